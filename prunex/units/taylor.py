"""Taylor: units whose removal would change the loss least, to first order, go first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor, nn

from prunex.checks import check_flag
from prunex.registry import register
from prunex.units.base import Scores, UnitOptions, UnitPruner
from prunex.units.batches import loss_of, mean_over_images
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

    L is the cross-entropy with the image's label; without labels, with the class the model predicts; with several
    labels an image, [B, C] of 0 and 1, the sum of their binary cross-entropies; with a number an image, where the
    model has one output, the squared error. The paper squares the gradient of a batch's mean loss; here every
    image's own is squared, the paper's rule at a batch of one: a trained model's gradients cancel over a batch, and
    how a loader happens to split images must not change what is removed. Each image has its own row of gates, so
    that one backward pass still serves a whole batch. The paper removes units little by little while training and
    re-estimates; this is one shot.

    Scores estimate loss, so they compare across branches: a unit is worth its score per multiply-add.

    Args:
        within: Compare within branches alone: each branch's mean score is made 1, and multiply-adds do not count.
        **shared: See :class:`~prunex.units.base.UnitOptions`.

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
        self, branches: Sequence[Branch], classes: int, within: bool = False, **shared: Unpack[UnitOptions]
    ) -> None:
        super().__init__(branches, classes, **shared)
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
        """The mean squared gradients of the gates over labelled or plain batches, float64 [units] a branch."""

        def squares(pruner: Taylor, working: nn.Module, images: Tensor, labels: Tensor | None) -> Scores:
            gradients = pruner._gradients(working, images, labels)
            return {key: gradient.cpu().double().square().sum(0) for key, gradient in gradients.items()}

        return mean_over_images(self, model, batches, squares, truth=True)

    def _gradients(self, model: Any, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """dL/dg of each image: [B, units] a branch."""
        probes = {b.key: images.new_ones(len(images), b.units, requires_grad=True) for b in self.branches}
        self._probes = probes
        try:
            logits = own_output(model, images)[0]
            by_branch = gradients(loss_of(logits, labels), list(probes.values()))
        finally:
            self._probes = None
        return dict(zip(probes, by_branch, strict=True))
