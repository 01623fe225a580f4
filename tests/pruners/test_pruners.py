"""What holds for every token pruner, over families: masked equals removed, batches equal singles, prefix is safe."""

import math

import pytest
import torch

import prunex
from prunex.pruners.base import ceil_share, check_stages, floor_share, top
from prunex.vit.decisions import Keep
from prunex.vit.state import TokenState
from tests.vits import (
    ALL_FAMILIES,
    QUICK_FAMILIES,
    assert_same_state,
    images,
    images_for,
    largest,
    quick,
    randomise,
    state_of,
    tiny,
)

PRUNERS = {
    "topk": ("topk", {}),
    "evit": ("evit", {}),
    "evit_unfused": ("evit", {"fuse": False}),
    "dynamicvit": ("dynamicvit", {}),
    "topk_shift": ("topk", {"score": "shift"}),
    "evit_shift": ("evit", {"score": "shift"}),
    "tome": ("tome", {}),
    "diffrate": ("diffrate", {}),
    "ppt": ("ppt", {"tau": 0.01}),
    "ppt_prunes": ("ppt", {"tau": 0}),
}
REMOVING = ("tome", "ppt", "ppt_prunes")  # so many tokens, not a share of them
RATED = [p for p in PRUNERS if p not in (*REMOVING, "diffrate")]  # those that keep a share, and never merge


def attach(model, pruner, keep_ratio=0.6, stages=(1, 2), **more):
    method, options = PRUNERS[pruner]
    rate = {"r": round(8 * (1 - keep_ratio))} if pruner in REMOVING else {"keep_ratio": keep_ratio}
    if pruner == "ppt" and model.global_pool != "token":
        options = {"tau": 0.002}  # the mean of many rows is flatter than one: else all images would pool
    pruning = prunex.attach(model, method, stages=stages, **rate, **options, **more)
    if pruner != "diffrate":  # predictors shall decide something; what DiffRate learns are the counts themselves
        randomise(pruning.pruner)
    return pruning


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_masked_equals_removed(family, pruner):
    model = tiny(family).double()
    x = images_for(model)
    pruning = attach(model, pruner)
    with torch.no_grad():
        removed = model(x)
        maps = [pruning.trace.kept(s) for s in range(2)] + [pruning.trace.share(s) for s in range(2)]
        pruning.masked = True
        masked = model(x)
        assert largest(masked, removed) < 1e-9
        for s in range(2):
            assert torch.equal(pruning.trace.kept(s), maps[s])
            assert largest(pruning.trace.share(s), maps[2 + s]) < 1e-9
        pruning.masked = False
        assert torch.equal(model(x), removed)
    assert not maps[1].all()


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class", "max_pool"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_masked_equals_removed_in_float32(family, pruner):
    model = tiny(family)
    x = images_for(model)
    pruning = attach(model, pruner)
    with torch.no_grad():
        removed = model(x)
        pruning.masked = True
        assert largest(model(x), removed) < 1e-5


@pytest.mark.parametrize("pruner", [p for p in PRUNERS if p not in ("dynamicvit", "diffrate")])
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool"])
def test_masked_equals_removed_in_gradients(pruner, family):
    model = tiny(family).double().train()
    x = images_for(model)
    pruning = attach(model, pruner)

    def step(masked):
        pruning.masked = masked
        model.zero_grad()
        model(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    removed, masked = step(False), step(True)
    assert removed.keys() == masked.keys()
    assert max(largest(removed[n], masked[n]) / (1 + float(removed[n].abs().max())) for n in removed) < 1e-9


@pytest.mark.parametrize("family", quick(ALL_FAMILIES, QUICK_FAMILIES))
@pytest.mark.parametrize("pruner", PRUNERS)
def test_keep_ratio_one_is_dense_in_every_mode(family, pruner):
    model = tiny(family)
    x = images_for(model)
    with torch.no_grad():
        dense = model(x)
        pruning = attach(model, pruner, keep_ratio=1.0)
        for masked in (None, True, False):
            pruning.masked = masked
            assert largest(model(x), dense) <= 1e-6
            assert pruning.trace.kept().all()
        assert pruning.counts(16) == [16, 16]
        model.train()
        pruning.masked = None
        assert largest(model(x), dense) <= 1e-6  # nothing random is in these models


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class", "qk_norm"])
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_equals_single_images(family, pruner, masked):
    model = tiny(family)
    x = images_for(model, 5)
    pruning = attach(model, pruner)
    pruning.masked = masked
    with torch.no_grad():
        together, kept, share = model(x), pruning.trace.kept(), pruning.trace.share()
        assert not torch.equal(kept[0], kept[1])  # images do decide for themselves
        for i in range(5):
            assert largest(model(x[i : i + 1])[0], together[i]) < 1e-6 * max(1, float(together.abs().max()))
            assert torch.equal(pruning.trace.kept()[0], kept[i])
            assert largest(pruning.trace.share()[0], share[i]) < 1e-6
        order = torch.tensor([3, 0, 4, 1, 2])
        assert largest(model(x[order]), together[order]) < 2e-6


@pytest.mark.parametrize("pruner", PRUNERS)
def test_one_image_cannot_poison_its_neighbours(pruner):
    model = tiny()
    x = images_for(model, 3)
    pruning = attach(model, pruner)
    for masked in (False, True):
        pruning.masked = masked
        with torch.no_grad():
            clean = model(x)
            spoiled = x.clone()
            spoiled[1] = 1e4
            assert largest(model(spoiled)[[0, 2]], clean[[0, 2]]) < 1e-6


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool"])
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("masked", [False, True])
def test_prefix_tokens_are_never_pruned(family, pruner, masked):
    """Whatever the scores: the prefix tokens before and after a stage are the same numbers in the same places."""
    model = tiny(family)
    pruning = attach(model, pruner, keep_ratio=0.01, stages=(0, 1, 3))
    pruning.masked = masked
    prefix = model.num_prefix_tokens
    seen = []
    own = pruning.pruner

    decide = own.decide

    def watch(turn, state):
        decision = decide(turn, state)
        if decision is not None:
            seen.append((state, state.tokens[:, :prefix].clone(), state.tokens.shape[1]))
        return decision

    own.decide = watch
    after = []
    apply = prunex.vit.turns.apply

    def applied(decision, *place):
        stages = apply(decision, *place)
        state = place[2]
        if decision is not None:
            after.append((state.tokens[:, :prefix].clone(), state.policy))
        return stages

    patch = pytest.MonkeyPatch()
    patch.setattr("prunex.vit.turns.apply", applied)
    try:
        with torch.no_grad():
            model(images_for(model))
    finally:
        patch.undo()
    assert len(seen) == len(after) > 0
    for (_, before, _), (tokens, policy) in zip(seen, after, strict=True):
        assert torch.equal(before, tokens)
        if masked:
            assert (policy[:, :prefix] == 1).all()
    if pruner in RATED:
        assert (pruning.trace.kept().flatten(1).sum(1) <= 1).all()  # at least one token always stays, fused or not
    assert pruning.trace.stages[0].group.shape[1] == 16  # prefix is no part of what is decided


@pytest.mark.parametrize("pruner", RATED)
def test_permuting_kept_patches_leaves_the_logits(pruner):
    model = tiny("dinov2_reg").double()
    x = images_for(model)
    pruning = attach(model, pruner, stages=(1,))
    with torch.no_grad():
        logits = model(x)
        own = pruning.pruner
        real = own.decide

        def shuffled(turn, state):
            d = real(turn, state)
            if d is None:
                return None
            order = torch.randperm(d.index.shape[1], generator=torch.Generator().manual_seed(2))
            return Keep(d.index[:, order], d.score, d.fuse)

        own.decide = shuffled
        kept = pruning.trace.kept()
        assert largest(model(x), logits) < 1e-10
        assert torch.equal(pruning.trace.kept(), kept)


@pytest.mark.parametrize("pruner", RATED)
def test_dropped_patches_matter_no_more_after_their_stage(pruner):
    """Garbage in a dropped slot (masked mode) never reaches the logits."""
    model = tiny().double()
    x = images_for(model)
    pruning = attach(model, pruner)
    pruning.masked = True
    spoil = []

    def garbage(block, args):
        (tokens,) = args
        return (tokens,)

    with torch.no_grad():
        logits = model(x)
        dropped = ~pruning.trace.kept(0).flatten(1)
        if pruner != "dynamicvit":  # their scores use the tokens of the stage's own block: spoil after it
            spoil = [3]
        else:
            spoil = [1]
        block = model.blocks[spoil[0]]
        gone = ~pruning.trace.kept(1 if spoil == [3] else 0).flatten(1)
        assert (gone & ~dropped).any() or spoil == [1]
        real = block.norm1.forward

        def poisoned(t):
            t = t.clone()
            body = t[:, 1:17]
            body[gone] = 1e3 * torch.randn(48, dtype=t.dtype)
            return real(t)

        block.norm1.forward = poisoned
        assert largest(model(x), logits) < 1e-9
        del block.norm1.forward


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("train", [False, True])
def test_detach_restores_bit_for_bit(pruner, train):
    model = tiny(drop_path_rate=0.1).train(train)
    before = state_of(model)
    x = images_for(model)
    torch.manual_seed(0)
    dense = model(x)
    pruning = attach(model, pruner)
    model(x)
    assert pruning.detach() is model
    assert pruning.detach() is model  # harmless when done already
    assert_same_state(model, before)
    torch.manual_seed(0)
    assert torch.equal(model(x), dense)
    with pytest.raises(prunex.PrunexError, match="was detached: attach again"):
        _ = pruning.trace


@pytest.mark.parametrize("pruner", PRUNERS)
def test_detach_after_an_exception_in_the_context(pruner):
    model = tiny()
    before = state_of(model)
    method, options = PRUNERS[pruner]
    with pytest.raises(ZeroDivisionError), prunex.attach(model, method, **options):  # noqa: PT012
        model(images_for(model))
        raise ZeroDivisionError
    assert_same_state(model, before)


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("where", ["block", "mlp", "head"])
@pytest.mark.parametrize("train", [False, True])
def test_detach_after_an_exception_inside_a_forward(pruner, where, train):
    model = tiny().train(train)
    before = state_of(model)
    x = images_for(model)
    dense = model(x)
    broken = {"block": model.blocks[3], "mlp": model.blocks[2].mlp, "head": model.head}[where]
    if where == "block":
        broken = broken.norm1

    def fail(*_):
        raise RuntimeError("a broken part")

    method, options = PRUNERS[pruner]
    with pytest.raises(RuntimeError, match="a broken part"), prunex.attach(model, method, **options):  # noqa: PT012
        broken.forward = fail
        try:
            model(x)
        finally:
            del broken.forward
    assert_same_state(model, before)
    assert torch.equal(model(x), dense)
    with attach(model, pruner, keep_ratio=1.0):
        assert largest(model(x), dense) <= 1e-6


@pytest.mark.parametrize("pruner", RATED)
def test_one_rate_a_stage(pruner):
    model = tiny()
    pruning = attach(model, pruner, keep_ratio=[1.0, 0.5])
    with torch.no_grad():
        model(images_for(model))
    assert pruning.trace.kept().flatten(1).sum(1).tolist() == [8, 8, 8]
    assert [s.block for s in pruning.trace.stages] == [2]  # a rate of 1 is no stage
    assert pruning.options["keep_ratio"] == [1.0, 0.5]


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("stages", [(0,), (3,), (0, 1, 2, 3)])
def test_first_and_last_blocks_may_be_stages(pruner, stages):
    model = tiny()
    pruning = attach(model, pruner, stages=stages)
    with torch.no_grad():
        removed = model(images_for(model))
        pruning.masked = True
        assert largest(model(images_for(model)), removed) < 1e-5
    assert [s.block for s in pruning.trace.stages] == list(stages)


@pytest.mark.parametrize("pruner", RATED)
def test_at_least_one_patch_is_always_kept(pruner):
    model = tiny("avg_pool_no_class")
    pruning = attach(model, pruner, keep_ratio=1e-4, stages=(1,))
    with torch.no_grad():
        logits = model(images_for(model))
    assert torch.isfinite(logits).all()
    assert pruning.trace.kept().flatten(1).sum(1).tolist() == [1, 1, 1]


def test_stages_default_to_the_quarters():
    assert check_stages(None, 12) == (3, 6, 9)
    assert check_stages(None, 24) == (6, 12, 18)
    assert check_stages(None, 4) == (1, 2, 3)
    assert check_stages(None, 1) == (0,)
    assert check_stages(2, 4) == (2,)
    for depth in range(1, 30):
        assert all(0 <= s < depth for s in check_stages(None, depth))


def test_shares_are_not_fooled_by_the_last_bit():
    assert 0.55 * 100 > 55
    assert 0.29 * 100 < 29
    assert ceil_share(0.55, 100) == 55
    assert floor_share(0.29, 100) == 29
    assert ceil_share(0.7, 196) == 138
    assert floor_share(0.7, 196) == 137
    assert ceil_share(1e-9, 5) == floor_share(1e-9, 5) == 1
    for n in range(1, 300):
        assert ceil_share(1.0, n) == floor_share(1.0, n) == n
        assert floor_share(0.7, n) in (math.floor(0.7 * n), math.floor(0.7 * n) + 1) or n == 1


def test_a_pruner_is_shown_what_is_there():
    model = tiny("dinov2_reg")
    pruning = attach(model, "evit", stages=(1, 2))
    pruning.masked = True
    shown: list[TokenState] = []
    real = pruning.pruner.decide

    def watch(turn, state):
        shown.append((state.left, state.patches.shape[1], None if state.present is None else state.present.sum(1)))
        assert largest(state.row.sum(1), torch.ones(3)) < 1e-5
        return real(turn, state)

    pruning.pruner.decide = watch
    with torch.no_grad():
        model(images_for(model))
    assert shown[0] == (16, 16, None)
    assert shown[1][:2] == (11, 17)  # 10 kept and the fused one, in 17 slots
    assert shown[1][2].tolist() == [11, 11, 11]


def test_of_equal_scores_the_first_stay():
    """Many equal scores, so that whichever a selection algorithm meets first would show."""
    score = torch.zeros(3, 1000)
    score[1, 500:] = 1
    score[2, ::2] = 1
    found = top(score, 300, None)
    assert found[0].tolist() == list(range(300))
    assert found[1].tolist() == list(range(500, 800))
    assert found[2].tolist() == list(range(0, 600, 2))
    present = torch.ones(3, 1000)
    present[:, :10] = 0
    assert top(score, 300, present)[0].tolist() == list(range(10, 310))


def test_masked_and_removed_agree_where_predictors_say_the_same_of_all():
    """New predictors tie in float32: removed and masked forwards must choose alike."""
    for seed in range(8):
        model = tiny(seed=seed)
        pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 2), teacher=False)
        x = images(4, seed=seed)
        with torch.no_grad():
            model(x)
            removed = pruning.trace.kept()
            pruning.masked = True
            model(x)
        assert pruning.trace.kept().equal(removed)
