"""Heads and MLP channels in a report: what is kept of them, and which heads serve which class."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prunex.columns import as_number
from prunex.errors import PrunexError
from prunex.pictures.cards import data_uri
from prunex.pictures.mosaic import class_name
from prunex.recipes.data.images import read_image
from prunex.recipes.report.gallery import Tile
from prunex.recipes.report.reading import epochs_of, reason_of
from prunex.untrusted import read_text

RANKED, LISTED = 5, 20  # heads named for a class (and classes for a head), and lines of such a list
CHART_BYTES = 500_000  # up to which a chart stays a PNG: its letters suffer from JPEG


@dataclass
class Units:
    """Pictures of units (heading, line, tile), and which heads and classes have to do with each other, by how much."""

    pictures: list[tuple[str, str, Tile]] = field(default_factory=list)
    classes: list[tuple[str, str, list[tuple[str, str]]]] = field(default_factory=list)
    heads: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    epoch: int = 0
    notes: list[str] = field(default_factory=list)


def units_of(folder: Path, names: Sequence[str] | None) -> Units | None:
    """What maps/ and units.csv hold of heads and MLP channels; None where there is nothing."""
    units = Units()
    wanted = (
        ("Kept of each block", "bars: share of the dense block", folder / "maps" / "units-widths.png"),
        ("Which heads serve which class", "red: more than for the mean class", _last(folder, "units-classes")),
        ("Where these heads look", "attention of the class token", _last(folder, "units-heads")),
    )
    for heading, words, path in wanted:
        if path is None or not path.is_file():
            continue
        epoch = re.search(r"epoch=(\d+)", path.name)
        words = f"epoch {int(epoch[1])}, {words}" if epoch else words
        tile = chart_of(path, f"{heading}, {words}", units.notes)
        if tile is not None:
            units.pictures.append((heading, words, tile))
    _rank(folder / "units.csv", names, units)
    return units if units.pictures or units.classes or units.notes else None


def chart_of(path: Path, alt: str, notes: list[str]) -> Tile | None:
    """A chart in maps/ as a tile; None, with a note, where it cannot be read."""
    try:
        return Tile(data_uri(np.asarray(read_image(path)), CHART_BYTES), alt)
    except (ValueError, OSError) as error:  # OSError: JPEG has a largest side
        notes.append(f"maps/{path.name} could not be read ({error}) and is left out.")
        return None


def _last(folder: Path, name: str) -> Path | None:
    pictures = epochs_of(folder / "maps", f"{name}-epoch=*.png")
    return pictures[max(pictures)] if pictures else None


def _rank(path: Path, names: Sequence[str] | None, units: Units) -> None:
    """The kept heads that matter most for each class beyond the mean of all classes, and the reverse."""
    if not path.is_file():
        return
    try:
        units.epoch, table, kept, seen = _relevance(path)
    except (PrunexError, csv.Error) as error:
        units.notes.append(f"units.csv could not be read ({reason_of(error)}) and is left out.")
        return
    if not table:
        units.notes.append("units.csv holds no relevance, so no head is named.")
        return
    # Some heads serve every class: what is told is how much more one serves than the mean class.
    excess: dict[tuple[int, int], dict[str, float]] = {}
    for head, row in table.items():
        if kept[head]:
            mean = float(np.mean(list(row.values())))
            excess[head] = {c: value - mean for c, value in row.items()}
    # Padded, so that numbers sort as numbers; names come after them.
    classes = sorted(set().union(*table.values()), key=lambda c: (not _is_number(c), c.zfill(12)))
    named = {c: class_name(int(c), names) if _is_number(c) else c for c in classes}
    top_heads = {}
    for c in classes:
        values = [(row[c], head) for head, row in excess.items() if c in row]
        top_heads[c] = sorted(values, key=lambda pair: -pair[0])[:RANKED]
    shown = _strongest({c: best[0][0] for c, best in top_heads.items() if best})
    for c in (c for c in classes if c in shown):
        units.classes.append((named[c], seen.get(c, "–"), [(_head(h), _signed(v)) for v, h in top_heads[c]]))
    heads = _strongest({h: max(row.values()) for h, row in excess.items() if row})
    for h in (h for h in sorted(excess) if h in heads):
        best = sorted(excess[h].items(), key=lambda pair: -pair[1])[:RANKED]
        units.heads.append((_head(h), [(named[c], _signed(v)) for c, v in best]))
    for what, hidden in (("classes", len(classes) - len(shown)), ("heads", len(excess) - len(heads))):
        if hidden > 0:
            units.notes.append(f"{hidden} more {what} in units.csv.")


def _relevance(
    path: Path,
) -> tuple[int, dict[tuple[int, int], dict[str, float]], dict[tuple[int, int], bool], dict[str, str]]:
    """The last epoch of units.csv: relevance by head and class, which heads are kept, images seen of each class."""
    epoch, table, kept, seen = -1, {}, {}, {}  # type: ignore[var-annotated]
    for row in csv.DictReader(io.StringIO(read_text(path))):
        numbers = [as_number(row.get(key)) for key in ("epoch", "block", "head", "relevance")]
        if row.get("class") in (None, "") or any(n is None for n in numbers):
            continue
        now, block, head, value = (n for n in numbers if n is not None)
        if now < epoch:
            continue
        # The last epoch of the file is what the page shows.
        if now > epoch:
            epoch, table, kept, seen = int(now), {}, {}, {}
        place, name = (int(block), int(head)), str(row["class"])
        table.setdefault(place, {})[name] = value
        kept[place] = str(row.get("kept")).strip().lower() in ("true", "1", "1.0")
        updates = as_number(row.get("updates"))
        seen[name] = "–" if updates is None else f"{updates:,.0f}"
    return epoch, table, kept, seen


def _is_number(name: str) -> bool:
    """Whether a class is told by its number: isdigit() alone knows digits that int() does not."""
    return name.isdecimal() and len(name) < 12


def _strongest(values: Mapping[Any, float]) -> set[Any]:
    """What a list has room for: those of the largest values."""
    return set(sorted(values, key=lambda key: -values[key])[:LISTED])


def _head(place: tuple[int, int]) -> str:
    return f"{place[0]}.{place[1]}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
