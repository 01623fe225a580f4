import pytest
import torch

import prunex
from prunex.relevance.rules import RelevanceRules
from prunex.vit.recording import recording
from prunex.vit.tape import Tape
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

WHICH = ["pred", "fixed"]
pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(("gradient", "name"), [(True, "te_attribution"), (False, "te_lrp_rollout")])
def test_double_precision(seed, start, gradient, name):
    model, images, stored = model_and_images(seed, torch.float64)
    wanted = arrays("explain", seed)
    for which in WHICH:
        target = stored[f"targets_{which}"]
        e = prunex.explain("transformer_attribution", model, images, target, start_layer=start, gradient=gradient)
        assert relative(e.maps.flatten(1), wanted[f"{name}_start{start}__{which}__dbl"]) < 2e-6


def test_single_precision(seed):
    # The reference's own single precision is 1.5e-2 (with gradients) and 2e-3 (without) off its double precision.
    model, images, stored = model_and_images(seed)
    wanted = arrays("explain", seed)
    for which in WHICH:
        for gradient, name in ((True, "te_attribution"), (False, "te_lrp_rollout")):
            e = prunex.explain("transformer_attribution", model, images, stored[f"targets_{which}"], gradient=gradient)
            assert relative(e.maps.flatten(1), wanted[f"{name}_start0__{which}__dbl"]) < 2e-3


@pytest.mark.parametrize("which", WHICH)
def test_relevance_of_every_attention_matrix(seed, which):
    model, images, stored = model_and_images(seed, torch.float64)
    rules = RelevanceRules()
    tape = Tape(attention=True, gradients=True, ops=rules)
    with recording(model, images, stored[f"targets_{which}"], tape) as recorded:
        one_hot = torch.zeros_like(recorded.logits).scatter_(1, recorded.target[:, None], 1)
        rules.relevance = True
        found = torch.autograd.grad(recorded.logits, [a.attention for a in tape.attended()], one_hot)
    wanted = arrays("explain", seed)[f"te_attn_relevance__{which}__dbl"]
    for block, r in enumerate(found):
        assert relative(r, wanted[:, block]) < 1e-5
