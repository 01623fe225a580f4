"""Whose turn it is to decide, where, and what they must be shown for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from prunex.brief import Brief
from prunex.vit.calls import hooked_within
from prunex.vit.decisions import Answer, When, apply
from prunex.vit.recorder import Recorder
from prunex.vit.state import TokenState

Shown = Literal["row", "keys", "values", "shift"]


@dataclass(eq=False, repr=False)
class Turn(Brief):
    """Where a pruner decides."""

    block: int  # block index
    # Before the block, between its halves ("inside"), or after it. "never": nothing is decided, and ``only`` alone is
    # told.
    when: When | Literal["never"] = "before"
    # What a turn inside must be shown of the block's attention: "row", who is looked at (``TokenState.row``), "keys",
    # their mean over heads (``TokenState.key_mean``), "values", their lengths (``TokenState.value_norm``). A turn after
    # it: "shift", how far its MLP moved each token (``TokenState.shift``).
    shown: tuple[Shown, ...] = ()
    # The tokens that go on after the block's attention, int64 [m], prefix included, where that is known before it and
    # the same for all images. Where nobody needs the others, only their queries are computed; what is decided inside
    # must say the same.
    only: Tensor | None = None
    ahead: int | None = None  # how many blocks are run on all patches only to decide here; None: nothing is run twice


class Pruner(Protocol):
    """What the forward asks of a token pruner; see ``prunex.pruners.base``."""

    def plan(self) -> Sequence[Turn]:
        """Where it decides in the forward that begins now."""

    def decide(self, turn: Turn, state: TokenState) -> Answer:
        """Decide; None leaves all as it is."""


class Turns:
    """The turns of one forward, of several pruners, who are asked in their order at every place."""

    def __init__(self, pruners: Sequence[Pruner] = ()) -> None:
        self.alone = len(pruners) == 1
        self._at: dict[tuple[str, int], list[tuple[Pruner, Turn]]] = {}
        self._shown: set[tuple[str, int]] = set()
        self._only: dict[int, Tensor] = {}
        # By place, since every block asks for each of its places, and at most of them nobody decides.
        for pruner in pruners:
            for turn in pruner.plan():
                self._at.setdefault((turn.when, turn.block), []).append((pruner, turn))
                self._shown.update((what, turn.block) for what in turn.shown)
                if turn.only is not None:
                    self._only.setdefault(turn.block, turn.only)

    def at(self, when: str, block: int) -> Sequence[tuple[Pruner, Turn]]:
        """Whose turn it is at one place."""
        return self._at.get((when, block), ())

    def show(self, what: Shown, block: int) -> bool:
        """Whether somebody must be shown this of a block."""
        return (what, block) in self._shown

    def only(self, number: int, block: Any, state: TokenState, recorder: Recorder) -> Tensor | None:
        """The tokens that go on after a block's attention, where that is known before it and the others are no use."""
        # Whoever records, watches, hooks, masks or weighs keys needs all: then tokens leave after the attention.
        needed = recorder.tape is not None or recorder.watch is not None or state.masked
        if not self.alone or needed or state.policy is not None or state.keys is not None:
            return None
        # Last, since looking for hooks walks through the block's modules.
        fixed = self._only.get(number)
        return None if fixed is None or hooked_within(block) else fixed

    def decide(self, when: When, block: int, state: TokenState, recorder: Recorder, entered: int | None = None) -> None:
        """Ask those whose turn it is, and carry their answers out; ``entered`` as for :func:`apply`."""
        deciding = self.at(when, block)
        for pruner, turn in deciding:
            recorder.note(apply(pruner.decide(turn, state), block, when, state, entered))
        # A decision inside or after the last block changes which tokens the head sees.
        if deciding and when != "before":
            recorder.leave(state)


NOBODY = Turns()
