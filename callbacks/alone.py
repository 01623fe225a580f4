"""What process 0 does alone, also where every process holds a part of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from prunex.callbacks.layers import is_layered
from prunex.errors import PrunexError
from prunex.vit.sharded import is_sharded, whole


def alone(trainer: Trainer, module: nn.Module, work: Callable[[Any], Any]) -> None:
    """Have process 0 work on a module: on itself, while the others go on; or on its whole copy, while they wait.

    Called by every process. Where weights are sharded the others raise what process 0 raised, so that nobody is left
    waiting in the next exchange.
    """
    if not is_sharded(module):
        if trainer.is_global_zero:
            work(module)
        return
    failure: Exception | None = None
    try:
        # Called by all: each gives its part, and process 0 alone gets the whole.
        copied = whole(module)
        if copied is not None:
            if isinstance(copied, LightningModule):
                _let_stand_alone(copied, trainer)
            work(copied)
    except Exception as error:
        failure = error
    # In words, for not every exception can be sent.
    said = trainer.strategy.broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if said is not None:
        raise PrunexError(f"process 0 ended with {said}")


def _let_stand_alone(copied: LightningModule, trainer: Trainer) -> None:
    """Have a copy log into the Trainer, and run its own steps: callbacks' layers on them lead to the original."""
    copied.to("cpu")  # which it tells as its device from then on
    copied.trainer = trainer
    layered = [name for name, value in vars(copied).items() if is_layered(value)]
    for name in layered:
        del copied.__dict__[name]


def agreed(trainer: Trainer, module: nn.Module, choice: bool) -> bool:
    """What process 0 chooses, where all have to take part in what follows; else each process's own choice."""
    return bool(trainer.strategy.broadcast(choice)) if is_sharded(module) else choice


def add_up(trainer: Trainer, tensor: Tensor) -> None:
    """Sum a tensor on the strategy's device over all processes, in place; called by each of them."""
    if trainer.world_size > 1:
        dist.all_reduce(tensor)
