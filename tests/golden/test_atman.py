"""AtMan's vision encoder against the public code, which multiplies the scores as they are."""

import pytest
import torch

import prunex
from prunex.explainers.atman import atman, suppression  # noqa: F401  (registers it)
from prunex.vit.embedding import embed_patches
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


@pytest.mark.parametrize("which", ["pred", "fixed"])
@pytest.mark.parametrize(("run", "similarity"), [("single", None), ("concept", 0.2)])
def test_logits_and_rise_of_the_loss(seed, run, similarity, which):
    model, images, stored = model_and_images(seed)
    wanted = arrays("explain", seed)
    name = "f0.1" if similarity is None else "f0.1_t0.2"
    target = stored[f"targets_{which}"]
    e = prunex.explain("atman", model, images, target, factor=0.1, similarity=similarity, rule="scale")
    assert relative(e.raw, wanted[f"atman_{run}_logits_{name}"]) < 2e-5
    assert relative(e.maps.flatten(1), wanted[f"atman_{run}_delta_ce_{name}__{which}"]) < 2e-5


def test_factors_of_patches_that_look_alike(seed):
    model, images, _ = model_and_images(seed)
    wanted = arrays("explain", seed)["atman_concept_factors_f0.1_t0.2"]
    with torch.no_grad():
        found = suppression(embed_patches(model, images)[0], 0.1, 0.2)
    assert relative(found, wanted) < 2e-5
    assert ((wanted > 0.1) & (wanted < 1)).any()
