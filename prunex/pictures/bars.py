"""Horizontal bars with error bars: several things compared by one number, and what chance would give."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from prunex.errors import PrunexError
from prunex.pictures.arrays import Picture
from prunex.pictures.curves import COLORS, chart, chart_svg, legend_name, plain_axes

Rows = Mapping[str, Mapping[str, tuple[float, float, float]]]
_FAINT = "#8a949e"
_LONGEST = 26  # letters of a name


def bars(
    rows: Rows,
    title: str | None = None,
    lines: Mapping[str, float] | None = None,
    faint: Collection[str] = (),
    width: int = 520,
    order: Sequence[str] = (),
) -> Picture:
    """One bar a row and series, with its interval; rows from the top as they come.

    Args:
        rows: By name, by series (mean, low, high); ends that are not finite are not drawn, nor is a mean that is not.
        title: A line above the chart.
        lines: Dashed vertical lines by name, such as the level of chance.
        faint: Rows in grey: what others are compared with.
        width: In pixels; the height follows from the number of bars.
        order: Series that other charts of the page have, so that each keeps its colour.

    >>> bars({"rollout": {"dense": (0.4, 0.3, 0.5)}}, width=300).shape[1:]
    (300, 3)
    """
    size = _size(rows, lines, width, order)
    return chart(size, lambda figure, ink: _draw(figure, rows, title, lines or {}, faint, ink, order))


def bars_svg(
    rows: Rows,
    title: str | None = None,
    lines: Mapping[str, float] | None = None,
    faint: Collection[str] = (),
    width: int = 520,
    order: Sequence[str] = (),
) -> str:
    """The same chart as `bars` as an ``<svg>`` element that takes its page's text colour and font; names are escaped.

    >>> bars_svg({"<b>": {"dense": (0.4, 0.3, 0.5)}}).startswith("<svg")
    True
    """
    size, salt = _size(rows, lines, width, order), f"{title}|{'|'.join(rows)}"
    return chart_svg(size, lambda figure, ink: _draw(figure, rows, title, lines or {}, faint, ink, order), salt)


def _series(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def _size(rows: Rows, lines: Mapping[str, float] | None, width: int, order: Sequence[str]) -> tuple[int, int]:
    count = len(_series(rows))
    if not any(math.isfinite(mean) for row in rows.values() for mean, *_ in row.values()):
        raise PrunexError(f"no value to draw in {list(rows)}: give at least one finite mean")
    return width, 60 + len(rows) * (7 + 9 * count) + (24 if count > 1 or lines or order else 0)


def _draw(
    figure: Figure,
    rows: Rows,
    title: str | None,
    lines: Mapping[str, float],
    faint: Collection[str],
    ink: str,
    order: Sequence[str],
) -> None:
    axes = plain_axes(figure, ink, title, grid="x")
    names, series = list(rows), _series(rows)
    # Colours go by the page's order, so that a series looks the same in every chart.
    colored = list(dict.fromkeys([*order, *series]))
    thick = 0.84 / len(series)
    handles: list[Any] = []
    for number, label in enumerate(series):
        color = COLORS[colored.index(label) % len(COLORS)]
        offset = (number - (len(series) - 1) / 2) * thick
        for place, (name, cells) in enumerate(rows.items()):
            if label in cells and math.isfinite(cells[label][0]):
                axes.barh(
                    [place + offset],
                    [cells[label][0]],
                    height=thick * 0.92,
                    color=_FAINT if name in faint else color,
                    alpha=0.85,
                    xerr=[[_reach(cells[label], 1)], [_reach(cells[label], 2)]],
                    error_kw={"ecolor": ink, "elinewidth": 1, "capsize": 1.5, "alpha": 0.8},
                )
        # The bars themselves may be grey, so that the legend has one of its own.
        handles.append(axes.barh([0], [0], color=color, label=legend_name(label)))
    for (name, value), style in zip(lines.items(), ("--", ":", "-.", (0, (1, 3))), strict=False):
        if math.isfinite(value):
            line = axes.axvline(value, color=ink, linestyle=style, linewidth=1.2, label=legend_name(name), zorder=3)
            handles.append(line)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], parse_math=False)
    # Rows read from the top, as in a table.
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    if len(colored) > 1 or lines:
        figure.legend(
            handles=handles if len(colored) > 1 else handles[1:],
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
    # An end on the wrong side of the mean is rounding.
    distance = mean - end if side == 1 else end - mean
    return max(0.0, distance) if math.isfinite(distance) else 0.0


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
