"""The propagation family's core: a row vector walked from the head back to the input patches.

A network is a list of linear steps on token identities: *mix* inside a block (a matrix M, one per attention half and,
for methods that have one, per MLP half) and *reduce* where tokens left (the stage map S of the trace). The relevance of
the input tokens is p^T (... M_2 S_1 M_1); only the row vector is ever multiplied, so a class-token map costs O(L n^2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from prunex.vit.attention import some
from prunex.vit.tape import Attended, Fed, Tape
from prunex.vit.trace import Stage

MixAttention = Callable[[Tensor, Attended], Tensor]
MixFeed = Callable[[Tensor, Fed], Tensor]


def propagate(
    tape: Tape, readout: Tensor, prefix: int, mix: MixAttention, feed: MixFeed | None = None, start: int = 0
) -> Tensor:
    """Walk row vectors, [B, n_last] or several an image [B, R, n_last], from the last token list to the input tokens.

    ``mix`` and ``feed`` are one attention or MLP half's ``row @ M``, from block ``start`` on; without them rows pass
    through, and where tokens left they still return.
    """
    row = readout
    for step in reversed(tape.steps):
        # Tokens return where they left, also before the first block that mixes.
        if isinstance(step, Stage):
            row = step.lift(row, prefix)
        elif step.block < start:
            continue
        elif isinstance(step, Attended):
            row = mix(row, step)
        elif feed is not None:
            row = feed(row, step)
    return row


def through_skips(tape: Tape, readout: Tensor, prefix: int, weights: Mapping[int, Tensor], start: int = 0) -> Tensor:
    """Walk row vectors through I + Abar of every block, Abar by block [B, n, n] or [B, queries, n]."""

    def mix(row: Tensor, step: Attended) -> Tensor:
        return row + times(row, weights[step.block], step.queries)

    return propagate(tape, readout, prefix, mix, start=start)


def times(row: Tensor, matrix: Tensor, queries: tuple[int, ...] | None = None) -> Tensor:
    """``row @ matrix`` for [B, n] or [B, R, n]; a matrix with the rows of ``queries`` alone has 0 in the others."""
    if queries is not None:
        row = some(row, queries, -1)
    return (row.unsqueeze(1) @ matrix).squeeze(1) if row.ndim == 2 else row @ matrix
