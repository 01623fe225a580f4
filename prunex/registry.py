"""Every method by name: what it is, where it was published, what it needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from prunex.errors import PrunexError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """One entry of :func:`prunex.methods`.

    Attributes:
        name: Lower case with underscores, as passed to ``attach`` or ``explain``; a metric's is the function's in
            ``prunex.metrics``.
        kind: "pruner", "explainer", "head" or "metric".
        paper: Authors, venue, arXiv number.
        needs: What the model or the user must bring.
        make: The class or function behind it.
    """

    name: str
    kind: str
    paper: str
    needs: str
    make: Callable[..., Any]

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options with their defaults, a pruner's schedule included; ``budget`` is for any pruner.

        >>> import prunex
        >>> lookup("explainer", "generic_attention").options
        {'start_layer': 0, 'full': False}
        >>> lookup("pruner", "evit").options["keep_ratio"]
        0.7
        """
        return options_of(self.make)


def options_of(make: Any) -> dict[str, Any]:
    """Options with their defaults: a function's keyword-only ones, or what a class can be built without.

    What hands ``**options`` on to what it is made from has their defaults as ``handed_on``.
    """
    parameters = inspect.signature(make).parameters.values()
    handed_on = dict(getattr(make, "handed_on", {})) if any(p.kind is p.VAR_KEYWORD for p in parameters) else {}
    is_function = not inspect.isclass(make)  # named, since asking in place would make a bare type of it
    # A function's positional ones are the model, images and target.
    if is_function:
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | handed_on
    return {p.name: p.default for p in parameters if p.default is not p.empty} | handed_on


METHODS: dict[tuple[str, str], Method] = {}


def register(
    kind: str, name: str, paper: str, needs: str, handed_on: Mapping[str, Any] | None = None
) -> Callable[[T], T]:
    """Class or function decorator that makes a :class:`Method` known under its name.

    ``handed_on`` are the defaults of a function's ``**options``; a class has them as an attribute.
    """

    def add(make: T) -> T:
        if handed_on is not None:
            make.handed_on = handed_on  # type: ignore[attr-defined]
        METHODS[kind, name] = Method(name, kind, paper, needs, make)  # type: ignore[arg-type]
        return make

    return add


def lookup(kind: str, name: str) -> Method:
    """The method of that kind and name; where there is none, near names are offered and all are listed."""
    if not isinstance(name, str) or (kind, name) not in METHODS:
        raise no_method(kind, name, METHODS)
    return METHODS[kind, name]


def no_method(kind: str, name: object, methods: Iterable[tuple[str, str]]) -> PrunexError:
    """The error for a name that no method of that kind has, from the kinds and names of all methods."""
    known = sorted(n for k, n in methods if k == kind)
    others = [k for k, n in methods if n == name]
    if others:
        return PrunexError(f"unknown {kind} {name!r}: it is of kind {others[0]!r}. Known: {', '.join(known)}")
    return unknown(kind, name, known)
