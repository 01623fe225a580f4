"""timm's BEiT blocks: plain gammas, and a relative bias on the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from prunex.vit.blocks.eva import EvaLayout
from prunex.vit.blocks.plain import Layout


class BeitLayout(EvaLayout):
    """timm's BEiT ``Block``, which adds its own bias to the one that blocks share."""

    def given(self, rope: Tensor | None, shared: Tensor | None) -> dict[str, Tensor | None]:
        return {"shared_rel_pos_bias": shared}

    def whole(self, block: Any, x: Tensor, rope: Tensor | None = None, shared: Tensor | None = None) -> Tensor:
        return Layout.whole(self, block, x, rope, shared)

    def attend(self, block: Any, y: Tensor, rope: Tensor | None) -> Tensor:
        """Without a bias: where there is one, attention is opened."""
        return block.attn(y)

    def inside(self, block: Any, function: Callable[..., Tensor], y: Tensor, rope: Tensor | None) -> Tensor:
        return Layout.inside(self, block, function, y, rope)

    def relative(self, block: Any) -> Tensor | None:
        attn = block.attn
        return None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()[0]
