"""From a detection's relevance map to a mask of its object: Otsu over the cells, then the image's own size.

The masks of the DETR experiment of Chefer, Gur & Wolf (ICCV 2021, arXiv 2103.15679, section 4). Nothing here knows a
model: maps come in as they are, one a detection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.brief import Brief
from prunex.checks import check_choice, check_whole
from prunex.errors import PrunexError

MaskRule = Literal["reference", "half"]
MASK_RULES: tuple[str, ...] = get_args(MaskRule)
LEVELS = 256
WHITE = LEVELS - 1
_ROOM = 2**25  # pixels that are resized at once


@dataclass(eq=False, repr=False)
class CellMasks(Brief):
    """Foreground cells of some maps.

    Attributes:
        masks: bool [..., h, w], the cells above their map's threshold.
        threshold: int64 [...] in 0..255, of the eight-bit map; what equals it is background.
        constant: bool [...], maps of one value, which have no threshold that divides them; their masks are empty.
    """

    masks: Tensor
    threshold: Tensor
    constant: Tensor


def eight_bit(maps: Tensor) -> Tensor:
    """Maps from their own minimum to their own maximum as 0..255, truncated: uint8 [..., h, w]; 0 for constant ones.

    Args:
        maps: float [..., h, w], finite.

    Raises:
        PrunexError: For other shapes and types, and NaN or infinity.

    >>> eight_bit(torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])).tolist()
    [[0, 51, 102], [153, 204, 255]]
    """
    wide = _check_maps(maps)
    low = wide.amin((-2, -1), keepdim=True)
    spread = wide.amax((-2, -1), keepdim=True) - low
    # The maps' own precision decides which side of a whole number a cell falls on.
    divides = (spread > 0) & spread.isfinite()
    return torch.where(divides, (wide - low) / spread * WHITE, 0).to(torch.uint8)


def otsu_threshold(images: Tensor) -> Tensor:
    """The smallest threshold with the largest between-class variance, of images of eight bits: int64 [...].

    The classes are the pixels up to the threshold and those strictly above it. With n pixels that sum up to S, and c of
    them up to t with the sum s, the variance between the classes is (S c - s n)^2 / (n^2 c (n - c)) (Otsu, IEEE Trans.
    SMC 1979, equation 18). All but the division is in whole numbers, so thresholds that are equally good are so.

    Args:
        images: uint8 [..., h, w].

    Returns:
        Thresholds in 0..254; 255 for an image of one value, of which nothing is above.

    Raises:
        PrunexError: For other shapes and types.

    >>> otsu_threshold(torch.tensor([[10, 10, 12], [200, 201, 10]], dtype=torch.uint8))
    tensor(12)
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim < 2 or 0 in images.shape[-2:]:
        raise PrunexError(f"images are {came(images)}: give uint8 [..., h, w] with at least one pixel")
    pixels = images.flatten(-2).long()
    n = pixels.shape[-1]
    count = pixels.new_zeros(*pixels.shape[:-1], LEVELS).scatter_add_(-1, pixels, torch.ones_like(pixels))
    level = torch.arange(LEVELS, device=images.device)
    below, mass = count.cumsum(-1), (count * level).cumsum(-1)
    numerator = (mass[..., -1:] * below - mass * n).double().square()
    denominator = (below * (n - below)).double()
    between = torch.where(denominator > 0, numerator / denominator, -1.0)
    best = between.amax(-1, keepdim=True)
    # argmax says nothing about which of equal ones it takes.
    smallest = torch.where(between == best, level, WHITE).amin(-1)
    return torch.where(best[..., 0] < 0, WHITE, smallest)


def cell_masks(maps: Tensor) -> CellMasks:
    """Binarise maps by Otsu's threshold of their eight bits (arXiv 2103.15679, DETR experiment).

    Cells that see only padding belong to no image: crop a padded batch's maps first, they would move the threshold.

    Args:
        maps: float [..., h, w], finite.

    Raises:
        PrunexError: As :func:`eight_bit`.

    >>> found = cell_masks(torch.tensor([[[0.0, 0.1, 0.9]], [[0.5, 0.5, 0.5]]]))
    >>> found.masks.tolist(), found.constant.tolist()
    ([[[False, False, True]], [[False, False, False]]], [False, True])
    """
    images = eight_bit(maps)
    threshold = otsu_threshold(images)
    # A spread too small or too large to divide by leaves one level, too.
    constant = images.amax((-2, -1)) == images.amin((-2, -1))
    return CellMasks(images > threshold[..., None, None], threshold, constant)


def image_masks(
    masks: Tensor,
    input_size: tuple[int, int],
    original_size: tuple[int, int] | None = None,
    *,
    size: tuple[int, int] | None = None,
    mask_rule: MaskRule = "reference",
) -> Tensor:
    """Masks of cells at the image's own size, as DETR's post-processing makes them: bool [N, H, W].

    Bilinear to the size of the model's input, binarised, cropped to what of it is image, and nearest to the original
    size.

    - "reference": foreground where the sigmoid of the interpolated 0..255 exceeds one half, as in the public code of
      arXiv 2103.15679. Every pixel with any weight of a foreground cell is foreground: a single cell of a 7 x 7 grid
      grows from 1,024 to 4,096 pixels of 224 x 224. What that paper reports includes this growth.
    - "half": foreground where the interpolation exceeds half the way, 628 pixels there.

    Args:
        masks: bool [N, h, w], over the whole of ``input_size``.
        input_size: Height and width in pixels of the model's input, with padding.
        original_size: Height and width of the image as it came; None: ``size``.
        size: Height and width of the image in the input, from the upper left corner; None: all of it.
        mask_rule: "reference" or "half".

    Raises:
        PrunexError: For masks, sizes or a rule that are none.

    >>> cell = torch.zeros(1, 7, 7, dtype=torch.bool)
    >>> cell[0, 3, 3] = True
    >>> [image_masks(cell, (224, 224), mask_rule=rule).sum().item() for rule in ("reference", "half")]
    [4096, 628]
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.ndim != 3 or 0 in masks.shape[1:]:
        raise PrunexError(f"masks are {came(masks)}: give bool [N, h, w], as cell_masks(maps).masks are")
    check_choice("mask_rule", mask_rule, MASK_RULES)
    entered = check_size("input_size", input_size)
    seen = entered if size is None else check_size("size", size)
    if seen[0] > entered[0] or seen[1] > entered[1]:
        raise PrunexError(f"size={size!r} is not allowed: the image lies in the input of {entered[0]} x {entered[1]}")
    height, width = seen if original_size is None else check_size("original_size", original_size)
    large = masks.new_zeros(len(masks), height, width)
    # Empty masks, most of a detector's, need no work; the others not all at once.
    filled = masks.flatten(1).any(1).nonzero()[:, 0]
    for part in filled.split(max(1, _ROOM // (entered[0] * entered[1] + height * width))):
        levels = masks[part, None].float() * WHITE
        levels = F.interpolate(levels, size=entered, mode="bilinear", align_corners=False)
        # In single precision the sigmoid of a weight that is only rounding is one half, which does not exceed it.
        inside = levels.sigmoid() > 0.5 if mask_rule == "reference" else levels > WHITE / 2
        inside = inside[..., : seen[0], : seen[1]].float()
        large[part] = F.interpolate(inside, size=(height, width), mode="nearest")[:, 0] > 0
    return large


def check_size(name: str, value: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise PrunexError(f"{name}={value!r} is not allowed: give (height, width) in pixels")
    height, width = (check_whole(name, side, 1) for side in value)
    return height, width


def _check_maps(maps: Any) -> Tensor:
    """Floats [..., h, w] in at least single precision, off the graph."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point() or maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise PrunexError(f"maps are {came(maps)}: give floats [..., h, w] with at least one cell")
    if not maps.isfinite().all():
        raise PrunexError("maps hold NaN or infinity: leave those detections out, or explain them by a safe method")
    return maps.detach().to(torch.promote_types(maps.dtype, torch.float32))


def came(value: Any) -> str:
    """What came in a mask's or map's place, for messages."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
