"""Layers round the methods of somebody's module, put on and taken off again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from prunex.errors import PrunexError
from prunex.vit.anatomy import find

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

    def _put_round(self, module: LightningModule, name: str, layer: Layer) -> None:
        self._undo.append(put_round(module, name, layer))

    def _when_model_exists(
        self, module: LightningModule, path: str | None, attach: Callable[[LightningModule], None], kinds: Any
    ) -> None:
        """Attach now, or right after ``configure_model`` of a module that makes its ViT only there."""
        if is_overridden("configure_model", module):
            # Lightning calls it after every callback's setup, so that there may be no ViT yet.
            try:
                find(module, path, kinds)
            except PrunexError:

                def configure_model(beneath: Callable[[], None]) -> None:
                    beneath()
                    attach(module)

                self._put_round(module, "configure_model", configure_model)
                return
        attach(module)


def is_layered(method: Any) -> bool:
    """Whether a method has layers round it."""
    return hasattr(method, "_prunex_layers")


def put_round(module: LightningModule, name: str, layer: Layer) -> Callable[[], None]:
    """Put a layer round a method of one module object; the call that is returned takes it off, in any order."""
    before = module.__dict__.get(name)
    layers: list[Layer] | None = getattr(before, "_prunex_layers", None)
    if layers is None:
        layers = _layered(module, name)
    layers.append(layer)

    def undo() -> None:
        if layer in layers:
            layers.remove(layer)
        now: Any = module.__dict__.get(name)
        # Somebody may have replaced the method since: theirs stays.
        if layers or getattr(now, "_prunex_layers", None) is not layers:
            return
        if now._prunex_before is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = now._prunex_before

    return undo


def _layered(module: LightningModule, name: str) -> list[Layer]:
    """Replace a method by one that runs through a list of layers, innermost first; give the list, empty yet."""
    # On the object, never on its class: other modules of that class stay as they are.
    before, original = module.__dict__.get(name), getattr(module, name)
    layers: list[Layer] = []

    # Lightning reads a step's signature to know what to pass, and follows __wrapped__.
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        function = original
        for layer in layers:
            function = functools.partial(layer, function)
        return function(*args, **kwargs)

    call._prunex_layers = layers  # type: ignore[attr-defined]
    call._prunex_before = before  # type: ignore[attr-defined]
    module.__dict__[name] = call
    return layers
