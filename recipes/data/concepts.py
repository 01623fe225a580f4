"""Concepts of images in a folder: a table of which has which, and masks of where."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.errors import PrunexError
from prunex.files import folders_in

TABLE, MASKS = "concepts.csv", "concepts"
_VALUES = {"0": 0.0, "1": 1.0, "": math.nan}


@dataclass(eq=False)
class Concepts:
    """What is known of a folder's concepts.

    Attributes:
        root: The folder.
        names: Concepts of the table, in its order.
        rows: By image, as ``split/class/name``, 0, 1 or NaN for each of them.
        placed: Concepts that have masks.
        grid: Patches a side of an image as it enters the model.
    """

    root: Path
    names: list[str]
    rows: dict[str, Tensor]
    placed: list[str]
    grid: int

    @classmethod
    def of(cls, root: Path, image_size: int, patch_size: int | None) -> "Concepts":
        """Read the table, and which concepts have folders of masks.

        Raises:
            PrunexError: For a table that is none, and masks where the patch size is not told, or does not divide.
        """
        names, rows = _table(root)
        folder = root / MASKS
        placed = folders_in(folder) if folder.is_dir() else []
        if placed and (patch_size is None or image_size % patch_size):
            raise PrunexError(
                f"patch_size={patch_size!r} is not allowed: '{folder}' has masks of concepts, so give the side of the "
                f"model's patches, which divides image_size={image_size}"
            )
        return cls(root, names, rows, placed, image_size // (patch_size or image_size))

    def masks_of(self, path: Path) -> list[Path | None]:
        """The mask of each concept that has some, where this image has one of it."""
        below = path.relative_to(self.root).with_suffix(".png")
        masks = [self.root / MASKS / name / below for name in self.placed]
        return [mask if mask.is_file() else None for mask in masks]

    def labels(self, path: Path, places: Sequence[Path | None], pixels: Sequence[Tensor]) -> dict[str, Tensor]:
        """An image's concepts as a batch has them; ``pixels`` are the masks that are there, bool [S, S]."""
        labels = {}
        if self.names:
            unknown = torch.full((len(self.names),), math.nan)
            labels["concepts"] = self.rows.get(path.relative_to(self.root).as_posix(), unknown)
        if self.placed:
            # An image that somebody annotated has nothing of the concepts without a mask; of others nothing is known.
            fill = 0.0 if pixels else math.nan
            spatial = torch.full((self.grid**2, len(self.placed)), fill)
            columns = [i for i, place in enumerate(places) if place is not None]
            for column, mask in zip(columns, pixels, strict=True):
                covered = F.adaptive_max_pool2d(mask.float()[None], self.grid)
                spatial[:, column] = covered.flatten()
            labels["spatial_concepts"] = spatial
        return labels


def _table(root: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Names and rows of a folder's table; of a folder without one, nothing."""
    path = root / TABLE
    if not path.is_file():
        return [], {}
    try:
        # Spreadsheets begin such files with a byte order mark.
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise PrunexError(f"'{path}' is no table ({error}): give image,<concept>,... with 0, 1 or nothing") from error
    header = [name.strip() for name in lines[0]] if lines else []
    names = header[1:]
    if not names or not all(names) or len(set(names)) < len(names):
        raise PrunexError(f"the first line of '{path}' is {header}: give image and names of concepts, each once")
    rows: dict[str, Tensor] = {}
    for number, line in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in line):
            continue
        image, *cells = (cell.strip() for cell in line)
        wrong = [cell for cell in cells if cell not in _VALUES]
        if len(cells) != len(names) or wrong:
            what = f"{wrong[0]!r}" if wrong else f"{len(cells)} values for {len(names)} concepts"
            raise PrunexError(f"line {number} of '{path}' has {what}: give 0, 1 or nothing for each concept")
        if not (root / image).is_file():
            raise PrunexError(
                f"line {number} of '{path}' names {image!r}, which is not there: give train/<class>/<image>"
            )
        rows[Path(image).as_posix()] = torch.tensor([_VALUES[cell] for cell in cells])
    return names, rows
