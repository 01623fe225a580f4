"""Random: units removed by chance, what every criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import nn

from prunex.checks import check_whole
from prunex.registry import register
from prunex.units.base import Scores, UnitOptions, UnitPruner
from prunex.vit.units import Branch


@register("pruner", "random", "the usual control", "nothing")
class Random(UnitPruner):
    """Scores drawn from a uniform distribution, by a generator of its own: the global one is not touched.

    Scores compare within a branch, so that all branches lose about the same share of their units.

    Args:
        seed: Of the generator; equal seeds remove equal units.
        **shared: See :class:`~prunex.units.base.UnitOptions`.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=32)
    >>> widths = prunex.attach(model, "random", budget=0.6, seed=3).calibrate()
    >>> widths == prunex.attach(prunex.attached(model, units=True).detach(), "random", budget=0.6, seed=3).calibrate()
    True
    """

    name = "random"

    def __init__(self, branches: Sequence[Branch], classes: int, seed: int = 0, **shared: Unpack[UnitOptions]) -> None:
        super().__init__(branches, classes, **shared)
        self.seed = check_whole("seed", seed, 0)
        self.options["seed"] = seed

    def scores(self, model: nn.Module, batches: Any = None) -> Scores:
        """Uniform in [0, 1); what images there are is not looked at."""
        generator = torch.Generator().manual_seed(self.seed)
        return {b.key: torch.rand(b.units, generator=generator, dtype=torch.float64) for b in self.branches}
