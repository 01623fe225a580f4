"""Running an opened part of a module inside the module's own call, so that hooks see what they would have seen.

Hooks are a user's, a profiler's, or what gathers sharded weights. Where there are none nobody can tell whether the call
happened, and it does not. Where there are some, the module's ``forward`` is a :class:`_Switch` for as long as somebody
is inside: it asks the caller's own context what to run, so that a model may be shared among threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from prunex.vit.weights import has_others_hooks

_WORK: ContextVar[list[tuple[nn.Module, Callable[..., Any]]]] = ContextVar("prunex_work")
_LOCK = threading.Lock()


def hooked(module: nn.Module) -> bool:
    """Whether somebody's hooks are on a module."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_pre_hooks or module._backward_hooks)


def hooked_anywhere() -> bool:
    """Whether somebody's hooks are on all modules."""
    everywhere: Any = torch_module
    before, after = everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks
    return bool(before or after or everywhere._global_backward_pre_hooks or everywhere._global_backward_hooks)


def hooked_within(module: nn.Module) -> bool:
    """Whether somebody's hooks are on a module or one inside it; gates of a unit pruner are none."""
    return any(map(has_others_hooks, module.modules()))


def inside(module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` as if it were the module's forward, between the module's own hooks."""
    if not hooked(module) and not hooked_anywhere():
        return function(*args, **kwargs)
    return _call(module, function, args, kwargs)


@torch.compiler.disable(reason="hooks see the call of a module that is opened: remove them, or leave fullgraph out")
def _call(module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Found on the instance, which nn.Module's call looks at before the class.
    switch = _Switch.enter(module)
    # By context, so that another thread in the same module runs the module's own forward.
    mine = _WORK.set([(module, function)])
    try:
        # A module's own compiled call would trace the switch.
        call = module if module._compiled_call_impl is None else module._call_impl
        return call(*args, **kwargs)
    finally:
        _WORK.reset(mine)
        switch.leave()


class _Switch:
    """Stands in for a module's forward: runs what the calling context wants to run inside, else the module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before, self.users = module, module.__dict__.get("forward"), 0

    @classmethod
    def enter(cls, module: nn.Module) -> _Switch:
        """The one on the module, put there if need be."""
        with _LOCK:
            switch = module.__dict__.get("forward")
            if not isinstance(switch, cls):
                switch = module.__dict__["forward"] = cls(module)
            switch.users += 1
            return switch

    def leave(self) -> None:
        """The last one to leave gives the module its own forward back."""
        with _LOCK:
            self.users -= 1
            if self.users or self.module.__dict__.get("forward") is not self:
                return
            del self.module.__dict__["forward"]
            if self.before is not None:
                self.module.__dict__["forward"] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        work = _WORK.get([])
        if work and work[0][0] is self.module:
            return work.pop()[1](*args, **kwargs)  # once: whoever calls the module from within gets its own forward
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)
