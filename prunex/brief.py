"""One line for what holds tensors: what is in it by type and shape, never the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

LONG = 80  # letters of one value; what takes more is counted instead
FEW = 8  # whole numbers of a tensor that are shown as they are


class Brief:
    """Base of dataclasses whose own ``repr`` would fill the screen: one line instead.

    A subclass is made with ``@dataclass(repr=False)``; one that holds tensors, which have no single truth value, with
    ``eq=False`` too: two of them are equal if they are the same object, and each can be a key of a dict.

    >>> import prunex, timm
    >>> prunex.cost(timm.create_model("vit_tiny_patch16_224", depth=2))
    Cost(macs=233191680, params=1268776, tokens=[197, 197])
    """

    in_repr: ClassVar[tuple[str, ...]] = ()  # attributes worth the room; empty: every field that is not None

    def __repr__(self) -> str:
        # What is None was not asked for, and says nothing.
        names = self.in_repr or tuple(f.name for f in fields(self) if f.repr)  # type: ignore[arg-type]
        held = [(name, getattr(self, name)) for name in names]
        return f"{type(self).__name__}({', '.join(f'{name}={brief(v)}' for name, v in held if v is not None)})"


def brief(value: Any) -> str:
    """A value in a few words: a tensor's type and shape, the number of what is many, else its ``repr``.

    >>> import torch
    >>> brief(torch.zeros(2, 3)), brief(torch.tensor([4, 1])), brief(range(1000)), brief(list(range(1000)))
    ('float32 [2, 3]', '[4, 1]', 'range(0, 1000)', '1000 of int')
    """
    from torch import Tensor, nn  # here: the command line checks what was typed before torch is imported

    if isinstance(value, Tensor):
        if value.ndim == 1 and len(value) <= FEW and not (value.is_floating_point() or value.is_meta):
            return str(value.tolist())
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{k!r}: {brief(v)}" for k, v in value.items()) + "}"
        return text if len(text) <= LONG else f"{len(value)} entries"
    if isinstance(value, list | tuple):
        text = "[" + ", ".join(map(brief, value)) + "]"
        return text if len(text) <= LONG else f"{len(value)} of {type(value[0]).__name__}"
    # Whatever is long or of several lines is told by its type.
    text = repr(value)
    return text if len(text) <= 2 * LONG and "\n" not in text else type(value).__name__
