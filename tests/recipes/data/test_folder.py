"""ImageFolder: what it yields, that masks follow their images, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from timm.data import create_transform

from prunex import PrunexError
from prunex.recipes.data.folder import IMAGENET_MEAN, IMAGENET_STD, ImageFolder, read_image

RENDER = Path(__file__).resolve().parents[4] / "shared" / "data" / "render_scenes.py"


def scene(seed, width=48, height=40):
    """A grey image with a bright red box, and the box."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 90, dtype=np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    top, left = int(rng.integers(4, height - 20)), int(rng.integers(4, width - 20))
    image[top : top + 16, left : left + 16] = (255, 0, 0)
    mask[top : top + 16, left : left + 16] = 255
    return Image.fromarray(image), Image.fromarray(mask)


@pytest.fixture
def root(tmp_path):
    """Two classes, three training and two validation images each, masks beside them."""
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for folder in (tmp_path / split / name, tmp_path / "masks" / split / name):
                folder.mkdir(parents=True)
            for i in range(count):
                image, mask = scene(10 * label + i)
                image.save(tmp_path / split / name / f"{i}.png")
                mask.save(tmp_path / "masks" / split / name / f"{i}.png")
    return tmp_path


def red(images):
    """Pixels of normalised images [B, 3, S, S] that belong to the red box."""
    rgb = images * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    return (rgb[:, 0] - rgb[:, 1]) > 0.5


def test_batches_with_masks(root):
    data = ImageFolder(root, image_size=32, batch_size=4, color_jitter=0.0)
    assert data.num_classes == 2
    assert data.class_names == ["cat", "dog"]
    data.setup("fit")
    images, labels, masks = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert type(images) is torch.Tensor
    assert labels.tolist() == [0, 0, 1, 1]
    assert labels.dtype == torch.int64
    assert masks.shape == (4, 32, 32)
    assert masks.dtype == torch.bool
    assert type(masks) is torch.Tensor


@pytest.mark.parametrize("augment", [True, False])
def test_masks_move_with_their_images(root, augment):
    torch.manual_seed(0)
    data = ImageFolder(root, image_size=40, batch_size=6, augment=augment, color_jitter=0.0, interpolation="bilinear")
    data.setup("fit")
    seen = set()
    for _ in range(5):
        images, _, masks = next(iter(data.train_dataloader()))
        agreement = (red(images) & masks).sum() / (red(images) | masks).sum()
        assert agreement > 0.9
        seen.add(tuple(masks.flatten(1).sum(1).tolist()))
    assert len({tuple(sorted(s)) for s in seen}) == (5 if augment else 1)


def test_without_masks(root):
    for folder in sorted((root / "masks").glob("*/*/*")):
        folder.unlink()
    data = ImageFolder(root, image_size=32, masks=None)
    data.setup()
    assert len(next(iter(data.train_dataloader()))) == 2
    assert len(next(iter(data.predict_dataloader()))) == 2


def test_masks_may_exist_for_one_split_only(root):
    (root / "masks" / "train").rename(root / "elsewhere")
    data = ImageFolder(root, image_size=32)
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))) == 2
    assert len(next(iter(data.val_dataloader()))) == 3


def test_validation_equals_timm(root):
    data = ImageFolder(root, image_size=32, crop_pct=0.9, masks=None)
    data.setup("validate")
    ours = data.val_dataloader().dataset[0][0]
    timm = create_transform((3, 32, 32), crop_pct=0.9, interpolation="bicubic", mean=data.mean, std=data.std)
    assert torch.allclose(ours, timm(Image.open(root / "val" / "cat" / "0.png").convert("RGB")), atol=1e-6)


def test_mask_values_and_modes(root):
    """0/1 files, palettes and colour files all mean: not 0 is object."""
    for path in (root / "masks" / "val").glob("*/*.png"):
        values = (np.asarray(Image.open(path)) > 0).astype(np.uint8)
        if path.parent.name == "cat":
            Image.fromarray(values).save(path)
        else:
            palette = Image.fromarray(values * 7, mode="P")
            palette.putpalette([0, 0, 0] * 256)
            palette.save(path)
    data = ImageFolder(root, image_size=40, interpolation="bilinear")
    data.setup("validate")
    images, _, masks = next(iter(data.val_dataloader()))
    assert (red(images) & masks).sum() / (red(images) | masks).sum() > 0.9


def test_turned_photo_is_shown_upright(root):
    image, mask = scene(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held sideways: turn by 90 degrees to show
    path = root / "val" / "cat" / "0.png"
    image.save(path, exif=exif)
    mask.transpose(Image.Transpose.ROTATE_270).save(root / "masks" / "val" / "cat" / "0.png")
    data = ImageFolder(root, image_size=40, interpolation="bilinear")
    data.setup("validate")
    images, _, masks = next(iter(data.val_dataloader()))
    assert (red(images) & masks)[0].sum() / (red(images) | masks)[0].sum() > 0.9


def test_hidden_files_are_no_images(root):
    (root / "train" / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    data = ImageFolder(root, image_size=32)
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 6


def test_seeded_runs_agree(root):
    def first():
        torch.manual_seed(3)
        data = ImageFolder(root, image_size=32, batch_size=2)
        data.setup("fit")
        return next(iter(data.train_dataloader()))[0]

    assert torch.equal(first(), first())


def test_signature_is_a_command_line_schema():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageFolder, "data")
    parsed = parser.parse_args(["--data.root", "x", "--data.mean", "[0.5,0.5,0.5]", "--data.masks", "null"])
    data = ImageFolder(**parsed.data.as_dict())
    assert data.mean == (0.5, 0.5, 0.5)
    assert data.masks is None


def refused(root, match, stage="fit", **options):
    with pytest.raises(PrunexError, match=match) as caught:
        ImageFolder(root, image_size=32, **options).setup(stage)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image_size", 0),
        ("image_size", 32.0),
        ("batch_size", 0),
        ("num_workers", -1),
        ("mean", (0.5, 0.5)),
        ("mean", 0.5),
        ("std", (1.0, 0.0, 1.0)),
        ("crop_scale", (0.9, 0.1)),
        ("crop_pct", 1.5),
        ("color_jitter", -0.1),
        ("interpolation", "lanczos"),
    ],
)
def test_bad_option(option, value):
    with pytest.raises(PrunexError, match=f"{option}=.*is not allowed: give"):
        ImageFolder("anywhere", **{option: value})


def test_missing_root(tmp_path):
    refused(tmp_path / "no", r"root='.*no' is not a folder.*check the path")
    with pytest.raises(PrunexError, match="is not a folder"):
        ImageFolder(tmp_path / "no").num_classes  # noqa: B018


def test_missing_split(root):
    (root / "val").rename(root / "validation")
    refused(root, r"has no folder 'val' \(it has: masks, train, validation\).*rename a folder to 'val'")


def test_no_classes(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    refused(tmp_path, "holds no class folders")


def test_classes_that_differ(root):
    (root / "val" / "dog").rename(root / "val" / "wolf")
    refused(root, r"differ between train and val \(only in train: dog; only in val: wolf\)")


def test_empty_class(root):
    for path in (root / "val" / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    refused(root, r"class folder '.*val/dog' holds no image.*\.png")


def test_broken_images_are_named_before_training(root):
    (root / "train" / "dog" / "1.png").write_bytes(b"not an image")
    refused(root, r"cannot read image '.*train/dog/1.png' \(cannot identify image file.*replace the file or remove it")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_images_are_named_before_training(root, suffix):
    for path in (root / "train" / "cat").iterdir():
        path.unlink()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = root / "train" / "cat" / f"0{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    refused(root, rf"cannot read image '.*train/cat/0{suffix}'", masks=None)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_that_breaks_later_is_named_without_a_traceback(root, num_workers):
    data = ImageFolder(root, image_size=32, num_workers=num_workers)
    data.setup("validate")
    (root / "val" / "dog" / "1.png").write_bytes(b"gone bad")
    with pytest.raises(PrunexError) as caught:
        list(data.val_dataloader())
    assert str(caught.value).startswith("cannot read image '")
    assert "val/dog/1.png" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_missing_mask(root):
    (root / "masks" / "train" / "dog" / "2.png").unlink()
    refused(root, r"1 of 6 images in '.*train' have no mask, first '.*masks/train/dog/2.png'.*masks=null")


def test_mask_of_another_size(root):
    Image.new("L", (48, 41)).save(root / "masks" / "val" / "cat" / "0.png")
    refused(root, r"mask '.*val/cat/0.png' is 48 x 41 pixels, its image '0.png' 48 x 40", stage="validate")


def test_sixteen_bits_are_read_as_eight_of_them(tmp_path):
    shades = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide = (shades.astype(np.uint16) << 8) + 77
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(wide).save(tmp_path / name)
        found = np.asarray(read_image(tmp_path / name))
        assert found.shape == (16, 16, 3)
        assert all(np.array_equal(found[..., c], shades) for c in range(3))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_no_known_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "odd.tif")
    with pytest.raises(PrunexError, match=r"odd\.tif' \(its pixels are numbers of no known range; save it with 8"):
        read_image(tmp_path / "odd.tif")


def test_named_mask_folder_must_exist(root):
    refused(root, r"masks='labels' is not a folder", masks="labels")


@pytest.mark.skipif(not RENDER.is_file(), reason="the photo scene script is not beside this checkout")
def test_rendered_photo_scenes(tmp_path):
    subprocess.run([sys.executable, str(RENDER), str(tmp_path), "--train-per", "1", "--val-per", "1"], check=True)
    data = ImageFolder(tmp_path, image_size=112, batch_size=8)
    data.setup("fit")
    images, labels, masks = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 112, 112)
    assert masks.any(dim=(1, 2)).all()
    assert data.num_classes == 6
