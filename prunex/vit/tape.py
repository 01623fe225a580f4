"""Tape: what one forward left behind for explainers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from prunex.brief import Brief
from prunex.vit.arithmetic import PLAIN, Arithmetic
from prunex.vit.trace import Stage


@dataclass(eq=False, repr=False)
class Attended(Brief):
    """One block's attention half, as it ran.

    Attributes:
        block: Block index.
        attention: [B, H, n, n] with rows = queries, part of the graph when gradients are on; None unless asked for.
            [B, H, m, n] where only the ``queries`` go on.
        queries: Positions of the rows of ``attention`` where they are not all tokens, else None.
        value: [B, H, n, d], the values it gathered, off the graph; None unless streams were asked for.
        before: [B, n, D], the residual stream entering the block, likewise.
        after: [B, n, D], the residual stream with the branch added, likewise.
        policy: [B, n] or None: 0 for slots of tokens that were dropped (masked mode).
        row: [B, n] or None: attention paid by the tokens that the head reads (or the class token), mean over heads.
        head_rows: [B, H, n] or None: the same for each head.
        normed: [B, n, D] or None: the tokens as the block's first norm gives them, part of the graph.
        sizes: [B, n] or None: how many patches each token stands for, where some were merged.
    """

    block: int
    attention: Tensor | None = None
    value: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    policy: Tensor | None = None
    row: Tensor | None = None
    head_rows: Tensor | None = None
    normed: Tensor | None = None
    queries: tuple[int, ...] | None = None
    sizes: Tensor | None = None


@dataclass(eq=False, repr=False)
class Fed(Brief):
    """One block's MLP half: the stream entering it and what is added to it ([B, n, D] each, off the graph)."""

    block: int
    before: Tensor | None = None
    branch: Tensor | None = None
    policy: Tensor | None = None


@dataclass(eq=False, repr=False)
class Tape(Brief):
    """A recording of one forward, in the order things happened.

    Attributes:
        attention: Ask for every block's attention matrix (no fused attention in this forward).
        reduce: Applied to each matrix before it is kept, such as a head mean; None keeps all heads.
        gradients: Make the matrices part of an autograd graph even if no parameter asks for gradients.
        streams: Ask for values and token streams.
        rows: Blocks whose read-out row alone is wanted (N numbers a head instead of N x N).
        head_rows: Blocks whose read-out row is wanted for each head.
        blocks: Blocks whose matrix is wanted; None: all of them.
        normed: Blocks whose first norm's output is wanted, as a place to differentiate at.
        graph_from: First block that is part of the graph. Nothing before it can be differentiated, nor costs memory.
        narrow: In the last block only the tokens that the head reads go on, as far as nobody asks for the others.
        ops: How elementary operations are carried out.
        steps: ``Attended``, ``Fed`` and ``Stage`` in forward order.
        embedded: [B, N, D], the tokens entering the first block; part of the graph if the images are.
        policy: [B, n] or None: which slots hold a token at the end (masked mode).
        tokens: Tokens after the last block, prefix included (those that were not carried on counted too).
        logits: [B, C], the model's output.
        sizes: [B, n] or None: how many patches each token stands for at the end, where some were merged.
        readout: [B, n] or None: attention of a pooling head over the final tokens, where the head has its own.
    """

    attention: bool = False
    reduce: Callable[[Tensor], Tensor] | None = None
    gradients: bool = False
    streams: bool = False
    rows: frozenset[int] = frozenset()
    head_rows: frozenset[int] = frozenset()
    blocks: frozenset[int] | None = None
    normed: frozenset[int] = frozenset()
    graph_from: int = 0
    narrow: bool = False
    ops: Arithmetic = PLAIN
    steps: list[Attended | Fed | Stage] = field(default_factory=list)
    embedded: Tensor | None = None
    policy: Tensor | None = None
    tokens: int = 0
    logits: Tensor | None = None
    sizes: Tensor | None = None
    readout: Tensor | None = None

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

    def wants_matrix(self, block: int) -> bool:
        """Whether a block's attention matrix is asked for."""
        return self.attention and (self.blocks is None or block in self.blocks)

    def looks_into(self, block: int) -> bool:
        """Whether something is asked for that only the opened attention of a block knows."""
        return self.streams or self.wants_matrix(block) or block in self.head_rows
