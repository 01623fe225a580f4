"""What the callbacks that prune share: attaching in time, one step of training, losses, calibration, checkpoints."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

import prunex
from prunex.callbacks.alone import alone
from prunex.callbacks.averaging import SWA, averaging, callbacks_of, check_own_averages, kinds_of
from prunex.callbacks.checkpoints import guard_loading, say_when_saved
from prunex.callbacks.finite import LossGuard
from prunex.callbacks.layers import Layered
from prunex.callbacks.runs import Runs
from prunex.checks import check_options
from prunex.errors import PrunexError, unknown
from prunex.later import Looks
from prunex.registry import Method
from prunex.vit.anatomy import ViT
from prunex.vit.sharded import is_sharded, settle, write_back
from prunex.vit.units import Backbone


class Participant(Layered):
    """Base of the callbacks that attach a pruner or a head to a ViT and train it with its user's own loss."""

    # What of a model's attachments it is about, as prunex.attached is asked for it: the token pruner, where empty.
    which: ClassVar[dict[str, bool]] = {}
    entry, hparam = "pruning", "pruning"  # what checkpoints and a module's hyperparameters call it
    method: str
    model: str | None
    budget: float | str | None
    options: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.pruning: Any = None  # the handle, from setup on
        self.runs: Any = None  # Runs of it
        self._guard = LossGuard()
        self._looks = Looks()  # at labels and images of a step, without waiting for the device

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach, before the optimiser is made and the checkpoint is read; harmless when done already."""
        check_strategy(trainer, self)
        if stage == "fit":
            self._check_training(trainer, pl_module)
            if self.pruning is None:
                check_own_averages(trainer, pl_module, self)
        self._when_model_exists(pl_module, self.model, self._attach, Backbone if self.which.get("units") else ViT)
        # Checkpoints are read after setup and before training: both must know by then how the model is pruned.
        say_when_saved(pl_module, self.model)
        self._undo += guard_loading(pl_module, {self.entry: lambda: self.pruning.spec}, self._take_over)
        if stage == "fit":
            self._put_round(pl_module, "training_step", partial(self._around_step, pl_module))

    @abstractmethod
    def _check_training(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse a training that cannot work, before anything is attached."""

    def _attach(self, module: LightningModule) -> None:
        """Attach, or take what is attached already where it is what was asked for."""
        handle: Any = prunex.attached(module, self.model, **self.which)  # type: ignore[call-overload]
        asked = "".join(f", {name}=True" for name in self.which)
        detach = f"prunex.attached(module{asked}).detach()"
        before = handle is not None
        what = f"the model has {handle.method} attached" if before else ""
        if not before:
            handle = prunex.attach(module, self.method, path=self.model, budget=self.budget, **self.options)
        elif handle.method != self.method:
            raise PrunexError(f"{what} already: {detach}, or ask for {handle.method} here")
        wanted = {"budget": self.budget, **self.options} if self.which.get("units") else self.options
        for name, value in wanted.items():
            has = handle.options.get(name)
            # What only attaching reads is kept nowhere, so that there is nothing to compare.
            if name in getattr(handle.learner, "read_once", ()):
                continue
            # Options are kept in plain values, in which a tuple is a list.
            if (list(value) if isinstance(value, tuple) else value) != has:
                raise PrunexError(
                    f"{what} already with {name}={has!r}, not {value!r}: detach it first with {detach}, or ask for "
                    f"{has!r} here"
                )
        again = before and self.pruning is not None and handle.model is self.pruning.model
        self._check_attached(handle, before and not again, again)
        self.pruning, self.runs = handle, Runs(handle)
        tell_hparams(module, self.hparam, handle.spec)

    def _check_attached(self, handle: Any, foreign: bool, again: bool) -> None:
        """Look at what is attached: somebody else's (``foreign``), this callback's of an earlier setup, or new."""

    def _take_over(self, entry: Mapping[str, Any]) -> None:
        """Take what a checkpoint says beside the weights."""

    def _calibrate_once(
        self, trainer: Trainer, module: LightningModule, calibrate: Callable[[Any, LightningModule], Any]
    ) -> None:
        """Have rank zero look at images, by a handle and its module; the others take over what it found."""
        if is_sharded(module):
            copies: list[LightningModule] = []

            def on_copy(copied: LightningModule) -> None:
                calibrate(prunex.attached(copied, self.model, **self.which), copied)  # type: ignore[call-overload]
                copies.append(copied)

            alone(trainer, module, on_copy)
            write_back(module, copies[0] if copies else None)
            return
        if trainer.is_global_zero:
            calibrate(self.pruning, module)
        # The others' images are other ones, and their choice would be, too.
        if trainer.world_size > 1:
            state = None
            # The whole model: patch_slimming's search tunes its blocks too.
            if trainer.is_global_zero:
                state = {name: value.cpu() for name, value in self.pruning.model.state_dict().items()}
            self.pruning.model.load_state_dict(trainer.strategy.broadcast(state))

    def _around_step(self, module: LightningModule, beneath: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def step() -> Any:
            self.runs.begin()
            output = beneath(*args, **kwargs)
            self.runs.end_training_step()
            return output

        self._looks.read()
        with self._looks:
            return self._training_step(module, step, args[0] if args else kwargs.get("batch"))

    @abstractmethod
    def _training_step(self, module: LightningModule, step: Callable[[], STEP_OUTPUT], batch: Any) -> STEP_OUTPUT:
        """Take the module's own step, and add to what it returns."""

    def _end_step(
        self,
        module: LightningModule,
        output: STEP_OUTPUT,
        losses: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        images: int = 1,
        logits: Tensor | None = None,
    ) -> STEP_OUTPUT:
        """:func:`with_losses`, and a look at the sum: one that is not finite ends the training."""
        result = with_losses(module, output, losses, images)
        task, total, trainer = loss_of(output), loss_of(result), module._trainer
        if task is not None and total is not None and trainer is not None:  # somebody may call the step by hand
            self._guard.saw(trainer, total, {"task": task, **losses}, batch, logits)
        return result

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """A module that optimises by hand shows its losses here alone, and under "16-mixed" only scaled ones."""
        if not pl_module.automatic_optimization and str(trainer.precision) != "16-mixed":
            self._guard.saw(trainer, loss, {"task": loss}, {})

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look where the first gradients went."""
        self.runs.saw_gradients()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """No process steps by a loss that was not finite in another, and none before something is seen to prune."""
        self._guard.agree(trainer)
        if pl_module.automatic_optimization:
            self.runs.look()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Of a module that optimises by hand the whole batch counts: another network's turn may come first."""
        if not pl_module.automatic_optimization:
            self.runs.look()

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """Whatever ran before was no validation."""
        self.runs.begin()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """See whether it ran the pruned model."""
        self.runs.end_validation_batch()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A forward without gradients leaves sharded weights gathered, which no optimiser knows."""
        settle(pl_module)

    def _validated(self, trainer: Trainer) -> bool:
        """At a validation's end: whether what it shows, or training showed before, is the pruned model."""
        self._looks.read()
        ran: bool = self.runs.end_validation(trainer.sanity_checking)
        return not trainer.sanity_checking and (ran or bool(self.runs.trained))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whether every loss of the epoch was finite is known before anything is written."""
        self._settle(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The same for checkpoints on the way."""
        self._settle(trainer)

    def _settle(self, trainer: Trainer) -> None:
        self._guard.settle(trainer)
        self._looks.read()

    def _restore(self) -> None:
        super()._restore()
        self._guard.clear()
        self._looks.clear()


def options_of(method: Method, options: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Options as they were given to a callback; one that the method does not have is refused."""
    given = {**check_options(options), **more}
    for name in given:
        if name not in method.options:
            raise unknown(f"option of {method.name}", name, method.options)
    return given


def check_single(trainer: Trainer, kind: type[Callback]) -> None:
    """Refuse several callbacks of a kind that there can be one of."""
    count = sum(isinstance(callback, kind) for callback in callbacks_of(trainer))
    if count > 1:
        raise PrunexError(f"{count} {kind.__name__} callbacks in one Trainer: keep one")


def check_strategy(trainer: Trainer, callback: Callback) -> None:
    """Refuse strategies that cut weights up in another way than ``fully_shard``, and averages that cannot follow it."""
    strategy: Any = getattr(trainer, "strategy", None)
    who, what = type(callback).__name__, type(strategy).__name__
    instead = (
        f"use strategy=ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1), and "
        "fully_shard() for each block and then the ViT in configure_model (docs/scale.md), or strategy='ddp'"
    )
    if "FSDPStrategy" in kinds_of(strategy) or getattr(strategy, "zero_stage_3", False):
        raise PrunexError(f"{who} cannot work under {what}, which wraps or empties the blocks it opens: {instead}")
    if not cuts_weights(trainer):
        return
    cut = strategy.device_mesh["tensor_parallel"].size()
    if cut > 1:
        raise PrunexError(
            f"{who} cannot work under {what} with tensor_parallel_size={cut}, which cuts up the heads it looks at: "
            f"{instead}"
        )
    average = averaging(trainer) or averaging(trainer, SWA)
    if average is not None:
        raise PrunexError(
            f"{type(average).__name__} keeps a copy of the model, which does not follow weights that are cut up among "
            f"processes: leave it out, or use strategy='ddp', where {who} follows it"
        )


def cuts_weights(trainer: Trainer) -> bool:
    """Whether the strategy is the one under which modules shard themselves by ``fully_shard``."""
    return "ModelParallelStrategy" in kinds_of(trainer.strategy)


def with_losses(module: LightningModule, output: STEP_OUTPUT, losses: Mapping[str, Tensor], batch: int) -> STEP_OUTPUT:
    """What ``training_step`` returned, with weighted scalars added and logged; None (a skipped batch) stays None."""
    for name, value in losses.items():
        module.log(
            f"prunex/loss_{name}", value.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=batch
        )
    if not losses or output is None:
        return output
    # In float32, as the module's own loss is under autocast.
    added = torch.stack([v.float() for v in losses.values()]).sum()
    if isinstance(output, Tensor):
        return output + added
    if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] + added}
    raise PrunexError(
        f"training_step returned {type(output).__name__}: give the loss as a tensor, or a dict with a 'loss' tensor"
    )


def loss_of(output: Any) -> Tensor | None:
    """The loss in what ``training_step`` returned; None where it holds none."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def progress(trainer: Trainer, batches: int) -> float:
    """Fraction of training done after so many batches of this epoch; an open-ended run counts as done."""
    # Batches are counted, not steps: those come several a batch where somebody optimises by hand.
    epochs, most, total = trainer.max_epochs, trainer.max_steps, trainer.num_training_batches
    done = []
    if epochs is not None and epochs > 0:
        window = trainer.accumulate_grad_batches
        share = 0.0  # of an epoch whose length nobody knows
        if math.isfinite(total) and total > 0:
            share = 1.0 if batches >= total else (batches // window) / math.ceil(total / window)
        done.append((trainer.current_epoch + share) / epochs)
    if most > 0:
        done.append(trainer.global_step / most)
    return min(1.0, max(done, default=1.0))


def tell_hparams(module: LightningModule, name: str, spec: dict[str, Any]) -> None:
    """Tell a module that rebuilds its structure from hyperparameters (``rebuilds_pruning``) how it is pruned."""
    if name not in module.hparams:
        return
    # A hyperparameter is somebody else's, unless it names one of prunex's methods.
    value = module.hparams[name]
    ours = isinstance(value, dict) and value.get("method") in {
        m.name for k in ("pruner", "head") for m in prunex.methods(k)
    }
    if ours or (value is None and getattr(module, "rebuilds_pruning", False)):
        module.hparams[name] = spec
