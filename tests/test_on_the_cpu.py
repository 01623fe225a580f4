"""What a GPU is to show, on the CPU as far as that goes: so that tests/test_gpu.py is known to be right but for it."""

from contextlib import nullcontext

import pytest

from tests.callbacks.every import CASES
from tests.on_any_device import TOKEN_PRUNERS, compiles, resumes, runs_beside_itself, trains
from tests.vits import quick


@pytest.mark.parametrize("name", quick(CASES, ["dynamicvit", "xpruner"]))
def test_every_callback_trains_in_bf16(tmp_path, name):
    trains(tmp_path, name, "cpu", "bf16-mixed")


@pytest.mark.parametrize("name", quick(CASES, ["guided tokens"]))
def test_every_callback_goes_on_bit_for_bit(tmp_path, name):
    resumes(tmp_path, name, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("method", TOKEN_PRUNERS)
def test_every_token_pruner_compiles(method):
    compiles(method, TOKEN_PRUNERS[method], "cpu", "aot_eager")


@pytest.mark.parametrize("method", quick(TOKEN_PRUNERS, ["evit"]))
def test_every_token_pruner_runs_beside_itself(method):
    runs_beside_itself(method, TOKEN_PRUNERS[method], "cpu", [nullcontext(), nullcontext()])
