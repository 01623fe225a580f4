"""Partial LRP: relevance propagated from the logit down to the last block's attention, and no further."""

from __future__ import annotations

import torch
from torch import Tensor

from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.rules import RelevanceRules, RuleSet, weighed_relevance
from prunex.relevance.walk import times
from prunex.vit.anatomy import ViT
from prunex.vit.attention import over_heads
from prunex.vit.recording import recording, widened
from prunex.vit.tape import Tape


@register(
    "explainer",
    "partial_lrp",
    "Voita et al., ACL 2019, arXiv 1905.09418; for ViTs: Chefer et al., CVPR 2021",
    "one forward, one block's relevance pass",
)
def partial_lrp(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    rule_set: RuleSet = "conserving",
    gradient: bool = False,
) -> Explanation:
    """Head mean of max(0, R) in the read-out row, R the last block's attention relevance under the z+ rule.

    From a one-hot 1 at the class through head, final norm, MLP and projection down to the product A V, where R_A = A *
    (S V^T) / 2 with S = R / (A V). Blocks below the last are not part of the pass. Class-specific in name; published
    positive and negative scores hardly change with the class.

    Two rule sets go by this name in published tables: "published_baseline" (the figures of arXiv 2012.09838; linear
    layers divide each sign of their inputs by its own sum, so relevance is not conserved) and "conserving" (shared
    denominators, rescaled skips; the figures of later papers). How the method's first authors weigh heads could not be
    checked (unverified); maps do not use it. Half-precision weights are read in float32.

    A patch that left before the last block gets 0 by definition (order such ties by ``trace.depth()``); one inside a
    fused token gets its share. ``transformer_attribution`` follows relevance through all blocks.

    Args:
        rule_set: "conserving" or "published_baseline".
        gradient: Multiply by the attention's gradient before clamping (an ablation of arXiv 2012.09838).

    Returns:
        ``maps`` >= 0; ``raw`` [B, H, prefix + P], each head's signed relevance of the read-out row on all tokens.

    Raises:
        PrunexError: For layers that the rules do not know.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("partial_lrp", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    model, images = widened(model, images)
    last = len(model.blocks) - 1
    rules = RelevanceRules(rule_set=rule_set)
    tape = Tape(attention=True, gradients=True, blocks=frozenset({last}), graph_from=last, narrow=True, ops=rules)
    with recording(model, images, target, tape, needs_class=True, precise=True) as recorded:
        ((step, attention),) = tape.matrices()
        relevance = weighed_relevance(recorded, rules, [attention], gradient)[0]
        with torch.no_grad():
            # Only the last block is walked: what the head reads, back to its attention, and on to the patches.
            readout = recorded.leaving(last).lift(recorded.readout())
            entering, heads = recorded.entering(last), relevance.shape[1]
            by_head = [entering.lift(times(readout, relevance[:, head], step.queries)) for head in range(heads)]
            row = entering.lift(times(readout, over_heads(relevance.clamp(min=0)), step.queries))
            raw = torch.stack(by_head, 1) if heads else row.new_zeros(len(row), 0, row.shape[1])
            return answer(recorded, row, raw)
