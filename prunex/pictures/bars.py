"""Horizontal bars with error bars: several things compared by one number, and what chance would give."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prunex.errors import PrunexError
from prunex.pictures.arrays import Picture
from prunex.pictures.curves import COLORS, adapted

Rows = Mapping[str, Mapping[str, tuple[float, float, float]]]
_INK = "#123456"  # stands for the text colour in SVG until it is replaced by currentColor
_DPI = 96
_FAINT = "#8a949e"
_LONGEST = 26  # letters of a name


def bars(
    rows: Rows,
    title: str | None = None,
    lines: Mapping[str, float] | None = None,
    faint: Collection[str] = (),
    width: int = 520,
) -> Picture:
    """One bar a row and series, with its interval; rows from the top as they come.

    Args:
        rows: By name, by series (mean, low, high); ends that are not finite are not drawn, nor is a mean that is not.
        title: A line above the chart.
        lines: Dashed vertical lines by name, such as the level of chance.
        faint: Rows in grey: what others are compared with.
        width: In pixels; the height follows from the number of bars.

    Returns:
        uint8 [height, width, 3].

    Raises:
        PrunexError: Nothing to draw.

    >>> bars({"rollout": {"dense": (0.4, 0.3, 0.5)}}, width=300).shape[1:]
    (300, 3)
    """
    figure = _figure(rows, lines, width)
    canvas = FigureCanvasAgg(figure)
    with rc_context({"text.usetex": False}):
        _draw(figure, rows, title, lines or {}, faint, ink="#1b1f24")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def bars_svg(
    rows: Rows,
    title: str | None = None,
    lines: Mapping[str, float] | None = None,
    faint: Collection[str] = (),
    width: int = 520,
) -> str:
    """The same chart as `bars` as an ``<svg>`` element that takes its page's text colour and font.

    Args:
        rows: As for `bars`, and so are the others.
        title: Likewise.
        lines: Likewise.
        faint: Likewise.
        width: Likewise.

    Returns:
        The element as text; names are escaped.

    Raises:
        PrunexError: Nothing to draw.

    >>> bars_svg({"<b>": {"dense": (0.4, 0.3, 0.5)}}).startswith("<svg")
    True
    """
    figure = _figure(rows, lines, width)
    canvas = FigureCanvasSVG(figure)
    salt = f"{title}|{'|'.join(rows)}"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "text.usetex": False}):
        _draw(figure, rows, title, lines or {}, faint, ink=_INK)
        figure.patch.set_alpha(0)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return adapted(buffer.getvalue(), _INK)


def _series(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def _figure(rows: Rows, lines: Mapping[str, float] | None, width: int) -> Figure:
    count = len(_series(rows))
    if not any(math.isfinite(mean) for row in rows.values() for mean, *_ in row.values()):
        raise PrunexError(f"no value to draw in {list(rows)}: give at least one finite mean")
    height = 60 + len(rows) * (7 + 9 * count) + (24 if count > 1 or lines else 0)
    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)


def _draw(
    figure: Figure,
    rows: Rows,
    title: str | None,
    lines: Mapping[str, float],
    faint: Collection[str],
    ink: str,
) -> None:
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    names, series = list(rows), _series(rows)
    thick = 0.84 / len(series)
    handles: list[Any] = []
    for number, one in enumerate(series):
        color = COLORS[number % len(COLORS)]
        places = [i for i, name in enumerate(names) if one in rows[name] and math.isfinite(rows[name][one][0])]
        means = [rows[names[i]][one][0] for i in places]
        ends = np.array([[_reach(rows[names[i]][one], side) for i in places] for side in (1, 2)]).reshape(2, -1)
        colors = [_FAINT if names[i] in faint else color for i in places]
        offset = (number - (len(series) - 1) / 2) * thick
        drawn = axes.barh(
            [i + offset for i in places],
            means,
            height=thick * 0.92,
            color=colors,
            alpha=0.85 if number == 0 else 0.75,
            xerr=ends,
            error_kw={"ecolor": ink, "elinewidth": 1, "capsize": 1.5, "alpha": 0.8},
        )
        drawn.set_label(f" {one}".replace("$", r"\$"))  # a leading underscore would hide it from the legend
        handles.append(axes.barh([0], [0], color=color, label=f" {one}".replace("$", r"\$")))
    for (name, place), style in zip(lines.items(), ("--", ":", "-.", (0, (1, 3))), strict=False):
        if math.isfinite(place):
            handles.append(
                axes.axvline(
                    place, color=ink, linestyle=style, linewidth=1.2, label=f" {name}".replace("$", r"\$"), zorder=3
                )
            )
    axes.set_yticks(range(len(names)), [_short(name) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(colors=ink, labelsize=9, length=3)
    axes.tick_params(axis="y", length=0)
    for edge, spine in axes.spines.items():
        spine.set_visible(edge in ("left", "bottom"))
        spine.set_color(ink)
    axes.grid(axis="x", color=ink, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, color=ink, fontsize=11, fontweight="bold", loc="left", parse_math=False)
    if len(series) > 1 or lines:
        figure.legend(
            handles=handles if len(series) > 1 else handles[1:],
            loc="outside lower center",
            ncols=min(4, len(handles)),
            frameon=False,
            labelcolor=ink,
            fontsize=9,
            handlelength=1.6,
        )


def _reach(cell: tuple[float, float, float], side: int) -> float:
    """How far the interval reaches from the mean to one side; 0 where its end is not known."""
    mean, end = cell[0], cell[side]
    distance = mean - end if side == 1 else end - mean
    return max(0.0, distance) if math.isfinite(distance) else 0.0


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
