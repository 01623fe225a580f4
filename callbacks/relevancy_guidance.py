"""RelevancyGuidance: train what is kept to be what the prediction rests on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn

import prunex
from prunex.callbacks.layers import Layered
from prunex.callbacks.participant import check_strategy
from prunex.checks import check_options, check_whole
from prunex.errors import PrunexError
from prunex.guidance import Guidance, UnitGuidance, check_guidance, dense_copy
from prunex.pruners.tome import ToMe
from prunex.units.xpruner import XPruner
from prunex.vit.anatomy import find
from prunex.vit.mount import mounted
from prunex.vit.sharded import check_gathered
from prunex.vit.surroundings import check_own_classes
from prunex.vit.units import Backbone


class RelevancyGuidance(Layered):
    """Turn relevancy of a dense judge into a target for what :class:`TokenPruning` or :class:`MaskPruning` learn.

    Beside TokenPruning, the scores that rank tokens follow the explainer's maps (:class:`prunex.guidance.Guidance` says
    by which loss, where its gradient goes and what it costs); beside MaskPruning with ``xpruner``, rows of its masks
    follow the relevance of units while masks are learned (:class:`prunex.guidance.UnitGuidance`, always by LRP). With
    both, both do. Logged: ``prunex/loss_guidance`` and ``prunex/loss_unit_guidance``.

    The dense judge is the model as it is when the callback is set up: the weights that training starts from. On resume
    those are the weights that your constructor loads.

    Args:
        method: An explainer's name; evaluate with another one than you train on.
        weight: Of the loss.
        judge: "dense", or "self" for the pruned model's own maps.
        loss: "pearson" or "kl".
        temperature: Of "kl".
        share: Share of each batch's images that are explained, in (0, 1].
        every_n_steps: Steps between explanations.
        cache: Maps kept for images that come again bit for bit; 0 keeps none.
        options: Of the explainer.
        model: Dotted path of the ViT in the module, when it holds several.

    Raises:
        PrunexError: At once for an unknown explainer or options out of range; when training starts, where nobody prunes
            the model or the pruner ranks nothing that could be guided.

    >>> from prunex.callbacks import RelevancyGuidance
    >>> RelevancyGuidance("generic_attention", weight=0.5, share=0.25).share
    0.25
    """

    def __init__(
        self,
        method: str = "tokentm",
        weight: float = 1.0,
        judge: Literal["dense", "self"] = "dense",
        loss: Literal["pearson", "kl"] = "pearson",
        temperature: float = 1.0,
        share: float = 1.0,
        every_n_steps: int = 1,
        cache: int = 0,
        options: dict[str, Any] | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__()
        check_whole("every_n_steps", every_n_steps, 1)
        check_guidance(method, weight, judge, loss, temperature, share, every_n_steps, cache)
        self.method, self.judge, self.share, self.model = method, judge, share, model
        self.options = check_options(options)
        self._shared: dict[str, Any] = {"weight": weight, "share": share, "every": every_n_steps}  # by both guides
        self._on_scores: dict[str, Any] = {"judge": judge, "loss": loss, "temperature": temperature, "cache": cache}
        self._teacher: tuple[nn.Module, ...] = ()
        self._guides: list[Guidance | UnitGuidance] = []
        self._steps: list[int] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the dense model, before a checkpoint is read."""
        check_strategy(trainer, self)
        if stage == "fit" and not pl_module.automatic_optimization:
            raise PrunexError(
                "RelevancyGuidance adds to the loss of training_step, and this module optimises by hand: leave it out, "
                "give prunex.attached(self).also() a prunex.guidance.Guidance, and add sum(losses().values()) yourself"
            )
        if stage == "fit" and self.judge == "dense":
            self._when_model_exists(pl_module, self.model, self._copy, Backbone)

    def _copy(self, module: LightningModule) -> None:
        backbone = find(module, self.model, Backbone)[1]
        check_gathered(
            backbone, "make it in __init__ and shard it in configure_model, for guidance copies its dense judge"
        )
        self._teacher = (dense_copy(backbone),)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the pruners' losses, now that every callback has attached its own; refused where there are none."""
        backbone = find(pl_module, self.model, Backbone)[1]
        tokens: Any = prunex.attached(pl_module, self.model) if mounted(backbone) is not None else None
        units = prunex.attached(pl_module, self.model, units=True)
        if tokens is None and (units is None or not isinstance(units.pruner, XPruner)):
            raise PrunexError(
                "RelevancyGuidance guides token scores or xpruner's masks, and this model has neither: add "
                "TokenPruning or MaskPruning('xpruner') to the callbacks"
            )
        if units is not None or self.judge == "self":
            check_gathered(
                backbone, "guidance by the model that trains itself needs its whole weights: use strategy='ddp'"
            )
        # Explained is the label's class: a head of the module's own behind the ViT has other classes.
        check_own_classes(pl_module, backbone, "RelevancyGuidance")
        if tokens is not None:
            still = isinstance(tokens.pruner, ToMe) or tokens.pruner.freezes_model
            if tokens.pruner.chooses != "image" or still:
                raise PrunexError(
                    f"{tokens.method} ranks no tokens by scores that training could move: RelevancyGuidance takes "
                    "dynamicvit, evit, topk and ia_red2"
                )
            options = {**self._shared, **self._on_scores, "options": self.options}
            teacher = self._teacher[0] if self._teacher else None
            self._join(tokens._attached.more, Guidance(backbone, self.method, **options, teacher=teacher))
        if units is not None and isinstance(units.pruner, XPruner):
            self._join(units._gated.more, UnitGuidance(backbone, **self._shared))

    @property
    def state_key(self) -> str:
        """Lets one trainer hold several, by what they guide with."""
        return self._generate_state_key(method=self.method, options=self.options, model=self.model)

    def state_dict(self) -> dict[str, Any]:
        """Steps seen: a run that goes on explains at the steps at which it would have."""
        return {"steps": [guide.step for guide in self._guides] or self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps = [int(step) for step in state_dict["steps"]]

    def _join(self, losses: list[Callable[..., Any]], guide: Guidance | UnitGuidance) -> None:
        # Pruners call these with every step's forwards; the callback that trains adds what they return.
        losses.append(guide)
        if len(self._guides) < len(self._steps):
            guide.step = self._steps[len(self._guides)]
        self._guides.append(guide)
        self._undo.append(lambda: losses.remove(guide) if guide in losses else None)

    def _restore(self) -> None:
        super()._restore()
        self._teacher = ()
        # Another fit counts on from here.
        self._steps, self._guides = [guide.step for guide in self._guides], []
