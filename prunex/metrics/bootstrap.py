"""Paired bootstrap intervals over images.

Images are what is sampled: numbers per image come first (:meth:`MeanOverImages.values`), then draws of images with
replacement. One set of draws serves all methods, so that differences between methods are paired: an image that is hard
for both moves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from prunex.checks import check_number, check_whole
from prunex.errors import PrunexError

_ROOM = 2**24  # counts of images in draws that are held at once


@dataclass(frozen=True)
class Interval:
    """A mean over images and where ``level`` of the means would lie if other images had been drawn."""

    mean: float  # over the images that have a number; NaN if none has
    low: float
    high: float
    images: int  # how many have a number
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Tensor,
    weights: Tensor | None = None,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of one number per image, with its percentile bootstrap interval.

    Args:
        values: float [N], one number an image; images with NaN are left out.
        weights: float [N], not negative: the ratio sum(values) / sum(weights) of sums over images instead of the mean,
            for measures of a whole data set, such as right and labelled pixels of :func:`segmentation_counts`.
        draws: How many times N images are drawn with replacement.
        level: Share of the draws that lie inside the interval.
        seed: Of the draws; the global random state stays as it is.

    Returns:
        The interval; NaN where no image has a number.

    >>> print(bootstrap(torch.tensor([0.0, 1.0, 1.0, 1.0]), seed=0))
    0.750 [0.250, 1.000]
    """
    values = _one_each("values", values)
    if weights is None:
        return _intervals(values[:, None], torch.ones_like(values)[:, None], draws, level, seed)[0]
    weights = _one_each("weights", weights).to(values.device)
    if len(weights) != len(values) or bool((weights < 0).any()):
        raise PrunexError(
            f"weights of {len(weights)} images do not fit values of {len(values)}: give one number of at least 0 each"
        )
    return _intervals(values[:, None], weights[:, None], draws, level, seed)[0]


def bootstrap_ratios(counts: Tensor, *, draws: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """A measure of a whole data set that is the mean of K ratios of sums over images, such as mIoU, with its interval.

    ``counts``, float [N, 2 K], are an image's numerator and denominator of each ratio in turn; images with NaN are left
    out. Columns 2 to 5 of :func:`segmentation_counts` give mIoU. All else is as for :func:`bootstrap`; NaN where a
    ratio has no denominator.

    >>> print(bootstrap_ratios(torch.tensor([[1.0, 2.0, 1.0, 4.0], [1.0, 2.0, 1.0, 4.0]])))
    0.375 [0.375, 0.375]
    """
    given = isinstance(counts, Tensor) and counts.is_floating_point() and counts.ndim == 2 and len(counts) > 0
    if not given or counts.shape[1] < 2 or counts.shape[1] % 2:
        raise PrunexError(
            f"counts are {_came(counts)}: give floats [N, 2 K], a numerator and a denominator of each ratio"
        )
    _check_draws(draws, level, seed)
    counts = counts.detach().double()
    defined = ~counts.isnan().any(1)
    mean, low, high = _resampled(
        counts.masked_fill(~defined[:, None], 0),
        lambda sums: (sums[..., ::2] / sums[..., 1::2]).mean(-1),
        draws, level, seed,
    )  # fmt: skip
    return Interval(float(mean), float(low), float(high), int(defined.sum()), level)


def compare(
    values: Mapping[str, Tensor], *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[dict[str, Interval], dict[tuple[str, str], Interval]]:
    """Several methods on the same images: each mean, and each paired difference, from the same draws.

    ``values`` are by method float [N], one number an image in the same order, NaN where an image has none; all else is
    as for :func:`bootstrap`.

    Returns:
        Interval by method, and by pair of methods that of first - second, over the images where both have a number.
        An interval without 0 inside tells the two apart.

    >>> a = torch.tensor([0.1, 0.5, 0.9])
    >>> means, differences = compare({"ours": a + 0.1, "theirs": a})
    >>> print(differences["ours", "theirs"])
    0.100 [0.100, 0.100]
    """
    if not isinstance(values, Mapping) or not values:
        raise PrunexError("values are no methods by name: give {'rollout': tensor [N], ...}")
    columns = {name: _one_each(f"values of {name}", v) for name, v in values.items()}
    lengths = {name: len(v) for name, v in columns.items()}
    if len(set(lengths.values())) > 1:
        raise PrunexError(f"methods have different numbers of images: {lengths}; give the same images to all")
    # Means and differences are columns of one table, so that they share their draws and differences are paired.
    pairs = list(combinations(columns, 2))
    device = next(iter(columns.values())).device
    single = [v.to(device) for v in columns.values()]
    paired = [columns[a].to(device) - columns[b].to(device) for a, b in pairs]
    table = torch.stack(single + paired, 1)
    intervals = _intervals(table, torch.ones_like(table), draws, level, seed)
    count = len(columns)
    return dict(zip(columns, intervals[:count], strict=True)), dict(zip(pairs, intervals[count:], strict=True))


def _intervals(values: Tensor, weights: Tensor, draws: int, level: float, seed: int) -> list[Interval]:
    """The interval of every column's ratio of sums, float64 [N, K] both."""
    _check_draws(draws, level, seed)
    # An image without a number adds nothing to either sum: it is left out of the ratio.
    defined = ~(values.isnan() | weights.isnan())
    values, weights = values.masked_fill(~defined, 0), weights.masked_fill(~defined, 0)
    count = values.shape[1]
    ends = _resampled(
        torch.cat([values, weights], 1), lambda sums: sums[..., :count] / sums[..., count:], draws, level, seed
    )
    rows = zip(*(end.tolist() for end in ends), defined.sum(0).tolist(), strict=True)
    return [Interval(mean, low, high, int(images), level) for mean, low, high, images in rows]


def _resampled(
    table: Tensor, statistic: Callable[[Tensor], Tensor], draws: int, level: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a statistic says of the sums of a table [N, C], and the ends of its interval over draws of rows."""
    drawn = torch.cat([statistic(counts @ table) for counts in _counts(len(table), draws, seed, table.device)])
    # A draw may hold no image that has a number: 0 / 0 says nothing.
    low, high = torch.nanquantile(drawn, drawn.new_tensor([(1 - level) / 2, (1 + level) / 2]), 0)
    return statistic(table.sum(0)), low, high


def _check_draws(draws: int, level: float, seed: int) -> None:
    check_whole("draws", draws, 1)
    check_whole("seed", seed, 0)
    if check_number("level", level, 0, 1) in (0, 1):
        raise PrunexError(f"level={level!r} is not allowed: give a share between 0 and 1, such as 0.95")


def _counts(images: int, draws: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """How often each image is in each draw, float64 [draws, N] in parts."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _ROOM // images)
    for start in range(0, draws, step):
        size = (min(step, draws - start), images)
        # How often an image was drawn is all that sums need, and makes a draw one row of a matrix.
        chosen = torch.randint(images, size, generator=generator)
        ones = torch.ones(size, dtype=torch.float64)
        yield torch.zeros(size, dtype=torch.float64).scatter_add(1, chosen, ones).to(device)


def _one_each(name: str, values: Any) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != 1 or not values.is_floating_point() or not len(values):
        raise PrunexError(f"{name} are {_came(values)}: give floats [N], one number an image")
    return values.detach().double()


def _came(values: Any) -> str:
    return f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
