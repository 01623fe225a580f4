"""PPT: a slow rewrite, what prunes and what pools, what either conserves, costs, and other patches missing."""

import math

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.pruners.tome import ranks
from prunex.removal.game import Removal
from prunex.vit import forward
from prunex.vit.forward import resume
from prunex.vit.replay import Absent
from tests.pruners.test_tome import SHOWN, slow_matching
from tests.vit.test_cost import counted
from tests.vits import geometry, images, images_for, largest, tiny

MIXED = 0.01  # of 16 patches that a class token ranks: some of these models' images prune, and some pool


def significance(rows, v, sizes, prefix):
    """One image's shares S and their unbiased variance, from attention rows [H, N] and values [N, H, d]."""
    length = v.flatten(1).square().sum(1).sqrt()
    a = (rows.sum(0) * length)[prefix:]
    s = a / a.sum()
    return s, sum((float(x) - 1 / len(s)) ** 2 for x in s) / max(1, len(s) - 1)


@torch.no_grad()
def slow(model, image, rs, tau, proportional=True):
    """One image through PPT in float64, token by token: logits, groups of patches, and at each stage who did what."""
    prefix = model.num_prefix_tokens
    x = forward.embed(model, image[None])[0][0]
    size, groups, done = [1] * len(x), [[p] for p in range(len(x) - prefix)], []
    for block, r in zip(model.blocks, rs, strict=True):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        q, k = attn.q_norm(q), attn.k_norm(k)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if proportional:
            scores = scores + torch.tensor(size, dtype=x.dtype).log()
        a = scores.softmax(-1)
        x = x + block.ls1(attn.proj((a @ v).transpose(0, 1).flatten(1)))
        n = len(x) - prefix
        r = min(r, n // 2)
        if r > 0:
            first = 0 if model.pool_include_prefix else prefix
            by_size = torch.tensor(size[first:], dtype=x.dtype)
            pooled = (a[:, first:] * by_size[:, None]).sum(1) / by_size.sum()
            rows = a[:, 0] if model.global_pool in ("token", "") else pooled
            s, spread = significance(rows, v.transpose(0, 1), size, prefix)
            done.append("prune" if spread >= tau else "pool")
            if spread >= tau:
                new = [[int(i)] for i in s.sort(descending=True, stable=True).indices[: n - r]]
            else:
                new = slow_matching(k.mean(0)[prefix:], r, prefix)
            weights = [[size[prefix + i] for i in g] for g in new]
            means = [
                sum(w * x[prefix + i] for w, i in zip(ws, g, strict=True)) / sum(ws)
                for ws, g in zip(weights, new, strict=True)
            ]
            groups = [sorted(p for i in g for p in groups[i]) for g in new]
            size = size[:prefix] + [sum(ws) for ws in weights]
            x = torch.cat([x[:prefix], torch.stack(means)])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x, weight = model.norm(x), torch.tensor(size, dtype=x.dtype)
    start = 0 if model.pool_include_prefix else prefix
    body, weight = x[start:], weight[start:]
    mean = (weight[:, None] * body).sum(0) / weight.sum()
    if model.global_pool == "token":
        pooled = x[0]
    else:
        pooled = mean if model.global_pool == "avg" else 0.5 * (mean + body.amax(0))
    if hasattr(model, "head_dist"):
        return (model.head(x[0]) + model.head_dist(x[1])) / 2, groups, done
    return model.head(model.fc_norm(pooled)), groups, done


def mixed(model, x):
    """A threshold between the variances of a model's images."""
    with prunex.attach(model, "ppt", r=1, tau=1e-9, stages=(1,)) as pruning, torch.no_grad():
        model(x)
        return float(pruning.trace.stages[0].score.var(1).log().mean().exp())


def general(pruning):
    """Have it rank, decide and match also where the threshold says beforehand what all images do."""
    pruning.pruner.always_prunes = pruning.pruner.always_pools = False
    pruning.pruner.shown = ("row", "values", "keys")


def pruned_at(trace, stage):
    """Which images pruned at a stage: bool [B]."""
    return (trace.stages[stage].group < 0).any(1)


@pytest.mark.parametrize("family", SHOWN)
@pytest.mark.parametrize("proportional", [True, False])
def test_a_slow_rewrite_gives_the_same(family, proportional):
    model = tiny(family).double()
    x, did = images_for(model, 4), set()
    tau = mixed(model, x)
    options = {"r": [3, 5, 0, 1], "tau": tau, "proportional": proportional, "stages": range(4)}
    with prunex.attach(model, "ppt", **options) as pruning, torch.no_grad():
        logits, trace = model(x), pruning.trace
    groups = trace.groups().flatten(1)
    for i in range(4):
        wanted, patches, done = slow(model, x[i], options["r"], tau, proportional)
        assert largest(logits[i], wanted) < 1e-10
        assert [(groups[i] == g).nonzero()[:, 0].tolist() for g in range(len(patches))] == patches
        assert [bool(pruned_at(trace, s)[i]) for s in range(3)] == [d == "prune" for d in done]
        did |= set(done)
    assert did == {"prune", "pool"}


@pytest.mark.parametrize("family", ["vit", "layer_scale", "qk_norm", "dinov2_reg", "attn_norm"])
@pytest.mark.parametrize("r", [0, [0, 0], []])
def test_nothing_removed_is_the_dense_model(family, r):
    model = tiny(family)
    x = images_for(model)
    with torch.no_grad():
        dense = model(x)
        with prunex.attach(model, "ppt", r=r) as pruning:
            assert largest(model(x), dense) <= 1e-6
            assert pruning.trace.stages == []
            assert pruning.trace.kept().all()


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class"])
@pytest.mark.parametrize("beforehand", [True, False])
@pytest.mark.parametrize("threshold", [{"tau": 1.0}, {"tau": 2}, {"tau": 0.0, "spread": "effective"}])
def test_who_always_pools_is_tome(family, threshold, beforehand):
    model = tiny(family).double()
    x = images_for(model)
    with torch.no_grad():
        with prunex.attach(model, "tome", r=3, stages=(1, 2)) as pruning:
            wanted, groups = model(x), pruning.trace.groups()
        with prunex.attach(model, "ppt", r=3, stages=(1, 2), **threshold) as pruning:
            assert pruning.pruner.always_pools
            if not beforehand:
                general(pruning)
            assert torch.equal(model(x), wanted)
            assert torch.equal(pruning.trace.groups(), groups)


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class"])
@pytest.mark.parametrize("threshold", [{"tau": 0.0}, {"tau": 1.0, "spread": "effective"}])
def test_who_always_prunes_is_top_k_by_significance(family, threshold):
    model = tiny(family).double()
    x, scores = images_for(model), []
    with prunex.attach(model, "ppt", r=4, stages=(1, 2), **threshold) as pruning, torch.no_grad():
        assert pruning.pruner.always_prunes
        real = pruning.pruner.decide

        def watch(turn, state):
            scores.append(pruning.pruner.significance(state))
            return real(turn, state)

        pruning.pruner.decide = watch
        logits, trace = model(x), pruning.trace
        assert not trace.merges()
        best = scores[0].topk(12).indices
        assert torch.equal(trace.kept(0).flatten(1), torch.zeros(3, 16).scatter(1, best, 1) > 0)
        assert torch.equal(trace.scores(0)[0], scores[0])
        pruning.pruner.decide = real
        general(pruning)
        assert largest(model(x), logits) < 1e-12
        assert torch.equal(pruning.trace.kept(), trace.kept())
        (found, ranked), (wanted, too) = pruning.trace.scores(1), trace.scores(1)
        assert torch.equal(ranked, too)
        assert largest(found * ranked, wanted * ranked) < 1e-12


def test_scores_sum_to_one_and_order_the_kept():
    model = tiny().double()
    with prunex.attach(model, "ppt", r=4, tau=1e-9, stages=(1, 2)) as pruning, torch.no_grad():
        model(images_for(model))
        stages = pruning.trace.stages
    for stage in stages:
        assert largest(stage.score.sum(1), torch.ones(3)) < 1e-12
        assert (stage.group < 0).sum(1).tolist() == [4] * 3
        place = ranks(stage.score)
        assert torch.equal(stage.group, place.masked_fill(place >= stage.n_out, -1))


def test_the_two_spreads_are_one_quantity():
    """1 / sum S^2 = 1 / (1/n + (n - 1) V): a threshold of either has its twin, at a given number of patches."""
    model = tiny().double()
    x = images_for(model, 8)
    share = 1 / (16 * (1 / 16 + 15 * MIXED))
    decided = []
    with torch.no_grad():
        for options in ({"tau": MIXED}, {"tau": share, "spread": "effective"}):
            with prunex.attach(model, "ppt", r=4, stages=(1,), **options) as pruning:
                logits = model(x)
                decided.append(pruned_at(pruning.trace, 0))
                score = pruning.trace.stages[0].score
    assert torch.isfinite(logits).all()
    assert torch.equal(decided[0], decided[1])
    assert torch.equal(decided[0], score.var(1) >= MIXED)
    assert torch.equal(decided[0], 1 / (16 * score.square().sum(1)) <= share)
    assert len(decided[0].unique()) == 2


def test_an_effective_share_means_the_same_on_every_grid():
    """Patches cut in four: shares are a quarter, the variance a sixteenth, and the effective share what it was."""
    pruner = prunex.attach(tiny(), "ppt", spread="effective").pruner
    by_variance = prunex.attach(tiny(), "ppt", tau=0.002).pruner
    score = torch.rand(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    score = score / score.sum(1, keepdim=True)
    fine = score.repeat_interleave(4, 1) / 4
    assert torch.equal(pruner.prunes(score, 16), pruner.prunes(fine, 64))
    assert len(pruner.prunes(score, 16).unique()) == 2
    assert not torch.equal(by_variance.prunes(score, 16), by_variance.prunes(fine, 64))


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_pruning_and_pooling_conserve(family, masked, monkeypatch):
    model = tiny(family).double()
    prefix, seen, real = model.num_prefix_tokens, [], prunex.vit.turns.apply

    def watched(answer, block, when, state, entered):
        tokens, sizes = state.tokens, state.sizes
        stages = real(answer, block, when, state, entered)
        seen.append((tokens, sizes, state.tokens, state.sizes, state.policy, stages[0]))
        return stages

    monkeypatch.setattr("prunex.vit.turns.apply", watched)
    x = images_for(model, 6)
    with prunex.attach(model, "ppt", r=4, tau=mixed(model, x), stages=range(4)) as pruning, torch.no_grad():
        seen.clear()
        pruning.masked = masked
        model(x)
        trace = pruning.trace
    assert len(seen) == 4
    did = set()
    for before, old, after, sizes, policy, stage in seen:
        old = torch.ones(before.shape[:2], dtype=torch.float64) if old is None else old
        there = torch.ones_like(sizes) if policy is None else policy
        assert torch.equal(before[:, :prefix], after[:, :prefix])
        assert (sizes[:, :prefix] == 1).all()
        goes_on = torch.cat([torch.ones(6, prefix), (stage.group >= 0)], 1).double()
        assert torch.equal((sizes * there).sum(1), (old * goes_on).sum(1))  # sizes go with their tokens
        carried = ((sizes * there).unsqueeze(2) * after).sum(1)
        assert largest(carried, ((old * goes_on).unsqueeze(2) * before).sum(1)) < 1e-10
        if not masked:
            gone = (stage.group < 0).sum(1)
            did |= {"prune" if n else "pool" for n in gone.tolist()}
            parts = torch.nn.functional.one_hot(stage.group + 1, stage.n_out + 1)[:, :, 1:].sum(1)
            assert (parts >= 1).all()  # no token is made of nothing
            assert (parts.amax(1)[gone > 0] == 1).all()  # and where some are pruned, none is made of several
    assert masked or did == {"prune", "pool"}
    # Every patch is in at most one token, and in exactly one where no stage pruned.
    kept_all = (trace.groups().flatten(1) >= 0).all(1)
    pruned = torch.stack([(s.group < 0).any(1) for s in trace.stages]).any(0)
    assert masked or torch.equal(kept_all, ~pruned)
    assert trace.left().tolist() == [2] * 6
    assert [float(v[0]) for v in trace.keep_ratios()] == [0.75, 0.5, 0.25, 0.125]


def test_sizes_are_kept_where_attention_is_not_proportional():
    """A token of three patches weighs three in the next mean, in any case."""
    model = tiny().double()
    with prunex.attach(model, "ppt", r=8, tau=1, proportional=False, stages=(0, 1)) as pruning, torch.no_grad():
        tokens = model.forward_features(images_for(model))
        sizes = pruning._attached.handover.take(tokens).sizes
        counts = torch.nn.functional.one_hot(pruning.trace.groups().flatten(1), 4).sum(1)
    assert (sizes.sum(1) == 17).all()
    assert torch.equal(sizes[:, 1:], counts.double())


@pytest.mark.parametrize(
    ("name", "r", "gmacs"),
    [("small", 30, 3.58), ("small", 40, 3.25), ("small", 50, 2.94), ("small", 60, 2.72), ("tiny", 50, 0.80),
     ("base", 50, 11.26)],
)  # fmt: skip
def test_costs_are_as_published(name, r, gmacs):
    model = geometry(f"deit_{name}_patch16_224")
    pruning = prunex.attach(model, "ppt", r=r)
    assert pruning.options["stages"] == [3, 6, 9]
    if r == 50:
        assert pruning.counts() == [146, 96, 48]  # and a class token
    cost = prunex.cost(model)
    own = sum(pruning.pruner.macs(cost.tokens[b] - 1, model.embed_dim) for b in (3, 6, 9))
    assert (cost.macs - own) / 1e9 == pytest.approx(gmacs, abs=0.006)
    assert own < 0.002 * cost.macs


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class", "avg_pool_prefix"])
@pytest.mark.parametrize("tau", [0, MIXED, 1])
def test_costs_are_what_torch_counts(family, tau):
    model = tiny(family, img_size=64)
    prunex.attach(model, "ppt", r=9, tau=tau, stages=(0, 2, 3))
    small, seen = prunex.slim(model), {"attn": [], "mlp": []}
    cost = prunex.cost(small)
    assert cost.macs == pytest.approx(counted(small, images(2, (64, 64))), rel=0.01)
    for block in small.blocks:
        for half, module in (("attn", block.attn.qkv), ("mlp", block.mlp)):
            module.register_forward_pre_hook(lambda _m, args, half=half: seen[half].append(args[0].shape[1]))
    small(images(1, (64, 64)))
    assert cost.tokens == seen["attn"]
    assert [b.mlp_tokens for b in cost.blocks] == seen["mlp"]


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.6])
def test_budgets(budget):
    model = geometry("deit_small_patch16_224")
    dense = prunex.cost(model).macs
    pruning = prunex.attach(model, "ppt", budget=budget, tau=MIXED)
    assert prunex.cost(model).macs == pytest.approx(budget * dense, rel=0.01)
    options = pruning.options
    assert options["tau"] == MIXED
    pruning.detach()
    prunex.attach(model, "ppt", **options)
    assert prunex.cost(model).macs == pytest.approx(budget * dense, rel=0.01)


@pytest.mark.parametrize("tau", [0, 0.002, MIXED, 1])
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class"])
def test_absent_patches_hidden_or_gone_are_the_same(family, tau):
    """The pruner decides anew among the patches that are there: in their slots, or without the others."""
    model = tiny(family).double()
    with prunex.attach(model, "ppt", r=3, tau=tau, stages=range(4)) as pruning, torch.no_grad():
        x, grid = forward.embed(model, images_for(model, 4))
        present = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) > 0.35
        hidden = resume(model, x, grid, (Absent(present, masked=True), pruning.pruner), masked=True)
        assert len(set(present.sum(1).tolist())) > 1
        for i in range(4):
            alone = resume(model, x[i : i + 1], grid, (Absent(present[i : i + 1]), pruning.pruner))
            assert largest(hidden[i], alone[0]) < 1e-10


@pytest.mark.parametrize("tau", [0, 0.002, MIXED])
@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class", "dinov2_reg"])
def test_frozen_among_fewer_patches(family, tau):
    """Removal games: dropped and hidden patches give the same values; all of them give the clean run's."""
    model = tiny(family).double()
    x = images_for(model, 2)
    coalitions = torch.rand(2, 6, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    coalitions[:, 0], coalitions[:, 1] = True, False
    coalitions[:, 2], coalitions[0, 2, 3] = False, True
    with prunex.attach(model, "ppt", r=[3, 0, 5, 2], tau=tau, stages=range(4)), torch.no_grad():
        values = [Removal(model, x, removal=how, output="logit")(coalitions) for how in ("drop", "mask")]
        assert largest(values[0], values[1]) < 1e-10
        assert largest(values[0][:, 0], model(x)) < 1e-10
        assert torch.isfinite(values[0]).all()
        free = Removal(model, x, selection="free", output="logit")(coalitions)
        assert largest(free[:, 0], model(x)) < 1e-10


def test_garbage_in_emptied_slots_reaches_nobody():
    model = tiny().double()
    x = images_for(model, 6)
    with prunex.attach(model, "ppt", r=4, tau=MIXED, stages=(0, 1, 2)) as pruning, torch.no_grad():
        pruning.masked = True
        logits, real = model(x), model.blocks[1].norm1.forward

        def poisoned(t):
            t = t.clone()
            t[:, 1 + 12 :] = 1e3 * torch.randn(6, 4, 48, dtype=t.dtype)
            return real(t)

        model.blocks[1].norm1.forward = poisoned
        assert largest(model(x), logits) < 1e-9


def test_gradients_flow_through_means_and_kept_tokens_alone():
    model = tiny("dinov2_reg").double().train()
    x = images_for(model, 6)
    weight = model.blocks[1].attn.qkv.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with prunex.attach(model, "ppt", r=3, tau=MIXED) as pruning:
        model(x).square().sum().backward()
        analytic = float((weight.grad * direction).sum())
        trace, values = pruning.trace, []
        assert len(pruned_at(trace, 0).unique()) == 2
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                weight.add_(step * direction)
                values.append(float(model(x).square().sum()))
                assert torch.equal(pruning.trace.groups(), trace.groups())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert pruning.losses() == {}
    assert analytic == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_checkpointed_blocks_decide_alike():
    model = tiny().double().train()
    x = images_for(model, 6)
    with prunex.attach(model, "ppt", r=[3, 2, 4], tau=MIXED):
        found = []
        for recompute in (False, True):
            model.set_grad_checkpointing(recompute)
            model.zero_grad()
            model(x).square().sum().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert max(largest(found[0][n], found[1][n]) for n in found[0]) < 1e-12


def test_slim_save_and_load(tmp_path):
    model = tiny("deit_distilled")
    x = images_for(model)
    prunex.attach(model, "ppt", r=[3, 1], proportional=False, stages=(1, 2, 3))
    with torch.no_grad():
        wanted, small = model(x), prunex.slim(model)
        assert torch.equal(small(x), wanted)
        loaded = prunex.load(prunex.save(small, tmp_path / "slim"))
        assert torch.equal(loaded(x), wanted)
    assert prunex.attached(loaded).spec == prunex.attached(model).spec
    assert prunex.attached(loaded).spec == {
        "method": "ppt", "tau": 7e-5, "spread": "variance", "r": [3, 1], "proportional": False, "stages": [1, 2, 3]
    }  # fmt: skip


def test_thresholds_that_nobody_gives():
    assert prunex.attach(tiny(), "ppt").options["tau"] == 7e-5
    assert prunex.attach(tiny(), "ppt", spread="effective").options["tau"] == 0.4


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0, MIXED])
def test_compiles_whole(tau):
    from prunex.slim.export import Graph
    from tests.vits import relative

    model = tiny(depth=2)
    prunex.attach(model, "ppt", r=3, tau=tau)
    x = images_for(model)
    with torch.no_grad():
        wanted = model(x)
        assert relative(torch.compile(Graph(prunex.slim(model)).eval(), fullgraph=True)(x), wanted) < 1e-5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep_ratio": 0.7}, "unknown option of ppt"),
        ({"inflect": 0.5}, "unknown option of ppt"),
        ({"r": -1}, "r=-1 is not allowed"),
        ({"r": 2.5}, "r=2.5 is not allowed"),
        ({"r": [1, 2, 3, 4]}, "has 4 values for 3 stages"),
        ({"tau": -1e-5}, "tau=-1e-05 is not allowed: give a number of at least 0"),
        ({"tau": "7e-5"}, "tau='7e-5' is not allowed"),
        ({"tau": True}, "tau=True is not allowed"),
        ({"tau": float("nan")}, "tau=nan is not allowed"),
        ({"tau": float("inf")}, "tau=inf is not allowed"),
        ({"tau": 1.5, "spread": "effective"}, r"tau=1.5 is not allowed: give a number in \[0, 1\]"),
        ({"spread": "varianc"}, "unknown spread 'varianc': did you mean 'variance'"),
        ({"spread": None}, "unknown spread None"),
        ({"proportional": 1}, "proportional=1"),
        ({"stages": (4,)}, "goes beyond the model's 4 blocks"),
        ({"budget": 0.7, "r": 3}, "both say how much is kept"),
    ],
)
def test_bad_options_end_in_one_line(options, match):
    model = tiny()
    with pytest.raises(PrunexError, match=match) as caught:
        prunex.attach(model, "ppt", **options)
    assert "\n" not in str(caught.value)
    assert prunex.attached(model) is None
