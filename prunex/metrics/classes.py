"""The torchmetrics classes: each the mean over images of one function, under that function's options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from prunex.checks import check_choice, check_number, check_whole
from prunex.errors import unknown
from prunex.metrics.agreement import (
    check_judge,
    check_persistence,
    corrected_overlap,
    depth_correlation,
    equal_area_iou,
    kept_auc,
    mass_efficiency,
    mass_kept,
    rank_biased_overlap,
    rank_kendall,
    rank_spearman,
    sign_agreement,
    topk_overlap,
)
from prunex.metrics.base import MeanOverImages
from prunex.metrics.checks import check_steps
from prunex.metrics.curves import (
    DEFINITIONS,
    aopc,
    comprehensiveness,
    deletion,
    insertion,
    log_odds,
    srg,
    sufficiency,
)
from prunex.metrics.faithfulness import faithfulness_correlation, infidelity, saco, sensitivity_n
from prunex.metrics.localization import (
    accuracy_of,
    energy_inside,
    foreground_auc,
    foreground_f1,
    iou_of,
    mean_ap,
    object_share,
    pointing_game,
    rank_accuracy,
    segmentation_counts,
    topk_intersection,
)

TORCHMETRICS = (
    "compute_on_cpu", "dist_sync_on_step", "process_group", "dist_sync_fn", "distributed_available_fn",
    "sync_on_compute", "compute_with_cache",
)  # fmt: skip
KEYWORD, REST = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD


class MeanOf(MeanOverImages):
    """Mean over images of one function, made by :func:`mean_of`; the function's options are attributes."""

    function: ClassVar[Callable[..., Tensor]]
    options: ClassVar[dict[str, Any]]
    checks: ClassVar[dict[str, Callable[[Any], Any]]]
    signature: ClassVar[inspect.Signature]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self.signature.bind(*args, **kwargs)
        given.apply_defaults()
        rest, keep = given.arguments.pop("kwargs"), given.arguments.pop("keep")
        for name in rest:
            if name not in TORCHMETRICS:
                raise unknown(f"option of {type(self).__name__}", name, self.options)
        super().__init__(keep, **rest)
        for name, value in given.arguments.items():
            setattr(self, name, self.checks[name](value) if name in self.checks else value)

    def measure(self, *args: Any, **kwargs: Any) -> Tensor:
        """One number an image; several of one image are averaged where they are defined."""
        options = {name: getattr(self, name) for name in self.options}
        values = type(self).function(*args, **kwargs, **options)
        return values if values.ndim == 1 else values.nanmean(1)


class Agreement(MeanOf):
    """Mean over images of one measure of agreement, and whose map judged.

    Args:
        judge: "dense" or "self": whose maps :meth:`update` is given.
        *args: The measure's own options, then ``keep``: also keep every image's number.
        **kwargs: Likewise, and torchmetrics' own.

    Raises:
        PrunexError: For an unknown judge.
    """

    def __init__(self, judge: str = "dense", *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.judge = check_judge(judge)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(judge={self.judge!r})"


def mean_of(
    name: str,
    function: Callable[..., Tensor],
    base: type[MeanOf] = MeanOf,
    *,
    higher_is_better: bool | None = True,
    **checks: Callable[[Any], Any],
) -> type[MeanOf]:
    """The class of a function's mean over images; ``update`` takes what the function takes.

    Args:
        name: Of the class.
        function: From data to one number an image; its parameters with a default, ``target`` aside, become options.
        base: What the class is made from.
        higher_is_better: As torchmetrics has it.
        **checks: By option, what sees to its value before the first batch.

    >>> metric = EqualAreaIoU(judge="dense")
    >>> metric.update(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    >>> metric.compute(), metric.judge
    (tensor(0.3333, dtype=torch.float64), 'dense')
    """
    taken = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in taken if p.default is not p.empty and p.name != "target"}
    defaults |= getattr(function, "handed_on", {})
    parameters = [inspect.Parameter(option, KEYWORD, default=value) for option, value in defaults.items()]
    parameters += [inspect.Parameter("keep", KEYWORD, default=False), inspect.Parameter("kwargs", REST)]
    words = (inspect.getdoc(function) or "").split(">>> ")[0].rstrip()
    body = {
        "__module__": __name__,  # where pickle looks the class up
        "__doc__": f"Mean over images of :func:`{function.__name__}`. {words}",
        "function": staticmethod(function),
        "options": defaults,
        "checks": checks,
        "signature": inspect.Signature(parameters),
        "higher_is_better": higher_is_better,
    }
    made: type[MeanOf] = type(base)(name, (base,), body)
    return made


EqualAreaIoU = mean_of("EqualAreaIoU", equal_area_iou, Agreement)
TopKOverlap = mean_of("TopKOverlap", topk_overlap, Agreement)
CorrectedOverlap = mean_of("CorrectedOverlap", corrected_overlap, Agreement)
MassKept = mean_of("MassKept", mass_kept, Agreement)
MassEfficiency = mean_of("MassEfficiency", mass_efficiency, Agreement)
KeptAUC = mean_of("KeptAUC", kept_auc, Agreement)
SignAgreement = mean_of("SignAgreement", sign_agreement, Agreement)
RankSpearman = mean_of("RankSpearman", rank_spearman, Agreement)
RankKendall = mean_of("RankKendall", rank_kendall, Agreement)
RankBiasedOverlap = mean_of("RankBiasedOverlap", rank_biased_overlap, Agreement, persistence=check_persistence)
DepthCorrelation = mean_of("DepthCorrelation", depth_correlation, Agreement)

MeanAP = mean_of("MeanAP", mean_ap)
ForegroundF1 = mean_of("ForegroundF1", foreground_f1)
EnergyInMask = mean_of("EnergyInMask", energy_inside)
RankAccuracy = mean_of("RankAccuracy", rank_accuracy)
ForegroundAUC = mean_of("ForegroundAUC", foreground_auc)
PointingGame = mean_of("PointingGame", pointing_game, tolerance=partial(check_number, "tolerance", low=0))
TopKIntersection = mean_of("TopKIntersection", topk_intersection, k=partial(check_whole, "k", least=1))

Deletion = mean_of("Deletion", deletion, higher_is_better=False)
Insertion = mean_of("Insertion", insertion)
SRG = mean_of("SRG", srg)
AOPC = mean_of("AOPC", aopc, definition=partial(check_choice, "definition", allowed=DEFINITIONS), fractions=check_steps)
LogOdds = mean_of("LogOdds", log_odds, higher_is_better=False, fractions=check_steps)
Comprehensiveness = mean_of("Comprehensiveness", comprehensiveness, fractions=check_steps)
Sufficiency = mean_of("Sufficiency", sufficiency, higher_is_better=False, fractions=check_steps)

SensitivityN = mean_of("SensitivityN", sensitivity_n)
FaithfulnessCorrelation = mean_of("FaithfulnessCorrelation", faithfulness_correlation)
Infidelity = mean_of("Infidelity", infidelity, higher_is_better=False)
SaCo = mean_of("SaCo", saco)


def _share_of_objects(maps: Tensor, masks: Tensor) -> Tensor:
    """The chance level of the others, :func:`object_share`, from what they are given; NaN where they are NaN too."""
    share = object_share(masks)
    return share.masked_fill(share == 0, torch.nan)


ObjectShare = mean_of("ObjectShare", _share_of_objects, higher_is_better=None)


class OverDataSet(Metric):
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


class PixelAccuracy(OverDataSet):
    """:func:`pixel_accuracy` of a data set: right pixels over labelled pixels, both summed over all images.

    >>> metric = PixelAccuracy()
    >>> metric.update(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, False]]]))
    >>> metric.compute()
    tensor(0.6667, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The ratio, float64; NaN without a labelled pixel."""
        return accuracy_of(self.total)


class MeanIoU(OverDataSet):
    """:func:`mean_iou` of a data set: intersections and unions summed over all images, divided once."""

    def compute(self) -> Tensor:
        """The mean over background and object, float64; NaN where one of them is nowhere."""
        return iou_of(self.total)
