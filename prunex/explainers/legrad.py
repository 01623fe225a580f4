"""LeGrad: how each block's own score would change with its attention."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import PLAIN, classify, promoted
from prunex.vit.attention import looked_at, over_heads, pooled_by
from prunex.vit.handover import Handed
from prunex.vit.late import finished
from prunex.vit.readout import ended, head
from prunex.vit.recording import Recording, check_layer, gradients, recording
from prunex.vit.tape import Attended, Tape


@register("explainer", "legrad", "Bousselham et al., ICCV 2025, arXiv 2404.03214", "one forward, one backward a block")
def legrad(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    start_layer: int = -2,
    pool: Literal["mean", "read"] = "mean",
) -> Explanation:
    """Sum over blocks of max(0, ds_l / dA_l), mean over heads and query rows (arXiv 2404.03214; equations unverified).

    s_l is the score of block l's own stream, as if the model ended there: its tokens are pooled, then come the final
    norm and the head. A_l is the attention of that block alone, and is not multiplied in. Any target will do, the
    likeness to an embedding too (``prunex.targets.Similarity``): its length is part of the score then.

    With attention pooling the gradient is that of the pool's own attention over block l's tokens, without the final
    norm. After pruning, each block scores the tokens that are there, and its scores go back to the original patches by
    their shares of the tokens.

    Args:
        start_layer: First block included; the authors' default is the last but one, 0 takes all.
        pool: Of models that read a class token "mean" pools all tokens, prefix tokens too, as the authors do; "read"
            takes the token that the head reads. Pooled models are pooled as they are.

    Returns:
        ``maps`` >= 0; ``raw`` [B, L, P], those of each block from ``start_layer`` on, on the original patches.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> e = prunex.explain("legrad", model, torch.randn(2, 3, 64, 64), start_layer=0)
    >>> e.maps.shape, e.raw.shape
    (torch.Size([2, 4, 4]), torch.Size([2, 3, 16]))
    """
    start = check_layer(start_layer, len(model.blocks))
    blocks = frozenset(range(start, len(model.blocks)))
    # Else the pool's attention is differentiated, and blocks' are not looked into.
    by_block = model.global_pool != "map"
    tape = Tape(attention=by_block, gradients=True, blocks=blocks, graph_from=start, leaving=blocks)
    with recording(model, images, target, tape, needs_class=True) as recorded:
        prefix = recorded.anatomy.prefix
        by_step = []
        for number, step in enumerate(tape.steps):
            if isinstance(step, Attended) and step.block in blocks:
                scores, steps = _of_block(recorded, step, pool, number) if by_block else _of_pool(recorded, step.block)
                by_step.append(tape.lifted(scores, steps, prefix))
        raw = torch.stack(by_step, 1)
        return answer(recorded, raw.sum(1), raw=raw[:, :, prefix:])


def _of_block(recorded: Recording, step: Attended, pool: str, number: int) -> tuple[Tensor, int]:
    """What a block's tokens are worth to its own score [B, n], and after how many steps these were there."""
    model: Any = recorded.model
    left = recorded.tape.left[step.block]
    tokens, handed = left.tokens, Handed(recorded.anatomy, left.policy, left.sizes)
    if recorded.anatomy.readers and pool == "mean":
        present = tokens.new_ones(tokens.shape[:2]) if left.policy is None else left.policy.to(tokens.dtype)
        share = (present if left.sizes is None else present * left.sizes.to(tokens.dtype)).unsqueeze(2)
        # One vector in the place of every token that the head may read; the norm comes after the mean.
        mean = (tokens * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)
        tokens, handed = mean.expand(-1, recorded.anatomy.prefix, -1), Handed(recorded.anatomy)
    logits = head(model, *finished(model, tokens, handed))
    gradient = gradients(_chosen(recorded, logits), [torch.as_tensor(step.attention)])[0]
    positive = over_heads(gradient.clamp(min=0)).sum(1)
    # Rows of dropped tokens have no part in the score, nor in the mean.
    rows = positive.shape[1] if step.policy is None else step.policy.sum(1, keepdim=True)
    return promoted(positive) / rows, number


def _of_pool(recorded: Recording, block: int) -> tuple[Tensor, int]:
    """The same by the attention of a pool over the tokens that left a block."""
    model: Any = recorded.model
    left, start = recorded.tape.left[block], 0 if recorded.anatomy.pool_prefix else recorded.anatomy.prefix
    counts = left.policy
    if left.sizes is not None:
        counts = left.sizes if counts is None else counts * left.sizes
    seen, values = looked_at(model.attn_pool, left.tokens[:, start:], None if counts is None else counts[:, start:])
    # Cut off here: the gradient wanted is the pool's attention's, and the blocks' own stay out of it.
    seen = seen.detach().requires_grad_()
    features = pooled_by(model.attn_pool, seen, values.detach())
    logits = ended(model, classify(model.head, model.head_drop(model.fc_norm(features)), PLAIN))
    positive = over_heads(gradients(_chosen(recorded, logits), [seen])[0].clamp(min=0))[:, 0]
    return F.pad(promoted(positive), (start, 0)), left.steps


def _chosen(recorded: Recording, logits: Tensor) -> Tensor:
    return logits.gather(1, recorded.target[:, None]).sum()
