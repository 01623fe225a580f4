"""One self-contained ``report.html`` from what a run folder holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

import prunex
from prunex.callbacks.record import RECORD
from prunex.errors import PrunexError
from prunex.files import is_there, write_whole
from prunex.pictures.mosaic import tokens_left
from prunex.recipes.report.curves import curves_of
from prunex.recipes.report.gallery import epoch_gallery, stage_gallery
from prunex.recipes.report.reading import Arrays, json_of, maps_of, metrics_of, text_of
from prunex.recipes.report.scores import scores_of
from prunex.recipes.report.units import units_of
from prunex.recipes.runs import home, slim_folder
from prunex.recipes.tables import as_number, entries, macs_unit, objects

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
    """One cell of the headline table: its text, a second smaller line, and the length of its bar (0..1) or none."""

    text: str
    note: str | None = None
    bar: float | None = None


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run folder.

    The page needs no network and no other file. It holds what the folder holds: ``summary.json`` (dense beside
    pruned), ``bench.json`` (measured speed, written by ``prunex bench``), ``maps/epoch=NNN.npz`` (kept patches and
    relevancy), ``maps/units-*.png`` and ``units.csv`` (heads and MLP channels), ``metrics.csv`` (curves), ``score/``
    (explainers by metrics, written by ``prunex score``), ``slim/``
    (how to load the model) and ``config.yaml``. What is missing or cannot be read is left out, with a sentence that
    says so; of ``bench.json``, scores and units nothing is said where they are missing.

    ``summary.json`` is ``{"machine": str, "rows": [{"model": str, "accuracy": 0..1, "gmacs": billions of
    multiply-adds an image, "params_m": millions, "images_per_s": float, "kept_digit_cover": 0..1}]}``; every key may
    be missing. The row whose model is called ``dense`` is what the others are compared with.

    Args:
        run: The run folder.

    Returns:
        The path of the page.

    Raises:
        PrunexError: `run` is no folder, or holds nothing that a run or its callbacks write.

    Example::

        write_report("runs/version_0")
    """
    if not is_there(Path(run).expanduser(), Path.is_dir):
        raise PrunexError(f"run='{run}' is not a folder: give the folder that a training run wrote")
    folder = home(Path(run).expanduser())
    slim_path = slim_folder(folder)
    known = any((folder / name).exists() for name in ("metrics.csv", "config.yaml", RECORD, "maps"))
    if not known and slim_path is None:
        raise PrunexError(
            f"run='{run}' is not a run folder (it has neither metrics.csv nor config.yaml, no maps/ and no slim/): "
            "give the folder that a training run wrote, such as runs/version_0 or lightning_logs/version_0"
        )
    summary, summary_note = json_of(folder / "summary.json", _NO_SUMMARY)
    slim_path = slim_path or folder / "slim"
    slim, slim_note = json_of(slim_path / "config.json", _NO_SLIM)
    names = slim.get("label_names")
    maps, map_notes = maps_of(folder / "maps")
    metrics, metrics_note = metrics_of(folder / "metrics.csv")
    config, config_note = text_of(folder / "config.yaml", _NO_CONFIG)
    bench, bench_note = json_of(folder / "bench.json", _NO_BENCH)
    rows, measured = objects(summary.get("rows")), objects(bench.get("rows"))
    unit = macs_unit([row.get("gmacs") for row in (*rows, *measured)] or metrics.get("prunex/gmacs", ([], []))[1])
    rows, measured = _in_unit(rows, unit[0]), _in_unit(measured, unit[0])
    curves = curves_of(metrics, unit)
    scored, scored_note = scores_of(folder / "score")
    named = names if isinstance(names, list) else None
    page = _template().render(
        title=_title(folder.resolve()),
        architecture=str(slim.get("architecture") or ""),
        machine=str(summary.get("machine") or ""),
        written=f"{datetime.now():%d %B %Y, %H:%M}",
        version=prunex.__version__,
        cards=_cards(rows or measured, maps, unit[1]),
        table=_table(rows, unit[1]),
        table_note=_table_note(summary_note, rows, measured),
        bench=_table(measured, unit[1]),
        bench_speed=_speed(bench),
        bench_machine=_conditions(bench),
        bench_notes=[str(note) for note in entries(bench.get("notes"))],
        bench_note="" if bench_note == _NO_BENCH else bench_note,
        units=units_of(folder, named),
        scores=scored,
        scores_note=scored_note,
        epochs=epoch_gallery(maps, named),
        stages=stage_gallery(maps, named),
        map_notes=map_notes or ([] if maps else [_NO_MAPS]),
        curves=curves,
        charts_note=metrics_note or ("" if metrics else "metrics.csv holds no numbers, so there are no curves."),
        slim_path=repr(slim_path.as_posix()),
        slim_files=_files(slim_path) if not slim_note else [],
        slim_note=slim_note,
        config=config,
        config_note=config_note,
    )
    # Names of files and classes may hold halves of characters, which no page can.
    return write_whole(folder / "report.html", page.encode(errors="replace"))


def _template() -> Any:
    text = (files("prunex.recipes") / "templates" / "report.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )


# Reading: each returns what it found, and a sentence where there is nothing to show.


def _files(folder: Path) -> list[tuple[str, str]]:
    """Names and sizes of the files in a folder."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return [(p.name, f"{p.stat().st_size / 2**20:.1f} MB" if p.stat().st_size > 1e5 else f"{p.stat().st_size:,} bytes")
            for p in paths]  # fmt: skip


# The headline.


def _dense(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((row for row in rows if str(row.get("model", "")).lower().startswith("dense")), {})


def _ratio(row: Mapping[str, Any], dense: Mapping[str, Any], key: str) -> float | None:
    value, base = as_number(row.get(key)), as_number(dense.get(key))
    return value / base if value is not None and base else None


def _points(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Difference in accuracy to the dense model, in points."""
    value, base = as_number(row.get("accuracy")), as_number(dense.get("accuracy"))
    return "" if value is None or base is None else f"{100 * (value - base):+.1f} points".replace("-", "−")


def _title(folder: Path) -> str:
    """What a run is called: its folder, and the one above where that has the name and this the number."""
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("version_") else folder.name


def _in_unit(rows: Sequence[Mapping[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Rows with multiply-adds in the page's unit."""
    counted = [(row, as_number(row.get("gmacs"))) for row in rows]
    return [{**row} if gmacs is None else {**row, "gmacs": gmacs * factor} for row, gmacs in counted]


def _cards(rows: Sequence[Mapping[str, Any]], maps: Mapping[int, Arrays], unit: str) -> list[tuple[str, str, str]]:
    """The result at a glance: (value, what it is, compared with what)."""
    dense = _dense(rows)
    pruned = next((r for r in rows if r is not dense and "untrained" not in str(r.get("model", "")).lower()), {})
    cards = []
    if (accuracy := as_number(pruned.get("accuracy"))) is not None:
        points = _points(pruned, dense)
        cards.append((f"{accuracy:.1%}", "accuracy", f"{points} to dense" if points else ""))
    for key, what, each in (("gmacs", "compute", f"{unit} an image"), ("images_per_s", "speed", "images/s")):
        if (ratio := _ratio(pruned, dense, key)) is not None:
            cards.append((f"{ratio:.2f}×", what, f"{_short(dense[key])} → {_short(pruned[key])} {each}"))
    kept = [arrays for arrays in maps.values() if "kept" in arrays]
    if kept:
        if "groups" in kept[-1]:
            cards.append((f"{tokens_left(kept[-1]['groups'][-1]):.0%}", "of tokens left", "after the last stage"))
        else:
            cards.append((f"{kept[-1]['kept'][-1].mean():.0%}", "of patches left", "after the last stage"))
    return cards


def _table(rows: Sequence[Mapping[str, Any]], unit: str) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows; a column nobody has a number for is left out."""
    dense = _dense(rows)
    columns = [
        ("accuracy", "accuracy", "{:.1%}"),
        ("gmacs", f"{unit} / image", "{:.3g}"),
        ("params_m", "parameters (M)", "{:.3g}"),
        ("file_mb", "file (MB)", "{:.3g}"),
        ("images_per_s", "images / s", "{:,.0f}"),
        ("kept_digit_cover", "object patches kept", "{:.1%}"),
    ]
    columns = [column for column in columns if any(as_number(row.get(column[0])) is not None for row in rows)]
    most = {key: max(as_number(row.get(key)) or 0.0 for row in rows) for key, *_ in columns}
    lines = []
    for row in rows:
        line = [Cell(str(row.get("model") or "?"))]
        for key, _, form in columns:
            value = as_number(row.get(key))
            if value is None:
                line.append(Cell("–"))
                continue
            ratio = _ratio(row, dense, key) if row is not dense else None
            note = _points(row, dense) or None if key == "accuracy" and row is not dense else None
            if key in ("gmacs", "params_m", "file_mb", "images_per_s") and ratio is not None:
                note = f"{ratio:.2f}×"
            bar = value / most[key] if key in ("gmacs", "images_per_s") and most[key] > 0 else None
            if key == "images_per_s" and as_number(row.get("images_per_s_low")) is not None:
                spread = _spread(row, key, f"{key}_low", f"{key}_high", ("{:,.0f}", "{:,.1f}")).note
                note = f"{note}, {spread}" if note else spread
            line.append(Cell(form.format(value), note, bar))
        lines.append(line)
    for column in zip(*lines, strict=True):
        if any(cell.note for cell in column):  # an empty note keeps the numbers of a column below one another
            for cell in column:
                cell.note = cell.note or ""
    return [heading for _, heading, _ in columns], lines


def _table_note(missing: str, rows: Sequence[Any], measured: Sequence[Any]) -> str:
    """Why there is no table; nothing where bench.json tells the costs instead."""
    if rows or (measured and missing == _NO_SUMMARY):
        return ""
    return missing or "summary.json holds no rows, so costs are not compared."


def _speed(bench: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of measured images a second: a row a runtime and batch size, a column a model."""
    models: list[str] = []
    found: list[tuple[str, dict[str, Any]]] = []
    for entry in objects(bench.get("speed")):
        runtime = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}.get(str(entry.get("runtime")))
        name = f"{runtime or entry.get('runtime') or '?'}, batch {entry.get('batch', '?')}"
        told = {str(m.get("model")): m for m in objects(entry.get("models")) if as_number(m.get("images_per_s"))}
        models += [model for model in told if model not in models]
        if told:
            found.append((name, told))
    lines = []
    for name, told in found:
        most = max(float(m["images_per_s"]) for m in told.values())
        line = [Cell(name)]
        for model in models:
            m = told.get(model, {})
            line.append(_spread(m, "images_per_s", "low", "high", ("{:,.0f}", "{:,.1f}"), most))
            if model != models[0]:
                line.append(_spread(m, "ratio", "ratio_low", "ratio_high", ("{:.2f}×", "{:.2f}×")))
        lines.append(line)
    headings = [h for model in models for h in ([model] if model == models[0] else [model, f"to {models[0]}"])]
    return headings, lines


def _spread(
    values: Mapping[str, Any], key: str, low: str, high: str, forms: tuple[str, str], most: float | None = None
) -> Cell:
    """A median with its quartiles."""
    middle, below, above = (as_number(values.get(k)) for k in (key, low, high))
    if middle is None:
        return Cell("–", "")
    form = forms[0] if middle >= 100 else forms[1]
    note = "" if below is None or above is None else f"{form.format(below)} to {form.format(above)}"
    return Cell(form.format(middle), note, None if most is None else middle / most)


def _conditions(bench: Mapping[str, Any]) -> str:
    versions = bench.get("versions")
    torch = versions.get("torch") if isinstance(versions, dict) else None
    threads = bench.get("threads")
    parts = [
        bench.get("machine"),
        f"{threads} thread{'' if threads == 1 else 's'}" if threads else None,
        bench.get("dtype"),
        f"torch {torch}" if torch else None,
    ]
    return ", ".join(str(part) for part in parts if part)


def _short(value: Any) -> str:
    return f"{float(value):,.0f}" if float(value) >= 100 else f"{float(value):.3g}"
