"""Options as users give them: checked, or refused in one line."""

from __future__ import annotations

import math
from typing import Any

from prunex.errors import PrunexError


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
