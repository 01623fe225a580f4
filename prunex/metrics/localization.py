"""Localisation: how much of a map falls on the object, and whether its peak does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunex.errors import PrunexError


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's positive relevance that lies inside the mask, sum(R+ M) / sum(R+).

    The energy-based pointing game of Score-CAM (arXiv 1910.01279) and the attribution localisation of arXiv 1910.09840,
    on the values as they are: no min-max scaling, which would lift the background. Relevance spread evenly over the
    image gives the mask's share of the area, ``masks.float().mean((1, 2))``: print it beside this number.

    Args:
        maps: float [B, H, W]; negative values count as 0.
        masks: bool [B, H, W], true on the object. For masks in pixels give maps in pixels (``Explanation.pixels``).

    Returns:
        float [B] in 0..1; NaN for an image without an object, without positive relevance or with NaN in its map.

    Raises:
        PrunexError: For other shapes or types.

    >>> energy_inside(torch.tensor([[[3.0, 1.0, -2.0]]]), torch.tensor([[[True, False, True]]]))
    tensor([0.7500])
    """
    maps, masks = _checked(maps, masks)
    positive = maps.clamp(min=0).flatten(1)
    top = positive.amax(1, keepdim=True)
    positive = positive / top.where(top > 0, 1)  # sums of very small values would be lost
    total = positive.sum(1)
    inside = (positive * masks.flatten(1)).sum(1)
    return (inside / total).where((total != 0) & masks.flatten(1).any(1), torch.nan)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Whether each map's largest value lies on the object (arXiv 1608.00507); of tied maxima, the share that does.

    So a constant map scores the mask's share of the area, what guessing would. Per image and without the original's
    tolerance of 15 pixels; the original then averages per class and over classes.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], true on the object. For masks in pixels give maps in pixels (``Explanation.pixels``).

    Returns:
        float [B] in 0..1, usually 0 or 1; NaN for an image without an object or with NaN in its map.

    Raises:
        PrunexError: For other shapes or types.

    >>> pointing_game(torch.tensor([[[3.0, 1.0, 3.0]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000])
    """
    maps, masks = _checked(maps, masks)
    flat, inside = maps.flatten(1), masks.flatten(1)
    peak = (flat == flat.amax(1, keepdim=True)).to(flat.dtype)
    return ((peak * inside).sum(1) / peak.sum(1)).where(inside.any(1), torch.nan)


def _checked(maps: Any, masks: Any) -> tuple[Tensor, Tensor]:
    """Maps in at least float32, and masks on their device."""
    for name, value in (("maps", maps), ("masks", masks)):
        if not isinstance(value, Tensor) or value.ndim != 3:
            came = f"have shape {list(value.shape)}" if isinstance(value, Tensor) else f"are a {type(value).__name__}"
            raise PrunexError(f"{name} {came}: give a tensor [B, H, W]")
    if not maps.is_floating_point():
        raise PrunexError(f"maps have dtype {maps.dtype}: give floats [B, H, W]")
    if masks.dtype != torch.bool:
        raise PrunexError(f"masks have dtype {masks.dtype}: give booleans, as in masks > 0")
    if maps.shape != masks.shape or 0 in maps.shape:
        raise PrunexError(
            f"maps of shape {list(maps.shape)} do not fit masks of shape {list(masks.shape)}: give one map a mask, of "
            "its size (an explanation's pixels, or its upsample((height, width)))"
        )
    return maps.detach().to(torch.promote_types(maps.dtype, torch.float32)), masks.to(maps.device)
