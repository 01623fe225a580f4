"""What a run folder holds, read for its report: each gives what it found, and a sentence where nothing can be shown."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunex.callbacks.run_folder import read_record
from prunex.columns import as_number
from prunex.errors import PrunexError
from prunex.recipes.tables import counted, objects
from prunex.untrusted import read_npz, read_text

NO_METRICS = "There is no metrics.csv in the run folder, so there are no curves: train with a CSVLogger or a monitor."

Arrays = Mapping[str, NDArray[Any]]
# Of the arrays in a file of maps, by the first part of their names: kinds of numbers, and what their shape must fit.
_FITS = {
    "labels": ("iu", "each"),
    "predicted": ("iu", "each"),
    "target": ("iu", "each"),
    "masks": ("biu", "pixels"),
    "kept": ("biu", "stages"),
    "groups": ("iu", "stages"),
    "relevance": ("biuf", "grid"),
    "share": ("biuf", "filled"),
    "head": ("biufU", None),
}


def text_of(path: Path, missing: str) -> tuple[str, str]:
    """A file's text; ``missing`` is the sentence where there is none."""
    if not path.is_file():
        return "", missing
    try:
        return read_text(path), ""
    except PrunexError as error:
        return "", f"{path.name} could not be read ({reason_of(error)}) and is left out."


def reason_of(error: Exception) -> str:
    """Why a file could not be read, without its path: the page says its name."""
    return str(error).split(" is damaged: ", 1)[-1]


def json_of(path: Path, missing: str) -> tuple[dict[str, Any], str]:
    """A JSON object, as :func:`text_of`."""
    text, note = text_of(path, missing)
    if note:
        return {}, note
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"{path.name} could not be read ({error}) and is left out."
    return (content, "") if isinstance(content, dict) else ({}, f"{path.name} is not a JSON object and is left out.")


def conditions(about: Mapping[str, Any]) -> str:
    """On what something was measured, as far as a file says it, in one line."""
    images, threads, versions = as_number(about.get("images")), as_number(about.get("threads")), about.get("versions")
    torch = versions.get("torch") if isinstance(versions, dict) else None
    parts = [
        "" if images is None else f"{images:,.0f} images",
        about.get("machine"),
        counted(threads, "thread") if threads else "",
        about.get("dtype"),
        f"torch {torch}" if torch else "",
    ]
    return ", ".join(str(part) for part in parts if part)


def epochs_of(folder: Path, name: str) -> dict[int, Path]:
    """Files by their epoch's number, for which ``*`` stands in the name."""
    before, after = name.split("*")
    files = {}
    for path in sorted(folder.glob(name)):
        number = path.name.removeprefix(before).removesuffix(after)
        if number.isdecimal():
            files[int(number)] = path
    return files


def metrics_of(path: Path) -> tuple[dict[str, tuple[list[float], list[float]]], str]:
    """Every column of Lightning's CSV with its steps; without that file what callbacks noted, a row an epoch."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    rows = objects(read_record(path.parent).get("metrics")) if not path.is_file() else []
    text, note = ("", "") if rows else text_of(path, NO_METRICS)
    try:
        rows = rows or list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        return {}, f"{path.name} could not be read ({error}) and is left out."
    # Lightning writes a row whenever something is logged, and leaves the other cells empty.
    for number, row in enumerate(rows):
        step = as_number(row.get("step"))
        for name, cell in row.items():
            value = as_number(cell)
            if name not in (None, "step", "epoch") and value is not None:
                steps, values = lines.setdefault(name, ([], []))
                steps.append(number if step is None else step)
                values.append(value)
    return lines, note


def maps_of(folder: Path) -> tuple[dict[int, Arrays], list[str]]:
    """The arrays of every epoch that draws the same images as the last one."""
    maps: dict[int, Arrays] = {}
    notes: list[str] = []
    paths = epochs_of(folder, "epoch=*.npz")
    for epoch in sorted(paths, reverse=True):
        try:
            arrays = read_npz(paths[epoch])
            _check(arrays)
        except (ValueError, KeyError) as error:  # a PrunexError is a ValueError
            notes.append(f"maps/{paths[epoch].name} could not be read ({reason_of(error)}) and is left out.")
            continue
        # Columns of a gallery are epochs of one image.
        if maps and not np.array_equal(arrays["images"], next(iter(maps.values()))["images"]):
            notes.append(f"maps/{paths[epoch].name} shows other images than the last epoch and is left out.")
            continue
        maps[epoch] = arrays
    return dict(sorted(maps.items())), notes


def _check(arrays: Arrays) -> None:
    """Raise ValueError where arrays do not belong together."""
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 [M, H, W, 3]")
    count = len(images)
    for key, values in arrays.items():
        wanted, shape = _FITS.get(key.partition("/")[0], ("biuf", None))
        if values.dtype.kind not in wanted:
            raise ValueError(f"{key} is {values.dtype}")
        # Of stages there are as many as there are; the first axis after them is the images.
        images_of = values.shape[1:2] if shape == "stages" else values.shape[:1]
        fits = {
            "each": values.shape == (count,),
            "grid": values.ndim == 3 and images_of == (count,) and 0 not in values.shape,
            "stages": values.ndim == 4 and images_of == (count,) and 0 not in values.shape,
            "pixels": values.shape == images.shape[:3],
            "filled": 0 not in values.shape,
        }
        if shape is not None and not fits[shape]:
            raise ValueError(f"{key} of shape {values.shape} does not fit {count} images")
