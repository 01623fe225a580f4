"""The elementary operations of a ViT's forward, so that an explainer may replace their backward passes.

Relevance propagation is a backward pass with other rules. The one forward does its arithmetic through an
:class:`Arithmetic`; the plain one calls timm's modules as they are. An explainer's own returns the same values and
differentiates them in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import GELUTanh, GluMlp, Mlp, QuickGELU, RmsNorm, SwiGLU
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit.calls import inside
from prunex.vit.sums import grouped, members


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``torch``'s attention without its matrix, [B, H, m, d], also where no head is left."""
    if q.shape[1] == 0:  # torch 2.9's kernel divides by the number of heads, and the process dies
        return q @ k.transpose(-2, -1) @ v
    return nn.functional.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=scale)


class Arithmetic:
    """Plain arithmetic. Subclasses keep every value and change what ``autograd`` does with it."""

    # Whether every layer has to come by for itself, where plain arithmetic calls timm's modules whole.
    opened = False
    # Whether attention has to be made of its matrix.
    matrices = False

    def linear(self, module: nn.Module, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """A linear layer (or an identity in its place); ``beside``: a bias [out] that is kept apart from it."""
        out: Tensor = module(x)
        return out if beside is None else out + beside

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
        """A linear map by its weight [out, in], as where several share one layer; ``beside``: a further bias [out]."""
        out = nn.functional.linear(x, weight, bias)
        return out if beside is None else out + beside

    def patches(self, module: nn.Module, images: Tensor) -> Tensor:
        """The patch embedding's convolution: [B, C, H, W] to [B, D, gh, gw]."""
        return module(images)

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """A normalisation over the last axis."""
        return module(x)

    def activation(self, module: nn.Module, x: Tensor) -> Tensor:
        """An element-wise non-linearity."""
        return module(x)

    def scaled(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """LayerScale."""
        return module(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """A skip connection, ``a`` the stream and ``b`` the branch."""
        return a + b

    def placed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens and the positions that are added to them."""
        return self.add(tokens, positions)

    def total(self, branches: Sequence[Tensor]) -> Tensor:
        """The sum of several branches that read one stream."""
        return torch.stack(list(branches)).sum(0)

    def difference(self, a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
        """Two attentions [B, H, m, n] (or what they gather), the second taken off so many times."""
        return a - factor * b

    def mixed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Maps of all heads, mixed for each pair of tokens: x [..., H] by a weight [G, H] to [..., G]."""
        return nn.functional.linear(x, weight)

    def mean(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean of two signals: of two heads, or of two ways to pool."""
        return (a + b) / 2

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Element-wise product of two signals, as in gated MLPs."""
        return a * b

    def gate(self, signal: Tensor, openness: Tensor) -> Tensor:
        """A signal let through in part, as in gated attention: ``openness`` in 0..1."""
        return signal * openness

    def rotated(self, q: Tensor, k: Tensor, table: Tensor, half: bool) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, n, d] turned by their places: a rotary table [..., n, 2d], of halves or of pairs."""
        return apply_rot_embed_cat(q, table, half=half), apply_rot_embed_cat(k, table, half=half)

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Scaled products of queries and keys, [B, H, m, n]."""
        return (q * scale) @ k.transpose(-2, -1)

    def latent_scores(self, latent: Tensor, k: Tensor, scale: float) -> Tensor:
        """Those of learned queries, which no image has a part in."""
        return (latent * scale) @ k.transpose(-2, -1)

    def biased(self, scores: Tensor, bias: Tensor) -> Tensor:
        """Scores and a relative bias, broadcast to [B, H, m, n]."""
        return scores + bias

    def softmax(self, scores: Tensor) -> Tensor:
        """Attention of each row over its keys."""
        return scores.softmax(-1)

    def gather(self, attention: Tensor, values: Tensor) -> Tensor:
        """What the heads gather: [B, H, m, n] times [B, H, n, d]."""
        return attention.to(values.dtype) @ values

    def attention(self, q: Tensor, k: Tensor, v: Tensor, relative: Tensor | None = None) -> Tensor:
        """Attention without its matrix, [B, H, m, d]; ``relative`` is added to the scores."""
        return fused_attention(q, k, v, relative)

    def whole(self, head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A head that is no chain of these operations: tokens [B, N, D] to logits [B, classes]."""
        return head(x)

    def combine(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """A weighted sum of tokens with given weights: [B, m, n] times [B, n, D]."""
        return weights @ tokens

    def merge(self, weights: Tensor, group: Tensor, count: int, tokens: Tensor) -> Tensor:
        """Weighted sums of the tokens of each group: weights and groups [B, n] of tokens [B, n, D] to [B, count, D]."""
        # Rules lead relevance back through products with weights, and know no sums by index.
        if self.opened:
            return self.combine(weights.unsqueeze(1) * members(group, count).to(weights.dtype), tokens)
        return grouped(weights.unsqueeze(2) * tokens, group, count)

    def largest(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Each window's maximum a channel, and which token alone has it: [B, m, k, D] to two of [B, m, D]."""
        values, winners = windows.max(2)
        return values, winners


PLAIN = Arithmetic()

_NORMS = (nn.LayerNorm, RmsNorm, nn.RMSNorm)
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, GELUTanh, QuickGELU)


def mlp(module: nn.Module, x: Tensor, ops: Arithmetic) -> Tensor:
    """A block's MLP for normed x [B, n, D]; opened, where the arithmetic asks for it, within the module's own call."""
    if not ops.opened:
        return module(x)
    out: Tensor = inside(module, partial(_mlp, module, ops), x)
    return out


def _mlp(module: nn.Module, ops: Arithmetic, x: Tensor) -> Tensor:
    # By type: a subclass may compute something else.
    m: Any = module
    if type(module) is SwiGLU:
        hidden = ops.product(ops.activation(m.act, ops.linear(m.fc1_g, x)), ops.linear(m.fc1_x, x))
    elif type(module) is GluMlp:
        # One layer makes both halves; which of them is the gate differs.
        first, second = ops.linear(m.fc1, x).chunk(2, -1)
        gate, signal = (second, first) if m.gate_last else (first, second)
        hidden = ops.product(ops.activation(m.act, gate), signal)
    elif type(module) is Mlp:
        hidden = ops.activation(m.act, ops.linear(m.fc1, x))
    else:
        raise unknown_layer(module, "Mlp, GluMlp and SwiGLU")
    return ops.linear(m.fc2, ops.norm(m.norm, hidden))


def classify(module: nn.Module, x: Tensor, ops: Arithmetic) -> Tensor:
    """The head for pooled x [B, D]; opened where the arithmetic asks for it, part by part."""
    if not ops.opened:
        return ops.linear(module, x)
    if isinstance(module, nn.Identity | nn.Dropout):
        return module(x)
    # Users put heads of several layers on, each of which has its own rule.
    if isinstance(module, nn.Sequential):
        for part in module:
            x = classify(part, x, ops)
        return x
    if isinstance(module, _NORMS):
        return ops.norm(module, x)
    if isinstance(module, _ACTIVATIONS):
        return ops.activation(module, x)
    return ops.linear(module, x)


def unknown_layer(module: nn.Module, known: str) -> PrunexError:
    """The error for a layer that relevance cannot be led through."""
    return PrunexError(
        f"relevance rules do not know {type(module).__name__}: known are {known}; "
        "generic_attention and rollout take this model"
    )


def pooled(x: Tensor, weights: Tensor, ops: Arithmetic) -> Tensor:
    """Weighted mean over tokens, [B, n, D] with weights [B, n] summing to 1: [B, D]."""
    return ops.combine(weights.unsqueeze(1).to(x.dtype), x).squeeze(1)


def promoted(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
