"""Small games whose Shapley values are known: by definition over every coalition, or by hand."""

from itertools import combinations
from math import factorial

import torch


def every_coalition(players):
    """bool [2^P, P]; bit i of the row number tells whether i takes part."""
    return (torch.arange(2**players)[:, None] >> torch.arange(players)) % 2 == 1


def exact(table, players):
    """Shapley values [P, C] of a table [2^P, C] in the order of every_coalition, from the definition's sum."""
    values = torch.zeros(players, table.shape[1], dtype=torch.float64)
    for i in range(players):
        others = [j for j in range(players) if j != i]
        for size in range(players):
            weight = factorial(size) * factorial(players - size - 1) / factorial(players)
            for chosen in combinations(others, size):
                row = sum(1 << j for j in chosen)
                values[i] += weight * (table[row | 1 << i] - table[row]).double()
    return values


class Tabled:
    """Games [B, 2^P, C] that answer from a table and count what they were asked."""

    def __init__(self, table):
        self.table, self.asked = table, 0
        self.players = table.shape[1].bit_length() - 1

    def __call__(self, coalitions):
        self.asked += coalitions.shape[1]
        rows = (coalitions.long() << torch.arange(self.players)).sum(2)
        return self.table.gather(1, rows[:, :, None].expand(-1, -1, self.table.shape[2]))


def toy(players=10, batch=2, classes=3, seed=0):
    """Smooth games with interactions of every order."""
    generator = torch.Generator().manual_seed(seed)
    z = every_coalition(players).double()
    one, two = (torch.randn(batch, players, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return Tabled(torch.tanh(z @ one * 0.6) * torch.cos(z @ two * 0.4) + z @ one * 0.2)


def additive(weights):
    """v(S) = 5 + the sum of weights [B, P, C] over S."""
    return lambda z: 5 + z.double() @ weights


def pairwise(weights, partners):
    """The same plus partners [B, P, P, C] (symmetric, no diagonal) for every pair in S."""
    return lambda z: z.double() @ weights + 0.5 * torch.einsum("bmi,bmj,bijc->bmc", z.double(), z.double(), partners)
