"""One self-contained ``report.html`` from what a run folder holds."""

import base64
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from prunex.errors import PrunexError
from prunex.files import write_whole
from prunex.pictures import bars_svg, curves_svg, dim_dropped, outline, overlay, png_bytes, resized
from prunex.pictures.arrays import Picture
from prunex.pictures.mosaic import class_name, covered, spaced, tokens_left
from prunex.pictures.overlay import OBJECT, paint_groups
from prunex.recipes.folder import read_image
from prunex.recipes.score_table import BASELINES, LARGEST, Score, best, by_metric, read_scores
from prunex.untrusted import is_there, read_npz, read_text

IMAGES, EPOCHS, STAGED = 6, 4, 3  # images, epochs, and images shown stage by stage, that fit on a screen
SCORED = 40  # explainers in a chart of scores
RANKED, LISTED = 5, 20  # heads named for a class (and classes for a head), and lines of such a list
_CHART_BYTES = 500_000  # a chart's letters suffer from JPEG
_PNG_BYTES = 30_000  # a tile larger than this is a photo, which JPEG holds in a tenth of the space
_NO_METRICS = "There is no metrics.csv in the run folder, so there are no curves: train with a CSVLogger."
_NO_MAPS = (
    "There are no maps in the run folder, so there are no pictures: "
    "train with the callbacks KeptTokenMonitor and RelevancyMonitor."
)
_NO_SUMMARY = "There is no summary.json in the run folder, so costs are not compared: run prunex bench on this folder."
_NO_BENCH = "There is no bench.json in the run folder."
_NO_SCORES = "There is no score/scores.csv in the run folder."
_NO_SLIM = "There is no slim/ in the run folder, so there is no model to load yet: train with the callback SlimExport."
_NO_CONFIG = "There is no config.yaml in the run folder; prunex fit writes one."

Arrays = Mapping[str, NDArray[Any]]


@dataclass
class Cell:
    """One cell of the headline table: its text, a second smaller line, and the length of its bar (0..1) or none."""

    text: str
    note: str | None = None
    bar: float | None = None


@dataclass
class Tile:
    """One picture: its address (a data URI) and what it shows, in words."""

    source: str
    alt: str


@dataclass
class Gallery:
    """A table of tiles: headings (title, smaller line), and for each image (name, verdict, whether right, tiles)."""

    headings: list[tuple[str, str]]
    rows: list[tuple[str, str, bool, list[Tile]]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Units:
    """Pictures of units (heading, smaller line, tile), and what single heads and classes have to do with each other.

    ``classes`` holds (class, images seen, [(head, excess)]), ``heads`` holds (head, [(class, excess)]).
    """

    pictures: list[tuple[str, str, Tile]] = field(default_factory=list)
    classes: list[tuple[str, str, list[tuple[str, str]]]] = field(default_factory=list)
    heads: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    epoch: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class Scores:
    """Charts by group of metrics, on what they were measured, and which explainers are best in most of them."""

    conditions: str
    groups: dict[str, list[Markup]] = field(default_factory=dict)
    winners: list[tuple[str, list[tuple[str, int]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
        PrunexError: `run` is no folder, or holds neither ``metrics.csv`` nor ``config.yaml``.

    Example::

        write_report("runs/version_0")
    """
    folder = Path(run).expanduser()
    if not is_there(folder, Path.is_dir):
        raise PrunexError(f"run='{run}' is not a folder: give the folder that a training run wrote")
    if not any((folder / name).is_file() for name in ("metrics.csv", "config.yaml")):
        raise PrunexError(
            f"run='{run}' is not a run folder (it has neither metrics.csv nor config.yaml): "
            "give the folder that a training run wrote, such as runs/version_0"
        )
    summary, summary_note = _json(folder / "summary.json", _NO_SUMMARY)
    slim, slim_note = _json(folder / "slim" / "config.json", _NO_SLIM)
    names = slim.get("label_names")
    maps, map_notes = _maps(folder / "maps")
    metrics, metrics_note = _metrics(folder / "metrics.csv")
    config, config_note = _text(folder / "config.yaml", _NO_CONFIG)
    rows = _dicts(summary.get("rows"))
    bench, bench_note = _json(folder / "bench.json", _NO_BENCH)
    measured = _dicts(bench.get("rows"))
    scored, scored_note = _scores(folder / "score")
    named = names if isinstance(names, list) else None
    page = _template().render(
        title=_title(folder.resolve()),
        architecture=str(slim.get("architecture") or ""),
        machine=str(summary.get("machine") or ""),
        cards=_cards(rows or measured, maps),
        table=_table(rows),
        table_note=_table_note(summary_note, rows, measured),
        bench=_table(measured),
        bench_speed=_speed(bench),
        bench_machine=_conditions(bench),
        bench_notes=[str(note) for note in _list(bench.get("notes"))],
        bench_note="" if bench_note == _NO_BENCH else bench_note,
        units=_units(folder, named),
        scores=scored,
        scores_note=scored_note,
        epochs=_epoch_gallery(maps, named),
        stages=_stage_gallery(maps, named),
        map_notes=map_notes or ([] if maps else [_NO_MAPS]),
        charts=[_chart(title, lines) for title, lines in _charts(metrics)],
        charts_note=metrics_note or ("" if metrics else "metrics.csv holds no numbers, so there are no curves."),
        slim_path=repr((folder / "slim").as_posix()),
        slim_files=_files(folder / "slim") if not slim_note else [],
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


def _text(path: Path, missing: str) -> tuple[str, str]:
    if not path.is_file():
        return "", missing
    try:
        return read_text(path), ""
    except PrunexError as error:
        return "", f"{path.name} could not be read ({_reason(error)}) and is left out."


def _reason(error: Exception) -> str:
    """Why a file could not be read, without its path: the page says its name."""
    return str(error).split(" is damaged: ", 1)[-1]


def _json(path: Path, missing: str) -> tuple[dict[str, Any], str]:
    text, note = _text(path, missing)
    if note:
        return {}, note
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"{path.name} could not be read ({error}) and is left out."
    return (content, "") if isinstance(content, dict) else ({}, f"{path.name} is not a JSON object and is left out.")


def _metrics(path: Path) -> tuple[dict[str, tuple[list[float], list[float]]], str]:
    """Every column of Lightning's CSV with its steps; its rows are sparse, one for each moment something was logged."""
    text, note = _text(path, _NO_METRICS)
    lines: dict[str, tuple[list[float], list[float]]] = {}
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        return {}, f"{path.name} could not be read ({error}) and is left out."
    for number, row in enumerate(rows):
        step = _number(row.get("step"))
        for name, cell in row.items():
            value = _number(cell)
            if name not in (None, "step", "epoch") and value is not None:
                steps, values = lines.setdefault(name, ([], []))
                steps.append(number if step is None else step)
                values.append(value)
    return lines, note


def _maps(folder: Path) -> tuple[dict[int, Arrays], list[str]]:
    """The arrays of every epoch that draws the same images as the last one."""
    found: dict[int, Arrays] = {}
    notes: list[str] = []
    paths = {
        int(m[1]): path for path in folder.glob("epoch=*.npz") if (m := re.fullmatch(r"epoch=(\d+)\.npz", path.name))
    }
    for epoch in sorted(paths, reverse=True):
        try:
            arrays = read_npz(paths[epoch])
            _check(arrays)
        except (ValueError, KeyError) as error:  # a PrunexError is a ValueError
            notes.append(f"maps/{paths[epoch].name} could not be read ({_reason(error)}) and is left out.")
            continue
        if found and not np.array_equal(arrays["images"], next(iter(found.values()))["images"]):
            notes.append(f"maps/{paths[epoch].name} shows other images than the last epoch and is left out.")
            continue
        found[epoch] = arrays
    return dict(sorted(found.items())), notes


def _check(arrays: Arrays) -> None:
    """Raise ValueError where arrays do not belong together."""
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 [M, H, W, 3]")
    count = len(images)
    for key, values in arrays.items():
        grid, one = key.startswith("relevance/"), key in ("labels", "predicted") or key.startswith("target/")
        plain = "iu" if one else "biu" if key in ("masks", "kept") else "iu" if key == "groups" else "biuf"
        if values.dtype.kind not in plain:
            raise ValueError(f"{key} is {values.dtype}")
        wrong = (
            (one and values.shape != (count,))
            or (grid and (values.ndim != 3 or len(values) != count))
            or (key in ("kept", "groups") and (values.ndim != 4 or values.shape[1] != count or not len(values)))
            or (key == "masks" and values.shape != images.shape[:3])
            or (grid or key in ("kept", "groups", "share"))
            and 0 in values.shape
        )
        if wrong:
            raise ValueError(f"{key} of shape {values.shape} does not fit {count} images")


def _files(folder: Path) -> list[tuple[str, str]]:
    """Names and sizes of the files in a folder."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return [(p.name, f"{p.stat().st_size / 2**20:.1f} MB" if p.stat().st_size > 1e5 else f"{p.stat().st_size:,} bytes")
            for p in paths]  # fmt: skip


# The headline.


def _dense(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((row for row in rows if str(row.get("model", "")).lower().startswith("dense")), {})


def _ratio(row: Mapping[str, Any], dense: Mapping[str, Any], key: str) -> float | None:
    value, base = _number(row.get(key)), _number(dense.get(key))
    return value / base if value is not None and base else None


def _points(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Difference in accuracy to the dense model, in points."""
    value, base = _number(row.get("accuracy")), _number(dense.get("accuracy"))
    return "" if value is None or base is None else f"{100 * (value - base):+.1f} points".replace("-", "−")


def _title(folder: Path) -> str:
    """What a run is called: its folder, and the one above where that has the name and this the number."""
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("version_") else folder.name


def _cards(rows: Sequence[Mapping[str, Any]], maps: Mapping[int, Arrays]) -> list[tuple[str, str, str]]:
    """The result at a glance: (value, what it is, compared with what)."""
    dense = _dense(rows)
    pruned = next((r for r in rows if r is not dense and "untrained" not in str(r.get("model", "")).lower()), {})
    cards = []
    if (accuracy := _number(pruned.get("accuracy"))) is not None:
        points = _points(pruned, dense)
        cards.append((f"{accuracy:.1%}", "accuracy", f"{points} to dense" if points else ""))
    for key, what, unit in (("gmacs", "compute", "GMACs an image"), ("images_per_s", "speed", "images/s")):
        if (ratio := _ratio(pruned, dense, key)) is not None:
            cards.append((f"{ratio:.2f}×", what, f"{_short(dense[key])} → {_short(pruned[key])} {unit}"))
    kept = [arrays for arrays in maps.values() if "kept" in arrays]
    if kept:
        if "groups" in kept[-1]:
            cards.append((f"{tokens_left(kept[-1]['groups'][-1]):.0%}", "of tokens left", "after the last stage"))
        else:
            cards.append((f"{kept[-1]['kept'][-1].mean():.0%}", "of patches left", "after the last stage"))
    return cards


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows; a column nobody has a number for is left out."""
    dense = _dense(rows)
    columns = [
        ("accuracy", "accuracy", "{:.1%}"),
        ("gmacs", "GMACs / image", "{:.3g}"),
        ("params_m", "parameters (M)", "{:.3g}"),
        ("file_mb", "file (MB)", "{:.3g}"),
        ("images_per_s", "images / s", "{:,.0f}"),
        ("kept_digit_cover", "object patches kept", "{:.1%}"),
    ]
    columns = [column for column in columns if any(_number(row.get(column[0])) is not None for row in rows)]
    most = {key: max(_number(row.get(key)) or 0.0 for row in rows) for key, *_ in columns}
    lines = []
    for row in rows:
        line = [Cell(str(row.get("model") or "?"))]
        for key, _, form in columns:
            value = _number(row.get(key))
            if value is None:
                line.append(Cell("–"))
                continue
            ratio = _ratio(row, dense, key) if row is not dense else None
            note = _points(row, dense) or None if key == "accuracy" and row is not dense else None
            if key in ("gmacs", "params_m", "file_mb", "images_per_s") and ratio is not None:
                note = f"{ratio:.2f}×"
            bar = value / most[key] if key in ("gmacs", "images_per_s") and most[key] > 0 else None
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
    for entry in _dicts(bench.get("speed")):
        runtime = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}.get(str(entry.get("runtime")))
        name = f"{runtime or entry.get('runtime') or '?'}, batch {entry.get('batch', '?')}"
        told = {str(m.get("model")): m for m in _dicts(entry.get("models")) if _number(m.get("images_per_s"))}
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
    middle, below, above = (_number(values.get(k)) for k in (key, low, high))
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


# Heads and MLP channels.


def _units(folder: Path, names: Sequence[str] | None) -> Units | None:
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
        try:
            source = _data_uri(np.asarray(read_image(path)), _CHART_BYTES)
        except (ValueError, OSError) as error:  # OSError: JPEG has a largest side
            units.notes.append(f"maps/{path.name} could not be read ({error}) and is left out.")
            continue
        units.pictures.append((heading, words, Tile(source, f"{heading}, {words}")))
    _rank(folder / "units.csv", names, units)
    return units if units.pictures or units.classes or units.notes else None


def _last(folder: Path, name: str) -> Path | None:
    """The picture of the last epoch."""
    found = {
        int(m[1]): path
        for path in (folder / "maps").glob(f"{name}-epoch=*.png")
        if (m := re.fullmatch(rf"{name}-epoch=(\d+)\.png", path.name))
    }
    return found[max(found)] if found else None


def _rank(path: Path, names: Sequence[str] | None, units: Units) -> None:
    """The kept heads that matter most for each class beyond the mean of all classes, and the reverse."""
    if not path.is_file():
        return
    try:
        units.epoch, table, kept, seen = _relevance(path)
    except (PrunexError, csv.Error) as error:
        units.notes.append(f"units.csv could not be read ({_reason(error)}) and is left out.")
        return
    if not table:
        units.notes.append("units.csv holds no relevance, so no head is named.")
        return
    means = {head: float(np.mean(list(row.values()))) for head, row in table.items()}
    excess = {head: {c: v - means[head] for c, v in row.items()} for head, row in table.items() if kept[head]}
    classes = sorted({c for row in table.values() for c in row}, key=lambda c: (not _is_number(c), c.zfill(12)))
    named = {c: class_name(int(c), names) if _is_number(c) else c for c in classes}
    top_heads = {
        c: sorted(((v[c], h) for h, v in excess.items() if c in v), key=lambda found: -found[0])[:RANKED]
        for c in classes
    }
    shown = _strongest({c: found[0][0] for c, found in top_heads.items() if found})
    for c in (c for c in classes if c in shown):
        units.classes.append((named[c], seen.get(c, "–"), [(_head(h), _signed(v)) for v, h in top_heads[c]]))
    heads = _strongest({h: max(row.values()) for h, row in excess.items() if row})
    for h in (h for h in sorted(excess) if h in heads):
        best = sorted(excess[h].items(), key=lambda found: -found[1])[:RANKED]
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
        numbers = [_number(row.get(key)) for key in ("epoch", "block", "head", "relevance")]
        if row.get("class") in (None, "") or any(n is None for n in numbers):
            continue
        now, block, head, value = (n for n in numbers if n is not None)
        if now < epoch:
            continue
        if now > epoch:
            epoch, table, kept, seen = int(now), {}, {}, {}
        place, name = (int(block), int(head)), str(row["class"])
        table.setdefault(place, {})[name] = value
        kept[place] = str(row.get("kept")).strip().lower() in ("true", "1", "1.0")
        updates = _number(row.get("updates"))
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


# The pictures.


def _epoch_gallery(maps: Mapping[int, Arrays], names: Sequence[str] | None) -> Gallery | None:
    """Image, what was left of it at the last stage epoch by epoch, and what the last epoch's prediction rests on."""
    if not maps:
        return None
    last = maps[max(maps)]
    gallery, cells = _gallery(last, names)
    kept = {epoch: arrays["kept"][-1] for epoch, arrays in maps.items() if "kept" in arrays}
    for epoch in spaced(sorted(kept), EPOCHS):
        _add(gallery, f"epoch {epoch}", *_stage_shown(maps[epoch], -1, last, cells))
    if not kept and "share" in last:
        gallery.notes.append("Tokens are pooled, so no patch is kept as itself; maps/ shows each patch's part in them.")
    elif not kept:
        gallery.notes.append("No kept patches were recorded: train with the callback KeptTokenMonitor to see them.")
    methods = [key.removeprefix("relevance/") for key in last if key.startswith("relevance/")]
    for method in methods:
        values = last[f"relevance/{method}"]
        drawn = overlay(cells, values[: len(cells)], signed=bool((values < 0).any()))
        if kept and max(kept) == max(maps):
            drawn = outline(drawn, kept[max(kept)][: len(cells)], thick=1)
        _add(gallery, method, _explained(last.get(f"target/{method}"), last), drawn)
    if not methods:
        gallery.notes.append("No relevancy was recorded: train with the callback RelevancyMonitor to see it.")
    hidden = len(last["images"]) - len(cells)
    if hidden > 0:
        gallery.notes.append(f"{hidden} more image{'s are' if hidden > 1 else ' is'} in maps/.")
    return gallery


def _stage_gallery(maps: Mapping[int, Arrays], names: Sequence[str] | None) -> Gallery | None:
    """Image and what was left of it after each stage, in the last epoch."""
    kept = [arrays for arrays in maps.values() if "kept" in arrays]
    if not kept or len(kept[-1]["kept"]) < 2:
        return None
    gallery, cells = _gallery(kept[-1], names, STAGED)
    for number in range(len(kept[-1]["kept"])):
        _add(gallery, f"stage {number + 1}", *_stage_shown(kept[-1], number, kept[-1], cells))
    return gallery


def _stage_shown(arrays: Arrays, stage: int, shown: Arrays, cells: Picture) -> tuple[str, Picture]:
    """What is left after a stage, in words and drawn on the images."""
    if "groups" in arrays:
        groups = arrays["groups"][stage]
        return f"{tokens_left(groups):.0%} of tokens", paint_groups(cells, groups[: len(cells)])
    kept = arrays["kept"][stage]
    return _kept_words(kept, shown), dim_dropped(cells, kept[: len(cells)])


def _gallery(arrays: Arrays, names: Sequence[str] | None, most: int = IMAGES) -> tuple[Gallery, Picture]:
    """A gallery with the images themselves as first column, and the images enlarged."""
    cells = resized(arrays["images"][:most])
    rows: list[tuple[str, str, bool, list[Tile]]] = []
    for index in range(len(cells)):
        label, guess = (int(arrays[key][index]) if key in arrays else None for key in ("labels", "predicted"))
        name = f"image {index}" if label is None else class_name(label, names)
        right = label is None or label == guess
        verdict = "" if guess is None else "predicted" if label == guess else class_name(guess, names)
        rows.append((name, verdict, right, []))
    gallery = Gallery([], rows)
    first = outline(cells, arrays["masks"][:most], OBJECT) if "masks" in arrays else cells
    _add(gallery, "input", "object outlined" if "masks" in arrays else "", first)
    return gallery, cells


def _add(gallery: Gallery, heading: str, words: str, pictures: Picture) -> None:
    gallery.headings.append((heading, words))
    for (name, _, _, tiles), picture in zip(gallery.rows, pictures, strict=True):
        tiles.append(Tile(_data_uri(picture), f"{name}, {heading}"))


def _kept_words(kept: NDArray[Any], arrays: Arrays) -> str:
    words = f"{kept.mean():.0%} kept"
    cover = covered(kept.astype(bool), arrays["masks"].astype(bool)) if "masks" in arrays else math.nan
    return words if math.isnan(cover) else f"{words}, {cover:.0%} of object"


def _explained(target: NDArray[Any] | None, arrays: Arrays) -> str:
    for key, words in (("predicted", "for the predicted class"), ("labels", "for the true class")):
        if target is not None and key in arrays and np.array_equal(target, arrays[key]):
            return words
    return "relevancy"


def _data_uri(picture: Picture, most: int = _PNG_BYTES) -> str:
    content, kind = png_bytes(picture), "png"
    if len(content) > most:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=88, subsampling=0)
        content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# Explainers by metrics.


def _scores(folder: Path) -> tuple[Scores | None, str]:
    """A chart a metric from score/scores.csv, and a sentence where it cannot be read."""
    text, note = _text(folder / "scores.csv", _NO_SCORES)
    if note:
        return None, "" if note == _NO_SCORES else note
    try:
        rows = read_scores(text)
    except csv.Error as error:
        return None, f"score/scores.csv could not be read ({error}) and is left out."
    if not rows:
        return None, "score/scores.csv holds no numbers, so explainers are not compared."
    about, _ = _json(folder / "about.json", "")
    methods = list(dict.fromkeys(row.method for row in rows))
    listed = {m for m in methods if m not in BASELINES}
    hidden = len(listed) - SCORED
    models = list(dict.fromkeys(row.model for row in rows))
    shown = {*sorted(listed, key=methods.index)[:SCORED], *BASELINES}
    found = Scores(_conditions_of(about))
    for metric, cells in by_metric([row for row in rows if row.method in shown]).items():
        if any(cell.method != "chance" for cell in cells):
            found.groups.setdefault(cells[0].group or "other", []).append(_score_chart(metric, cells, models))
    found.winners = _winners(rows)
    found.notes = [str(n) for n in _list(about.get("notes"))]
    if hidden > 0:
        found.notes.append(f"{hidden} more explainers are in score/scores.csv.")
    return found, ""


def _conditions_of(about: Mapping[str, Any]) -> str:
    images, threads = _number(about.get("images")), _number(about.get("threads"))
    parts = [
        f"{images:,.0f} images" if images is not None else None,
        about.get("machine"),
        f"{threads:.0f} thread{'' if threads == 1 else 's'}" if threads is not None else None,
    ]
    return ", ".join(str(part) for part in parts if part)


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

    rows = {
        method: {m: (c.mean, c.low, c.high) for m, c in by_method[method].items()}
        for method in sorted((m for m in by_method if m != "chance"), key=place)
    }
    lines: dict[str, float] = {}
    level = "chance" if "chance" in by_method else "random"
    for model, cell in by_method.get(level, {}).items():
        if cell.mean not in lines.values():
            named = level if all(c.mean == cell.mean for c in by_method[level].values()) else f"{level}, {model}"
            lines[named] = cell.mean
    title = f"{metric.replace('_', ' ')}, {'more' if higher else 'less'} is better"
    return Markup(bars_svg(rows, title, lines, faint=BASELINES, order=order))  # it escapes names itself


def _winners(rows: Sequence[Score]) -> list[tuple[str, list[tuple[str, int]]]]:
    """For each model how many metrics each explainer is best in, most first.

    Agreement does not count: it judges the pruner, not the explainer.
    """
    counts: dict[str, dict[str, int]] = {}
    for (model, _), method in best([row for row in rows if row.group != "agreement"]).items():
        counts.setdefault(model, {}).setdefault(method, 0)
        counts[model][method] += 1
    return [(m, sorted(c.items(), key=lambda found: (-found[1], found[0]))[:RANKED]) for m, c in counts.items()]


# The curves.


def _charts(
    metrics: Mapping[str, tuple[list[float], list[float]]],
) -> list[tuple[str, dict[str, tuple[list[float], list[float]]]]]:
    """Metrics that belong in one chart, by their names; what fits nowhere gets a chart for each quantity."""
    groups: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    first = ("Loss", "Accuracy", "Patches kept", "Parts of the loss")
    for name in metrics:
        low = name.lower()
        if re.fullmatch(r"(train|val|test)?[/_]?loss(_step|_epoch)?", low):
            group = first[0]
        elif "loss" in low:
            group = first[3]
        elif "acc" in low:
            group = first[1]
        elif re.search(r"keep|kept", low) and not re.search(r"cover|mass|relevan|inside", low):
            group = first[2]
        else:
            group = re.sub(r"^(train|val|test)[/_]|(_step|_epoch)$", "", name)
        groups.setdefault(group, {})[name] = metrics[name]
    order = [*(name for name in first if name in groups), *sorted(set(groups) - set(first))]
    return [(name, groups[name]) for name in order]


def _chart(title: str, lines: Mapping[str, tuple[list[float], list[float]]]) -> Markup:
    steps, epochs = {n for n in lines if n.endswith("_step")}, {n for n in lines if n.endswith("_epoch")}
    # Lightning logs one quantity twice when asked for both; the curve of steps says what the epochs' would.
    twice = {name for name in epochs if name.removesuffix("_epoch") + "_step" in steps}
    shown = {name: line for name, line in lines.items() if name not in twice}
    values = [value for _, line in shown.values() for value in line]
    percent = title in ("Accuracy", "Patches kept") and all(0 <= value <= 1 for value in values)
    return Markup(curves_svg(shown, title=title, percent=percent, size=(520, 300)))  # it escapes names itself


def _number(value: Any) -> float | None:
    """A number that can be drawn, or None for whatever else a cell may hold."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < LARGEST else None


def _short(value: Any) -> str:
    return f"{float(value):,.0f}" if float(value) >= 100 else f"{float(value):.3g}"


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in _list(value) if isinstance(entry, dict)]
