"""The class token that enters behind the blocks (CaiT): it alone asks, and patches stay as they are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunex.vit import attention
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import PLAIN, Arithmetic, mlp, promoted
from prunex.vit.attention import KeyWeights
from prunex.vit.blocks.eva import times
from prunex.vit.calls import inside
from prunex.vit.handover import Handed
from prunex.vit.recorder import SILENT, Recorder
from prunex.vit.state import TokenState


def finish(state: TokenState, recorder: Recorder = SILENT) -> None:
    """From the tokens that left the last block to the model's final ones, [B, prefix + n, D], in place.

    Where a class token enters now it is the first of them, and of these :func:`left_by` tells, not the state. A tape is
    given what it looked at as the read-out [B, n], as with attention pooling: its blocks' rows, head means in equal
    parts with the skip connection, multiplied through and rescaled to sum 1.
    """
    model: Any = state.model
    if state.anatomy.late:
        token, tape = model.cls_token.expand(state.tokens.shape[0], -1, -1), recorder.tape
        seen: list[Tensor] | None = None if tape is None else []
        # With pool="avg" timm's head reads the patches, and what the class token looked at says nothing of them.
        read = tape is not None and state.anatomy.pool != "avg"
        if tape is not None and read and recorder.ops.opened:
            # A parameter, and yet relevance must end somewhere.
            token = tape.late = token.detach().clone().requires_grad_()
        state.tokens = _with_class(model, state.tokens, token, state.policy, state.attending, recorder.ops, seen)
        if tape is not None and seen is not None and read:
            tape.readout = _through(seen, state.tokens)
    state.tokens = recorder.ops.norm(model.norm, state.tokens)


def finished(model: ViT, x: Tensor, left: Handed) -> tuple[Tensor, Handed]:
    """The same for tokens [B, prefix + n, D] of which ``left`` is known: final ones, and what is known of these."""
    inner: Any = model
    if left.anatomy.late:
        keys = None if left.sizes is None else KeyWeights(sizes=left.sizes)
        x = _with_class(model, x, inner.cls_token.expand(x.shape[0], -1, -1), left.policy, keys, PLAIN, None)
    return inner.norm(x), _entered(left)


def left_by(state: TokenState) -> Handed:
    """What pooling and head must know of the final tokens of a forward."""
    return _entered(Handed(state.anatomy, state.policy, state.sizes, state.trace))


def _entered(handed: Handed) -> Handed:
    """The same with a class token in front that entered late, where there is one."""
    anatomy, trace = handed.anatomy, handed.trace
    if not anatomy.late:
        return handed
    readers = () if anatomy.pool == "avg" else (0,)
    return replace(
        handed,
        anatomy=replace(anatomy, prefix=anatomy.final_prefix, readers=readers, late=False),
        policy=_in_front(handed.policy),
        sizes=_in_front(handed.sizes),
        trace=None if trace is None else replace(trace, prefix=anatomy.final_prefix),
    )


def _in_front(values: Tensor | None) -> Tensor | None:
    """Values of patches [B, n], and 1 for the class token in front."""
    return None if values is None else torch.cat([values.new_ones(values.shape[0], 1), values], 1)


def _with_class(
    model: ViT,
    x: Tensor,
    token: Tensor,
    policy: Tensor | None,
    keys: KeyWeights | None,
    ops: Arithmetic,
    seen: list[Tensor] | None,
) -> Tensor:
    """Patches [B, n, D] with the class token in front, [B, 1 + n, D]; ``seen`` gets each block's row [B, 1 + n]."""
    inner: Any = model
    whole = policy is None and keys is None and seen is None and not ops.opened
    for block in inner.blocks_token_only:
        if whole:
            token = block(x, token)
        else:
            token = inside(block, partial(_block, block, policy=policy, keys=keys, ops=ops, seen=seen), x, token)
    return torch.cat([token, x], 1)


def _block(
    block: Any,
    x: Tensor,
    token: Tensor,
    policy: Tensor | None,
    keys: KeyWeights | None,
    ops: Arithmetic,
    seen: list[Tensor] | None,
) -> Tensor:
    """Timm's ``LayerScaleBlockClassAttn``: the class token [B, 1, D] afterwards, by the patches that are there."""

    def attend(y: Tensor) -> Tensor:
        attn = block.attn
        q, k, v = (ops.linear(layer, t) for layer, t in ((attn.q, y[:, :1]), (attn.k, y), (attn.v, y)))
        # Not scaled beforehand, as timm does: ops.scores does so.
        q, k, v = (t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = promoted(ops.scores(q, k, attn.scale))
        present = _in_front(policy)
        if keys is not None:
            factor, sizes = _in_front(keys.factor), _in_front(keys.sizes)
            shown = None if present is None else (present > 0)[:, None, None, :]
            scores = KeyWeights(factor, keys.rule, sizes).on_scores(scores, shown)
        looked = attention.counted(scores, None if present is None else present[:, None, None, :], ops)
        if seen is not None:
            seen.append(attention.over_heads(looked.detach())[:, 0])
        out = ops.gather(attn.attn_drop(looked), v)
        return attn.proj_drop(ops.linear(attn.proj, out.transpose(1, 2).flatten(2)))

    normed = ops.norm(block.norm1, torch.cat([token, x], 1))
    branch = times(block.gamma_1, inside(block.attn, attend, normed), ops)
    token = ops.add(token, block.drop_path(branch))
    branch = times(block.gamma_2, mlp(block.mlp, ops.norm(block.norm2, token), ops), ops)
    return ops.add(token, block.drop_path(branch))


def _through(seen: list[Tensor], tokens: Tensor) -> Tensor:
    """From each block's row [B, 1 + n] to what reached the class token of each patch, [B, n], in at least float32."""
    itself = promoted(tokens.detach()).new_ones(tokens.shape[0], 1)
    patches = itself.new_zeros(tokens.shape[0], tokens.shape[1] - 1)
    # From the last block to the first: half of what reached the token came by the skip connection.
    for row in reversed(seen):
        patches = patches + 0.5 * itself * row[:, 1:]
        itself = 0.5 * itself * (1 + row[:, :1])
    return patches / patches.sum(1, keepdim=True).clamp(min=torch.finfo(patches.dtype).tiny)


def class_macs(model: Any, patches: int) -> int:
    """Multiply-adds of the blocks in which a late class token asks so many patches."""
    # The class token alone has a query and is projected; keys and values are of the patches, too.
    total = 0
    for block in getattr(model, "blocks_token_only", None) or ():
        width = block.attn.q.in_features
        mlp_macs = sum(m.weight.numel() for m in block.mlp.modules() if isinstance(m, nn.Linear))
        total += 2 * width * width + (patches + 1) * (2 * width * width + 2 * width) + mlp_macs
    return total
