"""Relevance: units that layer-wise relevance propagation finds nothing at go first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from prunex.checks import check_choice, check_flag
from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.gradients import ModifiedGradients
from prunex.relevance.rules import RelevanceRules
from prunex.units.base import Scores, UnitOptions, UnitPruner
from prunex.units.batches import mean_over_images
from prunex.vit.anatomy import ViT, read
from prunex.vit.arithmetic import Arithmetic
from prunex.vit.recording import gradients, recording
from prunex.vit.tape import Tape
from prunex.vit.units import Branch, last_layer

Rule = Literal["zplus", "attnlrp"]
RULES: tuple[Rule, ...] = ("zplus", "attnlrp")


@register(
    "pruner",
    "relevance",
    "Yeom et al., Pattern Recognition 2021, arXiv 1912.08881; ViTs: Hatefi et al., 2024, arXiv 2408.12568",
    "images, and labels if there are any; layers that lrp knows",
)
class Relevance(UnitPruner):
    r"""Pruning by explaining: a unit matters as much as its relevance for the images' own classes.

    The logit of an image's label (without labels, of the predicted class) is led back through the layers by the rules
    of the ``lrp`` explainer, and read where units are still apart: at the input of ``proj`` and of ``fc2``. With R its
    value there and n the tokens::

        score(unit) = mean over images of sum_n |sum over the unit's channels of R[n, channel]|

    A head's channels are summed before the absolute value is taken: rules conserve relevance by sums. The papers sum
    over positions signed; here a unit that speaks against the class at some tokens matters there too.

    Under "zplus" each image starts from 1, so relevance of different branches and images compares; "attnlrp" starts
    from the logit, so images of larger logits count more. Scores compare across branches: relevance per multiply-add.

    Args:
        rule: "zplus" or "attnlrp", see :func:`prunex.explainers.lrp`.
        within: Compare within branches alone: each branch's mean score is made 1, and multiply-adds do not count.
        **shared: See :class:`~prunex.units.base.UnitOptions`.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=32)
    >>> dense = prunex.cost(model).macs
    >>> widths = prunex.attach(model, "relevance", budget=0.6).calibrate([torch.randn(4, 3, 32, 32)])
    >>> round(prunex.cost(model).macs / dense, 1)
    0.6
    """

    name = "relevance"
    needs = "images"

    def __init__(
        self,
        branches: Sequence[Branch],
        classes: int,
        rule: Rule = "zplus",
        within: bool = False,
        **shared: Unpack[UnitOptions],
    ) -> None:
        super().__init__(branches, classes, **shared)
        check_choice("rule", rule, RULES)
        self.rule = rule
        self.within = check_flag("within", within)
        self.options |= {"rule": rule, "within": within}

    def prepare(self, model: nn.Module) -> None:
        """Refuse by name what relevance cannot be led through."""
        if not isinstance(model, ViT):
            raise PrunexError(
                f"relevance cannot be led through {type(model).__name__}: prunex.explain knows "
                "other ViTs of timm; use taylor or magnitude"
            )
        read(model)

    def scores(self, model: nn.Module, batches: Any = None) -> Scores:
        """Mean absolute relevance over labelled or plain batches, float64 [units] a branch."""

        def absolute(pruner: Relevance, working: nn.Module, images: Tensor, labels: Tensor | None) -> Scores:
            by_branch = pruner.relevance(working, images, labels)
            return {key: r.abs().sum((0, 1)).cpu().double() for key, r in by_branch.items()}

        return mean_over_images(self, model, batches, absolute)

    def relevance(self, model: Any, images: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Signed relevance of each unit at each token for classes int64 [B] (None: predicted), by branch [B, n, units].

        In the last block n counts the tokens that the head reads alone, where these are known beforehand.
        """
        watched: dict[nn.Module, str] = {last_layer(model.get_submodule(b.path), b.kind): b.key for b in self.branches}
        ops = _Rules(watched) if self.rule == "zplus" else _Gradients(watched)
        with torch.inference_mode(False):
            images = images.clone().requires_grad_()  # so that everything is part of the graph, weights frozen or not
        tape = Tape(gradients=True, narrow=True, ops=ops)
        try:
            with recording(model, images, target, tape, needs_class=True, precise=True) as recorded:
                one_hot = recorded.one_hot()
                ops.relevance = True
                arrived = gradients(recorded.logits, list(ops.seen.values()), one_hot)
                relevance = dict(zip(ops.seen, arrived, strict=True))
            seen = {key: x.detach() for key, x in ops.seen.items()}
        finally:
            ops.seen.clear()  # the graph knows the rules: they must not know the graph, or neither is ever let go
        units = {}
        for b in self.branches:
            x, r = seen[b.key], relevance[b.key]
            # Rules give relevance itself, modified gradients what it is per unit of the input.
            channels = (r if self.rule == "zplus" else r * x).detach()
            units[b.key] = channels.unflatten(2, (b.units, b.width)).sum(3)
        return units


class _Watching(Arithmetic):
    """Arithmetic that remembers what enters some layers, as places to differentiate at."""

    watched: Mapping[nn.Module, str]
    seen: dict[str, Tensor]

    def linear(self, module: nn.Module, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """As it is; the input of a watched layer is kept."""
        if module in self.watched:
            # A view of this layer's: what reaches others that read the same tensor is not asked for.
            x = x.view_as(x)
            self.seen[self.watched[module]] = x
        return super().linear(module, x, beside)


class _Rules(_Watching, RelevanceRules):
    def __init__(self, watched: Mapping[nn.Module, str]) -> None:
        super().__init__("zplus")
        self.watched, self.seen = watched, {}


class _Gradients(_Watching, ModifiedGradients):
    def __init__(self, watched: Mapping[nn.Module, str]) -> None:
        super().__init__("attnlrp")
        self.watched, self.seen = watched, {}
