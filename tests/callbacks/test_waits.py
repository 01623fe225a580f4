"""Nothing in a training step waits for the device, whatever callbacks take part; what does is listed with its reason.

On a CPU: values are read as on a device, later, and every read that would wait is counted (tests/waits.py).
tests/test_gpu.py has the same under ``torch.cuda.set_sync_debug_mode("error")``.
"""

from collections import Counter
from unittest.mock import patch

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import prunex
from prunex import later
from prunex.callbacks import ExplainableHead, MaskPruning, TokenPruning, finite
from prunex.recipes.modules.classifier import ImageClassifier
from tests.callbacks.every import CASES, Module, batches
from tests.callbacks.modules import data, trainer
from tests.vits import quick
from tests.waits import Waits

FLAG = "prunex/later.py:__bool__ _local_scalar_dense"
# What may happen in a step of training, and why.
ALLOWED = {
    FLAG: "whether the step before was finite: its copy has arrived, and no queue is waited for",
    "optim _local_scalar_dense": "torch's Adam counts steps on the CPU, wherever weights are",
    "prunex/vit/decisions.py:apply _local_scalar_dense": "adaptive counts: how many slots the fullest image takes",
    "prunex/pruners/diffrate.py:table tolist": "how many tokens blocks hold is what it learns, and Python has to know",
    "prunex/guidance.py:_keys cpu": "a cache tells images apart by their bytes; cache=0, the default, does not wait",
    "prunex/guidance.py:_keys numpy": "likewise",
    "prunex/guidance.py:<listcomp> _local_scalar_dense": "likewise, their classes",
    "prunex/guidance.py:maps tensor": "likewise, which of them are new",
    "prunex/guidance.py:maps from a list": "likewise",
    "prunex/guidance.py:maps cpu": "likewise, the maps that are kept",
}
# What may happen in a batch of validation beside that.
IN_VALIDATION = {
    "prunex/vit/packing.py:of nonzero": "images that keep numbers of their own are packed",
    "prunex/vit/packing.py:of tolist": "likewise",
    "prunex/units/xpruner.py:left _local_scalar_dense": "which units the hard gates of thresholds leave",
    "prunex/units/xpruner.py:left nonzero": "likewise",
    "prunex/units/xpruner.py:left tolist": "likewise",
    "callbacks/monitor.py:_take tolist": "classes of images that are collected, in the first validation alone",
    "callbacks/monitor.py:<genexpr> _local_scalar_dense": "likewise, of those held on the CPU already",
    "callbacks/monitor.py:<dictcomp> cpu": "likewise, the images themselves",
}


class Begin(L.Callback):
    """First of all callbacks: from here on a step is looked at. What is looked at once is so in the first one."""

    def __init__(self, waits):
        self.waits, self.steps, self.validation, self.stage = waits, Counter(), Counter(), None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.waits.noted.clear()
        self.stage = stage(module)
        self.waits.looking = trainer.global_step > 0

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.waits.noted.clear()
        self.waits.looking = batch_idx > 0


class End(L.Callback):
    """Last of all callbacks."""

    def __init__(self, begin):
        self.begin = begin

    def on_train_batch_end(self, trainer, module, *args):
        begin = self.begin
        begin.waits.looking = False
        # Units are chosen, and leave, in one step of a training: that one is not a step like others.
        if stage(module) == begin.stage:
            begin.steps += begin.waits.noted

    def on_validation_batch_end(self, *args, **kwargs):
        self.begin.waits.looking = False
        self.begin.validation += self.begin.waits.noted


def stage(module):
    handle = prunex.attached(module, units=True)
    return None if handle is None else (getattr(handle.pruner, "stage", None), handle.decided, handle.removed)


def looked(tmp_path, callbacks, module=None, loader=None, **options):
    """What a training with these callbacks waited for, in steps and in validation."""
    waits = Waits(looking=False)
    begin = Begin(waits)
    run = trainer(tmp_path, begin, *callbacks, End(begin), max_epochs=2, **options)
    loader = batches() if loader is None else loader
    with patch.object(later, "later", lambda tensor: True), patch.object(finite, "later", lambda tensor: True), waits:
        run.fit(Module() if module is None else module, loader, loader)
    return begin


@pytest.mark.parametrize("name", quick(CASES, ["dynamicvit", "xpruner", "guided tokens", "concept_transformer"]))
def test_no_step_waits_for_the_device(tmp_path, name):
    begin = looked(tmp_path, CASES[name](tmp_path))
    assert begin.steps[FLAG] > 0  # the steps were looked at
    assert set(begin.steps) <= set(ALLOWED)
    assert set(begin.validation) <= set(ALLOWED) | set(IN_VALIDATION)


@pytest.mark.parametrize("task", quick(["multi_label", "regression", "single"], ["multi_label"]))
def test_neither_does_the_classifier_that_comes_along(tmp_path, task):
    """Its own look at the labels is part of the step."""
    g = torch.Generator().manual_seed(0)
    outputs = 1 if task == "regression" else 5
    labels = {"multi_label": torch.randint(2, (24, 5), generator=g), "regression": torch.rand(24, generator=g)}
    module = ImageClassifier(
        "vit_tiny_patch16_224", outputs, {"img_size": 32, "depth": 4}, from_scratch=True, task=task
    )
    images, classes = data(24)
    loader = DataLoader(list(zip(images, labels.get(task, classes), strict=True)), 4)
    begin = looked(tmp_path, [TokenPruning("evit")], module, loader)
    assert begin.steps[FLAG] > 0
    # Of several labels, and on a CPU alone, torchmetrics reads whether scores are logits.
    assert set(begin.steps) <= set(ALLOWED) | ({"torchmetrics _local_scalar_dense"} if task == "multi_label" else set())


@pytest.mark.parametrize("bad", ["label", "concepts"])
def test_what_is_refused_without_waiting_is_refused_a_step_later(tmp_path, bad):
    loader = batches()
    loader.dataset[9][bad] = torch.tensor(7) if bad == "label" else torch.tensor([0.0, 0.5])
    if bad == "label":
        module, callbacks = Unlabelled(), [MaskPruning("xpruner")]
        said = "labels run from 0 to 7, the model has 5 classes"
    else:
        module, said = Module(), "global concept labels hold other numbers than 0, 1 and NaN"
        callbacks = [ExplainableHead("concept_transformer", concepts=["loop", "bar"], spatial=["ink"])]
    with pytest.raises(prunex.PrunexError, match=said):
        looked(tmp_path, callbacks, module, loader)
    assert module.trainer.global_step == 3  # the third batch was trained on, and the fourth was not


class Unlabelled(Module):
    """Whose own loss does not mind labels."""

    def training_step(self, batch, batch_idx):
        return self(batch["image"]).square().mean()
