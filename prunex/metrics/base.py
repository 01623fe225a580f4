"""What the metric classes share: a mean over images, the same in any split of batches and of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from prunex.checks import check_flag


class MeanOverImages(Metric):
    """The mean of one number an image, over the images where it is defined.

    A class of this kind says in :meth:`measure` what the number is. Sums are float64.

    Args:
        keep: Keep every image's value too, NaN where undefined, in the order seen (:meth:`values`): for intervals.
        **kwargs: torchmetrics' own.

    Attributes:
        total: float64, the sum of defined values.
        count: int64, how many there were.
        undefined: int64, images without a value.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor
    undefined: Tensor
    each: list[Tensor]

    def __init__(self, keep: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keep = check_flag("keep", keep)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("undefined", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        if keep:
            self.add_state("each", [], dist_reduce_fx="cat")

    def measure(self, *args: Any, **kwargs: Any) -> Tensor:
        """One number an image, float [B]; NaN where there is none."""
        raise NotImplementedError

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take a batch in; the arguments are those of the metric's function."""
        values = self.measure(*args, **kwargs).detach().to(self.total.device, torch.float64)
        there = ~values.isnan()
        self.total += values[there].sum()
        self.count += there.sum()
        self.undefined += (~there).sum()
        if self.keep:
            self.each.append(values)

    def compute(self) -> Tensor:
        """The mean, float64; NaN where no image has a value."""
        return self.total / self.count

    def values(self) -> Tensor:
        """Every image's value, float64 [images]; only with ``keep=True``."""
        return dim_zero_cat(self.each) if self.each else self.total.new_zeros(0)
