"""Grad-CAM: channels of the patch tokens, or heads, weighted by their mean gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.relevance.features import Features, features, features_tape, on_patches
from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import promoted
from prunex.vit.readout import check_head
from prunex.vit.recording import Recording, check_layer, gradients, recording
from prunex.vit.tape import Tape


@register("explainer", "grad_cam", "Selvaraju et al., ICCV 2017, arXiv 1610.02391", "one forward, a short backward")
def grad_cam(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    kind: Literal["tokens", "attention", "layercam", "elementwise"] = "tokens",
    layer: int = -1,
) -> Explanation:
    """Gradient-weighted class activation (arXiv 1610.02391, Eqs. 1-2), read from one block.

    With A the activation and G the gradient of the class's logit, over the patch tokens p and channels d:

    - "tokens": ReLU(sum_d w_d A_pd), w_d = mean_p G_pd, at the output of the block's ``norm1``. Behind the attention of
      the last block a class-token head gives patches no gradient at all; before it they always have one.
    - "layercam": ReLU(sum_d max(0, G_pd) A_pd), and "elementwise": sum_d max(0, G_pd A_pd), at the same place.
    - "attention": the "GradCAM" of Chefer et al. (arXiv 2012.09838): A_ph is head h's attention of the class token for
      patch p, G its gradient, and the heads' mean is taken instead of their sum. Where the head reads several tokens, A
      is the mean of their rows and G the sum of their gradients: how the logit changes with that mean row.

    Class-specific, and 0 all over where everything is against the class. Only the network from the block on is
    differentiated; all kinds but "attention" keep fused attention. A patch that left before the block, or was fused
    into another token, gets exactly 0; a fused token counts neither in the mean nor in the map.

    Args:
        kind: What is weighted by what.
        layer: Block index, negative from the end.

    Returns:
        ``maps`` >= 0, never scaled; ``raw`` [B, gh, gw], the same before the last ReLU, negative values included.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("grad_cam", model, torch.randn(2, 3, 64, 64), kind="layercam").maps.shape
    torch.Size([2, 4, 4])
    """
    layer = check_layer(layer, len(model.blocks))
    tape = features_tape(layer)
    if kind == "attention":
        tape = Tape(attention=True, blocks=frozenset({layer}), gradients=True, graph_from=layer, narrow=True)
    with recording(model, images, target, tape, needs_class=True) as recorded:
        score = recorded.score()
        seen = _rows(recorded, layer, score) if kind == "attention" else features(recorded, layer, score)
        with torch.no_grad():
            cam = seen.on_grid(_weighted(kind, seen))
            return answer(recorded, cam.clamp(min=0).flatten(1), raw=cam)


def _weighted(kind: str, seen: Features) -> Tensor:
    """One value a patch token, [B, n]."""
    if kind in ("tokens", "attention"):
        cam = (seen.activation @ seen.weights().unsqueeze(2)).squeeze(2)
        return cam / max(1, seen.activation.shape[2]) if kind == "attention" else cam
    gradient = torch.as_tensor(seen.gradient)
    if kind == "layercam":
        return (gradient.clamp(min=0) * seen.activation).sum(2)
    return (gradient * seen.activation).clamp(min=0).sum(2)


def _rows(recorded: Recording, layer: int, score: Tensor) -> Features:
    """What the tokens that the head reads pay to each patch token, and its gradient; heads are the channels."""
    ((step, attention),) = recorded.tape.matrices()
    gradient = promoted(gradients(score.sum(), [attention])[0])
    check_head(recorded.model)
    # Rows that the head reads count as one: their mean, with the sum of their gradients.
    readers = recorded.anatomy.readout(attention.shape[3], step.policy, attention.detach(), step.sizes)
    if step.queries is not None:
        readers = readers[:, list(step.queries)]
    with torch.no_grad():
        row = torch.einsum("bm,bhmn->bnh", readers, attention)
        total = torch.einsum("bm,bhmn->bnh", (readers > 0).to(gradient.dtype), gradient)
        prefix = recorded.anatomy.prefix
        return on_patches(recorded, layer, row[:, prefix:], total[:, prefix:])
