"""Batches of others' loaders in a whole training: what the callbacks take from them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import prunex
from prunex import PrunexError
from prunex.callbacks import MaskPruning, TokenPruning
from prunex.callbacks.monitor import Monitor
from prunex.units.xpruner import XPruner
from tests.callbacks.modules import Plain, data, loader, snapshot, trainer

IMAGES, LABELS = data(8)
MASKS = {"masks": 0.5, "thresholds": 0.25, "budget": 0.7}


class ByKey(Plain):
    """Reads dicts."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"]), batch["label"])


class First(Plain):
    """Takes images and labels by place, whatever comes after."""

    def training_step(self, batch, batch_idx):
        x = batch[0][0] if isinstance(batch[0], list) else batch[0]
        return F.cross_entropy(self(x), batch[1])

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


def rows(*columns):
    return DataLoader(list(zip(*columns, strict=True)), 4)


def test_xpruner_learns_the_masks_of_labels_and_not_of_view_numbers(tmp_path, monkeypatch):
    batches = DataLoader([{"view": i % 2, "image": x, "label": LABELS[i]} for i, x in enumerate(IMAGES)], 4)
    module = ByKey()
    seen = []
    saw = XPruner.saw
    monkeypatch.setattr(XPruner, "saw", lambda pruner, labels: (seen.append(labels), saw(pruner, labels)))
    trainer(tmp_path, MaskPruning("xpruner", **MASKS)).fit(module, batches)
    assert torch.equal(torch.cat(seen), LABELS[:4])  # the first of two batches learns masks


@pytest.mark.parametrize(
    "callback",
    [
        lambda: MaskPruning("xpruner", **MASKS),
        lambda: MaskPruning("taylor", budget=0.7),
    ],
)
def test_who_learns_from_labels_does_not_guess_between_two(tmp_path, callback):
    with pytest.raises(PrunexError, match=r"in?g? batch \(list\).*: batch\[1\] and batch\[2\] may both be meant"):
        trainer(tmp_path, callback()).fit(First(), rows(IMAGES, LABELS, torch.arange(8)))


def test_who_does_not_learn_from_labels_does_not_mind(tmp_path):
    module = First()
    before = snapshot(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*may both be meant.*")
        trainer(tmp_path, TokenPruning("evit")).fit(module, rows(IMAGES, LABELS, torch.arange(8)))
    after = snapshot(module)
    assert prunex.attached(module).method == "evit"
    assert any(not torch.equal(after[name], p) for name, p in before.items())


def test_soft_labels_leave_taylor_the_predicted_classes_and_it_says_so(tmp_path):
    module, wanted = First(), First()
    with pytest.warns(UserWarning, match=r"calibration goes by the predicted classes: batch\[1\] is float32 \[4, 5\]"):
        trainer(tmp_path, MaskPruning("taylor", budget=0.7, remove=False)).fit(
            module, rows(IMAGES, F.one_hot(LABELS, 5) * 0.9)
        )
    by_hand = prunex.attach(wanted, "taylor", budget=0.7)
    by_hand.calibrate(IMAGES)
    pruner = prunex.attached(module, units=True).pruner
    assert all(torch.equal(pruner.open(b.key), by_hand.pruner.open(b.key)) for b in by_hand.pruner.branches)


def test_monitors_watch_the_view_that_ran_and_say_once_what_they_leave_out(tmp_path):
    class Shown(Monitor):
        def watch(self, trainer, pl_module, batch):
            self.batch = batch

    views = DataLoader([([x, -x], y, i) for i, (x, y) in enumerate(zip(IMAGES, LABELS, strict=True))], 2)
    monitor = Shown(images=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, monitor, max_epochs=2).fit(First(), loader(8), views)
    assert set(monitor.batch) == {"images"}
    assert torch.equal(monitor.batch["images"], IMAGES)
    told = [str(w.message) for w in caught if "be meant" in str(w.message)]
    assert len(told) == 1  # the images are those that entered the ViT, and no guess
    assert told[0].startswith("Shown leaves labels out: batch[1] and batch[2]")


def test_a_monitor_watches_what_a_step_makes_of_bytes(tmp_path):
    class Bytes(Plain):
        def validation_step(self, batch, batch_idx):
            self(batch[0].float())

    class Shown(Monitor):
        def watch(self, trainer, pl_module, batch):
            self.batch = batch

    raw, monitor = (IMAGES * 9).to(torch.uint8), Shown(images=8)
    trainer(tmp_path, TokenPruning("topk"), monitor).fit(Bytes(), loader(8), rows(raw, LABELS))
    assert torch.equal(monitor.batch["images"].sort(0).values, raw.float().sort(0).values)
