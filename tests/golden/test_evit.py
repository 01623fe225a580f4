"""EViT with its fused token against the public code."""

import pytest
import torch

import prunex
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import largest, relative

pytestmark = present
both_seeds = pytest.mark.parametrize("seed", SEEDS)


def members_of(idx0, idx1, image, k):
    """Patches that the reference keeps as themselves after stage 1; position k there is its fused token."""
    first = idx0[image].tolist()
    return {first[i] for i in idx1[image].tolist() if i != k}


@both_seeds
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rate", "run"), [(0.7, "evit_fuse1"), (0.5, "evit_fuse1_keep05")])
def test_logits_and_kept_patches(seed, rate, run, masked):
    model, images, _ = model_and_images(seed)
    want = arrays("evit", seed)
    with prunex.attach(model, "evit", keep_ratio=rate, stages=(1, 3)) as pruning, torch.no_grad():
        pruning.masked = masked
        assert relative(model(images), want[f"{run}_logits"]) < 2e-5
        idx0, idx1 = (want[f"{run}_idx_stage{s}"].long() for s in range(2))
        k = idx0.shape[1]
        for image in range(4):
            first, second = (set(pruning.trace.kept(s)[image].flatten().nonzero()[:, 0].tolist()) for s in range(2))
            assert first == set(idx0[image].tolist())
            assert second == members_of(idx0, idx1, image, k)
        stage = pruning.trace.stages[1]
        goes = stage.group[:, (16 if masked else k)]  # where stage 0's fused token goes
        fused_again = goes == stage.n_out - 1
        assert torch.equal(~fused_again, (idx1 == k).any(1))


def test_the_fused_token_survived_in_some_image_and_not_in_others():
    """Otherwise the comparison above would be weaker than it looks."""
    found = set()
    for seed in SEEDS:
        for run, k in (("evit_fuse1", 12), ("evit_fuse1_keep05", 8)):
            found |= set((arrays("evit", seed)[f"{run}_idx_stage1"] == k).any(1).tolist())
    assert True in found


@both_seeds
def test_token_streams_after_every_block(seed):
    model, images, _ = model_and_images(seed)
    want = arrays("evit", seed)
    streams = []
    with prunex.attach(model, "evit", keep_ratio=0.7, stages=(1, 3)), torch.no_grad():
        for i in range(6):
            after = model.norm if i == 5 else model.blocks[i + 1].norm1
            after.register_forward_pre_hook(lambda m, args: streams.append(args[0]))
        model(images)
    for i in range(6):
        ours, theirs = streams[i], want[f"evit_fuse1_block{i}_out"]
        close = 2e-5 * float(theirs.abs().max())
        assert ours.shape == theirs.shape
        assert ours.shape[1] - 1 == int(want["evit_fuse1_left_tokens"][i])
        assert largest(ours[:, 0], theirs[:, 0]) < close
        if i >= 1:
            assert largest(ours[:, -1], theirs[:, -1]) < close  # the fused token is the last one in both
        distance = (ours.unsqueeze(2) - theirs.unsqueeze(1)).abs().amax(-1)
        assert float(distance.amin(2).max()) < close
        assert all(len(set(row.tolist())) == len(row) for row in distance.argmin(2))
