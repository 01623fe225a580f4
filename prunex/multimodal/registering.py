"""Teaching models that nobody here has heard of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.multimodal.adapter import known
from prunex.multimodal.single_stream import SingleStream


def register(
    model: str | type[nn.Module],
    attention: str | Sequence[str],
    row: int | Callable[[Mapping[str, Any]], Tensor] = 0,
    text: Callable[[Mapping[str, Any]], int] | None = None,
    image: Callable[[Mapping[str, Any]], tuple[int, tuple[int, int] | None]] | None = None,
    logits: str = "logits",
) -> None:
    r"""Teach a model with one stream of text and image tokens, whose answer reads one of them.

    Models of other kinds are a class of their own: derive from ``prunex.multimodal.Adapter`` and decorate it with
    ``prunex.multimodal.known``.

    Args:
        model: The class, or its name.
        attention: Regular expressions for the ends of the dotted paths of its attention modules, such as
            ``r"layers\.\d+\.attn"``; each returns (output, map [B, heads, n, n]) when it is called as the model does
            under eager attention, or with ``output_attentions=True`` if it has that argument.
        row: The token that the answer reads: its number, or a function from the inputs to int64 [B].
        text: From the inputs to the number of text tokens, which come first; ``input_ids``' length when not given.
        image: From the inputs to the number of tokens before the image's cells or boxes, counted after the text, and
            their grid, or None for boxes; (0, None) when not given.
        logits: The field of the output that holds class scores [B, C]; an output that is a tensor is those.

    >>> import prunex.multimodal
    >>> prunex.multimodal.register("MyFusion", r"blocks\.\d+\.attn", row=0)
    >>> "MyFusion" in prunex.multimodal.models()
    True
    """
    name = model if isinstance(model, str) else model.__name__
    patterns = [attention] if isinstance(attention, str) else list(attention)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise PrunexError(f"attention={pattern!r} is no regular expression: {error}") from error

    def read(self: Any) -> Tensor:
        ids = self.inputs["input_ids"]
        return torch.full((len(ids),), row, device=ids.device) if isinstance(row, int) else row(self.inputs)

    def length(self: Any) -> int:
        return int(self.inputs["input_ids"].shape[1]) if text is None else text(self.inputs)

    def cells(self: Any) -> tuple[int, tuple[int, int] | None]:
        return (0, None) if image is None else image(self.inputs)

    parts = {
        "models": (name,),
        "roles": dict.fromkeys(patterns, ("ss",)),
        "read": read,
        "length": length,
        "cells": cells,
        "scores": logits,
    }
    # A class, since an adapter is made anew for every batch of inputs.
    known(type(name, (SingleStream,), parts))
