"""Numbers in tables: read, brought to one unit, set below one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

LARGEST = 1e100  # axes cannot have steps between larger numbers


def as_number(value: Any) -> float | None:
    """A number that can be drawn, or None for whatever else a cell may hold."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < LARGEST else None


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells as a line of a table: to the right of their width, or to the left where it is negative.

    >>> line(["dense", "1.5"], [-8, 5])
    'dense      1.5'
    """
    pairs = zip(cells, widths, strict=True)
    return " ".join(cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in pairs).rstrip()


def macs_unit(gmacs: Iterable[Any]) -> tuple[float, str]:
    """The one unit of multiply-adds on a page: what billions are multiplied by, and its name.

    >>> macs_unit([0.049, 0.033]), macs_unit([4.6, None])
    ((1000.0, 'MMACs'), (1.0, 'GMACs'))
    """
    # One unit for a page: its numbers are compared.
    largest = max((value for value in map(as_number, gmacs) if value is not None), default=1.0)
    return (1e3, "MMACs") if largest < 1 else (1.0, "GMACs")


def macs_column(gmacs: Sequence[float]) -> tuple[str, list[str]]:
    """Multiply-adds of a table in one unit, and that unit.

    >>> macs_column([4.608, 2.99]), macs_column([0.0492])
    (('GMACs', ['4.61', '2.99']), ('MMACs', ['49.2']))
    """
    factor, unit = macs_unit(gmacs)
    return unit, [f"{factor * g:,.{1 if unit == 'MMACs' else 2}f}" for g in gmacs]
