"""Pixels painted over: what takes the place of parts of an image that are to be gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.attributes import numbers_of
from prunex.errors import PrunexError
from prunex.removal.imputing import imputed
from prunex.vit.anatomy import channels_of

PAINTS = ("black", "grey", "mean", "blur", "impute")
KERNEL, SIGMA = 11, 5.0  # of the blur, as RISE has them


def painter(
    images: Tensor, removal: str, mean: Tensor | None = None, std: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of which images, int64 [R], and their pixels present, bool [R, 1, H, W], to pictures [R, C, H, W]."""
    if removal == "impute":
        return lambda image, present: imputed(images[image], present)
    colours = substrate(images, removal, mean, std)
    return lambda image, present: torch.where(present, images[image], colours[image])


def substrate(images: Tensor, removal: str, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """What painted pixels of normalised images [B, C, H, W] become: as they, or what broadcasts to it for one colour.

    >>> substrate(torch.ones(1, 1, 2, 2), "black", torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.25)).unique()
    tensor([-2.])
    """
    if removal == "black":
        return (-torch.as_tensor(mean) / torch.as_tensor(std)).to(images).expand_as(images)
    if removal == "grey":
        return torch.zeros_like(images)
    if removal == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    return blurred(images)


def blurred(images: Tensor) -> Tensor:
    """A Gaussian blur of kernel 11 and sigma 5, border pixels repeated outwards: [B, C, H, W]."""
    # A Gaussian is separable: two passes of a row instead of one of a square.
    half = KERNEL // 2
    weight = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=images.device, dtype=images.dtype) / SIGMA) ** 2)
    weight = (weight / weight.sum()).view(1, 1, 1, -1)
    flat = F.pad(images.flatten(0, 1).unsqueeze(1), (half, half, half, half), mode="replicate")
    return F.conv2d(F.conv2d(flat, weight), weight.mT).view_as(images)


def normalisation(model: Any, mean: Any, std: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as [C, 1, 1], one number or one a channel, given or of ``pretrained_cfg``."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels = channels_of(model.patch_embed)
    columns = []
    for name, value in (("mean", mean), ("std", std)):
        if value is None:
            value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        try:
            numbers = numbers_of(name, value, channels)
        except ValueError:  # whatever a config holds
            raise PrunexError(
                f"{name}={value!r} is not allowed: removal='black' paints 0 before normalisation and needs its {name}, "
                f"{channels} numbers{' above 0' * (name == 'std')}, from you or the model's pretrained_cfg"
            ) from None
        columns.append(torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1, 1))
    return columns[0], columns[1]
