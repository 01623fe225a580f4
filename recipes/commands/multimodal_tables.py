"""What ``prunex explain`` writes of models of text and image: a sheet an image, maps.npz, and tables as CSV."""

from __future__ import annotations

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
from prunex.recipes.tables import as_csv

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
            write_whole(self.out / "explained.csv", as_csv(self._rows()))
            write_whole(self.out / "times.csv", as_csv([["method", "seconds_per_image", "images"], *times]))
            if any(entry.words for entry in self._entries):
                write_whole(self.out / "words.csv", as_csv(self._word_rows()))

    def _explained(self, sample: int, explanations: Explanations) -> Iterable[_Entry]:
        if not explanations:
            return
        e = next(iter(explanations.values()))
        if e.queries is None:
            target, score = int(e.target[sample]), float(e.scores[sample])
            maps = {method: map_of(other, (sample,)) for method, other in explanations.items()}
            rows = {method: other.text[sample] for method, other in explanations.items() if other.text is not None}
            texts = _texts(e, int(e.texts[sample]), rows)
            predicted = int(e.logits[sample].argmax())
            yield _Entry(self.done, target, self.opened.class_name(target), score, maps, *texts, predicted=predicted)
            return
        for query in e.queries:
            if query.image != sample:
                continue
            # Methods explain the same detections, each in an object of its own.
            same = {method: other.same(query) for method, other in explanations.items()}
            maps = {method: other.map.float().cpu().numpy() for method, other in same.items()}
            texts = _texts(e, query.text_number, {method: other.text for method, other in same.items()})
            of_query: dict[str, Any] = {"query": query.query, "probability": query.probability}
            of_query["box"] = corners(query.box).tolist()
            name = self.opened.class_name(query.target)
            yield _Entry(self.done, query.target, name, query.score, maps, *texts, **of_query)

    def _in_words(self, entries: Sequence[_Entry]) -> list[str]:
        """What the model answers, where that is not what was explained."""
        other = [entry.predicted for entry in entries if entry.predicted not in (-1, entry.target)]
        return [f"predicted: {self.opened.class_name(predicted)}" for predicted in other]

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


_OF_DETECTIONS = ("query", "probability", "x1", "y1", "x2", "y2")


def _texts(
    e: MultimodalExplanation, text: int, rows: Mapping[str, Any]
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Relevance of a text's tokens by method, without padding, and the tokens as words."""
    if e.text is None or e.words is None:
        return {}, []
    valid = torch.as_tensor(e.text_valid)[text].nonzero()[:, 0].tolist()
    # A tokenizer's marks of where words begin become blanks, or nothing.
    tokens = [e.words[text][place] for place in valid]
    words = [piece.text for piece in pieces(tokens)]
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
