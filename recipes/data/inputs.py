"""Many images to be explained: what they are called, whether they have changed, and how each is read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from prunex.errors import PrunexError
from prunex.files import is_there
from prunex.recipes.data.images import choose_range, read_image
from prunex.recipes.data.tables import read_list, read_table
from prunex.recipes.data.tar_members import read_members
from prunex.recipes.given import TABLES, image_names, is_dataset, tar_files
from prunex.untrusted import Held

DECODED = 10_000  # images up to which all are decoded beforehand, so that a broken one is told at once


class Inputs(ABC):
    """Images by number, each with a name of its own below the folder that results go to.

    Attributes:
        names: Paths with slashes, none of which leads out of a folder.
        labels: What each image is said to be, a class's number or name; None where nothing says so.
    """

    names: Sequence[str]
    labels: Sequence[int | str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def image(self, number: int) -> Path | Held:
        """Where an image is read from."""

    @abstractmethod
    def stamps(self) -> list[str]:
        """What tells whether an image is the one that was explained."""

    def files(self) -> Iterable[Path]:
        """Files that nothing may be written over."""
        return ()

    def choose_range(self, numbers: Iterable[int], count: int, given: int | None) -> int | None:
        """What becomes white of so many images of 16 bits; of not too many it is seen, too, that none is broken."""
        return choose_range(map(self.image, numbers), given, whole=count <= DECODED)

    def read(self, number: int, value_range: int | None) -> Image.Image:
        """One image as RGB."""
        return read_image(self.image(number), value_range)


class Files(Inputs):
    """Image files by their names below a folder."""

    def __init__(
        self, folder: Path, paths: Sequence[str], labels: Sequence[int | str] | None = None, given: str = ""
    ) -> None:
        self.folder, self.paths, self.labels = folder, paths, labels
        # A list may name files anywhere.
        self.names = _names(folder, paths, given) if given else paths

    def image(self, number: int) -> Path:
        """The file's path."""
        return self.folder / self.paths[number]

    def files(self) -> Iterable[Path]:
        """All of them."""
        return (self.folder / path for path in self.paths)

    def stamps(self) -> list[str]:
        """Size in bytes, and when it was written.

        A hash of its bytes would tell more, and would read a million files again before a run goes on.
        """
        return [_stamp(self.folder / path) for path in self.paths]


class TarShards(Inputs):
    """Images in uncompressed tar files, as webdataset writes them: ``a.jpg``, and ``a.cls`` with a number's text."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = shards
        names: list[str] = []
        self._places: list[tuple[int, int, int]] = []
        labels: list[int | str | None] = []
        for number, shard in enumerate(shards):
            for name, offset, size, label in read_members(shard):
                names.append(f"{shard.stem}/{name}")
                self._places.append((number, offset, size))
                labels.append(label)
        if not names:
            raise PrunexError(f"no images in {shards[0]}{' and others' * (len(shards) > 1)}: give other tar files")
        self.names = _once(names, "tar files")
        # All or none: an image without one would have no class to be explained.
        if None not in labels:
            self.labels = [label for label in labels if label is not None]

    def image(self, number: int) -> Held:
        """Its bytes, which are read when they are needed."""
        shard, offset, size = self._places[number]
        return Held(self.names[number], self.shards[shard], offset, size)

    def files(self) -> Iterable[Path]:
        """The tar files."""
        return self.shards

    def stamps(self) -> list[str]:
        """Those of its tar file, and where it lies in it."""
        of = [_stamp(shard) for shard in self.shards]
        return [f"{of[shard]}-{offset}" for shard, offset, _ in self._places]


class SavedDataset(Inputs):
    """A folder that ``save_to_disk`` of Hugging Face's datasets wrote: its first column of images, and a label."""

    def __init__(self, folder: Path) -> None:
        try:
            import datasets
        except ImportError as error:
            raise PrunexError(f"{folder} needs datasets, which is not installed: pip install datasets") from error
        try:
            rows: Any = datasets.load_from_disk(str(folder))
        except Exception as error:  # pyarrow has its own
            raise PrunexError(f"{folder} is damaged: {' '.join(str(error).split())[:200]}") from error
        if isinstance(rows, datasets.DatasetDict):
            raise PrunexError(f"{folder} has several splits: give one, {' or '.join(str(folder / s) for s in rows)}")
        columns = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise PrunexError(f"{folder} has no column of images: it has {', '.join(rows.column_names)}")
        self._column, self._mark = columns[0], rows._fingerprint
        # As bytes, which are decoded when an image's turn comes, as files are.
        self._rows = rows.cast_column(self._column, datasets.Image(decode=False))
        self.names = [f"{number:08d}.png" for number in range(len(rows))]
        if "label" in rows.column_names:
            self.labels = rows["label"][:]

    def image(self, number: int) -> Path | Held:
        """Its bytes, or the file that it names."""
        entry = self._rows[number][self._column]
        return Path(entry["path"]) if entry["bytes"] is None else Held(self.names[number], content=entry["bytes"])

    def stamps(self) -> list[str]:
        """The dataset's fingerprint: another dataset is explained anew."""
        return [self._mark] * len(self.names)


def open_inputs(given: str, besides: Path) -> Inputs:
    """The images that ``--images`` names: a folder, a file, a list, a table, tar files or a dataset."""
    path = Path(given)
    # Before folders are: one of tar files is a folder, too.
    shards = tar_files(given)
    if shards:
        if is_there(path, Path.is_dir) and image_names(path, besides, least=0):
            raise PrunexError(f"{path} holds both images and tar files: give a folder of one kind")
        return TarShards(shards)
    if is_dataset(path):
        return SavedDataset(path)
    if not is_there(path, Path.is_file):
        return Files(path, image_names(path, besides))
    kind = path.suffix.lower()
    if kind not in TABLES:
        return Files(path.parent, [path.name])
    paths, labels = read_list(path) if kind == ".txt" else read_table(path)
    if not paths:
        raise PrunexError(f"{path} names no image: give a path a {'line' if kind == '.txt' else 'row'}")
    return Files(path.parent, paths, labels, given)


def _names(folder: Path, paths: Sequence[str], given: str) -> list[str]:
    """What files are called: by their paths below the list's folder, or from the root where they lie elsewhere."""
    names = []
    top = os.path.abspath(folder)
    for path in paths:
        whole = os.path.normpath(os.path.join(top, path))
        inside = whole.startswith(top.rstrip(os.sep) + os.sep)
        names.append((os.path.relpath(whole, top) if inside else whole.lstrip(os.sep)).replace(os.sep, "/"))
    return _once(names, given)


def _once(names: list[str], where: str) -> list[str]:
    """The names; one that comes twice is refused, since there would be two maps by one name."""
    if len(set(names)) < len(names):
        twice = next(name for name, group in groupby(sorted(names)) if len(list(group)) > 1)
        raise PrunexError(f"'{twice}' is twice in {where}: list each image once")
    return names


def _stamp(path: Path) -> str:
    try:
        stat = os.stat(path)
    except (OSError, ValueError) as error:  # a zero byte
        raise PrunexError(f"cannot read image '{path}': {getattr(error, 'strerror', error)}") from error
    return f"{stat.st_size}-{stat.st_mtime_ns}"
