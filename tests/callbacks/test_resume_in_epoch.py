"""ExactResume inside an epoch: no step twice, bit for bit, where the loader knows where it stands."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from prunex import PrunexError
from prunex.callbacks import ExactResume, SafeCheckpointIO, TokenPruning
from tests.callbacks.modules import csv_logger, loader, snapshot, trainer
from tests.callbacks.test_exact_resume import Augmented, Break, Dropping


class Stateful:
    """Batches in an order that is drawn when an epoch begins; where it stands is its order and a number."""

    def __init__(self, images=40):
        self.data, self.order, self.at, self.loaded = Augmented(images), [], 0, False

    def __len__(self):
        return len(self.data) // 4

    def __iter__(self):
        if not self.loaded:
            self.order, self.at = torch.randperm(len(self.data)).tolist(), 0
        self.loaded = False
        torch.rand(3)  # as a loader that seeds its workers
        while self.at < len(self):
            some = self.order[4 * self.at : 4 * self.at + 4]
            self.at += 1
            yield tuple(map(torch.stack, zip(*(self.data[n] for n in some), strict=True)))

    def state_dict(self):
        return {"order": list(self.order), "at": self.at}

    def load_state_dict(self, state):
        self.order, self.at, self.loaded = list(state["order"]), state["at"], True


class Steps(L.Callback):
    """What each step saw, and what it drew."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, float(batch[0].sum())))


def fit(folder, *callbacks, checkpoint=None, seed=0, loaders=Stateful, every=2, **kwargs):
    L.seed_everything(seed, verbose=False)
    module = Dropping(optimiser="adamw", lr=1e-3)
    plugins = [SafeCheckpointIO()]
    run = trainer(
        folder, ExactResume(every_n_steps=every), *callbacks, max_epochs=3, logger=csv_logger(folder),
        enable_checkpointing=True, plugins=plugins, **kwargs,
    )  # fmt: skip
    # Made now: samplers may have generators that they seed when they are made.
    run.fit(module, loaders(), loader(8), ckpt_path=checkpoint)
    return module


def last(folder):
    return folder / "run" / "version_0" / "checkpoints" / "last.ckpt"


def compare(tmp_path, moment, make, pruning=(), **kwargs):
    """A run that broke after a batch of an epoch, and went on, beside one that nothing happened to."""
    whole, broken, rest = Steps(), Steps(), Steps()
    wanted = fit(tmp_path / "whole", whole, *(TokenPruning(*a, **k) for a, k in pruning), loaders=make, **kwargs)
    wanted = snapshot(wanted)
    with pytest.raises(KeyError, match="broken"):
        fit(
            tmp_path / "parts", broken, Break(*moment), *(TokenPruning(*a, **k) for a, k in pruning), loaders=make,
            **kwargs,
        )  # fmt: skip
    saved = torch.load(last(tmp_path / "parts"), weights_only=True)["global_step"]
    # Another seed: what the run began with is in the checkpoint.
    again = fit(
        tmp_path / "again", rest, *(TokenPruning(*a, **k) for a, k in pruning), loaders=make, seed=7,
        checkpoint=last(tmp_path / "parts"), **kwargs,
    )  # fmt: skip
    assert broken.seen == whole.seen[: len(broken.seen)]
    assert rest.seen == whole.seen[len(whole.seen) - len(rest.seen) :]
    assert all(torch.equal(p, wanted[n]) for n, p in again.named_parameters())
    return saved, whole.seen, broken.seen, rest.seen


@pytest.mark.parametrize("moment", [(0, 4), (1, 5), (2, 7)])
def test_training_goes_on_at_the_next_batch(tmp_path, moment):
    saved, whole, broken, rest = compare(tmp_path, moment, Stateful)
    epoch, batch = moment
    # Written after every second step: of ten batches an epoch, the last such one before it broke.
    assert saved == 10 * epoch + (batch + 1) // 2 * 2 - (2 if (batch + 1) % 2 == 0 else 0)
    assert len(rest) == len(whole) - saved


def test_gradients_in_the_air_are_not_left_behind(tmp_path):
    saved, whole, _, rest = compare(tmp_path, (1, 6), Stateful, every=1, accumulate_grad_batches=3)
    assert len(rest) == len(whole) - 10 - 6


@pytest.mark.parametrize("method", ["topk", "dynamicvit"])
def test_under_a_pruner(tmp_path, method):
    compare(tmp_path, (1, 5), Stateful, [((method,), {"keep_ratio": 0.6})])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_torchdatas_loader(tmp_path, workers):
    stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        context = "fork" if workers else None
        options = {"shuffle": True, "num_workers": workers, "multiprocessing_context": context}
        return stateful_dataloader.StatefulDataLoader(Augmented(40), 4, **options)

    saved, whole, _, rest = compare(tmp_path, (1, 5), make)
    assert len(rest) == len(whole) - saved


def test_other_loaders_go_on_from_the_epochs_beginning_and_that_is_said_once(tmp_path):
    def make():
        return DataLoader(Augmented(40), 4, shuffle=True)

    with pytest.warns(UserWarning, match="writes between epochs alone: the training loader does not know") as said:
        saved, _, _, rest = compare(tmp_path, (1, 5), make)
    assert (saved, len(rest)) == (10, 20)
    assert sum("writes between epochs alone" in str(w.message) for w in said) == 3  # one a fit


def own_generator():
    """A loader whose order comes from a generator of its own."""
    return DataLoader(Augmented(40), 4, shuffle=True, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("make", [Stateful, own_generator])
def test_between_epochs_the_next_one_begins(tmp_path, make):
    saved, _, _, rest = compare(tmp_path, (2, 5), make, every=None)
    assert (saved, len(rest)) == (20, 10)


def test_bad_options():
    with pytest.raises(PrunexError, match="every_n_steps=0"):
        ExactResume(every_n_steps=0)


def test_generators_go_on():
    from prunex.callbacks.generators import generators, set_generators

    def draw():
        return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))  # noqa: NPY002

    random.gauss(0, 1)
    np.random.randn()  # noqa: NPY002  (half of a pair waits)
    states = generators()
    wanted = draw()
    draw()
    set_generators(states)
    assert draw() == wanted
