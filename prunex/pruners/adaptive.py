"""What pruners share where each image may keep its own number of patches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from prunex.checks import check_choice, check_number
from prunex.errors import PrunexError
from prunex.pruners.base import TokenPruner, calibration_images
from prunex.pruners.schedules import ScheduleOptions
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.aside import as_found
from prunex.vit.forward import run
from prunex.vit.trace import TokenTrace

COUNTS = ("fixed", "adaptive")
_LEAST = 1e-6  # a keep rate must be above 0; counts are at least 1 anyway


class CountOptions(TypedDict, total=False):
    """What every pruner can be asked for whose images may keep their own numbers of patches.

    Attributes:
        count: "fixed", or "adaptive": each image keeps its own number.
        threshold: What a patch must reach to be kept where counts are adaptive, in [0, 1]; the method says of what.
        expected: Share of the original patches that images keep on average after each stage, none above the one
            before; None: not measured yet.
    """

    count: Literal["fixed", "adaptive"]
    threshold: float
    expected: Sequence[float] | None


class AdaptiveOptions(CountOptions, ScheduleOptions, total=False):
    """:class:`CountOptions` of a pruner whose rates may fall while training, and their schedule."""


class Adaptive(TokenPruner):
    """A pruner that keeps as many patches in every image (``count="fixed"``), or as many as each image asks for.

    Adaptive counts depend on the data, so what :meth:`counts` and ``prunex.cost`` tell is an expectation: the mean
    shares ``expected``, measured by ``Pruning.calibrate`` or in each validation of the callback; before that the counts
    of ``keep_ratio``. Attention's quadratic part is that of the mean count, which is less than the mean of its square.

    A graph for other runtimes has fixed counts: the expected ones.

    Args:
        anatomy: Of the model.
        keep_ratio: As for every pruner. Adaptive counts do not follow it, but at 1.0 nothing is dropped either way.
        stages: As for every pruner.
        **shared: See :class:`AdaptiveOptions`; a method without a schedule offers :class:`CountOptions`.
    """

    handed_on: ClassVar[AdaptiveOptions]  # what **shared stands for

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] = 0.7,
        stages: Sequence[int] | None = None,
        **shared: Unpack[AdaptiveOptions],
    ) -> None:
        options: dict[str, Any] = {**self.handed_on, **shared}
        count, threshold, expected = (options.pop(name) for name in ("count", "threshold", "expected"))
        # What is left is of a schedule, which methods without one do not hand on.
        super().__init__(anatomy, keep_ratio, stages, **options)
        # The share of the original patches that fixed counts keep after each stage.
        self.targets = cumulative(self.rates)
        check_choice("count", count, COUNTS)
        self.count = count
        self.threshold = check_number("threshold", threshold, 0, 1)
        self.expected = check_expected(expected, len(self.stages))
        # A head that only pools patches has nothing to read without one.
        self.least = 0 if anatomy.readers else 1
        self.options |= {"count": count, "threshold": self.threshold, "expected": _listed(self.expected)}

    @property
    def adaptive(self) -> bool:
        """Whether images keep their own numbers of patches."""
        return self.count == "adaptive"

    def mass(self) -> float:
        """The threshold in force now."""
        return self.threshold

    @torch.no_grad()
    def calibrate(self, model: ViT, images: Any, **options: Any) -> list[float]:
        """Measure the mean share of the patches that images keep after each stage; adaptive counts then go by it."""
        for name in options:
            raise PrunexError(f"{name}={options[name]!r} is not allowed: calibrating {self.name} has no options")
        total, count = torch.zeros(len(self.stages), dtype=torch.float64), 0
        with as_found(model, train=False):
            for batch in calibration_images(images):
                trace = run(model, batch, (self,), masked=False).trace
                total += realised(trace, self.stages).double().sum(0).cpu()
                count += len(batch)
        shares = (total / count).tolist()
        self.expect(shares)
        return shares

    def expect(self, shares: Sequence[float]) -> None:
        """Take measured mean shares as what :meth:`counts` tells; nothing where counts are fixed."""
        if self.adaptive:
            # A mean over images may rise by rounding alone; counts may not.
            falling = list(itertools.accumulate(map(float, shares), min))
            self.expected = check_expected(falling, len(self.stages))
            self.options["expected"] = _listed(self.expected)

    def fix(self) -> None:
        """Turn to fixed counts: the expected ones where they were measured, else those of ``keep_ratio``."""
        self.count = "fixed"
        if self.expected is not None:
            before = (1.0, *self.expected[:-1])
            # From shares of the original patches to shares of those that enter a stage.
            rates = [now / max(was, _LEAST) for now, was in zip(self.expected, before, strict=True)]
            self.rates = tuple(min(1.0, max(_LEAST, r)) for r in rates)
            self.options["keep_ratio"] = list(self.rates)
        self.targets = cumulative(self.rates)
        self.expected = None
        self.options |= {"count": "fixed", "expected": None}

    def inference_only(self) -> None:
        """Keep the rates and the threshold in force now."""
        self.threshold = self.options["threshold"] = self.mass()
        super().inference_only()
        self.targets = cumulative(self.rates)

    def likely(self, patches: int, extra: int = 0) -> list[int] | None:
        """The expected counts in adaptive mode, ``extra`` tokens added; None where they are fixed or not measured."""
        if not self.adaptive or self.expected is None:
            return None
        return [max(self.least, round(share * patches)) + extra for share in self.expected]


def check_expected(expected: Any, stages: int) -> tuple[float, ...] | None:
    """Mean shares, one a stage, each in [0, 1] and at most the one before, or None; anything else is refused."""
    if expected is None:
        return None
    listed = list(expected) if isinstance(expected, Sequence) and not isinstance(expected, str) else []
    numbers = [s for s in listed if not isinstance(s, bool) and isinstance(s, int | float) and 0 <= s <= 1]
    if len(numbers) != stages or len(listed) != stages or any(b > a for a, b in zip(listed, listed[1:], strict=False)):
        raise PrunexError(
            f"expected={expected!r} is not allowed: give None, or one share in [0, 1] for each of the {stages} stages, "
            "none above the one before"
        )
    return tuple(float(s) for s in numbers)


def cumulative(rates: Sequence[float]) -> tuple[float, ...]:
    """Products of the rates so far: the share of the original patches kept after each stage.

    >>> cumulative([0.5, 1.0, 0.5])
    (0.5, 0.5, 0.25)
    """
    return tuple(math.prod(rates[: s + 1]) for s in range(len(rates)))


def _listed(shares: tuple[float, ...] | None) -> list[float] | None:
    return None if shares is None else list(shares)


def realised(trace: TokenTrace, stages: Sequence[int]) -> Tensor:
    """Share of the original patches that each image keeps after each of a pruner's stages: float [B, stages]."""
    ratios = trace.keep_ratios()
    ones = torch.ones(trace.batch, device=trace.device)
    shares = []
    for stage in stages:
        # A stage that let all go on may have written nothing: what holds is the last reduction before it.
        made = [i for i, s in enumerate(trace.stages) if s.block <= stage]
        shares.append(ratios[made[-1]] if made else ones)
    return torch.stack(shares, 1)


def above(score: Tensor, threshold: float, present: Tensor | None, least: int = 0) -> Tensor:
    """The patches scored strictly above a threshold, bool [B, n], of those there; with ``least`` the best one is."""
    alive = torch.ones_like(score, dtype=torch.bool) if present is None else present > 0
    kept = (score > threshold) & alive
    if least:
        # For images where no patch reaches the threshold; one that has no patch left has none to rescue.
        best = score.masked_fill(~alive, float("-inf")).argmax(1, keepdim=True)
        rescued = torch.zeros_like(kept).scatter(1, best, ~kept.any(1, keepdim=True))
        kept = kept | (rescued & alive)
    return kept


def reaching(score: Tensor, mass: float, present: Tensor | None) -> Tensor:
    """The smallest set of patches whose scores [B, n] sum to at least ``mass`` of their total; at least one."""
    alive = torch.ones_like(score, dtype=torch.bool) if present is None else present > 0
    # Absent tokens come last, and then weigh nothing.
    ranked, order = score.masked_fill(~alive, -1).sort(dim=1, descending=True, stable=True)
    ranked = ranked.clamp(min=0)
    before = ranked.cumsum(1) - ranked
    chosen = before < mass * ranked.sum(1, keepdim=True)
    chosen[:, 0] = True
    return torch.zeros_like(chosen).scatter(1, order, chosen) & alive
