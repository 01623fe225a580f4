"""Budgets: what they solve for costs what they allow; what cannot be met is told."""

import itertools
import json
import warnings

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.checks import check_budget
from prunex.pruners.budget import Budget
from prunex.pruners.topk import TopK
from prunex.registry import lookup, register
from prunex.vit.anatomy import read
from prunex.vit.cost import count
from tests.vits import assert_same_state, geometry, images_for, state_of, tiny

METHODS = {
    "topk": ("topk", {}),
    "evit": ("evit", {}),
    "evit, not fused": ("evit", {"fuse": False}),
    "dynamicvit": ("dynamicvit", {"teacher": False}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1.0, 0.97, 0.65, 0.35, "2.9GMACs"])
def test_realised_cost_is_within_one_percent(method, budget):
    model, (name, options) = geometry(), METHODS[method]
    dense = prunex.cost(model).macs
    wanted = 2.9e9 if isinstance(budget, str) else budget * dense
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruning = prunex.attach(model, name, budget=budget, **options)
    assert prunex.cost(model).macs == pytest.approx(wanted, rel=0.01)
    assert isinstance(pruning.options["keep_ratio"], float)  # one shared rate is enough on 196 patches
    assert "budget" not in pruning.spec
    assert pruning.meets(budget)
    twin = geometry()
    prunex.attach(twin, **json.loads(json.dumps(pruning.spec)))
    assert prunex.cost(twin).macs == prunex.cost(model).macs


@pytest.mark.parametrize(
    ("name", "budget"), [("deit_tiny_patch16_224", "400MMACs"), ("deit_base_patch16_224", "9GMACs")]
)
def test_models_of_other_sizes(name, budget):
    model = geometry(name)
    prunex.attach(model, "evit", budget=budget)
    assert prunex.cost(model).gmacs == pytest.approx({"400MMACs": 0.4, "9GMACs": 9}[budget], rel=0.01)
    larger = geometry(name, img_size=384)
    pruning = prunex.attach(larger, "evit", budget=0.6)
    assert prunex.cost(larger).macs == pytest.approx(0.6 * prunex.cost(geometry(name, img_size=384)).macs, rel=0.01)
    assert pruning.options["keep_ratio"] != prunex.attach(geometry(name), "evit", budget=0.6).options["keep_ratio"]


@pytest.mark.parametrize("method", METHODS)
def test_the_rate_falls_with_the_budget(method):
    name, options = METHODS[method]
    model, rates = geometry(), []
    for budget in (1.0, 0.8, 0.6, 0.4):
        with prunex.attach(model, name, budget=budget, **options) as pruning:
            rates.append(pruning.options["keep_ratio"])
    assert rates == sorted(set(rates), reverse=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["deit_distilled", "avg_pool_no_class", "not_square"])
def test_small_grids_come_as_near_as_whole_tokens_allow(family, method):
    """16 patches: a shared rate steps by several per cent, single stages by less; a warning tells what is left."""
    name, options = METHODS[method]
    dense = prunex.cost(tiny(family, depth=6)).macs
    for budget in (0.9, 0.75, 0.6):
        model = tiny(family, depth=6)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pruning = prunex.attach(model, name, budget=budget, stages=(1, 3, 4), **options)
        off = abs(prunex.cost(model).macs / (budget * dense) - 1)
        assert off < 0.05
        assert len(told) == (off > 0.01)
        for warning in told:
            assert f"budget={budget}" in str(warning.message)
            assert f"{100 * off:.1f} % off" in str(warning.message)
            assert warning.filename == __file__
        assert pruning.meets(budget)


@pytest.mark.parametrize("stages", [(1,), (1, 2)])
def test_near_misses_are_the_nearest_there_is(stages):
    """Against trying every choice of counts."""
    misses = []
    for budget in (0.93, 0.81, 0.7, 0.58):
        model = tiny(depth=4)
        dense, anatomy = prunex.cost(model).macs, read(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruning = prunex.attach(model, "topk", budget=budget, stages=stages)
        found = abs(prunex.cost(model).macs / (budget * dense) - 1)
        pruning.detach()
        every = []
        for counts in itertools.combinations_with_replacement(range(16, 0, -1), len(stages)):
            rates = [after / before for before, after in itertools.pairwise((16, *counts))]
            every.append(count(model, TopK(anatomy, rates, stages)).macs)
        best = min(abs(m / (budget * dense) - 1) for m in every)
        assert found <= 0.01 or found == pytest.approx(best, abs=1e-9)
        misses.append(found > 0.01)
    assert any(misses) == (len(stages) == 1)  # one stage of 16 patches cannot meet all of them, two can


@pytest.mark.parametrize("method", METHODS)
def test_what_is_out_of_reach_is_refused_with_the_range(method):
    name, options = METHODS[method]
    model = tiny()
    before = state_of(model)
    for budget in (0.1, "0.1MMACs", "5GMACs", "9MMACs"):
        with pytest.raises(PrunexError, match=r"out of reach for \w+ .* from .* MMACs, .* % to .* 100.0 %") as caught:
            prunex.attach(model, name, budget=budget, **options)
        assert "\n" not in str(caught.value)
    assert_same_state(model, before)
    low = prunex.cost(model)
    with prunex.attach(model, name, keep_ratio=1e-9, **options):
        low = prunex.cost(model).macs
    share = low / prunex.cost(model).macs
    prunex.attach(model, name, budget=share * 1.0001, **options)  # the end of the range itself is met
    assert prunex.cost(model).macs == low


@pytest.mark.parametrize(
    "bad",
    [0, -0.5, 1.5, float("nan"), float("inf"), True, "", "0.65", "65%", "2.9", "GMACs", "0GMACs", "-1GMACs", [0.6]],
)
def test_budgets_that_are_none(bad):
    model = tiny()
    with pytest.raises(PrunexError, match="budget=.*is not allowed: give a share.*2.9GMACs") as caught:
        prunex.attach(model, "evit", budget=bad)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "prunex")


def test_written_budgets():
    assert check_budget("400MMACs", 1) == check_budget("0.4 GMACs", 1) == check_budget("400000kmacs", 1) == 4e8
    assert check_budget("1000 MACs", 1) == check_budget("1000MAC", 1) == 1000
    assert check_budget(1, 77) == 77


@pytest.mark.parametrize("ratio", [0.7, [0.7, 0.7, 0.7]])
def test_a_budget_beside_the_option_it_sets_is_refused(ratio):
    with pytest.raises(PrunexError, match=r"budget=0.6 and keep_ratio=.*both say"):
        prunex.attach(tiny(), "evit", budget=0.6, keep_ratio=ratio)


def test_other_mistakes_are_told_as_without_a_budget():
    with pytest.raises(PrunexError, match="unknown option of evit 'fuze'"):
        prunex.attach(tiny(), "evit", budget=0.6, fuze=True)
    with pytest.raises(PrunexError, match=r"stages=\(1, 9\) goes beyond"):
        prunex.attach(tiny(), "evit", budget=0.6, stages=(1, 9))


def test_a_schedule_meets_the_budget_at_its_end():
    model = tiny(img_size=64)
    dense = prunex.cost(model).macs
    pruning = prunex.attach(model, "evit", budget=0.7, schedule="linear", shrink_length=0.5)
    assert prunex.cost(model).macs == pytest.approx(0.7 * dense, rel=0.01)
    pruning.progress = 0.0
    assert prunex.cost(model).macs == dense
    assert pruning.meets(0.7)
    assert not pruning.meets(0.6)


def test_solving_leaves_model_and_random_numbers_alone_and_repeats_itself():
    model = tiny(drop_path_rate=0.1).train()
    before, state = state_of(model), torch.random.get_rng_state()
    search = Budget(model, read(model), lookup("pruner", "dynamicvit").make, {"teacher": False})
    solved = search.solve(0.8)
    assert_same_state(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert solved == Budget(model, read(model), lookup("pruner", "dynamicvit").make, {"teacher": False}).solve(0.8)
    assert solved == {"teacher": False, "keep_ratio": solved["keep_ratio"]}


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_as_plain_options(method, tmp_path):
    name, options = METHODS[method]
    model = tiny(img_size=64)
    prunex.attach(model, name, budget=0.7, **options)
    x = images_for(model)
    prunex.save(model, tmp_path / "slim")
    loaded = prunex.load(tmp_path / "slim")
    assert torch.equal(loaded(x), model(x))
    assert prunex.attached(loaded).spec == prunex.attached(model).spec
    assert "budget" not in (tmp_path / "slim" / "config.json").read_text()


class Halves(TopK):
    """A method without a free rate: it keeps the half or a quarter."""

    name = "halves"

    def __init__(self, anatomy, quarter=False):
        super().__init__(anatomy, 0.25 if quarter else 0.5)
        self.options = {"quarter": quarter}

    @classmethod
    def settings(cls, anatomy):
        return [{"quarter": False}, {"quarter": True}]


class Removes(TopK):
    """A method that counts what leaves, block by block, as token merging does."""

    name = "removes"

    def __init__(self, anatomy, r=1, even=False):
        if even and not isinstance(r, int):
            raise PrunexError("even=True is not allowed beside a list")
        patches, n = anatomy.grid[0] * anatomy.grid[1], anatomy.grid[0] * anatomy.grid[1]
        counts = [r] * anatomy.depth if isinstance(r, int) else list(r)
        rates = []
        for gone in counts:
            left = max(1, n - min(gone, n // 2))
            rates.append(left / n)
            n = left
        super().__init__(anatomy, rates, tuple(range(anatomy.depth)))
        assert patches >= n
        self.options = {"r": r, "even": even}

    @classmethod
    def knob(cls, anatomy, shares):
        most = anatomy.grid[0] * anatomy.grid[1] // 2
        r = [round((1 - s) * most) for s in shares]
        return {"r": r[0] if len(set(r)) == 1 else r}


@pytest.fixture(autouse=True)
def _registered():
    from prunex import registry

    known = dict(registry.METHODS)
    register("pruner", "halves", "none", "nothing")(Halves)
    register("pruner", "removes", "none", "nothing")(Removes)
    yield
    registry.METHODS.clear()
    registry.METHODS.update(known)


def test_a_method_without_a_rate_tells_what_its_settings_cost():
    model = tiny(img_size=64)
    shares = []
    for quarter in (False, True):
        with prunex.attach(model, "halves", quarter=quarter):
            pruned = prunex.cost(model).macs
        shares.append(100 * pruned / prunex.cost(model).macs)
    with pytest.raises(PrunexError, match="halves has no rate that a budget could set") as caught:
        prunex.attach(model, "halves", budget=0.6)
    assert f"quarter=False: 5.48 MMACs, {shares[0]:.1f} %; quarter=True" in str(caught.value)
    assert f"{shares[1]:.1f} %" in str(caught.value)
    pruning = prunex.attach(model, "halves")
    with pytest.raises(PrunexError, match="halves has no rate"):
        pruning.meets(0.6)


def test_a_method_with_another_knob():
    model = geometry()
    dense = prunex.cost(model).macs
    for budget in (0.9, 0.65, 0.5):
        with prunex.attach(model, "removes", budget=budget) as pruning:
            assert prunex.cost(model).macs == pytest.approx(budget * dense, rel=0.01)
            r = pruning.options["r"]
            assert isinstance(r, int) or all(isinstance(v, int) for v in r)
    with pytest.warns(UserWarning, match="whole tokens"):  # 6 tokens a step of r
        pruning = prunex.attach(tiny(depth=6), "removes", budget=0.6, even=True)
    assert isinstance(pruning.options["r"], int)
    with pytest.raises(PrunexError, match="budget=0.6 and r=3 both say"):
        prunex.attach(model, "removes", budget=0.6, r=3)
