"""Every family of models that is known, by the name of the model's class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import prunex.multimodal.detr
import prunex.multimodal.lxmert
import prunex.multimodal.single_stream
import prunex.multimodal.two_towers  # noqa: F401  (each makes its models known)
from prunex.errors import PrunexError
from prunex.multimodal.adapter import ADAPTERS, Adapter


def models() -> list[str]:
    """Names of the model classes that can be explained."""
    return sorted(ADAPTERS)


def adapter_of(model: Any, inputs: Any) -> Adapter:
    """The adapter of a model, with its inputs.

    Raises:
        PrunexError: A model that is not known; inputs that are no mapping or lack what the model needs.
    """
    names = [each.__name__ for each in type(model).__mro__] if isinstance(model, nn.Module) else []
    adapter = next((ADAPTERS[name] for name in names if name in ADAPTERS), None)
    if adapter is None:
        raise PrunexError(
            f"{type(model).__name__} is not known. Known: {', '.join(sorted(ADAPTERS))}; teach another with "
            "prunex.multimodal.register"
        )
    if not isinstance(inputs, Mapping):
        raise PrunexError(f"inputs is a {type(inputs).__name__}: give the processor's batch, tensors by name")
    return adapter(model, inputs)
