"""What lists of files hold, and by which score a table compares models."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

# How well a model does what it is for, by its key in rows: what it is called, and whether it is a share.
SCORES = {
    "accuracy": ("accuracy", True),
    "map": ("mAP", True),
    "mae": ("MAE", False),
    "miou": ("mIoU", True),
    "box_ap": ("box AP", True),
}


def entries(value: Any) -> Iterable[Any]:
    """A list's entries, and none of whatever else it is."""
    return value if isinstance(value, list) else []


def objects(value: Any) -> list[dict[str, Any]]:
    """The entries of a list that are objects."""
    return [entry for entry in entries(value) if isinstance(entry, dict)]


def score_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """By which score the rows of a table are compared: the first that one of them has, else accuracy.

    >>> score_of([{"model": "dense"}, {"map": 0.9}])
    'map'
    """
    held = set().union(*rows)
    return next((key for key in SCORES if key in held), "accuracy")


def score_text(key: str, value: float | None) -> str:
    """A score in its own form; nothing where it is not known.

    >>> score_text("map", 0.912), score_text("mae", 0.1234)
    ('91.2 %', '0.123')
    """
    if value is None or SCORES[key][1]:
        return share(value)
    return f"{value:.3g}"


def counted(number: float, thing: str) -> str:
    """A number of things.

    >>> counted(1, "thread"), counted(8, "thread")
    ('1 thread', '8 threads')
    """
    return f"{number:.0f} {thing}{'' if number == 1 else 's'}"


def as_csv(rows: Iterable[Iterable[Any]]) -> bytes:
    """Rows as a CSV file holds them."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def share(value: float | None) -> str:
    """A share as per cent; nothing where it is not known."""
    return "" if value is None else f"{100 * value:.1f} %"
