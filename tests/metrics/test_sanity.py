"""Sanity checks of explainers: random weights, batch order."""

import copy
import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import prunex
from prunex import PrunexError
from prunex.metrics import batch_order, model_randomisation, randomised
from prunex.registry import METHODS, register
from prunex.relevance.explanation import Explanation
from prunex.vit.trace import TokenTrace
from tests.vits import assert_same_state, images, state_of, tiny


def answer(model, pictures, maps):
    trace = TokenTrace((4, 4), 1, len(pictures), pictures.device)
    with torch.no_grad():
        logits = model(pictures)
    return Explanation(maps, maps, logits.argmax(1), True, trace, logits, (32, 32), (32, 32))


@pytest.fixture
def fakes():
    """Explainers that look at the images alone, at nothing, and at the whole batch."""
    before = dict(METHODS)

    @register("explainer", "edges", "none", "nothing")
    def edges(model, pictures, target=None):
        return answer(model, pictures, torch.nn.functional.avg_pool2d(pictures.mean(1), 8))

    @register("explainer", "flat", "none", "nothing")
    def flat(model, pictures, target=None):
        return answer(model, pictures, torch.ones(len(pictures), 4, 4))

    @register("explainer", "mixed", "none", "nothing")
    def mixed(model, pictures, target=None):
        maps = torch.nn.functional.avg_pool2d(pictures.mean(1), 8)
        return answer(model, pictures, maps - maps.mean(0))

    @register("explainer", "flipping", "none", "nothing")
    def flipping(model, pictures, target=None):
        # Right but for the sign, which one weight decides.
        maps = torch.nn.functional.avg_pool2d(pictures.mean(1), 8)
        return answer(model, pictures, maps * model.head.weight[0, 0].sign().detach())

    yield
    METHODS.clear()
    METHODS.update(before)


def big(**kwargs):
    return tiny(img_size=64, depth=2, **kwargs)


@pytest.mark.parametrize("method", ["grad_cam", "transformer_attribution"])
def test_explainers_of_the_model_do_not_survive(method):
    found = model_randomisation(method, big(), images(3, (64, 64)))
    assert found.stages == ["head", "blocks.1", "blocks.0", "embed"]
    assert found.spearman.shape == found.absolute.shape == found.ssim.shape == (4, 3)
    assert not found.survives
    assert found.similarity < found.threshold == 0.5
    assert [r["stage"] for r in found.table()] == found.stages
    assert found.table()[1]["spearman"] == pytest.approx(float(found.spearman[1].mean()))
    assert (found.method, found.cascade) == (method, True)


def test_an_explainer_that_survives_random_weights_is_reported(fakes):
    found = model_randomisation("edges", big(), images(3, (64, 64)))
    assert found.survives
    assert torch.allclose(found.spearman, torch.ones(4, 3, dtype=torch.float64))
    assert torch.allclose(found.ssim, torch.ones(4, 3, dtype=torch.float64))
    assert found.similarity == pytest.approx(1)
    assert not model_randomisation("edges", big(), images(3, (64, 64)), threshold=1.0).survives


def test_flat_maps_have_no_number_and_do_not_survive(fakes):
    found = model_randomisation("flat", tiny(depth=1), images(2))
    assert found.spearman.isnan().all()
    assert found.ssim.isnan().all()
    assert math.isnan(found.similarity)
    assert math.isnan(found.chance)
    assert found.survives is False


def test_a_lost_sign_alone_is_caught_by_absolute_values(fakes):
    found = [model_randomisation("flipping", tiny(depth=1), images(3), seed=s) for s in range(6)]
    assert all(f.survives and f.similarity == pytest.approx(1) for f in found)
    assert {round(float(f.spearman[-1].mean())) for f in found} == {-1, 1}


def test_similarities_against_slow_definitions():
    model, pictures = big(), images(3, (64, 64))
    found = model_randomisation("grad_cam", model, pictures)
    one = prunex.explain("grad_cam", model, pictures)
    two = prunex.explain("grad_cam", randomised(model), pictures, one.target)
    for i in range(3):
        a, b = (e.maps[i].flatten().numpy() for e in (one, two))
        assert float(found.spearman[-1, i]) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
        assert float(found.absolute[-1, i]) == pytest.approx(spearmanr(abs(a), abs(b)).statistic, abs=1e-9)
    assert float(found.ssim[-1, 0]) == pytest.approx(slow_ssim(one.pixels[0], two.pixels[0]), abs=1e-6)


def slow_ssim(one, two):
    """Wang et al. 2004 with a Gaussian window of 11 and sigma 1.5, the border mirrored, in 0..1."""
    one, two = ((v.double() - v.min()) / (v.max() - v.min()) for v in (one, two))
    mirrored = [[abs(i) if i < n else 2 * (n - 1) - i for i in range(-5, n + 5)] for n in one.shape]
    one, two = (v[mirrored[0]][:, mirrored[1]] for v in (one, two))
    places = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    window = (line[:, None] * line) / line.sum() ** 2
    total = []
    for r in range(one.shape[0] - 10):
        for c in range(one.shape[1] - 10):
            a, b = one[r : r + 11, c : c + 11], two[r : r + 11, c : c + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
            both = (window * a * b).sum() - ma * mb
            c1, c2 = 0.01**2, 0.03**2
            total.append((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(torch.stack(total).mean())


def test_chance_is_what_shuffled_maps_stay_below(fakes):
    found = model_randomisation("edges", tiny(depth=1), images(3))
    maps = prunex.explain("edges", tiny(depth=1), images(3)).maps.flatten(1)
    passed = 0
    for _ in range(200):
        order = torch.rand(3, 16).argsort(1)
        shuffled = maps.gather(1, order)
        means = [
            sum(spearmanr(f(maps[i]).numpy(), f(shuffled[i]).numpy()).statistic for i in range(3)) / 3
            for f in (lambda v: v, torch.abs)
        ]
        passed += max(means) > found.chance
    assert passed <= 8  # expected 2; more has probability below 0.001
    one = 2.5758 / (3 * 15) ** 0.5  # 99.5 % of a normal distribution lie below 2.5758
    assert found.chance == pytest.approx(one, rel=1e-4)


def test_stages_alone_change_only_their_own_parameters(monkeypatch):
    model, seen = tiny(depth=2), []
    original = {n: p.clone() for n, p in model.named_parameters()}
    real = prunex.metrics.sanity.explain

    def watch(method, given, *args, **kwargs):
        seen.append({n for n, p in given.named_parameters() if not torch.equal(p, original[n])})
        return real(method, given, *args, **kwargs)

    monkeypatch.setattr("prunex.metrics.sanity.explain", watch)
    found = model_randomisation("rollout", model, images(2), cascade=False)
    assert found.stages == ["head", "blocks.1", "blocks.0", "embed", "all"]
    alone = seen[1:]
    assert seen[0] == set()
    for stage, changed in zip(found.stages[1:3], alone[1:3], strict=True):
        assert changed == {n for n in original if n.startswith(stage + ".")}
    assert alone[0] == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert alone[3] == {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token"}
    assert alone[4] == set(original)
    seen.clear()
    cascade = model_randomisation("rollout", model, images(2))
    assert [len(s) for s in seen[1:]] == [len(set().union(*alone[: i + 1])) for i in range(4)]
    assert torch.equal(cascade.spearman[-1], found.spearman[-1])  # the noise of a stage is the same either way


def test_noise_has_each_parameters_own_mean_and_spread():
    model = tiny(embed_dim=96)
    for (name, one), (_, two) in zip(model.named_parameters(), randomised(model).named_parameters(), strict=True):
        assert not torch.equal(one, two), name
        if one.numel() > 2000:
            assert float(two.detach().std()) == pytest.approx(float(one.detach().std()), rel=0.1), name
            assert float(two.detach().mean()) == pytest.approx(
                float(one.detach().mean()), abs=0.1 * float(one.detach().std())
            ), name
    with torch.no_grad():
        model.norm.weight.copy_(5 + 0.01 * torch.randn(96))
        model.norm.bias.fill_(3.0)
    drawn = randomised(model).norm
    assert float(drawn.weight.detach().mean()) == pytest.approx(5, abs=0.01)
    assert drawn.bias.equal(model.norm.bias)
    assert torch.equal(randomised(model).head.weight, randomised(model).head.weight)
    assert not torch.equal(randomised(model, seed=1).head.weight, randomised(model).head.weight)


@pytest.mark.parametrize("method", [None, "dynamicvit"])
def test_model_and_random_state_stay(method):
    model, pictures = tiny(depth=2).train(), images(2)
    if method:
        prunex.attach(model, method, stages=(1,))
    model.requires_grad_(False)
    before, state = state_of(model), torch.get_rng_state()
    with torch.inference_mode():
        found = model_randomisation("grad_cam", model, pictures)
        batch_order("grad_cam", model, pictures)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(model, before)
    assert found.stages[-1] == "embed"
    if method:
        own = dict(randomised(model).named_parameters())
        for name, p in model.named_parameters():
            assert torch.equal(own[name], p) is name.startswith("prunex."), name


@pytest.mark.parametrize("family", ["dinov2_reg", "siglip", "beit_shared", "eva02"])
def test_every_parameter_of_other_families_is_in_a_stage(family):
    model = tiny(family, depth=1)
    kept = [n for (n, p), q in zip(model.named_parameters(), randomised(model).parameters(), strict=True) if p is q]
    assert not kept
    same = [
        n
        for (n, p), q in zip(model.named_parameters(), randomised(model).parameters(), strict=True)
        if torch.equal(p, q) and float(p.detach().std()) > 0
    ]
    assert not same


def test_inside_a_larger_module_with_options_and_target():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = tiny(depth=1), tiny(depth=1, seed=5)

    model = Wrapped()
    found = model_randomisation("rollout", model, images(2), 3, path="second", head_fusion="max")
    plain = model_randomisation("rollout", copy.deepcopy(model.second), images(2), 3, head_fusion="max")
    assert torch.equal(found.spearman, plain.spearman)
    assert found.options["head_fusion"] == "max"
    with pytest.raises(PrunexError, match="holds 2 timm ViTs"):
        model_randomisation("rollout", model, images(2))


def test_models_without_a_classifier():
    found = model_randomisation("rollout", tiny(depth=1, num_classes=0), images(2))
    assert found.spearman.shape == (3, 2)
    assert batch_order("rollout", tiny(depth=1, num_classes=0), images(2)).worst < 1e-4


def test_batch_order(fakes):
    model, pictures = tiny(depth=2), images(3)
    found = batch_order("grad_cam", model, pictures)
    assert found.alone.shape == found.shuffled.shape == (3,)
    assert found.worst < 1e-4
    mixed = batch_order("mixed", model, pictures)
    assert bool((mixed.alone > 0.1).all())  # alone its maps are 0
    assert mixed.worst == float(mixed.alone.max())
    assert batch_order("flat", model, pictures).worst == 0
    assert float(batch_order("mixed", model, pictures).shuffled.max()) < 1e-5  # a mean does not see order


def test_refused():
    model = tiny(depth=1)
    for given, match in (
        ({"seed": -1}, "seed=-1"),
        ({"threshold": 2}, "threshold=2"),
        ({"layers": 2}, "unknown option of rollout 'layers'"),
    ):
        with pytest.raises(PrunexError, match=match):
            model_randomisation("rollout", model, images(1), **given)
    with pytest.raises(PrunexError, match="unknown explainer 'rolout'"):
        model_randomisation("rolout", model, images(1))
    with pytest.raises(PrunexError, match="unknown explainer 'rolout'"):
        batch_order("rolout", model, images(1))
    with pytest.raises(PrunexError, match="seed='a'"):
        randomised(model, seed="a")
