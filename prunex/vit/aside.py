"""Running something aside, which leaves train flags and autocast as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def as_found(model: nn.Module, train: bool | None = None) -> Iterator[None]:
    """Run something aside with every module in train or eval mode, and give each its own flag back, whatever is raised.

    Under the caller's autocast it casts weights for itself: torch 2.9 takes one cast without a graph from its cache for
    a forward that needs the graph, which then loses the weight's gradient.
    """
    flags = [(m, m.training) for m in model.modules()]
    try:
        if train is not None and {flag for _, flag in flags} != {train}:
            model.train(train)
        with uncached_autocast(model):
            yield
    finally:
        for m, flag in flags:
            if m.training is not flag:  # setting an attribute of a module is slow
                m.training = flag


def uncached_autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """The autocast that is on where a model lies, without its cache of cast weights."""
    kind = next((p.device.type for p in model.parameters()), "cpu")
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
