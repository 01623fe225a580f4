"""Beside EMAWeightAveraging: monitors and slim models have the averaged weights, whoever's turn comes first."""

import csv
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as theirs

import prunex
from prunex import PrunexError
from prunex.callbacks import (
    FaithfulnessMonitor,
    KeptTokenMonitor,
    MaskPruning,
    RelevancyMonitor,
    SlimExport,
    TokenPruning,
)
from tests.callbacks.modules import Plain, data, loader, snapshot, trainer

pytestmark = pytest.mark.skipif(
    not hasattr(theirs, "EMAWeightAveraging"), reason="this Lightning has no weight averaging"
)


def average(decay=0.9):
    return theirs.EMAWeightAveraging(decay=decay)


class Noted(Plain):
    """Remembers, of each validation, the weights and the loss."""

    def __init__(self):
        super().__init__()
        self.seen, self.losses = [], []

    def on_train_epoch_end(self):
        self.losses.append(float(self.trainer.callback_metrics["val_loss"]))

    def on_validation_batch_start(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.seen.append({k: v.clone() for k, v in self.state_dict().items()})


def model_of(state):
    module = Plain()
    prunex.attach(module.vit, "dynamicvit", keep_ratio=0.6)
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("first", [True, False])
def test_monitors_see_what_validation_sees(tmp_path, first):
    pruning = TokenPruning("dynamicvit", keep_ratio=0.6)
    watch = [
        RelevancyMonitor(["rollout"], images=4),
        KeptTokenMonitor(images=4),
        FaithfulnessMonitor(["rollout"], ["deletion"], images=4),
    ]
    order = [pruning, average(), *watch] if first else [pruning, *watch, average()]
    module = Noted()
    trainer(tmp_path, *order, max_epochs=3).fit(module, loader(8), loader(8))
    images = data(8)[0][:4]
    with open(tmp_path / "faithfulness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for epoch, state in enumerate(module.seen):
        wanted = prunex.explain("rollout", model_of(state), images)
        curves = prunex.metrics.removal_curves(model_of(state), images, wanted.maps, wanted.target)
        with np.load(tmp_path / "maps" / f"epoch={epoch:03d}.npz", allow_pickle=False) as found:
            assert np.abs(found["relevance/rollout"] - wanted.maps.numpy()).max() < 1e-5
            assert np.array_equal(found["kept"][-1], wanted.trace.kept().numpy())
        deletion = float(prunex.metrics.curves.deletion(curves).mean())
        assert float(rows[epoch]["mean"]) == pytest.approx(deletion, abs=1e-4)
    for before, after in pairwise(module.seen):
        assert any(not before[k].equal(after[k]) for k in before)


@pytest.mark.parametrize("watching", [False, True])
def test_training_goes_on_with_its_own_weights(tmp_path, watching):
    """The swap leaves no trace: with monitors and export, on either side of the average, all ends bit for bit alike."""
    ends = []
    watch = [RelevancyMonitor(["rollout"], images=4)], [SlimExport(tmp_path / "s", monitor="val_loss", formats=[])]
    for before, after in ((), ()), watch if watching else watch[::-1]:
        torch.manual_seed(1)
        module = Plain()
        pruning = TokenPruning("dynamicvit", keep_ratio=0.6)
        trainer(tmp_path, pruning, *before, average(), *after, max_epochs=3).fit(module, loader(8), loader(8))
        ends.append(snapshot(module))
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("monitor", [None, "val_loss"])
def test_slim_models_hold_the_averaged_weights(tmp_path, first, monitor):
    pruning = TokenPruning("dynamicvit", keep_ratio=0.6)
    export = SlimExport(tmp_path, monitor=monitor, mode="min", formats=[])
    order = [pruning, average(), export] if first else [pruning, export, average()]
    module = Noted()
    trainer(tmp_path, *order, max_epochs=2).fit(module, loader(8), loader(8))
    images = data(8)[0]
    wanted = model_of(module.seen[module.losses.index(min(module.losses))] if monitor else module.state_dict())
    with torch.no_grad():
        assert (prunex.load(tmp_path / "slim")(images) - wanted(images)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (lambda: [average(), TokenPruning("evit")], "EMAWeightAveraging stands before TokenPruning"),
        (
            lambda: [theirs.StochasticWeightAveraging(1e-2), TokenPruning("evit")],
            "Averaging stands before TokenPruning",
        ),
        (lambda: [MaskPruning("taylor"), theirs.StochasticWeightAveraging(1e-2)], "in StochasticWeightAveraging does"),
        (lambda: [MaskPruning("xpruner"), average()], "in EMAWeightAveraging does not follow"),
        (lambda: [TokenPruning("patch_slimming"), average()], "those of patch_slimming are positions"),
        (
            lambda: [SlimExport(formats=[]), theirs.StochasticWeightAveraging(1e-2)],
            "list it before SlimExport",
        ),
    ],
)
def test_what_an_average_does_not_follow_is_told_before_training(tmp_path, order, said):
    run = trainer(tmp_path, *order())
    with pytest.raises(PrunexError, match=said):
        run.fit(Plain(), loader(8), loader(8))
    assert run.global_step == 0
