"""One picture for many images: what each stage kept, what it kept epoch by epoch, what each method points at."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from prunex.errors import PrunexError
from prunex.pictures.arrays import Bools, Picture, as_grids, as_numpy, as_pictures, on_pixels, resized
from prunex.pictures.overlay import OBJECT, dim_dropped, outline, overlay, paint_groups

INK, FAINT, RIGHT, WRONG = "#1b1f24", "#5f6872", "#1a7f37", "#c62828"
_DPI = 64  # a power of two: sizes in inches are exact, so the canvas has the pixels that were asked for
GAP = 8
_WIDE, _NARROW = 0.64, 0.53  # mean width of a letter per size, in bold and plain


def kept_mosaic(
    images: Any,
    kept: Any,
    labels: Any = None,
    predicted: Any = None,
    class_names: Sequence[str] | None = None,
    masks: Any = None,
    title: str | None = None,
    side: int = 160,
    groups: Any = None,
) -> Picture:
    """What each stage of a pruned model kept: one row an image, the image first, then one column a stage.

    Kept patches are in full colour, dropped ones pale; each column is titled with the mean share of patches kept, and
    with the mean share of the object that they cover where masks are known. Where patches were merged (``groups``),
    those of one token are painted in its mean colour, and titles count tokens.

    Args:
        images: uint8 [M, H, W, 3].
        kept: Booleans [S, M, gh, gw], stage by stage: true for a patch that is still there after the stage.
        labels: True classes, integers [M].
        predicted: Predicted classes, integers [M].
        class_names: Names of the classes; numbers are shown without them.
        masks: Object pixels, booleans [M, H, W].
        title: A line above everything.
        side: Wanted side of one cell, in pixels; see `resized`.
        groups: Whole numbers [S, M, gh, gw], stage by stage: the token each patch is part of, negative if removed.

    Returns:
        uint8 [height, width, 3].

    Raises:
        PrunexError: Arrays whose shapes do not fit the images.

    >>> images, kept = np.zeros((2, 64, 64, 3), dtype=np.uint8), np.ones((3, 2, 8, 8), dtype=bool)
    >>> picture = kept_mosaic(images, kept, labels=[0, 1], predicted=[0, 0], class_names=["cat", "dog"])
    >>> picture.dtype, picture.ndim
    (dtype('uint8'), 3)
    """
    cells, objects = enlarged(images, masks, side)
    stages = as_grids(kept, (len(as_numpy(kept)), len(cells)), "kept") if as_numpy(kept).ndim == 4 else None
    if stages is None:
        raise PrunexError(f"kept of shape {as_numpy(kept).shape} cannot be drawn: give [stages, images, gh, gw]")
    columns = [first_column(cells, objects)]
    merged = None if groups is None else as_grids(groups, stages.shape[:2], "groups", dtype=int)
    for number, stage in enumerate(stages, start=1):
        if merged is not None:
            title_here = f"stage {number}\n{tokens_left(merged[number - 1]):.0%} of tokens"
            columns.append(Column(title_here, paint_groups(cells, merged[number - 1])))
            continue
        columns.append(Column(_share_title(f"stage {number}", stage, objects), dim_dropped(cells, stage)))
    key = mask_key(objects)
    if merged is not None:
        key = ["flat colour: patches merged into one token", "sharp: tokens of their own", *key]
    return compose(columns, row_titles(len(cells), labels, predicted, class_names), title, key)


def share_mosaic(
    images: Any,
    shares: Any,
    tokens: Sequence[int],
    labels: Any = None,
    predicted: Any = None,
    class_names: Sequence[str] | None = None,
    masks: Any = None,
    title: str | None = None,
    side: int = 160,
) -> Picture:
    """How much of each patch a model that pools its tokens still holds: one row an image, one column a stage.

    Nothing is kept or dropped there; a patch is the brighter the larger its largest part in any token, each image and
    stage on its own scale from 0.

    Args:
        images: uint8 [M, H, W, 3].
        shares: Numbers [S, M, gh, gw] in 0..1, stage by stage.
        tokens: How many tokens each stage leaves.
        labels: True classes, integers [M].
        predicted: Predicted classes, integers [M].
        class_names: Names of the classes; numbers are shown without them.
        masks: Object pixels, booleans [M, H, W].
        title: A line above everything.
        side: Wanted side of one cell, in pixels; see `resized`.

    Returns:
        uint8 [height, width, 3].

    Raises:
        PrunexError: Arrays whose shapes do not fit the images.
    """
    cells, objects = enlarged(images, masks, side)
    values = as_numpy(shares)
    if values.ndim != 4 or len(values) != len(tokens):
        raise PrunexError(
            f"shares of shape {values.shape} with {len(tokens)} token counts cannot be drawn: give "
            "[stages, images, gh, gw] and one count a stage"
        )
    columns = [first_column(cells, objects)]
    for number, (stage, count) in enumerate(zip(values, tokens, strict=True), start=1):
        grid = as_grids(stage, (len(cells),), "shares", dtype=float)
        columns.append(Column(f"stage {number}\n{count} tokens", overlay(cells, grid, signed=False, floor=0.0)))
    key = ["bright: a large part in a token", *mask_key(objects)]
    return compose(columns, row_titles(len(cells), labels, predicted, class_names), title, key)


def kept_over_epochs(
    images: Any,
    kept: Mapping[int, Any],
    labels: Any = None,
    predicted: Any = None,
    class_names: Sequence[str] | None = None,
    masks: Any = None,
    title: str | None = None,
    side: int = 160,
    most: int = 6,
) -> Picture:
    """How the kept patches changed while training: one row an image, one column an epoch.

    Args:
        images: uint8 [M, H, W, 3].
        kept: Booleans [M, gh, gw] for each epoch, usually those of the last stage.
        labels: True classes, integers [M].
        predicted: Predicted classes, integers [M].
        class_names: Names of the classes; numbers are shown without them.
        masks: Object pixels, booleans [M, H, W].
        title: A line above everything.
        side: Wanted side of one cell, in pixels; see `resized`.
        most: Columns drawn at most; of more epochs the first, the last and evenly spaced ones between are taken.

    Returns:
        uint8 [height, width, 3].

    Raises:
        PrunexError: No epoch, or arrays whose shapes do not fit the images.
    """
    if not kept:
        raise PrunexError("no epoch to draw: give kept patches for at least one epoch")
    cells, objects = enlarged(images, masks, side)
    columns = [first_column(cells, objects)]
    for epoch in spaced(sorted(kept), most):
        grid = as_grids(kept[epoch], (len(cells),), f"kept of epoch {epoch}")
        columns.append(Column(_share_title(f"epoch {epoch}", grid, objects), dim_dropped(cells, grid)))
    return compose(columns, row_titles(len(cells), labels, predicted, class_names), title, mask_key(objects))


def relevancy_mosaic(
    images: Any,
    maps: Mapping[str, Any],
    kept_last: Any = None,
    targets: Mapping[str, Any] | None = None,
    labels: Any = None,
    predicted: Any = None,
    class_names: Sequence[str] | None = None,
    masks: Any = None,
    title: str | None = None,
    side: int = 160,
) -> Picture:
    """What the prediction rests on: one row an image, the image first, then one column a method.

    Args:
        images: uint8 [M, H, W, 3].
        maps: Relevancy, numbers [M, gh, gw] for each method; each map has its own scale, see `overlay`.
        kept_last: Booleans [M, gh, gw]: patches left after the last stage, whose boundary is drawn.
        targets: The class that was explained, integers [M] for each method; -1 where the method knows no class.
        labels: True classes, integers [M].
        predicted: Predicted classes, integers [M].
        class_names: Names of the classes; numbers are shown without them.
        masks: Object pixels, booleans [M, H, W].
        title: A line above everything.
        side: Wanted side of one cell, in pixels; see `resized`.

    Returns:
        uint8 [height, width, 3].

    Raises:
        PrunexError: No method, or arrays whose shapes do not fit the images.
    """
    if not maps:
        raise PrunexError("no map to draw: give maps of at least one method")
    cells, objects = enlarged(images, masks, side)
    count = len(cells)
    boundary = None if kept_last is None else as_grids(kept_last, (count,), "kept_last")
    columns = [first_column(cells, objects)]
    for method, values in maps.items():
        drawn = overlay(cells, as_grids(values, (count,), f"maps of {method}", dtype=float))
        drawn = drawn if boundary is None else outline(drawn, boundary, thick=1)
        explained, marks = _explained(_numbers(targets.get(method) if targets else None, count), labels, predicted)
        names = [class_name(target, class_names) for target in marks] if marks is not None else None
        columns.append(Column(f"{method}\n{explained}".strip(), drawn, names))
    signed = any((as_numpy(values) < 0).any() for values in maps.values())
    key = [
        "bright: most relevant, each map on its own scale",
        *(["red for the class, blue against it"] if signed else []),
        *(["yellow: kept patches"] if boundary is not None else []),
        *mask_key(objects),
    ]
    return compose(columns, row_titles(count, labels, predicted, class_names), title, key)


@dataclass
class Column:
    """One column of a mosaic: its title, cells uint8 [M, h, w, 3], and a word in each cell's corner or none."""

    title: str
    cells: Picture
    marks: list[str] | None = None


@dataclass
class Text:
    """Words on a canvas: the left (or right) end of their base line in pixels, and how they look."""

    x: float
    y: float
    text: str
    size: float = 13
    color: str = INK
    bold: bool = False
    anchor: str = "left"
    boxed: bool = False


def compose(
    columns: Sequence[Column],
    rows: Sequence[Sequence[tuple[str, str]]],
    title: str | None = None,
    key: Sequence[str] = (),
) -> Picture:
    """Lay columns of equal cells side by side, with titles above, rows named on the left and a key below.

    Args:
        columns: The columns, all with the same number and size of cells.
        rows: For each row its lines of text with their colours; no lines at all leave the margin out.
        title: A line above everything.
        key: What the colours mean, joined to one line below.

    Returns:
        uint8 [height, width, 3], black on white.
    """
    count, cell_height, cell_width = columns[0].cells.shape[:3]
    longest = max((len(line) for lines in rows for line, _ in lines), default=0)
    left = 2 * GAP + min(180, round(longest * 8.6)) if longest else GAP
    lines = [fitted(column.title, cell_width) for column in columns]
    title_lines = max(text.count("\n") + 1 for text in lines)
    top = GAP + (24 if title else 0) + 17 * title_lines + 4
    # A picture of one method is narrow: the title may widen it, the key goes on in further lines.
    width = max(left + len(columns) * (cell_width + GAP), GAP + round(len(title or "") * 15 * _WIDE))
    key_lines = textwrap.wrap(" · ".join(key), max(20, int((width - left) / (11 * _NARROW))))
    height = top + count * (cell_height + GAP) + 16 * len(key_lines) + (4 if key else 0)
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    texts = [Text(GAP, 20, fitted(title, width, 15), size=15, bold=True)] if title else []
    for number, column in enumerate(columns):
        x = left + number * (cell_width + GAP)
        for index, line in enumerate(lines[number].split("\n")):
            y = top - 8 - 17 * (title_lines - 1 - index)
            texts.append(Text(x, y, line, color=FAINT if index else INK, bold=not index))
        for row in range(count):
            y = top + row * (cell_height + GAP)
            canvas[y : y + cell_height, x : x + cell_width] = column.cells[row]
            if column.marks is not None:
                texts.append(Text(x + 6, y + 17, fitted(column.marks[row], cell_width), size=11, boxed=True))
    for row, words in enumerate(rows):
        middle = top + row * (cell_height + GAP) + cell_height / 2 + 5
        for index, (line, color) in enumerate(words):
            y = middle + 18 * (index - (len(words) - 1) / 2)
            texts.append(Text(left - GAP, y, fitted(line, left - GAP), color=color, bold=not index, anchor="right"))
    for number, line in enumerate(reversed(key_lines)):
        texts.append(Text(left, height - 7 - 16 * number, line, size=11, color=FAINT))
    return written(canvas, texts)


def spaced(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values: the first, the last, and evenly spaced ones between.

    >>> spaced(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(values) <= most:
        return list(values)
    places = np.linspace(0, len(values) - 1, max(most, 1)).round().astype(int)
    return [values[place] for place in places] if most > 1 else [values[-1]]


def class_name(number: int, class_names: Sequence[str] | None) -> str:
    """Name of a class, or its number where no name is known."""
    known = class_names is not None and 0 <= number < len(class_names)
    return str(class_names[number]) if known and class_names is not None else f"class {number}"


def covered(kept: Bools, objects: Bools) -> float:
    """Mean share of the objects' pixels that lie in kept patches; NaN where no image has an object.

    Args:
        kept: [M, gh, gw].
        objects: [M, H, W].

    >>> float(covered(np.array([[[True, False]]]), np.array([[[True, True, True, False]]])).__round__(2))
    0.67
    """
    inside = (on_pixels(kept, *objects.shape[-2:]) & objects).sum(axis=(-2, -1))
    area = objects.sum(axis=(-2, -1))
    return float((inside[area > 0] / area[area > 0]).mean()) if area.any() else float("nan")


def tokens_left(groups: NDArray[Any]) -> float:
    """Mean number of tokens that hold patches, over the number of patches.

    Args:
        groups: Whole numbers [M, gh, gw], equal for patches that share a token; negative for removed ones.

    >>> tokens_left(np.array([[[0, 0, 1, -1]]]))
    0.5
    """
    return float(np.mean([len(np.unique(grid[grid >= 0])) / grid.size for grid in groups]))


def enlarged(images: Any, masks: Any, side: int) -> tuple[Picture, Bools | None]:
    """Checked images at the size of a cell, and their checked masks."""
    pictures = as_pictures(images, 4)
    objects = None if masks is None else as_grids(masks, pictures.shape[:1], "masks")
    return resized(pictures, side), objects


def first_column(cells: Picture, objects: Bools | None) -> Column:
    """The images themselves, with their objects outlined where masks are known."""
    return Column("input", cells if objects is None else outline(cells, objects, OBJECT))


def mask_key(objects: Bools | None) -> list[str]:
    """What the outline means, for the key."""
    return [] if objects is None else ["cyan: the object's mask"]


def _share_title(name: str, kept: Bools, objects: Bools | None) -> str:
    share = f"{name} · {kept.mean():.0%} kept"
    cover = float("nan") if objects is None else covered(kept, objects)
    return share if np.isnan(cover) else f"{share}\ncovers {cover:.0%} of object"


def _numbers(values: Any, count: int) -> list[int] | None:
    if values is None:
        return None
    numbers = [int(v) for v in np.atleast_1d(as_numpy(values))]
    if len(numbers) != count:
        raise PrunexError(f"{len(numbers)} class numbers for {count} images: give one for each image")
    return numbers


def row_titles(
    count: int, labels: Any, predicted: Any, class_names: Sequence[str] | None
) -> list[list[tuple[str, str]]]:
    """For each image its class and what was predicted, as coloured words."""
    truth, guess = _numbers(labels, count), _numbers(predicted, count)
    rows = []
    for index in range(count):
        lines = [] if truth is None else [(class_name(truth[index], class_names), INK)]
        if guess is not None:
            name = class_name(guess[index], class_names)
            if truth is None:
                lines.append((f"→ {name}", INK))
            elif truth[index] == guess[index]:
                lines.append(("✓ predicted", RIGHT))
            else:
                lines.append((f"✗ {name}", WRONG))
        rows.append(lines)
    return rows


def _explained(targets: list[int] | None, labels: Any, predicted: Any) -> tuple[str, list[int] | None]:
    """Which classes a column explains: a subtitle, and the classes themselves where no word says it all."""
    if targets is None:
        return "", None
    if all(target < 0 for target in targets):
        return "of no class", None
    if targets == _numbers(predicted, len(targets)):
        return "for the predicted class", None
    if targets == _numbers(labels, len(targets)):
        return "for the true class", None
    return "for the class named", targets


def fitted(text: str, width: float, size: float = 13, letter: float = _WIDE) -> str:
    """Cut each line to what a width holds; `letter` is the mean width of a letter, here of a bold one, per size."""
    most = max(4, int(width / (letter * size)))
    return "\n".join(line if len(line) <= most else line[: most - 1] + "…" for line in text.split("\n"))


def written(canvas: Picture, texts: Sequence[Text]) -> Picture:
    """The canvas with words on it."""
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    agg = FigureCanvasAgg(figure)
    figure.figimage(canvas, resize=False)
    for text in texts:
        figure.text(
            text.x / width,
            1 - text.y / height,
            text.text,
            fontsize=text.size * 72 / _DPI,
            fontweight="bold" if text.bold else "normal",
            fontfamily="DejaVu Sans",  # comes with matplotlib
            color="white" if text.boxed else text.color,
            ha=text.anchor,
            va="baseline",
            parse_math=False,  # a class may be called "$5"
            usetex=False,
            bbox={"facecolor": "#000000b0", "edgecolor": "none", "pad": 3} if text.boxed else None,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in a script the font lacks
        agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()
