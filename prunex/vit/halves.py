"""One block as its two halves, attend and feed: the only code that opens a timm block.

The halves call the block's own submodules in the block's own order, inside the block's own call, and the opened
attention runs inside the attention module's own call, so that hooks see what they would have seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prunex.vit import attention
from prunex.vit import policy as masking
from prunex.vit.arithmetic import PLAIN, promoted
from prunex.vit.blocks import layout_of
from prunex.vit.calls import hooked_within, inside
from prunex.vit.packing import Packing
from prunex.vit.recorder import Recorder
from prunex.vit.state import TokenState
from prunex.vit.tape import Attended, Fed
from prunex.vit.turns import Turns


class Seen(NamedTuple):
    """What pruners were shown of one attention; see :class:`~prunex.vit.state.TokenState`."""

    row: Tensor | None = None
    key_mean: Tensor | None = None
    value_norm: Tensor | None = None


class Halves:
    """One block of one forward: ``x + drop_path(ls(attn(norm(x))))``, then ``x + drop_path(ls(mlp(norm(x))))``.

    What is said of plain blocks holds for every kind by its :class:`~prunex.vit.blocks.plain.Layout`. ``only`` are the
    tokens that go on after attention, int64 [m] or positions (None: all): keys and values are those of all, projection
    and what follows are computed for these alone, queries too where nothing else was asked for. ``entered`` counts the
    patch tokens that entered, where attention left out all but those a pruner knows.
    """

    def __init__(self, block: Any, number: int, state: TokenState, turns: Turns, recorder: Recorder) -> None:
        self.block, self.number, self.state, self.recorder = block, number, state, recorder
        self.layout = layout_of(block)
        self.decides = bool(turns.at("inside", number))
        self.shows_row = turns.show("row", number) or number in recorder.request.rows
        self.shows_keys, self.shows_values = turns.show("keys", number), turns.show("values", number)
        self.shows_shift = turns.show("shift", number)
        self.fixed = turns.only(number, block, state, recorder)
        self.entered = state.patches.shape[1] if self.fixed is not None else None
        self.only: tuple[int, ...] | Tensor | None = self.fixed
        if not self.decides and not turns.at("after", number) and self._narrows():
            self.only = state.anatomy.readers
        at = state.positions
        self.rope, self.shared = (None, None) if at is None else (at.rope_of(number), at.shared)

    def _narrows(self) -> bool:
        """Whether the tape is content with the tokens that the head reads, and this is the last block."""
        tape, last = self.recorder.request, self.number == self.state.anatomy.depth - 1
        wanted = last and tape.narrow and not tape.streams and bool(self.state.anatomy.readers)
        # Hooks last: to look for them is to walk through the block's modules.
        return wanted and self.recorder.watch is None and not hooked_within(self.block)

    @property
    def closed(self) -> bool:
        """Whether timm's own block will do: nobody asks anything of it from inside."""
        shows = self.decides or self.shows_row or self.shows_shift
        return not shows and self.fixed is None and self.recorder.tape is None and self.state.plain

    def whole(self) -> None:
        """The block as timm runs it."""
        block, rope, shared, layout = self.block, self.rope, self.shared, self.layout
        call = block if self.state.positions is None else lambda x: layout.whole(block, x, rope, shared)
        self.state.tokens = self._rerunning(call, self.state.tokens)

    def inside_call(self, steps: Callable[[Halves], None]) -> None:
        """What is done to the stream between its entering and leaving the block, within the block's own call."""

        def opened(x: Tensor, rope: Tensor | None = self.rope, **_: Any) -> Tensor:
            self.state.tokens, self.rope = x, rope
            steps(self)
            return self.state.tokens

        self.layout.check_hooks(self.block)
        given = self.layout.given(self.rope, self.shared)
        self.state.tokens = inside(self.block, opened, self.state.tokens, **given)

    def attend(self) -> None:
        """The first half, with what was asked for from inside."""
        state, at = self.state, self.state.positions
        state.packing = packing_of(state, self.recorder)
        # Run again in a backward pass it must see what it sees now: nothing of the state, which will have gone on.
        self.keys, self.sizes = state.attending, state.sizes if state.packing is None else None
        self.relative = None if at is None else at.relative_of(self.layout.relative(self.block))
        self.share = self.layout.draw(self.block, state.tokens)
        state.beside = state.tokens if self.layout.parallel else None
        state.trace.bare = self.fixed is not None and not self.decides
        self.recorder.leave(state)
        if state.packing is not None:
            state.tokens, state.row = self._attend_packed(state.tokens, state.packing)
            return
        state.tokens, seen, recorded = self._rerunning(self._attend, state.tokens, state.policy)
        state.row, state.key_mean, state.value_norm = seen
        if recorded is not None:
            self.recorder.note([recorded])
        if state.beside is not None and self.only is not None:
            state.beside = attention.some(state.beside, self.only)

    def feed(self) -> None:
        """The second half."""
        state = self.state
        state.row = state.key_mean = state.value_norm = None
        state.packing = packing_of(state, self.recorder)
        if state.packing is not None:
            fed_tokens, shift, _ = self._feed(state.packing.pack(state.tokens), None)
            state.tokens = state.packing.unpack(fed_tokens)
            state.shift = None if shift is None else state.packing.unpack(shift.unsqueeze(2)).squeeze(2)
            return
        state.tokens, state.shift, fed = self._rerunning(self._feed, state.tokens, state.beside)
        state.beside = None
        if fed is not None:
            self.recorder.note([fed])

    def _rerunning(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it; where the model saves memory so, it is run again in the backward pass."""
        # With a tape nothing is run again: gradients are asked for at the very tensors that it holds.
        saves = getattr(self.state.model, "grad_checkpointing", False) and self.recorder.tape is None
        if saves and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _attend(self, x: Tensor, policy: Tensor | None) -> tuple[Tensor, Seen, Attended | None]:
        """From [B, N, D] to the stream after attention, what was asked for of it, and the recording."""
        layout, block, ops = self.layout, self.block, self.recorder.ops
        y = layout.read(block, x, ops)
        recorded = self._recording(x, y, policy)
        if recorded is not None and recorded.normed is not None:
            y = recorded.normed
        seen = Seen()
        if self._closed_attention(policy):
            branch = layout.attend(block, y, self.rope)
        else:

            def opened(y: Tensor, rope: Tensor | None = self.rope, **_: Any) -> Tensor:
                nonlocal seen
                branch, seen = self._look(y, rope, policy, recorded)
                return branch

            branch = layout.inside(block, opened, y, self.rope)
        branch = layout.end(block, branch, ops)
        stream = x if self.only is None else attention.some(x, self.only)
        after = ops.add(stream, branch if self.share is None else branch * self.share)
        if recorded is not None and self.recorder.request.streams:
            recorded.before, recorded.after = x.detach(), after.detach()
        return after, seen, recorded

    def _recording(self, x: Tensor, y: Tensor, policy: Tensor | None) -> Attended | None:
        """An empty recording of this half, with the place to differentiate at where one is asked for."""
        if self.recorder.tape is None:
            return None
        only = tuple(self.only.tolist()) if isinstance(self.only, Tensor) else self.only
        recorded = Attended(self.number, policy=policy, queries=only, sizes=self.sizes)
        if self.number in self.recorder.request.normed:
            # A block without a norm in front: what attention reads, apart from what the skip carries on.
            y = x.view_as(x) if y is x else y
            if torch.is_grad_enabled() and not y.requires_grad:
                y.requires_grad_()
            recorded.normed = y
        return recorded

    def _closed_attention(self, policy: Tensor | None) -> bool:
        """Whether timm's own attention will do: nobody asks anything from inside."""
        shown = self._shows or self.recorder.request.looks_into(self.number)
        if shown or self.recorder.ops.opened:
            return False
        return policy is None and self.keys is None and self.only is None and self.relative is None

    @property
    def _shows(self) -> bool:
        """Whether somebody must be shown anything of the attention."""
        return self.shows_row or self.shows_keys or self.shows_values

    def _look(
        self, y: Tensor, rope: Tensor | None, policy: Tensor | None, recorded: Attended | None
    ) -> tuple[Tensor, Seen]:
        """The attention opened: what it gives for y [B, N, D], and what was asked for of it."""
        layout, block, only = self.layout, self.block, self.only
        going = y if only is None else attention.some(y, only)
        alone = None
        # Without anybody to show it to, the others' queries need not be computed.
        unasked = recorded is None and not self._shows
        if only is not None and policy is None and unasked and layout.opens:
            alone = attention.heads_of_some(layout.attentions(block)[0], y, going)
        q, k, v = layout.heads(block, y, rope, self.recorder.ops) if alone is None else alone
        asking = q if only is None or alone is not None else attention.some(q, only, 2)
        out, matrix = self._gathered(asking, q, k, v, policy)
        row = self._row(q, k, policy, matrix) if self.shows_row else None
        if recorded is not None:
            recorded.row = row
            self._record(recorded, q, k, v, policy, matrix)
        # Off the graph: pruners rank by them, and no gradient goes through a ranking.
        key_mean = attention.over_heads(promoted(k.detach())) if self.shows_keys else None
        value_norm = promoted(v.detach()).square().sum((1, 3)).sqrt() if self.shows_values else None
        return layout.project(block, out, going, self.recorder.ops), Seen(row, key_mean, value_norm)

    def _record(
        self, recorded: Attended, q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None, matrix: Tensor | None
    ) -> None:
        """What the tape asked for of an attention that was looked into."""
        tape = self.recorder.request
        if matrix is not None and tape.wants_matrix(self.number):
            seen = self._shares(matrix) if tape.shares else matrix
            recorded.attention = seen if tape.reduce is None else tape.reduce(seen)
        if self.number in tape.head_rows:
            recorded.head_rows = self._head_rows(q, k, policy, matrix)
        if tape.streams:
            recorded.value = v.detach()

    def _gathered(
        self, asking: Tensor, q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' outputs [B, H, m, d] of the tokens that go on, and the attention matrix where there is one."""
        ops, only, layout, tape = self.recorder.ops, self.only, self.layout, self.recorder.request
        relative = self.relative
        if relative is not None and only is not None:
            relative = attention.some(relative, only, 2)
        if self._needs_matrix(policy):
            matrix = layout.matrix(self.block, asking, k, policy, self.keys, only, ops=ops, relative=relative)
            if tape.wants_matrix(self.number) and tape.gradients and torch.is_grad_enabled():
                matrix.requires_grad_()
            return layout.gather(self.block, matrix, v, ops), matrix
        if policy is not None:
            return self._under_policy(q, k, v, policy), None
        kernel: Callable[..., Tensor] = partial(ops.attention, relative=relative)
        if not ops.opened:
            kernel = partial(attention.fused, dropout=self._dropout, keys=self.keys, relative=relative)
        return layout.through(self.block, kernel, asking, k, v, ops), None

    def _needs_matrix(self, policy: Tensor | None) -> bool:
        """Whether the attention matrix, N x N numbers a head, is made: somebody reads it, or no kernel does without."""
        ops, keys = self.recorder.ops, self.keys
        if self.recorder.request.wants_matrix(self.number) or ops.matrices or self.layout.matrices:
            return True
        # Kernels know policies, sizes of keys, and their factors, but no policy and factors at once.
        weighed = policy is not None and keys is not None and keys.factor is not None
        # Opened arithmetic has rules for plain attention alone.
        return weighed or (ops.opened and (policy is not None or keys is not None))

    def _under_policy(self, q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
        """The heads' outputs [B, H, m, d] among the tokens that a policy leaves."""
        scale = self.layout.attentions(self.block)[0].scale
        # Only what there is: a stand-in for the kernel need not know of sizes and biases.
        more: dict[str, Any] = {} if self.keys is None else {"sizes": self.keys.sizes}
        if self.relative is not None:
            more["relative"] = self.relative
        kernel = partial(masking.under_policy, policy=policy, scale=scale, dropout=self._dropout, **more)
        # All queries, also where some go on alone: the kernel finds a token's own key by its place.
        out = self.layout.through(self.block, kernel, q, k, v, self.recorder.ops)
        return out if self.only is None else attention.some(out, self.only, 2)

    @property
    def _dropout(self) -> float:
        return self.layout.attentions(self.block)[0].attn_drop.p if self.block.training else 0.0

    def _row(self, q: Tensor, k: Tensor, policy: Tensor | None, matrix: Tensor | None) -> Tensor:
        """Attention paid by the class token, or (pooled models) by every pooled token that is there, by its size.

        From a tape's matrix where there is one, so that its gradient holds what a fused token took from it.
        """
        anatomy, start = self.state.anatomy, self._first_row
        counts = None if anatomy.rankers else self._counts(policy, start)
        if matrix is None and (anatomy.rankers or counts is not None):
            return attention.over_heads(self._head_rows(q, k, policy))
        if matrix is None:
            scale, relative = self.layout.attentions(self.block)[0].scale, _rows_of(self.relative, start)
            shown = self._as_shares
            return attention.rows(q[:, :, start:], k, scale, keys=self.keys, relative=relative, shown=shown)
        if anatomy.rankers:
            return attention.over_heads(self._shares(matrix[:, :, 0]))
        matrix = self._shares(matrix[:, :, start:])
        if counts is None:
            return attention.over_heads(matrix).mean(1)
        # Images differ in which rows hold a dropped token, and those must not count: each is weighed by its policy.
        counts = counts.to(torch.promote_types(q.dtype, torch.float32))
        total = counts.sum(1, keepdim=True).clamp(min=1) * max(1, matrix.shape[1])
        return torch.einsum("bm,bhmn->bn", counts, matrix) / total

    def _head_rows(self, q: Tensor, k: Tensor, policy: Tensor | None, matrix: Tensor | None = None) -> Tensor:
        """The read-out row of each head, [B, H, N]."""
        start, last = self._first_row, 1 if self.state.anatomy.rankers else None
        counts = None if last else self._counts(policy, start)
        if matrix is not None and self.layout.matrices:
            return attention.mean_rows(self._shares(matrix[:, :, start:last]), counts)
        relative = _rows_of(self.relative, start, last)
        scale, shown = self.layout.attentions(self.block)[0].scale, self._as_shares
        return attention.rows_of_heads(q[:, :, start:last], k, scale, policy, counts, self.keys, relative, shown)

    def _as_shares(self, softmaxes: Tensor) -> Tensor:
        """Softmaxes [B, H, m, N] of :meth:`Layout.heads` as what the heads look at, in shares."""
        return self._shares(self.layout.shown(self.block, softmaxes, PLAIN))

    def _shares(self, seen: Tensor) -> Tensor:
        """What heads look at, in shares: those who rank or roll out by it know no negative attention."""
        return attention.shares(seen) if self.layout.signed else seen

    @property
    def _first_row(self) -> int:
        """The first token whose row tells who is looked at: the class token, or the first one that is pooled."""
        anatomy = self.state.anatomy
        return 0 if anatomy.rankers or anatomy.pool_prefix else anatomy.prefix

    def _counts(self, policy: Tensor | None, start: int) -> Tensor | None:
        """How often each token's row counts from a position on: 0 for a dropped one, else its size; None: once, all."""
        present = None if policy is None else policy[:, start:] > 0
        if self.sizes is None:
            return present
        return self.sizes[:, start:] if present is None else self.sizes[:, start:] * present

    def _feed(self, x: Tensor, entered: Tensor | None) -> tuple[Tensor, Tensor | None, Fed | None]:
        """From [B, n, D], and what entered a parallel block, to the stream after the MLP, its shift, the recording."""
        ops, layout = self.recorder.ops, self.layout
        branch = layout.feed(self.block, x if entered is None else entered, ops)
        fed = None
        if self.recorder.request.streams:
            fed = Fed(self.number, x.detach(), branch.detach(), self.state.policy)
        shift = torch.linalg.vector_norm(promoted(branch), dim=-1) if self.shows_shift else None
        branch = layout.drop_fed(self.block, branch)
        return ops.add(x, branch if self.share is None else branch * self.share), shift, fed

    def _attend_packed(self, x: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        """The first half where nothing is computed for empty slots: the stream, zeros in these, and the row."""
        layout, block, packed = self.layout, self.block, packing.pack(x)
        y = layout.read(block, packed, PLAIN)
        q, k, v = layout.heads(block, y, None, PLAIN)
        branch = layout.project(block, packing.attend(q, k, v), y, PLAIN)
        after = packing.unpack(packed + layout.end(block, branch, PLAIN))
        if not self.shows_row:
            return after, None
        # Each image is its own sequence: its row is a softmax over its own tokens.
        images = zip(packing.split(q), packing.split(k), strict=True)
        row = torch.cat([self._row(queries, keys, None, None) for queries, keys in images], 1)
        return after, packing.unpack(row.unsqueeze(2)).squeeze(2)


def packing_of(state: TokenState, recorder: Recorder) -> Packing | None:
    """Which slots hold a token, where images differ in length and nobody asks for more than the output."""
    if not state.ragged or state.policy is None or state.masked or state.training:
        return None
    if recorder.tape is not None or state.attending is not None or state.positions is not None:
        return None
    if state.packs is None:  # the halves of others are not known token by token, and hooks expect whole images
        state.packs = all(layout_of(b).opens and not hooked_within(b) for b in state.model.blocks)
    if not state.packs:
        return None
    packing = state.packing
    return packing if packing is not None and packing.policy is state.policy else Packing.of(state.policy)


def _rows_of(relative: Tensor | None, first: int, last: int | None = None) -> Tensor | None:
    return None if relative is None else relative[:, :, first:last]
