"""Which timm blocks are known from inside, and how each is laid out: one family of blocks a file.

A layout opens blocks and holds no state.
"""

from __future__ import annotations

from typing import Any

from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import AttentionRope, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import nn

from prunex.vit.blocks.beit import BeitLayout
from prunex.vit.blocks.eva import EvaLayout, EvaPostLayout
from prunex.vit.blocks.parallel import Scaling, Things, fused_out
from prunex.vit.blocks.plain import Layout, ResPost
from prunex.vit.narrow import NarrowAttention

# The first that fits a block is taken: a class stands before those it derives from.
LAYOUTS: dict[type[nn.Module], Layout] = {
    Block: Layout(),
    ResPostBlock: ResPost(),
    ParallelThingsBlock: Things(),
    ParallelScalingBlock: Scaling(),
    EvaBlock: EvaLayout(),
    EvaBlockPostNorm: EvaPostLayout(),
    BeitBlock: BeitLayout(),
}
ATTENTIONS: tuple[type[nn.Module], ...] = (Attention, NarrowAttention, EvaAttention, AttentionRope, BeitAttention)


def layout_of(block: nn.Module) -> Layout:
    """How a block is laid out; models of other blocks were refused by name by :func:`prunex.vit.anatomy.read`."""
    for kind, layout in LAYOUTS.items():
        if isinstance(block, kind):
            return layout
    raise TypeError(f"{type(block).__name__} is no block that is known from inside")


def unknown_part(block: nn.Module) -> str | None:
    """The name of what in a block is not known from inside, or None when all is."""
    kind = next((k for k in LAYOUTS if isinstance(block, k)), None)
    if kind is None or type(block).forward is not kind.forward:
        return type(block).__name__
    if kind is ParallelScalingBlock:
        return _unknown_scaling(block)
    for attn in LAYOUTS[kind].attentions(block):
        if not any(type(attn).forward is known.forward for known in ATTENTIONS):
            return type(attn).__name__
        reads = getattr(attn, "q_bias", None) is not None and attn.qkv is not None and not attn.qkv_bias_separate
        if reads and type(attn.qkv).forward is not nn.Linear.forward:
            return (
                f"{type(attn).__name__} around a {type(attn.qkv).__name__}, which it passes by (it reads qkv.weight "
                "itself unless built with qkv_bias_separate=True),"
            )
    return None


def _unknown_scaling(block: Any) -> str | None:
    """:func:`unknown_part` of a parallel scaling block."""
    name = type(block).__name__
    for part in (block.in_proj, fused_out(block)):
        if part is not None and type(part) is not nn.Linear:
            return f"{name} with other than plain linear layers (adapters: merge them first)"
    # timm 1.0.20 keeps zeros for the missing bias, and puts them in front of the MLP's, whose channels come first.
    misplaced = getattr(block, "qkv_bias", None) is not None
    return f"{name} without qkv_bias, whose bias this timm misplaces," if misplaced else None
