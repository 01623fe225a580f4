"""Transformer Attribution: gradient times relevance of every attention map, rolled out."""

from __future__ import annotations

import torch
from torch import Tensor

from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.rules import RelevanceRules, weighed_relevance
from prunex.relevance.walk import through_skips
from prunex.vit.anatomy import ViT
from prunex.vit.attention import over_heads
from prunex.vit.recording import check_layer, recording, widened
from prunex.vit.tape import Tape


@register(
    "explainer",
    "transformer_attribution",
    "Chefer et al., CVPR 2021, arXiv 2012.09838",
    "one forward, one backward, one relevance pass",
)
def transformer_attribution(
    model: ViT, images: Tensor, target: int | Tensor | None = None, *, start_layer: int = 0, gradient: bool = True
) -> Explanation:
    """C = Abar_{L-1} ... Abar_s with Abar_l = I + mean_h max(0, dy/dA_l * R_l) (arXiv 2012.09838, Eqs. 13-14).

    R_l is the relevance of block l's attention under the z+ rule: from a one-hot 1 at the class, linear layers pass on
    positive products only, skips split in proportion (and are rescaled to conserve an image's sum), a product of two
    signals gives each half, everything else passes through. The product is clamped before the head mean and the
    aggregate is not normalised, as in the authors' ViT code. One graph is walked twice, as gradients and as relevance,
    down to block ``start_layer``'s attention and no further; then the read-out row alone is rolled out.

    Departures from the authors' code: sums of the skip rule are taken per image (theirs take the whole batch, which
    must be 1). All published ViT figures use ``start_layer=1``; their notebooks use 0, as here. A fused token's weights
    (EViT) are constants to the relevance pass and part of the gradient. Half-precision weights are read in float32.

    Args:
        start_layer: First block included.
        gradient: False rolls out the relevance alone, head mean of max(0, R_l) (the paper's ablation).

    Returns:
        ``maps`` >= 0; ``raw`` is the read-out row [B, prefix + P].

    Raises:
        PrunexError: For layers that the rules do not know.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("transformer_attribution", model, torch.randn(2, 3, 64, 64), start_layer=1).maps.shape
    torch.Size([2, 4, 4])
    """
    start = check_layer(start_layer, len(model.blocks))
    model, images = widened(model, images)
    rules = RelevanceRules()
    blocks = frozenset(range(start, len(model.blocks)))
    tape = Tape(attention=True, gradients=True, blocks=blocks, graph_from=start, narrow=True, ops=rules)
    with recording(model, images, target, tape, needs_class=True, precise=True) as recorded:
        matrices = tape.matrices()
        relevance = weighed_relevance(recorded, rules, [attention for _, attention in matrices], gradient)
        with torch.no_grad():
            weights = {step.block: over_heads(r.clamp(min=0)) for (step, _), r in zip(matrices, relevance, strict=True)}
            row = through_skips(tape, recorded.readout(), recorded.anatomy.prefix, weights, start)
            return answer(recorded, row)
