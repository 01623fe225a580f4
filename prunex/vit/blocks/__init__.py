"""Which timm blocks are known from inside, and how each is laid out: one family of blocks a file.

A layout opens blocks and holds no state.
"""

from __future__ import annotations

from typing import Any

from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.cait import LayerScaleBlock, TalkingHeadAttn
from timm.models.eva import AttentionRope, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import nn

from prunex.vit.blocks import differential
from prunex.vit.blocks.beit import BeitLayout
from prunex.vit.blocks.eva import EvaLayout, EvaPostLayout
from prunex.vit.blocks.parallel import Scaling, Things, fused_out
from prunex.vit.blocks.plain import Layout, ResPost
from prunex.vit.blocks.relpos import RelPosLayout, RelPosPostLayout
from prunex.vit.blocks.talking import Talking
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
    RelPosBlock: RelPosLayout(),
    ResPostRelPosBlock: RelPosPostLayout(),
    LayerScaleBlock: Talking(),
}
if differential.PARALLEL is not None:
    LAYOUTS[differential.PARALLEL] = differential.DifferentialScaling()
# Where attention is one with a layout of its own: by the block and the attention.
OTHERS: dict[tuple[type, type | None], Layout] = {
    (Block, differential.KIND): differential.Differential(),
    (ResPostBlock, differential.KIND): differential.DifferentialPost(),
}
ATTENTIONS: tuple[type[nn.Module], ...] = (
    Attention,
    NarrowAttention,
    EvaAttention,
    AttentionRope,
    BeitAttention,
    RelPosAttention,
    TalkingHeadAttn,
)


def layout_of(block: nn.Module) -> Layout:
    """How a block is laid out; models of other blocks were refused by name by :func:`prunex.vit.anatomy.read`."""
    for kind, layout in LAYOUTS.items():
        if isinstance(block, kind):
            return OTHERS.get((kind, type(getattr(block, "attn", None))), layout)
    raise TypeError(f"{type(block).__name__} is no block that is known from inside")


def unknown_part(block: nn.Module) -> str | None:
    """The name of what in a block is not known from inside, or None when all is."""
    kind = next((k for k in LAYOUTS if isinstance(block, k)), None)
    if kind is None or type(block).forward is not kind.forward:
        return type(block).__name__
    if kind is ParallelScalingBlock or kind is differential.PARALLEL:
        return _unknown_scaling(block)
    if (kind, type(getattr(block, "attn", None))) in OTHERS:
        return None
    # By forward and not by class: subclasses that change something else compute the same.
    for attn in LAYOUTS[kind].attentions(block):
        if not any(type(attn).forward is known.forward for known in ATTENTIONS):
            return type(attn).__name__
        if kind is LayerScaleBlock and not isinstance(attn, TalkingHeadAttn):
            return f"{type(block).__name__} around a {type(attn).__name__}"
        # Weight and bias of these are used apart, so that nothing put round them would take part.
        mixing = (attn.proj_l, attn.proj_w) if isinstance(attn, TalkingHeadAttn) else ()
        for layer in mixing:
            if type(layer) is not nn.Linear:
                return f"{type(attn).__name__} whose heads are mixed by a {type(layer).__name__}"
        reads = getattr(attn, "q_bias", None) is not None and attn.qkv is not None and not attn.qkv_bias_separate
        if reads and type(attn.qkv).forward is not nn.Linear.forward:
            return (
                f"{type(attn).__name__} around a {type(attn.qkv).__name__}, which it passes by (it reads qkv.weight "
                "itself unless built with qkv_bias_separate=True),"
            )
    return None


def _unknown_scaling(block: Any) -> str | None:
    name = type(block).__name__
    for part in (block.in_proj, fused_out(block)):
        if part is not None and type(part) is not nn.Linear:
            return f"{name} with other than plain linear layers (adapters: merge them first)"
    # timm 1.0.20 keeps zeros for the missing bias, and puts them in front of the MLP's, whose channels come first.
    misplaced = getattr(block, "qkv_bias", None) is not None
    return f"{name} without qkv_bias, whose bias this timm misplaces," if misplaced else None
