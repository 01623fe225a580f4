"""Where chosen heads look: the read-out attention of single heads in any blocks, from one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.explainers.dino import head_rows
from prunex.vit.anatomy import check_images, find, read
from prunex.vit.recording import recording
from prunex.vit.tape import Tape
from prunex.vit.units import heads_left
from prunex.vit.widths import widths_of


def head_maps(model: nn.Module, images: Tensor, pairs: Sequence[tuple[int, int]], *, path: str | None = None) -> Tensor:
    """Attention of the class token in chosen heads, such as those that a relevance table names for a class.

    One forward, in which each block in question computes that row alone (N numbers a head); fused attention stays on.
    Average-pooled models have no class row: the mean row of the pooled tokens is taken. A patch that left before the
    block, or was fused there, gets 0; patches merged into one token share what it got: ``dino`` reads its block alike.

    Args:
        model: A supported ViT, pruned or dense, or any module that holds exactly one.
        images: float [B, C, H, W], normalised as the model expects.
        pairs: (block, head), numbered as in the dense model, also where heads or blocks were taken out.
        path: Dotted path to the ViT when ``model`` holds several.

    Returns:
        float32 (or 64) [B, pairs, gh, gw], at least 0; at most 1 in each map's sum, since prefix tokens are looked at
        too.

    Raises:
        PrunexError: For no pair, one that does not exist or was taken out, or images that the model cannot take.

    >>> import timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224")
    >>> head_maps(model, torch.randn(2, 3, 224, 224), [(3, 0), (11, 2)]).shape
    torch.Size([2, 2, 14, 14])
    """
    vit = find(model, path)[1]
    places = _places(vit, pairs)
    anatomy = read(vit)
    check_images(anatomy, images, values=True)
    weight = next(vit.parameters())
    # A row serves all pairs of its block.
    blocks = sorted({block for block, _ in places})
    tape = Tape(head_rows=frozenset(blocks), narrow=True)
    with recording(vit, images.detach().to(weight.device, weight.dtype), None, tape) as recorded:
        rows = {block: head_rows(recorded, block) for block in blocks}
        maps = torch.stack([rows[block][:, head] for block, head in places], 1)
        return maps.unflatten(2, recorded.trace.grid)


def _places(vit: Any, pairs: Any) -> list[tuple[int, int]]:
    """Where the pairs, given in the dense model's numbers, are in this model."""
    many = isinstance(pairs, Sequence) and not isinstance(pairs, str) and len(pairs) > 0
    if not many or not all(_is_pair(pair) for pair in pairs):
        raise PrunexError(f"pairs={pairs!r} is not allowed: give (block, head) pairs, such as [(3, 0), (11, 2)]")
    # Numbers are the dense model's: what was taken out leaves gaps, not new numbers.
    widths = widths_of(vit)
    blocks = list(range(len(vit.blocks)) if widths.blocks is None else widths.blocks)
    places = []
    for block, head in pairs:
        if block not in blocks:
            raise PrunexError(f"block {block} is not there: this model has blocks {', '.join(map(str, blocks))}")
        place = blocks.index(block)
        attn = vit.blocks[place].attn
        heads = list(widths.heads.get(block, range(attn.num_heads)))
        left = heads_left(attn.proj)
        if left is not None:  # heads behind closed gates are not looked at
            heads = [heads[i] for i in left]
        if head not in heads:
            kept = ", ".join(map(str, heads)) or "none"
            raise PrunexError(f"block {block} has no head {head}: it has {kept}")
        places.append((place, heads.index(head)))
    return places


def _is_pair(pair: Any) -> bool:
    numbers = isinstance(pair, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    return numbers and len(pair) == 2
