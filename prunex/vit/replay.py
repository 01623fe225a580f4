"""Pruners that make no choice of their own: what was decided before is repeated, and absent patches stay absent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunex.vit.decisions import Answer, Decided, Decision, Keep, Mask
from prunex.vit.state import TokenState
from prunex.vit.turns import Turn


class Replay:
    """A pruner that repeats what was decided for a batch, for any selection ``index`` int64 [R] of its images.

    Explainers that run a model many times on altered inputs freeze the selection of the clean run with it: a changed
    prediction is then never a changed selection.
    """

    def __init__(self, decisions: Sequence[Decided], index: Tensor | None = None) -> None:
        self.decisions, self.index = decisions, index

    def plan(self) -> list[Turn]:
        """Where something was decided."""
        # Several decisions at one place are one turn.
        places = dict.fromkeys((d.block, d.when) for d in self.decisions)
        return [Turn(block, when) for block, when in places]

    def decide(self, turn: Turn, state: TokenState) -> Answer:
        """What was decided there."""
        return [d.pick(self.index) for d in self._made(turn)]

    def _made(self, turn: Turn) -> list[Decision]:
        return [d.answer for d in self.decisions if (d.block, d.when) == (turn.block, turn.when)]


class Absent:
    """A pruner that takes patches away before the first block, as if they had never been embedded.

    ``present`` bool [B, P]: every image has as many, and the others really leave; or ``masked``: images may differ, and
    absent patches keep slots that nobody reads.
    """

    def __init__(self, present: Tensor, masked: bool = False) -> None:
        self.present, self.masked = present, masked

    def plan(self) -> list[Turn]:
        """Before the first block."""
        return [Turn(0)]

    def decide(self, turn: Turn, state: TokenState) -> Answer:
        """Take the patches away."""
        if self.masked:
            return Mask(self.present.to(torch.promote_types(state.tokens.dtype, torch.float32)))
        # A stable sort of flags: those that are there come first and keep their order.
        count = int(self.present[0].sum())
        return Keep(self.present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count])


class ReplayAmong(Replay):
    """A pruner that hides absent patches, then repeats a clean masked run's decisions among the others.

    ``present`` bool [R, n]: which slots of these sequences hold a patch; ``place`` as for :class:`Slots`.
    """

    def __init__(
        self, present: Tensor, decisions: Sequence[Decided], index: Tensor | None = None, place: Tensor | None = None
    ) -> None:
        super().__init__(decisions, index)
        self.present = present
        self.slots = Slots(present.shape[1], index, place)

    def plan(self) -> list[Turn]:
        """Before the first block, and where something was decided."""
        return [Turn(0), *(t for t in super().plan() if (t.block, t.when) != (0, "before"))]

    def decide(self, turn: Turn, state: TokenState) -> Answer:
        """What was decided there, among the tokens that are there."""
        answers: list[Decision] = []
        if (turn.block, turn.when) == (0, "before"):
            present = self.present
            answers.append(Mask(present.to(torch.promote_types(state.tokens.dtype, torch.float32))))
        else:
            present = torch.as_tensor(state.present) > 0
        for decision in self._made(turn):
            repeated, present = decision.among(present, self.slots)
            answers += repeated
        return answers


class Slots:
    """Where the slots of a clean run are in sequences of ``width`` slots that lack some of its patches.

    ``image`` int64 [R]: which image of the clean batch each is (None: the same batch); ``place`` int64 [R, P]: the slot
    here of each patch of the clean run (None: the slots are the same).
    """

    def __init__(self, width: int, image: Tensor | None, place: Tensor | None) -> None:
        self.width, self.image, self.place = width, image, place

    def values(self, values: Tensor) -> Tensor:
        """One number a slot of the clean run, in these sequences' slots; whatever where no patch is."""
        values = self._picked(values.detach())
        if self.place is None:
            return values
        # Tokens that were fused meanwhile lie behind the patches, in the clean run and here.
        slots = self._here(self.place, self.width + values.shape[1] - self.place.shape[1])
        # One slot more than there are: patches that are nowhere here are written to it, and it is cut off.
        room = values.new_zeros(len(values), slots.shape[1] - self.place.shape[1] + self.width + 1)
        return room.scatter(1, slots % room.shape[1], values)[:, :-1]

    def index(self, index: Tensor, count: int) -> Tensor:
        """Positions [B, k] among the clean run's slots as positions among the ``count`` slots here."""
        index = self._picked(index)
        return index if self.place is None else self._here(self.place, count).gather(1, index)

    def merged(self, entered: int, count: int, width: int) -> None:
        """Tokens have the clean run's slots from here on, ``width`` of them; those that it emptied are nowhere here."""
        if self.place is not None:
            place = torch.arange(entered, device=self.place.device)
            self.place = place.masked_fill(place >= count, -1).expand(len(self.place), -1)
            self.width = width

    def _here(self, place: Tensor, count: int) -> Tensor:
        """Where each of the clean run's slots is: patches by their place, fused ones behind them; -1: nowhere."""
        fused = torch.arange(self.width, count, device=place.device)
        return torch.cat([place, fused.expand(len(place), -1)], 1)

    def _picked(self, values: Tensor) -> Tensor:
        return values if self.image is None else values[self.image]
