import pytest
import torch
from timm.layers import RmsNorm, SimpleNorm
from torch import nn

import prunex
from prunex.relevance.gradients import ModifiedGradients
from prunex.relevance.rules import RelevanceRules
from prunex.vit.arithmetic import classify
from prunex.vit.forward import record
from prunex.vit.recording import recording
from prunex.vit.tape import Tape
from tests.vits import (
    ALL_FAMILIES,
    MORE_FAMILIES,
    assert_same_state,
    gated,
    images,
    images_for,
    largest,
    lively,
    relative,
    state_of,
    tiny,
)

TARGETS = torch.tensor([4, 0, 2])
KINDS = ["attnlrp", "cplrp"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [None, (0.25, 0.05)])
@pytest.mark.parametrize(
    "family",
    ["vit", "dinov2_giant", "qk_norm", "attn_norm", "deit_distilled", "clip", "max_pool", "dinov3"],
)
def test_values_stay_bit_for_bit(family, kind, gamma):
    model = tiny(family)
    tape = Tape(ops=ModifiedGradients(kind, gamma))
    with torch.no_grad():
        record(model, images_for(model), tape)
        assert tape.logits.equal(model(images_for(model)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_values_of_every_family(family, kind):
    model = tiny(family).double()
    tape = Tape(narrow=True, ops=ModifiedGradients(kind))
    with torch.no_grad():
        record(model, images_for(model), tape)
        assert relative(tape.logits, model(images_for(model))) < 1e-12


def without_biases(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    return model


def relevance_of_tokens(model, kind, gamma=None):
    """At the input of block 0, [B, N]; and the explained logits."""
    tape = Tape(gradients=True, narrow=True, ops=ModifiedGradients(kind, gamma))
    x = images_for(model).requires_grad_()
    with recording(model, x, TARGETS, tape) as recorded:
        score = recorded.logits.gather(1, TARGETS[:, None])[:, 0]
        found = torch.autograd.grad(score.sum(), recorded.embedded)[0] * recorded.embedded
    return found.sum(-1).detach(), score.detach()


@pytest.mark.parametrize(
    "family",
    # Of a late class token the first block knows nothing: docs/measure_conservation.py counts its part.
    [
        "vit",
        "layer_scale",
        "dinov2_giant",
        "avg_pool",
        "avgmax_pool",
        "deit_distilled",
        *sorted({*MORE_FAMILIES} - {"cait"}),
    ],
)
def test_cplrp_sums_to_the_logit_without_biases(family):
    model = without_biases(tiny(family).double())
    found, score = relevance_of_tokens(model, "cplrp")
    assert largest(found.sum(1), score) < 1e-6
    if model.num_prefix_tokens:
        assert largest(found[:, model.num_prefix_tokens :].sum(1), score) > 1e-3  # the other tokens' part counts
    attnlrp = relevance_of_tokens(without_biases(tiny(family).double()), "attnlrp")[0]
    assert largest(attnlrp.sum(1), score) > 1e-3  # its softmax rule does not conserve


def test_the_gamma_rule_conserves_too_and_is_plain_at_zero():
    model = without_biases(tiny().double())
    found, score = relevance_of_tokens(model, "cplrp", (0.25, 0.3))
    assert relative(found.sum(1), score) < 1e-3  # epsilon keeps a little at every layer
    plain, zero = (relevance_of_tokens(model, "attnlrp", g)[0] for g in (None, (0, 0)))
    assert relative(zero, plain) < 1e-3
    assert relative(relevance_of_tokens(model, "attnlrp", (0.25, 0.3))[0], plain) > 0.1


@pytest.mark.parametrize("inner", [nn.ReLU(), nn.Dropout(0.5).eval(), nn.Identity()])
def test_relu_networks_without_biases_give_gradient_times_input(inner):
    head = nn.Sequential(nn.Linear(6, 8, bias=False), inner, nn.ReLU(), nn.Sequential(nn.Linear(8, 3, bias=False)))
    head = lively(head.double())
    x = draw(4, 6).requires_grad_()
    out = head(x)
    wanted = x * torch.autograd.grad(out[:, 1].sum(), x)[0]
    assert wanted.abs().max() > 0.1
    for kind in KINDS:
        ruled = classify(head, x, ModifiedGradients(kind))
        assert ruled.equal(out)
        assert relative(x * torch.autograd.grad(ruled[:, 1].sum(), x)[0], wanted) < 1e-8
    # And as relevance that starts from the output itself, by the epsilon rule with epsilon 0.
    rules = RelevanceRules("epsilon", epsilon=0.0)
    ruled = classify(head, x, rules)
    rules.relevance = True
    seed = torch.zeros_like(out)
    seed[:, 1] = out[:, 1].detach()
    assert relative(torch.autograd.grad(ruled, x, seed)[0], wanted) < 1e-8


@pytest.mark.parametrize("masked", [False, True])
def test_quarters_and_halves_equal_the_explicit_attnlrp_rules(masked):
    q, k, v = (draw(1, 1, 5, 4, seed=s).requires_grad_() for s in range(3))
    rules, g = ModifiedGradients("attnlrp"), draw(1, 1, 5, 4, seed=3)
    if masked:  # the way of masked models, through the matrix
        out = rules.gather(rules.softmax(rules.scores(q, k, 0.5)), v)
    else:
        out = rules.attention(q, k, v)
    found = [x * grad for x, grad in zip((q, k, v), torch.autograd.grad(out, (q, k, v), g), strict=True)]
    with torch.no_grad():
        x = q[0, 0] @ k[0, 0].T * 0.5
        s = x.softmax(-1)
        o = s @ v[0, 0]
        assert relative(out[0, 0], o) < 1e-12
        r = o * g[0, 0]
        rs, rv = torch.zeros(5, 5).double(), torch.zeros(5, 4).double()
        rq, rk, rx = torch.zeros(5, 4).double(), torch.zeros(5, 4).double(), torch.zeros(5, 5).double()
        for j in range(5):
            for i in range(5):
                for p in range(4):  # O_jp = sum_i A_ji V_ip: half to each factor
                    part = s[j, i] * v[0, 0, i, p] * r[j, p] / (2 * o[j, p])
                    rs[j, i] += part
                    rv[i, p] += part
        for j in range(5):
            for i in range(5):
                rx[j, i] = x[j, i] * (rs[j, i] - s[j, i] * rs[j].sum())
                for p in range(4):
                    part = 0.5 * q[0, 0, j, p] * k[0, 0, i, p] * rx[j, i] / (2 * x[j, i])
                    rq[j, p] += part
                    rk[i, p] += part
    for a, b in zip(found, (rq, rk, rv), strict=True):
        assert relative(a[0, 0], b) < 1e-12


def test_cplrp_takes_attention_as_a_constant():
    q, k, v = (draw(1, 2, 5, 4, seed=s).requires_grad_() for s in range(3))
    out, g = ModifiedGradients("cplrp").attention(q, k, v), draw(1, 2, 5, 4, seed=3)
    to_q, to_k, to_v = torch.autograd.grad(out, (q, k, v), g, allow_unused=True)
    assert to_q is None
    assert to_k is None
    assert relative((v * to_v).sum(), (out * g).sum()) < 1e-12
    s = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
    assert relative(to_v, s.transpose(-2, -1) @ g) < 1e-12


def test_element_wise_functions_and_products():
    x, y = draw(3, 7).requires_grad_(), draw(3, 7, seed=1).requires_grad_()
    for act in (nn.GELU(), nn.SiLU(), nn.ReLU()):
        out = ModifiedGradients("cplrp").activation(act, x)
        assert relative(x * torch.autograd.grad(out.sum(), x)[0], act(x)) < 1e-8
    out = ModifiedGradients("cplrp").product(x, y)
    for signal, grad in zip((x, y), torch.autograd.grad(out.sum(), (x, y)), strict=True):
        assert relative(signal * grad, x * y / 2) < 1e-12


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(7), nn.LayerNorm(7, elementwise_affine=False), RmsNorm(7), nn.RMSNorm(7)]
)
def test_norms_hold_their_deviation_constant(norm):
    norm = lively(norm.double())
    x, g = draw(3, 7).requires_grad_(), draw(3, 7, seed=1)
    out = ModifiedGradients("cplrp").norm(norm, x)
    assert out.equal(norm(x))
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    wanted = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach()
    wanted = wanted * (1 if norm.weight is None else norm.weight) + (
        0 if getattr(norm, "bias", None) is None else norm.bias
    )
    assert relative(out, wanted) < 1e-12
    assert relative(torch.autograd.grad(out, x, g)[0], torch.autograd.grad(wanted, x, g)[0]) < 1e-12


def test_gates_of_attention_are_constants():
    signal, openness = draw(3, 7).requires_grad_(), draw(3, 7, seed=1).sigmoid().requires_grad_()
    out, g = ModifiedGradients("cplrp").gate(signal, openness), draw(3, 7, seed=2)
    to_signal, to_openness = torch.autograd.grad(out, (signal, openness), g, allow_unused=True)
    assert relative(to_signal, openness * g) < 1e-12
    assert to_openness is None
    model = gated().double()
    found, score = relevance_of_tokens(without_biases(model), "cplrp")
    assert largest(found.sum(1), score) < 1e-6


@pytest.mark.parametrize("rule", KINDS)
def test_ordinary_gradients_are_unchanged_afterwards(rule):
    found = []
    for explains in (False, True):
        model = tiny("qk_norm")
        if explains:
            before, forward = state_of(model), type(model.blocks[0].attn).forward
            prunex.explain("lrp", model, images(), TARGETS, rule=rule, gamma=0.1)
            assert_same_state(model, before)
            assert type(model.blocks[0].attn).forward is forward
        x = images().requires_grad_()
        nn.functional.cross_entropy(model(x), TARGETS).backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert a.equal(b)


def test_norms_and_heads_that_are_not_known():
    class Head(nn.Module):
        def forward(self, x):
            return x[:, :5]

    with pytest.raises(prunex.PrunexError, match="do not know SimpleNorm: known are LayerNorm and RmsNorm"):
        ModifiedGradients("cplrp").norm(SimpleNorm(7), torch.randn(2, 7))
    for head in (Head(), nn.Sequential(nn.Linear(48, 48), Head())):
        for gamma in (None, (0.25, 0.05)):
            with pytest.raises(prunex.PrunexError, match="do not know Head"):
                classify(head, torch.randn(2, 48), ModifiedGradients("cplrp", gamma))
