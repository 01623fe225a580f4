import pytest
import torch

import prunex
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


def test_last_block(seed):
    model, images, _ = model_and_images(seed)
    e = prunex.explain("raw_attention", model, images)
    assert relative(e.maps.flatten(1), arrays("explain", seed)["te_last_attn"]) < 1e-5


def test_last_block_in_double(seed):
    model, images, _ = model_and_images(seed, torch.float64)
    e = prunex.explain("raw_attention", model, images)
    assert relative(e.maps.flatten(1), arrays("explain", seed)["te_last_attn__dbl"]) < 2e-7


def test_every_head_of_every_block(seed):
    model, images, stored = model_and_images(seed)
    for layer in range(6):
        wanted = stored["attn"][:, layer, :, 0].mean(1)
        assert relative(prunex.explain("raw_attention", model, images, layer=layer).raw, wanted) < 1e-5


def test_equals_dino_head_mean(seed):
    model, images, _ = model_and_images(seed)
    e = prunex.explain("raw_attention", model, images)
    assert relative(e.maps.flatten(1), arrays("explain", seed)["dino_last_cls_attn"].mean(1)) < 1e-5
