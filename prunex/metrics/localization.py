"""Localisation: how much of a map falls on the object, how well it separates it, and whether its peak does.

Pixel accuracy, mIoU and mAP follow the ImageNet-Segmentation protocol of arXiv 2012.09838, whose particulars are kept:

- each map is scaled to 0..1 by its own minimum and maximum, and its threshold is its **mean**; both are taken over all
  pixels, ignored ones too. A constant map has no foreground;
- pixel accuracy and IoU are ratios of sums over the **whole data set**, not means over images, and mIoU is the mean of
  the background's IoU and the object's;
- average precision runs over **both channels** at once, the background's scores 1 - map beside the object's, so a
  constant map already scores one half.

The protocol explains the *predicted* class, so that a wrong prediction is charged to the explainer: report the images
that are classified rightly beside all. A map with two values, such as a mask of kept tokens, survives every threshold
between them: compare those by :func:`rank_accuracy`. Beside any of them print :func:`object_share`, which is what
random or constant maps score on energy, pointing and rank accuracy.

Masks are bool [B, H, W], or whole numbers: 1 object, 0 background, -1 ignored. For masks in pixels give maps in pixels
(``Explanation.pixels``); the protocol itself resizes image and mask to 224 x 224 without keeping the aspect ratio, the
mask by nearest neighbour.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from prunex.checks import check_number, check_whole
from prunex.errors import PrunexError
from prunex.metrics.base import MeanOverImages
from prunex.metrics.checks import check_grid, check_masks
from prunex.metrics.ranks import average_precision, inside_top, separation
from prunex.registry import register

_PROTOCOL = "Guillaumin et al., IJCV 2014; protocol of Chefer et al., CVPR 2021, arXiv 2012.09838"
_NEEDS = "object masks"


def object_share(masks: Tensor) -> Tensor:
    """The object's share of each image's labelled pixels: what chance scores on energy, pointing and rank accuracy.

    Args:
        masks: bool [B, H, W], or 1, 0 and -1 for ignored.

    Returns:
        float64 [B] in 0..1; NaN where every pixel is ignored.

    Raises:
        PrunexError: For other shapes or types.

    >>> object_share(torch.tensor([[[1, 0, 0, -1]]]))
    tensor([0.3333], dtype=torch.float64)
    """
    masks = check_grid("masks", masks, floats=False)
    _, inside, labelled = check_masks(torch.zeros(masks.shape, device=masks.device), masks)
    total = labelled.flatten(1).sum(1)
    return (inside.flatten(1).sum(1).double() / total).where(total > 0, torch.nan)


@register(
    "metric",
    "energy_inside",
    "Wang et al., CVPRW 2020, arXiv 1910.01279; Kohlbrenner et al., IJCNN 2020, arXiv 1910.09840",
    _NEEDS,
)
def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's positive relevance that lies inside the mask, sum(R+ M) / sum(R+).

    The energy-based pointing game of Score-CAM (arXiv 1910.01279) and the attribution localisation of arXiv 1910.09840,
    on the values as they are: no min-max scaling, which would lift the background, and not the absolute values that
    Quantus takes. Relevance spread evenly over the image gives the mask's share of the area, :func:`object_share`:
    print it beside this number.

    Args:
        maps: float [B, H, W]; negative values count as 0.
        masks: bool [B, H, W], true on the object; or 1, 0 and -1 for ignored, which counts neither inside nor outside.

    Returns:
        float [B] in 0..1; NaN for an image without an object, without positive relevance or with NaN in its map.

    Raises:
        PrunexError: For other shapes or types.

    >>> energy_inside(torch.tensor([[[3.0, 1.0, -2.0]]]), torch.tensor([[[True, False, True]]]))
    tensor([0.7500])
    """
    maps, inside, labelled = (t.flatten(1) for t in check_masks(maps, masks))
    broken = maps.isnan().any(1)
    positive = maps.clamp(min=0).masked_fill(~labelled, 0)
    top = positive.amax(1, keepdim=True)
    positive = positive / top.where(top > 0, 1)  # sums of very small values would be lost
    total = positive.sum(1)
    energy = (positive * inside).sum(1)
    return (energy / total).where((total != 0) & inside.any(1) & ~broken, torch.nan)


@register("metric", "pointing_game", "Zhang et al., ECCV 2016, arXiv 1608.00507", _NEEDS)
def pointing_game(maps: Tensor, masks: Tensor, *, tolerance: float = 0) -> Tensor:
    """Whether each map's largest value lies on the object (arXiv 1608.00507); of tied maxima, the share that does.

    So a constant map scores the mask's share of the area, what guessing would. Per image; the original then averages
    per class and over classes, and lets a peak within 15 pixels of the object count as a hit.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], true on the object; or 1, 0 and -1 for ignored, where no maximum is looked for.
        tolerance: Distance in pixels from the object up to which a peak counts as on it; the original's is 15.

    Returns:
        float [B] in 0..1, usually 0 or 1; NaN for an image without an object or with NaN in its map.

    Raises:
        PrunexError: For other shapes or types, or a negative tolerance.

    >>> pointing_game(torch.tensor([[[3.0, 1.0, 3.0]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000])
    """
    tolerance = check_number("tolerance", tolerance, 0)
    maps, inside, labelled = check_masks(maps, masks)
    near = _grown(inside, tolerance).flatten(1)
    flat, inside, labelled = maps.flatten(1), inside.flatten(1), labelled.flatten(1)
    largest = flat.masked_fill(~labelled, -torch.inf).amax(1, keepdim=True)
    peak = ((flat == largest) & labelled).to(flat.dtype)
    defined = inside.any(1) & ~flat.isnan().any(1)
    return ((peak * near).sum(1) / peak.sum(1)).where(defined, torch.nan)


def _grown(inside: Tensor, distance: float) -> Tensor:
    """The pixels of [B, H, W] within a Euclidean distance of the object."""
    distance = min(distance, math.hypot(*inside.shape[1:]))
    reach = int(min(distance, max(inside.shape[1:])))
    if reach < 1:
        return inside
    grown = inside.clone()
    high, wide = inside.shape[1:]
    before = torch.nn.functional.pad(inside.int().cumsum(2), (1, 0))  # of each row's first n pixels, n = 0..W
    column = torch.arange(wide, device=inside.device)
    for down in range(-min(reach, high - 1), min(reach, high - 1) + 1):
        # Of the pixels `down` rows away those that lie within the disc's half width.
        half = int((distance**2 - down**2) ** 0.5)
        row = before[:, :, (column + half + 1).clamp(max=wide)] > before[:, :, (column - half).clamp(min=0)]
        low, top = max(0, down), high + min(0, down)
        grown[:, low:top] |= row[:, low - down : top - down]
    return grown


@register("metric", "rank_accuracy", "Arras et al., Information Fusion 2022, arXiv 2003.07258", _NEEDS)
def rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Relevance rank accuracy: the share of the |M| most relevant pixels that lie on the object, |M| its area.

    The values' scale and sign do not matter. Of pixels that tie for the last places the expectation is taken, so a
    constant map scores :func:`object_share`.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], or 1, 0 and -1 for ignored; ignored pixels are not ranked.

    Returns:
        float64 [B] in 0..1; NaN for an image without an object or with NaN in its map.

    Raises:
        PrunexError: For other shapes or types.

    >>> rank_accuracy(torch.tensor([[[0.9, 0.1, 0.5]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    maps, inside, labelled = (t.flatten(1) for t in check_masks(maps, masks))
    area = inside.sum(1)
    return (inside_top(maps, inside, area, labelled) / area).where((area > 0) & ~maps.isnan().any(1), torch.nan)


@register("metric", "topk_intersection", "Theiner et al., WACV 2022; Quantus' TopKIntersection", _NEEDS)
def topk_intersection(maps: Tensor, masks: Tensor, *, k: int = 1000) -> Tensor:
    """The share of the k most relevant pixels that lie on the object; of ties for the last places, expected.

    Divided by :func:`object_share` it is the "concept influence" of the source.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], or 1, 0 and -1 for ignored; ignored pixels are not ranked.
        k: How many pixels.

    Returns:
        float64 [B] in 0..1; NaN for an image without an object, with fewer than k labelled pixels or NaN in its map.

    Raises:
        PrunexError: For other shapes or types, or a ``k`` that is no whole number in 1..H W.

    >>> topk_intersection(torch.tensor([[[0.9, 0.1, 0.5]]]), torch.tensor([[[True, True, False]]]), k=1)
    tensor([1.], dtype=torch.float64)
    """
    maps, inside, labelled = (t.flatten(1) for t in check_masks(maps, masks))
    if check_whole("k", k, 1) > maps.shape[1]:
        raise PrunexError(f"k={k} is more than the {maps.shape[1]} pixels of a map: give at most that")
    count = torch.full_like(inside[:, 0], k, dtype=torch.int64)
    defined = inside.any(1) & (labelled.sum(1) >= k) & ~maps.isnan().any(1)
    return (inside_top(maps, inside, count, labelled) / k).where(defined, torch.nan)


@register("metric", "foreground_auc", "the area under the ROC curve of relevance against the mask", _NEEDS)
def foreground_auc(maps: Tensor, masks: Tensor) -> Tensor:
    """Area under the ROC curve: how often a pixel of the object is more relevant than one outside, ties half.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], or 1, 0 and -1 for ignored.

    Returns:
        float64 [B] in 0..1, chance 0.5; NaN for an image without object or without background, or NaN in its map.

    Raises:
        PrunexError: For other shapes or types.

    >>> foreground_auc(torch.tensor([[[0.9, 0.1, 0.5]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    maps, inside, labelled = (t.flatten(1) for t in check_masks(maps, masks))
    return separation(maps, inside, labelled).masked_fill(maps.isnan().any(1), torch.nan)


@register("metric", "mean_ap", _PROTOCOL, _NEEDS)
def mean_ap(maps: Tensor, masks: Tensor) -> Tensor:
    """Average precision of each image over both channels at once; the protocol's mAP is the mean over images.

    The scores [1 - map ; map], the map scaled to 0..1, are ranked together against [background ; object]. That is at
    least the share of the positives, one half: a constant map scores 0.5, an average precision of the object alone
    would be another number. As in the source, the maps' own precision decides whether a value of the map ties with
    another's 1 - map.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], or 1, 0 and -1 for ignored, left out of both channels.

    Returns:
        float64 [B] in 0..1; NaN for an image that is all ignored or has NaN or infinity in its map.

    Raises:
        PrunexError: For other shapes or types.

    >>> mean_ap(torch.tensor([[[0.9, 0.1]], [[0.4, 0.4]]]), torch.tensor([[[True, False]], [[True, False]]]))
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    maps, inside, labelled = (t.flatten(1) for t in check_masks(maps, masks))
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    scaled = (maps - low) / (high - low)
    # The source divides 0 by 0 on a constant map and then puts 0 into both channels.
    scores = torch.cat([1 - scaled, scaled], 1).masked_fill(high == low, 0)
    found = average_precision(scores, torch.cat([~inside, inside], 1), torch.cat([labelled, labelled], 1))
    return found.masked_fill(~maps.isfinite().all(1), torch.nan)


@register("metric", "foreground_f1", _PROTOCOL, _NEEDS)
def foreground_f1(maps: Tensor, masks: Tensor) -> Tensor:
    """F1 of each map's foreground (above its mean) against the object; the protocol prints the mean over images.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], or 1, 0 and -1 for ignored.

    Returns:
        float64 [B] in 0..1; NaN for an image without an object or with NaN or infinity in its map.

    Raises:
        PrunexError: For other shapes or types.

    >>> foreground_f1(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    tensor([0.6667], dtype=torch.float64)
    """
    counts = segmentation_counts(maps, masks)
    hits, union = counts[:, 4], counts[:, 5]
    _, inside, _ = check_masks(maps, masks)
    return (2 * hits / (hits + union)).where(inside.flatten(1).any(1), torch.nan)


def segmentation_counts(maps: Tensor, masks: Tensor) -> Tensor:
    """What each image adds to the protocol's sums, its map thresholded at its mean.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], or 1, 0 and -1 for ignored.

    Returns:
        float64 [B, 6]: pixels right, pixels labelled, intersection and union of the background, intersection and union
        of the object. All NaN for an image with NaN or infinity in its map.

    Raises:
        PrunexError: For other shapes or types.

    >>> segmentation_counts(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]])).tolist()
    [[2.0, 3.0, 1.0, 2.0, 1.0, 2.0]]
    """
    maps, inside, labelled = (t.flatten(1) for t in check_masks(maps, masks))
    wide = maps.double()
    # The mean of equal numbers may be rounded to below them.
    found = (wide > wide.mean(1, keepdim=True)) & (wide.amin(1, keepdim=True) < wide.amax(1, keepdim=True))
    pairs = [(found == inside, labelled), (~found & ~inside, ~found | ~inside), (found & inside, found | inside)]
    counts = torch.stack([(t & labelled).sum(1) for pair in pairs for t in pair], 1).double()
    return counts.masked_fill(~maps.isfinite().all(1, keepdim=True), torch.nan)


@register("metric", "pixel_accuracy", _PROTOCOL, _NEEDS)
def pixel_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of all labelled pixels of these images that the map's foreground and background get right.

    One ratio of sums over the images given: an image counts by its labelled pixels. For a whole data set in batches
    use :class:`PixelAccuracy`.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], or 1, 0 and -1 for ignored.

    Returns:
        float64, a single number in 0..1, without the images whose map holds NaN or infinity; NaN where nothing is left.

    Raises:
        PrunexError: For other shapes or types.

    >>> pixel_accuracy(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    tensor(0.6667, dtype=torch.float64)
    """
    return _accuracy(segmentation_counts(maps, masks).nansum(0))


@register("metric", "mean_iou", _PROTOCOL, _NEEDS)
def mean_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Mean of background's and object's IoU, each of sums over these images: no mean of the images' own IoU.

    For a whole data set in batches use :class:`MeanIoU`.

    Args:
        maps: float [B, H, W].
        masks: bool [B, H, W], or 1, 0 and -1 for ignored.

    Returns:
        float64, a single number in 0..1, without the images whose map holds NaN or infinity; NaN where a class is
        neither in any mask nor in any map (the source would count it 0).

    Raises:
        PrunexError: For other shapes or types.

    >>> mean_iou(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    tensor(0.5000, dtype=torch.float64)
    """
    return _iou(segmentation_counts(maps, masks).nansum(0))


def _accuracy(counts: Tensor) -> Tensor:
    return (counts[0] / counts[1]).where(counts[1] > 0, torch.nan)


def _iou(counts: Tensor) -> Tensor:
    unions = counts[[3, 5]]
    return (counts[[2, 4]] / unions).where(unions > 0, torch.nan).mean()


class _OverDataSet(Metric):
    """Sums of :func:`segmentation_counts` over all images, in one process or several.

    Attributes:
        total: The sums, float64 [6].
        count: Images that went in.
        undefined: Images left out, their map holding NaN.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    count: Tensor
    undefined: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("undefined", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Take a batch of maps, float [B, H, W], and masks."""
        counts = segmentation_counts(maps, masks).to(self.total)
        broken = counts.isnan().any(1)
        self.total = self.total + counts.nansum(0)
        self.count = self.count + (~broken).sum()
        self.undefined = self.undefined + broken.sum()


class PixelAccuracy(_OverDataSet):
    """:func:`pixel_accuracy` of a data set: right pixels over labelled pixels, both summed over all images.

    >>> metric = PixelAccuracy()
    >>> metric.update(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    >>> metric.compute()
    tensor(0.6667, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The ratio, float64; NaN without a labelled pixel."""
        return _accuracy(self.total)


class MeanIoU(_OverDataSet):
    """:func:`mean_iou` of a data set: intersections and unions summed over all images, divided once.

    >>> metric = MeanIoU()
    >>> metric.update(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The mean over background and object, float64; NaN where one of them is nowhere."""
        return _iou(self.total)


class MeanAP(MeanOverImages):
    """Mean over images of :func:`mean_ap`, the protocol's mAP over both channels.

    >>> metric = MeanAP()
    >>> metric.update(torch.tensor([[[0.4, 0.4]]]), torch.tensor([[[True, False]]]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    def measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Per image."""
        return mean_ap(maps, masks)


class ForegroundF1(MeanOverImages):
    """Mean over images of :func:`foreground_f1`."""

    def measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Per image."""
        return foreground_f1(maps, masks)


class EnergyInMask(MeanOverImages):
    """Mean over images of :func:`energy_inside`."""

    def measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Per image."""
        return energy_inside(maps, masks)


class RankAccuracy(MeanOverImages):
    """Mean over images of :func:`rank_accuracy`."""

    def measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Per image."""
        return rank_accuracy(maps, masks)


class ForegroundAUC(MeanOverImages):
    """Mean over images of :func:`foreground_auc`."""

    def measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Per image."""
        return foreground_auc(maps, masks)


class PointingGame(MeanOverImages):
    """Mean over images of :func:`pointing_game`.

    Args:
        tolerance: As for the function.
        keep: Also keep every image's number.
        **kwargs: torchmetrics' own.

    Raises:
        PrunexError: For a negative tolerance.
    """

    def __init__(self, tolerance: float = 0, keep: bool = False, **kwargs: Any) -> None:
        super().__init__(keep, **kwargs)
        self.tolerance = check_number("tolerance", tolerance, 0)

    def measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Per image."""
        return pointing_game(maps, masks, tolerance=self.tolerance)


class TopKIntersection(MeanOverImages):
    """Mean over images of :func:`topk_intersection`.

    Args:
        k: As for the function.
        keep: Also keep every image's number.
        **kwargs: torchmetrics' own.

    Raises:
        PrunexError: For a ``k`` that is no whole number of at least 1.
    """

    def __init__(self, k: int = 1000, keep: bool = False, **kwargs: Any) -> None:
        super().__init__(keep, **kwargs)
        self.k = check_whole("k", k, 1)

    def measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Per image."""
        return topk_intersection(maps, masks, k=self.k)


class ObjectShare(MeanOverImages):
    """Mean over images of :func:`object_share`: the chance level of the others, ``update(maps, masks)`` like theirs."""

    higher_is_better = None

    def measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Per image; NaN without an object, where the others are NaN too."""
        share = object_share(masks)
        return share.masked_fill(share == 0, torch.nan)
