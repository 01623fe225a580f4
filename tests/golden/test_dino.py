"""DINO's attention of the last block and its mass masks against the public code."""

import pytest

import prunex
from prunex.explainers.dino import dino  # noqa: F401  (registers it)
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


def test_attention_of_every_head(seed):
    model, images, _ = model_and_images(seed)
    wanted = arrays("explain", seed)["dino_last_cls_attn"]
    e = prunex.explain("dino", model, images)
    assert relative(e.raw, wanted) < 2e-5
    assert relative(e.maps.flatten(1), wanted.mean(1)) < 2e-5


def test_masks_of_sixty_percent(seed):
    model, images, _ = model_and_images(seed)
    wanted = arrays("explain", seed)["dino_mask_mass60"].float()
    e = prunex.explain("dino", model, images, threshold=0.6)
    assert e.raw.equal(wanted)
    assert 0 < wanted.mean() < 1
    assert relative(e.maps.flatten(1), wanted.mean(1)) < 1e-6
