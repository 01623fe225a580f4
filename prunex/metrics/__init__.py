"""Measures: what a model costs, and where a map lies."""

from prunex.metrics.localization import energy_inside, pointing_game
from prunex.vit.cost import BlockCost, Cost, cost

__all__ = ["BlockCost", "Cost", "cost", "energy_inside", "pointing_game"]
