import pytest
import torch

import prunex
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


@pytest.mark.parametrize("start", [0, 1])
def test_mean(seed, start):
    model, images, _ = model_and_images(seed)
    e = prunex.explain("rollout", model, images, start_layer=start)
    assert relative(e.maps.flatten(1), arrays("explain", seed)[f"te_rollout_start{start}"]) < 1e-5


@pytest.mark.parametrize("start", [0, 1])
def test_mean_in_double(seed, start):
    model, images, _ = model_and_images(seed, torch.float64)
    e = prunex.explain("rollout", model, images, start_layer=start)
    assert relative(e.maps.flatten(1), arrays("explain", seed)[f"te_rollout_start{start}__dbl"]) < 2e-7


def test_agrees_with_the_public_vit_code_where_its_normalisation_is_right(seed):
    model, images, _ = model_and_images(seed)
    e = prunex.explain("rollout", model, images)
    assert relative(e.maps.flatten(1), arrays("explain", seed)["vx_rollout_mean_discard0"]) < 1e-5


@pytest.mark.parametrize("fusion", ["max", "min"])
def test_departs_from_its_normalisation_on_purpose(seed, fusion):
    # That code divides column j by the sum of row j; doing so to our own fused matrices gives its very numbers.
    model, images, stored = model_and_images(seed)
    wanted = arrays("explain", seed)[f"vx_rollout_{fusion}_discard0"]
    eye, theirs = torch.eye(17), torch.eye(17)
    for a in stored["attn"].unbind(1):
        m = (a.amax(1) if fusion == "max" else a.amin(1)) + eye
        theirs = (m / m.sum(-1)[:, None, :]) @ theirs
    assert relative(theirs[:, 0, 1:], wanted) < 1e-5
    e = prunex.explain("rollout", model, images, head_fusion=fusion)
    assert relative(e.maps.flatten(1), wanted) > 1e-3
