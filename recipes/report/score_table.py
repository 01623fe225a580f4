"""The table of explainers by metrics: as CSV, in the terminal, and read back for the report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prunex.files import write_whole
from prunex.recipes.tables import as_number

FILE = "scores.csv"
BASELINES = ("random", "chance")  # rows that no explainer made
LEFT = {  # how patches leave, in words
    "drop": "tokens dropped",
    "black": "patches painted black",
    "grey": "patches painted grey",
    "mean": "patches painted in the mean colour",
    "blur": "patches blurred",
}
_PROBABILITY = ("deletion", "insertion", "aopc", "comprehensiveness", "sufficiency", "srg")
_CORRELATION = ("faithfulness_correlation", "sensitivity_n")
# What a number is measured in, or between which it lies; a share, 0..1, where nothing else is said.
UNITS = {
    **dict.fromkeys(("perturbation_positive", "perturbation_negative"), "0..90"),
    **dict.fromkeys(_PROBABILITY, "probability"),
    **dict.fromkeys(_CORRELATION, "correlation"),
    **dict.fromkeys(("kept_auc", "foreground_auc"), "AUC"),
    **dict.fromkeys(("corrected_overlap", "mass_efficiency"), "up to 1"),
    "log_odds": "nats",
    "infidelity": "squared",
    "saco": "-1..1",
    "max_sensitivity": "relative",
}
Column = tuple[str, tuple[str, str, str], dict[tuple[str, str], str]]  # group, three lines of heading, cells by row
_LABEL = 24  # most letters of a row's name


@dataclass(frozen=True)
class Score:
    """One cell: a mean over images with the ends of its bootstrap interval; the fields are the columns of the file."""

    model: str  # "dense" or "slim"
    method: str  # an explainer, "random" or "chance"
    metric: str
    group: str  # what the metric is about
    higher_is_better: bool
    mean: float  # NaN where no image has a number
    low: float
    high: float
    images: int  # that have a number
    seconds_per_image: float = math.nan  # of the explanation; NaN for a baseline
    forwards_per_image: float = math.nan
    removal: str = ""  # how patches were taken away, if they were
    judge: str = ""  # whose map kept patches are held against, "dense/METHOD"


def write_scores(folder: Path, scores: Iterable[Score]) -> Path:
    """Write ``scores.csv``, whole or not at all: a row a model, method and metric; empty cells where unknown."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = [f.name for f in fields(Score)]
    table.writerow(names)
    for score in scores:
        table.writerow([_written(getattr(score, name)) for name in names])
    return write_whole(folder / FILE, text.getvalue().encode())


def _written(value: Any) -> Any:
    return ("" if math.isnan(value) else f"{value:.8g}") if isinstance(value, float) else value


def read_scores(text: str) -> list[Score]:
    """The rows of ``scores.csv`` that name a model, a method and a metric and hold a finite mean."""
    found = []
    for row in csv.DictReader(io.StringIO(text)):
        names = [str(row.get(key) or "") for key in ("model", "method", "metric", "group")]
        keys = ("mean", "low", "high", "images", "seconds_per_image", "forwards_per_image")
        numbers = [as_number(row.get(key)) for key in keys]
        mean, low, high, images, seconds, forwards = (math.nan if n is None else n for n in numbers)
        if not all(names[:3]) or math.isnan(mean):
            continue
        count = 0 if math.isnan(images) else int(images)
        better = str(row.get("higher_is_better")).strip().lower() != "false"
        model, method, metric, group = names
        how = [str(row.get(key) or "") for key in ("removal", "judge")]
        found.append(Score(model, method, metric, group, better, mean, low, high, count, seconds, forwards, *how))
    return found


def best(scores: Sequence[Score]) -> dict[tuple[str, str], str]:
    """The best explainer of each model and metric, where it is best: its interval meets no other explainer's.

    Baselines do not compete, nor does anybody in agreement, which judges the pruner: whoever reads what the pruner
    ranks by would always win. One explainer alone, or one without an interval, has won nothing.
    """
    rivals: dict[tuple[str, str], list[Score]] = {}
    for s in scores:
        if s.method not in BASELINES and s.group != "agreement" and not math.isnan(s.mean):
            rivals.setdefault((s.model, s.metric), []).append(s)
    found = {}
    for key, row in rivals.items():
        first, *others = sorted(row, key=lambda s: s.mean, reverse=row[0].higher_is_better)
        # A NaN end compares as false: without intervals nobody is ahead.
        ahead = [first.low > s.high if first.higher_is_better else first.high < s.low for s in others]
        if others and all(ahead):
            found[key] = first.method
    return found


def table(scores: Sequence[Score], width: int = 120) -> str:
    """The table as text: methods down, the models of each below one another, metrics across in blocks of that width.

    >>> one = Score("dense", "rollout", "deletion", "faithfulness", False, 0.25, 0.2, 0.3, 9, 0.01, 1)
    >>> print(table([one]))
                       deletion       seconds      forwards
                              ↓      an image      an image
                    probability
    rollout dense   0.250 ±.05         0.0100             1
    """
    rows = list(dict.fromkeys((s.method, s.model) for s in scores))
    methods = list(dict.fromkeys(method for method, _ in rows))
    order = {m: (m in BASELINES and BASELINES.index(m) + 1, methods.index(m)) for m in methods}
    rows.sort(key=lambda row: order[row[0]])
    cells = {(s.method, s.model, s.metric): s for s in scores}
    columns: list[Column] = []
    winners = best(scores)
    for metric, s in {s.metric: s for s in scores}.items():
        heading = (*metric.split("_", 1), "")[:2]
        arrow = "↑" if s.higher_is_better else "↓"
        shown = {
            row: _cell(cells[*row, metric], row[0] == winners.get((row[1], metric)))
            for row in rows
            if (*row, metric) in cells
        }
        told = (heading[0], f"{heading[1]} {arrow}".strip(), UNITS.get(metric, "0..1"))
        columns.append((s.group, told, shown))
    columns += _costs(scores)
    names = [method[:_LABEL] for method, _ in rows]
    first, second = max(map(len, names), default=0), max((len(model) for _, model in rows), default=0)
    room = max(1, (width - first - second - 2) // 14)
    blocks: list[list[Any]] = []
    for column in columns:
        if not blocks or len(blocks[-1]) >= room or (column[0] not in ("cost", blocks[-1][-1][0])):
            blocks.append([])
        blocks[-1].append(column)
    return "\n\n".join(_block(block, rows, first, second) for block in blocks)


def _block(block: Sequence[Any], rows: Sequence[tuple[str, str]], first: int, second: int) -> str:
    lines = [
        f"{'':<{first}} {'':<{second}}" + "".join(f"{heading[i][:13]:>14}" for _, heading, _ in block) for i in range(3)
    ]
    lines = [line for line in lines if line.strip()]
    for method, model in rows:
        shown = [cells.get((method, model)) for *_, cells in block]
        if any(shown):
            lines.append(
                f"{method[:_LABEL]:<{first}} {model:<{second}}"
                + "".join(f"{cell if cell is not None else '–':>14}" for cell in shown)
            )
    return "\n".join(line.rstrip() for line in lines)


def _costs(scores: Sequence[Score]) -> list[Column]:
    seconds = {
        (s.method, s.model): f"{s.seconds_per_image:#.3g}" for s in scores if not math.isnan(s.seconds_per_image)
    }
    forwards = {
        (s.method, s.model): f"{s.forwards_per_image:,.0f}" for s in scores if not math.isnan(s.forwards_per_image)
    }
    pairs = ((("seconds", "an image", ""), seconds), (("forwards", "an image", ""), forwards))
    return [("cost", heading, cells) for heading, cells in pairs if cells]


def _cell(score: Score, wins: bool) -> str:
    if math.isnan(score.mean):
        return "–"
    half = (score.high - score.low) / 2
    told = not math.isnan(half) and half > 0  # where all images agree, or there is one, drawing among them says nothing
    star = "*" if wins else " "
    if 0 < abs(score.mean) < 0.01:
        spread = f"±{half:.0e}" if told else ""
        return f"{score.mean:.1e}{spread}".replace("e-0", "e-") + star
    digits = 3 if abs(score.mean) < 10 else 1
    spread = f"±{half:.{digits - 1}f}".replace("±0.", "±.") if told else ""
    return f"{score.mean:.{digits}f} {spread}{star}"


def by_metric(scores: Sequence[Score]) -> Mapping[str, list[Score]]:
    """The scores of each metric, in order."""
    found: dict[str, list[Score]] = {}
    for score in scores:
        found.setdefault(score.metric, []).append(score)
    return found


def by_removal(scores: Sequence[Score]) -> dict[str, list[str]]:
    """The metrics that took patches away, by how; numbers of different ways do not compare."""
    found: dict[str, list[str]] = {}
    for metric, cells in by_metric(scores).items():
        if cells[0].removal:
            found.setdefault(cells[0].removal, []).append(metric)
    return found
