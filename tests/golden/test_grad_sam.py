"""Grad-SAM has no official code; its definition is applied to attention and gradients of a public forward."""

import pytest

import prunex
from prunex.explainers.grad_sam import grad_sam  # noqa: F401  (registers it)
from tests.explainers.reference import SEEDS, model_and_images, present
from tests.vits import relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS), pytest.mark.parametrize("which", ["pred", "fixed"])]


def test_definition_on_stored_attention_and_gradients(seed, which):
    model, images, stored = model_and_images(seed)
    product = (stored["attn"] * stored[f"attn_grad__{which}"]).clamp(min=0).mean((1, 2)) / 17
    for axis, wanted in (("key", product.sum(1)), ("query", product.sum(2)), ("cls", product[:, 0])):
        e = prunex.explain("grad_sam", model, images, stored[f"targets_{which}"], axis=axis)
        assert relative(e.raw, wanted) < 2e-5
