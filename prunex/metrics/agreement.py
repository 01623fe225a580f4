"""Agreement: whether the patches a pruned model keeps are the patches an explainer calls relevant.

Everything is judged on the original patch grid, per image, without prefix tokens, and with as many relevant patches as
there are kept ones (K is counted in the mask, not taken from a ratio). The combination is our own, made of published
parts: feature and rank agreement (arXiv 2202.01602), mass accuracy (arXiv 2003.07258), Kendall's tau (arXiv
1902.10186), rank-biased overlap (Webber et al. 2010).

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

from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.metrics.base import MeanOverImages
from prunex.metrics.checks import check_grid, check_kept, check_scores
from prunex.metrics.ranks import inside_top, kendall, rank_biased, separation, spearman
from prunex.registry import register
from prunex.vit.trace import TokenTrace

if TYPE_CHECKING:
    from prunex.explain import Explanation

_KRISHNA = "Krishna et al., TMLR 2024, arXiv 2202.01602"
_MASK = "a kept-token mask and a dense model's map"
_SCORES = "a pruner's scores and a dense model's map"
JUDGES = ("dense", "self")


@register("metric", "equal_area_iou", f"feature agreement of {_KRISHNA}, as IoU", _MASK)
def equal_area_iou(kept: Tensor, maps: Tensor) -> Tensor:
    """IoU of the K kept and the K most relevant patches, i / (2 K - i) with i of them in both.

    Chance is about rho / (2 - rho) with rho = K / P: 0.54 at a keep ratio of 0.7, so 0.6 is not good. Of tied patches
    the expected i goes in.

    Args:
        kept: bool [B, gh, gw], as ``trace.kept()`` gives it.
        maps: float [B, gh, gw], raw relevance.

    Returns:
        float64 [B] in 0..1; NaN without a kept patch, or for a constant or not finite map.

    Raises:
        PrunexError: For other shapes or types.

    >>> equal_area_iou(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    tensor([0.3333], dtype=torch.float64)
    """
    kept, relevance = check_kept(kept, maps)
    count = kept.sum(1)
    both = inside_top(relevance, kept, count)
    return (both / (2 * count - both)).where(_told(relevance) & (count > 0), torch.nan)


@register("metric", "topk_overlap", f"feature agreement of {_KRISHNA}", _MASK)
def topk_overlap(kept: Tensor, maps: Tensor) -> Tensor:
    """Share of the K kept patches that are among the K most relevant: precision, recall and feature agreement at once.

    Chance is rho = K / P.

    Args:
        kept: bool [B, gh, gw].
        maps: float [B, gh, gw], raw relevance.

    Returns:
        float64 [B] in 0..1; NaN without a kept patch, or for a constant or not finite map.

    Raises:
        PrunexError: For other shapes or types.

    >>> topk_overlap(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    kept, relevance = check_kept(kept, maps)
    count = kept.sum(1)
    return (inside_top(relevance, kept, count) / count).where(_told(relevance) & (count > 0), torch.nan)


@register("metric", "corrected_overlap", f"feature agreement of {_KRISHNA}, corrected for chance as kappa is", _MASK)
def corrected_overlap(kept: Tensor, maps: Tensor) -> Tensor:
    """The overlap above chance, (overlap - rho) / (1 - rho) with rho = K / P: 0 for a random mask, 1 at best.

    Args:
        kept: bool [B, gh, gw].
        maps: float [B, gh, gw], raw relevance.

    Returns:
        float64 [B], at most 1; NaN where all or no patches are kept, or for a constant or not finite map.

    Raises:
        PrunexError: For other shapes or types.

    >>> corrected_overlap(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    tensor([0.], dtype=torch.float64)
    """
    share = kept_share(kept)
    overlap = topk_overlap(kept, maps)
    share = share.to(overlap.device)
    return ((overlap - share) / (1 - share)).where(share < 1, torch.nan)


@register("metric", "mass_kept", "mass accuracy of Arras et al., Information Fusion 2022, arXiv 2003.07258", _MASK)
def mass_kept(kept: Tensor, maps: Tensor) -> Tensor:
    """Share of the positive relevance that lies on kept patches; chance is rho = K / P.

    Args:
        kept: bool [B, gh, gw].
        maps: float [B, gh, gw]; negative relevance counts as 0.

    Returns:
        float64 [B] in 0..1; NaN without positive relevance or kept patches, or for a constant or not finite map.

    Raises:
        PrunexError: For other shapes or types.

    >>> mass_kept(torch.tensor([[[True, True, False]]]), torch.tensor([[[3.0, -1.0, 1.0]]]))
    tensor([0.7500], dtype=torch.float64)
    """
    kept, relevance = check_kept(kept, maps)
    share = _mass(relevance)
    return (share * kept).sum(1).where(_told(relevance) & kept.any(1), torch.nan)


@register("metric", "mass_efficiency", "mass accuracy of arXiv 2003.07258 between chance and the best mask", _MASK)
def mass_efficiency(kept: Tensor, maps: Tensor) -> Tensor:
    """Mass kept above chance, over what the K most relevant patches would keep above it: 0 at random, 1 at best.

    Args:
        kept: bool [B, gh, gw].
        maps: float [B, gh, gw]; negative relevance counts as 0.

    Returns:
        float64 [B], at most 1; NaN where all or no patches are kept, without positive relevance, or for a constant or
        not finite map.

    Raises:
        PrunexError: For other shapes or types.

    >>> mass_efficiency(torch.tensor([[[True, False]]]), torch.tensor([[[3.0, 1.0]]]))
    tensor([1.], dtype=torch.float64)
    """
    kept, relevance = check_kept(kept, maps)
    count = kept.sum(1)
    chance = count.double() / kept.shape[1]
    share = _mass(relevance)
    ranked = share.sort(1, descending=True).values
    among = torch.arange(kept.shape[1], device=kept.device) < count[:, None]
    best = (ranked * among).sum(1)
    defined = _told(relevance) & (count > 0) & (count < kept.shape[1])
    return (((share * kept).sum(1) - chance) / (best - chance)).where(defined, torch.nan)


@register("metric", "kept_auc", "the area under the ROC curve, the normalised Mann-Whitney U", _MASK)
def kept_auc(kept: Tensor, maps: Tensor) -> Tensor:
    """How often a kept patch is more relevant than a dropped one, ties half: ROC-AUC of relevance against the mask.

    The best single number for a hard mask; chance is 0.5.

    Args:
        kept: bool [B, gh, gw].
        maps: float [B, gh, gw], raw relevance.

    Returns:
        float64 [B] in 0..1; NaN where all or no patches are kept, or for a constant or not finite map.

    Raises:
        PrunexError: For other shapes or types.

    >>> kept_auc(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    kept, relevance = check_kept(kept, maps)
    return separation(relevance, kept).where(_told(relevance), torch.nan)


@register("metric", "sign_agreement", f"sign agreement of {_KRISHNA}, of kept patches with 'for the class'", _MASK)
def sign_agreement(kept: Tensor, maps: Tensor) -> Tensor:
    """Share of the kept patches whose relevance is above 0; chance is that share of all patches.

    Says something of signed maps only.

    Args:
        kept: bool [B, gh, gw].
        maps: float [B, gh, gw], raw relevance.

    Returns:
        float64 [B] in 0..1; NaN without a kept patch, or for a constant or not finite map.

    Raises:
        PrunexError: For other shapes or types.

    >>> sign_agreement(torch.tensor([[[True, True, False]]]), torch.tensor([[[4.0, -1.0, 3.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    kept, relevance = check_kept(kept, maps)
    count = kept.sum(1)
    found = (kept & (relevance > 0)).sum(1).double() / count
    return found.where(_told(relevance) & (count > 0), torch.nan)


@register("metric", "rank_spearman", f"rank correlation of {_KRISHNA}; Adebayo et al., arXiv 1810.03292", _SCORES)
def rank_spearman(scores: Tensor, maps: Tensor) -> Tensor:
    """Spearman's correlation of keep scores and relevance: Pearson's of their average ranks.

    Args:
        scores: float [B, gh, gw], larger is kept; NaN for patches that had none, which are left out.
        maps: float [B, gh, gw], raw relevance.

    Returns:
        float64 [B] in -1..1, chance 0; NaN where either is constant, or for a not finite map.

    Raises:
        PrunexError: For other shapes or types.

    >>> rank_spearman(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 9.0, 4.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    scores, relevance = check_scores("scores", scores, maps)
    return spearman(scores, relevance, ~scores.isnan()).where(_told(relevance), torch.nan)


@register("metric", "rank_kendall", "Kendall's tau-b, as in Jain & Wallace, NAACL 2019, arXiv 1902.10186", _SCORES)
def rank_kendall(scores: Tensor, maps: Tensor) -> Tensor:
    """Kendall's tau-b of keep scores and relevance.

    Args:
        scores: float [B, gh, gw], larger is kept; NaN for patches that had none, which are left out.
        maps: float [B, gh, gw], raw relevance.

    Returns:
        float64 [B] in -1..1, chance 0; NaN where either is constant, or for a not finite map.

    Raises:
        PrunexError: For other shapes or types.

    >>> rank_kendall(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 9.0, 4.0]]]))
    tensor([0.3333], dtype=torch.float64)
    """
    scores, relevance = check_scores("scores", scores, maps)
    return kendall(scores, relevance, ~scores.isnan()).where(_told(relevance), torch.nan)


@register("metric", "rank_biased_overlap", "Webber et al., TOIS 2010 (extrapolated form)", _SCORES)
def rank_biased_overlap(scores: Tensor, maps: Tensor, *, persistence: float = 0.98) -> Tensor:
    """Overlap of the two rankings that weighs their tops most: extrapolated RBO over all patches.

    Both rankings are whole, so it is p^P + (1 - p) / p sum_d p^d X_d / d. Ties are broken in both at random and
    independently, in expectation: two equal rankings with ties score below 1. Chance depends on p and P:
    :func:`rank_biased_chance`.

    Args:
        scores: float [B, gh, gw], larger is kept; NaN for patches that had none, which are left out.
        maps: float [B, gh, gw], raw relevance.
        persistence: p in (0, 1); nearer to 1 looks deeper.

    Returns:
        float64 [B] in 0..1; NaN where either is constant, or for a not finite map.

    Raises:
        PrunexError: For other shapes or types, or a persistence out of range.

    >>> rank_biased_overlap(torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([[[9.0, 4.0, 1.0]]]))
    tensor([1.], dtype=torch.float64)
    """
    _check_persistence(persistence)
    scores, relevance = check_scores("scores", scores, maps)
    there = ~scores.isnan()
    varied = _varied(scores, there) & _varied(relevance, there)
    return rank_biased(scores, relevance, persistence, there).where(_told(relevance) & varied, torch.nan)


def rank_biased_chance(patches: int, persistence: float = 0.98) -> float:
    """What a random ranking scores on :func:`rank_biased_overlap`: two tops of depth d share d^2 / P on average.

    Args:
        patches: P, how many are ranked.
        persistence: p in (0, 1).

    Raises:
        PrunexError: For values out of range.

    >>> round(rank_biased_chance(196), 3)
    0.25
    """
    check_whole("patches", patches, 1)
    _check_persistence(persistence)
    tail = math.fsum(d * persistence**d for d in range(1, patches + 1)) / patches
    return persistence**patches + (1 - persistence) / persistence * tail


@register("metric", "depth_correlation", "Spearman's correlation or Kendall's tau-b; the measure is ours", _MASK)
def depth_correlation(depths: Tensor, maps: Tensor, *, kind: str = "spearman") -> Tensor:
    """Whether more relevant patches stay longer: correlation of the stage a patch was dropped at with its relevance.

    Args:
        depths: whole or float [B, gh, gw], how many stages each patch survived, as ``trace.depth()`` gives it.
        maps: float [B, gh, gw], raw relevance.
        kind: "spearman" (average ranks) or "kendall" (tau-b).

    Returns:
        float64 [B] in -1..1, chance 0; NaN where either is constant, or for a not finite map.

    Raises:
        PrunexError: For other shapes, types or kinds.

    >>> depth_correlation(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[1.0, 9.0, 4.0]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    if kind not in ("spearman", "kendall"):
        raise PrunexError(f"kind={kind!r} is not allowed: give 'spearman' or 'kendall'")
    depths = check_grid("depths", depths, floats=False)
    if depths.is_complex():
        raise PrunexError(f"depths have dtype {depths.dtype}: give numbers [B, gh, gw]")
    ranked, relevance = check_scores("depths", depths.double(), maps)
    found = (spearman if kind == "spearman" else kendall)(ranked, relevance)
    return found.where(_told(relevance), torch.nan)


def kept_share(kept: Tensor) -> Tensor:
    """Share of patches kept, rho = K / P: chance of overlap and mass. float64 [B].

    Args:
        kept: bool [B, gh, gw].

    Raises:
        PrunexError: For other shapes or types.

    >>> kept_share(torch.tensor([[[True, False]]]))
    tensor([0.5000], dtype=torch.float64)
    """
    kept = check_grid("kept", kept, floats=False)
    return check_kept(kept, torch.zeros(kept.shape, device=kept.device))[0].double().mean(1)


def keep_scores(trace: TokenTrace, stage: int = -1) -> Tensor:
    """What the pruner ranked by at a stage, on the original grid, through all stages before it.

    Args:
        trace: Of a pruned forward.
        stage: Which one; -1 is the last.

    Returns:
        float32 [B, gh, gw] or wider; NaN for patches that were gone before the stage, all NaN for a stage that ranked
        by nothing.

    Raises:
        PrunexError: For a stage that does not exist.
    """
    _check_trace(trace)
    count = len(trace.stages)
    if not -count <= stage < count:
        raise PrunexError(f"stage={stage} does not exist: this trace has {count} stages")
    at = stage % count
    score = trace.stages[at].score
    if score is None:
        return torch.full((trace.batch, *trace.grid), torch.nan, device=trace.device)
    score = score.detach().to(torch.promote_types(score.dtype, torch.float32))
    if at == 0:
        return score.unflatten(1, trace.grid)
    place = trace.tokens(at - 1)
    return score.gather(1, place.clamp(min=0)).masked_fill(place < 0, torch.nan).unflatten(1, trace.grid)


_ON_MASK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "equal_area_iou": equal_area_iou,
    "topk_overlap": topk_overlap,
    "corrected_overlap": corrected_overlap,
    "mass_kept": mass_kept,
    "mass_efficiency": mass_efficiency,
    "kept_auc": kept_auc,
    "sign_agreement": sign_agreement,
}
_ON_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
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
    ...     found = agreement(pruning.trace, dense)
    >>> found["judge"], found["kept_auc"].shape
    ('dense', torch.Size([2]))
    """
    judge = _judge(maps, judge)
    relevance: Any = getattr(maps, "maps", maps)
    own_set, depth = True, None
    if isinstance(kept, TokenTrace):
        trace, own_set = kept, not (kept.merges(stage) or kept.pooled)
        kept = trace.kept(stage)
        if trace.stages and scores is None:
            scores = keep_scores(trace, stage) if own_set else trace.share(stage).float()
        if trace.stages and not (trace.merges() or trace.pooled):
            depth = trace.depth()
    found: dict[str, Any] = _on_mask(kept, relevance)
    found["kept_share"] = kept_share(kept).to(relevance.device)
    if not own_set:
        found = {name: torch.full_like(v, torch.nan) for name, v in found.items()}
    if scores is not None:
        found |= {name: measure(scores, relevance) for name, measure in _ON_SCORES.items()}
    if depth is not None:
        found["depth_correlation"] = depth_correlation(depth, relevance)
    return {"judge": judge, **found}


def chance(kept: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """What each measure of :func:`agreement` scores by chance, per image, in closed form.

    Args:
        kept: bool [B, gh, gw].
        maps: float [B, gh, gw], raw relevance.

    Returns:
        By the measures' names, float64 [B]. ``equal_area_iou`` is the usual approximation rho / (2 - rho);
        ``rank_biased_overlap`` is for scores of all patches.

    Raises:
        PrunexError: For other shapes or types.

    >>> chance(torch.tensor([[[True, False]]]), torch.tensor([[[3.0, 1.0]]]))["mass_kept"]
    tensor([0.5000], dtype=torch.float64)
    """
    flat, relevance = check_kept(kept, maps)
    rho = flat.double().mean(1)
    nothing = torch.zeros_like(rho)
    return {
        "equal_area_iou": rho / (2 - rho),
        "topk_overlap": rho,
        "corrected_overlap": nothing,
        "mass_kept": rho,
        "mass_efficiency": nothing,
        "kept_auc": nothing + 0.5,
        "sign_agreement": (relevance > 0).double().mean(1),
        "rank_spearman": nothing,
        "rank_kendall": nothing,
        "rank_biased_overlap": nothing + rank_biased_chance(flat.shape[1]),
        "depth_correlation": nothing,
    }


def baselines(
    kept: Tensor,
    maps: Tensor,
    *,
    other_maps: Tensor | None = None,
    random_maps: Tensor | None = None,
    draws: int = 20,
    seed: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """What to print beside every agreement: the same measures of masks and maps that know less, or something else.

    Args:
        kept: bool [B, gh, gw].
        maps: float [B, gh, gw], the judge's relevance.
        other_maps: float [B, gh, gw], another method's maps of the same images.
        random_maps: float [B, gh, gw], the same method's maps of the model with random weights
            (:func:`prunex.metrics.randomised`).
        draws: Random masks per image.
        seed: Of the random masks.

    Returns:
        By baseline, by measure, float64 [B]:

        - "random": the mean over random masks of the same K;
        - "centre": the K patches nearest to the centre (of those equally near, the first in row order);
        - "another_image": the same mask with the map of the next image of the batch, the last's with the first's; NaN
          for a batch of one. What a mask scores above it is specific to the image;
        - "other_method", with ``other_maps``: the other method's K most relevant patches in place of the mask, and the
          rank measures of the two maps. Methods disagree: it is the ceiling;
        - "random_model", with ``random_maps``: the mask judged by the random model's map.

    Raises:
        PrunexError: For shapes or types that do not fit, or numbers out of range.

    >>> found = baselines(torch.tensor([[[True, False, False]]]), torch.tensor([[[3.0, 1.0, 2.0]]]))
    >>> sorted(found), found["centre"]["topk_overlap"]
    (['another_image', 'centre', 'random'], tensor([0.], dtype=torch.float64))
    """
    check_whole("draws", draws, 1)
    check_whole("seed", seed, 0)
    flat, _ = check_kept(kept, maps)
    grid, count, batch = kept.shape[1:], flat.sum(1), len(flat)
    # One set of orders for all images, so that an image's numbers do not depend on which batch it came in.
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in range(draws)]).to(flat.device)
    drawn = (orders < count[:, None, None]).flatten(0, 1).unflatten(1, grid)
    random = _on_mask(drawn, maps.repeat_interleave(draws, 0))
    found = {
        "random": {name: v.unflatten(0, (batch, draws)).mean(1) for name, v in random.items()},
        "centre": _on_mask(_top(_nearness(grid, flat.device).expand(batch, -1), count).unflatten(1, grid), maps),
        "another_image": _on_mask(kept, maps.roll(-1, 0)),
    }
    if batch == 1:
        found["another_image"] = {k: torch.full_like(v, torch.nan) for k, v in found["another_image"].items()}
    if other_maps is not None:
        other, _ = check_scores("other_maps", other_maps, maps)
        other_grid = other.unflatten(1, grid)
        found["other_method"] = _on_mask(_top(other, count).unflatten(1, grid), maps)
        found["other_method"] |= {name: measure(other_grid, maps) for name, measure in _ON_SCORES.items()}
    if random_maps is not None:
        found["random_model"] = _on_mask(kept, random_maps)
    return found


def _on_mask(kept: Tensor, maps: Tensor) -> dict[str, Tensor]:
    return {name: measure(kept, maps) for name, measure in _ON_MASK.items()}


def _top(values: Tensor, count: Tensor) -> Tensor:
    """The ``count`` largest of each row, bool [B, P]; of ties the first."""
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places) < count[:, None]


def _nearness(grid: Any, device: torch.device) -> Tensor:
    """Minus the squared distance of each patch from the grid's centre, [P]; whole numbers, so that ties are ties."""
    down, right = (2 * torch.arange(n, device=device) - (n - 1) for n in grid)
    return -(down[:, None] ** 2 + right[None, :] ** 2).flatten()


def _mass(relevance: Tensor) -> Tensor:
    """Each patch's share of its image's positive relevance, [B, P]; NaN without any."""
    positive = relevance.clamp(min=0)
    return positive / positive.sum(1, keepdim=True)


def _told(relevance: Tensor) -> Tensor:
    """Which maps say something: finite and not constant, bool [B]."""
    return relevance.isfinite().all(1) & (relevance != relevance[:, :1]).any(1)


def _varied(values: Tensor, there: Tensor) -> Tensor:
    """Which rows hold two different values among those that are there, bool [B]."""
    low = values.masked_fill(~there, torch.inf).amin(1)
    return low < values.masked_fill(~there, -torch.inf).amax(1)


def _judge(maps: Any, judge: str | None) -> str:
    if judge is not None and judge not in JUDGES:
        raise PrunexError(f"judge={judge!r} is not allowed: give 'dense' (the dense model's map) or 'self'")
    trace = getattr(maps, "trace", None)
    if not isinstance(trace, TokenTrace):
        return judge or "dense"
    told = "self" if trace.stages else "dense"
    if judge not in (None, told):
        raise PrunexError(
            f"judge={judge!r} contradicts the explanation, whose model "
            f"{'dropped tokens' if told == 'self' else 'dropped nothing'}: leave judge out, or explain the other model"
        )
    return told


def _check_persistence(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise PrunexError(f"persistence={value!r} is not allowed: give a number between 0 and 1")


def _check_trace(trace: Any) -> None:
    if not isinstance(trace, TokenTrace):
        raise PrunexError(f"trace is a {type(trace).__name__}: give pruning.trace, or an explanation's trace")


class Agreement(MeanOverImages):
    """Mean over images of one measure of agreement, and whose map judged.

    Args:
        judge: "dense" or "self": whose maps :meth:`update` is given.
        keep: Also keep every image's number.
        **kwargs: torchmetrics' own.

    Attributes:
        judge: As given.

    Raises:
        PrunexError: For an unknown judge.
    """

    function: Callable[..., Tensor]

    def __init__(self, judge: str = "dense", keep: bool = False, **kwargs: Any) -> None:
        super().__init__(keep, **kwargs)
        if judge not in JUDGES:
            raise PrunexError(f"judge={judge!r} is not allowed: give 'dense' (the dense model's map) or 'self'")
        self.judge = judge

    def measure(self, told: Tensor, maps: Tensor) -> Tensor:
        """Per image: of masks (or scores, or depths) and maps, float [B, gh, gw]."""
        return type(self).function(told, maps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(judge={self.judge!r})"


class EqualAreaIoU(Agreement):
    """Mean over images of :func:`equal_area_iou`; ``update(kept, maps)``.

    >>> metric = EqualAreaIoU(judge="dense")
    >>> metric.update(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    >>> metric.compute(), metric.judge
    (tensor(0.3333, dtype=torch.float64), 'dense')
    """

    function = staticmethod(equal_area_iou)


class TopKOverlap(Agreement):
    """Mean over images of :func:`topk_overlap`; ``update(kept, maps)``."""

    function = staticmethod(topk_overlap)


class CorrectedOverlap(Agreement):
    """Mean over images of :func:`corrected_overlap`; ``update(kept, maps)``."""

    function = staticmethod(corrected_overlap)


class MassKept(Agreement):
    """Mean over images of :func:`mass_kept`; ``update(kept, maps)``."""

    function = staticmethod(mass_kept)


class MassEfficiency(Agreement):
    """Mean over images of :func:`mass_efficiency`; ``update(kept, maps)``."""

    function = staticmethod(mass_efficiency)


class KeptAUC(Agreement):
    """Mean over images of :func:`kept_auc`; ``update(kept, maps)``."""

    function = staticmethod(kept_auc)


class SignAgreement(Agreement):
    """Mean over images of :func:`sign_agreement`; ``update(kept, maps)``."""

    function = staticmethod(sign_agreement)


class RankSpearman(Agreement):
    """Mean over images of :func:`rank_spearman`, plain, without Fisher's z; ``update(scores, maps)``."""

    function = staticmethod(rank_spearman)


class RankKendall(Agreement):
    """Mean over images of :func:`rank_kendall`; ``update(scores, maps)``."""

    function = staticmethod(rank_kendall)


class RankBiasedOverlap(Agreement):
    """Mean over images of :func:`rank_biased_overlap`; ``update(scores, maps)``.

    Args:
        judge: "dense" or "self".
        persistence: As for the function.
        keep: Also keep every image's number.
        **kwargs: torchmetrics' own.

    Raises:
        PrunexError: For an unknown judge or a persistence out of range.
    """

    def __init__(self, judge: str = "dense", persistence: float = 0.98, keep: bool = False, **kwargs: Any) -> None:
        super().__init__(judge, keep, **kwargs)
        _check_persistence(persistence)
        self.persistence = persistence

    def measure(self, told: Tensor, maps: Tensor) -> Tensor:
        """Per image."""
        return rank_biased_overlap(told, maps, persistence=self.persistence)


class DepthCorrelation(Agreement):
    """Mean over images of :func:`depth_correlation`; ``update(depths, maps)``.

    Args:
        judge: "dense" or "self".
        kind: "spearman" or "kendall".
        keep: Also keep every image's number.
        **kwargs: torchmetrics' own.

    Raises:
        PrunexError: For an unknown judge or, on update, kind.
    """

    def __init__(self, judge: str = "dense", kind: str = "spearman", keep: bool = False, **kwargs: Any) -> None:
        super().__init__(judge, keep, **kwargs)
        self.kind = kind

    def measure(self, told: Tensor, maps: Tensor) -> Tensor:
        """Per image."""
        return depth_correlation(told, maps, kind=self.kind)
