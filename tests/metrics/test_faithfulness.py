"""Faithfulness metrics against their definitions written out, one forward at a time, and by hand."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torchmetrics import MetricCollection

import prunex
from prunex import PrunexError, methods
from prunex.metrics import (
    AOPC,
    SRG,
    Comprehensiveness,
    Deletion,
    FaithfulnessCorrelation,
    Infidelity,
    Insertion,
    LogOdds,
    SaCo,
    SensitivityN,
    Sufficiency,
    aopc,
    comprehensiveness,
    deletion,
    faithfulness_correlation,
    infidelity,
    insertion,
    log_odds,
    max_sensitivity,
    perturbation,
    removal_curves,
    saco,
    sensitivity_n,
    srg,
    sufficiency,
)
from prunex.metrics.curves import curves_of
from prunex.metrics.faithfulness import ERASER, logarithmic_sizes, saco_of
from prunex.metrics.occlusion import Occlusion
from prunex.removal.coalitions import of_sizes, seeded
from tests.metrics.models import MEAN, PRUNED, STD, constant, linear, pruned, shares, without
from tests.vits import assert_same_state, images, largest, quick, randomise, state_of, tiny

STEPS = tuple(k / 10 for k in range(11))
DRAWN = [sensitivity_n, faithfulness_correlation, infidelity, saco]
READ = [deletion, insertion, srg, aopc, log_odds, comprehensiveness, sufficiency]


def case(batch=2, seed=0):
    model, x = tiny().double(), images(batch, dtype=torch.float64)
    maps = torch.randn(batch, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    maps[0, 1] = maps[0, 1, 0]  # a row of ties
    return model, x, maps


def line_of(values, sign):
    """Patches in the order in which they leave: largest first for sign -1; ties by index."""
    return sorted(range(len(values)), key=lambda i: (sign * values[i], i))


def probability(model, image, gone, removal, target):
    return float(without(model, image, torch.tensor(gone), removal).softmax(0)[target])


def curves_by_hand(model, image, values, removal, target, steps):
    """f(x), and the three curves as lists."""
    patches = len(values)
    down, up = line_of(values, -1), line_of(values, 1)
    rows = []
    for q in steps:
        k = round(q * patches)
        sets = (set(down[:k]), set(range(patches)) - set(down[:k]), set(up[:k]))
        rows.append([probability(model, image, [i in s for i in range(patches)], removal, target) for s in sets])
    clean = probability(model, image, [False] * patches, removal, target)
    return clean, *map(list, zip(*rows, strict=True))


def trapezoid(x, y):
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], y, y[1:], strict=False))


@pytest.mark.parametrize("removal", ["drop", "grey", "mean", "black"])
def test_curve_metrics_against_their_definitions(removal):
    model, x, maps = case()
    target = [1, 3]
    found = removal_curves(model, x, maps, torch.tensor(target), removal=removal, mean=MEAN, std=STD)
    assert found.counts.tolist() == [0, 2, 3, 5, 6, 8, 10, 11, 13, 14, 16]
    assert found.ties.tolist() == [4, 0]
    share = [c / 16 for c in found.counts.tolist()]
    for b in range(2):
        clean, gone, only, least = curves_by_hand(model, x[b], maps[b].flatten().tolist(), removal, target[b], STEPS)
        wanted = {
            deletion: trapezoid(share, gone),
            insertion: trapezoid(share, only),
            srg: trapezoid(share, least) - trapezoid(share, gone),
            aopc: sum(clean - f for f in gone) / 11,
            log_odds: sum(math.log(f / clean) for f in gone[1:-1]) / 9,
            comprehensiveness: sum(clean - f for f in gone[1:-1]) / 9,
            sufficiency: sum(clean - f for f in only[1:-1]) / 9,
        }
        for metric, value in wanted.items():
            assert float(metric(found)[b]) == pytest.approx(value, abs=1e-10), metric.__name__
        assert float(aopc(found, "percent")[b]) == pytest.approx(wanted[comprehensiveness], abs=1e-10)
        two = (0.1, 0.5)
        assert float(aopc(found, "percent", two)[b]) == pytest.approx(clean - (gone[1] + gone[5]) / 2, abs=1e-10)


def test_curves_at_the_fractions_of_eraser():
    model, x, maps = case()
    found = removal_curves(model, x, maps, 2, steps=ERASER, orders=("without", "only"))
    for b in range(2):
        values = maps[b].flatten().tolist()
        clean, gone, only, _ = curves_by_hand(model, x[b], values, "drop", 2, ERASER)
        assert float(comprehensiveness(found, ERASER)[b]) == pytest.approx(clean - sum(gone) / 5, abs=1e-10)
        assert float(sufficiency(found, ERASER)[b]) == pytest.approx(clean - sum(only) / 5, abs=1e-10)


def test_other_outputs_are_those_of_the_logits():
    model, x, maps = case()
    logit, odds, p = (removal_curves(model, x, maps, 1, output=o) for o in ("logit", "log_odds", "probability"))
    assert largest(odds.without, (p.without / (1 - p.without)).log()) < 1e-9
    with torch.no_grad():
        assert largest(logit.clean, model(x)[:, 1]) < 1e-10


def test_orders_that_are_not_asked_for_cost_nothing():
    model, x, maps = case()
    whole = removal_curves(model, x, maps)
    for name in ("without", "only", "least"):
        part = removal_curves(model, x, maps, orders=(name,))
        assert largest(getattr(part, name), getattr(whole, name)) < 1e-12
        assert [n for n in ("without", "only", "least") if getattr(part, n) is None] != []
        assert part.forwards == 20


def test_the_target_is_the_predicted_class_of_the_clean_image():
    model, x, maps = case()
    with torch.no_grad():
        best = model(x).argmax(1)
    assert removal_curves(model, x, maps).target.equal(best)
    assert removal_curves(model, x, maps).without.equal(removal_curves(model, x, maps, best).without)


def test_pixels_as_units():
    model, x, _ = case()
    maps = torch.rand(2, 32, 32, dtype=torch.float64)
    found = removal_curves(model, x, maps, 1, units="pixels", removal="grey", steps=(0, 0.25, 1))
    assert found.counts.tolist() == [0, 256, 1024]
    for b in range(2):
        order = line_of(maps[b].flatten().tolist(), -1)
        gone = torch.zeros(1024, dtype=torch.bool)
        gone[order[:256]] = True
        for mask, score in ((gone, found.without[b, 1]), (~gone, found.only[b, 1])):
            with torch.no_grad():
                p = model(x[b : b + 1].masked_fill(mask.view(32, 32), 0)).softmax(1)[0, 1]
            assert largest(p, score) < 1e-10
    assert found.without[:, 0].equal(found.only[:, 2])
    per_patch = maps.view(2, 4, 8, 4, 8).mean((2, 4))
    assert largest(removal_curves(model, x, maps).without, removal_curves(model, x, per_patch).without) < 1e-12


def pearson_by_hand(a, b):
    n = len(a)
    ma, mb = sum(a) / n, sum(b) / n
    top = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def pairs_by_hand(model, image, values, sets, removal, target):
    clean = probability(model, image, [False] * 16, removal, target)
    relevance = [sum(v for v, gone in zip(values, s, strict=True) if gone) for s in sets.tolist()]
    return relevance, [clean - probability(model, image, s, removal, target) for s in sets.tolist()]


@pytest.mark.parametrize("removal", ["drop", "grey"])
def test_sensitivity_n_against_its_definition(removal):
    model, x, maps = case()
    found = sensitivity_n(model, x, maps, 1, sizes=(1, 3, 9), samples=12, removal=removal, seed=4)
    sets = of_sizes(torch.tensor([1] * 12 + [3] * 12 + [9] * 12), 16, seeded(4))
    assert sets.sum(1).tolist() == [1] * 12 + [3] * 12 + [9] * 12
    for b in range(2):
        a, d = pairs_by_hand(model, x[b], maps[b].flatten().tolist(), sets, removal, 1)
        for i in range(3):
            part = slice(12 * i, 12 * i + 12)
            assert float(found[b, i]) == pytest.approx(pearson_by_hand(a[part], d[part]), abs=1e-8)
            assert float(found[b, i]) == pytest.approx(pearsonr(a[part], d[part])[0], abs=1e-8)


def test_faithfulness_correlation_against_its_definition():
    model, x, maps = case()
    found = faithfulness_correlation(model, x, maps, 1, size=5, samples=20)
    ranked = faithfulness_correlation(model, x, maps, 1, size=5, samples=20, rank=True)
    share = faithfulness_correlation(model, x, maps, 1, size=0.3, samples=20)
    sets = of_sizes(torch.full((20,), 5), 16, seeded(0))
    for b in range(2):
        a, d = pairs_by_hand(model, x[b], maps[b].flatten().tolist(), sets, "drop", 1)
        assert float(found[b]) == pytest.approx(pearson_by_hand(a, d), abs=1e-8)
        assert float(ranked[b]) == pytest.approx(spearmanr(a, d)[0], abs=1e-8)
    assert share.equal(found)  # 0.3 of 16 patches
    assert found.equal(sensitivity_n(model, x, maps, 1, sizes=(5,), samples=20)[:, 0])


def test_infidelity_against_its_definition():
    model, x, maps = case()
    generator = seeded(2)
    sizes = torch.randint(1, 17, (15,), generator=generator)
    sets = of_sizes(sizes, 16, generator)
    for scale in ("beta", "none"):
        found = infidelity(model, x, maps, 1, samples=15, scale=scale, seed=2)
        for b in range(2):
            a, d = pairs_by_hand(model, x[b], maps[b].flatten().tolist(), sets, "drop", 1)
            beta = sum(p * q for p, q in zip(a, d, strict=True)) / sum(p * p for p in a) if scale == "beta" else 1
            wanted = sum((beta * p - q) ** 2 for p, q in zip(a, d, strict=True)) / 15
            assert float(found[b]) == pytest.approx(wanted, rel=1e-8)
    nothing = infidelity(model, x, torch.zeros(2, 4, 4), 1, samples=15, seed=2)
    assert largest(nothing, infidelity(model, x, torch.zeros(2, 4, 4), 1, samples=15, scale="none", seed=2)) == 0
    assert (nothing > 0).all()


@pytest.mark.parametrize(("groups", "removal"), [(4, "mean"), (5, "drop")])
def test_saco_against_its_definition(groups, removal):
    model, x, maps = case()
    found = saco(model, x, maps, 1, groups=groups, removal=removal)
    sizes = [4, 4, 4, 4] if groups == 4 else [4, 3, 3, 3, 3]
    for b in range(2):
        values = maps[b].flatten().tolist()
        order = line_of(values, -1)
        parts = [order[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(groups)]
        clean = probability(model, x[b], [False] * 16, removal, 1)
        s = [sum(values[i] for i in p) for p in parts]
        d = [clean - probability(model, x[b], [i in p for i in range(16)], removal, 1) for p in parts]
        up = down = 0.0
        for i, j in itertools.combinations(range(groups), 2):
            w = s[i] - s[j] if d[i] >= d[j] else -(s[i] - s[j])
            up, down = up + w, down + abs(w)
        assert float(found[b]) == pytest.approx(up / down, abs=1e-9)


def test_a_linear_model_and_its_own_coefficients():
    model, x = linear(), images(3, dtype=torch.float64)
    maps = shares(model, x, 1)
    options = {"removal": "grey", "output": "logit"}
    for sign in (1, -1):
        for value in (
            sensitivity_n(model, x, sign * maps, 1, samples=20, **options),
            faithfulness_correlation(model, x, sign * maps, 1, samples=20, **options),
            faithfulness_correlation(model, x, sign * maps, 1, samples=20, rank=True, **options),
            saco(model, x, sign * maps, 1, **options),
        ):
            assert largest(value, torch.full_like(value, sign)) < 1e-9
    assert largest(infidelity(model, x, maps, 1, scale="none", **options), torch.zeros(3)) < 1e-20
    assert largest(infidelity(model, x, 7 * maps, 1, **options), torch.zeros(3)) < 1e-20
    assert (infidelity(model, x, 7 * maps, 1, scale="none", **options) > 1e-6).all()


@pytest.mark.parametrize("removal", ["drop", "grey"])
def test_a_constant_model(removal):
    model, x, maps = constant(), images(2, dtype=torch.float64), torch.rand(2, 4, 4)
    curves = removal_curves(model, x, maps, 1, removal=removal)
    f = curves.clean
    assert 0 < float(f[0]) < 1
    assert aopc(curves).tolist() == pytest.approx([0, 0], abs=1e-14)
    assert log_odds(curves).tolist() == pytest.approx([0, 0], abs=1e-15)
    assert largest(deletion(curves), f) < 1e-15
    assert largest(insertion(curves), f) < 1e-15
    assert largest(srg(curves), 0 * f) < 1e-15
    assert sensitivity_n(model, x, maps, 1, samples=5, removal=removal).isnan().all()
    assert faithfulness_correlation(model, x, maps, 1, samples=5, removal=removal).isnan().all()
    assert faithfulness_correlation(model, x, maps, 1, samples=5, removal=removal, rank=True).isnan().all()


def test_constant_maps():
    model, x, _ = case()
    maps = torch.full((2, 4, 4), 0.3, dtype=torch.float64)
    assert sensitivity_n(model, x, maps, samples=10).isnan().all()
    assert faithfulness_correlation(model, x, maps, samples=10).isnan().all()
    assert saco(model, x, maps, groups=5, removal="grey").isnan().all()
    assert srg(removal_curves(model, x, maps)).tolist() == [0, 0]


@pytest.mark.parametrize("steps", [1, 4, 10, 224])
def test_a_straight_fall_has_area_one_half_at_any_number_of_steps(steps):
    curves = curves_of(1 - torch.arange(steps + 1, dtype=torch.float64)[None] / steps)
    for metric in (deletion, aopc, insertion):
        assert float(metric(curves)) == pytest.approx(0.5)


def test_saco_by_hand():
    assert float(saco_of(torch.tensor([3.0, 1.0]), torch.tensor([0.1, 0.2]))) == -1
    assert torch.isnan(saco_of(torch.ones(3), torch.rand(3)))


def asked_sets(monkeypatch):
    """Patches gone in every row that a model is asked, as a list of (image, bool [P])."""
    seen, ask = [], Occlusion.__call__

    def spy(self, image, removed):
        rows = torch.arange(len(image))
        seen.extend(zip(image.tolist(), removed(rows), strict=True))
        return ask(self, image, removed)

    monkeypatch.setattr(Occlusion, "__call__", spy)
    return seen


def test_curves_are_nested_and_nothing_is_asked_twice(monkeypatch):
    model, x, maps = case()
    maps[0, 1] += torch.arange(4)  # no ties
    seen = asked_sets(monkeypatch)
    found = removal_curves(model, x, maps)
    for b in range(2):
        sets = [tuple(gone.tolist()) for image, gone in seen if image == b]
        assert len(sets) == len(set(sets))
        assert not any(not any(s) for s in sets)  # the clean image is known
        values = maps[b].flatten().tolist()
        for sign in (-1, 1):
            order = line_of(values, sign)
            nested = [tuple(i in order[:k] for i in range(16)) for k in found.counts.tolist()[1:]]
            assert set(nested) <= set(sets)
            assert nested[-1] == (True,) * 16
    assert found.forwards == len(seen) == 2 * 19  # 9 sets each way and everything, but for 2 x 9 + 1 shared ones
    assert found.without[:, 0].equal(found.clean)
    assert found.without[:, -1].equal(found.only[:, 0])
    assert found.without[:, -1].equal(torch.as_tensor(found.least)[:, -1])


def test_drawn_sets_are_not_asked_twice(monkeypatch):
    model, x, maps = case()
    seen = asked_sets(monkeypatch)
    sensitivity_n(model, x, maps, sizes=(1,), samples=100)
    assert len(seen) == 2 * 16


@pytest.mark.parametrize("metric", DRAWN)
def test_the_scale_of_a_map_does_not_matter(metric):
    model, x, maps = case()
    few = {"samples": 10} if metric is not saco else {}
    once, thrice = (metric(model, x, k * maps, **few).nan_to_num(5) for k in (1, 3))
    assert largest(once, thrice) < 1e-9
    half = metric(model.float(), x.float(), maps.float(), **few)
    assert half.dtype == torch.float64
    if metric is infidelity:
        plain, thrice = (infidelity(model, x, k * maps.float(), scale="none") for k in (1, 3))
        assert largest(plain, thrice) > 0.01 * float(plain.max())


def test_the_scale_of_a_map_does_not_matter_to_curves():
    model, x, maps = case()
    assert removal_curves(model, x, maps).without.equal(removal_curves(model, x, 3 * maps).without)


@pytest.mark.parametrize("selection", ["free", "frozen"])
@pytest.mark.parametrize("pruner", quick([None, *PRUNED], [None, "evit"]))
def test_one_equals_many_on_dense_and_pruned_models(pruner, selection):
    model, x, maps = pruned(pruner), *case(3)[1:]
    before = state_of(model)
    options = {"selection": selection}
    steps = (0, 0.3, 0.8, 1)
    for removal in ("drop", "grey"):
        whole = removal_curves(model, x, maps, removal=removal, steps=steps, **options)
        for b in range(3):
            part = slice(b, b + 1)
            one = removal_curves(model, x[part], maps[part], removal=removal, steps=steps, chunk=3, **options)
            for name in ("without", "only", "least", "clean"):
                assert largest(getattr(one, name), getattr(whole, name)[part]) < 1e-10
        with torch.no_grad():
            assert largest(whole.clean, model(x).softmax(1).amax(1)) < 1e-10
    for metric in DRAWN:
        few = {"samples": 6} if metric is not saco else {"groups": 4}
        whole = metric(model, x, maps, **few, **options)
        parts = [metric(model, x[i : i + 1], maps[i : i + 1], chunk=2, **few, **options) for i in range(3)]
        assert largest(torch.cat(parts).nan_to_num(5), whole.nan_to_num(5)) < 1e-9
    assert_same_state(model, before)


@pytest.mark.parametrize("selection", ["free", "frozen"])
@pytest.mark.parametrize("pruner", ["tome", "dynamicvit"])
def test_curves_of_one_equal_those_of_many(pruner, selection):
    model, x, maps = pruned(pruner), *case(2)[1:]
    options = {"selection": selection, "steps": (0.3, 0.8), "orders": ("only",)}
    whole = removal_curves(model, x, maps, **options).only
    for b in range(2):
        one = removal_curves(model, x[b : b + 1], maps[b : b + 1], chunk=1, **options).only
        assert largest(one, whole[b : b + 1]) < 1e-10


def test_free_and_frozen_differ_where_the_pruner_chooses_otherwise():
    model, x, maps = pruned("evit"), *case()[1:]
    free, frozen = (removal_curves(model, x, maps, selection=s).without for s in ("free", "frozen"))
    assert largest(free[:, 0], frozen[:, 0]) < 1e-10
    assert largest(free, frozen) > 1e-4


def test_nan_maps_and_their_neighbours():
    model, x, maps = case()
    bad = maps.clone()
    bad[0, 2, 2] = torch.nan
    for metric in READ:
        values = metric(removal_curves(model, x, bad))
        assert values.isnan().tolist() == [True, False], metric.__name__
        assert largest(values[1], metric(removal_curves(model, x, maps))[1]) < 1e-12
    for metric in DRAWN:
        few = {"samples": 5} if metric is not saco else {}
        values = metric(model, x, bad, **few)
        assert values.isnan().reshape(2, -1).all(1).tolist() == [True, False]
        assert largest(values[1].nan_to_num(5), metric(model, x, maps, **few)[1].nan_to_num(5)) < 1e-12


CURVE_CLASSES = {
    "deletion": (Deletion, deletion, False),
    "insertion": (Insertion, insertion, True),
    "srg": (SRG, srg, True),
    "aopc": (AOPC, aopc, True),
    "log_odds": (LogOdds, log_odds, False),
    "comprehensiveness": (Comprehensiveness, comprehensiveness, True),
    "sufficiency": (Sufficiency, sufficiency, False),
}
MODEL_CLASSES = {
    "sensitivity_n": (SensitivityN, sensitivity_n, True, {"samples": 5, "sizes": (2, 5)}),
    "faithfulness_correlation": (FaithfulnessCorrelation, faithfulness_correlation, True, {"samples": 5}),
    "infidelity": (Infidelity, infidelity, False, {"samples": 5}),
    "saco": (SaCo, saco, True, {"groups": 4, "removal": "drop"}),
}


def test_one_set_of_curves_serves_a_collection():
    model, x, maps = case(5)
    both = [MetricCollection({n: c[0](keep=True) for n, c in CURVE_CLASSES.items()}) for _ in range(2)]
    whole = removal_curves(model, x, maps)
    both[0].update(removal_curves(model, x[:2], maps[:2]))
    both[0].update(removal_curves(model, x[2:3], maps[2:3]))
    both[1].update(removal_curves(model, x[3:], maps[3:]))
    for name, (_, function, better) in CURVE_CLASSES.items():
        metric = both[0][name]
        metric.merge_state(both[1][name])
        wanted = function(whole)
        assert float(metric.compute()) == pytest.approx(float(wanted.mean()), abs=1e-9), name
        assert sorted(metric.values().tolist()) == pytest.approx(sorted(wanted.tolist()), abs=1e-9)
        assert metric.higher_is_better is better
        assert (int(metric.count), int(metric.undefined)) == (5, 0)


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_classes_that_ask_the_model(name):
    cls, function, better, options = MODEL_CLASSES[name]
    model, x, maps = case(4)
    maps[3] = 1.0  # undefined for all but infidelity
    parts = [cls(keep=True, **options) for _ in range(2)]
    parts[0].update(model, x[:1], maps[:1], 2)
    parts[0].update(model, x[1:2], maps[1:2], torch.tensor([2]))
    parts[1].update(model, x[2:], maps[2:], 2)
    parts[0].merge_state(parts[1])
    wanted = function(model, x, maps, 2, **options)
    wanted = wanted if wanted.ndim == 1 else wanted.nanmean(1)
    assert float(parts[0].compute()) == pytest.approx(float(wanted.nanmean()), abs=1e-9)
    assert int(parts[0].undefined) == (name != "infidelity")
    assert cls.higher_is_better is better
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert torch.isnan(cls().compute())


def test_every_metric_is_listed():
    known = {m.name: m for m in methods("metric")}
    assert {*CURVE_CLASSES, *MODEL_CLASSES, "perturbation", "max_sensitivity"} <= set(known)
    for name, entry in {**CURVE_CLASSES, **MODEL_CLASSES}.items():
        assert known[name].make is entry[1]
    assert known["perturbation"].make is perturbation
    assert known["max_sensitivity"].make is max_sensitivity
    assert known["saco"].options["groups"] == 10


def test_flags_gradients_and_mode_are_left_as_found():
    model, x, maps = case()
    model.train()
    model.blocks[1].eval()
    before = state_of(model)
    generator = random.getstate()
    draws = torch.get_rng_state()
    with torch.inference_mode():
        removal_curves(model, x.clone(), maps)
    for metric in DRAWN:
        metric(model, x, maps, **({"samples": 4} if metric is not saco else {}))
    with pytest.raises(PrunexError):
        removal_curves(model, x, maps, 99)
    assert_same_state(model, before)
    assert torch.is_grad_enabled()
    assert random.getstate() == generator
    assert torch.get_rng_state().equal(draws)


def test_sizes_are_logarithmic():
    assert logarithmic_sizes(1) == (1,)
    assert logarithmic_sizes(16)[-1] == 13
    assert all(a < b for a, b in itertools.pairwise(logarithmic_sizes(64)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": (0, 2)}, "rising fractions"),
        ({"steps": ()}, "rising fractions"),
        ({"units": "pixel"}, "unknown units 'pixel': did you mean 'pixels'"),
        ({"units": "pixels"}, "units='pixels' cannot be dropped"),
        ({"removal": "mask"}, "unknown removal 'mask'"),
        ({"selection": "frosen"}, "unknown selection 'frosen': did you mean 'frozen'"),
        ({"output": "prob"}, "unknown output 'prob': did you mean 'probability'"),
        ({"orders": "most"}, "unknown order 'most'.*least, only, without"),
        ({"orders": ()}, r"orders=\(\) is not allowed"),
        ({"orders": ("only", "only")}, "each once"),
        ({"chunk": True}, "chunk=True"),
        ({"target": 5}, "target=5 is out of range"),
        ({"target": 1.5}, "target=1.5"),
        ({"maps": torch.rand(2, 16)}, r"maps have shape \[2, 16\]"),
        ({"images": torch.full((2, 3, 32, 32), torch.nan)}, "NaN"),
    ],
)
def test_refused_by_the_curves(change, match):
    model, x, maps = case()
    given = {"images": x, "maps": maps} | change
    with pytest.raises(PrunexError, match=match) as caught:
        removal_curves(model, given.pop("images"), given.pop("maps"), given.pop("target", None), **given)
    assert "\n" not in str(caught.value)


def test_refused_by_readers():
    model, x, maps = case()
    some = removal_curves(model, x, maps, steps=(0.1, 0.5), output="logit", orders=["only", "without"])
    for metric in (deletion, insertion, aopc):
        with pytest.raises(PrunexError, match=r"go from 0.1 to 0.5: areas need steps from 0 to 1"):
            metric(some)
    with pytest.raises(PrunexError, match="no step 0.2"):
        sufficiency(some)
    with pytest.raises(PrunexError, match="made without 'least': name it among the orders"):
        srg(some)
    with pytest.raises(PrunexError, match="needs output='probability'"):
        log_odds(some, (0.1,))
    with pytest.raises(PrunexError, match="unknown definition 'sum'"):
        aopc(some, "sum")
    with pytest.raises(PrunexError, match="expected the Curves .* got a Tensor"):
        deletion(torch.ones(2, 3))
    with pytest.raises(PrunexError, match="expected the Curves"):
        Deletion().update(torch.ones(2, 3))
    with pytest.raises(PrunexError, match="unknown option of SaCo 'group': did you mean 'groups'"):
        SaCo(group=3)
    with pytest.raises(PrunexError, match="unknown definition"):
        AOPC("half")


@pytest.mark.parametrize(
    ("metric", "options", "match"),
    [
        (sensitivity_n, {"samples": 1}, "samples=1"),
        (sensitivity_n, {"sizes": (0, 3)}, r"sizes=\(0, 3\).*1 to 16"),
        (sensitivity_n, {"sizes": (5, 3)}, "rising"),
        (sensitivity_n, {"seed": -1}, "seed=-1"),
        (faithfulness_correlation, {"size": 17}, r"size=17.*1..16 patches"),
        (faithfulness_correlation, {"size": 1.0}, "size=1.0"),
        (faithfulness_correlation, {"rank": "yes"}, "rank='yes'"),
        (infidelity, {"scale": True}, "unknown scale True"),
        (infidelity, {"samples": 0}, "samples=0"),
        (saco, {"groups": 17}, r"groups=17.*2..16"),
        (saco, {"groups": 2.0}, "groups=2.0"),
        (saco, {"removal": "black"}, "mean=None"),
    ],
)
def test_refused_by_drawn_metrics(metric, options, match):
    with pytest.raises(PrunexError, match=match):
        metric(*case(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_depends_on_nothing_but_its_rounding(dtype):
    """Every token's value is the same, so attention cannot matter; the last bits of the scores say nothing."""
    model = tiny(seed=1).to(dtype)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[96:] = 0
    x, maps = torch.randn(3, 3, 32, 32, dtype=dtype), torch.randn(3, 4, 4)
    curves = removal_curves(model, x, maps, removal="grey")
    assert 0 < (curves.without - curves.clean[:, None]).abs().max() < 1e-6
    assert faithfulness_correlation(model, x, maps).isnan().all()
    assert sensitivity_n(model, x, maps).isnan().all()
    assert saco(model, x, maps, removal="grey").isnan().all()
    live = tiny(seed=2).to(dtype)
    assert faithfulness_correlation(live, x, maps).isfinite().all()
    assert saco(live, x, maps, removal="grey").isfinite().all()


def test_saco_of_an_image_does_not_depend_on_its_batch():
    """Patches that a pruner takes out first lose nothing, up to rounding, which other images in the batch change."""
    model = tiny(img_size=64, seed=3)
    prunex.attach(model, "ia_red2")
    randomise(prunex.attached(model).pruner)
    x, maps = torch.randn(4, 3, 64, 64), torch.rand(4, 8, 8)
    together = saco(model, x, maps, removal="drop")
    alone = torch.cat([saco(model, x[i : i + 1], maps[i : i + 1], removal="drop", chunk=3) for i in range(4)])
    assert (together - alone).abs().max() < 1e-6


def test_log_odds_hold_on_to_the_smallest_probabilities():
    """A probability of 1e-9 is told from one of 1e-12; below that both count as 1e-12."""
    model = linear(2)
    x, maps = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.rand(1, 4, 4)
    curves = removal_curves(model, x, maps, 1, removal="grey")
    for low, wanted in ((1e-9, math.log(1e-9)), (1e-15, math.log(1e-12))):
        altered = dataclasses.replace(
            curves, clean=torch.ones(1, dtype=torch.float64), without=torch.full_like(curves.without, low)
        )
        assert float(log_odds(altered)) == pytest.approx(wanted)
