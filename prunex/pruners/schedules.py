"""How keep rates fall from 1 to their base over a training: one formula for all pruners."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from prunex.checks import check_choice, check_number
from prunex.errors import PrunexError

KINDS = ("constant", "cosine", "linear")


class ScheduleOptions(TypedDict, total=False):
    """The options of a schedule, as a pruner's constructor passes them on.

    Attributes:
        schedule: "cosine" (EViT's), "linear" or "constant".
        shrink_start: Fraction of training with everything kept.
        shrink_length: Fraction of training the rates fall over; 0 goes to the base rates at once.
    """

    schedule: str
    shrink_start: float
    shrink_length: float


@dataclass(frozen=True)
class Schedule:
    """Everything is kept before ``start``, the base rates hold from ``start + length`` (fractions of training, 0..1).

    In between, with u running from 0 to 1: cosine: base + (1 - base) (cos(pi u) + 1) / 2, as EViT trains (arXiv
    2202.07800; the authors count iterations, here it is the fraction of training); linear: base + (1 - base) (1 - u).
    Constant: the base rates from ``start`` on, ``length`` 0.

    >>> half_way = Schedule("linear", start=0.2, length=0.4)
    >>> [round(half_way.rate(0.5, progress), 3) for progress in (0.1, 0.3, 0.6)]
    [1.0, 0.875, 0.5]
    """

    kind: str = "cosine"
    start: float = 0.0
    length: float = 0.0

    def rate(self, base: float, progress: float) -> float:
        """The keep rate in force at a progress of 0..1, for ``base`` in (0, 1] at the end."""
        # First, so that a length of 0 divides nothing.
        if progress >= self.start + self.length:
            return base
        if progress < self.start:
            return 1.0
        done = (progress - self.start) / self.length
        left = (math.cos(math.pi * done) + 1) / 2 if self.kind == "cosine" else 1 - done
        return base + (1 - base) * left

    @property
    def options(self) -> ScheduleOptions:
        """The options that make it again."""
        return {"schedule": self.kind, "shrink_start": self.start, "shrink_length": self.length}


def check_schedule(schedule: str = "cosine", shrink_start: float = 0.0, shrink_length: float = 0.0) -> Schedule:
    """The schedule that a user's options describe."""
    check_choice("schedule", schedule, KINDS)
    start = check_number("shrink_start", shrink_start, 0, 1)
    length = check_number("shrink_length", shrink_length, 0, 1)
    if start + length > 1:
        raise PrunexError(
            f"shrink_start={shrink_start} plus shrink_length={shrink_length} is more than the whole training: "
            "their sum may be at most 1"
        )
    if schedule == "constant" and length > 0:
        raise PrunexError(
            f"shrink_length={shrink_length} does nothing with schedule='constant': leave it out, or give 'cosine' or "
            "'linear'"
        )
    return Schedule(schedule, start, length)
