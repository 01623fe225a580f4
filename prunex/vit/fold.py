"""Plain layers of timm in the place of all that was put round them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from prunex.vit.mount import TOKENS, mounted
from prunex.vit.weights import (
    Unread,
    behind,
    by_name,
    convolution_of,
    effective,
    holds_plain,
    is_linear,
    is_packed,
    is_plain,
    kind_of,
    stands_for_linear,
    wrapped_layers,
)

_MERGE = (
    "merge the adapter into it first (peft: model = model.merge_and_unload()), or let prunex.slim(model) do so in a "
    "copy (MaskPruning: remove=False)"
)


def wrapped_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """All that :func:`fold` puts plain modules in the place of: path, parent, name there, module."""
    yield from _switching(model, "")
    yield from wrapped_layers(model)
    for name in ("head", "head_dist"):
        head: Any = getattr(model, name, None)
        # A head of several layers is somebody's own; what computes as one linear layer does may become one.
        several = isinstance(head, nn.Sequential) or type(head).__module__.startswith("timm.")
        if not several and not stands_for_linear(head, name) and is_linear(head) and _reads(head):
            yield name, model, name, head
    yield from _adapted_pruner(mounted(model), TOKENS)


def _switching(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    for name, child in model.named_children():
        if behind(child) is not child:
            yield path + name, model, name, child
        else:
            yield from _switching(child, f"{path}{name}.")


def _adapted_pruner(module: Any, path: str) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Adapters that were put on after a pruner, on its layers too; what it reparametrises itself is no adapter."""
    for name, child in () if module is None else module.named_children():
        if not isinstance(child, nn.Linear) and stands_for_linear(child, ""):
            yield f"{path}.{name}", module, name, child
        else:
            yield from _adapted_pruner(child, f"{path}.{name}")


def _reads(head: Any) -> bool:
    try:
        effective(head)
    except Unread:
        return False
    return True


def what_is_on(layer: nn.Module) -> str:
    """What keeps a layer from being a plain linear one, and how to make it one; empty where nothing does."""
    module: Any = layer
    held = next(layer.parameters(), None) is not None
    kind = kind_of(layer)
    if is_plain(layer, kind) or (not held and not is_linear(layer)):
        return ""
    if hasattr(module, "parametrizations"):
        return "is reparametrised: call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
    if hasattr(module, "weight_mask"):
        return "has a pruning mask: call torch.nn.utils.prune.remove(layer, 'weight') first"
    if is_packed(layer):
        return "holds quantised or sharded weights: do this before the model is quantised"
    if not is_linear(layer) and kind is nn.Linear:
        return "" if behind(layer) is layer else f"switches between several modules: {_MERGE}"
    if isinstance(layer, kind) and holds_plain(layer):
        # A layer with hooks that only watch is read as its own weight, the very tensor.
        alike = effective(layer)[0].data_ptr() == layer.weight.data_ptr()
        return "" if alike else "computes with more than its weight, such as a hook: take that off first"
    return f"is no plain nn.{kind.__name__}: {_MERGE}"


def fold(model: nn.Module) -> nn.Module:
    """Put plain layers in the place of all wrapped ones, in place."""
    # First, since what runs behind such a module may itself be wrapped.
    for _, parent, name, module in list(_switching(model, "")):
        setattr(parent, name, behind(module))
    # All are read before any is put in place: a layer that cannot be read leaves the others as they were.
    made = []
    with by_name(model):
        for path, parent, name, layer in wrapped_parts(model):
            what = what_is_on(layer)
            if is_packed(layer):
                raise Unread(layer, what, path)
            if what:
                made.append((parent, name, _plain(layer)))
    for parent, name, layer in made:
        setattr(parent, name, layer)
    return model


def _plain(layer: nn.Module) -> nn.Module:
    convolution = convolution_of(layer)
    weight, bias = effective(layer)
    # On the meta device, where no initial values are drawn from the user's random numbers.
    if convolution is None:
        made: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        inner: Any = convolution
        made = nn.Conv2d(weight.shape[1], weight.shape[0], inner.kernel_size, inner.stride, device="meta")
    free = any(p.requires_grad for p in layer.parameters())
    made.weight = nn.Parameter(weight.clone(), free)
    made.bias = None if bias is None else nn.Parameter(bias.clone(), free)
    return made.train(layer.training)


def copy_of(model: nn.Module) -> Any:
    """A deep copy, also where hooks left tensors of the last forward's graph on layers, as pruning masks do."""
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for value in vars(module).values():
            # torch copies no tensor that a graph made.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
