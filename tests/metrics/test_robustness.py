"""Max-sensitivity against its definition, and by explainers whose answer is known."""

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.metrics import MaxSensitivity, max_sensitivity, robustness
from prunex.metrics.scoring import scores
from prunex.removal.coalitions import seeded
from tests.metrics.models import PRUNED, pruned
from tests.vits import assert_same_state, images, largest, state_of, tiny


def case(batch=3):
    return tiny().double(), images(batch, dtype=torch.float64)


def by_hand(explain, x, radius, samples, seed=0):
    """The largest ratio of every image, one explanation at a time."""
    generator = seeded(seed)
    noise = torch.empty(samples, *x.shape[1:], dtype=torch.float64).uniform_(-radius, radius, generator=generator)
    found = []
    for b in range(len(x)):
        clean = explain(x[b : b + 1], b)
        size = float((clean**2).sum()) ** 0.5 or 1.0
        found.append(max(float(((explain(x[b : b + 1] + n, b) - clean) ** 2).sum()) ** 0.5 / size for n in noise))
    return found


@pytest.mark.parametrize(
    ("method", "options"), [("rollout", {}), ("generic_attention", {}), ("grad_cam", {"kind": "attention"})]
)
def test_against_one_explanation_at_a_time(method, options):
    model, x = case()
    with torch.no_grad():
        target = model(x).argmax(1)

    def explain(image, b):
        return prunex.explain(method, model, image, int(target[b]), **options).maps

    found = max_sensitivity(method, model, x, radius=0.3, samples=4, seed=2, **options)
    assert found.tolist() == pytest.approx(by_hand(explain, x, 0.3, 4, 2), rel=1e-9)
    assert found.dtype == torch.float64


def test_the_raw_output_is_measured_where_asked():
    model, x = case(2)
    found = max_sensitivity("integrated_gradients", model, x, 1, of="raw", samples=2, steps=4)

    def explain(image, b):
        return prunex.explain("integrated_gradients", model, image, 1, steps=4).raw

    assert found.tolist() == pytest.approx(by_hand(explain, x, 0.02, 2), rel=1e-9)


def test_constant_explainers_do_not_move():
    model, x = case()
    assert max_sensitivity(lambda m, i, t: torch.ones(len(i), 4, 4), model, x).tolist() == [0, 0, 0]
    assert max_sensitivity(lambda m, i, t: torch.zeros(len(i), 4, 4), model, x).tolist() == [0, 0, 0]


def test_fresh_noise_is_the_root_of_two():
    model, x = case()
    generator = torch.Generator().manual_seed(0)
    found = max_sensitivity(lambda m, i, t: torch.randn(len(i), 100, 100, generator=generator), model, x, samples=3)
    assert largest(found, torch.full((3,), 2**0.5)) < 0.03


def test_a_denominator_of_zero_counts_as_one():
    model, x = case(2)
    x[0] = 0
    found = max_sensitivity(lambda m, i, t: i.mean((1, 2, 3))[:, None, None], model, x, radius=0.5, samples=5)
    wanted = by_hand(lambda i, b: i.mean((1, 2, 3)), x, 0.5, 5)
    assert found.tolist() == pytest.approx(wanted)
    assert 0 < float(found[0]) < 0.5


def test_the_noise_is_bounded_and_the_same_for_every_image():
    model, x = case(2)
    seen = []

    def watch(m, i, t):
        seen.append(i.clone())
        return torch.ones(len(i), 2, 2)

    state = torch.get_rng_state()
    max_sensitivity(watch, model, x, radius=0.05, samples=6, chunk=5)
    assert torch.get_rng_state().equal(state)
    assert seen[0].equal(x)
    assert max(len(i) for i in seen[1:]) == 5
    noise = torch.cat(seen[1:]).view(6, 2, 3, 32, 32) - x
    assert float(noise.abs().max()) <= 0.05 + 1e-12
    assert float(noise.abs().max()) > 0.049
    assert largest(noise[:, 0], noise[:, 1]) < 1e-12
    assert largest(noise[0, 0], noise[1, 0]) > 0.01


def test_the_class_stays_that_of_the_clean_image():
    model, x = case(2)
    seen = []
    max_sensitivity(lambda m, i, t: seen.append(t) or torch.ones(len(i), 2, 2), model, x, radius=50.0, samples=3)
    with torch.no_grad():
        clean = model(x).argmax(1)
    assert all(t.equal(clean.repeat(len(t) // 2)) for t in seen)


@pytest.mark.parametrize("pruner", [None, *PRUNED])
def test_batches_split_and_processes_add_up(pruner):
    model, x = pruned(pruner), images(4, dtype=torch.float64)
    before = state_of(model)
    whole = max_sensitivity("rollout", model, x, samples=3)
    parts = torch.cat([max_sensitivity("rollout", model, x[i : i + 1], samples=3, chunk=2) for i in range(4)])
    assert largest(whole, parts) < 1e-9
    assert (whole > 0).all()
    assert_same_state(model, before)
    metrics = [MaxSensitivity("rollout", samples=3, keep=True) for _ in range(2)]
    metrics[0].update(model, x[:3])
    metrics[1].update(model, x[3:], torch.tensor([1]))
    metrics[0].merge_state(metrics[1])
    assert float(metrics[0].compute()) == pytest.approx(float(whole.mean()), rel=1e-9)
    assert MaxSensitivity.higher_is_better is False


def test_more_draws_never_lower_the_maximum():
    model, x = case()
    few, many = (max_sensitivity("rollout", model, x, samples=n) for n in (2, 6))
    assert (many >= few - 1e-12).all()


def test_nan_maps_are_nan():
    model, x = case(2)
    found = max_sensitivity(lambda m, i, t: torch.where(i > 9, 1.0, i.detach() * torch.nan), model, x, samples=2)
    assert found.isnan().all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"explainer": "rolout"}, "unknown explainer 'rolout': did you mean 'rollout'"),
        ({"explainer": 3}, "unknown explainer 3"),
        ({"radius": -1}, "radius=-1"),
        ({"radius": "big"}, "radius='big'"),
        ({"samples": 0}, "samples=0"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": None}, "chunk=None"),
        ({"of": "pixels"}, "unknown of 'pixels'.*maps, raw"),
        ({"stpes": 3}, "unknown option of rollout 'stpes'"),
        ({"images": torch.rand(3, 32, 32)}, "add the batch dimension"),
        ({"target": 9}, "out of range"),
        ({"explainer": lambda m, i, t: torch.ones(4)}, r"the explainer gave \[4\]: it must give one map an image"),
    ],
)
def test_refused(change, match):
    model, x = case()
    given = {"explainer": "rollout", "images": x, "target": None} | change
    with pytest.raises(PrunexError, match=match):
        max_sensitivity(given.pop("explainer"), model, given.pop("images"), given.pop("target"), **given)


def test_refused_by_the_class():
    with pytest.raises(PrunexError, match="unknown explainer"):
        MaxSensitivity("rolout")


def test_options_of_the_same_name_reach_the_explainer(monkeypatch):
    """Of ``scores`` and the class: the draws' own seed and chunk are others."""
    asked = []

    def seen(name, model, x, target=None, **options):
        asked.append(options)
        return prunex.explain(name, model, x, target, **options)

    monkeypatch.setattr(robustness, "explain", seen)
    model, x = tiny(), images(2)
    own = {"seed": 7, "chunk": None, "budget": 64}
    maps = prunex.explain("shap", model, x, **own).maps
    found = scores(["max_sensitivity"], model, x, maps, explainer="shap", options=own)["max_sensitivity"]
    metric = MaxSensitivity("shap", options=own)
    metric.update(model, x)
    assert asked
    assert all(options == own for options in asked)
    assert float(metric.compute()) == pytest.approx(float(found.mean()))


def test_a_model_without_a_classifier():
    model, x = tiny(num_classes=0), images(2)
    assert torch.isfinite(max_sensitivity("rollout", model, x, samples=2)).all()


def test_a_callables_class_is_checked():
    model, x = tiny(), images(2)
    with pytest.raises(PrunexError, match="out of range"):
        max_sensitivity(lambda m, i, t: i.mean(1), model, x, torch.tensor([0, 99]), samples=2)
