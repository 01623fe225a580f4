"""Attention rollout: how much each patch is mixed into the class token over all blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.walk import propagate, times
from prunex.vit.anatomy import ViT
from prunex.vit.attention import over_heads
from prunex.vit.recording import attention_gradients, check_layer, recording
from prunex.vit.tape import Attended, Tape

_FUSIONS = {
    "mean": over_heads,
    "max": lambda a: a.amax(1) if a.shape[1] else over_heads(a),
    "min": lambda a: a.amin(1) if a.shape[1] else over_heads(a),
}


@register("explainer", "rollout", "Abnar & Zuidema, ACL 2020, arXiv 2005.00928", "one forward")
def rollout(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    head_fusion: Literal["mean", "max", "min"] = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    gradient: bool = False,
) -> Explanation:
    """Product over blocks of 0.5 A + 0.5 I, rows normalised, read at the head's tokens (arXiv 2005.00928, Sec. 3).

    A public code for ViTs divides columns by row sums, discards in the first image only and protects one entry; here
    rows are normalised, every image is treated alike, and prefix columns and the diagonal are never discarded. Not
    class-specific: two target classes rightly give the same map.

    With ``gradient`` a block's matrix is max(0, mean over heads of A * dy/dA) in the place of A, y the class's logit:
    what that code calls gradient rollout, but there a block's attention meets another block's gradient, before the
    softmax. It has no publication of its own; the published method of this idea is ``generic_attention``.

    Where heads may look at tokens negatively (differential attention, talking heads), A is the positive part of each
    head's row, rescaled to sum 1 (our rule); ``gradient`` takes what the head really uses.

    Args:
        head_fusion: "mean" (the paper), "max" or "min" over heads; with ``gradient`` "mean".
        discard_ratio: Share of each fused matrix' smallest entries set to 0, in [0, 1).
        start_layer: First block included.
        gradient: Attention times its gradient; one more backward pass, and class-specific.

    Returns:
        ``maps`` >= 0; ``raw`` [B, prefix + P] sums to 1 over all tokens, removed ones included.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("rollout", model, torch.randn(2, 3, 64, 64), head_fusion="max", discard_ratio=0.5).maps.shape
    torch.Size([2, 4, 4])
    """
    if isinstance(discard_ratio, bool) or not isinstance(discard_ratio, int | float) or not 0 <= discard_ratio < 1:
        raise PrunexError(f"discard_ratio={discard_ratio!r} is not allowed: give a number in [0, 1)")
    start = check_layer(start_layer, len(model.blocks))
    if gradient and head_fusion != "mean":
        raise PrunexError(f"head_fusion={head_fusion!r} goes without gradient=True: give 'mean'")
    plain = head_fusion == "mean" and discard_ratio == 0 and not gradient
    tape = Tape(attention=True, reduce=_FUSIONS[head_fusion], narrow=plain, shares=True)
    if gradient:
        # Heads stay apart: each matrix is multiplied by its own gradient before they are averaged.
        blocks = frozenset(range(start, len(model.blocks)))
        tape = Tape(attention=True, gradients=True, blocks=blocks, graph_from=start)
    with recording(model, images, target, tape, needs_class=gradient) as recorded:
        prefix, by_block = recorded.anatomy.prefix, {}
        if gradient:
            steps = [step.block for step, _ in tape.matrices()]
            by_block = dict(zip(steps, attention_gradients(recorded), strict=True))

        def mix(row: Tensor, step: Attended) -> Tensor:
            fused = torch.as_tensor(step.attention)
            if gradient:
                fused = over_heads(fused * by_block[step.block]).clamp(min=0)
            if plain:
                mixes = fused.flatten(1).any(1, keepdim=True)  # without heads, a block mixes nothing
                return torch.where(mixes, 0.5 * times(row, fused, step.queries) + 0.5 * row, row)
            if discard_ratio > 0:
                fused = _discard(fused, discard_ratio, prefix, step.policy)
            # Rows of fused maxima, minima or what is left of them sum to anything: normalise A + I.
            row = row / (fused.sum(-1) + 1)
            return times(row, fused) + row

        with torch.no_grad():
            return answer(recorded, propagate(tape, recorded.readout(), prefix, mix, start=start))


def _discard(fused: Tensor, ratio: float, prefix: int, policy: Tensor | None) -> Tensor:
    """Zero each image's floor(ratio * m * m) smallest entries, sparing prefix columns and the diagonal."""
    n = fused.shape[-1]
    # The m tokens that are there count alone: slots of dropped ones hold zeros, which would use the share up.
    present = fused.new_ones(fused.shape[:2], dtype=torch.bool) if policy is None else policy > 0
    counts = torch.tensor([int(m * m * ratio) for m in present.sum(1).tolist()], device=fused.device)
    among = (present.unsqueeze(1) & present.unsqueeze(2)).flatten(1)
    flat = fused.flatten(1)
    order = flat.masked_fill(~among, float("inf")).argsort(dim=1, stable=True)
    lowest = torch.arange(n * n, device=fused.device) < counts[:, None]
    smallest = torch.zeros_like(among).scatter(1, order, lowest)
    spared = torch.eye(n, dtype=torch.bool, device=fused.device)
    spared[:, :prefix] = True
    return flat.masked_fill(smallest & ~spared.flatten(), 0).view_as(fused)
