"""PPT against the authors' code: logits, decisions, scores, streams, sizes and sources, pruned, pooled and mixed."""

import pytest
import torch

import prunex
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = present
both_seeds = pytest.mark.parametrize("seed", SEEDS)
CASES = ["prune", "pool", "mixed"]
STAGES = (1, 3, 4)


def options(case, want, proportional=True):
    tau = {"prune": 0.0, "pool": 1.0, "mixed": float(want["ppt_mixed_threshold"])}[case]
    return {"r": 4, "tau": tau, "proportional": proportional, "stages": STAGES}


def general(pruning):
    """Have it rank, decide and match also where the threshold says beforehand what all images do."""
    pruning.pruner.always_prunes = pruning.pruner.always_pools = False
    pruning.pruner.shown = ("row", "values", "keys")


def watch(pruning, look):
    """Call ``look`` with the state of every decision, before it is made."""
    real = pruning.pruner.decide

    def decide(turn, state):
        look(state)
        return real(turn, state)

    pruning.pruner.decide = decide


def sizes_begin_again(state):
    """Their code without proportional attention counts each token as one patch again at every stage; ours does not."""
    state.sizes = None


@both_seeds
@pytest.mark.parametrize("decided", ["beforehand", "by image"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_decisions(seed, case, proportional, masked, decided):
    want, run = arrays("ppt", seed), f"ppt_{case}_prop{int(proportional)}"
    for dtype, tolerance, stored in ((torch.float32, 1e-5, ""), (torch.float64, 1e-6, "__dbl")):
        model, images, _ = model_and_images(seed, dtype)
        with prunex.attach(model, "ppt", **options(case, want, proportional)) as pruning, torch.no_grad():
            pruning.masked = masked
            if decided == "by image":
                general(pruning)
            if not proportional:
                watch(pruning, sizes_begin_again)
            assert relative(model(images), want[f"{run}_logits{stored}"]) < tolerance
            trace = pruning.trace
        assert [s.block for s in trace.stages] == list(STAGES)
        # Masked, pruned slots stay, and are no tokens any more.
        left = [(trace.groups(k).flatten(1) < 0).sum(1) for k in range(3)]
        pruned = torch.stack([left[0], left[1] - left[0], left[2] - left[1]]) > 0
        wanted = torch.stack([want[f"{run}_site{k}_pruned"] for k in range(3)])
        assert torch.equal(pruned.long(), wanted.long())


@both_seeds
def test_images_of_one_batch_decide_differently(seed):
    """Otherwise the comparison above would be weaker than it looks."""
    want = arrays("ppt", seed)
    both = [k for k in range(3) if len(want[f"ppt_mixed_prop1_site{k}_pruned"].unique()) == 2]
    assert len(both) == int(want["ppt_mixed_sites_with_both"]) > 0


@both_seeds
@pytest.mark.parametrize("case", CASES)
def test_scores_and_variances(seed, case):
    want, run = arrays("ppt", seed), f"ppt_{case}_prop1"
    model, images, _ = model_and_images(seed, torch.float64)
    scores = []
    with prunex.attach(model, "ppt", **options(case, want)) as pruning, torch.no_grad():
        general(pruning)
        watch(pruning, lambda state: scores.append(pruning.pruner.significance(state)))
        model(images)
        traced = [s.score for s in pruning.trace.stages]
    for k, score in enumerate(scores):
        assert torch.equal(score, traced[k])
        assert relative(score, want[f"{run}_site{k}_scores"]) < 1e-5
        assert relative(score.var(1), want[f"{run}_site{k}_var"]) < 1e-5


@both_seeds
def test_scores_of_the_dense_model(seed):
    """Of every block, from a pruner that is asked everywhere and removes nothing."""
    want = arrays("ppt", seed)
    model, images, _ = model_and_images(seed, torch.float64)
    with prunex.attach(model, "ppt", r=1, stages=range(6)) as pruning, torch.no_grad():
        scores = []
        pruning.pruner.decide = lambda turn, state: scores.append(pruning.pruner.significance(state))
        model(images)
    found = torch.stack(scores, 1)
    assert relative(found, want["ppt_dense_scores"]) < 1e-5
    assert relative(found.var(2), want["ppt_dense_var"]) < 1e-5


@both_seeds
@pytest.mark.parametrize("case", CASES)
def test_token_streams_sizes_and_sources(seed, case):
    want, run = arrays("ppt", seed), f"ppt_{case}_prop1"
    model, images, _ = model_and_images(seed, torch.float64)
    streams, sizes = [], []
    with prunex.attach(model, "ppt", **options(case, want)) as pruning, torch.no_grad():
        general(pruning)
        for i in range(6):
            after = model.norm if i == 5 else model.blocks[i + 1].norm1
            after.register_forward_pre_hook(lambda m, args: streams.append(args[0]))
        watch(pruning, lambda state: sizes.append(state.sizes))
        sizes.append(pruning._attached.handover.take(model.forward_features(images)).sizes)
        groups = pruning.trace.groups().flatten(1)
    assert [s.shape[1] for s in streams] == want[f"{run}_tokens_per_block"].long().tolist()
    assert sizes[0] is None
    for k, block in enumerate(STAGES):
        assert relative(streams[block], want[f"{run}_site{k}_out"]) < 1e-5  # the order of tokens too
        assert torch.equal(sizes[k + 1].float(), want[f"{run}_site{k}_size"])
    source = want[f"{run}_source"]  # [B, 5, 17] of 0 and 1, class token first
    ours = torch.nn.functional.one_hot(groups + 1, 5)[:, :, 1:].transpose(1, 2)
    assert torch.equal(ours.float(), source[:, 1:, 1:])


@both_seeds
@pytest.mark.parametrize(
    ("run", "given"), [("every_mixed", {"r": 5, "stages": range(6)}), ("listr", {"r": [6, 2], "stages": (1, 4)})]
)
def test_other_schedules(seed, run, given):
    want = arrays("ppt", seed)
    model, images, _ = model_and_images(seed)
    tau = float(want["ppt_mixed_threshold"])
    lengths = []
    with prunex.attach(model, "ppt", tau=tau, **given) as pruning, torch.no_grad():
        for block in model.blocks:
            block.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
        assert relative(model(images), want[f"ppt_{run}_logits"]) < 1e-5
        assert lengths == want[f"ppt_{run}_tokens_per_block"].long().tolist()
        assert pruning.counts() == [lengths[b] - 1 for b in pruning.pruner.stages]
