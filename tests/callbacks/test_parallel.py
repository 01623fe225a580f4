"""Two processes train as one does; what is written or watched is so once; and nobody waits for somebody who left."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

import prunex
from prunex import PrunexError
from prunex.callbacks import FaithfulnessMonitor, MaskPruning, RelevancyGuidance, SlimExport, TokenPruning
from tests.callbacks.modules import Plain, metrics, trainer
from tests.callbacks.parallel import LINEAR, TRAINED, processes, train

# In float32 sums are taken in another order. In bfloat16 that is the same tolerance where the batches are the same:
# every product is rounded to 8 bits, which hides the order of sums (the losses came out equal bit for bit). One batch
# of four instead of two of two is another product to round: those are compared in float32 alone.
TOLERANCE = 1e-5


def check_trained(folder, name, first, second):
    """Two processes' losses and weights are one process's."""
    method, _, precision = name.partition("@")
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    whole = method in LINEAR and not precision
    for way in ("parts", "whole") if whole else ("parts",):
        one = train(folder, method, way, precision=precision or "32-true")
        both = torch.stack([first["losses"], second["losses"]], 1)
        assert first["steps"] == one["steps"] == 6
        if way == "whole":
            assert torch.allclose(both.mean(1), one["losses"], rtol=TOLERANCE, atol=TOLERANCE)
        else:
            assert torch.allclose(both.flatten(), one["losses"], rtol=TOLERANCE, atol=TOLERANCE)
        for key, value in one["state"].items():
            assert torch.allclose(value.float(), first["state"][key].float(), rtol=1e-3, atol=1e-4), key
        assert len(one["losses"].unique()) > 10  # it did train


def check_watched(first, second):
    """Everything ran once, on rank zero, and spoke to nobody meanwhile."""
    kinds = ("KeptTokenMonitor", "RelevancyMonitor", "UnitMonitor", "FaithfulnessMonitor")
    assert [first["ran"].count(f"{kind}.watch") for kind in kinds] == [4] * 4
    assert "prunex.save" in first["ran"]
    assert second["ran"] == []
    assert first["inside"] == second["inside"] == []
    assert first["called"] == second["called"]  # the same ones, in the same order
    assert "all_reduce" in first["called"]
    assert first["folder"] == second["folder"]
    folder = Path(first["folder"])
    assert [p.name for p in folder.parent.iterdir()] == ["version_0"]
    names = [
        f"{n}-epoch={e:03d}.png" for n in ("kept_tokens", "relevancy", "units-classes", "units-heads") for e in range(4)
    ]
    names += [f"epoch={e:03d}.npz" for e in range(4)] + ["units-widths.png"]
    assert sorted(p.name for p in (folder / "maps").iterdir()) == sorted(names)
    for file, rows in (("faithfulness.csv", 4 * 3), ("units.csv", 4 * 5 * 4 * 3)):
        with open(folder / file, newline="") as table:
            assert len(list(csv.DictReader(table))) == rows, file
    assert {p.name for p in (folder / "slim").iterdir()} == {
        "README.md",
        "config.json",
        "model.pt2",
        "model.safetensors",
    }
    assert prunex.load(folder.parents[1] / "best" / "slim") is not None
    # means over the images of both processes, the last batches being smaller ones
    told = metrics(folder)
    shares = kept(first, second)
    for epoch in range(4):
        mean = torch.tensor(shares[epoch]).mean(0)
        for stage, wanted in enumerate(mean.tolist()):
            assert told[f"prunex/val_keep_ratio_stage{stage + 1}"][epoch] == pytest.approx(wanted, abs=1e-6)
    assert first["expected"] == second["expected"] == pytest.approx(torch.tensor(shares[3]).mean(0).tolist())
    # 24 images, 2 epochs of learning masks, every image seen by one of the processes
    assert sum(first["updates"]) == 48
    assert first["updates"] == second["updates"]
    assert 0 <= told["prunex/deletion/rollout"][0] <= 1


def kept(*processes):
    """What validation kept, by epoch: shares of each stage, a row an image."""
    found = {}
    for told in processes:
        for epoch, rows in told["kept"]:
            found.setdefault(epoch, []).extend(rows)
    return found


def check_stopped(first, second, late=False):
    """The one that had the image says which it was, the other that it was another, and neither waited long."""
    had, other = sorted((first["said"], second["said"]), key=lambda said: "of another process" in said)
    assert other == "the training loss of another process is not finite: it says more"
    assert "the training loss is nan at epoch 0, global step" in had
    assert f"of process {int(had == second['said'])}; " in had
    assert re.search(r"by image \(positions in the batch\): inputs of ([01]), logits of \1: clean", had)
    assert first["finite"] == second["finite"] == (not late)  # one step was taken meanwhile
    assert first["steps"] == second["steps"]
    assert max(first["seconds"], second["seconds"]) < 30


def test_two_processes(tmp_path):
    """The quick ones, in one group of processes."""
    found = processes(tmp_path, ["dynamicvit", "nan", "around"])
    check_trained(tmp_path / "one", "dynamicvit", *found["dynamicvit"])
    check_stopped(*found["nan"])
    for told in found["around"]:  # nobody steps, and nobody waits for the other
        assert "trains the VisionTransformer without the forward that evit prunes" in told["said"]
        assert told["still"]
        assert told["steps"] == 0


@pytest.mark.slow
def test_what_only_one_process_does(tmp_path):
    check_watched(*processes(tmp_path, ["watch"])["watch"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["", "@bf16-mixed"])
def test_all_that_train_differently(tmp_path, precision):
    names = [name + precision for name in TRAINED if name != "dynamicvit" or precision]
    for name, both in processes(tmp_path, names).items():
        check_trained(tmp_path / "one", name, *both)


@pytest.mark.slow
def test_processes_with_other_numbers_of_images(tmp_path):
    first, second = processes(tmp_path, ["uneven"])["uneven"]
    shares = torch.tensor(kept(first, second)[0])
    assert len(shares) == 10
    mean = pytest.approx(shares.mean(0).tolist())
    for told in (first, second):
        assert told["expected"] == mean
        assert [told["logged"][f"prunex/val_keep_ratio_stage{s + 1}"] for s in range(3)] == mean


@pytest.mark.slow
def test_a_tree_is_counted_over_the_images_of_all_processes(tmp_path):
    first, second = processes(tmp_path, ["tree"])["tree"]
    assert first["called"] == second["called"]
    assert first["inside"] == second["inside"] == []
    assert first["ran"] == ["HeadMonitor.watch"] * 2
    assert second["ran"] == []
    folder = Path(first["folder"])
    names = {p.name for p in (folder / "maps").iterdir()}
    assert names == {f"{kind}epoch=00{e}.{ending}" for kind, ending in (("head-", "png"), ("", "npz")) for e in (0, 1)}
    ends = np.bincount(first["leaf"] + second["leaf"], minlength=4)
    left, right = ends[:2].sum(), ends[2:].sum()
    with np.load(folder / "maps" / "epoch=001.npz", allow_pickle=False) as arrays:
        assert arrays["head/passed"].tolist() == [10, left, *ends[:2], right, *ends[2:]]
    told = metrics(folder)
    for name in ("soft", "hard", "classifier", "tree", "shuffled"):
        share = sum(count * shares[name] for count, shares in first["controls"] + second["controls"]) / 10
        assert told[f"prunex/val_tree_{name}"][-1] == pytest.approx(share, abs=1e-6)


@pytest.mark.slow
def test_both_stop_one_step_later(tmp_path):
    check_stopped(*processes(tmp_path, ["nan_late"])["nan_late"], late=True)


@pytest.mark.slow
def test_two_nodes(tmp_path):
    """One process each on two nodes of this machine: nothing else is needed."""
    found = processes(tmp_path, ["evit", "xpruner", "watch", "nan"], nodes=2)
    for name in ("evit", "xpruner"):
        check_trained(tmp_path / "one", name, *found[name])
    check_watched(*found["watch"])
    check_stopped(*found["nan"])


class Sharded(FSDPStrategy):
    """Lightning refuses the class itself where there is no GPU."""


class Stage3(DDPStrategy):
    """What DeepSpeed's strategy says of itself, whose package is no requirement."""

    zero_stage_3 = True


class Tensors(ModelParallelStrategy):
    """As it is among four processes that cut up each tensor by two."""

    device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}


@pytest.mark.parametrize(
    ("strategy", "callback"),
    [
        (Sharded, lambda: TokenPruning("evit")),
        (Sharded, lambda: MaskPruning("taylor")),
        (Stage3, lambda: RelevancyGuidance("rollout")),
        (Stage3, lambda: FaithfulnessMonitor(["rollout"])),
        (Tensors, lambda: SlimExport()),
    ],
)
def test_other_cuts_are_refused(tmp_path, strategy, callback):
    callback, module = callback(), Plain()
    run = trainer(tmp_path, callback, strategy=strategy())
    who = rf"{type(callback).__name__} cannot work under {strategy.__name__}"
    with pytest.raises(PrunexError, match=rf"{who}.*use strategy=ModelParallelStrategy\(data_parallel_size=1.*'ddp'"):
        callback.setup(run, module, "fit")
    assert not hasattr(module.vit, "prunex")


def test_what_does_not_follow_cut_weights_is_refused(tmp_path):
    class Whole(ModelParallelStrategy):
        device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 1)}

    average = StochasticWeightAveraging(1e-2)
    run = trainer(tmp_path, average, strategy=Whole())
    with pytest.raises(PrunexError, match="StochasticWeightAveraging keeps a copy .* use strategy='ddp'"):
        SlimExport().setup(run, Plain(), "fit")
    run = trainer(tmp_path, strategy=Whole())
    with pytest.raises(PrunexError, match="diffrate looks at its own parameters between forwards"):
        TokenPruning("diffrate").setup(run, Plain(), "fit")
