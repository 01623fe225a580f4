"""Faithfulness: whether a map says what taking patches away does to the class.

Metrics that choose sets of patches of their own and ask the model; those that read removal curves are in
``prunex.metrics.curves``.

**What all take.** A supported ViT, pruned or dense, or a module that holds exactly one; ``images`` float [B, C, H, W],
normalised as the model expects; ``maps`` float [B, gh, gw] or [B, H, W], of which a patch has the mean; ``target`` the
class, an int or int [B], None for the predicted one; the ``seed`` of what is drawn, the same for every image; and
``removal``, ``selection``, ``output``, ``mean``, ``std`` and ``chunk`` of :class:`prunex.removal.game.ScoreOptions`.
The answer is float64 [B], NaN where there is none; what does not fit is refused with a ``PrunexError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from prunex.checks import check_choice, check_flag, check_whole
from prunex.errors import PrunexError
from prunex.metrics.base import mean_of
from prunex.metrics.checks import check_steps
from prunex.metrics.curves import PERCENT, removal_curves
from prunex.metrics.occlusion import ClassOcclusion
from prunex.metrics.ranks import TINY, average_ranks, pearson, ranked
from prunex.registry import register
from prunex.removal.coalitions import of_sizes, seeded
from prunex.removal.game import SCORE_DEFAULTS, ScoreOptions
from prunex.targets import Target

ERASER = (0.01, 0.05, 0.1, 0.2, 0.5)

_ANCONA = "Ancona et al., ICLR 2018, arXiv 1711.06104"
_BHATT = "Bhatt, Weller & Moura, IJCAI 2020, arXiv 2005.00631"
_YEH = "Yeh et al., NeurIPS 2019, arXiv 1901.09392"
_RONG = "Rong et al., ICML 2022, arXiv 2202.00449"
_SUNDARARAJAN = "Sundararajan, Taly & Yan, ICML 2017, arXiv 1703.01365"
_WU = "Wu et al., CVPR 2024, arXiv 2404.01415"


@register("metric", "sensitivity_n", _ANCONA, "a hundred forwards a size and image", SCORE_DEFAULTS)
def sensitivity_n(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    sizes: Sequence[int] | None = None,
    samples: int = 100,
    seed: int = 0,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """Sensitivity-n (arXiv 1711.06104): for each n, correlation of relevance removed and score lost over random sets.

    Pearson, over sets S of exactly n patches, between the sum of the map over S and f(x) - f(x without S): [B,
    len(sizes)] in -1..1, high is better; NaN where either side does not vary. Quantus' class of this name removes in
    order of relevance and correlates across images.

    ``sizes`` are the numbers n, rising; None: :func:`logarithmic_sizes`, up to 0.8 P. ``samples`` sets of each.
    """
    check_whole("samples", samples, 2)
    check_whole("seed", seed, 0)
    occlusion = ClassOcclusion(model, images, maps, target, **options)
    chosen = _check_sizes(sizes, occlusion.patches)
    sets = of_sizes(torch.tensor(chosen).repeat_interleave(samples), occlusion.patches, seeded(seed))
    relevance, lost = (x.unflatten(1, (len(chosen), samples)) for x in _taken(occlusion, sets))
    return occlusion.hide(pearson(relevance, lost))


@register("metric", "faithfulness_correlation", _BHATT, "a hundred forwards an image", SCORE_DEFAULTS)
def faithfulness_correlation(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    size: int | float = 0.2,
    samples: int = 100,
    rank: bool = False,
    seed: int = 0,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """Faithfulness correlation (arXiv 2005.00631): sensitivity-n at one size, [B] in -1..1; high is better.

    The paper's and Quantus' numbers are of pixels (224 of them there, painted); ours are of patches. ``size`` is how
    many are in a set (an int), or their share of all (a float below 1); of ``samples`` sets Quantus takes 100 and
    MuFidelity 200. With ``rank`` the correlation is Spearman's: at a share of 0.2 this is MuFidelity's on patches,
    except that an undefined one is NaN here and 0 there.
    """
    check_whole("samples", samples, 2)
    check_whole("seed", seed, 0)
    check_flag("rank", rank)
    occlusion = ClassOcclusion(model, images, maps, target, **options)
    patches = occlusion.patches
    count = max(1, round(size * patches)) if isinstance(size, float) and 0 < size < 1 else size
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= patches:
        raise PrunexError(f"size={size!r} is not allowed: give 1..{patches} patches, or a share between 0 and 1")
    sets = of_sizes(torch.full((samples,), count), patches, seeded(seed))
    # The same sets in every image: what one image gets never depends on its neighbours.
    relevance, lost = _taken(occlusion, sets)
    if rank:
        relevance, lost = average_ranks(_rounded(relevance)), average_ranks(_rounded(lost))
    return occlusion.hide(pearson(relevance, lost))


@register("metric", "infidelity", _YEH, "a hundred forwards an image", SCORE_DEFAULTS)
def infidelity(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    samples: int = 100,
    scale: Literal["beta", "none"] = "beta",
    seed: int = 0,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """Infidelity (arXiv 1901.09392) over random sets of patches: the mean of (beta a - d)^2, [B]; low is better.

    a is the sum of the map over the set, d = f(x) - f(x without the set), sizes uniform in 1..P, ``samples`` of them.
    With ``scale`` "beta", beta = E[a d] / E[a^2] (0 where the map is 0), as Captum's ``normalize=True``; with "none"
    the number tells the scale of the map and little else. Captum draws 10 perturbations of the user's own; Quantus'
    patches add up without being restored.
    """
    check_whole("samples", samples, 1)
    check_whole("seed", seed, 0)
    check_choice("scale", scale, ("beta", "none"))
    occlusion = ClassOcclusion(model, images, maps, target, **options)
    patches, generator = occlusion.patches, seeded(seed)
    # Sizes before sets: both come from one generator, in this order for every number of images.
    sizes = torch.randint(1, patches + 1, (samples,), generator=generator)
    relevance, lost = _taken(occlusion, of_sizes(sizes, patches, generator))
    # The best scale of the map in closed form, 0 / 0 being 0 for a map of zeros.
    if scale == "beta":
        squares = relevance.square().sum(1, keepdim=True)
        relevance = relevance * ((relevance * lost).sum(1, keepdim=True) / squares.where(squares > 0, 1))
    return occlusion.hide((relevance - lost).square().mean(1))


@register("metric", "saco", _WU, "ten forwards an image", SCORE_DEFAULTS | {"removal": "mean"})
def saco(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    groups: int = 10,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """Salience-guided faithfulness coefficient (arXiv 2404.01415), [B] in -1..1; high is better.

    Patches in order of relevance are cut into K ``groups`` (2..P) of (nearly) equal size; s_i is a group's summed
    relevance and d_i the score lost without it. Over pairs i < j, w = s_i - s_j where d_i >= d_j, else -(s_i - s_j);
    the answer is sum w / sum |w|, NaN where all groups are alike, or the score is the same without any of them (the
    formula would give 1, whatever the map). K = 10 and the image's mean colour in the place of a group (``removal``
    "mean" where nothing is said) are unverified: the published code is a template.
    """
    options = {"removal": "mean", **options}
    occlusion = ClassOcclusion(model, images, maps, target, **options)
    batch, patches = occlusion.values.shape
    check_whole("groups", groups, 2, most=patches)
    place = ranked(occlusion.values, "positive")[0].long()
    # As numpy's array_split: the first groups have one patch more where P does not divide.
    sizes = torch.tensor([patches // groups + (i < patches % groups) for i in range(groups)], device=place.device)
    member = torch.arange(groups, device=place.device).repeat_interleave(sizes)[place]
    removed = member[:, None] == torch.arange(groups, device=place.device)[:, None]
    image = torch.arange(batch, device=place.device).repeat_interleave(groups)
    lost = occlusion.lost(occlusion.of_sets(image, removed.flatten(0, 1)).view(batch, groups))
    relevance = (removed * occlusion.values.double()[:, None]).sum(2)
    # Groups that are all alike, on either side, have no order that could be right.
    even = (occlusion.values.amax(1) == occlusion.values.amin(1)) | (lost.amax(1) == lost.amin(1))
    return occlusion.hide(saco_of(relevance, lost).masked_fill(even, torch.nan))


def saco_of(relevance: Tensor, lost: Tensor) -> Tensor:
    """The coefficient of groups in order of relevance: [...] from summed relevance and score lost, [..., K] each.

    >>> saco_of(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.3, 0.1, 0.2])).item()
    0.5
    """
    first, second = torch.triu_indices(relevance.shape[-1], relevance.shape[-1], 1, device=relevance.device)
    gap = relevance[..., first] - relevance[..., second]
    signed = torch.where(lost[..., first] >= lost[..., second], gap, -gap)
    total = gap.abs().sum(-1)
    return signed.sum(-1) / total.where(total > 0, torch.nan)


@register(
    "metric",
    "road",
    _RONG,
    "eighteen forwards and imputations an image",
    SCORE_DEFAULTS | {"removal": "impute"},
)
def road(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    fractions: Sequence[float] = PERCENT,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """Remove and debias (ROAD, arXiv 2202.00449), both orders combined: [B]; high is better, 0 for random maps.

    Half of the mean over ``fractions`` q (10 to 90 %) of f(x without its least relevant share q) - f(x without its most
    relevant share q). What is gone is filled in from round it (``removal`` "impute" where nothing is said, see
    :func:`prunex.removal.imputing.imputed`), so that the shape of what was taken tells the model little: the paper's
    debiasing. The paper itself prints the accuracy at each q, most relevant first, which the means over images of
    :func:`prunex.metrics.removal_curves` with this ``removal`` are for probabilities; the combination is that of its
    users.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2)
    >>> road(model, torch.randn(1, 3, 224, 224), torch.ones(1, 14, 14), removal="drop").shape
    torch.Size([1])
    """
    options = {"removal": "impute", **options}
    curves = removal_curves(model, images, maps, target, steps=fractions, orders=("without", "least"), **options)
    return (torch.as_tensor(curves.least) - torch.as_tensor(curves.without)).mean(1) / 2


@register("metric", "completeness", _SUNDARARAJAN, "one forward an image", SCORE_DEFAULTS | {"output": "logit"})
def completeness(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """How far a map is from adding up to what it explains (arXiv 1703.01365, Prop. 1): [B] from 0 on; low is better.

    |sum of the map - (f(x) - f(nothing))| / |f(x) - f(nothing)|, ``output`` "logit" where nothing is said; NaN where
    the two are the same. 0 is asked of maps that claim to share the score out, such as Shapley values of the same
    ``removal`` ("drop"); a map of zeros scores 1, and a random one whatever its scale makes it. Maps in pixels count
    with the sum of their pixels.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=2).eval()
    >>> images = torch.randn(1, 3, 64, 64)
    >>> e = prunex.explain("shap", model, images, budget=32, output="logit")
    >>> completeness(model, images, e.maps, e.target).item() < 1e-3
    True
    """
    options = {"output": "logit", **options}
    occlusion = ClassOcclusion(model, images, maps, target, **options)
    batch = len(occlusion.values)
    nothing = torch.ones(batch, occlusion.patches, dtype=torch.bool, device=occlusion.values.device)
    after = occlusion.of_sets(torch.arange(batch, device=nothing.device), nothing)
    due = occlusion.lost(after[:, None])[:, 0]
    residual = (occlusion.maps.double().flatten(1).sum(1) - due).abs()
    return occlusion.hide(residual / due.abs().where(due != 0, torch.nan))


def logarithmic_sizes(patches: int, count: int = 10) -> tuple[int, ...]:
    """Sizes from 1 to 0.8 P, evenly spaced on a logarithmic scale, each once.

    >>> logarithmic_sizes(196)
    (1, 2, 3, 5, 9, 17, 29, 51, 90, 157)
    """
    last = max(1, round(0.8 * patches))
    spaced = torch.logspace(0, float(torch.tensor(float(last)).log10()), count, dtype=torch.float64)
    return tuple(sorted({min(last, max(1, round(v))) for v in spaced.tolist()}))


def _check_sizes(sizes: Any, patches: int) -> tuple[int, ...]:
    if sizes is None:
        return logarithmic_sizes(patches)
    given = tuple(sizes) if isinstance(sizes, list | tuple) else ()
    good = all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= patches for n in given)
    if not given or not good or any(b <= a for a, b in zip(given, given[1:], strict=False)):
        raise PrunexError(f"sizes={sizes!r} is not allowed: give rising whole numbers from 1 to {patches}, the patches")
    return given


def _taken(occlusion: ClassOcclusion, sets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the same sets bool [M, P] in every image: relevance removed and score lost, float64 [B, M] each."""
    sets = sets.to(occlusion.values.device)
    batch, count = len(occlusion.values), len(sets)
    relevance = occlusion.values.double() @ sets.double().T
    image = torch.arange(batch, device=sets.device).repeat_interleave(count)
    after = occlusion.of_sets(image, sets.repeat(batch, 1)).view(batch, count)
    return relevance, occlusion.lost(after)


def _rounded(x: Tensor) -> Tensor:
    """Values that rounding alone keeps apart made equal: float64 [B, M]."""
    # Ranks would tell values apart that differ in their last bits alone.
    unit = x.abs().amax(-1, keepdim=True) * TINY
    return (x / unit.where(unit > 0, 1)).round()


SensitivityN = mean_of("SensitivityN", sensitivity_n)
FaithfulnessCorrelation = mean_of("FaithfulnessCorrelation", faithfulness_correlation)
Infidelity = mean_of("Infidelity", infidelity, higher_is_better=False)
SaCo = mean_of("SaCo", saco)
ROAD = mean_of("ROAD", road, fractions=check_steps)
Completeness = mean_of("Completeness", completeness, higher_is_better=False)
