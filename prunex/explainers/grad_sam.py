"""Grad-SAM: attention weighed by its positive gradient, averaged over all blocks without chaining them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.walk import propagate
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.attention import over_heads
from prunex.vit.recording import Recording, gradients, recording, unreached
from prunex.vit.tape import Attended, Tape


@register("explainer", "grad_sam", "Barkan et al., CIKM 2021, arXiv 2204.11073", "one forward, one backward")
def grad_sam(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    axis: Literal["key", "query", "cls"] = "key",
    lift: Literal["direct", "presence"] = "direct",
) -> Explanation:
    """Gradient self-attention maps (arXiv 2204.11073): r = 1 / (L H N) * sum over blocks and heads of A * ReLU(dy/dA).

    **Unverified**: no official code was found, and which index of the matrix is summed could not be read from the
    paper. Class-specific. Blocks are not chained: attention to a token is credited to the place it sits in, though deep
    tokens are mixtures. L is the number of blocks and N the number of tokens of the dense model, for every axis and
    keep ratio.

    After pruning, each block scores the tokens that are there, and its scores go back to the original patches by their
    shares of the tokens.

    Args:
        axis: "key" sums over the queries: how much a token is read; "query" over the keys, where the last block says
            something about the tokens that the head reads alone; "cls" (ours) takes only the rows that the head reads:
            the class token's, both of a distilled model, all of a pooled one.
        lift: "direct" adds the blocks up, so that a patch removed early has few to collect from: for comparisons with
            the dense model. "presence" divides by the share of the blocks a patch lived in (inside a fused token it
            counts by its share of it), so that early removal does not pass for low relevance.

    Returns:
        ``maps`` >= 0; ``raw`` [B, prefix + P], all tokens.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("grad_sam", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    # Only the rows of tokens that the head reads have a gradient in the last block: the others need not be computed.
    tape = Tape(attention=True, gradients=True, narrow=True)
    with recording(model, images, target, tape, needs_class=True) as recorded:
        scores = _scores(recorded, axis)
        with torch.no_grad():
            # The walk adds each block's scores where they arise, and stages carry the sum back.
            start = torch.zeros_like(recorded.readout())
            prefix = recorded.anatomy.prefix
            total = propagate(tape, start, prefix, lambda row, step: row + scores[step.block])
            if lift == "presence":
                lived = propagate(tape, start, prefix, lambda row, step: row + 1)
                total = torch.where(lived > 0, total / lived.clamp(min=1e-12) * len(scores), 0)
            return answer(recorded, total / (len(scores) * total.shape[1]))


def _scores(recorded: Recording, axis: str) -> dict[int, Tensor]:
    """Each block's scores of its tokens, [B, n], the mean over heads."""
    scores: dict[int, Tensor] = {}
    matrices = recorded.tape.matrices()
    # Taken while the backward pass goes by, so that only one block's gradient is held at a time.
    handles = [matrix.register_hook(_taker(step, axis, recorded.anatomy, scores)) for step, matrix in matrices]
    try:
        gradients(recorded.score().sum(), [matrices[0][1]])
    finally:
        for handle in handles:
            handle.remove()
    if any(matrix.numel() and step.block not in scores for step, matrix in matrices):
        raise unreached()
    return scores


def _taker(step: Attended, axis: str, anatomy: Anatomy, scores: dict[int, Tensor]) -> Callable[[Tensor], None]:
    """What turns the gradient of one block's attention into scores. It holds no part of the graph."""
    block, queries, attention = step.block, step.queries, torch.as_tensor(step.attention).detach()

    def take(grad: Tensor) -> None:
        scores[block] = block_scores(attention, grad, axis, anatomy, queries)

    return take


def block_scores(
    attention: Tensor, grad: Tensor, axis: str, anatomy: Anatomy, queries: tuple[int, ...] | None = None
) -> Tensor:
    """Positive gradient times attention [B, H, m, n], summed along one axis and averaged over heads: [B, n].

    ``queries`` are the positions of the m rows; None: all tokens.
    """
    product = over_heads((attention * grad).clamp(min=0))
    if axis == "query":
        if queries is None:
            return product.sum(2)
        rows = product.new_zeros(len(product), product.shape[2])
        return rows.index_copy(1, torch.tensor(queries, device=product.device), product.sum(2))
    if axis == "cls" and queries is None:
        if anatomy.readers:
            product = product[:, list(anatomy.readers)]
        else:
            product = product[:, 0 if anatomy.pool_prefix else anatomy.prefix :]
    return product.sum(1)
