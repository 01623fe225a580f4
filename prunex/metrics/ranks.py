"""Ranks with ties, batched: what rank measures and threshold-free measures are made of.

Ties never depend on the order of tokens: ranks are averaged, and where the k largest are asked for and several tie for
the last places, the answer is the expectation over which of them are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROOM = 2**22  # numbers in one table of pairs: larger batches go in parts


def places(values: Tensor) -> tuple[Tensor, Tensor]:
    """How many values of a row are smaller than each, and how many are at most as large: int64 [B, P] both."""
    ordered = values.sort(1).values
    values = values.contiguous()
    return torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)


def _runs(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of equal values that each place of a sorted row is in begins, and ends: int64 [B, P] both."""
    size = ordered.shape[1]
    place = torch.arange(size, device=ordered.device).expand_as(ordered)
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


def pearson(first: Tensor, second: Tensor, there: Tensor) -> Tensor:
    """Correlation within each row over the places that are ``there``: float64 [B], NaN where either is constant."""
    count = there.sum(1, keepdim=True)
    centred = []
    for values in (first, second):
        values = values.masked_fill(~there, 0)
        centred.append((values - values.sum(1, keepdim=True) / count).masked_fill(~there, 0))
    product, one, other = (centred[0] * centred[1]).sum(1), centred[0].square().sum(1), centred[1].square().sum(1)
    return (product / (one * other).sqrt()).clamp(-1, 1).where((one > 0) & (other > 0), torch.nan)


def spearman(first: Tensor, second: Tensor, there: Tensor | None = None) -> Tensor:
    """Pearson correlation of average ranks within each row: float64 [B].

    Args:
        first: float [B, P].
        second: float [B, P].
        there: bool [B, P], which places count; None: all.
    """
    there = torch.ones_like(first, dtype=torch.bool) if there is None else there
    ranks = [average_ranks(v.masked_fill(~there, torch.inf)) for v in (first, second)]
    return pearson(ranks[0], ranks[1], there)


def kendall(first: Tensor, second: Tensor, there: Tensor | None = None) -> Tensor:
    """Kendall's tau-b within each row, (concordant - discordant) / sqrt(pairs untied in one x untied in the other).

    Args:
        first: float [B, P].
        second: float [B, P].
        there: bool [B, P], which places count; None: all.

    Returns:
        float64 [B]; NaN where either is constant.
    """
    there = torch.ones_like(first, dtype=torch.bool) if there is None else there
    found = []
    step = max(1, _ROOM // first.shape[1] ** 2)
    for part in range(0, len(first), step):
        rows = slice(part, part + step)
        pairs = there[rows, :, None] & there[rows, None, :]
        one, other = (
            ((v[rows, :, None] > v[rows, None, :]).float() - (v[rows, :, None] < v[rows, None, :]).float()) * pairs
            for v in (first, second)
        )
        # float32 sums of -1, 0 and 1 are exact over a row, not over all pairs.
        both, firsts, seconds = (t.sum(2).double().sum(1) for t in (one * other, one.abs(), other.abs()))
        found.append((both / (firsts * seconds).sqrt()).clamp(-1, 1).where((firsts > 0) & (seconds > 0), torch.nan))
    return torch.cat(found)


def rank_biased(first: Tensor, second: Tensor, persistence: float, there: Tensor | None = None) -> Tensor:
    """Extrapolated rank-biased overlap of two whole rankings, largest first (Webber et al. 2010, equation 23).

    p^n + (1 - p) / p sum_d p^d X_d / d over depths d = 1..n, where X_d is how many of the d largest both share; of ties
    the expectation, each ranking breaking its own.

    Args:
        first: float [B, P].
        second: float [B, P].
        persistence: p in (0, 1).
        there: bool [B, P], which places count; None: all.

    Returns:
        float64 [B] in 0..1.
    """
    there = torch.ones_like(first, dtype=torch.bool) if there is None else there
    depth = torch.arange(1, first.shape[1] + 1, device=first.device, dtype=torch.float64)
    found = []
    step = max(1, _ROOM // first.shape[1] ** 2)
    for part in range(0, len(first), step):
        here = there[part : part + step]
        shares = []
        for values in (first, second):
            larger, at_least = places(-values[part : part + step].masked_fill(~here, -torch.inf))
            ahead = depth - larger[..., None].double()
            taken = (ahead / (at_least - larger)[..., None].double()).clamp(0, 1)
            shares.append(taken * here[..., None])
        shared = (shares[0] * shares[1]).sum(1)
        count = here.sum(1, keepdim=True).double()
        weights = (persistence**depth).expand_as(shared).masked_fill(depth > count, 0)
        tail = persistence ** count[:, 0]
        found.append(tail + (1 - persistence) / persistence * (weights * shared / depth).sum(1))
    return torch.cat(found)


def inside_top(values: Tensor, inside: Tensor, count: Tensor, there: Tensor | None = None) -> Tensor:
    """How many of each row's ``count`` largest values lie inside, float64 [B]; of ties for the last places, expected.

    Args:
        values: float [B, P].
        inside: bool [B, P].
        count: int64 [B], at least 1 for a meaningful answer and at most what is there.
        there: bool [B, P], which places count; None: all.
    """
    there = torch.ones_like(inside) if there is None else there
    lowered = values.masked_fill(~there, -torch.inf)
    last = lowered.sort(1, descending=True).values.gather(1, (count - 1).clamp(min=0)[:, None])
    above, tied = (lowered > last) & there, (lowered == last) & there
    left = (count - above.sum(1)).double()
    share = (tied & inside).sum(1).double() / tied.sum(1).clamp(min=1)
    return (above & inside).sum(1) + left * share


def separation(values: Tensor, inside: Tensor, there: Tensor | None = None) -> Tensor:
    """Area under the ROC curve: P(value inside > value outside) + half the ties; float64 [B], NaN without both kinds.

    Args:
        values: float [B, P].
        inside: bool [B, P].
        there: bool [B, P], which places count; None: all.
    """
    there = torch.ones_like(inside) if there is None else there
    inside, outside = inside & there, ~inside & there
    ordered, order = values.sort(1)
    begin, end = _runs(ordered)
    # Outside values among the first n of the sorted row, n = 0..P.
    passed = torch.nn.functional.pad(outside.gather(1, order).long().cumsum(1), (1, 0))
    beaten = passed.gather(1, begin) + passed.gather(1, end)
    beaten = beaten.masked_fill(~inside.gather(1, order), 0).sum(1).double() / 2
    pairs = inside.sum(1).double() * outside.sum(1).double()
    return (beaten / pairs).where(pairs > 0, torch.nan)


def average_precision(scores: Tensor, positive: Tensor, there: Tensor) -> Tensor:
    """Sum over thresholds of (recall step) x precision, tied scores being one threshold: float64 [B].

    Args:
        scores: float [B, N].
        positive: bool [B, N].
        there: bool [B, N], which places count.

    Returns:
        As scikit-learn's ``average_precision_score``; NaN without positives.
    """
    ordered, order = scores.sort(1, descending=True)
    hits, seen = ((positive & there).gather(1, order), there.gather(1, order))
    end = _runs(ordered)[1] - 1
    precision = hits.long().cumsum(1).double() / seen.long().cumsum(1).clamp(min=1)
    total = hits.sum(1)
    return ((precision.gather(1, end) * hits).sum(1) / total).where(total > 0, torch.nan)
