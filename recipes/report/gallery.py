"""The pictures of a report: what was kept of each image, and what its prediction rests on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunex.pictures import dim_dropped, outline, overlay, resized
from prunex.pictures.arrays import Picture
from prunex.pictures.cards import data_uri
from prunex.pictures.mosaic import class_name, covered, spaced, tokens_left
from prunex.pictures.overlay import OBJECT, paint_groups
from prunex.recipes.report.reading import Arrays

IMAGES, EPOCHS, STAGED = 6, 4, 4  # images, epochs, and images shown stage by stage, that fit on a screen


@dataclass
class Tile:
    """One picture: its address (a data URI) and what it shows, in words."""

    source: str
    alt: str


@dataclass
class Gallery:
    """A table of tiles: headings (title, smaller line), and for each image (name, verdict, whether right, tiles).

    ``kept``: whether some of the tiles show which patches were kept.
    """

    headings: list[tuple[str, str]]
    rows: list[tuple[str, str, bool, list[Tile]]]
    notes: list[str] = field(default_factory=list)
    kept: bool = False


def epoch_gallery(maps: Mapping[int, Arrays], names: Sequence[str] | None) -> Gallery | None:
    """Image, what was left of it at the last stage epoch by epoch, and what the last epoch's prediction rests on."""
    if not maps:
        return None
    last = maps[max(maps)]
    rows = _chosen(last, IMAGES)
    gallery, cells = _gallery(last, names, rows)
    kept = {epoch: arrays["kept"][-1] for epoch, arrays in maps.items() if "kept" in arrays}
    gallery.kept = bool(kept)
    for epoch in spaced(sorted(kept), EPOCHS):
        _add(gallery, f"epoch {epoch}", *_stage_shown(maps[epoch], -1, last, cells, rows))
    if not kept and "share" in last:
        gallery.notes.append("Tokens are pooled, so no patch is kept as itself; maps/ shows each patch's part in them.")
    elif not kept:
        gallery.notes.append("No kept patches were recorded: where tokens are pruned, KeptTokenMonitor records them.")
    methods = [key.removeprefix("relevance/") for key in last if key.startswith("relevance/")]
    for method in methods:
        values = last[f"relevance/{method}"]
        drawn = overlay(cells, values[rows], signed=bool((values < 0).any()))
        # What was kept in another epoch is not what this map explains.
        if kept and max(kept) == max(maps):
            drawn = outline(drawn, kept[max(kept)][rows], thick=1)
        _add(gallery, method, _explained(last.get(f"target/{method}"), last), drawn)
    if not methods:
        gallery.notes.append("No relevancy was recorded: train with the callback RelevancyMonitor to see it.")
    hidden = len(last["images"]) - len(cells)
    if hidden > 0:
        gallery.notes.append(f"{hidden} more image{'s are' if hidden > 1 else ' is'} in maps/.")
    return gallery


def stage_gallery(maps: Mapping[int, Arrays], names: Sequence[str] | None) -> Gallery | None:
    """Image and what was left of it after each stage, in the last epoch."""
    kept = [arrays for arrays in maps.values() if "kept" in arrays]
    if not kept or len(kept[-1]["kept"]) < 2:
        return None
    rows = _chosen(kept[-1], STAGED)
    gallery, cells = _gallery(kept[-1], names, rows)
    for number in range(len(kept[-1]["kept"])):
        _add(gallery, f"stage {number + 1}", *_stage_shown(kept[-1], number, kept[-1], cells, rows))
    return gallery


def _chosen(arrays: Arrays, most: int) -> list[int]:
    """Which images are shown: the first of each class, then the second of each, as many as there is room for."""
    labels = arrays["labels"].tolist() if "labels" in arrays else [0] * len(arrays["images"])
    # As many classes as there is room for, rather than the first images of one.
    turn = [labels[:place].count(label) for place, label in enumerate(labels)]
    return sorted(sorted(range(len(labels)), key=lambda place: turn[place])[:most])


def _stage_shown(arrays: Arrays, stage: int, shown: Arrays, cells: Picture, rows: list[int]) -> tuple[str, Picture]:
    """What is left after a stage, in words and drawn on the images."""
    # Merged tokens are drawn as groups: no patch of theirs is gone.
    if "groups" in arrays:
        groups = arrays["groups"][stage]
        return f"{tokens_left(groups):.0%} of tokens", paint_groups(cells, groups[rows])
    kept = arrays["kept"][stage]
    words = f"{kept.mean():.0%} kept"
    cover = covered(kept.astype(bool), shown["masks"].astype(bool)) if "masks" in shown else math.nan
    words = words if math.isnan(cover) else f"{words}, {cover:.0%} of object"
    return words, dim_dropped(cells, kept[rows])


def _gallery(arrays: Arrays, names: Sequence[str] | None, chosen: list[int]) -> tuple[Gallery, Picture]:
    """A gallery with the chosen images themselves as first column, and these images enlarged."""
    cells = resized(arrays["images"][chosen])
    rows: list[tuple[str, str, bool, list[Tile]]] = []
    for index in chosen:
        label, guess = (int(arrays[key][index]) if key in arrays else None for key in ("labels", "predicted"))
        name = f"image {index}" if label is None else class_name(label, names)
        verdict = ""
        if guess is not None:
            verdict = "predicted" if label == guess else class_name(guess, names)
        rows.append((name, verdict, label is None or label == guess, []))
    gallery = Gallery([], rows)
    first = outline(cells, arrays["masks"][chosen], OBJECT) if "masks" in arrays else cells
    _add(gallery, "input", "object outlined" if "masks" in arrays else "", first)
    return gallery, cells


def _add(gallery: Gallery, heading: str, words: str, pictures: Picture) -> None:
    gallery.headings.append((heading, words))
    for (name, _, _, tiles), picture in zip(gallery.rows, pictures, strict=True):
        tiles.append(Tile(data_uri(picture), f"{name}, {heading}"))


def _explained(target: NDArray[Any] | None, arrays: Arrays) -> str:
    if target is not None and (target < 0).all():
        return "of no class"
    # The predicted class is what is explained unless somebody asked for another.
    for key, words in (("predicted", "for the predicted class"), ("labels", "for the true class")):
        if target is not None and key in arrays and np.array_equal(target, arrays[key]):
            return words
    return "relevancy"
