"""Curves of what was logged, as a picture or as SVG that follows the colours of the page it lies in."""

import io
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunex.errors import PrunexError
from prunex.pictures.arrays import Floats, Picture, as_numpy
from prunex.pictures.sheet import INK

# Told apart by people with any colour vision, and legible on white as on near black.
COLORS = ("#0a7bd6", "#e5730f", "#119a6d", "#c2478f", "#8d6bd1", "#b08900", "#5b8a99")
_PAGE = "#123456"  # stands for the text colour in SVG until it is replaced by currentColor
_LEAST = 0.05  # of the value axis: 5 points where values are per cent, else this share of the largest value
_MANY = 60  # points from which a noisy line is also drawn smoothed
DPI = 96


def curves(
    metrics: Mapping[str, tuple[Any, Any]],
    title: str | None = None,
    percent: bool = False,
    xlabel: str = "step",
    size: tuple[int, int] = (640, 360),
    bands: Mapping[str, tuple[Any, Any]] | None = None,
) -> Picture:
    """Lines of numbers over steps, in one chart.

    A line of many points is drawn faintly, with a running mean over it. Values that are not finite are left out. The
    value axis spans at least 5 points of per cent, or 5 % of the largest value: what is smaller looks small.

    Args:
        metrics: For each name its steps [N] and values [N].
        title: A line above the chart.
        percent: Show values as per cent of 1.
        xlabel: What the steps count.
        size: Width and height in pixels.
        bands: For some of the names the lower and upper end [N] of a faint band around the line, such as the spread
            over seeds.

    Raises:
        PrunexError: Steps and values of different length, or nothing to draw.

    >>> curves({"loss": ([0, 1, 2], [1.0, 0.5, 0.3])}, size=(200, 100)).shape
    (100, 200, 3)
    """
    return chart(size, lambda figure, ink: _draw(figure, metrics, title, percent, xlabel, ink, bands))


def curves_svg(
    metrics: Mapping[str, tuple[Any, Any]],
    title: str | None = None,
    percent: bool = False,
    xlabel: str = "step",
    size: tuple[int, int] = (640, 360),
) -> str:
    """The same chart as `curves` as an ``<svg>`` element for an HTML page, in its text colour; names are escaped.

    >>> curves_svg({"<loss>": ([0, 1], [1.0, 0.5])}).startswith("<svg")
    True
    """
    # The salt makes ids depend on the content alone: charts on one page differ, the same chart twice is the same.
    salt = f"{title}|{'|'.join(metrics)}"
    return chart_svg(size, lambda figure, ink: _draw(figure, metrics, title, percent, xlabel, ink), salt)


def chart(size: tuple[int, int], draw: Callable[[Figure, str], None]) -> Picture:
    """What ``draw`` draws on a figure in an ink, as a picture of a size in pixels."""
    figure = _figure(size)
    canvas = FigureCanvasAgg(figure)
    with rc_context({"text.usetex": False}):
        draw(figure, INK)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def chart_svg(size: tuple[int, int], draw: Callable[[Figure, str], None], salt: str) -> str:
    """The same as an element of a page, in the page's text colour and font, without an id that clashes."""
    figure = _figure(size)
    canvas = FigureCanvasSVG(figure)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "text.usetex": False}):
        draw(figure, _PAGE)
        figure.patch.set_alpha(0)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    # An element of a page has no XML declaration.
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_PAGE, "currentColor")
    # Two charts on a page may not use one id twice; only ids that are referred to matter, and those are salted.
    svg = re.sub(r'(<(?:g|svg)[^>]*?) id="[^"]*"', r"\1", svg)
    return re.sub(r"font-family: [^;\"]*;? ?", "", svg)


def _figure(size: tuple[int, int]) -> Figure:
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI)
    figure.set_layout_engine("constrained")
    return figure


def plain_axes(figure: Figure, ink: str, title: str | None, grid: Literal["both", "x"] = "both") -> Any:
    """Axes with two spines and faint lines, in one ink, on whatever is behind them."""
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=ink, labelsize=9, length=3)
    for edge, spine in axes.spines.items():
        spine.set_visible(edge in ("left", "bottom"))
        spine.set_color(ink)
    axes.grid(axis=grid, color=ink, alpha=0.15, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=grid == "both"))
    if title:
        axes.set_title(title, color=ink, fontsize=11, fontweight="bold", loc="left", parse_math=False)
    return axes


def legend_name(name: str) -> str:
    """A name as a legend shows it; a leading underscore would hide it, a dollar would begin a formula."""
    return f" {name}".replace("$", r"\$")


def _draw(
    figure: Figure,
    metrics: Mapping[str, tuple[Any, Any]],
    title: str | None,
    percent: bool,
    xlabel: str,
    ink: str,
    bands: Mapping[str, tuple[Any, Any]] | None = None,
) -> None:
    lines = {name: line for name, (steps, values) in metrics.items() if (line := _line(name, steps, values))}
    if not lines:
        raise PrunexError(f"no value to draw in {list(metrics)}: give steps and values of at least one finite number")
    axes = plain_axes(figure, ink, title)
    for (name, (steps, values)), color in zip(lines.items(), itertools.cycle(COLORS), strict=False):
        # A long noisy line says its trend; the noise stays to be seen behind it.
        if len(values) >= _MANY:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            values = _running_mean(values, len(values) // 20)
        mark = "o" if len(values) <= 20 else None
        axes.plot(steps, values, color=color, linewidth=2, marker=mark, markersize=4, label=legend_name(name))
        if bands and name in bands:
            low, high = (_band(name, steps, end) for end in bands[name])
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    # Limits of the data, taken before matplotlib adds its margins.
    bottom, top = axes.dataLim.intervaly
    axes.set_ylim(*_span(bottom, top, percent))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_xlabel(xlabel, color=ink, fontsize=9, parse_math=False)
    room = int(figure.get_figwidth() * DPI / (45 + 7 * max(map(len, lines))))  # names that fit side by side
    columns = min(3, len(lines), max(1, room))
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, labelcolor=ink, fontsize=9, handlelength=1.4
    )


def _span(low: float, high: float, percent: bool) -> tuple[float, float]:
    """Ends of the value axis: never zoomed into a difference that means nothing, nor past what a share can be."""
    # A difference of a hundredth of a point must not fill the chart.
    least = _LEAST if percent else _LEAST * max(abs(low), abs(high)) or 1.0
    wide = max(high - low, least) * 1.1
    bottom = (low + high - wide) / 2
    if percent and 0 <= low <= high <= 1:
        bottom = min(max(bottom, 0.0), max(1.01 - wide, 0.0))
    return bottom, bottom + wide


def _line(name: str, steps: Any, values: Any) -> tuple[Floats, Floats] | None:
    x, y = (as_numpy(v).astype(float) for v in (steps, values))
    if x.ndim != 1 or x.shape != y.shape:
        raise PrunexError(f"curve {name!r} has steps {x.shape} and values {y.shape}: give two lists of one length")
    # What is not finite has no place on an axis; a line of nothing else is left out.
    finite = np.isfinite(x) & np.isfinite(y)
    return (x[finite], y[finite]) if finite.any() else None


def _band(name: str, steps: Floats, values: Any) -> Floats:
    end = as_numpy(values).astype(float)
    if end.shape != steps.shape:
        raise PrunexError(f"the band of {name!r} has {end.shape} values for {steps.shape} points: give one a point")
    return end


def _running_mean(values: Floats, window: int) -> Floats:
    """Mean over `window` neighbours; fewer at the two ends, so that these are not pulled to 0."""
    ones = np.ones(2 * (window // 2) + 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")
