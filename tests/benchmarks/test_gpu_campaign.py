"""The campaign for a GPU, small and on the CPU: everything in it can be built, timed and told."""

import importlib
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def campaign(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("gpu")
    yield module
    for name in ("gpu", "explainers", "train_step", "measure"):
        sys.modules.pop(name, None)


def test_all_parts_run_and_are_written(campaign, tmp_path, capsys):
    campaign.main(["--dry", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "gpu.json").read_text())
    rows = written["rows"]
    assert {row["part"] for row in rows} == {"slim", "train", "explain", "scores", "attention"}
    # FlexAttention has no backward on a CPU, and is told so; all else is measured.
    assert {row["name"] for row in rows if "error" in row} == {"flex"}
    assert all(row["ms"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows if "error" not in row)
    slim = {row["name"]: row["macs"] for row in rows if row["part"] == "slim"}
    assert slim["dense"] == 1
    assert all(0.5 < slim[method] < 0.8 for method in ("evit", "topk", "tome"))
    errors = {row["name"]: row["largest_error"] for row in rows if row["part"] == "attention" and "error" not in row}
    assert errors["no policy"] is None
    assert 0 < errors["value columns"] < 1e-5
    assert 0 < errors["bias"] < 1e-5
    text = (tmp_path / "gpu.md").read_text()
    assert "**attention: B 2, H 2, N 17, d 16, forward and backward**" in text
    assert text.strip() in capsys.readouterr().out
    assert set(written["machine"]["seconds"]) == {"slim", "train", "explain", "scores", "attention"}


def test_without_a_gpu_it_says_what_to_do(campaign, monkeypatch):
    monkeypatch.setattr(campaign.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here: --dry"):
        campaign.main([])
