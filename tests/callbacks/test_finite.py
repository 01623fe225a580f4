"""A loss that is not finite ends the training, and says where it came from."""

import re
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prunex import PrunexError
from prunex.callbacks import MaskPruning, RelevancyGuidance, TokenPruning, finite
from tests.callbacks.modules import Plain, data, loader, snapshot, trainer

NAN = float("nan")


def poisoned(count=16, batch=4, at=(9, 11), value=NAN, shuffle=False):
    images, labels = data(count)
    images[list(at), 0, 3, 5] = value
    return DataLoader(TensorDataset(images, labels), batch, shuffle=shuffle)


def broken(folder, *callbacks, module=None, batches=None, **options):
    """The message that a training ends with, and the module."""
    module = Plain(lr=1e-3) if module is None else module
    with pytest.raises(PrunexError) as told:
        trainer(folder, *callbacks, **options).fit(module, poisoned() if batches is None else batches)
    return str(told.value), module


@pytest.mark.parametrize(
    "callback",
    [
        lambda: TokenPruning("dynamicvit", keep_ratio=0.6, options={"teacher": False}),
        lambda: TokenPruning("evit", keep_ratio=0.6),
        lambda: TokenPruning("ia_red2"),
        lambda: MaskPruning("xpruner", budget=0.6),
        lambda: MaskPruning("magnitude", budget=0.6),
    ],
)
def test_images_are_named_by_where_they_are_in_the_batch(tmp_path, callback):
    said, module = broken(tmp_path, callback())
    assert "loss is nan at epoch 0, global step 2, batch 2; not finite is the task's loss" in said
    assert re.search(r"by image \(positions in the batch\): inputs of 1, 3(, logits of 1, 3)?: clean", said)
    assert ("logits of" in said) == isinstance(callback(), TokenPruning)  # which knows its forward
    assert "\n" not in said
    assert all(p.isfinite().all() for p in module.parameters())  # stopped in front of the backward pass
    assert "training_step" not in vars(module)


def test_epoch_and_step_count_what_was_trained(tmp_path):
    class Late(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (NAN if self.current_epoch == 1 and batch_idx == 3 else 0)

    said, _ = broken(
        tmp_path, TokenPruning("evit"), module=Late(), batches=loader(), max_epochs=2, accumulate_grad_batches=2
    )
    assert "epoch 1, global step 3, batch 3; not finite is the task's loss; no single image's" in said


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_the_pruners_own_loss_is_named(tmp_path, value):
    class Bad(TokenPruning):
        def on_fit_start(self, trainer, pl_module):
            self.pruning.also(lambda forward: {"extra": forward.tokens.sum() * 0 + value})

    said, _ = broken(tmp_path, Bad("dynamicvit"), batches=loader())
    assert f"loss is {value} at epoch 0, global step 0, batch 0; not finite is the pruner's extra; no single" in said


def test_both_callbacks_and_guidance(tmp_path):
    callbacks = [TokenPruning("dynamicvit"), MaskPruning("xpruner", budget=0.6), RelevancyGuidance("rollout")]
    said, _ = broken(tmp_path, *callbacks, batches=poisoned(at=(4,), value=float("inf")))
    assert "batch 1; not finite is the task's loss" in said
    assert "inputs of 0," in said


def test_weights_that_are_gone_are_told_by_all_logits(tmp_path):
    class Blown(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                nn.init.constant_(self.vit.head.bias, NAN)

    said, _ = broken(tmp_path, TokenPruning("evit"), module=Blown(), batches=loader())
    assert "logits of 0, 1, 2, 3: lower the learning rate, clip gradients" in said


def test_optimised_by_hand(tmp_path):
    class Hand(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()

    said, _ = broken(tmp_path, TokenPruning("evit"), module=Hand())
    assert "loss is nan at epoch 0" in said
    assert "batch 2; not finite is the task's loss" in said


def test_without_dataset_images_or_labels(tmp_path):
    class Dicts(Plain):
        def training_step(self, batch, batch_idx):
            return {"loss": self(batch["x"].double().float()).square().mean() * (NAN if batch_idx else 1)}

    images = [{"x": x} for x in data(8)[0]]
    said, _ = broken(tmp_path, TokenPruning("topk"), module=Dicts(), batches=DataLoader(images, 4))
    assert "batch 1; not finite is the task's loss; no single image's" in said


# ------------------------------------------------------------------------------------------------- other devices' way


@pytest.fixture
def late(monkeypatch):
    """Flags are read as on an accelerator: one step later."""
    monkeypatch.setattr(finite, "later", lambda tensor: True)


def test_one_step_later_the_same_is_said(tmp_path, late):
    said, module = broken(tmp_path, TokenPruning("evit", keep_ratio=0.6))
    assert "epoch 0, global step 2, batch 2; not finite is the task's loss" in said
    assert "inputs of 1, 3, logits of 1, 3: clean" in said
    assert module.trainer.global_step == 3  # what waiting for the device would have saved


@pytest.mark.parametrize("method", ["evit", "magnitude"])
def test_the_last_step_of_an_epoch_is_not_forgotten(tmp_path, late, method):
    make = TokenPruning if method == "evit" else MaskPruning
    said, module = broken(tmp_path, make(method), batches=poisoned(at=(15,)), max_epochs=2)
    assert "epoch 0, global step 3, batch 3" in said
    assert "inputs of 3" in said
    assert module.trainer.global_step == 4


def test_no_checkpoint_of_weights_that_are_gone(tmp_path, late):
    from lightning.pytorch.callbacks import ModelCheckpoint

    kept = ModelCheckpoint(str(tmp_path / "kept"), every_n_train_steps=1, save_top_k=-1)
    broken(tmp_path, TokenPruning("evit"), kept, batches=poisoned(), enable_checkpointing=True)
    for path in (tmp_path / "kept").iterdir():
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(v.isfinite().all() for v in state.values()), path
    assert len(list((tmp_path / "kept").iterdir())) == 2


# ------------------------------------------------------------------------------------------------------ what it costs


def test_training_is_the_same_and_keeps_no_batch(tmp_path, monkeypatch):
    ends = []
    for active in (True, False):
        if not active:
            monkeypatch.setattr(finite.LossGuard, "saw", lambda *args, **kwargs: None)
        torch.manual_seed(1)
        module, callback = Plain(), TokenPruning("dynamicvit", keep_ratio=0.6)
        trainer(tmp_path, callback, max_epochs=2).fit(module, loader())
        ends.append(snapshot(module))
        assert not callback._guard._waiting
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_one_number_is_looked_at(tmp_path, monkeypatch):
    """Nothing else of a step is read: not the parts, not the images, not a gradient."""
    seen, real = [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda t: seen.append(t.numel()) or real(t))
    trainer(tmp_path, TokenPruning("dynamicvit")).fit(Plain(), loader())
    assert sum(n == 1 for n in seen) == 4  # batches
    guard, steps, run = finite.LossGuard(), 300, trainer(tmp_path)
    loss = torch.ones(())
    run.fit_loop.epoch_loop.batch_progress.current.ready = 1
    begun = time.perf_counter()
    for _ in range(steps):
        guard.saw(run, loss, {"task": loss}, {})
    print(f"a look costs {1e6 * (time.perf_counter() - begun) / steps:.0f} microseconds")


def test_infinite_gradients_under_a_scaler_are_nobodys_business(tmp_path):
    """A gradient scaler begins so high that gradients overflow, skips those steps and comes down."""

    class Scaled(Plain):
        def on_before_optimizer_step(self, optimizer):
            self.norms.append(float(sum(p.grad.square().sum() for p in self.parameters() if p.grad is not None)))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.scale = self.trainer.precision_plugin.scaler.get_scale()

    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    module = Scaled(lr=1e-3)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    run = trainer(tmp_path, TokenPruning("dynamicvit"), plugins=[plugin], max_epochs=3)
    run.fit(module, loader())
    assert not all(n < float("inf") for n in module.norms)
    assert module.scale < 1e38
    said, _ = broken(tmp_path, TokenPruning("dynamicvit"), plugins=[MixedPrecision("16-mixed", "cpu")])
    assert "batch 2; not finite is the task's loss" in said
    assert "inputs of 1, 3" in said


def test_long_lists_are_cut(tmp_path):
    said, _ = broken(tmp_path, TokenPruning("evit"), batches=poisoned(40, 20, at=range(20)))
    assert "inputs of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 4 more, logits" in said


def test_logits_of_one_dimension_are_looked_at():
    logits = torch.tensor([0.0, float("nan"), 1.0])
    text = finite._described("epoch 0", {"": torch.tensor(float("nan"))}, {"inputs": None, "logits": logits})
    assert "logits of 1: lower the learning rate" in text
