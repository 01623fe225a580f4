"""Differential attention, in the blocks that timm builds it in: each head is the difference of two softmaxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.layers
import timm.models.vision_transformer
from torch import Tensor, nn

from prunex.vit import attention
from prunex.vit.arithmetic import Arithmetic
from prunex.vit.attention import KeyWeights
from prunex.vit.blocks.parallel import Scaling, side_by_side
from prunex.vit.blocks.plain import Layout, ResPost

# An older timm has neither.
KIND: type[nn.Module] | None = getattr(timm.layers, "DiffAttention", None)
PARALLEL: type[nn.Module] | None = getattr(timm.models.vision_transformer, "DiffParallelScalingBlock", None)


def is_differential(module: Any) -> bool:
    """Whether a module is timm's ``DiffAttention``, or its block that holds such heads itself."""
    return any(kind is not None and type(module) is kind for kind in (KIND, PARALLEL))


class Differential(Layout):
    """timm's ``DiffAttention`` (Differential Transformer, arXiv 2410.05258, Eqs. 1-3) in a ``Block``.

    A head's attention is softmax(q1 k1^T) - lambda softmax(q2 k2^T), with a learned lambda: an entry may be negative,
    and a row sums to 1 - lambda. That difference is the head's map for everybody who differentiates it or multiplies
    with it. Behind the heads come an RMS norm of each and the factor 1 - lambda_init.

    Queries and keys of a head's two softmaxes follow each other: [B, 2H, N, d]; values are [B, H, N, 2d].
    """

    opens = False
    signed = True

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        return _apart(block.attn, ops.linear(block.attn.qkv, y), ops)

    def matrix(
        self,
        block: Any,
        q: Tensor,
        k: Tensor,
        policy: Tensor | None,
        keys: KeyWeights | None,
        queries: tuple[int, ...] | Tensor | None,
        *,
        ops: Arithmetic,
        relative: Tensor | None,
    ) -> Tensor:
        # timm drops entries of either softmax before it takes their difference.
        both = super().matrix(block, q, k, policy, keys, queries, ops=ops, relative=relative)
        return self.shown(block, self.attentions(block)[0].attn_drop(both), ops)

    def gather(self, block: Any, matrix: Tensor, v: Tensor, ops: Arithmetic) -> Tensor:
        return ops.gather(matrix, v)  # without dropout, which the matrix has had

    def through(
        self, block: Any, kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, ops: Arithmetic
    ) -> Tensor:
        # Softmax by softmax: a kernel knows no negative weights, and what both gather is linear in them.
        first, second = (kernel(q[:, i::2], k[:, i::2], v) for i in (0, 1))
        return self._difference(block, first, second, ops)

    def shown(self, block: Any, softmaxes: Tensor, ops: Arithmetic) -> Tensor:
        return self._difference(block, softmaxes[:, 0::2], softmaxes[:, 1::2], ops)

    def _difference(self, block: Any, first: Tensor, second: Tensor, ops: Arithmetic) -> Tensor:
        share = self.attentions(block)[0]._compute_lambda().type_as(first)
        return ops.difference(first, second, share)

    def project(self, block: Any, out: Tensor, y: Tensor, ops: Arithmetic) -> Tensor:
        return attention.project(block.attn, _normed(block.attn, out, ops), y, ops)

    def output(self, block: Any) -> Tensor:
        """The heads' norm is left out, as is any norm behind heads."""
        return super().output(block) * (1 - self.attentions(block)[0].lambda_init)

    def pair_macs(self, block: Any) -> int:
        """Both softmaxes gather all values."""
        return 3 * self.width(block)


class DifferentialPost(Differential, ResPost):
    """The same in a ``ResPostBlock``."""


class DifferentialScaling(Differential, Scaling):
    """timm's ``DiffParallelScalingBlock``: the same heads beside an MLP."""

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        return _apart(block, side_by_side(block, y, ops), ops)

    def project(self, block: Any, out: Tensor, y: Tensor, ops: Arithmetic) -> Tensor:
        return Scaling.project(self, block, _normed(block, out, ops), y, ops)

    def width(self, block: Any) -> int:
        return 2 * block.num_heads * block.head_dim


def _apart(attn: Any, three: Tensor, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, 2H, N, d] and values [B, H, N, 2d], of the three side by side [B, N, 6Hd]."""
    q, k, v = three.chunk(3, 2)
    q, k = (t.unflatten(2, (2 * attn.num_heads, -1)).transpose(1, 2) for t in (q, k))
    return ops.norm(attn.q_norm, q), ops.norm(attn.k_norm, k), v.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)


def _normed(attn: Any, out: Tensor, ops: Arithmetic) -> Tensor:
    """Each head's output [B, H, m, 2d] as it enters the projection."""
    return ops.scaled(lambda x: x * (1 - attn.lambda_init), ops.norm(attn.sub_norm, out))
