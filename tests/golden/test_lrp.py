import pytest
import torch

import prunex
from prunex.relevance.gradients import ModifiedGradients
from prunex.vit.recording import recording
from prunex.vit.tape import Tape
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

WHICH = ["pred", "fixed"]
pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


def correlations(a, b):
    """Of each image's map with the other's, [B]."""
    a, b = (t.flatten(1).double() - t.flatten(1).double().mean(1, keepdim=True) for t in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


# Seed 0 is ill-conditioned: a skip's two sums nearly cancel in its first image.
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    ("rule_set", "name", "tolerances"),
    [("published_baseline", "te_full_lrp", (1e-3, 2e-5)), ("conserving", "te_full_lrp_newrules", (1e-2, 2e-5))],
)
def test_positive_rules_down_to_the_pixels(seed, which, rule_set, name, tolerances):
    wanted = arrays("explain", seed)[f"{name}__{which}__dbl"]
    for dtype in (torch.float64, torch.float32):
        model, images, stored = model_and_images(seed, dtype)
        e = prunex.explain("lrp", model, images, stored[f"targets_{which}"], rule_set=rule_set)
        assert e.pixels.equal(e.raw.sum(1))
        if dtype == torch.float64:
            assert relative(e.pixels, wanted) < tolerances[seed]
        assert correlations(e.pixels, wanted).min() > (0.9999999 if dtype == torch.float64 else 0.99)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("rule", ["attnlrp", "cplrp"])
@pytest.mark.parametrize(("gamma", "name", "tolerance"), [(None, "eps", 1e-7), ((0.25, 0.05), "gamma", 5e-6)])
def test_modified_gradients(seed, which, rule, gamma, name, tolerance):
    wanted = arrays("explain", seed)
    for dtype in (torch.float64, torch.float32):
        model, images, stored = model_and_images(seed, dtype)
        target = stored[f"targets_{which}"]
        limit = tolerance if dtype == torch.float64 else 2e-5
        pixels, tokens = (wanted[f"lxt_{rule}_timm_{name}_{kind}__{which}__dbl"] for kind in ("pixels", "tokens"))
        e = prunex.explain("lrp", model, images, target, rule=rule, gamma=gamma)
        assert relative(e.raw, pixels) < limit
        assert relative(e.maps.flatten(1), tokens[:, 1:]) < limit
        # All tokens, the class token's relevance at the first block's input among them.
        tape = Tape(gradients=True, narrow=True, ops=ModifiedGradients(rule, gamma))
        with recording(model, images, target, tape) as recorded:
            score = recorded.logits.gather(1, target[:, None]).sum()
            found = torch.autograd.grad(score, recorded.embedded)[0] * recorded.embedded
        assert relative(found.sum(-1), tokens) < limit


@pytest.mark.parametrize("which", WHICH)
def test_plain_cplrp_is_what_the_library_gives_on_torchvision(seed, which):
    model, images, stored = model_and_images(seed, torch.float64)
    wanted = arrays("explain", seed)
    e = prunex.explain("lrp", model, images, stored[f"targets_{which}"], rule="cplrp")
    assert relative(e.raw, wanted[f"lxt_cplrp_eps_pixels__{which}__dbl"]) < 1e-6
    assert relative(e.maps.flatten(1), wanted[f"lxt_cplrp_eps_tokens__{which}__dbl"][:, 1:]) < 1e-6
