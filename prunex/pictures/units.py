"""Heads and MLP channels: how many each block keeps, which class each head serves, and where heads look."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prunex.errors import PrunexError
from prunex.pictures.arrays import Bools, Floats, Picture, as_grids, as_numpy, as_pictures, resized
from prunex.pictures.curves import COLORS
from prunex.pictures.mosaic import FAINT, GAP, INK, Column, Text, compose, fitted, written
from prunex.pictures.overlay import overlay

_DPI = 64  # a power of two: sizes in inches are exact, so the canvas has the pixels that were asked for
_FONT = "DejaVu Sans"  # comes with matplotlib
_KINDS = (("attention heads", COLORS[0]), ("MLP channels", COLORS[1]))
_GONE = "#e3e6e9"
_COUNTABLE = 16  # heads of a block that are drawn one by one


def unit_widths(dense: Any, kept: Any, title: str | None = None) -> Picture:
    """What each block keeps of its heads and MLP channels: two bars a block, full colour for what is kept.

    A bar's full height is the dense block, whatever its width; above it stands how many units are kept. Few heads are
    drawn one by one, without telling which they are. The share kept of the whole model stands beside each row.

    Args:
        dense: Whole numbers [blocks, 2]: heads and MLP channels of each block of the dense model; 0 where a block has
            no units of a kind that could be taken out.
        kept: Whole numbers [blocks, 2], those that are left.
        title: A line above everything.

    Returns:
        uint8 [height, width, 3].

    Raises:
        PrunexError: Numbers of another shape, negative ones, or more units kept than there were.

    >>> unit_widths([[6, 1536], [6, 1536]], [[3, 700], [0, 1536]]).shape
    (330, 420, 3)
    """
    whole, left = (_counts(values, name) for values, name in ((dense, "dense"), (kept, "kept")))
    if whole.shape != left.shape or (left > whole).any():
        raise PrunexError(
            f"kept units {left.shape} do not fit the dense ones {whole.shape}: give as many blocks, and in none more "
            "units than the dense model has"
        )
    count = len(whole)
    step = 46 if count <= 24 else max(26, 1100 // count)
    side = 130
    width, height = max(420, 44 + step * count + side), 330 + (20 if title else 0)
    figure, canvas = _figure(width, height)
    top = 44 if title else 24
    room = (height - top - 40) / 2  # pixels of one row, its numbers included
    for row, (name, color) in enumerate(_KINDS):
        axes = _axes(figure, (30, top + row * room + 32, step * count, room - 52))
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(0, 1)
        for block in range(count):
            _bar(axes, block, int(whole[block, row]), int(left[block, row]), color, step)
        total, there = int(whole[:, row].sum()), int(left[:, row].sum())
        middle = top + row * room + 32 + (room - 52) / 2
        x = 30 + step * count + 12
        share = f"{there / total:.0%}" if total else "none"
        _write(figure, x, middle + 2, share, size=22, bold=True, color=color)
        _write(figure, x, middle + 22, f"of {total:,} {'heads' if row == 0 else 'channels'}", size=11, color=FAINT)
        each = set(whole[:, row].tolist())
        _write(figure, 30, top + row * room + 3, name, size=13, bold=True)
        if len(each) == 1:
            _write(figure, 30 + 9.6 * len(name), top + row * room + 3, f"of {max(each):,} in each block", 11, FAINT)
    for block in range(count):
        if count <= 40 or block % 5 == 0:
            _write(figure, 30 + step * (block + 0.5), height - 28, str(block), size=11, color=FAINT, anchor="center")
    _write(figure, 30, height - 9, "block · full height: the dense model · colour: kept", size=11, color=FAINT)
    if title:
        _write(figure, GAP, 20, fitted(title, width, 15), size=15, bold=True)
    return _drawn(canvas)


def _counts(values: Any, name: str) -> Any:
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
    number = "–" if not whole else f"{left:,}" if step >= 40 or left < 1000 else f"{left / 1000:.1f}k"
    emphasis = {"color": INK if left else "#c62828", "fontweight": "bold" if left < whole else "normal"}
    axes.text(
        block,
        1.04,
        number,
        ha="center",
        va="bottom",
        fontsize=11 * 72 / _DPI,
        fontfamily=_FONT,
        clip_on=False,
        **emphasis,
    )
    if not whole:
        return
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

    Returns:
        uint8 [height, width, 3].

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
    there: Bools = np.ones(len(heads), dtype=bool) if kept is None else as_numpy(kept).astype(bool)
    if there.shape != (len(heads),):
        raise PrunexError(f"kept of shape {there.shape} does not fit {len(heads)} heads: give one boolean a head")
    if most < 1:
        raise PrunexError(f"most={most!r} is not allowed: draw at least one row")
    values = values.astype(float)
    strength = np.abs(np.where(there, values, 0))
    rows = np.sort(np.argsort(-strength.max(1), kind="stable")[:most])
    top_value = float(strength.max())
    return _heat(
        values[rows], [str(names[r]) for r in rows], [str(h) for h in heads], there, top_value, title, len(names)
    )


def _heat(
    values: Floats, names: list[str], heads: list[str], kept: Bools, top_value: float, title: str | None, classes: int
) -> Picture:
    rows, columns = values.shape
    cell = max(14, min(34, 1150 // columns))
    tall = max(18, min(30, 900 // rows))
    left = 2 * GAP + min(190, max(84, round(7.6 * max(map(len, names)))))
    deep = 12 + round(7.4 * max(map(len, heads)))  # of column names, written upwards
    top = (34 if title else GAP) + deep
    bar = 240
    width, height = max(left + cell * columns + 2 * GAP, left + bar + 400), top + tall * rows + 66
    figure, canvas = _figure(width, height)
    axes = _axes(figure, (left, top, cell * columns, tall * rows))
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    scale = top_value if top_value > 0 else 1.0
    colours = colormaps["RdBu_r"]((values / scale + 1).clip(0, 2) / 2)
    axes.imshow(colours, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest")
    for column in np.flatnonzero(~kept).tolist():
        axes.add_patch(
            Rectangle((column, 0), 1, rows, facecolor="#d4d8dc", edgecolor="#a4abb2", hatch="////", linewidth=0)
        )
    for row in range(1, rows):
        axes.axhline(row, color="white", linewidth=1)
    block = [name.split(".")[0] for name in heads]
    for column in range(1, columns):
        new = block[column] != block[column - 1]
        axes.axvline(column, color=INK if new else "white", linewidth=1.6 if new else 0.6)
    for column, name in enumerate(heads):
        color = INK if kept[column] else "#9aa2aa"
        _write(figure, left + cell * (column + 0.5), top - 6, name, 11, color, anchor="center", upwards=True)
    for row, name in enumerate(names):
        _write(figure, left - GAP, top + tall * (row + 0.5) + 4, fitted(name, left - GAP, 12, 0.6), 12, anchor="right")
    if title:
        _write(figure, GAP, 20, fitted(title, width, 15), 15, bold=True)
    _write(figure, left - GAP, top - 6, "block.head", 11, FAINT, anchor="right")
    _scale(figure, left, top + tall * rows + 16, bar, scale, top_value, not kept.all(), classes - rows)
    return _drawn(canvas)


def _scale(
    figure: Figure, left: int, y: int, bar: int, scale: float, top_value: float, gone: bool, hidden: int
) -> None:
    """The colour bar with its numbers, what they are, and what hatching means."""
    strip = _axes(figure, (left, y, bar, 12))
    strip.imshow(colormaps["RdBu_r"](np.linspace(0, 1, bar))[None], extent=(0, 1, 0, 1), aspect="auto")
    for place in (0.0, 0.25, 0.5, 0.75, 1.0):
        number = 0.0 if top_value == 0 else (2 * place - 1) * scale
        text = "0" if number == 0 else f"{number:+.2g}".replace("-", "−")
        _write(figure, left + bar * place, y + 26, text, 11, FAINT, anchor="center")
    x = left + bar + 26
    _write(figure, x, y + 10, "relevance above (red) or below (blue) what head", 11, FAINT)
    words = ["and class have on average"]
    if hidden:
        words.append(f"{hidden} more class{'es' if hidden > 1 else ''} not shown")
    _write(figure, x, y + 25, " · ".join(words), 11, FAINT)
    if gone:
        key = _axes(figure, (x, y + 31, 20, 11))
        key.set_xlim(0, 1)
        key.set_ylim(0, 1)
        key.add_patch(Rectangle((0, 0), 1, 1, facecolor="#d4d8dc", edgecolor="#a4abb2", hatch="////", linewidth=0))
        _write(figure, x + 26, y + 41, "head removed", 11, FAINT)


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

    Returns:
        uint8 [height, width, 3].

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
    captions = [[str(t) for t in row] for row in titles]
    if [len(row) for row in captions] != [across] * count or (names is not None and len(names) != count):
        raise PrunexError(
            f"captions for {[len(row) for row in captions]} maps of {len(captions)} images do not fit: give {across} "
            f"for each of {count} images, and one name an image or none"
        )
    rows = []
    for number in range(count):
        first = Column("input" if names is None else str(names[number]), cells[number : number + 1])
        others = [
            Column(
                captions[number][k],
                overlay(cells[number : number + 1], grids[number, k][None], signed=False, floor=0.0),
            )
            for k in range(across)
        ]
        rows.append(compose([first, *others], [[]]))
    width = rows[0].shape[1]
    above = [] if not title else [written(_white(26, width), [Text(GAP, 20, fitted(title, width, 15), 15, bold=True)])]
    told = fitted("bright: looked at most by the head, each map on its own scale from 0", width, 11, 0.55)
    below = written(_white(20, width), [Text(GAP, 13, told, 11, FAINT)])
    return np.concatenate([*above, *rows, below])


def _white(height: int, width: int) -> Picture:
    return np.full((height, width, 3), 255, dtype=np.uint8)


def _figure(width: int, height: int) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    return figure, FigureCanvasAgg(figure)


def _axes(figure: Figure, box: tuple[float, float, float, float]) -> Any:
    """Axes without lines or ticks in a box of pixels: left, top, width, height."""
    width, height = figure.get_figwidth() * _DPI, figure.get_figheight() * _DPI
    left, top, wide, tall = box
    axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
    axes.set_axis_off()
    return axes


def _write(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    size: float = 13,
    color: str = INK,
    bold: bool = False,
    anchor: str = "left",
    upwards: bool = False,
) -> None:
    """Words at a place in pixels."""
    width, height = figure.get_figwidth() * _DPI, figure.get_figheight() * _DPI
    figure.text(
        x / width,
        1 - y / height,
        text,
        fontsize=size * 72 / _DPI,
        fontweight="bold" if bold else "normal",
        fontfamily=_FONT,
        color=color,
        ha=anchor,
        va="bottom" if upwards else "baseline",
        rotation=90 if upwards else 0,
        parse_math=False,  # a class may be called "$5"
        usetex=False,
    )


def _drawn(canvas: FigureCanvasAgg) -> Picture:
    with warnings.catch_warnings(), rc_context({"hatch.linewidth": 1.0}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script the font lacks
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
