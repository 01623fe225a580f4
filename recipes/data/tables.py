"""Lists and tables of images: their paths, and what each is said to be."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from prunex.errors import PrunexError

PATHS = ("path", "file", "file_name", "filename", "image", "image_path")
LABELS = ("label", "class", "target", "labels")


def read_list(path: Path) -> tuple[list[str], None]:
    """Paths, one a line; what is relative lies below the list's folder."""
    return list(filter(None, map(str.strip, _lines(path)))), None


def read_table(path: Path) -> tuple[list[str], list[int | str] | None]:
    """Paths of a CSV or Parquet file, by a column of one of their usual names, and labels where there are some."""
    columns = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    name = _called(PATHS, columns)
    if name is None:
        raise PrunexError(f"{path} has the columns {', '.join(map(str, columns))[:200]}: call that of the paths path")
    paths = columns[name]
    if not all(isinstance(cell, str) and cell for cell in paths):
        raise PrunexError(f"{path} has rows without a path in its column {name}: give one a row")
    of_labels = _called(LABELS, columns)
    labels = None if of_labels is None else [_label(cell, path, of_labels) for cell in columns[of_labels]]
    return list(paths), labels


def _called(usual: Iterable[str], columns: Collection[str]) -> str | None:
    """The first of some usual names that a table has a column of."""
    return next((name for name in usual if name in columns), None)


def numbers_of(labels: Sequence[int | str], class_names: Sequence[str] | None, classes: int) -> list[int]:
    """Labels as a model's class numbers; names are looked up among its own."""
    order = {name: number for number, name in enumerate(class_names or [])}
    numbers = []
    for label in labels:
        number = label if isinstance(label, int) else order.get(label, -1)
        if not 0 <= number < classes:
            known = f"0..{classes - 1}" + (f" or {', '.join(order)}"[:200] if order else "")
            raise PrunexError(f"label {label!r} is no class of this model: give {known}")
        numbers.append(number)
    return numbers


def _label(value: Any, path: Path, column: str) -> int | str:
    text = str(value).strip()
    if value is None or not text:
        raise PrunexError(f"{path} has rows without a value in its column {column}: give one a row, or leave it out")
    return int(text) if text.removeprefix("-").isdecimal() else text


def _csv(path: Path) -> dict[str, list[Any]]:
    try:
        rows = csv.reader(_lines(path), strict=True)
        head = next(rows, [])
        columns: dict[str, list[Any]] = {name.strip(): [] for name in head}
        for row in rows:
            if len(row) != len(head) and row:
                raise PrunexError(f"{path} has {len(row)} cells in line {rows.line_num}, and {len(head)} columns")
            for cells, cell in zip(columns.values(), row, strict=False):
                cells.append(cell)
    except csv.Error as error:
        raise PrunexError(f"{path} is damaged: {error}") from error
    return columns


def _lines(path: Path) -> Iterable[str]:
    # Line by line: a million paths are larger than what other texts may be.
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            yield from lines
    except (OSError, ValueError) as error:
        raise PrunexError(f"{path} is damaged: {str(error)[:200]}") from error


def _parquet(path: Path) -> dict[str, list[Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise PrunexError(f"{path} needs pyarrow, which is not installed: pip install pyarrow") from error
    try:
        names = parquet.read_schema(path).names
        # Not the images themselves, which may lie in a column beside.
        wanted = filter(None, (_called(PATHS, names), _called(LABELS, names)))
        table = parquet.read_table(path, columns=list(wanted))
    except Exception as error:  # pyarrow has its own
        raise PrunexError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    return dict.fromkeys(names, []) | table.to_pydict()
