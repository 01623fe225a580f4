"""Corrected weights against closed forms and public code in double precision (population statistics)."""

import pytest
import torch

import prunex
from prunex.units.correction import cuts_of, make_up
from prunex.units.moments import Moments
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = present
both_seeds = pytest.mark.parametrize("seed", SEEDS)
CLOSE = 1e-6


def calibration(want):
    """The calibration images, checked to be those that the reference saw."""
    generator = torch.Generator().manual_seed(int(want["calibration_seed"]))
    images = torch.randn(64, 3, 32, 32, generator=generator)
    assert torch.equal(images.flatten()[:8], want["calibration_first8"])
    assert float(images.sum()) == pytest.approx(float(want["calibration_checksum"]), rel=1e-4)
    return images.double()


def kept_of(removed):
    """The channels that a row of 1 (removed) and 0 leaves."""
    return tuple((removed == 0).nonzero().flatten().tolist())


def spec_of(want):
    """The channels that the reference keeps, block by block."""
    return prunex.WidthSpec(channels={b: kept_of(row) for b, row in enumerate(want["vbp_removed_global"])})


def slimmed(seed, correct, batch):
    """The reference model without the reference's channels, corrected on its images in batches of a size."""
    model, images, _ = model_and_images(seed, torch.float64)
    want = arrays("weight_correction", seed)
    seen = calibration(want).split(batch)
    return prunex.slim(model, widths=spec_of(want), correct=correct, images=list(seen)), model, images, want


@both_seeds
def test_means_variances_and_who_has_the_smallest(seed):
    model, _, _ = model_and_images(seed, torch.float64)
    want = arrays("weight_correction", seed)
    everything = torch.arange(192)
    watched = [Moments(b.mlp.fc2.weight.detach(), everything, everything[:0], False) for b in model.blocks]
    for block, moments in zip(model.blocks, watched, strict=True):
        block.mlp.fc2.register_forward_hook(
            lambda m, args, out, moments=moments: moments.add(args[0].flatten(0, 1), out.flatten(0, 1))
        )
    with torch.no_grad():
        for images in calibration(want).split(10):
            model(images)
    variances = torch.stack([m.variances for m in watched])
    for b, moments in enumerate(watched):
        assert relative(moments.mean, want[f"vbp_mean/{b}"]) < CLOSE
        assert relative(variances[b], want[f"vbp_var/{b}"]) < CLOSE
    removed = want["vbp_removed_global"]
    smallest = variances.flatten().argsort()[: int(removed.sum())]
    assert set(smallest.tolist()) == set(removed.flatten().nonzero().flatten().tolist())


@both_seeds
@pytest.mark.parametrize("batch", [64, 10])
def test_biases_and_logits_with_the_removed_means_folded_in(seed, batch):
    small, _, images, want = slimmed(seed, "bias", batch)
    with torch.no_grad():
        for b, block in enumerate(small.blocks):
            assert relative(block.mlp.fc2.bias, want[f"vbp_new_bias/{b}"]) < CLOSE
        assert relative(small(images), want["vbp_logits_compensated"]) < CLOSE


@both_seeds
def test_without_a_correction_the_logits_are_the_uncompensated_ones(seed):
    model, images, stored = model_and_images(seed, torch.float64)
    want = arrays("weight_correction", seed)
    with torch.no_grad():
        bare = prunex.slim(model, widths=spec_of(want))(images)
        shifted = want["vbp_logits_compensated"].double()
    assert relative(bare, want["vbp_logits_uncompensated"]) < CLOSE
    errors = torch.stack([(x - stored["logits"]).norm() for x in (bare, shifted)])
    assert relative(errors, want["vbp_err"]) < 1e-4  # of single-precision logits


@both_seeds
@pytest.mark.parametrize("batch", [64, 7])
def test_the_affine_refit(seed, batch):
    small, model, _, want = slimmed(seed, "refit", batch)
    block = int(want["osscar_block"])
    layer = small.blocks[block].mlp.fc2
    assert relative(layer.weight, want["own_affine_weight"]) < CLOSE
    assert relative(layer.bias, want["own_affine_bias"]) < CLOSE
    row = prunex.correction(small).branches[block]
    zero, _, affine, _ = want["own_mse_zero_mean_affine_nointercept"].tolist()  # summed over channels
    assert row.before * model.embed_dim == pytest.approx(zero, rel=1e-6)
    assert row.after * model.embed_dim == pytest.approx(affine, rel=1e-6)


@both_seeds
def test_the_error_that_the_mean_leaves(seed):
    small, model, _, want = slimmed(seed, "bias", 16)
    row = prunex.correction(small).branches[int(want["osscar_block"])]
    mean = float(want["own_mse_zero_mean_affine_nointercept"][1])
    assert row.after * model.embed_dim == pytest.approx(mean, rel=1e-6)


@both_seeds
@pytest.mark.parametrize("run", ["own_nointercept", "mp_plus", "fast1", "fast4", "fast72", "local"])
def test_a_layer_without_a_bias_is_refitted_without_an_intercept(seed, run):
    """OSSCAR's own solutions for the channels that it keeps; which those are is its own affair."""
    model, _, _ = model_and_images(seed, torch.float64)
    want = arrays("weight_correction", seed)
    block = int(want["osscar_block"])
    layer = model.blocks[block].mlp.fc2
    layer.bias = None
    ours = run == "own_nointercept"
    kept = kept_of(want["vbp_removed_global"][block] if ours else want[f"osscar_{run}_kept"] == 0)
    cuts = cuts_of(model, prunex.WidthSpec(channels={block: kept}))
    done = make_up(model, cuts, calibration(want).split(9), "refit")
    weight = want[f"{run}_weight"] if ours else want[f"osscar_{run}_weight"][:, list(kept)]
    assert relative(layer.weight[:, list(kept)], weight) < CLOSE
    if ours:
        error = float(want["own_mse_zero_mean_affine_nointercept"][3])
        assert done.branches[0].after * model.embed_dim == pytest.approx(error, rel=1e-6)
