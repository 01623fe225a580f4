"""LightningModules as users write them, knowing nothing of prunex, and quiet Trainers for them."""

import csv
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prunex.callbacks import SafeCheckpointIO
from tests.vits import tiny


class Plain(L.LightningModule):
    """A classifier with its ViT some levels down, plain SGD and a loss returned in the form asked for."""

    def __init__(self, lr=0.1, returns="tensor", optimiser="sgd", seed=0, **vit):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.ModuleDict({"backbone": nn.Sequential(tiny(seed=seed, **vit))})
        self.train()
        self.norms = []

    def forward(self, x):
        return self.net["backbone"](x)

    @property
    def vit(self):
        return self.net["backbone"][0]

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        if self.hparams.returns == "none" and batch_idx % 2:
            return None
        return {"loss": loss, "other": 1} if self.hparams.returns == "dict" else loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        if self.hparams.optimiser == "adamw":
            return torch.optim.AdamW(self.parameters(), self.hparams.lr, weight_decay=0.1)
        if self.hparams.optimiser == "momentum":
            return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.5)
        return torch.optim.SGD(self.parameters(), self.hparams.lr)

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(float(sum(p.grad.square().sum() for p in self.parameters() if p.grad is not None)) ** 0.5)


class Seeded(Plain):
    """The same, with random numbers that depend on the step alone, so that a resumed run can be compared."""

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 + self.global_step)


def data(count=16, size=32, classes=5, seed=3):
    """Images [N, 3, size, size] and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % classes


def loader(count=16, batch=4, seed=3, masks=False):
    """Batches (images, labels), or with object masks: one square of 16 x 16 pixels, top left, in every image."""
    images, labels = data(count, seed=seed)
    if not masks:
        return DataLoader(TensorDataset(images, labels), batch)
    objects = torch.zeros(count, 32, 32, dtype=torch.bool)
    objects[:, :16, :16] = True
    return DataLoader(TensorDataset(images, labels, objects), batch)


def trainer(folder, *callbacks, **kwargs):
    """A Trainer that prints and writes nothing of its own."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder),
        "plugins": [SafeCheckpointIO()],
    }
    return L.Trainer(callbacks=list(callbacks), **(quiet | kwargs))


def csv_logger(folder):
    """A logger whose run folder is ``folder/run/version_0``."""
    return CSVLogger(str(folder), name="run")


def metrics(run):
    """metrics.csv of a run: {name: values in the order they were written}."""
    found = {}
    with open(Path(run) / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value not in ("", None):
                    found.setdefault(name, []).append(float(value))
    return found


def snapshot(module):
    """Copies of a module's parameters, the pruner's among them."""
    return {n: p.detach().clone() for n, p in module.named_parameters()}
