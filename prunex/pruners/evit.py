"""EViT: keep what the class token attends to, fuse the rest into one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

from prunex.checks import check_flag
from prunex.pruners.adaptive import AdaptiveOptions
from prunex.pruners.topk import TopK
from prunex.registry import register
from prunex.vit.anatomy import Anatomy


@register("pruner", "evit", "Liang et al., ICLR 2022, arXiv 2202.07800", "fine-tuning recommended, no parameters")
class EViT(TopK):
    r"""Token reorganisation by class attention ("Not All Patches are What You Need", arXiv 2202.07800, Sec. 3).

    As :class:`TopK`, and the dropped patches are fused into one extra token f = sum_dropped a_i x_i, which is not
    divided by its weights' sum and competes like any other token at the next stage. Gradients reach queries and keys
    through a. With ``score="shift"`` (see :class:`TopK`) the weights a are shares of the shift, and gradients reach the
    MLP; that use of it is ours.

    Only patches are ever dropped: class, distillation and register tokens stay where they are (the authors' code
    protects index 0 alone).

    In training the keep rate may fall along a cosine, as in the authors' training from scratch, or a line: see
    :class:`prunex.pruners.schedules.Schedule`. By default the base rate holds at once, as in their fine-tuning.
    Where counts are adaptive (see :class:`TopK`; ours), the threshold falls so.

    Args:
        keep_ratio: Share of the entering patch tokens kept at a stage, in (0, 1].
        stages: Blocks that shrink.
        fuse: Whether dropped patches leave a fused token.
        score: What patches are ranked and fused by, "attention" or "shift".
        **shared: As for :class:`TopK`.
    """

    name = "evit"

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] = 0.7,
        stages: Sequence[int] | None = None,
        fuse: bool = True,
        score: Literal["attention", "shift"] = "attention",
        **shared: Unpack[AdaptiveOptions],
    ) -> None:
        super().__init__(anatomy, keep_ratio, stages, score, **shared)
        # All else is Top-K's: only what becomes of the dropped patches differs.
        self.fuses = check_flag("fuse", fuse)
        self.options["fuse"] = self.fuses
