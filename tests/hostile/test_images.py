"""Image files of any kind: read as pictures, or refused in one line; nothing else is run or waited for."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from prunex import PrunexError
from prunex.recipes import ImageFolder
from prunex.recipes.data.folder import object_pixels, read_image
from prunex.recipes.given import image_files
from prunex.untrusted import BrokenImage, read_picture

HUGE = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    + struct.pack(">II", 100_000, 100_000)
    + b"\x08\x02\x00\x00\x00"
    + b"\x00" * 9
)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb_and_a_mask(tmp_path, mode):
    path = tmp_path / "x.tif"
    Image.new(mode, (5, 4), 1 if mode != "CMYK" else (1, 2, 3, 4)).save(path)
    if mode in ("I", "F"):  # whatever their numbers mean
        with pytest.raises(BrokenImage, match="numbers of no known range"):
            read_image(path)
    else:
        assert read_image(path).mode == "RGB"
    assert read_picture(path, object_pixels).shape == (4, 5)


def test_a_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9] * 768)
    image.save(tmp_path / "x.png", transparency=bytes(range(256)))
    assert read_image(tmp_path / "x.png").mode == "RGB"


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF"])
def test_the_first_of_several_frames_counts(tmp_path, form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(
        tmp_path / "x.png",
        form,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if form == "WEBP" else {}),
    )
    assert read_image(tmp_path / "x.png").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 99,
        HUGE,
        b"P6 100000 100000 255\n",
        b"II*\x00" + b"\xff" * 40,
        b"<svg/>",
        b"RIFF\x00\x00\x00\x00WEBP",
    ],
)
def test_what_is_no_image_is_told_in_one_line(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for read in (read_image, lambda p: read_picture(p, object_pixels)):
        with pytest.raises(PrunexError, match="cannot read image .*: replace the file or remove it"):
            read(path)


def test_postscript_under_another_name_is_not_handed_to_ghostscript(tmp_path, monkeypatch):
    """Pillow tells formats by their contents, and runs `gs` on this one."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was run"))
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    with Image.open(path) as image:
        assert image.format == "EPS"  # that is what would have been opened
    with pytest.raises(PrunexError, match="cannot read image"):
        read_image(path)


def test_a_side_beyond_all_measure(tmp_path):
    """Pillow's limit is on the product, and resizing takes memory by the side."""
    Image.new("1", (2**16 + 1, 1)).save(tmp_path / "x.png")
    Image.new("1", (2**16, 1)).save(tmp_path / "y.png")
    with pytest.raises(PrunexError, match="65537 x 1 pixels, and no side may be over 65,536"):
        read_image(tmp_path / "x.png")
    assert read_image(tmp_path / "y.png").size == (2**16, 1)


def test_what_is_called_like_an_image_but_is_no_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "nowhere.png").symlink_to("nowhere")
    assert [p.name for p in image_files(tmp_path)] == ["good.png"]
    for name in ("folder.png", "pipe.png", "endless.png", "nowhere.png"):
        with pytest.raises(PrunexError, match="it is no file"):
            read_image(tmp_path / name)


def test_a_pipe_in_a_class_folder_is_named_and_not_waited_for(room):
    root = room.copy("photos")
    os.mkfifo(root / "val" / "ant" / "b.png")
    with pytest.raises(PrunexError, match=r"b\.png' \(it is no file\)"):
        ImageFolder(root, masks=None).setup("fit")


def test_a_link_shows_no_more_than_an_image(tmp_path):
    (tmp_path / "x.png").symlink_to("/etc/passwd")
    with pytest.raises(PrunexError) as caught:
        read_image(tmp_path / "x.png")
    assert "cannot identify image file" in str(caught.value)
    assert Path("/etc/passwd").read_text()[:20] not in str(caught.value)


@pytest.mark.parametrize("value", [0, 9, 65535, 6])
def test_turns_that_are_none_are_left_alone(tmp_path, value):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = value
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    (tmp_path / "x.jpg").write_bytes(buffer.getvalue())
    assert read_image(tmp_path / "x.jpg").size == ((4, 8) if value == 6 else (8, 4))


def test_broken_exif(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\xff" * 30)
    (tmp_path / "x.jpg").write_bytes(buffer.getvalue())
    assert np.asarray(read_image(tmp_path / "x.jpg")).shape == (4, 8, 3)
