"""Nothing in a training step reads a value from the device, or has a shape that depends on one: both wait for it."""

from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prunex
from tests.heads.heads import HEADS
from tests.heads.heads import attach as attach_head
from tests.vits import images, tiny

# What .item(), .tolist(), bool() and float() of a tensor, nonzero, masked_select and unique are to the dispatcher.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
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
ALLOWED = {"diffrate": {"tolist"}}
UNITS = ["xpruner", "taylor", "relevance", "magnitude", "random"]


class Waits(TorchDispatchMode):
    """Notes operations that wait for the device."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __enter__(self):
        # These read memory without the dispatcher where it is the CPU's.
        self.patches = [patch.object(torch.Tensor, name, self.noting(name)) for name in ("tolist", "numpy", "cpu")]
        for each in self.patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *args):
        for each in self.patches:
            each.stop()
        return super().__exit__(*args)

    def noting(self, name):
        real = getattr(torch.Tensor, name)

        def noted(tensor, *args, **kwargs):
            self.noted.append(name)
            return real(tensor, *args, **kwargs)

        return noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in WAITING or any(i is not None and i.dtype == torch.bool for i in chosen):
            self.noted.append(str(func))
        return func(*args, **(kwargs or {}))


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
