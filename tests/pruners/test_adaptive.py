"""Counts that differ between images: the laws of every pruner, the rules, expected counts, and fixed copies."""

import copy
import importlib
import json
import warnings

import pytest
import torch

import prunex
from prunex.pruners.adaptive import above, reaching
from tests.vits import assert_same_state, images_for, largest, randomise, state_of, tiny

export = importlib.import_module("prunex.slim.export")  # the package also has a function of this name

PRUNERS = {
    "topk": ("topk", {"count": "adaptive", "threshold": 0.7}),
    "evit": ("evit", {"count": "adaptive", "threshold": 0.7}),
    "evit_unfused": ("evit", {"count": "adaptive", "threshold": 0.7, "fuse": False}),
    "topk_shift": ("topk", {"count": "adaptive", "threshold": 0.7, "score": "shift"}),
    "evit_shift": ("evit", {"count": "adaptive", "threshold": 0.7, "score": "shift"}),
    "dynamicvit": ("dynamicvit", {"count": "adaptive"}),
    "ia_red2": ("ia_red2", {"threshold": 0.48}),
}
SHOWN = ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class", "max_pool"]


def attach(model, pruner, keep_ratio=0.6, stages=(1, 2), **more):
    method, options = PRUNERS[pruner]
    pruning = prunex.attach(model, method, keep_ratio=keep_ratio, stages=stages, **(options | more))
    randomise(pruning.pruner)
    return pruning


@pytest.mark.parametrize("family", SHOWN)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_masked_equals_removed_equals_alone(family, pruner):
    if pruner == "ia_red2" and family == "avg_pool_no_class":
        pytest.skip("needs a class token")
    model = tiny(family).double()
    x = images_for(model, 4)
    pruning = attach(model, pruner)
    with torch.no_grad():
        removed, trace = model(x), pruning.trace
        pruning.masked = True
        assert largest(model(x), removed) < 1e-11
        for s in range(2):
            assert torch.equal(pruning.trace.kept(s), trace.kept(s))
            assert largest(pruning.trace.share(s), trace.share(s)) < 1e-11
        pruning.masked = None
        for i in range(4):
            assert largest(model(x[i : i + 1])[0], removed[i]) < 1e-11
            assert torch.equal(pruning.trace.kept()[0], trace.kept()[i])
    counts = trace.stages[-1].counted
    assert counts.shape == (4,)
    assert not trace.kept().all()


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_batch_of_very_different_images_equals_singles_in_single_precision(pruner):
    model = tiny(img_size=64)
    x = images_for(model, 6) * torch.tensor([0.05, 0.5, 1, 2, 5, 20])[:, None, None, None]
    pruning = attach(model, pruner, stages=(0, 1, 2), threshold=0.5 if pruner in ("dynamicvit", "ia_red2") else 0.9)
    with torch.no_grad():
        together, kept = model(x), pruning.trace.kept()
        for i in range(6):
            assert largest(model(x[i : i + 1])[0], together[i]) < 2e-6 * max(1, float(together.abs().max()))
            assert torch.equal(pruning.trace.kept()[0], kept[i])
        spoiled = x.clone()
        spoiled[2] = 1e4
        others = [0, 1, 3, 4, 5]
        assert largest(model(spoiled)[others], together[others]) < 2e-6 * max(1, float(together.abs().max()))
    assert len(set(kept.flatten(1).sum(1).tolist())) > 1


@pytest.mark.parametrize("pruner", ["dynamicvit", "ia_red2"])
def test_an_image_may_lose_every_patch(pruner):
    model = tiny()
    x = images_for(model, 5)
    pruning = attach(model, pruner)
    with torch.no_grad():
        model(x)
        score = pruning.trace.stages[0].score
        best = (score.exp() if pruner == "dynamicvit" else score).amax(1)
        pruning.pruner.threshold = float(best.sort().values[2])  # three images fail, two do not
        together = model(x)
        counts = pruning.trace.kept(0).flatten(1).sum(1)
        assert (counts == 0).sum() == 3
        assert torch.isfinite(together).all()
        for i in range(5):
            assert largest(model(x[i : i + 1])[0], together[i]) < 1e-6
        pruning.masked = True
        assert largest(model(x), together) < 1e-6


@pytest.mark.parametrize("pruner", ["topk", "evit", "topk_shift", "dynamicvit"])
def test_a_head_that_only_pools_patches_keeps_one(pruner):
    model = tiny("avg_pool_no_class")
    pruning = attach(model, pruner, threshold=1.0 if pruner == "dynamicvit" else 0.0)
    with torch.no_grad():
        assert torch.isfinite(model(images_for(model))).all()
    counts = pruning.trace.kept(0).flatten(1).sum(1)
    assert counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", ["vit", "dinov2_reg"])
def test_keep_ratio_one_is_dense(family, pruner):
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


@pytest.mark.parametrize("pruner", PRUNERS)
def test_training_and_detaching(pruner):
    model = tiny().train()
    before = state_of(model)
    pruning = attach(model, pruner)
    loss = model(images_for(model)).square().sum() + sum(pruning.losses().values())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    pruning.detach()
    assert_same_state(model, before)


@pytest.mark.parametrize("masked", [None, True])
@pytest.mark.parametrize("pruner", ["topk", "evit", "topk_shift", "evit_shift"])
def test_training_keeps_what_inference_keeps(pruner, masked):
    model = tiny()
    x = images_for(model)
    pruning = attach(model, pruner)
    with torch.no_grad():
        logits, kept = model(x), pruning.trace.kept()
        model.train()
        pruning.masked = masked
        assert largest(model(x), logits) < 1e-5
    assert torch.equal(pruning.trace.kept(), kept)


def test_reaching_is_the_smallest_set():
    score = torch.rand(200, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    present = (torch.rand(200, 7, generator=torch.Generator().manual_seed(1)) > 0.3).double()
    for mass in (0.0, 0.3, 0.9, 1.0):
        kept = reaching(score, mass, present)
        assert not (kept & (present == 0)).any()
        for s, there, own in zip(score, present > 0, kept, strict=True):
            if not there.any():
                assert not own.any()
                continue
            ranked = s[there].sort(descending=True).values
            least = next(n for n in range(1, len(ranked) + 1) if ranked[:n].sum() >= mass * ranked.sum() - 1e-12)
            assert int(own.sum()) == least
            assert s[own].min() >= s[there & ~own].max() if (there & ~own).any() else True
    assert reaching(torch.zeros(1, 4), 0.5, None).sum() == 1
    assert reaching(score, 0.5, None).equal(reaching(score, 0.5, torch.ones_like(score)))


def test_above_is_strict_and_rescues_the_best():
    score = torch.tensor([[0.5, 0.6, 0.2], [0.1, 0.3, 0.4]])
    assert above(score, 0.5, None).tolist() == [[False, True, False], [False] * 3]
    assert above(score, 0.5, None, least=1).tolist() == [[False, True, False], [False, False, True]]
    present = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    assert above(score, 0.15, present, least=1).tolist() == [[True, False, True], [False, True, False]]
    assert not above(score, 0.5, torch.zeros(2, 3), least=1).any()


@pytest.mark.parametrize("pruner", ["topk", "topk_shift"])
def test_topk_keeps_the_mass_it_says(pruner):
    model = tiny()
    pruning = attach(model, pruner, stages=(1,))
    with torch.no_grad():
        model(images_for(model))
    score = pruning.trace.stages[0].score
    share = (score * pruning.trace.kept().flatten(1)).sum(1) / score.sum(1)
    smallest = score.masked_fill(~pruning.trace.kept().flatten(1), 9).amin(1) / score.sum(1)
    assert (share >= 0.7 - 1e-6).all()
    assert (share - smallest < 0.7).all()


def test_dynamicvit_keeps_what_is_likely_and_trains_on_the_batch_mean():
    model = tiny()
    pruning = attach(model, "dynamicvit", threshold=0.52, teacher=False)
    with torch.no_grad():
        model(images_for(model))
    assert pruning.trace.kept(0).flatten(1).equal(pruning.trace.stages[0].score.exp() > 0.52)
    model.train()
    model(images_for(model))
    masks = pruning._attached.steps.take()[-1].masks
    wanted = 2 * sum((m.mean() - t) ** 2 for m, t in zip(masks, (0.6, 0.36), strict=True)) / 2
    assert largest(pruning.losses()["ratio"], wanted) < 1e-6


def test_the_mass_of_evit_falls_with_its_schedule():
    model = tiny()
    pruning = attach(model, "evit", shrink_start=0.2, shrink_length=0.6)
    kept = []
    for progress in (0.1, 0.5, 1.0):
        pruning.progress = progress
        with torch.no_grad():
            model(images_for(model))
        kept.append(float(pruning.trace.kept().float().mean()))
    assert kept[0] == 1 > kept[1] > kept[2]
    pruning.progress = 0.5
    small = prunex.slim(model)
    with torch.no_grad():
        assert torch.equal(small(images_for(model)), model(images_for(model)))
    assert prunex.attached(small).options["threshold"] == pytest.approx(0.85)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_expected_counts_are_those_of_keep_ratio_until_measured(pruner):
    model = tiny()
    pruning = attach(model, pruner)
    fixed = attach(tiny(), pruner, count="fixed")
    assert pruning.counts() == fixed.counts()
    with torch.no_grad():
        last = pruning._attached.trace
        shares = pruning.calibrate([images_for(model, 4), images_for(model, 2, seed=2)])
        assert pruning._attached.trace is last
        model(torch.cat([images_for(model, 4), images_for(model, 2, seed=2)]))
    assert shares == pytest.approx([float(r.mean()) for r in pruning.trace.keep_ratios()], abs=1e-6)
    assert pruning.counts() == [round(s * 16) + (pruner in ("evit", "evit_shift")) for s in shares]
    assert prunex.cost(model).tokens[3] == 1 + pruning.counts()[1]
    if pruner not in ("evit", "evit_shift"):  # among the tokens it keeps is an earlier fused one
        assert fixed.calibrate(images_for(model)) == [n / 16 for n in fixed.counts()]
    assert fixed.options["expected"] is None
    with pytest.raises(prunex.PrunexError, match="calibration got no images"):
        pruning.calibrate([])


@pytest.mark.parametrize("pruner", PRUNERS)
def test_save_and_load(pruner, tmp_path):
    model = tiny()
    x = images_for(model, 4)
    pruning = attach(model, pruner)
    pruning.calibrate(x)
    small = prunex.slim(model)
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(small(x), logits)
        loaded = prunex.load(prunex.save(small, tmp_path / "slim"))
        assert torch.equal(loaded(x), logits)
        assert torch.equal(copy.deepcopy(loaded)(x), logits)
    assert prunex.attached(loaded).options["expected"] == pruning.options["expected"]
    assert prunex.attached(loaded).counts() == pruning.counts()


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_what_is_exported_keeps_the_expected_counts_and_says_so(pruner, measured, tmp_path):
    model = tiny()
    pruning = attach(model, pruner)
    if measured:
        pruning.calibrate(images_for(model, 8))
    small, counts = prunex.slim(model), pruning.counts()
    how = "the mean that was measured" if measured else "as keep_ratio says"
    with pytest.warns(UserWarning, match=rf"model.pt2 keeps \[\d+, \d+\] patch tokens of every image \({how}"):
        export._fix_counts(small, tmp_path / "model.pt2")
    with torch.no_grad():
        small(images_for(model))
    assert [s.n_out for s in prunex.attached(small).trace.stages] == prunex.attached(small).counts()
    assert prunex.attached(small).counts() == pytest.approx(counts, abs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export._fix_counts(small, tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("measured", [False, True])
def test_a_graph_has_the_expected_counts_and_says_so(measured, tmp_path):
    model = tiny(depth=2, embed_dim=24)
    pruning = attach(model, "ia_red2", stages=(1,), threshold=0.5)
    if measured:
        pruning.calibrate(images_for(model, 8))
    counts = pruning.counts()
    with pytest.warns(UserWarning, match=r"model.pt2 keeps \[\d+\] patch tokens of every image"):
        path = prunex.export(model, tmp_path / "model.pt2", kept=True)
    extra = {"prunex.json": ""}
    program = torch.export.load(path, extra_files=extra)
    told = json.loads(extra["prunex.json"])["pruning"]
    assert told["count"] == "fixed"
    assert prunex.attached(model).options["count"] == "adaptive"
    x = images_for(model, 5)
    logits, kept = program.module()(x)
    assert kept.flatten(1).sum(1).tolist() == counts * 5
    other = copy.deepcopy(model)
    prunex.attached(other).pruner.fix()
    with torch.no_grad():
        assert largest(other(x), logits) < 1e-5


@pytest.mark.parametrize("pruner", PRUNERS)
def test_fixed_copies_keep_what_was_measured(pruner):
    model = tiny(img_size=64)
    pruning = attach(model, pruner)
    pruning.calibrate(images_for(model, 8))
    wanted = pruning.counts()
    pruning.pruner.fix()
    assert pruning.counts() == pytest.approx(wanted, abs=1)
    with torch.no_grad():
        model(images_for(model))
    assert [s.n_out for s in pruning.trace.stages] == pruning.counts()
    assert prunex.attach(tiny(img_size=64), **pruning.spec).counts() == pruning.counts()


@pytest.mark.parametrize("method", ["topk", "evit", "dynamicvit"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": "adaptiv"}, "unknown count 'adaptiv': did you mean 'adaptive'"),
        ({"count": 3}, "unknown count"),
        ({"threshold": -0.1}, "threshold=-0.1 is not allowed: give a number in"),
        ({"threshold": "0.5"}, "threshold='0.5'"),
        ({"expected": [0.5, 0.6, 0.4]}, "none above the one before"),
        ({"expected": [0.5]}, "one share in"),
        ({"expected": "abc"}, "expected='abc'"),
        ({"expected": [0.5, 0.4, -1]}, "expected="),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(prunex.PrunexError, match=message):
        prunex.attach(tiny(), method, **options)
