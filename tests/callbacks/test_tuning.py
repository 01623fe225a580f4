"""Lightning's tuners and repeated calls: they run training aside, save, restore, and run it again."""

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

import prunex
from prunex.callbacks import MaskPruning, TokenPruning
from tests.callbacks.modules import Plain, data, loader, trainer
from tests.vits import images, quick


class Sized(Plain):
    """Says how large its batches are, and makes the loader."""

    def __init__(self):
        super().__init__(lr=0.01)
        self.batch_size = 2
        self.lr = 0.01

    def train_dataloader(self):
        return DataLoader(TensorDataset(*data()), self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


TUNERS = {
    "learning rate": lambda: LearningRateFinder(num_training_steps=4, early_stop_threshold=None),
    "batch size": lambda: BatchSizeFinder(steps_per_trial=1, max_trials=2),
}
PRUNERS = {
    "evit": lambda: [TokenPruning("evit", keep_ratio=0.5, options={"shrink_length": 0.5})],
    "dynamicvit": lambda: [TokenPruning("dynamicvit", keep_ratio=0.5, backbone_lr_scale=0.5)],
    "patch_slimming": lambda: [TokenPruning("patch_slimming")],
    "xpruner": lambda: [MaskPruning("xpruner", budget=0.7)],
    "taylor": lambda: [MaskPruning("taylor", budget=0.7, images=8, start=0.5), TokenPruning("evit", keep_ratio=0.5)],
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("pruners", quick(PRUNERS, ["dynamicvit", "taylor"]))
@pytest.mark.filterwarnings("ignore")
def test_a_tuner_leaves_the_pruning_as_it_was(tmp_path, tuner, pruners):
    module, callbacks = Sized(), PRUNERS[pruners]()
    run = trainer(tmp_path, TUNERS[tuner](), *callbacks, max_epochs=2, enable_checkpointing=True)
    run.fit(module)
    if pruners == "evit":
        assert prunex.attached(module).progress == 1.0
        fresh = prunex.attach(Plain().vit, "evit", keep_ratio=0.5)
        assert prunex.attached(module).counts() == fresh.counts()
    if pruners in ("xpruner", "taylor"):
        assert prunex.attached(module, units=True).removed
    assert "training_step" not in vars(module)
    with torch.no_grad():
        assert torch.isfinite(module.eval()(images())).all()


@pytest.mark.filterwarnings("ignore")
def test_the_tuner_by_hand_then_a_fit(tmp_path):
    module = Sized()
    run = trainer(tmp_path, TokenPruning("dynamicvit", keep_ratio=0.5), max_epochs=1)
    Tuner(run).lr_find(module, num_training=4, early_stop_threshold=None)
    pruner = prunex.attached(module).pruner
    run.fit(module)
    assert prunex.attached(module).pruner is pruner
    assert run.callback_metrics["prunex/keep_ratio_stage1"] < 1


@pytest.mark.parametrize("pruners", PRUNERS)
@pytest.mark.filterwarnings("ignore")
def test_validate_and_test_before_fit(tmp_path, pruners):
    module, run = Plain(), trainer(tmp_path, *PRUNERS[pruners](), max_epochs=2)
    run.validate(module, loader(8), verbose=False)
    run.test(module, loader(8), verbose=False)
    run.fit(module, loader(), loader(8))
    logged = run.validate(module, loader(8), verbose=False)[0]
    assert logged["prunex/gmacs"] == pytest.approx(prunex.cost(module).gmacs)
    assert prunex.cost(module).gmacs < prunex.cost(Plain().vit).gmacs
