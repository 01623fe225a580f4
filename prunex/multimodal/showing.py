"""Explanations of text and image as pictures: what of them is drawn, and on what."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prunex.errors import PrunexError
from prunex.multimodal.words import pieces
from prunex.pictures import (
    Detection,
    boxes_over,
    colored_words,
    contact_sheet,
    detection_sheet,
    relevance_bars,
    resized,
)
from prunex.pictures.arrays import Picture, as_pictures, stretched
from prunex.pictures.sheet import Column, compose, heading_of, stacked

if TYPE_CHECKING:
    from prunex.multimodal.explanation import MultimodalExplanation, Query

MOST = 12  # object queries of an image that are drawn
_SQUEEZED = 1.15  # ratio of two shapes from which a map may lie elsewhere
Explanations = Mapping[str, "MultimodalExplanation"]


def show(e: MultimodalExplanation, images: Any, words: Any) -> Image.Image:
    """What :meth:`MultimodalExplanation.show` gives."""
    pictures, texts = pictures_of(e, images), check_words(e, words)
    samples = [sample_sheet({e.method: e}, number, picture, texts) for number, picture in enumerate(pictures)]
    return Image.fromarray(stacked(samples))


def sample_sheet(
    explanations: Explanations,
    sample: int,
    picture: Picture | None,
    words: Sequence[Sequence[str]] | None = None,
    heading: Sequence[str] = (),
) -> Picture:
    """One sample by one or several methods, uint8 [height, width, 3].

    Args:
        explanations: By method, of one model and the same inputs.
        sample: Its number in the batch.
        picture: uint8 [H, W, 3], what its map lies over; None where there is none.
        words: The tokens of each text in the inputs; None for numbers.
        heading: Lines above everything.
    """
    e = next(iter(explanations.values()))
    if e.queries is not None:
        return _detector(explanations, sample, picture, words, heading)
    parts: list[Picture] = []
    for column in range(1 if e.target.ndim == 1 else e.target.shape[1]):
        place = (sample,) if e.target.ndim == 1 else (sample, column)
        label = e.labels[sample] if e.target.ndim == 1 else e.labels[sample][column]
        lines = [*heading, f"{label} · score {float(e.scores[place]):.3g}"]
        parts.append(_image(explanations, place, picture, lines))
        for method, each in explanations.items():
            if each.text is not None:
                parts.append(_text(each.text[place], each, int(each.texts[place]), words, f"text: {method}"))
    return stacked(parts)


def _image(explanations: Explanations, place: tuple[int, ...], picture: Picture | None, lines: list[str]) -> Picture:
    """Relevance of the image's cells or boxes by all methods."""
    e, sample = next(iter(explanations.values())), place[0]
    if picture is not None and e.grid is not None:
        maps = {method: map_of(each, place)[None] for method, each in explanations.items()}
        return contact_sheet(picture[None], maps, heading=lines)
    valid = e.image_valid[sample].nonzero()[:, 0].tolist()
    rows = {method: each.image[place][valid].float().cpu().numpy() for method, each in explanations.items()}
    names = [str(number) for number in valid]
    if picture is not None and e.boxes is not None:
        boxes = e.boxes[sample][valid].float().cpu().numpy()
        # Lines need more pixels than cells do.
        large = resized(picture, 320)
        columns = [Column(method, boxes_over(large, boxes, row, names)[None]) for method, row in rows.items()]
        key = ("the brighter, the more relevant: from 0 to each picture's largest value",)
        return stacked([heading_of(lines), *(compose([each], [()], key=key) for each in columns)])
    one, many = ("cell", "cells") if e.grid is not None else ("box", "boxes")
    named = [f"{one} {name}" for name in names]
    return stacked([heading_of(lines), *(relevance_bars(named, row, f"{many}: {m}") for m, row in rows.items())])


def _detector(
    explanations: Explanations,
    sample: int,
    picture: Picture | None,
    words: Sequence[Sequence[str]] | None,
    heading: Sequence[str],
) -> Picture:
    """Every explained object query of one image, the most probable first."""
    e = next(iter(explanations.values()))
    queries = sorted((q for q in e.queries or () if q.image == sample), key=lambda q: -q.probability)
    drawn = queries[:MOST]
    lines = [*heading, "1 object query explained" if len(queries) == 1 else f"{len(queries)} object queries explained"]
    if len(queries) > MOST:
        lines[-1] += f", the {MOST} most probable drawn"
    if picture is None:
        raise PrunexError("a detector's maps lie over its image: give images=")
    if not drawn:
        columns = [Column("image\nno object above the threshold", resized(picture, 224)[None])]
        return stacked([heading_of(lines), compose(columns, [()])])
    detections = [_detection(explanations, each) for each in drawn]
    parts = [heading_of(lines), detection_sheet(picture, detections)]
    seen: set[int] = set()
    for each in drawn:
        # Texts are short and object queries many: of each text the one that it fits best.
        if each.text is None or each.text_number in seen:
            continue
        seen.add(each.text_number)
        for method, other in explanations.items():
            row: Any = other.same(each).text
            parts.append(_text(row, other, each.text_number, words, f"text of query {each.query}: {method}"))
    return stacked(parts)


def _detection(explanations: Explanations, query: Query) -> Detection:
    same = {method: e.same(query) for method, e in explanations.items()}
    return Detection(
        label=query.label,
        note=f"{query.probability:.0%}\nquery {query.query}",
        box=corners(query.box).tolist(),
        maps={method: each.map.float().cpu().numpy() for method, each in same.items()},
        masks={method: each.mask.cpu().numpy() for method, each in same.items()},
    )


def _text(
    row: Tensor, e: MultimodalExplanation, text: int, words: Sequence[Sequence[str]] | None, title: str
) -> Picture:
    """Relevance of one text's tokens, without padding."""
    valid = torch.as_tensor(e.text_valid)[text].nonzero()[:, 0].tolist()
    tokens = [str(place) for place in valid] if words is None else [words[text][place] for place in valid]
    read = pieces(tokens)
    return colored_words(
        [piece.text for piece in read],
        row[valid].float().cpu().numpy(),
        [piece.mark for piece in read],
        [piece.joined for piece in read],
        title if words is not None else f"{title} (words are not known)",
    )


def map_of(e: MultimodalExplanation, place: tuple[int, ...]) -> NDArray[np.float32]:
    """The cells [h, w] that lie on a sample's image, NaN where the model did not look; padding is cut off."""
    if e.grid is None:
        raise PrunexError("an image that is a list of boxes has no map of cells: read image and boxes")
    valid = e.image_valid[place[0]].view(e.grid)
    # Patches inside may have been left out, so the last one that was looked at says where the image ends.
    tall, wide = (int(valid.any(axis).nonzero().max()) + 1 for axis in (1, 0))
    cells = e.image[place].view(e.grid).float().masked_fill(~valid, math.nan)
    return cells[:tall, :wide].cpu().numpy()


def corners(box: Tensor) -> Tensor:
    """A box [4] of centre, width and height as its corners: x and y of the upper left, then of the lower right."""
    x, y, wide, tall = box.float().cpu().unbind()
    return torch.stack([x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2])


def check_words(e: MultimodalExplanation, words: Any) -> Sequence[Sequence[str]] | None:
    """The tokens of each text; those of the explanation where none are given."""
    if words is None or e.text_valid is None:
        return e.words
    # Of a single text its tokens alone will do.
    texts = [words] if len(e.text_valid) == 1 and words and isinstance(words[0], str) else list(words)
    most = [int(valid.nonzero().max()) + 1 for valid in e.text_valid]
    short = [n for n, (text, count) in enumerate(zip(texts, most, strict=False)) if len(text) < count]
    if len(texts) != len(most) or short:
        came = f"{len(texts)} texts" if not short else f"{len(texts[short[0]])} words in text {short[0]}"
        raise PrunexError(
            f"words hold {came}: give the tokens of each of the {len(most)} texts in the inputs, of lengths {most[:8]}"
        )
    return texts


def pictures_of(e: MultimodalExplanation, images: Any) -> list[Picture | None]:
    """One picture a sample, uint8 [H, W, 3], of the whole image and nothing else; None where there is none."""
    count = len(e.image)
    if images is None:
        if e.pictures is None or e.sizes is None:
            return [None] * count
        return [stretched(p[None, :, :tall, :wide])[0] for p, (tall, wide) in zip(e.pictures, e.sizes, strict=True)]
    single = isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3
    given = [images] if single else list(images)
    if len(given) != count:
        raise PrunexError(f"images are {len(given)}: give those that were explained, {count} of them")
    pictures = [_picture(each) for each in given]
    for picture, size in zip(pictures, e.sizes or [], strict=False):
        ratio = (picture.shape[0] / picture.shape[1]) / (size[0] / size[1])
        if max(ratio, 1 / ratio) > _SQUEEZED:
            warnings.warn(
                f"an image has {picture.shape[0]} x {picture.shape[1]} pixels, and the model saw {size[0]} x {size[1]}"
                ": its map is drawn as if it had been squeezed; if it was cropped, leave images out",
                stacklevel=4,
            )
            break
    return [*pictures]


def _picture(image: Any) -> Picture:
    """Anything that is one image as uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB")).copy()
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise PrunexError(f"an image has shape {list(image.shape)}: give float [C, H, W] of 1 or 3 channels")
        return stretched(image[None])[0]
    return as_pictures(image, 3, "an image")
