"""TokenPruning: make the ViT inside somebody's LightningModule prune its tokens while it is fine-tuned."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

import prunex
from prunex.batches import parts
from prunex.callbacks.averaging import averaging, check_order, check_own_averages
from prunex.callbacks.monitor import decisions
from prunex.callbacks.optimisers import check_stepped, learned, stepping
from prunex.callbacks.participant import Participant, progress, tell_hparams
from prunex.callbacks.rates import give_rates
from prunex.callbacks.runs import Runs
from prunex.callbacks.training_batches import training_batches
from prunex.checks import check_budget, check_number, check_options
from prunex.errors import PrunexError
from prunex.pruners.adaptive import realised
from prunex.pruners.budget import in_words
from prunex.units.base import UnitPruner
from prunex.vit.anatomy import ViT
from prunex.vit.surroundings import check_own_classes


class TokenPruning(Participant):
    """Attach a token pruner in ``setup`` and train it with the user's own loss, optimiser and precision.

    Losses of the pruner are added to what ``training_step`` returns; schedules follow the trainer's progress. Logged
    every epoch: ``prunex/loss_*`` (each auxiliary loss), ``prunex/keep_ratio_stage*`` (realised in training) and, in
    validation, ``prunex/val_keep_ratio_stage*`` and ``prunex/gmacs`` (per image at inference; with a budget also
    ``prunex/gmacs_budget``, what it allows). Stages count from 1, as in pictures and reports.

    A method that looks at images before it decides (``patch_slimming``) is calibrated once, when training starts, on
    what enters the ViT in the first training batches, unless it was before or a checkpoint brought what it found.
    Where images keep their own numbers of patches (``count="adaptive"``) each validation also tells the pruner the mean
    shares, as :meth:`prunex.Pruning.calibrate` does.

    A pruner that learns from being right (``ia_red2`` by reward) gets the labels of batches that hold images and an
    integer [B], see :func:`prunex.batches.parts`. One with a curriculum has the parameters whose turn it
    is not held still.

    The model stays pruned after ``fit``; ``prunex.attached(module).detach()`` gives the dense one back. Checkpoints,
    of weights only too, say how it was pruned, see :func:`prunex.callbacks.load_from_checkpoint`. So does the
    hyperparameter ``pruning`` of a module with ``rebuilds_pruning = True``; one of another meaning is left alone.

    Args:
        method: A pruner's name, such as "evit"; ``prunex methods`` lists them.
        keep_ratio: Share of patch tokens kept at each stage, in (0, 1], or one share a stage. None: the method's
            default, or what the budget needs. Methods that count otherwise have none.
        stages: Block indices; None: the method's own default, for most a quarter, half and three quarters of the depth.
        options: Further options of the method, such as ``{"fuse": False}`` or ``{"r": 13}``.
        budget: What the pruned model may cost instead of a keep ratio, as for :func:`prunex.attach`: 0.65 of the dense
            multiply-adds, or "2.9GMACs". It is solved when the pruner is attached; checkpoints hold the keep ratio. A
            model that is pruned already, as after a resume, must meet it.
        model: Dotted path of the ViT in the module, when it holds several.
        backbone_lr_scale: Share of each optimiser step that reaches the ViT's own parameters, its head among them but
            not the pruner, in [0, 1] (DynamicViT's recipe: 0.01). Any optimiser and schedule; costs a copy of them.
            What the module has beside the ViT (a decoder, a head of its own) takes whole steps.
        freeze_backbone: Fraction of training at whose start those parameters do not move at all.
        lr_scale: Learning rate of the pruner's parameters as a multiple of what the module gives them, at least 0.
            None: the method's own rate (``lr`` of its class: DynamicViT's is 9e-4), where the module's is lower. Any
            optimiser and schedule; checkpoints and loggers show the module's rate.

    Raises:
        PrunexError: At once for numbers out of range, a keep ratio or stages that the method does not have, or a budget
            beside a keep ratio; in ``setup`` for an unknown method or option, a budget out of reach, no ViT or several,
            a second TokenPruning, or manual optimisation with a method that brings losses; when training starts, for
            losses whose parameters no optimiser steps, or that were frozen since; before the first step, where the
            ViT's weights are trained by another forward than the pruned one.

    Warns:
        UserWarning: Once, where the first training step or a whole validation did not run the pruned ViT (nothing is
            logged of it then, and ``SlimExport`` writes no model that no step ran), or where no gradient reached what
            the method learns.

    >>> from prunex.callbacks import TokenPruning
    >>> TokenPruning("evit", keep_ratio=0.7, options={"fuse": False}).method
    'evit'
    """

    sees_loss = True

    def __init__(
        self,
        method: str = "dynamicvit",
        keep_ratio: float | list[float] | None = None,
        stages: list[int] | None = None,
        options: dict[str, Any] | None = None,
        model: str | None = None,
        backbone_lr_scale: float = 1.0,
        freeze_backbone: float = 0.0,
        budget: float | str | None = None,
        lr_scale: float | None = None,
    ) -> None:
        super().__init__()
        make: Any = prunex.registry.lookup("pruner", method).make
        if issubclass(make, UnitPruner):
            raise PrunexError(
                f"{method} prunes attention heads and MLP channels: give it to MaskPruning; TokenPruning takes evit, "
                "dynamicvit, topk, ..."
            )
        takes = inspect.signature(make).parameters
        self.method = method
        self.options = check_options(options)
        if budget is not None:
            check_budget(budget)
            if keep_ratio is not None:
                raise PrunexError(
                    f"budget={budget!r} and keep_ratio={keep_ratio!r} both say how much is kept: give one"
                )
        elif keep_ratio is None and "keep_ratio" in takes:
            keep_ratio = self.options.get("keep_ratio", takes["keep_ratio"].default)
        self.budget = budget
        for name, value in (("keep_ratio", keep_ratio), ("stages", None if stages is None else list(stages))):
            if value is None:
                continue
            if name not in takes:
                allowed = [n for n in takes if n != "anatomy"]
                raise PrunexError(
                    f"{name}={value!r} is not allowed: {method} has no such option; "
                    f"give options={{...}} with some of {', '.join(allowed)}"
                )
            self.options[name] = value
        self.model = model
        self.backbone_lr_scale = check_number("backbone_lr_scale", backbone_lr_scale, 0, 1)
        self.freeze_backbone = check_number("freeze_backbone", freeze_backbone, 0, 1)
        self.lr_scale = None if lr_scale is None else check_number("lr_scale", lr_scale, 0)
        self.pruning: prunex.Pruning | None = None
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []
        self._shares: list[Tensor] = []  # of this validation: kept shares of each stage, summed over images
        self._images = 0
        self._dense = 0  # multiply-adds of one image before anything was pruned, which a budget is a share of
        self._learned: dict[str, nn.Parameter] = {}  # what the pruner shall learn

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach, before the optimiser is made and the checkpoint is read; harmless when done already."""
        super().setup(trainer, pl_module, stage)
        others = [c for c in trainer.callbacks if isinstance(c, TokenPruning)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise PrunexError(f"{len(others)} TokenPruning callbacks in one Trainer: keep one")
        if stage == "fit" and self._brings_losses() and not pl_module.automatic_optimization:
            raise PrunexError(
                f"{self.method} brings losses of its own, and this module optimises by hand: add "
                "sum(prunex.attached(self).losses().values()) to your loss and attach without the callback, or use evit"
            )
        if stage == "fit":
            check_order(trainer, self)
            if self.pruning is None:
                check_own_averages(trainer, pl_module, self)
        self._when_model_is_there(pl_module, self.model, self._attach, ViT)
        self._guard_checkpoints(
            pl_module, self.model, "pruning", lambda: {} if self.pruning is None else self.pruning.spec, self._take_over
        )
        if stage == "fit":
            self._put_round(pl_module, "training_step", functools.partial(self._training_step, pl_module))

    @staticmethod
    def _rates(pruning: prunex.Pruning) -> str:
        """What a budget set, in words."""
        return ", ".join(f"{name}={pruning.options[name]!r}" for name in pruning.budgeted())

    def _brings_losses(self) -> bool:
        return bool(prunex.registry.lookup("pruner", self.method).make.trains_masked)  # type: ignore[attr-defined]

    def _attach(self, module: LightningModule) -> None:
        found = prunex.attached(module, self.model)
        again = found is not None and self.pruning is not None and found.model is self.pruning.model
        if found is None:
            found = prunex.attach(module, self.method, path=self.model, budget=self.budget, **self.options)
        elif found.method != self.method:
            raise PrunexError(
                f"the model is pruned by {found.method} already: detach() it, or ask for {found.method} here"
            )
        elif self.budget is not None and not again and not found.meets(self.budget):
            raise PrunexError(
                f"the model is pruned already with {self._rates(found)}, which does not meet budget={self.budget!r}: "
                "detach() it first with prunex.attached(module).detach(), or leave the budget out here"
            )
        for name, wanted in self.options.items():
            if name in found.pruner.read_once:
                continue
            has = found.options.get(name)
            if (list(wanted) if isinstance(wanted, tuple) else wanted) != has:
                raise PrunexError(
                    f"the model is pruned already with {name}={has!r}, not {wanted!r}: detach() it first with "
                    f"prunex.attached(module).detach(), or ask for {has!r} here"
                )
        if not again:  # units may have been removed since
            self._dense = found.dense_macs()
        self.pruning, self.runs, self._learned = found, Runs(found), learned(found)
        tell_hparams(module, "pruning", found.spec)

    def _training_step(self, module: LightningModule, beneath: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = args[0] if args else kwargs.get("batch")
        if self.runs is None:
            return beneath(*args, **kwargs)
        self.runs.begin()
        output = beneath(*args, **kwargs)
        self.runs.end_training_step()
        return self._with_losses(module, output, batch)

    def _with_losses(self, module: LightningModule, output: STEP_OUTPUT, batch: Any = None) -> STEP_OUTPUT:
        if self.pruning is None:
            return output
        self._log_ratios(module, "prunex/keep_ratio")
        forwards, known = list(self.pruning._attached.forwards), parts(batch)
        if output is None or not forwards:  # optimised by hand, a skipped batch, or a step that did not run the model
            self.pruning.forget()
            return self._end_step(module, output, {}, known)
        reads = self.pruning.pruner.reads_labels or self.pruning._attached.more
        labels = known.labels(self.method, "the training batch") if reads else known.get("labels")
        if labels is not None and all(len(labels) != len(f.images) for f in forwards):
            labels = None
        losses = self.pruning.losses(labels)
        self.pruning.forget()
        seen = forwards[-1]
        if len(forwards) > 1:  # of several views only the batch says which images a loss that is not finite comes from
            return self._end_step(module, output, losses, known, len(seen.images))
        held = {"images": seen.images} if labels is None else {"images": seen.images, "labels": labels}
        return self._end_step(module, output, losses, held, len(seen.images), seen.logits)

    def _log_ratios(self, module: LightningModule, name: str) -> None:
        if self.pruning is None or self.runs is None or not self.runs.now:  # what is left of another step is no news
            return
        trace = self.pruning.trace
        shares = [ratios.mean() for ratios in trace.keep_ratios()]
        for s, i in enumerate(decisions(trace, self.pruning.pruner.stages), 1):  # as pictures number them
            share = torch.ones((), device=module.device) if i is None else shares[i]
            module.log(f"{name}_stage{s}", share, on_step=False, on_epoch=True, sync_dist=True, batch_size=trace.batch)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give what the method brings its learning rate: optimisers are there, and have read no checkpoint yet."""
        if self.pruning is not None:
            self._undo += give_rates(trainer, self.pruning.pruner, self.lr_scale)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate if need be, say what will be left, and watch the optimisers where a part of their steps counts."""
        if self.pruning is None:
            return
        if averaging(trainer) is not None and any(not b.is_floating_point() for b in self.pruning.pruner.buffers()):
            raise PrunexError(
                f"{type(averaging(trainer)).__name__} averages buffers, and those of {self.method} are positions of "
                "patches: train without it, or use another pruner"
            )
        check_stepped(trainer, self.pruning, self._learned)
        if getattr(self.pruning.pruner, "by_reward", False):
            check_own_classes(pl_module, self.pruning.model, self.method)
        if self.pruning.pruner.needs_calibration:
            self._calibrate(trainer, pl_module, self.pruning)
        # What a checkpoint brought was not known when it was attached.
        tell_hparams(pl_module, "pruning", self.pruning.spec)
        tokens = self.pruning.counts()
        about = "about " if self.pruning.pruner.count == "adaptive" else ""
        rank_zero_info(
            f"prunex: {self.method} leaves {about}{tokens} patch tokens after blocks {self.pruning.pruner.stages}"
        )
        if self.budget is not None:
            spent, dense = self.pruning.macs(), self.pruning.dense_macs()
            rank_zero_info(
                f"prunex: budget {self.budget} gives {self._rates(self.pruning)}: {in_words(spent, dense)} of the "
                "dense model's"
            )
        if self._brings_losses() and not self.pruning.model.training:
            rank_zero_warn(f"the ViT is in eval mode, so {self.method} learns nothing: call module.train() before fit")
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            rank_zero_warn(
                "a strategy that spawns its processes gives the calling one a dense module back, without what "
                f"{self.method} learned: read the checkpoint with prunex.callbacks.load_from_checkpoint, or use ddp"
            )
        if self.backbone_lr_scale == 1 and self.freeze_backbone == 0 and not self.pruning.pruner.curriculum:
            return
        if self.freeze_backbone > 0 and trainer.max_epochs == -1 and trainer.max_steps == -1:
            rank_zero_warn("freeze_backbone is a fraction of the training, and this one has no end: nothing is frozen")
        for whole in trainer.optimizers:
            # Hooks of the optimiser itself, not of the trainer: they see every step, also several in one batch by hand,
            # and see none that the gradient scaler skips.
            optimizer = stepping(whole, self.pruning.pruner.curriculum)
            self._undo.append(optimizer.register_step_pre_hook(self._remember).remove)
            self._undo.append(optimizer.register_step_post_hook(self._take_back).remove)

    def _calibrate(self, trainer: Trainer, module: LightningModule, pruning: prunex.Pruning) -> None:
        """Once, on the first batches of the training data; rank zero does it, the others take over what it found."""
        if trainer.is_global_zero:
            with training_batches(trainer, module, pruning.model) as batches:
                report = pruning.calibrate(known["images"] for known in batches)
            rank_zero_info(f"prunex: {self.method} calibrated on the first training batches\n{report}")
        if trainer.world_size > 1:
            state: Any = None
            if trainer.is_global_zero:
                state = {k: v.cpu() for k, v in pruning.model.state_dict().items()}
            pruning.model.load_state_dict(trainer.strategy.broadcast(state))
        tell_hparams(module, "pruning", pruning.spec)

    def _remember(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Copy what shall not take the whole of a step, with the share that it shall take."""
        self._before = []
        if self.pruning is None:
            return
        own = {id(p) for p in self.pruning.pruner.parameters()}
        backbone = {id(p) for p in self.pruning.model.parameters()} - own
        still = {id(p) for p in self.pruning.pruner.resting(self.pruning.model)}
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            share = 0.0 if id(p) in still else self._scale() if id(p) in backbone else 1.0
            if share < 1:
                self._before.append((p, p.detach().clone(), share))

    def _take_back(self, *_: Any) -> None:
        """Take the rest of the backbone's step back: a learning-rate scale for any optimiser and schedule."""
        with torch.no_grad():
            for parameter, old, share in self._before:
                parameter.lerp_(old, 1 - share)
        self._before = []

    def _scale(self) -> float:
        """Share of the present step that reaches the backbone; progress is that of the step's begin."""
        begun = self.pruning.progress if self.pruning is not None else 1.0
        return 0.0 if begun < self.freeze_backbone else self.backbone_lr_scale

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the pruner how far training is."""
        if self.pruning is not None:
            self.pruning.progress = progress(trainer, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell it again, so that validation after the last batch sees the schedule's end."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.pruning is not None:
            self.pruning.progress = progress(trainer, batch_idx + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Schedules end at their base, also where an epoch's length was unknown."""
        if self.pruning is not None and progress(trainer, 0) >= 1:
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
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        ran = self.runs is not None and self.runs.now
        if ran and self.pruning is not None and dataloader_idx == 0 and not trainer.sanity_checking:
            self._log_ratios(pl_module, "prunex/val_keep_ratio")
            self._shares.append(realised(self.pruning.trace, self.pruning.pruner.stages).sum(0))
            self._images += self.pruning.trace.batch

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log multiply-adds per image at the present rates, or at the counts that this validation had on average."""
        ran = self.runs is not None and self.runs.end_validation(trainer.sanity_checking)
        if self.pruning is None or self.runs is None or trainer.sanity_checking:
            return
        if self.pruning.pruner.count == "adaptive":
            self._expect(trainer, self.pruning)
            tell_hparams(pl_module, "pruning", self.pruning.spec)
        self._shares, self._images = [], 0
        if not ran and not self.runs.trained:
            return
        pl_module.log("prunex/gmacs", prunex.cost(self.pruning.model).gmacs, rank_zero_only=True)
        if self.budget is not None:
            allowed = check_budget(self.budget, self._dense) / 1e9
            pl_module.log("prunex/gmacs_budget", allowed, rank_zero_only=True)

    def _expect(self, trainer: Trainer, pruning: prunex.Pruning) -> None:
        """Tell the pruner the mean shares of all processes' images, however many each of them had."""
        stages = len(pruning.pruner.stages)
        total = torch.zeros(stages + 1, device=trainer.strategy.root_device)
        if self._shares:
            total[:stages], total[stages] = torch.stack(self._shares).sum(0), self._images
        if trainer.world_size > 1:
            dist.all_reduce(total)
        if total[stages] > 0:
            pruning.pruner.expect((total[:stages] / total[stages]).tolist())

    def _take_over(self, told: Mapping[str, Any]) -> None:
        """Take schedules to where they were, so that validating a checkpoint gives what training saw."""
        if self.pruning is not None:
            self.pruning.progress = told.get("progress", 1.0)
            measured = dict(told.get("pruning") or {}).get("expected")
            if measured is not None:
                self.pruning.pruner.expect(measured)

    def _restore(self) -> None:
        super()._restore()
        self._before = []
