"""Relevance propagation once more, slowly: one image, every product x_j w_jk written out, straight from the papers.

Nothing here comes from ``prunex``. The z+ rule with rescaled skips, from the logit to the tokens entering block 0.
"""

import math
from dataclasses import dataclass, field

import torch

from tests.explainers.definitions import reduction


@dataclass
class Walked:
    """What one image's forward and relevance pass leave behind."""

    logits: torch.Tensor
    readout: torch.Tensor
    attention: dict = field(default_factory=dict)  # block: R_A [H, n, n]
    grads: dict = field(default_factory=dict)  # block: dy/dA
    reduced: dict = field(default_factory=dict)  # block: S with rows that sum to 1
    tokens: torch.Tensor | None = None  # relevance of the tokens entering block 0


def divided(a, b):
    """a / (b + 1e-9), 0 where b is 0."""
    return torch.where(b == 0, 0, a / (b + 1e-9))


def linear(x, weight, r):
    """Positive products alone, over one sum."""
    products = (x[:, :, None] * weight.T[None]).clamp(min=0)
    return (products * divided(r, products.sum(1))[:, None]).sum(2)


def add(a, b, r):
    """In proportion, then rescaled to each term's share of the whole."""
    ra, rb = divided(a * r, a + b), divided(b * r, a + b)
    size = ra.sum().abs() + rb.sum().abs()
    return ra * (ra.sum().abs() / size * r.sum() / ra.sum()), rb * (rb.sum().abs() / size * r.sum() / rb.sum())


def walked(model, image, target, prune=None):
    """Forward and relevance of one image [3, H, W]; ``prune`` as in ``definitions.opened``."""
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    kept = []
    for i, block in enumerate(model.blocks):
        attn, y = block.attn, block.norm1(x)
        h, d = attn.num_heads, y.shape[1] // attn.num_heads
        q, k, v = attn.qkv(y).reshape(len(x), 3, h, d).permute(1, 2, 0, 3)
        q, k = attn.q_norm(q), attn.k_norm(k)
        a = (q @ k.transpose(1, 2) / math.sqrt(d)).softmax(-1)
        o = a @ v
        branch = block.ls1(attn.proj(o.permute(1, 0, 2).reshape(len(x), h * d)))
        after = x + branch
        s = forward = None
        if prune and i in prune[2]:
            forward, s = reduction(a[:, 0, prefix:].mean(0), prefix, prune[1], prune[0] == "evit")
        middle = after if forward is None else forward @ after
        z = block.norm2(middle)
        hidden = block.mlp.act(block.mlp.fc1(z))
        fed = block.ls2(block.mlp.fc2(hidden))
        kept.append((x, y, q, k, v, a, o, branch, forward, s, after, middle, z, hidden, fed))
        x = middle + fed
    x = model.norm(x)
    readout = torch.zeros(len(x), dtype=x.dtype)
    if model.global_pool == "token":
        readout[0] = 1
    else:
        readout[prefix:] = 1 / (len(x) - prefix)
    pooled = readout @ x
    logits = model.head(model.fc_norm(pooled))
    found = Walked(logits.detach(), readout)
    grads = torch.autograd.grad(logits[target], [one[5] for one in kept])
    with torch.no_grad():
        r = linear(model.fc_norm(pooled)[None], model.head.weight, torch.eye(len(logits), dtype=x.dtype)[target][None])
        r = readout[:, None] * x * divided(r, pooled)
        for i, block in reversed(list(enumerate(model.blocks))):
            x, y, q, k, v, a, o, branch, forward, s, after, middle, z, hidden, fed = kept[i]
            r, inner = add(middle, fed, r)
            r = r + linear(z, block.mlp.fc1.weight, linear(hidden, block.mlp.fc2.weight, inner))
            if forward is not None:
                r = after * (forward.T @ divided(r, middle))
                found.reduced[i] = s
            r, inner = add(x, branch, r)
            flat = o.permute(1, 0, 2).flatten(1)
            inner = linear(flat, block.attn.proj.weight, inner).reshape(len(x), len(o), -1).permute(1, 0, 2)
            gathered = divided(inner, o)
            ra = a * (gathered @ v.transpose(1, 2)) / 2
            rv = v * (a.transpose(1, 2) @ gathered) / 2
            scored = divided(ra, q @ k.transpose(1, 2))
            rq, rk = q * (scored @ k) / 2, k * (scored.transpose(1, 2) @ q) / 2
            inner = torch.stack([rq, rk, rv]).permute(2, 0, 1, 3).flatten(1)
            r = r + linear(y, block.attn.qkv.weight, inner)
            found.attention[i], found.grads[i] = ra, grads[i]
    found.tokens = r
    return found


def rolled(found, start=0, gradient=True):
    """C = S_l (I + mean_h max(0, dy/dA * R)) C, whole matrices; the read-out row of the last one."""
    c = None
    for i in sorted(found.attention):
        r = found.attention[i] * (found.grads[i] if gradient else 1)
        if c is None:
            c = torch.eye(r.shape[1], dtype=r.dtype)
        if i >= start:
            c = (torch.eye(r.shape[1], dtype=r.dtype) + r.clamp(min=0).mean(0)) @ c
        if i in found.reduced:
            c = found.reduced[i] @ c
    return found.readout @ c
