"""TokenPruning: make the ViT inside somebody's LightningModule prune its tokens while it is fine-tuned."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

import prunex
from prunex.callbacks.monitor import decisions
from prunex.checks import check_number
from prunex.errors import PrunexError
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
        keep_ratio: Share of patch tokens kept at each stage, in (0, 1], or one share a stage; None: the method's own.
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
        keep_ratio: float | list[float] | None = None,
        stages: list[int] | None = None,
        options: dict[str, Any] | None = None,
        model: str | None = None,
        backbone_lr_scale: float = 1.0,
        freeze_backbone: float = 0.0,
    ) -> None:
        super().__init__()
        prunex.registry.lookup("pruner", method)
        self.method = method
        self.options: dict[str, Any] = dict(options or {})
        if keep_ratio is not None:
            self.options["keep_ratio"] = keep_ratio
        if stages is not None:
            self.options["stages"] = list(stages)
        self.model = model
        self.backbone_lr_scale = check_number("backbone_lr_scale", backbone_lr_scale, 0, 1)
        self.freeze_backbone = check_number("freeze_backbone", freeze_backbone, 0, 1)
        self.pruning: prunex.Pruning | None = None
        self._undo: list[Callable[[], None]] = []
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach, before the optimiser is made and the checkpoint is read; harmless when done already."""
        others = [c for c in trainer.callbacks if isinstance(c, TokenPruning)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise PrunexError(f"{len(others)} TokenPruning callbacks in one Trainer: keep one")
        if stage == "fit" and self._brings_losses() and not pl_module.automatic_optimization:
            raise PrunexError(
                f"{self.method} brings losses of its own, and this module optimises by hand: add "
                "sum(prunex.attached(self).losses().values()) to your loss and attach without the callback, or use evit"
            )
        if self._waits_for_configure_model(pl_module):
            self._attach_after_configure_model(pl_module)
        else:
            self._attach(pl_module)
        if stage == "fit":
            self._wrap_training_step(pl_module)

    def _brings_losses(self) -> bool:
        return bool(prunex.registry.lookup("pruner", self.method).make.trains_masked)  # type: ignore[attr-defined]

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
        for name, wanted in self.options.items():
            has = found.options.get(name)
            if (list(wanted) if isinstance(wanted, tuple) else wanted) != has:
                raise PrunexError(
                    f"the model is pruned already with {name}={has!r}, not {wanted!r}: detach() it first with "
                    f"prunex.attached(module).detach(), or ask for {has!r} here"
                )
        self.pruning = found
        if "pruning" in module.hparams and isinstance(module.hparams["pruning"], dict | None):
            # A module that rebuilds its structure itself needs to know it; an argument that only shares the name stays.
            module.hparams["pruning"] = found.spec

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
        if self.pruning is None:
            return output
        self._log_ratios(module, "prunex/keep_ratio")
        seen = self.pruning._attached.last
        if output is None or seen is None:  # optimised by hand, a skipped batch, or a step that did not run the model
            self.pruning.forget()
            return output
        losses = self.pruning.losses()
        for name, value in losses.items():
            module.log(
                f"prunex/loss_{name}",
                value.detach(),
                on_step=False,
                on_epoch=True,
                sync_dist=True,
                batch_size=len(seen.images),
            )
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
        trace = self.pruning.trace
        shares = [ratios.mean() for ratios in trace.keep_ratios()]
        for s, i in enumerate(decisions(trace, self.pruning.pruner.stages)):
            share = torch.ones((), device=module.device) if i is None else shares[i]
            module.log(f"{name}_stage{s}", share, on_step=False, on_epoch=True, sync_dist=True, batch_size=trace.batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what will be left, and watch the optimisers where only part of their steps shall reach the backbone."""
        if self.pruning is None:
            return
        tokens = self.pruning.counts()
        rank_zero_info(f"prunex: {self.method} leaves {tokens} patch tokens after blocks {self.pruning.pruner.stages}")
        if self._brings_losses() and not self.pruning.model.training:
            rank_zero_warn(f"the ViT is in eval mode, so {self.method} learns nothing: call module.train() before fit")
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            rank_zero_warn(
                "a strategy that spawns its processes gives the calling one a dense module back, without what "
                f"{self.method} learned: read the checkpoint with prunex.callbacks.load_from_checkpoint, or use ddp"
            )
        if self.backbone_lr_scale == 1 and self.freeze_backbone == 0:
            return
        if self.freeze_backbone > 0 and trainer.max_epochs == -1 and trainer.max_steps == -1:
            rank_zero_warn("freeze_backbone is a fraction of the training, and this one has no end: nothing is frozen")
        for optimizer in trainer.optimizers:
            # Hooks of the optimiser itself, not of the trainer: they see every step, also several in one batch by hand,
            # and see none that the gradient scaler skips.
            self._undo.append(optimizer.register_step_pre_hook(self._remember).remove)
            self._undo.append(optimizer.register_step_post_hook(self._take_back).remove)

    def _remember(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Copy the backbone before a step."""
        if self.pruning is None or self._scale() == 1:
            self._before = []
            return
        own = {id(p) for p in self.pruning.pruner.parameters()}
        moving = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in own]
        self._before = [(p, p.detach().clone()) for p in moving]

    def _take_back(self, *_: Any) -> None:
        """Take the rest of the backbone's step back: a learning-rate scale for any optimiser and schedule."""
        with torch.no_grad():
            for parameter, old in self._before:
                parameter.lerp_(old, 1 - self._scale())
        self._before = []

    def _scale(self) -> float:
        """Share of the present step that reaches the backbone; progress is that of the step's begin."""
        begun = self.pruning.progress if self.pruning is not None else 1.0
        return 0.0 if begun < self.freeze_backbone else self.backbone_lr_scale

    def _progress(self, trainer: Trainer, batches: int) -> float:
        """Fraction of training done after so many batches of this epoch; an open-ended run counts as done.

        Batches are counted, not steps, since steps come in several a batch (optimised by hand) or change their length;
        within one accumulation of gradients the progress stands still.
        """
        epochs, most, total = trainer.max_epochs, trainer.max_steps, trainer.num_training_batches
        done = []
        if epochs is not None and epochs > 0:
            window = trainer.accumulate_grad_batches
            known = math.isfinite(total) and total > 0
            share = (1.0 if batches >= total else (batches // window) / math.ceil(total / window)) if known else 0.0
            done.append((trainer.current_epoch + share) / epochs)
        if most > 0:
            done.append(trainer.global_step / most)
        return min(1.0, max(done, default=1.0))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the pruner how far training is."""
        if self.pruning is not None:
            self.pruning.progress = self._progress(trainer, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell it again, so that validation after the last batch sees the schedule's end."""
        if self.pruning is not None:
            self.pruning.progress = self._progress(trainer, batch_idx + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Schedules end at their base, also where an epoch's length was unknown."""
        if self.pruning is not None and self._progress(trainer, 0) >= 1:
            self.pruning.progress = 1.0

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
                "progress": self.pruning.progress,
            }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take schedules to where they were, so that validating a checkpoint gives what training saw."""
        told = checkpoint.get(CHECKPOINT_KEY)
        if self.pruning is not None and isinstance(told, dict):
            self.pruning.progress = told.get("progress", 1.0)

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
        raise PrunexError(
            f"{path} is no checkpoint that loads safely ({type(error).__name__}): give one of Lightning's, of a module "
            "that saves plain values only, as save_hyperparameters(ignore=[...]) does"
        ) from error
    told = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(told, dict) or "pruning" not in told:
        raise PrunexError(f"{path} was not trained with TokenPruning: use {module_class.__name__}.load_from_checkpoint")
    if told["version"] > CHECKPOINT_VERSION:
        raise PrunexError(f"{path} has prunex format {told['version']}: this prunex reads up to {CHECKPOINT_VERSION}")
    module = module_class(**_arguments(module_class, checkpoint, arguments))
    module.configure_model()
    pruning = prunex.attached(module, told["path"])
    if pruning is None:
        spec = {**told["pruning"]}
        pruning = prunex.attach(module, spec.pop("method"), path=told["path"], **spec)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    pruning.progress = told.get("progress", 1.0)
    return module.eval()


def _arguments(module_class: type, checkpoint: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments from saved hyperparameters, as Lightning's own loader chooses them."""
    parameters = inspect.signature(module_class).parameters
    saved = dict(checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    whole = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_NAME)
    if whole in parameters and whole != "kwargs":  # save_hyperparameters(hparams): one argument holds them all
        saved = {whole: saved}
    chosen = {k: v for k, v in {**saved, **given}.items() if not k.startswith("_")}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return chosen
    return {k: v for k, v in chosen.items() if k in parameters or k in given}
