"""ROAD and completeness against their definitions, and what they give for models whose answer is known."""

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.metrics import ROAD, Completeness, completeness, road
from prunex.metrics.scoring import MEASURES, removed_by, scores
from prunex.removal.imputing import imputed
from tests.metrics.models import constant, linear, pruned, shares
from tests.vits import images, largest, tiny


def case(batch=3):
    model, x = tiny().double(), images(batch, dtype=torch.float64)
    maps = torch.randn(batch, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x, maps


def test_road_is_half_the_gap_between_two_orders_of_imputed_images():
    model, x, maps = case()
    value = road(model, x, maps, 1, fractions=(0.25, 0.5))
    for b in range(3):
        order = maps[b].flatten().argsort(descending=True)
        gaps = []
        for count in (4, 8):
            seen = []
            for part in (order[-count:], order[:count]):
                gone = torch.zeros(16, dtype=torch.bool)
                gone[part] = True
                pixels = gone.view(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
                with torch.no_grad():
                    seen.append(float(model(imputed(x[b : b + 1], ~pixels)).softmax(1)[0, 1]))
            gaps.append(seen[0] - seen[1])
        assert float(value[b]) == pytest.approx(sum(gaps) / 4, abs=1e-9)


def test_road_of_opposite_random_and_useless_maps():
    model, x, maps = case()
    assert largest(road(model, x, -maps, 1), -road(model, x, maps, 1)) < 1e-9
    assert road(constant(), x, maps, 1).tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    flat = linear()
    with torch.no_grad():  # a scene whose lower half alone counts for class 1
        scene = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        scene[:, :, 16:] = 2.0
    right = shares(flat, scene, 1)
    assert float(road(flat, scene, right, 1)) >= float(road(flat, scene, torch.rand(1, 4, 4), 1)) - 1e-9


def test_road_of_one_equals_that_of_many_also_pruned():
    model, x, maps = pruned("evit"), *case()[1:]
    whole = road(model, x, maps, fractions=(0.2, 0.6))
    parts = [road(model, x[i : i + 1], maps[i : i + 1], fractions=(0.2, 0.6), chunk=1) for i in range(3)]
    assert largest(torch.cat(parts), whole) < 1e-9


def test_completeness_of_maps_that_are_complete():
    model, x = linear(), images(3, dtype=torch.float64)
    maps = shares(model, x, 1)
    assert (completeness(model, x, maps, 1, removal="grey") < 1e-9).all()
    assert torch.allclose(completeness(model, x, 3 * maps, 1, removal="grey"), torch.full((3,), 2.0).double())
    assert torch.allclose(completeness(model, x, 0 * maps, 1, removal="grey"), torch.ones(3).double())
    pixels = (maps / 64).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert (completeness(model, x, pixels, 1, removal="grey") < 1e-9).all()


def test_shapley_values_are_complete_in_their_own_game_alone():
    model, x = tiny(), images(2)
    e = prunex.explain("shap", model, x, budget=32, output="logit")
    assert (completeness(model, x, e.maps, e.target) < 1e-4).all()
    assert (completeness(model, x, e.maps, e.target, removal="blur") > 1e-3).all()


def test_nothing_to_share_out_and_nan_maps_have_no_number():
    model, x, maps = case()
    assert completeness(constant(), x, maps, 1).isnan().all()
    maps[1, 0, 0] = torch.nan
    assert completeness(model, x, maps, 1).isnan().tolist() == [False, True, False]
    assert road(model, x, maps, 1).isnan().tolist() == [False, True, False]


def test_refused():
    for metric in (road, completeness):
        with pytest.raises(PrunexError, match="unknown removal 'paint'"):
            metric(*case(), removal="paint")
    with pytest.raises(PrunexError, match="fractions|steps"):
        road(*case(), fractions=(0.5, 0.1))
    with pytest.raises(PrunexError, match="unknown option of ROAD"):
        ROAD(fraction=0.1)


def test_classes_and_the_table():
    model, x, maps = case()
    metric, rest = ROAD(fractions=(0.5,)), Completeness()
    metric.update(model, x, maps, 1)
    rest.update(model, x, maps, 1)
    assert float(metric.compute()) == pytest.approx(float(road(model, x, maps, 1, fractions=(0.5,)).mean()), abs=1e-12)
    assert (metric.higher_is_better, rest.higher_is_better) == (True, False)
    assert (removed_by(MEASURES["road"]), removed_by(MEASURES["completeness"])) == ("impute", "drop")
    values = scores(["road", "completeness"], model, x, maps, 1)
    assert torch.allclose(values["road"], road(model, x, maps, 1))
    assert torch.allclose(values["completeness"], completeness(model, x, maps, 1))
