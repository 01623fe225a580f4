"""How a run's images and classes are described by whoever made its data: read once, for pictures and slim models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from prunex.attributes import Pair, class_names, given_normalisation, models_normalisation, read_normalisation
from prunex.vit.anatomy import channels_of

_SAID: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()
OUTSIDE = 0.02  # share of pixels out of range that cropping, resizing and noise do not make


def warn_once(trainer: Trainer, text: str) -> None:
    """Warn, unless a callback of this trainer has said the same."""
    tell_once(trainer, text, rank_zero_warn)


def tell_once(trainer: Trainer, text: str, tell: Callable[[str], object] = rank_zero_info) -> None:
    """Print a line, unless a callback of this trainer has said the same."""
    said = _SAID.setdefault(trainer, set())
    if text not in said:
        said.add(text)
        tell(text)


def said_normalisation(
    trainer: Trainer, module: LightningModule, vit: Any, mean: Any = None, std: Any = None
) -> Pair | None:
    """What images are normalised by: as given to the callback, else as data module or module say; None: nobody does."""
    channels = channels_of(vit.patch_embed)
    given = given_normalisation(mean, std, channels)
    owners = (getattr(trainer, "datamodule", None), module)
    return given or read_normalisation(owners, channels, functools.partial(warn_once, trainer))


def normalisation(trainer: Trainer, module: LightningModule, vit: Any, mean: Any = None, std: Any = None) -> Pair:
    """The same, or what the model says where nobody does."""
    said = said_normalisation(trainer, module, vit, mean, std)
    return said or models_normalisation(vit, channels_of(vit.patch_embed))


def names_of(trainer: Trainer, module: LightningModule, count: int) -> list[str] | None:
    """Names of ``count`` classes from data module, module or the loaders' datasets; None where nobody tells them."""
    # Who made the data knows best, then who trains on them; datasets come last, since many have classes of their own.
    owners = (getattr(trainer, "datamodule", None), module, *_datasets(trainer))
    return class_names(owners, count, functools.partial(warn_once, trainer)) if count else None


def _datasets(trainer: Trainer) -> Iterator[Any]:
    """Datasets of the loaders for training and validation, and those that they are parts of."""
    waiting = [getattr(trainer, "train_dataloader", None), getattr(trainer, "val_dataloaders", None)]
    for _ in range(100):  # what a stranger's datasets lead to may lead back
        if not waiting:
            return
        inner = waiting.pop(0)
        if isinstance(inner, Mapping | list | tuple):
            waiting[:0] = inner.values() if isinstance(inner, Mapping) else inner
        elif inner is not None:
            yield inner
            # In front: a dataset's own parts come before what lies beside it.
            waiting[:0] = [getattr(inner, "dataset", None), getattr(inner, "datasets", None)]


def shown_channels(images: Tensor, mean: list[float], std: list[float]) -> tuple[Tensor, list[float], list[float]]:
    """Images as three channels: the first three, or the first one as grey where there are fewer."""
    if images.shape[1] < 3:  # two channels have no known colour
        return images[:, :1].expand(-1, 3, -1, -1), mean[:1] * 3, std[:1] * 3
    return images[:, :3], mean[:3], std[:3]


def check_pixels(trainer: Trainer, images: Tensor, mean: list[float], std: list[float]) -> None:
    """Warn where images lie outside 0..1 after their normalisation is undone: pictures would have false colours."""
    # A few images tell: this runs on the first batch of a training.
    x, shift, scale = shown_channels(images[:8].detach().float(), mean, std)
    pixels = x * x.new_tensor(scale)[:, None, None] + x.new_tensor(shift)[:, None, None]
    outside = float(((pixels < -0.01) | (pixels > 1.01)).float().mean())
    if outside > OUTSIDE:
        low, high = (float(v) for v in torch.aminmax(pixels))
        shown = f"mean {[round(v, 3) for v in mean]} and std {[round(v, 3) for v in std]}"
        warn_once(
            trainer,
            f"{shown} do not fit the images, whose pixels then run from {low:.3g} to {high:.3g} instead of 0 to 1: "
            "give mean= and std= to monitors and SlimExport, or the data module such attributes",
        )
