import pytest
import torch

import prunex
from prunex import PrunexError
from tests.vits import images_for, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
FAMILIES = ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class", "siglip", "eva02", "beit"]


def legrad(model, x, target=TARGETS, **options):
    return prunex.explain("legrad", model, x, target, **options)


def slow(model, x, target, block, pool):
    """One block's map by opening timm's own parts, in double precision: a class-token or average-pooled plain ViT."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for earlier in model.blocks[:block]:
        tokens = earlier(tokens)
    last = model.blocks[block]
    attn, y = last.attn, last.norm1(tokens)
    q, k, v = attn.qkv(y).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(2, 3)).softmax(-1).detach().requires_grad_()
    out = attn.proj((weights @ v).transpose(1, 2).flatten(2))
    tokens = tokens + last.ls1(out)
    tokens = tokens + last.ls2(last.mlp(last.norm2(tokens)))
    if model.global_pool == "token":
        features = model.norm(tokens.mean(1) if pool == "mean" else tokens[:, 0])
    else:
        features = model.fc_norm(model.norm(tokens)[:, model.num_prefix_tokens :].mean(1))
    score = model.head(features).gather(1, target[:, None]).sum()
    gradient = torch.autograd.grad(score, weights)[0]
    return gradient.clamp(min=0).mean((1, 2))[:, model.num_prefix_tokens :]


@pytest.mark.parametrize("pool", ["mean", "read"])
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "layer_scale", "qk_norm", "avg_pool", "avg_pool_no_class"])
def test_equals_the_slow_definition(family, pool):
    model = tiny(family).double()
    x = images_for(model)
    raw = legrad(model, x, start_layer=0, pool=pool).raw
    for block in range(4):
        assert relative(raw[:, block], slow(model, x, TARGETS, block, pool)) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_add_up_and_images_are_alone(family):
    model = tiny(family)
    x = images_for(model)
    every = legrad(model, x, start_layer=0)
    torch.testing.assert_close(every.maps.flatten(1), every.raw.sum(1))
    assert every.raw.shape == (3, 4, 16)
    assert (every.raw >= 0).all()
    assert every.raw.flatten(2).amax(2).min() > 0
    late = legrad(model, x, start_layer=2)
    torch.testing.assert_close(late.raw, every.raw[:, 2:], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(legrad(model, x).raw, late.raw, rtol=1e-4, atol=1e-8)  # the last two are the default
    for i in range(3):
        alone = legrad(model, x[i : i + 1], TARGETS[i : i + 1], start_layer=0)
        assert relative(alone.raw[0], every.raw[i]) < 1e-4


@pytest.mark.parametrize("method", ["topk", "evit", "dynamicvit", "tome"])
@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class", "siglip"])
def test_masked_equals_removed(family, method):
    model = tiny(family).double()
    x = images_for(model)
    options = {"r": 3} if method == "tome" else {"keep_ratio": 0.6, "stages": (1, 2)}
    pruning = prunex.attach(model, method, **options)
    removed = legrad(model, x, start_layer=0)
    pruning.masked = True
    masked = legrad(model, x, start_layer=0)
    assert relative(masked.raw, removed.raw) < 1e-6
    if method == "topk":
        assert removed.raw[:, -1][~removed.trace.kept().flatten(1)].abs().max() == 0


def test_bias_and_scale_of_the_head():
    model = tiny("vit").double()
    x = images_for(model)
    want = legrad(model, x, start_layer=0).raw
    with torch.no_grad():
        model.head.bias.add_(3.0)
    assert relative(legrad(model, x, start_layer=0).raw, want) < 1e-12
    with torch.no_grad():
        model.head.weight.mul_(2.5)
    assert relative(legrad(model, x, start_layer=0).raw, 2.5 * want) < 1e-12


def test_a_constant_score_has_no_map():
    model = tiny("vit")
    e = legrad(model, images_for(model), lambda out: out[:, 0] * 0)
    assert e.maps.abs().max() == 0


@pytest.mark.parametrize(("options", "message"), [({"start_layer": 9}, "blocks 0..3"), ({"pool": "max"}, "mean, read")])
def test_bad_options(options, message):
    model = tiny("vit")
    with pytest.raises(PrunexError, match=message):
        legrad(model, images_for(model), **options)
