"""The table of explainers by metrics: as CSV, in the terminal, and read back for the report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prunex.columns import as_number, line
from prunex.files import write_whole
from prunex.recipes.tables import as_csv

FILE = "scores.csv"
BASELINES = ("random", "chance")  # rows that no explainer made
LEFT = {  # how patches leave, in words
    "drop": "tokens dropped",
    "black": "patches painted black",
    "grey": "patches painted grey",
    "mean": "patches painted in the mean colour",
    "blur": "patches blurred",
    "impute": "patches filled in from round them",
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
    **dict.fromkeys(("log_odds", "complexity"), "nats"),
    "road": "probability, half",
    "completeness": "relative",
    "sparseness": "Gini",
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
    rows = [[field.name for field in fields(Score)]]
    for score in scores:
        rows.append([_written(getattr(score, name)) for name in rows[0]])
    return write_whole(folder / FILE, as_csv(rows))


def _written(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.8g}"
    return value


def read_scores(text: str) -> list[Score]:
    """The rows of ``scores.csv`` that name a model, a method and a metric and hold a finite mean."""
    scores = []
    for row in csv.DictReader(io.StringIO(text)):
        values: dict[str, Any] = {field.name: str(row.get(field.name) or "") for field in fields(Score)}
        for name in ("mean", "low", "high", "images", "seconds_per_image", "forwards_per_image"):
            # What is no number in somebody's file counts as unknown.
            number = as_number(row.get(name))
            values[name] = math.nan if number is None else number
        if not (values["model"] and values["method"] and values["metric"]) or math.isnan(values["mean"]):
            continue
        values["images"] = 0 if math.isnan(values["images"]) else int(values["images"])
        values["higher_is_better"] = values["higher_is_better"].strip().lower() != "false"
        scores.append(Score(**values))
    return scores


def best(scores: Sequence[Score]) -> dict[tuple[str, str], str]:
    """The best explainer of each model and metric, where its interval meets no other explainer's.

    Nobody wins in agreement, which judges the pruner: whoever reads what the pruner ranks by would always be best.
    """
    rivals: dict[tuple[str, str], list[Score]] = {}
    for s in scores:
        if s.method not in BASELINES and s.group != "agreement" and not math.isnan(s.mean):
            rivals.setdefault((s.model, s.metric), []).append(s)
    winners = {}
    for key, row in rivals.items():
        first, *others = sorted(row, key=lambda s: s.mean, reverse=row[0].higher_is_better)
        # A NaN end compares as false: without intervals nobody is ahead.
        ahead = [first.low > s.high if first.higher_is_better else first.high < s.low for s in others]
        if others and all(ahead):
            winners[key] = first.method
    return winners


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
    # Baselines come last, below what they are compared with.
    order = {m: (m in BASELINES and BASELINES.index(m) + 1, methods.index(m)) for m in methods}
    rows.sort(key=lambda row: order[row[0]])
    winners = best(scores)
    columns: list[Column] = []
    for metric, cells in by_metric(scores).items():
        first, _, second = metric.partition("_")
        arrow = "↑" if cells[-1].higher_is_better else "↓"
        heading = (first, f"{second} {arrow}".strip(), UNITS.get(metric, "0..1"))
        shown = {(s.method, s.model): _cell(s, s.method == winners.get((s.model, metric))) for s in cells}
        columns.append((cells[-1].group, heading, shown))
    columns += _costs(scores)
    wide = max((len(method[:_LABEL]) for method in methods), default=0)
    second_wide = max((len(model) for _, model in rows), default=0)
    room = max(1, (width - wide - second_wide - 2) // 14)
    blocks: list[list[Column]] = []
    for column in columns:
        # A group of metrics begins a block of its own; costs stand beside whatever came last.
        if not blocks or len(blocks[-1]) >= room or column[0] not in ("cost", blocks[-1][-1][0]):
            blocks.append([])
        blocks[-1].append(column)
    return "\n\n".join(_block(block, rows, [-wide, -second_wide]) for block in blocks)


def _block(block: Sequence[Column], rows: Sequence[tuple[str, str]], names: list[int]) -> str:
    widths = [*names, *[13] * len(block)]
    lines = []
    for i in range(3):
        text = line(["", "", *(heading[i][:13] for _, heading, _ in block)], widths)
        # The third line of a block of costs alone is empty.
        if text:
            lines.append(text)
    for method, model in rows:
        shown = [cells.get((method, model)) for *_, cells in block]
        if any(shown):
            lines.append(line([method[:_LABEL], model, *(cell or "–" for cell in shown)], widths))
    return "\n".join(lines)


def _costs(scores: Sequence[Score]) -> list[Column]:
    columns: list[Column] = []
    for name, form in (("seconds", "{:#.3g}"), ("forwards", "{:,.0f}")):
        values = {(s.method, s.model): getattr(s, f"{name}_per_image") for s in scores}
        cells = {row: form.format(value) for row, value in values.items() if not math.isnan(value)}
        if cells:
            columns.append(("cost", (name, "an image", ""), cells))
    return columns


def _cell(score: Score, wins: bool) -> str:
    if math.isnan(score.mean):
        return "–"
    half = (score.high - score.low) / 2
    # Where all images agree, or there is one, drawing among them says nothing.
    spreads = not math.isnan(half) and half > 0
    star = "*" if wins else " "
    if 0 < abs(score.mean) < 0.01:
        spread = f"±{half:.0e}" if spreads else ""
        return f"{score.mean:.1e}{spread}".replace("e-0", "e-") + star
    digits = 3 if abs(score.mean) < 10 else 1
    spread = f"±{half:.{digits - 1}f}".replace("±0.", "±.") if spreads else ""
    return f"{score.mean:.{digits}f} {spread}{star}"


def by_metric(scores: Sequence[Score]) -> Mapping[str, list[Score]]:
    """The scores of each metric, in order."""
    metrics: dict[str, list[Score]] = {}
    for score in scores:
        metrics.setdefault(score.metric, []).append(score)
    return metrics


def by_removal(scores: Sequence[Score]) -> dict[str, list[str]]:
    """The metrics that took patches away, by how; numbers of different ways do not compare."""
    removals: dict[str, list[str]] = {}
    for metric, cells in by_metric(scores).items():
        if cells[0].removal:
            removals.setdefault(cells[0].removal, []).append(metric)
    return removals
