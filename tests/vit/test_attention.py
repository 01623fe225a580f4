"""Attention under a policy against its slow definition, and read-out rows against the whole matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from prunex.vit import attention
from prunex.vit.attention import matrix, rows
from prunex.vit.policy import under_policy
from tests.vits import largest, relative, tiny

SCALE = 0.25


def slow(q, k, v, policy, scale):
    """The definition: W_ij = exp(A_ij) E_ij with E_ij = policy_j and E_ii = 1, rows divided by their sums."""
    scores = (q * scale) @ k.transpose(-2, -1)
    eye = torch.eye(policy.shape[1], dtype=q.dtype)
    e = policy[:, None, None, :] * (1 - eye) + eye
    w = (scores - scores.detach().amax(-1, keepdim=True)).exp() * e
    return w @ v / w.sum(-1, keepdim=True)


def only_seen(q, k, v, policy, scale):
    """The same forward with dropped keys taken out beforehand, for scores whose exponentials overflow."""
    scores = (q * scale) @ k.transpose(-2, -1)
    seen = (policy > 0)[:, None, None, :] | torch.eye(policy.shape[1], dtype=torch.bool)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def inputs(batch=2, heads=3, tokens=17, width=16, peaked=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, tokens, width, generator=generator, dtype=torch.float64)
    return q * peaked, k * peaked, v, generator


def policies(kind, batch, tokens, generator):
    policy = torch.ones(batch, tokens, dtype=torch.float64)
    if kind == "hard":
        policy[:, 1:] = (torch.rand(batch, tokens - 1, generator=generator) > 0.5).double()
    elif kind == "soft":
        policy[:, 1:] = torch.rand(batch, tokens - 1, generator=generator, dtype=torch.float64)
    elif kind == "mixed":  # one image keeps all its patches, the other none
        policy[1, 1:] = 0
    return policy


def with_grads(function, values, seed=3):
    leaves = [t.clone().requires_grad_() for t in values]
    out = function(*leaves, SCALE)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return out, torch.autograd.grad(out, leaves, upstream.to(out.dtype))


@pytest.mark.parametrize("kind", ["ones", "hard", "soft", "mixed"])
@pytest.mark.parametrize("peaked", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("width", [16, 5])
def test_policy_equals_its_definition_in_float64(kind, peaked, width):
    q, k, v, generator = inputs(peaked=peaked, width=width)
    values = (q, k, v, policies(kind, 2, 17, generator))
    out, grads = with_grads(under_policy, values)
    wanted, wanted_grads = with_grads(slow, values)
    assert largest(out, wanted) < 1e-10
    for name, got, want in zip(("q", "k", "v", "policy"), grads, wanted_grads, strict=True):
        assert relative(got, want) < 1e-10, name


def test_policy_gradient_is_the_finite_difference():
    q, k, v, generator = inputs(batch=1, heads=2, tokens=6, width=4)
    policy = policies("hard", 1, 6, generator).requires_grad_()
    out = under_policy(q, k, v, policy, SCALE)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad(out, policy, upstream)
    for j in range(6):
        step = torch.zeros_like(policy)
        step[0, j] = 1e-6
        up, down = (slow(q, k, v, policy.detach() + s * step, SCALE) for s in (1, -1))
        assert float(grad[0, j]) == pytest.approx(float(((up - down) * upstream).sum() / 2e-6), abs=1e-7)


@pytest.mark.parametrize(("dtype", "forward", "backward"), [(torch.float32, 2e-6, 1e-5), (torch.bfloat16, 2e-2, 2e-2)])
def test_policy_in_lower_precision(dtype, forward, backward):
    q, k, v, generator = inputs()
    q, k, v = (t.to(dtype).double() for t in (q, k, v))
    policy = policies("hard", 2, 17, generator)
    wanted, wanted_grads = with_grads(slow, (q, k, v, policy))
    out, grads = with_grads(under_policy, (q.to(dtype), k.to(dtype), v.to(dtype), policy.float()))
    assert out.dtype == dtype
    assert relative(out, wanted) < forward
    for name, got, want in zip(("q", "k", "v", "policy"), grads, wanted_grads, strict=True):
        assert relative(got, want) < backward, name


def test_policy_in_float16_has_the_range_of_float32():
    q, k, v, generator = inputs()
    q, k, v = (t.half().double() for t in (q, k, v))
    policy = policies("hard", 2, 17, generator)
    out = under_policy(q.half(), k.half(), v.half(), policy.float(), SCALE)
    assert out.dtype == torch.float16
    assert relative(out, slow(q, k, v, policy, SCALE)) < 2e-3


@pytest.mark.parametrize("lead", [20.0, 60.0, 100.0, 140.0, 1000.0])
@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float64, 1e-12, 1e-11), (torch.float32, 1e-5, 5e-5), (torch.bfloat16, 2e-2, 0.1)],
)
def test_a_dominant_dropped_key_does_not_leak(lead, dtype, forward, backward):
    q, k, v, _ = inputs()
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 6, 0] = lead  # its score is `lead` above what it was, for every query
    policy = torch.ones(2, 17, dtype=torch.float64)
    policy[:, 5:9] = 0
    q, k, v = (t.to(dtype).double() for t in (q, k, v))
    wanted, wanted_grads = with_grads(lambda q, k, v, s: only_seen(q, k, v, policy, s), (q, k, v))
    policy_type = torch.float64 if dtype == torch.float64 else torch.float32
    out, grads = with_grads(under_policy, (q.to(dtype), k.to(dtype), v.to(dtype), policy.to(policy_type)))
    assert relative(out, wanted) < forward
    for name, got, want in zip("qkv", grads, wanted_grads, strict=False):
        assert relative(got, want) < backward, name
    assert torch.isfinite(grads[3]).all()


def test_a_value_behind_a_dropped_key_changes_nothing_for_others():
    q, k, v, generator = inputs()
    policy = policies("hard", 2, 17, generator)
    policy[:, 4] = 0
    out = under_policy(q, k, v, policy, SCALE)
    k[:, :, 4], v[:, :, 4] = 1e3, -1e6
    moved = under_policy(q, k, v, policy, SCALE)
    others = [i for i in range(17) if i != 4]
    assert largest(out[:, :, others], moved[:, :, others]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_patches_dropped_is_finite_and_each_sees_the_class_token_and_itself(dtype):
    q, k, v, _ = inputs()
    policy = torch.zeros(2, 17, dtype=torch.float32)
    policy[:, 0] = 1
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)] + [policy.requires_grad_()]
    out = under_policy(*leaves, SCALE)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(torch.isfinite(t).all() for t in (out, *grads))
    assert relative(out[:, :, 0], v[:, :, 0]) < 1e-2
    assert relative(out, only_seen(q, k, v, policy, SCALE)) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_dropped_queries_with_extreme_scores_of_their_own_stay_finite():
    q, k, v, _ = inputs()
    q[:, :, 3] *= 100
    k[:, :, 3] = q[:, :, 3]  # token 3 sees itself thousands above anything else
    policy = torch.ones(2, 17, dtype=torch.float64)
    policy[:, 3] = 0
    out, grads = with_grads(under_policy, [t.float() for t in (q, k, v, policy)])
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in grads)
    assert relative(out, only_seen(q, k, v, policy, SCALE)) < 1e-5


def test_dropout_leaves_the_denominator_alone_and_the_mean_unchanged():
    q, k, v, generator = inputs(batch=1, heads=1, tokens=9, width=8)
    policy = policies("hard", 1, 9, generator)
    exact = under_policy(q, k, v, policy, SCALE)
    torch.manual_seed(0)
    draws = torch.stack([under_policy(q, k, v, policy, SCALE, 0.3) for _ in range(4000)])
    assert float(draws.std(0).min()) > 1e-3  # something was dropped everywhere
    error = draws.std(0) / len(draws) ** 0.5
    assert float(((draws.mean(0) - exact).abs() / error).max()) < 5
    # Constant values: with a denominator of its own pass, an output is a multiple of 1 / (1 - p) times kept weights.
    ones = under_policy(q, k, torch.ones_like(v), policy, SCALE, 0.3)
    assert float(ones.max()) <= 1 / 0.7 + 1e-9
    assert float(ones.std()) > 0


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_dropout_gradients_are_finite_differences(kind):
    q, k, v, generator = inputs(batch=2, heads=2, tokens=5, width=3)
    policy = policies(kind, 2, 5, generator)

    def same_draw(*values):
        torch.manual_seed(4)
        return under_policy(*values, SCALE, 0.3)

    leaves = [t.clone().requires_grad_() for t in (q, k, v, policy)]
    assert torch.autograd.gradcheck(same_draw, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Records the largest number of elements any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_square_matrix_is_allocated(dropout):
    b, h, n, d = 1, 2, 512, 16
    q, k, v = (torch.randn(b, h, n, d, requires_grad=True) for _ in range(3))
    policy = torch.ones(b, n, requires_grad=True)
    with Largest() as seen:
        under_policy(q, k, v, policy, 0.25).sum().backward()
    assert b * h * n * d <= seen.numel < b * h * n * n / 4
    with Largest() as seen:
        rows(q, k, 0.25).sum().backward()
    assert seen.numel < b * h * n * n / 4
    if dropout:  # how torch runs dropout on a CPU is its own affair; the result must be usable
        out = under_policy(q, k, v, policy, 0.25, dropout)
        out.sum().backward()
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("family", ["vit", "qk_norm"])
def test_rows_equal_the_full_matrix(family):
    model = tiny(family).double()
    attn = model.blocks[1].attn
    x = torch.randn(3, 17, 48, dtype=torch.float64)
    q, k, v = attention.heads(attn, x)
    full = matrix(q, k, attn.scale)
    assert largest(rows(q[:, :, :1], k, attn.scale), full[:, :, 0].mean(1)) < 1e-12
    assert largest(rows(q, k, attn.scale, chunk=4), full.mean((1, 2))) < 1e-12
    assert largest(rows(q, k, attn.scale).sum(1), torch.ones(3)) < 1e-12
    # and the matrix is the model's own attention
    assert largest(attention.project(attn, full @ v, x), attn(x)) < 1e-12


def test_rows_under_a_policy_see_only_what_is_there():
    q, k, _, generator = inputs()
    policy = policies("hard", 2, 17, generator)
    row = rows(q[:, :, :1], k, SCALE, policy)
    assert torch.equal(row > 0, policy > 0)
    assert largest(row, matrix(q, k, SCALE, policy)[:, :, 0].mean(1)) < 1e-12
    assert largest(row.sum(1), torch.ones(2)) < 1e-12


def test_rows_carry_gradients():
    q, k, _, _ = inputs()
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    weights = torch.randn(2, 17, dtype=torch.float64)
    got = torch.autograd.grad((rows(leaves[0], leaves[1], SCALE, chunk=5) * weights).sum(), leaves)
    want = torch.autograd.grad((matrix(*leaves, SCALE).mean((1, 2)) * weights).sum(), leaves)
    assert max(largest(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


def test_matrix_under_a_policy_gives_dropped_queries_themselves():
    q, k, v, generator = inputs()
    policy = policies("hard", 2, 17, generator)
    full = matrix(q, k, SCALE, policy)
    assert largest(full.sum(-1), torch.ones(2, 3, 17)) < 1e-12
    assert largest(full @ v, under_policy(q, k, v, policy, SCALE)) < 1e-12
    assert largest(attention.fused(q, k, v), F.scaled_dot_product_attention(q, k, v)) == 0
