import pytest
import torch

import prunex
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = [
    present,
    pytest.mark.parametrize("seed", SEEDS),
    pytest.mark.parametrize("which", ["pred", "fixed"]),
]


def explain(seed, which, dtype=torch.float64, **options):
    model, images, stored = model_and_images(seed, dtype)
    return prunex.explain("integrated_gradients", model, images, stored[f"targets_{which}"], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels(seed, which, dtype):
    e = explain(seed, which, dtype)
    wanted = arrays("explain", seed)[f"captum_ig__{which}"]
    assert relative(e.raw, wanted) < 1e-5
    assert relative(e.pixels, wanted.sum(1)) < 1e-5
    assert relative(e.maps, wanted.sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((3, 4))) < 1e-5


def test_trapezoid_is_longer_by_what_the_reference_lacks(seed, which):
    e = explain(seed, which, rule="trapezoid", steps=20)
    wanted = arrays("explain", seed)[f"captum_ig_riemann_trapezoid20__{which}"]
    assert relative(e.raw * 19 / 20, wanted) < 1e-5
    assert relative(e.raw, wanted) > 0.04


def test_one_step_at_the_image_is_input_times_gradient(seed, which):
    e = explain(seed, which, rule="right", steps=1)
    stored = arrays("explain", seed)
    assert relative(e.raw, stored[f"captum_input_x_gradient__{which}"]) < 1e-5
    _, images, _ = model_and_images(seed)
    assert relative(e.raw, stored[f"captum_saliency_signed__{which}"] * images) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_are_the_layer_at_the_first_block(seed, which, dtype):
    # There the whole input of the block is moved; the class token and positions, equal at both ends, get nothing.
    e = explain(seed, which, dtype, space="tokens")
    assert relative(e.raw, arrays("explain", seed)[f"captum_layer_ig_block0_input__{which}"]) < 1e-5
    assert (e.raw[:, 0] == 0).all()
