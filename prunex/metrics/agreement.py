"""Agreement: whether the patches a pruned model keeps are the patches an explainer calls relevant.

Everything is judged on the original patch grid, per image, without prefix tokens, and with as many relevant patches as
there are kept ones (K is counted in the mask, not taken from a ratio). The combination is our own, made of published
parts: feature and rank agreement (arXiv 2202.01602), mass accuracy (arXiv 2003.07258), Kendall's tau (arXiv
1902.10186), rank-biased overlap (Webber et al. 2010).

**What all take.** A mask ``kept``, bool [B, gh, gw], as ``trace.kept()`` gives it; or ``scores`` that a pruner ranked
by, float [B, gh, gw], larger is kept and NaN for patches that had none, which are left out; and ``maps`` of the same
shape, floats, raw relevance. The answer is float64 [B]; other shapes and types are refused with a ``PrunexError``.

**Who judges.** The map should be the *dense* model's, for the class the pruned model is asked about. Many maps of the
pruned model are 0 on dropped patches by construction, which makes agreement trivially perfect: call that
self-agreement. Every class and :func:`agreement` record which it was, as ``judge`` "dense" or "self". A pruner that
ranks by class attention (``evit``) also agrees with attention maps partly because both are one quantity: judge it by a
map that does not use attention.

**Signs and ties.** Rank and set measures take relevance raw; mass measures count negative relevance as 0. Of tied
patches the expectation over their order is taken. An image whose map is constant or holds NaN or infinity has no
number (NaN), nor has one without a kept patch; where all are kept, overlap and mass are 1 and what compares kept with
dropped is NaN.

High agreement is not faithfulness: pair it with what the dense model loses when only kept, or only dropped, patches are
shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunex.checks import check_index, check_whole
from prunex.errors import PrunexError
from prunex.metrics.base import MeanOf, mean_of
from prunex.metrics.checks import check_grid, check_kept, check_scores
from prunex.metrics.ranks import inside_top, kendall, rank_biased, separation, spearman
from prunex.registry import register
from prunex.vit.trace import TokenTrace

if TYPE_CHECKING:
    from prunex.relevance.explanation import Explanation

_KRISHNA = "Krishna et al., TMLR 2024, arXiv 2202.01602"
_MASK = "a kept-token mask and a dense model's map"
_SCORES = "a pruner's scores and a dense model's map"
JUDGES = ("dense", "self")


@register("metric", "equal_area_iou", f"feature agreement of {_KRISHNA}, as IoU", _MASK)
def equal_area_iou(kept: Tensor, maps: Tensor) -> Tensor:
    """IoU of the K kept and the K most relevant patches, i / (2 K - i) with i of them in both: [B] in 0..1.

    Chance is about rho / (2 - rho) with rho = K / P: 0.54 at a keep ratio of 0.7, so 0.6 is not good. Of tied patches
    the expected i goes in.

    >>> equal_area_iou(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    tensor([0.3333], dtype=torch.float64)
    """
    kept, relevance, count, defined = _compared(kept, maps)
    both = inside_top(relevance, kept, count)
    return (both / (2 * count - both)).where(defined, torch.nan)


@register("metric", "topk_overlap", f"feature agreement of {_KRISHNA}", _MASK)
def topk_overlap(kept: Tensor, maps: Tensor) -> Tensor:
    """Share of the K kept patches that are among the K most relevant, [B] in 0..1; chance is rho = K / P.

    It is precision, recall and feature agreement at once.

    >>> topk_overlap(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    kept, relevance, count, defined = _compared(kept, maps)
    return (inside_top(relevance, kept, count) / count).where(defined, torch.nan)


@register("metric", "corrected_overlap", f"feature agreement of {_KRISHNA}, corrected for chance as kappa is", _MASK)
def corrected_overlap(kept: Tensor, maps: Tensor) -> Tensor:
    """The overlap above chance, (overlap - rho) / (1 - rho) with rho = K / P: [B], 0 for a random mask, 1 at best.

    NaN where all patches are kept.

    >>> corrected_overlap(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    tensor([0.], dtype=torch.float64)
    """
    share = kept_share(kept)
    overlap = topk_overlap(kept, maps)
    # A mask may lie elsewhere than the map; answers lie where the map does.
    share = share.to(overlap.device)
    return ((overlap - share) / (1 - share)).where(share < 1, torch.nan)


@register("metric", "mass_kept", "mass accuracy of Arras et al., Information Fusion 2022, arXiv 2003.07258", _MASK)
def mass_kept(kept: Tensor, maps: Tensor) -> Tensor:
    """Share of the positive relevance that lies on kept patches, [B] in 0..1; chance is rho = K / P.

    Negative relevance counts as 0; without positive relevance the answer is NaN.

    >>> mass_kept(torch.tensor([[[True, True, False]]]), torch.tensor([[[3.0, -1.0, 1.0]]]))
    tensor([0.7500], dtype=torch.float64)
    """
    kept, relevance, _, defined = _compared(kept, maps)
    return (_mass(relevance) * kept).sum(1).where(defined, torch.nan)


@register("metric", "mass_efficiency", "mass accuracy of arXiv 2003.07258 between chance and the best mask", _MASK)
def mass_efficiency(kept: Tensor, maps: Tensor) -> Tensor:
    """Mass kept above chance, over what the K most relevant patches would keep above it: [B], 0 at random, 1 at best.

    Negative relevance counts as 0; NaN without positive relevance, or where all patches are kept.

    >>> mass_efficiency(torch.tensor([[[True, False]]]), torch.tensor([[[3.0, 1.0]]]))
    tensor([1.], dtype=torch.float64)
    """
    kept, relevance, count, defined = _compared(kept, maps)
    chance = count.double() / kept.shape[1]
    share = _mass(relevance)
    # The best mask of K patches holds the K largest shares, whatever their places.
    ranked = share.sort(1, descending=True).values
    among = torch.arange(kept.shape[1], device=kept.device) < count[:, None]
    best = (ranked * among).sum(1)
    efficiency = ((share * kept).sum(1) - chance) / (best - chance)
    return efficiency.where(defined & (count < kept.shape[1]), torch.nan)


@register("metric", "kept_auc", "the area under the ROC curve, the normalised Mann-Whitney U", _MASK)
def kept_auc(kept: Tensor, maps: Tensor) -> Tensor:
    """How often a kept patch is more relevant than a dropped one, ties half: [B] in 0..1, chance 0.5.

    The ROC-AUC of relevance against the mask, and the best single number for a hard mask; NaN where all patches are
    kept.

    >>> kept_auc(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    kept, relevance, _, defined = _compared(kept, maps)
    return separation(relevance, kept).where(defined, torch.nan)


@register("metric", "sign_agreement", f"sign agreement of {_KRISHNA}, of kept patches with 'for the class'", _MASK)
def sign_agreement(kept: Tensor, maps: Tensor) -> Tensor:
    """Share of the kept patches whose relevance is above 0, [B] in 0..1; chance is that share of all patches.

    Says something of signed maps only.

    >>> sign_agreement(torch.tensor([[[True, True, False]]]), torch.tensor([[[4.0, -1.0, 3.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    kept, relevance, count, defined = _compared(kept, maps)
    return ((kept & (relevance > 0)).sum(1).double() / count).where(defined, torch.nan)


@register("metric", "rank_spearman", f"rank correlation of {_KRISHNA}; Adebayo et al., arXiv 1810.03292", _SCORES)
def rank_spearman(scores: Tensor, maps: Tensor) -> Tensor:
    """Spearman's correlation of keep scores and relevance, Pearson's of their average ranks: [B] in -1..1, chance 0.

    NaN where either is constant. Means over images are plain, without Fisher's z.

    >>> rank_spearman(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 9.0, 4.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    scores, relevance = check_scores("scores", scores, maps)
    return spearman(scores, relevance, ~scores.isnan()).where(_informative(relevance), torch.nan)


@register("metric", "rank_kendall", "Kendall's tau-b, as in Jain & Wallace, NAACL 2019, arXiv 1902.10186", _SCORES)
def rank_kendall(scores: Tensor, maps: Tensor) -> Tensor:
    """Kendall's tau-b of keep scores and relevance, [B] in -1..1, chance 0; NaN where either is constant.

    >>> rank_kendall(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 9.0, 4.0]]]))
    tensor([0.3333], dtype=torch.float64)
    """
    scores, relevance = check_scores("scores", scores, maps)
    return kendall(scores, relevance, ~scores.isnan()).where(_informative(relevance), torch.nan)


@register("metric", "rank_biased_overlap", "Webber et al., TOIS 2010 (extrapolated form)", _SCORES)
def rank_biased_overlap(scores: Tensor, maps: Tensor, *, persistence: float = 0.98) -> Tensor:
    """Overlap of the two rankings that weighs their tops most: extrapolated RBO over all patches, [B] in 0..1.

    Both rankings are whole, so it is p^P + (1 - p) / p sum_d p^d X_d / d with ``persistence`` p in (0, 1); nearer to 1
    looks deeper. Ties are broken in both at random and independently, in expectation: two equal rankings with ties
    score below 1. Chance is :func:`rank_biased_chance`. NaN where either is constant.

    >>> rank_biased_overlap(torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([[[9.0, 4.0, 1.0]]]))
    tensor([1.], dtype=torch.float64)
    """
    check_persistence(persistence)
    scores, relevance = check_scores("scores", scores, maps)
    ranked = ~scores.isnan()
    # Two rankings that are ties alone agree by chance, which is no agreement.
    defined = _informative(relevance) & _varied(scores, ranked) & _varied(relevance, ranked)
    return rank_biased(scores, relevance, persistence, ranked).where(defined, torch.nan)


def rank_biased_chance(patches: int, persistence: float = 0.98) -> float:
    """What a random ranking of P patches scores on :func:`rank_biased_overlap`: two tops of depth d share d^2 / P.

    >>> round(rank_biased_chance(196), 3)
    0.25
    """
    check_whole("patches", patches, 1)
    check_persistence(persistence)
    tail = math.fsum(d * persistence**d for d in range(1, patches + 1)) / patches
    return persistence**patches + (1 - persistence) / persistence * tail


@register("metric", "depth_correlation", "Spearman's correlation or Kendall's tau-b; the measure is ours", _MASK)
def depth_correlation(depths: Tensor, maps: Tensor, *, kind: str = "spearman") -> Tensor:
    """Whether more relevant patches stay longer: correlation of the stage a patch was dropped at with its relevance.

    ``depths``, whole or float [B, gh, gw], is how many stages each patch survived, as ``trace.depth()`` gives it;
    ``kind`` is "spearman" (average ranks) or "kendall" (tau-b). [B] in -1..1, chance 0; NaN where either is constant.

    >>> depth_correlation(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[1.0, 9.0, 4.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    if kind not in ("spearman", "kendall"):
        raise PrunexError(f"kind={kind!r} is not allowed: give 'spearman' or 'kendall'")
    # Depths are counts: whole numbers are as good as floats, where scores must be floats.
    depths = check_grid("depths", depths, floats=False)
    if depths.is_complex():
        raise PrunexError(f"depths have dtype {depths.dtype}: give numbers [B, gh, gw]")
    ranked, relevance = check_scores("depths", depths.double(), maps)
    correlation = spearman if kind == "spearman" else kendall
    return correlation(ranked, relevance).where(_informative(relevance), torch.nan)


def kept_share(kept: Tensor) -> Tensor:
    """Share of patches kept, rho = K / P: chance of overlap and mass. float64 [B].

    >>> kept_share(torch.tensor([[[True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    kept = check_grid("kept", kept, floats=False)
    return check_kept(kept, torch.zeros(kept.shape, device=kept.device))[0].double().mean(1)


def keep_scores(trace: TokenTrace, stage: int = -1) -> Tensor:
    """What the pruner ranked by at a stage (-1 is the last), on the original grid, through all stages before it.

    Returns:
        float32 [B, gh, gw] or wider; NaN for patches that were gone before the stage, all NaN for a stage that ranked
        by nothing.

    Raises:
        PrunexError: For a stage that does not exist.
    """
    if not isinstance(trace, TokenTrace):
        raise PrunexError(f"trace is a {type(trace).__name__}: give pruning.trace, or an explanation's trace")
    count = len(trace.stages)
    stage = check_index("stage", stage, count, f"this trace has {count} stages")
    if trace.stages[stage].score is None:
        return torch.full((trace.batch, *trace.grid), torch.nan, device=trace.device)
    # A later stage ranked the tokens that were left; what others had was no score of theirs.
    scores, ranked = trace.scores(stage)
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(~ranked, torch.nan).unflatten(1, trace.grid)


ON_MASK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "equal_area_iou": equal_area_iou,
    "topk_overlap": topk_overlap,
    "corrected_overlap": corrected_overlap,
    "mass_kept": mass_kept,
    "mass_efficiency": mass_efficiency,
    "kept_auc": kept_auc,
    "sign_agreement": sign_agreement,
}
ON_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rank_spearman": rank_spearman,
    "rank_kendall": rank_kendall,
    "rank_biased_overlap": rank_biased_overlap,
}


def agreement(
    kept: TokenTrace | Tensor,
    maps: Tensor | Explanation,
    scores: Tensor | None = None,
    *,
    stage: int = -1,
    judge: str | None = None,
) -> dict[str, Any]:
    """Every measure of agreement of one batch at once, per image.

    Args:
        kept: The trace of a pruned forward, or its mask, bool [B, gh, gw].
        maps: The judge's relevance of the same images, float [B, gh, gw] raw, or its ``Explanation``.
        scores: What the pruner ranked by, float [B, gh, gw], NaN where a patch had none; None: the trace's own. Where
            tokens were merged: each patch's share of its token.
        stage: Which stage of the trace; -1 is the last.
        judge: "dense" or "self": whose map it is, recorded in the answer. None: as the explanation's trace says; a
            bare tensor counts as the dense model's.

    Returns:
        "judge", and by name float64 [B]: "kept_share" (rho), the measures on the mask, those on scores (if there are
        any) and "depth_correlation" (of a trace that dropped patches). After merging or pooling there is no kept set:
        what needs one is NaN.

    Raises:
        PrunexError: For shapes or types that do not fit, an unknown judge, or one that the explanation contradicts.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    >>> images = torch.randn(2, 3, 224, 224)
    >>> dense = prunex.explain("rollout", model, images)
    >>> with prunex.attach(model, "evit", keep_ratio=0.7) as pruning:
    ...     _ = model(images)
    ...     measured = agreement(pruning.trace, dense)
    >>> measured["judge"], measured["kept_auc"].shape
    ('dense', torch.Size([2]))
    """
    judge = _judge(maps, judge)
    relevance: Any = getattr(maps, "maps", maps)
    has_kept_set, depth = True, None
    # What merges or pools keeps no set of patches, so that set measures would compare with nothing.
    if isinstance(kept, TokenTrace):
        trace, has_kept_set = kept, not (kept.merges(stage) or kept.pooled)
        kept = trace.kept(stage)
        if trace.stages and scores is None:
            scores = keep_scores(trace, stage) if has_kept_set else trace.share(stage).float()
        if trace.stages and not (trace.merges() or trace.pooled):
            depth = trace.depth()
    measured = on_mask(kept, relevance)
    measured["kept_share"] = kept_share(kept).to(relevance.device)
    # The columns stay, so that tables of several pruners line up.
    if not has_kept_set:
        measured = {name: torch.full_like(v, torch.nan) for name, v in measured.items()}
    if scores is not None:
        measured |= {name: measure(scores, relevance) for name, measure in ON_SCORES.items()}
    if depth is not None:
        measured["depth_correlation"] = depth_correlation(depth, relevance)
    return {"judge": judge, **measured}


def check_judge(value: Any) -> str:
    """Whose map judges: "dense" or "self"."""
    if value not in JUDGES:
        raise PrunexError(f"judge={value!r} is not allowed: give 'dense' (the dense model's map) or 'self'")
    return str(value)


def check_persistence(value: Any) -> float:
    """How deep rank-biased overlap looks, p in (0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise PrunexError(f"persistence={value!r} is not allowed: give a number between 0 and 1")
    return value


def on_mask(kept: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """Every measure on a mask, by name."""
    return {name: measure(kept, maps) for name, measure in ON_MASK.items()}


def _compared(kept: Tensor, maps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A mask and relevance [B, P], how many are kept [B], and which images have a number: bool [B]."""
    kept, relevance = check_kept(kept, maps)
    count = kept.sum(1)
    return kept, relevance, count, _informative(relevance) & (count > 0)


def _mass(relevance: Tensor) -> Tensor:
    """Each patch's share of its image's positive relevance, [B, P]; NaN without any."""
    positive = relevance.clamp(min=0)
    return positive / positive.sum(1, keepdim=True)


def _informative(relevance: Tensor) -> Tensor:
    """Which maps say something: finite and not constant, bool [B]."""
    # A constant map ranks nothing: any number would be that of its ties.
    return relevance.isfinite().all(1) & (relevance != relevance[:, :1]).any(1)


def _varied(values: Tensor, counted: Tensor) -> Tensor:
    """Which rows hold two different values among those that count, bool [B]."""
    return values.masked_fill(~counted, torch.inf).amin(1) < values.masked_fill(~counted, -torch.inf).amax(1)


def _judge(maps: Any, judge: str | None) -> str:
    """Whose map it is, as an explanation's trace says; a judge who is named must be the same."""
    if judge is not None:
        check_judge(judge)
    # An explanation knows whether its model dropped tokens; a bare tensor does not.
    trace = getattr(maps, "trace", None)
    if not isinstance(trace, TokenTrace):
        return judge or "dense"
    traced = "self" if trace.stages else "dense"
    if judge not in (None, traced):
        dropped = "tokens" if traced == "self" else "nothing"
        raise PrunexError(
            f"judge={judge!r} contradicts the explanation, whose model dropped {dropped}: leave judge out, or explain "
            "the other model"
        )
    return traced


class Agreement(MeanOf):
    """Mean over images of one measure of agreement, and whose map judged: ``judge`` is "dense" or "self".

    It is the first argument, before the measure's own options and ``keep``, to keep every image's number too.
    """

    extras = {"judge": "dense"}
    checks = {"judge": check_judge}
    judge: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}(judge={self.judge!r})"


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
