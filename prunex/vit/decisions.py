"""What a pruner is shown, what it may answer, and how an answer is carried out on the token stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from prunex.vit.anatomy import Anatomy
from prunex.vit.arithmetic import PLAIN, Arithmetic
from prunex.vit.attention import KeyWeights
from prunex.vit.positions import Positions
from prunex.vit.trace import Stage, TokenTrace


@dataclass
class TokenState:
    """What a pruner is shown.

    Attributes:
        tokens: [B, prefix + n, D], the residual stream.
        anatomy: Of the model.
        trace: What was removed so far.
        masked: Whether dropped tokens keep their slots under a policy (training, or on request) instead of leaving.
        training: Whether the model is in training mode.
        policy: [B, prefix + n] or None: 1 for tokens that are there, 0 for dropped ones in their slots.
        row: [B, prefix + n] or None: attention paid to each token by the class token (by the pooled tokens where there
            is none), mean over heads; present between the halves of a block that a pruner asked it for.
        left: Patch tokens that are there (an upper bound where images differ).
        masks: The differentiable policies [B, n] set so far, one a masking decision.
        keys: Weights of tokens as attention keys, or None; they follow their tokens.
        ops: How elementary operations are carried out; None: plainly.
        decisions: What was decided so far, in order.
        positions: Rotary tables and relative biases of the tokens, for models that have them; they follow every stage.
    """

    tokens: Tensor
    anatomy: Anatomy
    trace: TokenTrace
    masked: bool
    training: bool
    policy: Tensor | None = None
    row: Tensor | None = None
    left: int = 0
    masks: list[Tensor] = field(default_factory=list)
    keys: KeyWeights | None = None
    ops: Arithmetic | None = None
    decisions: list[Decision] = field(default_factory=list)
    positions: Positions | None = None

    @property
    def patches(self) -> Tensor:
        """The patch tokens [B, n, D] of the stream, dropped slots included."""
        return self.tokens[:, self.anatomy.prefix :]

    @property
    def present(self) -> Tensor | None:
        """The policy of the patch tokens [B, n], or None when all of them are there."""
        return None if self.policy is None else self.policy[:, self.anatomy.prefix :]


@dataclass
class Keep:
    """A pruner's answer: which patch tokens continue.

    Attributes:
        index: int64 [B, k], positions among the patch tokens now, in rising order. Every image keeps as many.
        score: [B, n] or None, what they were ranked by.
        fuse: [B, n] or None: weights of all patch tokens; the dropped ones' weighted sum becomes one extra, last token.
    """

    index: Tensor
    score: Tensor | None = None
    fuse: Tensor | None = None


@dataclass
class Mask:
    """A pruner's answer in training: a (differentiable) policy [B, n] in 0..1 over the patch tokens, and its scores."""

    policy: Tensor
    score: Tensor | None = None


@dataclass
class Decision:
    """One answer of a pruner and where it was given: before ``block``, or between its halves."""

    block: int
    inside: bool
    answer: Keep | Mask


Answer = Keep | Mask | Sequence[Keep | Mask] | None


class Pruner(Protocol):
    """What the forward asks of a token pruner; see ``prunex.pruners.base``."""

    def rows(self) -> frozenset[int]:
        """Blocks whose read-out attention row it needs between the halves."""

    def acts_between(self, block: int) -> bool:
        """Whether it may decide between the halves of this block."""

    def before(self, block: int, state: TokenState) -> Answer:
        """Decide before a block."""

    def between(self, block: int, state: TokenState) -> Answer:
        """Decide between a block's attention and its MLP."""


class Replay:
    """A pruner that repeats what was decided for a batch, for any selection of its images.

    Explainers that run a model many times on altered inputs freeze the selection of the clean run with it: a changed
    prediction is then never a changed selection.

    Args:
        decisions: Of the clean run.
        index: int64 [R], the image of the clean batch each sequence comes from; None: the same batch.
    """

    def __init__(self, decisions: Sequence[Decision], index: Tensor | None = None) -> None:
        self.decisions = decisions
        self.index = index

    def rows(self) -> frozenset[int]:
        """None: nothing is ranked again."""
        return frozenset()

    def acts_between(self, block: int) -> bool:
        """Whether something was decided between the halves of this block."""
        return any(d.inside and d.block == block for d in self.decisions)

    def before(self, block: int, state: TokenState) -> Answer:
        """What was decided before the block."""
        return [self._pick(d.answer) for d in self.decisions if d.block == block and not d.inside]

    def between(self, block: int, state: TokenState) -> Answer:
        """What was decided between the block's halves."""
        return [self._pick(d.answer) for d in self.decisions if d.block == block and d.inside]

    def _pick(self, answer: Keep | Mask) -> Keep | Mask:
        def pick(values: Tensor) -> Tensor:
            values = values.detach()
            return values if self.index is None else values[self.index]

        if isinstance(answer, Mask):
            return Mask(pick(answer.policy))
        return Keep(pick(answer.index), fuse=None if answer.fuse is None else pick(answer.fuse))


class Absent:
    """A pruner that takes patches away before the first block, as if they had never been embedded.

    Args:
        present: bool [B, P], which patches are there. Every image has as many: the others really leave. Or ``masked``:
            images may differ, absent patches keep their slots and nobody reads them.
        masked: Keep the slots.
    """

    def __init__(self, present: Tensor, masked: bool = False) -> None:
        self.present = present
        self.masked = masked

    def rows(self) -> frozenset[int]:
        """None."""
        return frozenset()

    def acts_between(self, block: int) -> bool:
        """Never."""
        return False

    def before(self, block: int, state: TokenState) -> Answer:
        """Take the patches away before block 0."""
        if block:
            return None
        if self.masked:
            return Mask(self.present.to(torch.promote_types(state.tokens.dtype, torch.float32)))
        count = int(self.present[0].sum())
        return Keep(self.present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count])

    def between(self, block: int, state: TokenState) -> Answer:
        """Nothing."""
        return None


def apply(answer: Answer, block: int, inside: bool, state: TokenState) -> list[Stage]:
    """Carry an answer out (gather, fuse or mask) and write it into the trace.

    Returns:
        The stages that were added.
    """
    if answer is None:
        return []
    added = []
    for one in answer if isinstance(answer, Sequence) else [answer]:
        if isinstance(one, Mask):
            stage = _mask(one, block, state)
        elif state.masked:
            stage = _keep_masked(one, block, state)
        else:
            stage = _keep(one, block, state)
        if state.keys is not None:
            state.keys = replace(state.keys, factor=stage.push(state.keys.factor, state.anatomy.prefix))
        if state.positions is not None:
            state.positions = state.positions.after(stage)
        state.trace.stages.append(stage)
        state.decisions.append(Decision(block, inside, one))
        added.append(stage)
    return added


def _keep(d: Keep, block: int, state: TokenState) -> Stage:
    prefix, x = state.anatomy.prefix, state.tokens
    body = state.patches
    b, n, width = body.shape
    k = d.index.shape[1]
    group = torch.full((b, n), -1, dtype=torch.long, device=x.device)
    group.scatter_(1, d.index, torch.arange(k, device=x.device).expand(b, -1))
    weight = (group >= 0).to(torch.promote_types(x.dtype, torch.float32))
    parts = [x[:, :prefix], body.gather(1, d.index.unsqueeze(-1).expand(-1, -1, width))]
    if d.fuse is not None:
        dropped = d.fuse * (group < 0)
        parts.append((state.ops or PLAIN).combine(dropped.unsqueeze(1).to(x.dtype), body))
        weight = torch.where(group < 0, _shares(dropped), weight)
        group = group.masked_fill(group < 0, k)
    state.tokens = torch.cat(parts, 1)
    state.left = state.tokens.shape[1] - prefix
    return Stage(block, group, weight, state.left, d.fuse is not None, d.score, state.left)


def _shares(dropped: Tensor) -> Tensor:
    """Weights of dropped tokens as shares of 1; equal shares where all weights are 0."""
    total = dropped.sum(1, keepdim=True)
    return torch.where(total > 0, dropped / total.clamp(min=torch.finfo(dropped.dtype).tiny), 0)


def _keep_masked(d: Keep, block: int, state: TokenState) -> Stage:
    prefix = state.anatomy.prefix
    body = state.patches
    b, n, _ = body.shape
    there = state.present if state.present is not None else body.new_ones(b, n, dtype=torch.float32)
    kept = torch.zeros_like(there).scatter(1, d.index, 1.0) * there
    group = torch.arange(n, device=body.device).expand(b, -1).masked_fill(kept <= 0, -1)
    weight = kept
    left = d.index.shape[1]
    if d.fuse is not None:
        dropped = d.fuse * (there - kept)
        state.tokens = torch.cat(
            [state.tokens, (state.ops or PLAIN).combine(dropped.unsqueeze(1).to(body.dtype), body)], 1
        )
        weight = kept + _shares(dropped) * (there - kept)
        group = torch.where((there - kept) > 0, n, group)
        kept = torch.cat([kept, kept.new_ones(b, 1)], 1)
        left += 1
    state.policy = torch.cat([kept.new_ones(b, prefix), kept], 1)
    state.left = left
    return Stage(block, group, weight, kept.shape[1], d.fuse is not None, d.score, left)


def _mask(d: Mask, block: int, state: TokenState) -> Stage:
    b, n = d.policy.shape
    hard = d.policy.detach() > 0
    state.masks.append(d.policy)
    state.policy = torch.cat([d.policy.new_ones(b, state.anatomy.prefix), d.policy], 1)
    group = torch.arange(n, device=hard.device).expand(b, -1).masked_fill(~hard, -1)
    return Stage(block, group, hard.to(d.policy.dtype), n, False, d.score, hard.sum(1))
