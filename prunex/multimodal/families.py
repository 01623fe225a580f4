"""Every family of models that is known, by the name of the model's class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from prunex.errors import PrunexError
from prunex.multimodal import detr, lxmert, single_stream, two_towers  # each makes its models known
from prunex.multimodal.adapter import ADAPTERS, Adapter

_OF_TRANSFORMERS = {module.__name__ for module in (detr, lxmert, single_stream, two_towers)}


def models() -> list[str]:
    """Names of the model classes that can be explained."""
    return sorted(ADAPTERS)


def adapter_of(model: Any, inputs: Any) -> Adapter:
    """The adapter of a model, with its inputs.

    Raises:
        PrunexError: A model that is not known; inputs that are no mapping or lack what the model needs.
    """
    if not isinstance(model, nn.Module):
        raise PrunexError(f"model is a {type(model).__name__}: give a torch.nn.Module, one of {', '.join(models())}")
    adapter = _family(model)
    if adapter is None:
        inside = [f"a {type(m).__name__} at {path!r}" for path, m in model.named_modules() if path and _family(m)]
        hint = f"it holds {', '.join(inside)}: give that (model.get_submodule)" if inside else "none is inside it"
        raise PrunexError(
            f"{type(model).__name__} is not known, and {hint}. Known: {', '.join(models())}; teach another with "
            "prunex.multimodal.register"
        )
    if not isinstance(inputs, Mapping):
        raise PrunexError(f"inputs is a {type(inputs).__name__}: give the processor's batch, tensors by name")
    return adapter(model, inputs)


def _family(model: nn.Module) -> type[Adapter] | None:
    """The adapter of a model's class, or of the nearest that it derives from."""
    for kind in type(model).__mro__:
        adapter = ADAPTERS.get(kind.__name__)
        # Another library may call something else CLIPModel.
        ours = adapter is not None and adapter.__module__ in _OF_TRANSFORMERS
        if adapter is not None and not (ours and kind.__module__.split(".")[0] != "transformers"):
            return adapter
    return None
