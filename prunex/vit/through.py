"""One call of a ViT inside a larger module, with all else that the module is given held fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.targets import Aimed, Function, column
from prunex.vit.anatomy import ViT, find
from prunex.vit.aside import as_found
from prunex.vit.tail import kind, stand_in, with_another


class Through(Aimed):
    """A module of several inputs, or several ViTs, as a function of what enters one call of one of them.

    For one sample: R rows entering that call meet the sample's other inputs R times. Other calls of the same ViT answer
    as they did. Made by :func:`through_call`.
    """

    def __init__(
        self, model: nn.Module, vit: ViT, inputs: Any, others: dict[int, Tensor], target: Function | None
    ) -> None:
        super().__init__(model, target)
        self.vit, self.inputs, self.others = vit, inputs, others
        self.by_rows = True  # whether the target has a number for each row, and not one for all

    def forward(self, *images: Any, **named: Any) -> Any:
        """What the module, or the target, makes of images entering the call, [R, C, h, w]."""
        out = self.vit(*images, **named)
        if self.target is None:
            return self._answer(out)
        # Of a target with one number for all rows, such as a loss, each row is its own batch.
        rows = [out] if self.by_rows else out.split(1)
        return torch.cat([column(self._each, self._answer(each)) for each in rows])

    def _each(self, output: Any) -> Any:
        """The target's numbers; the one number of a single row, such as a loss, is that row's."""
        number: Any = None if self.target is None else self.target(output)
        return number[None] if isinstance(number, Tensor) and not number.ndim else number

    def _answer(self, out: Tensor) -> Any:
        """The module's own output where the call gave [R, ...]."""
        calls = []

        # The call that is asked for gives what entered it now, all others what they gave then, for as many rows.
        def forward(*_: Any, **__: Any) -> Tensor:
            calls.append(1)
            fixed = self.others.get(len(calls) - 1)
            return out if fixed is None else fixed.expand(len(out), *fixed.shape[1:])

        whole = with_another(self.model, self.vit, stand_in(self.vit, forward))
        return _called(whole, self.inputs, len(out))


def through_call(model: nn.Module, inputs: Any, through: str, target: Function | None) -> tuple[Through, Tensor]:
    """A module as a function of one call of a ViT in it, and what entered that call, [1, C, h, w].

    ``inputs`` and ``through`` are :func:`prunex.explain`'s. Refused are more than one sample, a path or a number that
    does not exist, and a module that does not call that ViT as a whole.
    """
    path, _, number = through.partition("#")
    if number and not number.isdecimal():
        raise PrunexError(f"through={through!r} is not allowed: give the ViT's path, or path#number of its call from 0")
    vit = find(model, path)[1]
    sizes = {len(value) for value in _tensors(inputs) if value.ndim}
    if sizes != {1}:
        held = ", ".join(map(str, sorted(sizes))) or "no tensors"
        raise PrunexError(f"through={through!r} explains one sample, and the inputs hold {held}: give tensors [1, ...]")
    entered: list[tuple[Tensor, Tensor]] = []

    def note(*images: Any, **named: Any) -> Tensor:
        out = nn.Module.__call__(vit, *images, **named)
        entered.append((images[0] if images else next(iter(named.values())), out))
        return out

    with torch.no_grad(), as_found(model, train=False):
        output = _called(with_another(model, vit, stand_in(vit, note)), inputs, 1)
    if not entered:
        raise PrunexError(f"{kind(model)} never calls its {path} as a whole: nothing goes through it")
    if not number and len(entered) > 1:
        raise PrunexError(f"{kind(model)} calls its {path} {len(entered)} times: say which, as in through='{path}#0'")
    chosen = int(number or 0)
    if chosen >= len(entered):
        raise PrunexError(f"through={through!r} does not exist: calls of {path} are 0..{len(entered) - 1}")
    # What the other calls gave holds still while this one's images are altered.
    others = {i: out for i, (_, out) in enumerate(entered) if i != chosen}
    module = Through(model, vit, inputs, others, target)
    if target is not None:
        with torch.no_grad():
            answer: Any = target(output)
        module.by_rows = not (isinstance(answer, Tensor) and answer.ndim == 0)
    return module, entered[chosen][0]


def _called(module: nn.Module, inputs: Any, rows: int) -> Any:
    """The module on a sample's inputs, so many times."""
    if isinstance(inputs, Mapping):
        return module(**{name: _expanded(value, rows) for name, value in inputs.items()})
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return module(*(_expanded(value, rows) for value in given))


def _expanded(value: Any, rows: int) -> Any:
    return value.expand(rows, *value.shape[1:]) if isinstance(value, Tensor) and value.ndim else value


def _tensors(inputs: Any) -> list[Tensor]:
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    values = inputs.values() if isinstance(inputs, Mapping) else given
    return [value for value in values if isinstance(value, Tensor)]
