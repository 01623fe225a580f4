"""Faithfulness: whether a map says what taking patches away does to the class.

Metrics that draw sets of patches of their own and ask the model; those that read removal curves are in
``prunex.metrics.curves``. All give one number an image, NaN where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunex.checks import check_choice, check_flag, check_whole
from prunex.errors import PrunexError, unknown
from prunex.metrics.base import MeanOverImages
from prunex.metrics.ranks import average_ranks
from prunex.registry import register
from prunex.removal.coalitions import of_sizes, seeded
from prunex.removal.occlusion import Asked, Output, Route, ranked

ERASER = (0.01, 0.05, 0.1, 0.2, 0.5)
TINY = 1e-12  # of the largest value: what rounding alone may make of nothing


@register(
    "metric", "sensitivity_n", "Ancona et al., ICLR 2018, arXiv 1711.06104", "a hundred forwards a size and image"
)
def sensitivity_n(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: int | Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
    samples: int = 100,
    removal: Route = "drop",
    selection: Literal["free", "frozen"] = "free",
    output: Output = "probability",
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sensitivity-n (arXiv 1711.06104): for each n, correlation of relevance removed and score lost over random sets.

    Pearson, over sets S of exactly n patches, between the sum of the map over S and f(x) - f(x without S). Every image
    gets the same sets. Quantus' class of this name removes in order of relevance and correlates across images.

    Args:
        model: As for :func:`removal_curves`, and so are the options not told here.
        images: float [B, C, H, W].
        maps: float [B, gh, gw] or [B, H, W].
        target: The class, or None.
        sizes: The numbers n of patches, rising. None: :func:`logarithmic_sizes`, up to 0.8 P.
        samples: Sets of each size.
        removal: As for the curves.
        selection: Likewise.
        output: Likewise.
        seed: Of the sets.
        mean: Likewise.
        std: Likewise.
        chunk: Likewise.

    Returns:
        float64 [B, len(sizes)] in -1..1, high is better; NaN where either side does not vary.

    Raises:
        PrunexError: For options that do not fit.
    """
    check_whole("samples", samples, 2)
    check_whole("seed", seed, 0)
    asked = Asked(model, images, maps, target, output, removal=removal, selection=selection, mean=mean, std=std,
                   chunk=chunk)  # fmt: skip
    chosen = _check_sizes(sizes, asked.occlusion.patches)
    sets = of_sizes(torch.tensor(chosen).repeat_interleave(samples), asked.occlusion.patches, seeded(seed))
    relevance, lost = (x.unflatten(1, (len(chosen), samples)) for x in _taken(asked, sets))
    return asked.hide(correlation(relevance, lost))


@register(
    "metric",
    "faithfulness_correlation",
    "Bhatt, Weller & Moura, IJCAI 2020, arXiv 2005.00631",
    "a hundred forwards an image",
)
def faithfulness_correlation(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: int | Tensor | None = None,
    *,
    size: int | float = 0.2,
    samples: int = 100,
    rank: bool = False,
    removal: Route = "drop",
    selection: Literal["free", "frozen"] = "free",
    output: Output = "probability",
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Faithfulness correlation (Bhatt et al., arXiv 2005.00631): sensitivity-n at one size.

    The paper's and Quantus' numbers are of pixels (224 of them there, painted); ours are of patches.

    Args:
        model: As for :func:`removal_curves`, and so are the options not told here.
        images: float [B, C, H, W].
        maps: float [B, gh, gw] or [B, H, W].
        target: The class, or None.
        size: Patches in a set: how many (an int), or their share of all (a float below 1).
        samples: Sets. Quantus: 100; MuFidelity: 200.
        rank: Spearman's correlation instead of Pearson's. With a share of 0.2 this is MuFidelity's on patches, except
            that an undefined one is NaN here and 0 there.
        removal: As for the curves.
        selection: Likewise.
        output: Likewise.
        seed: Of the sets.
        mean: Likewise.
        std: Likewise.
        chunk: Likewise.

    Returns:
        float64 [B] in -1..1, high is better; NaN where either side does not vary.

    Raises:
        PrunexError: For options that do not fit.
    """
    check_whole("samples", samples, 2)
    check_whole("seed", seed, 0)
    check_flag("rank", rank)
    asked = Asked(model, images, maps, target, output, removal=removal, selection=selection, mean=mean, std=std,
                   chunk=chunk)  # fmt: skip
    patches = asked.occlusion.patches
    count = max(1, round(size * patches)) if isinstance(size, float) and 0 < size < 1 else size
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= patches:
        raise PrunexError(f"size={size!r} is not allowed: give 1..{patches} patches, or a share between 0 and 1")
    sets = of_sizes(torch.full((samples,), count), patches, seeded(seed))
    relevance, lost = _taken(asked, sets)
    if rank:
        relevance, lost = average_ranks(_rounded(relevance)), average_ranks(_rounded(lost))
    return asked.hide(correlation(relevance, lost))


@register("metric", "infidelity", "Yeh et al., NeurIPS 2019, arXiv 1901.09392", "a hundred forwards an image")
def infidelity(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: int | Tensor | None = None,
    *,
    samples: int = 100,
    scale: Literal["beta", "none"] = "beta",
    removal: Route = "drop",
    selection: Literal["free", "frozen"] = "free",
    output: Output = "probability",
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Infidelity (arXiv 1901.09392) over random sets of patches: the mean of (beta a - d)^2, [B]; low is better.

    a is the sum of the map over the set, d = f(x) - f(x without the set), sizes uniform in 1..P. With "beta", beta =
    E[a d] / E[a^2] (0 where the map is 0), as Captum's ``normalize=True``: without it, the number tells the scale of
    the map and little else. Captum draws 10 perturbations of the user's own; Quantus' patches add up without being
    restored. Every image gets the same sets.

    Args:
        model: As for :func:`removal_curves`, and so are the options not told here.
        images: float [B, C, H, W].
        maps: float [B, gh, gw] or [B, H, W].
        target: The class, or None.
        samples: Sets.
        scale: "beta" or "none".
        removal: As for the curves.
        selection: Likewise.
        output: Likewise.
        seed: Of the sets.
        mean: Likewise.
        std: Likewise.
        chunk: Likewise.

    Raises:
        PrunexError: For options that do not fit.
    """
    check_whole("samples", samples, 1)
    check_whole("seed", seed, 0)
    check_choice("scale", scale, ("beta", "none"))
    asked = Asked(model, images, maps, target, output, removal=removal, selection=selection, mean=mean, std=std,
                   chunk=chunk)  # fmt: skip
    patches, generator = asked.occlusion.patches, seeded(seed)
    sizes = torch.randint(1, patches + 1, (samples,), generator=generator)
    relevance, lost = _taken(asked, of_sizes(sizes, patches, generator))
    if scale == "beta":
        squares = relevance.square().sum(1, keepdim=True)
        relevance = relevance * ((relevance * lost).sum(1, keepdim=True) / squares.where(squares > 0, 1))
    return asked.hide((relevance - lost).square().mean(1))


@register("metric", "saco", "Wu et al., CVPR 2024, arXiv 2404.01415", "ten forwards an image")
def saco(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: int | Tensor | None = None,
    *,
    groups: int = 10,
    removal: Route = "mean",
    selection: Literal["free", "frozen"] = "free",
    output: Output = "probability",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Salience-guided faithfulness coefficient (arXiv 2404.01415), [B] in -1..1; high is better.

    Patches in order of relevance are cut into K groups of (nearly) equal size; s_i is a group's summed relevance and
    d_i the score lost without it. Over pairs i < j, w = s_i - s_j where d_i >= d_j, else -(s_i - s_j); the answer is
    sum w / sum |w|, NaN where all groups are alike, or the score is the same without any of them (the formula would
    give 1, whatever the map). K = 10 and the image's mean colour in the place of a group are unverified: the published
    code is a template.

    Args:
        model: As for :func:`removal_curves`, and so are the options not told here.
        images: float [B, C, H, W].
        maps: float [B, gh, gw] or [B, H, W].
        target: The class, or None.
        groups: K, from 2 to P.
        removal: As for the curves, but "mean" where nothing is said.
        selection: As for the curves.
        output: Likewise.
        mean: Likewise.
        std: Likewise.
        chunk: Likewise.

    Raises:
        PrunexError: For options that do not fit.
    """
    asked = Asked(model, images, maps, target, output, removal=removal, selection=selection, mean=mean, std=std,
                   chunk=chunk)  # fmt: skip
    batch, patches = asked.values.shape
    if isinstance(groups, bool) or not isinstance(groups, int) or not 2 <= groups <= patches:
        raise PrunexError(f"groups={groups!r} is not allowed: give 2..{patches}, the number of patches")
    place = ranked(asked.values, "positive")[0].long()
    # As numpy's array_split: the first groups have one patch more where P does not divide.
    sizes = torch.tensor([patches // groups + (i < patches % groups) for i in range(groups)], device=place.device)
    member = torch.arange(groups, device=place.device).repeat_interleave(sizes)[place]
    removed = member[:, None] == torch.arange(groups, device=place.device)[:, None]
    image = torch.arange(batch, device=place.device).repeat_interleave(groups)
    lost = asked.lost(asked.of_sets(image, removed.flatten(0, 1)).view(batch, groups))
    relevance = (removed * asked.values.double()[:, None]).sum(2)
    even = (asked.values.amax(1) == asked.values.amin(1)) | (lost.amax(1) == lost.amin(1))
    return asked.hide(saco_of(relevance, lost).masked_fill(even, torch.nan))


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


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation along the last dimension, NaN where either side does not vary (beyond rounding).

    >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([6.0, 4.0, 2.0])).item()
    -1.0
    """
    a, b = a.double(), b.double()
    still = _still(a) | _still(b)
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    a, b = (x / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) for x in (a, b))
    found = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return found.clamp(-1, 1).masked_fill(still, torch.nan)


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


def _taken(asked: Asked, sets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the same sets bool [M, P] in every image: relevance removed and score lost, float64 [B, M] each."""
    sets = sets.to(asked.values.device)
    batch, count = len(asked.values), len(sets)
    relevance = asked.values.double() @ sets.double().T
    image = torch.arange(batch, device=sets.device).repeat_interleave(count)
    after = asked.of_sets(image, sets.repeat(batch, 1)).view(batch, count)
    return relevance, asked.lost(after)


def _still(x: Tensor) -> Tensor:
    """Where nothing varies along the last dimension, beyond float64's rounding."""
    return ~(x.amax(-1) - x.amin(-1) > TINY * x.abs().amax(-1))


def _rounded(x: Tensor) -> Tensor:
    """Values that rounding alone keeps apart made equal: float64 [B, M]."""
    unit = x.abs().amax(-1, keepdim=True) * TINY
    return (x / unit.where(unit > 0, 1)).round()


class _OfModel(MeanOverImages):
    """A metric that asks the model itself: ``update(model, images, maps, target=None)``.

    Args:
        keep: Keep every image's value too.
        **options: The function's own.
    """

    function: Callable[..., Tensor]

    def __init__(self, keep: bool = False, **options: Any) -> None:
        names = self.function.__kwdefaults__ or {}
        super().__init__(keep, **{k: v for k, v in options.items() if k not in names and k in _TORCHMETRICS})
        self.options = {k: v for k, v in options.items() if k not in _TORCHMETRICS}
        for name in self.options:
            if name not in names:
                raise unknown(f"option of {type(self).__name__}", name, names)

    def measure(self, model: nn.Module, images: Tensor, maps: Tensor, target: int | Tensor | None = None) -> Tensor:
        """One number an image; several of one image are averaged where they are defined."""
        found = type(self).function(model, images, maps, target, **self.options)
        return found if found.ndim == 1 else found.nanmean(1)


_TORCHMETRICS = (
    "compute_on_cpu", "dist_sync_on_step", "process_group", "dist_sync_fn", "distributed_available_fn",
    "sync_on_compute", "compute_with_cache",
)  # fmt: skip


class SensitivityN(_OfModel):
    """Mean of :func:`sensitivity_n` over sizes and images; its options are the function's."""

    higher_is_better = True
    function = staticmethod(sensitivity_n)


class FaithfulnessCorrelation(_OfModel):
    """Mean of :func:`faithfulness_correlation` over images; its options are the function's."""

    higher_is_better = True
    function = staticmethod(faithfulness_correlation)


class Infidelity(_OfModel):
    """Mean of :func:`infidelity` over images; its options are the function's."""

    higher_is_better = False
    function = staticmethod(infidelity)


class SaCo(_OfModel):
    """Mean of :func:`saco` over images; its options are the function's."""

    higher_is_better = True
    function = staticmethod(saco)
