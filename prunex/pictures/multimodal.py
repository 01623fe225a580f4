"""Text and image explained together: words coloured, boxes over an image or as bars, detections one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

from prunex.errors import PrunexError
from prunex.pictures.arrays import Bools, Floats, Picture, as_numpy, as_pictures, resized
from prunex.pictures.overlay import DARKENED, OBJECT, outline, overlay
from prunex.pictures.sheet import FAINT, GAP, INK, NOTE, Column, Sheet, compose, fitted, stacked

BOX = (255, 255, 255)  # lines of a detected object's box
_WORDS, _MARKS = colormaps["Oranges"], colormaps["Greys"]
_STRONGEST, _MARKED = 0.75, 0.35  # places on those colormaps, above which words could not be read
_SIZE, _LINE, _SPACE = 15, 30, 7  # letters, lines and the gap between words in pixels
_NAMED = 3  # boxes that have their number written on them
_FAINTEST, _PALE = 0.1, (128, 128, 128)  # share of the largest value below which a box is pale


@dataclass(frozen=True)
class Detection:
    """One detected object and what its detection rests on, by method.

    Attributes:
        label: Its class.
        note: What else is written above it.
        box: x and y of the upper left and of the lower right corner, as shares of the image.
        maps: Relevance, numbers [h, w] over the whole image, for each method.
        masks: Booleans [H, W] over the whole image, for each method.
    """

    label: str
    note: str
    box: Sequence[float]
    maps: Mapping[str, Any]
    masks: Mapping[str, Any]


def colored_words(
    words: Sequence[str],
    relevance: Any,
    marks: Sequence[bool] | None = None,
    joined: Sequence[bool] | None = None,
    title: str = "",
    width: int = 600,
) -> Picture:
    """A text whose words stand on a colour as strong as their relevance, in as many lines as it needs.

    The scale goes from 0 to the largest value of a word, which is written at its end. Marks, such as the tokens that
    begin and end a text, are grey on the same scale, and no word's colour depends on them.

    Args:
        words: T words or parts of words, without padding.
        relevance: Numbers [T]; negative ones and those that are not finite get no colour.
        marks: Which of them are no words.
        joined: Which of them go on the word before.
        title: A line above, in bold.
        width: In pixels.

    Returns:
        uint8 [height, width, 3], on white.

    Raises:
        PrunexError: For numbers of another length than the words, or no word.

    >>> colored_words(["a", "cat"], [0.1, 0.9], width=200).shape[1:]
    (200, 3)
    """
    count = len(words)
    values = _numbers(relevance, count, "words")
    marked = np.array([False] * count if marks is None else list(marks), dtype=bool)
    glued = [False] * count if joined is None else list(joined)
    if not count or len(marked) != count or len(glued) != count:
        raise PrunexError(
            f"words are {count}, marks {len(marked)}, joined {len(glued)}: give at least one, and as many"
        )
    # Words have the scale to themselves: a text's end often has the most of all.
    top = _largest(values[~marked] if not marked.all() else values)
    shares = (values / top).clip(0, 1) if top > 0 else np.zeros(count)
    sheet = Sheet(width, 8)
    widths = [min(sheet.measured(word, _SIZE) + 6, width - 2 * GAP) for word in words]
    places = _wrapped(widths, glued, width)
    head = 24 if title else 4
    sheet = Sheet(width, head + _LINE * (places[-1][1] + 1) + 28)
    if title:
        sheet.write(GAP, 18, fitted(title, width - 2 * GAP), bold=True)
    for word, wide, (x, line), share, mark in zip(words, widths, places, shares, marked, strict=True):
        y = head + _LINE * line
        color = _MARKS(share * _MARKED) if mark else _WORDS(share * _STRONGEST)
        # The end of a long word that no line holds is cut off.
        sheet.fill(x, y, round(wide), _LINE - 6, _rgb(color))
        shown = fitted(word, wide, _SIZE, 0.55) if wide >= width - 2 * GAP else word
        sheet.write(x + 3, y + 17, shown, _SIZE, FAINT if mark else INK)
    _scale(sheet, GAP, sheet.height - 20, top, bool(marked.any()))
    return sheet.drawn()


def boxes_over(image: Any, boxes: Any, relevance: Any, names: Sequence[str] | None = None) -> Picture:
    """An image, greyed, with boxes whose lines and light are the stronger the more relevant they are.

    The scale goes from 0 to the largest value; the three boxes with the most have their names on them, and those with
    less than a tenth of it a faint line.

    Args:
        image: uint8 [H, W, 3], and so is the answer.
        boxes: Numbers [n, 4]: x and y of two opposite corners, as shares of the image's width and height.
        relevance: Numbers [n].
        names: What the boxes are called; their numbers when not given.

    Raises:
        PrunexError: For boxes of another number or shape, or that are no shares.

    >>> boxes_over(np.zeros((60, 80, 3), dtype=np.uint8), [[0.1, 0.1, 0.6, 0.9]], [1.0]).shape
    (60, 80, 3)
    """
    picture = as_pictures(image, 3, "image")
    height, width = picture.shape[:2]
    corners = _corners(boxes)
    values = _numbers(relevance, len(corners), "boxes")
    top = _largest(values)
    shares = (values / top).clip(0, 1) if top > 0 else np.zeros(len(values))
    places = [_on_pixels(box, width, height) for box in corners]
    order = np.argsort(shares, kind="stable")
    light = np.zeros((height, width))
    for number in order:
        x0, y0, x1, y1 = places[number]
        light[y0:y1, x0:x1] = np.maximum(light[y0:y1, x0:x1], shares[number])
    # The light of a box is faint: what the image shows must stay readable inside.
    drawn = overlay(picture, light, alpha=0.3, floor=0.0) if light.any() else (DARKENED * picture).astype(np.uint8)
    thickest = max(2, max(height, width) / 90)
    for number in order:
        # Dozens of lines that mean next to nothing would hide the few that mean something.
        if shares[number] < _FAINTEST:
            _frame(drawn, places[number], _PALE, 1, edged=False)
        else:
            color = _rgb(colormaps["inferno"](0.3 + 0.7 * shares[number]))
            _frame(drawn, places[number], color, max(1, round(thickest * shares[number])))
    sheet = Sheet(width, height)
    sheet.put(0, 0, drawn)
    for number in order[::-1][:_NAMED]:
        if shares[number] > 0:
            x0, y0 = places[number][:2]
            x, y = min(x0 + 8, max(0, width - 18)), min(y0 + 20, height - 6)
            sheet.write(x, y, str(number) if names is None else names[number], NOTE, boxed=True)
    return sheet.drawn()


def relevance_bars(names: Sequence[str], relevance: Any, title: str = "", width: int = 600, most: int = 12) -> Picture:
    """The most relevant of some things as bars, the longest first, with their numbers.

    Args:
        names: n names.
        relevance: Numbers [n].
        title: A line above, in bold.
        width: In pixels.
        most: How many have a bar; how many others there are is said.

    Raises:
        PrunexError: For numbers of another length than the names, or no name.

    >>> relevance_bars(["box 0", "box 1"], [0.2, 0.7]).shape[1:]
    (600, 3)
    """
    values = _numbers(relevance, len(names), "names")
    if not len(names):
        raise PrunexError("there is nothing to draw a bar for: give at least one name")
    order = np.argsort(-values, kind="stable")[:most]
    top, head, left = _largest(values), 26 if title else 6, 90
    rest = len(values) - len(order)
    sheet = Sheet(width, head + 22 * len(order) + (20 if rest else 6))
    if title:
        sheet.write(GAP, 18, fitted(title, width - 2 * GAP), bold=True)
    for row, number in enumerate(order):
        y, share = head + 22 * row, max(0.0, values[number] / top) if top > 0 else 0.0
        sheet.write(left - GAP, y + 14, fitted(names[number], left - GAP, letter=0.55), anchor="right")
        end = left + round(share * (width - left - 80))
        sheet.fill(left, y + 2, max(end - left, 1), 16, _rgb(_WORDS(0.25 + 0.5 * share)))
        sheet.write(end + 6, y + 14, f"{values[number]:.3g}", NOTE, FAINT)
    if rest:
        sheet.write(left, sheet.height - 6, f"and {rest} with less", NOTE, FAINT)
    return sheet.drawn()


def detection_sheet(image: Any, detections: Sequence[Detection], side: int = 224, across: int = 4) -> Picture:
    """What each detection of an image rests on: its map over the image, its box, and the outline of its map's mask.

    With one method the detections stand side by side, with several each is a row. Every map has its own scale, up to
    its largest value.

    Args:
        image: uint8 [H, W, 3].
        detections: At least one, all by the same methods.
        side: Wanted size of a tile in pixels.
        across: Tiles in a row, where there is one method.

    Raises:
        PrunexError: No detection, or one without the maps of the others.

    >>> cells = np.eye(4)
    >>> cat = Detection("cat", "97 %", (0.1, 0.1, 0.5, 0.5), {"rollout": cells}, {"rollout": cells > 0})
    >>> detection_sheet(np.zeros((64, 64, 3), dtype=np.uint8), [cat]).dtype
    dtype('uint8')
    """
    picture = resized(as_pictures(image, 3, "image"), side)
    methods = list(detections[0].maps) if detections else []
    if not methods or any(list(d.maps) != methods or list(d.masks) != methods for d in detections):
        raise PrunexError("detections are drawn from the maps and masks of the same methods: give at least one of each")
    key = ("white: the box", "cyan: the map's mask", "each tile from 0 to its largest value")
    plain = [_framed(picture, detection) for detection in detections]
    if len(methods) > 1:
        columns = [Column("image", np.stack(plain))]
        for method in methods:
            columns.append(Column(method, np.stack([_detected(picture, d, method) for d in detections])))
        return compose(columns, [_caption(detection) for detection in detections], key=key)
    tiles = [Column("image\n" + methods[0], picture[None])]
    for detection in detections:
        words = f"{detection.label}\n{detection.note.replace(chr(10), ' · ')}"
        tiles.append(Column(words, _detected(picture, detection, methods[0])[None]))
    parts = [tiles[start : start + across] for start in range(0, len(tiles), across)]
    return stacked([compose(part, [()], key=key if part is parts[-1] else ()) for part in parts])


def _caption(detection: Detection) -> list[tuple[str, str]]:
    """What stands beside a detection's row: its class, and its note in faint lines."""
    return [(detection.label, INK), *((line, FAINT) for line in detection.note.split("\n"))]


def _detected(picture: Picture, detection: Detection, method: str) -> Picture:
    """One tile: the map, the outline of its mask, the box above both."""
    drawn = overlay(picture, detection.maps[method], signed=False, floor=0.0)
    mask = as_numpy(detection.masks[method])
    drawn = outline(drawn, mask, OBJECT) if mask.any() else drawn
    framed = _framed(drawn, detection)
    if (as_numpy(detection.maps[method]) > 0).any():
        return framed
    sheet = Sheet(framed.shape[1], framed.shape[0])
    sheet.put(0, 0, framed)
    sheet.write(6, 17, "zero everywhere", NOTE, boxed=True)
    return sheet.drawn()


def _framed(picture: Picture, detection: Detection) -> Picture:
    framed = picture.copy()
    height, width = framed.shape[:2]
    thick = max(1, round(max(height, width) / 140))
    _frame(framed, _on_pixels(_corners([detection.box])[0], width, height), BOX, thick)
    return framed


def _numbers(relevance: Any, count: int, of: str) -> Floats:
    """Checked numbers [count]; what is not finite is 0."""
    values = as_numpy(relevance)
    if values.shape != (count,) or not (np.issubdtype(values.dtype, np.number) or values.dtype == np.bool_):
        raise PrunexError(f"relevance of shape {list(values.shape)} does not fit {count} {of}: give a number for each")
    return np.nan_to_num(values.astype(float), nan=0.0, posinf=0.0, neginf=0.0)


def _largest(values: Floats) -> float:
    return float(values.max(initial=0.0))


def _corners(boxes: Any) -> Floats:
    """Checked boxes [n, 4], the upper left corner first."""
    corners = as_numpy(boxes).astype(float)
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise PrunexError(f"boxes of shape {list(corners.shape)} are not allowed: give [n, 4], x and y of two corners")
    # Detectors go a little beyond the image.
    if not np.isfinite(corners).all() or corners.min(initial=0.0) < -1 or corners.max(initial=0.0) > 2:
        raise PrunexError(
            f"boxes from {corners.min():.3g} to {corners.max():.3g} are not allowed: give corners as shares of the "
            "image's width and height"
        )
    low, high = np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])
    return np.concatenate([low, high], 1).clip(0, 1)


def _on_pixels(box: NDArray[Any], width: int, height: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a box of at least one pixel."""
    x0, y0 = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
    return x0, y0, max(x0 + 1, round(box[2] * width)), max(y0 + 1, round(box[3] * height))


def _frame(
    picture: Picture, place: tuple[int, int, int, int], color: tuple[int, int, int], thick: int, edged: bool = True
) -> None:
    """Draw the lines of a box inside it, with a dark line around them that keeps them visible."""
    x0, y0, x1, y1 = place
    edge: Bools = np.zeros(picture.shape[:2], dtype=bool)
    edge[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = True
    line = np.zeros_like(edge)
    line[y0:y1, x0:x1] = True
    hole = np.zeros_like(edge)
    hole[y0 + thick : max(y0 + thick, y1 - thick), x0 + thick : max(x0 + thick, x1 - thick)] = True
    if edged:
        picture[edge & ~line] = (20, 20, 20)
    picture[line & ~hole] = color


def _wrapped(widths: Sequence[float], joined: Sequence[bool], width: int) -> list[tuple[int, int]]:
    """Where words of some widths begin, and on which line; a word that goes on another stays with it if it can."""
    places: list[tuple[int, int]] = []
    x, line = float(GAP), 0
    for number, wide in enumerate(widths):
        goes_on = joined[number] and number > 0
        x += _SPACE if number > 0 and not goes_on else 0
        # A word in parts goes to the next line as a whole, unless no line holds it.
        following = next((k for k in range(number + 1, len(joined)) if not joined[k]), len(joined))
        whole = sum(widths[number:following])
        needed = wide if goes_on or whole > width - 2 * GAP else whole
        if number > 0 and x + needed > width - GAP:
            x, line = float(GAP), line + 1
        places.append((round(x), line))
        x += wide
    return places


def _scale(sheet: Sheet, x: int, y: int, top: float, marked: bool) -> None:
    """From 0 to the largest value of a word, and what grey is."""
    strip = _WORDS(np.linspace(0, _STRONGEST, 120))[:, :3]
    sheet.write(x, y + 10, "0", NOTE, FAINT)
    sheet.put(x + 12, y, np.broadcast_to((strip * 255).round().astype(np.uint8), (12, 120, 3)))
    says = f"{top:.3g}, the most of a word" if top > 0 else "no word has any"
    sheet.write(x + 138, y + 10, f"{says}{' · grey: marks of the text' if marked else ''}", NOTE, FAINT)


def _rgb(color: Any) -> tuple[int, int, int]:
    red, green, blue = (round(255 * float(part)) for part in color[:3])
    return red, green, blue
