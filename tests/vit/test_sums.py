"""Sums over groups, against a loop, and the same sums in a graph for other runtimes."""

import pytest
import torch
from torch import nn

from prunex.vit.sums import grouped, members


class Grouped(nn.Module):
    def forward(self, values, group):
        return grouped(values, group, 4)


@pytest.mark.parametrize("rest", [(), (3,), (2, 3)])
def test_sums_are_those_of_a_loop_also_where_a_graph_is_exported(rest):
    generator = torch.Generator().manual_seed(len(rest))
    values = torch.randn(2, 7, *rest, generator=generator, dtype=torch.float64)
    group = torch.tensor([[0, -1, 3, 3, 0, 1, -1], [-1, -1, 1, 1, 1, 3, 0]])  # nobody is in group 2
    wanted = torch.zeros(2, 4, *rest, dtype=torch.float64)
    for image in range(2):
        for place, at in enumerate(group[image].tolist()):
            if at >= 0:
                wanted[image, at] += values[image, place]
    assert torch.allclose(grouped(values, group, 4), wanted, rtol=0, atol=1e-12)
    program = torch.export.export(Grouped(), (values, group))
    assert not any("scatter" in str(node.target) for node in program.graph.nodes)
    assert torch.allclose(program.module()(values, group), wanted, rtol=0, atol=1e-12)


def test_what_is_in_no_group_reaches_no_sum():
    values = torch.tensor([[1.0, torch.nan, torch.inf]])
    assert grouped(values, torch.tensor([[1, -1, -1]]), 2).tolist() == [[0.0, 1.0]]
    assert members(torch.tensor([[1, -1]]), 2).tolist() == [[[False, False], [True, False]]]


def test_gradients_reach_each_member_and_nobody_else():
    values = torch.randn(1, 3, 2, requires_grad=True)
    grouped(values, torch.tensor([[0, -1, 0]]), 1)[..., 1].sum().backward()
    assert values.grad.tolist() == [[[0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]]
