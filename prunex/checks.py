"""Calls and options as users give them: given back as they are used, or refused with a ``PrunexError`` of one line."""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Collection
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from prunex.brief import brief
from prunex.errors import PrunexError, unknown

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
            # Python's own message names the function, but not how it is called.
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
    """A finite number in [low, high]."""
    # To Python True is a number, and NaN fails every comparison.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        allowed = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"of at least {low:g}"
        raise PrunexError(f"{name}={value!r} is not allowed: give a number {allowed}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one (``"no"`` would be true)."""
    if not isinstance(value, bool):
        raise PrunexError(f"{name}={value!r} is not allowed: give True or False")
    return value


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number of at least ``least``, and at most ``most`` where that is given."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"in {least}..{most}"
        raise PrunexError(f"{name}={value!r} is not allowed: give a whole number {allowed}")
    return int(value)


def check_share(name: str, value: Any, zero: bool = False) -> float:
    """A number in (0, 1], or in [0, 1] where ``zero`` is a share too."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (value == 0 and not zero):
        raise PrunexError(f"{name}={value!r} is not allowed: give a number in {'[' if zero else '('}0, 1]")
    return float(value)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """One of some names."""
    if not isinstance(value, str) or value not in allowed:
        raise unknown(name, value, allowed)
    return value


def check_choices(one: str, many: str, values: Any, allowed: Collection[str]) -> list[str]:
    """One or more of some names, each once; a single one may come alone.

    >>> check_choices("order", "orders", "least", ("without", "only", "least"))
    ['least']
    """
    given = list(values) if isinstance(values, list | tuple) else [values]
    for name in given:
        check_choice(one, name, allowed)
    if not given or len(set(given)) < len(given):
        raise PrunexError(f"{many}={values!r} is not allowed: give one or more of {', '.join(allowed)}, each once")
    return given


def check_kind(name: str, value: Any, kind: Any) -> None:
    """See that an option is one of the names, or the flag, that its annotation says; other kinds are not looked at.

    >>> check_kind("rule", "shift", Literal["log", "shift"] | None)
    """
    kinds = get_args(kind) if isinstance(kind, types.UnionType) or get_origin(kind) is Union else (kind,)
    if value is None and types.NoneType in kinds:
        return
    names: list[str] = []
    for part in kinds:
        if get_origin(part) is Literal:
            names += get_args(part)
    if names:
        check_choice(name, value, names)
    elif kind is bool:
        check_flag(name, value)


def check_index(name: str, value: Any, count: int, what: str) -> int:
    """The place in 0..count - 1 that an index means, which may count from the end.

    ``what`` tells what there is, as in "blocks are 0..11".
    """
    if isinstance(value, bool) or not isinstance(value, int) or not -count <= value < count:
        raise PrunexError(f"{name}={value!r} does not exist: {what}, or negative from the end")
    return value % count


def check_options(options: Any) -> dict[str, Any]:
    """A method's options by name; None for none."""
    if options is not None and not (isinstance(options, dict) and all(isinstance(name, str) for name in options)):
        raise PrunexError(f"options={options!r} is not allowed: give a dict of options by name, or None")
    return dict(options or {})


_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_WRITTEN = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmgt]?)macs?\s*", re.IGNORECASE)


def check_budget(budget: Any, dense: int = 1) -> float:
    """Multiply-adds of one image that a budget allows: a share of the ``dense`` model's, or a number of them.

    ``dense`` is of no matter where only the form is checked.

    >>> check_budget(0.5, 1000), check_budget("2.9GMACs", 4_600_000_000)
    (500.0, 2900000000.0)
    """
    # A number says which unit it is in: without one, 2.9 could be anything.
    if isinstance(budget, str) and (written := _WRITTEN.fullmatch(budget)):
        macs = float(written[1]) * _UNITS[written[2].lower()]
        if macs > 0:
            return macs
    elif isinstance(budget, int | float) and not isinstance(budget, bool) and 0 < budget <= 1:
        return float(budget) * dense
    raise PrunexError(
        f"budget={budget!r} is not allowed: give a share of the dense model's multiply-adds in (0, 1], such as 0.65, "
        "or their number for one image, such as '2.9GMACs' or '400MMACs'"
    )
