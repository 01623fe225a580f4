"""timm's BEiT blocks: plain gammas, and a relative bias on the scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prunex.vit.blocks.eva import Gamma


class BeitLayout(Gamma):
    """timm's BEiT ``Block``, which adds its own bias to the one that blocks share."""

    def given(self, rope: Tensor | None, shared: Tensor | None) -> dict[str, Tensor | None]:
        return {"shared_rel_pos_bias": shared}

    def relative(self, block: Any) -> Tensor | None:
        attn = block.attn
        return None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()[0]
