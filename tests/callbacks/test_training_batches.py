"""What calibration sees is what the first training steps give the ViT, and the training goes on as without a look."""

import multiprocessing
import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import prunex
from prunex import PrunexError
from prunex.callbacks import MaskPruning, TokenPruning
from prunex.callbacks.training_batches import training_batches
from tests.callbacks.modules import Plain, data, trainer

X, Y = data(8)
BYTES = (X.abs() * 60).clamp(0, 255).to(torch.uint8)


class Look(L.Callback):
    """What a look when training starts finds, and what the steps then give the ViT."""

    def __init__(self, batches=None):
        self.batches = batches
        self.found, self.entered = [], []

    def on_train_start(self, trainer, pl_module):
        if self.batches:
            with training_batches(trainer, pl_module, pl_module.vit) as walk:
                self.found = [found for found, _ in zip(walk, range(self.batches), strict=False)]
        note = lambda m, args: self.entered.append(args[0].detach().clone())  # noqa: E731
        self.handle = pl_module.vit.patch_embed.register_forward_pre_hook(note)

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()


class Data(L.LightningDataModule):
    def __init__(self, *columns, **options):
        super().__init__()
        self.columns, self.options = columns or (X, Y), {"batch_size": 4} | options

    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.columns), **self.options)


class AfterInData(Data):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].float() / 255 - 0.5, batch[1]


class BeforeAndMove(Data):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {"image": batch[0] * 2, "label": batch[1], "seen": torch.arange(len(batch[1]))}

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return [batch["image"] + 1, batch["label"]]


class HookInModule(Plain):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].float() * 3 + 1, batch[1]


class InStep(Plain):
    def training_step(self, batch, batch_idx):
        self.log("seen", 1.0)
        return super().training_step([batch[0].float() / 255 + batch_idx, batch[1]], batch_idx)


class InForward(Plain):
    def __init__(self):
        super().__init__()
        self.before = nn.BatchNorm2d(3, affine=False)

    def forward(self, x):
        return super().forward(self.before(x))


class TwoViews(Plain):
    def training_step(self, batch, batch_idx):
        (first, second), labels = batch
        self(first)
        return F.cross_entropy(self(second), labels)


class Pairs(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return (X[i] + 1, X[i]), Y[i]


class Teacher(Plain):
    """Runs a frozen network of its own before the ViT, and takes only a batch."""

    def training_step(self, batch):
        return F.cross_entropy(self(F.interpolate(batch[0][:, :, 4:-4, 4:-4], size=32)), batch[1])


class Fetches(Plain):
    def training_step(self, dataloader_iter):
        batch, index, _ = next(dataloader_iter)
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("module", "loaders", "options"),
    [
        (Plain, Data, {}),
        (Plain, lambda: AfterInData(BYTES, Y), {}),
        (HookInModule, lambda: AfterInData(BYTES, Y), {}),  # the data module's wins
        (HookInModule, lambda: Data(BYTES, Y), {}),
        (Plain, BeforeAndMove, {}),
        (Plain, Data, {"precision": "64-true"}),
        (InStep, lambda: Data(BYTES, Y), {}),
        (InForward, Data, {}),
        (Teacher, Data, {}),
        (Fetches, Data, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*have overridden.*")
@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*")
def test_a_look_finds_what_the_first_steps_give_the_vit(tmp_path, module, loaders, options):
    look, module = Look(2), module()
    trainer(tmp_path, look, **options).fit(module, datamodule=loaders())
    assert len(look.entered) == len(look.found) == 2
    for found, entered in zip(look.found, look.entered, strict=True):
        assert found["images"].dtype == entered.dtype
        assert torch.equal(found["images"], entered)
    assert torch.equal(torch.cat([found["labels"] for found in look.found]), Y)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_loaders_are_combined_as_the_trainer_does(tmp_path, mode):
    class Second(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["b"], batch_idx)

    look = Look(2)
    loaders = {"a": DataLoader(TensorDataset(X, Y), 4), "b": DataLoader(TensorDataset(-X, Y), 4)}
    trainer(tmp_path, look).fit(Second(), CombinedLoader(loaders, mode))
    assert torch.equal(torch.cat([found["images"] for found in look.found]), torch.cat(look.entered[:2]))
    # Which loader's labels are those of the images is not guessed.
    assert "may both be meant" in look.found[0].unclear["labels"]


def test_of_several_views_the_one_that_enters_first(tmp_path):
    look = Look(2)
    trainer(tmp_path, look).fit(TwoViews(), DataLoader(Pairs(), 4))
    assert torch.equal(torch.cat([found["images"] for found in look.found]), X + 1)
    assert torch.equal(look.found[1]["labels"], Y[4:])


class Noisy(Data):
    """Draws from every generator there is, in hooks and in the loader's own."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.drawn = random.random() + float(np.random.rand()) + torch.rand(())  # noqa: NPY002
        return batch[0] + self.drawn, batch[1]


class Turns(torch.utils.data.Sampler):
    """Shuffles its own list in place, by a generator of its own."""

    def __init__(self):
        self.order, self.numpy = list(range(8)), np.random.default_rng(1)

    def __len__(self):
        return 8

    def __iter__(self):
        self.numpy.shuffle(self.order)
        return iter(self.order)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"shuffle": True},
        lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(5)},
        lambda: {"sampler": Turns()},
        lambda: {"batch_sampler": torch.utils.data.BatchSampler(Turns(), 4, False), "batch_size": 1},
        lambda: {"shuffle": True, "num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"},
    ],
)
def test_the_training_goes_on_as_without_a_look(tmp_path, options):
    runs = []
    for batches in (None, 1):
        L.seed_everything(7, verbose=False)
        look, module = Look(batches), InForward()
        trainer(tmp_path, look, max_epochs=2).fit(module, datamodule=Noisy(**options()))
        runs.append((look, module.state_dict()))
    (plain, wanted), (looked, found) = runs
    assert len(looked.found) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.entered, looked.entered, strict=True))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_no_worker_outlives_a_look(tmp_path):
    class Counts(Look):
        def on_train_start(self, trainer, pl_module):
            before = {p.pid for p in multiprocessing.active_children()}
            super().on_train_start(trainer, pl_module)
            self.left = {p.pid for p in multiprocessing.active_children()} - before

    look = Counts(1)
    trainer(tmp_path, look).fit(Plain(), datamodule=Data(num_workers=2, multiprocessing_context="fork"))
    assert look.left == set()
    assert torch.equal(look.found[0]["images"], X[:4])


def test_nothing_is_logged_and_weights_move_as_before(tmp_path):
    class Toggles(Plain):
        def training_step(self, batch, batch_idx):
            self.log("before", 1.0)
            self.vit.head.requires_grad_(False)
            loss = super().training_step(batch, batch_idx)
            self.vit.head.requires_grad_(True)
            return loss

    class After(Look):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.state = (
                dict(trainer.logged_metrics),
                pl_module.vit.head.weight.requires_grad,
                vars(pl_module).get("log"),
            )

    look = After(2)
    trainer(tmp_path, look).fit(Toggles(), datamodule=Data())
    assert look.state == ({}, True, None)
    assert len(look.found) == 2


def test_what_can_be_walked_only_once_is_refused(tmp_path):
    loader = DataLoader(TensorDataset(X, Y), 4)
    with pytest.raises(
        PrunexError, match="are a generator that can be walked only once: give a DataLoader, or calibrate"
    ):
        trainer(tmp_path, Look(1)).fit(Plain(), (batch for batch in loader))


def test_a_step_that_cannot_be_followed_is_told_once(tmp_path):
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            if self.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
                raise RuntimeError("not started")
            return super().training_step(batch, batch_idx)

    look = Look(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, look).fit(Fails(), datamodule=Data())
    told = [str(w.message) for w in caught if "could not be followed" in str(w.message)]
    assert len(told) == 1
    assert told[0].endswith(r"it raised RuntimeError (not started)")
    assert torch.equal(torch.cat([found["images"] for found in look.found]), X)


def test_masks_are_calibrated_on_what_training_sees(tmp_path):
    module, wanted = Plain(), Plain()
    trainer(tmp_path, MaskPruning("taylor", budget=0.7, images=8, remove=False)).fit(
        module, datamodule=AfterInData(BYTES, Y)
    )
    by_hand = prunex.attach(wanted, "taylor", budget=0.7)
    by_hand.calibrate([(BYTES[:4] / 255 - 0.5, Y[:4]), (BYTES[4:] / 255 - 0.5, Y[4:])])
    pruner = prunex.attached(module, units=True).pruner
    assert all(torch.equal(pruner.open(b.key), by_hand.pruner.open(b.key)) for b in by_hand.pruner.branches)


def test_positions_are_calibrated_on_what_training_sees(tmp_path):
    options = {"tolerance": 0.3, "step": 3, "epochs": 0, "calibration_images": 8}
    module, wanted = InStep(), Plain()
    trainer(tmp_path, TokenPruning("patch_slimming", options=options)).fit(module, datamodule=Data(BYTES, Y))
    by_hand = prunex.attach(wanted, "patch_slimming", **options)
    by_hand.calibrate([BYTES[:4] / 255, BYTES[4:] / 255 + 1])
    assert prunex.attached(module).options["keep"] == by_hand.options["keep"]
