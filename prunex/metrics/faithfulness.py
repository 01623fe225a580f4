"""Faithfulness: whether a map ranks patches by what taking them away does to the class.

Curve metrics (:func:`deletion`, :func:`insertion`, :func:`srg`, :func:`aopc`, :func:`log_odds`,
:func:`comprehensiveness`, :func:`sufficiency`) read the :class:`Curves` that :func:`removal_curves` makes once for all
of them. The others draw coalitions of their own and take the model. All give one number an image, NaN where there is
none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunex.checks import check_flag, check_whole
from prunex.errors import PrunexError, unknown
from prunex.explainers.base import choose_target
from prunex.explainers.coalitions import of_sizes, seeded
from prunex.explainers.removal import OUTPUTS, score
from prunex.metrics.base import MeanOverImages
from prunex.metrics.occlusion import Occlusion, Route, check_maps, check_steps, on_patches, on_pixels, ranked
from prunex.metrics.ranks import average_ranks
from prunex.registry import register

Output = Literal["probability", "logit", "log_odds"]
Order = Literal["without", "only", "least"]
ORDERS: tuple[Order, ...] = ("without", "only", "least")
STEPS = tuple(k / 10 for k in range(11))
PERCENT = STEPS[1:-1]  # 10 to 90 %, the fractions usual for ViTs
ERASER = (0.01, 0.05, 0.1, 0.2, 0.5)
TINY = 1e-12
_CURVES = "the curves of removal_curves, one set for all of its kind"


@dataclass
class Curves:
    """The class's score f along three nested orders; float64, NaN for an image with NaN in its map.

    Attributes:
        steps: The K fractions asked for.
        counts: int64 [K], how many of the ``units`` units they are: round(q U).
        units: U.
        clean: [B], f(x).
        without: [B, K], the most relevant ones gone; None where it was not asked for, as the next two.
        only: [B, K], nothing but the most relevant ones there.
        least: [B, K], the least relevant ones gone.
        target: int64 [B], the class.
        output: What f is: "probability", "logit" or "log_odds".
        ties: int64 [B], units that share their relevance with another; they go by index, in every order.
        forwards: Altered images the model has seen.
    """

    steps: tuple[float, ...]
    counts: Tensor
    units: int
    clean: Tensor
    without: Tensor | None
    only: Tensor | None
    least: Tensor | None
    target: Tensor
    output: str
    ties: Tensor
    forwards: int


def removal_curves(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: int | Tensor | None = None,
    *,
    steps: Sequence[float] = STEPS,
    units: Literal["patches", "pixels"] = "patches",
    removal: Route = "drop",
    selection: Literal["free", "frozen"] = "free",
    output: Output = "probability",
    orders: Sequence[Order] = ORDERS,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    chunk: int | None = None,
) -> Curves:
    """Ask the model once for all that the curve metrics read: all orders, steps and images share the forwards.

    No set of patches is asked of an image twice: where the map has no ties, the least relevant gone are the most
    relevant left.

    RISE's own setting (arXiv 1806.07421) is ``units="pixels"``, ``steps=[k / 224 for k in range(225)]`` at 224 x 224,
    with ``removal="grey"`` for :func:`deletion` and "blur" for :func:`insertion`. Its kernel is this one up to the
    borders.

    Args:
        model: A supported ViT, pruned or dense, or a module that holds exactly one.
        images: float [B, C, H, W], normalised as the model expects.
        maps: float [B, gh, gw] on the patch grid or [B, H, W]; the mean over a patch, or the bilinear map, where the
            units are the other ones.
        target: The class, an int or int [B]. None: the predicted one of the clean image.
        steps: Rising fractions in [0, 1]. Areas and the whole AOPC need both 0 and 1.
        units: "patches", or "pixels" for painted routes.
        removal: "drop" (tokens leave), or paint: "black", "grey", "mean", "blur". Numbers do not compare across routes.
        selection: "free" or "frozen", of a pruned model: whether its pruner decides anew without what is gone.
        output: What f is: "probability", "logit", or "log_odds" ln(p / (1 - p)), which is not :func:`log_odds`.
        orders: Which curves are made: "without" (for deletion, aopc, log_odds, comprehensiveness, srg), "only" (for
            insertion, sufficiency) and "least" (for srg).
        mean: Of the normalisation, for "black"; None: as the model's ``pretrained_cfg`` says.
        std: Likewise.
        chunk: Most images in one forward: bounds memory, changes no result.

    Raises:
        PrunexError: For maps, a target or options that do not fit.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> curves = removal_curves(model, torch.randn(1, 3, 224, 224), torch.rand(1, 14, 14), steps=(0, 0.5, 1))
    >>> curves.without.shape, curves.counts.tolist(), curves.forwards
    (torch.Size([1, 3]), [0, 98, 196], 3)
    """
    steps = check_steps(steps)
    if not isinstance(units, str) or units not in ("patches", "pixels"):
        raise unknown("units", units, ("patches", "pixels"))
    if units == "pixels" and removal == "drop":
        raise PrunexError("units='pixels' cannot be dropped: paint them with removal='grey', or take units='patches'")
    kinds = _check_orders(orders)
    asked = _Asked(model, images, maps, target, output, removal=removal, selection=selection, mean=mean, std=std,
                   chunk=chunk)  # fmt: skip
    values = asked.values if units == "patches" else on_pixels(asked.maps, asked.occlusion.size)
    total = values.shape[1]
    places, ties = zip(*(ranked(values, order) for order in ("positive", "negative")), strict=True)
    counts = torch.tensor([round(q * total) for q in steps], device=values.device)
    batch, k = len(values), len(steps)
    # Row (kind * K + step) * B + image; kinds as in ORDERS.
    image = torch.arange(batch, device=values.device).repeat(len(kinds) * k)
    kind = torch.tensor(kinds, device=values.device).repeat_interleave(k * batch)
    limit = counts.repeat_interleave(batch).repeat(len(kinds))
    place = torch.stack(places)

    def removed(rows: Tensor) -> Tensor:
        gone = place[(kind[rows] == 2).long(), image[rows]] < limit[rows, None]
        return gone ^ (kind[rows] == 1)[:, None]

    if units == "patches":
        scores = asked.of_sets(image, removed(torch.arange(len(image), device=values.device)))
    else:
        scores = asked.of_rows(image, removed, torch.where(kind == 1, total - limit, limit))
    each = dict(zip(kinds, asked.hide(scores.view(len(kinds), k, batch).permute(2, 0, 1)).unbind(1), strict=True))
    return Curves(
        steps,
        counts,
        total,
        asked.hide(asked.clean),
        each.get(0),
        each.get(1),
        each.get(2),
        asked.target,
        output,
        ties[0],
        asked.forwards,
    )


class _Asked:
    """The class's score f of altered images, and the maps that say what to alter.

    Attributes:
        clean: float64 [B], f(x).
        maps: As given, in at least float32.
        values: float [B, P], one a patch.
        forwards: Altered images the model has seen.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, maps: Tensor, target: int | Tensor | None, output: str, **options: Any
    ) -> None:
        if not isinstance(output, str) or output not in OUTPUTS:
            raise unknown("output", output, OUTPUTS)
        self.output, self.forwards = output, 0
        self.occlusion = Occlusion(model, images, **options)
        self.maps = check_maps(maps, self.occlusion.images, self.occlusion.grid)
        self.values = on_patches(self.maps, self.occlusion.grid, self.occlusion.patch)
        self.target = choose_target(self.occlusion.clean, target)
        self.bad = self.maps.flatten(1).isnan().any(1)
        self.clean = self._of_class(self.occlusion.clean, torch.arange(len(self.maps), device=self.maps.device))

    def of_rows(self, image: Tensor, removed: Callable[[Tensor], Tensor], count: Tensor) -> Tensor:
        """F of rows [R], each of one image [R] with ``count`` [R] units gone; rows without any are the clean image."""
        scores = self.clean[image]
        rows = count.nonzero()[:, 0]
        if len(rows):
            mine = image[rows]
            scores[rows] = self._of_class(self.occlusion(mine, lambda part: removed(rows[part])), mine)
            self.forwards += len(rows)
        return scores

    def of_sets(self, image: Tensor, removed: Tensor) -> Tensor:
        """F of sets of patches gone, bool [R, P]; none is asked of an image twice."""
        code = torch.cat([image[:, None].to(torch.int32), removed.to(torch.int32)], 1)
        one, again = code.unique(dim=0, return_inverse=True)
        sets = one[:, 1:].bool()
        return self.of_rows(one[:, 0].long(), lambda part: sets[part], sets.sum(1))[again]

    def hide(self, values: Tensor) -> Tensor:
        """NaN for images with NaN in their map; values [B] or [B, ...]."""
        return values.masked_fill(self.bad.view(-1, *[1] * (values.ndim - 1)), torch.nan)

    def _of_class(self, logits: Tensor, image: Tensor) -> Tensor:
        return score(logits, self.output).gather(1, self.target[image, None])[:, 0]


@register("metric", "deletion", "Petsiuk, Das & Saenko, BMVC 2018, arXiv 1806.07421", _CURVES)
def deletion(curves: Curves) -> Tensor:
    """Area under f while the most relevant units leave, over the share gone, from 0 to 1: [B]; low is better.

    RISE (arXiv 1806.07421): the trapezoid with both ends, divided by the number of steps. Quantus' area has dx = 1 and
    leaves the clean point out: divide its by (steps - 1) and prepend f(x).

    Raises:
        PrunexError: For curves that do not go from 0 to 1.

    >>> deletion(curves_of(torch.tensor([[1.0, 0.5, 0.0]]))).item()
    0.5
    """
    return _area(curves, _curve(curves, "without"))


@register("metric", "insertion", "Petsiuk, Das & Saenko, BMVC 2018, arXiv 1806.07421", _CURVES)
def insertion(curves: Curves) -> Tensor:
    """Area under f while the most relevant units come back, over the share there, from 0 to 1: [B]; high is better.

    RISE starts from the blurred image; here from what ``removal`` makes of everything. Models that bear missing
    patches are near their ceiling even in random order.

    Raises:
        PrunexError: For curves that do not go from 0 to 1.
    """
    return _area(curves, _curve(curves, "only"))


@register("metric", "srg", "Bluecher, Vielhaben & Strodthoff, TMLR 2024", _CURVES)
def srg(curves: Curves) -> Tensor:
    """Symmetric relevance gain: area with the least relevant leaving first minus :func:`deletion`, [B]; high is better.

    (Bluecher et al., TMLR 2024.) Exactly 0 for a constant map.

    Raises:
        PrunexError: For curves that do not go from 0 to 1, or were made without the order "least".
    """
    return _area(curves, _curve(curves, "least")) - deletion(curves)


@register("metric", "aopc", "Samek et al., TNNLS 2017, arXiv 1509.06321", _CURVES)
def aopc(
    curves: Curves,
    definition: Literal["all", "percent"] = "all",
    fractions: Sequence[float] = PERCENT,
) -> Tensor:
    """Area over the perturbation curve, most relevant first: the mean of f(x) - f(x_k), [B]; high is better.

    - "all" (Samek et al., arXiv 1509.06321): over k = 0..L, 1 / (L + 1) times the sum; its first term is 0.
    - "percent" (papers on text and ViTs): over the fractions given, without 0.

    Raises:
        PrunexError: For an unknown definition, or fractions that the curves do not have.

    >>> aopc(curves_of(torch.tensor([[1.0, 0.5, 0.0]]))).item()
    0.5
    """
    without = _curve(curves, "without")
    if not isinstance(definition, str) or definition not in ("all", "percent"):
        raise unknown("definition", definition, ("all", "percent"))
    if definition == "all":
        _whole(curves)
        return curves.clean - without.mean(1)
    return comprehensiveness(curves, fractions)


@register("metric", "log_odds", "Shrikumar et al., ICML 2017, arXiv 1704.02685 (unverified)", _CURVES)
def log_odds(curves: Curves, fractions: Sequence[float] = PERCENT) -> Tensor:
    """LOdds: the mean of ln(f(x_q) / f(x)) with the share q of most relevant units gone, [B]; low is better.

    Natural logarithm of probabilities, each at least 1e-12. Not ln(p / (1 - p)), which is ``output="log_odds"``.

    Raises:
        PrunexError: For curves of another output than probability, or fractions they do not have.

    >>> round(log_odds(curves_of(torch.tensor([[1.0, 0.5, 0.0]])), (0.5,)).item(), 4)
    -0.6931
    """
    without = _curve(curves, "without")
    if curves.output != "probability":
        raise PrunexError(f"these curves hold output={curves.output!r}: log_odds needs output='probability'")
    after = without[:, _columns(curves, fractions)].clamp(min=TINY)
    return (after.log() - curves.clean.clamp(min=TINY).log()[:, None]).mean(1)


@register("metric", "comprehensiveness", "DeYoung et al., ACL 2020, arXiv 1911.03429", _CURVES)
def comprehensiveness(curves: Curves, fractions: Sequence[float] = PERCENT) -> Tensor:
    """ERASER (arXiv 1911.03429): the mean of f(x) - f(x without the most relevant share q), [B]; high is better.

    ERASER itself takes the fractions :data:`ERASER`, of words; make the curves with these ``steps`` then. With the same
    fractions it is the percent definition of :func:`aopc`.

    Raises:
        PrunexError: For fractions that the curves do not have.
    """
    return curves.clean - _curve(curves, "without")[:, _columns(curves, fractions)].mean(1)


@register("metric", "sufficiency", "DeYoung et al., ACL 2020, arXiv 1911.03429", _CURVES)
def sufficiency(curves: Curves, fractions: Sequence[float] = PERCENT) -> Tensor:
    """ERASER: the mean of f(x) - f(nothing but the most relevant share q), [B]; low is better.

    Quantus' ``Sufficiency`` compares images by the likeness of their maps and is something else.

    Raises:
        PrunexError: For fractions that the curves do not have.
    """
    return curves.clean - _curve(curves, "only")[:, _columns(curves, fractions)].mean(1)


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
    asked = _Asked(model, images, maps, target, output, removal=removal, selection=selection, mean=mean, std=std,
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
    asked = _Asked(model, images, maps, target, output, removal=removal, selection=selection, mean=mean, std=std,
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
    if not isinstance(scale, str) or scale not in ("beta", "none"):
        raise unknown("scale", scale, ("beta", "none"))
    asked = _Asked(model, images, maps, target, output, removal=removal, selection=selection, mean=mean, std=std,
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
    sum w / sum |w|, NaN where all groups are alike. K = 10 and the image's mean colour in the place of a group are
    unverified: the published code is a template.

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
    asked = _Asked(model, images, maps, target, output, removal=removal, selection=selection, mean=mean, std=std,
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
    lost = asked.clean[:, None] - asked.of_sets(image, removed.flatten(0, 1)).view(batch, groups)
    relevance = (removed * asked.values.double()[:, None]).sum(2)
    even = asked.values.amax(1) == asked.values.amin(1)
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


def curves_of(without: Tensor, only: Tensor | None = None, least: Tensor | None = None) -> Curves:
    """Curves from scores that one already has, at evenly spaced steps from 0 to 1.

    Args:
        without: float [B, K], K at least 2; the first column is the clean score.
        only: float [B, K], or None: ``without`` backwards.
        least: float [B, K], or None.
    """
    without = without.double()
    steps = tuple(k / (without.shape[1] - 1) for k in range(without.shape[1]))
    counts, none = torch.arange(len(steps)), torch.full((len(without),), -1)
    only = without.flip(1) if only is None else only.double()
    least = None if least is None else least.double()
    return Curves(
        steps,
        counts,
        len(steps) - 1,
        without[:, 0],
        without,
        only,
        least,
        none,
        "probability",
        torch.zeros_like(none),
        0,
    )


def _curve(curves: Any, order: Order) -> Tensor:
    """One of the curves, [B, K]."""
    if not isinstance(curves, Curves):
        came = type(curves).__name__
        raise PrunexError(f"expected the Curves that removal_curves(model, images, maps) makes, got a {came}")
    found: Tensor | None = getattr(curves, order)
    if found is None:
        raise PrunexError(f"these curves were made without {order!r}: name it among the orders of removal_curves")
    return found


def _check_orders(orders: Any) -> list[int]:
    """Their numbers in ORDERS."""
    given = list(orders) if isinstance(orders, list | tuple) else [orders]
    for name in given:
        if not isinstance(name, str) or name not in ORDERS:
            raise unknown("order", name, ORDERS)
    if not given or len(set(given)) < len(given):
        raise PrunexError(f"orders={orders!r} is not allowed: give one or more of {', '.join(ORDERS)}, each once")
    return [ORDERS.index(name) for name in given]


def _whole(curves: Curves) -> None:
    if curves.steps[0] != 0 or curves.steps[-1] != 1:
        raise PrunexError(
            f"these curves go from {curves.steps[0]:g} to {curves.steps[-1]:g}: areas need steps from 0 to 1, both in"
        )


def _area(curves: Curves, scores: Tensor) -> Tensor:
    """The trapezoid over the true shares: rounded to whole units they may differ a little from the steps."""
    _whole(curves)
    return torch.trapezoid(scores, curves.counts.to(scores) / curves.units, dim=1)


def _columns(curves: Curves, fractions: Sequence[float]) -> list[int]:
    wanted = check_steps(fractions)
    near = {round(q, 9): i for i, q in enumerate(curves.steps)}
    missing = [q for q in wanted if round(q, 9) not in near]
    if missing:
        raise PrunexError(
            f"these curves have no step {missing[0]:g}: make them with it among their steps, or give fractions of "
            f"{curves.steps!r}"
        )
    return [near[round(q, 9)] for q in wanted]


def _check_sizes(sizes: Any, patches: int) -> tuple[int, ...]:
    if sizes is None:
        return logarithmic_sizes(patches)
    given = tuple(sizes) if isinstance(sizes, list | tuple) else ()
    good = all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= patches for n in given)
    if not given or not good or any(b <= a for a, b in zip(given, given[1:], strict=False)):
        raise PrunexError(f"sizes={sizes!r} is not allowed: give rising whole numbers from 1 to {patches}, the patches")
    return given


def _taken(asked: _Asked, sets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the same sets bool [M, P] in every image: relevance removed and score lost, float64 [B, M] each."""
    sets = sets.to(asked.values.device)
    batch, count = len(asked.values), len(sets)
    relevance = asked.values.double() @ sets.double().T
    image = torch.arange(batch, device=sets.device).repeat_interleave(count)
    after = asked.of_sets(image, sets.repeat(batch, 1)).view(batch, count)
    return relevance, asked.clean[:, None] - after


def _still(x: Tensor) -> Tensor:
    """Where nothing varies along the last dimension, beyond float64's rounding."""
    return ~(x.amax(-1) - x.amin(-1) > TINY * x.abs().amax(-1))


def _rounded(x: Tensor) -> Tensor:
    """Values that rounding alone keeps apart made equal: float64 [B, M]."""
    unit = x.abs().amax(-1, keepdim=True) * TINY
    return (x / unit.where(unit > 0, 1)).round()


class _OfCurves(MeanOverImages):
    """A mean over images of what is read off :class:`Curves`: ``update(removal_curves(model, images, maps))``."""


class Deletion(_OfCurves):
    """Mean of :func:`deletion` over images."""

    higher_is_better = False

    def measure(self, curves: Curves) -> Tensor:
        """See :func:`deletion`."""
        return deletion(curves)


class Insertion(_OfCurves):
    """Mean of :func:`insertion` over images."""

    higher_is_better = True

    def measure(self, curves: Curves) -> Tensor:
        """See :func:`insertion`."""
        return insertion(curves)


class SRG(_OfCurves):
    """Mean of :func:`srg` over images."""

    higher_is_better = True

    def measure(self, curves: Curves) -> Tensor:
        """See :func:`srg`."""
        return srg(curves)


class AOPC(_OfCurves):
    """Mean of :func:`aopc` over images.

    Args:
        definition: "all" or "percent".
        fractions: Of "percent".
        **kwargs: As for every mean over images.
    """

    higher_is_better = True

    def __init__(
        self,
        definition: Literal["all", "percent"] = "all",
        fractions: Sequence[float] = PERCENT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(definition, str) or definition not in ("all", "percent"):
            raise unknown("definition", definition, ("all", "percent"))
        self.definition, self.fractions = definition, check_steps(fractions)

    def measure(self, curves: Curves) -> Tensor:
        """See :func:`aopc`."""
        return aopc(curves, self.definition, self.fractions)


class _AtFractions(_OfCurves):
    """A curve metric at chosen fractions.

    Args:
        fractions: Shares of the units; the curves need these steps.
        **kwargs: As for every mean over images.
    """

    def __init__(self, fractions: Sequence[float] = PERCENT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fractions = check_steps(fractions)


class LogOdds(_AtFractions):
    """Mean of :func:`log_odds` over images."""

    higher_is_better = False

    def measure(self, curves: Curves) -> Tensor:
        """See :func:`log_odds`."""
        return log_odds(curves, self.fractions)


class Comprehensiveness(_AtFractions):
    """Mean of :func:`comprehensiveness` over images."""

    higher_is_better = True

    def measure(self, curves: Curves) -> Tensor:
        """See :func:`comprehensiveness`."""
        return comprehensiveness(curves, self.fractions)


class Sufficiency(_AtFractions):
    """Mean of :func:`sufficiency` over images."""

    higher_is_better = False

    def measure(self, curves: Curves) -> Tensor:
        """See :func:`sufficiency`."""
        return sufficiency(curves, self.fractions)


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
