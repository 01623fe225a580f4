"""The Triton kernel of attention under a policy, in Triton's interpreter: output and gradients against float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which torch's wheels for Linux bring along")
ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: what of Triton is imported before the interpreter is switched on cannot be interpreted.
SCRIPT = """
import json
import sys
import torch
from gpu import by_definition, differences, results
from policy_kernel import fused

def compared(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    b, h, n, d = 2, 2, 70, 16  # more than one block of keys, and no multiple
    q, k, v, r = (torch.randn(b, h, n, d, generator=generator) for _ in range(4))
    policy = (torch.rand(b, n, generator=generator) > 0.4).float()
    policy[:, 0], policy[:, 1] = 1, 0.5
    if kind == "all":
        policy = torch.ones(b, n)
    if kind == "none":
        policy = torch.zeros(b, n)  # each token sees itself alone
    if kind == "far":
        policy[:, 2] = 0
        k[:, :, 2] = 30 * q.mean(2)  # a dropped key far above the kept ones
    q, k, v, r = (t.to(getattr(torch, dtype)) for t in (q, k, v, r))
    exact = results(by_definition, *(t.double() for t in (q, k, v, policy, r)))
    return differences(results(fused, q, k, v, policy, r), exact, None)

print(json.dumps([compared(*case.split()) for case in sys.argv[1:]]))
"""


def largest(*cases):
    """The largest differences of outputs and of gradients, case by case."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_exact_to_the_rounding_of_bfloat16():
    ((output, gradients),) = largest("some bfloat16")
    assert 0 < output < 2e-2  # outputs up to 2, of which bfloat16 tells 1 / 128 apart
    assert 0 < gradients < 2e-2


@pytest.mark.slow
def test_exact_in_float32_and_float16():
    wanted = {
        "some float32": 2e-6,
        "all float32": 2e-6,
        "none float32": 5e-4,  # gradients of queries and keys are 0, and rounding is told over 0.01
        "far float32": 2e-5,
        "some float16": 3e-3,
    }
    for case, both in zip(wanted, largest(*wanted), strict=True):
        assert 0 <= max(both) < wanted[case], case
