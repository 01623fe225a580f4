"""The two halves of a block, attend and feed: the only code that opens a timm block.

The halves call the block's own submodules in the block's own order, and the opened attention runs inside the attention
module's own call, so that hooks see what they would have seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunex.vit import attention
from prunex.vit.anatomy import Anatomy
from prunex.vit.arithmetic import PLAIN, promoted, unknown_layer
from prunex.vit.attention import KeyWeights
from prunex.vit.layouts import layout_of
from prunex.vit.packing import Packing
from prunex.vit.policy import under_policy
from prunex.vit.tape import Attended, Fed, Tape


def attend(
    block: Any,
    x: Tensor,
    anatomy: Anatomy,
    policy: Tensor | None = None,
    want_row: bool = False,
    tape: Tape | None = None,
    number: int = -1,
    keys: KeyWeights | None = None,
    queries: tuple[int, ...] | Tensor | None = None,
    sizes: Tensor | None = None,
    want_keys: bool = False,
    rope: Tensor | None = None,
    relative: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Attended | None, Tensor | None]:
    """The first half of a block: ``x + drop_path(ls(attn(norm(x))))``, with what was asked for from inside.

    What is said of plain blocks holds for every kind by its :class:`~prunex.vit.layouts.Layout`.

    Args:
        block: timm's block.
        x: [B, N, D].
        anatomy: Of the model.
        policy: [B, N] or None.
        want_row: Whether the read-out row is wanted.
        tape: Records what it asks for, or None.
        number: The block's index.
        keys: Weights of the tokens as keys, or None.
        queries: The tokens that go on, as numbers or int64 [m]; None: all of them. Keys and values are those of all;
            projection and what follows are computed for these alone, queries too where nothing else was asked for.
        sizes: [B, N] or None: how many patches each token stands for; read-out rows of pooled tokens count by it.
        want_keys: Whether the keys' mean over heads is wanted.
        rope: The block's rotary table for the tokens after the prefix, or None.
        relative: The block's relative bias [1 or B, H, N, N], or None.
        share: [B, 1, 1], what stochastic depth multiplies the branch by where both halves share a draw; or None.

    Returns:
        The stream [B, N, D] ([B, len(queries), D] if given), the read-out row [B, N] if asked for, the recording if a
        tape runs, and the keys' mean over heads [B, N, d] if asked for, off the graph.
    """
    ops = PLAIN if tape is None else tape.ops
    layout = layout_of(block)
    if ops.opened and not layout.opens:
        raise unknown_layer(block, "timm's Block and ResPostBlock")
    y = layout.read(block, x, ops)
    row: Tensor | None = None
    key_mean: Tensor | None = None
    recorded: Attended | None = None
    if tape is not None:
        listed = tuple(queries.tolist()) if isinstance(queries, Tensor) else queries
        recorded = Attended(number, policy=policy, queries=listed, sizes=sizes)
        if number in tape.normed:
            if y is x:  # a block without a norm in front: what attention reads, apart from what the skip carries on
                y = x.view_as(x)
            if torch.is_grad_enabled() and not y.requires_grad:
                y.requires_grad_()
            recorded.normed = y
    asked = want_row or want_keys or ops.opened or (tape is not None and tape.looks_into(number))
    if policy is None and keys is None and queries is None and relative is None and not asked:
        branch = layout.attend(block, y, rope)
    else:

        def opened(y: Tensor, rope: Tensor | None = rope, **_: Any) -> Tensor:
            nonlocal row, key_mean
            weights, wants = (policy, keys, sizes, relative), (want_row, want_keys)
            branch, row, key_mean = _look(block, y, anatomy, weights, queries, rope, wants, tape, recorded)
            return branch

        branch = layout.inside(block, opened, y, rope)
    stream = x if queries is None else attention.some(x, queries)
    branch = layout.end(block, branch, ops)
    after = ops.add(stream, branch if share is None else branch * share)
    if recorded is not None and tape is not None and tape.streams:
        recorded.before, recorded.after = x.detach(), after.detach()
    return after, row, recorded, key_mean


def _look(
    block: Any,
    y: Tensor,
    anatomy: Anatomy,
    weights: tuple[Tensor | None, KeyWeights | None, Tensor | None, Tensor | None],
    queries: tuple[int, ...] | Tensor | None,
    rope: Tensor | None,
    wants: tuple[bool, bool],
    tape: Tape | None,
    recorded: Attended | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The attention of a block, opened: what it gives, the read-out row, and the keys' mean.

    Args:
        block: timm's block.
        y: [B, N, D], what the attention reads.
        anatomy: Of the model.
        weights: Policy, weights of the keys, sizes, and relative bias, as for :func:`attend`.
        queries: As for :func:`attend`, like all that follow.
        rope: The rotary table.
        wants: Whether the row is wanted, and whether the keys' mean is.
        tape: Records what it asks for, or None.
        recorded: What it records into.
    """
    (policy, keys, sizes, relative), (want_row, want_keys) = weights, wants
    ops, layout = PLAIN if tape is None else tape.ops, layout_of(block)
    attn = layout.attentions(block)[0]
    going = y if queries is None else attention.some(y, queries)
    alone = None
    if queries is not None and policy is None and tape is None and layout.opens and not (want_row or want_keys):
        alone = attention.heads_of_some(attn, y, going)
    q, k, v = layout.heads(block, y, rope, ops) if alone is None else alone
    added = relative if relative is None or queries is None else attention.some(relative, queries, 2)
    asking = q if queries is None or alone is not None else attention.some(q, queries, 2)
    dropout = attn.attn_drop.p if block.training else 0.0
    wants_matrix = tape is not None and recorded is not None and tape.wants_matrix(recorded.block)
    ruled = policy is not None and keys is not None and keys.factor is not None
    unusual = ops.opened and (policy is not None or keys is not None)  # what plain fused arithmetic does not know
    whole = None
    if wants_matrix or ops.matrices or ruled or unusual:
        whole = attention.matrix(asking, k, attn.scale, policy, keys, queries, ops, added)
        if wants_matrix and tape is not None and tape.gradients and torch.is_grad_enabled():
            whole.requires_grad_()
        out = ops.gather(attn.attn_drop(whole), v)
    elif policy is not None:
        more: dict[str, Tensor | None] = {} if keys is None else {"sizes": keys.sizes}
        if relative is not None:
            more["relative"] = relative
        out = under_policy(q, k, v, policy, attn.scale, dropout, **more)
        out = out if queries is None else attention.some(out, queries, 2)
    elif ops.opened:
        out = ops.attention(asking, k, v)
    else:
        out = attention.fused(asking, k, v, dropout, keys, relative=added)
    row = _row(q, k, attn.scale, anatomy, policy, whole, keys, sizes, relative) if want_row else None
    if tape is not None and recorded is not None:
        if wants_matrix and whole is not None:
            recorded.attention = whole if tape.reduce is None else tape.reduce(whole)
        if recorded.block in tape.head_rows:
            recorded.head_rows = _head_rows(q, k, attn.scale, anatomy, policy, keys, sizes, relative)
        recorded.row, recorded.value = row, v.detach() if tape.streams else None
    key_mean = attention.over_heads(promoted(k.detach())) if want_keys else None
    return layout.project(block, out, going, ops), row, key_mean


def _row(
    q: Tensor,
    k: Tensor,
    scale: float,
    anatomy: Anatomy,
    policy: Tensor | None,
    whole: Tensor | None,
    keys: KeyWeights | None = None,
    sizes: Tensor | None = None,
    relative: Tensor | None = None,
) -> Tensor:
    """Attention paid by the class token, or (pooled models) by every pooled token that is there, by its size.

    Where a tape has the whole matrix, the row is taken from it, so that the gradient of that matrix holds what a fused
    token took from it.
    """
    if anatomy.readers:
        if whole is not None:
            return attention.over_heads(whole[:, :, 0])
        return attention.rows(q[:, :, :1], k, scale, policy, keys=keys, relative=_from(relative, 0, 1))
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    asking, relative = q[:, :, start:], _from(relative, start)
    there = _counting(policy, sizes, start)
    if there is None:
        if whole is not None:
            return attention.over_heads(whole[:, :, start:]).mean(1)
        return attention.rows(asking, k, scale, keys=keys, relative=relative)
    # Images differ in which rows hold a dropped token, and those must not count: every row is weighed by its policy.
    there = there.to(torch.promote_types(q.dtype, torch.float32))
    if whole is None:
        return attention.over_heads(attention.rows_of_heads(asking, k, scale, policy, there, keys, relative))
    seen = whole[:, :, start:]
    return torch.einsum("bm,bhmn->bn", there, seen) / (there.sum(1, keepdim=True).clamp(min=1) * max(1, q.shape[1]))


def _counting(policy: Tensor | None, sizes: Tensor | None, start: int) -> Tensor | None:
    """How often each token's row counts from a position on: 0 for a dropped one, else its size; None: once, all."""
    there = None if policy is None else policy[:, start:] > 0
    if sizes is None:
        return there
    return sizes[:, start:] if there is None else sizes[:, start:] * there


def _head_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    anatomy: Anatomy,
    policy: Tensor | None,
    keys: KeyWeights | None = None,
    sizes: Tensor | None = None,
    relative: Tensor | None = None,
) -> Tensor:
    """The read-out row of each head, [B, H, N]."""
    if anatomy.readers:
        return attention.rows_of_heads(q[:, :, :1], k, scale, policy, keys=keys, relative=_from(relative, 0, 1))
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    there = _counting(policy, sizes, start)
    return attention.rows_of_heads(q[:, :, start:], k, scale, policy, there, keys, _from(relative, start))


def _from(relative: Tensor | None, first: int, last: int | None = None) -> Tensor | None:
    """Some rows of a relative bias."""
    return None if relative is None else relative[:, :, first:last]


def feed(
    block: Any,
    x: Tensor,
    tape: Tape | None = None,
    policy: Tensor | None = None,
    entered: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Fed | None]:
    """The second half of a block: ``x + drop_path(ls(mlp(norm(x))))``.

    Args:
        block: timm's block.
        x: [B, n, D].
        tape: Records what it asks for, or None.
        policy: [B, n] or None, for the recording.
        entered: [B, n, D], the stream of the same tokens as it entered the block, which the MLP of a parallel block
            reads; None: it reads ``x``.
        share: As for :func:`attend`.
    """
    ops, layout = PLAIN if tape is None else tape.ops, layout_of(block)
    branch = layout.feed(block, x if entered is None else entered, ops)
    recorded = Fed(-1, x.detach(), branch.detach(), policy) if tape is not None and tape.streams else None
    branch = layout.drop_fed(block, branch)
    return ops.add(x, branch if share is None else branch * share), recorded


def attend_packed(
    block: Any, x: Tensor, packing: Packing, anatomy: Anatomy, want_row: bool = False
) -> tuple[Tensor, Tensor | None]:
    """:func:`attend` in eval mode for images of different lengths: nothing is computed for empty slots.

    Args:
        block: timm's block.
        x: [B, N, D].
        packing: Which slots hold a token.
        anatomy: Of the model.
        want_row: Whether the read-out row is wanted.

    Returns:
        The stream [B, N, D], zeros in empty slots, and the row [B, N] if asked for.
    """
    layout, packed = layout_of(block), packing.pack(x)
    y = layout.read(block, packed, PLAIN)
    q, k, v = layout.heads(block, y, None, PLAIN)
    branch = layout.project(block, packing.attend(q, k, v), y, PLAIN)
    after = packing.unpack(packed + layout.end(block, branch, PLAIN))
    if not want_row:
        return after, None
    pairs = zip(packing.split(q), packing.split(k), strict=True)
    row = torch.cat([_row(*pair, block.attn.scale, anatomy, None, None) for pair in pairs], 1)
    return after, packing.unpack(row.unsqueeze(2)).squeeze(2)


def feed_packed(block: Any, x: Tensor, packing: Packing) -> Tensor:
    """:func:`feed` in eval mode for images of different lengths."""
    return packing.unpack(feed(block, packing.pack(x))[0])
