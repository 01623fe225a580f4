"""The one block-by-block forward: attend, then feed; the only code that opens a timm block.

Pruners act before a block or between its halves, explainers ask for what they need through a :class:`Tape`. The halves
call the block's own submodules in the block's own order; a block that nobody asks anything of is called whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.anatomy import Anatomy, check_images, read
from prunex.vit.arithmetic import PLAIN, Arithmetic, classify, mlp, pooled, promoted
from prunex.vit.attention import KeyWeights
from prunex.vit.decisions import Pruner, TokenState, apply
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
    sizes: Tensor | None = None,
    want_keys: bool = False,
) -> tuple[Tensor, Tensor | None, Attended | None, Tensor | None]:
    """The first half of a block: ``x + drop_path(ls(attn(norm(x))))``, with what was asked for from inside.

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
        sizes: [B, N] or None: how many patches each token stands for; read-out rows of pooled tokens count by it.
        want_keys: Whether the keys' mean over heads is wanted.

    Returns:
        The stream [B, N, D] ([B, len(queries), D] if given), the read-out row [B, N] if asked for, the recording if a
        tape runs, and the keys' mean over heads [B, N, d] if asked for, off the graph.
    """
    ops = PLAIN if tape is None else tape.ops
    attn, y = block.attn, ops.norm(block.norm1, x)
    recorded = None if tape is None else Attended(number, policy=policy, queries=queries, sizes=sizes)
    if tape is not None and recorded is not None and number in tape.normed:
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()
        recorded.normed = y
    wants_streams = tape is not None and tape.streams
    wants_matrix = tape is not None and tape.wants_matrix(number)
    wants_heads = tape is not None and number in tape.head_rows
    row = key_mean = None
    asked = want_row or want_keys or wants_streams or wants_matrix or wants_heads or ops.opened
    if policy is None and keys is None and queries is None and not asked:
        branch = attn(y)
    else:
        q, k, v = attention.heads(attn, y, ops)
        if want_keys:
            key_mean = promoted(k.detach()).mean(1)
        asking = q if queries is None else q[:, :, list(queries)]
        dropout = attn.attn_drop.p if block.training else 0.0
        whole = None
        ruled = policy is not None and keys is not None and keys.factor is not None
        unusual = ops.opened and (policy is not None or keys is not None)  # what plain fused arithmetic does not know
        if wants_matrix or ops.matrices or ruled or unusual:
            whole = attention.matrix(asking, k, attn.scale, policy, keys, queries, ops)
            if wants_matrix and tape is not None and tape.gradients and torch.is_grad_enabled():
                whole.requires_grad_()
            out = ops.gather(attn.attn_drop(whole), v)
        elif policy is not None:
            by_size = {} if keys is None else {"sizes": keys.sizes}
            out = attention.under_policy(q, k, v, policy, attn.scale, dropout, **by_size)
            out = out if queries is None else out[:, :, list(queries)]
        elif ops.opened:
            out = ops.attention(asking, k, v)
        else:
            out = attention.fused(asking, k, v, dropout, keys)
        if want_row:
            row = _row(q, k, attn.scale, anatomy, policy, whole, keys, sizes)
        branch = attention.project(attn, out, y if queries is None else y[:, list(queries)], ops)
        if tape is not None and recorded is not None:
            if wants_matrix and whole is not None:
                recorded.attention = whole if tape.reduce is None else tape.reduce(whole)
            if wants_heads:
                recorded.head_rows = _head_rows(q, k, attn.scale, anatomy, policy, keys, sizes)
            recorded.row, recorded.value = row, v.detach() if wants_streams else None
    stream = x if queries is None else x[:, list(queries)]
    after = ops.add(stream, block.drop_path1(ops.scaled(block.ls1, branch)))
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
) -> Tensor:
    """Attention paid by the class token, or (pooled models) by every pooled token that is there, by its size.

    Where a tape has the whole matrix, the row is taken from it, so that the gradient of that matrix holds what a fused
    token took from it.
    """
    if anatomy.readers:
        return attention.rows(q[:, :, :1], k, scale, policy, keys=keys) if whole is None else whole[:, :, 0].mean(1)
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    asking = q[:, :, start:]
    there = _counting(policy, sizes, start)
    if there is None:
        return attention.rows(asking, k, scale, keys=keys) if whole is None else whole[:, :, start:].mean((1, 2))
    # Images differ in which rows hold a dropped token, and those must not count: every row is weighed by its policy.
    there = there.to(torch.promote_types(q.dtype, torch.float32))
    if whole is None:
        return attention.rows_of_heads(asking, k, scale, policy, there, keys).mean(1)
    seen = whole[:, :, start:]
    return torch.einsum("bm,bhmn->bn", there, seen) / (there.sum(1, keepdim=True).clamp(min=1) * q.shape[1])


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
) -> Tensor:
    """The read-out row of each head, [B, H, N]."""
    if anatomy.readers:
        return attention.rows_of_heads(q[:, :, :1], k, scale, policy, keys=keys)
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    return attention.rows_of_heads(q[:, :, start:], k, scale, policy, _counting(policy, sizes, start), keys)


def feed(block: Any, x: Tensor, tape: Tape | None = None, policy: Tensor | None = None) -> tuple[Tensor, Fed | None]:
    """The second half of a block: ``x + drop_path(ls(mlp(norm(x))))``."""
    ops = PLAIN if tape is None else tape.ops
    branch = ops.scaled(block.ls2, mlp(block.mlp, ops.norm(block.norm2, x), ops))
    recorded = Fed(-1, x.detach(), branch.detach(), policy) if tape is not None and tape.streams else None
    return ops.add(x, block.drop_path2(branch)), recorded


def embed(model: VisionTransformer, images: Tensor, ops: Arithmetic = PLAIN) -> tuple[Tensor, tuple[int, int]]:
    """From images to the tokens entering the first block, and the patch grid of these images."""
    if ops.opened:
        return _embed_opened(model, images, ops)
    x = model.patch_embed(images)
    return _enter(model, x), _grid(model, x)


def embed_patches(model: VisionTransformer, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The first part of :func:`embed`: what each patch is embedded as [B, P, D], and the patch grid."""
    x = model.patch_embed(images)
    return x.flatten(1, 2) if x.ndim == 4 else x, _grid(model, x)


def place(model: VisionTransformer, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rest of :func:`embed`: embedded patches [B, P, D] get positions and prefix tokens, [B, prefix + P, D]."""
    return _enter(model, patches.unflatten(1, grid) if model.dynamic_img_size else patches)


def _grid(model: VisionTransformer, x: Tensor) -> tuple[int, int]:
    return (x.shape[1], x.shape[2]) if x.ndim == 4 else tuple(model.patch_embed.grid_size)


def _enter(model: VisionTransformer, x: Tensor) -> Tensor:
    return model.norm_pre(model.patch_drop(model._pos_embed(x)))


def patch_vectors(model: VisionTransformer, images: Tensor) -> Tensor:
    """The patch embeddings alone, before anything is added to them: [B, P, D]."""
    x = model.patch_embed(images)
    return x.flatten(1, 2) if x.ndim == 4 else x


def _embed_opened(model: VisionTransformer, images: Tensor, ops: Arithmetic) -> tuple[Tensor, tuple[int, int]]:
    """The same by elementary operations: what ``_pos_embed`` adds to patches is what it gives for patches of zeros."""
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
    model: VisionTransformer,
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
    x, grid = embed(model, images, PLAIN if tape is None else tape.ops)
    return encode(model, x, grid, anatomy, pruners, tape, masked)


def encode(
    model: VisionTransformer,
    x: Tensor,
    grid: tuple[int, int],
    anatomy: Anatomy,
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
    keys: KeyWeights | None = None,
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

    Returns:
        Tokens [B, prefix + n_last, D] after the final norm (only those that the head reads, where the tape asked for no
        others), and the final state with its trace.
    """
    trace = TokenTrace(grid, anatomy.prefix, x.shape[0], x.device)
    state = TokenState(x, anatomy, trace, masked, model.training, left=grid[0] * grid[1], keys=keys)
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
    for i, block in enumerate(model.blocks):
        if tape is not None and i < tape.graph_from:
            off: Any = torch.no_grad()
        else:
            off = nullcontext()
        with off:
            for pruner in pruners:
                _note(tape, apply(pruner.before(i, state), i, False, state))
            within = [p for p in pruners if p.acts_between(i)]
            plain = tape is None and state.policy is None and state.attending is None
            if plain and i not in wanted and not within:
                state.tokens = _maybe_checkpoint(recompute, block, state.tokens)
                continue
            policy, keys, want = state.policy, state.attending, i in wanted
            narrow = i == last and tape is not None and tape.narrow and not tape.streams and not within
            queries = anatomy.readers if narrow and anatomy.readers else None
            if tape is not None and i == last:
                tape.policy, tape.tokens, tape.sizes = policy, state.tokens.shape[1], state.sizes

            def first(
                x: Tensor,
                policy: Tensor | None,
                block: nn.Module = block,
                number: int = i,
                want: bool = want,
                keys: KeyWeights | None = keys,
                queries: tuple[int, ...] | None = queries,
                sizes: Tensor | None = state.sizes,
            ) -> tuple[Tensor, Tensor | None, Attended | None, Tensor | None]:
                return attend(block, x, anatomy, policy, want, tape, number, keys, queries, sizes, number in matched)

            state.tokens, state.row, attended, state.key_mean = _maybe_checkpoint(
                recompute, first, state.tokens, policy
            )
            if tape is not None and attended is not None:
                tape.steps.append(attended)
            for pruner in within:
                _note(tape, apply(pruner.between(i, state), i, True, state))
            if tape is not None and i == last and within:
                tape.policy, tape.tokens, tape.sizes = state.policy, state.tokens.shape[1], state.sizes
            state.row = state.key_mean = None

            def second(x: Tensor, block: nn.Module = block) -> tuple[Tensor, Fed | None]:
                return feed(block, x, tape, state.policy)

            state.tokens, fed = _maybe_checkpoint(recompute, second, state.tokens)
            if tape is not None and fed is not None:
                fed.block = i
                tape.steps.append(fed)
    state.tokens = (PLAIN if tape is None else tape.ops).norm(model.norm, state.tokens)
    return state.tokens, state


def own_pruners(model: VisionTransformer) -> tuple[Pruner, ...]:
    """The pruner attached to a model, or nothing."""
    attached = getattr(model, "prunex", None)
    return () if attached is None else (attached.pruner,)


def record(model: VisionTransformer, images: Tensor, tape: Tape, masked: bool | None = None) -> TokenState:
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
    tape.logits = head(model, tokens, state.policy, anatomy, tape.ops, state.sizes)
    return state


def resume(
    model: VisionTransformer,
    x: Tensor,
    grid: tuple[int, int],
    pruners: Sequence[Pruner] = (),
    tape: Tape | None = None,
    masked: bool = False,
    keys: KeyWeights | None = None,
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

    Returns:
        [B, classes], or the pooled features without a head.
    """
    attached = getattr(model, "prunex", None)
    anatomy = read(model) if attached is None else attached.current(model)
    tape = Tape(narrow=True) if tape is None else tape
    tokens, state = encode(model, x, grid, anatomy, pruners, tape, masked, keys)
    tape.logits = head(model, tokens, state.policy, anatomy, tape.ops, state.sizes)
    return tape.logits


def head(
    model: VisionTransformer,
    x: Tensor,
    policy: Tensor | None,
    anatomy: Anatomy,
    ops: Arithmetic = PLAIN,
    sizes: Tensor | None = None,
) -> Tensor:
    """From the final tokens to the model's output, as timm's ``forward_head`` in eval mode.

    Args:
        model: The ViT.
        x: [B, N, D] after the final norm.
        policy: [B, N] or None: 0 for slots of dropped tokens, which are not pooled.
        anatomy: Of the model.
        ops: The arithmetic.
        sizes: [B, N] or None: how many patches each token stands for; means over tokens count by it.

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
        features = pooled(x, anatomy.readout(x.shape[1], policy, x, sizes), ops)
        if anatomy.pool == "avgmax":
            features = ops.mean(masked_pool(model, x, "max", policy, anatomy), features)
    else:
        features = masked_pool(model, x, None, policy, anatomy, sizes)
    return classify(inner.head, inner.head_drop(ops.norm(inner.fc_norm, features)), ops)


def masked_pool(
    model: VisionTransformer,
    x: Tensor,
    pool_type: str | None,
    policy: Tensor | None,
    anatomy: Anatomy,
    sizes: Tensor | None = None,
) -> Tensor:
    """Pool as timm does, but over the tokens that are there, and means by size: sum s x / sum s.

    Args:
        model: The ViT.
        x: [B, N, D] after the final norm.
        pool_type: timm's override, or None.
        policy: [B, N] or None.
        anatomy: Of the model.
        sizes: [B, N] or None: how many patches each token stands for.
    """
    kind = model.global_pool if pool_type is None else pool_type
    # Tokens of another number are the user's own, and not what the last forward left.
    policy, sizes = (None if t is None or t.shape[1] != x.shape[1] else t for t in (policy, sizes))
    if (policy is None and sizes is None) or kind in ("token", "") or not isinstance(kind, str):
        return type(model).pool(model, x, pool_type)
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    body = x[:, start:]
    p = (x.new_ones(x.shape[:2]) if policy is None else policy)[:, start:, None].to(x.dtype)
    if sizes is None:
        mean = (body * p).sum(1) / p.sum(1).clamp(min=1)
    else:
        share = sizes[:, start:, None] * p
        mean = (body * (share / share.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)).sum(1)
    if kind == "avg":
        return mean
    top = body.masked_fill(p <= 0, torch.finfo(x.dtype).min).amax(1)
    top = torch.where(p.sum(1) > 0, top, 0)  # an image whose patches were all dropped
    return top if kind == "max" else 0.5 * (top + mean)


def _check_dtype(model: VisionTransformer, images: Tensor) -> None:
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
