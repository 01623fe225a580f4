"""Results of ``prunex explain`` as they come: shards of many images, and what small runs get besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunex.files import write_whole
from prunex.maps import FOLDER, Maps, write_shard
from prunex.pictures import save_npz
from prunex.recipes.tables import as_csv
from prunex.registry import lookup

ROWS, BYTES = 1000, 2**24  # of a shard: whichever comes first
SMALL = 10_000  # images up to which maps.npz is written, too

Arrays = Mapping[str, NDArray[Any]]
Spent = Mapping[str, tuple[float, float, int]]  # by method seconds, forwards, images


class Shards:
    """One process's shards. Every batch is a file at once, so that a killed run has lost no more than was at work.

    When there are many, they are joined to one: a million images are a thousand files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[tuple[Path, Arrays, Spent]] = []
        self._rows = self._bytes = 0

    def add(self, arrays: Arrays, spent: Spent) -> None:
        """Write the rows of a batch."""
        self._parts.append((write_shard(self.folder, arrays, spent), arrays, spent))
        self._rows += len(next(iter(arrays.values())))
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._rows >= ROWS or self._bytes >= BYTES:
            self.join()

    def join(self) -> None:
        """Make one file of those that are small."""
        parts, self._parts, self._rows, self._bytes = self._parts, [], 0, 0
        if len(parts) < 2:
            return
        whole = joined([arrays for _, arrays, _ in parts])
        write_shard(self.folder, whole, total(spent for _, _, spent in parts))
        # Where this is cut short some rows are there twice, and alike.
        for path, _, _ in parts:
            path.unlink()


def joined(parts: Sequence[Arrays]) -> dict[str, NDArray[Any]]:
    """Rows of several files one after another."""
    whole = {}
    for name in parts[0]:
        whole[name] = np.concatenate([arrays[name] for arrays in parts])
    return whole


def total(parts: Any) -> dict[str, tuple[float, float, int]]:
    """What some batches took together."""
    sums: dict[str, tuple[float, float, int]] = {}
    for spent in parts:
        for method, more in spent.items():
            before = sums.get(method, (0.0, 0.0, 0))
            sums[method] = (before[0] + more[0], before[1] + more[1], before[2] + more[2])
    return sums


def write_besides(out: Path) -> str:
    """Write times.csv, and maps.npz of not too many images, from all shards; give back what is to be said of it."""
    maps = Maps(out)
    write_whole(out / "times.csv", as_csv(_times(maps)))
    whole = out / f"{FOLDER}.npz"
    if len(maps) <= SMALL:
        save_npz(whole, {"files": np.array(maps.names), **maps[:]}, compressed=False)
        return ""
    # One of when there were fewer would be taken for all.
    whole.unlink(missing_ok=True)
    return f"maps of {len(maps):,} images lie in {maps.folder}, for prunex.open_maps: too many for a {whole.name}"


def _times(maps: Maps) -> Iterator[Sequence[Any]]:
    """A heading and the methods' mean times, a row each."""
    yield ["method", "seconds_per_image", "forwards_per_image", "images", "needs"]
    for name, (seconds, forwards, images) in maps.spent().items():
        count = max(1, images)
        yield name, f"{seconds / count:.4g}", f"{forwards / count:g}", len(maps), lookup("explainer", name).needs
