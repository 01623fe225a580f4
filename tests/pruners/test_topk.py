"""Top-K: its counts, its ranking and its rule for pooled models."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import prunex
from prunex.vit.anatomy import read
from prunex.vit.forward import run
from prunex.vit.recorder import Recorder
from prunex.vit.tape import Tape
from tests.vits import ALL_FAMILIES, images_for, largest, tiny, weightless


@pytest.mark.parametrize(("rate", "counts"), [(0.7, [138, 97, 68]), (0.5, [98, 49, 25]), (1.0, [196] * 3)])
def test_counts_at_224(rate, counts):
    model = weightless(VisionTransformer, depth=12, embed_dim=48, num_heads=3)
    with prunex.attach(model, "topk", keep_ratio=rate, stages=(3, 6, 9)) as pruning:
        assert pruning.counts() == counts
        assert pruning.counts(196) == counts


def test_counts_are_what_a_forward_leaves():
    model = tiny(img_size=112, depth=4)
    for rate in (0.7, 0.5):
        with prunex.attach(model, "topk", keep_ratio=rate, stages=(1, 2, 3)) as pruning, torch.no_grad():
            features = model.forward_features(images_for(model, 1))
            kept = [int(pruning.trace.kept(s).sum()) for s in range(3)]
            assert kept == pruning.counts() == ([138, 97, 68] if rate == 0.7 else [98, 49, 25])
            assert features.shape[1] == 1 + kept[-1]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_best_attended_patches_are_kept(family):
    """Against the whole attention matrix of the dense model at the stage's block."""
    model = tiny(family)
    x = images_for(model)
    anatomy = read(model)
    with torch.no_grad():
        tape = Tape(attention=True, shares=True)
        run(model, x, recorder=Recorder(tape))
        full = tape.attended()[1].attention  # [B, H, N, N]
        if anatomy.readers:
            score = full[:, :, 0].mean(1)
        else:
            start = 0 if anatomy.pool_prefix else anatomy.prefix
            score = full[:, :, start:].mean((1, 2))
        score = score[:, anatomy.prefix :]
        with prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,)) as pruning:
            model(x)
            trace = pruning.trace
    want = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(-(-score.shape[1] // 2), 1).indices, True)
    assert torch.equal(trace.kept().flatten(1), want)
    assert largest(trace.stages[0].score, score) < 1e-6


def test_topk_is_evit_without_its_fused_token():
    model = tiny()
    x = images_for(model)
    with torch.no_grad():
        with prunex.attach(model, "topk", keep_ratio=0.6, stages=(1, 2)):
            plain = model(x)
        with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2), fuse=False):
            assert torch.equal(model(x), plain)
        with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)):
            assert largest(model(x), plain) > 1e-3


def test_topk_has_no_parameters_and_no_losses():
    model = tiny()
    before = sum(p.numel() for p in model.parameters())
    with prunex.attach(model, "topk") as pruning:
        assert sum(p.numel() for p in model.parameters()) == before
        model.train()
        model(images_for(model))
        assert pruning.losses() == {}


def test_training_drops_the_same_patches_as_inference():
    model = tiny()
    x = images_for(model)
    with prunex.attach(model, "topk", keep_ratio=0.6, stages=(1, 2)) as pruning:
        logits, kept = model(x), pruning.trace.kept()
        model.train()
        assert largest(model(x), logits) < 1e-6
        assert torch.equal(pruning.trace.kept(), kept)


def test_the_class_row_attends_at_the_old_length_and_the_mlp_at_the_new():
    model = tiny()
    lengths = {"attn": [], "mlp": []}
    for block in model.blocks:
        block.attn.proj.register_forward_hook(lambda m, args, out: lengths["attn"].append(out.shape[1]))
        block.mlp.register_forward_hook(lambda m, args, out: lengths["mlp"].append(out.shape[1]))
    with prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,)):
        for seen in lengths.values():
            seen.clear()
        model(images_for(model))
    assert lengths == {"attn": [17, 17, 9, 9], "mlp": [17, 9, 9, 9]}
