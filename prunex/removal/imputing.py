"""Noisy linear imputation: what is gone is filled in from what surrounds it (arXiv 2202.00449)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.vit.arithmetic import promoted

NOISE = 0.01  # standard deviation, of normalised images; as the authors' imputer has it
BESIDE, ACROSS = 1 / 6, 1 / 12  # weights of the four neighbours that share a side, and of the four at the corners
_TOLERANCE, _ROUNDS, _EVERY = 1e-5, 2000, 10
_AT_ONCE = 2**17  # values that a CPU works on at once: what its cache holds


def imputed(images: Tensor, present: Tensor) -> Tensor:
    """Images [R, C, H, W] whose pixels that are not ``present``, bool [R, 1, H, W], are filled in.

    Each is the weighted mean of its eight neighbours, present or filled in themselves (ROAD, arXiv 2202.00449, noisy
    linear imputation: 1/6 beside, 1/12 across, of those within the image), and a fixed Gaussian noise of standard
    deviation 0.01 is added, the same in every image. Where no pixel is present all are 0, the data's mean colour.

    >>> ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    >>> hole = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    >>> hole[..., 2, 2] = False
    >>> (imputed(ramp, hole) - ramp).abs().max().item() < 0.05
    True
    """
    rows = max(1, _AT_ONCE * len(images) // max(1, images.numel()))
    if images.device.type == "cpu" and len(images) > rows:
        parts = zip(images.split(rows), present.split(rows), strict=True)
        return torch.cat([imputed(*part) for part in parts])
    pixels, here = promoted(images), present.to(promoted(images).dtype)
    gone = 1 - here
    whole = _around(torch.ones_like(here))
    known = _around(pixels * here) * gone
    mean = (pixels * here).sum((2, 3), keepdim=True) / here.sum((2, 3), keepdim=True).clamp(min=1)
    filled = _solve(lambda x: gone * (whole * x - _around(x)), known, mean * gone)
    noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(pixels)
    return torch.where(present, pixels, filled + NOISE * noise).to(images.dtype)


def _around(x: Tensor) -> Tensor:
    """The weighted sum of each pixel's neighbours within the image, [R, C, H, W]."""
    row = x.new_tensor([ACROSS, BESIDE, ACROSS])
    kernel = torch.stack([row, x.new_tensor([BESIDE, 0, BESIDE]), row])
    return F.conv2d(x.flatten(0, 1).unsqueeze(1), kernel[None, None], padding=1).view_as(x)


def _solve(operator: Callable[[Tensor], Tensor], right: Tensor, start: Tensor) -> Tensor:
    """Conjugate gradients of a symmetric positive system, [R, C, H, W], each plane by itself."""
    x, residual = start, right - operator(start)
    direction = residual
    size = residual.square().sum((2, 3), keepdim=True)
    enough = _TOLERANCE**2 * right.square().sum((2, 3), keepdim=True)
    for number in range(_ROUNDS):
        # A plane that is done stands still: how long its neighbours take must not change it.
        busy = size > enough
        if number % _EVERY == 0 and not bool(busy.any()):
            break
        applied = operator(direction)
        bend = (direction * applied).sum((2, 3), keepdim=True)
        step = torch.where(busy & (bend > 0), size / bend.where(bend > 0, 1), 0)
        x, residual = x + step * direction, residual - step * applied
        after = torch.where(busy, residual.square().sum((2, 3), keepdim=True), size)
        direction = torch.where(busy, residual + after / size.where(size > 0, 1) * direction, direction)
        size = after
    return x
