"""Budgets: the rates under which a model costs what it may, found by the closed form before anything is attached."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from prunex.checks import check_budget
from prunex.errors import OutOfReach, PrunexError
from prunex.pruners.base import accepted
from prunex.vit.anatomy import Anatomy
from prunex.vit.cost import count

CLOSE = 0.01  # how far from the budget, as a share of it, a model may lie

Shares = tuple[float, ...]


class Budget:
    """The search for the options of one method on one model that meet a budget, beside those that the user gave.

    All stages first share one rate (or the method's like, see :meth:`TokenPruner.knob`): cost rises with it, so it is
    bisected, on the closed form, at the model's own image size and at the schedule's end. Of the two counts beside the
    budget the nearer wins. Where whole tokens make that miss by more than 1 %, as on small grids, one stage leaves the
    shared rate and is bisected alone; where that is not enough either, after another was moved by a token or two.
    """

    def __init__(self, model: Any, anatomy: Anatomy, make: Any, options: Mapping[str, Any]) -> None:
        self.model, self.anatomy, self.make, self.options = model, anatomy, make, dict(options)
        self.dense = count(model, None).macs
        self._costs: dict[Shares, int] = {}

    def macs(self, options: Mapping[str, Any]) -> int:
        """What the model costs under these options, at the schedule's end."""
        with torch.device("meta"):  # a learned pruner's weights are not needed, nor random numbers for them
            return count(self.model, self.make(self.anatomy, **options)).macs

    def solve(self, budget: Any) -> dict[str, Any]:
        """All options, those that meet the budget among them; a warning says where whole tokens miss it by 1 %."""
        target = check_budget(budget, self.dense)
        name = self.make.name
        for option in self.turned():
            if option in self.options:
                raise PrunexError(
                    f"budget={budget!r} and {option}={self.options[option]!r} both say how much is kept: give one"
                )
        with torch.device("meta"):
            stages = len(self.make(self.anatomy, **self._with((0.5,))).stages)
        # One rate for all stages first: what users would give, and monotonous in cost.
        shared = self._bisect(lambda x: (x,) * stages, 0.0, 1.0, target)
        best = min(shared, key=lambda s: self._miss(s, target))
        # A pruner costs something itself: with all tokens kept it may be more than the dense model.
        low, high = self._of((1e-9,) * stages), max(self.dense, self._of((1.0,) * stages))
        # Only a budget beyond both ends is out of reach; between them whole tokens are in the way.
        if self._miss(best, target) > CLOSE and not low <= target <= high:
            raise OutOfReach(
                f"budget={budget!r} ({in_words(target, self.dense)}) is out of reach for {name} at these settings: "
                f"give one from {in_words(low, self.dense)} to {in_words(high, self.dense)}"
            )
        if self._miss(best, target) > CLOSE:
            best = self._apart(shared, target)
        if self._miss(best, target) > CLOSE:
            warnings.warn(
                f"whole tokens let {name} come no nearer to budget={budget!r} than "
                f"{in_words(self._of(best), self.dense)}, {100 * self._miss(best, target):.1f} % off: this grid of "
                f"{self.anatomy.grid} patches is small",
                stacklevel=3,
            )
        return self._with(self._short(best))

    def meets(self, budget: Any) -> bool:
        """Whether the options meet a budget as nearly as whole tokens allow; errors as for :meth:`solve`."""
        target, macs = check_budget(budget, self.dense), self.macs(self.options)
        turned = self.turned()
        if abs(macs - target) <= CLOSE * target:
            return True
        others = {k: v for k, v in self.options.items() if k not in turned}
        # The search is made to compare with: what it would warn of, nobody asked for.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return macs == self.macs(Budget(self.model, self.anatomy, self.make, others).solve(budget))

    def turned(self) -> list[str]:
        """Names of the options that a budget sets; of a method without a rate the settings' costs are told."""
        turned = list(self.make.knob(self.anatomy, (0.5,)))
        if turned and all(option in accepted(self.make) for option in turned):
            return turned
        costs = []
        choices = self.make.settings(self.anatomy) if hasattr(self.make, "settings") else []
        for settings in choices:
            try:
                cost = in_words(self.macs({**self.options, **settings}), self.dense)
            except PrunexError:  # a setting that does not go with the user's other options
                continue
            costs.append(f"{', '.join(f'{k}={v!r}' for k, v in settings.items())}: {cost}")
        known = f"; its settings cost {'; '.join(costs)}" if costs else ""
        raise PrunexError(f"{self.make.name} has no rate that a budget could set: leave budget out{known}")

    def _with(self, shares: Shares) -> dict[str, Any]:
        return {**self.options, **self.make.knob(self.anatomy, shares)}

    def _of(self, shares: Shares) -> int:
        if shares not in self._costs:
            self._costs[shares] = self.macs(self._with(shares))
        return self._costs[shares]

    def _miss(self, shares: Shares, target: float) -> float:
        return abs(self._of(shares) - target) / target

    def _bisect(self, line: Callable[[float], Shares], low: float, high: float, target: float) -> tuple[Shares, Shares]:
        """The two shares on a line from low to high between whose counts the target lies (or the end next to it)."""
        # Finer than a hundredth of a token changes no count.
        low, finest = max(low, 1e-9), 0.01 / (self.anatomy.grid[0] * self.anatomy.grid[1])
        if self._of(line(high)) <= target:
            return line(high), line(high)
        while high - low > finest:
            middle = (low + high) / 2
            if self._of(line(middle)) <= target:
                low = middle
            else:
                high = middle
        return line(low), line(high)

    def _apart(self, starts: Sequence[Shares], target: float) -> Shares:
        """Let a single stage leave the shared rate; then one more by a token or two; until it is near enough."""
        best = min(starts, key=lambda s: self._miss(s, target))
        token = 1 / (self.anatomy.grid[0] * self.anatomy.grid[1])
        for start, moves in [*((s, (0,)) for s in starts), (best, (1, -1, 2, -2))]:
            late_first = range(len(start) - 1, -1, -1)  # late stages are the finest
            for turned, moved, move in itertools.product(late_first, late_first, moves):
                if (turned == moved) != (move == 0):
                    continue
                moved_start = _put(start, moved, min(1.0, max(token, start[moved] + move * token)))
                try:
                    nearest = self._bisect(partial(_put, moved_start, turned), 0.0, 1.0, target)
                except PrunexError:  # beside the user's other options the method takes no rates of single stages
                    return best
                best = min(best, *nearest, key=lambda s: self._miss(s, target))
                if self._miss(best, target) <= CLOSE:
                    return best
        return best

    def _short(self, shares: Shares) -> Shares:
        """The same counts by rates of as few digits as will do, and a little inside the step they stand for."""

        def shortened(line: Callable[[float], Shares], value: float) -> Shares:
            for digits in range(2, 16):
                for step in (0, 1, -1):
                    rounded = round(value + step * 10.0**-digits, digits)
                    if 0 < rounded <= 1 and self._of(line(rounded)) == self._of(shares):
                        return line(rounded)
            return shares

        # Users read these numbers: 0.769 rather than fifteen digits of the same count.
        if len(set(shares)) == 1:
            return shortened(lambda x: (x,) * len(shares), shares[0])
        for s in range(len(shares)):
            shares = shortened(partial(_put, shares, s), shares[s])
        return shares


def _put(shares: Shares, stage: int, value: float) -> Shares:
    return (*shares[:stage], value, *shares[stage + 1 :])


def in_words(macs: float, dense: int) -> str:
    """Multiply-adds in the unit that suits the dense model, and as a share of its own."""
    unit, name = (1e9, "GMACs") if dense >= 1e9 else (1e6, "MMACs")
    return f"{macs / unit:.3g} {name}, {100 * macs / dense:.1f} %"
