"""The torchmetrics classes around measures of images: the mean over those they are defined for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from prunex.checks import check_flag
from prunex.errors import PrunexError, unknown

TORCHMETRICS = (
    "compute_on_cpu", "dist_sync_on_step", "process_group", "dist_sync_fn", "distributed_available_fn",
    "sync_on_compute", "compute_with_cache",
)  # fmt: skip
KEYWORD, REST = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD


class MeanOverImages(Metric):
    """Mean of a number per image, over all images for which it is defined (not NaN), in one process or several.

    A subclass gives :meth:`measure`. Sums are kept in float64, so that splitting batches changes nothing: ``total`` of
    the numbers that are defined, ``count`` of their images and ``undefined``, the images without one.

    Args:
        keep: Also keep every image's number (:meth:`values`), for :func:`prunex.metrics.bootstrap`.
        shape: Of one image's answer: () for a number, (K,) for K of them.
        **kwargs: torchmetrics' own.
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
        # Float64 sums do not depend on how batches were split.
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


class MeanOf(MeanOverImages):
    """Mean over images of one function, made by :func:`mean_of`; the function's options are attributes."""

    function: ClassVar[Callable[..., Tensor]]
    options: ClassVar[dict[str, Any]] = {}  # the function's, with their defaults
    extras: ClassVar[dict[str, Any]] = {}  # of the class alone
    checks: ClassVar[dict[str, Callable[[Any], Any]]] = {}
    __signature__: ClassVar[inspect.Signature]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self.__signature__.bind(*args, **kwargs)
        given.apply_defaults()
        rest, keep = given.arguments.pop("kwargs"), given.arguments.pop("keep")
        # torchmetrics would name what it does not know, but offer no near name.
        for name in rest:
            if name not in TORCHMETRICS:
                raise unknown(f"option of {type(self).__name__}", name, {*self.extras, *self.options})
        super().__init__(keep, **rest)
        for name, value in given.arguments.items():
            setattr(self, name, self.checks[name](value) if name in self.checks else value)

    def measure(self, *args: Any, **kwargs: Any) -> Tensor:
        """One number an image; several of one image are averaged where they are defined."""
        # Read anew each time: an option that is set on a metric counts from then on.
        options = {name: getattr(self, name) for name in self.options}
        values = type(self).function(*args, **kwargs, **options)
        return values if values.ndim == 1 else values.nanmean(1)


def mean_of(
    name: str,
    function: Callable[..., Tensor],
    base: type[MeanOf] = MeanOf,
    *,
    higher_is_better: bool | None = True,
    **checks: Callable[[Any], Any],
) -> type[MeanOf]:
    """The class of a function's mean over images; ``update`` takes what the function takes.

    The function's parameters with a default, ``target`` aside, become options; ``checks`` are by option what sees to
    its value before the first batch.

    >>> from prunex.metrics import EqualAreaIoU
    >>> metric = EqualAreaIoU(judge="dense")
    >>> metric.update(torch.tensor([[[True, True, False, False]]]), torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]))
    >>> metric.compute(), metric.judge
    (tensor(0.3333, dtype=torch.float64), 'dense')
    """
    # What has a default is an option; only a class that is explained comes with the data all the same.
    taken = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in taken if p.default is not p.empty and p.name != "target"}
    defaults |= getattr(function, "handed_on", {})
    every = {**base.extras, **defaults, "keep": False}
    parameters = [inspect.Parameter(option, KEYWORD, default=value) for option, value in every.items()]
    words = (inspect.getdoc(function) or "").split(">>> ")[0].rstrip()
    body = {
        "__module__": function.__module__,  # where pickle looks the class up
        "__doc__": f"Mean over images of :func:`{function.__name__}`. {words}",
        "function": staticmethod(function),
        "options": defaults,
        "checks": {**base.checks, **checks},
        "__signature__": inspect.Signature([*parameters, inspect.Parameter("kwargs", REST)]),
        "higher_is_better": higher_is_better,
    }
    metaclass: Any = type(base)
    made: type[MeanOf] = metaclass(name, (base,), body)
    return made
