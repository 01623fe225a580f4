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

**What all take.** ``maps`` float [B, H, W] and ``masks`` bool [B, H, W], true on the object, or whole numbers: 1
object, 0 background, -1 ignored; other shapes, types and labels are refused with a ``PrunexError``. The answer is one
float an image, [B], in 0..1; NaN for an image without an object or with NaN in its map. For masks in pixels give maps
in pixels (``Explanation.pixels``); the protocol itself resizes image and mask to 224 x 224 without keeping the aspect
ratio, the mask by nearest neighbour.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from prunex.checks import check_number, check_whole
from prunex.errors import PrunexError
from prunex.metrics.base import mean_of
from prunex.metrics.checks import check_grid, check_masks
from prunex.metrics.ranks import average_precision, inside_top, separation
from prunex.registry import register

_PROTOCOL = "Guillaumin et al., IJCV 2014; protocol of Chefer et al., CVPR 2021, arXiv 2012.09838"
_NEEDS = "object masks"


def object_share(masks: Tensor) -> Tensor:
    """The object's share of each image's labelled pixels: what chance scores on energy, pointing and rank accuracy.

    float64 [B] in 0..1; NaN where every pixel is ignored.

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
    """Share of each map's positive relevance that lies inside the mask, sum(R+ M) / sum(R+): [B] in 0..1.

    The energy-based pointing game of Score-CAM (arXiv 1910.01279) and the attribution localisation of arXiv 1910.09840,
    on the values as they are: no min-max scaling, which would lift the background, and not the absolute values that
    Quantus takes. Negative values count as 0, ignored pixels neither inside nor outside; NaN also without positive
    relevance. Relevance spread evenly over the image gives the mask's share of the area, :func:`object_share`: print it
    beside this number.

    >>> energy_inside(torch.tensor([[[3.0, 1.0, -2.0]]]), torch.tensor([[[True, False, True]]]))
    tensor([0.7500])
    """
    maps, inside, labelled = _flat(maps, masks)
    broken = maps.isnan().any(1)
    positive = maps.clamp(min=0).masked_fill(~labelled, 0)
    # Relevance is scaled by its maximum, which no ratio sees.
    top = positive.amax(1, keepdim=True)
    positive = positive / top.where(top > 0, 1)  # sums of very small values would be lost
    total = positive.sum(1)
    energy = (positive * inside).sum(1)
    return (energy / total).where((total != 0) & inside.any(1) & ~broken, torch.nan)


@register("metric", "pointing_game", "Zhang et al., ECCV 2016, arXiv 1608.00507", _NEEDS)
def pointing_game(maps: Tensor, masks: Tensor, *, tolerance: float = 0) -> Tensor:
    """Whether each map's largest value lies on the object (arXiv 1608.00507); of tied maxima, the share that does: [B].

    So a constant map scores the mask's share of the area, what guessing would. No maximum is looked for in ignored
    pixels. ``tolerance`` is the distance in pixels from the object up to which a peak counts as on it: the original
    takes 15, and averages per class and over classes.

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


def _flat(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maps, which pixels are the object's, and which have a label: [B, H * W] each."""
    maps, inside, labelled = check_masks(maps, masks)
    return maps.flatten(1), inside.flatten(1), labelled.flatten(1)


def _grown(inside: Tensor, distance: float) -> Tensor:
    """The pixels of [B, H, W] within a Euclidean distance of the object."""
    distance = min(distance, math.hypot(*inside.shape[1:]))
    # No distance within the image is longer than its diagonal, however far the user wants to look.
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
    """Relevance rank accuracy: the share of the |M| most relevant pixels that lie on the object, |M| its area: [B].

    The values' scale and sign do not matter; ignored pixels are not ranked. Of pixels that tie for the last places the
    expectation is taken, so a constant map scores :func:`object_share`.

    >>> rank_accuracy(torch.tensor([[[0.9, 0.1, 0.5]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    maps, inside, labelled = _flat(maps, masks)
    area = inside.sum(1)
    return (inside_top(maps, inside, area, labelled) / area).where((area > 0) & ~maps.isnan().any(1), torch.nan)


@register("metric", "topk_intersection", "Theiner et al., WACV 2022; Quantus' TopKIntersection", _NEEDS)
def topk_intersection(maps: Tensor, masks: Tensor, *, k: int = 1000) -> Tensor:
    """The share of the k most relevant pixels that lie on the object; of ties for the last places, expected: [B].

    Ignored pixels are not ranked; NaN also with fewer than k labelled pixels. ``k`` is a whole number in 1..H W.
    Divided by :func:`object_share` it is the "concept influence" of the source.

    >>> topk_intersection(torch.tensor([[[0.9, 0.1, 0.5]]]), torch.tensor([[[True, True, False]]]), k=1)
    tensor([1.], dtype=torch.float64)
    """
    maps, inside, labelled = _flat(maps, masks)
    if check_whole("k", k, 1) > maps.shape[1]:
        raise PrunexError(f"k={k} is more than the {maps.shape[1]} pixels of a map: give at most that")
    count = torch.full_like(inside[:, 0], k, dtype=torch.int64)
    defined = inside.any(1) & (labelled.sum(1) >= k) & ~maps.isnan().any(1)
    return (inside_top(maps, inside, count, labelled) / k).where(defined, torch.nan)


@register("metric", "foreground_auc", "the area under the ROC curve of relevance against the mask", _NEEDS)
def foreground_auc(maps: Tensor, masks: Tensor) -> Tensor:
    """How often a pixel of the object is more relevant than one outside, ties half: area under the ROC curve, [B].

    Chance is 0.5; NaN also without background.

    >>> foreground_auc(torch.tensor([[[0.9, 0.1, 0.5]]]), torch.tensor([[[True, True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    maps, inside, labelled = _flat(maps, masks)
    return separation(maps, inside, labelled).masked_fill(maps.isnan().any(1), torch.nan)


@register("metric", "mean_ap", _PROTOCOL, _NEEDS)
def mean_ap(maps: Tensor, masks: Tensor) -> Tensor:
    """Average precision of each image over both channels at once, [B]; the protocol's mAP is the mean over images.

    The scores [1 - map ; map], the map scaled to 0..1, are ranked together against [background ; object]. That is at
    least the share of the positives, one half: a constant map scores 0.5, an average precision of the object alone
    would be another number. As in the source, the maps' own precision decides whether a value of the map ties with
    another's 1 - map. NaN for an image that is all ignored, or has NaN or infinity in its map.

    >>> mean_ap(torch.tensor([[[0.9, 0.1]], [[0.4, 0.4]]]), torch.tensor([[[True, False]], [[True, False]]]))
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    maps, inside, labelled = _flat(maps, masks)
    # Scaled by all pixels, ignored ones too, as the protocol does.
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    scaled = (maps - low) / (high - low)
    # The source divides 0 by 0 on a constant map and then puts 0 into both channels.
    scores = torch.cat([1 - scaled, scaled], 1).masked_fill(high == low, 0)
    precision = average_precision(scores, torch.cat([~inside, inside], 1), torch.cat([labelled, labelled], 1))
    return precision.masked_fill(~maps.isfinite().all(1), torch.nan)


@register("metric", "foreground_f1", _PROTOCOL, _NEEDS)
def foreground_f1(maps: Tensor, masks: Tensor) -> Tensor:
    """F1 of each map's foreground (above its mean) against the object, [B]; the protocol prints the mean over images.

    NaN also for infinity in a map.

    >>> foreground_f1(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    tensor([0.6667], dtype=torch.float64)
    """
    counts = segmentation_counts(maps, masks)
    hits, union = counts[:, 4], counts[:, 5]
    # Counts hold no difference between an object that is missed and one that is not there.
    _, inside, _ = check_masks(maps, masks)
    return (2 * hits / (hits + union)).where(inside.flatten(1).any(1), torch.nan)


def segmentation_counts(maps: Tensor, masks: Tensor) -> Tensor:
    """What each image adds to the protocol's sums, its map thresholded at its mean: float64 [B, 6].

    Pixels right, pixels labelled, intersection and union of the background, intersection and union of the object; all
    NaN for an image with NaN or infinity in its map.

    >>> segmentation_counts(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]])).tolist()
    [[2.0, 3.0, 1.0, 2.0, 1.0, 2.0]]
    """
    maps, inside, labelled = _flat(maps, masks)
    wide = maps.double()
    # The mean of equal numbers may be rounded to below them.
    shown = (wide > wide.mean(1, keepdim=True)) & (wide.amin(1, keepdim=True) < wide.amax(1, keepdim=True))
    counted = [shown == inside, labelled, ~shown & ~inside, ~shown | ~inside, shown & inside, shown | inside]
    counts = torch.stack([(pixels & labelled).sum(1) for pixels in counted], 1).double()
    return counts.masked_fill(~maps.isfinite().all(1, keepdim=True), torch.nan)


@register("metric", "pixel_accuracy", _PROTOCOL, _NEEDS)
def pixel_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of all labelled pixels of these images that the map's foreground and background get right: one number.

    One ratio of sums over the images given, without those whose map holds NaN or infinity: an image counts by its
    labelled pixels. NaN where nothing is left. For a whole data set in batches use :class:`PixelAccuracy`.

    >>> pixel_accuracy(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    tensor(0.6667, dtype=torch.float64)
    """
    return accuracy_of(segmentation_counts(maps, masks).nansum(0))


@register("metric", "mean_iou", _PROTOCOL, _NEEDS)
def mean_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Mean of background's and object's IoU, each of sums over these images: one number, no mean of the images' own.

    Without the images whose map holds NaN or infinity; NaN where a class is neither in any mask nor in any map (the
    source would count it 0). For a whole data set in batches use :class:`MeanIoU`.

    >>> mean_iou(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    tensor(0.5000, dtype=torch.float64)
    """
    return iou_of(segmentation_counts(maps, masks).nansum(0))


def accuracy_of(counts: Tensor) -> Tensor:
    """Right over labelled pixels, from sums of :func:`segmentation_counts` [6]."""
    return (counts[0] / counts[1]).where(counts[1] > 0, torch.nan)


def iou_of(counts: Tensor) -> Tensor:
    """Mean of background's and object's IoU, likewise."""
    unions = counts[[3, 5]]
    return (counts[[2, 4]] / unions).where(unions > 0, torch.nan).mean()


MeanAP = mean_of("MeanAP", mean_ap)
ForegroundF1 = mean_of("ForegroundF1", foreground_f1)
EnergyInMask = mean_of("EnergyInMask", energy_inside)
RankAccuracy = mean_of("RankAccuracy", rank_accuracy)
ForegroundAUC = mean_of("ForegroundAUC", foreground_auc)
PointingGame = mean_of("PointingGame", pointing_game, tolerance=partial(check_number, "tolerance", low=0))
TopKIntersection = mean_of("TopKIntersection", topk_intersection, k=partial(check_whole, "k", least=1))


def _share_of_objects(maps: Tensor, masks: Tensor) -> Tensor:
    """The chance level of the others, :func:`object_share`, from what they are given; NaN where they are NaN too."""
    share = object_share(masks)
    return share.masked_fill(share == 0, torch.nan)


ObjectShare = mean_of("ObjectShare", _share_of_objects, higher_is_better=None)


class OverDataSet(Metric):
    """Sums of :func:`segmentation_counts` over all images, in one process or several; ``undefined`` hold NaN."""

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

    def compute(self) -> Tensor:
        """The ratio of the sums, float64; NaN where there is nothing to divide by."""
        return self.ratio(self.total)

    @staticmethod
    def ratio(counts: Tensor) -> Tensor:
        """From sums [6] to one number."""
        raise NotImplementedError


class PixelAccuracy(OverDataSet):
    """:func:`pixel_accuracy` of a data set: right pixels over labelled pixels, both summed over all images.

    >>> metric = PixelAccuracy()
    >>> metric.update(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    >>> metric.compute()
    tensor(0.6667, dtype=torch.float64)
    """

    ratio = staticmethod(accuracy_of)


class MeanIoU(OverDataSet):
    """:func:`mean_iou` of a data set: intersections and unions summed over all images, divided once."""

    ratio = staticmethod(iou_of)
