"""Generic attention explainability: attention times its gradient, accumulated over blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.walk import through_skips, times
from prunex.vit.anatomy import ViT
from prunex.vit.attention import over_heads
from prunex.vit.recording import attention_gradients, check_layer, recording
from prunex.vit.tape import Tape


@register("explainer", "generic_attention", "Chefer et al., ICCV 2021, arXiv 2103.15679", "one forward, one backward")
def generic_attention(
    model: ViT, images: Tensor, target: int | Tensor | None = None, *, start_layer: int = 0, full: bool = False
) -> Explanation:
    """R <- R + Abar R over the blocks, Abar = head mean of max(0, dy/dA * A) (arXiv 2103.15679, Eqs. 5-6).

    Class-specific; the recommended default for plain ViTs. The product is clamped before the head mean. Only the
    read-out row of R is propagated, unless the whole of R is asked for.

    Args:
        start_layer: First block included.
        full: Also give the whole R.

    Returns:
        ``maps`` >= 0; ``raw`` is the read-out row [B, prefix + P], or R [B, n_last, prefix + P] with ``full``.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("generic_attention", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    start = check_layer(start_layer, len(model.blocks))
    blocks = frozenset(range(start, len(model.blocks)))
    tape = Tape(attention=True, gradients=True, blocks=blocks, graph_from=start, narrow=not full)
    with recording(model, images, target, tape, needs_class=True) as recorded:
        gradients = attention_gradients(recorded)
        with torch.no_grad():
            weights = {}
            for (step, attention), gradient in zip(tape.matrices(), gradients, strict=True):
                weights[step.block] = over_heads((attention * gradient).clamp(min=0))
            prefix, readout = recorded.anatomy.prefix, recorded.readout()
            if not full:
                return answer(recorded, through_skips(tape, readout, prefix, weights, start))
            # All rows of R at once: one unit vector for each token that came out.
            identity = torch.eye(tape.tokens, device=images.device, dtype=readout.dtype).expand(len(images), -1, -1)
            whole = through_skips(tape, identity, prefix, weights, start)
            return answer(recorded, times(readout, whole), raw=whole)
