"""The one block-by-block forward: attend, then feed; the only code that opens a timm block.

Pruners act before a block or between its halves, explainers ask for what they need through a :class:`Tape`. The halves
call the block's own submodules in the block's own order; a block that nobody asks anything of is called whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.anatomy import Anatomy, ViT, check_images, read
from prunex.vit.arithmetic import PLAIN, promoted, unknown_layer
from prunex.vit.attention import KeyWeights
from prunex.vit.decisions import Answer, Keep, Pruner, TokenState, apply, carried_out
from prunex.vit.embedding import embed, enter, grid_of
from prunex.vit.intermediates import Watch
from prunex.vit.layouts import Layout, draw, layout_of
from prunex.vit.packing import Packing
from prunex.vit.positions import Places, Positions, positions_of
from prunex.vit.readout import head, pool_attention
from prunex.vit.tape import Attended, Fed, Tape
from prunex.vit.trace import TokenTrace


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
    attn, y = layout.attentions(block)[0], layout.read(block, x, ops)
    recorded = None
    if tape is not None:
        listed = tuple(queries.tolist()) if isinstance(queries, Tensor) else queries
        recorded = Attended(number, policy=policy, queries=listed, sizes=sizes)
    if tape is not None and recorded is not None and number in tape.normed:
        if y is x:  # a block without a norm in front: what attention reads, apart from what the skip carries on
            y = x.view_as(x)
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()
        recorded.normed = y
    wants_streams = tape is not None and tape.streams
    wants_matrix = tape is not None and tape.wants_matrix(number)
    wants_heads = tape is not None and number in tape.head_rows
    row = key_mean = None
    asked = want_row or want_keys or wants_streams or wants_matrix or wants_heads or ops.opened
    if policy is None and keys is None and queries is None and relative is None and not asked:
        branch = layout.attend(block, y, rope)
    else:
        going = y if queries is None else attention.some(y, queries)
        alone = None
        if queries is not None and policy is None and tape is None and layout.opens and not (want_row or want_keys):
            alone = attention.heads_of_some(attn, y, going)
        q, k, v = layout.heads(block, y, rope, ops) if alone is None else alone
        added = relative if relative is None or queries is None else attention.some(relative, queries, 2)
        if want_keys:
            key_mean = attention.over_heads(promoted(k.detach()))
        asking = q if queries is None or alone is not None else attention.some(q, queries, 2)
        dropout = attn.attn_drop.p if block.training else 0.0
        whole = None
        ruled = policy is not None and keys is not None and keys.factor is not None
        unusual = ops.opened and (policy is not None or keys is not None)  # what plain fused arithmetic does not know
        if wants_matrix or ops.matrices or ruled or unusual:
            whole = attention.matrix(asking, k, attn.scale, policy, keys, queries, ops, added)
            if wants_matrix and tape is not None and tape.gradients and torch.is_grad_enabled():
                whole.requires_grad_()
            out = ops.gather(attn.attn_drop(whole), v)
        elif policy is not None:
            more: dict[str, Tensor | None] = {} if keys is None else {"sizes": keys.sizes}
            if relative is not None:
                more["relative"] = relative
            out = attention.under_policy(q, k, v, policy, attn.scale, dropout, **more)
            out = out if queries is None else attention.some(out, queries, 2)
        elif ops.opened:
            out = ops.attention(asking, k, v)
        else:
            out = attention.fused(asking, k, v, dropout, keys, relative=added)
        if want_row:
            row = _row(q, k, attn.scale, anatomy, policy, whole, keys, sizes, relative)
        branch = layout.project(block, out, going, ops)
        if tape is not None and recorded is not None:
            if wants_matrix and whole is not None:
                recorded.attention = whole if tape.reduce is None else tape.reduce(whole)
            if wants_heads:
                recorded.head_rows = _head_rows(q, k, attn.scale, anatomy, policy, keys, sizes, relative)
            recorded.row, recorded.value = row, v.detach() if wants_streams else None
    stream = x if queries is None else attention.some(x, queries)
    branch = layout.drop(block, layout.end(block, branch, ops))
    after = ops.add(stream, branch if share is None else branch * share)
    if recorded is not None and wants_streams:
        recorded.before, recorded.after = x.detach(), after.detach()
    return after, row, recorded, key_mean


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


def through(
    block: Any,
    x: Tensor,
    anatomy: Anatomy,
    queries: tuple[int, ...] | Tensor | None = None,
    tape: Tape | None = None,
    number: int = -1,
) -> tuple[Tensor, Attended | None]:
    """One whole block on its own, for methods that compare a block with itself: attend, then feed.

    Args:
        block: timm's block.
        x: [B, N, D].
        anatomy: Of the model.
        queries: The tokens that come out, as numbers or int64 [m]; None: all of them.
        tape: Records what it asks for, or None.
        number: The block's index, as the tape knows it.

    Returns:
        The stream [B, m, D], and the recording of the attention half if a tape runs.
    """
    x, _, recorded, _ = attend(block, x, anatomy, tape=tape, number=number, queries=queries)
    return feed(block, x, tape)[0], recorded


def _known_queries(pruners: Sequence[Pruner], block: int, state: TokenState, tape: Tape | None) -> Tensor | None:
    """The tokens that will go on after a block's attention, where the one pruner there is knows them beforehand.

    Whoever records, watches, masks or weighs keys needs all rows: then tokens leave after the attention, as always.
    """
    asked = tape is not None or state.leaving is not None or state.masked
    if len(pruners) != 1 or asked or state.policy is not None or state.keys is not None:
        return None
    ask = getattr(pruners[0], "queries", None)
    return None if ask is None else ask(block, state)


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
    after = packing.unpack(packed + layout.drop(block, layout.end(block, branch, PLAIN)))
    if not want_row:
        return after, None
    pairs = zip(packing.split(q), packing.split(k), strict=True)
    row = torch.cat([_row(*pair, block.attn.scale, anatomy, None, None) for pair in pairs], 1)
    return after, packing.unpack(row.unsqueeze(2)).squeeze(2)


def feed_packed(block: Any, x: Tensor, packing: Packing) -> Tensor:
    """:func:`feed` in eval mode for images of different lengths."""
    return packing.unpack(feed(block, packing.pack(x))[0])


def _decide(
    answer: Answer, block: int, inside: bool, state: TokenState, entered: Tensor | None
) -> tuple[Sequence[Any], Tensor | None]:
    """Carry an answer out; the stream that entered a parallel block goes through the same, beside its tokens."""
    if entered is None or answer is None:
        return apply(answer, block, inside, state), entered
    width = entered.shape[-1]
    state.tokens = torch.cat([state.tokens, entered], -1)
    stages = apply(answer, block, inside, state)
    state.tokens, entered = state.tokens.split(width, -1)
    return stages, entered


def look_ahead(
    model: ViT,
    x: Tensor,
    anatomy: Anatomy,
    blocks: int,
    policy: Tensor | None = None,
    keys: KeyWeights | None = None,
    positions: Positions | None = None,
) -> list[Tensor]:
    """The stream entering the first ``blocks`` + 1 blocks if nothing were decided: [B, N, D] each.

    The one after the last block is what the final norm will read. Call it with the model in eval mode.

    Args:
        model: The ViT; a pruner on it is not asked.
        x: [B, N, D], entering the first block.
        anatomy: Of the model.
        blocks: How many are run.
        policy: [B, N] or None: 0 for slots of tokens that are not there.
        keys: Weights of the tokens as keys, or None.
        positions: As the state has them.
    """
    streams = [x]
    for i, block in enumerate(list(model.blocks)[:blocks]):
        layout, rope = layout_of(block), None if positions is None else positions.rope_of(i)
        if policy is None and keys is None and (positions is None or positions.whole):
            x = _whole(block, layout, positions, rope)(x)
        else:
            relative = None if positions is None else positions.relative_of(layout.relative(block))
            entered = x if layout.parallel else None
            x = attend(block, x, anatomy, policy, keys=keys, rope=rope, relative=relative)[0]
            x = feed(block, x, policy=policy, entered=entered)[0]
        streams.append(x)
    return streams


def run(
    model: ViT,
    images: Tensor,
    anatomy: Anatomy,
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
    watch: Watch | None = None,
) -> tuple[Tensor, TokenState]:
    """Images through all blocks and the final norm, with pruners deciding and a tape recording.

    Args:
        model: A supported ViT.
        images: [B, C, H, W].
        anatomy: Of the model.
        pruners: Asked in this order at every place.
        tape: Records what it asks for, or None.
        masked: Dropped tokens keep their slots under a policy instead of leaving the tensor.
        watch: Is shown the stream after every block, and may want no more than the first ones; or None.

    Returns:
        Tokens [B, prefix + n_last, D] after the final norm, and the final state with its trace.
    """
    check_images(anatomy, images)
    _check_dtype(model, images)
    ops, rope = PLAIN if tape is None else tape.ops, None
    if ops.opened:
        x, grid = embed(model, images, ops)
    else:
        patches = model.patch_embed(images)
        grid = grid_of(model, patches)
        x, rope = enter(model, patches)
    return encode(model, x, grid, anatomy, pruners, tape, masked, watch=watch, rope=rope)


def encode(
    model: ViT,
    x: Tensor,
    grid: tuple[int, int],
    anatomy: Anatomy,
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
    keys: KeyWeights | None = None,
    watch: Watch | None = None,
    places: Places | None = None,
    rope: Tensor | None = None,
) -> tuple[Tensor, TokenState]:
    """Embedded tokens through all blocks and the final norm; :func:`run` without the embedding.

    Args:
        model: A supported ViT.
        x: [B, prefix + P, D], as :func:`embed` gives them.
        grid: Their patch grid.
        anatomy: Of the model.
        pruners: Asked in this order at every place.
        tape: Records what it asks for, or None.
        masked: Dropped tokens keep their slots.
        keys: Weights of the tokens as attention keys in every block, or None.
        watch: As for :func:`run`.
        places: Which patches the P tokens are, where they are not all patches of ``grid`` in order; or None.
        rope: The rotary table of the blocks, where embedding gave one already.

    Returns:
        Tokens [B, prefix + n_last, D] after the final norm (only those that the head reads, where the tape asked for no
        others), and the final state with its trace.
    """
    trace = TokenTrace(grid, anatomy.prefix, x.shape[0], x.device)
    state = TokenState(x, anatomy, trace, masked, model.training, left=grid[0] * grid[1], keys=keys, model=model)
    state.positions = positions_of(model, anatomy.prefix, grid, places, rope)
    wanted: set[int] = set()
    if tape is not None:
        tape.embedded, state.ops = x, tape.ops
        wanted.update(tape.rows)
    matched: set[int] = set()
    for pruner in pruners:
        wanted.update(pruner.rows())
        matched.update(pruner.key_means())
    recompute = model.grad_checkpointing and torch.is_grad_enabled() and tape is None
    last = len(model.blocks) - 1
    if watch is not None:
        state.leaving = []
    packing: Packing | None = None
    blocks = list(model.blocks)[: None if watch is None else watch.stop]
    for i, block in enumerate(blocks):
        if watch is not None and i:
            watch.after(i - 1, state)
        if tape is not None and i < tape.graph_from:
            off: Any = torch.no_grad()
        else:
            off = nullcontext()
        with off:
            for pruner in pruners:
                _note(tape, apply(pruner.before(i, state), i, False, state))
            within = [p for p in pruners if p.acts_between(i)]
            at, layout = state.positions, layout_of(block)
            turned, known = None if at is None else at.rope_of(i), _known_queries(pruners, i, state, tape)
            plain = tape is None and state.policy is None and state.attending is None and (at is None or at.whole)
            if plain and known is None and i not in wanted and not within:
                state.tokens = _maybe_checkpoint(recompute, _whole(block, layout, at, turned), state.tokens)
                _decide_after(pruners, i, state, tape)
                continue
            relative = None if at is None else at.relative_of(layout.relative(block))
            entered = state.tokens if layout.parallel else None
            share = draw(block, layout, state.tokens)
            policy, keys, want = state.policy, state.attending, i in wanted
            narrow = i == last and tape is not None and tape.narrow and not tape.streams and not within
            narrow = narrow and not any(p.acts_after(i) for p in pruners)
            queries: tuple[int, ...] | Tensor | None = anatomy.readers if narrow and anatomy.readers else known
            if tape is not None and i == last:
                tape.policy, tape.tokens, tape.sizes = policy, state.tokens.shape[1], state.sizes
            trace.bare = known is not None and not within
            packing = _packing(model, state, tape, packing)

            def first(
                x: Tensor,
                policy: Tensor | None,
                block: nn.Module = block,
                number: int = i,
                want: bool = want,
                keys: KeyWeights | None = keys,
                queries: tuple[int, ...] | Tensor | None = queries,
                places: tuple[Tensor | None, ...] = (turned, relative, share),
                sizes: Tensor | None = state.sizes,
            ) -> tuple[Tensor, Tensor | None, Attended | None, Tensor | None]:
                match = number in matched
                return attend(block, x, anatomy, policy, want, tape, number, keys, queries, sizes, match, *places)

            came, attended = state.patches.shape[1], None
            if packing is not None:
                state.tokens, state.row = attend_packed(block, state.tokens, packing, anatomy, want)
            else:
                state.tokens, state.row, attended, state.key_mean = _maybe_checkpoint(
                    recompute, first, state.tokens, policy
                )
            if tape is not None and attended is not None:
                tape.steps.append(attended)
            if entered is not None and queries is not None:
                entered = attention.some(entered, queries)
            for pruner in within:
                answer = pruner.between(i, state)
                if known is not None and isinstance(answer, Keep):
                    carried_out(answer, i, came, state)
                    continue
                stages, entered = _decide(answer, i, True, state, entered)
                _note(tape, stages)
            if tape is not None and i == last and within:
                tape.policy, tape.tokens, tape.sizes = state.policy, state.tokens.shape[1], state.sizes
            state.row = state.key_mean = None
            packing = _packing(model, state, tape, packing)
            if packing is not None:
                state.tokens = feed_packed(block, state.tokens, packing)
                _decide_after(pruners, i, state, tape)
                continue

            def second(
                x: Tensor, entered: Tensor | None, block: nn.Module = block, share: Tensor | None = share
            ) -> tuple[Tensor, Fed | None]:
                return feed(block, x, tape, state.policy, entered, share)

            state.tokens, fed = _maybe_checkpoint(recompute, second, state.tokens, entered)
            if tape is not None and fed is not None:
                fed.block = i
                tape.steps.append(fed)
            _decide_after(pruners, i, state, tape)
    if watch is not None:
        watch.after(len(blocks) - 1, state)
    state.tokens = (PLAIN if tape is None else tape.ops).norm(model.norm, state.tokens)
    return state.tokens, state


def _packing(model: ViT, state: TokenState, tape: Tape | None, known: Packing | None) -> Packing | None:
    """Which slots hold a token, where images differ in length and nobody asks for more than the output."""
    if not state.ragged or state.policy is None or state.masked or state.training:
        return None
    if tape is not None or state.attending is not None or state.positions is not None:
        return None
    if not all(layout_of(b).opens for b in model.blocks):  # their halves are not known token by token
        return None
    return known if known is not None and known.policy is state.policy else Packing.of(state.policy)


def _decide_after(pruners: Sequence[Pruner], number: int, state: TokenState, tape: Tape | None) -> None:
    """Ask those who decide after a block."""
    for pruner in pruners:
        if pruner.acts_after(number):
            _note(tape, apply(pruner.after(number, state), number, False, state, after=True))
            if tape is not None:
                tape.policy, tape.tokens, tape.sizes = state.policy, state.tokens.shape[1], state.sizes


def own_anatomy(model: ViT) -> Anatomy:
    """What a model's forward is made of: its anatomy, as the attached pruner may have altered it."""
    attached = getattr(model, "prunex", None)
    return read(model) if attached is None else attached.current(model)


def _whole(block: nn.Module, layout: Layout, at: Any, rope: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Timm's own block, given what it looks positions up in."""
    if at is None:
        return block
    return lambda x: layout.whole(block, x, rope, at.shared)


def own_pruners(model: ViT) -> tuple[Pruner, ...]:
    """The pruner attached to a model, or nothing."""
    attached = getattr(model, "prunex", None)
    return () if attached is None else (attached.pruner,)


def record(model: ViT, images: Tensor, tape: Tape, masked: bool | None = None) -> TokenState:
    """Run a model, pruned or dense, under a tape, leaving no trace of it on the model.

    Args:
        model: A supported ViT; call it in eval mode.
        images: [B, C, H, W].
        tape: Says what to record; its ``logits`` are filled too ([B, classes], or pooled features without a head).
        masked: Whether dropped tokens keep their slots; None: as the model is set.

    Returns:
        The final state, with the trace and the decisions.
    """
    attached = getattr(model, "prunex", None)
    if attached is not None:
        masked = bool(attached.masked) if masked is None else masked
    anatomy = own_anatomy(model)
    tokens, state = run(model, images, anatomy, own_pruners(model), tape, bool(masked))
    tape.logits = head(model, tokens, state.policy, anatomy, tape.ops, state.sizes)
    if anatomy.pool == "map":
        with torch.no_grad():
            tape.readout = pool_attention(model, tokens, state.policy, anatomy, state.sizes)
    return state


def resume(
    model: ViT,
    x: Tensor,
    grid: tuple[int, int],
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
    keys: KeyWeights | None = None,
    places: Places | None = None,
) -> Tensor:
    """From embedded tokens to the model's output, with decisions of one's own choice.

    Args:
        model: A supported ViT, pruned or dense; its own pruner decides only if it is among ``pruners``.
        x: [B, prefix + P, D], as :func:`embed` gives them.
        grid: Their patch grid.
        pruners: Such as a :class:`~prunex.vit.decisions.Replay` of the clean run's decisions, or an ``Absent`` before
            it.
        tape: Records what it asks for. None: only what the head reads is carried through the last block.
        masked: Dropped tokens keep their slots.
        keys: Weights of the tokens as attention keys, or None.
        places: Which patches the tokens are, where they are not all patches of ``grid`` in order; or None.

    Returns:
        [B, classes], or the pooled features without a head.
    """
    anatomy = own_anatomy(model)
    tape = Tape(narrow=True) if tape is None else tape
    tokens, state = encode(model, x, grid, anatomy, pruners, tape, masked, keys, places=places)
    tape.logits = head(model, tokens, state.policy, anatomy, tape.ops, state.sizes)
    return tape.logits


def _check_dtype(model: ViT, images: Tensor) -> None:
    wanted = model.patch_embed.proj.weight.dtype
    # Autocast brings 16- and 32-bit floats together, but leaves float64 (numpy's own) alone.
    if images.dtype != wanted and (
        torch.float64 in (images.dtype, wanted) or not torch.is_autocast_enabled(images.device.type)
    ):
        raise PrunexError(
            f"images have dtype {images.dtype}, the model {wanted}: convert them with images.to({wanted})"
        )


def _maybe_checkpoint(recompute: bool, function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False) if recompute else function(*args)


def _note(tape: Tape | None, stages: Sequence[Any]) -> None:
    if tape is not None:
        tape.steps.extend(stages)
