"""One picture for many images: what each stage kept, and what each method points at."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunex.errors import PrunexError
from prunex.pictures.arrays import Bools, Picture, as_grids, as_numpy, as_pictures, on_pixels, resized
from prunex.pictures.overlay import OBJECT, dim_dropped, outline, overlay, paint_groups
from prunex.pictures.sheet import INK, RIGHT, WRONG, Column, compose

_PLAIN = (96, 150, 220)  # a cell without an image


class Scenes:
    """Images at the size of a cell, and what is known of each: its classes and its object. As for `kept_mosaic`.

    Without images cells are of one colour, of the shape of a grid [..., M, gh, gw] that will be drawn on them.
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        predicted: Any = None,
        class_names: Sequence[str] | None = None,
        masks: Any = None,
        side: int = 160,
        grid: Any = None,
    ) -> None:
        self.plain = images is None
        pictures = as_pictures(_plain(grid, side) if images is None else images, 4)
        self.objects: Bools | None = None if masks is None else as_grids(masks, pictures.shape[:1], "masks")
        self.cells = resized(pictures, side)
        self.count = len(self.cells)
        self.class_names = class_names
        self.labels, self.predicted = self.numbers(labels), self.numbers(predicted)

    def numbers(self, values: Any) -> list[int] | None:
        """Class numbers, one an image."""
        if values is None:
            return None
        numbers = [int(v) for v in np.atleast_1d(as_numpy(values))]
        if len(numbers) != self.count:
            raise PrunexError(f"{len(numbers)} class numbers for {self.count} images: give one for each image")
        return numbers

    def first(self) -> list[Column]:
        """The images themselves, with their objects outlined where masks are known; nothing without images."""
        if self.plain:
            return []
        return [Column("input", self.cells if self.objects is None else outline(self.cells, self.objects, OBJECT))]

    def rows(self) -> list[list[tuple[str, str]]]:
        """For each image its class and what was predicted, as coloured words."""
        rows: list[list[tuple[str, str]]] = [[] for _ in range(self.count)]
        for index, words in enumerate(rows):
            if self.labels is not None:
                words.append((class_name(self.labels[index], self.class_names), INK))
            if self.predicted is None:
                continue
            guess = class_name(self.predicted[index], self.class_names)
            if self.labels is None:
                words.append((f"→ {guess}", INK))
            elif self.labels[index] == self.predicted[index]:
                words.append(("✓ predicted", RIGHT))
            else:
                words.append((f"✗ {guess}", WRONG))
        return rows

    def key(self) -> list[str]:
        """What the outline of the images means."""
        return [] if self.objects is None else ["cyan: the object's mask"]

    def mosaic(self, columns: Sequence[Column], title: str | None, key: Sequence[str] = ()) -> Picture:
        """The images and columns beside them, under a title."""
        return compose([*self.first(), *columns], self.rows(), title, [*key, *self.key()])

    def kept(self, name: str, grid: Bools) -> Column:
        """What is left of each image, titled with its share, and of the object where masks are known."""
        title = f"{name} · {grid.mean():.0%} kept"
        cover = float("nan") if self.objects is None else covered(grid, self.objects)
        title += "" if np.isnan(cover) else f"\ncovers {cover:.0%} of object"
        return Column(title, dim_dropped(self.cells, grid))


def _plain(grid: Any, side: int) -> Picture:
    """Pictures of one colour for a grid [..., M, gh, gw], every patch of it a whole number of pixels."""
    count, gh, gw = as_numpy(grid).shape[-3:]
    factor = max(1, -(-side // max(gh, gw)))
    return np.full((count, gh * factor, gw * factor, 3), _PLAIN, dtype=np.uint8)


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
        images: uint8 [M, H, W, 3]; None: cells of one colour take their place.
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
    if as_numpy(kept).ndim != 4:
        raise PrunexError(f"kept of shape {as_numpy(kept).shape} cannot be drawn: give [stages, images, gh, gw]")
    scenes = Scenes(images, labels, predicted, class_names, masks, side, kept)
    stages = as_grids(kept, (len(as_numpy(kept)), scenes.count), "kept")
    # Merged tokens are neither kept nor dropped, so groups are painted instead.
    if groups is None:
        columns = [scenes.kept(f"stage {number}", stage) for number, stage in enumerate(stages, start=1)]
        return scenes.mosaic(columns, title)
    columns = []
    for number, merged in enumerate(as_grids(groups, stages.shape[:2], "groups", dtype=int), start=1):
        words = f"stage {number}\n{tokens_left(merged):.0%} of tokens"
        columns.append(Column(words, paint_groups(scenes.cells, merged)))
    key = ["flat colour: patches merged into one token", "sharp: tokens of their own"]
    return scenes.mosaic(columns, title, key)


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
    stage on its own scale from 0. ``shares`` are numbers [S, M, gh, gw] in 0..1, stage by stage, and ``tokens`` tells
    how many each stage leaves; all else, what comes back and what is refused is as for `kept_mosaic`.
    """
    values = as_numpy(shares)
    # Counts come from the pruner and shares from the trace: both must speak of the same stages.
    if values.ndim != 4 or len(values) != len(tokens):
        raise PrunexError(
            f"shares of shape {values.shape} with {len(tokens)} token counts cannot be drawn: give "
            "[stages, images, gh, gw] and one count a stage"
        )
    scenes = Scenes(images, labels, predicted, class_names, masks, side, shares)
    columns = []
    for number, (stage, count) in enumerate(zip(values, tokens, strict=True), start=1):
        grid = as_grids(stage, (scenes.count,), "shares", dtype=float)
        drawn = overlay(scenes.cells, grid, signed=False, floor=0.0)
        columns.append(Column(f"stage {number}\n{count} tokens", drawn))
    return scenes.mosaic(columns, title, ["bright: a large part in a token"])


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

    ``maps`` are relevancy, numbers [M, gh, gw] for each method, each map on its own scale (see `overlay`);
    ``kept_last`` booleans [M, gh, gw], the patches left after the last stage, whose boundary is drawn; and ``targets``
    the class that was explained, integers [M] for each method, -1 where the method knows no class. All else, what comes
    back and what is refused is as for `kept_mosaic`.
    """
    if not maps:
        raise PrunexError("no map to draw: give maps of at least one method")
    scenes = Scenes(images, labels, predicted, class_names, masks, side)
    boundary = None if kept_last is None else as_grids(kept_last, (scenes.count,), "kept_last")
    columns = []
    for method, values in maps.items():
        drawn = overlay(scenes.cells, as_grids(values, (scenes.count,), f"maps of {method}", dtype=float))
        if boundary is not None:
            drawn = outline(drawn, boundary, thick=1)
        explained, marks = _explained(scenes, targets.get(method) if targets else None)
        columns.append(Column(f"{method}\n{explained}".strip(), drawn, marks))
    key = ["bright: most relevant, each map on its own scale"]
    # The key explains only colours that are there.
    if any((as_numpy(values) < 0).any() for values in maps.values()):
        key.append("red for the class, blue against it")
    if boundary is not None:
        key.append("yellow: kept patches")
    return scenes.mosaic(columns, title, key)


def _explained(scenes: Scenes, targets: Any) -> tuple[str, list[str] | None]:
    """Which classes a column explains: a subtitle, and each class's name where no word says it all."""
    numbers = scenes.numbers(targets)
    if numbers is None:
        return "", None
    if all(target < 0 for target in numbers):
        return "of no class", None
    # Words for what holds of all images; else every cell names its class.
    if numbers == scenes.predicted:
        return "for the predicted class", None
    if numbers == scenes.labels:
        return "for the true class", None
    return "for the class named", [class_name(target, scenes.class_names) for target in numbers]


def spaced(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values: the first, the last, and evenly spaced ones between.

    >>> spaced(range(10), 4)
    [0, 3, 6, 9]
    """
    # The first and the last are what a change is seen by.
    if len(values) <= most:
        return list(values)
    places = np.linspace(0, len(values) - 1, max(most, 1)).round().astype(int)
    return [values[place] for place in places] if most > 1 else [values[-1]]


def class_name(number: int, class_names: Sequence[str] | None) -> str:
    """Name of a class, or its number where no name is known."""
    known = class_names is not None and 0 <= number < len(class_names)
    return str(class_names[number]) if known and class_names is not None else f"class {number}"


def covered(kept: Bools, objects: Bools) -> float:
    """Mean share of the objects' pixels [M, H, W] that lie in kept patches [M, gh, gw]; NaN without any object.

    >>> float(covered(np.array([[[True, False]]]), np.array([[[True, True, True, False]]])).__round__(2))
    0.67
    """
    # Per image, then the mean: a large object counts no more than a small one.
    inside = (on_pixels(kept, *objects.shape[-2:]) & objects).sum(axis=(-2, -1))
    area = objects.sum(axis=(-2, -1))
    return float((inside[area > 0] / area[area > 0]).mean()) if area.any() else float("nan")


def tokens_left(groups: NDArray[Any]) -> float:
    """Tokens that hold patches, as a share of the patches: groups [M, gh, gw] are equal for patches of one token.

    >>> tokens_left(np.array([[[0, 0, 1, -1]]]))
    0.5
    """
    return float(np.mean([len(np.unique(grid[grid >= 0])) / grid.size for grid in groups]))
