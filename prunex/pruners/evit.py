"""EViT: keep what the class token attends to, fuse the rest into one token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from prunex.checks import check_flag, check_number
from prunex.errors import PrunexError
from prunex.pruners.topk import TopK
from prunex.registry import register
from prunex.vit.anatomy import Anatomy


@register("pruner", "evit", "Liang et al., ICLR 2022, arXiv 2202.07800", "fine-tuning recommended, no parameters")
class EViT(TopK):
    r"""Token reorganisation by class attention ("Not All Patches are What You Need", arXiv 2202.07800, Sec. 3).

    As :class:`TopK`, and the dropped patches are fused into one extra token f = sum_dropped a_i x_i, which is not
    divided by its weights' sum and competes like any other token at the next stage. Gradients reach queries and keys
    through a. Only patches are ever dropped: class, distillation and register tokens stay where they are (the authors'
    code protects index 0 alone).

    In training the keep rate may fall along a cosine: 1 before ``shrink_start``, then
    base + (1 - base) (cos(pi (t - start) / length) + 1) / 2, and the base rate from ``shrink_start + shrink_length``.
    Where counts are adaptive (see :class:`TopK`; ours), the threshold falls so.

    Args:
        anatomy: Of the model.
        keep_ratio: Share of the entering patch tokens kept at a stage, in (0, 1].
        stages: Blocks that shrink.
        fuse: Whether dropped patches leave a fused token.
        shrink_start: Fraction of training with everything kept; 0 as in the authors' fine-tuning.
        shrink_length: Fraction of training the rate falls over; 0 goes to the base rate at once.
        count: "fixed", or "adaptive": each image keeps its own number, at least one.
        threshold: Share of the attention that the kept patches hold, in [0, 1], where counts are adaptive.
        expected: Measured mean shares, see :class:`~prunex.pruners.adaptive.Adaptive`.
    """

    name = "evit"

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] = 0.7,
        stages: Sequence[int] | None = None,
        fuse: bool = True,
        shrink_start: float = 0.0,
        shrink_length: float = 0.0,
        count: Literal["fixed", "adaptive"] = "fixed",
        threshold: float = 0.9,
        expected: Sequence[float] | None = None,
    ) -> None:
        super().__init__(anatomy, keep_ratio, stages, count, threshold, expected)
        self.fuses = check_flag("fuse", fuse)
        self.shrink_start = check_number("shrink_start", shrink_start, 0, 1)
        self.shrink_length = check_number("shrink_length", shrink_length, 0, 1)
        if self.shrink_start + self.shrink_length > 1:
            raise PrunexError(
                f"shrink_start={shrink_start} plus shrink_length={shrink_length} is more than the whole training: "
                "their sum may be at most 1"
            )
        self.options |= {"fuse": self.fuses, "shrink_start": self.shrink_start, "shrink_length": self.shrink_length}

    def rate(self, stage: int) -> float:
        """The keep rate in force at a stage, at the present progress."""
        return self._eased(self.rates[stage])

    def mass(self) -> float:
        """The share of attention in force now, where counts are adaptive."""
        return self._eased(self.threshold)

    def _eased(self, base: float) -> float:
        t, start, length = self.progress, self.shrink_start, self.shrink_length
        if t >= start + length:
            return base
        if t < start:
            return 1.0
        return base + (1 - base) * (math.cos(math.pi * (t - start) / length) + 1) / 2

    def inference_only(self) -> None:
        """A finished model keeps the rates in force now, so that its logits stay as they were."""
        self.rates, self.threshold = tuple(self.rate(s) for s in range(len(self.stages))), self.mass()
        self.shrink_start = self.shrink_length = 0.0
        even = len(set(self.rates)) == 1
        self.options |= {
            "keep_ratio": self.rates[0] if even else list(self.rates),
            "threshold": self.threshold,
            "shrink_start": 0.0,
            "shrink_length": 0.0,
        }
