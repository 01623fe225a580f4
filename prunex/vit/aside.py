"""Running something aside, which leaves train flags and autocast as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def as_found(model: nn.Module, train: bool | None = None) -> Iterator[None]:
    """Run something aside with every module in train or eval mode, and give each its own flag back, whatever is raised.

    Of several threads, and of calls within calls, the last one to leave gives the flags back.

    Under the caller's autocast it casts weights for itself: torch 2.9 takes one cast without a graph from its cache for
    a forward that needs the graph, which then loses the weight's gradient.
    """
    modules = list(model.modules())
    try:
        _enter(modules, train)
        with uncached_autocast(model):
            yield
    finally:
        _leave(modules)


_LOCK = threading.Lock()
_FLAGS: dict[nn.Module, tuple[bool, int]] = {}  # of modules that are run aside: their own flag, and by how many


def _enter(modules: Sequence[nn.Module], train: bool | None) -> None:
    # Threads may explain one model at once: the flag is the module's own that the first of them sees.
    with _LOCK:
        for m in modules:
            flag, count = _FLAGS.get(m, (m.training, 0))
            _FLAGS[m] = (flag, count + 1)
            if train is not None and m.training is not train:  # setting an attribute of a module is slow
                m.training = train


def _leave(modules: Sequence[nn.Module]) -> None:
    with _LOCK:
        for m in modules:
            flag, count = _FLAGS.pop(m)
            # Only the last gives it back: others would go on with dropout.
            if count > 1:
                _FLAGS[m] = (flag, count - 1)
            elif m.training is not flag:
                m.training = flag


def shallow(module: Any) -> Any:
    """A module of its own that shares parameters, children and hooks with another."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    # What torch.compile made is bound to the module that it was made for.
    copied.__dict__["_compiled_call_impl"] = None
    return copied


def uncached_autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """The autocast that is on where a model lies, without its cache of cast weights."""
    kind = next((p.device.type for p in model.parameters()), "cpu")
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
