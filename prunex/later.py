"""Values on a device are looked at without making it wait, where whoever looks can hear of it later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, Token

import torch
from torch import Tensor

from prunex.errors import PrunexError

_LOOKS: ContextVar[Looks | None] = ContextVar("looks", default=None)


class Flag:
    """A bool on a device that is read later without making the device wait: its copy is on its way meanwhile."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.event = value, None
        # Into pinned memory, without which the host waits for the copy; the event tells when it is there.
        if value.is_cuda:
            self.value = torch.empty_like(value, device="cpu", pin_memory=True)
            self.value.copy_(value, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def __bool__(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.value)


class Looks:
    """What :func:`refuse` was asked for inside of the ``with`` block, and is raised by :meth:`read`."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Flag, Callable[[], str]]] = deque()
        self._opened: list[Token[Looks | None]] = []

    def __enter__(self) -> Looks:
        self._opened.append(_LOOKS.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _LOOKS.reset(self._opened.pop())

    def add(self, bad: Tensor, describe: Callable[[], str]) -> None:
        """Keep a bool on a device until it is read, with what there is to say where it holds."""
        self._waiting.append((Flag(bad), describe))

    def read(self) -> None:
        """Raise for the first that holds; the others are forgotten."""
        # Emptied first: what was raised once is not raised by the next step.
        waiting, self._waiting = self._waiting, deque()
        for bad, describe in waiting:
            if bad:
                raise PrunexError(describe())

    def clear(self) -> None:
        """Forget all that is waiting."""
        self._waiting.clear()


def later(tensor: Tensor) -> bool:
    """Whether to read a value at once a device's whole queue would have to be empty."""
    return tensor.device.type != "cpu"


def deferred(tensor: Tensor) -> bool:
    """Whether nothing may be read from a tensor now: it is on a device, and somebody reads :class:`Looks` later."""
    return _LOOKS.get() is not None and later(tensor)


def refuse(bad: Tensor, describe: Callable[[], str]) -> None:
    """Raise what ``describe`` says where a bool scalar holds: at once, or later for who opened :class:`Looks`."""
    looks = _LOOKS.get()
    if looks is not None and later(bad):
        looks.add(bad, describe)
    elif bool(bad):
        raise PrunexError(describe())
