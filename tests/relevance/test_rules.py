from functools import partial

import pytest
import torch
from torch import nn

import prunex
from prunex.relevance.rules import (
    Layer,
    RelevanceRules,
    bounded,
    conserving_sum,
    epsilon_rule,
    gamma_rule,
    proportional,
    ratio,
    zplus,
    zplus_split,
)
from prunex.vit.arithmetic import PLAIN, classify
from prunex.vit.forward import record
from prunex.vit.recording import recording
from prunex.vit.tape import Tape
from prunex.vit.units import put_gates
from tests.vits import ALL_FAMILIES, MORE_FAMILIES, gated, images, images_for, largest, relative, tiny


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(ins=4, outs=3):
    module = nn.Linear(ins, outs).double()
    with torch.no_grad():
        module.weight.copy_(draw(outs, ins, seed=5))
        module.bias.copy_(draw(outs, seed=6))
    return module


def rule_on(rule, module, x, r):
    """What a module's inputs get of its outputs' relevance."""
    return rule(Layer.of(module), x, module(x).detach(), r)


# The rules as one function of layer, inputs, outputs and relevance, and by explicit loops for one output's products.
RULES = {
    "zplus": zplus,
    "zplus_split": zplus_split,
    "epsilon": partial(epsilon_rule, epsilon=0.1),
    "gamma": partial(gamma_rule, gamma=0.3, epsilon=1e-6),
}


def shares(rule, x, w, bias):
    """What each input of one output gets of its relevance, from lists of numbers."""
    products = [a * b for a, b in zip(x, w, strict=True)]
    out = sum(products) + bias
    sign = -1 if out < 0 else 1
    if rule == "zplus":
        total = sum(p for p in products if p > 0)
        return [max(p, 0) / (total + 1e-9) if total else 0 for p in products]
    if rule == "zplus_split":
        totals = {s: sum(p for p, a in zip(products, x, strict=True) if p > 0 and (a > 0) is s) for s in (True, False)}
        both = zip(products, x, strict=True)
        return [max(p, 0) / (totals[a > 0] + 1e-9) if totals[a > 0] else 0 for p, a in both]
    if rule == "epsilon":
        return [p / (out + 0.1 * sign) for p in products]
    favoured = [p * 1.3 if p * out > 0 else p for p in products]
    bias = bias * 1.3 if bias * out > 0 else bias
    return [p / (sum(favoured) + bias + 1e-6 * sign) for p in favoured]


@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_double_loops(rule):
    module = linear()
    x, r = draw(6, 4), draw(6, 3, seed=1)
    x[0, 0] = 0
    found = rule_on(RULES[rule], module, x, r)
    wanted = torch.zeros_like(x)
    for n in range(6):
        for k in range(3):
            part = shares(rule, x[n].tolist(), module.weight[k].tolist(), module.bias[k].item())
            for j in range(4):
                wanted[n, j] += part[j] * r[n, k]
    assert relative(found, wanted) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [True, False])
def test_patch_convolutions_equal_linear_layers_on_unfolded_patches(rule, bias):
    conv = nn.Conv2d(2, 3, 4, 4, bias=bias).double()
    same = nn.Linear(32, 3, bias=bias).double()
    with torch.no_grad():
        same.weight.copy_(conv.weight.flatten(1))
        if bias:
            same.bias.copy_(conv.bias)
    x, r = draw(2, 2, 8, 12), draw(2, 3, 2, 3, seed=1)
    found = rule_on(RULES[rule], conv, x, r)
    unfolded = nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
    rows = rule_on(RULES[rule], same, unfolded, r.flatten(2).transpose(1, 2))
    assert relative(found, nn.functional.fold(rows.transpose(1, 2), (8, 12), 4, stride=4)) < 1e-12


def test_pixel_rule_equals_loops_with_each_images_own_bounds():
    conv = nn.Conv2d(2, 3, 2, 2).double()
    x, r = draw(2, 2, 4, 2), draw(2, 3, 2, 1, seed=1)
    x[1] *= 5
    wanted = torch.zeros_like(x)
    for b in range(2):
        low, high = x[b].min().item(), x[b].max().item()
        for k in range(3):
            for row in range(2):
                patch, w = x[b, :, 2 * row : 2 * row + 2], conv.weight[k].detach()
                z = patch * w - low * w.clamp(min=0) - high * w.clamp(max=0)
                wanted[b, :, 2 * row : 2 * row + 2] += z * r[b, k, row, 0] / (z.sum() + 1e-9)
    found = rule_on(bounded, conv, x, r)
    assert relative(found, wanted) < 1e-12
    assert relative(found.sum((1, 2, 3)), r.sum((1, 2, 3))) < 1e-7
    assert (rule_on(bounded, conv, torch.full((1, 2, 4, 2), 0.3).double(), r[:1]) == 0).all()  # a blank image


def test_positive_products_conserve_and_split_ones_double():
    module = linear(40, 30)
    x, r = draw(5, 40), draw(5, 30, seed=1).abs()
    assert relative(rule_on(zplus, module, x, r).sum(1), r.sum(1)) < 1e-7
    assert relative(rule_on(zplus_split, module, x, r).sum(1), 2 * r.sum(1)) < 1e-7


@pytest.mark.parametrize("rule", [zplus, zplus_split])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_positive_product_passes_nothing_on(rule, dtype):
    module = linear().to(dtype)
    x = torch.rand(3, 4, dtype=dtype) + 0.1
    with torch.no_grad():
        module.weight.copy_(-module.weight.abs())
        module.weight[2, 1] = 1
    found = rule_on(rule, module, x, torch.ones(3, 3, dtype=dtype))
    assert largest(found[:, 1], torch.ones(3)) < 1e-6
    assert (found[:, [0, 2, 3]] == 0).all()
    assert (rule_on(rule, module, torch.zeros(3, 4, dtype=dtype), torch.ones(3, 3, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("bias", [0.0, 1.0, 3e3])
@pytest.mark.parametrize("positive", [3e-7, 1e-4, 1e-2, 0.03, 0.1, 1.0])
def test_few_positive_products_keep_single_precision(positive, bias):
    """Products of 64 inputs, all negative but one of the given size: what that one gets is exact to rounding."""
    module = nn.Linear(64, 5)
    x, r = draw(7, 64).abs().float() + 0.1, draw(7, 5, seed=1).abs().float() + 0.1
    with torch.no_grad():
        module.weight.copy_(-draw(5, 64, seed=2).abs())
        module.weight[:, 3], module.weight[2, 4] = positive, positive / 3
        module.bias.fill_(bias)
    found = rule_on(zplus, module, x, r)
    exact = rule_on(zplus, module.double(), x.double(), r.double())
    assert relative(found, exact) < 2e-5
    assert (found[:, 5:] == 0).all()


def test_positive_products_take_three_products_with_weights():
    module, calls = linear(40, 30), []

    def counted(kind, f):
        return lambda x, w: (calls.append(kind), f(x, w))[1]

    plain = Layer.of(module)
    layer = Layer(plain.weight, plain.bias, counted("forth", plain.forth), counted("back", plain.back))
    x = draw(5, 40)
    zplus(layer, x, module(x).detach(), draw(5, 30, seed=1))
    assert sorted(calls) == ["back", "back", "forth"]


@pytest.mark.parametrize("options", [{}, {"rule": "gamma"}, {"rule": "attnlrp"}, {"rule": "cplrp", "gamma": 0.1}])
def test_half_open_gates_are_constant_factors(options):
    """A model whose units are half open explains as one whose next layers' weights are half as large."""
    x, found = images(dtype=torch.float64), []
    for gates in (True, False):
        model = tiny().double()
        if gates:
            put_gates(model, lambda key, n: torch.full((48 if key.endswith("heads") else 192,), 0.5))
        else:
            for block in model.blocks:
                block.attn.proj.weight.data *= 0.5
                block.mlp.fc2.weight.data *= 0.5
        found.append(prunex.explain("lrp", model, x, 1, **options))
    assert relative(found[0].logits, found[1].logits) < 1e-12
    assert relative(found[0].raw, found[1].raw) < 1e-4
    assert relative(found[0].maps, found[1].maps) < 1e-4


def test_ratio_is_zero_at_zero():
    found = ratio(torch.ones(4).double(), torch.tensor([0.0, 1e-9, 2.0, -2.0]).double())
    assert found[0] == 0
    assert relative(found[1], torch.tensor(5e8)) < 1e-6
    assert largest(found[2:], torch.tensor([0.5, -0.5])) < 1e-9


def test_skips():
    a, b, r = draw(3, 5, 4), draw(3, 5, 4, seed=1), draw(3, 5, 4, seed=2)
    plain = proportional([a, b], a + b, r)
    assert relative(plain[0], a * r / (a + b)) < 1e-6
    assert relative(sum(plain), r) < 1e-6
    first, second = conserving_sum([a, b], a + b, r)
    for i in range(3):
        sums = [p[i].sum() for p in plain]
        share = sums[0].abs() / (sums[0].abs() + sums[1].abs())
        assert relative(first[i], plain[0][i] * share * r[i].sum() / sums[0]) < 1e-6
        assert relative(first[i].sum() + second[i].sum(), r[i].sum()) < 1e-6
        alone = conserving_sum([a[i : i + 1], b[i : i + 1]], (a + b)[i : i + 1], r[i : i + 1])
        assert alone[0][0].equal(first[i])  # sums are an image's own
    nothing = conserving_sum([a, torch.zeros_like(a)], a, r)
    assert (nothing[1] == 0).all()
    assert relative(nothing[0].sum((1, 2)), r.sum((1, 2))) < 1e-6
    c = draw(3, 5, 4, seed=3)
    three = conserving_sum([a, b, c], a + b + c, r)
    sums = [(x * r / (a + b + c)).sum((1, 2)) for x in (a, b, c)]
    for part, own in zip(three, sums, strict=True):
        share = own.abs() / sum(s.abs() for s in sums)
        assert relative(part.sum((1, 2)), share * r.sum((1, 2))) < 1e-6


def back(rules, out, inputs, r):
    """Relevance of the inputs for that of an output."""
    rules.relevance = True
    found = torch.autograd.grad(out, inputs, r, retain_graph=True)
    rules.relevance = False
    return found


def test_products_conserve_by_halves():
    rules = RelevanceRules()
    q, k, v = (draw(2, 3, 5, 4, seed=s).requires_grad_() for s in range(3))
    a = draw(2, 3, 5, 5, seed=3).softmax(-1).requires_grad_()
    out, r = rules.gather(a, v), draw(2, 3, 5, 4, seed=4)
    assert out.equal(a @ v)
    ra, rv = back(rules, out, (a, v), r)
    assert relative(ra, a * ((r / out) @ v.transpose(-2, -1)) / 2) < 1e-6
    assert relative(ra.sum((2, 3)), r.sum((2, 3)) / 2) < 1e-6
    assert relative(ra.sum() + rv.sum(), r.sum()) < 1e-6
    scores, r = rules.scores(q, k, 0.5), draw(2, 3, 5, 5, seed=4)
    rq, rk = back(rules, scores, (q, k), r)
    assert relative(rq.sum((2, 3)), r.sum((2, 3)) / 2) < 1e-6
    assert relative(rk.sum((2, 3)), r.sum((2, 3)) / 2) < 1e-6
    assert relative(rq, q * ((r / (q @ k.transpose(-2, -1))) @ k) / 2) < 1e-6
    # Ordinary gradients of the same graph.
    plain = PLAIN.gather(PLAIN.softmax(PLAIN.scores(q, k, 0.5)), v)
    ruled = rules.gather(rules.softmax(rules.scores(q, k, 0.5)), v)
    g = draw(2, 3, 5, 4, seed=6)
    for x, y in zip(torch.autograd.grad(plain, (q, k, v), g), torch.autograd.grad(ruled, (q, k, v), g), strict=True):
        assert x.equal(y)


def test_gates_leave_all_to_the_signal_and_means_share_as_sums():
    rules = RelevanceRules()
    a, b, r = draw(3, 7).requires_grad_(), draw(3, 7, seed=1).sigmoid().requires_grad_(), draw(3, 7, seed=2)
    found = back(rules, rules.gate(a, b), (a,), r)[0]
    assert found.equal(r)
    for x, y in zip(
        torch.autograd.grad(rules.gate(a, b), (a, b), r), torch.autograd.grad(a * b, (a, b), r), strict=True
    ):
        assert x.equal(y)
    assert relative(sum(back(rules, rules.mean(a, b), (a, b), r)).sum(1), r.sum(1)) < 1e-6
    assert torch.autograd.grad(rules.mean(a, b), a, r)[0].equal(r / 2)


def test_weights_of_a_sum_are_constants_to_relevance_alone():
    rules = RelevanceRules()
    weights, tokens = draw(2, 1, 5).requires_grad_(), draw(2, 5, 4, seed=1).requires_grad_()
    out, r = rules.combine(weights, tokens), draw(2, 1, 4, seed=2)
    found = back(rules, out, (tokens,), r)[0]
    assert relative(found, weights.transpose(1, 2) * tokens * r / out) < 1e-6
    assert relative(found.sum(1), r[:, 0]) < 1e-6
    grads = torch.autograd.grad(out, (weights, tokens), r)
    for x, y in zip(grads, torch.autograd.grad(weights @ tokens, (weights, tokens), r), strict=True):
        assert x.equal(y)


@pytest.mark.parametrize("family", [*ALL_FAMILIES, "gated"])
def test_a_whole_model_conserves_relevance(family):
    model = (gated() if family == "gated" else tiny(family)).double()
    rules = RelevanceRules()
    x = images_for(model).requires_grad_()
    with recording(model, x, None, Tape(gradients=True, ops=rules)) as recorded:
        one_hot = torch.zeros_like(recorded.logits).scatter_(1, recorded.target[:, None], 1)
        rules.relevance = True
        # A class token that enters late has its own part.
        late = [] if recorded.tape.late is None else [recorded.tape.late]
        parts = torch.autograd.grad(recorded.logits, [recorded.embedded, *late], one_hot)
    assert relative(recorded.logits, model(x)) < 1e-10
    total = sum(r.flatten(1).sum(1) for r in parts)
    assert largest(total, torch.ones(3)) < 2e-4  # the stabiliser where a skip's or a product's sum is near 0


@pytest.mark.parametrize(
    "family", ["vit", "dinov2_giant", "qk_norm", "attn_norm", "avg_pool", "deit_distilled", *MORE_FAMILIES]
)
@pytest.mark.parametrize("pruner", [None, "evit"])
def test_one_graph_gives_ordinary_gradients_too(family, pruner):
    model = tiny(family).double()
    if pruner:
        prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2))
    grads = []
    for ops in (PLAIN, RelevanceRules()):
        x = images_for(model).requires_grad_()
        tape = Tape(attention=True, gradients=True, ops=ops)
        record(model, x, tape)
        inputs = [x, *(a.attention for a in tape.attended())]
        grads.append(torch.autograd.grad(tape.logits[:, 2].sum(), inputs))
    for a, b in zip(*grads, strict=True):
        assert relative(b, a) < 1e-10


def test_layers_that_are_not_known():
    class Cosine(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(nn.functional.normalize(x, dim=-1), self.weight)

    with pytest.raises(prunex.PrunexError, match="Cosine.* is not linear.*rollout"):
        Layer.of(Cosine(4, 3))
    for module in (nn.Bilinear(4, 4, 3), nn.Conv2d(4, 4, 2, 2, groups=2), nn.Conv2d(4, 4, 3, 3, 1)):
        with pytest.raises(prunex.PrunexError, match=f"do not know {type(module).__name__}: known are.*rollout"):
            Layer.of(module)
    with pytest.raises(prunex.PrunexError, match="do not know Softmax"):
        classify(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), torch.ones(1, 4), RelevanceRules())


def test_images_of_any_scale_are_finite():
    e = prunex.explain("lrp", tiny(), torch.cat([torch.zeros(1, 3, 32, 32), 0.5 + 0 * images(1), 1e3 * images(1)]))
    assert torch.isfinite(e.raw).all()
    assert torch.isfinite(e.maps).all()
    assert (e.raw[:2] == 0).all()  # no pixel is above its image's lowest or below its highest value
