"""The removal game: what a model says with some parts there, against its own blocks and against the other routes."""

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.removal import coalitions
from prunex.removal import game as removal
from prunex.removal.game import Removal, score
from prunex.vit.embedding import embed
from tests.vits import FAMILIES, images, images_for, largest, quick, randomise, tiny

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


@pytest.mark.parametrize("family", quick(SHOWN, ["vit", "avg_pool", "dinov2_reg"]))
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


@pytest.mark.parametrize("pruner", [None, "evit"])
@pytest.mark.parametrize("selection", ["free", "frozen"])
def test_painted_patches_are_pixels_of_the_paint(pruner, selection):
    model, x = tiny().double(), images(2, dtype=torch.float64)
    if pruner:
        attach(model, pruner)
    value = Removal(model, x, removal="grey", selection=selection, output="logit", chunk=5)
    z = drawn(2, 6, 16)
    painted = x[:, None] * z.unflatten(2, (4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, None]
    with torch.no_grad():
        clean, anew = model(x), model(painted.flatten(0, 1)).unflatten(0, (2, 6))
    assert largest(value(z)[:, 1], clean) < 1e-12
    if selection == "free" or pruner is None:
        assert largest(value(z), anew) < 1e-12


def test_words_of_the_game():
    model, x = tiny(), images(2)
    for given, says in (
        ({"removal": "paint"}, "unknown removal 'paint'"),
        ({"selection": "fre"}, "unknown selection 'fre'"),
        ({"output": "odds"}, "unknown output 'odds'"),
        ({"selection": "adaptive", "removal": "mask"}, "needs removal='drop'"),
    ):
        with pytest.raises(PrunexError, match=says):
            Removal(model, x, **given)
    with pytest.raises(PrunexError, match=r"give bool \[2, M, 16\]"):
        Removal(model, x, removal="grey")(torch.ones(3, 1, 16, dtype=torch.bool))
