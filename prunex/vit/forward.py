"""The one block-by-block forward: attend, then feed; the only code that opens a timm block.

Pruners act before a block or between its halves, explainers ask for what they need through a :class:`Tape`. The halves
call the block's own submodules in the block's own order; a block that nobody asks anything of is called whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.anatomy import Anatomy, ViT, check_images, read
from prunex.vit.arithmetic import PLAIN, Arithmetic, classify, pooled, unknown_layer
from prunex.vit.attention import KeyWeights
from prunex.vit.decisions import Answer, Pruner, TokenState, apply
from prunex.vit.layouts import Layout, draw, layout_of
from prunex.vit.positions import Places, positions_of
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
    queries: tuple[int, ...] | None = None,
    rope: Tensor | None = None,
    relative: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Attended | None]:
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
        queries: The tokens that go on; None: all of them.
        rope: The block's rotary table for the tokens after the prefix, or None.
        relative: The block's relative bias [1 or B, H, N, N], or None.
        share: [B, 1, 1], what stochastic depth multiplies the branch by where both halves share a draw; or None.

    Returns:
        The stream [B, N, D] ([B, len(queries), D] if given), the read-out row [B, N] if asked for, and the recording if
        a tape runs.
    """
    ops = PLAIN if tape is None else tape.ops
    layout = layout_of(block)
    if ops.opened and not layout.opens:
        raise unknown_layer(block, "timm's Block and ResPostBlock")
    attn, y = layout.attentions(block)[0], layout.read(block, x, ops)
    recorded = None if tape is None else Attended(number, policy=policy, queries=queries)
    if tape is not None and recorded is not None and number in tape.normed:
        if y is x:  # a block without a norm in front: what attention reads, apart from what the skip carries on
            y = x.view_as(x)
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()
        recorded.normed = y
    wants_streams = tape is not None and tape.streams
    wants_matrix = tape is not None and tape.wants_matrix(number)
    wants_heads = tape is not None and number in tape.head_rows
    row = None
    asked = want_row or wants_streams or wants_matrix or wants_heads or ops.opened
    if policy is None and keys is None and queries is None and relative is None and not asked:
        branch = layout.attend(block, y, rope)
    else:
        q, k, v = layout.heads(block, y, rope, ops)
        added = relative if relative is None or queries is None else relative[:, :, list(queries)]
        asking = q if queries is None else q[:, :, list(queries)]
        dropout = attn.attn_drop.p if block.training else 0.0
        whole = None
        if wants_matrix or ops.matrices or (policy is not None and (keys is not None or ops.opened)):
            whole = attention.matrix(asking, k, attn.scale, policy, keys, queries, ops, added)
            if wants_matrix and tape is not None and tape.gradients and torch.is_grad_enabled():
                whole.requires_grad_()
            out = ops.gather(attn.attn_drop(whole), v)
        elif policy is not None:
            out = attention.under_policy(q, k, v, policy, attn.scale, dropout, relative)
            out = out if queries is None else out[:, :, list(queries)]
        elif ops.opened:
            out = ops.attention(asking, k, v)
        else:
            out = attention.fused(asking, k, v, dropout, keys, relative=added)
        if want_row:
            row = _row(q, k, attn.scale, anatomy, policy, whole, keys, relative)
        branch = layout.project(block, out, y if queries is None else y[:, list(queries)], ops)
        if tape is not None and recorded is not None:
            if wants_matrix and whole is not None:
                recorded.attention = whole if tape.reduce is None else tape.reduce(whole)
            if wants_heads:
                recorded.head_rows = _head_rows(q, k, attn.scale, anatomy, policy, keys, relative)
            recorded.row, recorded.value = row, v.detach() if wants_streams else None
    stream = x if queries is None else x[:, list(queries)]
    branch = layout.drop(block, layout.end(block, branch, ops))
    after = ops.add(stream, branch if share is None else branch * share)
    if recorded is not None and wants_streams:
        recorded.before, recorded.after = x.detach(), after.detach()
    return after, row, recorded


def _row(
    q: Tensor,
    k: Tensor,
    scale: float,
    anatomy: Anatomy,
    policy: Tensor | None,
    whole: Tensor | None,
    keys: KeyWeights | None = None,
    relative: Tensor | None = None,
) -> Tensor:
    """Attention paid by the class token, or (pooled models) by every pooled token that is there.

    Where a tape has the whole matrix, the row is taken from it, so that the gradient of that matrix holds what a fused
    token took from it.
    """
    if anatomy.readers:
        if whole is not None:
            return whole[:, :, 0].mean(1)
        return attention.rows(q[:, :, :1], k, scale, policy, keys=keys, relative=_from(relative, 0, 1))
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    asking, relative = q[:, :, start:], _from(relative, start)
    if policy is None:
        if whole is not None:
            return whole[:, :, start:].mean((1, 2))
        return attention.rows(asking, k, scale, keys=keys, relative=relative)
    # Images differ in which rows hold a dropped token, and those must not count: every row is weighed by its policy.
    there = (policy[:, start:] > 0).to(torch.promote_types(q.dtype, torch.float32))
    if whole is None:
        return attention.rows_of_heads(asking, k, scale, policy, there, keys, relative).mean(1)
    seen = whole[:, :, start:]
    return torch.einsum("bm,bhmn->bn", there, seen) / (there.sum(1, keepdim=True).clamp(min=1) * q.shape[1])


def _head_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    anatomy: Anatomy,
    policy: Tensor | None,
    keys: KeyWeights | None = None,
    relative: Tensor | None = None,
) -> Tensor:
    """The read-out row of each head, [B, H, N]."""
    if anatomy.readers:
        return attention.rows_of_heads(q[:, :, :1], k, scale, policy, keys=keys, relative=_from(relative, 0, 1))
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    there = None if policy is None else policy[:, start:] > 0
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


def embed(model: ViT, images: Tensor, ops: Arithmetic = PLAIN) -> tuple[Tensor, tuple[int, int]]:
    """From images to the tokens entering the first block, and the patch grid of these images."""
    if ops.opened:
        return _embed_opened(model, images, ops)
    x = model.patch_embed(images)
    return _enter(model, x)[0], _grid(model, x)


def embed_patches(model: ViT, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The first part of :func:`embed`: what each patch is embedded as [B, P, D], and the patch grid."""
    x = model.patch_embed(images)
    return x.flatten(1, 2) if x.ndim == 4 else x, _grid(model, x)


def place(model: ViT, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rest of :func:`embed`: embedded patches [B, P, D] get positions and prefix tokens, [B, prefix + P, D]."""
    return _enter(model, patches.unflatten(1, grid) if getattr(model, "dynamic_img_size", False) else patches)[0]


def _grid(model: ViT, x: Tensor) -> tuple[int, int]:
    return (x.shape[1], x.shape[2]) if x.ndim == 4 else tuple(model.patch_embed.grid_size)


def _enter(model: ViT, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """From embedded patches to the tokens entering the first block, and the rotary table of the blocks, if any."""
    inner: Any = model
    if isinstance(model, Eva):
        x, rope = inner._pos_embed(x)
        return inner.norm_pre(x), rope
    if isinstance(model, Beit):
        x = torch.cat([inner.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return inner.pos_drop(x if inner.pos_embed is None else x + inner.pos_embed), None
    return inner.norm_pre(inner.patch_drop(inner._pos_embed(x))), None


def patch_vectors(model: ViT, images: Tensor) -> Tensor:
    """The patch embeddings alone, before anything is added to them: [B, P, D]."""
    x = model.patch_embed(images)
    return x.flatten(1, 2) if x.ndim == 4 else x


def _embed_opened(model: ViT, images: Tensor, ops: Arithmetic) -> tuple[Tensor, tuple[int, int]]:
    """The same by elementary operations: what ``_pos_embed`` adds to patches is what it gives for patches of zeros."""
    if isinstance(model, Eva | Beit):
        raise unknown_layer(model, "VisionTransformer")
    inner: Any = model.patch_embed
    height, width = inner.patch_size
    padded = images
    if inner.dynamic_img_pad:
        padded = nn.functional.pad(images, (0, -images.shape[3] % width, 0, -images.shape[2] % height))
    patches = ops.patches(inner.proj, padded)
    grid = (patches.shape[2], patches.shape[3])
    x = ops.norm(inner.norm, patches.flatten(2).transpose(1, 2))
    with torch.no_grad():
        empty = torch.zeros_like(x)
        added = model._pos_embed(empty.unflatten(1, grid) if model.dynamic_img_size else empty)
    prefix = model.num_prefix_tokens
    parts = (getattr(model, n, None) for n in ("cls_token", "dist_token", "reg_token"))
    own = [t for t in parts if t is not None]
    front = torch.cat([t.detach() for t in own], 1).expand(len(x), -1, -1) if own else added[:, :0]
    table: Tensor | None = None if model.no_embed_class else model.pos_embed
    at = torch.zeros_like(front) if table is None else table.detach()[:, :prefix].expand_as(front)
    x = ops.add(torch.cat([front, x], 1), torch.cat([at, added[:, prefix:]], 1))
    return ops.norm(model.norm_pre, x), grid


def run(
    model: ViT,
    images: Tensor,
    anatomy: Anatomy,
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
) -> tuple[Tensor, TokenState]:
    """Images through all blocks and the final norm, with pruners deciding and a tape recording.

    Args:
        model: A supported ViT.
        images: [B, C, H, W].
        anatomy: Of the model.
        pruners: Asked in this order at every place.
        tape: Records what it asks for, or None.
        masked: Dropped tokens keep their slots under a policy instead of leaving the tensor.

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
        grid = _grid(model, patches)
        x, rope = _enter(model, patches)
    return encode(model, x, grid, anatomy, pruners, tape, masked, rope=rope)


def encode(
    model: ViT,
    x: Tensor,
    grid: tuple[int, int],
    anatomy: Anatomy,
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
    keys: KeyWeights | None = None,
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
        places: Which patches the P tokens are, where they are not all patches of ``grid`` in order; or None.
        rope: The rotary table of the blocks, where embedding gave one already.

    Returns:
        Tokens [B, prefix + n_last, D] after the final norm (only those that the head reads, where the tape asked for no
        others), and the final state with its trace.
    """
    trace = TokenTrace(grid, anatomy.prefix, x.shape[0], x.device)
    state = TokenState(x, anatomy, trace, masked, model.training, left=grid[0] * grid[1], keys=keys)
    state.positions = positions_of(model, anatomy.prefix, grid, places, rope)
    wanted: set[int] = set()
    if tape is not None:
        tape.embedded, state.ops = x, tape.ops
        wanted.update(tape.rows)
    for pruner in pruners:
        wanted.update(pruner.rows())
    recompute = model.grad_checkpointing and torch.is_grad_enabled() and tape is None
    last = len(model.blocks) - 1
    for i, block in enumerate(model.blocks):
        if tape is not None and i < tape.graph_from:
            off: Any = torch.no_grad()
        else:
            off = nullcontext()
        with off:
            for pruner in pruners:
                _note(tape, apply(pruner.before(i, state), i, False, state))
            within = [p for p in pruners if p.acts_between(i)]
            at, layout = state.positions, layout_of(block)
            turned = None if at is None else at.rope_of(i)
            plain = tape is None and state.policy is None and state.keys is None and (at is None or at.whole)
            if plain and i not in wanted and not within:
                state.tokens = _maybe_checkpoint(recompute, _whole(block, layout, at, turned), state.tokens)
                continue
            relative = None if at is None else at.relative_of(layout.relative(block))
            entered = state.tokens if layout.parallel else None
            share = draw(block, layout, state.tokens)
            policy, keys, want = state.policy, state.keys, i in wanted
            narrow = i == last and tape is not None and tape.narrow and not tape.streams and not within
            queries = anatomy.readers if narrow and anatomy.readers else None
            if tape is not None and i == last:
                tape.policy, tape.tokens = policy, state.tokens.shape[1]

            def first(
                x: Tensor,
                policy: Tensor | None,
                block: nn.Module = block,
                number: int = i,
                want: bool = want,
                keys: KeyWeights | None = keys,
                queries: tuple[int, ...] | None = queries,
                rope: Tensor | None = turned,
                relative: Tensor | None = relative,
                share: Tensor | None = share,
            ) -> tuple[Tensor, Tensor | None, Attended | None]:
                return attend(block, x, anatomy, policy, want, tape, number, keys, queries, rope, relative, share)

            state.tokens, state.row, attended = _maybe_checkpoint(recompute, first, state.tokens, policy)
            if tape is not None and attended is not None:
                tape.steps.append(attended)
            if entered is not None and queries is not None:
                entered = entered[:, list(queries)]
            for pruner in within:
                stages, entered = _decide(pruner.between(i, state), i, True, state, entered)
                _note(tape, stages)
            if tape is not None and i == last and within:
                tape.policy, tape.tokens = state.policy, state.tokens.shape[1]
            state.row = None

            def second(
                x: Tensor, entered: Tensor | None, block: nn.Module = block, share: Tensor | None = share
            ) -> tuple[Tensor, Fed | None]:
                return feed(block, x, tape, state.policy, entered, share)

            state.tokens, fed = _maybe_checkpoint(recompute, second, state.tokens, entered)
            if tape is not None and fed is not None:
                fed.block = i
                tape.steps.append(fed)
    state.tokens = (PLAIN if tape is None else tape.ops).norm(model.norm, state.tokens)
    return state.tokens, state


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
    if attached is None:
        anatomy = read(model)
    else:
        anatomy = attached.current(model)
        masked = bool(attached.masked) if masked is None else masked
    tokens, state = run(model, images, anatomy, own_pruners(model), tape, bool(masked))
    tape.logits = head(model, tokens, state.policy, anatomy, tape.ops)
    if anatomy.pool == "map":
        with torch.no_grad():
            tape.readout = pool_attention(model, tokens, state.policy, anatomy)
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
    attached = getattr(model, "prunex", None)
    anatomy = read(model) if attached is None else attached.current(model)
    tape = Tape(narrow=True) if tape is None else tape
    tokens, state = encode(model, x, grid, anatomy, pruners, tape, masked, keys, places)
    tape.logits = head(model, tokens, state.policy, anatomy, tape.ops)
    return tape.logits


def head(model: ViT, x: Tensor, policy: Tensor | None, anatomy: Anatomy, ops: Arithmetic = PLAIN) -> Tensor:
    """From the final tokens to the model's output, as timm's ``forward_head`` in eval mode.

    Args:
        model: The ViT.
        x: [B, N, D] after the final norm.
        policy: [B, N] or None: 0 for slots of dropped tokens, which are not pooled.
        anatomy: Of the model.
        ops: The arithmetic.

    Returns:
        [B, classes], or the pooled features without a head.
    """
    inner: Any = model
    if isinstance(model, VisionTransformerDistilled):
        first, second = (
            classify(h, inner.head_drop(x[:, i]), ops) for i, h in enumerate((inner.head, inner.head_dist))
        )
        return ops.mean(first, second)
    if ops.opened and anatomy.pool in ("avg", "avgmax"):
        features = pooled(x, anatomy.readout(x.shape[1], policy, x), ops)
        if anatomy.pool == "avgmax":
            features = ops.mean(masked_pool(model, x, "max", policy, anatomy), features)
    else:
        if ops.opened and anatomy.pool == "map":
            raise unknown_layer(inner.attn_pool, "token and average pooling")
        features = masked_pool(model, x, None, policy, anatomy)
    return classify(inner.head, inner.head_drop(ops.norm(inner.fc_norm, features)), ops)


def masked_pool(model: ViT, x: Tensor, pool_type: str | None, policy: Tensor | None, anatomy: Anatomy) -> Tensor:
    """Pool as timm does, but over the tokens that are there.

    Args:
        model: The ViT.
        x: [B, N, D] after the final norm.
        pool_type: timm's override, or None.
        policy: [B, N] or None.
        anatomy: Of the model.
    """
    inner: Any = model
    kind = model.global_pool if pool_type is None else pool_type
    if policy is not None and policy.shape[1] == x.shape[1] and anatomy.pool == "map":
        start = 0 if anatomy.pool_prefix else anatomy.prefix
        return attention.latent(inner.attn_pool, x[:, start:], policy[:, start:])[0]
    if policy is None or policy.shape[1] != x.shape[1] or kind in ("token", "") or not isinstance(kind, str):
        if isinstance(model, Beit):
            return global_pool_nlc(x, kind, anatomy.prefix)
        return type(inner).pool(inner, x, pool_type)
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    p = policy[:, start:, None].to(x.dtype)
    body = x[:, start:]
    mean = (body * p).sum(1) / p.sum(1).clamp(min=1)
    if kind == "avg":
        return mean
    top = body.masked_fill(p <= 0, torch.finfo(x.dtype).min).amax(1)
    top = torch.where(p.sum(1) > 0, top, 0)  # an image whose patches were all dropped
    return top if kind == "max" else 0.5 * (top + mean)


def pool_attention(model: ViT, x: Tensor, policy: Tensor | None, anatomy: Anatomy) -> Tensor:
    """What an attention-pooling head looks at: float [B, N], mean over its heads, 0 for prefix tokens it skips.

    Args:
        model: A ViT with ``global_pool="map"``.
        x: [B, N, D] after the final norm.
        policy: [B, N] or None.
        anatomy: Of the model.
    """
    inner: Any = model
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    seen = attention.latent(inner.attn_pool, x[:, start:], None if policy is None else policy[:, start:])[1]
    return nn.functional.pad(seen, (start, 0))


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
