"""What ``prunex score --protocol`` writes and prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunex.files import write_whole
from prunex.recipes.commands.sheets import writing
from prunex.recipes.tables import as_csv


def prepare(args: Any) -> Path:
    """The folder that results go to, made before anything is computed for it."""
    out = Path(args.out or "score")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def write_results(args: Any, rows: Sequence[Sequence[str]], conditions: Mapping[str, Any]) -> None:
    """Write scores.csv, and about.json, which says under which conditions they hold; print the table."""
    out = prepare(args)
    about = {"protocol": args.protocol, "model": args.folder.architecture, **conditions}
    with writing(out):
        write_whole(out / "scores.csv", as_csv(rows))
        write_whole(out / "about.json", (json.dumps(about, indent=2, allow_nan=False) + "\n").encode())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(out / "scores.csv")
