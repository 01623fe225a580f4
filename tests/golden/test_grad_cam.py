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


@pytest.mark.parametrize(
    ("kind", "name"),
    [("tokens", "gradcam"), ("layercam", "layercam"), ("elementwise", "gradcam_elementwise")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorch_grad_cam(seed, which, kind, name, dtype):
    model, images, stored = model_and_images(seed, dtype)
    wanted = arrays("explain", seed)[f"pgc_{name}_raw__{which}"]
    e = prunex.explain("grad_cam", model, images, stored[f"targets_{which}"], kind=kind)
    assert relative(e.raw.flatten(1), wanted) < 1e-5
    assert relative(e.maps.flatten(1), wanted.clamp(min=0)) < 1e-5


def test_scaled_and_resized(seed, which):
    model, images, stored = model_and_images(seed)
    wanted = arrays("explain", seed)[f"pgc_gradcam_final__{which}"]
    e = prunex.explain("grad_cam", model, images, stored[f"targets_{which}"])

    def scaled(maps):
        maps = maps - maps.amin((1, 2), keepdim=True)
        return maps / (1e-7 + maps.amax((1, 2), keepdim=True))

    e.maps = scaled(e.maps)
    assert relative(scaled(e.upsample()), wanted) < 1e-5  # its resizing is ours; it scales before and after


def test_attention_of_the_last_block(seed, which):
    model, images, stored = model_and_images(seed, torch.float64)
    e = prunex.explain("grad_cam", model, images, stored[f"targets_{which}"], kind="attention")
    wanted = arrays("explain", seed)
    assert relative(e.maps.flatten(1), wanted[f"te_attn_gradcam__{which}__dbl"]) < 1e-6
    single = prunex.explain("grad_cam", model.float(), images.float(), stored[f"targets_{which}"], kind="attention")
    assert relative(single.maps.flatten(1), wanted[f"te_attn_gradcam__{which}"]) < 1e-5
    # The reference is clamped; its ingredients are not.
    a, g = stored["attn"][:, -1, :, 0, 1:], stored[f"attn_grad__{which}"][:, -1, :, 0, 1:]
    assert relative(e.raw.flatten(1), (g.mean(2, keepdim=True) * a).mean(1)) < 1e-5


@pytest.mark.parametrize("layer", [0, 3])
def test_attention_of_an_earlier_block(seed, which, layer):
    model, images, stored = model_and_images(seed, torch.float64)
    e = prunex.explain("grad_cam", model, images, stored[f"targets_{which}"], kind="attention", layer=layer)
    a, g = stored["attn"][:, layer, :, 0, 1:], stored[f"attn_grad__{which}"][:, layer, :, 0, 1:]
    assert relative(e.raw.flatten(1), (g.mean(2, keepdim=True) * a).mean(1)) < 1e-5
