"""TokenPruning: make the ViT inside somebody's LightningModule prune its tokens while it is fine-tuned."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

import prunex
from prunex.errors import PrunexError
from prunex.pruners.base import check_number
from prunex.vit.anatomy import find

CHECKPOINT_KEY = "prunex"
CHECKPOINT_VERSION = 1


class TokenPruning(Callback):
    """Attach a token pruner in ``setup`` and train it with the user's own loss, optimiser and precision.

    Losses of the pruner are added to what ``training_step`` returns; schedules follow the trainer's progress. Logged
    every epoch: ``prunex/loss_*`` (each auxiliary loss), ``prunex/keep_ratio_stage*`` (realised in training) and, in
    validation, ``prunex/val_keep_ratio_stage*`` and ``prunex/gmacs`` (per image at inference).

    The model stays pruned after ``fit``; ``prunex.attached(module).detach()`` gives the dense one back. The checkpoint
    says how it was pruned, see :func:`prunex.callbacks.load_from_checkpoint`.

    Args:
        method: "topk", "evit" or "dynamicvit"; ``prunex methods`` lists them.
        keep_ratio: Share of patch tokens kept at each stage, in (0, 1], or one share a stage.
        stages: Block indices; None takes a quarter, half and three quarters of the depth.
        options: Further options of the method, such as ``{"fuse": False}``.
        model: Dotted path of the ViT in the module, when it holds several.
        backbone_lr_scale: Share of each optimiser step that reaches parameters other than the pruner's own, in
            [0, 1] (DynamicViT's recipe: 0.01). Any optimiser and schedule; costs a copy of the parameters.
        freeze_backbone: Fraction of training at whose start those parameters do not move at all.

    Raises:
        PrunexError: At once for numbers out of range; in ``setup`` for an unknown method or option, no ViT or several,
            a second TokenPruning, or manual optimisation with a method that brings losses.

    >>> from prunex.callbacks import TokenPruning
    >>> TokenPruning("evit", keep_ratio=0.7, options={"fuse": False}).method
    'evit'
    """

    def __init__(
        self,
        method: str = "dynamicvit",
        keep_ratio: float | list[float] = 0.7,
        stages: list[int] | None = None,
        options: dict[str, Any] | None = None,
        model: str | None = None,
        backbone_lr_scale: float = 1.0,
        freeze_backbone: float = 0.0,
    ) -> None:
        super().__init__()
        prunex.registry.lookup("pruner", method)
        self.method = method
        self.options: dict[str, Any] = {**(options or {}), "keep_ratio": keep_ratio}
        if stages is not None:
            self.options["stages"] = list(stages)
        self.model = model
        self.backbone_lr_scale = check_number("backbone_lr_scale", backbone_lr_scale, 0, 1)
        self.freeze_backbone = check_number("freeze_backbone", freeze_backbone, 0, 1)
        self.pruning: prunex.Pruning | None = None
        self._undo: list[Callable[[], None]] = []
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._steps = math.inf

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach, before the optimiser is made and the checkpoint is read; harmless when done already."""
        others = [c for c in trainer.callbacks if isinstance(c, TokenPruning)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise PrunexError(f"{len(others)} TokenPruning callbacks in one Trainer: keep one")
        if self._waits_for_configure_model(pl_module):
            self._attach_after_configure_model(pl_module)
        else:
            self._attach(pl_module)
        if stage == "fit":
            self._wrap_training_step(pl_module)

    def _waits_for_configure_model(self, module: LightningModule) -> bool:
        """Whether the module makes its ViT later, in ``configure_model``."""
        if not is_overridden("configure_model", module):
            return False
        try:
            find(module, self.model)
        except PrunexError:
            return True
        return False

    def _attach_after_configure_model(self, module: LightningModule) -> None:
        original = module.configure_model

        @functools.wraps(original)
        def configure_model() -> None:
            original()
            self._attach(module)

        self._override(module, "configure_model", configure_model)

    def _attach(self, module: LightningModule) -> None:
        found = prunex.attached(module, self.model)
        if found is None:
            found = prunex.attach(module, self.method, path=self.model, **self.options)
        elif found.method != self.method:
            raise PrunexError(
                f"the model is pruned by {found.method} already: detach() it, or ask for {found.method} here"
            )
        self.pruning = found
        if "pruning" in module.hparams:  # a module that rebuilds its structure itself needs to know it
            module.hparams["pruning"] = found.spec
        brings_losses = found.pruner.trains_masked
        if brings_losses and not module.automatic_optimization:
            raise PrunexError(
                f"{self.method} brings losses of its own, and this module optimises by hand: add "
                "sum(prunex.attached(self).losses().values()) to your loss and attach without the callback, or use evit"
            )

    def _wrap_training_step(self, module: LightningModule) -> None:
        if "training_step" in module.__dict__ and hasattr(module.training_step, "_prunex"):
            return
        original = module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._with_losses(module, original(*args, **kwargs))

        training_step._prunex = True  # type: ignore[attr-defined]
        self._override(module, "training_step", training_step)

    def _override(self, module: LightningModule, name: str, function: Callable[..., Any]) -> None:
        before = module.__dict__.get(name)
        module.__dict__[name] = function

        def undo() -> None:
            if before is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before

        self._undo.append(undo)

    def _with_losses(self, module: LightningModule, output: STEP_OUTPUT) -> STEP_OUTPUT:
        if self.pruning is None or output is None:
            return output
        losses = self.pruning.losses()
        for name, value in losses.items():
            module.log(f"prunex/loss_{name}", value.detach(), on_step=False, on_epoch=True, sync_dist=True)
        self._log_ratios(module, "prunex/keep_ratio")
        self.pruning.forget()
        if not losses:
            return output
        added = torch.stack([v.float() for v in losses.values()]).sum()
        if isinstance(output, Tensor):
            return output + added
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": output["loss"] + added}
        raise PrunexError(
            f"training_step returned {type(output).__name__}: give the loss as a tensor, or a dict with a 'loss' tensor"
        )

    def _log_ratios(self, module: LightningModule, name: str) -> None:
        if self.pruning is None or self.pruning._attached.trace is None:
            return
        for s, ratios in enumerate(self.pruning.trace.keep_ratios()):
            batch = len(ratios)
            module.log(
                f"{name}_stage{s}", ratios.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=batch
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how long the training is, for schedules."""
        self._steps = float(trainer.estimated_stepping_batches)
        if self.pruning is not None:
            tokens = self.pruning.counts()
            rank_zero_info(
                f"prunex: {self.method} leaves {tokens} patch tokens after blocks {self.pruning.pruner.stages}"
            )

    def _progress(self, trainer: Trainer) -> float:
        """Fraction of training done; an open-ended run counts as done."""
        return min(1.0, trainer.global_step / self._steps) if math.isfinite(self._steps) and self._steps > 0 else 1.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the pruner how far training is."""
        if self.pruning is not None:
            self.pruning.progress = self._progress(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Schedules end at their base."""
        if self.pruning is not None and self._progress(trainer) >= 1:
            self.pruning.progress = 1.0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Remember the backbone, where only part of the step shall reach it."""
        if self._scale(trainer) == 1 or self.pruning is None:
            return
        own = {id(p) for p in self.pruning.pruner.parameters()}
        moving = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None and id(p) not in own]
        self._before = [(p, p.detach().clone()) for p in moving]

    def _scale(self, trainer: Trainer) -> float:
        return 0.0 if self._progress(trainer) < self.freeze_backbone else self.backbone_lr_scale

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the rest of the backbone's step back: a learning-rate scale for any optimiser and schedule."""
        if not self._before:
            return
        # The step just taken has raised global_step; the scale is the one that held when it began.
        begun = self.pruning.progress if self.pruning is not None else 1.0
        scale = 0.0 if begun < self.freeze_backbone else self.backbone_lr_scale
        with torch.no_grad():
            for parameter, old in self._before:
                parameter.lerp_(old, 1 - scale)
        self._before = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log what inference really keeps."""
        if dataloader_idx == 0 and not trainer.sanity_checking:
            self._log_ratios(pl_module, "prunex/val_keep_ratio")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log multiply-adds per image at the present rates."""
        if self.pruning is not None and not trainer.sanity_checking:
            pl_module.log("prunex/gmacs", prunex.cost(self.pruning.model).gmacs, rank_zero_only=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down how the model is pruned, so that a checkpoint can be opened without this callback."""
        if self.pruning is not None:
            checkpoint[CHECKPOINT_KEY] = {
                "version": CHECKPOINT_VERSION,
                "path": self.model,
                "pruning": self.pruning.spec,
            }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module's own methods as they were."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own methods back; the pruner stays, since a checkpoint may still be saved."""
        self._restore()

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._before = []


def load_from_checkpoint(
    module_class: type[LightningModule], path: str, *, map_location: Any = None, **arguments: Any
) -> LightningModule:
    """A LightningModule from a checkpoint that was trained with :class:`TokenPruning`: attach first, load second.

    ``module_class.load_from_checkpoint`` alone does not know the pruner's parameters and ends in "Unexpected key(s)".

    Args:
        module_class: The user's own class.
        path: The checkpoint.
        map_location: As for ``torch.load``.
        **arguments: For the class's constructor, over the saved hyperparameters.

    Returns:
        The module with its pruned model, weights loaded, in eval mode.

    Raises:
        PrunexError: A file that is missing, no checkpoint, or holds no word of prunex.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise PrunexError(f"there is no checkpoint at {path}") from error
    except Exception as error:
        raise PrunexError(f"{path} is no checkpoint that loads safely: {type(error).__name__}") from error
    told = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if told is None:
        raise PrunexError(f"{path} was not trained with TokenPruning: use {module_class.__name__}.load_from_checkpoint")
    if told["version"] > CHECKPOINT_VERSION:
        raise PrunexError(f"{path} has prunex format {told['version']}: this prunex reads up to {CHECKPOINT_VERSION}")
    hparams = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
    module = module_class(**{**hparams, **arguments})
    module.configure_model()
    if prunex.attached(module, told["path"]) is None:
        spec = {**told["pruning"]}
        prunex.attach(module, spec.pop("method"), path=told["path"], **spec)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()
