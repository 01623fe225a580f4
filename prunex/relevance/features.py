"""Patch tokens at the first norm of one block, and how a score changes with them: what Grad-CAM's relatives share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.vit.arithmetic import promoted
from prunex.vit.recording import Recording, gradients
from prunex.vit.tape import Tape


@dataclass(eq=False, repr=False)
class Features(Brief):
    """What patch tokens are inside one block, such as at its ``norm1``; prefix tokens are left out."""

    activation: Tensor  # [B, n, D], at least float32
    gradient: Tensor | None  # [B, n, D] of a score, likewise; None unless a score was given
    # bool [B, n], the tokens that are a patch of the image, or were pooled from some: no fused token, no slot of a
    # dropped one
    present: Tensor
    # int64 [B, P], the token that stands for each patch (of pooled ones that with the patch's largest part); -1 for a
    # patch that left or was fused before
    where: Tensor
    grid: tuple[int, int]  # patch grid (gh, gw)

    def weights(self) -> Tensor:
        """Grad-CAM's channel weights: the mean gradient over the patch tokens that are there, [B, D]."""
        present = self.present.unsqueeze(2)
        return torch.as_tensor(self.gradient).masked_fill(~present, 0).sum(1) / present.sum(1).clamp(min=1)

    def on_grid(self, values: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """One value a token, [B, n] or several [B, k, n], put where its patch is, [B, (k,) gh, gw], or ``fill``."""
        where = self.where if values.ndim == 2 else self.where.unsqueeze(1).expand(-1, values.shape[1], -1)
        empty = torch.as_tensor(fill, dtype=values.dtype, device=values.device)
        placed = values.gather(-1, where.clamp(min=0))
        return torch.where(where < 0, empty.view(-1, *[1] * (values.ndim - 1)), placed).unflatten(-1, self.grid)


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """ln(p / (1 - p)) of each image's class under the softmax of [B, classes >= 2]: [B], at least float32."""
    # The probability's own gradient, p (1 - p) times this one, cancels away where a softmax is saturated.
    logits, index = promoted(logits), target[:, None]
    return logits.gather(1, index)[:, 0] - logits.scatter(1, index, float("-inf")).logsumexp(1)


def features_tape(layer: int, gradients: bool = True) -> Tape:
    """The tape for :func:`features`: nothing before the block is on the graph, and attention stays fused."""
    return Tape(normed=frozenset({layer}), gradients=gradients, graph_from=layer, narrow=True)


def features(recorded: Recording, layer: int, score: Tensor | None = None) -> Features:
    """Patch tokens as a block's first norm gives them, and the gradient of a score [B]; merged tokens count once."""
    # Under class-token pooling the latest place where patches have a gradient at all: behind the last block's
    # attention only the class token reaches the head.
    normed = torch.as_tensor(recorded.tape.attended()[layer].normed)
    gradient = None
    if score is not None:
        gradient = _wide(gradients(score.sum(), [normed])[0], recorded.anatomy.prefix)
    return on_patches(recorded, layer, _wide(normed, recorded.anatomy.prefix), gradient)


def on_patches(recorded: Recording, layer: int, activation: Tensor, gradient: Tensor | None = None) -> Features:
    """Any channels [B, n, D] of the patch tokens entering a block, with the places they belong to."""
    if activation.shape[1] == 0:
        raise PrunexError(
            f"no patch token enters block {layer} of this pruned model, so there are no features to read: give an "
            "earlier layer, or use generic_attention"
        )
    trace = recorded.entering(layer)
    where = trace.tokens()
    # A token without a patch is a fused one, or the slot of one that was dropped.
    patches = torch.zeros(activation.shape[:2], dtype=torch.long, device=where.device)
    present = patches.scatter_add(1, where.clamp(min=0), (where >= 0).long()) > 0
    if trace.pooled:  # a token need not be any patch's first choice
        present = trace.composition().sum(1) > 0
    return Features(activation, gradient, present, where, trace.grid)


def patch_means(pixels: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Mean of [B, H, W] over each patch, [B, gh, gw]; a padded patch has the mean of its real pixels."""
    seen = pixels[:, None, : grid[0] * patch[0], : grid[1] * patch[1]]
    return F.avg_pool2d(seen, patch, ceil_mode=True)[:, 0]


def _wide(tokens: Tensor, prefix: int) -> Tensor:
    return promoted(tokens.detach()[:, prefix:])
