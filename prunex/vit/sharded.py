"""Weights that torch's ``fully_shard`` cut up among processes: known, gathered into a plain copy, and written back.

The forward needs nothing of this: it opens each block inside the block's own call, where the weights are whole.
Whatever reads, copies or explains a model outside its forward works on the copy that :func:`whole` makes. Sharding puts
other parameters in the place of those that were there, and while a root's are gathered others again: who wants to know
a parameter later remembers its name.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from prunex.errors import PrunexError

_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
COPY = "call prunex.whole(model) in every process, and work on the copy that process 0 gets"
_FLAGS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


class _Nobody:
    """Takes the place of what shards a module in a copy that is not sharded."""


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a part of some weights of a module alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # Not before it is needed: these take a while to import.
    from torch.distributed.tensor import DTensor

    return next(_sharding(module), None) is not None or any(isinstance(p, DTensor) for p in module.parameters())


def check_gathered(module: nn.Module, instead: str) -> None:
    """Refuse a module whose weights are cut up, and say what to do ``instead``."""
    if is_sharded(module):
        raise PrunexError(f"the weights of this {_plain_type(module).__name__} are cut up among processes: {instead}")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, or all of it where it is not cut up; writing into it in place writes it."""
    part: Any = getattr(tensor, "_local_tensor", tensor)
    return part


def named(module: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """A module's parameters of these names, as optimisers know them now."""
    settle(module)
    return [p for name, p in module.named_parameters() if name in names]


def settle(module: nn.Module) -> None:
    """Let go of weights that a forward left gathered: parameters are then those that optimisers know.

    Nothing is exchanged with other processes.
    """
    if is_sharded(module):
        for part in _sharding(module):
            part.reshard()


def gather(model: nn.Module) -> None:
    """Have what hangs on a sharded model at hand as in its forward: losses look at parameters behind it.

    Every process calls it; nothing is exchanged where the weights are gathered already.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, FSDPModule):
            model.unshard()


def whole(module: nn.Module) -> nn.Module | None:
    """A plain copy of a module whose weights are cut up among processes: whole weights, on the CPU of process 0.

    **Every process calls it**, since each has a part to give; weights go to the CPU one by one, so that no device holds
    them all. The copy can be explained, measured, slimmed and saved like any other model; gradients, and what shards
    the module, are left out.

    Args:
        module: A ViT, dense or pruned, or any module that holds one, after ``fully_shard``.

    Returns:
        The copy in process 0, None in the others. Of a module that is not sharded the module itself, in all.

    Raises:
        PrunexError: In process 0, where the module holds something that Python cannot copy.

    >>> import prunex, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> prunex.whole(model) is model
    True
    """
    if not is_sharded(module):
        return module
    settle(module)
    first = dist.get_rank() == 0
    # Gathering is an exchange between all processes: those that keep nothing take part in it too.
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        gathered = _gathered(parameter)
        if first:
            memo[id(parameter)] = nn.Parameter(gathered.cpu(), parameter.requires_grad)
    if not first:
        return None
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().clone().cpu().requires_grad_(buffer.requires_grad)
    return _copied(module, memo)


def write_back(module: nn.Module, copied: nn.Module | None) -> None:
    """Give a sharded module the weights and buffers of its :func:`whole` copy; **every process calls it**."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    # The others are given process 0's by broadcast.
    state = {} if copied is None else copied.state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(module, state, options=options)


def _gathered(parameter: Tensor) -> Tensor:
    """All of a parameter, where it was or on the device that its processes talk by."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter.detach().clone()
    placed: Any = parameter.detach().to(parameter.device_mesh.device_type)  # offloaded ones lie on the CPU
    gathered: Tensor = placed.full_tensor()
    return gathered


def _sharding(module: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (m for m in module.modules() if isinstance(m, FSDPModule))


def _plain_type(module: nn.Module) -> type:
    """A module's class, without what ``fully_shard`` put in front of it."""
    from torch.distributed.fsdp import FSDPModule

    # fully_shard makes a class of both, with its own first.
    kinds = type(module).__mro__
    return kinds[kinds.index(FSDPModule) + 1] if FSDPModule in kinds else kinds[0]


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a sharded module that is not sharded, with tensors as a memo has them by id."""
    nobody = _Nobody()
    # Known by id before the copy begins: deepcopy looks there first, and never opens what cannot be copied.
    for part in module.modules():
        for hook in _hooks(part):
            if _is_torchs(hook):
                memo[id(getattr(hook, "__self__", hook))] = nobody
        mesh = getattr(part, "_device_mesh", None)  # Lightning's, in a LightningModule
        memo[id(mesh)] = None
        teacher = getattr(part, "_teacher", None)  # frozen, whole, and as large as the model
        memo[id(teacher)] = teacher
    try:
        with _as_plain(module):
            copied: nn.Module = copy.deepcopy(module, memo)
    except Exception as error:  # whatever a stranger's attributes raise
        raise PrunexError(
            f"this {_plain_type(module).__name__} cannot be copied, as is needed to look at sharded weights "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): keep open files, loaders and the like "
            "out of the module"
        ) from error
    # fully_shard marks modules by hooks and attributes, which would have the copy take itself for sharded.
    for part in copied.modules():
        for name in _HOOKS:
            hooks = getattr(part, name, {})
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", hook), _Nobody) or _is_torchs(hook):
                    del hooks[number]
        for name in [n for n in vars(part) if n in _FLAGS or n.startswith("__composable")]:
            del part.__dict__[name]
    return copied


def _hooks(module: nn.Module) -> Iterator[Any]:
    return (hook for name in _HOOKS for hook in getattr(module, name, {}).values())


def _is_torchs(hook: Any) -> bool:
    """Whether a hook is of what shards a module."""
    function = getattr(hook, "hook", hook)  # torch wraps those of state dicts
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")


@contextmanager
def _as_plain(module: nn.Module) -> Iterator[None]:
    """Sharded modules with their own classes, which can be copied."""
    sharded = [(part, type(part)) for part in _sharding(module)]
    try:
        for part, _ in sharded:
            part.__class__ = _plain_type(part)
        yield
    finally:
        for part, kind in sharded:
            part.__class__ = kind
