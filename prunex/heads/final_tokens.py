"""The final tokens of a forward as a head reads them: those that are there, each as often as it counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.vit.handover import Handed
from prunex.vit.trace import TokenTrace


@dataclass(eq=False, repr=False)
class FinalTokens(Brief):
    """What leaves the final norm, with what a pruner did on the way.

    Attributes:
        prefix: [B, prefix, D], class, distillation and register tokens.
        patches: [B, n, D], the patch tokens that are left; slots of dropped ones included while training masked.
        counts: float [B, n] or None: how many patches each token stands for, 0 in an empty slot; None: one each.
        trace: Which patches the tokens are; None: all of them, in raster order.
        grid: The patch grid of the images; None where nothing tells it, of tokens of a model for any image size that
            no forward of its gave.
    """

    prefix: Tensor
    patches: Tensor
    counts: Tensor | None
    trace: TokenTrace | None
    grid: tuple[int, int] | None

    @classmethod
    def of(cls, x: Tensor, left: Handed) -> FinalTokens:
        """Final tokens [B, prefix + n, D] with what their forward handed on."""
        prefix = left.anatomy.prefix
        counts = None
        for factor in (left.policy, left.sizes):
            # Tokens of another number are the user's own, and not what the last forward left.
            if factor is not None and factor.shape == x.shape[:2]:
                factor = factor[:, prefix:].to(x.dtype)
                counts = factor if counts is None else counts * factor
        # A trace without stages says what None does: every token is a patch, in raster order.
        trace = left.trace if left.trace is not None and left.trace.stages else None
        fixed = None if left.anatomy.dynamic else left.anatomy.grid
        return cls(x[:, :prefix], x[:, prefix:], counts, trace, fixed if left.trace is None else left.trace.grid)

    @property
    def whole_grid(self) -> tuple[int, int]:
        """The patch grid, for whoever cannot do without.

        Raises:
            PrunexError: Where nothing tells it.
        """
        if self.grid is None:
            raise PrunexError(
                "this model takes images of any size, and these tokens do not tell their patch grid: give images, or "
                "what its forward_features returned"
            )
        return self.grid

    @property
    def shares(self) -> Tensor:
        """Each token's part of a mean over patches: [B, n], summing to 1 where any is left."""
        if self.counts is None:
            return self.patches.new_full(self.patches.shape[:2], 1 / max(1, self.patches.shape[1]))
        # An image that has lost every patch has shares of 0, not of 0 / 0.
        return self.counts / self.counts.sum(1, keepdim=True).clamp(min=1)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of [B, n, ...] over patches, [B, ...]."""
        if self.counts is None:
            return values.mean(1)
        return torch.einsum("bn,bn...->b...", self.shares, values)

    def softmax(self, scores: Tensor) -> Tensor:
        """The softmax of scores [B, n, m] over tokens, each counted as often as it counts: [B, n, m]."""
        if self.counts is None:
            return scores.softmax(1)
        # As if a merged token were there once for each of its patches; the floor keeps the logarithm's gradient whole.
        floor = torch.finfo(scores.dtype).tiny
        absent = self.counts.unsqueeze(2) <= 0
        scores = scores + self.counts.clamp(min=floor).log().unsqueeze(2)
        weights = scores.masked_fill(absent, torch.finfo(scores.dtype).min).softmax(1)
        return weights.masked_fill(absent, 0)  # of an image that has lost every patch nothing is left to weigh

    def hide(self, values: Tensor, fill: float) -> Tensor:
        """Values [B, n, ...] with a number in slots that nobody is left in, for maxima."""
        if self.counts is None:
            return values
        absent = (self.counts <= 0).reshape(*self.counts.shape, *[1] * (values.ndim - 2))
        return values.masked_fill(absent, fill)

    def on_patches(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What each patch's own token has: values [B, n, ...] as [B, P, ...], and bool [B, P], who has one."""
        if self.trace is None:
            return values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        place = self.trace.tokens()
        # Patches without a token read any row: who has one is said beside it.
        index = place.clamp(min=0).reshape(*place.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        return values.gather(1, index), place >= 0
