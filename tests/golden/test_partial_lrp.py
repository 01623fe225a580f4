import pytest
import torch

import prunex
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


# The reference's own single precision is 5e-3 off its double precision.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-7), (torch.float32, 1.5e-2)])
@pytest.mark.parametrize(("gradient", "name"), [(False, "te_partial_lrp"), (True, "te_partial_lrp_grad")])
def test_published_baseline(seed, dtype, tolerance, gradient, name):
    model, images, stored = model_and_images(seed, dtype)
    wanted = arrays("explain", seed)
    for which in ("pred", "fixed"):
        e = prunex.explain(
            "partial_lrp",
            model,
            images,
            stored[f"targets_{which}"],
            rule_set="published_baseline",
            gradient=gradient,
        )
        assert relative(e.maps.flatten(1), wanted[f"{name}__{which}__dbl"]) < tolerance


def test_conserving_equals_the_stored_relevance_of_the_last_attention(seed):
    model, images, stored = model_and_images(seed, torch.float64)
    e = prunex.explain("partial_lrp", model, images, stored["targets_fixed"])
    last = arrays("explain", seed)["te_attn_relevance__fixed__dbl"][:, -1]
    assert relative(e.raw, last[:, :, 0]) < 1e-5
    assert relative(e.maps.flatten(1), last.clamp(min=0).mean(1)[:, 0, 1:]) < 1e-5
