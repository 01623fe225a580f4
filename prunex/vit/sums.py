"""Sums over the tokens that become one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def members(group: Tensor, count: int) -> Tensor:
    """Who is in which group, bool [B, count, E], from int64 [B, E]; -1 is in none."""
    return group.unsqueeze(1) == torch.arange(count, device=group.device).unsqueeze(1)


def grouped(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Sums over each group's members: values [B, E, ...] and groups int64 [B, E], -1 for none, to [B, count, ...].

    >>> grouped(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[1, 0, 1, -1]]), 3)
    tensor([[2., 5., 0.]])
    """
    rest = values.shape[2:]
    if torch.compiler.is_exporting():
        # Other runtimes reject or miscompute a scatter that adds (TensorRT); a matrix product they all know.
        flat = values.reshape(*values.shape[:2], math.prod(rest))
        return (members(group, count).to(values.dtype) @ flat).reshape(values.shape[0], count, *rest)
    # Who is in no group goes to a slot behind the last, which is cut off. Not len(): that would fix a compiled graph to
    # the batch of its example.
    room = values.new_zeros(values.shape[0], count + 1, *rest)
    at = group.masked_fill(group < 0, count).view(*group.shape, *[1] * len(rest)).expand_as(values)
    return room.scatter_add(1, at, values)[:, :count]
