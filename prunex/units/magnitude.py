"""Magnitude: units whose weights are small go first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from prunex.checks import check_choice
from prunex.registry import register
from prunex.units.base import Scores, UnitOptions, UnitPruner
from prunex.vit.units import Branch, first_layers, last_layer
from prunex.vit.weights import by_name, effective, scale_of

Weights = Literal["all", "out"]
WEIGHTS: tuple[Weights, ...] = ("all", "out")


@register("pruner", "magnitude", "Li et al., ICLR 2017, arXiv 1608.08710", "nothing")
class Magnitude(UnitPruner):
    """The L2 norm of a unit's weights, mean over the model taken branch by branch; no images are needed.

    Weights of a head: its rows of queries, keys and values (and of the output gate, where attention has one), and its
    columns of ``proj``. Of an MLP channel: its row of ``fc1`` (of both halves where the MLP is gated), and its column
    of ``fc2``. The columns are what the unit writes into the stream, so LayerScale, which multiplies them, is taken in.
    Biases, norms and relative position biases do not count. Weights are those that the layers compute with, adapters
    and masks taken in.

    The paper sums absolute weights of a convolution's filter, one layer at a time; L2, and the columns behind the
    unit, are common for groups of weights. How large weights are says nothing across layers, so a branch's scores are
    divided by their mean before one threshold counts for all.

    Args:
        weights: "all", or "out" for the columns of ``proj`` and ``fc2`` alone.
        **shared: See :class:`~prunex.units.base.UnitOptions`.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=32)
    >>> widths = prunex.attach(model, "magnitude", budget=0.6).calibrate()
    >>> round(prunex.cost(model).macs / prunex.cost(prunex.attached(model, units=True).detach()).macs, 1)
    0.6
    """

    name = "magnitude"

    def __init__(
        self, branches: Sequence[Branch], classes: int, weights: Weights = "all", **shared: Unpack[UnitOptions]
    ) -> None:
        super().__init__(branches, classes, **shared)
        check_choice("weights", weights, WEIGHTS)
        self.weights = weights
        self.options["weights"] = weights

    def scores(self, model: nn.Module, batches: Any = None) -> Scores:
        """The norms, float64 [units] a branch; what images there are is not looked at."""
        with torch.no_grad(), by_name(model):
            return {b.key: self._norms(b, model.get_submodule(b.path)) for b in self.branches}

    def _norms(self, branch: Branch, block: Any) -> Tensor:
        # On the CPU in float64: norms of half precision would tie, and every device must choose alike.
        columns = _wide(effective(last_layer(block, branch.kind))[0])
        gamma = layer_scale(block, branch)
        if gamma is not None:
            columns = columns * _wide(gamma)[:, None]
        squares = columns.square().sum(0)
        if self.weights == "all":
            squares = squares + sum(_wide(w).square().sum(1) for w in _rows(branch, block))
        return squares.view(branch.units, branch.width).sum(1).sqrt()


def layer_scale(block: Any, branch: Branch) -> Tensor | None:
    """What multiplies a branch before it is added to the stream, [D]; None without LayerScale."""
    first = branch.kind == "heads"
    # Most of timm's blocks have a module for it; Eva's and BEiT's hold the vector itself.
    scale = getattr(block, "ls1" if first else "ls2", None)
    gamma = getattr(block, "gamma_1" if first else "gamma_2", None)
    return gamma if scale is None else scale_of(scale)


def _rows(branch: Branch, block: Any) -> list[Tensor]:
    """The weights whose rows are a branch's inputs to the layer behind it: each [units * width, D]."""
    parts = (effective(layer)[0].chunk(rows) for layer, rows in first_layers(block, branch.kind))
    return [weight for chunks in parts for weight in chunks]


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().cpu().double()
