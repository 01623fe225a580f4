"""Beside Lightning's weight averaging: whose weights are in the model when, and what an average does not follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from prunex.errors import PrunexError
from prunex.vit.mount import TOKENS, UNITS, mounted

SWA = "StochasticWeightAveraging"


def averaging(trainer: Trainer, kind: str = "WeightAveraging") -> Callback | None:
    """The Trainer's ``WeightAveraging`` (``EMAWeightAveraging`` is one) or another kind; old Lightnings have none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if kind in {k.__name__ for k in type(c).__mro__}), None)


def stands_before(trainer: Trainer, first: Callback | None, second: Callback) -> bool:
    """Whether one callback's turn comes before another's."""
    order = [id(c) for c in trainer.callbacks]  # type: ignore[attr-defined]
    return first is not None and order.index(id(first)) < order.index(id(second))


@contextmanager
def averaged(trainer: Trainer, pl_module: LightningModule, swapped: bool = False) -> Iterator[None]:
    """The module with the weights that validation sees: the averaged ones where something averages them.

    Args:
        trainer: Holds the callback that averages.
        pl_module: Its weights change places with the averaged ones, and back.
        swapped: Whether they are in place already.
    """
    average = None if swapped else getattr(averaging(trainer), "_average_model", None)
    if average is None:
        yield
        return
    _swap(average.module, pl_module)
    try:
        yield
    finally:
        _swap(average.module, pl_module)


def check_order(trainer: Trainer, callback: Callback) -> None:
    """Refuse an average that copies the model before this callback has attached what it trains.

    Raises:
        PrunexError: By name.
    """
    for other in (averaging(trainer), averaging(trainer, SWA)):
        if stands_before(trainer, other, callback):
            raise PrunexError(
                f"{type(other).__name__} stands before {type(callback).__name__}, so it copies a model without what is "
                f"attached here: list {type(callback).__name__} first"
            )


_AVERAGES = {"AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3"}  # torch's, and timm's


def check_own_averages(trainer: Trainer, module: LightningModule, callback: Callback) -> None:
    """Refuse averages that the module or somebody's callback made already, of a model without what is attached here.

    Raises:
        PrunexError: By where they are.
    """
    for holder in (module, *trainer.callbacks):  # type: ignore[attr-defined]
        found = {**vars(holder), **(dict(holder.named_modules()) if isinstance(holder, torch.nn.Module) else {})}
        for name, value in found.items():
            kinds = {k.__name__ for k in type(value).__mro__} & _AVERAGES
            if kinds and not any(mounted(m, kind) is not None for m in value.modules() for kind in (TOKENS, UNITS)):
                raise PrunexError(
                    f"{type(holder).__name__}.{name} ({kinds.pop()}) averages a model without what "
                    f"{type(callback).__name__} attaches in setup: make it later, such as in on_fit_start"
                )


def check_swa_order(trainer: Trainer, callback: Callback) -> None:
    """Refuse stochastic weight averaging that puts its weights into the model after this callback has used them.

    Raises:
        PrunexError: By name.
    """
    other = averaging(trainer, SWA)
    if other is not None and not stands_before(trainer, other, callback):
        raise PrunexError(
            f"StochasticWeightAveraging puts its weights into the model when its turn comes at the end: list it before "
            f"{type(callback).__name__}, which would use others"
        )


def _swap(average: torch.nn.Module, module: torch.nn.Module) -> None:
    with torch.no_grad():
        theirs = [*average.parameters(), *average.buffers()]
        for a, b in zip(theirs, [*module.parameters(), *module.buffers()], strict=True):
            held = a.detach().clone()
            a.data.copy_(b.detach())
            b.data.copy_(held)
