"""One self-contained ``report.html`` from what a run folder holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

import prunex
from prunex.callbacks.run_folder import RECORD
from prunex.columns import as_number, macs_unit
from prunex.errors import PrunexError
from prunex.files import is_there, write_whole
from prunex.pictures.mosaic import tokens_left
from prunex.recipes.report.curves import curves_of
from prunex.recipes.report.gallery import epoch_gallery, stage_gallery
from prunex.recipes.report.heads import heads_of
from prunex.recipes.report.reading import Arrays, conditions, json_of, maps_of, metrics_of, text_of
from prunex.recipes.report.scores import scores_of
from prunex.recipes.report.units import units_of
from prunex.recipes.runs import home, slim_folder
from prunex.recipes.tables import SCORES, entries, objects, score_of

_NO_MAPS = (
    "There are no maps in the run folder, so there are no pictures: "
    "train with the callbacks KeptTokenMonitor and RelevancyMonitor."
)
_NO_SUMMARY = "There is no summary.json in the run folder, so costs are not compared: run prunex bench on this folder."
_NO_BENCH = "There is no bench.json in the run folder."
_NO_SLIM = "There is no slim/ in the run folder, so there is no model to load yet: train with the callback SlimExport."
_NO_CONFIG = "There is no config.yaml in the run folder; prunex fit writes one."


@dataclass
class Cell:
    """One cell of a table: its text, a second smaller line, and the length of its bar (0..1) or none."""

    text: str
    note: str | None = None
    bar: float | None = None


Table = tuple[list[str], list[list[Cell]]]  # headings, rows


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run folder.

    The page needs no network and no other file. It holds what the folder holds: ``summary.json`` (dense beside
    pruned), ``bench.json`` (measured speed, written by ``prunex bench``), ``maps/epoch=NNN.npz`` (kept patches and
    relevancy), ``maps/head-*.png`` (what a head that explains itself says), ``maps/units-*.png`` and ``units.csv``
    (attention heads and MLP channels), ``metrics.csv`` (curves), ``score/`` (explainers by metrics, written by
    ``prunex score``), ``slim/`` (how to load the model) and ``config.yaml``. What is missing or cannot be read is left
    out, with a sentence that says so; of ``bench.json``, scores, heads and units nothing where they are missing.

    ``summary.json`` is ``{"machine": str, "rows": [{"model": str, "accuracy": 0..1, "gmacs": billions of
    multiply-adds an image, "params_m": millions, "images_per_s": float, "speed_ratio": times the
    dense model's, "kept_digit_cover": 0..1}]}``; every key may be missing, and in the place of ``accuracy`` may stand
    ``map``, ``miou``, ``box_ap`` (0..1) or ``mae``. The row whose model is called ``dense`` is what the others are
    compared with.

    Raises:
        PrunexError: `run` is no folder, or holds nothing that a run or its callbacks write.
    """
    if not is_there(Path(run).expanduser(), Path.is_dir):
        raise PrunexError(f"run='{run}' is not a folder: give the folder that a training run wrote")
    folder = home(Path(run).expanduser())
    # The page lies in the run, wherever its slim model is.
    known = any((folder / name).exists() for name in ("metrics.csv", "config.yaml", RECORD, "maps"))
    if not known and slim_folder(folder) is None:
        raise PrunexError(
            f"run='{run}' is not a run folder (it has neither metrics.csv nor config.yaml, no maps/ and no slim/): "
            "give the folder that a training run wrote, such as runs/version_0 or lightning_logs/version_0"
        )
    return write_whole(folder / "report.html", report_page(folder))


def report_page(folder: Path, live: Mapping[str, str] | None = None) -> bytes:
    """The page of a run folder; ``live`` is what ``prunex watch`` adds to it, see :mod:`prunex.recipes.report.live`."""
    return render(
        "report.html",
        written=f"{datetime.now():%d %B %Y, %H:%M}",
        version=prunex.__version__,
        live=live,
        **_content(folder, slim_folder(folder) or folder / "slim"),
    )


def render(template: str, **content: Any) -> bytes:
    """A template of ``recipes/templates`` with its content, every text of which is escaped."""
    loader = FunctionLoader(lambda name: (files("prunex.recipes") / "templates" / name).read_text(encoding="utf-8"))
    # Strict: a name that the content lacks must not print as nothing.
    options: Any = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    page = Environment(loader=loader, autoescape=True, **options).get_template(template).render(content)
    # Names of files and classes may hold halves of characters, which no page can.
    return page.encode(errors="replace")


def run_name(folder: Path) -> str:
    """What pages call a run: the folder's name, of ``version_N`` with that of the folder round it."""
    place = folder.resolve()
    return f"{place.parent.name}/{place.name}" if place.name.startswith("version_") else place.name


def _content(folder: Path, slim_path: Path) -> dict[str, Any]:
    """What the template shows, by name: each thing, or a sentence in its place."""
    summary, summary_note = json_of(folder / "summary.json", _NO_SUMMARY)
    bench, bench_note = json_of(folder / "bench.json", _NO_BENCH)
    slim, slim_note = json_of(slim_path / "config.json", _NO_SLIM)
    metrics, metrics_note = metrics_of(folder / "metrics.csv")
    maps, map_notes = maps_of(folder / "maps")
    config, config_note = text_of(folder / "config.yaml", _NO_CONFIG)
    scored, scored_note = scores_of(folder / "score")
    names = slim.get("label_names")
    # The file may come from anywhere.
    names = names if isinstance(names, list) else None
    rows, measured = objects(summary.get("rows")), objects(bench.get("rows"))
    unit = macs_unit([row.get("gmacs") for row in (*rows, *measured)] or metrics.get("prunex/gmacs", ([], []))[1])
    rows, measured = _in_unit(rows, unit[0]), _in_unit(measured, unit[0])
    if rows or (measured and summary_note == _NO_SUMMARY):  # bench.json tells the costs then
        summary_note = ""
    elif not summary_note:
        summary_note = "summary.json holds no rows, so costs are not compared."
    return {
        "title": run_name(folder),
        "architecture": str(slim.get("architecture") or ""),
        "machine": str(summary.get("machine") or ""),
        "cards": _cards(rows or measured, maps, unit[1]),
        "table": _table(rows, unit[1]),
        "table_note": summary_note,
        "bench": _table(measured, unit[1]),
        "bench_speed": _speed(bench),
        "bench_machine": conditions(bench),
        "bench_notes": [str(note) for note in entries(bench.get("notes"))],
        "bench_note": "" if bench_note == _NO_BENCH else bench_note,
        "heads": heads_of(folder, metrics),
        "units": units_of(folder, names),
        "scores": scored,
        "scores_note": scored_note,
        "epochs": epoch_gallery(maps, names),
        "stages": stage_gallery(maps, names),
        "map_notes": map_notes or ([] if maps else [_NO_MAPS]),
        "curves": curves_of(metrics, unit),
        "charts_note": metrics_note or ("" if metrics else "metrics.csv holds no numbers, so there are no curves."),
        "slim_path": repr(slim_path.as_posix()),
        "slim_files": _files(slim_path) if not slim_note else [],
        "slim_note": slim_note,
        "config": config,
        "config_note": config_note,
    }


def _files(folder: Path) -> list[tuple[str, str]]:
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")}
    return [(name, f"{size / 2**20:.1f} MB" if size > 1e5 else f"{size:,} bytes") for name, size in sizes.items()]


def _in_unit(rows: Sequence[Mapping[str, Any]], factor: float) -> list[dict[str, Any]]:
    counted = [(row, as_number(row.get("gmacs"))) for row in rows]
    return [{**row} if gmacs is None else {**row, "gmacs": gmacs * factor} for row, gmacs in counted]


def _dense(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((row for row in rows if str(row.get("model", "")).lower().startswith("dense")), {})


def _ratio(row: Mapping[str, Any], dense: Mapping[str, Any], key: str) -> float | None:
    if key == "images_per_s" and dense and (ratio := as_number(row.get("speed_ratio"))) is not None:
        return ratio  # the median of rounds, which others on the machine move less than either speed
    value, base = as_number(row.get(key)), as_number(dense.get(key))
    return value / base if value is not None and base else None


def _points(row: Mapping[str, Any], dense: Mapping[str, Any], score: str) -> str:
    """Difference in a score to the dense model: of shares in points, of others in their own unit."""
    value, base = as_number(row.get(score)), as_number(dense.get(score))
    if value is None or base is None:
        return ""
    text = f"{100 * (value - base):+.1f} points" if SCORES[score][1] else f"{value - base:+.3g}"
    # A minus is as wide as a plus, a hyphen is not.
    return text.replace("-", "−")


def _cards(rows: Sequence[Mapping[str, Any]], maps: Mapping[int, Arrays], unit: str) -> list[tuple[str, str, str]]:
    """The result at a glance: (value, what it is, compared with what)."""

    def short(value: Any) -> str:
        return f"{float(value):,.0f}" if float(value) >= 100 else f"{float(value):.3g}"

    # Of several pruned models the first is the run's own.
    dense = _dense(rows)
    pruned = next((r for r in rows if r is not dense and "untrained" not in str(r.get("model", "")).lower()), {})
    cards, score = [], score_of(rows)
    if (value := as_number(pruned.get(score))) is not None:
        points, (name, is_share) = _points(pruned, dense, score), SCORES[score]
        text = f"{value:.1%}" if is_share else f"{value:.3g}"
        cards.append((text, name, f"{points} to dense" if points else ""))
    for key, what, each in (("gmacs", "compute", f"{unit} an image"), ("images_per_s", "speed", "images/s")):
        if (ratio := _ratio(pruned, dense, key)) is not None:
            cards.append((f"{ratio:.2f}×", what, f"{short(dense[key])} → {short(pruned[key])} {each}"))
    kept = [arrays for arrays in maps.values() if "kept" in arrays]
    if kept and "groups" in kept[-1]:
        cards.append((f"{tokens_left(kept[-1]['groups'][-1]):.0%}", "of tokens left", "after the last stage"))
    elif kept:
        cards.append((f"{kept[-1]['kept'][-1].mean():.0%}", "of patches left", "after the last stage"))
    return cards


def _table(rows: Sequence[Mapping[str, Any]], unit: str) -> Table:
    """Headings and rows; a column nobody has a number for is left out."""
    columns = [
        *((key, name, "{:.1%}" if is_share else "{:.3g}") for key, (name, is_share) in SCORES.items()),
        ("gmacs", f"{unit} / image", "{:.3g}"),
        ("params_m", "parameters (M)", "{:.3g}"),
        ("file_mb", "file (MB)", "{:.3g}"),
        ("images_per_s", "images / s", "{:,.0f}"),
        ("kept_digit_cover", "object patches kept", "{:.1%}"),
    ]
    # Bars show shares of the longest in their column.
    most = {key: _largest(rows, key) for key, *_ in columns}
    columns = [column for column in columns if most[column[0]] is not None]
    dense = _dense(rows)
    lines = []
    for row in rows:
        base = {} if row is dense else dense
        cells = [_cost_cell(row, base, key, form, most[key] or 0.0) for key, _, form in columns]
        lines.append([Cell(str(row.get("model") or "?")), *cells])
    for column in zip(*lines, strict=True):
        if any(cell.note for cell in column):  # an empty note keeps the numbers of a column below one another
            for cell in column:
                cell.note = cell.note or ""
    return [heading for _, heading, _ in columns], lines


def _largest(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The largest number in a column; None where nobody has one."""
    numbers = (as_number(row.get(key)) for row in rows)
    return max((number for number in numbers if number is not None), default=None)


def _cost_cell(row: Mapping[str, Any], dense: Mapping[str, Any], key: str, form: str, most: float) -> Cell:
    """A number, how it compares with the dense model's, and its bar in the column."""
    value = as_number(row.get(key))
    if value is None:
        return Cell("–")
    ratio = _ratio(row, dense, key)
    note = _points(row, dense, key) or None if key in SCORES else None
    if key in ("gmacs", "params_m", "file_mb", "images_per_s") and ratio is not None:
        note = f"{ratio:.2f}×"
    if key == "images_per_s" and as_number(row.get("images_per_s_low")) is not None:
        spread = _spread(row, key, f"{key}_low", f"{key}_high", ("{:,.0f}", "{:,.1f}")).note
        note = f"{note}, {spread}" if note else spread
    return Cell(form.format(value), note, value / most if key in ("gmacs", "images_per_s") and most > 0 else None)


def _speed(bench: Mapping[str, Any]) -> Table:
    """Measured images a second: a row a runtime and batch size, a column a model."""
    names: list[str] = []
    measured: list[tuple[str, dict[str, Any]]] = []
    for entry in objects(bench.get("speed")):
        runtime = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}.get(str(entry.get("runtime")))
        title = f"{runtime or entry.get('runtime') or '?'}, batch {entry.get('batch', '?')}"
        models = {str(m.get("model")): m for m in objects(entry.get("models")) if as_number(m.get("images_per_s"))}
        names += [name for name in models if name not in names]
        if models:
            measured.append((title, models))
    headings: list[str] = []
    lines = [[Cell(title)] for title, _ in measured]
    for name in names:
        headings += [name] if name == names[0] else [name, f"to {names[0]}"]
        for line, (_, models) in zip(lines, measured, strict=True):
            most = max(float(m["images_per_s"]) for m in models.values())
            m = models.get(name, {})
            line.append(_spread(m, "images_per_s", "low", "high", ("{:,.0f}", "{:,.1f}"), most))
            if name != names[0]:
                line.append(_spread(m, "ratio", "ratio_low", "ratio_high", ("{:.2f}×", "{:.2f}×")))
    return headings, lines


def _spread(
    values: Mapping[str, Any], key: str, low: str, high: str, forms: tuple[str, str], most: float | None = None
) -> Cell:
    middle, below, above = (as_number(values.get(k)) for k in (key, low, high))
    if middle is None:
        return Cell("–", "")
    form = forms[0] if middle >= 100 else forms[1]
    note = "" if below is None or above is None else f"{form.format(below)} to {form.format(above)}"
    return Cell(form.format(middle), note, None if most is None else middle / most)
