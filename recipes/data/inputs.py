"""Many images to be explained: what they are called, whether they have changed, and how each is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from prunex.errors import PrunexError
from prunex.files import is_there
from prunex.recipes.data.images import choose_range, read_image
from prunex.recipes.given import image_names

DECODED = 10_000  # images up to which all are decoded beforehand, so that a broken one is told at once


class Files:
    """Image files in a folder and those below it, or one; by number, each with a name below the folder."""

    def __init__(self, root: Path, besides: Path) -> None:
        alone = is_there(root, Path.is_file)
        self.folder = root.parent if alone else root
        self.names: Sequence[str] = [root.name] if alone else image_names(root, besides)

    def __len__(self) -> int:
        return len(self.names)

    def paths(self) -> Iterable[Path]:
        """Where the images lie, one after the other."""
        return (self.folder / name for name in self.names)

    def stamps(self) -> list[str]:
        """What tells whether an image is the one that was explained: its size and when it was written.

        A hash of its bytes would tell more, and would read a million files again before a run goes on.
        """
        stamps = []
        for name in self.names:
            try:
                stat = os.stat(self.folder / name)
            except OSError as error:
                raise PrunexError(f"cannot read image '{self.folder / name}': {error.strerror}") from error
            stamps.append(f"{stat.st_size}-{stat.st_mtime_ns}")
        return stamps

    def choose_range(self, numbers: Iterable[int], count: int, given: int | None) -> int | None:
        """What becomes white of so many images of 16 bits; of not too many it is seen, too, that none is broken."""
        paths = (self.folder / self.names[number] for number in numbers)
        return choose_range(paths, given, whole=count <= DECODED)

    def read(self, number: int, value_range: int | None) -> Image.Image:
        """One image as RGB."""
        return read_image(self.folder / self.names[number], value_range)
