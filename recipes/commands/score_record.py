"""What ``prunex score`` keeps of one explainer on one model, so that an interrupted start goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from prunex.files import remove_drafts
from prunex.maps import INDEX, shards_of
from prunex.metrics.scoring import columns
from prunex.pictures.arrays import save_npz
from prunex.recipes.commands.shards import Shards, joined
from prunex.recipes.runs import token_pruning
from prunex.removal.game import ROUTES
from prunex.untrusted import read_npz

_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # a PrunexError is a ValueError


@dataclass
class Record:
    """What is known of one method on one model: its maps, and values per image of each metric; a file."""

    path: Path
    key: str  # a hash of the model, images, method and options
    again: bool = False  # start anew whatever the file holds
    images: int | None = None  # how many there are, or any
    grid: tuple[int, int] | None = None
    keys: dict[str, str] = field(default_factory=dict)  # what else each of the values depends on, by their arrays
    arrays: dict[str, Any] = field(default_factory=dict)  # maps, the class explained, and values by metric
    fine: bool = False  # whether the method's own map is finer than a patch
    cost: list[float] = field(default_factory=lambda: [0.0, 0.0])  # seconds and forwards an image of the explanation
    seconds: dict[str, float] = field(default_factory=dict)  # of metrics, together with those they share with
    writes: bool = True  # of several processes, the first one

    def __post_init__(self) -> None:
        """Take what is there; a file that is damaged counts as none, one of something else waits beside it."""
        if self.writes:
            self._make_way()
        if self.again or not self.path.is_file():
            return
        with suppress(*_DAMAGED):
            self._take(read_npz(self.path))

    def _make_way(self) -> None:
        """Put aside a file of something else, and take back one of this that was."""
        key = self._key_of(self.path)
        if key not in ("", self.key):
            # Kept: whoever goes back to those options finds it again.
            os.replace(self.path, self._beside(key))
        if not self.path.is_file() and self._key_of(self._beside(self.key)):
            os.replace(self._beside(self.key), self.path)

    def _beside(self, key: str) -> Path:
        """Where a file waits while one of another model, data or options has its name."""
        return self.path.with_name(f"{self.path.stem}-{key[:12]}.npz")

    def _key_of(self, path: Path) -> str:
        """What a file is of; "" where there is none that is whole."""
        with suppress(*_DAMAGED):
            key = str(json.loads(str(read_npz(path)["about"]))["key"])
            return key if re.fullmatch("[0-9a-f]{64}", key) else ""
        return ""

    def _take(self, arrays: dict[str, Any]) -> None:
        about = json.loads(str(arrays.pop("about")))
        if about["key"] != self.key or not self._fits(arrays):
            return
        seconds, explanation = about["cost"]
        keys = {name: str(key) for name, key in about["keys"].items() if name in arrays}
        spent = {name: float(value) for name, value in about["seconds"].items()}
        self.cost, self.fine = [float(seconds), float(explanation)], bool(about["fine"])
        self.arrays, self.keys, self.seconds = arrays, keys, spent

    def _fits(self, arrays: Mapping[str, Any]) -> bool:
        """Whether arrays are of these images: a file may come from anywhere."""
        maps, target = arrays["maps"], arrays["target"]
        count = len(maps) if self.images is None else self.images
        if maps.dtype.kind != "f" or maps.ndim != 3 or len(maps) != count or target.dtype != np.int64:
            return False
        if target.shape != (count,) or self.grid not in (None, maps.shape[1:]):
            return False
        for name, values in arrays.items():
            wanted = (count, *columns(name.partition("@")[0]))
            if name not in ("maps", "target") and (values.dtype.kind not in "fbi" or values.shape != wanted):
                return False
        return True

    @property
    def has_maps(self) -> bool:
        """Whether there are maps."""
        return "maps" in self.arrays

    def values(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """Values by metric, of those with these keys."""
        return {name: self.tensor(_stored(name, key)) for name, key in keys.items() if self.knows(name, key)}

    def knows(self, name: str, key: str) -> bool:
        """Whether a metric's values are there that depend on that."""
        return self.keys.get(_stored(name, key)) == key

    def tensor(self, name: str) -> Tensor:
        """One of the arrays."""
        return torch.from_numpy(self.arrays[name])

    def maps(self, maps: Tensor, target: Tensor | None, fine: bool, values: Mapping[str, Tensor]) -> None:
        """Take maps, and the values that came with them; the next :meth:`add` writes them."""
        self.arrays["maps"], self.fine = maps.numpy(), fine
        self.arrays["target"] = np.full(len(maps), -1) if target is None else target.numpy()
        self.arrays |= {name: tensor.numpy() for name, tensor in values.items()}

    def add(self, values: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
        """Take values by metric; the process that writes writes everything, whole or not at all."""
        self.arrays |= {_stored(name, keys[name]): tensor.numpy() for name, tensor in values.items()}
        self.keys |= {_stored(name, key): key for name, key in keys.items()}
        if not self.writes:
            return
        about = {"key": self.key, "keys": self.keys, "fine": self.fine, "cost": self.cost, "seconds": self.seconds}
        # Uncompressed, for it is written anew after every metric.
        save_npz(self.path, {**self.arrays, "about": np.array(json.dumps(about))}, compressed=False)


class Rows:
    """What one pass over the images has made so far, in a folder that all processes write to.

    Whoever is killed has lost no more than the batch at work.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._shards = Shards(folder)

    def done(self) -> Tensor:
        """Which images have rows, bool [N]; files that are damaged are removed."""
        done = torch.zeros(self.count, dtype=torch.bool)
        if self.folder.is_dir():
            remove_drafts(self.folder)
        for path in shards_of(self.folder):
            try:
                done[torch.from_numpy(_read_shard(path, self.count)[INDEX])] = True
            except Exception:  # safetensors has its own error
                path.unlink()
        return done

    def add(self, places: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Write a batch."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in rows.items()}
        self._shards.add({INDEX: places.numpy(), **arrays}, {})

    def join(self) -> None:
        """Make one file of this process's."""
        self._shards.join()

    def whole(self) -> dict[str, Tensor]:
        """All images' rows in order, of all processes."""
        read = [_read_shard(path, self.count) for path in shards_of(self.folder)]
        # Where a file was written twice, by a process that was killed while it joined some, rows are alike.
        order = np.unique(np.concatenate([arrays[INDEX] for arrays in read]), return_index=True)[1]
        return {name: torch.from_numpy(rows[order]) for name, rows in joined(read).items() if name != INDEX}

    def remove(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_shard(path: Path, count: int) -> dict[str, Any]:
    """Arrays of one file, all with a row for each of its images."""
    arrays = load_file(path)
    index = arrays[INDEX]
    if index.dtype != np.int64 or not len(index) or not 0 <= index.min() <= index.max() < count:
        raise ValueError("its rows are of other images")
    if any(len(array) != len(index) for array in arrays.values()):
        raise ValueError("some rows are missing")
    return arrays


def _stored(name: str, key: str) -> str:
    """The array of a metric's values: one each for ways to take patches away that were asked for."""
    return f"{name}@{key}" if key in ROUTES else name


def digest(model: nn.Module) -> str:
    """A hash of a model's weights, its modules' plain settings and its pruner's options."""
    content = hashlib.sha256()
    # Options that are no weights, such as a pruner's rate, change what a model computes.
    for name, module in model.named_modules():
        plain = {
            k: v
            for k, v in sorted(vars(module).items())
            if isinstance(v, bool | int | float | str) and not k.startswith("_") and k != "training"
        }
        content.update(repr((name, type(module).__name__, plain)).encode())
    handle = token_pruning(model)
    content.update(repr(None if handle is None else handle.spec).encode())
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous()
        content.update(repr((name, raw.dtype, tuple(raw.shape))).encode())
        content.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return content.hexdigest()
