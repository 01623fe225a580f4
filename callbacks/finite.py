"""A training loss that is NaN or infinite ends the training, and is told with where it came from."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.vit.aside import as_found

MOST = 16  # images that a message lists


class Flag:
    """A bool on a device that is read later without making the device wait: its copy is on its way meanwhile."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.event = value, None
        if value.is_cuda:
            self.value = torch.empty_like(value, device="cpu", pin_memory=True)
            self.value.copy_(value, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def __bool__(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.value)


@dataclass(eq=False, repr=False)
class Step(Brief):
    """One training step whose loss is looked at.

    Attributes:
        bad: Whether its loss was not finite.
        total: The loss.
        parts: What it is the sum of: "task", the module's own, and the pruner's by name.
        images: [B, C, H, W], where the batch holds any.
        labels: int64 [B], where they are known.
        logits: [B, classes], where the training forward left them.
        epoch: Of the step.
        number: The batch's, in the epoch.
        step: Optimiser steps before it.
    """

    bad: Flag
    total: Tensor
    parts: dict[str, Tensor]
    images: Tensor | None
    labels: Tensor | None
    logits: Tensor | None
    epoch: int
    number: int
    step: int


class LossGuard:
    """Looks at every training loss, and raises where one is not finite.

    On the CPU that is at once, before the backward pass. On another device the flag is read one step later, when its
    copy has arrived anyway: nothing waits, at the price of one optimiser step with what was not finite, and of one
    batch held for so long. With several processes all of them raise together, in front of the same optimiser step (or
    the one after it), so that none is left waiting: that costs one reduction of one number an optimiser step.

    Gradients are not looked at: a gradient scaler makes infinite ones and recovers from them.
    """

    def __init__(self) -> None:
        self._waiting: deque[Step] = deque()
        self._asked: deque[Flag] = deque()
        self._since: Tensor | None = None  # whether anything was not finite since the last optimiser step
        self._bad: Step | None = None  # this process's first, until all know
        self._begun = (-1, 0)  # the epoch, and the first batch that was seen of it

    def clear(self) -> None:
        """Forget all that is waiting."""
        self._waiting.clear()
        self._asked.clear()
        self._since = self._bad = None

    def saw(
        self,
        trainer: Trainer,
        total: Tensor,
        parts: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        logits: Tensor | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """Take the loss of one training step.

        Args:
            trainer: Says where training is.
            total: The loss, a scalar.
            parts: What it is the sum of, "task" first.
            batch: Images and labels, where there are any.
            logits: Of the training forward, where they are known.
            model: From images to logits, asked where they are not.

        Raises:
            PrunexError: In training by one process, when this loss (or, not on the CPU, the one before) is not finite.
        """
        with torch.no_grad():
            bad = ~torch.isfinite(total.detach()).all()
            if trainer.world_size > 1:
                self._since = bad if self._since is None else self._since | bad
            where = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx, trainer.global_step)
            if where[0] != self._begun[0]:
                self._begun = where[:2]
            held = {name: value.detach() for name, value in parts.items()}
            known = None if logits is None else logits.detach()
            step = Step(Flag(bad), total.detach(), held, batch.get("images"), batch.get("labels"), known, *where)
        self._waiting.append(step)
        self._read(trainer, int(later(total)), model)

    def agree(self, trainer: Trainer) -> None:
        """Called by every process in front of every optimiser step: whether one of them has seen such a loss.

        Raises:
            PrunexError: In all of them, then.
        """
        if trainer.world_size == 1:
            return
        device = trainer.strategy.root_device
        flag = torch.zeros((), device=device) if self._since is None else self._since.to(device, torch.float32)
        self._since = None
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self._asked.append(Flag(flag))
        self._hear(trainer, int(later(flag)))

    def settle(self, trainer: Trainer) -> None:
        """Wait for what is still on its way; called by every process.

        Raises:
            PrunexError: As the others.
        """
        self._read(trainer, 0, None)
        self._hear(trainer, 0)

    def _read(self, trainer: Trainer, left: int, model: nn.Module | None) -> None:
        while len(self._waiting) > left:
            step = self._waiting.popleft()
            if not step.bad:
                continue
            if step.logits is None and not later(step.total):  # the weights are still those of this step
                step.logits = _logits(model, step.images)
            if trainer.world_size == 1:
                self._raise(self._tell(trainer, step))
            self._bad = self._bad or step

    def _hear(self, trainer: Trainer, left: int) -> None:
        while len(self._asked) > left:
            if self._asked.popleft():
                self._read(trainer, 0, None)
                own = None if self._bad is None else self._tell(trainer, self._bad)
                told: list[str | None] = [None] * trainer.world_size
                dist.all_gather_object(told, own)
                self._raise("; ".join(t for t in told if t))

    def _raise(self, message: str) -> None:
        self.clear()
        raise PrunexError(message)

    def _tell(self, trainer: Trainer, step: Step) -> str:
        """What is known of a step, in one line."""
        where = f"epoch {step.epoch}, global step {step.step}, batch {step.number}"
        if trainer.world_size > 1:
            where += f" of process {trainer.global_rank}"
        wrong = [name for name, value in step.parts.items() if not bool(torch.isfinite(value).all())]
        named = ["the task's loss" if name == "task" else f"the pruner's {name}" for name in wrong]
        parts = " and ".join(named) if named else "only the sum of its parts"
        return (
            f"the training loss is {float(step.total.float().sum()):g} at {where}; not finite is {parts}; "
            + self._blame(trainer, step)
        )

    def _blame(self, trainer: Trainer, step: Step) -> str:
        """Which images are at fault, and what to do."""
        found = _at_fault(step)
        if not found:
            return "no single image's inputs, logits or cross-entropy are: look at the loss itself, or clip gradients"
        count = 0 if step.images is None else len(step.images)
        known = dataset_indices(trainer, step.number, count) if self._begun == (step.epoch, 0) else None
        kind = "positions in the batch" if known is None else "dataset indices"
        lists = [f"{what} of {_listed([i if known is None else known[i] for i in at])}" for what, at in found.items()]
        advice = "clean these images or leave them out"
        if "inputs" not in found:
            advice = "lower the learning rate, clip gradients, or train in 'bf16-mixed' or '32-true'"
        return f"by image ({kind}): {', '.join(lists)}: {advice}"


def later(tensor: Tensor) -> bool:
    """Whether flags are read one step later: to read one at once, the device's whole queue would have to be empty."""
    return tensor.device.type != "cpu"


def dataset_indices(trainer: Trainer, number: int, count: int) -> list[int] | None:
    """Which of the training data a batch holds, where the sampler tells it again: in order, or of this process's part.

    Args:
        trainer: In training.
        number: The batch's in the epoch.
        count: Images in it.

    Returns:
        One index an image; None for a sampler that draws anew each time it is asked, or several loaders.
    """
    batches = getattr(trainer.train_dataloader, "batch_sampler", None)
    order = getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or type(order) not in (SequentialSampler, DistributedSampler):
        return None
    found = next(islice(batches, number, None), [])
    return [int(i) for i in found] if len(found) == count else None


def _at_fault(step: Step) -> dict[str, list[int]]:
    """Positions of the images with non-finite inputs, logits and cross-entropy; only what is anybody's."""
    looked: dict[str, Tensor] = {}
    if step.images is not None:
        looked["inputs"] = step.images
        logits, labels = step.logits, step.labels
        if logits is not None and len(logits) == len(step.images):
            looked["logits"] = logits
            fits = labels is not None and logits.ndim == 2 and len(labels) == len(logits)
            if fits and labels is not None and 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
                looked["cross-entropy"] = F.cross_entropy(logits.float(), labels.long(), reduction="none")
    found = {k: (~torch.isfinite(v.flatten(1) if v.ndim > 1 else v[:, None])).any(1) for k, v in looked.items()}
    return {k: v.nonzero().flatten().tolist() for k, v in found.items() if bool(v.any())}


def _logits(model: nn.Module | None, images: Tensor | None) -> Tensor | None:
    """A forward in eval mode of the images that a step had."""
    if model is None or images is None:
        return None
    try:
        with as_found(model, train=False), torch.no_grad():
            found = model(images)
    except (PrunexError, RuntimeError):  # the module feeds its ViT something else than the batch holds
        return None
    return found if isinstance(found, Tensor) else None


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST]))
    return shown if len(numbers) <= MOST else f"{shown} and {len(numbers) - MOST} more"
