"""Where images go in a tree of prototypes: paths, the parts of an image that reach its nodes, and what turns are worth.

``order`` is the branch, numbered in pre-order, at each place of the tree level by level from left to right. Level l has
the places from 2^l - 1 on, and the children of its j-th node are the nodes 2 j and 2 j + 1 of the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunex.heads.tree_reading import TreeReading

FLOOR = 1e-12  # what the authors add to a probability before its logarithm


def log_of(probabilities: Tensor) -> Tensor:
    """Their logarithms, those below 0 taken for 0."""
    return (probabilities.clamp(min=0) + FLOOR).log()


def walk(similarity: Tensor, order: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The hard path for similarities level by level: branches and turns [B, depth], and the leaf [B]."""
    place = torch.zeros_like(similarity[:, 0], dtype=torch.long)
    visited, sides = [], []
    for level in range(depth):
        at = 2**level - 1 + place
        visited.append(order[at])
        sides.append((similarity.gather(1, at.unsqueeze(1)).squeeze(1) <= 0.5).long())
        place = 2 * place + sides[-1]
    return torch.stack(visited, 1), torch.stack(sides, 1), place


def reach(routing: Tensor, order: Tensor, depth: int) -> list[Tensor]:
    """Which part of an image reaches each node, level by level, leaves last: [B, nodes], from shares that go left.

    A product of the shares along the way.
    """
    routing = routing[:, order]
    parts = [torch.ones_like(routing[:, :1])]
    for level in range(depth):
        left = routing[:, 2**level - 1 : 2 ** (level + 1) - 1]
        parts.append(torch.stack([parts[-1] * left, parts[-1] * (1 - left)], 2).flatten(1))
    return parts


def turns_worth(reading: TreeReading, target: Tensor, order: Tensor) -> Tensor:
    """How log p(target) changes with the way that each visited branch went, [B, depth]; the rest is as it was."""
    routing, depth = reading.routing[:, order], reading.path.shape[1]
    value = reading.leaves.gather(2, target.reshape(-1, 1, 1).expand(-1, reading.leaves.shape[1], 1)).squeeze(2)
    gains = []  # by level, deepest first: what more the left subtree gives than the right one
    for level in reversed(range(depth)):
        left = routing[:, 2**level - 1 : 2 ** (level + 1) - 1]
        gains.append(value[:, ::2] - value[:, 1::2])
        value = left * value[:, ::2] + (1 - left) * value[:, 1::2]
    # p is linear in a branch's share, and its slope is the part of the image that comes there times the gain.
    slopes = torch.cat(reach(reading.routing, order, depth)[:-1], 1) * torch.cat(gains[::-1], 1)
    slope = slopes.gather(1, order.argsort()[reading.visited])
    share = reading.routing.gather(1, reading.visited)
    left, right = (log_of(value + slope * change) for change in (1 - share, -share))
    return torch.where(reading.path == 0, left - right, right - left)


def handed_round(routing: Tensor) -> Tensor:
    """Shares [B, branches], those of each branch handed round among the images, none keeping its own."""
    generator = torch.Generator().manual_seed(0)
    rounds = torch.stack([torch.randperm(len(routing), generator=generator) for _ in range(routing.shape[1])], 1)
    # In each branch's random order an image takes the share of the one before it, the first that of the last.
    return routing.gather(0, torch.empty_like(rounds).scatter(0, rounds, rounds.roll(1, 0)).to(routing.device))
