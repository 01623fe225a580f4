"""EViT: counts, schedule, the fused token and its gradient."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import prunex
from prunex.vit.forward import run
from prunex.vit.recorder import Recorder
from prunex.vit.tape import Tape
from tests.vits import images_for, largest, tiny, weightless


@pytest.mark.parametrize(
    ("rate", "fuse", "kept"),
    [
        (0.7, True, [138, 98, 70]),
        (0.7, False, [138, 97, 68]),
        (0.5, True, [98, 50, 26]),
        (0.5, False, [98, 49, 25]),
    ],
)
def test_counts_at_224(rate, fuse, kept):
    model = weightless(VisionTransformer, depth=12, embed_dim=48, num_heads=3)
    with prunex.attach(model, "evit", keep_ratio=rate, stages=(3, 6, 9), fuse=fuse) as pruning:
        assert pruning.counts() == [k + fuse for k in kept]
    model = tiny(img_size=112)
    with prunex.attach(model, "evit", keep_ratio=rate, stages=(1, 2, 3), fuse=fuse) as pruning, torch.no_grad():
        model(images_for(model, 1))
        assert [s.n_out for s in pruning.trace.stages] == [k + fuse for k in kept]
        # The fused token of an earlier stage may be among the k kept ones: then one patch fewer continues as itself.
        own = [int(pruning.trace.kept(s).sum()) for s in range(3)]
        assert own[0] == kept[0]
        assert all(o in (k, k - 1) for o, k in zip(own, kept, strict=True))


def test_the_fused_token_is_the_attention_weighted_sum_of_the_dropped():
    model = tiny("dinov2_reg").double()
    x = images_for(model)
    with torch.no_grad():
        dense = Tape(attention=True, streams=True)
        run(model, x, recorder=Recorder(dense))
        a = dense.attended()[1].attention[:, :, 0, 5:].mean(1)  # class row over the patches
        between = next(s for s in dense.steps if getattr(s, "block", None) == 1 and hasattr(s, "branch")).before
        body = between[:, 5:]
        with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1,)) as pruning:
            shortened = []
            model.blocks[1].norm2.register_forward_pre_hook(lambda m, args: shortened.append(args[0]))
            model(x)
            kept = pruning.trace.kept().flatten(1)
            share = pruning.trace.share().flatten(1)
    tokens = shortened[0]
    assert tokens.shape[1] == 5 + 10 + 1
    fused = tokens[:, -1]
    weighted = a.unsqueeze(-1) * body
    assert largest(fused, (weighted * ~kept.unsqueeze(-1)).sum(1)) < 1e-12  # not divided by the weights' sum
    # The identity: kept ones weighted by their attention, plus the fused token, is the sum over all patches.
    own = torch.stack([a[i][kept[i]] for i in range(3)])
    assert largest((own.unsqueeze(-1) * tokens[:, 5:-1]).sum(1) + fused, weighted.sum(1)) < 1e-12
    # The trace says the same, as shares of 1.
    dropped = a * ~kept
    assert largest(share, torch.where(kept, 1.0, dropped / dropped.sum(1, keepdim=True))) < 1e-6
    assert largest(tokens[:, :5], between[:, :5]) < 1e-12


def test_the_fused_token_competes_at_the_next_stage():
    outcomes = set()
    for seed in range(8):
        model = tiny(seed=seed)
        with prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2)) as pruning, torch.no_grad():
            model(images_for(model, 8))
            first, second = pruning.trace.stages
            goes = second.group[:, first.n_out - 1]  # where the fused token of stage 0 goes at stage 1
            outcomes |= set((goes == second.n_out - 1).tolist())
            for image, survived in enumerate(goes < second.n_out - 1):
                kept = int(pruning.trace.kept(1)[image].sum())
                assert kept == (4 if survived else 5)
                members = pruning.trace.share(1)[image] * ~pruning.trace.kept(1)[image]
                # Its patches stay together: as one token of their own, or inside the next fused token.
                assert float(members.sum()) == pytest.approx(2 if survived else 1, abs=1e-5)
    assert outcomes == {True, False}


def test_gradients_reach_queries_and_keys_through_the_fused_token():
    model = tiny().double()
    x = images_for(model)
    weight = model.blocks[3].attn.qkv.weight
    direction = torch.zeros_like(weight)  # queries and keys only
    direction[:96] = torch.randn(96, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with prunex.attach(model, "evit", keep_ratio=0.5, stages=(3,)) as pruning:
        model.forward_features(x)[:, -1].square().sum().backward()
        analytic = float((weight.grad * direction).sum())
        kept = pruning.trace.kept()
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                weight.add_(step * direction)
                values.append(float(model.forward_features(x)[:, -1].square().sum()))
                assert torch.equal(pruning.trace.kept(), kept)
    assert abs(analytic) > 1e-2
    assert analytic == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_schedule_values_of_the_paper_s_code():
    """Base 0.7, 10 epochs dense, 100 epochs of ramp: epoch 30 0.971 (191 tokens), 60 0.85 (167), 85 0.744 (146)."""
    total = 150
    model = tiny(img_size=112)
    pruning = prunex.attach(
        model, "evit", keep_ratio=0.7, stages=(1,), shrink_start=10 / total, shrink_length=100 / total
    )
    rate = pruning.pruner.rate
    for epoch, value, tokens in ((30, 0.971, 191), (60, 0.85, 167), (85, 0.744, 146), (109, 0.700, 138)):
        pruning.progress = epoch / total
        assert rate(0) == pytest.approx(value, abs=1e-3)
        assert pruning.counts()[0] == tokens + 1
        with torch.no_grad():
            model(images_for(model, 1))
        assert int(pruning.trace.kept().sum()) == tokens
    for epoch in (0, 3, 9.99):
        pruning.progress = epoch / total
        assert rate(0) == 1.0
        assert pruning.counts() == [196]
    for epoch in (110, 111, 150):
        pruning.progress = epoch / total
        assert rate(0) == 0.7
    pruning.progress = 60 / total
    assert rate(0) == pytest.approx(0.7 + 0.3 * (math.cos(math.pi * 0.5) + 1) / 2)


def test_schedule_falls_and_is_dense_at_first():
    model = tiny()
    x = images_for(model)
    dense = model(x)
    with prunex.attach(
        model, "evit", keep_ratio=[0.7, 0.5], stages=(1, 2), shrink_start=0.2, shrink_length=0.5
    ) as pruning:
        pruning.progress = 0.1
        assert largest(model(x), dense) <= 1e-6
        assert pruning.trace.stages == []
        rates = []
        for step in range(101):
            pruning.progress = step / 100
            rates.append([pruning.pruner.rate(s) for s in range(2)])
        for s, base in enumerate((0.7, 0.5)):
            column = [r[s] for r in rates]
            assert column[:20] == [1.0] * 20
            assert column[71:] == [base] * 30
            assert all(a >= b for a, b in zip(column, column[1:], strict=False))


def test_without_a_schedule_the_base_rate_holds_at_once():
    with prunex.attach(tiny(), "evit", keep_ratio=0.7) as pruning:
        for progress in (0.0, 0.5, 1.0):
            pruning.progress = progress
            assert pruning.pruner.rate(0) == 0.7


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), True, "half", None])
def test_bad_progress_and_schedules_are_refused(bad):
    model = tiny()
    with prunex.attach(model, "evit") as pruning:
        with pytest.raises(prunex.PrunexError, match="progress="):
            pruning.progress = bad
        assert pruning.progress == 1.0
    for name in ("shrink_start", "shrink_length"):
        with pytest.raises(prunex.PrunexError, match=name):
            prunex.attach(model, "evit", **{name: bad})
    assert not hasattr(model, "prunex")


def test_schedules_longer_than_the_training_are_refused():
    with pytest.raises(prunex.PrunexError, match="more than the whole training"):
        prunex.attach(tiny(), "evit", shrink_start=0.6, shrink_length=0.5)


@pytest.mark.parametrize("fuse", ["no", 1, None])
def test_fuse_is_a_flag(fuse):
    with pytest.raises(prunex.PrunexError, match=f"fuse={fuse!r}.*True or False"):
        prunex.attach(tiny(), "evit", fuse=fuse)
