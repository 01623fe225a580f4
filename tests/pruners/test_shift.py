"""Representation Shift as a score: a slow rewrite, what ranks, where patches leave, and that no attention is read."""

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from prunex.pruners.base import ceil_share
from prunex.removal.game import Removal
from prunex.vit import attention, forward
from prunex.vit.anatomy import read
from prunex.vit.forward import resume
from prunex.vit.recorder import Recorder
from prunex.vit.replay import Absent
from prunex.vit.tape import Fed, Tape
from tests.vit.test_cost import counted
from tests.vits import ALL_FAMILIES, images, images_for, largest, tiny

METHODS = ["topk", "evit"]
SHOWN = ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class", "avg_pool_no_class_reg", "qk_norm",
         "layer_scale", "avg_pool_prefix", "siglip"]  # fmt: skip


@torch.no_grad()
def slow(model, image, rates, fuse):
    """One image in float64, token by token, ranked after the blocks of ``rates``: logits and the positions kept."""
    prefix = model.num_prefix_tokens
    x = forward.embed(model, image[None])[0][0]
    place, scores = list(range(len(x) - prefix)), []
    for number, block in enumerate(model.blocks):
        x = x + block.ls1(block.attn(block.norm1(x[None])))[0]
        before = x
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if rates.get(number, 1) == 1:
            continue
        moved = [float((after - at).norm()) for after, at in zip(x[prefix:], before[prefix:], strict=True)]
        share = torch.tensor([m / sum(moved) for m in moved], dtype=x.dtype)
        scores.append(share)
        best = sorted(range(len(moved)), key=lambda i: (-moved[i], i))[: ceil_share(rates[number], len(moved))]
        kept, gone = sorted(best), sorted(set(range(len(moved))) - set(best))
        extra = [sum(share[i] * x[prefix + i] for i in gone)[None]] if fuse else []
        x = torch.cat([x[:prefix], x[prefix:][kept], *extra])
        place = [place[i] for i in kept] + [-1] * fuse
    x = model.norm(x)
    return model.forward_head(x[None])[0], [p for p in place if p >= 0], scores


@pytest.mark.parametrize("family", SHOWN)
@pytest.mark.parametrize("method", METHODS)
def test_a_slow_rewrite_gives_the_same(family, method):
    model = tiny(family).double()
    x = images_for(model, 3)
    reads = [slow(model, image, {1: 0.7, 2: 0.5}, int(method == "evit")) for image in x]
    with prunex.attach(model, method, score="shift", keep_ratio=[0.7, 0.5], stages=(1, 2)) as pruning, torch.no_grad():
        logits, trace = model(x), pruning.trace
    for i, (wanted, kept, scores) in enumerate(reads):
        assert largest(logits[i], wanted) < 1e-10
        assert trace.kept()[i].flatten().nonzero()[:, 0].tolist() == kept
        for stage, score in zip(trace.stages, scores, strict=True):
            assert largest(stage.score[i], score) < 1e-12


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_is_ranked_by_what_its_mlp_adds(family):
    """Between the halves of the dense block and behind it, whatever a block does in there."""
    model = tiny(family).double()
    x, prefix = images_for(model), read(model).prefix  # none in these blocks where a class token enters late
    streams = []
    with torch.no_grad():
        tape = Tape(streams=True)
        forward.run(model, x, recorder=Recorder(tape))
        fed = next(s for s in tape.steps if isinstance(s, Fed) and s.block == 1)
        wanted = fed.branch.norm(dim=-1)[:, prefix:]
        with prunex.attach(model, "topk", score="shift", keep_ratio=0.5, stages=(1,)) as pruning:
            model.blocks[1].register_forward_hook(lambda m, args, out: streams.append(out))
            model(x)
            score, kept = pruning.trace.stages[0].score, pruning.trace.kept().flatten(1)
    assert streams[0].shape[1] == prefix + wanted.shape[1]  # nobody has left inside the block
    assert largest(score, wanted / wanted.sum(1, keepdim=True)) < 1e-12
    best = score.topk(ceil_share(0.5, score.shape[1])).indices
    assert torch.equal(kept, torch.zeros_like(kept).scatter(1, best, True))


@pytest.mark.parametrize("scale", [-3.0, 0.25, 7.0])
def test_scaling_what_the_mlp_adds_scales_the_shift(scale):
    model = tiny().double()
    x, shifts = images_for(model), []
    for factor in (1.0, scale):
        with torch.no_grad():
            model.blocks[1].mlp.fc2.weight.mul_(factor)
            model.blocks[1].mlp.fc2.bias.mul_(factor)
            with prunex.attach(model, "topk", score="shift", keep_ratio=0.5, stages=(1,)) as pruning:
                real = pruning.pruner.decide

                def watch(turn, state, real=real):
                    shifts.append(state.shift)
                    return real(turn, state)

                pruning.pruner.decide = watch
                model(x)
                shifts.append(pruning.trace.kept())
    assert largest(shifts[2], abs(scale) * shifts[0]) < 1e-10
    assert torch.equal(shifts[1], shifts[3])


@pytest.mark.parametrize("method", METHODS)
def test_who_is_not_moved_goes_first(method):
    model = tiny().double()
    real = model.blocks[1].mlp.forward
    still = torch.tensor([2, 7, 9, 11])

    def forward_(x):
        return real(x).index_fill(1, still + 1, 0)

    model.blocks[1].mlp.forward = forward_
    with prunex.attach(model, method, score="shift", keep_ratio=0.75, stages=(1,)) as pruning, torch.no_grad():
        model(images_for(model))
        kept = pruning.trace.kept().flatten(1)
    assert not kept[:, still].any()
    assert kept.sum(1).tolist() == [12, 12, 12]


def test_nothing_is_moved_at_all():
    """Every score is 0: the first stay, and nothing is divided by 0."""
    model = tiny()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.zero_()
        model.blocks[1].mlp.fc2.bias.zero_()
        for method in METHODS:
            with prunex.attach(model, method, score="shift", keep_ratio=0.5, stages=(1,)) as pruning:
                assert torch.isfinite(model(images_for(model))).all()
                assert torch.equal(pruning.trace.kept().flatten(1), (torch.arange(16) < 8).expand(3, -1))
    model.train()
    with prunex.attach(model, "evit", score="shift", keep_ratio=0.5, stages=(1,)):
        model(images_for(model)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class", "siglip"])
def test_attention_stays_timm_s_own(family, monkeypatch):
    """No row of the attention is computed, and no block's attention is opened for it."""
    model = tiny(family)
    opened = []
    for name in ("rows", "rows_of_heads", "matrix", "fused", "heads"):
        real = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, real=real, name=name, **k: (opened.append(name), real(*a, **k))[1]
        )
    with torch.no_grad():
        for method in METHODS:
            with prunex.attach(model, method, score="shift", keep_ratio=0.5, stages=(1, 2)):
                opened.clear()
                model(images_for(model))
                assert opened == []
            with prunex.attach(model, method, keep_ratio=0.5, stages=(1, 2)):
                model(images_for(model))
                assert opened


def test_permuting_patches_permutes_scores():
    model = tiny("no_pos_embed").double()
    x = images_for(model)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    cut = x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)[:, :, order]  # [3, 3, 16, 8, 8]
    moved = F.fold(cut.permute(0, 1, 3, 4, 2).flatten(1, 3), (32, 32), 8, stride=8)
    with prunex.attach(model, "topk", score="shift", keep_ratio=0.5, stages=(1,)) as pruning, torch.no_grad():
        first, score = model(x), pruning.trace.stages[0].score
        assert largest(model(moved), first) < 1e-10
        assert largest(pruning.trace.stages[0].score, score[:, order]) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_stochastic_depth_does_not_rank(method):
    """An image whose MLP branch is dropped in training keeps what it would have kept."""
    model = tiny(drop_path_rate=0.9)
    x = images_for(model, 8)
    with prunex.attach(model, method, score="shift", keep_ratio=0.5, stages=(0,)) as pruning, torch.no_grad():
        model(x)
        kept = pruning.trace.kept()
        model.train()
        model.blocks[0].drop_path1.drop_prob = 0.0
        model.blocks[0].drop_path2.drop_prob = 0.9
        torch.manual_seed(0)
        model(x)
        assert torch.equal(pruning.trace.kept(), kept)


def test_gradients_reach_the_mlp_through_the_fused_token():
    model = tiny().double()
    x = images_for(model)
    weight = model.blocks[3].mlp.fc2.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with prunex.attach(model, "evit", score="shift", keep_ratio=0.5, stages=(3,)) as pruning:
        model.forward_features(x)[:, -1].square().sum().backward()
        analytic, kept, values = float((weight.grad * direction).sum()), pruning.trace.kept(), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                weight.add_(step * direction)
                values.append(float(model.forward_features(x)[:, -1].square().sum()))
                assert torch.equal(pruning.trace.kept(), kept)
    assert abs(analytic) > 1e-2
    assert analytic == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_checkpointed_blocks_rank_alike():
    model = tiny().double().train()
    x, found = images_for(model), []
    with prunex.attach(model, "evit", score="shift", keep_ratio=0.6, stages=(1, 2)):
        for recompute in (False, True):
            model.set_grad_checkpointing(recompute)
            model.zero_grad()
            model(x).square().sum().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert max(largest(found[0][n], found[1][n]) for n in found[0]) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool_no_class", "avg_pool_prefix"])
def test_costs_are_what_torch_counts_and_tokens_what_runs(family, method):
    model = tiny(family, img_size=64)
    prunex.attach(model, method, score="shift", keep_ratio=0.7, stages=(0, 2, 3))
    small, seen = prunex.slim(model), {"attn": [], "mlp": []}
    cost = prunex.cost(small)
    assert cost.macs == pytest.approx(counted(small, images(2, (64, 64))), rel=0.01)
    for block in small.blocks:
        for half, module in (("attn", block.attn.qkv), ("mlp", block.mlp)):
            module.register_forward_pre_hook(lambda _m, args, half=half: seen[half].append(args[0].shape[1]))
    small(images(1, (64, 64)))
    assert cost.tokens == seen["attn"]
    assert [b.mlp_tokens for b in cost.blocks] == seen["mlp"]


@pytest.mark.parametrize("method", METHODS)
def test_budgets(method):
    model = tiny(img_size=224)
    dense = prunex.cost(model).macs
    pruning = prunex.attach(model, method, score="shift", budget=0.7)
    assert pruning.options["score"] == "shift"
    assert prunex.cost(model).macs == pytest.approx(0.7 * dense, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"keep_ratio": [0.7, 0.5]}, {"count": "adaptive", "threshold": 0.6}])
def test_games_and_absent_patches(method, options):
    model = tiny("dinov2_reg").double()
    x = images_for(model, 2)
    coalitions = torch.rand(2, 6, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    coalitions[:, 0], coalitions[:, 1] = True, False
    with prunex.attach(model, method, score="shift", stages=(1, 2), **options) as pruning, torch.no_grad():
        values = [Removal(model, x, removal=how, output="logit")(coalitions) for how in ("drop", "mask")]
        assert largest(values[0], values[1]) < 1e-10
        assert largest(values[0][:, 0], model(x)) < 1e-10
        assert torch.isfinite(values[0]).all()
        if "count" in options:
            x, grid = forward.embed(model, x)
            present = torch.ones(2, 16, dtype=torch.bool)
            present[:, 3:8] = False
            gone = resume(model, x, grid, (Absent(present), pruning.pruner))
            hidden = resume(model, x, grid, (Absent(present, masked=True), pruning.pruner), masked=True)
            assert largest(hidden, gone) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_slim_save_and_load(method, tmp_path):
    model = tiny("siglip")
    x = images_for(model)
    pruning = prunex.attach(model, method, score="shift", keep_ratio=0.5)
    with torch.no_grad():
        wanted, small = model(x), prunex.slim(model)
        assert torch.equal(small(x), wanted)
        loaded = prunex.load(prunex.save(small, tmp_path / "slim"))
        assert torch.equal(loaded(x), wanted)
    assert prunex.attached(loaded).spec == pruning.spec
    assert pruning.spec["score"] == "shift"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiles_whole(method):
    from prunex.slim.export import Graph

    model = tiny(depth=2)
    prunex.attach(model, method, score="shift", keep_ratio=0.5)
    x = images_for(model)
    with torch.no_grad():
        wanted = model(x)
        assert largest(torch.compile(Graph(prunex.slim(model)).eval(), fullgraph=True)(x), wanted) < 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("score", ["shfit", "", None, 3, "representation_shift"])
def test_unknown_scores_end_in_one_line(method, score):
    model = tiny()
    with pytest.raises(PrunexError, match="unknown score .*attention, shift") as caught:
        prunex.attach(model, method, score=score)
    assert "\n" not in str(caught.value)
    assert prunex.attached(model) is None
    with pytest.raises(PrunexError, match="unknown option of dynamicvit"):
        prunex.attach(model, "dynamicvit", score="shift")
