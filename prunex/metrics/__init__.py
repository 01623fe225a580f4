"""Measures: what a model costs, and where a map lies."""

from prunex.metrics.cost import BlockCost, Cost, cost
from prunex.metrics.localization import energy_inside, pointing_game

__all__ = ["BlockCost", "Cost", "cost", "energy_inside", "pointing_game"]
