"""Pictures as arrays: what comes in is checked once, enlarged crisply, and written whole or not at all."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from prunex.errors import PrunexError
from prunex.files import write_whole

Picture = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def from_tensor(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> Picture:
    """Normalised model input, float [B, 3, H, W] made as ``(x - mean) / std`` of RGB in [0, 1], back to pictures.

    uint8 [B, H, W, 3]; values outside [0, 1] are clipped. ``mean`` and ``std`` are of each channel.

    >>> from_tensor(torch.zeros(1, 3, 2, 2), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))[0, 0, 0].tolist()
    [128, 128, 128]
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise PrunexError(f"images of shape {tuple(images.shape)} are not allowed: give [B, 3, H, W]")
    scale, shift = (torch.tensor(list(v), dtype=torch.float32)[:, None, None] for v in (std, mean))
    rgb = images.detach().float().cpu() * scale + shift
    return (rgb.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def stretched(images: torch.Tensor) -> Picture:
    """Float [B, C, H, W] of 1 or 3 channels as uint8 [B, H, W, 3]; each image outside 0..1 is stretched to that range.

    >>> stretched(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)).tolist()
    [[[[0, 0, 0], [255, 255, 255]]]]
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise PrunexError(f"images have shape {list(images.shape)}: give [B, 3, H, W], or a uint8 array [B, H, W, 3]")
    images = images.detach().float().cpu().expand(-1, 3, -1, -1)
    # Normalised images are stretched to 0..1, others are left as they are.
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    outside = (low < 0) | (high > 1)
    images = (images - low * outside) / ((high - low) * outside + ~outside).clamp(min=1e-8)
    return (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()


def under_grid(pictures: NDArray[Any], covered: tuple[int, int]) -> NDArray[Any]:
    """What of pictures or masks lies under a patch grid, with what the model pads them by.

    From [B, H, W] or [B, H, W, C] and the height and width in pixels that the grid covers from the upper left corner to
    the same of ``covered`` size: cut off where the model sees nothing, zeros where it pads.

    >>> under_grid(np.ones((1, 2, 3), int), (3, 2)).tolist()
    [[[1, 1], [1, 1], [0, 0]]]
    """
    more = [(0, max(0, c - s)) for c, s in zip(covered, pictures.shape[1:], strict=False)]
    padded = np.pad(pictures, [(0, 0), *more, *[(0, 0)] * (pictures.ndim - 3)])
    return padded[:, : covered[0], : covered[1]]


def resized(images: Any, side: int = 160) -> Picture:
    """Pictures uint8 [..., H, W, 3] at a size at which single patches can be seen, uint8 [..., H', W', 3].

    Small ones are enlarged by the smallest whole factor that brings the longer side to `side` or above, pixel by
    pixel, so that nothing is blurred; ones of more than twice `side` are averaged down to it.

    >>> resized(np.zeros((2, 64, 48, 3), dtype=np.uint8), side=160).shape
    (2, 192, 144, 3)
    """
    pictures = as_pictures(images)
    longer = max(pictures.shape[-3:-1])
    # Photos are averaged down; anything smaller keeps its pixels, since single patches are what is looked at.
    if longer > 2 * side:
        height, width = (max(1, round(length * side / longer)) for length in pictures.shape[-3:-1])
        flat = torch.from_numpy(pictures.reshape(-1, *pictures.shape[-3:])).permute(0, 3, 1, 2)
        small = F.interpolate(flat, size=(height, width), mode="bilinear", antialias=True)
        return small.permute(0, 2, 3, 1).numpy().reshape(*pictures.shape[:-3], height, width, 3)
    # A whole factor: fractions of a pixel would blur the borders of patches.
    factor = -(-side // longer)
    return pictures.repeat(factor, axis=-3).repeat(factor, axis=-2)


def on_pixels(grid: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Patch grid [..., gh, gw] to pixels [..., height, width]: each pixel takes the value of its patch."""
    # By index, so that grids need not divide the picture.
    rows = np.arange(height) * grid.shape[-2] // height
    columns = np.arange(width) * grid.shape[-1] // width
    return grid[..., rows[:, None], columns]


def as_numpy(values: Any) -> NDArray[Any]:
    """Array or tensor (any device, any float type) to numpy."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy knows no bfloat16.
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        return values.numpy()
    return np.asarray(values)


def as_pictures(images: Any, ndim: int | None = None, name: str = "images") -> Picture:
    """Checked uint8 [..., H, W, 3], of `ndim` dimensions where that is given."""
    pictures = as_numpy(images)
    wrong = pictures.shape[-1:] != (3,) or 0 in pictures.shape or pictures.ndim != (ndim or max(pictures.ndim, 3))
    if wrong or pictures.dtype != np.uint8:
        shape = {3: "[H, W, 3]", 4: "[M, H, W, 3]"}.get(ndim or 0, "[..., H, W, 3]")
        raise PrunexError(
            f"{name} of shape {pictures.shape} and type {pictures.dtype} cannot be drawn: give uint8 {shape} "
            "(prunex.pictures.from_tensor makes them from normalised model input)"
        )
    return pictures


def as_grids(values: Any, lead: tuple[int, ...], name: str, dtype: type = bool) -> NDArray[Any]:
    """Checked grids of the wanted leading shape: [*lead, gh, gw], as `dtype`."""
    grids = as_numpy(values)
    if grids.ndim != len(lead) + 2 or grids.shape[: len(lead)] != lead or 0 in grids.shape[-2:]:
        wanted = ", ".join([*map(str, lead), "gh", "gw"])
        raise PrunexError(f"{name} of shape {grids.shape} does not fit the images: give [{wanted}]")
    if not (np.issubdtype(grids.dtype, np.number) or grids.dtype == np.bool_):
        raise PrunexError(f"{name} of type {grids.dtype} cannot be drawn: give numbers or booleans")
    return grids.astype(dtype)


def png_bytes(picture: Any) -> bytes:
    """A picture, uint8 [H, W, 3], as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(as_pictures(picture, 3, "picture")).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | Path, picture: Any) -> Path:
    """Write a picture, uint8 [H, W, 3], as PNG, in a folder that is made; a reader never sees half of it."""
    return write_whole(Path(path), png_bytes(picture))


def save_npz(path: str | Path, arrays: Mapping[str, Any], compressed: bool = True) -> Path:
    """Write arrays of numbers, booleans or text as an npz file that opens with ``allow_pickle=False``.

    Its folder is made, and a reader never sees half of it. ``compressed`` is smaller, at about a second for 30 MB.

    Raises:
        PrunexError: For arrays of Python objects.
    """
    # Made in memory first: what cannot be written leaves no file behind.
    buffer = io.BytesIO()
    plain: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.hasobject:
            raise PrunexError(f"array {name!r} holds Python objects: give numbers, booleans or text")
    (np.savez_compressed if compressed else np.savez)(buffer, **plain)
    return write_whole(Path(path), buffer.getvalue())
