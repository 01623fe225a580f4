"""The images that explainers are scored on: a run's validation images, or a folder with masks of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from prunex.attributes import models_normalisation, read_normalisation
from prunex.batches import Parts, parts
from prunex.errors import PrunexError
from prunex.files import readable
from prunex.recipes.data.images import choose_range, object_pixels, preparation, read_image
from prunex.recipes.given import image_files
from prunex.untrusted import read_picture
from prunex.vit.anatomy import read


@dataclass
class Scenes:
    """Images float [N, C, H, W], normalised by mean and std (None: as the model says), to score on."""

    images: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """A hash of all that the scores depend on."""
        content = hashlib.sha256(repr((self.mean, self.std)).encode())
        for part in (self.images, self.labels, self.masks):
            content.update(b"none" if part is None else repr((part.dtype, tuple(part.shape))).encode())
            if part is not None:
                content.update(np.ascontiguousarray(part.cpu().numpy()).tobytes())
        return content.hexdigest()


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
    loader, which = spread(data.val_dataloader(), wanted)
    seen: list[Parts] = []
    for batch in loader:
        seen.append(parts(batch))
        seen[-1].need("images", "scoring", "the validation batch")
        if sum(len(p["images"]) for p in seen) >= wanted:
            break
    if not seen:
        raise PrunexError("there are no validation images to score on")
    keys = set.intersection(*(set(p) for p in seen))
    tensors = {k: torch.cat([p[k] for p in seen])[:wanted] for k in keys}
    left_out = [name for name in ("labels", "masks") if name not in tensors and name in seen[0].unclear | seen[0].unfit]
    notes = [which, *(f"{name} are unknown: {seen[0].why(name)}" for name in left_out)]
    mean, std = read_normalisation([data], tensors["images"].shape[1]) or (None, None)
    return Scenes(tensors["images"], tensors.get("labels"), tensors.get("masks"), mean, std, notes)


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
    images, objects = [], []
    value_range = choose_range(files, value_range)
    for file in files:
        image = read_image(file, value_range)
        images.append(prepare(image)[1])
        if has_masks:
            objects.append(_mask(shapes / file.relative_to(top).with_suffix(".png"), file, image.size, size))
    labels, notes = _labels(files, top, model)
    pair = models_normalisation(model, images[0].shape[0])
    return Scenes(torch.stack(images), labels, torch.stack(objects) if objects else None, *pair, notes)


def _mask(path: Path, image: Path, size: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """A mask cropped and resized as :func:`preparation` does with its image: bool [H, W]."""
    if not path.is_file():
        raise PrunexError(f"there is no mask '{path}' for '{image}': add it, or point --masks to whole masks")
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
