"""Copies of the weights that somebody keeps beside a model, such as averages: they do not follow removed units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from types import ModuleType, NoneType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from prunex.vit.units import blocks_of

_MOST = 20_000  # objects that are looked at: somebody's data may lie there too
_NO_HOLDERS = (type, ModuleType, Trainer, Tensor, str, bytes, int, float, NoneType)


class Copies:
    """What the module and the callbacks of others hold that has the shapes of the ViT's blocks.

    That may be an average of the weights, or a teacher, which never changes: after the first steps the two are told
    apart by whether the numbers moved. A second network that an optimiser steps is neither.

    Args:
        trainer: Its callbacks are looked through.
        module: Likewise.
        vit: Whose copies are looked for.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, vit: nn.Module) -> None:
        self.trainer, self.module, self.vit = trainer, module, vit
        self._step = trainer.global_step
        self._began = {where: tensor.detach().clone() for where, tensor in self._found()}

    def moving(self) -> str | None:
        """Where an average is held, in words; None where there is none."""
        early = self.trainer.global_step == self._step
        for where, tensor in self._found():
            before = self._began.get(where)
            if before is None:
                moved = "[" not in where  # lists that grow hold records, one after another
            else:
                moved = before.shape != tensor.shape or not torch.equal(before, tensor)
            if early or moved:
                return where
        return None

    def _found(self) -> Iterator[tuple[str, Tensor]]:
        """Where copies are, each with a tensor of it."""
        weights = [p for _, block in blocks_of(self.vit) for p in block.parameters()]
        own = {id(p) for p in self.vit.parameters()}
        own |= {id(p) for o in self.trainer.optimizers for group in o.param_groups for p in group["params"]}
        shapes = {p.shape for p in weights}
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        foreign = [c for c in callbacks if not type(c).__module__.startswith(("prunex.", "lightning."))]
        for holder in (self.module, *foreign):
            seen: set[int] = {id(self.vit), id(self.trainer)}
            for where, tensors in _held(holder, type(holder).__name__, seen, 6):
                others = [t for t in tensors if id(t) not in own]
                if shapes <= {t.shape for t in others}:
                    yield where, next(t for t in others if t.shape == weights[0].shape)


def _held(holder: Any, where: str, seen: set[int], deep: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Lists of tensors that lie together somewhere in an object: a module's, a dict's, a list's."""
    if deep == 0 or id(holder) in seen or len(seen) > _MOST or isinstance(holder, _NO_HOLDERS):
        return
    seen.add(id(holder))
    if isinstance(holder, nn.Module) and not any(id(m) in seen for m in holder.modules() if m is not holder):
        yield where, list(holder.parameters())
        return
    parts: Any = holder.items() if isinstance(holder, Mapping) else None
    if parts is None:
        parts = enumerate(holder) if isinstance(holder, list | tuple) else getattr(holder, "__dict__", {}).items()
    parts = list(islice(parts, _MOST))
    tensors = [value for _, value in parts if isinstance(value, Tensor)]
    if tensors:
        yield where, tensors
    for name, value in parts:
        if not isinstance(value, Tensor):
            inner = f"{where}[{name}]" if isinstance(name, int) else f"{where}.{name}".replace("._modules", "")
            yield from _held(value, inner, seen, deep - 1)
