"""Relevance of tokens and of their added positions, by another implementation of the rules that halve products."""

import pytest
import torch

from prunex.vit.recording import recording
from prunex.vit.tape import Tape
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.golden.test_lrp import correlations
from tests.golden.test_lrp_families import Halves
from tests.vits import relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]


class Placed(Halves):
    """With the added positions as a place to read relevance at."""

    def placed(self, tokens, positions):
        self.positions = positions.clone().requires_grad_()
        return super().placed(tokens, self.positions)


@pytest.mark.parametrize("biases", [False, True])
def test_tokens_and_positions_share_what_arrives(seed, biases):
    model, images, stored = model_and_images(seed, torch.float64)
    wanted, ops = arrays("pelrp", seed), Placed()
    if not biases:
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(p)
    target = stored["targets_pred"] if biases else wanted["pelrp_nobias_targets"]
    with recording(model, images.clone().requires_grad_(), target, Tape(gradients=True, ops=ops)) as recorded:
        if not biases:
            assert relative(recorded.logits, wanted["pelrp_nobias_logits__dbl"]) < 1e-6
        ops.relevance = True
        total, position = torch.autograd.grad(recorded.logits, [recorded.embedded, ops.positions], recorded.one_hot())
    found = {"total": total, "position": position, "semantic": total - position}
    kind = "pelrp_eps_attn" if biases else "pelrp_nobias_eps_attn"
    for part, r in found.items():
        # Theirs adds its stabilisers without their sign, so small denominators differ.
        assert correlations(r.sum(-1), wanted[f"{kind}_{part}__pred__dbl"]).min() > 0.99999
    if not biases:
        assert relative(total.sum((1, 2)), torch.ones(4)) < 1e-6
