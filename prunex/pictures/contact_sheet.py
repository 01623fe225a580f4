"""Everything about one image on one sheet, or all methods for a few: titled tiles in rows, and the scale they share."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from prunex.errors import PrunexError
from prunex.pictures.arrays import Floats, Picture, as_grids, as_numpy, as_pictures
from prunex.pictures.mosaic import Scenes
from prunex.pictures.overlay import dim_dropped, outline, overlay
from prunex.pictures.sheet import FAINT, GAP, Column, Sheet, compose, heading_of, stacked

_BAR = (12, 220)  # height and width of a scale in pixels
_LEAST = 600  # pixels that the words below need
_NOTED = 1e-3  # negative values below this share of a map's maximum are rounding


def contact_sheet(
    images: Any,
    maps: Mapping[str, Any],
    signed: Collection[str] = (),
    kept: Any = None,
    masks: Any = None,
    labels: Any = None,
    predicted: Any = None,
    class_names: Sequence[str] | None = None,
    heading: Sequence[str] = (),
    side: int = 224,
    across: int = 5,
) -> Picture:
    """The image, its kept patches and one tile a method, a few tiles in a row, with the scale of their colours.

    For one image the tiles follow each other and each says its largest value. For several images every method is a
    column and every image a row; columns that do not fit side by side go on below, beside the images again.

    Methods have different units, so each tile is scaled to its own largest value, and the sheet says so: unsigned maps
    from 0 to it, signed ones from minus to plus their largest magnitude with 0 in the middle. A map of an unsigned
    method that holds negative values all the same is drawn as a signed one.

    Args:
        images: uint8 [M, H, W, 3]; None: cells of one colour take their place.
        maps: Relevance, numbers [M, gh, gw] for each method.
        signed: Which of the methods are signed.
        kept: Booleans [M, gh, gw]: patches left after the last stage.
        masks: Object pixels, booleans [M, H, W].
        labels: True classes, integers [M], written beside the rows.
        predicted: Predicted classes, integers [M], likewise.
        class_names: Names of the classes; numbers are shown without them.
        heading: Lines above everything, the first in bold.
        side: Wanted width of a tile, in pixels, see `resized`; 192 is enough for a name of 23 letters.
        across: Tiles in a row.

    Returns:
        uint8 [height, width, 3], on white.

    Raises:
        PrunexError: No method, fewer than two tiles in a row, or arrays whose shapes do not fit the images.

    >>> image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    >>> contact_sheet(image, {"rollout": np.ones((1, 8, 8))}, heading=["cat.jpg"]).dtype
    dtype('uint8')
    """
    if not maps:
        raise PrunexError("no map to draw: give maps of at least one method")
    if across < 2:
        raise PrunexError(f"across={across!r} is not allowed: give at least 2 tiles in a row")
    grid = next(iter(maps.values()))
    height, width = as_numpy(grid).shape[-2:] if images is None else as_pictures(images, 4).shape[1:3]
    # Tiles are as wide as was asked for, so that names fit above them; tall images get taller tiles.
    scenes = Scenes(images, labels, predicted, class_names, masks, round(side * max(1, height / width)), grid)
    boundary = None if kept is None else as_grids(kept, (scenes.count,), "kept")
    columns, two_sided = [], set()
    if boundary is not None:
        columns.append(Column(f"kept patches\n{boundary.mean():.0%} kept", dim_dropped(scenes.cells, boundary)))
    for method, values in maps.items():
        grids = as_grids(values, (scenes.count,), f"maps of {method}", dtype=float)
        # A method may call itself unsigned and still give negative values, which must not be hidden.
        both = method in signed or _negative(grids)
        two_sided.add(both)
        drawn = overlay(scenes.cells, grids, signed=both, floor=0.0)
        if boundary is not None:
            drawn = outline(drawn, boundary, thick=1)
        columns.append(Column(f"{method}\n{_largest(grids, both)}" if scenes.count == 1 else method, drawn))
    rows = scenes.rows()
    bands = [compose(band, rows) for band in _bands(scenes.first(), columns, across, scenes.count > 1)]
    wide = max(_LEAST, *(band.shape[1] for band in bands))
    key = []
    if set(maps) & set(signed):
        key.append("negative: against the explained class")
    if boundary is not None:
        key.append("yellow: border of the kept patches")
    below = _scales(sorted(two_sided), [*key, *scenes.key()], scenes.count, wide)
    return stacked([*([heading_of(heading, wide)] if heading else []), *bands, below])


def _bands(first: list[Column], columns: list[Column], across: int, again: bool) -> list[list[Column]]:
    """Columns in rows of tiles; several images are shown again beside each, in rows of about one length."""
    if not again:
        tiles = [*first, *columns]
        return [tiles[start : start + across] for start in range(0, len(tiles), across)]
    # As few rows as there can be, and those of about one length.
    count = -(-len(columns) // (across - 1))
    length = -(-len(columns) // count)
    return [[*first, *columns[start : start + length]] for start in range(0, len(columns), length)]


def _negative(grids: Floats) -> bool:
    finite = grids[np.isfinite(grids)]
    return bool(finite.size and finite.min() < -_NOTED * abs(finite).max())


def _largest(grids: Floats, signed: bool) -> str:
    """The value at the end of a tile's scale."""
    finite = grids[np.isfinite(grids)]
    if not finite.size:
        return "no finite value"
    top = abs(finite).max() if signed else finite.max()
    if top <= 0:
        return "zero everywhere"
    return f"{'± ' if signed else 'max '}{top:.3g}"


def _scales(kinds: Sequence[bool], key: Sequence[str], count: int, width: int) -> Picture:
    """One bar for unsigned maps and one for signed ones, drawn as the tiles are, and what they mean."""
    top_value = "largest value, written above it" if count == 1 else "largest value"
    rule = (
        f"Each tile has its own scale, up to its {top_value}: compare places within a tile, not colours between tiles."
    )
    lines = textwrap.wrap(" · ".join([rule, *key]), int((width - 2 * GAP) / (0.55 * 12)))
    top, left = 10, 80
    sheet = Sheet(width, top + 22 * len(kinds) + 17 * len(lines) + 8)
    for number, signed in enumerate(kinds):
        y = top + 22 * number
        sheet.put(left, y, _bar(signed))
        high = "+ largest (red: positive, blue: negative)" if signed else "largest value of the tile"
        sheet.write(left - 6, y + 11, "− largest" if signed else "0", 12, anchor="right")
        sheet.write(left + _BAR[1] + 6, y + 11, high, 12)
    for number, line in enumerate(lines):
        sheet.write(GAP, top + 22 * len(kinds) + 12 + 17 * number, line, 12, FAINT)
    return sheet.drawn()


def _bar(signed: bool) -> Picture:
    """The colours of a scale, over grey as a map lies over its image."""
    # Drawn by what draws the tiles, so that the scale cannot tell another story.
    grey = np.full((*_BAR, 3), 128, dtype=np.uint8)
    return overlay(grey, np.linspace(-1 if signed else 0, 1, _BAR[1])[None], signed=signed, floor=0.0)
