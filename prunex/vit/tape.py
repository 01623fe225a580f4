"""Tape: what one forward left behind for explainers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prunex.brief import Brief
from prunex.vit.arithmetic import PLAIN, Arithmetic
from prunex.vit.trace import Stage


@dataclass(eq=False, repr=False)
class Attended(Brief):
    """One block's attention half, as it ran."""

    block: int  # block index
    # [B, H, n, n] with rows = queries, part of the graph when gradients are on; None unless asked for. [B, H, m, n]
    # where only the ``queries`` go on. A differential head's is the difference of its two softmaxes.
    attention: Tensor | None = None
    # [B, H, n, d], the values it gathered, off the graph; None unless streams were asked for
    value: Tensor | None = None
    before: Tensor | None = None  # [B, n, D], the residual stream entering the block, likewise
    after: Tensor | None = None  # [B, n, D], the residual stream with the branch added, likewise
    policy: Tensor | None = None  # [B, n] or None: 0 for slots of tokens that were dropped (masked mode)
    # [B, n] or None: attention paid by the tokens that the head reads (or the class token), mean over heads; in shares,
    # whatever heads look at: what is negative counts as 0, and each head's row sums to 1
    row: Tensor | None = None
    head_rows: Tensor | None = None  # [B, H, n] or None: the same for each head
    # [B, n, D] or None: the tokens as the block's first norm gives them, part of the graph
    normed: Tensor | None = None
    # positions of the rows of ``attention`` where they are not all tokens, else None
    queries: tuple[int, ...] | None = None
    sizes: Tensor | None = None  # [B, n] or None: how many patches each token stands for, where some were merged


@dataclass(eq=False, repr=False)
class Fed(Brief):
    """One block's MLP half: the stream entering it and what is added to it ([B, n, D] each, off the graph)."""

    block: int
    before: Tensor | None = None
    branch: Tensor | None = None
    policy: Tensor | None = None


@dataclass(eq=False, repr=False)
class Left(Brief):
    """The stream as it left a block."""

    tokens: Tensor  # [B, n, D], part of the graph
    policy: Tensor | None  # [B, n] or None: which slots hold a token (masked mode)
    sizes: Tensor | None  # [B, n] or None: how many patches each token stands for
    steps: int  # how many steps the tape had then


@dataclass(eq=False, repr=False)
class Tape(Brief):
    """A recording of one forward, in the order things happened."""

    attention: bool = False  # ask for every block's attention matrix (no fused attention in this forward)
    # applied to each matrix before it is kept, such as a head mean; None keeps all heads
    reduce: Callable[[Tensor], Tensor] | None = None
    # where a block's heads may look at tokens negatively, or rows do not sum to 1: keep the positive part of each row,
    # rescaled to sum 1
    shares: bool = False
    gradients: bool = False  # make the matrices part of an autograd graph even if no parameter asks for gradients
    streams: bool = False  # ask for values and token streams
    rows: frozenset[int] = frozenset()  # blocks whose read-out row alone is wanted (N numbers a head instead of N x N)
    head_rows: frozenset[int] = frozenset()  # blocks whose read-out row is wanted for each head
    blocks: frozenset[int] | None = None  # blocks whose matrix is wanted; None: all of them
    normed: frozenset[int] = frozenset()  # blocks whose first norm's output is wanted, as a place to differentiate at
    leaving: frozenset[int] = frozenset()  # blocks whose leaving stream is wanted, part of the graph
    # First block that is part of the graph. Nothing before it can be differentiated, nor costs memory.
    graph_from: int = 0
    # in the last block only the tokens that the head reads go on, as far as nobody asks for the others
    narrow: bool = False
    ops: Arithmetic = PLAIN  # how elementary operations are carried out
    # ``Attended``, ``Fed`` and ``Stage`` in forward order
    steps: list[Attended | Fed | Stage] = field(default_factory=list)
    left: dict[int, Left] = field(default_factory=dict)  # by block, the stream that left it
    # [B, N, D], the tokens entering the first block; part of the graph if the images are
    embedded: Tensor | None = None
    # [B, 1, D] or None: the class token that entered behind the blocks, where operations are opened; part of the graph
    late: Tensor | None = None
    policy: Tensor | None = None  # [B, n] or None: which slots hold a token at the end (masked mode)
    tokens: int = 0  # tokens after the last block, prefix included (those that were not carried on counted too)
    logits: Tensor | None = None  # [B, C], the model's output
    # [B, n] or None: how many patches each token stands for at the end, where some were merged
    sizes: Tensor | None = None
    # [B, n] or None: attention of a pooling head over the final tokens, where the head has its own
    readout: Tensor | None = None

    def asked(self) -> tuple[Any, ...]:
        """What is asked for; tapes that ask the same record the same."""
        nodes = (self.rows, self.head_rows, self.blocks, self.normed, self.leaving, self.graph_from)
        return (self.attention, self.reduce, self.shares, self.gradients, self.streams, self.narrow, *nodes)

    def attended(self) -> list[Attended]:
        """The attention halves in forward order."""
        return [s for s in self.steps if isinstance(s, Attended)]

    def matrices(self) -> list[tuple[Attended, Tensor]]:
        """The attention halves whose matrix was kept, with it."""
        return [(step, step.attention) for step in self.attended() if step.attention is not None]

    def stages_before(self, block: int) -> list[Stage]:
        """The reductions in front of a block's attention."""
        stages = []
        for step in self.steps:
            if isinstance(step, Stage):
                stages.append(step)
            elif isinstance(step, Attended) and step.block == block:
                break
        return stages

    def lifted(self, row: Tensor, steps: int, prefix: int) -> Tensor:
        """Row vectors [..., n] over the tokens that were there after so many steps, carried to the input tokens."""
        for step in reversed(self.steps[:steps]):
            row = step.lift(row, prefix) if isinstance(step, Stage) else row
        return row

    def wants_matrix(self, block: int) -> bool:
        """Whether a block's attention matrix is asked for."""
        return self.attention and (self.blocks is None or block in self.blocks)

    def looks_into(self, block: int) -> bool:
        """Whether something is asked for that only the opened attention of a block knows."""
        return self.streams or self.wants_matrix(block) or block in self.head_rows
