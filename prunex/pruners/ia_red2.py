"""IA-RED^2: small policies, one a group of blocks, that drop patches and whose scores are a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.checks import check_number, check_whole
from prunex.errors import PrunexError
from prunex.pruners.adaptive import Adaptive, CountOptions, above
from prunex.pruners.base import Forward, floor_share, top
from prunex.registry import register
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.decisions import Drop, Keep, Mask
from prunex.vit.state import TokenState
from prunex.vit.turns import Turn
from prunex.vit.units import prefix_of


class Interpreter(nn.Module):
    """How much the class token's query agrees with each patch's key: a keep probability a patch.

    p_j = mean over heads of sigmoid(q_class . k_j / sqrt(D / heads)), on LayerNorm without affine parameters of the
    tokens times their policy: a mean of sigmoids, and no softmax over tokens.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qk = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, prefix: int, policy: Tensor | None = None) -> Tensor:
        """From tokens [B, prefix + n, D], the class token first, and their policy to p [B, n], in at least float32."""
        y = self.norm(x if policy is None else x * policy.unsqueeze(-1).to(x.dtype))
        # The class token needs no key and a patch no query: half of the projection is enough for either.
        if type(self.qk) is nn.Linear:
            (query, key), (q_bias, k_bias) = self.qk.weight.chunk(2), self.qk.bias.chunk(2)
            q, k = F.linear(y[:, :1], query, q_bias), F.linear(y[:, prefix:], key, k_bias)
        else:  # an adapter was put round it, and has a part in both
            q, k = self.qk(y[:, :1]).chunk(2, -1)[0], self.qk(y[:, prefix:]).chunk(2, -1)[1]
        q, k = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return scores.to(torch.promote_types(x.dtype, torch.float32)).sigmoid().mean(1)[:, 0]


@register(
    "pruner",
    "ia_red2",
    "Pan et al., NeurIPS 2021, arXiv 2106.12620",
    "a class token; training: its policies are learned",
)
class IARED2(Adaptive):
    r"""Interpretability-aware redundancy reduction (arXiv 2106.12620).

    The blocks are cut into groups. Before each group an :class:`Interpreter` gives every patch still there a
    probability p, and the patches with p > ``threshold`` go on, any number an image; what was dropped stays dropped.
    The class token asks, so it and all other prefix tokens stay.

    The map of the method is p of the first interpreter: ``pruning.trace.stages[0].score`` [B, n] holds the patches in
    raster order where group 0 begins before block 0; it tells where the model looks, not for which class. Later groups'
    scores cover the patches that were left to them.

    The authors published no training code, and the paper's reinforcement (its reward, penalty and curriculum) could not
    be read. The algorithm above is that of a third-party inference copy. Training is ours: hard Bernoulli draws of p
    with straight-through (Gumbel) gradients mask patches, and ``ratio``, mean over groups of (kept share of the batch -
    target)^2, weight 2, is added to the user's loss.

    Departures from the third-party copy: the unused value third of its projection is not made; dropped keys leave the
    softmax exactly.

    Args:
        keep_ratio: Base rate in (0, 1]; group g's target is its (g+1)-th power, a sequence gives one factor a group. It
            is what the ratio loss and fixed counts aim at. A group of factor 1 drops nothing.
        stages: First blocks of the groups. None: ``groups`` equal ones.
        groups: How many equal groups, where ``stages`` is None; None: 3, or as many as there are blocks.
        heads: Of the interpreters; None: the model's.
        ratio_weight: Of the ratio loss.
        **shared: See :class:`~prunex.pruners.adaptive.CountOptions`: ``threshold`` is of p, strictly. Counts are
            "adaptive" as published, or "fixed": the floor(N * target) best-scored patches at inference.

    Raises:
        PrunexError: For a model without a class token, heads that do not divide its width, groups and stages together,
            or another option out of range.
    """

    name = "ia_red2"
    trains_masked = True
    lr = 9e-4  # dynamicvit's, whose predictors are as new; not searched
    handed_on = {"count": "adaptive", "threshold": 0.5, "expected": None}

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] = 0.7,
        stages: Sequence[int] | None = None,
        groups: int | None = None,
        heads: int | None = None,
        ratio_weight: float = 2.0,
        **shared: Unpack[CountOptions],
    ) -> None:
        if stages is None or groups is not None:
            stages = _equal(groups, stages, anatomy.depth)
        super().__init__(anatomy, keep_ratio, stages, **shared)
        heads = anatomy.dividing_heads if heads is None else heads
        if type(heads) is not int or heads < 1 or anatomy.width % heads:
            raise PrunexError(f"heads={heads!r} is not allowed: give a number that divides the width {anatomy.width}")
        self.interpreters = nn.ModuleList(Interpreter(anatomy.width, heads) for _ in self.stages)
        for interpreter, rate in zip(self.interpreters, self.rates, strict=True):
            interpreter.requires_grad_(rate < 1)  # one that is never asked must not wait for a gradient
        self.ratio_weight = check_number("ratio_weight", ratio_weight, 0)
        self.options |= {"heads": heads, "ratio_weight": self.ratio_weight}

    def prepare(self, model: ViT) -> None:
        """Refuse a model without a class token."""
        if model.cls_token is None or prefix_of(model) == 0:
            has = "one that enters behind the blocks" if model.cls_token is not None else "none"
            raise PrunexError(
                f"ia_red2 asks with the class token, and this {type(model).__name__} has {has}: use dynamicvit, which "
                "scores patches without one"
            )

    @property
    def active(self) -> list[int]:
        """Groups that drop anything."""
        return [g for g, rate in enumerate(self.rates) if rate < 1]

    def plan(self) -> list[Turn]:
        """Before the first blocks of the groups that drop anything."""
        return [Turn(self.stages[g]) for g in self.active]

    def decide(self, turn: Turn, state: TokenState) -> Keep | Mask | Drop | None:
        """Drop patches before a group's first block; draw which ones while training."""
        g, present = self.stages.index(turn.block), state.present
        p = self.interpreters[g](state.tokens, state.anatomy.prefix, state.policy)
        # What was dropped stays dropped, and its score on the map is 0.
        score = p if present is None else p * present
        if state.training and state.masked:
            drawn = _straight_through(p)
            return Mask(drawn if present is None else drawn * present, score)
        if self.adaptive:
            return Drop(above(p.detach(), self.threshold, present, self.least), score)
        k = floor_share(self.targets[g], state.trace.grid[0] * state.trace.grid[1])
        return None if k >= state.left else Keep(top(score, k, present), score)

    def counts(self, patches: int) -> list[int]:
        """Patch tokens after each stage; expected ones where counts are adaptive."""
        return self.likely(patches) or [floor_share(target, patches) for target in self.targets]

    def macs(self, entering: int, inner: int = 0) -> int:
        """One interpreter: the class token's query, the patches' keys, and their products: D^2 + n D^2 + n D."""
        width = self.interpreters[0].qk.in_features  # type: ignore[union-attr]
        return int(width * width * (1 + entering) + entering * width)  # type: ignore[operator]

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        """``ratio`` of one training forward."""
        if not forward.masks:
            return {}
        targets = [self.targets[g] for g in self.active]
        gaps = [(m.mean() - t) ** 2 for m, t in zip(forward.masks, targets, strict=True)]
        return {"ratio": self.ratio_weight * torch.stack(gaps).mean()}

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Interpreters from a published state dict: one projection ``...qkv`` [3 D, D] outside the blocks a group."""
        # In the dict's order, since the names themselves are unverified; the value third is dropped.
        renamed: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            projections = [v for k, v in state.items() if k.endswith(f"qkv.{kind}") and "blocks." not in k]
            for g, value in enumerate(projections):
                renamed[f"interpreters.{g}.qk.{kind}"] = value[: 2 * len(value) // 3]
        return renamed


def _equal(groups: int | None, stages: Sequence[int] | None, depth: int) -> list[int]:
    """First blocks of equal groups."""
    if stages is not None:
        raise PrunexError(f"stages={stages!r} and groups={groups!r} say the same thing: give one of them")
    count = min(3, depth) if groups is None else check_whole("groups", groups, 1, depth)
    return [depth * g // count for g in range(count)]


def _straight_through(p: Tensor) -> Tensor:
    """Hard Bernoulli draws of p with the gradient of their Gumbel relaxation."""
    # Logarithms of 0 have no gradient.
    p = p.clamp(1e-6, 1 - 1e-6)
    return F.gumbel_softmax(torch.stack([p.log(), (1 - p).log()], -1), tau=1.0, hard=True, dim=-1)[..., 0]
