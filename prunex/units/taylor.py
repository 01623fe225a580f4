"""Taylor: units whose removal would change the loss least, to first order, go first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.checks import check_flag
from prunex.registry import register
from prunex.units.base import Scores, UnitPruner
from prunex.units.batches import classes_of, labelled_batches, undisturbed, widened
from prunex.vit.mount import mounted_units
from prunex.vit.recording import gradients
from prunex.vit.surroundings import own_output
from prunex.vit.units import Branch
from prunex.vit.weights import check_gradients


@register("pruner", "taylor", "Molchanov et al., CVPR 2019, arXiv 1906.10771", "images, and labels if there are any")
class Taylor(UnitPruner):
    r"""First-order Taylor importance ("Importance Estimation for Neural Network Pruning").

    What the loss L would change by if a unit were zeroed is, to first order, the sum over its weights w of
    w * dL/dw; its square is the importance (Eqs. 6-8). With a gate g = 1 on the unit the same number is dL/dg (the
    paper's gate formulation), so one multiplication in front of ``proj`` and ``fc2`` gives it for heads and channels
    alike, and weights need no gradient::

        score(unit) = mean over images of (dL_image / dg_unit)^2

    L is the cross-entropy with the image's label; without labels, with the class the model predicts. The paper squares
    the gradient of a batch's mean loss; here every image's own is squared, the paper's rule at a batch of one: a
    trained model's gradients cancel over a batch, and how a loader happens to split images must not change what is
    removed. Each image has its own row of gates, so that one backward pass still serves a whole batch. The paper
    removes units little by little while training and re-estimates; this is one shot.

    Scores estimate loss, so they compare across branches: a unit is worth its score per multiply-add.

    Args:
        branches: Of the model.
        classes: Outputs of the head.
        budget: What the slim model may cost: a share of the dense multiply-adds, or "2.4GMACs".
        min_heads: Heads left in every block at least.
        min_channels: MLP channels left in every block at least.
        round_to: Kept MLP channels are rounded up to a multiple.
        within: Compare within branches alone: each branch's mean score is made 1, and multiply-adds do not count.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=32)
    >>> batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]
    >>> dense = prunex.cost(model).macs
    >>> widths = prunex.attach(model, "taylor", budget=0.6).calibrate(batches)
    >>> round(prunex.cost(model).macs / dense, 1)
    0.6
    """

    name = "taylor"
    needs = "images"

    def __init__(
        self,
        branches: Sequence[Branch],
        classes: int,
        budget: float | str = 0.5,
        min_heads: int = 1,
        min_channels: int = 8,
        round_to: int = 1,
        within: bool = False,
    ) -> None:
        super().__init__(branches, classes, budget, min_heads, min_channels, round_to)
        self.within = check_flag("within", within)
        self.options["within"] = within
        self._probes: dict[str, Tensor] | None = None

    def prepare(self, model: nn.Module) -> None:
        """Refuse by name what gradients do not pass."""
        check_gradients(model, "magnitude")

    def gate(self, key: str, labels: Tensor | None) -> Tensor | None:
        """While scores are taken, an open gate that can be differentiated; else what was decided."""
        if self._probes is not None:
            return self._probes[key].repeat_interleave(self.branch(key).width, 1)
        return super().gate(key, labels)

    def scores(self, model: nn.Module, batches: Any = None) -> Scores:
        """The mean squared gradients of the gates, float64 [units] a branch.

        Args:
            model: The backbone whose gates this pruner answers for.
            batches: See :func:`~prunex.units.batches.labelled_batches`.

        Raises:
            PrunexError: For batches that do not fit the model, or a model without a classifier.
        """
        count = 0
        with undisturbed(model):
            totals = {b.key: torch.zeros(b.units, dtype=torch.float64) for b in self.branches}
            working = widened(model)
            own: Taylor = mounted_units(working).pruner
            with own.all_open():
                for images, labels in labelled_batches(batches, working):
                    for key, gradient in own._gradients(working, images, labels).items():
                        totals[key] += gradient.cpu().double().square().sum(0)
                    count += len(images)
        return {key: total / count for key, total in totals.items()}

    def _gradients(self, model: Any, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """dL/dg of each image: [B, units] a branch."""
        probes = {b.key: images.new_ones(len(images), b.units, requires_grad=True) for b in self.branches}
        self._probes = probes
        try:
            logits = own_output(model, images)[0]
            loss = F.cross_entropy(logits, classes_of(logits, labels), reduction="sum")
            found = gradients(loss, list(probes.values()))
        finally:
            self._probes = None
        return dict(zip(probes, found, strict=True))
