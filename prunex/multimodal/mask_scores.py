"""How well relevance covers what was detected: COCO's mask AP at IoU 0.20 to 0.95, and the mean IoU of objects.

The DETR experiment of Chefer, Gur & Wolf (ICCV 2021, arXiv 2103.15679): a detector that never saw a mask, whose
relevance maps become masks (:mod:`prunex.multimodal.masks`). **Sixteen thresholds from 0.20** make this AP larger than
the usual one from 0.50: the two must not stand in one table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.multimodal.coco import Objects, need_pycocotools
from prunex.multimodal.masks import MaskRule, came, cell_masks, image_masks

IOU_THRESHOLDS = tuple(k / 100 for k in range(20, 100, 5))
SIZES = ("small", "medium", "large")
SMALL, MEDIUM = 32**2, 96**2  # pixels from which COCO calls an object medium, and large


@dataclass(eq=False, repr=False)
class Detections(Brief):
    """What was detected in one image, with the masks made of its explanation.

    Attributes:
        masks: bool [K, H, W], at the size of the image as it came; empty for detections that are not explained.
        scores: float [K], the probabilities that detections are ranked by.
        labels: int64 [K], classes.
        constant: How many maps had one value, so that nothing divides them.
    """

    masks: Tensor
    scores: Tensor
    labels: Tensor
    constant: int = 0

    @classmethod
    def of_maps(
        cls,
        maps: Tensor,
        scores: Tensor,
        labels: Tensor,
        input_size: tuple[int, int],
        original_size: tuple[int, int] | None = None,
        *,
        size: tuple[int, int] | None = None,
        mask_rule: MaskRule = "reference",
    ) -> Detections:
        """From relevance maps, float [K, h, w], one a detection: see :func:`prunex.multimodal.masks.image_masks`.

        >>> found = Detections.of_maps(torch.rand(2, 3, 4), torch.tensor([0.9, 0.6]), torch.tensor([1, 5]), (96, 128))
        >>> found.masks.shape, found.constant
        (torch.Size([2, 96, 128]), 0)
        """
        cells = cell_masks(maps)
        masks = image_masks(cells.masks, input_size, original_size, size=size, mask_rule=mask_rule)
        return cls(masks, scores, labels, int(cells.constant.sum()))


@dataclass(frozen=True)
class BySize:
    """A number for all objects and for the small (below 32^2 pixels), medium and large (from 96^2) ones; NaN: none.

    An object is a cell or less of a stride of 32 where it is small: read medium and large ones apart.
    """

    all: float
    small: float
    medium: float
    large: float


@dataclass(eq=False, repr=False)
class MaskScores(Brief):
    """What a :class:`MaskScorer` measured; shares in 0..1, NaN where there is no such object.

    Attributes:
        ap: Average precision over the sixteen thresholds, the mean over classes, as COCO's evaluation has it.
        ar: Average recall over them, of at most 100 detections an image and class.
        iou: Mean over objects, crowds aside, of the largest IoU that a mask of the object's class has with it; 0 for
            an object whose class was not detected.
        objects: How many objects that is, by size.
        images: How many images.
        detections: How many detections.
        constant: How many of their maps had one value.
    """

    ap: BySize
    ar: BySize
    iou: BySize
    objects: BySize
    images: int
    detections: int
    constant: int


class MaskScorer:
    """Collects detections and objects image by image, for :class:`MaskScores`.

    Matching, ranking and sizes are pycocotools', by way of torchmetrics; only thresholds and points of recall are set.

    Raises:
        PrunexError: Where pycocotools is not installed.

    >>> scorer, mask = MaskScorer(), torch.zeros(1, 64, 64, dtype=torch.bool)
    >>> mask[0, 8:48, 16:56] = True
    >>> scorer.update(Detections(mask, torch.tensor([0.9]), torch.tensor([3])), Objects(mask, torch.tensor([3])))
    >>> scores = scorer.compute()
    >>> round(scores.ap.all, 6), scores.iou.medium, scores.objects.large
    (1.0, 1.0, 0)
    """

    def __init__(self) -> None:
        need_pycocotools("mask AP")
        # COCO's own points of recall: torchmetrics' are rounded to single precision, and miss a recall that is one.
        recalls = np.linspace(0, 1, 101).tolist()
        self._precision = MeanAveragePrecision(
            iou_type="segm", iou_thresholds=list(IOU_THRESHOLDS), rec_thresholds=recalls
        )
        self._ious: list[Tensor] = []
        self._areas: list[Tensor] = []
        self._images = self._detections = self._constant = 0

    def update(self, detections: Detections, objects: Objects) -> None:
        """Take one image.

        Raises:
            PrunexError: For detections or objects that are none, or of different sizes.
        """
        _check("detections", detections, Detections, "labels", "scores")
        _check("objects", objects, Objects, "labels", "crowd", "areas")
        masks, truth = detections.masks.cpu(), objects.masks.cpu()
        if masks.shape[1:] != truth.shape[1:]:
            raise PrunexError(
                f"masks of detections are {list(masks.shape[1:])} and those of objects {list(truth.shape[1:])}: give "
                "both at the size of the image as it came (original_size)"
            )
        crowd = torch.zeros(len(truth), dtype=torch.bool) if objects.crowd is None else objects.crowd.cpu().bool()
        areas = truth.flatten(1).sum(1).double() if objects.areas is None else objects.areas.cpu().double()
        labels, of = detections.labels.cpu(), objects.labels.cpu()
        self._ious.append(_best_ious(masks, labels, truth[~crowd], of[~crowd]))
        self._areas.append(areas[~crowd])
        if not len(truth):
            # torchmetrics passes over images without objects, and what is wrongly detected there would not count. An
            # empty crowd makes it look: nobody has to find it, and no mask meets it.
            truth, of = masks.new_zeros(1, *masks.shape[1:]), torch.zeros(1, dtype=torch.int64)
            crowd, areas = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.float64)
        scores = detections.scores.detach().cpu().float()
        self._images += 1
        self._detections += len(masks)
        self._constant += detections.constant
        if not len(masks):
            # Nor does it say 0 where nothing is detected in any image. An empty mask behind all others changes no AP.
            masks, labels = torch.zeros_like(truth[:1]), of[:1]
            scores = torch.full((1,), torch.finfo(torch.float32).min)
        detected = {"masks": masks, "scores": scores, "labels": labels}
        annotated = {"masks": truth, "labels": of, "iscrowd": crowd.long(), "area": areas}
        self._precision.update([detected], [annotated])

    def compute(self) -> MaskScores:
        """The scores of all images so far.

        Raises:
            PrunexError: Before the first image.
        """
        if not self._images:
            raise PrunexError("no image was scored: call update(detections, objects) first")
        detected = self._precision.compute()
        ious, areas = torch.cat(self._ious), torch.cat(self._areas)
        size = (areas >= SMALL).long() + (areas >= MEDIUM).long()
        parts = [ious, *(ious[size == k] for k in range(len(SIZES)))]
        return MaskScores(
            ap=_of_coco(detected, "map", "map"),
            ar=_of_coco(detected, "mar_100", "mar"),
            iou=BySize(*(part.mean().item() for part in parts)),
            objects=BySize(*(len(part) for part in parts)),
            images=self._images,
            detections=self._detections,
            constant=self._constant,
        )


def score_masks(explain: Callable[[Any], Detections], data: Iterable[tuple[Any, Objects]]) -> MaskScores:
    """Mask AP and IoU of what ``explain`` makes of each image (arXiv 2103.15679, DETR experiment).

    Args:
        explain: From an image of the data to its :class:`Detections`.
        data: Pairs of an image and its :class:`~prunex.multimodal.coco.Objects`, such as a
            :class:`~prunex.multimodal.coco.CocoFolder` or a list.

    Raises:
        PrunexError: As :class:`MaskScorer`, and for data without images.
    """
    scorer = MaskScorer()
    for image, objects in data:
        scorer.update(explain(image), objects)
    return scorer.compute()


def _best_ious(masks: Tensor, labels: Tensor, truth: Tensor, of: Tensor) -> Tensor:
    """The largest IoU of each object with a mask of its class, float64 [N]; 0 without one."""
    best = torch.zeros(len(truth), dtype=torch.float64)
    for n, (wanted, label) in enumerate(zip(truth, of, strict=True)):
        same = masks[labels == label]
        # An object without a pixel meets no mask: with an empty one its IoU would be 0 / 0.
        if len(same) and wanted.any():
            inside, union = (same & wanted).flatten(1).sum(1), (same | wanted).flatten(1).sum(1)
            best[n] = (inside.double() / union).max()
    return best


def _of_coco(detected: Mapping[str, Tensor], whole: str, part: str) -> BySize:
    """A number of all objects, and those by size, as torchmetrics names them."""
    names = [whole, *(f"{part}_{size}" for size in SIZES)]
    # COCO says -1 where there is nothing to find.
    return BySize(*(detected[name].item() if detected[name] >= 0 else float("nan") for name in names))


def _check(name: str, value: Any, kind: type, *columns: str) -> None:
    """See that it holds masks, and one number of each column for every mask; of those after labels, None for none."""
    if not isinstance(value, kind):
        raise PrunexError(f"{name} are a {type(value).__name__}: give {kind.__name__} of one image")
    masks: Any = getattr(value, "masks", None)
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.ndim != 3 or 0 in masks.shape[1:]:
        raise PrunexError(f"masks of {name} are {came(masks)}: give bool [N, H, W]")
    for column in columns:
        numbers = getattr(value, column)
        if numbers is None and column in ("crowd", "areas"):
            continue
        if not isinstance(numbers, Tensor) or numbers.shape != masks.shape[:1]:
            raise PrunexError(f"{column} of {name} are {came(numbers)}: give one for each of the {len(masks)} masks")
        if column == "labels" and numbers.dtype != torch.int64:
            raise PrunexError(f"labels of {name} are {came(numbers)}: give int64, the model's class numbers")
        if not numbers.isfinite().all():
            raise PrunexError(f"{column} of {name} hold NaN or infinity: give numbers that can be ranked")
