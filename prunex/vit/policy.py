"""How a dropped token that still has a slot is masked: which keys each query sees, and fused attention over these.

As in DynamicViT (arXiv 2106.02034, Eqs. 9-10) every query sees the tokens that are there, and itself. Who has the whole
attention matrix takes :func:`seen`; :func:`under_policy` computes the same, with gradients for the policy, in less
memory than that matrix takes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prunex.vit.arithmetic import fused_attention

_MOST = math.exp(40)


def present(policy: Tensor) -> Tensor:
    """Whose keys are there, bool [B, 1, 1, N], of a policy [B, N]."""
    return (policy > 0)[:, None, None, :]


def _itself(policy: Tensor, queries: tuple[int, ...] | Tensor | None) -> Tensor:
    """Which key is each query's own, bool [m, N]."""
    places = torch.arange(policy.shape[1], device=policy.device)
    at = places if queries is None else torch.as_tensor(queries, device=policy.device)
    return at[:, None] == places


def seen(policy: Tensor, queries: tuple[int, ...] | Tensor | None = None) -> Tensor:
    """Which keys each query sees, bool [B, 1, m, N]; ``queries``: the positions of m of them, None: all N."""
    return present(policy) | _itself(policy, queries)


def weights(policy: Tensor, queries: tuple[int, ...] | Tensor | None = None) -> Tensor:
    """How much each key counts for each query, float [B, 1, m, N]: its policy, and 1 for the query's own."""
    return torch.where(_itself(policy, queries), 1, policy[:, None, None, :])


def under_policy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    scale: float,
    dropout: float = 0.0,
    sizes: Tensor | None = None,
    relative: Tensor | None = None,
) -> Tensor:
    """Fused attention under a (differentiable) token policy: softmax over the tokens that are there, no N x N matrix.

    For q, k [B, H, N, d], v [B, H, N, e] and a policy [B, N] in 0..1 computes out_i = sum_j W_ij v_j / sum_j W_ij with
    W_ij = exp(A_ij) E_ij, E_ij = policy_j for j != i and E_ii = 1, and the exact gradients of that definition for q, k,
    v and the policy (also where the policy is 0; up to e^40). With ``sizes`` s [B, N], each W_ij is multiplied by s_j.

    Three columns and one key turn it into one ordinary ``scaled_dot_product_attention``:

    - values are multiplied by the policy, and a further value column carries the policy, so that its output is the
      denominator (up to the softmax's own normalisation, which cancels in the quotient);
    - a further key stands for "the token itself": a query column holds A_ii, so the key's weight in row i is
      exp(A_ii), and an indicator column returns it. It replaces the token's own entry by E_ii = 1, for a dropped
      token's finite output and for a policy gradient without the diagonal;
    - a key column lowers the scores of dropped tokens by c while their value columns are raised by e^c: nothing
      changes but the range, so a dropped key far above the kept ones neither leaks nor underflows them.

    A ``relative`` bias [1 or B, H, N, N] is part of A; the kernel gets it with its diagonal for the further key.
    float16 is computed in float32, whose range the quotient needs; the denominator is taken without ``dropout``.
    """
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    s = 1 if sizes is None else sizes.to(wide)[:, None, :, None]
    p = _Held.apply(policy.to(wide))[:, None, :, None]
    with torch.no_grad():
        # The kept keys' mean bounds a dropped key's lead over the best kept one: A_ij - max A_i <= |q_i| |k_j - mean|.
        dropped = (p <= 0).to(wide)
        left = 1 - dropped
        mean = (k.to(wide) * left).sum(2, keepdim=True) / left.sum(2, keepdim=True).clamp(min=1)
        longest = torch.linalg.vector_norm(q.to(wide), dim=-1, keepdim=True).amax(2, keepdim=True)
        lead = scale * longest * torch.linalg.vector_norm(k.to(wide) - mean, dim=-1, keepdim=True)
        if relative is not None:
            lead = lead + (relative.amax((2, 3), keepdim=True) - relative.amin((2, 3), keepdim=True)).to(wide)
        # A dropped key's exact policy gradient grows with e^lead. Twice the room stays inside the type's range.
        room = 300 if wide == torch.float64 else 40
        lower = ((lead - room).clamp(min=40) * dropped / scale).to(dtype)
        raised = (lower.to(wide) * scale).clamp(max=room).exp()
    query, key, value = _Extend.apply(q.to(dtype), k.to(dtype), v.to(dtype), lower, p * raised * s)
    bias = None
    if relative is not None:
        itself = relative.diagonal(dim1=2, dim2=3).unsqueeze(-1)
        bias = torch.cat([relative, itself], -1).to(query.dtype)
    out = fused_attention(query, key, value, bias, scale=scale)
    mixed = None
    if dropout > 0:  # entries are dropped after normalisation, so the denominator keeps its own undisturbed pass
        mixed = fused_attention(query, key, value, bias, dropout, scale=scale)
    return _Quotient.apply(out, mixed, v.to(dtype), (1 - p) * s).to(v.dtype)


class _Held(torch.autograd.Function):
    """The policy itself; its gradient is exact up to e^40 and held there, since products of larger ones overflow."""

    @staticmethod
    def forward(ctx: Any, policy: Tensor) -> Tensor:
        return policy.view_as(policy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-_MOST, _MOST)


class _Extend(torch.autograd.Function):
    """Queries, keys and values with the further columns and the further key of :func:`under_policy`."""

    # By hand, since a dozen ``cat``, ``pad`` and ``slice`` each write all of it once more, forth and back.
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lower: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, share)
        b, h, n, d = q.shape
        wide = share.dtype
        rest = (q.to(wide) * k.to(wide)).sum(-1)
        parts = 3 if q.dtype == torch.bfloat16 else 1  # three bfloat16 numbers carry one float32
        values = v.shape[3]
        width = -(-max(d + 1 + parts, values + 2) // 8) * 8  # fused kernels like multiples of 8
        query, (key, value) = q.new_empty(b, h, n, width), q.new_empty(2, b, h, n + 1, width)
        query[..., :d] = q
        query[..., d] = 1
        query[..., d + 1 + parts :] = 0
        for i in range(d + 1, d + 1 + parts):
            query[..., i] = rest
            rest = rest - query[..., i].to(wide)
        key[:, :, :n, :d] = k
        key[:, :, :n, d] = -lower[..., 0]
        key[:, :, :n, d + 1 :] = 0
        key[:, :, n] = 0
        key[:, :, n, d + 1 : d + 1 + parts] = 1
        value[:, :, :n, :values] = v
        value[:, :, :n, :values] *= share
        value[:, :, :n, values] = share[..., 0]
        value[:, :, :n, values + 1 :] = 0
        value[:, :, n] = 0
        value[:, :, n, values + 1] = 1
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, share = ctx.saved_tensors
        n, d, values, wide = q.shape[2], q.shape[3], v.shape[3], share.dtype
        gq, gk, gv = grads[0], grads[1][:, :, :n], grads[2][:, :, :n].to(wide)
        # The further query column is the product of q and k, and so has a gradient for either.
        itself = gq[..., d + 1 : d + 2].to(wide)
        to_q = torch.addcmul(gq[..., :d].to(wide), itself, k.to(wide)).to(q.dtype)
        to_k = torch.addcmul(gk[..., :d].to(wide), itself, q.to(wide)).to(k.dtype)
        to_v = (gv[..., :values] * share).to(v.dtype)
        to_share = None
        if ctx.needs_input_grad[4]:
            to_share = (gv[..., :values] * v.to(wide)).sum(-1, keepdim=True) + gv[..., values : values + 1]
        return to_q, to_k, to_v, None, to_share


class _Quotient(torch.autograd.Function):
    """What :func:`under_policy` reads out of the extended attention: numerator over denominator, [B, H, N, d]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, mixed: Tensor | None, v: Tensor, absent: Tensor) -> Tensor:
        # Column d carries the denominator, column d + 1 what the token's own key was given.
        d, wide = v.shape[-1], absent.dtype
        top = (out if mixed is None else mixed).to(wide)
        bottom = out[..., d : d + 1].to(wide) + out[..., d + 1 : d + 2].to(wide) * absent
        itself = top[..., d + 1 : d + 2]
        result = torch.addcmul(top[..., :d], itself * absent, v.to(wide)) / bottom
        ctx.save_for_backward(result, bottom, out[..., d + 1 : d + 2].to(wide), itself, v, absent)
        ctx.shape, ctx.split = out.shape, mixed is not None
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        result, bottom, itself_bottom, itself_top, v, absent = ctx.saved_tensors
        d = v.shape[-1]
        grad = grad / bottom
        to_bottom = -(grad * result).sum(-1, keepdim=True)
        to_own = (grad * v.to(grad.dtype)).sum(-1, keepdim=True)
        to_v = (grad * (itself_top * absent)).to(v.dtype)
        to_absent = (to_bottom * itself_bottom + to_own * itself_top).sum(1, keepdim=True)
        # Without dropout numerator and denominator come from one pass, with it from two, each with its gradient.
        to_top = v.new_empty(ctx.shape)
        to_top[..., :d] = grad
        to_top[..., d + 2 :] = 0
        if ctx.split:
            to_out = v.new_zeros(ctx.shape)
            to_out[..., d : d + 1] = to_bottom
            to_out[..., d + 1 : d + 2] = to_bottom * absent
            to_top[..., d : d + 1] = 0
            to_top[..., d + 1 : d + 2] = to_own * absent
            return to_out, to_top, to_v, to_absent
        to_top[..., d : d + 1] = to_bottom
        to_top[..., d + 1 : d + 2] = (to_bottom + to_own) * absent
        return to_top, None, to_v, to_absent
