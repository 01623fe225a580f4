"""Two processes: the same weights in both, files from one, and nobody waits for the other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import prunex
from tests.callbacks.modules import Plain, metrics
from tests.vits import images

ROOT = Path(__file__).parents[2]


def trained(tmp_path, method):
    """What two processes left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.callbacks.ddp_script", str(tmp_path), method]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["xpruner", "taylor"])
def test_two_processes_choose_the_same_units(tmp_path, method):
    first, second = trained(tmp_path, method)
    for name, p in first["state"].items():
        assert torch.equal(p, second["state"][name]), name
    assert not first["removed"]
    dense = prunex.cost(Plain().vit).macs
    assert first["macs"] == pytest.approx(0.6 * dense, rel=0.02)
    folder = Path(first["log_dir"])
    small = prunex.load(folder / "slim")
    assert prunex.cost(small).macs == first["macs"]
    assert (folder / "units.csv").is_file() == (method == "xpruner")
    assert len([k for k in metrics(folder) if k.startswith("prunex/loss")]) == (3 if method == "xpruner" else 0)


@pytest.mark.slow  # three processes that import everything
@pytest.mark.parametrize("method", ["dynamicvit", "evit", "patch_slimming"])
def test_two_processes(tmp_path, method):
    first, second = trained(tmp_path, method)
    assert first["log_dir"] == second["log_dir"]
    assert torch.equal(first["kept"], second["kept"])
    start = dict(Plain().named_parameters())
    for name, p in first["state"].items():
        assert torch.equal(p, second["state"][name]), name
        assert name not in start or name.endswith("norm.bias") or not torch.equal(p, start[name]), name
    run = Path(first["log_dir"])
    assert run == tmp_path / "run" / "version_0"
    assert [p.name for p in run.parent.iterdir()] == ["version_0"]
    assert sorted(p.name for p in (run / "maps").iterdir()) == sorted(
        f"{name}epoch={e:03d}.{end}"
        for e in (0, 1)
        for name, end in (("", "npz"), ("kept_tokens-", "png"), ("relevancy-", "png"))
    )
    with np.load(run / "maps" / "epoch=001.npz", allow_pickle=False) as maps:
        assert maps["images"].shape == (3, 32, 32, 3)
        assert {"kept", "relevance/tokentm"} <= set(maps.files)
    assert len(metrics(run)["prunex/keep_ratio_stage1"]) == 2
    assert len(list((run / "checkpoints").iterdir())) == 1
    small = prunex.load(run / "slim")
    with torch.no_grad():
        assert small(images()).isfinite().all()
