"""The campaign for a GPU, small and on the CPU: everything in it can be built, timed and told."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def campaign(*arguments):
    """In a process of its own: compilers and FlexAttention leave one in which no test may fork any more."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow  # half a minute
def test_all_parts_run_and_are_written(tmp_path):
    done = campaign("--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    rows = written["rows"]
    assert {row["part"] for row in rows} == {"slim", "train", "explain", "scores", "attention"}
    # FlexAttention has no backward on a CPU, and is told so; all else is measured, Triton by its interpreter.
    triton = importlib.util.find_spec("triton") is not None
    assert {row["name"] for row in rows if "error" in row} == {"flex"} | (set() if triton else {"triton"})
    assert all(row["ms"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows if "error" not in row)
    slim = {row["name"]: row["macs"] for row in rows if row["part"] == "slim"}
    assert slim["dense"] == 1
    assert all(0.5 < slim[method] < 0.8 for method in ("evit", "topk", "tome"))
    errors = {row["name"]: row["largest_error"] for row in rows if row["part"] == "attention" and "error" not in row}
    assert errors["no policy"] is None
    assert 0 < errors["value columns"] < 1e-5
    assert 0 < errors["bias"] < 1e-5
    if triton:
        assert 0 < errors["triton"] < 1e-5
    assert written["machine"]["attention"] == "value columns"  # an interpreter is not the fastest
    text = (tmp_path / "gpu.md").read_text()
    assert "**attention: B 2, H 2, N 17, d 16, forward and backward**" in text
    assert text.strip() in done.stdout
    assert set(written["machine"]["seconds"]) == {"slim", "train", "explain", "scores", "attention"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_what_to_do():
    done = campaign()
    assert done.returncode == 1
    assert "no CUDA device here: --dry" in done.stderr
