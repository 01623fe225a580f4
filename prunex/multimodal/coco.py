"""Images and their objects' masks from a folder and an annotation file in COCO's format (cocodataset.org/#format-data).

Files may be anyone's: what they say is checked before memory is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.untrusted import LONGEST_SIDE, read_json, read_picture

_ROOM = 2**33  # pixels of all masks of an image
_PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes of eight bits


@dataclass(eq=False, repr=False)
class Objects(Brief):
    """The objects of one image.

    Attributes:
        masks: bool [N, H, W], at the size of the image as it came.
        labels: int64 [N], classes as the model numbers them.
        crowd: bool [N], groups that nobody has to find and that are no mistake to find; None: none.
        areas: float [N] in pixels, by which objects are small, medium or large; None: the masks'.
    """

    masks: Tensor
    labels: Tensor
    crowd: Tensor | None = None
    areas: Tensor | None = None


def need_pycocotools(what: str) -> None:
    """Refuse what pycocotools is needed for, where it is not installed."""
    if find_spec("pycocotools") is None:
        raise PrunexError(f"{what} needs pycocotools: pip install 'prunex-vit[multimodal]'")


class CocoFolder:
    """A COCO-format data set, image by image: loops give ``(image, Objects)``, an RGB ``PIL.Image`` and its objects.

    Masks may be polygons, run lengths, or COCO's text of run lengths. Images without objects come too: what is detected
    there is wrong. Images of more than eight bits, and ones of another size than the file says, are refused.

    Args:
        annotations: The JSON file with ``images``, ``annotations`` and ``categories``.
        images: The folder that its file names lie in.
        labels: The model's class number of each category's name, as in ``model.config.label2id``; categories that it
            lacks are refused. None: the categories' own numbers, which are DETR's.

    Raises:
        PrunexError: For files that are not there or damaged, at once; for damaged images and masks, when they are
            reached.

    Attributes:
        names: The categories' names by the model's class number.
    """

    def __init__(self, annotations: str | Path, images: str | Path, labels: Mapping[str, int] | None = None) -> None:
        need_pycocotools("reading COCO's masks")
        self.file, self.folder = Path(annotations), Path(images)
        if not self.folder.is_dir():
            raise PrunexError(f"images={str(images)!r} is no folder: give the one that the file names lie in")
        content = read_json(self.file)
        entries = {key: self._entries(content, key) for key in ("images", "annotations", "categories")}
        self._labels: dict[Any, int] = {}
        self.names: dict[int, str] = {}
        # COCO's numbers have gaps, and a model may have numbered the same names otherwise.
        for category in entries["categories"]:
            key, name = self._number(category, "id"), str(category.get("name", ""))
            if labels is not None and type(labels.get(name)) is not int:
                raise PrunexError(f"{self.file}: labels has no number for the category {name!r}; give one for each")
            self._labels[key] = key if labels is None else labels[name]
            self.names[self._labels[key]] = name
        self._images = entries["images"]
        self._objects: dict[int, list[dict[str, Any]]] = {self._number(entry, "id"): [] for entry in self._images}
        # Images of one number would be given each other's objects.
        if not self._images or len(self._objects) < len(self._images):
            raise PrunexError(
                f"{self.file} lists {len(self._images)} images of {len(self._objects)} numbers: give each its own"
            )
        # All of them now: scoring a data set takes hours, and a damaged entry may be its last.
        for entry in self._images:
            self._check_image(entry)
        for annotation in entries["annotations"]:
            image = self._number(annotation, "image_id")
            if image not in self._objects or self._number(annotation, "category_id") not in self._labels:
                raise PrunexError(
                    f"{self.file}: annotation {annotation.get('id')!r} is of an image or category it does not list"
                )
            self._objects[image].append(annotation)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[tuple[Image.Image, Objects]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        """The image and the objects of a place in the file's list."""
        entry = self._images[index]
        height, width = entry["height"], entry["width"]
        picture = read_picture(self.folder / entry["file_name"], _rgb)
        if picture.size != (width, height):
            raise PrunexError(
                f"{self.folder / entry['file_name']} has {picture.size[0]} x {picture.size[1]} pixels, and {self.file} "
                f"says {width} x {height}: masks would lie beside their objects"
            )
        objects = self._objects[entry["id"]]
        # Before memory is taken: a file may list any number of objects.
        if len(objects) * height * width > _ROOM:
            raise PrunexError(
                f"{self.file}: {len(objects)} masks of {width} x {height} pixels are too many for one image"
            )
        masks = torch.zeros(len(objects), height, width, dtype=torch.bool)
        for mask, annotation in zip(masks, objects, strict=True):
            try:
                mask.copy_(torch.from_numpy(decode(annotation.get("segmentation"), height, width)))
            except (ValueError, TypeError, OverflowError) as error:
                raise PrunexError(f"{self.file}: annotation {annotation.get('id')!r} has no mask: {error}") from error
        # COCO sizes objects by the file's number, which need not be that of the mask's pixels.
        pixels = masks.flatten(1).sum(1).tolist()
        given = [annotation.get("area") for annotation in objects]
        areas = [a if isinstance(a, int | float) and a > 0 else n for a, n in zip(given, pixels, strict=True)]
        return picture, Objects(
            masks,
            torch.tensor([self._labels[annotation["category_id"]] for annotation in objects], dtype=torch.int64),
            torch.tensor([annotation.get("iscrowd", 0) == 1 for annotation in objects], dtype=torch.bool),
            torch.tensor(areas, dtype=torch.float64),
        )

    def _entries(self, content: Any, key: str) -> list[dict[str, Any]]:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise PrunexError(f"{self.file} has no list of {key}: give a file in COCO's format for object detection")
        return entries

    def _number(self, entry: dict[str, Any], key: str) -> int:
        if type(entry.get(key)) is not int:
            raise PrunexError(f"{self.file}: {key}={entry.get(key)!r} is not allowed: give a whole number")
        number: int = entry[key]
        return number

    def _check_image(self, entry: dict[str, Any]) -> None:
        sides = [self._number(entry, key) for key in ("height", "width")]
        name = entry.get("file_name")
        if not all(1 <= side <= LONGEST_SIDE for side in sides) or not isinstance(name, str):
            raise PrunexError(f"{self.file}: image {entry['id']} has no file_name, or no height and width in pixels")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise PrunexError(f"{self.file}: file_name={name!r} is not allowed: it leads out of the images' folder")


def decode(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """One object's mask, bool [H, W], from COCO's polygons or run lengths; else a ValueError that says what is wrong.

    >>> decode({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3).astype(int).tolist()
    [[0, 1, 0], [1, 0, 0]]
    """
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"its size is {segmentation.get('size')!r}, the image's [{height}, {width}]")
        runs = _runs(segmentation.get("counts"))
        if sum(runs) != height * width:
            raise ValueError(f"its runs cover {sum(runs)} pixels of {height * width}")
        # Runs go down the columns, and every second one is the object's.
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(width, height).T
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("its segmentation is neither a list of polygons nor run lengths")
    reach = 2 * max(height, width)
    for polygon in segmentation:
        numbers = isinstance(polygon, list) and all(type(v) in (int, float) and math.isfinite(v) for v in polygon)
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon is a list x, y, x, y, ... of at least three points")
        # An edge takes memory by its length.
        if not all(-reach <= v <= reach for v in polygon):
            raise ValueError("a polygon goes far out of the image")
    from pycocotools import mask as coco

    parts = coco.frPyObjects(segmentation, height, width)
    return np.asarray(coco.decode(coco.merge(parts)), dtype=bool)


def _runs(counts: Any) -> list[int]:
    """Run lengths, from a list or from COCO's text: five bits a letter, and from the third on what they differ by.

    The text is read here: pycocotools leaves pixels that no run covers as they were in memory.
    """
    if isinstance(counts, list):
        if not all(type(run) is int and run >= 0 for run in counts):
            raise ValueError("its counts are no whole numbers")
        return counts
    if not isinstance(counts, str):
        raise ValueError("its counts are neither a list nor text")
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 30:
            raise ValueError("its counts are no run lengths")
        value |= (code & 31) << shift
        shift += 5
        # The highest bit says that the number goes on, the next one of its last letter that it is below 0.
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            raise ValueError("its counts hold a negative run")
        value = shift = 0
    if shift:
        raise ValueError("its counts end within a number")
    return runs


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode not in _PLAIN:
        raise ValueError(f"its pixels are {image.mode}; save it with eight bits a channel")
    return image.convert("RGB")
