import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.explainers.shap import estimate
from prunex.removal import coalitions
from prunex.removal import game as removal
from prunex.removal.game import Removal, score
from prunex.vit.embedding import embed
from tests.removal import games
from tests.vits import FAMILIES, images, images_for, largest, randomise, relative, tiny

PRUNERS = ["topk", "evit", "dynamicvit"]
SHOWN = ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class", "max_pool", "layer_scale", "dynamic"]


def small(family="vit", size=24, **options):
    """A ViT of 3 x 3 patches and 2 blocks: 512 coalitions."""
    return tiny(family, img_size=size, depth=2, **options).double()


def attach(model, pruner, **options):
    pruning = prunex.attach(model, pruner, **({"keep_ratio": 0.6, "stages": (0, 1)} | options))
    randomise(pruning.pruner)
    return pruning


def drawn(batch, count, players, seed=0):
    """Coalitions of every size, nobody, everybody and a single patch among them: bool [B, M, P]."""
    z = coalitions.uniform_coalitions(batch * count, players, coalitions.seeded(seed)).view(batch, count, players)
    z[:, 0], z[:, 1], z[:, 2] = False, True, torch.arange(players) == players // 2
    return z


def by_hand(model, image, present):
    """Logits of one image with some patches there: embed all, add positions, keep rows, run timm's own blocks."""
    prefix = model.num_prefix_tokens
    x = embed(model, image[None])[0]
    rows = [*range(prefix), *(prefix + present.nonzero().flatten()).tolist()]
    x = x[:, rows]
    for block in model.blocks:
        x = block(x)
    return type(model).forward_head(model, model.norm(x))[0]


# --------------------------------------------------------------------------------------------------------------------
# The value function.


@pytest.mark.parametrize("family", SHOWN)
def test_values_are_those_of_the_model_without_these_tokens(family):
    model = tiny(family).double()
    x = images_for(model)
    value = Removal(model, x, output="logit")
    z = drawn(3, 12, value.players)
    with torch.no_grad():
        found = value(z)
        assert largest(found[:, 1], model(x)) < 1e-12
        for i in range(3):
            for j in range(2 if model.global_pool != "token" else 0, 12):
                if int(z[i, j].sum()) > 0 or model.global_pool == "token":
                    assert largest(found[i, j], by_hand(model, x[i], z[i, j])) < 1e-12
    assert largest(found[0, 0], found[2, 0]) < 1e-12  # of nothing, whatever the image


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_equals_masking(family, dtype):
    model = tiny(family).to(dtype)
    x = images_for(model)
    dropped, hidden = (Removal(model, x, removal=r) for r in ("drop", "mask"))
    z = drawn(3, 20, dropped.players)
    assert largest(dropped(z), hidden(z)) < (1e-5 if dtype == torch.float32 else 1e-13)
    assert torch.isfinite(dropped(z)).all()


@pytest.mark.parametrize("family", SHOWN)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_dropping_equals_masking_on_pruned_models(family, pruner):
    model = tiny(family).double()
    x = images_for(model)
    with attach(model, pruner, stages=(1, 2)) as pruning:
        dropped, hidden = (Removal(model, x, removal=r) for r in ("drop", "mask"))
        z = drawn(3, 20, dropped.players)
        frozen = dropped(z)
        assert largest(frozen, hidden(z)) < 1e-13
        adaptive = Removal(model, x, selection="free")(z)
        with torch.no_grad():
            clean = score(model(x), "probability")
        for values in (frozen, adaptive):
            assert torch.isfinite(values).all()
            assert largest(values[:, 1], clean) < 1e-13
        assert largest(frozen, adaptive) > 1e-3
        pruning.masked = True  # whatever mode the model is set to
        assert largest(Removal(model, x)(z), frozen) < 1e-13


def test_frozen_decisions_are_those_of_the_clean_run():
    # topk between the halves of block 0: recomputed with timm's submodules, tokens leaving by the clean run's choice.
    model = small()
    x = images(2, (24, 24), dtype=torch.float64)
    with attach(model, "topk", stages=(0,)) as pruning, torch.no_grad():
        value = Removal(model, x, output="logit")
        z = drawn(2, 16, 9)
        found = value(z)
        model(x)
        kept = pruning.trace.kept().flatten(1)
    for i in range(2):
        for j in range(16):
            with torch.no_grad():
                there = z[i, j]
                tokens = embed(model, x[i : i + 1])[0][:, [0, *(1 + there.nonzero().flatten()).tolist()]]
                first, second = model.blocks
                tokens = tokens + first.attn(first.norm1(tokens))
                left = kept[i][there]
                tokens = tokens[:, [0, *(1 + left.nonzero().flatten()).tolist()]]
                tokens = second(tokens + first.mlp(first.norm2(tokens)))
                wanted = type(model).forward_head(model, model.norm(tokens))[0]
            assert largest(found[i, j], wanted) < 1e-12


def test_a_fused_token_holds_what_is_there_and_vanishes_with_it():
    model = small()
    x = images(1, (24, 24), dtype=torch.float64)
    with attach(model, "evit", stages=(0,)) as pruning, torch.no_grad():
        model(x)
        stage = pruning.trace.stages[0]
        kept, weights = pruning.trace.kept().flatten(), stage.score[0]
        value = Removal(model, x, output="logit")
        everything_kept = kept.clone()
        half = everything_kept.clone()
        half[(~kept).nonzero().flatten()[0]] = True
        found = value(torch.stack([everything_kept, half])[None])[0]
        first, second = model.blocks
        for there, logits in zip((everything_kept, half), found, strict=True):
            tokens = embed(model, x)[0][:, [0, *(1 + there.nonzero().flatten()).tolist()]]
            tokens = tokens + first.attn(first.norm1(tokens))
            stays = torch.cat([torch.tensor([True]), kept[there]])
            fused = (weights[there & ~kept][:, None] * tokens[0, ~stays]).sum(0)
            rest = tokens[:, stays]
            if (there & ~kept).any():
                rest = torch.cat([rest, fused[None, None]], 1)
            rest = second(rest + first.mlp(first.norm2(rest)))
            assert largest(logits, type(model).forward_head(model, model.norm(rest))[0]) < 1e-12


@pytest.mark.parametrize("pruner", PRUNERS)
def test_the_adaptive_game_decides_among_the_patches_there(pruner):
    # Ground truth: a model whose grid is just the patches that are there (a row of them), pruned by the same pruner.
    model = small("no_pos_embed")
    x = images(2, (24, 24), dtype=torch.float64)
    there = torch.zeros(2, 1, 9, dtype=torch.bool)
    there[:, 0, 3:6] = True  # the middle row
    with attach(model, pruner, keep_ratio=0.4) as pruning:
        value = Removal(model, x, selection="free", output="logit")(there)[:, 0]
        narrow = small("no_pos_embed", size=(8, 24))
        narrow.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("prunex.")})
        with attach(narrow, pruner, keep_ratio=0.4) as theirs, torch.no_grad():
            theirs.pruner.load_state_dict(pruning.pruner.state_dict())
            if pruner == "dynamicvit":  # counts by the whole grid: 0.4 * 9 = 3, then 1, against 0.4 * 3 = 1
                theirs.pruner.targets = tuple(t * 3 for t in theirs.pruner.targets)
            assert largest(narrow(x[:, :, 8:16]), value) < 1e-12


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("route", ["drop", "mask"])
def test_the_chunk_bounds_forwards_and_changes_nothing(route, chunk, monkeypatch):
    model = tiny().double()
    x = images_for(model)
    z = drawn(3, 15, 16)
    wanted = Removal(model, x, removal=route)(z)
    seen = []
    inner = removal.resume
    monkeypatch.setattr(removal, "resume", lambda m, x, *a, **k: seen.append(len(x)) or inner(m, x, *a, **k))
    assert largest(Removal(model, x, removal=route, chunk=chunk)(z), wanted) < 1e-13
    assert max(seen) <= chunk
    assert sum(seen) == 45


def test_dropping_costs_less_where_fewer_patches_are_there(monkeypatch):
    model, seen = tiny().double(), []
    inner = removal.resume
    monkeypatch.setattr(removal, "resume", lambda m, x, *a, **k: seen.append(x.shape[1]) or inner(m, x, *a, **k))
    z = torch.arange(16).expand(1, 17, -1) < torch.arange(17)[:, None]
    Removal(model, images_for(model, 1))(z)
    assert seen == list(range(1, 18))
    seen.clear()
    Removal(model, images_for(model, 1), removal="mask")(z)
    assert seen == [17]


def test_units():
    logits = torch.tensor([[2.0, -1.0, 0.5], [800.0, 0.0, 0.0]], dtype=torch.float64)
    p = logits.softmax(1)
    assert score(logits, "probability").equal(logits.log_softmax(1).exp())
    assert score(logits, "logit").equal(logits)
    assert largest(score(logits, "log_odds")[0], (p / (1 - p)).log()[0]) < 1e-12
    assert largest(score(logits, "log_odds")[1, 0], 800 - torch.tensor(2.0).double().log()) < 1e-9
    one = torch.tensor([[0.3]])
    assert largest(score(one, "probability"), one.sigmoid()) < 1e-7
    assert largest(score(one, "log_odds"), one) < 1e-7


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
