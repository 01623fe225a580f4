"""What a pruner brings, new parameters among pretrained ones: whether an optimiser steps them, and at which rate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from prunex.callbacks.averaging import callbacks_of, kinds_of, stepped
from prunex.errors import PrunexError
from prunex.handles.base import Handle
from prunex.vit.optimisers import chain
from prunex.vit.sharded import settle

PEAKS = ("lr", "initial_lr", "max_lr")  # of a group: now, and what schedules note down there about their highest
REACH = 0.02  # how far a parameter must be able to go: as wide as what is new is drawn, and as positions of ViTs are

Group = dict[str, Any]


def give_rates(trainer: Trainer, pruner: Any, scale: float | None) -> list[Callable[[], None]]:
    """Give what a pruner brings its rate in each optimiser, until the returned calls undo that."""
    if scale not in (None, 1) and not any(p.requires_grad for p in pruner.parameters()):
        rank_zero_warn(f"lr_scale={scale:g} has no effect: {pruner.name} brings no parameters that learn; leave it out")
    undo = []
    slow = ""  # told once, whichever optimiser it is about
    for optimizer in trainer.optimizers:
        watched = PrunerRate(optimizer, pruner, scale)
        changed = [(base, rate) for base, rate in watched.rates() if rate != base]
        if not watched.reachable:
            if changed or scale not in (None, 1):
                rank_zero_warn(
                    f"{type(watched.optimizer).__name__} does not step by the rates of its groups, so {pruner.name}'s "
                    "parameters have the rate of all others: use AdamW, or lr_scale=1"
                )
            continue
        if changed:
            base, rate = changed[0]
            rank_zero_info(f"prunex: {pruner.name}'s parameters learn at {rate:.2g}, the module's rate is {base:.2g}")
            undo.append(watched.watch())
        slow = slow or _too_slow(trainer, watched)
    if slow:
        rank_zero_warn(slow)
    return undo


def _too_slow(trainer: Trainer, watched: PrunerRate) -> str:
    """What to say of a rate at which the training is over before new parameters are anywhere; "" of any other."""
    pruner, rates = watched.pruner, watched.rates()
    if isinstance(watched.optimizer, torch.optim.SGD) and rates and pruner.trains_masked and pruner.lr is not None:
        # SGD's steps are as long as gradients are, and those of new predictors are tiny at any usual rate.
        return f"SGD hardly moves {pruner.name}'s predictors, which then learn nothing: use AdamW"
    slow = [(base, rate) for base, rate in rates if rate < (pruner.lr or 0.0)]
    if not slow or is_plain(watched.optimizer):
        return ""
    base, rate = slow[0]
    # Each step of Adam goes about as far as its rate, and over warm-up and decay rates are half their peak.
    reach = rate * trainer.estimated_stepping_batches / 2
    if reach >= REACH:
        return ""
    remedy = "leave lr_scale out" + (f", or give {(pruner.lr or 0.0) / base:.2g}" if base > 0 else "")
    return (
        f"at a rate of {rate:.2g} {pruner.name}'s new parameters move by {reach:.1g} at most in this training, and "
        f"learn little below {REACH:g}: {remedy}"
    )


class PrunerRate:
    """Steps a pruner's parameters at another rate than the others of their group, in one optimiser.

    While the optimiser's step runs, and not longer, each of its groups that holds such parameters is two, which differ
    by their rate: schedules, checkpoints and loggers meet the user's groups alone. ``scale`` times their group's rate
    is theirs; None: the pruner's ``lr`` at the schedule's peak, where their group has less, never below its rate.
    """

    def __init__(self, optimizer: Optimizer, pruner: Any, scale: float | None = None) -> None:
        # Of optimisers that wrap others the one that really steps, and that a gradient scaler skips.
        *_, self.optimizer = chain(optimizer)
        self.pruner = pruner
        self.scale = scale
        self._parted: list[tuple[Group, list[nn.Parameter], Any]] = []  # groups, with all their parameters and rate
        self._count = 0
        # By place: reading a checkpoint makes new groups, and what it brings is no peak.
        self._peaks = [peak(group) for group in self.optimizer.param_groups]

    def watch(self) -> Callable[[], None]:
        """Take part in every step from now on, until the call that is returned."""
        before = self.optimizer.register_step_pre_hook(self._before)
        after = self.optimizer.register_step_post_hook(self._join)

        def undo() -> None:
            before.remove()
            after.remove()
            self._join()

        return undo

    def rates(self) -> list[tuple[float, float]]:
        """Rates at the schedule's peak of each group that holds such parameters: the group's, and theirs."""
        rates = []
        for i, group in enumerate(self.optimizer.param_groups):
            if self._brought(group):
                rates.append((self._peak(i), float(self._rate(i, self._peak(i)))))
        return rates

    @property
    def reachable(self) -> bool:
        """Whether the optimiser steps by its groups' rates: some have none, and L-BFGS reads those of the first."""
        groups = [g for g in self.optimizer.param_groups if self._brought(g)]
        return all(g.get("lr") is not None for g in groups) and not isinstance(self.optimizer, torch.optim.LBFGS)

    def _brought(self, group: Group) -> list[nn.Parameter]:
        brought = {id(p) for p in self.pruner.parameters()}
        return [p for p in group["params"] if id(p) in brought]

    def _peak(self, number: int) -> float:
        while number >= len(self._peaks):  # a group that somebody added on the way
            self._peaks.append(peak(self.optimizer.param_groups[len(self._peaks)]))
        return self._peaks[number]

    def _rate(self, number: int, now: Any) -> Any:
        """The rate of what the pruner brings, where that of its group is ``now``."""
        if self.scale is not None:
            return self.scale * now
        # The schedule's shape is the module's: warm-up and decay of the group's rate scale the pruner's as well.
        top, target = self._peak(number), self.pruner.lr
        if target is None or top <= 0 or is_plain(self.optimizer):
            return now
        return max(now, min(target / top * now, target))

    def _before(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Part the groups behind a closure, which is the user's whole training step and may look at them."""
        # torch hands on what step was called with, the optimiser itself first.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._part()
            return None

        @functools.wraps(closure)
        def between() -> Any:
            self._join()
            result = closure()
            self._part()
            return result

        if len(args) > 1:
            return (args[0], between, *args[2:]), kwargs
        return args, {**kwargs, "closure": between}

    def _part(self) -> None:
        self._join()
        # New groups go to the end, where they can be cut off again.
        groups = self.optimizer.param_groups
        self._count = len(groups)
        for i, group in enumerate(list(groups)):
            brought = self._brought(group)
            # By identity: where the rate is a tensor on a GPU, comparing numbers would wait for it.
            if not brought or (rate := self._rate(i, group["lr"])) is group["lr"]:
                continue
            self._parted.append((group, group["params"], group["lr"]))
            if len(brought) < len(group["params"]):
                chosen = {id(p) for p in brought}
                group["params"] = [p for p in group["params"] if id(p) not in chosen]
                group = {**group, "params": brought}
                groups.append(group)
            group["lr"] = rate

    def _join(self, *_: Any) -> None:
        """Make the user's groups whole again; harmless where they are."""
        if self._parted:
            del self.optimizer.param_groups[self._count :]
        for group, params, rate in self._parted:
            group["params"], group["lr"] = params, rate
        self._parted = []


def check_stepped(trainer: Trainer, handle: Handle, names: Collection[str]) -> None:
    """Refuse a training in which nothing moves what a pruner learns by losses of its own; of any other it is told."""
    settle(trainer.lightning_module)
    learned = {name: p for name, p in handle.learner.named_parameters() if name in names}
    frozen = [name for name, p in learned.items() if not p.requires_grad]
    known = stepped(trainer)
    missing = [name for name, p in learned.items() if p.requires_grad and id(p) not in known]
    if "DeepSpeedStrategy" in kinds_of(trainer.strategy):
        missing = []  # its optimisers hold flat copies
    complaints = []
    if frozen:
        complaints.append(
            f"{len(frozen)} of {len(learned)} parameters of {handle.method} ({frozen[0]}, ...) were frozen after they "
            "were attached: freeze the others only, or do it (and put adapters on) before the callback's setup, as in "
            "__init__"
        )
    if missing:
        complaints.append(
            f"no optimiser steps {len(missing)} of {len(learned)} parameters of {handle.method} ({missing[0]}, ...): "
            "make it in configure_optimizers, which comes after setup, of all self.parameters(), or give it the group "
            f"{{'params': {handle.reached}.parameters()}} there"
        )
    # A callback that thaws parameters later gives them to the optimiser later, too.
    thaws = any("BaseFinetuning" in kinds_of(callback) for callback in callbacks_of(trainer))
    for complaint in complaints:
        if handle.learner.trains_masked and not thaws:
            raise PrunexError(complaint)
        rank_zero_warn(complaint)


def peak(group: Group) -> float:
    """The highest rate of a parameter group, as far as it is known when training starts."""
    return max((float(group[name]) for name in PEAKS if group.get(name) is not None), default=0.0)


def is_plain(optimizer: Optimizer) -> bool:
    """Whether steps are as long as gradients are: the SGDs. All others go about as far as their rate says."""
    return any("SGD" in kind for kind in kinds_of(optimizer))
