"""What ``prunex explain`` draws: a contact sheet an image, and what images and their sheets are called."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import prunex
from prunex.errors import PrunexError
from prunex.files import readable
from prunex.pictures import contact_sheet, save_png, under_grid
from prunex.pictures.arrays import Picture
from prunex.pictures.mosaic import class_name
from prunex.recipes.given import on_hub
from prunex.targets import spelt

COLLECT = 32  # sheets


class Sheets:
    """Draws sheets; ``several`` says that images have several labels, each with a probability of its own."""

    def __init__(self, out: Path, class_names: Sequence[str] | None, several: bool = False) -> None:
        self.out, self.class_names, self.several = out, class_names, several
        self._drawn = 0

    def draw(
        self,
        place: int,
        name: str,
        sheet: str,
        picture: Picture,
        explanations: Mapping[str, prunex.Explanation],
        arrays: Mapping[str, NDArray[Any]],
    ) -> None:
        """Write one image's sheet: of the explanations' images the one at that place."""
        e = next(iter(explanations.values()))
        logits = e.logits[place].float().cpu()
        shares = (logits.sigmoid() if self.several else logits.softmax(0)).numpy()
        one = slice(place, place + 1)
        drawn = contact_sheet(
            under_grid(picture[None], e.covered),
            {method: arrays[method][one] for method in explanations},
            [method for method, each in explanations.items() if each.signed],
            arrays["kept"][one] if "kept" in arrays else None,
            heading=[readable(name), _in_words(place, logits, shares, self.class_names, explanations)],
        )
        with writing(self.out):
            save_png(self.out / sheet, drawn)
        self._drawn += 1
        if self._drawn % COLLECT == 0:
            # Matplotlib's figures and renderers hold each other, and a quarter of a MB a sheet, until the collector
            # comes by of itself, which is after hundreds of them.
            gc.collect()


def arrays_of(explanations: Mapping[str, prunex.Explanation]) -> dict[str, NDArray[Any]]:
    """What is kept of some images: what was predicted and explained, maps by method, and the patches that stayed."""
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
    maps = {name: each.maps.numpy() for name, each in explanations.items()}
    kept = {"kept": e.trace.kept().cpu().numpy()} if e.trace.stages and not e.trace.pooled else {}
    return {**said, **maps, **kept}


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


def check_out(out: Path, root: Path, sheets: Iterable[str], images: Iterable[Path], ours: bool) -> None:
    """Refuse a folder in which sheets would replace images, or, unless it is ours, anything that is there already."""
    if out.resolve() == root.resolve():
        raise PrunexError(f"--out {out} is the folder of the images, among which sheets would lie: give another")
    # Sheets of an earlier call may be replaced, pictures of somebody else may not.
    taken = [out / name for name in sheets if (out / name).exists()]
    real = _real_paths(images) if taken and ours else set()
    for sheet in taken:
        if not ours or os.path.realpath(sheet) in real:
            raise PrunexError(f"{sheet} is there already and no sheet of an earlier prunex explain: give another --out")
    # The nearest folder that exists is the one in which others would be made.
    above = next(p for p in (out, *out.resolve().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PrunexError(f"cannot write to {out}: {above} is no folder that may be written to; choose another --out")


def _real_paths(files: Iterable[Path]) -> set[str]:
    """Files as they are without links; folders are resolved once each."""
    folders: dict[Path, str] = {}
    paths = set()
    for file in files:
        if file.is_symlink():
            paths.add(os.path.realpath(file))
            continue
        if file.parent not in folders:
            folders[file.parent] = os.path.realpath(file.parent)
        paths.add(os.path.join(folders[file.parent], file.name))
    return paths


def name_of_model(where: str) -> str:
    """What a model's own folder is called: by its run, its path, or its name on the Hub or of timm.

    >>> name_of_model("runs/digits-evit/version_0"), name_of_model("out/slim"), name_of_model("deit_tiny_patch16_224")
    ('digits-evit-version_0', 'out-slim', 'deit_tiny_patch16_224')
    >>> name_of_model("runs/digits-evit/version_0/checkpoints/epoch=1.ckpt")
    'digits-evit-version_0-epoch=1'
    >>> name_of_model("hf-hub:me/deit-small-evit")
    'deit-small-evit'
    """
    name = on_hub(where)
    if name is not None:
        return name
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
    return sheets_of([name_of(file, root) for file in files])


def sheets_of(names: Sequence[str]) -> list[str]:
    """The same of images' names below their folder.

    >>> sheets_of(["sub/a.jpg", "b.jpg", "b.png", "b.jpg.png"])
    ['sub/a.png', 'b.jpg.png', 'b.png.png', 'b.jpg.png.png']
    """
    bare = [os.path.splitext(name)[0] for name in names]
    count, whole = Counter(bare), set(names)
    sheets = []
    for name, short in zip(names, bare, strict=True):
        # a.jpg and a.png would have one sheet between them, and b.jpg.png that of b.jpg.
        alone = count[short] == 1 and short not in whole
        sheets.append(f"{short if alone else name}.png")
    return sheets
