"""Running aside: each module's own flag comes back, whoever else runs the model meanwhile."""

import threading

import pytest
import torch

import prunex
from prunex.vit.aside import as_found
from tests.vits import tiny


def flags(model):
    return [m.training for m in model.modules()]


def test_the_last_to_leave_gives_the_flags_back():
    model = tiny().train()
    model.blocks[0].eval()
    before = flags(model)
    first, second = as_found(model, train=False), as_found(model.blocks, train=False)
    second.__enter__()
    first.__enter__()
    second.__exit__(None, None, None)
    assert not any(flags(model))
    first.__exit__(None, None, None)
    assert flags(model) == before
    with pytest.raises(KeyError), as_found(model, train=False):
        raise KeyError
    assert flags(model) == before


def test_threads_that_explain_one_model_in_training_get_its_maps_without_dropout():
    model = tiny(proj_drop_rate=0.5).train()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted, inside, left = prunex.explain("tokentm", model, images).maps, threading.Event(), threading.Event()

    def stays(module, inputs):
        # The other thread comes, explains and goes while this one is in the middle.
        if threading.current_thread() is slow and not inside.is_set():
            inside.set()
            assert left.wait(30)

    found = {}

    def explain(name):
        found[name] = prunex.explain("tokentm", model, images).maps

    model.blocks[1].norm1.register_forward_pre_hook(stays)
    slow = threading.Thread(target=explain, args=("slow",))
    early = as_found(model, train=False)
    early.__enter__()
    slow.start()
    assert inside.wait(30)
    early.__exit__(None, None, None)
    explain("other")
    left.set()
    slow.join()
    assert torch.equal(found["slow"], wanted)
    assert torch.equal(found["other"], wanted)
    assert all(flags(model))
