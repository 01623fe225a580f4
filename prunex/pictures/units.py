"""Heads and MLP channels: how many each block keeps, which class each head serves, and where heads look."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from prunex.errors import PrunexError
from prunex.pictures.arrays import Bools, Floats, Picture, as_grids, as_numpy, as_pictures, resized
from prunex.pictures.curves import COLORS
from prunex.pictures.overlay import overlay
from prunex.pictures.sheet import DPI, FAINT, GAP, INK, NOTE, SIGNED, WRONG, Column, Sheet, compose, fitted, stacked

_KINDS = (("attention heads", COLORS[0]), ("MLP channels", COLORS[1]))
_GONE = "#e3e6e9"
_COUNTABLE = 16  # heads of a block that are drawn one by one
_HATCHED: Any = {"facecolor": "#d4d8dc", "edgecolor": "#a4abb2", "hatch": "////", "linewidth": 0}
_SCALE = 240  # width of the colour bar


def unit_widths(dense: Any, kept: Any, title: str | None = None) -> Picture:
    """What each block keeps of its heads and MLP channels: two bars a block, full colour for what is kept.

    A bar's full height is the dense block, whatever its width; above it stands how many units are kept. Few heads are
    drawn one by one, without telling which they are. The share kept of the whole model stands beside each row.

    ``dense`` and ``kept`` are whole numbers [blocks, 2], heads and MLP channels of each block of the dense model and
    those that are left; 0 where a block has no units of a kind that could be taken out. Numbers of another shape,
    negative ones, or more units kept than there were are refused.

    >>> unit_widths([[6, 1536], [6, 1536]], [[3, 700], [0, 1536]]).shape
    (330, 420, 3)
    """
    whole, left = _counts(dense, "dense"), _counts(kept, "kept")
    if whole.shape != left.shape or (left > whole).any():
        raise PrunexError(
            f"kept units {left.shape} do not fit the dense ones {whole.shape}: give as many blocks, and in none more "
            "units than the dense model has"
        )
    count = len(whole)
    # Deep models get narrower bars, so that all blocks fit on a screen.
    step = 46 if count <= 24 else max(26, 1100 // count)
    sheet = Sheet(max(420, 44 + step * count + 130), 330 + (20 if title else 0))
    top = 44 if title else 24
    room = (sheet.height - top - 40) / 2  # pixels of one row, its numbers included
    for row, (name, color) in enumerate(_KINDS):
        y = top + row * room
        axes = sheet.axes(30, y + 32, step * count, room - 52)
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(0, 1)
        for block in range(count):
            _bar(axes, block, int(whole[block, row]), int(left[block, row]), color, step)
        total, remaining = int(whole[:, row].sum()), int(left[:, row].sum())
        x, middle = 30 + step * count + 12, y + 32 + (room - 52) / 2
        sheet.write(x, middle + 2, f"{remaining / total:.0%}" if total else "none", 22, color, bold=True)
        sheet.write(x, middle + 22, f"of {total:,} {'heads' if row == 0 else 'channels'}", NOTE, FAINT)
        sheet.write(30, y + 3, name, bold=True)
        widths = set(whole[:, row].tolist())
        if len(widths) == 1:
            sheet.write(30 + 9.6 * len(name), y + 3, f"of {max(widths):,} in each block", NOTE, FAINT)
    for block in range(count):
        if count <= 40 or block % 5 == 0:
            sheet.write(30 + step * (block + 0.5), sheet.height - 28, str(block), NOTE, FAINT, anchor="center")
    sheet.write(30, sheet.height - 9, "block · full height: the dense model · colour: kept", NOTE, FAINT)
    sheet.head(title)
    return sheet.drawn()


def _counts(values: Any, name: str) -> Any:
    # Counts that were averaged or normalised on the way would draw bars that mean nothing.
    numbers = as_numpy(values)
    wrong = numbers.ndim != 2 or numbers.shape[1:] != (2,) or not len(numbers)
    if wrong or not np.issubdtype(numbers.dtype, np.integer) or (numbers < 0).any():
        raise PrunexError(
            f"{name} units of shape {numbers.shape} and type {numbers.dtype} cannot be drawn: give whole numbers "
            "[blocks, 2], heads and MLP channels"
        )
    return numbers


def _bar(axes: Any, block: int, whole: int, left: int, color: str, step: int) -> None:
    """One bar in axes of height 1: the dense block pale, what is kept in colour, and how many above it."""
    low, wide = block - 0.36, 0.72
    number = f"{left:,}" if step >= 40 or left < 1000 else f"{left / 1000:.1f}k"
    words = axes.text(block, 1.04, number if whole else "–", ha="center", va="bottom", clip_on=False)
    words.set(fontsize=NOTE * 72 / DPI, fontfamily="DejaVu Sans", color=INK if left else WRONG)
    words.set_fontweight("bold" if left < whole else "normal")
    if not whole:
        return
    # Few units are countable things, many are an amount.
    if whole <= _COUNTABLE:
        gap = 0.12 / whole
        for unit in range(whole):
            face = color if unit < left else _GONE
            axes.add_patch(Rectangle((low, unit / whole + gap / 2), wide, 1 / whole - gap, facecolor=face, linewidth=0))
        return
    axes.add_patch(Rectangle((low, 0), wide, 1, facecolor=_GONE, linewidth=0))
    axes.add_patch(Rectangle((low, 0), wide, left / whole, facecolor=color, linewidth=0))


def class_heads(
    relevance: Any,
    names: Sequence[str],
    heads: Sequence[str],
    kept: Any = None,
    title: str | None = None,
    most: int = 40,
) -> Picture:
    """Which heads serve which class: a table of classes and heads, red where a head matters more than on average.

    Colours run from minus to plus the largest magnitude among the heads that are kept; the bar below has numbers. Heads
    that were removed are grey and hatched. Of many classes those with the largest values are shown, in their order.

    Args:
        relevance: Numbers [classes, heads]: a head's relevance for a class beyond what head and class have on average.
        names: Names of the classes.
        heads: Names of the columns, ``"block.head"``; a line separates blocks.
        kept: Booleans [heads]; None: all are.
        title: A line above everything.
        most: Rows drawn at most.

    Raises:
        PrunexError: Numbers, names or booleans that do not fit each other, values that are not finite.

    >>> class_heads(np.eye(2), ["cat", "dog"], ["0.0", "0.1"]).dtype
    dtype('uint8')
    """
    values = as_numpy(relevance)
    fits = values.ndim == 2 and 0 not in values.shape and values.shape == (len(names), len(heads))
    if not fits or not (np.issubdtype(values.dtype, np.number) and np.isfinite(values).all()):
        raise PrunexError(
            f"relevance of shape {values.shape} for {len(names)} classes and {len(heads)} heads cannot be drawn: give "
            "finite numbers [classes, heads] and a name for each"
        )
    present: Bools = np.ones(len(heads), dtype=bool) if kept is None else as_numpy(kept).astype(bool)
    if present.shape != (len(heads),):
        raise PrunexError(f"kept of shape {present.shape} does not fit {len(heads)} heads: give one boolean a head")
    if most < 1:
        raise PrunexError(f"most={most!r} is not allowed: draw at least one row")
    values = values.astype(float)
    # A removed head says nothing, and must not pale those that are left.
    strength = np.abs(np.where(present, values, 0))
    # The strongest classes, in the order in which the user knows them.
    rows = np.sort(np.argsort(-strength.max(1), kind="stable")[:most])
    shown, columns = [str(names[row]) for row in rows], [str(head) for head in heads]
    cell = max(14, min(34, 1150 // len(columns)))
    tall = max(18, min(30, 900 // len(rows)))
    left = 2 * GAP + min(190, max(84, round(7.6 * max(map(len, shown)))))
    top = (34 if title else GAP) + 12 + round(7.4 * max(map(len, columns)))  # names of columns are written upwards
    across, down = cell * len(columns), tall * len(rows)
    sheet = Sheet(max(left + across + 2 * GAP, left + _SCALE + 400), top + down + 66)
    largest = float(strength.max())
    _cells(sheet.axes(left, top, across, down), values[rows], columns, present, largest or 1.0)
    for column, name in enumerate(columns):
        color = INK if present[column] else "#9aa2aa"
        sheet.write(left + cell * (column + 0.5), top - 6, name, NOTE, color, anchor="center", upwards=True)
    for row, name in enumerate(shown):
        sheet.write(left - GAP, top + tall * (row + 0.5) + 4, fitted(name, left - GAP, 12, 0.6), 12, anchor="right")
    sheet.head(title)
    sheet.write(left - GAP, top - 6, "block.head", NOTE, FAINT, anchor="right")
    notes = ["and class have on average"]
    if hidden := len(names) - len(rows):
        notes.append(f"{hidden} more class{'es' if hidden > 1 else ''} not shown")
    _scale(sheet, left, top + down + 16, largest, notes, not present.all())
    return sheet.drawn()


def _cells(axes: Any, values: Floats, heads: list[str], kept: Bools, scale: float) -> None:
    """A coloured cell for each class and head; lines between classes, and darker ones between blocks."""
    rows, columns = values.shape
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    colours = colormaps[SIGNED]((values / scale + 1).clip(0, 2) / 2)
    axes.imshow(colours, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest")
    for column in np.flatnonzero(~kept).tolist():
        axes.add_patch(Rectangle((column, 0), 1, rows, **_HATCHED))
    for row in range(1, rows):
        axes.axhline(row, color="white", linewidth=1)
    # Heads of one block belong together; a dark line says where the next begins.
    block = [name.split(".")[0] for name in heads]
    for column in range(1, columns):
        new = block[column] != block[column - 1]
        axes.axvline(column, color=INK if new else "white", linewidth=1.6 if new else 0.6)


def _scale(sheet: Sheet, left: int, y: int, largest: float, notes: list[str], gone: bool) -> None:
    """The colour bar with its numbers, what they are, and what hatching means."""
    sheet.scale(left, y, _SCALE, largest)
    x = left + _SCALE + 26
    sheet.write(x, y + 10, "relevance above (red) or below (blue) what head", NOTE, FAINT)
    sheet.write(x, y + 25, " · ".join(notes), NOTE, FAINT)
    if gone:
        key = sheet.axes(x, y + 31, 20, 11)
        key.set_xlim(0, 1)
        key.set_ylim(0, 1)
        key.add_patch(Rectangle((0, 0), 1, 1, **_HATCHED))
        sheet.write(x + 26, y + 41, "head removed", NOTE, FAINT)


def head_attention(
    images: Any,
    maps: Any,
    titles: Sequence[Sequence[str]],
    names: Sequence[str] | None = None,
    title: str | None = None,
    side: int = 160,
) -> Picture:
    """Where chosen heads look: one row an image, the image first, then one overlay a head under its own caption.

    Args:
        images: uint8 [M, H, W, 3].
        maps: Attention, numbers [M, K, gh, gw]; each map has its own scale from 0, see `overlay`.
        titles: For each image K captions, such as ``"flower: head 4.2"``.
        names: A caption for each image; ``"input"`` without them.
        title: A line above everything.
        side: Wanted side of one cell, in pixels; see `resized`.

    Raises:
        PrunexError: Arrays or captions that do not fit the images.

    >>> picture = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    >>> head_attention(picture, np.ones((1, 2, 8, 8)), [["cat: head 3.0", "cat: head 5.2"]]).dtype
    dtype('uint8')
    """
    cells = resized(as_pictures(images, 4), side)
    count, across = len(cells), as_numpy(maps).shape[1] if as_numpy(maps).ndim == 4 else 0
    if not across:
        raise PrunexError(f"maps of shape {as_numpy(maps).shape} cannot be drawn: give [images, heads, gh, gw]")
    grids = as_grids(maps, (count, across), "maps", dtype=float)
    # Each image has heads of its own, so that captions stand above cells and not above columns.
    captions = [list(map(str, row)) for row in titles]
    if [len(row) for row in captions] != [across] * count or (names is not None and len(names) != count):
        raise PrunexError(
            f"captions for {[len(row) for row in captions]} maps of {len(captions)} images do not fit: give {across} "
            f"for each of {count} images, and one name an image or none"
        )
    rows = []
    for number, cell in enumerate(cells):
        columns = [Column("input" if names is None else str(names[number]), cell[None])]
        for caption, grid in zip(captions[number], grids[number], strict=True):
            columns.append(Column(caption, overlay(cell[None], grid[None], signed=False, floor=0.0)))
        rows.append(compose(columns, [[]]))
    width = rows[0].shape[1]
    above, below = Sheet(width, 26 if title else 0), Sheet(width, 20)
    above.head(title)
    rule = "bright: looked at most by the head, each map on its own scale from 0"
    below.write(GAP, 13, fitted(rule, width, NOTE, 0.55), NOTE, FAINT)
    return stacked([*([above.drawn()] if title else []), *rows, below.drawn()])
