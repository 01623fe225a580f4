"""One image at a time: what a map points at, and which patches were kept."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from numpy.typing import NDArray

from prunex.errors import PrunexError
from prunex.pictures.arrays import Bools, Floats, Picture, as_grids, as_numpy, as_pictures, on_pixels

KEPT = (255, 214, 10)  # boundary of the kept patches
OBJECT = (0, 229, 255)  # boundary of an object's mask
DARKENED = 0.8  # brightness of the image below a map, so that the map glows


def overlay(
    images: Any,
    heat: Any,
    alpha: float = 0.85,
    cmap: str | None = None,
    signed: bool | None = None,
    smooth: bool = False,
    floor: float | None = None,
) -> Picture:
    """Images with a map laid over them: the image, greyed, shows through where the map is low.

    Every image has its own scale. An unsigned map runs from its smallest value, or from `floor` where that is given (no
    colour), to its largest (full colour). A signed one runs from minus to plus its largest magnitude, with a diverging
    colormap centred at 0 (no colour there). An unsigned map that is constant (or nowhere above `floor`), and values
    that are not finite, get no colour.

    Args:
        images: uint8 [..., H, W, 3], and so is the answer.
        heat: Numbers [..., h, w], one map an image: a patch grid or pixels.
        alpha: Share of the colour where the map is strongest, in [0, 1].
        cmap: A matplotlib colormap; ``"inferno"``, or ``"RdBu_r"`` for signed maps, when not given.
        signed: Whether 0 is the middle of the scale. When not given: whether any value is negative.
        smooth: Interpolate between the map's values; otherwise each patch is one flat square.
        floor: The value, and below, of an unsigned map that gets no colour; its smallest value when not given.

    Raises:
        PrunexError: Images that are not uint8, a map for another number of images, an `alpha` outside [0, 1], an
            unknown colormap.

    >>> image = np.full((4, 4, 3), 100, dtype=np.uint8)
    >>> overlay(image, np.array([[0.0, 1.0]]), alpha=1.0, cmap="gray")[0, :, 0].tolist()
    [80, 80, 255, 255]
    """
    pictures = as_pictures(images)
    maps = as_grids(heat, pictures.shape[:-3], "heat", dtype=float)
    if not 0 <= alpha <= 1:
        raise PrunexError(f"alpha={alpha!r} is not allowed: give a number in [0, 1]")
    signed = bool((maps < 0).any()) if signed is None else signed
    name = cmap or ("RdBu_r" if signed else "inferno")
    if name not in colormaps:
        raise PrunexError(f"cmap={name!r} is no matplotlib colormap: give one, such as 'viridis'")
    # Scaled before it is enlarged: interpolation must not change a map's range.
    strength, place = _scaled(maps, signed, floor)
    height, width = pictures.shape[-3:-1]
    spread = _interpolated if smooth else on_pixels
    strength, place = spread(strength, height, width), spread(place, height, width)
    share = alpha * strength[..., None]
    # A faint tint of the image's own colours helps to recognise it and cannot be mistaken for the map's.
    grey = DARKENED * (0.85 * _grey(pictures) + 0.15 * pictures)
    colour = colormaps[name](place)[..., :3] * 255
    return (grey * (1 - share) + colour * share).round().clip(0, 255).astype(np.uint8)


def dim_dropped(images: Any, kept: Any, boundary: bool = True) -> Picture:
    """Images uint8 [..., H, W, 3] with kept patches in full colour and dropped ones grey and pale.

    ``kept`` are booleans [..., gh, gw], true for a patch that is still there; with ``boundary`` a line runs between the
    two.

    >>> image = np.zeros((2, 4, 3), dtype=np.uint8)
    >>> dim_dropped(image, np.array([[True, False]]), boundary=False)[0, :, 0].tolist()
    [0, 0, 168, 168]
    """
    pictures = as_pictures(images)
    grid = as_grids(kept, pictures.shape[:-3], "kept")
    # Dropped patches stay readable: what was thrown away is half of the story.
    pixels = on_pixels(grid, *pictures.shape[-3:-1])[..., None]
    pale = 0.3 * _grey(pictures) + 0.7 * 240
    drawn = np.where(pixels, pictures, pale.round().astype(np.uint8))
    return outline(drawn, grid) if boundary else drawn


def paint_groups(images: Any, groups: Any) -> Picture:
    """Images with merged patches in the mean colour of their group, and a line around each; removed ones grey and pale.

    ``groups`` are whole numbers [..., gh, gw], equal for patches that share a token, negative for removed ones.

    >>> image = np.array([[[0] * 3, [100] * 3, [30] * 3, [90] * 3]] * 2, dtype=np.uint8)
    >>> paint_groups(image, np.array([[0, 0, 1, -1]]))[0, :, 0].tolist()
    [50, 50, 30, 195]
    """
    pictures = as_pictures(images)
    grids = as_grids(groups, pictures.shape[:-3], "groups", dtype=int)
    height, width = pictures.shape[-3:-1]
    # Removed patches are pale as in every other picture.
    drawn = dim_dropped(pictures, grids >= 0, boundary=False)
    flat, members = drawn.reshape(-1, height, width, 3), grids.reshape(-1, *grids.shape[-2:])
    for picture, grid in zip(flat, members, strict=True):
        pixels = on_pixels(grid, height, width)
        tokens, counts = np.unique(grid[grid >= 0], return_counts=True)
        for token in tokens[counts > 1]:
            picture[pixels == token] = picture[pixels == token].mean(0).round()
        merged = on_pixels(np.isin(grid, tokens[counts > 1]), height, width)
        picture[_borders(pixels, merged)] = 255
    return flat.reshape(pictures.shape)


def _borders(pixels: NDArray[Any], merged: Bools) -> Bools:
    """The last pixel before another group, right and below, where one of the two is merged; none in tiny pictures."""
    # Lines in a tiny picture would cover it.
    edge = np.zeros_like(merged)
    if min(pixels.shape) < 32:
        return edge
    edge[:, :-1] |= (pixels[:, :-1] != pixels[:, 1:]) & (merged[:, :-1] | merged[:, 1:])
    edge[:-1] |= (pixels[:-1] != pixels[1:]) & (merged[:-1] | merged[1:])
    return edge


def outline(images: Any, region: Any, color: tuple[int, int, int] = KEPT, thick: int | None = None) -> Picture:
    """Images uint8 [..., H, W, 3] with a line around a region; its dark edge keeps it visible on any background.

    Args:
        images: uint8 [..., H, W, 3].
        region: Booleans [..., h, w]: a patch grid or a mask of pixels.
        color: RGB of the line, 0..255.
        thick: Width of the line in pixels; about a twelfth of a patch, or a hundredth of the image for a mask, when
            not given.
    """
    pictures = as_pictures(images).copy()
    height, width = pictures.shape[-3:-1]
    grid = as_grids(region, pictures.shape[:-3], "region")
    inside = on_pixels(grid, height, width)
    # A line as thick as the patches can bear; masks of pixels have none, and go by the image.
    patch = min(height / grid.shape[-2], width / grid.shape[-1])
    thick = thick or max(1, round(patch / 12 if patch >= 4 else max(height, width) / 110))
    pictures[inside & _grown(~inside, thick)] = color
    pictures[~inside & _grown(inside, max(1, thick // 2))] = (20, 20, 20)
    return pictures


def _scaled(maps: Floats, signed: bool, floor: float | None) -> tuple[Floats, Floats]:
    """Per map: how much colour (0..1) and where on the colormap (0..1)."""
    finite = np.isfinite(maps)
    top = np.where(finite, maps, -np.inf).max(axis=(-2, -1), keepdims=True)
    low = np.where(finite, maps, np.inf).min(axis=(-2, -1), keepdims=True)
    # Maps without a finite or a second value end as 0 below.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if signed:
            value = maps / np.maximum(np.abs(top), np.abs(low))
            strength, place = np.abs(value), (value + 1) / 2
        else:
            low = low if floor is None else np.full_like(low, floor)
            value = ((maps - low) / (top - low)).clip(0, None)
            strength = place = np.where(top > low, value, np.nan)
    drawn = finite & np.isfinite(place)
    return np.where(drawn, strength, 0.0), np.where(drawn, place, 0.5 if signed else 0.0)


def _interpolated(maps: Floats, height: int, width: int) -> Floats:
    flat = torch.from_numpy(maps.reshape(-1, 1, *maps.shape[-2:]))
    large = F.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False)
    return as_numpy(large).reshape(*maps.shape[:-2], height, width)


def _grey(pictures: Picture) -> Floats:
    return (pictures @ np.array([0.299, 0.587, 0.114]))[..., None]


def _grown(pixels: Bools, by: int) -> Bools:
    """True within `by` pixels (a square) of a true one; outside the image counts as false."""
    grown = pixels.copy()
    for axis in (-2, -1):
        source = grown.copy()
        for step in range(1, by + 1):
            ahead, behind = [slice(None)] * pixels.ndim, [slice(None)] * pixels.ndim
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            grown[tuple(ahead)] |= source[tuple(behind)]
            grown[tuple(behind)] |= source[tuple(ahead)]
    return grown
