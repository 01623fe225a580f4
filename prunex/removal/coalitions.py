"""Shapley values of a game that is only known by asking: drawing coalitions, and two estimators. No model in here.

A game has P players and a value v(S) of every coalition S of them, a number or one a class. Estimators see it as a
callable ``value(coalitions bool [B, M, P]) -> [B, M, C]`` that answers M coalitions of each of B games at once. Games
of one batch are asked the same coalitions, so that what one gives never depends on its neighbours. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.errors import PrunexError

Value = Callable[[Tensor], Tensor]
HELD = 2**24  # numbers of one answer [B, M, C]: bounds memory, never changes a result
GROUPS = 10  # disjoint parts that are left out in turn for KernelSHAP's error
PER_PLAYER = 2  # coalitions KernelSHAP needs at least for every unknown it solves for


@dataclass(eq=False, repr=False)
class Estimate(Brief):
    """Estimated Shapley values of a batch of games."""

    values: Tensor  # float64 [B, P, C]; their sum over players is ``full - empty``
    errors: Tensor  # float64 [B, P, C], standard errors; NaN where too little was drawn to tell
    empty: Tensor  # float64 [B, C], v of nobody
    full: Tensor  # float64 [B, C], v of everybody
    evaluations: int  # coalitions asked of each game, those two included

    def uncertainty(self) -> Tensor:
        """Largest standard error over the values' range, float64 [B, C]: below 0.01 counts as converged."""
        spread = self.values.amax(1) - self.values.amin(1)
        return self.errors.amax(1) / spread.clamp(min=torch.finfo(spread.dtype).tiny)


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU, so that draws are the same for every device."""
    return torch.Generator().manual_seed(seed)


def size_probabilities(players: int) -> Tensor:
    """How often each size 1..P-1 is drawn: float64 [P - 1], proportional to 1 / (s (P - s))."""
    s = torch.arange(1, players, dtype=torch.float64)
    weight = 1 / (s * (players - s))
    return weight / weight.sum()


def of_sizes(sizes: Tensor, players: int, generator: torch.Generator) -> Tensor:
    """A uniformly drawn coalition of exactly each size: bool [len(sizes), P]."""
    # Ranks of uniform numbers are a uniform order, and its first s players a uniform set of size s.
    rank = torch.rand(len(sizes), players, generator=generator, dtype=torch.float64).argsort(1).argsort(1)
    return rank < sizes[:, None]


def shapley_coalitions(count: int, players: int, generator: torch.Generator, paired: bool = True) -> Tensor:
    """Coalitions whose size s has probability ~ 1 / (s (P - s)), uniform given their size: bool [count, P].

    True for who takes part; never nobody, never everybody. Where they are ``paired``, every second one is the
    complement of the one before it, and ``count`` is even. There are at least 2 players.

    >>> z = shapley_coalitions(4, 6, seeded(0))
    >>> bool((z[0] ^ z[1]).all()), bool((z[2] ^ z[3]).all())
    (True, True)
    """
    if players < 2:
        raise PrunexError(f"{players} players have no coalition between nobody and everybody: give at least 2")
    if paired and count % 2:
        raise PrunexError(f"{count} coalitions cannot be paired: give an even number")
    drawn = torch.multinomial(size_probabilities(players), count // (1 + paired), replacement=True, generator=generator)
    chosen = of_sizes(drawn + 1, players, generator)
    return torch.stack([chosen, ~chosen], 1).flatten(0, 1) if paired else chosen


def batch_coalitions(batch: int, count: int, players: int, generator: torch.Generator) -> Tensor:
    """Coalitions as :func:`shapley_coalitions` draws them, paired, each game its own: bool [B, count, P]."""
    # The games share the sizes, so that token sequences of equal length can share a forward.
    sizes = shapley_coalitions(count, players, generator)[::2].sum(1)
    chosen = of_sizes(sizes.repeat(batch), players, generator).unflatten(0, (batch, -1))
    return torch.stack([chosen, ~chosen], 2).flatten(1, 2)


def uniform_coalitions(count: int, players: int, generator: torch.Generator) -> Tensor:
    """Coalitions whose size is uniform on 0..P: keep each player with a probability drawn anew for each coalition."""
    limit = torch.rand(count, 1, generator=generator)
    return torch.rand(count, players, generator=generator) > limit


def permutation_ranks(count: int, players: int, generator: torch.Generator, antithetic: bool = True) -> Tensor:
    """Orders in which players arrive, as each player's place: int64 [count, P]; every second one reversed, or none."""
    if antithetic and count % 2:
        raise PrunexError(f"{count} orders cannot be paired: give an even number")
    # Ranks of uniform numbers: the inverse of a uniform permutation is one too.
    ranks = torch.rand(count // (1 + antithetic), players, generator=generator, dtype=torch.float64).argsort(1)
    return torch.stack([ranks, players - 1 - ranks], 1).flatten(0, 1) if antithetic else ranks


def permutation_sampling(
    value: Value, players: int, batch: int, orders: int, generator: torch.Generator, antithetic: bool = True
) -> Estimate:
    """Mean marginal contribution over random orders of arrival (Castro et al. 2009), each followed by its reverse.

    phi_i is the mean over orders of v(those before i, and i) - v(those before i). Every order alone sums to v(all) -
    v(nobody). A game of at most pairwise interactions is exact after one pair of orders. An order costs P - 1
    evaluations, and two more are shared by all. Errors are those of the means of pairs, NaN for a single one.
    """
    # Nobody and everybody are asked once for all orders.
    empty, full = _ends(value, players, batch)
    ranks = permutation_ranks(orders, players, generator, antithetic)
    unit = 1 + antithetic
    at_once = unit * max(1, HELD // (unit * max(1, players - 1) * empty.numel()))
    mean, spread, seen = torch.zeros(()), torch.zeros(()), 0
    for part in ranks.split(at_once):
        # Row k of an order: the first k to arrive, k = 1..P-1.
        coalitions = (part[:, None] < torch.arange(1, players)[:, None]).flatten(0, 1)
        between = _ask(value, coalitions, batch, empty).unflatten(1, (len(part), players - 1))
        first, last = (end[:, None, None].expand(-1, len(part), -1, -1) for end in (empty, full))
        gain = torch.cat([first, between, last], 2).diff(dim=2)
        place = part.to(gain.device)[None, :, :, None].expand(batch, -1, -1, gain.shape[3])
        marginals = gain.gather(2, place).unflatten(1, (-1, unit)).mean(2)
        mean, spread, seen = _pool(mean, spread, seen, marginals)
    errors = (spread / (seen - 1) / seen).sqrt() if seen > 1 else torch.full_like(mean, float("nan"))
    return Estimate(mean, errors, empty, full, 2 + orders * (players - 1))


def kernel_shap(
    value: Value,
    players: int,
    batch: int,
    samples: int,
    generator: torch.Generator,
    paired: bool = True,
    closed_form: bool = False,
) -> Estimate:
    """Weighted least squares for an additive game that ends where the game does (Lundberg & Lee, arXiv 1705.07874).

    With coalitions z drawn by size (so that all weigh alike; Covert & Lee, arXiv 2012.01536), A = mean z z^T and
    b = mean z (v(z) - v(0)): phi = A^-1 (b - 1 (1^T A^-1 b - D) / (1^T A^-1 1)), D = v(all) - v(nobody). It is solved
    as one system with the constraint, which needs A to be regular only on vectors that sum to 0. Errors are jackknifed:
    ten disjoint parts of the draws are left out in turn; NaN where the rest would leave the solution open.

    ``samples`` coalitions are drawn, many times P for useful values and an even number where each is ``paired`` with
    its complement; fewer than 2 P are refused. With ``closed_form`` A is that of infinitely many draws instead of their
    mean: unbiased, but noisier, and no longer exact for additive games.
    """
    empty, full = _ends(value, players, batch)
    total = full - empty
    if players == 1:
        return Estimate(total[:, None], torch.zeros_like(total)[:, None], empty, full, 2)
    if samples < PER_PLAYER * players:
        raise PrunexError(
            f"{samples} coalitions cannot determine {players} values: give at least {PER_PLAYER * players}, "
            "better 20 times as many"
        )
    coalitions = shapley_coalitions(samples, players, generator, paired)
    unit = 1 + paired
    exact = closed_form_matrix(players) if closed_form else None
    counts, products, gains = [], [], []
    # Sums are kept part by part, so that each can be left out for the error.
    for group in torch.arange(samples // unit).tensor_split(min(GROUPS, samples // unit)):
        part = coalitions[unit * int(group[0]) : unit * (int(group[-1]) + 1)]
        a, b = torch.zeros(()), torch.zeros(())
        for z in part.split(max(1, HELD // empty.numel())):
            gain = _ask(value, z, batch, empty) - empty[:, None]
            member = z.to(gain.device, torch.float64)
            a, b = a + member.T @ member, b + member.T @ gain
        counts.append(len(part))
        products.append(a)
        gains.append(b)

    def solve(a: Tensor, b: Tensor, count: int) -> Tensor | None:
        return _solve(a / count if exact is None else exact.to(b.device), b / count, total)

    a, b = torch.stack(products).sum(0), torch.stack(gains).sum(0)
    values = solve(a, b, samples)
    if values is None:
        raise PrunexError(
            f"the coalitions drawn leave some of the {players} values open: draw more, at least 20 for each player"
        )
    without = [solve(a - x, b - y, samples - n) for x, y, n in zip(products, gains, counts, strict=True)]
    solved = [v for v in without if v is not None]
    errors = torch.full_like(values, float("nan"))
    if len(solved) == len(without) > 1:
        errors = (torch.stack(solved).var(0, correction=0) * (len(solved) - 1)).sqrt()
    return Estimate(values, errors, empty, full, 2 + samples)


def closed_form_matrix(players: int) -> Tensor:
    """E[z z^T] of :func:`shapley_coalitions`: float64 [P, P], 1/2 on the diagonal and one number beside it."""
    s = torch.arange(1, players, dtype=torch.float64)
    both = ((s - 1) / (players - s)).sum() / (players * (players - 1) * (1 / (s * (players - s))).sum())
    return torch.full((players, players), float(both), dtype=torch.float64).fill_diagonal_(0.5)


def _ask(value: Value, coalitions: Tensor, batch: int, like: Tensor | None) -> Tensor:
    """The same coalitions [M, P] asked of every game: float64 [B, M, C]; ``like`` [B, C] tells C where M is 0."""
    if like is not None and len(coalitions) == 0:
        return like.new_empty(batch, 0, like.shape[1])
    return value(coalitions.expand(batch, -1, -1)).detach().double()


def _ends(value: Value, players: int, batch: int) -> tuple[Tensor, Tensor]:
    """The values of nobody and of everybody, [B, C] each."""
    if players < 1:
        raise PrunexError("a game without players has nothing to share: give at least one")
    ends = _ask(value, torch.tensor([[False] * players, [True] * players]), batch, None)
    return ends[:, 0], ends[:, 1]


def _pool(mean: Tensor, spread: Tensor, seen: int, observed: Tensor) -> tuple[Tensor, Tensor, int]:
    """Welford's sums with further observations [B, m, P, C]: mean, summed squares about it, and their number."""
    more, total = observed.shape[1], seen + observed.shape[1]
    later = observed.mean(1)
    squares = ((observed - later[:, None]) ** 2).sum(1)
    if seen == 0:
        return later, squares, more
    gap = later - mean
    return mean + gap * (more / total), spread + squares + gap**2 * (seen * more / total), total


def _solve(a: Tensor, b: Tensor, total: Tensor) -> Tensor | None:
    """Minimum of phi^T a phi - 2 phi^T b with values that sum to ``total``: [B, P, C] for b [B, P, C]; None if open."""
    players = len(a)
    # The constraint as one more row and column (a Lagrange multiplier).
    system = torch.ones(players + 1, players + 1, dtype=a.dtype, device=a.device)
    system[:players, :players] = a
    system[players, players] = 0
    if torch.linalg.matrix_rank(system, hermitian=True) <= players:
        return None
    values = torch.linalg.solve(system, torch.cat([b, total[:, None]], 1))[:, :players]
    return values + ((total - values.sum(1)) / players)[:, None]  # the last bit of the constraint too
