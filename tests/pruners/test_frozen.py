"""Calibration looks at a model: frozen parameters stay bit for bit, the others too unless a method says it tunes."""

import math

import pytest
import torch

import prunex
from prunex import PrunexError
from tests.vits import images, tiny

TUNES = ("patch_slimming",)
METHODS = [m.name for m in prunex.methods("pruner")]
X = images(4)


def weights(model):
    return {k: p.clone() for k, p in model.named_parameters() if not k.startswith("prunex")}


def calibrated(name, model):
    """Attach a method and let it look at images, however it does."""
    try:
        pruning = prunex.attach(model, name)
    except PrunexError:  # one that needs something trained
        return None
    for given in ((X,), ([(X, torch.arange(4))],)):
        try:
            return pruning.calibrate(*given)
        except PrunexError:
            continue
    return None


@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_stay(name):
    model = tiny(depth=2).requires_grad_(False)
    before = weights(model)
    calibrated(name, model)
    after = weights(model)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not any(p.requires_grad for k, p in model.named_parameters() if k in before)


@pytest.mark.parametrize("name", [m for m in METHODS if m not in TUNES])
def test_so_do_the_others(name):
    model = tiny(depth=2)
    before = weights(model)
    calibrated(name, model)
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())


@pytest.mark.parametrize("name", ["magnitude", "random", "taylor", "relevance", "patch_slimming"])
def test_these_are_really_calibrated(name):
    assert calibrated(name, tiny(depth=2)) is not None


def test_adaptive_counts_look_and_leave():
    model = tiny()
    before = weights(model)
    prunex.attach(model, "topk", keep_ratio=0.5, count="adaptive").calibrate(X)
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())


def test_patch_slimming_tunes_what_is_free_alone():
    model = tiny(depth=3)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("blocks.1.mlp") or name.endswith("norm1.bias"))
    before = weights(model)
    prunex.attach(model, "patch_slimming", tolerance=math.inf, epochs=1, learning_rate=1e-2).calibrate(X)
    moved = {k for k, p in weights(model).items() if not torch.equal(p, before[k])}
    assert moved
    assert all(model.get_parameter(k).requires_grad for k in moved)
    assert "blocks.0.norm1.bias" in moved


def test_patch_slimming_under_frozen_half_precision():
    model = tiny(depth=2).requires_grad_(False).bfloat16()
    before = weights(model)
    prunex.attach(model, "patch_slimming", epochs=1, learning_rate=1e-1).calibrate(X)
    assert all(torch.equal(p, before[k]) for k, p in weights(model).items())
