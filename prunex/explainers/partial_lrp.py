"""Partial LRP: relevance propagated from the logit down to the last block's attention, and no further."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunex.checks import check_choice, check_flag
from prunex.registry import register
from prunex.relevance.rules import RULE_SETS, RelevanceRules, RuleSet
from prunex.relevance.walk import propagate, times
from prunex.vit.anatomy import ViT
from prunex.vit.attention import over_heads
from prunex.vit.recording import Relevance, gradients, recording, widened
from prunex.vit.tape import Attended, Tape


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
) -> Relevance:
    r"""Head mean of max(0, R) in the read-out row, R the last block's attention relevance under the z+ rule.

    From a one-hot 1 at the class through head, final norm, MLP and projection down to the product A V, where
    R_A = A * (S V^T) / 2 with S = R / (A V). Blocks below the last are not part of the pass, and in class-token models
    it touches the read-out tokens alone: that is where relevance is. Class-specific in name; published positive and
    negative scores hardly change with the class.

    Two rule sets go by this name in published tables: "published_baseline" (the figures of arXiv 2012.09838; linear
    layers divide each sign of their inputs by its own sum, so relevance is not conserved) and "conserving" (shared
    denominators, rescaled skips; the figures of later papers). How the method's first authors weigh heads could not
    be checked (unverified); maps do not use it.

    A patch that left before the last block gets 0 here by definition (order such ties by ``trace.depth()``); a patch
    inside a fused token gets its share. ``transformer_attribution`` follows relevance through all blocks.

    Args:
        model: A supported ViT, pruned or dense. Half-precision weights are read in float32.
        images: float [B, C, H, W].
        target: Class whose logit is explained; None: the predicted one.
        rule_set: "conserving" or "published_baseline".
        gradient: Multiply by the attention's gradient before clamping (an ablation of arXiv 2012.09838).

    Returns:
        ``maps`` >= 0; ``raw`` [B, H, prefix + P], each head's signed relevance of the read-out row on all tokens.

    Raises:
        PrunexError: For an unknown rule set, or layers that the rules do not know.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("partial_lrp", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    check_choice("rule_set", rule_set, RULE_SETS)
    gradient = check_flag("gradient", gradient)
    model, images = widened(model, images)
    last = len(model.blocks) - 1
    rules = RelevanceRules(rule_set=rule_set)
    tape = Tape(attention=True, gradients=True, blocks=frozenset({last}), graph_from=last, narrow=True, ops=rules)
    with recording(model, images, target, tape, needs_class=True, precise=True) as recorded:
        step = tape.attended()[-1]
        one_hot = recorded.one_hot()
        attention = torch.as_tensor(step.attention)
        grad = gradients(recorded.logits, [attention], one_hot, retain_graph=True)[0] if gradient else 1
        rules.relevance = True
        found = gradients(recorded.logits, [attention], one_hot)[0] * grad
        with torch.no_grad():
            prefix, heads = recorded.anatomy.prefix, found.shape[1]
            readout = recorded.readout()

            def read(matrix: Tensor) -> Tensor:
                """One head's (or the mean's) read-out row on the original tokens."""

                def mix(row: Tensor, step: Attended) -> Tensor:
                    return times(row, matrix, step.queries)

                return propagate(tape, readout, prefix, mix, start=last)

            raw = readout.new_zeros(len(images), 0, prefix + math.prod(recorded.trace.grid))  # a block without heads
            if heads:
                raw = torch.stack([read(found[:, h]) for h in range(heads)], 1)
            return recorded.answer(read(over_heads(found.clamp(min=0))), raw, signed=False)
