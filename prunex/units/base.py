"""What unit pruners share: a score for each head and MLP channel, and the choice of units that meets a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from prunex.checks import check_budget, check_whole
from prunex.errors import OutOfReach, PrunexError
from prunex.vit.units import Branch
from prunex.vit.widths import WidthSpec

Scores = dict[str, Tensor]


class UnitOptions(TypedDict, total=False):
    """What every unit pruner can be asked for.

    Attributes:
        budget: What the slim model may cost: a share of the dense multiply-adds in (0, 1], or "2.4GMACs".
        min_heads: Heads left in every block at least.
        min_channels: MLP channels left in every block at least (or all, where there are fewer).
        round_to: Kept MLP channels are rounded up to a multiple, 8 or 16 for hardware that likes such widths.
    """

    budget: float | str
    min_heads: int
    min_channels: int
    round_to: int


class UnitPruner(nn.Module):
    """A module that says which heads and MLP channels are worth their multiply-adds; it never touches them itself.

    Whatever the criterion, it ends in one boolean a unit, ``open``, chosen so that the model costs what the budget
    allows. Until then all units are open and the model computes what the dense one does. Options of all:
    :class:`UnitOptions`.
    """

    name = ""
    handed_on: ClassVar[UnitOptions] = {"budget": 0.5, "min_heads": 1, "min_channels": 8, "round_to": 1}
    needs: ClassVar[str | None] = None  # what calibrate() has to be given: None, "model", "images" or "labels"
    trains = False  # whether it learns in training, by itself
    within = True  # whether scores compare within a branch alone, so that each branch's mean is made 1
    known = WidthSpec()  # what is left of the model already, so that widths are told in the dense model's numbers

    decided: Tensor
    removed: Tensor

    def __init__(self, branches: Sequence[Branch], classes: int, **shared: Unpack[UnitOptions]) -> None:
        super().__init__()
        self.options: dict[str, Any] = {**self.handed_on, **shared}
        check_budget(self.options["budget"])
        self.branches = tuple(branches)
        self.classes = classes
        self._allowed: float | None = None
        self.least = {
            "heads": check_whole("min_heads", self.options["min_heads"], 0),
            "channels": check_whole("min_channels", self.options["min_channels"], 0),
        }
        self.round_to = check_whole("round_to", self.options["round_to"], 1)
        for b in self.branches:
            self.register_buffer(slot("open", b.key), torch.ones(b.units, dtype=torch.bool))
        self.register_buffer("decided", torch.tensor(False))
        self.register_buffer("removed", torch.tensor(False))
        # Loading writes buffers in place, and the plain values read from them would be those of before.
        self.register_load_state_dict_post_hook(_after_loading)
        self.refresh()

    def refresh(self) -> None:
        """Read the buffers' flags into plain values: a forward must not wait for the device to know them."""
        self._left: dict[str, tuple[int, ...]] = {}
        self.has_decided, self.has_removed = bool(self.decided), bool(self.removed)
        if not self.has_decided or self.has_removed:
            return
        for b in self.branches:
            if not bool(self.open(b.key).all()):
                self._left[b.key] = tuple(self.open(b.key).nonzero().flatten().tolist())

    def prepare(self, model: nn.Module) -> None:
        """Called once with the model, before anything is put on it; refuses what the criterion cannot score."""

    def price(self, branches: Sequence[Branch]) -> None:
        """Be told anew what units cost, where tokens came to be pruned, or no longer are."""
        # A unit is computed for every token, so that it costs less behind a stage that drops some.
        costs = {b.key: b for b in branches}
        self.branches = tuple(costs[b.key] for b in self.branches)

    @contextmanager
    def all_open(self) -> Iterator[None]:
        """Let every unit through for a while, whatever was decided: a criterion looks at the whole model."""
        left, self._left = self._left, {}
        try:
            yield
        finally:
            self._left = left

    @contextmanager
    def reopened(self, units: Mapping[str, Tensor]) -> Iterator[None]:
        """Let these units through, too, for a while: bool [units] by branch."""
        chosen = {b.key: self.open(b.key).clone() for b in self.branches}
        try:
            for key, more in units.items():
                self.open(key).logical_or_(more)
            self.refresh()
            yield
        finally:
            for key, open_ in chosen.items():
                self.open(key).copy_(open_)
            self.refresh()

    def open(self, key: str) -> Tensor:
        """Which units of a branch are kept: bool [units]."""
        return self.get_buffer(slot("open", key))

    def gate(self, key: str, labels: Tensor | None) -> Tensor | None:
        """What the branch's units are multiplied by in the coming forward, of images of ``labels``; None: all open."""
        if key not in self._left:
            return None
        return self.open(key).float().repeat_interleave(self.branch(key).width)

    def branch(self, key: str) -> Branch:
        """A branch by its key."""
        return next(b for b in self.branches if b.key == key)

    def left(self, key: str) -> tuple[int, ...] | None:
        """The open units, where gates are 0 or 1 in the coming forward; None where they are not, or all are open."""
        return self._left.get(key)

    def calibrate(self, model: nn.Module, batches: Any = None) -> None:
        """Look at the model (and at images and labels, where the method needs them), and decide."""
        self.decide(self.scores(model, batches))

    def scores(self, model: nn.Module, batches: Any = None) -> Scores:
        """How much each unit matters, by branch: float [units], at least 0."""
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """Weighted auxiliary losses (scalars) of the last training forward."""
        return {}

    def closed(self) -> dict[str, int]:
        """How many units of each branch are closed, and still in the model."""
        return {key: self.branch(key).units - len(units) for key, units in self._left.items()}

    def remove(self) -> None:
        """Be told that what is closed was taken out of the model for good."""
        self.removed.fill_(True)
        self.refresh()

    def widths(self) -> WidthSpec:
        """The units that are kept, in the dense model's numbers."""
        return self._spec({b.key: self.open(b.key) for b in self.branches})

    def present(self) -> WidthSpec:
        """The units that an evaluation has open at this moment: all of them, until something was decided."""
        return self.widths()

    def _spec(self, opened: Mapping[str, Tensor]) -> WidthSpec:
        kept: dict[str, dict[int, tuple[int, ...]]] = {"heads": {}, "channels": {}}
        blocks = self.known.blocks
        for b in self.branches:
            # A spec names what is cut alone: where it is silent about a branch, all units stay.
            if bool(opened[b.key].all()):
                continue
            number = b.block if blocks is None else blocks[b.block]
            names = getattr(self.known, b.kind).get(number, range(b.units))
            kept[b.kind][number] = tuple(names[u] for u in opened[b.key].nonzero().flatten().tolist())
        return WidthSpec(heads=kept["heads"], channels=kept["channels"])

    def prunable(self) -> int:
        """Multiply-adds of all units together."""
        return sum(b.units * b.macs for b in self.branches)

    def spent(self) -> int:
        """Multiply-adds of the units that are open."""
        return sum(int(self.open(b.key).sum()) * b.macs for b in self.branches)

    def aim(self, full: int, dense: int) -> float:
        """What units may cost in a model that costs ``full`` with all units, and ``dense`` with all tokens too."""
        rest = full - self.prunable()
        budget = self.options["budget"]
        allowed = check_budget(budget, dense)
        least = rest + sum(b.macs * self._least(b) for b in self.branches)
        if allowed < least:
            raise OutOfReach(
                f"budget={budget!r} ({allowed / dense:.1%} of the dense multiply-adds) is out of reach for "
                f"{self.name}: embedding, head and the fewest units (min_heads={self.least['heads']}, "
                f"min_channels={self.least['channels']}) alone are {least / dense:.1%}"
            )
        # A budget may allow more than all units cost, where tokens are pruned too: then none has to go.
        return min(float(self.prunable()), allowed - rest)

    def decide(self, scores: Mapping[str, Tensor], allowed: float | None = None) -> None:
        """Open the units of the highest :meth:`level`, one threshold for all, as many as the budget allows."""
        allowed = self.allowed if allowed is None else allowed
        # NaN is above no threshold: its units would go, whatever they are worth.
        for b in self.branches:
            if not bool(torch.isfinite(scores[b.key]).all()):
                raise PrunexError(f"{self.name} scores of {b.key} hold NaN or infinite values: see weights and images")
        levels = {b.key: self.level(b, scores[b.key]) for b in self.branches}
        thresholds = [float("-inf"), *torch.cat([levels[b.key] for b in self.branches]).unique().tolist()]
        # The lowest threshold that the allowance can pay for: what is open, and so the cost, falls with it.
        low, high = 0, len(thresholds) - 1
        while low < high:
            middle = (low + high) // 2
            if self._cost(_above(thresholds[middle], levels), levels) <= allowed:
                high = middle
            else:
                low = middle + 1
        wanted = _above(thresholds[low], levels)
        self._fill(wanted, levels, allowed)
        self.keep(wanted, levels)

    def _fill(self, wanted: dict[str, Tensor], levels: Mapping[str, Tensor], allowed: float) -> None:
        """Open the next best units that still fit, channels in whole multiples of ``round_to``."""
        # One threshold for all stops at the first unit too many, and units of equal level come and go together.
        room = allowed - self._cost(wanted, levels)
        steps = []
        for i, b in enumerate(self.branches):
            wanted[b.key] = self._rounded(b, wanted[b.key], levels[b.key])
            closed = (~wanted[b.key]).nonzero().flatten()
            closed = closed[torch.sort(levels[b.key][closed], descending=True, stable=True).indices]
            for n, units in enumerate(closed.split(self.round_to if b.kind == "channels" else 1)):
                if len(units):
                    steps.append((-float(levels[b.key][units[0]]), i, n, units))
        full: set[int] = set()
        for _, i, _, units in sorted(steps, key=lambda s: s[:3]):
            b = self.branches[i]
            if i not in full and len(units) * b.macs <= room:
                wanted[b.key][units] = True
                room -= len(units) * b.macs
            # A smaller step behind one that does not fit holds worse units: it must not pass.
            else:
                full.add(i)

    @property
    def allowed(self) -> float:
        """Multiply-adds that all units together may cost; refused before that is known."""
        if self._allowed is None:
            raise PrunexError(f"what {self.name}'s units may cost is not known yet: call budget() on its handle first")
        return self._allowed

    def may_spend(self, allowed: float) -> None:
        """Be told how many multiply-adds the units may cost together."""
        self._allowed = allowed

    def level(self, branch: Branch, score: Tensor) -> Tensor:
        """Scores as they compare across branches, float64 on the CPU: over the branch's mean, or over a unit's cost."""
        score = score.detach().cpu().double()
        if not self.within:
            return score / branch.macs
        mean = score.mean()
        return score / mean if mean > 0 else score

    def keep(self, wanted: Mapping[str, Tensor], levels: Mapping[str, Tensor]) -> None:
        """Open these units, the fewest that each branch must have and whole multiples of ``round_to``."""
        for b in self.branches:
            self.open(b.key).copy_(self._rounded(b, wanted[b.key], levels[b.key]))
        self.decided.fill_(True)
        self.refresh()

    def _cost(self, wanted: Mapping[str, Tensor], levels: Mapping[str, Tensor]) -> int:
        return sum(int(self._rounded(b, wanted[b.key], levels[b.key]).sum()) * b.macs for b in self.branches)

    def _least(self, branch: Branch) -> int:
        least = min(self.least[branch.kind], branch.units)
        # Rounded here as where units are kept, or :meth:`aim` would promise budgets that rounding up breaks.
        if branch.kind == "channels":
            least = min(branch.units, -(-least // self.round_to) * self.round_to)
        return least

    def _rounded(self, branch: Branch, wanted: Tensor, level: Tensor) -> Tensor:
        # Ranked anew, so that what is added to make a multiple is the best of what was left out.
        # All of it stays on the device: hard gates are made so in every step.
        count = wanted.sum().clamp(min=self._least(branch))
        if branch.kind == "channels":
            count = ((count + self.round_to - 1) // self.round_to * self.round_to).clamp(max=branch.units)
        order = torch.sort(level, descending=True, stable=True).indices
        ranks = torch.arange(branch.units, device=level.device)
        return torch.empty_like(ranks).scatter_(0, order, ranks) < count


def _above(threshold: float, levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: level > threshold for key, level in levels.items()}


def slot(what: str, key: str) -> str:
    """The name of a branch's buffer."""
    return f"{what}_{key.replace('.', '_')}"


def _after_loading(module: UnitPruner, _: Any) -> None:
    module.refresh()
