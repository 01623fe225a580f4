"""What unit pruners share: the choice under a budget, rounding, the fewest units, numbers of a narrowed model."""

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.units.base import UnitPruner
from prunex.vit.units import Branch, branches
from prunex.vit.widths import WidthSpec, narrow, widths_of
from tests.units.units import removed, swin
from tests.vits import geometry, images_for, largest, tiny


class Given(UnitPruner):
    """Scores that a test gives."""

    name = "given"
    within = False


HEADS, CHANNELS = 40, 3
BRANCHES = [
    Branch("0.heads", 0, "blocks.0", "heads", 3, 4, HEADS),
    Branch("0.channels", 0, "blocks.0", "channels", 10, 1, CHANNELS),
    Branch("1.heads", 1, "blocks.1", "heads", 3, 4, HEADS),
    Branch("1.channels", 1, "blocks.1", "channels", 10, 1, CHANNELS),
]


def chosen(scores, allowed, within=False, **options):
    pruner = Given(BRANCHES, 5, **{"min_heads": 0, "min_channels": 0} | options)
    pruner.within = within
    pruner.decide(scores, allowed)
    return pruner


def random_scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {b.key: torch.rand(b.units, generator=generator).double() for b in BRANCHES}


@pytest.mark.parametrize("allowed", [0, 50, 137, 200, 299, 300])
def test_the_choice_is_the_definition(allowed):
    """Slow: units by score per cost, best first, until one does not fit; then whatever still does."""
    scores = random_scores()
    found = chosen(scores, allowed)
    order = sorted(((float(s) / b.macs, b.macs, b.key, u) for b in BRANCHES for u, s in enumerate(scores[b.key])))[::-1]
    wanted, room, index = set(), allowed, 0
    while index < len(order) and order[index][1] <= room:
        room -= order[index][1]
        wanted.add(order[index][2:])
        index += 1
    full = set()
    for _, macs, key, u in order[index:]:
        if key not in full and macs <= room:
            wanted.add((key, u))
            room -= macs
        elif key not in full:
            full.add(key)
    assert {(b.key, u) for b in BRANCHES for u in found.open(b.key).nonzero().flatten().tolist()} == wanted
    assert found.spent() == allowed - room


def test_equal_scores_keep_the_lower_numbers():
    found = chosen({b.key: torch.ones(b.units) for b in BRANCHES}, 2 * HEADS + 7 * CHANNELS, within=True)
    for b in BRANCHES:
        opened = found.open(b.key).nonzero().flatten().tolist()
        assert opened == list(range(len(opened)))
    assert 2 * HEADS + 7 * CHANNELS - found.spent() < CHANNELS


def test_more_is_kept_of_a_larger_budget():
    """With equal costs the kept units of a smaller budget are among those of a larger one."""
    scores = random_scores(1)
    equal = [Branch(b.key, b.block, b.path, b.kind, b.units, b.width, 5) for b in BRANCHES]
    before = None
    for allowed in range(0, 131, 5):
        pruner = Given(equal, 5, min_heads=0, min_channels=0)
        pruner.decide(scores, allowed)
        assert pruner.spent() == allowed
        now = torch.cat([pruner.open(b.key) for b in equal])
        assert before is None or bool((now | ~before).all())
        before = now


@pytest.mark.parametrize("step", [2, 4, 8, 16])
def test_rounding_up_to_multiples_meets_the_budget_too(step):
    for allowed in (120, 180, 250):
        found = chosen(random_scores(2), allowed, round_to=step)
        counts = [int(found.open(b.key).sum()) for b in BRANCHES if b.kind == "channels"]
        assert all(c % step == 0 or c == 10 for c in counts)
        assert found.spent() <= allowed
        # Nothing that is closed would still fit.
        room = allowed - found.spent()
        for b in BRANCHES:
            closed = b.units - int(found.open(b.key).sum())
            size = min(step, closed) if b.kind == "channels" else min(1, closed)
            assert size == 0 or size * b.macs > room


def test_the_fewest_units_stay_whatever_their_scores():
    scores = random_scores() | {"0.heads": torch.zeros(3), "1.channels": torch.zeros(10)}
    found = chosen(scores, 2 * HEADS + 9 * CHANNELS, min_heads=1, min_channels=3)
    for b in BRANCHES:
        assert int(found.open(b.key).sum()) >= (1 if b.kind == "heads" else 3)
    assert found.spent() <= 2 * HEADS + 9 * CHANNELS
    found = chosen(scores, 2 * HEADS + 9 * CHANNELS, min_heads=1, min_channels=3, round_to=4)
    assert all(int(found.open(f"{i}.channels").sum()) in (4, 8) for i in (0, 1))


def test_room_above_the_fewest_units_is_used():
    """Where all scores fall below the threshold but one, the rest of the budget still is spent."""
    scores = {b.key: torch.zeros(b.units) for b in BRANCHES}
    found = chosen(scores, 4 * HEADS + 12 * CHANNELS, min_heads=1, min_channels=2)
    assert 4 * HEADS + 12 * CHANNELS - found.spent() < CHANNELS


def test_scores_within_a_branch_do_not_see_its_scale():
    scores = random_scores(3)
    scaled = scores | {"0.heads": scores["0.heads"] * 1e4, "1.channels": scores["1.channels"] * 1e-4}
    one, two = chosen(scores, 150, within=True), chosen(scaled, 150, within=True)
    assert one.widths() == two.widths()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_must_be_finite(bad):
    with pytest.raises(PrunexError, match=r"given scores of 0.heads hold NaN"):
        chosen(random_scores() | {"0.heads": torch.tensor([1.0, bad, 2.0])}, 100)


def test_deit_small_unit_costs_sum_to_the_published_macs():
    model = geometry("deit_small_patch16_224")
    found = branches(model)
    assert {b.macs for b in found if b.kind == "heads"} == {24_333_440}
    assert {b.macs for b in found if b.kind == "channels"} == {151_296}
    assert sum(b.units * b.macs for b in found) + 196 * 768 * 384 + 384 * 1000 == 4_598_882_304


@pytest.mark.parametrize("make", [tiny, swin])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0 is not allowed"),
        ({"budget": 1.2}, "budget=1.2 is not allowed"),
        ({"budget": "half"}, "budget='half' is not allowed"),
        ({"min_heads": -1}, "min_heads=-1 is not allowed"),
        ({"min_heads": True}, "min_heads=True is not allowed"),
        ({"min_channels": 1.5}, "min_channels=1.5 is not allowed"),
        ({"round_to": 0}, "round_to=0 is not allowed"),
    ],
)
def test_options_out_of_range_leave_the_model_alone(make, options, message):
    model = make()
    with pytest.raises(PrunexError, match=message):
        prunex.attach(model, "magnitude", **options)
    assert not hasattr(model, "prunex_units")
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("make", [tiny, swin])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.02}, "out of reach for magnitude"),
        ({"budget": "1MACs"}, "out of reach for magnitude"),
        ({"budget": 0.3, "min_heads": 3, "min_channels": 1000}, "min_heads=3, min_channels=1000"),
    ],
)
def test_a_budget_out_of_reach_is_refused_when_units_are_chosen(make, options, message):
    """Not before: tokens that are pruned later may bring it within reach."""
    pruning = prunex.attach(make(), "magnitude", **options)
    with pytest.raises(PrunexError, match=message):
        pruning.calibrate()
    with pytest.raises(PrunexError, match="not known yet"):
        pruning.pruner.decide(pruning.pruner.scores(pruning.model))
    assert not pruning.decided


def test_tokens_pruned_later_bring_a_budget_within_reach():
    model = tiny(depth=4)
    least = prunex.cost(model).macs - sum(b.units * b.macs for b in branches(model))
    least += sum(b.macs * (1 if b.kind == "heads" else 8) for b in branches(model))
    pruning = prunex.attach(model, "magnitude", budget=f"{least - 10_000}MACs")
    with pytest.raises(PrunexError, match="out of reach"):
        pruning.calibrate()
    prunex.attach(model, "evit", keep_ratio=0.3, stages=(1,))
    pruning.calibrate()
    assert prunex.cost(model).macs <= least - 10_000


def test_a_narrowed_model_can_be_narrowed_again_in_the_dense_models_numbers():
    model = tiny().double()
    x = images_for(model)
    first = WidthSpec(heads={0: (1, 2), 2: (0,)}, channels={1: tuple(range(0, 192, 2)), 3: tuple(range(100))})
    narrow(model, first)
    pruning = prunex.attach(model, "magnitude", budget=f"{int(prunex.cost(model).macs * 0.7)}MACs", min_heads=0)
    widths = pruning.calibrate()
    for kind in ("heads", "channels"):
        for number, units in getattr(widths, kind).items():
            assert set(units) <= set(getattr(first, kind).get(number, units))
    assert any(u % 2 == 0 and u > 96 for u in widths.channels[1])
    with torch.no_grad():
        gated = model(x)
        pruning.remove()
        assert largest(model(x), gated) < 1e-12
    assert widths_of(model).channels[1] == widths.channels[1]


def test_units_that_were_removed_cannot_be_scored_again():
    model = tiny()
    pruning = prunex.attach(model, "magnitude", budget=0.6)
    pruning.calibrate()
    pruning.remove()
    with pytest.raises(PrunexError, match="removed for good already"):
        pruning.calibrate()
    assert pruning.widths.channels


def test_what_units_cost_does_not_depend_on_the_tokens_progress():
    found = []
    for progress in (0.0, 1.0):
        model = tiny()
        tokens = prunex.attach(model, "evit", keep_ratio=0.5, stages=(1,), schedule="cosine")
        tokens.progress = progress
        pruning = prunex.attach(model, "magnitude", budget=0.5)
        tokens.progress = progress
        found.append(pruning.calibrate())
        assert tokens.progress == progress
        tokens.progress = 1.0
        assert 0.49 < prunex.cost(model).macs / prunex.cost(tiny()).macs <= 0.5
    assert found[0] == found[1]


def test_relevance_rules_see_closed_gates_as_removed_units():
    model = tiny().double()
    pruning = prunex.attach(model, "random", budget=0.55, min_heads=0)
    pruning.calibrate()
    small, x = removed(model), images_for(model)
    for method, options in [
        ("lrp", {}),
        ("lrp", {"rule": "gamma"}),
        ("lrp", {"rule": "attnlrp", "gamma": 0.1}),
        ("lrp", {"rule": "cplrp"}),
    ]:
        one = prunex.explain(method, model, x, 1, **options)
        two = prunex.explain(method, small, x, 1, **options)
        assert largest(one.maps, two.maps) < 1e-7 * max(1, float(two.maps.abs().max()))
