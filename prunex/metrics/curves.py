"""Removal curves: the class' score while units leave in the order of their relevance, and what is read off them.

:func:`removal_curves` makes the :class:`Curves` once for all of :func:`deletion`, :func:`insertion`, :func:`srg`,
:func:`aopc`, :func:`log_odds`, :func:`comprehensiveness` and :func:`sufficiency`. All give one number an image, NaN
where there is none; curves that lack what is read off them (an order, a step, both ends) are refused with a
``PrunexError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.checks import check_choice, check_choices
from prunex.errors import PrunexError
from prunex.metrics.base import mean_of
from prunex.metrics.checks import check_steps
from prunex.metrics.occlusion import ClassOcclusion, on_pixels
from prunex.metrics.ranks import ranked
from prunex.registry import register
from prunex.removal.game import ScoreOptions
from prunex.targets import Target

Order = Literal["without", "only", "least"]
ORDERS: tuple[Order, ...] = ("without", "only", "least")
STEPS = tuple(k / 10 for k in range(11))
DEFINITIONS = ("all", "percent")  # of AOPC
PERCENT = STEPS[1:-1]  # 10 to 90 %, the fractions usual for ViTs
TINY = 1e-12  # the least probability a logarithm is taken of
_CURVES = "the curves of removal_curves, one set for all of its kind"


@dataclass(eq=False, repr=False)
class Curves(Brief):
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
    target: Target = None,
    *,
    steps: Sequence[float] = STEPS,
    units: Literal["patches", "pixels"] = "patches",
    orders: Sequence[Order] = ORDERS,
    **options: Unpack[ScoreOptions],
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
        orders: Which curves are made: "without" (for deletion, aopc, log_odds, comprehensiveness, srg), "only" (for
            insertion, sufficiency) and "least" (for srg).
        **options: ``removal`` ("drop"), ``selection`` ("free"), ``output`` ("probability"), ``mean``, ``std`` and
            ``chunk``: see :class:`prunex.removal.game.ScoreOptions`. The output "log_odds" is not :func:`log_odds`.

    Raises:
        PrunexError: For maps, a target or options that do not fit.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> curves = removal_curves(model, torch.randn(1, 3, 224, 224), torch.rand(1, 14, 14), steps=(0, 0.5, 1))
    >>> curves.without.shape, curves.counts.tolist(), curves.forwards
    (torch.Size([1, 3]), [0, 98, 196], 3)
    """
    steps = check_steps(steps)
    check_choice("units", units, ("patches", "pixels"))
    # Tokens are whole patches: a pixel alone cannot leave with one.
    if units == "pixels" and options.get("removal", "drop") == "drop":
        raise PrunexError("units='pixels' cannot be dropped: paint them with removal='grey', or take units='patches'")
    kinds = [ORDERS.index(name) for name in check_choices("order", "orders", orders, ORDERS)]
    occlusion = ClassOcclusion(model, images, maps, target, **options)
    values = occlusion.values if units == "patches" else on_pixels(occlusion.maps, occlusion.size, occlusion.patch)
    total = values.shape[1]
    # Ties go by index in both orders, so the second is no mirror of the first.
    first, ties = ranked(values, "positive")
    last, _ = ranked(values, "negative")
    counts = torch.tensor([round(q * total) for q in steps], device=values.device)
    batch, k = len(values), len(steps)
    # Row (kind * K + step) * B + image; kinds as in ORDERS.
    image = torch.arange(batch, device=values.device).repeat(len(kinds) * k)
    kind = torch.tensor(kinds, device=values.device).repeat_interleave(k * batch)
    limit = counts.repeat_interleave(batch).repeat(len(kinds))
    place = torch.stack([first, last])

    # A function of row numbers: where units are pixels, a table of all rows would not fit into memory.
    def removed(rows: Tensor) -> Tensor:
        gone = place[(kind[rows] == 2).long(), image[rows]] < limit[rows, None]
        return gone ^ (kind[rows] == 1)[:, None]

    # Sets of patches repeat between orders, and equal ones are asked once; sets of pixels hardly do.
    if units == "patches":
        scores = occlusion.of_sets(image, removed(torch.arange(len(image), device=values.device)))
    else:
        scores = occlusion.of_rows(image, removed, torch.where(kind == 1, total - limit, limit))
    table = occlusion.hide(scores.view(len(kinds), k, batch).permute(2, 0, 1))
    by_kind = dict(zip(kinds, table.unbind(1), strict=True))
    return Curves(
        steps=steps,
        counts=counts,
        units=total,
        clean=occlusion.hide(occlusion.score),
        without=by_kind.get(0),
        only=by_kind.get(1),
        least=by_kind.get(2),
        target=occlusion.target,
        output=occlusion.output,
        ties=ties,
        forwards=occlusion.forwards,
    )


@register("metric", "deletion", "Petsiuk, Das & Saenko, BMVC 2018, arXiv 1806.07421", _CURVES)
def deletion(curves: Curves) -> Tensor:
    """Area under f while the most relevant units leave, over the share gone, from 0 to 1: [B]; low is better.

    RISE (arXiv 1806.07421): the trapezoid with both ends, divided by the number of steps. Quantus' area has dx = 1 and
    leaves the clean point out: divide its by (steps - 1) and prepend f(x).

    >>> deletion(curves_of(torch.tensor([[1.0, 0.5, 0.0]]))).item()
    0.5
    """
    return _area(curves, _curve(curves, "without"))


@register("metric", "insertion", "Petsiuk, Das & Saenko, BMVC 2018, arXiv 1806.07421", _CURVES)
def insertion(curves: Curves) -> Tensor:
    """Area under f while the most relevant units come back, over the share there, from 0 to 1: [B]; high is better.

    RISE starts from the blurred image; here from what ``removal`` makes of everything. Models that bear missing
    patches are near their ceiling even in random order.
    """
    return _area(curves, _curve(curves, "only"))


@register("metric", "srg", "Bluecher, Vielhaben & Strodthoff, TMLR 2024", _CURVES)
def srg(curves: Curves) -> Tensor:
    """Symmetric relevance gain: area with the least relevant leaving first minus :func:`deletion`, [B]; high is better.

    (Bluecher et al., TMLR 2024.) Exactly 0 for a constant map.
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

    >>> aopc(curves_of(torch.tensor([[1.0, 0.5, 0.0]]))).item()
    0.5
    """
    without = _curve(curves, "without")
    check_choice("definition", definition, DEFINITIONS)
    if definition == "all":
        _whole(curves)
        return curves.clean - without.mean(1)
    return comprehensiveness(curves, fractions)


@register("metric", "log_odds", "Shrikumar et al., ICML 2017, arXiv 1704.02685 (unverified)", _CURVES)
def log_odds(curves: Curves, fractions: Sequence[float] = PERCENT) -> Tensor:
    """LOdds: the mean of ln(f(x_q) / f(x)) with the share q of most relevant units gone, [B]; low is better.

    Natural logarithm of probabilities, each at least 1e-12. Not ln(p / (1 - p)), which is ``output="log_odds"``.

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
    """
    return curves.clean - _curve(curves, "without")[:, _columns(curves, fractions)].mean(1)


@register("metric", "sufficiency", "DeYoung et al., ACL 2020, arXiv 1911.03429", _CURVES)
def sufficiency(curves: Curves, fractions: Sequence[float] = PERCENT) -> Tensor:
    """ERASER: the mean of f(x) - f(nothing but the most relevant share q), [B]; low is better.

    Quantus' ``Sufficiency`` compares images by the likeness of their maps and is something else.
    """
    return curves.clean - _curve(curves, "only")[:, _columns(curves, fractions)].mean(1)


def curves_of(without: Tensor, only: Tensor | None = None, least: Tensor | None = None) -> Curves:
    """Curves from scores that are known, float [B, K] each, at evenly spaced steps from 0 to 1."""
    without = without.double()
    steps = tuple(k / (without.shape[1] - 1) for k in range(without.shape[1]))
    no_target = torch.full((len(without),), -1)
    return Curves(
        steps=steps,
        counts=torch.arange(len(steps)),
        units=len(steps) - 1,
        clean=without[:, 0],
        without=without,
        only=without.flip(1) if only is None else only.double(),
        least=None if least is None else least.double(),
        target=no_target,
        output="probability",
        ties=torch.zeros_like(no_target),
        forwards=0,
    )


def _curve(curves: Any, order: Order) -> Tensor:
    """One of the curves, [B, K]."""
    if not isinstance(curves, Curves):
        came = type(curves).__name__
        raise PrunexError(f"expected the Curves that removal_curves(model, images, maps) makes, got a {came}")
    curve: Tensor | None = getattr(curves, order)
    if curve is None:
        raise PrunexError(f"these curves were made without {order!r}: name it among the orders of removal_curves")
    return curve


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
    # Steps are made by division: 0.3 and 3 / 10 are the same step.
    near = {round(q, 9): i for i, q in enumerate(curves.steps)}
    missing = [q for q in wanted if round(q, 9) not in near]
    if missing:
        raise PrunexError(
            f"these curves have no step {missing[0]:g}: make them with it among their steps, or give fractions of "
            f"{curves.steps!r}"
        )
    return [near[round(q, 9)] for q in wanted]


Deletion = mean_of("Deletion", deletion, higher_is_better=False)
Insertion = mean_of("Insertion", insertion)
SRG = mean_of("SRG", srg)
AOPC = mean_of("AOPC", aopc, definition=partial(check_choice, "definition", allowed=DEFINITIONS), fractions=check_steps)
LogOdds = mean_of("LogOdds", log_odds, higher_is_better=False, fractions=check_steps)
Comprehensiveness = mean_of("Comprehensiveness", comprehensiveness, fractions=check_steps)
Sufficiency = mean_of("Sufficiency", sufficiency, higher_is_better=False, fractions=check_steps)
