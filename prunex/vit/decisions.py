"""What a pruner is shown, what it may answer, and how an answer is carried out on the token stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.vit.anatomy import Anatomy
from prunex.vit.arithmetic import PLAIN, Arithmetic
from prunex.vit.attention import KeyWeights
from prunex.vit.positions import Positions
from prunex.vit.trace import Stage, TokenTrace


@dataclass(eq=False, repr=False)
class TokenState(Brief):
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
        ragged: Whether a ``Drop`` left images of different lengths, so that some slots hold nobody.
        masks: The differentiable policies [B, n] set so far, one a masking decision.
        keys: Weights of tokens as attention keys, or None; they follow their tokens.
        ops: How elementary operations are carried out; None: plainly.
        decisions: What was decided so far, in order.
        leaving: The patch tokens [B, n, D] each stage was given, where somebody watches; else None.
        sizes: float [B, prefix + n] or None: how many patches each token stands for; None: one each. Prefix tokens and
            slots that nobody is left in have 1.
        proportional: Whether attention counts a key as often as its size says.
        key_mean: [B, prefix + n, d] or None: the keys of the block's attention, mean over heads, off the graph; present
            between the halves of a block that a pruner asked them for.
        model: The ViT itself, for pruners that look ahead (:func:`prunex.vit.forward.look_ahead`).
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
    ragged: bool = False
    masks: list[Tensor] = field(default_factory=list)
    keys: KeyWeights | None = None
    ops: Arithmetic | None = None
    decisions: list[Decision] = field(default_factory=list)
    model: Any = None
    leaving: list[Tensor] | None = None
    sizes: Tensor | None = None
    proportional: bool = False
    key_mean: Tensor | None = None
    positions: Positions | None = None

    @property
    def attending(self) -> KeyWeights | None:
        """What the next attention weighs its keys by: the given weights, and sizes where attention counts them."""
        if self.sizes is None or not self.proportional:
            return self.keys
        return KeyWeights(sizes=self.sizes) if self.keys is None else replace(self.keys, sizes=self.sizes)

    @property
    def patches(self) -> Tensor:
        """The patch tokens [B, n, D] of the stream, dropped slots included."""
        return self.tokens[:, self.anatomy.prefix :]

    @property
    def present(self) -> Tensor | None:
        """The policy of the patch tokens [B, n], or None when all of them are there."""
        return None if self.policy is None else self.policy[:, self.anatomy.prefix :]


@dataclass(eq=False, repr=False)
class Keep(Brief):
    """A pruner's answer: which patch tokens continue.

    Attributes:
        index: int64 [B, k], positions among the patch tokens now, in rising order. Every image keeps as many.
        score: [B, n] or None, what they were ranked by.
        fuse: [B, n] or None: weights of all patch tokens; the dropped ones' weighted sum becomes one extra, last token.
    """

    index: Tensor
    score: Tensor | None = None
    fuse: Tensor | None = None


@dataclass(eq=False, repr=False)
class Mask(Brief):
    """A pruner's answer in training: a (differentiable) policy [B, n] in 0..1 over the patch tokens, and its scores."""

    policy: Tensor
    score: Tensor | None = None


@dataclass(eq=False, repr=False)
class Merge(Brief):
    """A pruner's answer: which patch tokens become one, their mean weighted by size. Nobody is lost.

    Attributes:
        group: int64 [B, n], the token each becomes a part of, 0..count-1: its position afterwards. -1 for slots that
            hold no token.
        count: Number of groups (an upper bound where images differ).
        proportional: Whether later attention counts a key as often as its size says: log size is added to its scores.
    """

    group: Tensor
    count: int
    proportional: bool = True


@dataclass(eq=False, repr=False)
class Fill(Brief):
    """A pruner's answer: patch tokens that are replaced where they stand; their number stays as it is.

    Attributes:
        present: [B, n], above 0 for the tokens that continue as themselves.
        filler: [B, n, D], what stands in the place of the others.
        score: [B, n] or None.
    """

    present: Tensor
    filler: Tensor
    score: Tensor | None = None


@dataclass(eq=False, repr=False)
class Drop(Brief):
    """A pruner's answer where images keep as many patch tokens as they like.

    Tokens really leave where nothing is masked: each image's own move to its first slots, the slots left over are
    empty under the policy, and between pruners nothing is computed for them.

    Attributes:
        present: bool [B, n], which patch tokens continue, of those that are there; any number, 0 included.
        score: [B, n] or None, what they were ranked by.
        fuse: [B, n] or None: weights of all patch tokens; the dropped ones' weighted sum becomes one extra, last token
            of every image that dropped something.
        width: Slots for patch tokens that stay, at least as many as any image keeps; None: just enough. A repeated
            decision has the width of the run it comes from, since later ones point to its slots.
    """

    present: Tensor
    score: Tensor | None = None
    fuse: Tensor | None = None
    width: int | None = None


@dataclass(eq=False, repr=False)
class Pool(Brief):
    """A pruner's answer: windows of patch tokens continue as their maxima, channel by channel.

    Windows are 3 tokens wide and begin 2 apart, so they overlap and a token may be part of several. The maximum is over
    tokens that are there; a window without any leaves an absent token.

    Attributes:
        grid: (h, w) of the tokens: windows of 3 x 3 with a border of one nothing around the grid, ceil(h / 2) x
            ceil(w / 2) of them. None: windows along the sequence as it is, without a border, (n - 3) // 2 + 1 of them;
            of an even number of tokens the last is in none.
        position: [1, n_out, D] or None, added to the maxima.
    """

    grid: tuple[int, int] | None = None
    position: Tensor | None = None

    def layout(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Who is in which window.

        Args:
            tokens: How many patch tokens there are.
            device: Where the answer shall be.

        Returns:
            Members of each window, int64 [n_out, k] (-1 for the border); the windows of each token [n, m] (-1 where
            there are fewer than m); and the token's place in each of them [n, m].
        """
        if self.grid is None:
            return _windows_along(tokens, 0, device)
        (my, wy, sy), (mx, wx, sx) = (_windows_along(n, 1, device) for n in self.grid)

        def both(y: Tensor, x: Tensor, width: int) -> Tensor:
            y, x = y[:, None, :, None], x[None, :, None, :]
            return torch.where((y < 0) | (x < 0), -1, y * width + x).flatten(2).flatten(0, 1)

        return both(my, mx, self.grid[1]), both(wy, wx, len(mx)), both(sy, sx, 3)


def _windows_along(n: int, border: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`Pool.layout` of one axis: [n_out, 3] and twice [n, 2]."""
    count = (n + 2 * border - 3) // 2 + 1
    members = 2 * torch.arange(count, device=device)[:, None] - border + torch.arange(3, device=device)
    members = members.masked_fill((members < 0) | (members >= n), -1)
    at = torch.arange(n, device=device) + border
    window, place = torch.stack([at // 2, at // 2 - 1], 1), torch.stack([at % 2, at % 2 + 2], 1)
    return members, window.masked_fill((window < 0) | (window >= count) | (place > 2), -1), place.clamp(max=2)


@dataclass
class Decision:
    """One answer of a pruner and where it was given: before ``block``, between its halves, or after it."""

    block: int
    inside: bool
    answer: One
    after: bool = False


One = Keep | Mask | Merge | Drop | Fill | Pool
Answer = One | Sequence[One] | None


class Pruner(Protocol):
    """What the forward asks of a token pruner; see ``prunex.pruners.base``."""

    def rows(self) -> frozenset[int]:
        """Blocks whose read-out attention row it needs between the halves."""

    def key_means(self) -> frozenset[int]:
        """Blocks whose keys, mean over heads, it needs between the halves."""

    def acts_between(self, block: int) -> bool:
        """Whether it may decide between the halves of this block."""

    def before(self, block: int, state: TokenState) -> Answer:
        """Decide before a block."""

    def between(self, block: int, state: TokenState) -> Answer:
        """Decide between a block's attention and its MLP."""

    def acts_after(self, block: int) -> bool:
        """Whether it may decide after this block."""

    def after(self, block: int, state: TokenState) -> Answer:
        """Decide after a block."""


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

    def key_means(self) -> frozenset[int]:
        """None: nothing is matched again."""
        return frozenset()

    def acts_between(self, block: int) -> bool:
        """Whether something was decided between the halves of this block."""
        return any(d.inside and d.block == block for d in self.decisions)

    def before(self, block: int, state: TokenState) -> Answer:
        """What was decided before the block."""
        return [self._pick(d.answer) for d in self.decisions if d.block == block and not d.inside and not d.after]

    def between(self, block: int, state: TokenState) -> Answer:
        """What was decided between the block's halves."""
        return [self._pick(d.answer) for d in self.decisions if d.block == block and d.inside]

    def acts_after(self, block: int) -> bool:
        """Whether something was decided after this block."""
        return any(d.after and d.block == block for d in self.decisions)

    def after(self, block: int, state: TokenState) -> Answer:
        """What was decided after the block."""
        return [self._pick(d.answer) for d in self.decisions if d.block == block and d.after]

    def _pick(self, answer: One) -> One:
        def pick(values: Tensor) -> Tensor:
            values = values.detach()
            return values if self.index is None else values[self.index]

        if isinstance(answer, Mask):
            return Mask(pick(answer.policy))
        if isinstance(answer, Merge):
            return Merge(pick(answer.group), answer.count, answer.proportional)
        if isinstance(answer, Fill):
            return Fill(pick(answer.present), pick(answer.filler))
        if isinstance(answer, Drop):
            fuse = None if answer.fuse is None else pick(answer.fuse)
            return Drop(pick(answer.present), fuse=fuse, width=answer.width)
        if isinstance(answer, Pool):  # the same windows for every image
            return replace(answer, position=None if answer.position is None else answer.position.detach())
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

    def key_means(self) -> frozenset[int]:
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

    def acts_after(self, block: int) -> bool:
        """Never."""
        return False

    def after(self, block: int, state: TokenState) -> Answer:
        """Nothing."""
        return None


def apply(answer: Answer, block: int, inside: bool, state: TokenState, after: bool = False) -> list[Stage]:
    """Carry an answer out (gather, fuse, mask, merge or pool) and write it into the trace.

    Returns:
        The stages that were added.
    """
    if answer is None:
        return []
    added = []
    for one in answer if isinstance(answer, Sequence) else [answer]:
        if state.leaving is not None:
            state.leaving.append(state.patches)
        if isinstance(one, Mask):
            stage = _mask(one, block, state)
        elif isinstance(one, Merge):
            stage = _merge(one, block, state)
        elif isinstance(one, Fill):
            stage = _fill(one, block, state)
        elif isinstance(one, Drop):
            one, stage = _drop_masked(one, block, state) if state.masked else _drop(one, block, state)
        elif isinstance(one, Pool):
            stage = _pool(one, block, state)
        elif state.masked or state.policy is not None:  # after a Drop images differ, and slots stay
            stage = _keep_masked(one, block, state)
        else:
            stage = _keep(one, block, state)
        if state.keys is not None and state.keys.factor is not None:
            state.keys = replace(state.keys, factor=stage.push(state.keys.factor, state.anatomy.prefix))
        if state.sizes is not None:
            state.sizes = stage.total(state.sizes, state.anatomy.prefix)
        if state.positions is not None:
            state.positions = state.positions.after(stage)
        state.trace.stages.append(stage)
        state.decisions.append(Decision(block, inside, one, after))
        added.append(stage)
    return added


def carried_out(d: Keep, block: int, entered: int, state: TokenState) -> None:
    """Write down a decision between the halves that the attention half carried out already: only these came out of it.

    Args:
        d: The decision, nothing fused.
        block: The block.
        entered: Patch tokens that entered it.
        state: Of the forward, its tokens those that came out.
    """
    b, k = d.index.shape
    group = torch.full((b, entered), -1, dtype=torch.long, device=d.index.device)
    group = group.scatter(1, d.index, torch.arange(k, device=d.index.device).expand(b, -1))
    weight = (group >= 0).to(torch.promote_types(state.tokens.dtype, torch.float32))
    state.left = k
    stage = Stage(block, group, weight, k, False, d.score, k)
    if state.positions is not None:
        state.positions = state.positions.after(stage)
    state.trace.stages.append(stage)
    state.decisions.append(Decision(block, True, d))


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
    state.ragged = False
    state.policy = torch.cat([d.policy.new_ones(b, state.anatomy.prefix), d.policy], 1)
    group = torch.arange(n, device=hard.device).expand(b, -1).masked_fill(~hard, -1)
    return Stage(block, group, hard.to(d.policy.dtype), n, False, d.score, hard.sum(1))


def _merge(d: Merge, block: int, state: TokenState) -> Stage:
    """Groups become tokens 0..count-1 in both modes; in masked mode the slots that became free stay behind them."""
    prefix, body, there = state.anatomy.prefix, state.patches, state.present
    b, n, _ = body.shape
    if state.sizes is None:
        state.sizes = body.new_ones(b, prefix + n, dtype=torch.promote_types(body.dtype, torch.float32))
    group = d.group if there is None else d.group.masked_fill(there <= 0, -1)
    at, size = group.clamp(min=0), state.sizes[:, prefix:].masked_fill(group < 0, 0)
    total = size.new_zeros(b, d.count).scatter_add(1, at, size)
    share = size / total.gather(1, at).clamp(min=1)
    merged = (state.ops or PLAIN).merge(share.to(body.dtype), at, d.count, body)
    state.proportional, state.left = d.proportional, d.count
    if not state.masked and there is None:
        state.tokens = torch.cat([state.tokens[:, :prefix], merged], 1)
        return Stage(block, group, share, d.count, counted=d.count, merged=True)
    behind = body[:, d.count :]  # whatever: nobody reads it
    state.tokens = torch.cat([state.tokens[:, :prefix], merged, behind], 1)
    left = (total > 0).to(size.dtype)
    state.policy = torch.cat([left.new_ones(b, prefix), left, left.new_zeros(b, behind.shape[1])], 1)
    counted = d.count if there is None else left.sum(1)
    return Stage(block, group, share, d.count + behind.shape[1], counted=counted, merged=True)


def _fill(d: Fill, block: int, state: TokenState) -> Stage:
    kept = d.present.detach() > 0
    b, n = kept.shape
    body = torch.where(kept.unsqueeze(-1), state.patches, d.filler.to(state.tokens.dtype))
    state.tokens = torch.cat([state.tokens[:, : state.anatomy.prefix], body], 1)
    group = torch.arange(n, device=kept.device).expand(b, -1).masked_fill(~kept, -1)
    weight = kept.to(torch.promote_types(body.dtype, torch.float32))
    return Stage(block, group, weight, n, False, d.score, state.left)


def _drop(d: Drop, block: int, state: TokenState) -> tuple[Drop, Stage]:
    """Move each image's tokens to its first slots; the decision comes back with the width that this took."""
    prefix, x = state.anatomy.prefix, state.tokens
    body = state.patches
    b, n, width = body.shape
    there = torch.ones_like(d.present) if state.present is None else state.present > 0
    kept = d.present & there
    counts = kept.sum(1)
    k = max(1, int(counts.max())) if d.width is None else d.width
    index = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k]
    group = (kept.cumsum(1) - 1).masked_fill(~kept, -1)
    weight = kept.to(torch.promote_types(x.dtype, torch.float32))
    parts = [x[:, :prefix], body.gather(1, index.unsqueeze(-1).expand(-1, -1, width))]
    policy = torch.arange(k, device=x.device) < counts[:, None]
    if d.fuse is not None:
        gone = there & ~kept
        dropped = d.fuse * gone
        parts.append((state.ops or PLAIN).combine(dropped.unsqueeze(1).to(x.dtype), body))
        weight = torch.where(gone, _shares(dropped), weight)
        group = group.masked_fill(gone, k)
        policy = torch.cat([policy, gone.any(1, keepdim=True)], 1)
    policy = torch.cat([policy.new_ones(b, prefix), policy], 1)
    state.tokens = torch.cat(parts, 1)
    state.ragged = not bool(policy.all())
    state.policy = policy.to(weight.dtype) if state.ragged else None
    state.left = state.tokens.shape[1] - prefix
    counted = policy[:, prefix:].sum(1).to(weight.dtype)
    return replace(d, width=k), Stage(block, group, weight, state.left, d.fuse is not None, d.score, counted)


def _drop_masked(d: Drop, block: int, state: TokenState) -> tuple[Drop, Stage]:
    prefix = state.anatomy.prefix
    body = state.patches
    b, n, _ = body.shape
    there = state.present if state.present is not None else body.new_ones(b, n, dtype=torch.float32)
    kept = d.present.to(there.dtype) * there
    group = torch.arange(n, device=body.device).expand(b, -1).masked_fill(kept <= 0, -1)
    weight = (kept > 0).to(there.dtype)
    if d.fuse is not None:
        gone = (there > 0) & (kept <= 0)
        dropped = d.fuse * gone
        extra = (state.ops or PLAIN).combine(dropped.unsqueeze(1).to(body.dtype), body)
        state.tokens = torch.cat([state.tokens, extra], 1)
        weight = torch.where(gone, _shares(dropped), weight)
        group = group.masked_fill(gone, n)
        kept = torch.cat([kept, gone.any(1, keepdim=True).to(kept.dtype)], 1)
    state.policy = torch.cat([kept.new_ones(b, prefix), kept], 1)
    counted = (kept > 0).sum(1).to(weight.dtype)
    state.left = int(counted.max())
    return d, Stage(block, group, weight, kept.shape[1], d.fuse is not None, d.score, counted)


def _pool(d: Pool, block: int, state: TokenState) -> Stage:
    prefix, x = state.anatomy.prefix, state.tokens
    body, present, ops = state.patches, state.present, state.ops or PLAIN
    b, n, width = body.shape
    members, group, place = d.layout(n, x.device)
    at = members.clamp(min=0)
    seen = (members >= 0).expand(b, -1, -1)
    if present is not None:
        seen = seen & (present[:, at] > 0)
    windows = body[:, at]
    if present is not None or d.grid is not None:
        windows = windows.masked_fill(~seen.unsqueeze(-1), float("-inf"))
    best, winner = ops.largest(windows)
    if present is not None:
        best = torch.where(seen.any(2, keepdim=True), best, 0)
    if d.position is not None:
        best = ops.add(best, d.position.expand_as(best))
    state.tokens = torch.cat([x[:, :prefix], best], 1)
    # A token's share of a window is the share of channels whose maximum it has.
    won = torch.stack([(winner == i).sum(-1) for i in range(members.shape[1])], -1)
    share = won.to(torch.promote_types(x.dtype, torch.float32)) / width * seen
    weight = share[:, group.clamp(min=0), place].masked_fill(group < 0, 0)
    counted: Tensor | int = len(members)
    if present is not None:
        there = (present[:, at] * (members >= 0)).amax(2)
        state.policy = torch.cat([there.new_ones(b, prefix), there], 1)
        counted = (there > 0).sum(1)
    state.left = len(members)
    return Stage(block, group.expand(b, -1, -1), weight, len(members), counted=counted)
