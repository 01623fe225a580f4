"""Measures: what a model costs."""

from prunex.metrics.cost import BlockCost, Cost, cost

__all__ = ["BlockCost", "Cost", "cost"]
