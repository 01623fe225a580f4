"""What goes in and out of the pictures: types, sizes, files."""

import numpy as np
import pytest
import torch
from PIL import Image

from prunex import PrunexError
from prunex.pictures import from_tensor, resized, save_png, under_grid
from prunex.pictures.arrays import as_numpy, on_pixels, save_npz


def test_from_tensor_undoes_the_normalisation():
    pictures = torch.randint(0, 256, (2, 8, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = pictures.permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert np.array_equal(from_tensor(images, mean, std), pictures.numpy())


def test_from_tensor_refuses_other_shapes():
    with pytest.raises(PrunexError, match=r"shape \(3, 8, 8\) are not allowed: give \[B, 3, H, W\]"):
        from_tensor(torch.zeros(3, 8, 8), (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((64, 64), (192, 192)), ((160, 100), (160, 100)), ((224, 224), (224, 224)), ((640, 320), (160, 80))],
)
def test_resized(shape, wanted):
    pictures = np.random.default_rng(0).integers(0, 255, (2, *shape, 3), dtype=np.uint8)
    large = resized(pictures, side=160)
    assert large.shape == (2, *wanted, 3)
    if wanted[0] > shape[0]:  # crisp: every pixel is one of the source
        assert np.array_equal(large[:, 1::3, 1::3], pictures)


def test_on_pixels_when_the_grid_does_not_divide():
    grid = np.arange(6).reshape(2, 3)
    assert np.array_equal(on_pixels(grid, 5, 7)[0], [0, 0, 0, 1, 1, 2, 2])
    assert np.array_equal(on_pixels(grid, 4, 6), grid.repeat(2, 0).repeat(2, 1))


def test_as_numpy_takes_half_precision_with_gradient():
    assert as_numpy(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).tolist() == [1.0, 1.0]


def test_save_png_round_trip_and_nothing_half_written(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 255, (5, 4, 3), dtype=np.uint8)
    path = save_png(tmp_path / "new" / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(path)), picture)

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, 255 - picture)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert np.array_equal(np.asarray(Image.open(path)), picture)


def test_save_png_refuses_floats(tmp_path):
    with pytest.raises(PrunexError, match=r"float64 cannot be drawn: give uint8 \[H, W, 3\]"):
        save_png(tmp_path / "a.png", np.zeros((4, 4, 3)))
    assert not list(tmp_path.iterdir())


def test_python_objects_are_no_arrays(tmp_path):
    with pytest.raises(PrunexError, match="array 'a' holds Python objects"):
        save_npz(tmp_path / "x.npz", {"a": np.array([{}])})
    assert not list(tmp_path.iterdir())
    with np.load(save_npz(tmp_path / "x.npz", {"b": np.ones(2)}), allow_pickle=False) as found:
        assert found.files == ["b"]  # and no "allow_pickle" among them, as older NumPy would have it


def test_what_lies_under_the_patch_grid():
    pictures = np.arange(2 * 90 * 90 * 3, dtype=np.uint8).reshape(2, 90, 90, 3)
    assert np.array_equal(under_grid(pictures, (80, 80)), pictures[:, :80, :80])
    padded = under_grid(pictures, (96, 80))
    assert padded.shape == (2, 96, 80, 3)
    assert np.array_equal(padded[:, :90], pictures[:, :, :80])
    assert not padded[:, 90:].any()
    assert np.array_equal(under_grid(pictures, (90, 90)), pictures)
    assert np.array_equal(under_grid(pictures[..., 0], (64, 96))[:, :, :90], pictures[:, :64, :, 0])
