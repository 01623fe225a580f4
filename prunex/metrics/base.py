"""The torchmetrics class around a measure of images: the mean over those it is defined for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from prunex.checks import check_flag
from prunex.errors import PrunexError


class MeanOverImages(Metric):
    """Mean of a number per image, over all images for which it is defined (not NaN), in one process or several.

    A subclass gives :meth:`measure`. Sums are kept in float64, so that splitting batches changes nothing.

    Args:
        keep: Also keep every image's number (:meth:`values`), for :func:`prunex.metrics.bootstrap`.
        shape: Of one image's answer: () for a number, (K,) for K of them.
        **kwargs: torchmetrics' own.

    Attributes:
        total: Sum of the numbers that are defined, float64 of ``shape``.
        count: Of how many images, int64 of ``shape``.
        undefined: Images without one, int64 of ``shape``.
        each: With ``keep``, every image's number, NaN included.

    Raises:
        PrunexError: For ``keep`` that is not True or False.
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False

    total: Tensor
    count: Tensor
    undefined: Tensor
    each: list[Tensor]

    def __init__(self, keep: bool = False, shape: tuple[int, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keep = check_flag("keep", keep)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("undefined", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        # A MetricCollection goes on with only one of the metrics whose states are equal after their first batch, as
        # those of different measures may be; NaN equals nothing.
        self.add_state("apart", torch.tensor(torch.nan), dist_reduce_fx="max")
        if keep:
            self.add_state("each", [], dist_reduce_fx="cat")

    def measure(self, *args: Any, **kwargs: Any) -> Tensor:
        """One answer an image, float [B, *shape]; NaN where there is none."""
        raise NotImplementedError

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take a batch; arguments as the function's."""
        values = self.measure(*args, **kwargs).detach().to(self.total)
        defined = ~values.isnan()
        self.total = self.total + values.masked_fill(~defined, 0).sum(0)
        self.count = self.count + defined.sum(0)
        self.undefined = self.undefined + (~defined).sum(0)
        if self.keep:
            self.each.append(values)

    def compute(self) -> Tensor:
        """The mean, float64 of ``shape``; NaN where no image had a number."""
        return self.total / self.count.where(self.count > 0, torch.nan)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """Gather; a process that saw no image sends none of the right shape and dtype."""
        if self.keep and isinstance(self.each, list) and not self.each:
            self.each = [self.total.new_zeros((0, *self.total.shape))]
        super()._sync_dist(*args, **kwargs)

    def values(self) -> Tensor:
        """Every number of this process so far, float64 [N, *shape], NaN where there was none.

        Raises:
            PrunexError: Unless made with ``keep=True``.
        """
        if not self.keep:
            raise PrunexError(f"{type(self).__name__} kept only sums: make it with keep=True")
        if isinstance(self.each, list) and not self.each:
            return self.total.new_zeros((0, *self.total.shape))
        return dim_zero_cat(self.each)
