from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

import prunex
from prunex.explainers.tokentm import _head_weights, _necc, _weights
from prunex.vit.forward import record
from prunex.vit.tape import Attended, Fed, Tape
from tests.explainers import definitions
from tests.vits import images, images_for, largest, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
VARIANTS = ["per_head", "libragrad"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["vit", "layer_scale", "dinov2_reg", "qk_norm", "avg_pool", "avg_pool_no_class"])
def test_equals_explicit_matrices(family, variant):
    model = tiny(family).double()
    x = images_for(model)
    e = prunex.explain("tokentm", model, x, TARGETS, variant=variant)
    for i, image in enumerate(x):
        wanted, c = definitions.tokentm(model, definitions.opened(model, image, TARGETS[i]), variant)
        assert relative(e.raw[i], wanted) < 1e-7  # the guards of 1e-8 on both quotients
        if family == "vit":
            assert relative(e.raw[i], c[0]) < 1e-7


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_pruned_equals_explicit_matrices_with_s_at_its_place(pruner, variant):
    model = tiny().double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)):
        e = prunex.explain("tokentm", model, x, TARGETS, variant=variant)
    for i, image in enumerate(x):
        opened = definitions.opened(model, image, TARGETS[i], (pruner, 0.6, (1, 2)))
        assert relative(e.raw[i], definitions.tokentm(model, opened, variant)[0]) < 1e-7


def steps(model, x):
    tape = Tape(attention=True, streams=True)
    with torch.no_grad():
        record(model, x, tape)
    return tape


@pytest.mark.parametrize("family", ["vit", "layer_scale"])
def test_gram_norms_equal_explicit_norms(family):
    model = tiny(family)
    tape = steps(model, images())
    for step in tape.attended():
        block = model.blocks[step.block]
        found = _head_weights(block, step, 17, None)
        for b in range(3):
            half = SimpleNamespace(value=step.value[b])
            for h in range(3):
                et = definitions.projected(block, half, h)
                assert relative(found[b, h], definitions.transformation(step.before[b], et)) < 1e-5


def test_weights_are_not_negative_and_necc_sums_to_one():
    model = tiny()
    for step in steps(model, images()).steps:
        if isinstance(step, Attended):
            assert (_head_weights(model.blocks[step.block], step, 17, None) >= 0).all()
        elif isinstance(step, Fed):
            assert (_weights(step.before, step.branch, None, 17, None) >= 0).all()
    cosine = torch.rand(2, 3, 17) * 2 - 1
    policy = (torch.rand(2, 1, 17) > 0.4).float()
    for p in (None, policy):
        share = _necc(cosine, p, 17, None)
        assert largest(share.sum(-1), torch.ones(2, 3)) < 1e-6
    assert (share[policy.expand_as(share) == 0] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_gradient_leaves_the_class_token_alone(variant):
    model = tiny().double()
    with torch.no_grad():
        model.head.weight.zero_()
    x = images_for(model)
    e = prunex.explain("tokentm", model, x, 0, variant=variant)
    wanted = []
    for image in x:
        opened = definitions.opened(model, image, 0)
        value = opened.embedded[0].norm()
        for half in opened.halves:
            if half.kind == "feed":
                et = half.branch if variant == "per_head" else half.after
                value = value * (1 + definitions.transformation(half.before, et)[0])
        wanted.append(value)
    assert relative(e.raw[:, 0], torch.stack(wanted)) < 1e-7
    assert (e.maps == 0).all()


def test_tokens_that_stay_as_they_are_weigh_one_nth():
    # One head whose value is the token itself and whose output projection is the identity: Et = E.
    block = Block(12, 1)
    nn.init.eye_(block.attn.proj.weight)
    e = torch.randn(2, 7, 12).double()
    step = Attended(0, value=e[:, None], before=e)
    assert relative(_head_weights(block, step, 7, None), torch.full((2, 1, 7), 1 / 7)) < 1e-7
    assert relative(_weights(e, e, None, 7, None), torch.full((2, 7), 1 / 7)) < 1e-7


def test_whole_walk_when_tokens_stay_as_they_are():
    # Values are the tokens, projections the identity, MLPs return their input: U_att = I + ReLU(g) A / n and
    # U_ffn = (1 + 1/n) I.
    class Same(nn.Module):
        def forward(self, x):
            return x

    model = tiny(num_heads=1, depth=1).double()
    block = model.blocks[0]
    block.norm1, block.norm2, block.mlp = Same(), Same(), Same()
    with torch.no_grad():
        block.attn.qkv.weight[96:] = torch.eye(48)
        block.attn.qkv.weight[:96] *= 0.2
        block.attn.qkv.bias[96:] = 0
        block.attn.proj.weight.copy_(torch.eye(48))
        block.attn.proj.bias.zero_()
    x = images_for(model)
    e = prunex.explain("tokentm", model, x, TARGETS)
    for i, image in enumerate(x):
        opened = definitions.opened(model, image, TARGETS[i])
        half = opened.halves[0]
        u = torch.eye(17) + (half.grad.clamp(min=0) * half.matrix)[0] / 17
        wanted = (1 + 1 / 17) * u[0] * opened.embedded.norm(dim=1)
        assert relative(e.raw[i], wanted) < 1e-7


def test_scale_of_necc():
    model = tiny()
    plain = prunex.explain("tokentm", model, images(), TARGETS)
    assert relative(prunex.explain("tokentm", model, images(), TARGETS, necc_scale="n0").maps, plain.maps) < 1e-6
    cosine = torch.rand(2, 9)
    assert relative(_necc(cosine, None, 17, "n0"), _necc(cosine, None, 17, None) * 9 / 17) < 1e-6
    policy = torch.ones(2, 9)
    policy[0, 4:] = 0
    scaled, unscaled = _necc(cosine, policy, 17, "n0"), _necc(cosine, policy, 17, None)
    assert relative(scaled[0], unscaled[0] * 4 / 17) < 1e-6
    assert relative(scaled[1], unscaled[1] * 9 / 17) < 1e-6


@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
@pytest.mark.parametrize("options", [{"necc_scale": "n0"}, {"variant": "libragrad"}])
def test_masked_equals_removed_with_options(pruner, options):
    model = tiny().double()
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        removed = prunex.explain("tokentm", model, images_for(model), TARGETS, **options).raw
        pruning.masked = True
        assert relative(prunex.explain("tokentm", model, images_for(model), TARGETS, **options).raw, removed) < 1e-12


def test_bad_options():
    for options, says in (
        ({"variant": "perhead"}, "did you mean 'per_head'"),
        ({"variant": ["per_head"]}, "Known: libragrad, per_head"),
        ({"necc_scale": "n1"}, "did you mean 'n0'"),
    ):
        with pytest.raises(prunex.PrunexError, match=says):
            prunex.explain("tokentm", tiny(), images(), **options)
