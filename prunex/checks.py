"""Calls and options as users give them: checked, or refused in one line."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prunex.brief import brief
from prunex.errors import PrunexError

P = ParamSpec("P")
R = TypeVar("R")


def called_as(example: str, **kinds: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a public function: arguments forgotten, too many or in another's place are told in one line.

    Args:
        example: How it is called.
        **kinds: By parameter, what it must be; only what could be mistaken for another.

    >>> @called_as("double(2)", number=int)
    ... def double(number):
    ...     return 2 * number
    >>> double("two")
    Traceback (most recent call last):
    ...
    prunex.errors.PrunexError: number='two' is not allowed: call it as double(2)
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise PrunexError(f"{function.__name__}: {error}; call it as {example}") from None
            for name, kind in kinds.items():
                if not isinstance(given[name], kind):
                    raise PrunexError(f"{name}={brief(given[name])} is not allowed: call it as {example}")
            return function(*args, **kwargs)

        return checked

    return decorate


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """A finite number in [low, high].

    Raises:
        PrunexError: For anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        allowed = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"of at least {low:g}"
        raise PrunexError(f"{name}={value!r} is not allowed: give a number {allowed}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one (``"no"`` would be true).

    Raises:
        PrunexError: For anything else.
    """
    if not isinstance(value, bool):
        raise PrunexError(f"{name}={value!r} is not allowed: give True or False")
    return value


def check_whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``.

    Raises:
        PrunexError: For anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PrunexError(f"{name}={value!r} is not allowed: give a whole number of at least {least}")
    return value


def check_options(options: Any) -> dict[str, Any]:
    """A method's options by name; None for none.

    Raises:
        PrunexError: For anything else.
    """
    if options is not None and not (isinstance(options, dict) and all(isinstance(name, str) for name in options)):
        raise PrunexError(f"options={options!r} is not allowed: give a dict of options by name, or None")
    return dict(options or {})
