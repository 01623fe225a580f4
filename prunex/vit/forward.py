"""The one block-by-block forward: attend, then feed; the only code that opens a timm block.

Pruners act before a block or between its halves, explainers ask for what they need through a :class:`Tape`. The halves
call the block's own submodules in the block's own order; a block that nobody asks anything of is called whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.anatomy import Anatomy, check_images, read
from prunex.vit.tape import Attended, Fed, Tape
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


class Pruner(Protocol):
    """What the forward asks of a token pruner; see ``prunex.pruners.base``."""

    def rows(self) -> frozenset[int]:
        """Blocks whose read-out attention row it needs between the halves."""

    def acts_between(self, block: int) -> bool:
        """Whether it may decide between the halves of this block."""

    def before(self, block: int, state: TokenState) -> Keep | Mask | None:
        """Decide before a block."""

    def between(self, block: int, state: TokenState) -> Keep | Mask | None:
        """Decide between a block's attention and its MLP."""


def attend(
    block: Any, x: Tensor, anatomy: Anatomy, policy: Tensor | None, want_row: bool, tape: Tape | None
) -> tuple[Tensor, Tensor | None, Attended | None]:
    """The first half of a block: ``x + drop_path(ls(attn(norm(x))))``, with what was asked for from inside.

    Returns:
        The stream [B, N, D], the read-out row [B, N] if asked for, and the recording if a tape runs.
    """
    attn, y = block.attn, block.norm1(x)
    want_streams = tape is not None and tape.streams
    row = heads_attention = value = whole = None
    if policy is None and not (want_row or want_streams or (tape is not None and tape.attention)):
        branch = attn(y)
    else:
        q, k, v = attention.heads(attn, y)
        dropout = attn.attn_drop.p if block.training else 0.0
        if tape is not None and tape.attention:
            whole = attention.matrix(q, k, attn.scale, policy)
            if tape.gradients and not whole.requires_grad:
                whole.requires_grad_()
            out = attn.attn_drop(whole).to(v.dtype) @ v
            heads_attention = whole if tape.reduce is None else tape.reduce(whole)
        elif policy is not None:
            out = attention.under_policy(q, k, v, policy, attn.scale, dropout)
        else:
            out = attention.fused(q, k, v, dropout)
        if want_row:
            row = _row(q, k, attn.scale, anatomy, policy, whole)
        branch = attention.project(attn, out, y)
        value = v.detach() if want_streams else None
    after = x + block.drop_path1(block.ls1(branch))
    recorded = None
    if tape is not None:
        recorded = Attended(-1, heads_attention, value, policy=policy, row=row)
        if want_streams:
            recorded.before, recorded.after = x.detach(), after.detach()
    return after, row, recorded


def _row(q: Tensor, k: Tensor, scale: float, anatomy: Anatomy, policy: Tensor | None, whole: Tensor | None) -> Tensor:
    """Attention paid by the class token, or (pooled models) by every pooled token that is there.

    Where a tape has the whole matrix, the row is taken from it, so that the gradient of that matrix holds what a fused
    token took from it.
    """
    if anatomy.readers:
        return attention.rows(q[:, :, :1], k, scale, policy) if whole is None else whole[:, :, 0].mean(1)
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    asking = q[:, :, start:]
    if policy is None:
        return attention.rows(asking, k, scale) if whole is None else whole[:, :, start:].mean((1, 2))
    # Images differ in which rows hold a dropped token, and those must not count: every row is weighed by its policy.
    there = (policy[:, start:] > 0).to(torch.promote_types(q.dtype, torch.float32))
    if whole is None:
        scores = ((asking * scale) @ k.transpose(-2, -1)).to(there.dtype)
        seen = scores.masked_fill((policy <= 0)[:, None, None, :], float("-inf")).softmax(-1)
    else:
        seen = whole[:, :, start:]
    return torch.einsum("bm,bhmn->bn", there, seen) / (there.sum(1, keepdim=True).clamp(min=1) * q.shape[1])


def feed(block: Any, x: Tensor, tape: Tape | None = None, policy: Tensor | None = None) -> tuple[Tensor, Fed | None]:
    """The second half of a block: ``x + drop_path(ls(mlp(norm(x))))``."""
    branch = block.ls2(block.mlp(block.norm2(x)))
    recorded = Fed(-1, x.detach(), branch.detach(), policy) if tape is not None and tape.streams else None
    return x + block.drop_path2(branch), recorded


def embed(model: VisionTransformer, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """From images to the tokens entering the first block, and the patch grid of these images."""
    x = model.patch_embed(images)
    grid = tuple(x.shape[1:3]) if x.ndim == 4 else tuple(model.patch_embed.grid_size)
    return model.norm_pre(model.patch_drop(model._pos_embed(x))), grid


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
    x, grid = embed(model, images)
    trace = TokenTrace(grid, anatomy.prefix, images.shape[0], images.device)
    state = TokenState(x, anatomy, trace, masked, model.training, left=grid[0] * grid[1])
    if tape is not None and tape.streams:
        tape.embedded = x.detach()
    wanted: set[int] = set(tape.rows) if tape is not None else set()
    for pruner in pruners:
        wanted.update(pruner.rows())
    recompute = model.grad_checkpointing and torch.is_grad_enabled() and tape is None
    for i, block in enumerate(model.blocks):
        for pruner in pruners:
            _apply(pruner.before(i, state), i, state, tape)
        within = [p for p in pruners if p.acts_between(i)]
        if tape is None and state.policy is None and i not in wanted and not within:
            state.tokens = _maybe_checkpoint(recompute, block, state.tokens)
            continue
        policy = state.policy
        want = i in wanted

        def first(
            x: Tensor, policy: Tensor | None, block: nn.Module = block, want: bool = want
        ) -> tuple[Tensor, Tensor | None, Attended | None]:
            return attend(block, x, anatomy, policy, want, tape)

        state.tokens, state.row, attended = _maybe_checkpoint(recompute, first, state.tokens, policy)
        if tape is not None and attended is not None:
            attended.block = i
            tape.steps.append(attended)
        for pruner in within:
            _apply(pruner.between(i, state), i, state, tape)
        state.row = None

        def second(x: Tensor, block: nn.Module = block) -> tuple[Tensor, Fed | None]:
            return feed(block, x, tape, state.policy)

        state.tokens, fed = _maybe_checkpoint(recompute, second, state.tokens)
        if tape is not None and fed is not None:
            fed.block = i
            tape.steps.append(fed)
    if tape is not None:
        tape.policy, tape.tokens = state.policy, state.tokens.shape[1]
    state.tokens = model.norm(state.tokens)
    return state.tokens, state


def record(model: VisionTransformer, images: Tensor, tape: Tape) -> TokenState:
    """Run a model, pruned or dense, under a tape, leaving no trace of it on the model.

    Args:
        model: A supported ViT; call it in eval mode.
        images: [B, C, H, W].
        tape: Says what to record; its ``logits`` are filled too ([B, classes], or pooled features without a head).

    Returns:
        The final state, with the trace.
    """
    attached = getattr(model, "prunex", None)
    if attached is None:
        tokens, state = run(model, images, read(model), tape=tape)
        tape.logits = type(model).forward_head(model, tokens)
        return state
    masked = bool(attached.masked)
    tokens, state = run(model, images, attached.current(model), (attached.pruner,), tape, masked)
    found, attached.policy = attached.policy, state.policy
    try:
        tape.logits = type(model).forward_head(model, tokens)
    finally:
        attached.policy = found
    return state


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


def _apply(decision: Keep | Mask | None, block: int, state: TokenState, tape: Tape | None) -> None:
    """Carry a decision out: gather, fuse or mask, and write it into the trace."""
    if decision is None:
        return
    if isinstance(decision, Mask):
        stage = _mask(decision, block, state)
    elif state.masked:
        stage = _keep_masked(decision, block, state)
    else:
        stage = _keep(decision, block, state)
    state.trace.stages.append(stage)
    if tape is not None:
        tape.steps.append(stage)


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
        parts.append(dropped.unsqueeze(1).to(x.dtype) @ body)
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
        state.tokens = torch.cat([state.tokens, dropped.unsqueeze(1).to(body.dtype) @ body], 1)
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


# --------------------------------------------------------------------------------------------------------------------
# Putting the forward on a model, and taking it off again.

_METHODS = ("forward_features", "forward_head", "pool", "forward_intermediates")


def _forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    if attn_mask is not None or any(kwargs.values()):
        raise PrunexError("attn_mask and is_causal cannot be combined with token pruning: call detach() first")
    return self.prunex.features(self, x)


def _pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
    return self.prunex.pool(self, x, pool_type)


def _forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
    out = type(self).forward_head(self, x, pre_logits=pre_logits)
    if not pre_logits:
        self.prunex.saw_logits(out)
    return out


def _forward_intermediates(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise PrunexError(
        "forward_intermediates of a pruned model has no full grid to return: detach() first, or read pruning.trace"
    )


def put_on(model: VisionTransformer) -> None:
    """Route the model's forward through ``model.prunex`` (an object with features, pool and saw_logits)."""
    ours: tuple[Callable[..., Any], ...] = (_forward_features, _forward_head, _pool, _forward_intermediates)
    for name, function in zip(_METHODS, ours, strict=True):
        model.__dict__[name] = MethodType(function, model)


def take_off(model: VisionTransformer) -> None:
    """Give the model its class's own methods back."""
    for name in _METHODS:
        model.__dict__.pop(name, None)


def masked_pool(
    model: VisionTransformer, x: Tensor, pool_type: str | None, policy: Tensor | None, anatomy: Anatomy
) -> Tensor:
    """Pool as timm does, but over the tokens that are there.

    Args:
        model: The ViT.
        x: [B, N, D] after the final norm.
        pool_type: timm's override, or None.
        policy: [B, N] or None.
        anatomy: Of the model.
    """
    kind = model.global_pool if pool_type is None else pool_type
    if policy is None or policy.shape[1] != x.shape[1] or kind in ("token", "") or not isinstance(kind, str):
        return type(model).pool(model, x, pool_type)
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    p = policy[:, start:, None].to(x.dtype)
    body = x[:, start:]
    mean = (body * p).sum(1) / p.sum(1).clamp(min=1)
    if kind == "avg":
        return mean
    top = body.masked_fill(p <= 0, torch.finfo(x.dtype).min).amax(1)
    top = torch.where(p.sum(1) > 0, top, 0)  # an image whose patches were all dropped
    return top if kind == "max" else 0.5 * (top + mean)


@contextmanager
def as_found(model: nn.Module, train: bool | None = None) -> Iterator[None]:
    """Run something with every module in train or eval mode, and give each its own flag back, whatever is raised."""
    flags = [(m, m.training) for m in model.modules()]
    try:
        if train is not None:
            model.train(train)
        yield
    finally:
        for m, flag in flags:
            m.training = flag


def check_parity(model: VisionTransformer, tolerance: float = 1e-4) -> Anatomy:
    """Send one small random input through timm's own forward and through ours.

    Args:
        model: A supported ViT, nothing attached.
        tolerance: Largest difference allowed, relative to the largest output.

    Returns:
        The model's anatomy.

    Raises:
        PrunexError: By name, for a model whose outputs differ (a new timm, a subclass with something of its own).
    """
    anatomy = read(model)
    own = [name for name in ("forward", *_METHODS) if name in vars(model)]
    if own:
        raise PrunexError(
            f"this {type(model).__name__} has its own {', '.join(own)}, set on the object: restore the class's methods "
            "first, or subclass and prune the plain model"
        )
    weight = next(model.parameters())
    if weight.is_meta:
        return anatomy
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, anatomy.channels, *anatomy.image, generator=generator).to(weight)
    with as_found(model, train=False), torch.no_grad():
        theirs = type(model).forward_features(model, image)
        tape = Tape(rows=frozenset(range(anatomy.depth)))
        ours, _ = run(model, image, anatomy, tape=tape)
    scale = theirs.abs().max().clamp(min=1e-6)
    gap = float((ours - theirs).abs().max() / scale)
    if not gap <= max(tolerance, 2e-2 if weight.dtype in (torch.float16, torch.bfloat16) else 0):
        raise PrunexError(
            f"{type(model).__name__} computes something prunex does not know (outputs differ by {gap:.1e} of their "
            "size): it is not supported as it is"
        )
    return anatomy
