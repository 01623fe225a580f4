"""A folder of labelled images, with object masks where they are known, as a Lightning data module."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from prunex.checks import check_number, check_share, check_whole
from prunex.errors import PrunexError
from prunex.files import folders_in, readable
from prunex.recipes.data.concepts import Concepts
from prunex.recipes.data.images import choose_range, object_pixels, read_image
from prunex.recipes.given import check_range
from prunex.untrusted import read_picture

SPLITS = ("train", "val")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_TURNED = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
_LAYOUT = "expected <root>/train/<class>/<image> and <root>/val/<class>/<image>"


class ImageFolder(LightningDataModule):
    """Images in ``root/{train,val}/<class>/``, optional masks in ``root/masks/{train,val}/<class>/<same stem>.png``.

    Batches are ``(images, labels)``, or ``(images, labels, masks)`` for a split that has masks: images float32
    [B, 3, S, S] normalised with `mean` and `std`, labels int64 [B] (classes in alphabetical order), masks bool
    [B, S, S], true on the object. A mask moves with its image through every resize, crop and flip.

    Concepts, for heads that explain themselves, are a last part of the batch, a dict: ``concepts`` float32 [B, C] of
    `root/concepts.csv`, whose first column names an image as ``train/<class>/<image>`` and whose others are concepts of
    0, 1 or nothing (unknown, NaN); and ``spatial_concepts`` float32 [B, patches, C] of
    ``root/concepts/<concept>/{train,val}/<class>/<same stem>.png``, 1 where the mask touches a patch. An image
    with no such mask at all is unknown, one with some has nothing of the others. Images may be left out of both.

    Training takes a random resized crop, a flip and a little colour jitter (with `augment`); validation, test and
    prediction all read ``val`` with a fixed resize of the shorter side and a centre crop, as timm does.

    Args:
        root: The folder that holds ``train`` and ``val``.
        image_size: Side S of the square images, in pixels; a multiple of the model's patch size.
        batch_size: Images per batch. Training drops the last, smaller batch unless it is the only one.
        num_workers: Loading processes; 0 loads in the main process.
        mean: Mean of each channel, for RGB in [0, 1]. The default is ImageNet's, which DINOv2 uses as well.
        std: Standard deviation of each channel, above 0.
        augment: Random crop, flip and colour jitter in training; without it, prepare images as in validation.
        crop_scale: Smallest and largest share of the image's area that a training crop covers, each in (0, 1].
        color_jitter: Strength of random brightness, contrast and saturation in training, 0 (none) or more.
        crop_pct: Share of the resized shorter side that the centre crop keeps, in (0, 1]; 1 keeps all of it.
        interpolation: How images are resized. Masks are always resized to the nearest pixel.
        patch_size: Side of the model's patches, in pixels; needed where concepts have masks.
        masks: Folder of masks below `root`; pixels other than 0 are object. ``None`` ignores masks. A split without
            a folder in it has no masks.
        value_range: Largest value that pixels of files with 16 bits can have, such as 4095 where a camera fills 12 of
            them; it becomes white. ``None`` takes the smallest of 8, 10, 12, 14 and 16 bits that holds all images of
            both splits (without `verify` 256 of each), and says so. All images are scaled alike.
        verify: Decode every image once in `setup`, so that a broken one is reported before training starts and not
            in the middle of it (below a millisecond for a small JPEG; turn it off for millions of images).

    Raises:
        PrunexError: In the constructor for values outside these ranges; in `setup` (and where `class_names` is read)
            for a concepts.csv that names images or values it may not, masks of concepts without `patch_size`, and for
            a missing root or split, no classes, classes that differ between the splits, an empty class, a broken
            image, and a mask that is missing, broken or of another size than its image. The message names the file.

    Example::

        data = ImageFolder("photos", image_size=224, batch_size=64, num_workers=4)
        trainer.fit(ImageClassifier("vit_small_patch16_224", data.num_classes, pretrained=True), datamodule=data)
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int = 224,
        batch_size: int = 32,
        num_workers: int = 0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        augment: bool = True,
        crop_scale: tuple[float, float] = (0.35, 1.0),
        color_jitter: float = 0.2,
        crop_pct: float = 1.0,
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        masks: str | None = "masks",
        verify: bool = True,
        value_range: int | None = None,
        patch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = None if patch_size is None else check_whole("patch_size", patch_size, 1)
        self.image_size = check_whole("image_size", image_size, 1)
        self.batch_size = check_whole("batch_size", batch_size, 1)
        self.num_workers = check_whole("num_workers", num_workers, 0)
        for name, numbers in (("mean", mean), ("std", std)):
            if np.shape(numbers) != (3,) or not np.isfinite(numbers).all() or (name == "std" and min(numbers) <= 0):
                bound = ", each above 0" if name == "std" else ""
                raise PrunexError(f"{name}={numbers!r} is not allowed: give one number for each of R, G, B{bound}")
        if np.shape(crop_scale) != (2,) or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise PrunexError(f"crop_scale={crop_scale!r} is not allowed: give (smallest, largest), each in (0, 1]")
        self.crop_pct = check_share("crop_pct", crop_pct)
        self.color_jitter = check_number("color_jitter", color_jitter, 0)
        if interpolation not in ("bilinear", "bicubic"):
            raise PrunexError(f"interpolation={interpolation!r} is not allowed: give 'bilinear' or 'bicubic'")
        self.root = Path(root).expanduser()
        # Configs give lists.
        self.mean, self.std, self.crop_scale = tuple(mean), tuple(std), tuple(crop_scale)
        self.augment, self.interpolation, self.masks, self.verify = augment, interpolation, masks, verify
        self.value_range = check_range(value_range)
        self._class_names: list[str] | None = None
        self._concepts: Concepts | None = None
        self._splits: dict[str, FolderSplit] = {}

    @property
    def class_names(self) -> list[str]:
        """The classes in the order of their labels; known before `setup`."""
        if self._class_names is None:
            self._class_names = [readable(name) for name in _classes(self.root)]
        return self._class_names

    @property
    def num_classes(self) -> int:
        """Number of classes; known before `setup`."""
        return len(self.class_names)

    @property
    def concepts(self) -> Concepts:
        """Which concepts images have; of a folder without any, none. Known before `setup`."""
        if self._concepts is None:
            self._concepts = Concepts.of(self.root, self.image_size, self.patch_size)
        return self._concepts

    @property
    def concept_names(self) -> list[str]:
        """Concepts of `concepts.csv`, in its order."""
        return self.concepts.names

    @property
    def spatial_concept_names(self) -> list[str]:
        """Concepts that have masks, in alphabetical order."""
        return self.concepts.placed

    def setup(self, stage: str | None = None) -> None:
        """Read the folders and check every file; see the class for what is refused."""
        self._class_names = [readable(name) for name in _classes(self.root)]
        wanted = SPLITS if stage in (None, "fit") else SPLITS[1:]
        for split in wanted:
            # Lightning calls setup again for every fit, validate, test and predict.
            if split in self._splits:
                continue
            samples = _samples(self.root / split)
            masks = self._masks_of(split, samples)
            _check_files(samples, masks, decode=self.verify)
            transform = self._transform(split == "train" and self.augment)
            self._splits[split] = FolderSplit(samples, masks, transform, self._range, self.concepts)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``train``."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Batches of ``val``, in the order of the file names."""
        return self._loader("val")

    test_dataloader = predict_dataloader = val_dataloader

    def _loader(self, split: str) -> DataLoader:
        if split not in self._splits:
            self.setup("fit" if split == "train" else "validate")
        dataset = self._splits[split]
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=split == "train",
            # A last batch of one image would be a step of its own, and spoil what needs a batch.
            drop_last=split == "train" and len(dataset) > self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _transform(self, augment: bool) -> Callable[..., Any]:
        mode = InterpolationMode(self.interpolation)
        steps: list[torch.nn.Module]
        if augment:
            steps = [
                v2.RandomResizedCrop(self.image_size, scale=self.crop_scale, interpolation=mode),
                v2.RandomHorizontalFlip(),
            ]
            if self.color_jitter:
                steps.append(v2.ColorJitter(*[self.color_jitter] * 3))
        else:
            steps = [
                v2.Resize(int(self.image_size / self.crop_pct), interpolation=mode),
                v2.CenterCrop(self.image_size),
            ]
        # ToDtype leaves masks alone: given a plain dtype it converts images only.
        return v2.Compose(
            [*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        )

    @cached_property
    def _range(self) -> int | None:
        """Both splits count, whichever is read: validation alone must see what training saw."""
        some: list[Path] = []
        for split in SPLITS:
            paths = [path for path, _ in _samples(self.root / split)]
            # Whoever does without verifying has millions of images: some of each split must do.
            some += paths if self.verify else paths[:: max(1, len(paths) // 256)]
        return choose_range(some, self.value_range, "value_range", whole=False, say=rank_zero_info)

    def _masks_of(self, split: str, samples: list[tuple[Path, int]]) -> list[Path] | None:
        """The mask file of every image, or None when this split has none."""
        if self.masks is None:
            return None
        top = self.root / self.masks
        if not top.is_dir() and self.masks != "masks":
            raise PrunexError(
                f"masks={self.masks!r} is not a folder in '{self.root}': "
                "make it with <split>/<class>/<image's stem>.png, or give masks=null"
            )
        # A split without a folder of masks has none; validation alone may be annotated.
        if not (top / split).is_dir():
            return None
        masks = [top / split / path.parent.relative_to(self.root / split) / f"{path.stem}.png" for path, _ in samples]
        missing = [mask for mask in masks if not mask.is_file()]
        if missing:
            raise PrunexError(
                f"{len(missing)} of {len(masks)} images in '{self.root / split}' have no mask, first '{missing[0]}': "
                f"add the missing files, remove '{top / split}', or give masks=null"
            )
        return masks


@dataclass(eq=False)
class FolderSplit(Dataset):
    """One split: item i is ``(image [3, S, S], label)``, ``(image, label, mask bool [S, S])``, maybe with concepts."""

    samples: list[tuple[Path, int]]
    masks: list[Path] | None
    transform: Callable[..., Any]
    value_range: int | None = None
    concepts: Concepts | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        path, label = self.samples[index]
        image = read_image(path, self.value_range)
        planes = [] if self.masks is None else [read_picture(self.masks[index], object_pixels)]
        places = [] if self.concepts is None else self.concepts.masks_of(path)
        planes += [read_picture(mask, object_pixels) for mask in places if mask is not None]
        # All in one call, so that every random crop and flip is the same for all.
        image, *moved = self.transform(image, *map(tv_tensors.Mask, planes)) if planes else [self.transform(image)]
        pixels = [mask.as_subclass(Tensor).bool() for mask in moved]
        parts: list[Any] = [image.as_subclass(Tensor), label]
        if self.masks is not None:
            parts.append(pixels.pop(0))
        labels = {} if self.concepts is None else self.concepts.labels(path, places, pixels)
        return (*parts, labels) if labels else tuple(parts)


def _classes(root: Path) -> list[str]:
    if not root.is_dir():
        raise PrunexError(f"root='{root}' is not a folder: {_LAYOUT}; check the path")
    classes = {}
    for split in SPLITS:
        folder = root / split
        if not folder.is_dir():
            raise PrunexError(
                f"root='{root}' has no folder '{split}' (it has: {_some(folders_in(root)) or 'no folders'}): "
                f"{_LAYOUT}; make or rename a folder to '{split}'"
            )
        classes[split] = set(folders_in(folder))
        if not classes[split]:
            raise PrunexError(f"'{folder}' holds no class folders: {_LAYOUT}; make one folder for each class")
    if classes["train"] != classes["val"]:
        differences = {a: sorted(classes[a] - classes[b]) for a, b in (SPLITS, SPLITS[::-1])}
        only = [f"only in {split}: {_some(names)}" for split, names in differences.items() if names]
        raise PrunexError(
            f"the classes of '{root}' differ between train and val ({'; '.join(only)}): "
            "both need the same class folders; add the missing ones or remove the others"
        )
    return sorted(classes["train"])


def _samples(folder: Path) -> list[tuple[Path, int]]:
    """Image files of a split and their labels, in torchvision's order."""
    samples: list[tuple[Path, int]] = []
    for label, name in enumerate(folders_in(folder)):
        before = len(samples)
        for place, _, files in sorted(os.walk(folder / name, followlinks=True)):
            # File copies that macOS makes are called like images, after a dot.
            images = [file for file in sorted(files) if file.lower().endswith(IMG_EXTENSIONS) and file[0] != "."]
            samples += [(Path(place, file), label) for file in images]
        if len(samples) == before:
            raise PrunexError(
                f"class folder '{folder / name}' holds no image: put images there ({', '.join(IMG_EXTENSIONS)}) or "
                "remove the class from every split"
            )
    return samples


def _check_files(samples: list[tuple[Path, int]], masks: list[Path] | None, decode: bool) -> None:
    """Open every image and mask; Pillow decodes outside the interpreter's lock, so threads share the work."""

    def shown_size(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        # Readers turn images as EXIF says, and masks are drawn on turned images.
        turned = image.getexif().get(0x0112) in _TURNED
        if decode:
            # Of a JPEG the whole file is read, but an eighth of the picture built.
            image.draft("RGB", (1, 1))
            image.convert("RGB")
        return (height, width) if turned else (width, height)

    def mask_size(image: Image.Image) -> tuple[int, int]:
        if decode:
            image.load()
        return image.size

    def check(index: int) -> None:
        size = read_picture(samples[index][0], shown_size)
        if masks is None:
            return
        other = read_picture(masks[index], mask_size)
        if other != size:
            raise PrunexError(
                f"mask '{masks[index]}' is {other[0]} x {other[1]} pixels, its image '{samples[index][0].name}' "
                f"{size[0]} x {size[1]}: a mask must have its image's size; make it again or give masks=null"
            )

    with ThreadPoolExecutor(max_workers=4) as pool:
        # In order, so that the first bad file is the one named.
        for _ in pool.map(check, range(len(samples))):
            pass


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
