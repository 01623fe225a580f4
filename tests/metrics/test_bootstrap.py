"""Paired bootstrap intervals over images."""

import math
import sys

import pytest
import torch

from prunex import PrunexError
from prunex.metrics import RankAccuracy, bootstrap, bootstrap_ratios, compare, segmentation_counts


def test_against_a_loop():
    values = torch.randn(30, dtype=torch.float64)
    values[[3, 8]] = torch.nan
    found = bootstrap(values, draws=400, seed=7)
    generator, means = torch.Generator().manual_seed(7), []
    for row in torch.randint(30, (400, 30), generator=generator):
        drawn = [float(values[i]) for i in row if not math.isnan(values[i])]
        means.append(sum(drawn) / len(drawn))
    means = torch.tensor(means, dtype=torch.float64)
    assert (found.mean, found.images) == (pytest.approx(float(values.nanmean())), 28)
    assert found.low == pytest.approx(float(means.quantile(0.025)))
    assert found.high == pytest.approx(float(means.quantile(0.975)))


def test_parts_of_draws_equal_one(monkeypatch):
    values = torch.randn(20)
    whole = bootstrap(values, draws=100, seed=1)
    monkeypatch.setattr(sys.modules["prunex.metrics.bootstrap"], "_ROOM", 20 * 30)
    assert bootstrap(values, draws=100, seed=1) == whole


def test_covers_the_true_mean_about_as_often_as_it_says():
    inside = 0
    for trial in range(300):
        values = torch.randn(60, generator=torch.Generator().manual_seed(trial))
        found = bootstrap(values, draws=300, seed=trial)
        inside += found.low <= 0 <= found.high
    assert 0.90 <= inside / 300 <= 0.98


def test_width_is_that_of_the_standard_error():
    values = torch.randn(400)
    found = bootstrap(values, draws=4000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.08)
    narrow = bootstrap(values, draws=4000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * float(values.std()) / 20, rel=0.08)


def test_differences_are_paired():
    hard = 5 * torch.randn(50)
    values = {"a": hard + 0.3 + 0.01 * torch.randn(50), "b": hard, "c": hard.roll(1)}
    means, differences = compare(values)
    assert list(differences) == [("a", "b"), ("a", "c"), ("b", "c")]
    told = differences["a", "b"]
    assert 0.28 < told.low < told.mean < told.high < 0.32
    assert told.mean == pytest.approx(means["a"].mean - means["b"].mean)
    assert means["a"].high - means["a"].low > 1  # which two single intervals would never have told apart
    assert means["b"] == bootstrap(hard)
    assert differences["b", "c"].low < 0 < differences["b", "c"].high
    assert str(told).count(".") == 3


def test_differences_are_over_images_where_both_have_a_number():
    a, b = torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([0.0, torch.nan, 5.0, 1.0])
    means, differences = compare({"a": a, "b": b})
    assert (means["a"].images, means["b"].images, differences["a", "b"].images) == (3, 3, 2)
    assert differences["a", "b"].mean == 2.0


def test_ratios_of_sums_for_measures_of_a_data_set():
    maps, masks = torch.randn(12, 4, 4), torch.rand(12, 4, 4) < 0.4
    counts = segmentation_counts(maps, masks)
    counts[2] = torch.nan
    found = bootstrap(counts[:, 0], counts[:, 1])
    rest = counts[~counts.isnan().any(1)]
    assert found.mean == pytest.approx(float(rest[:, 0].sum() / rest[:, 1].sum()))
    assert found.low < found.mean < found.high
    assert found.images == 11


def test_same_seed_same_interval_and_global_state_stays():
    values, state = torch.randn(20), torch.get_rng_state()
    first = bootstrap(values, seed=3)
    assert first == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_kept_numbers_of_a_metric_go_in():
    metric = RankAccuracy(keep=True)
    metric.update(torch.randn(9, 4, 4), torch.rand(9, 4, 4) < 0.5)
    assert bootstrap(metric.values()).mean == pytest.approx(float(metric.compute()))


def test_nothing_defined_is_nan():
    found = bootstrap(torch.full((4,), torch.nan))
    assert math.isnan(found.mean)
    assert math.isnan(found.low)
    assert found.images == 0
    one = bootstrap(torch.tensor([1.0, torch.nan, torch.nan]))  # some draws hold no image with a number
    assert (one.mean, one.low, one.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"values": torch.ones(2, 2)}, r"values are torch.float32 \[2, 2\]: give floats \[N\]"),
        ({"values": torch.ones(3, dtype=torch.int64)}, "values are torch.int64"),
        ({"values": torch.ones(0)}, r"values are torch.float32 \[0\]"),
        ({"values": [1.0]}, "values are list"),
        ({"weights": torch.ones(4)}, "weights of 4 images do not fit values of 3"),
        ({"weights": -torch.ones(3)}, "at least 0 each"),
        ({"draws": 0}, "draws=0"),
        ({"seed": -1}, "seed=-1"),
        ({"level": 1.0}, "level=1.0 is not allowed"),
        ({"level": 95}, "level=95"),
    ],
)
def test_refused(given, match):
    with pytest.raises(PrunexError, match=match):
        bootstrap(**{"values": torch.ones(3), **given})


def test_compare_refused():
    with pytest.raises(PrunexError, match=r"different numbers of images: \{'a': 2, 'b': 3\}"):
        compare({"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(PrunexError, match="values of a are list"):
        compare({"a": [1.0]})
    for nothing in ({}, torch.ones(3)):
        with pytest.raises(PrunexError, match="no methods by name"):
            compare(nothing)


def test_ratios_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    counts = torch.rand(30, 4, generator=generator, dtype=torch.float64) * 3
    counts[5] = torch.nan
    found = bootstrap_ratios(counts, draws=400, seed=7, level=0.9)
    generator, means = torch.Generator().manual_seed(7), []
    for row in torch.randint(30, (400, 30), generator=generator):
        sums = sum(counts[i] for i in row if i != 5)
        means.append(float(sums[0] / sums[1] + sums[2] / sums[3]) / 2)
    means = torch.tensor(means, dtype=torch.float64)
    assert found.low == pytest.approx(float(means.quantile(0.05)))
    assert found.high == pytest.approx(float(means.quantile(0.95)))
