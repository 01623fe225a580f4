import pytest
import torch

import prunex
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


@pytest.mark.parametrize("which", ["pred", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_and_whole_matrix(seed, which, dtype):
    model, images, stored = model_and_images(seed, dtype)
    wanted = arrays("explain", seed)
    target = stored[f"targets_{which}"]
    row = prunex.explain("generic_attention", model, images, target)
    whole = prunex.explain("generic_attention", model, images, target, full=True)
    assert row.target.equal(target)
    assert relative(row.maps.flatten(1), wanted[f"mm_relevance__{which}"]) < 1e-5
    assert relative(whole.maps.flatten(1), wanted[f"mm_relevance__{which}"]) < 1e-5
    assert relative(whole.raw, wanted[f"mm_R_full__{which}"]) < 1e-5


def test_the_predicted_class_is_the_default(seed):
    model, images, stored = model_and_images(seed)
    e = prunex.explain("generic_attention", model, images)
    assert e.target.equal(stored["targets_pred"])
    assert relative(e.logits, stored["logits"]) < 1e-5
    assert relative(e.maps.flatten(1), arrays("explain", seed)["mm_relevance__pred"]) < 1e-5


@pytest.mark.parametrize("which", ["pred", "fixed"])
def test_gradients_of_attention(seed, which):
    from prunex.vit.recording import attention_gradients, recording
    from prunex.vit.tape import Tape

    model, images, stored = model_and_images(seed)
    tape = Tape(attention=True, gradients=True)
    with recording(model, images, stored[f"targets_{which}"], tape) as recorded:
        grads = torch.stack(attention_gradients(recorded), 1)
    assert relative(grads, stored[f"attn_grad__{which}"]) < 1e-5
    assert relative(torch.stack([a.attention for a in tape.attended()], 1), stored["attn"]) < 1e-5
