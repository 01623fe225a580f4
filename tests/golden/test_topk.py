"""Top-K against the public EViT code without its fused token."""

import pytest
import torch

import prunex
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import largest, relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


@pytest.mark.parametrize("method", ["topk", "evit"])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_and_kept_patches(seed, method, masked):
    model, images, _ = model_and_images(seed)
    want = arrays("evit", seed)
    options = {"fuse": False} if method == "evit" else {}
    with prunex.attach(model, method, keep_ratio=0.7, stages=(1, 3), **options) as pruning, torch.no_grad():
        pruning.masked = masked
        assert relative(model(images), want["evit_fuse0_logits"]) < 2e-5
        theirs = torch.arange(16).expand(4, -1)  # original numbers of the current patches: theirs come best first
        for s in range(2):
            real = theirs.gather(1, want[f"evit_fuse0_idx_stage{s}"].long())
            assert torch.equal(real, want[f"evit_fuse0_realidx_stage{s}"].long())
            kept = pruning.trace.kept(s).flatten(1).nonzero()[:, 1].view(4, -1)
            assert torch.equal(kept, real.sort(1).values)
            if not masked:  # and the ranking is the same, place by place; ours come in raster order
                score = pruning.trace.stages[s].score
                ranked = theirs.sort(1).values.gather(1, score.topk(real.shape[1], 1).indices)
                assert torch.equal(ranked, real)
            theirs = real


def test_half_of_the_patches(seed):
    model, images, _ = model_and_images(seed)
    want = arrays("evit", seed)
    with prunex.attach(model, "topk", keep_ratio=0.5, stages=(1, 3)) as pruning, torch.no_grad():
        assert relative(model(images), want["evit_fuse0_keep05_logits"]) < 2e-5
        first = want["evit_fuse0_keep05_idx_stage0"].long()
        second = first.gather(1, want["evit_fuse0_keep05_idx_stage1"].long())
        for s, real in enumerate((first, second)):
            kept = pruning.trace.kept(s).flatten(1).nonzero()[:, 1].view(4, -1)
            assert torch.equal(kept, real.sort(1).values)


def test_token_streams_after_every_block(seed):
    model, images, _ = model_and_images(seed)
    want = arrays("evit", seed)
    streams = []
    with prunex.attach(model, "topk", keep_ratio=0.7, stages=(1, 3)), torch.no_grad():
        for i in range(6):  # the stream after block i enters block i + 1 (or the last norm)
            after = model.norm if i == 5 else model.blocks[i + 1].norm1
            after.register_forward_pre_hook(lambda m, args: streams.append(args[0]))
        model(images)
    for i in range(6):
        ours, theirs = streams[i], want[f"evit_fuse0_block{i}_out"]
        assert ours.shape == theirs.shape
        assert ours.shape[1] - 1 == int(want["evit_fuse0_left_tokens"][i])
        assert largest(ours[:, 0], theirs[:, 0]) < 2e-5 * float(theirs.abs().max())
        assert _as_sets(ours, theirs) < 2e-5 * float(theirs.abs().max())


def _as_sets(a, b):
    """Largest difference between two token streams whose tokens come in different orders."""
    distance = (a.unsqueeze(2) - b.unsqueeze(1)).abs().amax(-1)
    assert all(len(set(row.tolist())) == len(row) for row in distance.argmin(2))
    return float(distance.amin(2).max())
