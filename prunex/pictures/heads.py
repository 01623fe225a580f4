"""Heads that explain themselves: what concepts add to classes, and where attributes are."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps

from prunex.errors import PrunexError
from prunex.pictures.arrays import Floats, Picture, as_grids, as_numpy
from prunex.pictures.mosaic import Scenes, class_name
from prunex.pictures.overlay import overlay
from prunex.pictures.sheet import GAP, INK, NOTE, SIGNED, Sheet, fitted, titled, wrapped

FOR, AGAINST = ((np.array(colormaps[SIGNED](place)[:3]) * 255).round().astype(np.uint8) for place in (0.86, 0.14))
_SHOWN = 5  # bars of an image
_MOST = (30, 30)  # concepts and classes of a table
_COLUMNS = 10  # attributes drawn
_BAR = 130  # longest bar in pixels


def concept_contributions(
    images: Any,
    contributions: Any,
    concepts: Sequence[str],
    targets: Any,
    maps: Any = None,
    labels: Any = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    side: int = 112,
    effects: Any = None,
) -> Picture:
    """What concepts add to class scores: a table of both on the left, and image by image on the right.

    The table has the ``effects``, else means over the images, in which concepts that none of them has look like ones
    without effect; red where a concept speaks for a class and blue where against it; of many, the concepts and classes
    with the largest values. Beside each image stand the concepts that add most to its target's
    score, all on one scale, and where concepts have a place a map of what they add there, each on its own scale.

    Args:
        images: uint8 [M, H, W, 3].
        contributions: Finite numbers [M, C, classes], what each concept adds to each score.
        concepts: Names of the concepts.
        targets: The class that each image is explained for, the predicted one, integers [M].
        maps: Signed numbers [M, gh, gw], what is added to the target's score patch by patch; None: nothing has a place.
        labels: True classes, integers [M].
        class_names: Names of the classes; numbers are shown without them.
        title: A line above everything.
        side: Wanted side of an image, in pixels; see `resized`.
        effects: Finite numbers [C, classes], what each concept adds to each score where all attention is on it.

    Returns:
        uint8 [height, width, 3].

    Raises:
        PrunexError: Arrays or names that do not fit each other, values that are not finite.

    >>> image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    >>> concept_contributions(image, np.ones((1, 2, 3)), ["loop", "bar"], [0]).dtype
    dtype('uint8')
    """
    scenes = Scenes(images, labels, targets, class_names, None, side)
    values = _contributions(contributions, scenes.count, len(concepts), "concepts")
    chosen = _targets(scenes, values.shape[2])
    names = [str(name) for name in concepts]
    drawn = None
    if maps is not None:
        drawn = overlay(scenes.cells, as_grids(maps, (scenes.count,), "maps", dtype=float), signed=True)
    if effects is None:
        note = f"what a concept adds to a score, mean over {scenes.count} image{'s' if scenes.count > 1 else ''}"
        table = _table(values.mean(0), names, class_names, note)
    else:
        full = _contributions(as_numpy(effects)[None], 1, len(concepts), "concepts")[0]
        if full.shape != values.shape[1:]:
            raise PrunexError(f"effects of shape {full.shape} do not fit contributions: give {values.shape[1:]}")
        table = _table(full, names, class_names, "what a concept adds to a score where all attention is on it")
    tall, wide = scenes.cells.shape[1:3]
    named = min(130, max(44, round(7.4 * max(map(len, names)))))
    block = wide * (1 if drawn is None else 2) + (0 if drawn is None else 4) + 8 + named + _BAR + 54
    across = 1 if scenes.count <= 3 else 2
    high = 20 + max(tall, 20 * min(_SHOWN, len(names))) + 12
    top, left = GAP + (30 if title else 4), 2 * GAP + table.shape[1] + 20
    down = -(-scenes.count // across)
    keys = ["bars: what the strongest concepts add to the score of the predicted class, one scale for all images"]
    if drawn is not None:
        keys.append("maps: red patches speak for it, blue ones against it, each map on its own scale")
    width = left + across * (block + 2 * GAP)
    lines = wrapped(" · ".join(keys), width - left)
    height = max(top + table.shape[0], top + down * high + 15 * len(lines)) + GAP
    sheet = Sheet(titled(width, title), height)
    sheet.head(title)
    sheet.put(GAP, top, table)
    # Chosen first, since the bars of all images share one scale.
    strongest = [np.argsort(-np.abs(values[i, :, k]), kind="stable")[:_SHOWN] for i, k in enumerate(chosen)]
    shown = [values[i, order, k] for i, (order, k) in enumerate(zip(strongest, chosen, strict=True))]
    for number, row in enumerate(scenes.rows()):
        x, y = left + number % across * (block + 2 * GAP), top + number // across * high
        _caption(sheet, x, y + 14, row, block)
        sheet.put(x, y + 20, scenes.cells[number])
        x += wide
        if drawn is not None:
            sheet.put(x + 4, y + 20, drawn[number])
            x += wide + 4
        _bars(sheet, x + 8, y + 20, [names[c] for c in strongest[number]], shown[number], named, np.concatenate(shown))
    sheet.notes(left, top + down * high + 10, lines)
    return sheet.drawn()


def _contributions(values: Any, count: int, names: int, what: str) -> Floats:
    """Checked [M, names, classes]."""
    numbers = as_numpy(values)
    fits = numbers.ndim == 3 and 0 not in numbers.shape and numbers.shape[:2] == (count, names)
    if not fits or not (np.issubdtype(numbers.dtype, np.number) and np.isfinite(numbers).all()):
        raise PrunexError(
            f"contributions of shape {numbers.shape} for {count} images and {names} {what} cannot be drawn: give "
            f"finite numbers [images, {what}, classes]"
        )
    return numbers.astype(float)


def _targets(scenes: Scenes, classes: int) -> list[int]:
    """The classes that images are explained for, each one of those that have scores."""
    chosen = scenes.predicted
    if chosen is None or not all(0 <= k < classes for k in chosen):
        raise PrunexError(f"targets={chosen} are not allowed: give one class of 0..{classes - 1} an image")
    return chosen


def _caption(sheet: Sheet, x: float, y: float, words: Sequence[tuple[str, str]], width: float) -> None:
    """An image's class in bold, and behind it what was predicted."""
    for number, (text, color) in enumerate(words):
        text = fitted(text, width / len(words), 12, 0.62)
        sheet.write(x, y, text, 12, color, bold=not number)
        x += 8.2 * len(text) + 8


def _signed(value: float, largest: float) -> str:
    """A number with as many digits as the largest one beside it needs."""
    places = 2 - math.floor(math.log10(largest)) if largest > 0 else 2
    return f"{value:+.{min(max(places, 0), 6)}f}".replace("-", "−")


def _bars(sheet: Sheet, x: int, y: int, names: list[str], values: Floats, named: int, every: Floats) -> None:
    """Names and bars to the right and left of 0; ``every`` has all values on the same scale."""
    low, high = min(0.0, float(every.min())), max(0.0, float(every.max()))
    unit = _BAR / ((high - low) or 1.0)
    zero, largest = x + named + 6 - low * unit, float(np.abs(every).max())
    for row, (name, value) in enumerate(zip(names, values.tolist(), strict=True)):
        top = y + 20 * row
        sheet.write(x + named, top + 13, fitted(name, named, 12, 0.6), 12, anchor="right")
        long = max(1.0, abs(value) * unit)
        sheet.fill(zero if value >= 0 else zero - long, top + 3, long, 13, FOR if value >= 0 else AGAINST)
        end = zero + 4 + (long if value >= 0 else 0)
        sheet.write(end, top + 13, _signed(value, largest), NOTE, INK)
    sheet.fill(zero - 1, y, 1, 20 * len(names), (90, 98, 106))


def _table(means: Floats, concepts: list[str], class_names: Sequence[str] | None, note: str) -> Picture:
    """Cells of concepts by classes with their names, and the scale of their colours."""
    strength = np.abs(means)
    # The strongest of many, in the order in which they came.
    rows, columns = (np.sort(np.argsort(-strength.max(1 - axis), kind="stable")[: _MOST[axis]]) for axis in (0, 1))
    classes = [class_name(int(k), class_names) for k in columns]
    named = [concepts[c] for c in rows]
    cell, tall = max(16, min(64, 320 // len(classes))), max(18, min(28, 560 // len(named)))
    left = GAP + min(170, max(50, round(7.4 * max(map(len, named)))))
    upwards = max(map(len, classes)) * 7.4 > cell - 2
    top = 8 + (min(140, round(7.4 * max(map(len, classes)))) if upwards else 16)
    across, down = cell * len(classes), tall * len(named)
    hidden = [f"{means.shape[0] - len(rows)} more concepts"] if len(rows) < means.shape[0] else []
    hidden += [f"{means.shape[1] - len(columns)} more classes"] if len(columns) < means.shape[1] else []
    notes = [note]
    notes += [f"{' and '.join(hidden)} not shown"] if hidden else []
    width = max(left + across + GAP, 300)
    lines = [line for note in notes for line in wrapped(note, width - GAP)]
    sheet = Sheet(width, top + down + 46 + 15 * len(lines))
    largest = float(strength.max()) or 1.0
    colours = colormaps[SIGNED]((means[np.ix_(rows, columns)] / largest + 1) / 2)[..., :3]
    cells = (colours * 255).round().astype(np.uint8).repeat(tall, 0).repeat(cell, 1)
    cells[::tall], cells[:, ::cell] = 255, 255
    sheet.put(left, top, cells)
    for number, name in enumerate(classes):
        name = fitted(name, 140 if upwards else cell, 12, 0.6)
        sheet.write(left + cell * (number + 0.5), top - 5, name, 12, anchor="center", upwards=upwards)
    for number, name in enumerate(named):
        sheet.write(left - 6, top + tall * (number + 0.5) + 4, fitted(name, left - 6, 12, 0.6), 12, anchor="right")
    sheet.scale(left, top + down + 8, max(200, min(across, 240)), largest)
    sheet.notes(GAP, top + down + 54, lines)
    return sheet.drawn()


def attribute_rows(
    images: Any,
    attention: Any,
    contributions: Any,
    targets: Any,
    labels: Any = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    side: int = 96,
) -> Picture:
    """Where attributes are and what they add: one row an image, the image first, then one map an attribute.

    Above each map stands what the attribute adds to the target's score, red where it speaks for it and blue where
    against it. Attention always lies somewhere, so that a map is the paler the less its attribute adds. Attributes have
    numbers and no names: nobody knows what they are of. Of many, those that add most on average are drawn.

    Args:
        images: uint8 [M, H, W, 3].
        attention: Numbers [M, K, gh, gw], at least 0; each map has its own scale from 0.
        contributions: Finite numbers [M, K, classes].
        targets: The class that each image is explained for, the predicted one, integers [M].
        labels: True classes, integers [M].
        class_names: Names of the classes; numbers are shown without them.
        title: A line above everything.
        side: Wanted side of a cell, in pixels; see `resized`.

    Raises:
        PrunexError: Arrays that do not fit each other, values that are not finite.

    >>> image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    >>> attribute_rows(image, np.ones((1, 4, 8, 8)), np.ones((1, 4, 3)), [2]).dtype
    dtype('uint8')
    """
    scenes = Scenes(images, labels, targets, class_names, None, side)
    count = as_numpy(attention).shape[1] if as_numpy(attention).ndim == 4 else 0
    if not count:
        raise PrunexError(f"attention of shape {as_numpy(attention).shape} cannot be drawn: give [images, K, gh, gw]")
    grids = as_grids(attention, (scenes.count, count), "attention", dtype=float)
    every = _contributions(contributions, scenes.count, count, "attributes")
    chosen = _targets(scenes, every.shape[2])
    values = np.stack([every[i, :, k] for i, k in enumerate(chosen)])  # [M, K]
    columns = np.sort(np.argsort(-np.abs(values).mean(0), kind="stable")[:_COLUMNS]).tolist()
    tall, wide = scenes.cells.shape[1:3]
    rows = scenes.rows()
    left = 2 * GAP + min(150, max((round(7.8 * len(text)) for row in rows for text, _ in row), default=0))
    top = GAP + (28 if title else 0) + 18
    width = left + (1 + len(columns)) * (wide + GAP)
    key = ["number: what the attribute adds to the score of the predicted class, red for it, blue against it"]
    key += ["bright: where the attribute attends to, each map on its own scale, paler the less it adds"]
    if hidden := count - len(columns):
        key.append(f"{hidden} more attribute{'s' if hidden > 1 else ''} that add less not shown")
    lines = wrapped(" · ".join(key), width - 2 * GAP)
    high = tall + 24
    sheet = Sheet(titled(width, title), top + scenes.count * high + 15 * len(lines) + 6)
    sheet.head(title)
    for number, name in enumerate(["input", *(f"attribute {m + 1}" for m in columns)]):
        sheet.write(left + number * (wide + GAP), top - 6, fitted(name, wide + 4, 12, 0.6), 12, bold=True)
    largest = float(np.abs(values).max())
    for row in range(scenes.count):
        y = top + row * high + 18
        sheet.put(left, y, scenes.cells[row])
        for index, (text, color) in enumerate(rows[row]):
            place = y + tall / 2 + 5 + 18 * (index - (len(rows[row]) - 1) / 2)
            sheet.write(left - GAP, place, fitted(text, left - GAP), color=color, bold=not index, anchor="right")
        for number, m in enumerate(columns, start=1):
            value, x = values[row, m], left + number * (wide + GAP)
            # By the root, so that what adds little is pale and still to be seen.
            strong = 0.9 * max(0.12, abs(value) / (largest or 1.0)) ** 0.5
            sheet.put(x, y, overlay(scenes.cells[row], grids[row, m], alpha=strong, signed=False, floor=0.0))
            rgb = "#{:02x}{:02x}{:02x}".format(*(FOR if value >= 0 else AGAINST))
            sheet.write(x, y - 5, _signed(value, largest), 13, rgb, bold=True)
    sheet.notes(GAP, sheet.height - 8 - 15 * (len(lines) - 1), lines)
    return sheet.drawn()
