"""Layer-wise relevance propagation through a whole ViT: z+, epsilon and gamma rules, AttnLRP and CP-LRP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.gradients import ModifiedGradients
from prunex.relevance.rules import RelevanceRules, RuleSet
from prunex.vit.anatomy import ViT
from prunex.vit.recording import Recording, gradients, recording, widened
from prunex.vit.tape import Tape

RULES = ("zplus", "epsilon", "gamma", "attnlrp", "cplrp")


@register(
    "explainer",
    "lrp",
    "Bach et al., PLoS ONE 2015; AttnLRP: Achtibat et al., ICML 2024, arXiv 2402.05602",
    "one forward, one relevance pass",
)
def lrp(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    rule: Literal["zplus", "epsilon", "gamma", "attnlrp", "cplrp"] = "zplus",
    gamma: float | tuple[float, float] | None = None,
    rule_set: RuleSet = "conserving",
    positions: bool = False,
) -> Explanation:
    """A logit decomposed backwards through every layer, to tokens and pixels.

    - ``"zplus"``: the "LRP" baseline of arXiv 2012.09838 (alpha 1, beta 0): from a one-hot 1, positive products alone;
      norms, GELU and softmax pass relevance through; zB at the pixels with each image's lowest and highest value.
    - ``"epsilon"``, ``"gamma"``: the same pass with those rules in linear layers and the patch convolution.
    - ``"attnlrp"`` (arXiv 2402.05602, Eqs. 13-16): softmax s gives x_i (R_i - s_i sum_j R_j), products half each, norms
      are constants but for the mean. As activation times modified gradient (arXiv 2502.15886), with fused attention.
    - ``"cplrp"`` (arXiv 2202.07304): attention and norm deviations are constants. Public ViT examples use it with
      ``gamma``.

    Relevance sums to the logit only without biases (they absorb some), and under "attnlrp" not even then. Plain epsilon
    maps of ViTs are noisy; gamma calms them and wants tuning per model. Published figures beyond the z+ ones of arXiv
    2012.09838 could not be checked (unverified). LRP is patented for commercial use by its authors' institutions.

    One rule an operation holds for every family: a rotary turn is a linear map and shares by signed proportion; a
    relative bias on the scores is treated as a linear layer's bias; a gated product gives each side half, a sigmoid
    gate nothing; heads that are taken from each other share by signed proportion, heads that are mixed as a linear
    layer does, but by magnitudes under "zplus"; queries that are learned (attention pooling) leave all of a score to
    its key; branches side by side share as skips do. "cplrp" takes scores as constants, positions included. Public
    implementations differ in these, so they are choices.

    Tokens that left keep what earlier blocks gave them. A fused token's weights are constants. Half-precision weights
    are read in float32.

    Args:
        rule: The rules, see above.
        gamma: For "gamma", "attnlrp" and "cplrp": strength >= 0 of the gamma rule, one number, or one for the patch
            convolution and one for linear layers. None: (0.25, 0.05) for "gamma", no gamma rule for the others.
        rule_set: For "zplus": "conserving", or "published_baseline", whose linear layers may double relevance.
        positions: For "attnlrp": positions are inputs too (PE-LRP, arXiv 2506.02138). A patch's map has the part of
            its added position in any case, and its pixels get it too, each the same; rotary tables take half of their
            products with queries and keys, and |sum R| of a block's sines and of its cosines is the patch's as well.
            So maps of rotary models no longer sum to anything, and their tokens' own part is smaller. Relative biases
            have no part. The paper was read in summary alone; for images it has code for added positions only.

    Returns:
        Signed. ``maps``: relevance of the patch tokens that enter the first block, position included, summed over
        channels; ``raw`` [B, C, H, W], of the pixels. ``pixels`` sums them over colours. ``info["prefix"]``
        [B, prefix]: of class, distillation and register tokens, also of one that enters late (CaiT), which is no
        pixel's. With ``positions``, ``info["positions"]`` [B, P]: the part of the maps that is the patches' positions.

    Raises:
        PrunexError: For a gamma or rule set that the rule does not have, or layers that the rules do not know.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("lrp", model, torch.randn(2, 3, 64, 64), rule="attnlrp").maps.shape
    torch.Size([2, 4, 4])
    """
    strengths = _strengths(rule, gamma)
    if rule != "zplus" and rule_set != "conserving":
        raise PrunexError(f"rule_set={rule_set!r} with rule={rule!r} is not allowed: rule sets belong to rule='zplus'")
    if positions and rule != "attnlrp":
        raise PrunexError(
            f"positions=True with rule={rule!r} is not allowed: positions are inputs under rule='attnlrp' alone"
        )
    model, images = widened(model, images)
    # The pixels become part of the graph, which the caller's own tensor must not.
    with torch.inference_mode(False):
        images = images.clone().requires_grad_()
    if rule == "attnlrp" or rule == "cplrp":
        ops: ModifiedGradients | RelevanceRules = ModifiedGradients(rule, strengths, positions)
    else:
        ops = RelevanceRules(rule, rule_set, strengths or (0.25, 0.05))
    tape = Tape(gradients=True, narrow=True, ops=ops)
    with recording(model, images, target, tape, needs_class=True, precise=True) as recorded:
        one_hot, prefix = recorded.one_hot(), recorded.anatomy.prefix
        ops.relevance = True
        late = () if tape.late is None else (tape.late,)
        inputs = [recorded.embedded, images, *late, *(_places(ops) if positions else ())]
        relevance = gradients(recorded.logits, inputs, one_hot)
        # These give gradients, to be multiplied; the rules give relevance itself.
        if isinstance(ops, ModifiedGradients):
            relevance = [r * x for r, x in zip(relevance, inputs, strict=True)]
        tokens, pixels, *places = relevance
        entered = [places.pop(0).sum(-1) for _ in late]
        row, info = tokens.sum(-1), {}
        if positions:
            added, turned = places[0].sum(-1), _turned(recorded, places[1:])
            row, info["positions"] = row + turned, (added + turned)[:, prefix:]
            pixels = pixels + _spread(recorded, info["positions"], pixels)
        info["prefix"] = entered[0] if entered else row[:, :prefix]
        return answer(recorded, row, pixels, signed=True, fine=pixels.sum(1), info=info)


def _places(ops: Any) -> list[Tensor]:
    """What tells tokens' places, as a forward left it: added positions, then each block's rotary table."""
    return [ops.added, *ops.tables]


def _turned(recorded: Recording, tables: Sequence[Tensor]) -> Tensor:
    """|sum R| of sines and of cosines, summed over blocks, on the tokens that entered: [B, prefix + P]."""
    prefix, row = recorded.anatomy.prefix, recorded.logits.new_zeros(len(recorded.logits), recorded.embedded.shape[1])
    for block, r in enumerate(tables):
        sines, cosines = r.sum(1).chunk(2, -1)
        through_tables = sines.sum(-1).abs() + cosines.sum(-1).abs()
        row = row + recorded.entering(block).lift(nn.functional.pad(through_tables, (prefix, 0)))
    return row


def _spread(recorded: Recording, patches: Tensor, pixels: Tensor) -> Tensor:
    """Relevance [B, P] of patches on all values of their pixels alike: [B, C, H, W]."""
    (high, wide), (channels, height, width) = recorded.anatomy.patch, pixels.shape[1:]
    part = patches.unflatten(1, recorded.trace.grid) / (high * wide * channels)
    fine = part.repeat_interleave(high, 1).repeat_interleave(wide, 2)[:, None, :height, :width]
    return nn.functional.pad(fine, (0, width - fine.shape[3], 0, height - fine.shape[2])).expand_as(pixels)


def _strengths(rule: str, gamma: Any) -> tuple[float, float] | None:
    """Of the gamma rule, in the patch convolution and in linear layers."""
    if gamma is None:
        return None
    if rule in ("zplus", "epsilon"):
        raise PrunexError(
            f"gamma={gamma!r} with rule={rule!r} is not allowed: rules with gamma are gamma, attnlrp, cplrp"
        )
    pair = gamma if isinstance(gamma, tuple | list) else (gamma, gamma)
    numbers = [g for g in pair if isinstance(g, int | float) and not isinstance(g, bool) and 0 <= g < 1e6]
    if len(pair) != 2 or len(numbers) != 2:
        raise PrunexError(
            f"gamma={gamma!r} is not allowed: give a number of at least 0, or one for pixels and one for linear layers"
        )
    return float(numbers[0]), float(numbers[1])
