"""Layers round the methods of somebody's module, put on and taken off again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

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
