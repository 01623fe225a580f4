"""timm's blocks of relative-position ViTs: a bias on the scores, looked up in a table or made by a small network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prunex.vit.blocks.plain import Layout, ResPost


class RelPosLayout(Layout):
    """timm's ``RelPosBlock``: as ``Block``, with a bias of each pair of places that is its own or all blocks'."""

    def given(self, rope: Tensor | None, shared: Tensor | None) -> dict[str, Tensor | None]:
        return {"shared_rel_pos": None if shared is None else shared[None]}

    def relative(self, block: Any) -> Tensor | None:
        pairs = block.attn.rel_pos
        return None if pairs is None else pairs.get_bias()[0]


class RelPosPostLayout(RelPosLayout, ResPost):
    """timm's ``ResPostRelPosBlock``: norms behind attention and MLP."""
