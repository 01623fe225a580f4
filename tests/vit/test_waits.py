"""Nothing in a training step reads a value from the device, or has a shape that depends on one: both wait for it."""

import pytest
import torch

import prunex
from tests.heads.heads import HEADS
from tests.heads.heads import attach as attach_head
from tests.vits import images, tiny
from tests.waits import Waits

TOKENS = {
    "topk": {},
    "evit": {},
    "dynamicvit": {},
    "ia_red2": {},
    "diffrate": {"keep_ratio": 0.7},
    "ppt": {"r": 3},
    "tome": {"r": 3},
    "hvt": {},
    "patch_slimming": {"keep": [range(12)] * 3},
}
# How many tokens the next blocks are to hold is what this method learns, and Python has to know.
ALLOWED = {"diffrate": {"prunex/pruners/diffrate.py:table tolist"}}
UNITS = ["xpruner", "taylor", "relevance", "magnitude", "random"]


def step(model, x, handle):
    loss = model(x).square().sum() + sum(handle.losses().values())
    if loss.requires_grad:
        loss.backward()


def check(model, handle, allowed=frozenset()):
    model.train()
    x = images(4)
    step(model, x, handle)  # what is looked at once, such as hooks and shapes, is looked at now
    with Waits() as waits:
        step(model, x, handle)
    assert set(waits.noted) <= allowed


@pytest.mark.parametrize("method", TOKENS)
def test_a_step_of_a_token_pruner(method):
    model = tiny()
    check(model, prunex.attach(model, method, **TOKENS[method]), ALLOWED.get(method, set()))


@pytest.mark.parametrize("method", UNITS)
def test_a_step_of_a_unit_pruner(method):
    model = tiny()
    check(model, prunex.attach(model, method, budget=0.7))


@pytest.mark.parametrize("name", HEADS)
def test_a_step_of_a_head_under_a_pruner(name):
    model = tiny()
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2))
    check(model, attach_head(model, name))


def test_what_waits_is_noticed():
    x = torch.arange(4.0)
    for act in (
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: bool(x.any()),
    ):
        with Waits() as waits:
            act()
        assert waits.noted
