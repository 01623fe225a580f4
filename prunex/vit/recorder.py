"""Who is told what of one forward: a tape, a watch, or nobody."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from prunex.vit.state import TokenState
from prunex.vit.tape import Attended, Fed, Left, Tape
from prunex.vit.trace import Stage

_ASKS_FOR_NOTHING = Tape()


class Watcher(Protocol):
    """Who is shown the stream after every block; ``stop`` says how many blocks are wanted, None: all."""

    stop: int | None

    def after(self, block: int, state: TokenState) -> None:
        """Look at the stream as it leaves a block."""


class Recorder:
    """What one forward is recorded by: a tape, which says what it asks for, and a watch that sees block after block."""

    def __init__(self, tape: Tape | None = None, watch: Watcher | None = None) -> None:
        self.tape, self.watch = tape, watch
        self.request = _ASKS_FOR_NOTHING if tape is None else tape
        self.ops = self.request.ops
        self.stop = None if watch is None else watch.stop

    def graph(self, block: int) -> AbstractContextManager[Any]:
        """Off the graph before the first block that the tape wants on it."""
        return torch.no_grad() if block < self.request.graph_from else nullcontext()

    def note(self, steps: Sequence[Attended | Fed | Stage]) -> None:
        """Something happened."""
        if self.tape is not None:
            self.tape.steps.extend(steps)

    def leave(self, state: TokenState) -> None:
        """These tokens may be the last."""
        if self.tape is not None:
            # Asked again after every decision: the last answer stays.
            self.tape.policy, self.tape.tokens, self.tape.sizes = state.policy, state.tokens.shape[1], state.sizes

    def passed(self, block: int, state: TokenState) -> None:
        """A block is done."""
        if self.tape is not None and block in self.tape.leaving:
            self.tape.left[block] = Left(state.tokens, state.policy, state.sizes, len(self.tape.steps))
        if self.watch is not None:
            self.watch.after(block, state)


SILENT = Recorder()  # one for all: a fresh one in every forward would be traced anew by torch.compile
