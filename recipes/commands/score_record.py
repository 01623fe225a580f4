"""What ``prunex score`` keeps of one explainer on one model, so that an interrupted start goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunex.metrics.scoring import columns
from prunex.pictures.arrays import save_npz
from prunex.recipes.runs import token_pruning
from prunex.removal.game import ROUTES
from prunex.untrusted import read_npz


@dataclass
class Record:
    """What is known of one method on one model: its maps, and values per image of each metric; a file."""

    path: Path
    key: str  # a hash of the model, images, method and options; a file of another is put aside
    again: bool = False  # start anew whatever the file holds
    images: int | None = None  # how many there are, or any
    grid: tuple[int, int] | None = None
    keys: dict[str, str] = field(default_factory=dict)  # what else each of the values depends on, by their arrays
    arrays: dict[str, Any] = field(default_factory=dict)  # maps, the class explained, and values by metric
    fine: bool = False  # whether the method's own map is finer than a patch
    cost: list[float] = field(default_factory=lambda: [0.0, 0.0])  # seconds and forwards an image of the explanation
    seconds: dict[str, float] = field(default_factory=dict)  # of metrics, together with those they share with

    def __post_init__(self) -> None:
        """Take what is there; a file that is damaged counts as none, one of something else is put aside."""
        if self.again:
            return
        # Another model's values may have been put in this place since.
        if not self._read(self.path) and self._read(self._aside(self.key)):
            self._put_aside()
            os.replace(self._aside(self.key), self.path)

    def _aside(self, key: str) -> Path:
        """Where a file waits while one of another model, data or options has its name."""
        return self.path.with_name(f"{self.path.stem}-{key[:12]}.npz")

    def _put_aside(self) -> None:
        """Keep what somebody else computed."""
        try:
            key = str(json.loads(str(read_npz(self.path)["about"]))["key"])
        except (ValueError, KeyError, TypeError, RecursionError):  # none, or damaged
            return
        if key != self.key and re.fullmatch("[0-9a-f]{64}", key):
            os.replace(self.path, self._aside(key))

    def _read(self, path: Path) -> bool:
        """Whether a file is of this, and then its content is taken."""
        if not path.is_file():
            return False
        try:
            arrays = read_npz(path)
            about = json.loads(str(arrays.pop("about")))
            if about["key"] == self.key and self._fits(arrays):
                cost = [float(x) for x in about["cost"]][:2] + [0.0] * (2 - len(about["cost"]))
                keys = {k: str(v) for k, v in about["keys"].items() if k in arrays}
                seconds, fine = {k: float(v) for k, v in about["seconds"].items()}, bool(about["fine"])
                self.arrays, self.keys, self.cost, self.seconds, self.fine = arrays, keys, cost, seconds, fine
                return True
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a PrunexError is a ValueError
            pass
        return False

    def _fits(self, arrays: Mapping[str, Any]) -> bool:
        """Whether arrays are of these images: a file may come from anywhere."""
        maps, target = arrays["maps"], arrays["target"]
        count = len(maps) if self.images is None else self.images
        # A file may come from anywhere.
        values = {k: v for k, v in arrays.items() if k not in ("maps", "target")}
        return (
            maps.dtype.kind == "f"
            and maps.ndim == 3
            and (self.grid is None or maps.shape[1:] == self.grid)
            and target.dtype == np.int64
            and target.shape == (count,) == maps.shape[:1]
            and all(
                v.dtype.kind in "fbi" and v.shape == (count, *columns(k.partition("@")[0])) for k, v in values.items()
            )
        )

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
        """Take values by metric, and write everything, whole or not at all."""
        self.arrays |= {_stored(name, keys[name]): tensor.numpy() for name, tensor in values.items()}
        self.keys |= {_stored(name, key): key for name, key in keys.items()}
        self._put_aside()
        about = {"key": self.key, "keys": self.keys, "fine": self.fine, "cost": self.cost, "seconds": self.seconds}
        save_npz(self.path, {**self.arrays, "about": np.array(json.dumps(about))}, compressed=False)


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
