"""TokenPruning: make the ViT inside somebody's LightningModule prune its tokens while it is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

import prunex
from prunex.batches import parts
from prunex.callbacks.alone import add_up
from prunex.callbacks.averaging import averaging, check_order
from prunex.callbacks.participant import Participant, check_single, cuts_weights, progress, tell_hparams
from prunex.callbacks.rates import check_stepped, give_rates
from prunex.callbacks.training_batches import training_batches
from prunex.checks import check_budget, check_number, check_options
from prunex.errors import PrunexError
from prunex.pruners.adaptive import Adaptive, realised
from prunex.pruners.budget import in_words
from prunex.units.base import UnitPruner
from prunex.vit.mount import mounted_head
from prunex.vit.optimisers import chain
from prunex.vit.sharded import check_gathered, local, named
from prunex.vit.trace import TokenTrace


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

    The model stays pruned after ``fit``; ``prunex.attached(module).detach()`` gives the dense one back. Checkpoints,
    of weights only too, say how it was pruned, see :func:`prunex.callbacks.load_from_checkpoint`; so does the
    hyperparameter ``pruning`` of a module with ``rebuilds_pruning = True``.

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
            What the module has beside the ViT (a decoder, a head of its own) takes whole steps. None: 1; of a method
            that learns beside a frozen model (``diffrate``) those parameters need no gradient till the run ends.
        freeze_backbone: Fraction of training at whose start those parameters do not move at all.
        lr_scale: Learning rate of the pruner's parameters as a multiple of what the module gives them, at least 0.
            None: the method's own rate (``lr`` of its class: DynamicViT's is 9e-4), where the module's is lower. Any
            optimiser and schedule; checkpoints and loggers show the module's rate.

    Raises:
        PrunexError: At once for numbers out of range, an option that the method does not have, or a budget beside a
            keep ratio; in ``setup`` for a budget out of reach, no ViT or several, a second TokenPruning, or manual
            optimisation with a method that brings losses; when training starts, for losses whose parameters no
            optimiser steps; before the first step, where the ViT is trained by another forward than the pruned one.

    Warns:
        UserWarning: Once, where the first training step or a whole validation did not run the pruned ViT, no gradient
            reached what the method learns, or SGD steps predictors.

    >>> from prunex.callbacks import TokenPruning
    >>> TokenPruning("evit", keep_ratio=0.7, options={"fuse": False}).method
    'evit'
    """

    pruning: prunex.Pruning

    def __init__(
        self,
        method: str = "dynamicvit",
        keep_ratio: float | list[float] | None = None,
        stages: list[int] | None = None,
        options: dict[str, Any] | None = None,
        model: str | None = None,
        backbone_lr_scale: float | None = None,
        freeze_backbone: float = 0.0,
        budget: float | str | None = None,
        lr_scale: float | None = None,
    ) -> None:
        super().__init__()
        known = prunex.registry.lookup("pruner", method)
        make: Any = known.make
        if issubclass(make, UnitPruner):
            raise PrunexError(
                f"{method} prunes attention heads and MLP channels: give it to MaskPruning; TokenPruning takes evit, "
                "dynamicvit, topk, ..."
            )
        takes = known.options
        self.method = method
        self.options = check_options(options)
        self.budget = budget
        if budget is not None:
            check_budget(budget)
            if keep_ratio is not None:
                raise PrunexError(
                    f"budget={budget!r} and keep_ratio={keep_ratio!r} both say how much is kept: give one"
                )
        elif keep_ratio is None and "keep_ratio" in takes:
            keep_ratio = self.options.get("keep_ratio", takes["keep_ratio"])
        # Not every method counts by a ratio or decides at stages: hvt pools, tome merges in every block.
        for name, value in (("keep_ratio", keep_ratio), ("stages", None if stages is None else list(stages))):
            if value is None:
                continue
            if name not in takes:
                raise PrunexError(
                    f"{name}={value!r} is not allowed: {method} has no such option; "
                    f"give options={{...}} with some of {', '.join(takes)}"
                )
            self.options[name] = value
        self.model = model
        scale = 1.0 if backbone_lr_scale is None else backbone_lr_scale
        self.backbone_lr_scale = check_number("backbone_lr_scale", scale, 0, 1)
        self._may_freeze = backbone_lr_scale is None
        self.freeze_backbone = check_number("freeze_backbone", freeze_backbone, 0, 1)
        self.lr_scale = None if lr_scale is None else check_number("lr_scale", lr_scale, 0)
        self._brings_losses = bool(make.trains_masked)
        self._shards = bool(make.shards)
        self._before: list[tuple[Tensor, Tensor, float]] = []
        self._shares: list[Tensor] = []  # of this validation: kept shares of each stage, summed over images
        self._images = 0
        self._dense = 0  # multiply-adds of one image before anything was pruned, which a budget is a share of
        self._learned: list[str] = []  # names of what the pruner shall learn

    def _check_training(self, trainer: Trainer, module: LightningModule) -> None:
        check_single(trainer, TokenPruning)
        if self._brings_losses and not module.automatic_optimization:
            raise PrunexError(
                f"{self.method} brings losses of its own, and this module optimises by hand: add "
                "sum(prunex.attached(self).losses().values()) to your loss and attach without the callback, or use evit"
            )
        if cuts_weights(trainer) and not self._shards:
            raise PrunexError(
                f"{self.method} looks at its own parameters between forwards, which cannot be where each process holds "
                "a part of them: use strategy='ddp', or evit, topk, dynamicvit, ia_red2"
            )
        check_order(trainer, self)

    def _check_attached(self, handle: prunex.Pruning, foreign: bool, again: bool) -> None:
        if foreign and self.budget is not None and not handle.meets(self.budget):
            raise PrunexError(
                f"the model is pruned already with {_rates(handle)}, which does not meet budget={self.budget!r}: "
                "detach() it first with prunex.attached(module).detach(), or leave the budget out here"
            )
        if not again:  # units may have been removed since
            self._dense = handle.dense_macs()
        # Predictors of stages that keep everything are held still by the method.
        self._learned = [name for name, p in handle.pruner.named_parameters() if p.requires_grad]
        if self._may_freeze and handle.pruner.freezes_model:
            # Now, since optimisers and DDP look at what learns when they are made.
            brought = {id(p) for p in backbone_of(handle) if p.requires_grad}
            names = {name for name, p in handle.model.named_parameters() if id(p) in brought}
            move(handle.model, names, False)
            self._undo.append(partial(move, handle.model, names, True))

    def _training_step(self, module: LightningModule, step: Callable[[], STEP_OUTPUT], batch: Any) -> STEP_OUTPUT:
        output, pruning = step(), self.pruning
        self._log_ratios(module, "prunex/keep_ratio")
        forwards, fields = list(pruning._attached.forwards), parts(batch)
        if output is None or not forwards:  # optimised by hand, a skipped batch, or a step that did not run the model
            pruning.forget()
            return self._end_step(module, output, {}, fields)
        # Who goes by labels is told of ones that cannot be read; the others take them where they are.
        reads = bool(pruning._attached.more)
        labels = fields.labels(self.method, "the training batch") if reads else fields.get("labels")
        if labels is not None and all(len(labels) != len(f.images) for f in forwards):
            labels = None
        losses = pruning.losses(labels)
        pruning.forget()
        # What the forward took and gave is nearer to the loss than the batch, which the module may have altered.
        last = forwards[-1]
        if len(forwards) > 1:  # of several views only the batch says which images a loss that is not finite comes from
            return self._end_step(module, output, losses, fields, len(last.images))
        return self._end_step(module, output, losses, {"images": last.images}, len(last.images), last.logits)

    def _log_ratios(self, module: LightningModule, name: str) -> None:
        if not self.runs.now:  # what is left of another step is no news
            return
        trace = self.pruning.trace
        shares = [ratios.mean() for ratios in trace.keep_ratios()]
        for s, i in enumerate(decisions(trace, self.pruning.pruner.stages), 1):  # as pictures number them
            share = torch.ones((), device=module.device) if i is None else shares[i]
            module.log(f"{name}_stage{s}", share, on_step=False, on_epoch=True, sync_dist=True, batch_size=trace.batch)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give what the method brings its learning rate: optimisers are there, and have read no checkpoint yet."""
        self._undo += give_rates(trainer, self.pruning.pruner, self.lr_scale)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate if need be, say what will be left, and watch the optimisers where a part of their steps counts."""
        pruning, average = self.pruning, averaging(trainer)
        pruner = pruning.pruner
        if average is not None and any(not b.is_floating_point() for b in pruner.buffers()):
            raise PrunexError(
                f"{type(average).__name__} averages buffers, and those of {self.method} are positions of patches: "
                "train without it, or use another pruner"
            )
        # Before anything is spent on calibration.
        check_stepped(trainer, pruning, self._learned)
        if pruner.needs_calibration:
            check_gathered(
                pl_module,
                f"{self.method} tunes them on images before it trains: calibrate before fit with "
                "prunex.attach(...).calibrate(images), or use strategy='ddp'",
            )
            self._calibrate_once(trainer, pl_module, partial(self._calibrate, trainer))
        # What a checkpoint brought was not known when it was attached.
        tell_hparams(pl_module, "pruning", pruning.spec)
        self._say_what_is_left()
        if self._brings_losses and not pruning.model.training:
            rank_zero_warn(f"the ViT is in eval mode, so {self.method} learns nothing: call module.train() before fit")
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            rank_zero_warn(
                "a strategy that spawns its processes gives the calling one a dense module back, without what "
                f"{self.method} learned: read the checkpoint with prunex.callbacks.load_from_checkpoint, or use ddp"
            )
        self._watch_steps(trainer)

    def _calibrate(self, trainer: Trainer, pruning: prunex.Pruning, module: LightningModule) -> None:
        with training_batches(trainer, module, pruning.model) as batches:
            report = pruning.calibrate(fields["images"] for fields in batches)
        rank_zero_info(f"prunex: {self.method} calibrated on the first training batches\n{report}")

    def _say_what_is_left(self) -> None:
        pruning = self.pruning
        about = "about " if pruning.pruner.count == "adaptive" else ""
        rank_zero_info(
            f"prunex: {self.method} leaves {about}{pruning.counts()} patch tokens after blocks {pruning.pruner.stages}"
        )
        if self.budget is not None:
            rank_zero_info(
                f"prunex: budget {self.budget} gives {_rates(pruning)}: "
                f"{in_words(pruning.macs(), pruning.dense_macs())} of the dense model's"
            )

    def _watch_steps(self, trainer: Trainer) -> None:
        """Let the backbone take a share of each optimiser step, where it shall not take the whole."""
        if self.backbone_lr_scale == 1 and self.freeze_backbone == 0:
            return
        if self.freeze_backbone > 0 and trainer.max_epochs == -1 and trainer.max_steps == -1:
            rank_zero_warn("freeze_backbone is a fraction of the training, and this one has no end: nothing is frozen")
        for outer in trainer.optimizers:
            # Hooks of the optimiser itself, not of the trainer: they see every step, also several in one batch by hand,
            # and see none that the gradient scaler skips. In a wrapper such as timm's Lookahead the inner one steps.
            *_, optimizer = chain(outer)
            self._undo.append(optimizer.register_step_pre_hook(self._remember).remove)
            self._undo.append(optimizer.register_step_post_hook(self._take_back).remove)

    def _remember(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Copy what shall not take the whole of a step, with the share that it shall take."""
        self._before = []
        backbone = {id(p) for p in backbone_of(self.pruning)}
        # Progress is that of the step's begin.
        scale = 0.0 if self.pruning.pruner.progress < self.freeze_backbone else self.backbone_lr_scale
        if scale == 1:
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in backbone:
                    part = local(p.detach())
                    self._before.append((part, part.clone(), scale))

    def _take_back(self, *_: Any) -> None:
        """Take the rest of the backbone's step back: a learning-rate scale for any optimiser and schedule."""
        with torch.no_grad():
            for parameter, old, share in self._before:
                parameter.lerp_(old, 1 - share)
        self._before = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the pruner how far training is."""
        self.pruning.progress = progress(trainer, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell it again, so that validation after the last batch sees the schedule's end."""
        super().on_train_batch_end(trainer, pl_module)
        self.pruning.progress = progress(trainer, batch_idx + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Schedules end at their base, also where an epoch's length was unknown."""
        if progress(trainer, 0) >= 1:
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
        super().on_validation_batch_end(trainer, pl_module)
        if self.runs.now and dataloader_idx == 0 and not trainer.sanity_checking:
            self._log_ratios(pl_module, "prunex/val_keep_ratio")
            # Kept on the device, and read once, when the validation ends.
            self._shares.append(realised(self.pruning.trace, self.pruning.pruner.stages).sum(0))
            self._images += self.pruning.trace.batch

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log multiply-adds per image at the present rates, or at the counts that this validation had on average."""
        shown = self._validated(trainer)
        if trainer.sanity_checking:
            return
        if self.pruning.pruner.count == "adaptive":
            self._expect(trainer)
            tell_hparams(pl_module, "pruning", self.pruning.spec)
        self._shares, self._images = [], 0
        if shown:
            pl_module.log("prunex/gmacs", prunex.cost(self.pruning.model).gmacs, rank_zero_only=True)
        if shown and self.budget is not None:
            allowed = check_budget(self.budget, self._dense) / 1e9
            pl_module.log("prunex/gmacs_budget", allowed, rank_zero_only=True)

    def _expect(self, trainer: Trainer) -> None:
        """Tell the pruner the mean shares of all processes' images, however many each of them had."""
        stages = len(self.pruning.pruner.stages)
        total = torch.zeros(stages + 1, device=trainer.strategy.root_device)
        if self._shares:
            # Shares and the images that they are of in one exchange.
            total[:stages], total[stages] = torch.stack(self._shares).sum(0), self._images
        add_up(trainer, total)
        # An epoch without validation images says nothing new.
        pruner = self.pruning.pruner
        if total[stages] > 0 and isinstance(pruner, Adaptive):
            pruner.expect((total[:stages] / total[stages]).tolist())

    def _take_over(self, entry: Mapping[str, Any]) -> None:
        """Take schedules to where they were, so that validating a checkpoint gives what training saw."""
        self.pruning.progress = entry.get("progress", 1.0)
        measured = dict(entry.get("pruning") or {}).get("expected")
        pruner = self.pruning.pruner
        if measured is not None and isinstance(pruner, Adaptive):
            pruner.expect(measured)

    def _restore(self) -> None:
        super()._restore()
        self._before = []


def backbone_of(pruning: prunex.Pruning) -> list[nn.Parameter]:
    """The ViT's own parameters, without those of its pruner and of a head that explains itself."""
    # What is new hangs on the ViT, so its parameters are among the ViT's.
    new = [pruning.pruner, mounted_head(pruning.model) or nn.Identity()]
    brought = {id(p) for module in new for p in module.parameters()}
    return [p for p in pruning.model.parameters() if id(p) not in brought]


def move(model: nn.Module, names: Collection[str], moves: bool) -> None:
    """Let a model's parameters of these names take part in training, or stand still."""
    for parameter in named(model, names):
        parameter.requires_grad_(moves)


def _rates(pruning: prunex.Pruning) -> str:
    return ", ".join(f"{name}={pruning.options[name]!r}" for name in pruning.budgeted())


def decisions(trace: TokenTrace, stages: Sequence[int]) -> list[int | None]:
    """For each of a pruner's stages the last decision in the trace by then; None while nothing was decided."""
    # A stage whose keep rate is 1 at present decides nothing and leaves no entry.
    made = [s.block for s in trace.stages]
    last: list[int | None] = []
    for stage in stages:
        past = [i for i, block in enumerate(made) if block <= stage]
        last.append(max(past, default=None))
    return last
