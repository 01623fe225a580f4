"""Attention rollout: how much each patch is mixed into the class token over all blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prunex.errors import PrunexError, unknown
from prunex.explainers.base import Relevance, recording
from prunex.explainers.base import start_layer as check_layer
from prunex.explainers.propagation import propagate, times
from prunex.registry import register
from prunex.vit.anatomy import ViT
from prunex.vit.attention import over_heads
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
) -> Relevance:
    """Product over blocks of 0.5 A + 0.5 I, rows normalised, read at the head's tokens (arXiv 2005.00928, Sec. 3).

    A public code for ViTs divides columns by row sums, discards in the first image only and protects one entry; here
    rows are normalised, every image is treated alike, and prefix columns and the diagonal are never discarded.
    Not class-specific: two target classes rightly give the same map.

    Args:
        model: A supported ViT, pruned or dense.
        images: float [B, C, H, W].
        target: Recorded, not used.
        head_fusion: "mean" (the paper), "max" or "min" over heads.
        discard_ratio: Share of each fused matrix' smallest entries set to 0, in [0, 1).
        start_layer: First block included.

    Returns:
        ``maps`` >= 0; ``raw`` [B, prefix + P] sums to 1 over all tokens, removed ones included.

    Raises:
        PrunexError: For an unknown fusion, a ratio outside [0, 1) or a block that does not exist.
    """
    if not isinstance(head_fusion, str) or head_fusion not in _FUSIONS:
        raise unknown("head_fusion", head_fusion, _FUSIONS)
    if isinstance(discard_ratio, bool) or not isinstance(discard_ratio, int | float) or not 0 <= discard_ratio < 1:
        raise PrunexError(f"discard_ratio={discard_ratio!r} is not allowed: give a number in [0, 1)")
    start = check_layer(start_layer, len(model.blocks))
    plain = head_fusion == "mean" and discard_ratio == 0
    tape = Tape(attention=True, reduce=_FUSIONS[head_fusion], narrow=plain)
    with recording(model, images, target, tape) as recorded, torch.no_grad():
        prefix = recorded.anatomy.prefix

        def mix(row: Tensor, step: Attended) -> Tensor:
            fused = torch.as_tensor(step.attention)
            if plain:
                mixes = fused.flatten(1).any(1, keepdim=True)  # without heads, a block mixes nothing
                return torch.where(mixes, 0.5 * times(row, fused, step.queries) + 0.5 * row, row)
            fused = _discard(fused, discard_ratio, prefix, step.policy)
            row = row / (fused.sum(-1) + 1)
            return times(row, fused) + row

        return recorded.answer(propagate(tape, recorded.readout(), prefix, mix, start=start))


def _discard(fused: Tensor, ratio: float, prefix: int, policy: Tensor | None) -> Tensor:
    """Zero each image's floor(ratio * m * m) smallest entries, sparing prefix columns and the diagonal.

    The m tokens that are there are counted and ranked: slots of dropped ones hold zeros, which would use the share up.
    """
    n = fused.shape[-1]
    there = fused.new_ones(fused.shape[:2], dtype=torch.bool) if policy is None else policy > 0
    counts = torch.tensor([int(m * m * ratio) for m in there.sum(1).tolist()], device=fused.device)
    among = (there.unsqueeze(1) & there.unsqueeze(2)).flatten(1)
    flat = fused.flatten(1)
    order = flat.masked_fill(~among, float("inf")).argsort(dim=1, stable=True)
    lowest = torch.arange(n * n, device=fused.device) < counts[:, None]
    smallest = torch.zeros_like(among).scatter(1, order, lowest)
    spared = torch.eye(n, dtype=torch.bool, device=fused.device)
    spared[:, :prefix] = True
    return flat.masked_fill(smallest & ~spared.flatten(), 0).view_as(fused)
