"""Attention under a differentiable token policy as one Triton kernel, a candidate for `prunex/vit/policy.py`.

DynamicViT's softmax (arXiv 2106.02034, Eqs. 9-10): out_i = sum_j W_ij v_j / sum_j W_ij with W_ij = exp(A_ij) E_ij,
A = q k^T scale, E_ij = policy_j for j != i and E_ii = 1. The forward keeps the output and the logarithm L_i of each
row's sum; the backward computes A again, block by block, and needs with D_i = grad_i . out_i

    P_ij = E_ij exp(A_ij - L_i)                        S_ij = P_ij (grad_i . v_j - D_i)
    dv_j = sum_i P_ij grad_i                           dq_i = scale sum_j S_ij k_j,  dk_j = scale sum_i S_ij q_i
    dpolicy_j = sum over heads and i != j of exp(A_ij - L_i) (grad_i . v_j - D_i)

which is exact where the policy is 0, too; there a key's lead over the row is held at e^40, as `under_policy` has it.
`benchmarks/gpu.py` measures it beside what prunex does and beside FlexAttention. Nothing in the package imports it:
it moves there if it is chosen. On a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1, set before the import).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
# Triton's interpreter multiplies the bits of bfloat16 as whole numbers: there its numbers are widened first, which
# changes nothing else, since products are added up in float32 either way.
WIDEN: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b):
    """A product with float32 sums, in the precision of its factors."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(q, k, policy, i, j, n, scale):
    """A and E of a block of queries i [M, 1] and keys j [1, N]; E is 0 outside of the image."""
    scores = _dot(q, tl.trans(k)) * scale
    share = tl.where(i == j, 1.0, policy[None, :])
    return scores, tl.where((i < n) & (j < n), share, 0.0)


@triton.jit
def _keys(k_ptr, v_ptr, policy_ptr, head, heads, j, n, D: tl.constexpr):
    """A block j of keys and values [N, D] of one head, and their policy [N]."""
    at = head * n * D + j[:, None] * D + tl.arange(0, D)[None, :]
    k = tl.load(k_ptr + at, mask=j[:, None] < n, other=0.0)
    v = tl.load(v_ptr + at, mask=j[:, None] < n, other=0.0)
    return k, v, tl.load(policy_ptr + head // heads * n + j, mask=j < n, other=0.0)


@triton.jit
def _forward(q_ptr, k_ptr, v_ptr, policy_ptr, out_ptr, total_ptr, heads, n, scale, D: tl.constexpr, M: tl.constexpr):
    """Output and log of the sum of one block of queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    i, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    at = head * n * D + i[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=i[:, None] < n, other=0.0)
    most = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, D], tl.float32)
    for start in range(0, n, M):
        j = start + tl.arange(0, M)
        k, v, policy = _keys(k_ptr, v_ptr, policy_ptr, head, heads, j, n, D)
        scores, share = _scores(q, k, policy, i[:, None], j[None, :], n, scale)
        # The largest of the keys that count: a dropped one far above them would leave nothing of them.
        largest = tl.maximum(most, tl.max(tl.where(share > 0, scores, -float("inf")), 1))
        base = tl.where(largest == -float("inf"), 0.0, largest)
        weight = tl.where(share > 0, tl.exp(scores - base[:, None]) * share, 0.0)
        fade = tl.where(most == -float("inf"), 0.0, tl.exp(most - base))
        total = total * fade + tl.sum(weight, 1)
        mixed = mixed * fade[:, None] + _dot(weight.to(v.dtype), v)
        most = largest
    total = tl.where(i < n, total, 1.0)
    most = tl.where(i < n, most, 0.0)
    tl.store(out_ptr + at, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=i[:, None] < n)
    tl.store(total_ptr + head * n + i, most + tl.log(total), mask=i < n)


@triton.jit
def _gap(scores, total):
    """exp(A - L), held at e^40 for a dropped key far above the others."""
    return tl.exp(tl.minimum(scores - total, 40.0))


@triton.jit
def _to_queries(
    q_ptr, k_ptr, v_ptr, policy_ptr, grad_ptr, total_ptr, delta_ptr, to_q_ptr,
    heads, n, scale, D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries."""
    head = tl.program_id(1).to(tl.int64)
    i, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    at = head * n * D + i[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=i[:, None] < n, other=0.0)
    grad = tl.load(grad_ptr + at, mask=i[:, None] < n, other=0.0)
    total = tl.load(total_ptr + head * n + i, mask=i < n, other=0.0)
    delta = tl.load(delta_ptr + head * n + i, mask=i < n, other=0.0)
    to_q = tl.zeros([M, D], tl.float32)
    for start in range(0, n, M):
        j = start + tl.arange(0, M)
        k, v, policy = _keys(k_ptr, v_ptr, policy_ptr, head, heads, j, n, D)
        scores, share = _scores(q, k, policy, i[:, None], j[None, :], n, scale)
        change = _dot(grad, tl.trans(v)) - delta[:, None]
        slope = _gap(scores, total[:, None]) * share * change
        to_q += _dot(slope.to(k.dtype), k)
    tl.store(to_q_ptr + at, (to_q * scale).to(to_q_ptr.dtype.element_ty), mask=i[:, None] < n)


@triton.jit
def _to_keys(
    q_ptr, k_ptr, v_ptr, policy_ptr, grad_ptr, total_ptr, delta_ptr, to_k_ptr, to_v_ptr, to_policy_ptr,
    heads, n, scale, D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys, of its values and of its policy in this head."""
    head = tl.program_id(1).to(tl.int64)
    j, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    at = head * n * D + j[:, None] * D + d[None, :]
    k = tl.load(k_ptr + at, mask=j[:, None] < n, other=0.0)
    v = tl.load(v_ptr + at, mask=j[:, None] < n, other=0.0)
    policy = tl.load(policy_ptr + head // heads * n + j, mask=j < n, other=0.0)
    to_k, to_v = tl.zeros([M, D], tl.float32), tl.zeros([M, D], tl.float32)
    to_policy = tl.zeros([M], tl.float32)
    for start in range(0, n, M):
        i = start + tl.arange(0, M)
        there = head * n * D + i[:, None] * D + d[None, :]
        q = tl.load(q_ptr + there, mask=i[:, None] < n, other=0.0)
        grad = tl.load(grad_ptr + there, mask=i[:, None] < n, other=0.0)
        total = tl.load(total_ptr + head * n + i, mask=i < n, other=0.0)
        delta = tl.load(delta_ptr + head * n + i, mask=i < n, other=0.0)
        scores, share = _scores(q, k, policy, i[:, None], j[None, :], n, scale)
        change = _dot(grad, tl.trans(v)) - delta[:, None]
        gap = _gap(scores, total[:, None])
        weight = gap * share
        to_v += _dot(tl.trans(weight).to(grad.dtype), grad)
        to_k += _dot(tl.trans(weight * change).to(q.dtype), q)
        others = (i[:, None] != j[None, :]) & (i[:, None] < n)
        to_policy += tl.sum(tl.where(others, gap * change, 0.0), 0)
    tl.store(to_k_ptr + at, (to_k * scale).to(to_k_ptr.dtype.element_ty), mask=j[:, None] < n)
    tl.store(to_v_ptr + at, to_v.to(to_v_ptr.dtype.element_ty), mask=j[:, None] < n)
    tl.store(to_policy_ptr + head * n + j, to_policy, mask=j < n)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float) -> Tensor:
        b, h, n, d = q.shape
        q, k, v, policy = (t.contiguous() for t in (q, k, v, policy.float()))
        out = torch.empty_like(q)
        total = q.new_empty(b, h, n, dtype=torch.float32)
        grid = (triton.cdiv(n, BLOCK), b * h)
        _forward[grid](q, k, v, policy, out, total, h, n, scale, D=d, M=BLOCK)
        ctx.save_for_backward(q, k, v, policy, out, total)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, policy, out, total = ctx.saved_tensors
        b, h, n, d = q.shape
        grad = grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1)
        grid, known = (triton.cdiv(n, BLOCK), b * h), (q, k, v, policy, grad, total, delta)
        to_q, to_k, to_v = (torch.empty_like(t) for t in (q, k, v))
        to_policy = torch.empty_like(delta)
        _to_queries[grid](*known, to_q, h, n, ctx.scale, D=d, M=BLOCK)
        _to_keys[grid](*known, to_k, to_v, to_policy, h, n, ctx.scale, D=d, M=BLOCK)
        return to_q, to_k, to_v, to_policy.sum(1), None


def fused(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
    """Attention [B, H, N, d] under a policy [B, N] in 0..1; d a power of two from 16 on.

    Raises:
        ValueError: For another width.
    """
    if q.shape[3] < 16 or q.shape[3] & (q.shape[3] - 1):
        raise ValueError(f"heads are {q.shape[3]} wide: the kernel takes powers of two from 16 on")
    return _Attention.apply(q, k, v, policy, q.shape[3] ** -0.5)
