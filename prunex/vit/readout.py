"""From the final tokens to the model's output: pooling over tokens that are there, by size, and the head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.anatomy import ViT, head_classes
from prunex.vit.arithmetic import PLAIN, Arithmetic, classify, pooled, promoted
from prunex.vit.calls import inside
from prunex.vit.handover import Handed
from prunex.vit.mount import mounted_head

POOLS = ("avg", "max", "avgmax")

_NONE = nn.Identity()
TAIL = "prunex_tail"  # on a ViT that stands for a whole module: what the module makes of its ViT's output


def head(model: ViT, x: Tensor, left: Handed, ops: Arithmetic = PLAIN) -> Tensor:
    """From final tokens x [B, N, D] to [B, classes] (or the features), as timm's ``forward_head`` in eval mode.

    Dropped tokens are not pooled; means over tokens count each by its size. A ViT that stands for the module round it
    (:mod:`prunex.vit.surroundings`) gives the module's output.
    """
    explainable = mounted_head(model)
    out = classifier(model, x, left, ops) if explainable is None else explainable.logits(model, x, left, ops)
    return ended(model, out, ops)


def ended(model: ViT, out: Tensor, ops: Arithmetic = PLAIN) -> Tensor:
    """What follows the ViT in the module that it stands for, of its own output [R, D]."""
    check_head(model)
    tail = vars(model).get(TAIL)
    return out if tail is None else tail(out, ops)


def reads_grids(model: ViT) -> bool:
    """Whether a ViT stands for a module that reads grids of it, and not what its head makes of the final tokens."""
    tail = vars(model).get(TAIL)
    return tail is not None and tail.grid_call is not None


def check_head(model: ViT) -> None:
    """Refuse such a module, for who starts from the tokens that a head reads."""
    if reads_grids(model):
        module = vars(model)[TAIL].module
        raise PrunexError(
            f"{type(getattr(module, 'model', module)).__name__} reads grids of its ViT (forward_intermediates), and "
            "this starts from the tokens that a head reads: use integrated_gradients, grad_cam, r_cut, atman or vit_cx"
        )


def before_softmax(model: ViT, out: Tensor) -> Tensor:
    """What a softmax may be taken of: the output [R, classes], or its logarithm where the model took one already."""
    tail = vars(model).get(TAIL)
    if tail is None or not tail.probabilities:
        return out
    # A softmax of probabilities would flatten them, one of their logarithms gives them back; 0 has none.
    return promoted(out).clamp(min=torch.finfo(torch.float32).tiny).log()


def scalar(model: ViT) -> bool:
    """Whether the model's one output is a target's number, of which no softmax and no sigmoid may be taken."""
    tail = vars(model).get(TAIL)
    return tail is not None and tail.scalar


def classifies(model: ViT) -> bool:
    """Whether a model gives classes and no bare features: the head tells, since users assign it."""
    return not isinstance(model.head, nn.Identity) or TAIL in vars(model)


def outputs(model: ViT) -> int:
    """How many classes a model gives; 0 without a classifier."""
    tail = vars(model).get(TAIL)
    return head_classes(model) if tail is None else tail.classes


def classifier(model: ViT, x: Tensor, left: Handed, ops: Arithmetic = PLAIN) -> Tensor:
    """What timm's own head makes of final tokens, whatever hangs on the model in its place."""
    inner: Any = model
    if isinstance(model, VisionTransformerDistilled):
        # Each of its two heads reads a token of its own, and in eval mode timm gives their mean.
        x = for_heads(model, x, left, ops)
        first = classify(inner.head, inner.head_drop(x[:, 0]), ops)
        return ops.mean(first, classify(inner.head_dist, inner.head_drop(x[:, 1]), ops))
    return classify(inner.head, inner.head_drop(ops.norm(norm_behind_pool(model), _features(model, x, left, ops))), ops)


def norm_behind_pool(model: ViT) -> nn.Module:
    """The norm between pooling and head; an identity where a model has none."""
    return getattr(model, "fc_norm", _NONE)


def _features(model: ViT, x: Tensor, left: Handed, ops: Arithmetic) -> Tensor:
    """The pooled tokens, [B, D]."""
    pool = left.anatomy.pool
    if ops.opened and pool == "map":
        return _map_pooled(model, x, left, ops)
    if not ops.opened or pool not in ("avg", "avgmax"):
        return masked_pool(model, x, left)
    # Means are sums with weights, so that relevance is shared by them.
    features = pooled(x, left.anatomy.readout(x.shape[1], left.policy, x, left.sizes), ops)
    if pool == "avgmax":
        features = ops.mean(masked_pool(model, x, replace(left, sizes=None), "max"), features)
    return features


def for_heads(model: ViT, x: Tensor, left: Handed, ops: Arithmetic = PLAIN) -> Tensor:
    """Final tokens as timm's ``forward_head`` wants them; pooled, [B, 2, D], where a DeiT's own two did not enter."""
    if not isinstance(model, VisionTransformerDistilled) or left.anatomy.rankers:
        return x
    features = _features(model, x, left, ops)
    return torch.stack([features, features], 1)


def masked_pool(model: ViT, x: Tensor, left: Handed, pool_type: str | None = None) -> Tensor:
    """Pool x [B, N, D] as timm does (or by its override ``pool_type``), over tokens that are there, means by size."""
    inner: Any = model
    anatomy = left.anatomy
    kind = anatomy.pool if pool_type is None else pool_type
    # Tokens of another number are the user's own, and not what the last forward left.
    policy, sizes = (None if t is None or t.shape[1] != x.shape[1] else t for t in (left.policy, left.sizes))
    start, all_alike = 0 if anatomy.pool_prefix else anatomy.prefix, policy is None and sizes is None
    if anatomy.prefix != model.num_prefix_tokens:  # timm's own would look for prefix tokens that did not enter
        if kind == "token":
            raise PrunexError("pool_type='token' is not allowed: this pruned model has no class token; use 'avg'")
        if kind == "":
            return x
    elif anatomy.pool == "map" and not all_alike:
        return _map_pooled(model, x, replace(left, policy=policy, sizes=sizes))
    elif all_alike or kind in ("token", "", "map") or not isinstance(kind, str):
        if hasattr(type(model), "pool"):
            return type(inner).pool(inner, x, pool_type)
        return global_pool_nlc(x, kind, anatomy.prefix)
    return over_patches(x, policy, sizes, start, kind)


def _map_pooled(model: ViT, x: Tensor, left: Handed, ops: Arithmetic = PLAIN) -> Tensor:
    """Attention pooling over tokens that are there, by size, opened within its own call: [B, D]."""
    inner: Any = model
    start = 0 if left.anatomy.pool_prefix else left.anatomy.prefix
    weights = _weights(left.policy, left.sizes, start)
    out: Tensor = inside(inner.attn_pool, lambda x: attention.latent(inner.attn_pool, x, weights, ops)[0], x[:, start:])
    return out


def over_patches(x: Tensor, policy: Tensor | None, sizes: Tensor | None, start: int, kind: str) -> Tensor:
    """Mean, maximum, or the mean of both, over the tokens from ``start`` on that are there, [B, D]; means by size."""
    body = x[:, start:]
    p = (x.new_ones(x.shape[:2]) if policy is None else policy)[:, start:, None].to(x.dtype)
    if sizes is None:
        # At least 1: an image all of whose patches were dropped has a mean of 0.
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


def pool_attention(model: ViT, x: Tensor, left: Handed) -> Tensor:
    """What an attention-pooling head looks at: float [B, N], mean over its heads, 0 for prefix tokens it skips."""
    inner: Any = model
    start = 0 if left.anatomy.pool_prefix else left.anatomy.prefix
    seen = attention.latent(inner.attn_pool, x[:, start:], _weights(left.policy, left.sizes, start))[1]
    return nn.functional.pad(seen, (start, 0))
