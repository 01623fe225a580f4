"""Before and around taking units out for good: every layer that is cut can be cut, and what fails leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunex.errors import PrunexError
from prunex.vit.optimisers import chain
from prunex.vit.units import blocks_of
from prunex.vit.weights import Unread, by_name, stands_for_linear, what_is_on

_HEADS = ("qkv", "gate", "proj")
_CHANNELS = ("fc1", "fc1_g", "fc1_x", "fc2")


def check_cuts(model: Any, spec: Any) -> None:
    """Refuse to cut layers that are more than their own weights, or not their own alone.

    Args:
        model: A backbone.
        spec: A :class:`~prunex.vit.widths.WidthSpec` in the numbers of the blocks that the model has now; only which
            blocks it names counts.

    Raises:
        PrunexError: By layer.
    """
    layers = dict(_to_cut(model, spec))
    with by_name(model):
        for path, layer in layers.items():
            what = what_is_on(layer)
            if what:
                raise Unread(layer, what, path)
    cut = {id(p): f"{path}.{name}" for path, layer in layers.items() for name, p in layer.named_parameters()}
    _check_alone(model, cut)


def _to_cut(model: Any, spec: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose parameters are cut, by their paths."""
    if spec.embedding is not None:  # every layer there is
        for name, m in model.named_modules():
            if stands_for_linear(m, name.rpartition(".")[2]) or next(m.children(), None) is None:
                yield name, m
        return
    for number, (path, block) in enumerate(blocks_of(model)):
        heads = number in spec.heads or number in spec.query_dims
        for half, names, cuts in (("attn", _HEADS, heads), ("mlp", _CHANNELS, number in spec.channels)):
            found = ((name, getattr(getattr(block, half, None), name, None)) for name in names)
            yield from ((f"{path}.{half}.{name}", layer) for name, layer in found if cuts and layer is not None)


def _check_alone(model: nn.Module, cut: dict[int, str]) -> None:
    """Refuse weights that two layers share: cut in one of them, they would no longer fit the other."""
    paths: dict[int, list[str]] = {}
    for path, p in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(p), []).append(path)
    for key, path in cut.items():
        if len(paths.get(key, ())) > 1:
            raise PrunexError(
                f"{path} is the same tensor as {next(n for n in paths[key] if n != path)}: units cannot be taken out "
                "of one layer alone; give each its own copy first"
            )


@contextmanager
def whole_or_not(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> Iterator[None]:
    """Give model and optimisers back as they were where something is raised inside, such as memory that runs out."""
    modules = [(m, type(m), dict(vars(m)), dict(m._parameters), dict(m._modules)) for m in model.modules()]
    every = [each for whole in optimizers for each in chain(whole)]
    states = [(o, [list(g["params"]) for g in o.param_groups], dict(o.state)) for o in every]
    try:
        yield
    except BaseException:
        for m, kind, attributes, parameters, children in modules:
            m.__class__ = kind
            _refill(vars(m), attributes)
            _refill(m._parameters, parameters)
            _refill(m._modules, children)
        for optimizer, groups, state in states:
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"][:] = params
            optimizer.state.clear()
            optimizer.state.update(state)
        raise


def _refill(now: dict[str, Any], before: dict[str, Any]) -> None:
    now.clear()
    now.update(before)
