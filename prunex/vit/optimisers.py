"""What an optimiser remembers of parameters that are cut: its groups and states follow, wrapped ones too."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError

Slices = dict[nn.Parameter, tuple[nn.Parameter, list[tuple[int, Tensor]]]]
_BASE = ("_base_optimizer", "base_optimizer", "optimizer")  # where wrappers such as timm's Lookahead hold another


def chain(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """An optimiser, the one that it wraps, and so on; the last one takes the steps."""
    yield optimizer
    for name in _BASE:
        base = vars(optimizer).get(name)
        if isinstance(base, torch.optim.Optimizer):
            yield from chain(base)
            return


def chains(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[torch.optim.Optimizer]:
    """The same of several."""
    for optimizer in optimizers:
        yield from chain(optimizer)


def check_followed(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Refuse, by name, optimisers that hold tensors of parameters where they cannot be cut."""
    for optimizer in chains(optimizers):
        others = {name: value for name, value in vars(optimizer).items() if name not in _KNOWN}
        kept = [name for name, value in others.items() if _holds_tensors(value)]
        # It flattens all parameters into one vector, whose places would no longer be theirs.
        if isinstance(optimizer, torch.optim.LBFGS):
            kept = ["its history"]
        if kept:
            raise PrunexError(
                f"{type(optimizer).__name__} keeps tensors of the parameters beside its state ({', '.join(kept)}), "
                "which do not follow units that are removed: use another optimiser, or MaskPruning(remove=False)"
            )


_KNOWN = ("param_groups", "state", "defaults", *_BASE)


def _holds_tensors(value: Any, deep: int = 4) -> bool:
    """Whether there are tensors of more than one number in nested containers."""
    # One number, such as a step count or a loss scale, is of no layer.
    if isinstance(value, Tensor):
        return value.numel() > 1
    if deep == 0 or not isinstance(value, dict | list | tuple):
        return False
    values = value.values() if isinstance(value, dict) else value
    return any(_holds_tensors(v, deep - 1) for v in values)


def follow(optimizers: Iterable[torch.optim.Optimizer], slices: Slices) -> None:
    """Give optimisers the new parameters, and what they remember of the old ones, cut likewise; else it begins anew."""
    for optimizer in chains(optimizers):
        for group in optimizer.param_groups:  # in place: some hold the list itself
            group["params"][:] = [slices[p][0] if p in slices else p for p in group["params"]]
        anew = False
        for old, (new, cuts) in slices.items():
            if old not in optimizer.state:
                continue
            state = optimizer.state.pop(old)
            # Momenta have the parameter's shape and are cut as it is; what has another, such as a factored second
            # moment, says nothing of single rows.
            same = {k: isinstance(v, Tensor) and v.shape == old.shape for k, v in state.items()}
            if any(_holds_tensors(v) for k, v in state.items() if not same[k]):
                anew = True
                continue
            optimizer.state[new] = {k: sliced(v, cuts) if same[k] else v for k, v in state.items()}
        if anew:
            warnings.warn(
                f"what {type(optimizer).__name__} remembers of layers that lost units has other shapes than their "
                "weights: for these it begins anew",
                stacklevel=2,
            )


def sliced(tensor: Tensor, cuts: list[tuple[int, Tensor]]) -> Tensor:
    """A tensor's chosen places, dimension by dimension."""
    for dim, places in cuts:
        tensor = tensor.index_select(dim, places.to(tensor.device))
    return tensor.contiguous()
