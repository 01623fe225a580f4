"""What was measured of a method: the rows about it of the tables in docs/, each under its heading."""

import re
from collections.abc import Sequence
from pathlib import Path

REFERENCES = ("dense", "random", "chance")  # rows beside which a method's own are read


def tables_of(page: str) -> list[tuple[str, list[str]]]:
    """Every table of a page with the heading it stands under: its lines, head and rule first."""
    tables: list[tuple[str, list[str]]] = []
    heading, lines, fenced = "", [], False
    for line in [*page.splitlines(), ""]:
        fenced ^= line.startswith("```")
        if line.startswith("|") and not fenced:
            lines.append(line)
        elif lines:
            tables.append((heading, lines))
            lines = []
        if line.startswith("#") and not fenced:
            heading = line.lstrip("# ").strip()
    return tables


def name_of(row: str) -> str:
    """What a row is about: the first name in backticks of its first two cells, or the first word of its first.

    >>> name_of("| detection | `evit` | 74.7 % |"), name_of("| lrp, zplus | 1F |"), name_of("| **`lrp`** | 3 |")
    ('evit', 'lrp', 'lrp')
    """
    cells = [cell.strip(" *") for cell in row.strip("|").split("|")[:2]]
    named = [match[1] for cell in cells if (match := re.match(r"`([a-z0-9_]+)", cell))]
    return named[0] if named else re.split(r"[\s,(:]", cells[0])[0]


def of(name: str, root: Path, pages: Sequence[str]) -> list[tuple[str, str, str]]:
    """Page, heading and table of every table that has rows about a method, and of its columns' head."""
    about = []
    for page in pages:
        for heading, lines in tables_of((root / "docs" / page).read_text()):
            rows = [row for row in lines[2:] if name_of(row) == name]
            if rows and any(re.search(r"\d", cell) for row in rows for cell in row.split("|")[2:]):
                beside = [row for row in lines[2:] if name_of(row) in REFERENCES and name != name_of(row)]
                about.append((page, heading, "\n".join([*lines[:2], *rows, *beside])))
    return about


def slug(heading: str) -> str:
    """The anchor that Markdown gives a heading.

    >>> slug("Measured: digit scenes at half the multiply-adds")
    'measured-digit-scenes-at-half-the-multiply-adds'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
