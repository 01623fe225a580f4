"""What measures are given, checked or refused in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunex.errors import PrunexError


def check_grid(name: str, value: Any, floats: bool = True) -> Tensor:
    """A tensor [B, H, W], off the graph; floats in at least float32 where it must hold ``floats``."""
    if not isinstance(value, Tensor) or value.ndim != 3:
        came = f"have shape {list(value.shape)}" if isinstance(value, Tensor) else f"are a {type(value).__name__}"
        raise PrunexError(f"{name} {came}: give a tensor [B, H, W]")
    if not floats:
        return value.detach()
    if not value.is_floating_point():
        raise PrunexError(f"{name} have dtype {value.dtype}: give floats [B, H, W]")
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def check_masks(maps: Any, masks: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Maps, and the pixels of each that are the object's, and those that have a label at all: [B, H, W] each."""
    for name, value in (("maps", maps), ("masks", masks)):
        check_grid(name, value, floats=False)
    maps = check_grid("maps", maps)
    if masks.is_floating_point() or masks.is_complex():
        raise PrunexError(
            f"masks have dtype {masks.dtype}: give booleans, as in masks > 0, or whole numbers where -1 is ignored"
        )
    if maps.shape != masks.shape or 0 in maps.shape:
        raise PrunexError(
            f"maps of shape {list(maps.shape)} do not fit masks of shape {list(masks.shape)}: give one map a mask, of "
            "its size (an explanation's pixels, or its upsample((height, width)))"
        )
    masks = masks.to(maps.device)
    if masks.dtype == torch.bool:
        return maps, masks, torch.ones_like(masks)
    # Labels of uint8 cannot hold -1: compared as they are, 255 would pass for it.
    unsigned = masks.to(torch.int64)
    # Labels such as 255 for "ignored" would silently count as something else.
    low, high = (int(v) for v in torch.aminmax(unsigned))
    if low < -1 or high > 1:
        raise PrunexError(
            f"masks hold labels from {low} to {high}: give 1 for the object, 0 for the background, -1 to ignore"
        )
    return maps, unsigned == 1, unsigned >= 0


def check_kept(kept: Any, maps: Any) -> tuple[Tensor, Tensor]:
    """Which patches are kept and their relevance, flat: bool [B, P] and float64 [B, P], on the device of the maps."""
    check_grid("kept", kept, floats=False)
    maps = check_grid("maps", maps)
    if kept.dtype != torch.bool:
        raise PrunexError(f"kept has dtype {kept.dtype}: give booleans [B, gh, gw], as trace.kept() does")
    _check_same("kept", kept, maps)
    return kept.to(maps.device).flatten(1), maps.flatten(1).double()


def check_scores(name: str, scores: Any, maps: Any) -> tuple[Tensor, Tensor]:
    """One score a patch and the patches' relevance, flat: float64 [B, P] both."""
    scores, maps = check_grid(name, scores), check_grid("maps", maps)
    _check_same(name, scores, maps)
    return scores.to(maps.device).flatten(1).double(), maps.flatten(1).double()


def _check_same(name: str, value: Tensor, maps: Tensor) -> None:
    if value.shape != maps.shape or 0 in maps.shape:
        raise PrunexError(
            f"{name} of shape {list(value.shape)} do not fit maps of shape {list(maps.shape)}: give both on the "
            "original patch grid [B, gh, gw], without prefix tokens"
        )


def check_maps(maps: Any, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [B, gh, gw] or [B, H, W] on the images' device, in at least float32."""
    size = (images.shape[2], images.shape[3])
    want = f"floats [{len(images)}, {grid[0]}, {grid[1]}] on the patch grid or [{len(images)}, {size[0]}, {size[1]}]"
    came = ""
    if not isinstance(maps, Tensor):
        came = f"are a {type(maps).__name__}"
    elif not maps.is_floating_point():
        came = f"have dtype {maps.dtype}"
    elif maps.ndim != 3 or len(maps) != len(images) or tuple(maps.shape[1:]) not in (grid, size):
        came = f"have shape {list(maps.shape)}"
    if came:
        raise PrunexError(f"maps {came}: give {want}")
    return maps.detach().to(images.device, torch.promote_types(maps.dtype, torch.float32))


def check_steps(steps: Any, first: bool = False) -> tuple[float, ...]:
    """Rising fractions in [0, 1]; where ``first``, they must begin with 0."""
    given = tuple(steps) if isinstance(steps, list | tuple) else ()
    good = all(isinstance(q, int | float) and not isinstance(q, bool) and 0 <= q <= 1 for q in given)
    if not given or not good or any(b <= a for a, b in zip(given, given[1:], strict=False)) or (first and given[0]):
        begin = " that begin with 0, the clean image" if first else ""
        raise PrunexError(f"steps={steps!r} is not allowed: give rising fractions in [0, 1]{begin}, as (0, 0.1, 0.2)")
    return tuple(float(q) for q in given)
