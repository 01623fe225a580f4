"""Ranks with ties, batched: what rank measures and threshold-free measures are made of.

Ties never depend on the order of tokens: ranks are averaged, and where the k largest are asked for and several tie for
the last places, the answer is the expectation over which of them are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12  # of the largest value: what rounding alone may make of nothing
_ROOM = 2**22  # numbers in one table of pairs: larger batches go in parts


def places(values: Tensor) -> tuple[Tensor, Tensor]:
    """How many values of a row are smaller than each, and how many are at most as large: int64 [B, P] both."""
    # Counting by search needs no table of pairs.
    ordered = values.sort(1).values
    values = values.contiguous()
    return torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)


def _runs(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of equal values that each place of a sorted row is in begins, and ends: int64 [B, P] both."""
    size = ordered.shape[1]
    place = torch.arange(size, device=ordered.device).expand_as(ordered)
    # A run begins where a value differs from the one before it, and ends where the next begins.
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    last = torch.ones_like(new)
    last[:, :-1] = new[:, 1:]
    begin = place.masked_fill(~new, 0).cummax(1).values
    end = (place + 1).masked_fill(~last, size).flip(1).cummin(1).values.flip(1)
    return begin, end


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..P within each row, float64 [B, P]; tied values share the mean of theirs."""
    below, to_here = places(values)
    return (below + to_here + 1).double() / 2


def pearson(first: Tensor, second: Tensor, counted: Tensor | None = None) -> Tensor:
    """Correlation along the last dimension over the places that count (None: all), float64 [...].

    NaN where either side does not vary, beyond float64's rounding.

    >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([6.0, 4.0, 2.0])).item()
    -1.0
    """
    counted = torch.ones_like(first, dtype=torch.bool) if counted is None else counted
    count = counted.sum(-1, keepdim=True)
    constant = torch.zeros_like(counted[..., 0])
    scaled = []
    for values in (first.double(), second.double()):
        spread = values.masked_fill(~counted, -torch.inf).amax(-1) - values.masked_fill(~counted, torch.inf).amin(-1)
        values = values.masked_fill(~counted, 0)
        constant = constant | ~(spread > TINY * values.abs().amax(-1))
        centred = (values - values.sum(-1, keepdim=True) / count).masked_fill(~counted, 0)
        # Squares of very small values would be lost.
        scaled.append(centred / centred.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(centred.dtype).tiny))
    a, b = scaled
    correlation = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return correlation.clamp(-1, 1).masked_fill(constant, torch.nan)


def spearman(first: Tensor, second: Tensor, counted: Tensor | None = None) -> Tensor:
    """Pearson correlation of average ranks within each row [B, P], over the places that count: float64 [B]."""
    counted = torch.ones_like(first, dtype=torch.bool) if counted is None else counted
    ranks = [average_ranks(values.masked_fill(~counted, torch.inf)) for values in (first, second)]
    return pearson(ranks[0], ranks[1], counted)


def kendall(first: Tensor, second: Tensor, counted: Tensor | None = None) -> Tensor:
    """Kendall's tau-b within each row [B, P], over the places that count: float64 [B]; NaN where either is constant."""
    counted = torch.ones_like(first, dtype=torch.bool) if counted is None else counted
    taus = []
    for rows in _parts(first):
        pairs = counted[rows, :, None] & counted[rows, None, :]
        a, b = (_order(values[rows]) * pairs for values in (first, second))
        # float32 sums of -1, 0 and 1 are exact over a row, not over all pairs.
        both, untied, others = (t.sum(2).double().sum(1) for t in (a * b, a.abs(), b.abs()))
        taus.append((both / (untied * others).sqrt()).clamp(-1, 1).where((untied > 0) & (others > 0), torch.nan))
    return torch.cat(taus)


def _order(values: Tensor) -> Tensor:
    """1 where a row's value is larger than another of the row, -1 where smaller, 0 where equal: [B, P, P]."""
    return (values[:, :, None] > values[:, None, :]).float() - (values[:, :, None] < values[:, None, :]).float()


def _parts(rows: Tensor) -> list[slice]:
    """Rows [B, P] in parts whose tables of pairs fit into memory."""
    step = max(1, _ROOM // rows.shape[1] ** 2)
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def rank_biased(first: Tensor, second: Tensor, persistence: float, counted: Tensor | None = None) -> Tensor:
    """Extrapolated rank-biased overlap of two whole rankings, largest first (Webber et al. 2010, equation 23).

    p^n + (1 - p) / p sum_d p^d X_d / d over depths d = 1..n, where X_d is how many of the d largest both share; of ties
    the expectation, each ranking breaking its own.
    """
    counted = torch.ones_like(first, dtype=torch.bool) if counted is None else counted
    depth = torch.arange(1, first.shape[1] + 1, device=first.device, dtype=torch.float64)
    overlaps = []
    for rows in _parts(first):
        here = counted[rows]
        taken = []  # how likely each place is among the d largest, [b, P, d]
        for values in (first, second):
            larger, at_least = places(-values[rows].masked_fill(~here, -torch.inf))
            ahead = depth - larger[..., None].double()
            taken.append((ahead / (at_least - larger)[..., None].double()).clamp(0, 1) * here[..., None])
        shared = (taken[0] * taken[1]).sum(1)
        count = here.sum(1, keepdim=True).double()
        weights = (persistence**depth).expand_as(shared).masked_fill(depth > count, 0)
        tail = persistence ** count[:, 0]
        overlaps.append(tail + (1 - persistence) / persistence * (weights * shared / depth).sum(1))
    return torch.cat(overlaps)


def inside_top(values: Tensor, inside: Tensor, count: Tensor, counted: Tensor | None = None) -> Tensor:
    """How many of each row's ``count`` [B] largest values lie inside, float64 [B]; of ties for the last, expected."""
    counted = torch.ones_like(inside) if counted is None else counted
    lowered = values.masked_fill(~counted, -torch.inf)
    # The value of the last place decides: what is larger is in, and what equals it shares the places left.
    last = lowered.sort(1, descending=True).values.gather(1, (count - 1).clamp(min=0)[:, None])
    above, tied = (lowered > last) & counted, (lowered == last) & counted
    left = (count - above.sum(1)).double()
    share = (tied & inside).sum(1).double() / tied.sum(1).clamp(min=1)
    return (above & inside).sum(1) + left * share


def separation(values: Tensor, inside: Tensor, counted: Tensor | None = None) -> Tensor:
    """Area under the ROC curve, P(value inside > value outside) and half the ties: [B]; NaN without both kinds."""
    counted = torch.ones_like(inside) if counted is None else counted
    inside, outside = inside & counted, ~inside & counted
    ordered, order = values.sort(1)
    begin, end = _runs(ordered)
    # Outside values among the first n of the sorted row, n = 0..P.
    passed = torch.nn.functional.pad(outside.gather(1, order).long().cumsum(1), (1, 0))
    beaten = passed.gather(1, begin) + passed.gather(1, end)
    beaten = beaten.masked_fill(~inside.gather(1, order), 0).sum(1).double() / 2
    pairs = inside.sum(1).double() * outside.sum(1).double()
    return (beaten / pairs).where(pairs > 0, torch.nan)


def average_precision(scores: Tensor, positive: Tensor, counted: Tensor) -> Tensor:
    """Sum over thresholds of (recall step) x precision, tied scores being one threshold, as scikit-learn's: [B]."""
    ordered, order = scores.sort(1, descending=True)
    hits, seen = (positive & counted).gather(1, order), counted.gather(1, order)
    end = _runs(ordered)[1] - 1
    precision = hits.long().cumsum(1).double() / seen.long().cumsum(1).clamp(min=1)
    total = hits.sum(1)
    return ((precision.gather(1, end) * hits).sum(1) / total).where(total > 0, torch.nan)


def ranked(values: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """The place of each unit when they leave in "positive" (largest first) or "negative" order, and how many tie.

    >>> ranked(torch.tensor([[0.2, 0.7, 0.2, 0.9]]), "negative")
    (tensor([[0, 2, 1, 3]], dtype=torch.int32), tensor([2]))
    """
    ordered, index = values.sort(dim=1, descending=order == "positive", stable=True)
    place = torch.arange(values.shape[1], dtype=torch.int32, device=values.device).expand_as(index)
    same = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 1))
    ties = (same[:, 1:] | same[:, :-1]).sum(1)
    return torch.empty_like(place, memory_format=torch.contiguous_format).scatter_(1, index, place), ties
