"""The images that explainers are scored on: a run's validation images, or a folder with masks of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from prunex.attributes import models_normalisation, read_normalisation
from prunex.batches import Parts, parts
from prunex.errors import PrunexError
from prunex.files import readable
from prunex.recipes.commands.processes import joined
from prunex.recipes.data.images import choose_range, object_pixels, preparation, read_image
from prunex.recipes.given import image_files
from prunex.untrusted import read_picture
from prunex.vit.anatomy import read

HELD = 2**29  # bytes of images that a process keeps in memory


class Scene(NamedTuple):
    """Some images float [B, C, H, W], normalised, labels int64 [B] and masks bool [B, H, W] where they are known."""

    images: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Scene:
        """What a function makes of all that is known."""
        labels, masks = (None if part is None else change(part) for part in (self.labels, self.masks))
        return Scene(change(self.images), labels, masks)

    def stamps(self) -> Tensor:
        """A hash of each image with its label and mask: uint8 [B, 32]."""
        hashes = []
        for place in range(len(self.images)):
            content = hashlib.sha256()
            for part in self:
                content.update(b"none" if part is None else repr((part.dtype, tuple(part.shape[1:]))).encode())
                if part is not None:
                    content.update(np.ascontiguousarray(part[place].cpu().numpy()).tobytes())
            hashes.append(list(content.digest()))
        return torch.tensor(hashes, dtype=torch.uint8)


class Scenes:
    """Images to score on, read when they are asked for: ``scenes[places]`` is a :class:`Scene`.

    As many as fit into ``HELD`` bytes stay in memory.

    Attributes:
        mean: What images are normalised by, with ``std``; None: as the model says.
        notes: What is to be said of them.
        stamps: A hash of each image, once all have been looked at: one that is read again must be the same.
    """

    def __init__(
        self,
        count: int,
        read: Callable[[list[int]], Scene],
        mean: list[float] | None = None,
        std: list[float] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self._count, self._read, self._room = count, read, HELD
        self._held: dict[int, Scene] = {}
        self.mean, self.std, self.notes = mean, std, list(notes)
        self.stamps: Tensor | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, which: slice | Tensor) -> Scene:
        places = range(self._count)[which] if isinstance(which, slice) else which.tolist()
        missing = [place for place in places if place not in self._held]
        more = dict(zip(missing, self._new(missing), strict=True)) if missing else {}
        some = [self._held[place] if place in self._held else more[place] for place in places]
        images, labels, masks = zip(*some, strict=True)
        return Scene(torch.cat(images), _all(labels), _all(masks))

    def _new(self, places: list[int]) -> list[Scene]:
        """Images that are not held."""
        scene = self._read(places)
        if self.stamps is not None and not scene.stamps().equal(self.stamps[places]):
            raise PrunexError(
                f"the validation data give other images at {places[0]}..{places[-1]} when they are read again: scores "
                "are of images that stay the same; leave random changes to training, and seed a random split"
            )
        scenes = [scene.each(itemgetter(slice(n, n + 1))) for n in range(len(places))]
        for place, image in zip(places, scenes, strict=True):
            size = sum(part.nbytes for part in image if part is not None)
            if size <= self._room:
                self._room -= size
                # A view would keep its whole batch.
                self._held[place] = image.each(torch.clone)
        return scenes

    def digest(self) -> str:
        """A hash of all that the scores depend on."""
        stamps = b"" if self.stamps is None else self.stamps.numpy().tobytes()
        return hashlib.sha256(repr((self.mean, self.std)).encode() + stamps).hexdigest()


def _all(parts: Sequence[Tensor | None]) -> Tensor | None:
    """What every image has."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def spaced(count: int, wanted: int) -> list[int]:
    """So many places out of all, evenly spaced: files lie in the order of their classes.

    >>> spaced(10, 4), spaced(2, 4)
    ([0, 2, 5, 7], [0, 1])
    """
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def spread(loader: Any, wanted: int) -> tuple[Any, str]:
    """Batches of so many images of a loader (or the first of several), and which these are, in words."""
    loader = loader[0] if isinstance(loader, list | tuple) else loader
    dataset: Any = getattr(loader, "dataset", None)
    indexed = (
        isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")
    )
    # A stream cannot be asked for its tenth image.
    if not indexed:
        return loader, f"images: the first {wanted:,}, since the validation data cannot be indexed"
    places = spaced(len(dataset), wanted)
    some = DataLoader(Subset(dataset, places), batch_size=loader.batch_size or 1, collate_fn=loader.collate_fn)
    return some, f"images: {len(places):,} of {len(dataset):,}, evenly spaced over the validation data"


def from_run(data: Any, wanted: int) -> Scenes:
    """So many validation images of a data module: evenly spaced where the data can be indexed, else the first ones."""
    # Evenly spaced, as bench and explainers of other runs see them too.
    given = data.val_dataloader()
    loader, which = spread(given, wanted)
    dataset: Any = loader.dataset if loader is not given else None

    def read(places: list[int]) -> Parts:
        some = Subset(dataset, places)
        # By the loader's own collate_fn, which may make what a step gets.
        batch = parts(next(iter(DataLoader(some, batch_size=len(places), collate_fn=loader.collate_fn))))
        count = len(batch.need("images", "scoring", "the validation batch"))
        if count != len(places):
            raise PrunexError(
                f"the validation data's collate_fn made {count} images of {len(places)}: give one of each"
            )
        return batch

    if dataset is not None and not len(dataset):
        raise PrunexError("there are no validation images to score on")
    first = _streamed(loader, wanted) if dataset is None else read([0])
    left_out = [name for name in ("labels", "masks") if name not in first and name in first.unclear | first.unfit]
    notes = [which, *(f"{name} are unknown: {first.why(name)}" for name in left_out)]
    mean, std = read_normalisation([data], first["images"].shape[1]) or (None, None)
    if dataset is not None:
        return Scenes(len(dataset), lambda places: _scene(read(places)), mean, std, notes)
    whole = _scene(first)
    return Scenes(len(whole.images), lambda places: whole.each(itemgetter(places)), mean, std, notes)


def _streamed(loader: Any, wanted: int) -> Parts:
    """The first images of a stream, which cannot be asked for one of them."""
    seen: list[Parts] = []
    for batch in loader:
        seen.append(parts(batch))
        seen[-1].need("images", "scoring", "the validation batch")
        if sum(len(p["images"]) for p in seen) >= wanted:
            break
    if not seen:
        raise PrunexError("there are no validation images to score on")
    whole = Parts(seen[0].kind)
    whole.update({name: rows[:wanted] for name, rows in joined(seen).items()})
    whole.unclear, whole.unfit = seen[0].unclear, seen[0].unfit
    return whole


def _scene(known: Mapping[str, Tensor]) -> Scene:
    return Scene(known["images"], known.get("labels"), known.get("masks"))


def from_folder(
    root: Path, masks: Path | None, model: nn.Module, wanted: int, value_range: int | None = None
) -> Scenes:
    """Images of a folder, evenly spaced, prepared as the model expects.

    Layouts: ``root/val/<class>/<image>``, ``root/<class>/<image>``, or images alone. The mask of ``a/b.jpg`` is
    ``a/b.png`` below the masks' folder (None: ``root/masks`` where that is there), or below its ``val``.
    """
    top = root / "val" if (root / "val").is_dir() else root
    named = root / "masks" if masks is None else masks
    if masks is not None and not masks.is_dir():
        raise PrunexError(f"--masks {masks} is not a folder: give one that holds <class>/<image's stem>.png")
    files = image_files(top, besides=named)
    # Files lie in the order of their classes.
    files = [files[i] for i in spaced(len(files), wanted)]
    shapes = named / "val" if (named / "val").is_dir() else named
    has_masks = named.is_dir()
    prepare, size = preparation(model), read(model).image
    value_range = choose_range(files, value_range)
    objects = [shapes / file.relative_to(top).with_suffix(".png") if has_masks else None for file in files]
    for file, mask in zip(files, objects, strict=True):
        if mask is not None and not mask.is_file():
            raise PrunexError(f"there is no mask '{mask}' for '{file}': add it, or point --masks to whole masks")
    labels, notes = _labels(files, top, model)

    def open_one(place: int) -> Scene:
        image, mask = read_image(files[place], value_range), objects[place]
        shape = None if mask is None else _mask(mask, files[place], image.size, size)[None]
        return Scene(prepare(image)[1][None], None if labels is None else labels[[place]], shape)

    def open_some(places: list[int]) -> Scene:
        images, _, masks = zip(*map(open_one, places), strict=True)
        return Scene(torch.cat(images), None if labels is None else labels[places], _all(masks))

    pair = models_normalisation(model, open_one(0).images.shape[1])
    return Scenes(len(files), open_some, *pair, notes)


def _mask(path: Path, image: Path, size: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """A mask cropped and resized as :func:`preparation` does with its image: bool [H, W]."""
    pixels = read_picture(path, object_pixels)
    if (pixels.shape[1], pixels.shape[0]) != size:
        raise PrunexError(
            f"mask '{path}' is {pixels.shape[1]} x {pixels.shape[0]} pixels, its image '{image.name}' "
            f"{size[0]} x {size[1]}: a mask must have its image's size"
        )
    shown = Image.fromarray(pixels.numpy() * 255)
    return torch.from_numpy(np.array(ImageOps.fit(shown, wanted[::-1], Image.Resampling.NEAREST)) > 127)


def _labels(files: Sequence[Path], top: Path, model: Any) -> tuple[Tensor | None, list[str]]:
    """The images' classes as far as folders tell them, and why not."""
    folders = sorted(
        readable(p.name) for p in top.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "masks"
    )
    names, classes = [str(n) for n in getattr(model, "label_names", None) or []], read(model).classes
    if classes == 0:  # nothing could be right
        return None, []
    # Names say which class a folder is; without names as many folders as classes are taken in order.
    if folders and set(folders) <= set(names):
        order = {name: names.index(name) for name in folders}
    elif folders and len(folders) == classes:
        order = {name: place for place, name in enumerate(folders)}
    else:
        why = f"{len(folders)} class folders do not fit {classes} classes" if folders else "there are no class folders"
        return None, [f"labels are unknown ({why}): the class predicted for the whole image counts as right"]
    if any(len(f.relative_to(top).parts) < 2 for f in files):
        return None, ["some images lie in no class folder: the class predicted for the whole image counts as right"]
    return torch.tensor([order[readable(f.relative_to(top).parts[0])] for f in files]), []
