"""What a pruner may answer. Each kind of decision carries itself out on the token stream, and can be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.vit.state import TokenState
from prunex.vit.sums import grouped
from prunex.vit.trace import Stage

if TYPE_CHECKING:
    from prunex.vit.replay import Slots

When = Literal["before", "inside", "after"]


class Decision(Brief):
    """Base of a pruner's answers."""

    def apply(self, state: TokenState, block: int) -> Stage:
        """Carry it out on the stream, and say what it did."""
        raise NotImplementedError

    def pick(self, index: Tensor | None) -> Decision:
        """The same decision off the graph, for a selection of the batch's images, int64 [R]; None: all of them."""
        raise NotImplementedError

    def among(self, present: Tensor, slots: Slots) -> tuple[list[Decision], Tensor]:
        """What does the same where some tokens are absent (``present`` bool [R, n]), and which slots hold one then."""
        raise NotImplementedError


@dataclass(eq=False, repr=False)
class Keep(Decision):
    """Which patch tokens continue, as many in every image."""

    index: Tensor  # int64 [B, k], positions among the patch tokens now, in rising order
    score: Tensor | None = None  # [B, n] or None, what they were ranked by
    # [B, n] or None: weights of all patch tokens; the dropped ones' weighted sum becomes one extra, last token
    fuse: Tensor | None = None

    def apply(self, state: TokenState, block: int) -> Stage:
        """The others leave, or keep their slots where something is masked."""
        fused, k = int(self.fuse is not None), self.index.shape[1]
        state.left = k + fused
        if state.masked or state.policy is not None:  # after a Drop images differ, and slots stay
            present = _policy_of(state)
            kept = torch.zeros_like(present).scatter(1, self.index, 1.0) * present
            fused_slot = kept.new_ones(kept.shape[0], 1) if fused else None
            group, weight = _hide(state, kept, self.fuse, fused_slot)
            return Stage(block, group, weight, weight.shape[1] + fused, bool(fused), self.score, state.left)
        group = self._groups(state.patches.shape[1])
        group, weight = _gather(state, self.index, group, group < 0, self.fuse)
        return Stage(block, group, weight, state.left, bool(fused), self.score, state.left)

    def carried_out(self, state: TokenState, block: int, entered: int) -> Stage:
        """What it did where attention computed these of ``entered`` patch tokens alone, so that no other came out."""
        group = self._groups(entered)
        state.left = self.index.shape[1]
        return Stage(block, group, _wide(group >= 0, state.tokens), state.left, False, self.score, state.left)

    def _groups(self, entered: int) -> Tensor:
        """The position of each entering token afterwards, int64 [B, n]; -1 for those that are dropped."""
        b, k = self.index.shape
        group = torch.full((b, entered), -1, dtype=torch.long, device=self.index.device)
        return group.scatter(1, self.index, torch.arange(k, device=self.index.device).expand(b, -1))

    def pick(self, index: Tensor | None) -> Keep:
        """Without its scores."""
        return Keep(_pick(self.index, index), fuse=None if self.fuse is None else _pick(self.fuse, index))

    def among(self, present: Tensor, slots: Slots) -> tuple[list[Decision], Tensor]:
        """Those of them that are there; nothing is fused where nothing was left to fuse."""
        index = slots.index(self.index, present.shape[1])
        left = torch.zeros_like(present).scatter(1, index, True) & present
        if self.fuse is None:
            return [Keep(index)], left
        after = torch.cat([left, (present & ~left).any(1, keepdim=True)], 1)
        return [Keep(index, fuse=slots.values(self.fuse)), Mask(after.to(self.fuse.dtype))], after


@dataclass(eq=False, repr=False)
class Mask(Decision):
    """In training: a (differentiable) policy [B, n] in 0..1 over the patch tokens, and its scores."""

    policy: Tensor
    score: Tensor | None = None

    def apply(self, state: TokenState, block: int) -> Stage:
        """All tokens stay; attention reads those that the policy leaves."""
        hard = self.policy.detach() > 0
        _set_policy(state, self.policy)
        weight = hard.to(self.policy.dtype)
        return Stage(block, _stay(hard), weight, hard.shape[1], False, self.score, hard.sum(1), stays=True)

    def pick(self, index: Tensor | None) -> Mask:
        """Without its scores."""
        return Mask(_pick(self.policy, index))

    def among(self, present: Tensor, slots: Slots) -> tuple[list[Decision], Tensor]:
        """Of those that are there."""
        left = slots.values(self.policy) * present
        return [Mask(left)], left > 0


@dataclass(eq=False, repr=False)
class Merge(Decision):
    """Which patch tokens become one, their mean weighted by size."""

    # int64 [B, n], the token each becomes a part of, 0..count-1: its position afterwards. -1 for slots that hold no
    # token, and for tokens that leave.
    group: Tensor
    count: int  # number of groups (an upper bound where images differ)
    # whether later attention counts a key as often as its size says: log size is added to its scores
    proportional: bool = True
    score: Tensor | None = None  # [B, n] or None, what they were ranked by
    even: bool = False  # whether every token counts once in its group's mean, whatever its size
    # float [B, n] or None: what each token's size is multiplied by before its group's is their sum, 1 at least
    worth: Tensor | None = None
    # In training: a (differentiable) policy [B, n] in 0..1. All tokens stay, groups are named by the slot that their
    # mean takes, and attention reads those that the policy leaves.
    policy: Tensor | None = None

    def apply(self, state: TokenState, block: int) -> Stage:
        """Groups become tokens 0..count-1; masked, the slots that became free stay behind them."""
        prefix, body, present = state.anatomy.prefix, state.patches, state.present
        b, n, _ = body.shape
        # Sizes begin with the first merge: until then every token stands for one patch.
        if state.sizes is None:
            state.sizes = body.new_ones(b, prefix + n, dtype=torch.promote_types(body.dtype, torch.float32))
        group = self.group if present is None else self.group.masked_fill(present <= 0, -1)
        slots = self.count if self.policy is None else n
        size = (torch.ones_like(group) if self.even else state.sizes[:, prefix:]).to(state.sizes.dtype)
        size = size.masked_fill(group < 0, 0)
        if self.worth is not None:
            worth = torch.cat([self.worth.new_ones(b, prefix), self.worth], 1)
            state.sizes = state.sizes * worth.to(state.sizes.dtype)
        total = grouped(size, group, slots)
        share = size / total.gather(1, group.clamp(min=0)).clamp(min=1)
        # Through the arithmetic, so that relevance is led back through the mean.
        merged = state.ops.merge(share.to(body.dtype), group, slots, body)
        state.proportional, state.left = self.proportional, self.count
        if self.policy is not None:
            body = torch.where(total.unsqueeze(2) > 0, merged, body)
            state.tokens = torch.cat([state.tokens[:, :prefix], body], 1)
            _set_policy(state, self.policy)
            return Stage(block, group, share, n, score=self.score, counted=self.count, merged=True, stays=True)
        if not state.masked and present is None:
            state.tokens = torch.cat([state.tokens[:, :prefix], merged], 1)
            return Stage(block, group, share, self.count, score=self.score, counted=self.count, merged=True)
        behind = body[:, self.count :]  # whatever: nobody reads it
        state.tokens = torch.cat([state.tokens[:, :prefix], merged, behind], 1)
        left = (total > 0).to(size.dtype)
        state.policy = torch.cat([left.new_ones(b, prefix), left, left.new_zeros(b, behind.shape[1])], 1)
        counted = self.count if present is None else left.sum(1)
        slots += behind.shape[1]
        return Stage(block, group, share, slots, score=self.score, counted=counted, merged=True)

    def pick(self, index: Tensor | None) -> Merge:
        """Of some images, without its scores."""
        worth = None if self.worth is None else _pick(self.worth, index)
        return replace(self, group=_pick(self.group, index), worth=worth, score=None)

    def among(self, present: Tensor, slots: Slots) -> tuple[list[Decision], Tensor]:
        """A group is the mean of its members that are there; where nobody is, its slot stays empty."""
        group = slots.values(self.group + 1) - 1  # -1 for slots that are no token of the clean run
        group = group.masked_fill(~present, -1)
        width = max(self.count, present.shape[1])
        left = present.new_zeros(present.shape[0], width + 1).scatter(1, group.masked_fill(group < 0, width), True)[
            :, :width
        ]
        worth = None if self.worth is None else slots.values(self.worth)
        slots.merged(self.group.shape[1], self.count, width)
        return [replace(self, group=group, worth=worth, score=None)], left


@dataclass(eq=False, repr=False)
class Drop(Decision):
    """Which patch tokens continue, where images keep as many as they like.

    Tokens really leave where nothing is masked: each image's own move to its first slots, the slots left over are
    empty under the policy, and between pruners nothing is computed for them.
    """

    present: Tensor  # bool [B, n], which patch tokens continue, of those that are there; any number, 0 included
    score: Tensor | None = None  # [B, n] or None, what they were ranked by
    # [B, n] or None: weights of all patch tokens; the dropped ones' weighted sum becomes one extra, last token of every
    # image that dropped something
    fuse: Tensor | None = None
    # Slots for patch tokens that stay, at least as many as any image keeps; None: just enough. A repeated decision has
    # the width of the run it comes from, since later ones point to its slots.
    width: int | None = None

    def apply(self, state: TokenState, block: int) -> Stage:
        """Move each image's tokens to its first slots, or hide the others where something is masked."""
        fused, present = int(self.fuse is not None), _policy_of(state)
        kept = self.present & (present > 0)
        gone = (present > 0) & ~kept
        fused_slot = gone.any(1, keepdim=True) if fused else None
        if state.masked:
            soft = self.present.to(present.dtype) * present
            group, weight = _hide(state, soft, self.fuse, fused_slot)
            counted = (torch.as_tensor(state.present) > 0).sum(1).to(present.dtype)
            state.left += fused  # an upper bound: to count would be to wait for the device
            return Stage(block, group, weight, weight.shape[1] + fused, bool(fused), self.score, counted)
        counts = kept.sum(1)
        self.width = max(1, int(counts.max())) if self.width is None else self.width
        # A stable sort of flags: kept tokens come first and keep their order.
        index = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.width]
        group = (kept.cumsum(1) - 1).masked_fill(~kept, -1)
        group, weight = _gather(state, index, group, gone, self.fuse)
        policy = torch.arange(self.width, device=kept.device) < counts[:, None]
        policy = policy if fused_slot is None else torch.cat([policy, fused_slot], 1)
        policy = torch.cat([policy.new_ones(policy.shape[0], state.anatomy.prefix), policy], 1)
        state.ragged = not bool(policy.all())
        state.policy = policy.to(weight.dtype) if state.ragged else None
        state.left = self.width + fused
        counted = policy[:, state.anatomy.prefix :].sum(1).to(weight.dtype)
        return Stage(block, group, weight, state.left, bool(fused), self.score, counted)

    def pick(self, index: Tensor | None) -> Drop:
        """Without its scores."""
        fuse = None if self.fuse is None else _pick(self.fuse, index)
        return Drop(_pick(self.present, index), fuse=fuse, width=self.width)

    def among(self, present: Tensor, slots: Slots) -> tuple[list[Decision], Tensor]:
        """Those of them that are there."""
        stays = (slots.values(self.present.float()) > 0) & present
        if self.fuse is None:
            return [Drop(stays)], stays
        # A Drop makes its fused token in the images that dropped something, and nowhere else.
        after = torch.cat([stays, (present & ~stays).any(1, keepdim=True)], 1)
        return [Drop(stays, fuse=slots.values(self.fuse))], after


@dataclass(eq=False, repr=False)
class Pool(Decision):
    """Windows of patch tokens continue as their maxima, channel by channel.

    Windows are 3 tokens wide and begin 2 apart, so they overlap and a token may be part of several. The maximum is over
    tokens that are there; a window without any leaves an absent token.
    """

    # (h, w) of the tokens: windows of 3 x 3 with a border of one nothing around the grid, ceil(h / 2) x ceil(w / 2) of
    # them. None: windows along the sequence as it is, without a border, (n - 3) // 2 + 1 of them; of an even number of
    # tokens the last is in none.
    grid: tuple[int, int] | None = None
    position: Tensor | None = None  # [1, n_out, D] or None, added to the maxima

    def apply(self, state: TokenState, block: int) -> Stage:
        """A token's share of a window is the share of channels whose maximum it has."""
        prefix, x, body, present = state.anatomy.prefix, state.tokens, state.patches, state.present
        b, n, width = body.shape
        members, group, place = self.layout(n, x.device)
        at = members.clamp(min=0)
        seen = (members >= 0).expand(b, -1, -1)
        if present is not None:
            seen = seen & (present[:, at] > 0)
        windows = body[:, at]
        if present is not None or self.grid is not None:
            windows = windows.masked_fill(~seen.unsqueeze(-1), float("-inf"))
        best, winner = state.ops.largest(windows)
        # A window without any token would hand -inf on.
        if present is not None:
            best = torch.where(seen.any(2, keepdim=True), best, 0)
        if self.position is not None:
            best = state.ops.add(best, self.position.expand_as(best))
        state.tokens = torch.cat([x[:, :prefix], best], 1)
        # A maximum has no weights: what a token contributed is counted in channels.
        won = torch.stack([(winner == i).sum(-1) for i in range(members.shape[1])], -1)
        share = won.to(torch.promote_types(x.dtype, torch.float32)) / width * seen
        weight = share[:, group.clamp(min=0), place].masked_fill(group < 0, 0)
        counted: Tensor | int = len(members)
        if present is not None:
            filled = (present[:, at] * (members >= 0)).amax(2)
            state.policy = torch.cat([filled.new_ones(b, prefix), filled], 1)
            counted = (filled > 0).sum(1)
        state.left = len(members)
        return Stage(block, group.expand(b, -1, -1), weight, len(members), counted=counted)

    def pick(self, index: Tensor | None) -> Pool:
        """The same windows for every image."""
        return replace(self, position=None if self.position is None else self.position.detach())

    def among(self, present: Tensor, slots: Slots) -> tuple[list[Decision], Tensor]:
        """The same windows; a window with a token of its own is one."""
        members = self.layout(present.shape[1], present.device)[0]
        return [self], (present[:, members.clamp(min=0)] & (members >= 0)).any(2)

    def layout(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Who is in which window, of so many patch tokens: its members int64 [n_out, k] (-1 for the border).

        Then the windows of each token [n, m] (-1 where there are fewer than m), and the token's place in each of them
        [n, m].
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
class Decided:
    """One answer of a pruner and where it was given: before a block, between its halves, or after it."""

    block: int
    when: When
    answer: Decision


Answer = Decision | Sequence[Decision] | None


def apply(answer: Answer, block: int, when: When, state: TokenState, entered: int | None = None) -> list[Stage]:
    """Carry an answer out, given at a block, and write it into trace and decisions; the stages that were added.

    ``entered``: patch tokens that entered the block, where its attention computed only those that are kept.
    """
    if answer is None:
        return []
    added = []
    for decision in answer if isinstance(answer, Sequence) else [answer]:
        if state.leaving is not None:
            state.leaving.append(state.patches)
        if entered is not None and isinstance(decision, Keep):
            stage = decision.carried_out(state, block, entered)
        else:
            stage = _carry_out(decision, state, block)
        # What belongs to the tokens goes where they go.
        if state.keys is not None and state.keys.factor is not None:
            state.keys = replace(state.keys, factor=stage.push(state.keys.factor, state.anatomy.prefix))
        if state.sizes is not None:
            # A size below 1 would have a token count less than one patch, and 0 has no logarithm.
            state.sizes = stage.total(state.sizes, state.anatomy.prefix).clamp(min=1)
        if state.positions is not None:
            state.positions = state.positions.after(stage)
        state.trace.stages.append(stage)
        state.decisions.append(Decided(block, when, decision))
        added.append(stage)
    return added


def _carry_out(decision: Decision, state: TokenState, block: int) -> Stage:
    """On the stream, and beside it on what entered a parallel block, which goes where the tokens go."""
    if state.beside is None:
        return decision.apply(state, block)
    width = state.beside.shape[-1]
    state.tokens = torch.cat([state.tokens, state.beside], -1)
    stage = decision.apply(state, block)
    state.tokens, state.beside = state.tokens.split(width, -1)
    return stage


def _gather(
    state: TokenState, index: Tensor, group: Tensor, gone: Tensor, fuse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The patch tokens at ``index`` [B, k] alone go on, and the fused ones that are gone: groups and weights [B, n]."""
    prefix, x, body = state.anatomy.prefix, state.tokens, state.patches
    weight = _wide(group >= 0, x)
    parts = [x[:, :prefix], body.gather(1, index.unsqueeze(-1).expand(-1, -1, body.shape[2]))]
    if fuse is not None:
        dropped = fuse * gone
        # The fused token is not divided by its weights' sum, as in EViT; the trace wants shares of 1.
        parts.append(state.ops.combine(dropped.unsqueeze(1).to(x.dtype), body))
        weight = torch.where(gone, _shares(dropped), weight)
        group = group.masked_fill(gone, index.shape[1])
    state.tokens = torch.cat(parts, 1)
    return group, weight


def _hide(state: TokenState, kept: Tensor, fuse: Tensor | None, fused_slot: Tensor | None) -> tuple[Tensor, Tensor]:
    """The patch tokens with ``kept`` [B, n] above 0 go on, the others keep their slots: groups and weights [B, n]."""
    body, n = state.patches, kept.shape[1]
    group, weight = _stay(kept > 0), kept
    if fuse is not None and fused_slot is not None:
        gone = _policy_of(state) - kept
        dropped = fuse * gone
        fused = state.ops.combine(dropped.unsqueeze(1).to(body.dtype), body)
        state.tokens = torch.cat([state.tokens, fused], 1)
        weight = torch.where(gone > 0, _shares(dropped), weight)
        group = group.masked_fill(gone > 0, n)
        kept = torch.cat([kept, fused_slot.to(kept.dtype)], 1)
    state.policy = torch.cat([kept.new_ones(kept.shape[0], state.anatomy.prefix), kept], 1)
    return group, weight


def _set_policy(state: TokenState, policy: Tensor) -> None:
    """Patch tokens go on in their slots as a policy [B, n] says."""
    state.masks.append(policy)
    state.ragged = False
    state.policy = torch.cat([policy.new_ones(policy.shape[0], state.anatomy.prefix), policy], 1)


def _policy_of(state: TokenState) -> Tensor:
    """The policy of the patch tokens, [B, n]: ones where all are there."""
    if state.present is not None:
        return state.present
    return state.tokens.new_ones(*state.patches.shape[:2], dtype=torch.float32)


def _stay(kept: Tensor) -> Tensor:
    """Groups of tokens that keep their slots, int64 [B, n]; -1 for those that are hidden."""
    return torch.arange(kept.shape[1], device=kept.device).expand(kept.shape[0], -1).masked_fill(~kept, -1)


def _shares(dropped: Tensor) -> Tensor:
    """Weights of dropped tokens as shares of 1; equal shares where all weights are 0."""
    total = dropped.sum(1, keepdim=True)
    return torch.where(total > 0, dropped / total.clamp(min=torch.finfo(dropped.dtype).tiny), 0)


def _wide(flags: Tensor, like: Tensor) -> Tensor:
    return flags.to(torch.promote_types(like.dtype, torch.float32))


def _pick(values: Tensor, index: Tensor | None) -> Tensor:
    values = values.detach()
    return values if index is None else values[index]
