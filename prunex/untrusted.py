"""Reading files that anyone may have written: JSON, safetensors, npz and images, of plain values, within limits."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from prunex.errors import PrunexError

TEXT_BYTES = 2**26  # of a JSON, CSV or YAML file
NPZ_BYTES = 2**31  # of all arrays in an npz file, unpacked
_KINDS = "biufU"  # booleans, numbers, text
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What image files may hold, whatever their names end in: Pillow knows more, and runs Ghostscript on PostScript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF")
LONGEST_SIDE = 2**16


class BrokenImage(PrunexError):
    """A file that cannot be read as an image; the same one line whether a worker met it or the main process.

    A `DataLoader` carries an exception out of a worker by making a new one of its class, with the worker's whole
    traceback as the message. The last line of that is the message that was meant.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


def read_text(path: Path) -> str:
    """A text file in UTF-8; what cannot be read, is no text, or is larger than any of its kind is refused."""
    try:
        if not path.is_file():
            raise PrunexError(f"{path} is no file")
        if path.stat().st_size > TEXT_BYTES:
            raise PrunexError(f"{path} is damaged: it is larger than {TEXT_BYTES // 2**20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, PrunexError):
            raise
        raise PrunexError(f"{path} is damaged: {error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds; what is damaged, nested beyond all measure, or no JSON number is refused."""
    text = read_text(path)
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise PrunexError(f"{path} is damaged: {str(error)[:200]}") from error


def parse_json(text: str) -> Any:
    """What JSON says, of numbers that everybody reads alike; else a ValueError, or a RecursionError."""
    return json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    # JSON writes 1e999, which Python reads as infinite.
    number = float(text)
    return number if math.isfinite(number) else _no_number(text[:20])


def _whole(text: str) -> int:
    # A longer text would be turned into a number for minutes.
    number = int(text) if len(text) <= 20 else 2**64
    return number if abs(number) < 2**63 else _no_number(text[:20])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; what is damaged, or numbers that no layer computes with, is refused."""
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors has its own error, and older versions stumble over new types
        raise PrunexError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    odd = [k for k, v in tensors.items() if v.is_complex() or (v.is_floating_point() and v.dtype not in FLOATS)]
    if odd:
        raise PrunexError(f"{path} holds {tensors[odd[0]].dtype} ({odd[0][:80]}): convert it to float16 or wider")
    return tensors


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file: numbers, booleans and text, `NPZ_BYTES` of them at most; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            # Sizes are promises, read before anything is unpacked.
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > NPZ_BYTES:
                raise ValueError(f"it unpacks to more than {NPZ_BYTES // 2**30} GiB")
            return {part.filename.removesuffix(".npy"): _array(archive, part) for part in parts}
    except Exception as error:  # zipfile, zlib and numpy stumble over broken files in many ways
        raise PrunexError(f"{path} is damaged: {' '.join(str(error).split())[:200] or type(error).__name__}") from error


def _array(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(part) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
        # What the header promises must be there before it is allocated.
        promised = math.prod(shape) * dtype.itemsize
        if dtype.kind not in _KINDS or any(n < 0 for n in shape) or promised != part.file_size - file.tell():
            raise ValueError(f"{part.filename} is {dtype} {shape}, which is not what it holds")
    with archive.open(part) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


@dataclass(frozen=True)
class Held:
    """An image's bytes, or where in a file they lie."""

    name: str
    file: Path | None = None
    offset: int = 0
    size: int = 0
    content: bytes = b""

    def __str__(self) -> str:
        return self.name if self.file is None else f"{self.file}:{self.name}"

    def read(self) -> io.BytesIO:
        """The bytes, as a file; less of them than was promised is an OSError."""
        if self.file is None:
            return io.BytesIO(self.content)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError("the file ends before it does")
        return io.BytesIO(content)


def read_picture(path: Path | Held, use: Callable[[Image.Image], Any]) -> Any:
    """What `use` makes of the image in a file; a `BrokenImage` that names the file where that fails."""
    try:
        if isinstance(path, Path) and not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        source: Any = path if isinstance(path, Path) else path.read()
        with Image.open(source, formats=_formats()) as image:
            if source is not path:
                image.filename = source  # from which it may be read once more
            if not 1 <= min(image.size) <= max(image.size) <= LONGEST_SIDE:  # resizing takes memory by the side
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, and no side may be over {LONGEST_SIDE:,}")
            return use(image)
    except Exception as error:  # Pillow's readers stumble over broken files in many ways
        reason = " ".join(str(error).replace(str(path), "the file").split())[:200] or type(error).__name__
        raise BrokenImage(f"cannot read image '{path}' ({reason}): replace the file or remove it") from error


@cache
def _formats() -> list[str]:
    """Those that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
