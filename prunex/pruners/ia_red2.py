"""IA-RED^2: small policies, one a group of blocks, that drop patches and whose scores are a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.checks import check_choice, check_number
from prunex.errors import PrunexError
from prunex.pruners.adaptive import Adaptive, above, cumulative, realised
from prunex.pruners.base import Forward, floor_share, top
from prunex.registry import register
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.aside import as_found
from prunex.vit.decisions import Drop, Keep, Mask, TokenState
from prunex.vit.forward import run
from prunex.vit.readout import head
from prunex.vit.trace import TokenTrace

TRAINS = ("straight_through", "reward")


class Interpreter(nn.Module):
    """How much the class token's query agrees with each patch's key: a keep probability a patch.

    p_j = mean over heads of sigmoid(q_class . k_j / sqrt(D / heads)), on LayerNorm without affine parameters of the
    tokens times their policy: a mean of sigmoids, and no softmax over tokens.

    Args:
        width: D.
        heads: Heads; they divide D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qk = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, prefix: int, policy: Tensor | None = None) -> Tensor:
        """From tokens [B, prefix + n, D], the class token first, and their policy to p [B, n], in at least float32."""
        y = self.norm(x if policy is None else x * policy.unsqueeze(-1).to(x.dtype))
        (query, key), (q_bias, k_bias) = self.qk.weight.chunk(2), self.qk.bias.chunk(2)
        q = F.linear(y[:, :1], query, q_bias).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k = F.linear(y[:, prefix:], key, k_bias).unflatten(2, (self.heads, -1)).transpose(1, 2)
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

    The authors published no training code. The algorithm above is that of a third-party inference copy; the paper's
    text on training could not be read, so that the reward below, its penalty and its curriculum are all (unverified).

    ``train="straight_through"`` (ours): hard Bernoulli draws of p with straight-through (Gumbel) gradients mask
    patches, and ``ratio``, mean over groups of (kept share of the batch - target)^2, weight 2, is added to the user's
    loss.

    ``train="reward"`` (unverified): reinforcement. u ~ Bernoulli(p'), p' = a p + (1 - a)(1 - p), is rewarded with
    R = 1 - (|u| / N)^2 where the prediction is right and -tau where not, N the patches of the image; the loss
    ``policy`` is -(R(u) - R(u^)) sum_j log p'(u_j), u^ the thresholded policy of an eval forward without gradients.
    A curriculum runs over the groups, driven by ``progress`` (0..1, cut into two equal parts a group): first group g's
    interpreter learns by reward and nothing else moves, then the blocks from group g on, norm and head learn by the
    user's own loss under the thresholded policy. Groups that had no turn yet drop nothing. No gradient of the user's
    loss reaches an interpreter: u is hard. Who moves is enforced by ``prunex.callbacks.TokenPruning`` (see
    :meth:`resting`). What is right is told by labels: the callback finds them in the batch, ``pruning.losses(labels)``
    takes them; without any, the dense model's own present prediction counts as right. Labels are the batch's, also
    where images were mixed. Without the callback ``progress`` stays 1, the last part, in which no interpreter learns.

    Departures from the third-party copy: the unused value third of its projection is not made; dropped keys leave the
    softmax exactly; the reward is not scaled by a group's share of the blocks.

    Args:
        anatomy: Of the model.
        keep_ratio: Base rate in (0, 1]; group g's target is its (g+1)-th power, a sequence gives one factor a group. It
            is what the ratio loss and fixed counts aim at; rewards know no target. A group of factor 1 drops nothing.
        stages: First blocks of the groups. None: ``groups`` equal ones.
        groups: How many equal groups, where ``stages`` is None; None: 3, or as many as there are blocks.
        heads: Of the interpreters; None: the model's.
        count: "adaptive" as published, or "fixed": the floor(N * target) best-scored patches at inference.
        threshold: p above which (strictly) a patch is kept, in [0, 1].
        train: "straight_through" or "reward".
        ratio_weight: Of the ratio loss.
        penalty: tau, what a wrong prediction costs (1 in the copy; unverified).
        bound: a, which keeps exploration alive, in [0, 1] (0.8 in a comment of the copy; unverified).
        expected: Measured mean shares, see :class:`~prunex.pruners.adaptive.Adaptive`.

    Raises:
        PrunexError: For a model without a class token, heads that do not divide its width, groups and stages together,
            or another option out of range.
    """

    name = "ia_red2"
    trains_masked = True
    lr = 9e-4  # dynamicvit's, whose predictors are as new; not searched

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] = 0.7,
        stages: Sequence[int] | None = None,
        groups: int | None = None,
        heads: int | None = None,
        count: Literal["fixed", "adaptive"] = "adaptive",
        threshold: float = 0.5,
        train: Literal["straight_through", "reward"] = "straight_through",
        ratio_weight: float = 2.0,
        penalty: float = 1.0,
        bound: float = 0.8,
        expected: Sequence[float] | None = None,
    ) -> None:
        if stages is None or groups is not None:
            stages = _equal(groups, stages, anatomy.depth)
        super().__init__(anatomy, keep_ratio, stages, count, threshold, expected)
        heads = anatomy.dividing_heads if heads is None else heads
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or anatomy.width % heads:
            raise PrunexError(f"heads={heads!r} is not allowed: give a number that divides the width {anatomy.width}")
        check_choice("train", train, TRAINS)
        self.by_reward = self.reads_labels = train == "reward"
        self.depth = anatomy.depth
        self.targets = cumulative(self.rates)
        self.interpreters = nn.ModuleList(Interpreter(anatomy.width, heads) for _ in self.stages)
        for interpreter, rate in zip(self.interpreters, self.rates, strict=True):
            interpreter.requires_grad_(rate < 1)  # one that is never asked must not wait for a gradient
        self.ratio_weight = check_number("ratio_weight", ratio_weight, 0)
        self.penalty = check_number("penalty", penalty, 0)
        self.bound = check_number("bound", bound, 0, 1)
        self.options |= {
            "heads": heads,
            "train": train,
            "ratio_weight": self.ratio_weight,
            "penalty": self.penalty,
            "bound": self.bound,
        }

    def prepare(self, model: ViT) -> None:
        """Refuse a model without a class token."""
        if model.cls_token is None:
            raise PrunexError(
                f"ia_red2 asks with the class token, and this {type(model).__name__} has none: use dynamicvit, which "
                "scores patches without one"
            )

    @property
    def active(self) -> list[int]:
        """Groups that drop anything."""
        return [g for g, rate in enumerate(self.rates) if rate < 1]

    @property
    def curriculum(self) -> bool:  # type: ignore[override]
        """Whether groups learn in turn."""
        return self.by_reward and bool(self.active)

    def turn(self) -> tuple[int, bool]:
        """Whose turn it is at the present progress: the group, and whether its interpreter learns (else the blocks)."""
        parts = 2 * len(self.active)
        part = min(int(self.progress * parts + 1e-9), parts - 1)
        return self.active[part // 2], part % 2 == 0

    def asked(self, group: int) -> bool:
        """Whether a group drops anything yet."""
        return self.rates[group] < 1 and (not self.by_reward or group <= self.turn()[0])

    def before(self, block: int, state: TokenState) -> Keep | Mask | Drop | None:
        """Drop patches before a group's first block; draw which ones where its interpreter learns."""
        if block not in self.stages:
            return None
        g = self.stages.index(block)
        if not self.asked(g):
            return None
        tokens = state.tokens.detach() if self.by_reward else state.tokens
        p, present = self.interpreters[g](tokens, state.anatomy.prefix, state.policy), state.present
        score = p if present is None else p * present
        if state.training and state.masked and (not self.by_reward or self.turn() == (g, True)):
            drawn = bounded(p.detach(), self.bound).bernoulli() if self.by_reward else _straight_through(p)
            return Mask(drawn if present is None else drawn * present, score)
        if self.adaptive or (state.training and state.masked):
            return Drop(above(p.detach(), self.threshold, present, self.least), score)
        k = floor_share(self.targets[g], state.trace.grid[0] * state.trace.grid[1])
        return None if k >= state.left else Keep(top(score, k, present), score)

    def counts(self, patches: int) -> list[int]:
        """Patch tokens after each stage; expected ones where counts are adaptive."""
        found, n = [], patches
        for g, target in enumerate(self.targets):
            n = min(n, floor_share(target, patches)) if self.asked(g) else n
            found.append(n)
        return self.likely(patches) or found

    def macs(self, entering: int) -> int:
        """One interpreter: the class token's query, the patches' keys, and their products: D^2 + n D^2 + n D."""
        width = self.interpreters[0].qk.in_features  # type: ignore[union-attr]
        return int(width * width * (1 + entering) + entering * width)  # type: ignore[operator]

    def proxy(self, trace: TokenTrace) -> Tensor:
        """The method's own cost of each image, linear in tokens: share of the block-tokens left, float [B] in 0..1.

        1 - sum over groups of (1 - kept share) * blocks of the group / L. ``prunex.cost`` counts multiply-adds.
        """
        sizes = [b - a for a, b in zip(self.stages, (*self.stages[1:], self.depth), strict=True)]
        shares = realised(trace, self.stages)
        return 1 - (1 - shares) @ shares.new_tensor(sizes) / self.depth

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        """``ratio``, or ``policy`` where interpreters learn by reward, of one training forward."""
        if not self.active:
            return {}
        if self.by_reward:
            return {"policy": self._policy_loss(forward)}
        if not forward.masks:
            return {}
        targets = [self.targets[g] for g in self.active]
        gaps = [(m.mean() - t) ** 2 for m, t in zip(forward.masks, targets, strict=True)]
        return {"ratio": self.ratio_weight * torch.stack(gaps).mean()}

    def _policy_loss(self, forward: Forward) -> Tensor:
        # Every interpreter has a gradient in every step, 0 out of turn: DDP would take a missing one for a mistake.
        idle = sum((0 * p.float().sum() for p in self.parameters() if p.requires_grad), torch.zeros(()))
        g, learns = self.turn()
        if not learns or not forward.masks or forward.trace is None or forward.model is None:
            return torch.as_tensor(idle)
        if forward.logits is None or forward.anatomy.classes == 0:
            raise PrunexError(
                "ia_red2 with train='reward' must see whether the ViT's own prediction is right, and it gave no "
                "logits: use its own head, or train='straight_through'"
            )
        with torch.no_grad():
            labels, greedy, greedy_share = self._compare(forward, forward.model, g)
            drawn = forward.masks[-1]
            mine = reward(drawn.mean(1), forward.logits.argmax(1) == labels, self.penalty)
            advantage = mine - reward(greedy_share, greedy == labels, self.penalty)
        at = next(i for i, s in enumerate(forward.trace.stages) if s.block == self.stages[g])
        there = forward.trace.kept(at - 1).flatten(1) if at else torch.ones_like(drawn, dtype=torch.bool)
        p = torch.as_tensor(forward.trace.stages[at].score)
        return policy_loss(p, drawn, there, advantage, self.bound) + idle.to(p.device)

    def _compare(self, forward: Forward, model: ViT, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, the prediction under the thresholded policy, and which share of the patches this keeps; [B] each."""
        count, anatomy, images = self.count, forward.anatomy, forward.images
        labels = forward.labels
        with as_found(model, train=False):
            try:
                self.count = "adaptive"
                tokens, state = run(model, images, anatomy, (self,))
            finally:
                self.count = count
            greedy = head(model, tokens, state.policy, anatomy).argmax(1)
            if labels is None:
                labels = head(model, run(model, images, anatomy)[0], None, anatomy).argmax(1)
        share = realised(state.trace, self.stages)[:, group]
        return labels.to(images.device), greedy, share

    def resting(self, model: ViT) -> list[nn.Parameter]:
        """Where groups learn in turn: all but the interpreter, or all but the blocks, whose turn it is."""
        if not self.curriculum:
            return []
        g, learns = self.turn()
        moving: list[nn.Module] = [self.interpreters[g]]
        if not learns:
            ends = (getattr(model, name, None) for name in ("norm", "fc_norm", "head", "head_dist"))
            moving = [*model.blocks[self.stages[g] :], *(m for m in ends if m is not None)]
        free = {id(p) for m in moving for p in m.parameters()}
        return [p for p in model.parameters() if id(p) not in free]

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Interpreters from a published state dict: one projection ``...qkv`` [3 D, D] outside the blocks a group.

        They are taken in the dict's order (the names themselves are unverified); the value third is dropped.
        """
        own: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            found = [v for k, v in state.items() if k.endswith(f"qkv.{kind}") and "blocks." not in k]
            for g, value in enumerate(found):
                own[f"interpreters.{g}.qk.{kind}"] = value[: 2 * len(value) // 3]
        return own

    def fix(self) -> None:
        """Turn to fixed counts."""
        super().fix()
        self.targets = cumulative(self.rates)

    def inference_only(self) -> None:
        """A finished model drops nothing in groups that had no turn, so that its logits stay as they were."""
        rates = tuple(rate if self.asked(g) else 1.0 for g, rate in enumerate(self.rates))
        if rates != self.rates:
            self.rates, self.targets = rates, cumulative(rates)
            self.options["keep_ratio"] = list(rates)
        self.progress = 1.0


def _equal(groups: int | None, stages: Sequence[int] | None, depth: int) -> list[int]:
    """First blocks of equal groups."""
    if stages is not None:
        raise PrunexError(f"stages={stages!r} and groups={groups!r} say the same thing: give one of them")
    count = min(3, depth) if groups is None else groups
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= depth:
        raise PrunexError(f"groups={groups!r} is not allowed: give a whole number in 1..{depth}, the model's blocks")
    return [depth * g // count for g in range(count)]


def _straight_through(p: Tensor) -> Tensor:
    """Hard Bernoulli draws of p with the gradient of their Gumbel relaxation."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return F.gumbel_softmax(torch.stack([p.log(), (1 - p).log()], -1), tau=1.0, hard=True, dim=-1)[..., 0]


def bounded(p: Tensor, bound: float) -> Tensor:
    """No decision is ever certain: a p + (1 - a)(1 - p).

    >>> bounded(torch.tensor([0.0, 0.5, 1.0]), 0.8)
    tensor([0.2000, 0.5000, 0.8000])
    """
    return bound * p + (1 - bound) * (1 - p)


def reward(share: Tensor, right: Tensor, penalty: float) -> Tensor:
    """1 - share^2 where the prediction is right, else -penalty; share of the patches kept and all else [B]."""
    return torch.where(right, 1 - share.square(), -penalty)


def policy_loss(p: Tensor, drawn: Tensor, there: Tensor, advantage: Tensor, bound: float) -> Tensor:
    """A scalar whose gradient estimates that of minus the expected reward (REINFORCE with a baseline).

    Args:
        p: float [B, n], keep probabilities, part of the graph.
        drawn: [B, n], 1 for kept patches, drawn from ``bounded(p, bound)``.
        there: bool [B, n], patches about which anything was decided.
        advantage: [B], the reward above the baseline's.
        bound: See :func:`bounded`.
    """
    likely = bounded(p, bound).clamp(1e-6, 1 - 1e-6)
    chance = torch.where(drawn > 0, likely, 1 - likely).log()
    return -(advantage * (chance * there).sum(1)).mean()
