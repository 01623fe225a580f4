"""What callbacks that take part in somebody's training share: attaching in time, progress, losses, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

import prunex
from prunex.callbacks.finite import LossGuard
from prunex.callbacks.layers import Layer, Layered, put_round
from prunex.callbacks.runs import Runs
from prunex.callbacks.saved import guard_loading, say_when_saved
from prunex.errors import PrunexError
from prunex.vit.anatomy import find


class Participant(Layered):
    """Base of the callbacks that attach something to a ViT and train it with the user's own loss and optimiser."""

    sees_loss = False  # whether every training step comes by

    def __init__(self) -> None:
        super().__init__()
        self._guard = LossGuard()
        self.runs: Runs | None = None  # of what was attached

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy under which nobody has the whole model."""
        check_strategy(trainer, self)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """A module that optimises by hand shows its losses here alone, and under "16-mixed" only scaled ones."""
        if self.sees_loss and not pl_module.automatic_optimization and str(trainer.precision) != "16-mixed":
            self._guard.saw(trainer, loss, {"task": loss}, {})

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """No process steps by a loss that was not finite in another, and none before something is seen to prune."""
        if self.sees_loss:
            self._guard.agree(trainer)
        if self.runs is not None and pl_module.automatic_optimization:
            self.runs.look()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look where the first gradients went."""
        if self.runs is not None:
            self.runs.saw_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Of a module that optimises by hand the whole batch counts: another network's turn may come first."""
        if self.runs is not None and not pl_module.automatic_optimization:
            self.runs.look()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Whatever ran before was no validation."""
        if self.runs is not None:
            self.runs.begin()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """See whether it ran the pruned model."""
        if self.runs is not None:
            self.runs.end_validation_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whether every loss of the epoch was finite is known before anything is written."""
        self._guard.settle(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The same for checkpoints on the way."""
        self._guard.settle(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module's own methods as they were."""
        self._guard.clear()
        super().on_exception(trainer, pl_module, exception)

    def _end_step(
        self,
        module: LightningModule,
        output: STEP_OUTPUT,
        losses: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        images: int = 1,
        logits: Tensor | None = None,
        model: torch.nn.Module | None = None,
    ) -> STEP_OUTPUT:
        """:func:`with_losses`, and a look at the sum: a loss that is not finite ends the training.

        Args:
            module: Logs.
            output: What ``training_step`` returned.
            losses: Weighted scalars to be added.
            batch: Images and labels of it, where there are any.
            images: How many the forward saw.
            logits: What the forward gave, where it is known.
            model: From images to logits, where it is not.
        """
        result = with_losses(module, output, losses, images)
        task, total, trainer = loss_of(output), loss_of(result), module._trainer
        if task is not None and total is not None and trainer is not None:  # somebody may call the step by hand
            self._guard.saw(trainer, total, {"task": task, **losses}, batch, logits, model)
        return result

    def _put_round(self, module: LightningModule, name: str, layer: Layer) -> None:
        """Put a layer round a method of the module until :meth:`_restore`; several callbacks' layers lie in order."""
        self._undo.append(put_round(module, name, layer))

    def _guard_checkpoints(
        self,
        module: LightningModule,
        path: str | None,
        name: str,
        spec: Callable[[], dict[str, Any]],
        take_over: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Say in every checkpoint how the model is pruned, and take none that says otherwise."""
        say_when_saved(module, path)
        self._undo += guard_loading(module, {name: spec}, take_over)

    def _when_model_is_there(
        self, module: LightningModule, path: str | None, attach: Callable[[LightningModule], None], kinds: Any
    ) -> None:
        """Attach now, or right after ``configure_model`` of a module that makes its ViT only there."""
        if is_overridden("configure_model", module):
            try:
                find(module, path, kinds)
            except PrunexError:

                def configure_model(beneath: Callable[[], None]) -> None:
                    beneath()
                    attach(module)

                self._put_round(module, "configure_model", configure_model)
                return
        attach(module)


def check_strategy(trainer: Trainer, callback: Callback) -> None:
    """Refuse strategies that cut the weights up among processes.

    Blocks are opened from inside, where sharded ones have no whole weights, and one process alone explains, counts and
    exports, while their gathering needs all.

    Raises:
        PrunexError: By the strategy's name.
    """
    strategy: Any = getattr(trainer, "strategy", None)
    kinds = {c.__name__ for c in type(strategy).__mro__}
    if kinds & {"FSDPStrategy", "ModelParallelStrategy"} or getattr(strategy, "zero_stage_3", False):
        raise PrunexError(
            f"{type(callback).__name__} cannot work under {type(strategy).__name__}, which gives each process a part "
            "of every weight: use strategy='ddp' (on any number of nodes), or DeepSpeed below stage 3"
        )


def with_losses(module: LightningModule, output: STEP_OUTPUT, losses: Mapping[str, Tensor], batch: int) -> STEP_OUTPUT:
    """What ``training_step`` returned, with losses added and logged as ``prunex/loss_*``.

    Args:
        module: Logs.
        output: A loss, or a dict with a "loss"; None (a skipped batch) stays None.
        losses: Weighted scalars.
        batch: Images in it.

    Raises:
        PrunexError: For an output without a loss, where there are losses to add.
    """
    for name, value in losses.items():
        module.log(
            f"prunex/loss_{name}", value.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=batch
        )
    if not losses or output is None:
        return output
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
    found = output.get("loss") if isinstance(output, Mapping) else output
    return found if isinstance(found, Tensor) else None


def progress(trainer: Trainer, batches: int) -> float:
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


def tell_hparams(module: LightningModule, name: str, spec: dict[str, Any]) -> None:
    """Tell a module that rebuilds its structure from hyperparameters how it is pruned.

    Such a module says so with ``rebuilds_pruning = True``. Without that a hyperparameter is somebody else's, unless it
    names one of prunex's methods.
    """
    known = module.hparams.get(name)
    ours = isinstance(known, dict) and known.get("method") in {m.name for m in prunex.methods("pruner")}
    if name in module.hparams and (ours or (known is None and getattr(module, "rebuilds_pruning", False))):
        module.hparams[name] = spec
