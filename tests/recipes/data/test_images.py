"""Files of 8, 10, 12 and 16 bits: scaled by what all of them use, and said."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import prunex
from prunex import PrunexError
from prunex.recipes.commands.cli import run
from prunex.recipes.commands.score_data import from_folder
from prunex.recipes.data.folder import ImageFolder, read_image
from prunex.recipes.data.images import choose_range
from tests.vits import tiny

RAMP = np.arange(256).reshape(16, 16)  # every shade of eight bits


def deep_png(path, pixels):
    """A PNG of 16 bits a channel, of 1 to 4 channels; Pillow writes grey ones alone."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(data))


def deep_tif(path, pixels):
    Image.fromarray(pixels.astype(np.uint16)).save(path)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("write", [deep_png, deep_tif])
def test_the_bits_in_use_become_eight(tmp_path, capsys, write, bits):
    path = tmp_path / ("x.png" if write is deep_png else "x.tif")
    write(path, RAMP << (bits - 8))
    value_range = choose_range([path])
    assert value_range == 2**bits - 1
    assert (
        f"images of 16 bits are scaled by {value_range}, which holds all of them; --range says"
        in capsys.readouterr().err
    )
    found = np.asarray(read_image(path, value_range))
    assert all(np.array_equal(found[..., c], RAMP) for c in range(3))


@pytest.mark.parametrize("channels", [3, 4])
def test_of_colours_no_bit_is_lost(tmp_path, channels):
    pixels = np.stack([RAMP, RAMP[::-1], RAMP.T, np.full_like(RAMP, 200)][:channels], 2) << 4
    deep_png(tmp_path / "x.png", pixels)
    assert choose_range([tmp_path / "x.png"]) == 4095
    found = np.asarray(read_image(tmp_path / "x.png", 4095))
    assert np.array_equal(found, pixels[..., :3] >> 4)  # alpha is left out


def test_grey_of_sixteen_bits_with_alpha_is_refused(tmp_path):
    deep_png(tmp_path / "x.png", np.stack([RAMP, RAMP], 2))
    for read in (read_image, lambda path: choose_range([path])):
        with pytest.raises(PrunexError, match="grey of 16 bits with an alpha channel; save it without"):
            read(tmp_path / "x.png")


def test_eight_bits_have_no_range(tmp_path, capsys):
    for name in ("x.png", "x.tif", "x.bmp"):
        Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / name)
        assert choose_range([tmp_path / name]) is None
        assert np.array_equal(np.asarray(read_image(tmp_path / name, 4095))[..., 1], RAMP)
    assert capsys.readouterr().err == ""


def test_a_dark_image_stays_darker_than_a_bright_one(tmp_path):
    deep_png(tmp_path / "bright.png", RAMP << 4)
    deep_tif(tmp_path / "dark.tif", RAMP)
    value_range = choose_range([tmp_path / "bright.png", tmp_path / "dark.tif"])
    assert value_range == 4095
    assert np.asarray(read_image(tmp_path / "dark.tif", value_range)).max() == 255 >> 4


def test_a_range_is_kept_to_or_refused(tmp_path):
    path = tmp_path / "x.png"
    deep_png(path, RAMP * 10)  # up to 2550
    assert choose_range([path], 2999) == 2999
    assert np.asarray(read_image(path, 2999)).max() == 2550 * 256 // 3000
    for read in (lambda: choose_range([path], 2000), lambda: read_image(path, 2000)):
        with pytest.raises(PrunexError, match=r"its pixels go up to 2550, over the range 2000; give a larger one"):
            read()
    for bad in (0, 254, 65536, 12.5, True, "12"):
        with pytest.raises(PrunexError, match="value_range=.* is not allowed: give the largest value"):
            ImageFolder(tmp_path, value_range=bad)


def test_turned_and_deep(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((RAMP[:8] << 4).astype(np.uint16)).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png", 4095))[..., 0], np.rot90(RAMP[:8], -1))


@pytest.fixture
def folder(tmp_path):
    """Two classes; the bright image of 12 bits is in training alone."""
    for split, name, pixels in (
        ("train", "cat/0.png", RAMP << 4),
        ("train", "dog/0.tif", RAMP << 2),
        ("val", "cat/0.tif", RAMP << 1),
        ("val", "dog/0.png", RAMP),
    ):
        path = tmp_path / "data" / split / name
        path.parent.mkdir(parents=True)
        (deep_png if path.suffix == ".png" else deep_tif)(path, pixels)
    return tmp_path / "data"


@pytest.mark.parametrize("options", [{}, {"verify": False}, {"value_range": 4095}])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_both_splits_are_scaled_alike(folder, options, stage):
    data = ImageFolder(folder, image_size=16, batch_size=2, mean=(0.0,) * 3, std=(1.0,) * 3, augment=False, **options)
    data.setup(stage)
    images, labels = next(iter(data.val_dataloader()))
    assert labels.tolist() == [0, 1]
    wanted = torch.from_numpy(np.stack([RAMP >> 3, RAMP >> 4]) / 255).float()
    assert torch.allclose(images[:, 0], wanted, atol=1e-6)


def test_a_range_too_small_is_refused_in_setup(folder):
    with pytest.raises(PrunexError, match="go up to 4080, over the range 1023"):
        ImageFolder(folder, value_range=1023).setup("validate")


def test_explain_and_score_take_a_range(folder, tmp_path, capsys):
    prunex.save(tiny(), tmp_path / "slim")
    common = ["explain", str(tmp_path / "slim"), "--methods", "rollout", "--images", str(folder / "val")]
    for more in ([], ["--range", "4095"]):
        assert run([*common, "--device", "cpu", "--out", str(tmp_path / f"out{len(more)}"), *more]) == 0
        assert ("scaled by 1023" in capsys.readouterr().err) == (not more)
    with pytest.raises(PrunexError, match="go up to 510, over the range 300"):
        run([*common, "--device", "cpu", "--out", str(tmp_path / "other"), "--range", "300"])
    model = tiny()
    scaled = [from_folder(folder, None, model, 2, value_range)[:].images for value_range in (None, 1023, 4095)]
    assert torch.equal(scaled[0], scaled[1])
    assert scaled[2].max() < scaled[0].max()
