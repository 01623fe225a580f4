"""Numbers of files, and numbers in tables: read, brought to one unit, set below one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LARGEST = 1e100  # axes cannot have steps between larger numbers
# How well a model does what it is for, by its key in rows: what it is called, and whether it is a share.
SCORES = {
    "accuracy": ("accuracy", True),
    "map": ("mAP", True),
    "mae": ("MAE", False),
    "miou": ("mIoU", True),
    "box_ap": ("box AP", True),
}


def as_number(value: Any) -> float | None:
    """A number that can be drawn, or None for whatever else a cell may hold."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < LARGEST else None


def entries(value: Any) -> Iterable[Any]:
    """A list's entries, and none of whatever else it is."""
    return value if isinstance(value, list) else []


def objects(value: Any) -> list[dict[str, Any]]:
    """The entries of a list that are objects."""
    return [entry for entry in entries(value) if isinstance(entry, dict)]


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


def score_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """By which score the rows of a table are compared: the first that one of them has, else accuracy.

    >>> score_of([{"model": "dense"}, {"map": 0.9}])
    'map'
    """
    held = [row.keys() for row in rows]
    return next((key for key in SCORES if any(key in keys for keys in held)), "accuracy")


def score_text(key: str, value: float | None) -> str:
    """A score in its own form; nothing where it is not known.

    >>> score_text("map", 0.912), score_text("mae", 0.1234)
    ('91.2 %', '0.123')
    """
    if value is None or SCORES[key][1]:
        return share(value)
    return f"{value:.3g}"


def share(value: float | None) -> str:
    """A share as per cent; nothing where it is not known."""
    return "" if value is None else f"{100 * value:.1f} %"
