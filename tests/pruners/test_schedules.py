"""Schedules: the formulas, one set of options for every pruner, and what follows the rates."""

import json
import math

import pytest
import torch

import prunex
from prunex.pruners.base import TokenPruner, floor_share
from prunex.pruners.schedules import Schedule, check_schedule
from prunex.vit.anatomy import read
from tests.vits import images_for, largest, randomise, tiny

METHODS = {"topk": {}, "evit": {}, "dynamicvit": {"teacher": False}}


@pytest.mark.parametrize("base", [0.1, 0.7, 1.0])
def test_formulas(base):
    cosine, linear = Schedule("cosine", 0.2, 0.5), Schedule("linear", 0.2, 0.5)
    constant = Schedule("constant", 0.2)
    for step in range(101):
        t = step / 100
        u = min(1.0, max(0.0, (t - 0.2) / 0.5))
        assert cosine.rate(base, t) == pytest.approx(base + (1 - base) * (math.cos(math.pi * u) + 1) / 2)
        assert linear.rate(base, t) == pytest.approx(1 - (1 - base) * u)
        assert constant.rate(base, t) == (1.0 if t < 0.2 else base)
    for schedule in (cosine, linear, constant):
        assert schedule.rate(base, 1.0) == base  # to the last bit
    assert Schedule().rate(base, 0.0) == base


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("method", METHODS)
def test_rates_fall_from_all_to_the_base_in_every_method(method, kind):
    model = tiny(img_size=64)
    x = images_for(model, 2)
    dense = model(x)
    length = 0.0 if kind == "constant" else 0.5
    options = {"schedule": kind, "shrink_start": 0.2, "shrink_length": length}
    with prunex.attach(model, method, keep_ratio=[0.7, 0.5], stages=(1, 2), **options, **METHODS[method]) as pruning:
        assert {k: pruning.options[k] for k in options} == options
        json.dumps(pruning.spec)
        pruning.progress = 0.1
        assert largest(model(x), dense) <= 1e-6
        assert pruning.trace.stages == []
        assert pruning.counts() == [64, 64]
        dense_cost = prunex.cost(model).macs
        seen = []
        for step in range(101):
            pruning.progress = step / 100
            seen.append(pruning.counts())
        costs = []
        for pruning.progress in (0.3, 0.5, 0.69, 1.0):
            model(x)
            assert [s.counted for s in pruning.trace.stages] == pruning.counts()
            costs.append(prunex.cost(model).macs)
        assert costs == sorted(costs, reverse=True)
        end = pruning.counts()
        for stage in (0, 1):
            column = [counts[stage] for counts in seen]
            assert column == sorted(column, reverse=True)
            assert column[:20] == [64] * 20
            assert column[70 if length else 20 :] == [end[stage]] * (31 if length else 81)
        twin = tiny(img_size=64)
        assert prunex.attach(twin, **pruning.spec).counts() == end
    with prunex.attach(model, method, keep_ratio=[0.7, 0.5], stages=(1, 2), **METHODS[method]) as plain:
        plain.progress = 0.0
        assert plain.counts() == end  # by default the base rates hold at once
        assert costs[-1] == prunex.cost(model).macs < dense_cost


def test_dynamicvit_s_targets_follow():
    model = tiny()
    pruning = prunex.attach(
        model, "dynamicvit", keep_ratio=0.6, stages=(1, 2), teacher=False, schedule="linear", shrink_length=1.0
    )
    randomise(pruning.pruner)
    model.train()
    for pruning.progress in (0.25, 0.5, 1.0):
        torch.manual_seed(0)
        model(images_for(model))
        rate = 1 - 0.4 * pruning.progress
        kept = [pruning.trace.kept(s).flatten(1).float().mean(1) for s in (0, 1)]
        wanted = 2 * torch.stack([(k - rate ** (s + 1)) ** 2 for s, k in enumerate(kept)]).mean()
        assert pruning.losses()["ratio"].item() == pytest.approx(wanted.item(), rel=1e-5)
        assert pruning.counts(100) == [floor_share(rate ** (s + 1), 100) for s in (0, 1)]


def test_dynamicvit_trains_densely_before_the_start_and_no_predictor_waits_for_a_gradient():
    model = tiny()
    x = images_for(model)
    model.train()
    dense = model(x)
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 2), shrink_start=0.5)
    randomise(pruning.pruner)
    pruning.progress = 0.2
    logits = model(x)
    assert largest(logits, dense) < 1e-5
    assert pruning.trace.kept().all()
    losses = pruning.losses()
    assert losses["ratio"] == 0
    (logits.square().sum() + sum(losses.values())).backward()
    assert all(p.grad is not None and not p.grad.any() for p in pruning.pruner.parameters())
    pruning.progress = 0.5
    model(x).square().sum().backward()
    assert not pruning.trace.kept().all()
    assert any(p.grad.any() for p in pruning.pruner.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_slim_model_keeps_the_rates_of_its_moment(method, tmp_path):
    model = tiny(img_size=64)
    options = {"schedule": "linear", "shrink_length": 1.0, **METHODS[method]}
    pruning = prunex.attach(model, method, keep_ratio=0.5, **options)
    randomise(pruning.pruner)
    pruning.progress = 0.4
    x = images_for(model)
    small = prunex.slim(model)
    assert torch.equal(small(x), model(x))
    slim = prunex.attached(small)
    slim.progress = 0.9
    assert torch.equal(small(x), model(x))
    assert slim.options["shrink_length"] == 0.0
    assert slim.options["keep_ratio"] == pytest.approx(0.8)
    prunex.save(small, tmp_path / "slim")
    assert torch.equal(prunex.load(tmp_path / "slim")(x), model(x))
    assert pruning.options["shrink_length"] == 1.0


def test_a_pruner_that_takes_no_schedule_is_given_none():
    class Fixed(TokenPruner):
        def __init__(self, anatomy, keep_ratio=0.7, stages=None):
            super().__init__(anatomy, keep_ratio, stages)

    assert set(Fixed(read(tiny())).options) == {"keep_ratio", "stages"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'.*constant, cosine, linear"),
        ({"schedule": None}, "unknown schedule None"),
        ({"schedule": ["linear"]}, "unknown schedule"),
        ({"shrink_start": -0.1}, "shrink_start=-0.1"),
        ({"shrink_length": 1.5}, "shrink_length=1.5"),
        ({"shrink_length": True}, "shrink_length=True"),
        ({"shrink_start": 0.6, "shrink_length": 0.5}, "more than the whole training"),
        ({"schedule": "constant", "shrink_length": 0.5}, "does nothing with schedule='constant'"),
        ({"schedul": "linear"}, "did you mean 'schedule'"),
    ],
)
def test_bad_schedules_are_refused(method, options, message):
    model = tiny()
    with pytest.raises(prunex.PrunexError, match=message) as caught:
        prunex.attach(model, method, **options)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "prunex")


def test_defaults_make_the_plain_schedule():
    assert check_schedule() == Schedule() == Schedule("cosine", 0.0, 0.0)
