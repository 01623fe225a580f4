"""The training forwards of one step: remembered until their losses were asked for, or a backward pass was through."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

# Forwards whose losses nobody asks for must not pile up. A compiled one is traced anew for each number that waits.
MOST, MOST_COMPILED = 16, 4

T = TypeVar("T")


class Steps(Generic[T]):
    """What training forwards left for losses.

    Attributes:
        waiting: Of forwards with a graph whose losses were not asked for, and no backward pass went through.
        counted: Of those before them, until the next training forward.
        crowded: Whether some were let go of because too many waited.
    """

    def __init__(self) -> None:
        self.waiting: list[T] = []
        self.counted: list[T] = []
        self.crowded = False

    def __reduce__(self) -> Any:
        # Copies start without forwards: their tensors belong to a graph and cannot be copied.
        return Steps, ()

    @staticmethod
    def counts() -> bool:
        """Whether a forward that runs now has losses: not one without a graph, nor one that a checkpoint runs again."""
        if not torch.is_grad_enabled():
            return False
        return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1

    def remember(self, forward: T, tokens: Tensor) -> None:
        """Keep what a forward left until a backward pass goes through its tokens."""
        compiled = torch.compiler.is_compiling()
        most = MOST_COMPILED if compiled else MOST
        if len(self.waiting) >= most:
            self.crowded = True
        self.waiting, self.counted = [*self.waiting[1 - most :], forward], []
        if compiled or not tokens.requires_grad:
            return
        # A hook that held either would be a cycle through the graph, which Python's collector cannot see.
        ours, theirs = weakref.ref(self), weakref.ref(forward)

        def spent(_: Tensor) -> None:
            steps, passed = ours(), theirs()
            if steps is not None and passed is not None and not torch.is_grad_enabled():  # else the graph is kept
                steps._count(passed)

        tokens.register_hook(spent)

    def _count(self, passed: T) -> None:
        """A backward pass went through this forward: it is no part of a later step."""
        left = [f for f in self.waiting if f is not passed]
        if len(left) < len(self.waiting):
            self.waiting, self.counted = left, [*self.counted, passed]

    def take(self) -> list[T]:
        """What the training forwards of this step left: the next one begins another, till then it is given again."""
        if self.crowded:
            self.crowded = False
            warnings.warn(
                f"more than {MOST} training forwards ({MOST_COMPILED} compiled ones) ran since losses() was last asked:"
                " the earlier ones' losses are left out; ask after fewer, call forget(), or run them under no_grad()",
                stacklevel=3,
            )
        if self.waiting:
            self.waiting, self.counted = [], self.waiting
        return self.counted

    def forget(self) -> None:
        """Let go of all of them."""
        self.waiting, self.counted = [], []
