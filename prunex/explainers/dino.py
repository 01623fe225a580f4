"""DINO's self-attention maps: where each head of the class token looks, and the patches that hold most of it."""

from __future__ import annotations

import torch
from torch import Tensor

from prunex.checks import check_share
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.vit.anatomy import ViT
from prunex.vit.attention import over_heads
from prunex.vit.recording import Recording, check_layer, recording, rounded
from prunex.vit.tape import Tape


@register("explainer", "dino", "Caron et al., ICCV 2021, arXiv 2104.14294", "one forward")
def dino(
    model: ViT, images: Tensor, target: int | Tensor | None = None, *, threshold: float | None = None, layer: int = -1
) -> Explanation:
    """Class-token attention of one block, head by head, as in "Emerging Properties" (arXiv 2104.14294, Figs. 1 and 4).

    Only that row is computed; attention stays fused. Average-pooled models have no class row: the mean row of the
    pooled tokens is taken (our rule). Not class-specific. With a threshold m, each head's attention becomes a mask: of
    its mass on the patches (prefix tokens left out, the rest scaled to sum 1), the smallest set of patches that holds
    at least m. The authors' script uses 0.6, and the last block.

    A patch that left before the block, or was fused (a fused token stands for the whole rest of the picture and would
    drag all of it into a mask), gets 0 and is outside every mask. Patches merged into one token (ToMe) share what it
    got.

    Args:
        threshold: Share of each head's mass to keep, in [0, 1]; None: the attention itself.
        layer: Block index, negative from the end.

    Returns:
        ``raw`` [B, heads, P]: each head's attention to the patches, or its mask of 0 and 1; ``maps`` >= 0, their mean.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("dino", model, torch.randn(2, 3, 64, 64), threshold=0.6).maps.shape
    torch.Size([2, 4, 4])
    """
    if threshold is not None:
        check_share("threshold", threshold, zero=True)
    layer = check_layer(layer, len(model.blocks))
    with recording(model, images, target, Tape(head_rows=frozenset({layer}), narrow=True)) as recorded:
        raw = head_rows(recorded, layer)
        if threshold is not None:
            raw = mass_mask(raw, threshold)
        return answer(recorded, over_heads(raw), raw)


def head_rows(recorded: Recording, layer: int) -> Tensor:
    """Each head's recorded row over the original patches, [B, heads, P]; 0 where a patch left or was fused."""
    trace = recorded.entering(layer)
    rows = trace.lift(torch.as_tensor(recorded.tape.attended()[layer].head_rows))[..., trace.prefix :]
    # A fused token's share would fall on all patches inside it.
    return rows * (trace.tokens() >= 0).unsqueeze(1)


def mass_mask(row: Tensor, share: float) -> Tensor:
    """The smallest set of entries that holds a share of the sum of each row [..., P] >= 0, as 0 and 1.

    The entry that crosses the share is in the set. Share 1 takes every entry that is not 0, share 0 takes none.
    """
    # Members of one merged token are equal but for rounding, which other images in the batch may change.
    row = rounded(row, 16 if row.dtype == torch.float32 else 40)
    order = row.argsort(dim=-1, stable=True)
    rising = row.gather(-1, order)
    tiny = torch.finfo(row.dtype).tiny
    below = (rising / rising.sum(-1, keepdim=True).clamp(min=tiny)).cumsum(-1)
    inside = (below > 1 - share) & (rising > 0) & (share > 0)
    return torch.zeros_like(row).scatter(-1, order, inside.to(row.dtype))
