"""Whether the optimisers of somebody's module step what was attached, and where their steps can be seen."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from prunex.errors import PrunexError
from prunex.handles.tokens import Pruning
from prunex.vit.optimisers import chain


def learned(pruning: Pruning) -> dict[str, torch.nn.Parameter]:
    """What a pruner trains at present, by name; predictors of stages that keep everything are held by the method."""
    return {name: p for name, p in pruning.pruner.named_parameters() if p.requires_grad}


def check_stepped(trainer: Trainer, pruning: Pruning, wanted: dict[str, torch.nn.Parameter]) -> None:
    """Refuse a training in which nothing moves what a pruner learns.

    Args:
        trainer: Its optimisers are there.
        pruning: Of the model.
        wanted: What was to be trained when the pruner was attached; one that had been attached before may be frozen.

    Raises:
        PrunexError: For a method that learns by losses of its own; of any other it is told.
    """
    frozen = [name for name, p in wanted.items() if not p.requires_grad]
    stepped = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    # DeepSpeed's optimisers hold flat copies.
    missing = [] if _flat(trainer) else [n for n, p in wanted.items() if p.requires_grad and id(p) not in stepped]
    complaints = []
    if frozen:
        complaints.append(
            f"{len(frozen)} of {len(wanted)} parameters of {pruning.method} ({frozen[0]}, ...) were frozen after they "
            "were attached: freeze the others only, or do it before the callback's setup"
        )
    if missing:
        complaints.append(
            f"no optimiser steps {len(missing)} of {len(wanted)} parameters of {pruning.method} ({missing[0]}, ...): "
            "make it in configure_optimizers, which comes after setup, of all self.parameters(), or give it the group "
            "{'params': prunex.attached(self).pruner.parameters()} there"
        )
    thaws = any("BaseFinetuning" in {k.__name__ for k in type(c).__mro__} for c in trainer.callbacks)  # type: ignore[attr-defined]
    for told in complaints:
        if pruning.pruner.trains_masked and not thaws:
            raise PrunexError(told)
        rank_zero_warn(told)


def _flat(trainer: Trainer) -> bool:
    return "DeepSpeedStrategy" in {c.__name__ for c in type(trainer.strategy).__mro__}


def stepping(optimizer: torch.optim.Optimizer, curriculum: bool) -> torch.optim.Optimizer:
    """The optimiser that takes the steps, in wrappers such as timm's Lookahead, which average what it does.

    Args:
        optimizer: Of the trainer.
        curriculum: Whether some parameters must stand still for a while.

    Raises:
        PrunexError: Where the wrapper would move what the one in it had to leave.
    """
    *outer, last = chain(optimizer)
    if outer and curriculum:
        raise PrunexError(
            f"{type(optimizer).__name__} moves parameters after the steps of the {type(last).__name__} in it, and a "
            "curriculum holds some of them still: give that one alone"
        )
    return last
