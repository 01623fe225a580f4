"""Raw attention: how strongly the class token looks at each patch in one block."""

from __future__ import annotations

import torch
from torch import Tensor

from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.vit.anatomy import ViT
from prunex.vit.recording import check_layer, recording
from prunex.vit.tape import Tape


@register("explainer", "raw_attention", "baseline in Chefer et al., CVPR 2021, arXiv 2012.09838", "one forward")
def raw_attention(model: ViT, images: Tensor, target: int | Tensor | None = None, *, layer: int = -1) -> Explanation:
    """Head-mean class-token attention of one block, the cheapest map and the very signal EViT prunes by.

    Only that row is computed (N numbers a head); attention stays fused. Average-pooled models have no class row: the
    mean row of the pooled tokens is taken. Of differential attention, and of talking heads, the positive part of each
    head's row counts, rescaled to sum 1. A patch that left before the block gets 0 (order such ties by
    ``trace.depth()``), one inside a fused token its share of that token's value. Not class-specific.

    Args:
        layer: Block index, negative from the end.

    Returns:
        ``maps`` >= 0; ``raw`` [B, prefix + P] sums to 1 over all tokens.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("raw_attention", model, torch.randn(2, 3, 64, 64), layer=-2).maps.shape
    torch.Size([2, 4, 4])
    """
    layer = check_layer(layer, len(model.blocks))
    with recording(model, images, target, Tape(rows=frozenset({layer}), narrow=True)) as recorded:
        row = torch.as_tensor(recorded.tape.attended()[layer].row)
        return answer(recorded, recorded.entering(layer).lift(row))
