import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.explainers.shap import estimate
from prunex.removal.game import Removal
from tests.removal import games
from tests.vits import FAMILIES, images, images_for, largest, randomise, relative, tiny

PRUNERS = ["topk", "evit", "dynamicvit"]


def small(family="vit", size=24, **options):
    """A ViT of 3 x 3 patches and 2 blocks: 512 coalitions."""
    return tiny(family, img_size=size, depth=2, **options).double()


def attach(model, pruner, **options):
    pruning = prunex.attach(model, pruner, **({"keep_ratio": 0.6, "stages": (0, 1)} | options))
    randomise(pruning.pruner)
    return pruning


# --------------------------------------------------------------------------------------------------------------------
# The explainer.


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["permutation", "kernel"])
@pytest.mark.parametrize("output", ["probability", "logit", "log_odds"])
@pytest.mark.parametrize("pruner", [None, "evit"])
def test_it_converges_to_the_enumeration(estimator, output, pruner):
    model = small()
    x = images(2, (24, 24), dtype=torch.float64)
    if pruner:
        attach(model, pruner)
    value = Removal(model, x, output=output)
    table = value(games.every_coalition(9).expand(2, -1, -1))
    wanted = torch.stack([games.exact(t, 9) for t in table])
    found = [prunex.explain("shap", model, x, estimator=estimator, output=output, budget=4000, seed=s) for s in (0, 1)]
    for e in found:
        assert (e.raw - wanted).pow(2).mean().sqrt() < 0.05 * wanted.std()
    assert largest(found[0].raw, found[1].raw) > 0


def test_four_patches_against_the_enumeration():
    model = small(size=16)
    x = images(3, (16, 16), dtype=torch.float64)
    table = Removal(model, x)(games.every_coalition(4).expand(3, -1, -1))
    wanted = torch.stack([games.exact(t, 4) for t in table])
    for estimator in ("permutation", "kernel"):
        e = prunex.explain("shap", model, x, estimator=estimator, budget=3000)
        found = estimate(Removal(model, x), 3, estimator, 3000, 0)
        assert largest(found.values, e.raw) < 1e-12
        assert ((e.raw - wanted).abs() <= 4 * found.errors + 1e-9).all()
        assert (e.raw - wanted).pow(2).mean().sqrt() < 0.05 * wanted.std()
        assert largest(e.maps.flatten(1), e.raw.gather(2, e.target[:, None, None].expand(-1, 4, 1))[..., 0]) == 0


@pytest.mark.parametrize("estimator", ["permutation", "kernel"])
@pytest.mark.parametrize("budget", [34, 80, None])
@pytest.mark.parametrize("output", ["probability", "log_odds"])
def test_every_class_sums_to_what_all_patches_add(estimator, budget, output):
    model = tiny().double()
    x = images_for(model)
    e = prunex.explain("shap", model, x, estimator=estimator, budget=budget, output=output)
    nothing, everything = Removal(model, x, output=output)(torch.tensor([[False], [True]]).expand(3, 2, 16)).unbind(1)
    total = everything - nothing
    assert ((e.raw.sum(1) - total).abs() <= 1e-6 * total.abs().clamp(min=1)).all()
    assert e.signed
    assert (e.maps < 0).any()
    assert (e.maps > 0).any()


@pytest.mark.parametrize("estimator", ["permutation", "kernel"])
def test_a_budget_is_never_exceeded(estimator, monkeypatch):
    asked = []
    inner = Removal.__call__
    monkeypatch.setattr(Removal, "__call__", lambda self, z: asked.append(z.shape[1]) or inner(self, z))
    for budget, used in ((80, {"permutation": 62, "kernel": 80}), (101, {"permutation": 92, "kernel": 100})):
        asked.clear()
        prunex.explain("shap", tiny(), images(1), estimator=estimator, budget=budget)
        assert sum(asked) == used[estimator]
    asked.clear()
    prunex.explain("shap", tiny(), images(1), estimator=estimator)
    assert sum(asked) == 2 + 40 * 15


def test_equal_patches_get_equal_values_and_unread_ones_nothing():
    model = small("no_pos_embed")
    x = images(1, (24, 24), dtype=torch.float64)
    x[:, :, 16:24, 16:24] = x[:, :, :8, :8]  # patch 8 looks like patch 0, and positions are equal
    found = estimate(Removal(model, x), 1, "permutation", 600, 0)
    gap = (found.values[0, 0] - found.values[0, 8]).abs()
    assert (gap <= 3 * (found.errors[0, 0] ** 2 + found.errors[0, 8] ** 2).sqrt()).all()
    table = Removal(model, x)(games.every_coalition(9)[None])[0]
    exact = games.exact(table, 9)
    assert largest(exact[0], exact[8]) < 1e-12

    class Unread(Removal):
        """Patch 4 is hidden as a key, whether it takes part or not."""

        def __call__(self, z):
            return super().__call__(z & (torch.arange(9) != 4))

    for estimator, bound in (("permutation", 1e-12), ("kernel", 0.02)):
        found = estimate(Unread(model, x), 1, estimator, 4000, 0)
        assert float(found.values[0, 4].abs().max()) < bound


def test_removal_routes_give_equal_maps():
    for pruner in (None, *PRUNERS):
        model = tiny().double()
        if pruner:
            attach(model, pruner, stages=(1, 2))
        maps = [prunex.explain("shap", model, images_for(model), removal=r, budget=70).maps for r in ("drop", "mask")]
        assert relative(maps[0], maps[1]) < 1e-11


@pytest.mark.parametrize("selection", ["frozen", "adaptive"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruned_models_play_the_game_asked_for(pruner, selection):
    model = tiny().double()
    x = images_for(model)
    with attach(model, pruner, stages=(1, 2)) as pruning:
        e = prunex.explain("shap", model, x, selection=selection, budget=70)
        pruning.masked = True
        hidden = prunex.explain("shap", model, x, selection=selection, budget=70)
        pruning.masked = None
        other = prunex.explain("shap", model, x, selection="adaptive" if selection == "frozen" else "frozen", budget=70)
    assert relative(hidden.maps, e.maps) < 1e-11
    assert relative(other.maps, e.maps) > 1e-3
    assert e.trace.kept().equal(hidden.trace.kept())
    assert e.maps[~e.trace.kept()].abs().max() > 0  # what was removed may have mattered before


def test_patches_gone_before_the_first_block_are_worth_nothing_in_the_frozen_game():
    model = tiny().double()
    with attach(model, "dynamicvit", stages=(0,)):
        e = prunex.explain("shap", model, images_for(model), budget=100)
    assert float(e.maps[~e.trace.kept()].abs().max()) < 1e-13


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = tiny(family)
    x = images(2, (32, 56)) if family == "dynamic" else images_for(model, 2)
    e = prunex.explain("shap", model, x, budget=120)
    grid = (4, 7) if family == "dynamic" else tuple(model.patch_embed.grid_size)
    assert e.maps.shape == (2, *grid)
    assert e.raw.shape == (2, grid[0] * grid[1], 5)
    assert e.maps.dtype == torch.float32
    assert torch.isfinite(e.raw).all()
    with torch.no_grad():
        assert e.target.equal(model(x).argmax(1))


@pytest.mark.parametrize("pruner", [None, *PRUNERS])
@pytest.mark.parametrize("estimator", ["permutation", "kernel"])
def test_a_batch_equals_its_images_one_by_one(pruner, estimator):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = tiny().to(dtype)
        if pruner:
            attach(model, pruner, stages=(1, 2))
        x = images_for(model)
        together = prunex.explain("shap", model, x, torch.tensor([0, 3, 1]), estimator=estimator, budget=70)
        for i, t in enumerate((0, 3, 1)):
            alone = prunex.explain("shap", model, x[i : i + 1], t, estimator=estimator, budget=70)
            assert relative(alone.maps, together.maps[i : i + 1]) < tolerance


def test_seeds_repeat_and_differ_and_leave_the_callers_random_numbers():
    model, x = tiny(), images(1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (prunex.explain("shap", model, x, budget=70, seed=s).maps for s in (1, 1, 2))
    assert torch.get_rng_state().equal(before)
    assert a.equal(b)
    assert not a.equal(c)


def test_it_leaves_the_model_as_it_was_and_works_without_gradients():
    model = tiny().train()
    with attach(model, "evit", stages=(1, 2)):
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                e = prunex.explain("shap", model, images(1), budget=40)
            assert not e.raw.requires_grad
        assert all(m.training for m in model.modules())
        assert all(p.grad is None for p in model.parameters())


def test_half_precision_models_give_single_precision_values():
    e = prunex.explain("shap", tiny().bfloat16(), images(1, dtype=torch.bfloat16), budget=70)
    assert e.maps.dtype == e.raw.dtype == torch.float32
    full = prunex.explain("shap", tiny(), images(1), budget=70)
    assert largest(e.maps, full.maps) < 0.05


def test_a_model_of_one_output():
    e = prunex.explain("shap", tiny(num_classes=1), images(2), budget=70)
    assert e.raw.shape == (2, 16, 1)
    assert (e.maps.abs() > 0).any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"estimator": "kernal"}, "did you mean 'kernel'"),
        ({"removal": "paint"}, "Known: drop, mask"),
        ({"selection": "froze"}, "did you mean 'frozen'"),
        ({"output": None}, "Known: log_odds, logit, probability"),
        ({"selection": "adaptive", "removal": "mask"}, "needs removal='drop'"),
        ({"budget": 31}, r"budget=31 is too small: one antithetic pair of orders of 16 patches takes 32"),
        ({"budget": 33, "estimator": "kernel"}, r"at least 34 evaluations and is useful from about 320"),
        ({"budget": 0}, "whole number of at least 1"),
        ({"budget": 2.5e3}, "whole number"),
        ({"seed": -1}, "at least 0"),
        ({"seed": True}, "whole number"),
        ({"chunk": 0}, "at least 1"),
        ({"samples": 5}, "unknown option of shap 'samples'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("shap", tiny(), images(1), **options)


def test_bad_models_and_coalitions():
    with pytest.raises(PrunexError, match="no classifier"):
        prunex.explain("shap", tiny(num_classes=0), images(1))
    value = Removal(tiny(), images(2))
    for z in (torch.ones(2, 3, 16), torch.ones(1, 3, 16).bool(), torch.ones(2, 3, 15).bool(), torch.ones(2, 16).bool()):
        with pytest.raises(PrunexError, match=r"give bool \[2, M, 16\]"):
            value(z)
    with pytest.raises(PrunexError, match="no coalitions"):
        value(torch.ones(2, 0, 16).bool())
