"""The snippets of the README and the docs: their types fit, and those of the README run from top to bottom."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from zipfile import ZipFile

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.nn import functional as F
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What the text around the snippets takes for granted.
GIVEN = """
from typing import Any
import prunex
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from prunex.callbacks import MaskPruning, RelevancyGuidance, SlimExport, TokenPruning, UnitMonitor
from torch import Tensor, nn
from torch.utils.data import DataLoader
"""
ARGUMENTS = (
    "model: nn.Module, dense: nn.Module, images: Tensor, labels: Tensor, criterion: nn.CrossEntropyLoss, "
    "loader: DataLoader[Any], your_module: LightningModule, your_data: LightningDataModule"
)


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.slow
def test_types_fit_the_snippets(tmp_path):
    pytest.importorskip("mypy")
    # As an installed package lies: callbacks and recipes inside of it.
    (tmp_path / "prunex").mkdir()
    for inside in (*(ROOT / "prunex").iterdir(), *(ROOT / room for room in ("callbacks", "recipes", "configs"))):
        (tmp_path / "prunex" / inside.name).symlink_to(inside)
    functions = [
        f"def {page.stem.lower()}_{number}({ARGUMENTS}) -> None:\n{textwrap.indent(text, '    ')}"
        for page in PAGES
        for number, text in enumerate(snippets(page))
    ]
    assert len(functions) > 10
    (tmp_path / "snippets.py").write_text(GIVEN + "\n\n".join(functions))
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--check-untyped-defs", "snippets.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


class YourModule(LightningModule):
    """What somebody may have: a timm ViT somewhere inside."""

    def __init__(self):
        super().__init__()
        self.net = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, patch_size=8, embed_dim=48)

    def training_step(self, batch, index):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.net(images), labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch, logger):
    monkeypatch.chdir(tmp_path)
    in_lightning, afterwards, by_hand, units = snippets(ROOT / "README.md")
    batch = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    short = 'max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=your_logger'
    scenes = TensorDataset(*batch)
    here = {
        "your_module": YourModule(),
        "your_data": LightningDataModule.from_datasets(scenes, scenes, batch_size=4),
        "your_logger": logger(tmp_path, name="logs"),
        "images": batch[0],
        "labels": batch[1],
    }
    # A graph for every runtime takes longer than the training.
    in_lightning = in_lightning.replace("max_epochs=30", short).replace(
        'SlimExport("out")', 'SlimExport("out", formats=["pt2"])'
    )
    exec(in_lightning, here)
    exec(afterwards, here)
    assert here["logits"].shape == (4, 3)
    assert here["kept"].shape == (4, 4, 4)
    assert here["e"].maps.shape == (4, 4, 4)
    assert list(tmp_path.rglob("kept_tokens-epoch=000.png"))
    if logger is TensorBoardLogger:  # the rest does not log
        return
    here["model"] = timm.create_model("deit_small_patch16_224", num_classes=3)
    here |= {"images": torch.randn(1, 3, 224, 224), "labels": torch.tensor([1]), "criterion": F.cross_entropy}
    exec(by_hand, here)
    exec(units, here)
    assert len(here["callbacks"]) == 4


@pytest.mark.parametrize("how", ["build_editable", "build_wheel"])
def test_python_is_started_beside_a_clone_called_prunex(tmp_path, how):
    pytest.importorskip("setuptools")
    clone, site = tmp_path / "prunex", tmp_path / "site"
    clone.mkdir()
    for part in ("prunex", "callbacks", "recipes", "configs", "pyproject.toml", "README.md", "LICENSE"):
        (clone / part).symlink_to(ROOT / part)
    build = f"from setuptools import build_meta; print(build_meta.{how}({str(tmp_path)!r}))"
    built = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True, check=True)
    with ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    # addsitedir reads .pth files, as Python does with site-packages when it starts.
    script = f"import site; site.addsitedir({str(site)!r}); import prunex.callbacks; print(prunex.attach.__name__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert found.stdout == "attach\n", found.stderr
