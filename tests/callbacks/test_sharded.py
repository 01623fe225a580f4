"""Processes that hold a part of every weight each train as one does, and what needs whole weights gets a copy."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import prunex
from prunex import PrunexError
from prunex.callbacks import load_from_checkpoint
from tests.callbacks.modules import Plain, metrics
from tests.callbacks.parallel import ROOT, TRAINED, processes, train
from tests.callbacks.sharded import SCRIPT, checkpoint
from tests.callbacks.sharded import slim as train_slim
from tests.callbacks.test_parallel import TOLERANCE, check_watched
from tests.recipes.interrupted import WHEN, callback, write_config

sharded = partial(processes, script=SCRIPT, timeout=240)


def check_trained(folder, name, found, count=2):
    """Losses and weights are those of one process that takes the same batches in turn."""
    one = train(folder, name.partition("#")[0], "parts", count=count)
    both = torch.stack([told["losses"] for told in found], 1).flatten()
    assert torch.allclose(both, one["losses"], rtol=TOLERANCE, atol=TOLERANCE), (name, both - one["losses"])
    assert [told["steps"] for told in found] == [one["steps"]] * count
    assert len(one["losses"].unique()) > 10
    assert found[0]["state"].keys() == one["state"].keys()
    for key, value in one["state"].items():
        assert torch.allclose(value.float(), found[0]["state"][key].float(), rtol=1e-3, atol=1e-4), (name, key)
    assert not any(told["state"] for told in found[1:])


def test_two_processes(tmp_path):
    """The quick ones: a pruner without parameters, what is refused, and the core's doors by hand."""
    found = sharded(tmp_path, ["evit", "refused", "by_hand"])
    check_trained(tmp_path / "one", "evit", found["evit"])
    for told in found["refused"]:
        assert "cut up among processes: attach before fully_shard" in told["late"]
        assert "make it in __init__ and shard it in configure_model" in told["guidance"]
        assert "calibrate before fit" in told["patch_slimming"]
        assert "correct='bias' would write them anew" in told["corrected"]
        for name in ("self", "units", "diffrate"):
            assert "use strategy='ddp'" in told[name]
        assert "17 tokens are more than max_tokens=4" in told["explainer"]  # said by process 0, and raised by both
    first, second = found["by_hand"]
    for told in (first, second):
        assert "attach before fully_shard" in told["attach"]
        for door in ("explain", "slim", "calibrate"):
            assert "call prunex.whole(model) in every process" in told[door]
        assert told["same"]
    assert (first["none"], second["none"]) == (False, True)
    assert first["copied"]
    assert (first["kinds"], first["left"]) == (["Tensor"], [])
    module = Plain(lr=0.02).eval()
    prunex.attach(module, "evit", keep_ratio=0.6)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    assert torch.equal(prunex.explain("rollout", module, images).maps, first["maps"])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_all_that_train_differently(tmp_path, count):
    """Four processes for what the issue of several is about; two for the rest."""
    few = ["evit", "topk", "dynamicvit", "xpruner", "guidance"]
    left_out = {"unit_guidance", "diffrate", "diffmask"}
    names = few if count == 4 else [n for n in TRAINED if n not in left_out]
    names += [] if count == 4 else ["concept_transformer#nested", "vit_net#nested"]
    for name, told in sharded(tmp_path, names, count=count).items():
        check_trained(tmp_path / "one", name, told, count)


@pytest.mark.slow
def test_made_and_attached_before_it_is_sharded(tmp_path):
    check_trained(tmp_path / "one", "evit", sharded(tmp_path, ["first"])["first"])


@pytest.mark.slow
def test_what_only_one_process_does(tmp_path):
    """Monitors and exports take the whole weights from all, then nobody speaks until process 0 is through."""
    check_watched(*sharded(tmp_path, ["watch"])["watch"])


@pytest.mark.slow
def test_a_tree_is_watched(tmp_path):
    first, second = sharded(tmp_path, ["tree"])["tree"]
    assert first["called"] == second["called"]
    assert first["inside"] == []
    assert (first["ran"], second["ran"]) == (["HeadMonitor.watch"] * 2, [])
    assert len(metrics(first["folder"])["prunex/val_tree_soft"]) == 2
    assert len(list(Path(first["folder"], "maps").glob("head-epoch=*.png"))) == 2


@pytest.mark.slow
def test_slim_models_and_failures(tmp_path):
    found = sharded(tmp_path, ["slim", "broken"])
    train_slim(tmp_path / "one")
    one, two = (load_file(tmp_path / name / "slim" / "model.safetensors") for name in ("one", "slim"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=1e-4, atol=1e-5), key
    images = torch.randn(3, 3, 32, 32)
    small = [prunex.load(tmp_path / name / "slim") for name in ("one", "slim", "slim/best")]
    assert torch.allclose(small[0](images), small[1](images), rtol=1e-4, atol=1e-4)
    first, second = found["broken"]
    assert first["said"] == "RuntimeError: no picture today"
    assert second["said"] == "PrunexError: process 0 ended with RuntimeError: no picture today"
    assert max(first["seconds"], second["seconds"]) < 60


@pytest.mark.slow
@pytest.mark.parametrize("parts", [False, True])
def test_checkpoints_open_in_other_numbers_of_processes(tmp_path, parts):
    lone = tmp_path / "one" / "end.ckpt"  # of one process; what it goes on to in one is what all go on to
    checkpoint(lone.parent)
    wanted = {count: checkpoint(tmp_path / f"to{count}", 2, count=count, start=lone)["losses"] for count in (2, 4)}
    assert not torch.allclose(wanted[2], wanted[4], atol=1e-2)
    sharded(tmp_path, ["save"], parts=parts)
    written = tmp_path / "save" / "end.ckpt"
    assert written.is_dir() == parts
    for count, start in ((4, written), (2, written if parts else lone)):
        folder = tmp_path / f"from{count}"
        folder.mkdir()
        (shutil.copytree if start.is_dir() else shutil.copy)(start, folder / "start.ckpt")
        told = sharded(folder, ["go_on"], count=count, parts=parts)["go_on"]
        every = torch.stack([each["losses"] for each in told], 1).flatten()
        assert torch.allclose(every, wanted[count], rtol=TOLERANCE, atol=TOLERANCE)
    if parts:
        with pytest.raises(PrunexError, match="consolidate_checkpoint"):
            load_from_checkpoint(Plain, str(written))
        folder, written = written, tmp_path / "parts.ckpt"
        command = [sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(folder)]
        subprocess.run([*command, "--output_file", str(written)], check=True, capture_output=True, timeout=120)
    else:
        one = checkpoint(tmp_path / "single", 2, start=written)["losses"]
        assert torch.allclose(one, wanted[2], rtol=TOLERANCE, atol=TOLERANCE)
    module, same = (load_from_checkpoint(Plain, str(path)).state_dict() for path in (written, lone))
    for key, value in same.items():
        assert torch.allclose(module[key].float(), value.float(), rtol=1e-3, atol=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("parts", [False, True])
def test_inside_an_epoch(tmp_path, parts):
    for found in sharded(tmp_path, ["inside"], parts=parts)["inside"]:
        assert found["folder"] == parts
        assert found["same"]
        assert found["cut"] > 20
        assert found["broken"] == found["seen"][: len(found["broken"])]
        # Written after the fourth of ten batches of the second epoch; it broke in the sixth.
        assert found["rest"] == found["seen"][14:]


CLI = """
import os
if os.environ["RANK"] == "0":
    os.environ.pop("PRUNEX_TEST_INTERRUPT", None)  # one process alone is killed
from prunex.recipes.commands.cli import main
main()
"""


def fit(folder, *more, when=None):
    """``prunex fit`` under torchrun, by two processes that cut the weights up: its exit code."""
    script = folder / "cli.py"
    script.write_text(CLI)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | ({WHEN: when} if when else {})
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [*run, "--rdzv-endpoint", "localhost:0", str(script), "fit", "--config", str(folder / "fit.yaml"), *more]
    with open(folder / "log", "w") as log:
        return subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=100, check=False).returncode


@pytest.mark.slow
def test_the_command_goes_on_after_one_process_was_killed(tmp_path):
    """Checkpoints are folders here, and the module is the one that shards itself."""
    for name in ("whole", "killed"):
        tokens = callback("TokenPruning", method="dynamicvit", keep_ratio=0.7, stages=[1, 2])
        path = write_config(tmp_path / name, [tokens, callback("SlimExport", formats=[])])
        config = yaml.safe_load(path.read_text())
        sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        strategy = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": sizes}
        config["trainer"] |= {"devices": 2, "strategy": strategy}
        path.write_text(yaml.safe_dump(config | {"seed_everything": 1}))
    assert fit(tmp_path / "whole") == 0, (tmp_path / "whole" / "log").read_text()[-3000:]
    assert fit(tmp_path / "killed", when="40 kill") != 0
    run = tmp_path / "killed" / "run" / "version_0"
    assert (run / "checkpoints" / "last.ckpt").is_dir()
    assert not (run / "slim").exists()
    assert fit(tmp_path / "killed", "--ckpt_path", "last") == 0, (tmp_path / "killed" / "log").read_text()[-3000:]
    assert "going on from" in (tmp_path / "killed" / "log").read_text()
    whole = tmp_path / "whole" / "run" / "version_0"
    assert [p.name for p in run.parent.iterdir()] == ["version_0"]
    assert metrics(run)["train_loss_epoch"] == metrics(whole)["train_loss_epoch"]
    one, two = (load_file(folder / "slim" / "model.safetensors") for folder in (whole, run))
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
