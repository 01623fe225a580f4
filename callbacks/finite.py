"""A training loss that is NaN or infinite ends the training, and is told with where it came from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from prunex.errors import PrunexError
from prunex.later import Flag, later

MOST = 16  # images that a message lists


class LossGuard:
    """Looks at every training loss, and raises where one is not finite.

    On the CPU that is at once; on another device the flag is read one step later, when its copy has arrived anyway:
    nothing waits, at the price of one optimiser step. Several processes raise together, in front of the same optimiser
    step, so that none is left waiting. Gradients are not looked at: a gradient scaler recovers from infinite ones.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Flag, int, Callable[[], str]]] = deque()  # its optimiser step, what there is to say
        self._shared: deque[tuple[Flag, int]] = deque()  # the same of all processes
        self._round = 0  # optimiser steps that all have looked at
        self._since: Tensor | None = None  # whether anything was not finite since the last optimiser step
        self._first: tuple[int, str] | None = None  # of this process's first such loss

    def clear(self) -> None:
        """Forget all that is waiting."""
        self._waiting.clear()
        self._shared.clear()
        self._since, self._first = None, None

    def saw(
        self,
        trainer: Trainer,
        total: Tensor,
        parts: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        logits: Tensor | None = None,
    ) -> None:
        """Take the loss of one training step: a scalar, what it is the sum of by name, and which images it is about."""
        # One number is looked at: the parts and the images only when it is bad.
        bad = ~torch.isfinite(total.detach()).all()
        where = f"epoch {trainer.current_epoch}, global step {trainer.global_step}"
        where += f", batch {trainer.fit_loop.epoch_loop.batch_idx}"
        if trainer.world_size > 1:
            where += f" of process {trainer.global_rank}"
            self._since = bad if self._since is None else self._since | bad
        # Held detached: the graph goes when the backward pass is through.
        losses = {"": total.detach(), **{name: value.detach() for name, value in parts.items()}}
        rows = {"inputs": batch.get("images"), "logits": None if logits is None else logits.detach()}
        self._waiting.append((Flag(bad), self._round, lambda: _described(where, losses, rows)))
        self._read(trainer, int(later(total)))

    def agree(self, trainer: Trainer) -> None:
        """Called by every process in front of every optimiser step: all raise where one has seen such a loss."""
        if trainer.world_size == 1:
            return
        device = trainer.strategy.root_device
        bad = torch.zeros((), device=device) if self._since is None else self._since.to(device, torch.float32)
        self._since = None
        # The largest of 0 and 1: whether any process saw one.
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        self._shared.append((Flag(bad), self._round))
        self._round += 1
        self._read_shared(trainer, int(later(bad)))

    def settle(self, trainer: Trainer) -> None:
        """Wait for what is still on its way; called by every process."""
        self._read(trainer, 0)
        self._read_shared(trainer, 0)

    def _read(self, trainer: Trainer, left: int) -> None:
        """Read this process's flags but the last ``left``."""
        while len(self._waiting) > left:
            bad, number, describe = self._waiting.popleft()
            if bad:
                # The first is the cause: once weights are NaN all later losses are.
                self._first = self._first or (number, describe())
                if trainer.world_size == 1:
                    raise PrunexError(self._first[1])

    def _read_shared(self, trainer: Trainer, left: int) -> None:
        """Read what all processes have seen but the last ``left``."""
        while len(self._shared) > left:
            bad, number = self._shared.popleft()
            if bad:
                self._read(trainer, 0)
                # A loss that is bad after the shared step may be what another process's did to the weights.
                if self._first is not None and self._first[0] <= number:
                    raise PrunexError(self._first[1])
                raise PrunexError("the training loss of another process is not finite: it says more")


def _described(where: str, losses: Mapping[str, Tensor], rows: Mapping[str, Tensor | None]) -> str:
    """When it was, which part of the loss, which images are at fault, and what to do, in one line."""
    wrong = []
    for name, value in losses.items():
        if name and not bool(torch.isfinite(value).all()):
            wrong.append("the task's loss" if name == "task" else f"the pruner's {name}")
    part = " and ".join(wrong) or "only the sum of its parts"
    text = f"the training loss is {float(losses[''].float().sum()):g} at {where}; not finite is {part}; "
    faults = {}
    for what, values in rows.items():
        if values is None or values.ndim == 0:
            continue
        # Also of logits [B], which a module may have squeezed.
        bad = (~torch.isfinite(values.reshape(len(values), -1))).any(1).nonzero().flatten().tolist()
        if bad:
            more = f" and {len(bad) - MOST} more" if len(bad) > MOST else ""
            faults[what] = f"{what} of {', '.join(map(str, bad[:MOST]))}{more}"
    if not faults:
        return text + "no single image's inputs or logits are: look at the loss itself, or clip gradients"
    advice = "lower the learning rate, clip gradients, or train in 'bf16-mixed' or '32-true'"
    if "inputs" in faults:
        advice = "clean these images or leave them out"
    return f"{text}by image (positions in the batch): {', '.join(faults.values())}: {advice}"
