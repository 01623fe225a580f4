"""Memory stays flat: monitors over many epochs, many explanations, many times attached and taken off again.

What counts is what is left after a warm-up: tensors alive, objects of ours, hooks, figures, threads, processes, open
files. The long ones also watch the resident memory; ``pytest -s -m slow tests/test_leaks.py`` prints the figures.
"""

import gc
import multiprocessing
import os
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from matplotlib import pyplot

import prunex
from prunex.callbacks import (
    FaithfulnessMonitor,
    KeptTokenMonitor,
    MaskPruning,
    RelevancyMonitor,
    TokenPruning,
    UnitMonitor,
)
from prunex.guidance import UnitGuidance
from tests.callbacks.modules import Plain, csv_logger, loader, trainer
from tests.explainers.quick import EXPLAINERS, explain
from tests.test_numbers import FEWEST
from tests.vits import assert_same_state, images, quick, state_of, tiny

MANY = pytest.mark.slow
UNITS = ("magnitude", "taylor", "relevance", "random", "xpruner")


def resident():
    """Resident memory in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def alive():
    """What must not become more: tensors and their bytes, our own objects, and what the process holds open."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if isinstance(o, torch.Tensor)]
    return {
        "tensors": len(tensors),
        "kilobytes": sum(t.numel() * t.element_size() for t in tensors if t.numel()) // 1024,
        "ours": sum(str(type(o).__module__).startswith("prunex") for o in objects),
        "threads": threading.active_count(),
        "processes": len(multiprocessing.active_children()),
        "files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        "figures": len(pyplot.get_fignums()),
    }


def check_flat(work, times, most=0.0, warm=3):
    """Do something many times: nothing stays behind.

    Args:
        work: Takes the number of the time.
        times: How often.
        most: MB that the resident memory may grow by, and Python's own by a tenth of it; 0: not looked at.
        warm: Times before it counts: caches fill, modules are imported.
    """
    for i in range(warm):
        work(i)
    before, memory = alive(), resident()
    first = 0
    if most:
        tracemalloc.start()
        work(warm)
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
    for i in range(warm + bool(most), warm + times):
        work(i)
    after = alive()
    more = {name: (before[name], now) for name, now in after.items() if now > before[name]}
    assert not more  # less is what others left and the collector found
    if most:
        now, grown = resident(), (tracemalloc.get_traced_memory()[0] - first) / 2**20
        tracemalloc.stop()
        print(f"\n{times} times: RSS {memory:.0f} -> {now:.0f} MB, Python's own {grown:+.2f} MB; {after}")
        assert now - memory < most
        assert grown < most / 10


@pytest.fixture(autouse=True)
def _no_tracing_left():
    yield
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------------------- explanations


@pytest.mark.parametrize(("times", "most"), [(len(EXPLAINERS), 0), pytest.param(500, 60, marks=MANY)])
def test_explanations(times, most):
    dense, small = tiny(), tiny()
    prunex.attach(small, "dynamicvit", keep_ratio=0.6)
    flags, x = state_of(small), images(1)

    def work(i):
        name = EXPLAINERS[i % len(EXPLAINERS)]
        e = explain(name, dense if most and i // len(EXPLAINERS) % 2 else small, x)
        e.overlay(np.zeros((1, 32, 32, 3), np.uint8))

    check_flat(work, times, most, warm=(2 if most else 1) * len(EXPLAINERS))
    assert_same_state(small, flags)


# ------------------------------------------------------------------------------------------------- attached, taken off


def attach_and_detach(method, train=True):
    """One cycle on a model that is there all the time."""
    model = tiny()

    def work(i):
        if method in UNITS:
            pruning = prunex.attach(model, method, budget=0.7)
            if method != "xpruner":
                pruning.calibrate([(images(2), torch.tensor([0, 1]))])
        else:
            pruning = prunex.attach(model, method, **FEWEST[method])
        logits = model.train()(images(2))
        losses = pruning.losses()
        (logits.sum() + sum(losses.values())).backward()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.eval()(images(2))
        prunex.slim(model)
        pruning.detach()

    return model, work


@pytest.mark.filterwarnings("ignore:xpruner has not chosen")
@pytest.mark.parametrize(("times", "most"), [(2, 0), pytest.param(50, 40, marks=MANY)])
@pytest.mark.parametrize("method", quick([*FEWEST, *UNITS], ["dynamicvit", "xpruner"]))
def test_attached_and_detached(method, times, most):
    model, work = attach_and_detach(method)
    before = state_of(model)
    check_flat(work, times, most, warm=2)
    assert_same_state(model.eval(), before)


@pytest.mark.parametrize(("times", "most"), [pytest.param(50, 40, marks=MANY)])
def test_units_removed_in_the_middle(times, most):
    """Narrowed for good, its optimiser with it: the wide weights are let go."""

    def work(i):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters())
        pruning = prunex.attach(model, "magnitude", budget=0.6)
        for step in range(2):
            model.train()(images(2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                pruning.calibrate()
                pruning.remove([optimizer])
        prunex.slim(model)

    check_flat(work, times, most, warm=2)


def test_relevance_of_units_lets_its_graph_go():
    """One a training step under RelevancyGuidance: rules that knew their graph kept every one of them."""
    model = tiny()
    prunex.attach(model, "xpruner", budget=0.7)
    guide = UnitGuidance(model)
    labels = torch.tensor([0, 1])
    check_flat(lambda i: guide(images(2), labels)["unit_guidance"].backward(), 2, warm=2)


# ------------------------------------------------------------------------------------------------------------ monitors


@pytest.mark.parametrize(("epochs", "most"), [(4, 0), pytest.param(200, 60, marks=MANY)])
def test_monitors(tmp_path, epochs, most):
    """A training with every monitor: its end holds no more than its middle."""
    found = []

    class Counted(TokenPruning):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch in (epochs // 2, epochs - 1):  # caches and the heap have settled by then
                found.append((alive(), resident()))

    callbacks = [
        Counted("evit", keep_ratio=0.6),
        MaskPruning("xpruner", budget=0.6, masks=1.0, thresholds=0.0),
        KeptTokenMonitor(images=2),
        RelevancyMonitor(["rollout"], images=2),
        UnitMonitor(images=2),
        FaithfulnessMonitor(["rollout"], ["deletion"], images=2),
    ]
    module = Plain(lr=1e-3)
    run = trainer(tmp_path, *callbacks, max_epochs=epochs, logger=csv_logger(tmp_path))
    run.fit(module, loader(4, 2), loader(4, 2, masks=True))
    (first, memory), (last, now) = found
    if most:
        print(f"\n{epochs} epochs: RSS {memory:.0f} -> {now:.0f} MB, {first} -> {last}")
        assert now - memory < most
    assert last == first
    assert len(list((tmp_path / "run" / "version_0" / "maps").iterdir())) == 5 * epochs + 1


@pytest.mark.parametrize("times", [pytest.param(20, marks=MANY)])
def test_trainings_one_after_another(tmp_path, times):
    """Trainers, modules and callbacks are let go, whatever was put round a module's methods."""

    def work(i):
        callbacks = [TokenPruning("dynamicvit", keep_ratio=0.6), KeptTokenMonitor(images=2)]
        module = Plain(lr=1e-3)
        trainer(tmp_path / str(i), *callbacks).fit(module, loader(4, 2), loader(2, 2))
        prunex.attached(module).detach()

    check_flat(work, times, warm=2)
