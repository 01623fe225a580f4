"""From the final tokens to the model's output: pooling over tokens that are there, by size, and the head."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.anatomy import Anatomy, ViT, head_classes
from prunex.vit.arithmetic import PLAIN, Arithmetic, classify, pooled, promoted, unknown_layer
from prunex.vit.calls import inside

POOLS = ("avg", "max", "avgmax")

TAIL = "prunex_tail"  # on a ViT that stands for a whole module: what the module makes of its ViT's output


def head(
    model: ViT,
    x: Tensor,
    policy: Tensor | None,
    anatomy: Anatomy,
    ops: Arithmetic = PLAIN,
    sizes: Tensor | None = None,
) -> Tensor:
    """From the final tokens to the model's output, as timm's ``forward_head`` in eval mode.

    A ViT that stands for the module round it (:mod:`prunex.vit.surroundings`) gives the module's output.

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
    out = _own_head(model, x, policy, anatomy, ops, sizes)
    tail = vars(model).get(TAIL)
    return out if tail is None else tail(out, ops)


def before_softmax(model: ViT, out: Tensor) -> Tensor:
    """What a softmax may be taken of: the output [R, classes], or its logarithm where the model took one already."""
    tail = vars(model).get(TAIL)
    if tail is None or not tail.probabilities:
        return out
    return promoted(out).clamp(min=torch.finfo(torch.float32).tiny).log()


def classifies(model: ViT) -> bool:
    """Whether a model gives classes and no bare features.

    The head itself tells, not num_classes: users put heads on and take them off by assignment.
    """
    return not isinstance(model.head, nn.Identity) or TAIL in vars(model)


def outputs(model: ViT) -> int:
    """How many classes a model gives; 0 without a classifier."""
    tail = vars(model).get(TAIL)
    return head_classes(model) if tail is None else tail.classes


def _own_head(
    model: ViT, x: Tensor, policy: Tensor | None, anatomy: Anatomy, ops: Arithmetic, sizes: Tensor | None
) -> Tensor:
    """The ViT's own output."""
    inner: Any = model
    if isinstance(model, VisionTransformerDistilled):
        x = for_heads(model, x, policy, anatomy, ops)
        first, second = (
            classify(h, inner.head_drop(x[:, i]), ops) for i, h in enumerate((inner.head, inner.head_dist))
        )
        return ops.mean(first, second)
    features = _features(model, x, policy, anatomy, ops, sizes)
    return classify(inner.head, inner.head_drop(ops.norm(inner.fc_norm, features)), ops)


def _features(
    model: ViT,
    x: Tensor,
    policy: Tensor | None,
    anatomy: Anatomy,
    ops: Arithmetic,
    sizes: Tensor | None = None,
) -> Tensor:
    """The pooled tokens, [B, D]."""
    if ops.opened and anatomy.pool == "map":
        inner: Any = model
        raise unknown_layer(inner.attn_pool, "token and average pooling")
    if not ops.opened or anatomy.pool not in ("avg", "avgmax"):
        return masked_pool(model, x, None, policy, anatomy, sizes)
    features = pooled(x, anatomy.readout(x.shape[1], policy, x, sizes), ops)
    if anatomy.pool == "avgmax":
        features = ops.mean(masked_pool(model, x, "max", policy, anatomy), features)
    return features


def for_heads(model: ViT, x: Tensor, policy: Tensor | None, anatomy: Anatomy, ops: Arithmetic = PLAIN) -> Tensor:
    """Final tokens as timm's ``forward_head`` wants them.

    Where the two tokens that a distilled DeiT's heads read did not enter, both heads read the pooled ones, [B, 2, D].
    """
    if not isinstance(model, VisionTransformerDistilled) or anatomy.readers:
        return x
    features = _features(model, x, policy, anatomy, ops)
    return torch.stack([features, features], 1)


def masked_pool(
    model: ViT,
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
    inner: Any = model
    kind = anatomy.pool if pool_type is None else pool_type
    # Tokens of another number are the user's own, and not what the last forward left.
    policy, sizes = (None if t is None or t.shape[1] != x.shape[1] else t for t in (policy, sizes))
    if anatomy.prefix != model.num_prefix_tokens:  # timm's own would look for prefix tokens that did not enter
        if kind == "token":
            raise PrunexError("pool_type='token' is not allowed: this pruned model has no class token; use 'avg'")
        if kind == "":
            return x
    elif anatomy.pool == "map" and not (policy is None and sizes is None):
        start = 0 if anatomy.pool_prefix else anatomy.prefix
        weights = _weights(policy, sizes, start)
        return inside(inner.attn_pool, lambda x: attention.latent(inner.attn_pool, x, weights)[0], x[:, start:])
    elif (policy is None and sizes is None) or kind in ("token", "", "map") or not isinstance(kind, str):
        if isinstance(model, Beit):
            return global_pool_nlc(x, kind, anatomy.prefix)
        return type(inner).pool(inner, x, pool_type)
    return over_patches(x, policy, sizes, 0 if anatomy.pool_prefix else anatomy.prefix, kind)


def over_patches(x: Tensor, policy: Tensor | None, sizes: Tensor | None, start: int, kind: str) -> Tensor:
    """Mean, maximum, or the mean of both, over the tokens from a position on that are there, [B, D].

    Args:
        x: [B, N, D].
        policy: [B, N] or None: 0 for slots of dropped tokens.
        sizes: [B, N] or None: how often each token counts in a mean.
        start: The position.
        kind: One of ``POOLS``.
    """
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


def _weights(policy: Tensor | None, sizes: Tensor | None, start: int) -> Tensor | None:
    """How much each token from a position on counts in attention pooling: its policy times its size; None: 1."""
    if policy is None:
        return None if sizes is None else sizes[:, start:]
    return policy[:, start:] if sizes is None else (policy * sizes)[:, start:]


def pool_attention(
    model: ViT, x: Tensor, policy: Tensor | None, anatomy: Anatomy, sizes: Tensor | None = None
) -> Tensor:
    """What an attention-pooling head looks at: float [B, N], mean over its heads, 0 for prefix tokens it skips.

    Args:
        model: A ViT with ``global_pool="map"``.
        x: [B, N, D] after the final norm.
        policy: [B, N] or None.
        anatomy: Of the model.
        sizes: [B, N] or None: how many patches each token stands for.
    """
    inner: Any = model
    start = 0 if anatomy.pool_prefix else anatomy.prefix
    seen = attention.latent(inner.attn_pool, x[:, start:], _weights(policy, sizes, start))[1]
    return nn.functional.pad(seen, (start, 0))
