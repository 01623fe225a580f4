"""Image files as RGB of eight bits, whatever number of bits they hold, and whatever their names end in."""

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import v2

from prunex.attributes import models_normalisation
from prunex.errors import PrunexError
from prunex.pictures.arrays import Picture
from prunex.recipes.given import FULL_RANGE, check_range
from prunex.untrusted import Held, read_picture
from prunex.vit.anatomy import read

DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners fill of a container of 16


def choose_range(
    paths: Iterable[Path | Held],
    given: int | None = None,
    name: str = "--range",
    whole: bool = True,
    say: Callable[[str], Any] | None = None,
) -> int | None:
    """The largest value that pixels of some images of 16 bits can have: as given, or from what all of them use.

    The files say 16 bits whatever a camera filled of them. The smallest of 8, 10, 12, 14 and 16 bits that holds every
    pixel is taken for all images, so that a dark image stays darker than a bright one; None where all have 8 bits.

    With ``whole`` images of 8 bits are read too, so that broken ones are found.
    """
    check_range(given, name)

    def peak(image: Image.Image) -> int:
        if _is_deep(image):
            return int(_deep(image, FULL_RANGE if given is None else given).max())
        if whole:
            _rgb(image, FULL_RANGE)
        return -1

    # One scale for all: each by its own would make a dark image as bright as a bright one.
    highest, waiting = -1, iter(paths)
    with ThreadPoolExecutor(max_workers=4) as pool:  # Pillow decodes outside the interpreter's lock
        # Some at a time: a pool takes in all that it is given, and a million would wait in memory.
        while some := list(islice(waiting, 1024)):
            highest = max(highest, *pool.map(lambda path: read_picture(path, peak), some))
    if given is not None or highest < 0:
        return given
    value_range: int = next(2**bits - 1 for bits in DEPTHS if highest < 2**bits)
    text = f"prunex: images of 16 bits are scaled by {value_range}, which holds all of them; {name} says otherwise"
    if say is None:
        print(text, file=sys.stderr)
    else:
        say(text)
    return value_range


def read_image(path: Path | Held, value_range: int | None = None) -> Image.Image:
    """One image as RGB, turned as EXIF says; ``value_range`` is what becomes white of 16 bits (None: 65535)."""
    return read_picture(path, lambda image: _rgb(image, FULL_RANGE if value_range is None else value_range))


def _rgb(image: Image.Image, value_range: int) -> Image.Image:
    if not _is_deep(image):
        turned = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            raise ValueError("its pixels are numbers of no known range; save it with 8 or 16 bits a channel")
        return turned.convert("RGB")
    pixels = _deep(image, value_range)
    # For a whole number of bits these are the upper eight of them.
    picture = Image.fromarray((pixels * 256 // (value_range + 1)).astype(np.uint8))
    # A picture made of numbers has none of its file's EXIF.
    picture.getexif()[_TURN] = image.getexif().get(_TURN, 1)
    return ImageOps.exif_transpose(picture).convert("RGB")


_TURN = 0x0112  # EXIF's orientation


def _is_deep(image: Any) -> bool:
    """Whether it holds 16 bits a channel; of several channels Pillow would read the upper eight."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return True
    modes = [str(tile[3]) for tile in image.tile] if image.format == "PNG" else []
    if "LA;16B" in modes:
        raise ValueError("it is grey of 16 bits with an alpha channel; save it without that channel")
    return any("16B" in mode for mode in modes)


def _deep(image: Any, value_range: int) -> NDArray[np.int64]:
    """Its pixels, [H, W] or [H, W, 3], none of them beyond the range."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
    else:
        with Image.open(image.filename, formats=["PNG"]) as low:
            # Read as if the bytes of each number were exchanged, so that Pillow keeps the lower one.
            low.tile = [tile._replace(args=str(tile[3]).replace("16B", "16L")) for tile in low.tile]
            lower = np.asarray(low).astype(np.int64)
        # Pillow gives the upper byte of each number.
        pixels = (np.asarray(image).astype(np.int64) * 256 + lower)[..., :3]  # without the alpha channel
    if pixels.max() > value_range:
        raise ValueError(f"its pixels go up to {pixels.max()}, over the range {value_range}; give a larger one")
    return pixels


def object_pixels(image: Image.Image) -> Tensor:
    """Mask file to uint8 [H, W], 1 on the object: whatever is not 0, so that 0/1 and 0/255 and palettes all work."""
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        image = image.convert("L")
    return torch.from_numpy((np.asarray(image) != 0).astype(np.uint8))


def preparation(vit: nn.Module) -> Callable[[Image.Image], tuple[Picture, Tensor]]:
    """How an RGB image becomes what a model sees: uint8 [H, W, 3], fitted and cropped, and normalised [C, H, W]."""
    a = read(vit)
    if a.channels not in (1, 3):
        raise PrunexError(f"this model takes {a.channels} channels: only grey and RGB images can be read from files")
    height, width = a.image
    mean, std = models_normalisation(vit, a.channels)
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    def prepare(image: Image.Image) -> tuple[Picture, Tensor]:
        shown = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        if a.channels == 1:
            shown = shown.convert("L").convert("RGB")
        picture = np.array(shown)
        # A grey picture has three channels alike, of which a grey model takes one.
        return picture, normalise(torch.from_numpy(picture).permute(2, 0, 1)[: a.channels])

    return prepare
