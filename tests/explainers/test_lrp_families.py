"""Relevance propagation through other than plain blocks: against a slow walk, and what every rule must keep."""

from functools import partial

import pytest
import torch
from timm.layers import SwiGLU
from torch import nn

import prunex
from prunex.relevance.gradients import ModifiedGradients
from prunex.relevance.rules import RelevanceRules
from prunex.vit import attention
from prunex.vit.arithmetic import PLAIN, mlp
from prunex.vit.embedding import embed
from prunex.vit.forward import resume
from prunex.vit.tape import Tape
from tests.explainers.test_lrp import every
from tests.relevance.slow_families import walked
from tests.vit.families import FAMILIES, double
from tests.vit.test_layouts import fused_projection
from tests.vits import images_for, largest, lively, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
explain = partial(prunex.explain, "lrp")
SLOW = {
    "pe": lambda: double("pe"),
    "sapiens2": lambda: double("sapiens2"),
    "parallel_scaling": lambda: double("parallel_scaling"),
    "parallel_fused": lambda: fused_projection().double(),
    "parallel_things": lambda: double("parallel_things"),
}


@pytest.mark.parametrize("rule", ["zplus", "cplrp"])
@pytest.mark.parametrize("family", SLOW)
def test_equals_the_slow_walk(family, rule):
    model = SLOW[family]()
    x = images_for(model)
    e = explain(model, x, TARGETS, rule=rule)
    for i, image in enumerate(x):
        r, logits = walked(model, image, TARGETS[i], rule)
        assert relative(e.logits[i], logits) < 1e-10
        assert relative(e.maps[i].flatten(), r[model.num_prefix_tokens :].sum(1)) < 1e-6


@pytest.mark.parametrize("family", ["dinov3", "pe", "siglip"])
def test_prefix_tokens_keep_theirs(family):
    model = double(family)
    e = explain(model, images_for(model), TARGETS)
    assert e.info["prefix"].shape == (3, model.num_prefix_tokens)
    assert relative(e.maps.sum((1, 2)) + e.info["prefix"].sum(1), torch.ones(3)) < 2e-4
    assert (e.info["prefix"] != 0).all()


@every
@pytest.mark.parametrize("pruner", ["topk", "evit"])
@pytest.mark.parametrize("family", ["pe", "siglip", "dinov3", "beit", "eva02_clip", "sapiens2", "parallel_scaling"])
def test_masked_equals_removed(family, pruner, options):
    model = double(family)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        removed = explain(model, images_for(model), TARGETS, **options)
        pruning.masked = True
        masked = explain(model, images_for(model), TARGETS, **options)
    assert torch.isfinite(removed.raw).all()
    # Epsilon is small beside most denominators, not all: where one is near 0 other roundings grow.
    limit = 1e-4 if options.get("rule") in ("epsilon", "gamma") else 1e-7
    assert relative(masked.raw, removed.raw) < limit
    assert relative(masked.maps, removed.maps) < limit
    assert (removed.maps[~removed.trace.kept()] != 0).any()


@pytest.mark.parametrize("family", ["siglip", "pe"])
def test_pooling_of_tokens_that_were_merged_counts_each_by_its_size(family):
    model = double(family)
    with prunex.attach(model, "tome", r=4) as pruning:
        removed = explain(model, images_for(model), TARGETS, rule="cplrp")
        pruning.masked = True
        assert relative(explain(model, images_for(model), TARGETS, rule="cplrp").raw, removed.raw) < 1e-7
    assert relative(removed.logits, explain(model, images_for(model), TARGETS).logits) > 1e-3


@pytest.mark.parametrize("ops", [RelevanceRules(), ModifiedGradients("attnlrp"), ModifiedGradients("cplrp")])
def test_pooling_by_weights_has_the_plain_values_also_of_nobody(ops):
    pool = tiny("siglip").double().attn_pool
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 48, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randint(0, 3, (3, 16), generator=generator).double()
    weight[1] = 0
    for given in (weight, None):
        out, seen = attention.latent(pool, x, given, ops)
        for found, wanted in zip((out, seen), attention.latent(pool, x, given), strict=True):
            assert relative(found, wanted) < 1e-12
        ops.relevance = True
        r = torch.autograd.grad(out, x, torch.ones_like(out))[0]
        ops.relevance = isinstance(ops, ModifiedGradients)
        assert torch.isfinite(r).all()
        assert ((r != 0).any(-1) == (torch.ones(3, 16) if given is None else given).bool()).all()


class Absorbing(ModifiedGradients):
    """With norms whose biases are part of the graph."""

    def norm(self, module, x):
        out = super().norm(module, x)
        bias = getattr(module, "bias", None)
        return out if bias is None else out + (bias - bias.detach())


def from_the_first_block(model, x, ops):
    """Scores [B] of the targets, and what they are made of: tokens [B, N, D], and a class token that enters late."""
    with torch.no_grad():
        tokens, grid = embed(model, x)
    tokens.requires_grad_()
    tape = Tape(gradients=True, ops=ops)
    logits = resume(model, tokens, grid, tape=tape)
    return logits.gather(1, TARGETS[: len(x), None])[:, 0], [tokens] if tape.late is None else [tokens, tape.late]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_biases_together_are_the_logit(family):
    """What CP-LRP does not hand on, biases absorbed: none is lost or counted twice."""
    model = double(family)
    score, tokens = from_the_first_block(model, images_for(model, 1), Absorbing("cplrp"))
    # Those of a network that makes relative biases, or that mix heads, are part of attention, which is constant.
    apart = ("rel_pos", "proj_l", "proj_w")
    named = [(name, p) for name, p in model.named_parameters() if not any(part in name for part in apart)]
    biases = [p for name, p in named if name.endswith("bias")]
    leaves = [*tokens, *biases]
    grads = torch.autograd.grad(score.sum(), leaves, allow_unused=True)
    shares = [(p * g).sum() for p, g in zip(leaves, grads, strict=True) if g is not None]
    assert relative(sum(shares), score[0]) < 1e-9
    assert len(biases) < 10 or largest(shares[0], score[0]) > 1e-4  # they do absorb, in models that have any


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("ops", [PLAIN, RelevanceRules(), ModifiedGradients("attnlrp")], ids=lambda o: type(o).__name__)
def test_turns_of_queries_and_keys_alike_leave_their_relevance(ops, half):
    """A further turn by one angle, the same for all tokens, is in the scores of none."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    angles = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    r = torch.randn(2, 3, 7, 7, generator=generator, dtype=torch.float64)
    found = []
    for further in (0.0, 0.7):
        turn = angles + further
        pairs = torch.cat([turn, turn], 1) if half else turn.repeat_interleave(2, 1)
        table = torch.cat([pairs.sin(), pairs.cos()], 1)
        inputs = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        scores = ops.scores(*ops.rotated(*inputs, table, half), 0.5)
        if isinstance(ops, RelevanceRules):
            ops.relevance = True
        found.append([scores, *torch.autograd.grad(scores, inputs, r)])
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-6
    still = torch.cat([torch.zeros(7, 8), torch.ones(7, 8)], 1).double()
    assert ops.rotated(q, k, still, half)[1].equal(k)
    x = q.clone().requires_grad_()
    came = torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float64)
    assert relative(torch.autograd.grad(ops.rotated(x, k, still, half)[0], x, came)[0], came) < 1e-6


@pytest.mark.parametrize(
    "ops", [RelevanceRules("epsilon", epsilon=1e-12), ModifiedGradients("cplrp")], ids=lambda o: type(o).__name__
)
def test_gated_mlps_halve_and_pass_nothing_where_one_side_is_silent(ops):
    module = lively(SwiGLU(6, 8).double()).eval()
    for layer in (module.fc1_g, module.fc1_x, module.fc2):
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def relevance():
        ops.relevance = True
        out = mlp(module, x, ops)
        grad = torch.autograd.grad(out, x, torch.ones_like(out))[0]
        return out, (grad if isinstance(ops, RelevanceRules) else grad * x)

    out, r = relevance()
    wanted = out.sum() if isinstance(ops, ModifiedGradients) else torch.tensor(float(out.numel()))
    assert relative(r.sum(), wanted) < 1e-6
    nn.init.zeros_(module.fc1_x.weight)
    out, r = relevance()
    assert (out == 0).all()
    assert (r == 0).all()


@pytest.mark.parametrize("rule", ["zplus", "attnlrp", "cplrp"])
def test_a_pool_does_not_know_the_order_of_its_tokens(rule):
    model = tiny("siglip").double()
    ops = RelevanceRules() if rule == "zplus" else ModifiedGradients(rule)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    tokens, grid = embed(model, images_for(model))
    found = []
    for x in (tokens.detach(), tokens.detach()[:, order]):
        x = x.requires_grad_()
        ops.relevance = False
        logits = resume(model, x, grid, tape=Tape(gradients=True, ops=ops))
        ops.relevance = True
        found.append(torch.autograd.grad(logits, x, torch.eye(5).double()[TARGETS])[0])
    assert relative(found[1], found[0][:, order]) < 1e-6
    assert relative(found[1], found[0]) > 1e-2


@pytest.mark.parametrize("rule", ["attnlrp", "cplrp"])
def test_registers_without_values_have_relevance_through_scores_alone(rule):
    class Silenced(ModifiedGradients):
        def attention(self, q, k, v, relative=None):
            there = torch.ones(v.shape[2], 1, dtype=v.dtype)
            there[1:5] = 0  # the four registers behind the class token
            return super().attention(q, k, v * there, relative)

    model = tiny("dinov3").double()
    score, (tokens, *_) = from_the_first_block(model, images_for(model), Silenced(rule))
    r = (torch.autograd.grad(score.sum(), tokens)[0] * tokens).sum(-1)
    silent = r[:, 1:5].abs().max()
    assert silent == 0 if rule == "cplrp" else silent > 1e-4
    assert (r[:, 5:] != 0).all()


def test_relative_biases_absorb_as_biases_of_linear_layers_do():
    generator = torch.Generator().manual_seed(0)
    z, b, r = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    for rule, wanted in (("zplus", r), ("epsilon", z * r / (z + b))):
        rules, x = RelevanceRules(rule, epsilon=0.0), z.clone().requires_grad_()
        out = rules.biased(x, b)
        assert out.equal(z + b)
        assert torch.autograd.grad(out, x, r, retain_graph=True)[0].equal(r)
        rules.relevance = True
        assert relative(torch.autograd.grad(out, x, r)[0], wanted) < 1e-12


def test_learned_queries_leave_all_of_the_scores_to_the_keys():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (1, 6))
    r = torch.randn(2, 3, 1, 6, generator=generator, dtype=torch.float64)
    rules, x = RelevanceRules(), k.clone().requires_grad_()
    out = rules.latent_scores(q, x, 0.5)
    rules.relevance = True
    found = torch.autograd.grad(out, x, r)[0]
    wanted = k * q * (r / (q @ k.transpose(-2, -1)))[:, :, 0, :, None]
    assert relative(found, wanted) < 1e-6
    assert relative(found.sum(-1), r[:, :, 0]) < 1e-6
    for kind, share in (("attnlrp", 0.5), ("cplrp", None)):
        x = k.clone().requires_grad_()
        out = ModifiedGradients(kind).latent_scores(q.requires_grad_(), x, 0.5)
        assert out.equal((q * 0.5) @ k.transpose(-2, -1))
        assert out.requires_grad == (share is not None)  # CP-LRP's scores are constants
        if share is not None:
            grad = torch.autograd.grad(out, x, r)[0]
            assert relative(grad, share * 0.5 * r.transpose(-2, -1) @ q) < 1e-12
