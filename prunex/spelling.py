"""How targets are spelt on the command line and in configs, read without torch."""

from __future__ import annotations

import re
from typing import Any

from prunex.errors import PrunexError, unknown

# Fewest and most whole numbers after the colon; None: any number of them.
FORMS: dict[str, tuple[int, int | None]] = {
    "class": (1, 1),
    "contrast": (2, 2),
    "entropy": (0, 0),
    "labels": (1, None),
    "margin": (0, 1),
    "regression": (0, 1),
}
SHOWN = "3, contrast:3,5, margin, margin:2, entropy, regression:0 or labels:1,4"


def read_target(text: Any, what: str = "target") -> tuple[str, tuple[int, ...]]:
    """The name and the numbers of a target as it is spelt; a number alone is a class. Anything else is refused.

    >>> read_target("contrast:3,5"), read_target("7"), read_target("margin")
    (('contrast', (3, 5)), ('class', (7,)), ('margin', ()))
    """
    if type(text) is int:
        return "class", (text,)
    if not isinstance(text, str):
        raise PrunexError(f"{what}={text!r} is not allowed: give {SHOWN}")
    name, _, rest = text.strip().partition(":")
    if re.fullmatch(r"-?\d+", name) and not rest:
        name, rest = "class", name
    if name not in FORMS:
        raise unknown(what, name[:100], FORMS)
    given = [number.strip() for number in rest.split(",")] if rest else []
    fewest, most = FORMS[name]
    whole = all(re.fullmatch(r"-?\d{1,9}", number) for number in given)
    numbers = tuple(int(number) for number in given) if whole else ()
    fits = whole and fewest <= len(given) and (most is None or len(given) <= most)
    if not fits or len(set(numbers)) < len(numbers):
        wanted = {0: "no number", 1: "one number" if fewest else "at most one number", 2: "two different ones"}
        allowed = wanted[most] if most is not None else "whole numbers, each once"
        raise PrunexError(f"{what} {text[:100]!r} is not allowed: {name} takes {allowed}, as in {SHOWN}")
    return name, numbers
