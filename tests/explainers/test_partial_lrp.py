import importlib
from functools import partial

import pytest
import torch

import prunex
from prunex.vit.tape import Tape
from tests.relevance import definitions as relevance
from tests.vits import gated, images, images_for, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
RULE_SETS = ["conserving", "published_baseline"]
explain = partial(prunex.explain, "partial_lrp")


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("family", ["vit", "layer_scale", "dinov2_reg", "qk_norm", "avg_pool", "avg_pool_no_class"])
def test_equals_the_slow_walk(family, gradient):
    model = tiny(family).double()
    x, prefix = images_for(model), model.num_prefix_tokens
    e = explain(model, x, TARGETS, gradient=gradient)
    for i, image in enumerate(x):
        found = relevance.walked(model, image, TARGETS[i])
        r = found.attention[3] * (found.grads[3] if gradient else 1)
        assert relative(e.raw[i], found.readout @ r) < 1e-6
        assert relative(e.maps[i].flatten(), (found.readout @ r.clamp(min=0).mean(0))[prefix:]) < 1e-6


@pytest.mark.parametrize("stages", [(1, 2), (1, 3)])  # also where tokens leave inside the last block
@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_pruned_is_lifted_to_the_input(pruner, stages):
    model = tiny().double()
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=stages):
        e = explain(model, images_for(model), TARGETS)
    for i, image in enumerate(images_for(model)):
        found = relevance.walked(model, image, TARGETS[i], (pruner, 0.6, stages))
        row = found.readout @ found.reduced.get(3, torch.eye(len(found.readout)).double())
        row = row @ found.attention[3].clamp(min=0).mean(0)
        for block in (s for s in reversed(stages) if s < 3):
            row = row @ found.reduced[block]
        assert relative(e.maps[i].flatten(), row[1:]) < 1e-6
    if pruner == "topk":
        assert (e.maps[~e.trace.kept(0)] == 0).all()


@pytest.mark.parametrize("rule_set", RULE_SETS)
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_giant"])
def test_read_out_rows_alone_equal_all_rows(family, rule_set, monkeypatch):
    model = tiny(family).double()
    narrow = explain(model, images_for(model), TARGETS, rule_set=rule_set)
    module = importlib.import_module("prunex.explainers.partial_lrp")
    monkeypatch.setattr(module, "Tape", lambda **asked: Tape(**asked | {"narrow": False}))
    whole = explain(model, images_for(model), TARGETS, rule_set=rule_set)
    assert relative(whole.raw, narrow.raw) < 1e-9
    assert relative(whole.maps, narrow.maps) < 1e-9


def test_the_rule_sets_and_classes_differ():
    model = tiny()
    a, b = (explain(model, images(), TARGETS, rule_set=s).maps for s in RULE_SETS)
    assert relative(a, b) > 0.05
    a, b = (explain(model, images(), t).maps for t in (0, 3))
    assert relative(a, b) > 0.01


@pytest.mark.parametrize("rule_set", RULE_SETS)
@pytest.mark.parametrize(
    "family",
    ["vit", "dinov2_giant", "qk_norm", "attn_norm", "layer_scale", "avg_pool", "max_pool", "avgmax_pool", "gated"],
)
def test_a_batch_equals_singles(family, rule_set):
    model = (gated() if family == "gated" else tiny(family)).double()
    x = images_for(model)
    e = explain(model, x, TARGETS, rule_set=rule_set)
    assert e.raw.shape == (3, 3, 17)
    assert torch.isfinite(e.raw).all()
    assert (e.maps >= 0).all()
    assert (e.maps > 0).any()
    for i in range(3):
        assert relative(explain(model, x[i : i + 1], int(TARGETS[i]), rule_set=rule_set).raw[0], e.raw[i]) < 1e-9


@pytest.mark.parametrize("rule_set", RULE_SETS)
@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_masked_equals_removed(pruner, rule_set):
    model = tiny().double()
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        removed = explain(model, images_for(model), TARGETS, rule_set=rule_set)
        pruning.masked = True
        masked = explain(model, images_for(model), TARGETS, rule_set=rule_set)
    assert relative(masked.maps, removed.maps) < 1e-9
    assert relative(masked.raw, removed.raw) < 1e-9


def test_keeping_everything_is_the_dense_map():
    dense, model = explain(tiny(), images(), TARGETS), tiny()
    with prunex.attach(model, "topk", keep_ratio=1.0, stages=(1, 2)):
        assert explain(model, images(), TARGETS).raw.equal(dense.raw)


@pytest.mark.parametrize("value", ["conserve", None, ["conserving"]])
def test_a_rule_set_that_is_not_known(value):
    with pytest.raises(prunex.PrunexError, match="rule_set.*Known: conserving, published_baseline|did you mean"):
        explain(tiny(), images(), rule_set=value)
