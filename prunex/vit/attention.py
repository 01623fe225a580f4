"""What is computed inside one attention module, as functions of queries, keys and values.

Shapes: q, k, v [B, H, N, d]; policy [B, N] with 1 for a token that is there and 0 for one that was dropped but still
has a slot. Masking follows DynamicViT (arXiv 2106.02034, Eqs. 9-10): every query sees
the tokens that are there, and itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of timm's ``Attention`` for normed tokens x [B, N, D]: three of [B, H, N, d]."""
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def project(attn: Any, out: Tensor, x: Tensor) -> Tensor:
    """From the heads' outputs [B, H, N, d] to the branch's output [B, N, D], as timm's ``Attention`` ends.

    Args:
        attn: timm's attention module.
        out: What the heads gathered.
        x: The normed tokens the module was given; gated attention reads them once more.
    """
    y = attn.norm(out.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        y = y * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y))


def fused(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Plain attention without the matrix; [B, H, N, d]."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def matrix(q: Tensor, k: Tensor, scale: float, policy: Tensor | None = None) -> Tensor:
    """The softmax attention itself, [B, H, N, N], over the tokens that are there (and the query's own).

    At least float32, whatever the queries are: gradients of single entries are tiny.
    """
    scores = ((q * scale) @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32))
    if policy is not None:
        seen = (policy > 0)[:, None, None, :] | torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1)


def rows(q: Tensor, k: Tensor, scale: float, policy: Tensor | None = None, chunk: int = 64) -> Tensor:
    """Attention averaged over query rows and heads: who is looked at, [B, N], summing to 1.

    Only the rows asked for are computed: one class-token row costs N numbers a head. Many rows (average-pooled
    models) are walked in chunks, so that no N x N matrix is ever held.

    Args:
        q: [B, H, M, d], the queries whose rows are wanted.
        k: [B, H, N, d].
        scale: Of the scores, d ** -0.5.
        policy: [B, N] or None; tokens that are not there get 0. Which *rows* count is the caller's to choose: here
            every given query does.
        chunk: Rows at a time.

    Returns:
        float32 (or float64) [B, N]; gradients flow.
    """
    gone = None if policy is None else (policy <= 0)[:, None, None, :]
    seen = []
    for part in q.split(chunk, 2):
        scores = ((part * scale) @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32))
        if gone is not None:
            scores = scores.masked_fill(gone, float("-inf"))
        seen.append(scores.softmax(-1).mean(1).sum(1))
    return sum(seen[1:], seen[0]) / q.shape[2]


def under_policy(q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    r"""Fused attention under a (differentiable) token policy: softmax over the tokens that are there, no N x N matrix.

    Computes out_i = sum_j W_ij v_j / sum_j W_ij with W_ij = exp(A_ij) E_ij, E_ij = policy_j for j != i and E_ii = 1,
    and the exact gradients of that definition for q, k, v and the policy (also where the policy is 0).

    Three columns and one key turn it into one ordinary ``scaled_dot_product_attention``:

    - values are multiplied by the policy, and a further value column carries the policy, so that its output is the
      denominator (up to the softmax's own normalisation, which cancels in the quotient);
    - a further key stands for "the token itself": a query column holds A_ii, so the key's weight in row i is
      exp(A_ii), and an indicator column returns it. It replaces the token's own entry by E_ii = 1, for a dropped
      token's finite output and for a policy gradient without the diagonal;
    - a key column lowers the scores of dropped tokens by c while their value columns are raised by e^c: nothing
      changes but the range, so a dropped key far above the kept ones neither leaks nor underflows them.

    Args:
        q: [B, H, N, d]. float16 is computed in float32, whose range the quotient needs.
        k: [B, H, N, d].
        v: [B, H, N, d].
        policy: [B, N] in 0..1.
        scale: Of the scores, d ** -0.5.
        dropout: Probability for attention entries; the denominator is taken without it.

    Returns:
        [B, H, N, d] in the dtype of ``v``.
    """
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    b, h, n, d = q.shape
    p = policy.to(wide)[:, None, :, None]
    qf, kf = q.to(dtype), k.to(dtype)

    own = (q.to(wide) * k.to(wide)).sum(-1, keepdim=True)
    parts, rest = [], own
    for _ in range(3 if dtype == torch.bfloat16 else 1):  # three bfloat16 numbers carry one float32
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].to(wide)

    with torch.no_grad():
        # The kept keys' mean bounds a dropped key's lead over the best kept one: A_ij - max A_i <= |q_i| |k_j - mean|.
        dropped = (p <= 0).to(wide)
        there = 1 - dropped
        mean = (k.to(wide) * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)
        longest = torch.linalg.vector_norm(q.to(wide), dim=-1, keepdim=True).amax(2, keepdim=True)
        lead = scale * longest * torch.linalg.vector_norm(k.to(wide) - mean, dim=-1, keepdim=True)
        # A dropped key's exact policy gradient grows with e^lead. Twice the room stays inside the type's range, so that
        # it is exact up to there and finite above.
        room = 300 if wide == torch.float64 else 40
        lower = ((lead - room).clamp(min=40) * dropped / scale).to(dtype)
        raised = (lower.to(wide) * scale).clamp(max=room).exp()

    width = -(-(d + 1 + len(parts)) // 8) * 8  # fused kernels like multiples of 8
    one = torch.ones_like(own, dtype=dtype)
    query = F.pad(torch.cat([qf, one, *parts], -1), (0, width - d - 1 - len(parts)))
    key = F.pad(torch.cat([kf, -lower], -1), (0, width - d - 1, 0, 1))
    self_key = key.new_zeros(width)
    self_key[d + 1 : d + 1 + len(parts)] = 1
    key = torch.cat([key[:, :, :n], self_key.expand(b, h, 1, width)], 2)
    share = p * raised
    value = torch.cat([v.to(wide) * share, share.expand(b, h, n, 1)], -1).to(dtype)
    value = F.pad(value, (0, width - d - 1))
    self_value = value.new_zeros(width)
    self_value[d + 1] = 1
    value = torch.cat([value, self_value.expand(b, h, 1, width)], 2)

    out = F.scaled_dot_product_attention(query, key, value, scale=scale).to(wide)
    mixed = out
    if dropout > 0:  # entries are dropped after normalisation, so the denominator keeps its own undisturbed pass
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale).to(wide)
    absent = 1 - p
    top = mixed[..., :d] + mixed[..., d + 1 : d + 2] * absent * v.to(wide)
    bottom = out[..., d : d + 1] + out[..., d + 1 : d + 2] * absent
    return (top / bottom).to(v.dtype)
