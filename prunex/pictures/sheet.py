"""A sheet: pictures, words and small charts at places in pixels; and the one layout of labelled cells."""

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from prunex.pictures.arrays import Picture

INK, FAINT, RIGHT, WRONG = "#1b1f24", "#5f6872", "#1a7f37", "#c62828"
DPI = 64  # a power of two: sizes in inches are exact, so the canvas has the pixels that were asked for
GAP = 8
_FONT = "DejaVu Sans"  # comes with matplotlib
WIDE, NARROW = 0.64, 0.53  # mean width of a letter per size, in bold and plain
LETTER = 0.58  # likewise, with which no line of a note is cut
HEAD, NOTE = 15, 11  # sizes of a title, and of what explains
_MISSING = "Glyph .* missing"  # a name in a script that the font lacks
SIGNED = "RdBu_r"  # colours of signed numbers: red above 0, blue below


class Sheet:
    """A white canvas that pictures, words and axes are put on; places are pixels from its upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.pixels = np.full((height, width, 3), 255, dtype=np.uint8)
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def put(self, x: int, y: int, picture: Picture) -> None:
        """Lay a picture, uint8 [h, w, 3], with its upper left corner at a place."""
        self.pixels[y : y + picture.shape[0], x : x + picture.shape[1]] = picture

    def fill(self, x: float, y: float, width: float, height: int, color: Any) -> None:
        """Lay a rectangle of one colour."""
        left, right = round(x), round(x + width)
        self.pixels[round(y) : round(y) + height, left:right] = color

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes without lines or ticks in a box."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set_axis_off()
        return axes

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 13,
        color: str = INK,
        bold: bool = False,
        anchor: str = "left",
        boxed: bool = False,
        upwards: bool = False,
    ) -> None:
        """Words whose base line has its left end (or what ``anchor`` says) at a place."""
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=size * 72 / DPI,
            fontweight="bold" if bold else "normal",
            fontfamily=_FONT,
            color="white" if boxed else color,
            ha=anchor,
            va="bottom" if upwards else "baseline",
            rotation=90 if upwards else 0,
            parse_math=False,  # a class may be called "$5"
            usetex=False,
            bbox={"facecolor": "#000000b0", "edgecolor": "none", "pad": 3} if boxed else None,
        )

    def measured(self, text: str, size: float = 13) -> float:
        """Width of words in pixels."""
        font = FontProperties(family=_FONT, size=size * 72 / DPI)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_MISSING)
            # The canvas draws at a dot a pixel.
            return float(self.canvas.get_renderer().get_text_width_height_descent(text, font, ismath=False)[0])

    def scale(self, x: float, y: float, width: int, largest: float) -> None:
        """The bar of a signed scale, 12 pixels high, from minus to plus the largest magnitude, with numbers below."""
        strip = self.axes(x, y, width, 12)
        strip.imshow(colormaps[SIGNED](np.linspace(0, 1, width))[None], extent=(0, 1, 0, 1), aspect="auto")
        for place in (0.0, 0.25, 0.5, 0.75, 1.0):
            number = (2 * place - 1) * largest
            text = "0" if number == 0 else f"{number:+.2g}".replace("-", "−")
            self.write(x + width * place, y + 26, text, NOTE, FAINT, anchor="center")

    def head(self, title: str | None) -> None:
        """A title in the upper left corner, as much of it as fits."""
        if title:
            self.write(GAP, 20, fitted(title, self.width, HEAD), HEAD, bold=True)

    def notes(self, x: float, y: float, lines: Sequence[str]) -> None:
        """Lines of what explains, the first with its base line at a place."""
        for number, line in enumerate(lines):
            self.write(x, y + 15 * number, line, NOTE, FAINT)

    def drawn(self) -> Picture:
        """What the sheet shows, uint8 [height, width, 3]."""
        self.figure.figimage(self.pixels, resize=False, zorder=-1)  # below axes, which lie at 0
        with warnings.catch_warnings(), rc_context({"hatch.linewidth": 1.0}):
            warnings.filterwarnings("ignore", message=_MISSING)
            self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def fitted(text: str, width: float, size: float = 13, letter: float = WIDE) -> str:
    """Cut each line to what a width holds; `letter` is the mean width of a letter, here of a bold one, per size."""
    most = max(4, int(width / (letter * size)))
    return "\n".join(line if len(line) <= most else line[: most - 1] + "…" for line in text.split("\n"))


def wrapped(text: str, width: float, size: float = NOTE) -> list[str]:
    """A text in lines that a width holds."""
    return textwrap.wrap(text, int(width / (size * LETTER)))


def titled(width: int, title: str | None) -> int:
    """A width that holds a title, too."""
    return max(width, GAP + round(len(title or "") * HEAD * WIDE))


def stacked(parts: Sequence[Picture]) -> Picture:
    """Pictures below each other, narrower ones with white on their right."""
    width = max(part.shape[1] for part in parts)
    filled = [np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255) for part in parts]
    return np.concatenate(filled)


def heading_of(lines: Sequence[str], width: int = 600) -> Picture:
    """Lines above a picture, the first in bold."""
    sheet = Sheet(width, 12 + 19 * len(lines))
    for number, line in enumerate(lines):
        text = fitted(line, width - 2 * GAP, 13 if number else HEAD, 0.58 if number else WIDE)
        sheet.write(GAP, 22 + 19 * number, text, 13 if number else HEAD, bold=not number)
    return sheet.drawn()


@dataclass
class Column:
    """One column of cells: its title, cells uint8 [M, h, w, 3], and a word in each cell's corner or none."""

    title: str
    cells: Picture
    marks: list[str] | None = None


def compose(
    columns: Sequence[Column],
    rows: Sequence[Sequence[tuple[str, str]]],
    title: str | None = None,
    key: Sequence[str] = (),
) -> Picture:
    """Lay columns of equal cells side by side, titles above, a row's coloured words on its left and a key below."""
    count, tall, wide = columns[0].cells.shape[:3]
    # The margin is as wide as the longest name needs, within reason.
    longest = max((len(line) for lines in rows for line, _ in lines), default=0)
    left = 2 * GAP + min(180, round(longest * 8.6)) if longest else GAP
    # All titles end on one line, whatever they need above it.
    titles = [fitted(column.title, wide).split("\n") for column in columns]
    deepest = max(map(len, titles))
    top = GAP + (24 if title else 0) + 17 * deepest + 4
    # A picture of one method is narrow: the title may widen it, the key goes on in further lines.
    width = titled(left + len(columns) * (wide + GAP), title)
    notes = textwrap.wrap(" · ".join(key), max(20, int((width - left) / (NOTE * NARROW))))
    height = top + count * (tall + GAP) + 16 * len(notes) + (4 if key else 0)
    sheet = Sheet(width, height)
    sheet.head(title)
    for number, (column, lines) in enumerate(zip(columns, titles, strict=True)):
        x = left + number * (wide + GAP)
        for index, line in enumerate(lines):
            sheet.write(x, top - 8 - 17 * (deepest - 1 - index), line, color=FAINT if index else INK, bold=not index)
        for row in range(count):
            y = top + row * (tall + GAP)
            sheet.put(x, y, column.cells[row])
            if column.marks is not None:
                sheet.write(x + 6, y + 17, fitted(column.marks[row], wide), NOTE, boxed=True)
    for row, words in enumerate(rows):
        middle = top + row * (tall + GAP) + tall / 2 + 5
        for index, (line, color) in enumerate(words):
            y = middle + 18 * (index - (len(words) - 1) / 2)
            sheet.write(left - GAP, y, fitted(line, left - GAP), color=color, bold=not index, anchor="right")
    for number, line in enumerate(reversed(notes)):
        sheet.write(left, height - 7 - 16 * number, line, NOTE, FAINT)
    return sheet.drawn()
