import importlib
from functools import partial

import pytest
import torch
from torch import nn

import prunex
from prunex.vit.tape import Tape
from tests.relevance import definitions as relevance
from tests.vits import gated, images, images_for, lively, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
explain = partial(prunex.explain, "transformer_attribution")


@pytest.mark.parametrize("options", [{}, {"start_layer": 2}, {"gradient": False}])
@pytest.mark.parametrize("family", ["vit", "layer_scale", "dinov2_reg", "qk_norm", "avg_pool", "avg_pool_no_class"])
def test_equals_the_explicit_product(family, options):
    model = tiny(family).double()
    x = images_for(model)
    e = explain(model, x, TARGETS, **options)
    for i, image in enumerate(x):
        found = relevance.walked(model, image, TARGETS[i])
        assert relative(e.logits[i], found.logits) < 1e-10
        wanted = relevance.rolled(found, options.get("start_layer", 0), options.get("gradient", True))
        assert relative(e.raw[i], wanted) < 1e-6
        assert (wanted[model.num_prefix_tokens :] > 0).sum() > 8


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_pruned_equals_the_explicit_product_with_s(pruner, gradient):
    # A fused token's weights are part of EViT's gradient and constants to relevance.
    model = tiny().double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)):
        e = explain(model, x, TARGETS, gradient=gradient)
    for i, image in enumerate(x):
        found = relevance.walked(model, image, TARGETS[i], (pruner, 0.6, (1, 2)))
        assert relative(e.raw[i], relevance.rolled(found, gradient=gradient)) < 1e-6


def test_one_block_is_the_clamped_product_before_the_head_mean():
    model = tiny(depth=1).double()
    e = explain(model, images_for(model), TARGETS)
    for i, image in enumerate(images_for(model)):
        found = relevance.walked(model, image, TARGETS[i])
        product = found.grads[0] * found.attention[0]
        assert relative(e.raw[i, 1:], product.clamp(min=0).mean(0)[0, 1:]) < 1e-6
        assert relative(e.raw[i, 1:], product.mean(0).clamp(min=0)[0, 1:]) > 1e-3


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "dinov2_giant"])
def test_read_out_rows_alone_equal_all_rows(family, monkeypatch):
    model = tiny(family).double()
    narrow = explain(model, images_for(model), TARGETS)
    module = importlib.import_module("prunex.explainers.transformer_attribution")
    monkeypatch.setattr(module, "Tape", lambda **asked: Tape(**asked | {"narrow": False}))
    assert relative(explain(model, images_for(model), TARGETS).raw, narrow.raw) < 1e-9


def test_classes_differ():
    model = tiny()
    a, b = (explain(model, images(), t).maps for t in (0, 3))
    assert relative(a, b) > 0.05
    several = explain(model, images(), TARGETS)
    assert several.maps[0].equal(explain(model, images(), torch.tensor([4, 1, 1])).maps[0])


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    "family",
    ["vit", "dinov2_giant", "qk_norm", "attn_norm", "layer_scale", "avg_pool", "max_pool", "avgmax_pool", "gated"],
)
def test_a_batch_equals_singles(family, gradient):
    model = (gated() if family == "gated" else tiny(family)).double()
    x = images_for(model)
    e = explain(model, x, TARGETS, gradient=gradient)
    assert torch.isfinite(e.raw).all()
    assert (e.maps >= 0).all()
    assert (e.maps > 0).any()
    for i in range(3):
        assert relative(explain(model, x[i : i + 1], int(TARGETS[i]), gradient=gradient).raw[0], e.raw[i]) < 1e-9


@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
@pytest.mark.parametrize("family", ["vit", "avg_pool", "dinov2_giant"])
def test_masked_equals_removed(family, pruner):
    model = tiny(family).double()
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        removed = explain(model, images_for(model), TARGETS, start_layer=1)
        pruning.masked = True
        masked = explain(model, images_for(model), TARGETS, start_layer=1)
    assert relative(masked.maps, removed.maps) < 1e-8
    assert (removed.maps[~removed.trace.kept()] > 0).any()  # what left is not forced to 0


def test_keeping_everything_is_the_dense_map():
    dense = explain(tiny(), images(), TARGETS)
    for masked in (None, True):
        model = tiny()
        with prunex.attach(model, "topk", keep_ratio=1.0, stages=(1, 2)) as pruning:
            pruning.masked = masked
            assert explain(model, images(), TARGETS).raw.equal(dense.raw)


@pytest.mark.parametrize("method", ["transformer_attribution", "partial_lrp", "lrp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_grad_mode_and_autocast(method, dtype):
    model = tiny().to(dtype)
    wanted = prunex.explain(method, model, images(), TARGETS)
    assert wanted.maps.dtype == wanted.raw.dtype == torch.float32
    assert torch.isfinite(wanted.maps).all()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            e = prunex.explain(method, model, images(), TARGETS)
        assert e.maps.equal(wanted.maps)
        assert not e.maps.is_inference()
    assert next(model.parameters()).dtype == dtype
    if dtype == torch.bfloat16:  # as the same weights in single precision
        same = prunex.explain(method, tiny().to(dtype).float(), images().to(dtype).float(), TARGETS)
        assert same.maps.equal(wanted.maps)


@pytest.mark.parametrize("method", ["transformer_attribution", "partial_lrp", "lrp"])
def test_half_precision_in_the_middle_of_training(method):
    model = tiny().bfloat16()
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)):
        model.train()
        loss = model(images(dtype=torch.bfloat16)).sum()
        e = prunex.explain(method, model, images(), TARGETS)
        assert torch.isfinite(e.maps).all()
        assert model.training
        loss.backward()


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(48, 5)

    def forward(self, x):
        return self.inner(x).softmax(-1)


@pytest.mark.parametrize("method", ["transformer_attribution", "partial_lrp", "lrp"])
@pytest.mark.parametrize("head", ["own", "sequence with own", "no"])
def test_heads_that_are_not_known(method, head):
    model = tiny()
    inside = nn.Sequential(nn.LayerNorm(48), Head())
    model.head = {"own": Head(), "sequence with own": inside, "no": nn.Identity()}[head]
    for options in ({}, {"rule": "cplrp"}, {"rule": "attnlrp", "gamma": 0.1}) if method == "lrp" else ({},):
        with pytest.raises(
            prunex.PrunexError, match="no classifier" if head == "no" else r"\(tests\.Head\) is not linear"
        ):
            prunex.explain(method, model, images(), **options)
    assert torch.is_grad_enabled()


def test_heads_of_several_layers():
    model = tiny().double()
    plain = explain(model, images_for(model), TARGETS)
    model.head = nn.Sequential(nn.Dropout(0.3), nn.Sequential(model.head, nn.Identity()))
    assert explain(model, images_for(model), TARGETS).raw.equal(plain.raw)
    model.head = lively(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 5)).double())
    for method in ("transformer_attribution", "partial_lrp", "lrp"):
        assert torch.isfinite(prunex.explain(method, model.eval(), images_for(model), TARGETS).raw).all()
    for rule in ("attnlrp", "cplrp"):
        e = prunex.explain("lrp", model, images_for(model), TARGETS, rule=rule, gamma=0.1)
        assert torch.isfinite(e.raw).all()


@pytest.mark.parametrize("value", [4, -5, True, "0"])
def test_a_start_that_does_not_exist(value):
    with pytest.raises(prunex.PrunexError, match=r"does not exist.*0\.\.3"):
        explain(tiny(), images(), start_layer=value)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_gradient_is_true_or_false(value):
    for method in ("transformer_attribution", "partial_lrp"):
        with pytest.raises(prunex.PrunexError, match="give True or False"):
            prunex.explain(method, tiny(), images(), gradient=value)
