"""Rules of layer-wise relevance propagation: one layer's relevance back to its inputs, and a forward that carries it.

A layer is given by its products x_j w_jk; R_k is the relevance of its outputs, R_j what its inputs get. The propagating
forward (:class:`RelevanceRules`) keeps every value and lets one graph be walked twice: as ordinary gradients, and as
relevance. Every sum is taken per image, so images of a batch do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.later import deferred
from prunex.vit.arithmetic import Arithmetic, unknown_layer
from prunex.vit.recording import Recording, gradients
from prunex.vit.units import let_through
from prunex.vit.weights import convolution_of, effective, is_identity, is_linear

LinearRule = Literal["zplus", "epsilon", "gamma"]
RuleSet = Literal["conserving", "published_baseline"]
RULE_SETS = get_args(RuleSet)


@dataclass(frozen=True, eq=False, repr=False)
class Layer(Brief):
    """A linear layer or patch convolution: weights, bias, and how they act on inputs and back."""

    weight: Tensor  # [out, in], or [out, C, h, w]
    bias: Tensor | None  # [out] or None, shaped to be added to outputs
    forth: Callable[[Tensor, Tensor], Tensor]  # inputs and a weight to outputs, without bias
    back: Callable[[Tensor, Tensor], Tensor]  # outputs and a weight to inputs (the transpose)

    @classmethod
    def linear(cls, weight: Tensor, *biases: Tensor | None) -> Layer:
        """A linear layer of given weights [out, in] and biases [out]."""
        some = [b.detach() for b in biases if b is not None]
        return cls(weight.detach(), sum(some[1:], some[0]) if some else None, lambda x, w: x @ w.T, lambda s, w: s @ w)

    @classmethod
    def of(cls, module: nn.Module) -> Layer:
        """The layer behind a module; refused where that is neither linear nor a patch convolution."""
        if is_linear(module):
            return cls.linear(*effective(module))
        convolution: Any = convolution_of(module)
        if convolution is not None and _cuts_patches(convolution):
            stride = convolution.stride
            weight, bias = effective(module)
            return cls(
                weight,
                None if bias is None else bias[:, None, None],
                lambda x, w: F.conv2d(x, w, stride=stride),
                lambda s, w: F.conv_transpose2d(s, w, stride=stride),
            )
        raise unknown_layer(module, "nn.Linear and patch convolutions")


def _cuts_patches(convolution: nn.Conv2d) -> bool:
    return (
        convolution.stride == convolution.kernel_size
        and set(convolution.padding) == {0}
        and convolution.groups == 1
        and set(convolution.dilation) == {1}
    )


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / (b + 1e-9)``, and 0 where b is 0: the stabiliser of the published relevance layers."""
    # Theirs also takes 1e-9 for a denominator where b is exactly -1e-9, which values of a network's size never are.
    return (a / (b + 1e-9)).masked_fill_(b == 0, 0)


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """The values moved away from 0 by epsilon, along its sign (positive at 0)."""
    return z + epsilon * torch.where(z < 0, -1.0, 1.0).to(z.dtype)


def zplus(layer: Layer, x: Tensor, out: Tensor, r: Tensor) -> Tensor:
    """R_j = sum_k (x_j w_jk)^+ / sum_i (x_i w_ik)^+ R_k: positive products only, one denominator, no bias."""
    up, down = _by_sign(layer.weight)
    s = r / _positive_sum(layer, x, out).add_(1e-9)  # where that sum is 0, so is what s meets on the way back
    return (layer.back(s, up) * x.clamp(min=0)).addcmul_(layer.back(s, down), x.clamp(max=0))


def _positive_sum(layer: Layer, x: Tensor, out: Tensor) -> Tensor:
    """sum_i (x_i w_ik)^+, as half of sum and sum of magnitudes: one product with weights where two signs take two."""
    magnitude = layer.forth(x.abs(), layer.weight.abs())
    positive = magnitude + out
    if layer.bias is not None:
        positive -= layer.bias
        magnitude += layer.bias.abs()
    # Where positive products are few, that difference would be rounding alone: the signs are summed apart.
    few = positive < magnitude.mul_(1 / 32)
    positive *= 0.5
    if deferred(few) or few.any():
        (above, below), (up, down) = _by_sign(x), _by_sign(layer.weight)
        positive = torch.where(few, layer.forth(above, up) + layer.forth(below, down), positive)
    return positive


def zplus_split(layer: Layer, x: Tensor, out: Tensor, r: Tensor) -> Tensor:
    """As :func:`zplus`, each sign of the inputs divided by its own denominator: up to twice the relevance leaves."""
    (above, below), (up, down) = _by_sign(x), _by_sign(layer.weight)
    first = above * layer.back(ratio(r, layer.forth(above, up)), up)
    return first + below * layer.back(ratio(r, layer.forth(below, down)), down)


def epsilon_rule(layer: Layer, x: Tensor, out: Tensor, r: Tensor, epsilon: float = 1e-6) -> Tensor:
    """R_j = sum_k x_j w_jk R_k / (z_k + epsilon sign z_k), z_k with bias."""
    return x * layer.back(r / stabilised(out, epsilon), layer.weight)


def gamma_rule(layer: Layer, x: Tensor, out: Tensor, r: Tensor, gamma: float, epsilon: float = 1e-6) -> Tensor:
    """The epsilon rule with products of the output's own sign favoured: each counts (1 + gamma) times.

    For z_k > 0 these are x_j w_jk > 0, for z_k < 0 those below 0; the bias is favoured alike.
    """
    up, down = _by_sign(x)
    # Outputs above and below 0 favour products of their own sign.
    positive = layer.weight + gamma * layer.weight.clamp(min=0)
    negative = layer.weight + gamma * layer.weight.clamp(max=0)
    total = torch.zeros_like(x)
    for side, with_up, with_down, bound in (
        (out > 0, positive, negative, {"min": 0}),
        (out < 0, negative, positive, {"max": 0}),
    ):
        z = layer.forth(up, with_up) + layer.forth(down, with_down)
        if layer.bias is not None:
            z = z + layer.bias + gamma * layer.bias.clamp(**bound)
        s = r * side / stabilised(z, epsilon)
        total += up * layer.back(s, with_up) + down * layer.back(s, with_down)
    return total


def bounded(layer: Layer, x: Tensor, out: Tensor, r: Tensor) -> Tensor:
    """The pixel layer's rule zB: x w - l w^+ - h w^-, l and h each image's lowest and highest value (no bias)."""
    above, below = x - x.amin((1, 2, 3), keepdim=True), x - x.amax((1, 2, 3), keepdim=True)
    up, down = _by_sign(layer.weight)
    s = ratio(r, layer.forth(above, up) + layer.forth(below, down))
    return above * layer.back(s, up) + below * layer.back(s, down)


def _by_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.clamp(min=0), x.clamp(max=0)


def proportional(terms: Sequence[Tensor], out: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    """A sum's relevance in proportion to its terms."""
    s = ratio(r, out)
    return tuple(term * s for term in terms)


def conserving_sum(terms: Sequence[Tensor], out: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    """As :func:`proportional`, rescaled: a term's share of an image is |sum R_a| / (|sum R_a| + |sum R_b| + ...)."""
    parts = proportional(terms, out, r)
    axes = tuple(range(1, r.ndim))
    sums = [p.sum(axes, keepdim=True) for p in parts]
    size = torch.stack([s.abs() for s in sums]).sum(0)
    whole = r.sum(axes, keepdim=True)
    # Together the parts sum to what came, each by its share of all sums' magnitudes.
    return tuple(p.mul_(ratio(ratio(s.abs(), size) * whole, s)) for p, s in zip(parts, sums, strict=True))


class RelevanceRules(Arithmetic):
    """A forward whose graph carries gradients or, with ``relevance`` set, relevance.

    Norms, element-wise non-linearities, softmax and LayerScale pass relevance through unchanged; a product of two
    signals gives each half, and all to the keys where queries are learned (attention pooling); sigmoid gates, pooling
    weights and a fused token's weights are constants; the scale of the scores is left out; positions that are added
    keep what they get. A rotary turn is a linear map, and shares by proportion, as the difference of two attentions
    does; a relative bias on the scores is what a bias of a linear layer is: nothing under "zplus", part of the
    denominator under the others.

    Args:
        linear: Rule of linear layers: "zplus", "epsilon" or "gamma".
        rule_set: "conserving": one denominator a linear layer, rescaled skip connections. "published_baseline":
            separate denominators, plain proportional skips.
        gamma: Of the gamma rule: for the patch convolution, for linear layers.
        epsilon: Of the epsilon and gamma rules.

    Attributes:
        relevance: Which of the two a backward pass carries now.
    """

    opened = True
    matrices = True

    def __init__(
        self,
        linear: LinearRule = "zplus",
        rule_set: RuleSet = "conserving",
        gamma: tuple[float, float] = (0.25, 0.05),
        epsilon: float = 1e-6,
    ) -> None:
        self.rule, self.rule_set, self.gamma, self.epsilon = linear, rule_set, gamma, epsilon
        self.relevance = False

    def _through(self, out: Tensor, x: Tensor) -> Tensor:
        return Route.apply(self, lambda saved, out, r: (r.reshape(saved[0].shape),), out, x)

    def linear(self, module: nn.Module, x: Tensor, beside: Tensor | None = None) -> Tensor:
        layer = Layer.of(module) if beside is None else Layer.linear(*effective(module), beside)
        # The rules see the layer's inputs as its gates leave them; a gate is a constant factor, all goes on.
        seen = let_through(module, x).detach()
        return self._by_rule(layer, super().linear(module, x, beside), x, seen, self.gamma[1], self._positive)

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
        """As a linear layer."""
        out = super().affine(x, weight, bias, beside)
        layer = Layer.linear(weight, bias, beside)
        return self._by_rule(layer, out, x, x.detach(), self.gamma[1], self._positive)

    def patches(self, module: nn.Module, images: Tensor) -> Tensor:
        """The pixel layer: zB under z+, else the linear layers' rule."""
        return self._by_rule(Layer.of(module), module(images), images, images.detach(), self.gamma[0], bounded)

    @property
    def _positive(self) -> Callable[..., Tensor]:
        return zplus if self.rule_set == "conserving" else zplus_split

    def _by_rule(
        self, layer: Layer, out: Tensor, x: Tensor, seen: Tensor, gamma: float, positive: Callable[..., Tensor]
    ) -> Tensor:
        def back(saved: tuple[Tensor, ...], out: Tensor, r: Tensor) -> tuple[Tensor, None]:
            if self.rule == "epsilon":
                return epsilon_rule(layer, saved[1], out, r, self.epsilon), None
            if self.rule == "gamma":
                return gamma_rule(layer, saved[1], out, r, gamma, self.epsilon), None
            return positive(layer, saved[1], out, r), None

        return Route.apply(self, back, out, x, seen)

    def scaled(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return x if is_identity(module) else self._through(module(x), x)

    norm = scaled
    activation = scaled

    def softmax(self, scores: Tensor) -> Tensor:
        return self._through(scores.softmax(-1), scores)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """In proportion to the terms."""
        return self._sum(a + b, [a, b])

    def total(self, branches: Sequence[Tensor]) -> Tensor:
        """In proportion to the branches, as a skip connection."""
        return self._sum(super().total(branches), branches)

    def _sum(self, out: Tensor, terms: Sequence[Tensor]) -> Tensor:
        conserving = self.rule == "zplus" and self.rule_set == "conserving"
        return Route.apply(self, conserving_sum if conserving else proportional, out, *terms)

    def difference(self, a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
        """In proportion to the terms; the factor is a constant."""

        def back(saved: tuple[Tensor, ...], out: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            # What gathering gave is in proportion to the difference: no small one makes a large quotient.
            s = torch.where(out == 0, 0, r / out)
            return saved[0] * s, -factor.detach() * saved[1] * s

        return Route.apply(self, back, super().difference(a, b, factor), a, b)

    def mixed(self, x: Tensor, weight: Tensor) -> Tensor:
        """As a linear layer; under z+ by the magnitudes of products, since so few heads may have no positive one."""
        if self.rule != "zplus":
            return self.affine(x, weight)
        gain = weight.detach().abs()

        def back(saved: tuple[Tensor, ...], out: Tensor, r: Tensor) -> tuple[Tensor]:
            size = saved[0].abs()
            return (size * (ratio(r, size @ gain.T) @ gain),)

        return Route.apply(self, back, super().mixed(x, weight), x)

    def mean(self, a: Tensor, b: Tensor) -> Tensor:
        both = self.add(a, b)
        return self._through(both / 2, both)

    def gate(self, signal: Tensor, openness: Tensor) -> Tensor:
        return self._through(signal * openness, signal)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return Route.apply(self, lambda saved, out, r: (r / 2, r / 2), a * b, a, b)

    def rotated(self, q: Tensor, k: Tensor, table: Tensor, half: bool) -> tuple[Tensor, Tensor]:
        """In proportion to the products x_j w_jk of the turn as a linear map."""
        turn = partial(apply_rot_embed_cat, emb=table, half=half)
        return self.whole(turn, q), self.whole(turn, k)

    def latent_scores(self, latent: Tensor, k: Tensor, scale: float) -> Tensor:
        """All to the keys, in proportion to the products: a learned query is a constant."""
        fixed = latent.detach()

        def back(saved: tuple[Tensor, ...], out: Tensor, r: Tensor) -> tuple[Tensor]:
            return (saved[0] * (ratio(r, out / scale).transpose(-2, -1) @ fixed),)

        return Route.apply(self, back, super().latent_scores(latent, k, scale), k)

    def biased(self, scores: Tensor, bias: Tensor) -> Tensor:
        """As a bias of a linear layer: under z+ it takes no part, else it absorbs its share."""

        def back(saved: tuple[Tensor, ...], out: Tensor, r: Tensor) -> tuple[Tensor]:
            return (r if self.rule == "zplus" else saved[0] * r / stabilised(out, self.epsilon),)

        return Route.apply(self, back, scores + bias, scores)

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Queries and keys half each, in proportion to their products."""

        def back(saved: tuple[Tensor, ...], out: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            s = ratio(r, out / scale)
            return saved[0] * (s @ saved[1]) / 2, saved[1] * (s.transpose(-2, -1) @ saved[0]) / 2

        return Route.apply(self, back, (q * scale) @ k.transpose(-2, -1), q, k)

    def gather(self, attention: Tensor, values: Tensor) -> Tensor:
        """Attention and values half each, in proportion to their products."""

        def back(saved: tuple[Tensor, ...], out: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            s = ratio(r, out)
            return saved[0] * (s @ saved[1].transpose(-2, -1)) / 2, saved[1] * (saved[0].transpose(-2, -1) @ s) / 2

        return Route.apply(self, back, attention @ values, attention, values)

    def whole(self, head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function without rules of its own: input times gradient, R_j = x_j sum_k (dz_k / dx_j) R_k / z_k."""

        def back(saved: tuple[Tensor, ...], out: Tensor, r: Tensor) -> tuple[Tensor]:
            # Backward passes are off the graph, and this one differentiates the function once more.
            with torch.enable_grad():
                x = saved[0].detach().requires_grad_()
                (gradient,) = torch.autograd.grad(head(x), x, ratio(r, out))
            return (x.detach() * gradient,)

        return Route.apply(self, back, head(x), x)

    def combine(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """Tokens in proportion to their weighted part."""

        def back(saved: tuple[Tensor, ...], out: Tensor, r: Tensor) -> tuple[Tensor]:
            return (saved[0] * (fixed.transpose(-2, -1) @ ratio(r, out)),)

        fixed = weights.detach()  # constants to relevance, not to gradients
        return Route.apply(self, back, weights @ tokens, tokens)


def weighed_relevance(
    recorded: Recording, rules: RelevanceRules, inputs: Sequence[Tensor], gradient: bool
) -> list[Tensor]:
    """Relevance at some places of a forward, from a one-hot 1 at the class; with ``gradient`` times the gradient."""
    one_hot = recorded.one_hot()
    factors = gradients(recorded.logits, inputs, one_hot, retain_graph=True) if gradient else None
    # Gradients first: from here on the same graph carries relevance.
    rules.relevance = True
    relevance = gradients(recorded.logits, inputs, one_hot)
    if factors is None:
        return relevance
    return [factor * r for factor, r in zip(factors, relevance, strict=True)]


class Route(torch.autograd.Function):
    """A value that two graphs lead to: its own (for gradients), and a rule from it straight to its inputs.

    ``rules.relevance`` says which of the two is walked.
    """

    @staticmethod
    def forward(ctx: Any, rules: Any, back: Callable[..., Any], out: Tensor, *inputs: Tensor) -> Tensor:
        """The value as it is."""
        ctx.rules, ctx.back = rules, back
        ctx.save_for_backward(out, *inputs)
        # Where nothing comes back, None does instead of zeros, which the rule would be asked to share out.
        ctx.set_materialize_grads(False)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Gradients go to the value, relevance past it to the inputs."""
        count = len(ctx.needs_input_grad) - 3
        if grads[0] is None:
            return (None,) * (3 + count)
        if not ctx.rules.relevance:
            return (None, None, grads[0], *(None,) * count)
        out, *inputs = ctx.saved_tensors
        return (None, None, None, *ctx.back(tuple(inputs), out, grads[0]))
