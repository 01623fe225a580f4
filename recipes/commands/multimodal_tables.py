"""What ``prunex explain`` writes of models of text and image: a sheet an image, maps.npz, and tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunex.files import readable, write_whole
from prunex.multimodal import MultimodalExplanation
from prunex.multimodal.showing import corners, map_of, sample_sheet
from prunex.multimodal.words import pieces
from prunex.pictures import resized, save_npz, save_png
from prunex.pictures.arrays import Picture
from prunex.pictures.sheet import Column, compose, heading_of, stacked
from prunex.recipes.commands.multimodal_model import OpenedFolder
from prunex.recipes.commands.sheets import name_of, sheet_names, writing

Explanations = Mapping[str, MultimodalExplanation]


@dataclass
class _Entry:
    """One thing that was explained: an image's answer, or one of its detections."""

    image: int
    target: int
    label: str
    score: float
    maps: dict[str, NDArray[np.float32]]
    texts: dict[str, NDArray[np.float32]]
    words: list[str]
    predicted: int = -1
    query: int = -1
    probability: float = float("nan")
    box: list[float] = field(default_factory=list)  # corners as shares of the image


class MultimodalOutput:
    """What is written: a sheet an image as it comes, the maps and tables of all at the end."""

    def __init__(self, out: Path, files: Sequence[Path], root: Path, opened: OpenedFolder) -> None:
        self.out, self.opened = out, opened
        self.files = [name_of(file, root) for file in files]
        self.sheets = sheet_names(files, root)
        self.done, self.empty = 0, 0  # images; those in which nothing was detected
        self._sizes: list[tuple[int, int]] = []
        self._entries: list[_Entry] = []

    def add(
        self, sizes: Sequence[tuple[int, int]], pictures: Sequence[Picture | None], explanations: Explanations
    ) -> None:
        """The next images: their sizes in pixels, what is drawn on, and what explains them."""
        for sample, (size, picture) in enumerate(zip(sizes, pictures, strict=True)):
            entries = [*self._explained(sample, explanations)]
            self.empty += not entries
            heading = [readable(self.files[self.done]), *self._in_words(entries)]
            if explanations:
                e = next(iter(explanations.values()))
                sheet = sample_sheet(explanations, sample, picture, e.words, heading)
            else:
                sheet = stacked([heading_of([*heading, "no object above the threshold"]), *_plain(picture)])
            with writing(self.out):
                save_png(self.out / self.sheets[self.done], sheet)
            self._entries += entries
            self._sizes.append(size)
            self.done += 1

    def finish(self, times: Iterable[Sequence[Any]]) -> None:
        """Write the maps and tables of the images that were added."""
        if not self.done:
            return
        with writing(self.out):
            save_npz(self.out / "maps.npz", self._arrays(), compressed=False)
            self._write("explained.csv", self._rows())
            self._write("times.csv", [["method", "seconds_per_image", "images"], *times])
            if any(entry.words for entry in self._entries):
                self._write("words.csv", self._word_rows())

    def _explained(self, sample: int, explanations: Explanations) -> Iterable[_Entry]:
        """What was explained of one image of the batch."""
        if not explanations:
            return
        e = next(iter(explanations.values()))
        if e.queries is None:
            target = int(e.target[sample])
            yield _Entry(
                self.done,
                target,
                self.opened.class_name(target),
                float(e.scores[sample]),
                {method: map_of(each, (sample,)) for method, each in explanations.items()},
                *_texts(
                    e, int(e.texts[sample]), {m: o.text[sample] for m, o in explanations.items() if o.text is not None}
                ),
                predicted=int(e.logits[sample].argmax()),
            )
            return
        for query in (each for each in e.queries if each.image == sample):
            same = {m: each.same(query) for m, each in explanations.items()}
            yield _Entry(
                self.done,
                query.target,
                self.opened.class_name(query.target),
                query.score,
                {method: each.map.float().cpu().numpy() for method, each in same.items()},
                *_texts(e, query.text_number, {m: each.text for m, each in same.items()}),
                query=query.query,
                probability=query.probability,
                box=corners(query.box).tolist(),
            )

    def _in_words(self, entries: Sequence[_Entry]) -> list[str]:
        """What the model answers, where that is not what was explained."""
        other = [each for each in entries if each.predicted not in (-1, each.target)]
        return [f"predicted: {self.opened.class_name(each.predicted)}" for each in other]

    def _arrays(self) -> dict[str, Any]:
        """Everything as arrays, a row for each thing that was explained; what lies beyond an image's map is NaN."""
        entries, detects = self._entries, self.opened.folder.kind.detects
        arrays: dict[str, Any] = {
            "files": np.array(self.files[: self.done]),
            "image": np.array([entry.image for entry in entries], dtype=np.int64),
            "target": np.array([entry.target for entry in entries], dtype=np.int64),
            "label": np.array([entry.label for entry in entries], dtype=str),
            "score": np.array([entry.score for entry in entries]),
        }
        if detects:
            arrays["query"] = np.array([entry.query for entry in entries], dtype=np.int64)
            arrays["probability"] = np.array([entry.probability for entry in entries])
            arrays["box"] = np.array([entry.box for entry in entries]).reshape(-1, 4)
        else:
            arrays["predicted"] = np.array([entry.predicted for entry in entries], dtype=np.int64)
        for method in entries[0].maps if entries else ():
            arrays[method] = _padded([entry.maps[method] for entry in entries])
            if entries[0].texts:
                arrays[f"{method}_text"] = _padded([entry.texts[method] for entry in entries])
        return arrays

    def _rows(self) -> Iterable[Sequence[Any]]:
        """What was explained, a row each, boxes in pixels of the image file."""
        detects = self.opened.folder.kind.detects
        yield ["file", "label", "target", "score", *(_OF_DETECTIONS if detects else ["predicted"])]
        for entry in self._entries:
            tall, wide = self._sizes[entry.image]
            start = [readable(self.files[entry.image]), entry.label, entry.target, f"{entry.score:.6g}"]
            if not detects:
                yield [*start, self.opened.class_name(entry.predicted)]
                continue
            pixels = [f"{share * side:.1f}" for share, side in zip(entry.box, (wide, tall, wide, tall), strict=True)]
            yield [*start, entry.query, f"{entry.probability:.6f}", *pixels]

    def _word_rows(self) -> Iterable[Sequence[Any]]:
        """Relevance of each token of the texts, a column a method."""
        methods = list(self._entries[0].texts)
        yield ["file", "label", *(["query"] if self.opened.folder.kind.detects else []), "place", "word", *methods]
        for entry in self._entries:
            query = [entry.query] if self.opened.folder.kind.detects else []
            for place, word in enumerate(entry.words):
                values = [f"{entry.texts[method][place]:.6g}" for method in methods]
                yield [readable(self.files[entry.image]), entry.label, *query, place, word, *values]

    def _write(self, name: str, rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_whole(self.out / name, text.getvalue().encode())


_OF_DETECTIONS = ("query", "probability", "x1", "y1", "x2", "y2")


def _texts(
    e: MultimodalExplanation, text: int, rows: Mapping[str, Any]
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Relevance of a text's tokens by method, without padding, and the tokens as words."""
    if e.text is None or e.words is None:
        return {}, []
    valid = torch.as_tensor(e.text_valid)[text].nonzero()[:, 0].tolist()
    words = [piece.text for piece in pieces([e.words[text][place] for place in valid])]
    return {method: row[valid].float().cpu().numpy() for method, row in rows.items()}, words


def _padded(arrays: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Arrays of several sizes as one, from the upper left corner; NaN beyond each."""
    shape = np.max([array.shape for array in arrays], axis=0)
    whole = np.full((len(arrays), *shape), np.nan, dtype=np.float32)
    for row, array in zip(whole, arrays, strict=True):
        row[tuple(slice(0, side) for side in array.shape)] = array
    return whole


def _plain(picture: Picture | None) -> list[Picture]:
    return [] if picture is None else [compose([Column("image", resized(picture, 224)[None])], [()])]
