"""What the monitors share: a fixed small set of validation images, files under maps/, pictures to every logger."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from prunex.errors import PrunexError
from prunex.pictures import from_tensor, save_png
from prunex.vit.anatomy import find


class Monitor(Callback):
    """Base of the monitors: collects images once, then calls :meth:`watch` after validation epochs on rank zero.

    Images are the first of the first validation loader. A batch may be a tensor, a sequence or a dict: the first
    floating [B, C, H, W] in it is the images, the first integer [B] the labels, the first bool [B, H, W] object masks.

    Args:
        images: How many validation images to watch.
        every_n_epochs: Watch every so many epochs.
        model: Dotted path of the ViT in the module, when it holds several.
    """

    def __init__(self, images: int = 8, every_n_epochs: int = 1, model: str | None = None) -> None:
        super().__init__()
        for name, value in (("images", images), ("every_n_epochs", every_n_epochs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PrunexError(f"{name}={value!r} is not allowed: give a whole number of at least 1")
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.model = model
        self._parts: list[dict[str, Tensor]] = []

    @property
    def collected(self) -> int:
        """Images collected so far."""
        return sum(len(p["images"]) for p in self._parts)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a new set of images for a new run."""
        self._parts = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect images until there are enough."""
        if dataloader_idx != 0 or self.collected >= self.images or not trainer.is_global_zero:
            return
        part = parts_of(batch)
        if not part:
            raise PrunexError(
                f"{type(self).__name__} found no images in the validation batch ({type(batch).__name__}): "
                "give batches that hold a float tensor [B, C, H, W]"
            )
        room = self.images - self.collected
        self._parts.append({k: v[:room].detach().cpu().clone() for k, v in part.items()})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch, unless this is the sanity check."""
        due = trainer.current_epoch % self.every_n_epochs == 0 or trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.sanity_checking or not trainer.is_global_zero or not self._parts or not due:
            return
        keys = set.intersection(*(set(p) for p in self._parts))
        self.watch(trainer, pl_module, {k: torch.cat([p[k] for p in self._parts]) for k in keys})

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Look at the model; ``batch`` holds images and, where known, labels and masks (on the CPU)."""

    def vit(self, pl_module: LightningModule) -> Any:
        """The ViT being watched."""
        return find(pl_module, self.model)[1]

    def common(self, trainer: Trainer, vit: Any, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """What both monitors write: pictures, labels and masks."""
        found = {"images": shown(trainer, vit, batch["images"])}
        if "labels" in batch:
            found["labels"] = batch["labels"].numpy()
        if "masks" in batch:
            found["masks"] = batch["masks"].numpy()
        return found

    def write(self, trainer: Trainer, name: str, arrays: dict[str, np.ndarray], picture: np.ndarray) -> None:
        """PNG and npz under maps/, and the picture to every logger that takes one."""
        folder = run_folder(trainer) / "maps"
        folder.mkdir(parents=True, exist_ok=True)
        epoch = trainer.current_epoch
        save_png(folder / f"{name}-epoch={epoch:03d}.png", picture)
        merge_npz(folder / f"epoch={epoch:03d}.npz", arrays)
        log_picture(trainer, f"prunex/{name}", picture)


def parts_of(batch: Any) -> dict[str, Tensor]:
    """Images, labels and masks of a batch, by dtype and shape; empty without images."""
    values = list(batch.values()) if isinstance(batch, dict) else batch if isinstance(batch, Sequence) else [batch]
    tensors = [v for v in values if isinstance(v, Tensor)]
    images = next((t for t in tensors if t.ndim == 4 and t.is_floating_point()), None)
    if images is None:
        return {}
    found = {"images": images}
    for t in tensors:
        whole = not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool
        if t.ndim == 1 and whole and len(t) == len(images) and "labels" not in found:
            found["labels"] = t
        if t.ndim == 3 and t.dtype == torch.bool and t.shape[1:] == images.shape[2:] and "masks" not in found:
            found["masks"] = t
    return found


def shown(trainer: Trainer, vit: Any, images: Tensor) -> np.ndarray:
    """The images as uint8 [M, H, W, 3], the data module's normalisation undone (or the model's)."""
    data = getattr(trainer, "datamodule", None)
    known = getattr(vit, "pretrained_cfg", None) or {}
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    if mean is None or std is None:
        mean, std = known.get("mean", (0.5,) * 3), known.get("std", (0.5,) * 3)
    images = images.float()
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
        mean, std = [mean[0]] * 3, [std[0]] * 3
    return np.asarray(from_tensor(images[:, :3], list(mean), list(std)))


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder: the first logger's, or the trainer's root."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def merge_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Add arrays to an npz file, replacing it whole."""
    found: dict[str, np.ndarray] = {}
    if path.is_file():
        with np.load(path, allow_pickle=False) as old:
            found = {k: old[k] for k in old.files}
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".npz", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        np.savez_compressed(file, **(found | arrays))  # type: ignore[arg-type]
    os.chmod(name, 0o644)
    os.replace(name, path)


def log_picture(trainer: Trainer, tag: str, picture: np.ndarray) -> None:
    """Hand one uint8 [H, W, 3] picture to every logger that takes images; files are written by the caller anyway."""
    for logger in trainer.loggers:
        try:
            kind = type(logger).__name__
            if kind == "TensorBoardLogger":
                logger.experiment.add_image(tag, picture, trainer.global_step, dataformats="HWC")  # type: ignore[attr-defined]
            elif kind == "WandbLogger":
                logger.log_image(tag, images=[picture], step=trainer.global_step)  # type: ignore[attr-defined]
            elif kind == "MLFlowLogger":
                logger.experiment.log_image(  # type: ignore[attr-defined]
                    logger.run_id,
                    picture,
                    key=tag.replace("/", "."),
                    step=trainer.global_step,  # type: ignore[attr-defined]
                )
            elif kind == "CometLogger":
                logger.experiment.log_image(picture, name=tag, step=trainer.global_step)  # type: ignore[attr-defined]
        except (
            OSError,
            RuntimeError,
            ValueError,
            AttributeError,
            ImportError,
        ) as error:
            # A picture must not end a training.
            rank_zero_warn(f"{type(logger).__name__} did not take the picture {tag}: {error}")
