"""How simple maps are, against the definitions written out."""

import math

import pytest
import torch
from torchmetrics import MetricCollection

from prunex import PrunexError, methods
from prunex.metrics import Complexity, Sparseness, complexity, sparseness
from prunex.metrics.scoring import MEASURES, scores
from tests.vits import images, tiny


def maps(count=6, side=5, seed=0):
    return torch.randn(count, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sparseness_is_half_the_mean_difference_of_all_pairs():
    """The Gini index as it is defined, without a sort."""
    given = maps()
    for one, value in zip(given, sparseness(given).tolist(), strict=True):
        sizes = one.abs().flatten().tolist()
        pairs = sum(abs(a - b) for a in sizes for b in sizes)
        assert value == pytest.approx(pairs / (2 * len(sizes) * sum(sizes)), abs=1e-12)


def test_complexity_is_the_entropy_of_shares():
    given = maps()
    for one, value in zip(given, complexity(given).tolist(), strict=True):
        sizes = one.abs().flatten().tolist()
        wanted = -sum(a / sum(sizes) * math.log(a / sum(sizes)) for a in sizes)
        assert value == pytest.approx(wanted, abs=1e-12)


def test_noise_has_the_levels_that_the_docstrings_say():
    noise = torch.rand(2000, 14, 14, generator=torch.Generator().manual_seed(0))
    assert float(sparseness(noise).mean()) == pytest.approx(1 / 3, abs=0.005)
    assert float(complexity(noise).mean()) == pytest.approx(math.log(196) - (math.log(2) - 0.5), abs=0.005)


@pytest.mark.parametrize("function", [sparseness, complexity])
def test_only_the_sizes_of_the_values_count(function):
    given = maps()
    wanted = function(given)
    shuffled = given.flatten(1)[:, torch.randperm(25)].view_as(given)
    for same in (3e38 * given.float().clamp(-1, 1) / 1.0, -given, 1e-40 * given, shuffled):
        reference = function(given.float().clamp(-1, 1)) if same.abs().max() > 1e30 else wanted
        assert torch.allclose(function(same), reference, rtol=0, atol=1e-6)
    assert torch.allclose(torch.cat([function(given[i : i + 1]) for i in range(6)]), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("function", [sparseness, complexity])
def test_maps_that_say_nothing_have_no_number(function):
    given = maps(3)
    given[0], given[1, 2, 2] = 0, torch.nan
    assert function(given).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("function", [sparseness, complexity])
def test_refused(function):
    for bad, match in [
        (torch.ones(4, 4), r"\[B, H, W\]"),
        (torch.ones(1, 4, 4, dtype=torch.int64), "dtype"),
        ([[1.0]], "list"),
        (torch.ones(2, 0, 4), "at least one patch"),
    ]:
        with pytest.raises(PrunexError, match=match):
            function(bad)


def test_classes_and_names():
    known = {m.name: m.make for m in methods("metric")}
    assert (known["sparseness"], known["complexity"]) == (sparseness, complexity)
    both = MetricCollection([Sparseness(keep=True), Complexity(keep=True)])
    given = maps()
    both.update(given[:2])
    both.update(given[2:])
    assert float(both.compute()["Sparseness"]) == pytest.approx(float(sparseness(given).mean()), abs=1e-12)
    assert float(both.compute()["Complexity"]) == pytest.approx(float(complexity(given).mean()), abs=1e-12)
    assert (Sparseness().higher_is_better, Complexity().higher_is_better) == (True, False)
    assert [MEASURES[n].higher for n in ("sparseness", "complexity")] == [True, False]
    values = scores(["complexity", "sparseness"], tiny(), images(6), maps(side=4).float())
    assert torch.allclose(values["sparseness"], sparseness(maps(side=4).float()))
