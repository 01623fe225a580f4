import importlib
from functools import partial

import pytest
import torch

import prunex
from prunex.vit.tape import Tape
from tests.relevance import definitions as relevance
from tests.vits import gated, images, images_for, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
EVERY = [
    {},
    {"rule_set": "published_baseline"},
    {"rule": "epsilon"},
    {"rule": "gamma"},
    {"rule": "attnlrp"},
    {"rule": "attnlrp", "gamma": (0.25, 0.05)},
    {"rule": "cplrp"},
    {"rule": "cplrp", "gamma": 0.1},
]
every = pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(str(v) for v in o.values()) or "zplus")
explain = partial(prunex.explain, "lrp")


@pytest.mark.parametrize("family", ["vit", "layer_scale", "qk_norm", "avg_pool"])
def test_equals_the_slow_walk(family):
    model = tiny(family).double()
    e = explain(model, images_for(model), TARGETS)
    for i, image in enumerate(images_for(model)):
        found = relevance.walked(model, image, TARGETS[i])
        assert relative(e.maps[i].flatten(), found.tokens[model.num_prefix_tokens :].sum(1)) < 1e-4  # sums near 0
    assert e.signed


@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_pruned_equals_the_slow_walk(pruner):
    model = tiny().double()
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)):
        e = explain(model, images_for(model), TARGETS)
    for i, image in enumerate(images_for(model)):
        found = relevance.walked(model, image, TARGETS[i], (pruner, 0.6, (1, 2)))
        assert relative(e.maps[i].flatten(), found.tokens[1:].sum(1)) < 1e-4


@every
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_giant"])
def test_read_out_rows_alone_equal_all_rows(family, options, monkeypatch):
    model = tiny(family).double()
    narrow = explain(model, images_for(model), TARGETS, **options)
    module = importlib.import_module("prunex.explainers.lrp")
    monkeypatch.setattr(module, "Tape", lambda **asked: Tape(**asked | {"narrow": False}))
    assert relative(explain(model, images_for(model), TARGETS, **options).raw, narrow.raw) < 1e-7


@every
@pytest.mark.parametrize(
    "family",
    ["vit", "dinov2_giant", "qk_norm", "attn_norm", "layer_scale", "avg_pool", "max_pool", "avgmax_pool", "gated"],
)
def test_a_batch_equals_singles(family, options):
    model = (gated() if family == "gated" else tiny(family)).double()
    x = images_for(model)
    e = explain(model, x, TARGETS, **options)
    assert e.raw.shape == x.shape
    assert e.pixels.equal(e.raw.sum(1))
    assert torch.isfinite(e.raw).all()
    assert (e.maps != 0).all()
    for i in range(3):
        one = explain(model, x[i : i + 1], int(TARGETS[i]), **options)
        assert relative(one.raw[0], e.raw[i]) < 1e-7
        assert relative(one.maps[0], e.maps[i]) < 1e-7


@every
@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_masked_equals_removed(pruner, options):
    model = tiny().double()
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        removed = explain(model, images_for(model), TARGETS, **options)
        pruning.masked = True
        masked = explain(model, images_for(model), TARGETS, **options)
    assert relative(masked.raw, removed.raw) < 1e-7
    assert relative(masked.maps, removed.maps) < 1e-7
    assert (removed.maps[~removed.trace.kept()] != 0).any()  # what earlier blocks gave is kept


@every
def test_keeping_everything_is_the_dense_map(options):
    dense, model = explain(tiny(), images(), TARGETS, **options), tiny()
    with prunex.attach(model, "topk", keep_ratio=1.0, stages=(1, 2)):
        assert explain(model, images(), TARGETS, **options).raw.equal(dense.raw)


@every
def test_classes_differ_and_grad_modes_do_not(options):
    model = tiny()
    wanted = explain(model, images(), 0, **options)
    assert relative(explain(model, images(), 3, **options).maps, wanted.maps) > 0.01
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert explain(model, images(), 0, **options).raw.equal(wanted.raw)
    half = explain(tiny().bfloat16(), images(), 0, **options)
    assert half.maps.dtype == half.raw.dtype == torch.float32
    assert torch.isfinite(half.maps).all()


@every
@pytest.mark.parametrize("size", [(32, 56), (29, 41)])
def test_any_image_size(size, options):
    model = tiny("dynamic", dynamic_img_pad=True)
    x = images(2, size)
    e = explain(model, x, 1, **options)
    assert e.raw.shape == x.shape
    assert e.pixels.shape == (2, *size)
    assert torch.isfinite(e.raw).all()


def test_strengths_of_the_gamma_rule():
    model = tiny().double()
    x = images_for(model)
    wanted = explain(model, x, TARGETS, rule="gamma", gamma=(0.25, 0.05)).raw
    assert explain(model, x, TARGETS, rule="gamma").raw.equal(wanted)
    assert explain(model, x, TARGETS, rule="gamma", gamma=0.25).raw.equal(
        explain(model, x, TARGETS, rule="gamma", gamma=[0.25, 0.25]).raw
    )
    assert relative(explain(model, x, TARGETS, rule="gamma", gamma=(0.25, 0.5)).raw, wanted) > 0.01
    assert relative(explain(model, x, TARGETS, rule="gamma", gamma=(1, 0.05)).raw, wanted) > 0.01
    zero = explain(model, x, TARGETS, rule="gamma", gamma=0).maps
    assert relative(zero, explain(model, x, TARGETS, rule="epsilon").maps) < 1e-9


def test_bad_options():
    for options, says in (
        ({"rule": "z+"}, "Known: attnlrp, cplrp, epsilon, gamma, zplus|did you mean"),
        ({"rule": None}, "rule"),
        ({"rule_set": "both"}, "conserving"),
        ({"rule": "cplrp", "rule_set": "published_baseline"}, "rule sets belong to rule='zplus'"),
        ({"gamma": 0.1}, "with rule='zplus' is not allowed: rules with gamma are gamma, attnlrp, cplrp"),
        ({"rule": "epsilon", "gamma": 0}, "with rule='epsilon' is not allowed"),
        *(
            ({"rule": "gamma", "gamma": g}, "give a number of at least 0, or one for pixels")
            for g in (-1, True, "0.1", (0.1,), (0.1, None), float("nan"), float("inf"), torch.tensor(0.1))
        ),
    ):
        with pytest.raises(prunex.PrunexError, match=says):
            explain(tiny(), images(), **options)
