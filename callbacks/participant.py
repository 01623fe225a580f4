"""What callbacks that take part in somebody's training share: layers round the module's methods, progress, losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from prunex.callbacks.finite import LossGuard
from prunex.errors import PrunexError
from prunex.vit.anatomy import find

CHECKPOINT_KEY = "prunex"
CHECKPOINT_VERSION = 1

Layer = Callable[..., Any]  # takes the function beneath it, and that one's arguments


class Layered(Callback):
    """Base of the callbacks that put layers round a module's methods, and take them off however a run ends."""

    def __init__(self) -> None:
        super().__init__()
        self._undo: list[Callable[[], None]] = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module's own methods as they were."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own methods back; what was attached stays, since a checkpoint may still be saved."""
        self._restore()

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()


class Participant(Layered):
    """Base of the callbacks that attach something to a ViT and train it with the user's own loss and optimiser."""

    sees_loss = False  # whether every training step comes by

    def __init__(self) -> None:
        super().__init__()
        self._guard = LossGuard()

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
        """No process steps by a loss that was not finite in another."""
        if self.sees_loss:
            self._guard.agree(trainer)

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

    def _guard_loading(self, module: LightningModule, name: str, spec: Callable[[], dict[str, Any]]) -> None:
        """Take no checkpoint written with other options, see :func:`guard_loading`."""
        self._undo += guard_loading(module, {name: spec})

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


def guard_loading(
    module: LightningModule, specs: Mapping[str, Callable[[], dict[str, Any]]]
) -> list[Callable[[], None]]:
    """Let the module take no checkpoint that was written with other options, and say which they are.

    Args:
        module: Its ``on_load_checkpoint`` and ``load_state_dict`` get a layer each.
        specs: How the model is pruned now, by the name under which checkpoints tell it ("pruning", "units").

    Returns:
        Calls that take the layers off again.
    """
    written: dict[str, Any] = {}

    def on_load_checkpoint(beneath: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        told = checkpoint.get(CHECKPOINT_KEY)
        if isinstance(told, dict):
            check_version(told)
            for name, spec in specs.items():
                if isinstance(told.get(name), dict):
                    # What is left open here may have been found out there: counts, a calibrated choice.
                    found = differences(told[name], {k: v for k, v in spec().items() if v is not None})
                    if found:
                        raise PrunexError(f"the checkpoint was written with other options: {found}; {_HOW}")
        written.update(checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {})
        return beneath(checkpoint)

    def load_state_dict(beneath: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return beneath(*args, **kwargs)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            found = differences(written, dict(module.hparams)) or " ".join(lines[1:2] or lines)[:200]
            raise PrunexError(f"the checkpoint's weights do not fit this model: {found}; {_HOW}") from error

    return [
        put_round(module, "on_load_checkpoint", on_load_checkpoint),
        put_round(module, "load_state_dict", load_state_dict),
    ]


_HOW = "ask for the options it was written with, or open it with prunex.callbacks.load_from_checkpoint"


def check_version(told: Mapping[str, Any]) -> None:
    """Refuse what a later prunex wrote down in a checkpoint."""
    version = told.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= CHECKPOINT_VERSION:
        raise PrunexError(
            f"the checkpoint has prunex format {version!r}: this prunex reads up to {CHECKPOINT_VERSION}; use the "
            "prunex that wrote it, or a later one"
        )


def differences(written: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between options of a checkpoint and those of this run, in words; "" when nothing does."""
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in now.items()}
    found = [
        f"{name}={written[name]!r} (now {plain[name]!r})"
        for name in written
        if name in plain and written[name] != plain[name] and not name.startswith("_")
    ]
    return ", ".join(found)


def put_round(module: LightningModule, name: str, layer: Layer) -> Callable[[], None]:
    """Put a layer round a method of one module object; the call that is returned takes it off again.

    Layers come off in any order; with the last one the object has its own method back.
    """
    before = module.__dict__.get(name)
    layers: list[Layer] | None = getattr(before, "_prunex_layers", None)
    if layers is None:
        layers, original = [], getattr(module, name)
        inside = layers

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            function = original
            for each in inside:
                function = functools.partial(each, function)
            return function(*args, **kwargs)

        call._prunex_layers = layers  # type: ignore[attr-defined]
        call._prunex_before = before  # type: ignore[attr-defined]
        module.__dict__[name] = call
    layers.append(layer)

    def undo() -> None:
        if layer in layers:
            layers.remove(layer)
        now: Any = module.__dict__.get(name)
        if layers or getattr(now, "_prunex_layers", None) is not layers:
            return
        own = now._prunex_before
        if own is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = own

    return undo


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


def note(checkpoint: dict[str, Any], path: str | None, **told: Any) -> None:
    """Write down in a checkpoint how its model is pruned, beside what another callback wrote."""
    own = checkpoint.setdefault(CHECKPOINT_KEY, {"version": CHECKPOINT_VERSION, "path": path})
    own.update(told)
