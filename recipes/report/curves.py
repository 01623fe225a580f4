"""Curves in a report: which metrics share a chart, what they are called, and numbers where there is nothing to draw."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from prunex.pictures import curves_svg

Lines = dict[str, tuple[list[float], list[float]]]

_PARTS = {"train": "training", "val": "validation", "test": "test"}
_SPLIT = r"(?:(?P<part>train|val|test)[/_])?"
_LAST = "Parts of the loss"
# What prunex and its recipes log: the key, the chart it belongs to, its line there, and what its numbers are.
_KNOWN = (
    (rf"{_SPLIT}loss(?:_step|_epoch)?", "Loss", "{part}", ""),
    (rf"{_SPLIT}acc(?:uracy)?(?:_step|_epoch)?", "Accuracy", "{part}", "share"),
    (rf"{_SPLIT}map(?:_step|_epoch)?", "Mean average precision", "{part}", "share"),
    (rf"{_SPLIT}mae(?:_step|_epoch)?", "Mean absolute error", "{part}", ""),
    (r"prunex/keep_ratio_(?P<name>stage\d+)", "Patches kept", "{name}, training", "share"),
    (r"prunex/val_keep_ratio_(?P<name>stage\d+)", "Patches kept", "{name}, validation", "share"),
    (r"prunex/object_kept", "Patches of the object kept", "after the last stage", "share"),
    (r"prunex/relevancy_kept/(?P<name>.+)", "Relevance on kept patches", "{name}", "share"),
    (r"prunex/relevancy_on_object/(?P<name>.+)", "Relevance on the object", "{name}", "share"),
    (r"prunex/val_top_concept", "Most attended concept is present", "validation", "share"),
    (r"prunex/val_tree_(?P<name>.+)", "Tree and its controls", "{name}", "share"),
    (r"prunex/units_removed", "Cost of heads and channels removed", "removed", "share"),
    (r"prunex/units_target", "Cost of heads and channels removed", "aimed at", "share"),
    (r"prunex/gmacs", "Compute", "as it is", "macs"),
    (r"prunex/gmacs_budget", "Compute", "allowed", "macs"),
    (r"prunex/loss_(?P<name>.+)", _LAST, "{name}", ""),
    (r"lr(?:-(?P<name>.+))?", "Learning rate", "{name}", ""),
)
_FIRST = ("Loss", "Accuracy", "Mean average precision", "Mean absolute error", "Patches kept", "Compute")
_STILL = 1e-3  # a change below this share of the value is none


@dataclass
class Chart:
    """Lines that share a chart, and what their numbers are: "share", "macs" or "" for all else."""

    kind: str
    lines: Lines = field(default_factory=dict)


@dataclass
class Curves:
    """Charts as SVG; for what never changed or was logged once: (what, [(line, number)])."""

    charts: list[Markup] = field(default_factory=list)
    numbers: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)


def curves_of(metrics: Mapping[str, tuple[list[float], list[float]]], unit: tuple[float, str]) -> Curves:
    """What was logged (by key, steps and values), as charts and numbers; multiply-adds in the page's unit."""
    curves, grouped = Curves(), _grouped(metrics, unit)
    # What everybody looks for first comes first, parts of the loss last.
    order = [*(name for name in _FIRST if name in grouped), *sorted({*grouped} - {*_FIRST, _LAST})]
    for title in [*order, *([_LAST] if _LAST in grouped else [])]:
        kind = grouped[title].kind
        # Colours go by order: training has the same one in every chart.
        lines = dict(sorted(grouped[title].lines.items(), key=lambda line: "validation" in line[0]))
        heading = f"{title} ({unit[1]} an image)" if kind == "macs" else title
        changes = [max(values) - min(values) > _STILL * max(map(abs, values)) for _, values in lines.values()]
        if any(changes):
            svg = curves_svg(lines, title=heading, percent=kind == "share", size=(520, 300))
            curves.charts.append(Markup(svg))  # it escapes names itself
        else:
            form = "{:.1%}" if kind == "share" else "{:.4g}"
            curves.numbers.append((heading, [(name, form.format(values[-1])) for name, (_, values) in lines.items()]))
    return curves


def _grouped(metrics: Mapping[str, tuple[list[float], list[float]]], unit: tuple[float, str]) -> dict[str, Chart]:
    """The charts by title, their lines by name."""
    # Lightning logs one quantity twice when asked for both; the curve of steps says what the epochs' would.
    twice = {key for key in metrics if key.endswith("_epoch") and key.removesuffix("_epoch") + "_step" in metrics}
    grouped: dict[str, Chart] = {}
    for key, (steps, values) in metrics.items():
        if key in twice:
            continue
        title, name, kind = _named(key, values)
        # In the page's unit.
        if kind == "macs":
            values = [value * unit[0] for value in values]
        chart = grouped.setdefault(title, Chart(kind))
        if kind != chart.kind:  # shares and other numbers have no axis in common
            chart.kind = ""
        # Two keys of one name have two lines.
        chart.lines[key if name in chart.lines else name] = (steps, values)
    return grouped


def _named(key: str, values: Sequence[float]) -> tuple[str, str, str]:
    """A key's chart, its line there, and what its numbers are."""
    for pattern, title, line, kind in _KNOWN:
        if match := re.fullmatch(pattern, key, re.IGNORECASE):
            words = {group: _words(text) for group, text in match.groupdict(default="").items()}
            # Somebody may log other numbers under such a name.
            shares = all(0 <= value <= 1 for value in values)
            return title, line.format(**words) or title.lower(), kind if shares or kind != "share" else ""
    match = re.fullmatch(rf"(?:prunex/)?{_SPLIT}(?P<rest>.+?)(?:_step|_epoch)?", key, re.IGNORECASE)
    part, rest = ("", key) if match is None else (match["part"] or "", match["rest"])
    name = ", ".join(word for word in (_words(rest), _words(part)) if word)
    if "loss" in key.lower():
        return _LAST, name, ""
    if re.search(r"keep|kept", rest, re.IGNORECASE) and all(0 <= value <= 1 for value in values):
        return "Patches kept", name, "share"
    title = _words(rest)
    return title[:1].upper() + title[1:], _words(part) or title, ""


def _words(text: str) -> str:
    """A key as words: ``stage2`` is "stage 2"."""
    text = _PARTS.get(text.lower(), text)
    return re.sub(r"(?<=stage)(?=\d)", " ", text.replace("/", ", ").replace("_", " ").strip())
