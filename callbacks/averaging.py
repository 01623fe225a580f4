"""Copies of the weights that somebody keeps beside a model, averages above all: whose are in the model when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import ModuleType, NoneType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit.mount import TOKENS, UNITS, mounted
from prunex.vit.units import blocks_of

SWA = "StochasticWeightAveraging"
_AVERAGES = {"AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3"}  # torch's, and timm's
_MOST = 20_000  # objects that are looked at: somebody's data may lie there too
_NO_HOLDERS = (type, ModuleType, Trainer, Tensor, str, bytes, int, float, NoneType)


def kinds_of(value: object) -> set[str]:
    """Names of an object's class and its bases: packages that are told apart by these need not be installed."""
    return {kind.__name__ for kind in type(value).__mro__}


def callbacks_of(trainer: Trainer) -> list[Any]:
    """A Trainer's callbacks, in the order of their turns."""
    # A connector sets them, so that no type says so.
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def stepped(trainer: Trainer) -> set[int]:
    """The ``id`` of each parameter that an optimiser of the Trainer steps."""
    ids: set[int] = set()
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            ids.update(map(id, group["params"]))
    return ids


def averaging(trainer: Trainer, kind: str = "WeightAveraging") -> Callback | None:
    """The Trainer's ``WeightAveraging`` (``EMAWeightAveraging`` is one) or another kind; old Lightnings have none."""
    return next((c for c in callbacks_of(trainer) if kind in kinds_of(c)), None)


def stands_before(trainer: Trainer, first: Callback | None, second: Callback) -> bool:
    """Whether one callback's turn comes before another's."""
    order = [id(c) for c in callbacks_of(trainer)]
    return first is not None and order.index(id(first)) < order.index(id(second))


@contextmanager
def averaged(trainer: Trainer, pl_module: LightningModule, swapped: bool = False) -> Iterator[None]:
    """The module with the weights that validation sees: the averaged ones, unless they are in place (``swapped``)."""
    average = None if swapped else getattr(averaging(trainer), "_average_model", None)
    if average is None:
        yield
        return
    _swap(average.module, pl_module)
    try:
        yield
    finally:
        _swap(average.module, pl_module)


def _swap(average: nn.Module, module: nn.Module) -> None:
    with torch.no_grad():
        # Numbers change places, not tensors: optimisers and DDP hold these very parameters.
        ours = [*module.parameters(), *module.buffers()]
        for a, b in zip([*average.parameters(), *average.buffers()], ours, strict=True):
            held = a.detach().clone()
            a.data.copy_(b.detach())
            b.data.copy_(held)


def check_order(trainer: Trainer, callback: Callback) -> None:
    """Refuse an average that copies the model before this callback has attached what it trains."""
    for average in (averaging(trainer), averaging(trainer, SWA)):
        if stands_before(trainer, average, callback):
            raise PrunexError(
                f"{type(average).__name__} stands before {type(callback).__name__}, so it copies a model without what "
                f"is attached here: list {type(callback).__name__} first"
            )


def check_swa_order(trainer: Trainer, callback: Callback) -> None:
    """Refuse stochastic weight averaging that puts its weights into the model after this callback has used them."""
    average = averaging(trainer, SWA)
    if average is not None and not stands_before(trainer, average, callback):
        raise PrunexError(
            f"StochasticWeightAveraging puts its weights into the model when its turn comes at the end: list it before "
            f"{type(callback).__name__}, which would use others"
        )


def check_own_averages(trainer: Trainer, module: LightningModule, callback: Callback) -> None:
    """Refuse averages that the module or somebody's callback made already, of a model without what is attached here."""
    for holder in (module, *callbacks_of(trainer)):
        held = dict(vars(holder))
        # torch keeps submodules apart from a module's other attributes.
        if isinstance(holder, nn.Module):
            held |= dict(holder.named_modules())
        for name, value in held.items():
            kinds = kinds_of(value) & _AVERAGES
            if kinds and not any(mounted(m, kind) is not None for m in value.modules() for kind in (TOKENS, UNITS)):
                raise PrunexError(
                    f"{type(holder).__name__}.{name} ({kinds.pop()}) averages a model without what "
                    f"{type(callback).__name__} attaches in setup: make it later, such as in on_fit_start"
                )


class Copies:
    """What the module and the callbacks of others hold that has the shapes of the ViT's blocks.

    After the first steps an average, which does not follow removed units, and a teacher, which never changes, are told
    apart by whether the numbers moved. A second network that an optimiser steps is neither.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, vit: nn.Module) -> None:
        self.trainer, self.module, self.vit = trainer, module, vit
        self._step = trainer.global_step
        self._began = {where: tensor.detach().clone() for where, tensor in self._copies()}

    def moving(self) -> str | None:
        """Where an average is held, in words; None where there is none."""
        # Before the first step nothing could move yet, so that any copy may be an average.
        early = self.trainer.global_step == self._step
        for where, tensor in self._copies():
            before = self._began.get(where)
            if before is None:
                moved = "[" not in where  # lists that grow hold records, one after another
            else:
                moved = before.shape != tensor.shape or not torch.equal(before, tensor)
            if early or moved:
                return where
        return None

    def _copies(self) -> Iterator[tuple[str, Tensor]]:
        """Where copies are, each with a tensor of it."""
        weights = [p for _, block in blocks_of(self.vit) for p in block.parameters()]
        trained = {id(p) for p in self.vit.parameters()} | stepped(self.trainer)
        shapes = {p.shape for p in weights}
        known = ("prunex.", "lightning.")
        foreign = [c for c in callbacks_of(self.trainer) if not type(c).__module__.startswith(known)]
        # Lightning's own averages are known by name, and ours hold none.
        for holder in (self.module, *foreign):
            seen = {id(self.vit), id(self.trainer)}
            for where, tensors in _held(holder, type(holder).__name__, seen, 6):
                others = [t for t in tensors if id(t) not in trained]
                # A copy has all the shapes of the blocks; of another network that would be chance.
                if shapes <= {t.shape for t in others}:
                    yield where, next(t for t in others if t.shape == weights[0].shape)


def _held(holder: Any, where: str, seen: set[int], deep: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Lists of tensors that lie together somewhere in an object: a module's, a dict's, a list's."""
    if deep == 0 or id(holder) in seen or len(seen) > _MOST or isinstance(holder, _NO_HOLDERS):
        return
    seen.add(id(holder))
    # A module is one place, unless the ViT itself is in it: then its other parts are looked at one by one.
    if isinstance(holder, nn.Module) and not any(id(m) in seen for m in holder.modules() if m is not holder):
        yield where, list(holder.parameters())
        return
    if isinstance(holder, Mapping):
        entries: Any = holder.items()
    elif isinstance(holder, list | tuple):
        entries = enumerate(holder)
    else:
        entries = getattr(holder, "__dict__", {}).items()
    entries = list(islice(entries, _MOST))
    tensors = [value for _, value in entries if isinstance(value, Tensor)]
    if tensors:
        yield where, tensors
    for name, value in entries:
        if not isinstance(value, Tensor):
            inner = f"{where}[{name}]" if isinstance(name, int) else f"{where}.{name}".replace("._modules", "")
            yield from _held(value, inner, seen, deep - 1)
