"""Beyond Intuition against the public code."""

import pytest

import prunex
from prunex.explainers.beyond_intuition import beyond_intuition  # noqa: F401  (registers it)
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = [
    present,
    pytest.mark.parametrize("seed", SEEDS),
    pytest.mark.parametrize("which", ["pred", "fixed"]),
    pytest.mark.parametrize("variant", ["token", "head"]),
]


@pytest.mark.parametrize("start", [1, 2, 4])
def test_perception_times_feedback(seed, which, variant, start):
    model, images, stored = model_and_images(seed)
    target = stored[f"targets_{which}"]
    wanted = arrays("explain", seed)[f"bi_{variant}_start{start}__{which}"]
    e = prunex.explain("beyond_intuition", model, images, target, variant=variant, start_layer=start)
    assert relative(e.maps.flatten(1), wanted) < 2e-5


def test_perception_alone(seed, which, variant):
    model, images, stored = model_and_images(seed)
    target = stored[f"targets_{which}"]
    wanted = arrays("explain", seed)[f"bi_{variant}_perception_start1__{which}"]
    e = prunex.explain("beyond_intuition", model, images, target, variant=variant, feedback="none")
    assert relative(e.maps.flatten(1), wanted) < 2e-5
