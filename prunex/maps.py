"""Maps of many images on disk: shards in safetensors, and a reader that opens of them only what is asked for."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from prunex.errors import PrunexError, unknown
from prunex.files import DRAFT, write_whole
from prunex.untrusted import read_json

FORMAT = 1
FOLDER = "maps"  # below what was given as --out
ABOUT, LISTING = "about.json", "images.jsonl"
INDEX = "index"  # the tensor that says which lines of the listing a shard's rows are of
MOST_OPEN = 64  # shards kept open at once
_SPENT = "spent"  # in a shard's metadata: what its rows cost


def open_maps(folder: str | Path) -> Maps:
    """Open what ``prunex explain --out folder`` wrote, of any number of images, from any number of processes.

    Only names and places are read here; maps are read when they are asked for. A run that is still going on may be
    opened: its images so far are there.

    Args:
        folder: What was given as ``--out``, or its ``maps/``.

    Raises:
        PrunexError: A folder that holds no maps of this command, those of a newer version, or a file that is damaged.

    >>> from tempfile import mkdtemp
    >>> folder = Path(mkdtemp())
    >>> _ = write_listing(folder / "maps", ["a.png", "b.png"], ["", ""])
    >>> _ = write_about(folder / "maps", {"methods": ["rollout"]})
    >>> arrays = {"index": np.arange(2), "rollout": np.ones((2, 4, 4), np.float32)}
    >>> _ = write_shard(folder / "maps", arrays, {})
    >>> maps = open_maps(folder)
    >>> maps, maps.names[1], maps["b.png", "rollout"].shape, maps[0:2, "rollout"].shape
    (Maps(2 images, methods=['rollout']), 'b.png', (4, 4), (2, 4, 4))
    """
    return Maps(folder)


class Maps:
    """Explanations of many images, read from disk when they are asked for.

    ``maps[which]`` is a dictionary of all arrays, ``maps[which, "rollout"]`` one of them and
    ``maps[which, ["rollout", "kept"]]`` a dictionary of some, where ``which`` is an image's number or name, a slice, or
    a list of numbers or names. Arrays are as in ``maps.npz``: a method's maps float32 [gh, gw] of one image and
    [N, gh, gw] of several, ``predicted`` and ``target`` (or ``value``) int64 [N], ``kept`` bool [N, gh, gw].

    Attributes:
        names: Images in the order in which they were listed, as paths below the folder of images.
        methods: Explainers that there are maps of.
        columns: Shape of one row by array, methods among them.
        about: With what the maps were made, in plain values.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = _folder_of(Path(folder))
        self.about = _read_about(self.folder)
        listed, self._stamps = read_listing(self.folder)
        self.columns: dict[str, tuple[int, ...]] = {}
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._locate(len(listed))
        # Of an image that has changed, the line that was added last counts.
        last = {name: number for number, name in enumerate(listed)}
        written = self._shard >= 0
        self._numbers = np.array([n for name, n in last.items() if written[n]], dtype=np.int64)
        self._numbers.sort()
        self.names: list[str] = [listed[n] for n in self._numbers]
        self.methods = [name for name in self.about.get("methods", []) if name in self.columns]
        # Of several labels a method has a map each.
        several = {name.partition(":")[0] for name in self.columns if ":" in name} & {*self.about.get("methods", [])}
        self.methods += [name for name in self.columns if name.partition(":")[0] in several]

    def __repr__(self) -> str:
        return f"Maps({len(self):,} images, methods={self.methods})"

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def place(self, name: str) -> int:
        """The number of an image."""
        if name not in self._places:
            raise unknown(f"image in {self.folder}", name, self.names[:10_000])
        return self._places[name]

    def __getitem__(self, key: Any) -> Any:
        which, columns = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        wanted = [columns] if isinstance(columns, str) else columns
        wanted = list(self.columns if wanted is None else wanted)
        for name in wanted:
            if name not in self.columns:
                raise unknown(f"array in {self.folder}", str(name), self.columns)
        places, single = self._which(which)
        arrays = self._read(self._numbers[places], wanted)
        if single:
            arrays = {name: array[0] for name, array in arrays.items()}
        return arrays[wanted[0]] if isinstance(columns, str) else arrays

    def batches(
        self, size: int = 1024, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[list[str], dict[str, NDArray[Any]]]]:
        """Names and arrays of so many images at a time, in order: all of them, without ever holding all."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.names[part], self[part] if columns is None else self[part, list(columns)]

    def spent(self) -> dict[str, tuple[float, float, int]]:
        """Of each method seconds and forwards of all images, and how many these are."""
        sums: dict[str, tuple[float, float, int]] = {}
        for path in self._shards:
            metadata = self._opened(path).metadata() or {}
            try:
                rows = json.loads(metadata.get(_SPENT, "{}"))
                for method, (seconds, forwards, images) in rows.items():
                    before = sums.get(method, (0.0, 0.0, 0))
                    sums[method] = (before[0] + seconds, before[1] + forwards, before[2] + int(images))
            except (ValueError, TypeError, AttributeError) as error:
                raise PrunexError(f"{path} is damaged: what its rows cost cannot be read") from error
        return sums

    def has(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which lines of the listing have rows."""
        inside = numbers < len(self._shard)
        written: NDArray[np.bool_] = inside & (self._shard[np.where(inside, numbers, 0)] >= 0)
        return written

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def _which(self, which: Any) -> tuple[NDArray[np.int64], bool]:
        """The places that were asked for, and whether it is one image."""
        if isinstance(which, slice):
            return np.arange(len(self))[which], False
        single = isinstance(which, str | int | np.integer) and not isinstance(which, bool)
        several = [which] if single else which
        places = []
        for name in several if isinstance(several, list | tuple | range | np.ndarray) else [None]:
            if isinstance(name, str):
                places.append(self.place(name))
            elif isinstance(name, int | np.integer) and not isinstance(name, bool):
                if not -len(self) <= name < len(self):
                    raise PrunexError(f"there is no image {name}: there are {len(self):,}, from 0")
                places.append(int(name) % len(self))
            else:
                raise PrunexError(
                    f"{repr(which)[:100]} names no image: give a number, a name, a slice, or a list of these, and "
                    'after a comma an array, as in maps["a.png", "rollout"]'
                )
        return np.array(places, dtype=np.int64), single

    def _locate(self, count: int) -> None:
        """Where the row of each line of the listing lies."""
        # A run that goes on joins small shards to larger ones, and what was listed may be gone when it is opened.
        for left in reversed(range(20)):
            try:
                self._shards = shards_of(self.folder)
                self._shard, self._row = np.full(count, -1, np.int32), np.zeros(count, np.int32)
                for number, path in enumerate(self._shards):
                    index = self._index_of(path, count)
                    self._shard[index], self._row[index] = number, np.arange(len(index))
                return
            except FileNotFoundError:
                if not left:
                    raise

    def _index_of(self, path: Path, count: int) -> NDArray[np.int64]:
        """A shard's rows as lines of the listing; a shard that does not fit is refused."""
        columns = {}
        try:
            shard = self._opened(path)
            index: NDArray[np.int64] = shard.get_tensor(INDEX)
            for name in shard.keys():  # noqa: SIM118  (it is no dictionary)
                shape = shard.get_slice(name).get_shape()
                columns[name] = tuple(shape[1:])
                if len(shape) < 1 or shape[0] != len(index):
                    raise ValueError(f"{name} has {shape} numbers for {len(index)} images")
        except FileNotFoundError:
            raise
        except Exception as error:  # safetensors has its own error
            raise damaged(path, error) from error
        if index.dtype != np.int64 or (len(index) and not 0 <= index.min() <= index.max() < count):
            raise damaged(path, f"its rows are of no image in {LISTING}")
        del columns[INDEX]
        self.columns = self.columns or columns
        if columns != self.columns:
            raise damaged(path, f"it holds {columns}, and other files hold {self.columns}")
        return index

    def _opened(self, path: Path) -> Any:
        # Each open shard takes a file handle, of which a process has only so many.
        if path not in self._open:
            self._open[path] = safe_open(str(path), "np")
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    def _read(self, numbers: NDArray[np.int64], columns: Sequence[str]) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        for again in (True, False):
            shards, rows = self._shard[numbers], self._row[numbers]
            try:
                for shard in np.unique(shards):
                    path, chosen = self._shards[shard], np.flatnonzero(shards == shard)
                    low, high = rows[chosen].min(), rows[chosen].max() + 1
                    for name in columns:
                        part = self._opened(path).get_slice(name)[int(low) : int(high)]
                        if name not in arrays:
                            arrays[name] = np.empty((len(numbers), *part.shape[1:]), part.dtype)
                        arrays[name][chosen] = part[rows[chosen] - low]
                break
            except FileNotFoundError:
                if not again:
                    raise
                # A run that goes on has joined this shard to another meanwhile.
                self._locate(len(self._shard))
        return arrays or {name: np.empty((0, *self.columns[name])) for name in columns}


def damaged(path: Path, why: object) -> PrunexError:
    """What is said of a file of maps that cannot be read."""
    reason = " ".join(str(why).split())[:200] or type(why).__name__
    return PrunexError(f"{path} is damaged: {reason}; remove it, and the same prunex explain makes what it held again")


def _folder_of(folder: Path) -> Path:
    """Where the maps lie: in a folder itself or its ``maps/``."""
    for candidate in (folder / FOLDER, folder):
        if (candidate / ABOUT).is_file() and (candidate / LISTING).is_file():
            return candidate
    other = "; its maps.npz is read by numpy.load" if (folder / "maps.npz").is_file() else ""
    raise PrunexError(f"{folder} holds no maps of many images: give a folder that prunex explain --out wrote{other}")


def _read_about(folder: Path) -> dict[str, Any]:
    about = read_json(folder / ABOUT)
    if not isinstance(about, dict) or not isinstance(about.get("format"), int) or "methods" not in about:
        raise PrunexError(f"{folder / ABOUT} was not written by prunex explain: give a folder that was its --out")
    if about["format"] > FORMAT:
        raise PrunexError(
            f"{folder} has format {about['format']} of prunex {str(about.get('prunex'))[:40]}, and this version reads "
            f"{FORMAT}: install a newer prunex-vit"
        )
    return about


def shards_of(folder: Path) -> list[Path]:
    """The files that hold maps, drafts left out."""
    paths = sorted(folder.glob("*.safetensors"))
    return [path for path in paths if not path.name.startswith(DRAFT)]


def read_listing(folder: Path) -> tuple[list[str], list[str]]:
    """Names of all images that were ever listed, and by what each one's content is known again."""
    names, stamps = [], []
    try:
        with open(folder / LISTING, encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                names.append(str(entry["name"]))
                stamps.append(str(entry["stamp"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PrunexError(f"{folder / LISTING} is damaged: {str(error)[:200]}; start over with --again") from error
    return names, stamps


def write_listing(folder: Path, names: Sequence[str], stamps: Sequence[str]) -> Path:
    """Write the names that rows' numbers stand for: a line of JSON an image."""
    pairs = zip(names, stamps, strict=True)
    lines = (json.dumps({"name": name, "stamp": stamp}) + "\n" for name, stamp in pairs)
    return write_whole(folder / LISTING, "".join(lines).encode())


def write_about(folder: Path, about: Mapping[str, Any]) -> Path:
    """Write with what the maps are made."""
    text = json.dumps({"format": FORMAT, **about}, indent=2, allow_nan=False)
    return write_whole(folder / ABOUT, (text + "\n").encode())


def write_shard(
    folder: Path, arrays: Mapping[str, NDArray[Any]], spent: Mapping[str, tuple[float, float, int]]
) -> Path:
    """Write rows of some images, whole or not at all; ``index`` says which. No other shard has its name."""
    content = save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, {_SPENT: json.dumps(spent)})
    # Rows from one image on may be written again in other company, and must not take the place of these.
    return write_whole(folder / f"{int(arrays[INDEX][0]):09d}-{token_hex(6)}.safetensors", content)
