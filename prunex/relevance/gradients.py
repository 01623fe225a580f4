"""AttnLRP and CP-LRP as gradients: relevance = activation times a gradient whose rules were changed.

The forward's values stay bit for bit; only backward passes change. Relevance of a signal x is x times its gradient, so
ordinary backward passes of linear layers, skips and products *are* their LRP-0 rules.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from prunex.relevance.rules import Layer, Route, gamma_rule
from prunex.vit.arithmetic import Arithmetic, fused_attention, unknown_layer
from prunex.vit.units import let_through
from prunex.vit.weights import behind, effective, is_identity


class ModifiedGradients(Arithmetic):
    """The forward with AttnLRP's or CP-LRP's backward passes.

    - element-wise f: the gradient is f(x) / x;
    - norms: the deviation (or root mean square) is a constant;
    - attention: "attnlrp" divides the gradients of q and k by 4 and of v by 2 (of k by 2 where queries are learned, in
      attention pooling), "cplrp" takes q and k as constants; rotary turns and relative biases are left as they are;
    - products in gated MLPs: half each; gates of gated attention are constants;
    - linear layers and the patch convolution: as they are, or by the gamma rule of a pair of strengths;
    - with ``positions``, what tells places is an input too (PE-LRP, arXiv 2506.02138): ``added``, the positions that
      tokens are given [B, N, D], and ``tables``, a block's sines and cosines each [B, 1 or H, n, 2d], whose products
      with queries and keys give either side half. Each forward fills them anew.
    """

    opened = True
    relevance = True  # its graph has no other use

    def __init__(
        self, kind: Literal["attnlrp", "cplrp"], gamma: tuple[float, float] | None = None, positions: bool = False
    ) -> None:
        self.kind, self.gamma, self.positions = kind, gamma, positions
        self.added: Tensor | None = None
        self.tables: list[Tensor] = []

    def linear(self, module: nn.Module, x: Tensor, beside: Tensor | None = None) -> Tensor:
        # Made whether or not a rule asks for it: what is no linear layer is refused alike under all options.
        layer = Layer.of(module) if beside is None else Layer.linear(*effective(module), beside)
        seen = x if self.gamma is None else let_through(module, x)
        return self._by_gamma(layer, super().linear(module, x, beside), x, seen, 1)

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
        """As a linear layer."""
        return self._by_gamma(Layer.linear(weight, bias, beside), super().affine(x, weight, bias, beside), x, x, 1)

    def patches(self, module: nn.Module, images: Tensor) -> Tensor:
        return self._by_gamma(Layer.of(module), module(images), images, images, 0)

    def _by_gamma(self, layer: Layer, out: Tensor, x: Tensor, seen: Tensor, place: int) -> Tensor:
        if self.gamma is None:
            return out
        gamma = self.gamma[place]

        def back(saved: tuple[Tensor, ...], out: Tensor, grad: Tensor) -> tuple[Tensor, None]:
            # Gradient times output is the relevance that comes, relevance over input the gradient that goes.
            return gamma_rule(layer, saved[1], out, grad * out, gamma) / (saved[0] + 1e-10), None

        return Route.apply(self, back, out, x, seen.detach())

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        if is_identity(module):
            return x
        return _Norm.apply(x, module(x), behind(module))

    def activation(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Identity):
            return x
        return Route.apply(self, lambda saved, out, grad: (grad * (out / (saved[0] + 1e-10)),), module(x), x)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return _Scaled.apply(a, 0.5) * _Scaled.apply(b, 0.5)

    def gate(self, signal: Tensor, openness: Tensor) -> Tensor:
        return signal * openness.detach()

    def placed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As a skip; positions that are inputs are kept as a place to differentiate at."""
        if self.positions:
            positions = self.added = positions.detach().clone().requires_grad_()
            self.tables = []
        return super().placed(tokens, positions)

    def rotated(self, q: Tensor, k: Tensor, table: Tensor, half: bool) -> tuple[Tensor, Tensor]:
        """A linear map, or products of two inputs each."""
        if not self.positions:
            return super().rotated(q, k, table, half)
        heads = 1 if table.ndim == 2 else table.shape[-3]
        leaf = table.detach().expand(len(q), heads, *table.shape[-2:]).clone().requires_grad_()
        self.tables.append(leaf)
        return super().rotated(_Scaled.apply(q, 0.5), _Scaled.apply(k, 0.5), _Scaled.apply(leaf, 0.5), half)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, relative: Tensor | None = None) -> Tensor:
        """Fused attention; queries, keys and values get their share of the gradient."""
        return fused_attention(*self._queries_and_keys(q, k), self._gathered(v), relative)

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The products, for masked attention."""
        q, k = self._queries_and_keys(q, k)
        return (q * scale) @ k.transpose(-2, -1)

    def latent_scores(self, latent: Tensor, k: Tensor, scale: float) -> Tensor:
        """Learned queries are constants: keys alone get what attention gets, half."""
        keys = k.detach() if self.kind == "cplrp" else _Scaled.apply(k, 0.5)
        return super().latent_scores(latent.detach(), keys, scale)

    def gather(self, attention: Tensor, values: Tensor) -> Tensor:
        """What is gathered, for masked attention."""
        return attention.to(values.dtype) @ self._gathered(values)

    def combine(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """A fused token; its weights are constants."""
        return weights.detach() @ tokens

    def _queries_and_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "cplrp":
            return q.detach(), k.detach()
        return _Scaled.apply(q, 0.25), _Scaled.apply(k, 0.25)

    def _gathered(self, v: Tensor) -> Tensor:
        return v if self.kind == "cplrp" else _Scaled.apply(v, 0.5)


class _Scaled(torch.autograd.Function):
    """The value itself, with its gradient multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.factor, None


class _Norm(torch.autograd.Function):
    """A layer or RMS norm, differentiated with its deviation (or root mean square) held constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, module: Any) -> Tensor:
        ctx.centred = isinstance(module, nn.LayerNorm)
        if not ctx.centred and not isinstance(module, RmsNorm | nn.RMSNorm):
            raise unknown_layer(module, "LayerNorm and RmsNorm")
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        spread = x.var(-1, unbiased=False, keepdim=True) if ctx.centred else x.square().mean(-1, keepdim=True)
        ctx.save_for_backward((spread + eps).rsqrt(), module.weight)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inverse, weight = ctx.saved_tensors
        scaled = grads[0] * inverse if weight is None else grads[0] * weight * inverse
        return scaled - scaled.mean(-1, keepdim=True) if ctx.centred else scaled, None, None
