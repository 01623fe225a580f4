"""timm's attention with fewer heads, or narrower ones, than timm itself builds."""

from __future__ import annotations

from timm.models.vision_transformer import Attention
from torch import Tensor

from prunex.vit.arithmetic import fused_attention
from prunex.vit.attention import heads, project


class NarrowAttention(Attention):
    """timm's ``Attention`` without any heads, or with other widths than an older timm's own forward takes."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Through fused attention, [B, N, D]."""
        q, k, v = heads(self, x)
        dropout = self.attn_drop.p if self.training else 0.0
        out = fused_attention(q, k, v, attn_mask, dropout, is_causal)
        return project(self, out, x)
