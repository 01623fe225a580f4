"""TokenTrace against a slow composition that carries every patch by its original number."""

import pytest
import torch

import prunex
from prunex.vit.decisions import Keep
from prunex.vit.trace import Stage, TokenTrace
from prunex.vit.turns import Turn
from tests.vits import images, largest, randomise, tiny


def slow_composition(trace, upto, image):
    """Original patches behind every token after a stage, as {patch: share} one token, and which tokens are fused."""
    tokens = [({p: 1.0}, False) for p in range(trace.grid[0] * trace.grid[1])]
    for stage in trace.stages[: upto + 1]:
        after = [({}, stage.fused and i == stage.n_out - 1) for i in range(stage.n_out)]
        for position, (members, fused) in enumerate(tokens):
            goes = int(stage.group[image, position])
            if goes >= 0:
                share = float(stage.weight[image, position])
                into, mixed = after[goes]
                into.update({p: s * share for p, s in members.items()})
                after[goes] = (into, mixed or fused)
        tokens = after
    return tokens


OPTIONS = [
    ("topk", {"keep_ratio": 0.6}),
    ("evit", {"keep_ratio": 0.6}),
    ("evit", {"keep_ratio": 0.4}),
    ("evit", {"keep_ratio": 0.6, "fuse": False}),
    ("dynamicvit", {"keep_ratio": 0.6}),
]


@pytest.fixture(params=OPTIONS, ids=lambda o: f"{o[0]}-{'-'.join(map(str, o[1].values()))}")
def pruned(request):
    method, options = request.param
    model = tiny("dinov2_reg", depth=6)
    pruning = prunex.attach(model, method, stages=(1, 2, 4), **options)
    randomise(pruning.pruner)
    return model, pruning


@pytest.mark.parametrize("mode", ["removed", "masked", "training"])
def test_kept_and_share_equal_the_slow_composition(pruned, mode):
    model, pruning = pruned
    pruning.masked = True if mode == "masked" else None
    model.train(mode == "training")
    model(images(4))
    trace = pruning.trace
    for s in range(3):
        kept, share = trace.kept(s), trace.share(s)
        assert kept.dtype == torch.bool
        assert kept.shape == share.shape == (4, 4, 4)
        for image in range(4):
            want_kept, want_share = torch.zeros(16, dtype=torch.bool), torch.zeros(16)
            for members, fused in slow_composition(trace, s, image):
                for patch, part in members.items():
                    want_share[patch] = part
                    want_kept[patch] = not fused
            assert torch.equal(kept[image].flatten(), want_kept)
            assert largest(share[image].flatten(), want_share) < 1e-6
    assert torch.equal(trace.kept(-1), trace.kept(2))
    assert torch.equal(trace.kept(-3), trace.kept(0))
    assert torch.equal(trace.depth(), sum(trace.kept(s).long() for s in range(3)))
    assert all(((trace.kept(s + 1) & ~trace.kept(s)).sum() == 0) for s in range(2))  # nothing comes back
    for s, ratio in enumerate(trace.keep_ratios()):
        assert largest(ratio, trace.kept(s).flatten(1).float().mean(1)) == 0


@pytest.mark.parametrize("mode", ["removed", "masked"])
def test_shares_of_every_token_sum_to_one(pruned, mode):
    model, pruning = pruned
    pruning.masked = True if mode == "masked" else None
    with torch.no_grad():
        model(images(4))
    for stage in pruning.trace.stages:
        for group, weight in zip(stage.group, stage.weight, strict=True):
            sums = torch.zeros(stage.n_out).index_add(0, group.clamp(min=0), weight * (group >= 0))
            there = torch.zeros(stage.n_out).index_add(0, group.clamp(min=0), (group >= 0).float()) > 0
            assert largest(sums, there.float()) < 1e-6
    if pruning.options.get("fuse", False):
        fused = pruning.trace.share(0) * ~pruning.trace.kept(0)
        assert largest(fused.flatten(1).sum(1), torch.ones(4)) < 1e-6


def test_lift_conserves_sums_and_undoes_the_stage(pruned):
    model, pruning = pruned
    with torch.no_grad():
        model(images(4))
    generator = torch.Generator().manual_seed(0)
    trace = pruning.trace
    row = torch.randn(4, 5 + trace.stages[-1].n_out, generator=generator, dtype=torch.float64)
    sums, prefix = row.sum(1), row[:, :5].clone()
    for stage in reversed(trace.stages):
        row = stage.lift(row, 5)
        assert row.shape == (4, 5 + stage.group.shape[1])
        assert largest(row.sum(1), sums) < 1e-5
        assert torch.equal(row[:, :5], prefix)
    # One token lifted to the grid lands on exactly the patches it stands for.
    for token in range(trace.stages[-1].n_out):
        row = torch.zeros(4, 5 + trace.stages[-1].n_out)
        row[:, 5 + token] = 1
        for stage in reversed(trace.stages):
            row = stage.lift(row, 5)
        for image in range(4):
            members, _ = slow_composition(trace, 2, image)[token]
            want = torch.zeros(16)
            for patch, part in members.items():
                want[patch] = part
            assert largest(row[image, 5:], want) < 1e-6


def test_kept_is_raster_order_of_the_original_grid():
    """A pruner that keeps chosen patches, stage by stage, by their numbers."""
    model = tiny("not_square")
    pruning = prunex.attach(model, "topk", keep_ratio=0.5, stages=(1, 2))
    first, second = [1, 4, 7, 10, 13, 14], [0, 3, 5]  # of 15; then positions among these
    chosen = {1: first, 2: second}
    pruning.pruner.plan = lambda: [Turn(1), Turn(2)]
    pruning.pruner.decide = lambda turn, state: Keep(torch.tensor([chosen[turn.block]] * len(state.tokens)))
    with torch.no_grad():
        model(images(2, (40, 24)))
    want = torch.zeros(15, dtype=torch.bool)
    want[first] = True
    assert torch.equal(pruning.trace.kept(0)[1], want.view(5, 3))
    want[:] = False
    want[[first[i] for i in second]] = True  # 1, 10, 14
    assert torch.equal(pruning.trace.kept(1)[0], want.view(5, 3))
    assert pruning.trace.depth()[0].flatten().tolist() == [0, 2, 0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0, 1, 2]


def test_stage_that_does_not_exist_and_traces_without_stages():
    model = tiny()
    pruning = prunex.attach(model, "topk", keep_ratio=0.5, stages=(1, 2))
    with pytest.raises(prunex.PrunexError, match="no forward has run yet"):
        _ = pruning.trace
    model(images(2))
    for stage in (2, -3, 17):
        with pytest.raises(prunex.PrunexError, match=rf"stage={stage} does not exist.*0\.\.1"):
            pruning.trace.kept(stage)
    empty = TokenTrace((2, 3), 1, 2, torch.device("cpu"))
    assert empty.kept().all()
    assert empty.kept().shape == (2, 2, 3)
    assert torch.equal(empty.share(), torch.ones(2, 2, 3))
    assert torch.equal(empty.depth(), torch.zeros(2, 2, 3, dtype=torch.long))
    assert empty.keep_ratios() == []


def test_the_trace_of_a_training_forward_holds_no_graph():
    model = tiny()
    for method in ("evit", "dynamicvit"):
        with prunex.attach(model, method, keep_ratio=0.6) as pruning:
            model.train()
            model(images(2))
            for stage in pruning.trace.stages:
                tensors = [t for t in (stage.weight, stage.score, stage.counted) if isinstance(t, torch.Tensor)]
                assert tensors
                assert not any(t.requires_grad for t in tensors)


def test_counted_says_what_later_blocks_see():
    model = tiny()
    with prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2)) as pruning:
        model(images(2))
        assert [s.counted for s in pruning.trace.stages] == pruning.counts() == [9, 6]
        pruning.masked = True
        model(images(2))
        assert [s.counted for s in pruning.trace.stages] == [9, 6]
        assert [s.n_out for s in pruning.trace.stages] == [17, 18]
    with prunex.attach(model, "dynamicvit", keep_ratio=0.5, stages=(1, 2)) as pruning:
        model.train()
        model(images(2))
        for s, stage in enumerate(pruning.trace.stages):
            assert torch.equal(stage.counted, pruning.trace.kept(s).flatten(1).sum(1))


def test_lift_leaves_removed_tokens_at_zero_even_where_weights_are_garbage():
    stage = Stage(0, torch.tensor([[0, -1, 1]]), torch.tensor([[1.0, float("nan"), 1.0]]), 2)
    assert stage.lift(torch.tensor([[5.0, 2.0, 3.0]]), 1).tolist() == [[5.0, 2.0, 0.0, 3.0]]


@pytest.mark.parametrize("mode", ["removed", "masked"])
def test_tokens_equal_the_slow_composition(pruned, mode):
    model, pruning = pruned
    pruning.masked = mode == "masked"
    model(images(4))
    trace = pruning.trace
    for s in range(3):
        tokens = trace.tokens(s)
        assert (tokens >= 0).equal(trace.kept(s).flatten(1))
        for image in range(4):
            composed = slow_composition(trace, s, image)
            for patch, token in enumerate(tokens[image].tolist()):
                if token >= 0:
                    assert composed[token] == ({patch: 1.0}, False)


def test_a_stage_that_leaves_nothing():
    """Every way through it gives zeros in front of it, and prefix tokens alone behind it."""
    for m in ((), (2,)):
        gone = torch.full((2, 3, *m), -1)
        stage = Stage(0, gone, torch.zeros(gone.shape), 0)
        row, several = torch.randn(2, 1), torch.randn(2, 4, 1)
        for carry in (stage.lift, stage.paint):
            assert carry(row, 1).equal(torch.cat([row, torch.zeros(2, 3)], 1))
            assert carry(several, 1).equal(torch.cat([several, torch.zeros(2, 4, 3)], 2))
        values, there = stage.back(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.bool))
        assert values.equal(torch.zeros(2, 3, 5))
        assert not there.any()
        assert there.shape == (2, 3)
    stage = Stage(0, torch.full((2, 3), -1), torch.zeros(2, 3), 0)
    values = torch.randn(2, 4)
    assert stage.push(values, 1).equal(values[:, :1])
    assert stage.total(values, 1).equal(values[:, :1])
