"""Explainers by metrics in a report, from what ``prunex score`` wrote."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from prunex.pictures import bars_svg
from prunex.recipes.report.reading import conditions, json_of, text_of
from prunex.recipes.report.score_table import BASELINES, LEFT, Score, best, by_metric, by_removal, read_scores
from prunex.recipes.tables import entries

SCORED, BEST = 40, 5  # explainers in a chart of scores, and those that are named for a model
_NO_SCORES = "There is no score/scores.csv in the run folder."


@dataclass
class Scores:
    """Charts by group of metrics, on what they were measured, which explainers are best in most, how patches left."""

    conditions: str
    groups: dict[str, list[Markup]] = field(default_factory=dict)
    winners: list[tuple[str, list[tuple[str, int]]]] = field(default_factory=list)
    removals: list[tuple[str, str]] = field(default_factory=list)
    judged: bool = False
    notes: list[str] = field(default_factory=list)


def scores_of(folder: Path) -> tuple[Scores | None, str]:
    """A chart a metric from score/scores.csv, and a sentence where it cannot be read."""
    text, note = text_of(folder / "scores.csv", _NO_SCORES)
    if note:
        return None, "" if note == _NO_SCORES else note
    try:
        rows = read_scores(text)
    except csv.Error as error:
        return None, f"score/scores.csv could not be read ({error}) and is left out."
    if not rows:
        return None, "score/scores.csv holds no numbers, so explainers are not compared."
    about, _ = json_of(folder / "about.json", "")
    methods = list(dict.fromkeys(row.method for row in rows))
    listed = {m for m in methods if m not in BASELINES}
    # A chart has room for so many bars.
    hidden = len(listed) - SCORED
    models = list(dict.fromkeys(row.model for row in rows))
    shown = {*sorted(listed, key=methods.index)[:SCORED], *BASELINES}
    content = Scores(conditions(about))
    for metric, cells in by_metric([row for row in rows if row.method in shown]).items():
        if any(cell.method != "chance" for cell in cells):
            content.groups.setdefault(cells[0].group or "other", []).append(_score_chart(metric, cells, models))
    content.winners = _winners(rows)
    content.removals = [(LEFT.get(how, how), ", ".join(names)) for how, names in by_removal(rows).items()]
    content.judged = any(row.judge for row in rows)
    content.notes = [str(n) for n in entries(about.get("notes"))]
    if hidden > 0:
        content.notes.append(f"{hidden} more explainers are in score/scores.csv.")
    return content, ""


def _score_chart(metric: str, cells: Sequence[Score], order: Sequence[str]) -> Markup:
    """Bars of one metric, the best of the first model on top; a line for chance, else for random maps."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    higher = cells[0].higher_is_better
    by_method: dict[str, dict[str, Score]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, {})[cell.model] = cell

    def place(method: str) -> float:
        means = [by_method[method][m].mean for m in models if m in by_method[method]]
        return -means[0] if higher else means[0]

    rows = {}
    for method in sorted((m for m in by_method if m != "chance"), key=place):
        rows[method] = {model: (cell.mean, cell.low, cell.high) for model, cell in by_method[method].items()}
    lines: dict[str, float] = {}
    # Not every metric has a chance level in closed form; random maps have a score in all of them.
    level = "chance" if "chance" in by_method else "random"
    for model, cell in by_method.get(level, {}).items():
        # Models of one level share a line.
        if cell.mean not in lines.values():
            named = level if all(c.mean == cell.mean for c in by_method[level].values()) else f"{level}, {model}"
            lines[named] = cell.mean
    title = f"{metric.replace('_', ' ')}, {'more' if higher else 'less'} is better"
    return Markup(bars_svg(rows, title, lines, faint=BASELINES, order=order))  # it escapes names itself


def _winners(rows: Sequence[Score]) -> list[tuple[str, list[tuple[str, int]]]]:
    """For each model how many metrics each explainer is best in, beyond the intervals, most first."""
    counts: dict[str, dict[str, int]] = {}
    for (model, _), method in best(rows).items():
        counts.setdefault(model, {}).setdefault(method, 0)
        counts[model][method] += 1
    return [(m, sorted(c.items(), key=lambda pair: (-pair[1], pair[0]))[:BEST]) for m, c in counts.items()]
