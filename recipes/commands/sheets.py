"""What ``prunex explain`` writes: a contact sheet an image, maps.npz and times.csv."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import prunex
from prunex.errors import PrunexError
from prunex.files import readable, write_whole
from prunex.pictures import contact_sheet, save_npz, save_png, under_grid
from prunex.pictures.arrays import Picture
from prunex.pictures.mosaic import class_name
from prunex.targets import spelt

PATIENCE = 20  # maps.npz grows with every batch: between two writings lie so many times what one took


class Output:
    """What is written: a sheet an image, and now and then the maps and times of all images so far."""

    def __init__(
        self, out: Path, files: Sequence[Path], root: Path, class_names: Sequence[str] | None, several: bool = False
    ) -> None:
        self.out = out
        self.files = [name_of(file, root) for file in files]
        self.sheets = sheet_names(files, root)
        self.class_names = class_names
        self.several = several  # whether images have several labels, each with a probability of its own
        self.done = 0
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._times = ""  # of what maps.npz does not hold yet
        self._written, self._took = -math.inf, 0.0  # when maps.npz was written last, and how long that took

    def add(self, pictures: Sequence[Picture], explanations: Mapping[str, prunex.Explanation], times: str) -> None:
        """Write the sheets of the next images; maps.npz and times.csv anew, unless that would take most of the time."""
        e = next(iter(explanations.values()))
        logits = e.logits.float().cpu()
        said: dict[str, NDArray[Any]]
        if e.function is None:
            target = e.target.cpu().numpy()
            # Features have no class.
            said = {"predicted": np.where(target < 0, -1, logits.argmax(1).numpy())}
            # What a map is of says its name where there are several.
            said |= {} if len(labels_of(explanations)) > 1 else {"target": target}
        else:
            said = {"value": logits[:, 0].numpy()}
        kept = {"kept": e.trace.kept().cpu().numpy()} if e.trace.stages and not e.trace.pooled else {}
        maps = {name: each.maps.numpy() for name, each in explanations.items()}
        shares = (logits.sigmoid() if self.several else logits.softmax(1)).numpy()
        first, self.done = self.done, self.done + len(pictures)
        self._parts.append({**said, **maps, **kept})
        self._times = times
        # The file is written whole, and grows: most of the time should go into explaining.
        if perf_counter() - self._written > PATIENCE * self._took:
            self.finish()
        for place, picture in enumerate(pictures):
            one = slice(place, place + 1)
            sheet = contact_sheet(
                under_grid(picture[None], e.covered),
                {name: values[one] for name, values in maps.items()},
                [name for name, each in explanations.items() if each.signed],
                kept["kept"][one] if kept else None,
                heading=[
                    readable(self.files[first + place]),
                    _in_words(place, logits[place], shares[place], self.class_names, explanations),
                ],
            )
            with writing(self.out):
                save_png(self.out / self.sheets[first + place], sheet)

    def finish(self) -> None:
        """Write the maps and times that are not on disk yet."""
        if not self._times:
            return
        began = perf_counter()
        whole = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        with writing(self.out):
            save_npz(self.out / "maps.npz", {"files": np.array(self.files[: self.done]), **whole}, compressed=False)
            write_whole(self.out / "times.csv", self._times.encode())
        self._written, self._took, self._times = perf_counter(), perf_counter() - began, ""


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the file system refuses is told in one line."""
    try:
        yield
    except OSError as error:
        raise PrunexError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error


def labels_of(explanations: Mapping[str, prunex.Explanation]) -> list[int]:
    """The classes that are explained of the first image, each once."""
    return list(dict.fromkeys(int(e.target[0]) for e in explanations.values() if e.class_specific))


def _in_words(
    place: int,
    logits: Tensor,
    shares: NDArray[np.float32],
    class_names: Sequence[str] | None,
    explanations: Mapping[str, prunex.Explanation],
) -> str:
    """What was predicted and what explained of an image, in words, and which methods know no class."""
    e = next(iter(explanations.values()))
    target, predicted = int(e.target[place]), int(logits.argmax())
    classless = [name for name, each in explanations.items() if not each.class_specific]
    end = f" · of no class: {', '.join(classless)}" if classless else ""
    if e.function is not None:
        return f"explained: {spelt(e.function)} = {float(logits[0]):.4g}{end}"
    if target < 0:
        return "no classifier: what the features rest on"
    if len(shares) == 1:  # a number, of which no share can be told
        return f"predicted and explained: {float(logits[0]):.4g}{end}"

    def named(number: int) -> str:
        share = "below 1%" if shares[number] < 0.005 else f"{shares[number]:.0%}"
        return f"{class_name(number, class_names)} ({share})"

    if len(classless) == len(explanations):
        return f"predicted: {named(predicted)} · maps of no class"
    labels = labels_of(explanations)
    if len(labels) > 1:
        return f"predicted: {named(predicted)} · explained: {', '.join(map(named, labels))}{end}"
    if target == predicted:
        return f"predicted and explained: {named(predicted)}{end}"
    return f"predicted: {named(predicted)} · explained: {named(target)}{end}"


def check_out(out: Path, root: Path, files: Sequence[Path]) -> None:
    """Refuse a folder in which sheets would replace images, or anything that no earlier call wrote."""
    if out.resolve() == root.resolve():
        raise PrunexError(f"--out {out} is the folder of the images, among which sheets would lie: give another")
    # Sheets of an earlier call may be replaced, pictures of somebody else may not.
    ours = (out / "maps.npz").exists()
    images = {file.resolve() for file in files}
    for name in sheet_names(files, root):
        sheet = out / name
        if sheet.resolve() in images or (sheet.exists() and not ours):
            raise PrunexError(f"{sheet} is there already and no sheet of an earlier prunex explain: give another --out")
    above = next(p for p in (out, *out.resolve().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PrunexError(f"cannot write to {out}: {above} is no folder that may be written to; choose another --out")


def name_of_model(where: str) -> str:
    """What a model's own folder is called: by its run, its path or its timm name.

    >>> name_of_model("runs/digits-evit/version_0"), name_of_model("out/slim"), name_of_model("deit_tiny_patch16_224")
    ('digits-evit-version_0', 'out-slim', 'deit_tiny_patch16_224')
    >>> name_of_model("runs/digits-evit/version_0/checkpoints/epoch=1.ckpt")
    'digits-evit-version_0-epoch=1'
    """
    parts = Path(where).with_suffix("") if where.endswith(".ckpt") else Path(where)
    kept = [part for part in parts.parts if part not in ("/", "..", ".", "checkpoints")]
    return "-".join(kept[-3 if where.endswith(".ckpt") else -2 :]) or Path(where).resolve().name


def name_of(file: Path, root: Path) -> str:
    """An image's name below the folder that was given."""
    return file.name if file == root else file.relative_to(root).as_posix()


def sheet_names(files: Sequence[Path], root: Path) -> list[str]:
    """Where each image's sheet goes below the output folder; images that differ in their ending alone keep it.

    >>> sheet_names([Path("d/a.jpg"), Path("d/b.jpg"), Path("d/b.png")], Path("d"))
    ['a.png', 'b.jpg.png', 'b.png.png']
    """
    names = [Path(name_of(file, root)) for file in files]
    # a.jpg and a.png would have one sheet between them.
    bare = [name.with_suffix("") for name in names]
    return [
        f"{(name if bare.count(short) > 1 else short).as_posix()}.png" for name, short in zip(names, bare, strict=True)
    ]
