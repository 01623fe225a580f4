"""The propagation methods once more, slowly: whole matrices, one image at a time, straight from the papers.

Nothing here comes from ``prunex``: the timm blocks are opened again, every matrix is formed, and tokens leave by
multiplication with an explicit S.
"""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Half:
    """What one half of a block, or one reduction, leaves behind for one image (no batch dimension)."""

    kind: str  # "attention", "feed" or "reduce"
    block: int
    matrix: torch.Tensor | None = None  # attention [H, n, n], or S [n_out, n_in] with rows that sum to 1
    value: torch.Tensor | None = None  # [H, n, d]
    before: torch.Tensor | None = None  # [n, D]
    after: torch.Tensor | None = None  # [n, D], skip added
    branch: torch.Tensor | None = None  # [n, D], what the skip adds to
    grad: torch.Tensor | None = None  # like matrix


@dataclass
class Opened:
    """One image's forward, opened."""

    embedded: torch.Tensor
    readout: torch.Tensor
    logits: torch.Tensor
    halves: list[Half] = field(default_factory=list)


def opened(model, image, target, prune=None):
    """Forward and backward of one image [3, H, W].

    ``prune`` is None, ``("topk" | "evit", keep_ratio, stages)`` decided here from the attention itself, or
    ``("given", {block: kept positions})`` with tokens leaving before these blocks.
    """
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    record = Opened(x.detach(), None, None)
    for i, block in enumerate(model.blocks):
        if prune and prune[0] == "given" and i in prune[1]:
            s = torch.eye(len(x), dtype=x.dtype)[[*range(prefix), *(prefix + k for k in prune[1][i])]]
            record.halves.append(Half("reduce", i, s))
            x = s @ x
        attn, y = block.attn, block.norm1(x)
        h, d = attn.num_heads, y.shape[1] // attn.num_heads
        q, k, v = attn.qkv(y).reshape(len(x), 3, h, d).permute(1, 2, 0, 3)
        q, k = attn.q_norm(q), attn.k_norm(k)
        a = (q @ k.transpose(1, 2) / math.sqrt(d)).softmax(-1)
        gathered = (a @ v).permute(1, 0, 2).reshape(len(x), h * d)
        branch = block.ls1(attn.proj(gathered))
        record.halves.append(Half("attention", i, a, v.detach(), x.detach(), (x + branch).detach(), branch.detach()))
        x = x + branch
        if prune and prune[0] in ("topk", "evit") and i in prune[2]:
            score = a[:, 0, prefix:].mean(0)
            forward, backward = reduction(score, prefix, prune[1], prune[0] == "evit")
            record.halves.append(Half("reduce", i, backward.detach()))
            x = forward @ x
        branch = block.ls2(block.mlp(block.norm2(x)))
        record.halves.append(Half("feed", i, before=x.detach(), after=(x + branch).detach(), branch=branch.detach()))
        x = x + branch
    record.readout = torch.zeros(len(x), dtype=x.dtype)
    if model.global_pool == "token":
        record.readout[0] = 1
    else:
        record.readout[prefix:] = 1 / (len(x) - prefix)
    pooled = record.readout @ model.norm(x)
    record.logits = model.head(model.fc_norm(pooled))
    maps = [half for half in record.halves if half.kind == "attention"]
    grads = torch.autograd.grad(record.logits[target], [half.matrix for half in maps])
    for half, grad in zip(maps, grads, strict=True):
        half.matrix, half.grad = half.matrix.detach(), grad
    return record


def reduction(score, prefix, rate, fuse):
    """What the forward multiplies by, and the same with rows that sum to 1: [n_out, n_in] each."""
    n = len(score)
    kept = score.argsort(descending=True)[: math.ceil(rate * n - 1e-9)].sort().values
    s = torch.eye(prefix + n, dtype=score.dtype)[[*range(prefix), *(prefix + kept).tolist()]]
    if not fuse:
        return s, s
    weights = torch.cat([score.new_zeros(prefix), score]).index_fill(0, prefix + kept, 0)[None]
    return torch.cat([s, weights]), torch.cat([s, weights / weights.sum()])


def rollout(record, fusion="mean", discard=0.0, start=0, prefix=1, gradient=False):
    """R = S M_l R with M = rows of (fused + I) divided by their sums; fused of attention, or times its gradient."""
    r = torch.eye(len(record.embedded), dtype=record.embedded.dtype)
    for half in record.halves:
        if half.kind == "reduce":
            r = half.matrix @ r
        elif half.kind == "attention" and half.block >= start:
            a = half.matrix
            f = {"mean": a.mean(0), "max": a.max(0).values, "min": a.min(0).values}[fusion].clone()
            if gradient:
                f = (a * half.grad).mean(0).clamp(min=0)
            n = len(f)
            for place in f.flatten().argsort()[: int(discard * n * n)].tolist():
                row, column = divmod(place, n)
                if row != column and column >= prefix:
                    f[row, column] = 0
            m = f + torch.eye(n, dtype=f.dtype)
            r = (m / m.sum(1, keepdim=True)) @ r
    return record.readout @ r, r


def generic_attention(record, start=0):
    """R = R + Abar R, Abar = mean over heads of max(0, dy/dA * A)."""
    r = torch.eye(len(record.embedded), dtype=record.embedded.dtype)
    for half in record.halves:
        if half.kind == "reduce":
            r = half.matrix @ r
        elif half.kind == "attention" and half.block >= start:
            r = r + (half.matrix * half.grad).clamp(min=0).mean(0) @ r
    return record.readout @ r, r


def transformation(e, et):
    """W = diag(length ratio * NECC) as a vector, token by token."""
    ratio = torch.stack([b.norm() / a.norm() for a, b in zip(e, et, strict=True)])
    cosine = torch.stack([(a @ b) / (a.norm() * b.norm()) for a, b in zip(e, et, strict=True)])
    return ratio * cosine.exp() / cosine.exp().sum()


def projected(block, half, head):
    """Each token's W_O,h v_h with LayerScale, [n, D]."""
    d = half.value.shape[2]
    out = block.attn.proj.weight.detach()[:, head * d : (head + 1) * d]
    return getattr(block.ls1, "gamma", torch.ones(1, dtype=out.dtype)).detach() * (half.value[head] @ out.T)


def tokentm(model, record, variant="per_head"):
    """C = U_ffn S U_att C, C_0 = diag of the embedding lengths."""
    c = torch.diag(torch.stack([e.norm() for e in record.embedded]))
    for half in record.halves:
        if half.kind == "reduce":
            c = half.matrix @ c
            continue
        eye = torch.eye(len(half.before), dtype=c.dtype)
        if half.kind == "feed":
            et = half.branch if variant == "per_head" else half.after
            u = eye + torch.diag(transformation(half.before, et))
        elif variant == "per_head":
            block = model.blocks[half.block]
            terms = []
            for h, (a, g) in enumerate(zip(half.matrix, half.grad, strict=True)):
                w = torch.diag(transformation(half.before, projected(block, half, h)))
                terms.append(g.clamp(min=0) * (a @ w))
            u = eye + torch.stack(terms).mean(0)
        else:
            w = torch.diag(transformation(half.before, half.after))
            u = eye + half.grad.clamp(min=0).mean(0) * (half.matrix.mean(0) @ w)
        c = u @ c
    return record.readout @ c, c
