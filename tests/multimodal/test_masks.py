"""Masks from relevance maps: Otsu against a search by hand, both rules, sizes, crops, constant maps and bad input."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunex.errors import PrunexError
from prunex.multimodal.masks import cell_masks, eight_bit, image_masks, otsu_threshold


def brute(image):
    """The smallest threshold with the largest between-class variance, level by level in fractions; 255 for none."""
    pixels = image.flatten().tolist()
    best, at = Fraction(-1), 255
    for threshold in range(256):
        low = [p for p in pixels if p <= threshold]
        high = [p for p in pixels if p > threshold]
        if low and high:
            apart = Fraction(sum(low), len(low)) - Fraction(sum(high), len(high))
            variance = apart**2 * len(low) * len(high)
            if variance > best:
                best, at = variance, threshold
    return at


def test_otsu_is_the_brute_search():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 7, 5), generator=generator, dtype=torch.uint8)
    images[20:40] = images[20:40] // 64 * 64  # four values, so that many thresholds are as good
    images[40:] = torch.where(images[40:] > 128, 200, 13).to(torch.uint8)
    assert otsu_threshold(images).tolist() == [brute(image) for image in images]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=12))
def test_otsu_of_few_pixels(pixels):
    image = torch.tensor([pixels], dtype=torch.uint8)
    assert otsu_threshold(image).item() == brute(image)


def test_symmetric_levels_take_the_smaller_threshold():
    assert otsu_threshold(torch.tensor([[0, 100, 200]], dtype=torch.uint8)).item() == 0


def test_one_value_has_nothing_above():
    images = torch.tensor([[[0, 0]], [[7, 7]], [[255, 255]]], dtype=torch.uint8)
    assert otsu_threshold(images).tolist() == [255, 255, 255]


def test_batch_equals_singles_and_leading_dimensions_stay():
    maps = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    cells = cell_masks(maps)
    assert cells.masks.shape == (2, 3, 4, 5)
    assert cells.threshold.shape == cells.constant.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert torch.equal(cell_masks(maps[i, j]).masks, cells.masks[i, j])


def test_eight_bits_are_truncated():
    assert eight_bit(torch.tensor([[0.0, 0.999, 1.0]])).tolist() == [[0, 254, 255]]
    assert eight_bit(torch.tensor([[-2.0, 0.0, 2.0]])).tolist() == [[0, 127, 255]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype):
    maps = torch.tensor([[0.0, 0.25, 1.0]], dtype=dtype)
    assert eight_bit(maps).tolist() == [[0, 63, 255]]


def test_scale_and_shift_change_nothing():
    maps = torch.rand(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(cell_masks(maps).masks, cell_masks(maps * 2.0**-60).masks)
    assert torch.equal(cell_masks(maps).masks, cell_masks(maps * 8 - 4).masks)


def test_constant_maps_are_empty_and_counted():
    maps = torch.stack([torch.zeros(3, 4), torch.full((3, 4), -2.5), torch.arange(12.0).view(3, 4)])
    cells = cell_masks(maps)
    assert cells.constant.tolist() == [True, True, False]
    assert cells.masks.flatten(1).sum(1).tolist() == [0, 0, 6]
    # No number is large enough to hold the spread.
    wide = cell_masks(torch.tensor([[-3e38, 3e38]]))
    assert wide.constant
    assert not wide.masks.any()


def test_areas_of_one_cell():
    cell = torch.zeros(2, 7, 7, dtype=torch.bool)
    cell[0, 3, 3] = cell[1, 1, 4] = True
    assert image_masks(cell, (224, 224)).flatten(1).sum(1).tolist() == [4096, 4096]
    assert image_masks(cell, (224, 224), mask_rule="half").flatten(1).sum(1).tolist() == [628, 628]


def test_half_keeps_aligned_rectangles_with_their_corners_rounded():
    rectangle = torch.zeros(1, 6, 8, dtype=torch.bool)
    rectangle[0, 2:5, 1:6] = True
    exact = rectangle.repeat_interleave(8, 1).repeat_interleave(8, 2)
    found = image_masks(rectangle, (48, 64), mask_rule="half")
    assert (found & exact).sum() / (found | exact).sum() > 0.97
    grown = image_masks(rectangle, (48, 64))
    assert grown.sum() == (3 * 8 + 8) * (5 * 8 + 8)  # half a cell more on every side
    assert (grown >= exact).all()


def test_input_of_the_grid_itself_is_the_grid():
    cells = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(3)) > 0.5
    for rule in ("reference", "half"):
        assert torch.equal(image_masks(cells, (5, 4), mask_rule=rule), cells)
        enlarged = image_masks(cells, (5, 4), (10, 8), mask_rule=rule)
        assert torch.equal(enlarged, cells.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_the_crop_is_the_upper_left_corner():
    cells = torch.zeros(1, 4, 4, dtype=torch.bool)
    cells[0, :, 2:] = True
    assert image_masks(cells, (4, 4), size=(4, 2)).sum() == 0
    assert image_masks(cells, (4, 4), (8, 6), size=(4, 3)).sum() == 8 * 2
    assert image_masks(cells, (4, 4), size=(3, 4)).shape == (1, 3, 4)


def test_one_row_of_cells_and_no_masks_at_all():
    assert image_masks(torch.tensor([[[True, False]]]), (2, 4), mask_rule="half").tolist() == [
        [[True, True, False, False]] * 2
    ]
    assert image_masks(torch.zeros(0, 3, 3, dtype=torch.bool), (6, 6), (5, 4)).shape == (0, 5, 4)


def test_parts_are_as_the_whole(monkeypatch):
    cells = torch.rand(7, 3, 4, generator=torch.Generator().manual_seed(4)) > 0.6
    cells[2] = False
    whole = image_masks(cells, (24, 32), (50, 41))
    monkeypatch.setattr("prunex.multimodal.masks._ROOM", 1)
    assert torch.equal(image_masks(cells, (24, 32), (50, 41)), whole)


@pytest.mark.parametrize(
    ("maps", "why"),
    [
        ([[1.0]], "a list"),
        (torch.zeros(3, 3, dtype=torch.int64), "torch.int64"),
        (torch.zeros(3), r"\[3\]"),
        (torch.zeros(2, 0, 3), r"\[2, 0, 3\]"),
        (torch.tensor([[0.0, float("nan")]]), "NaN or infinity"),
        (torch.tensor([[0.0, float("inf")]]), "NaN or infinity"),
    ],
)
def test_bad_maps(maps, why):
    with pytest.raises(PrunexError, match=why):
        cell_masks(maps)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"input_size": 32}, "input_size=32"),
        ({"input_size": (32, 0)}, "input_size=0"),
        ({"input_size": (32, 32.0)}, "input_size=32.0"),
        ({"original_size": (True, 4)}, "original_size=True"),
        ({"size": (33, 32)}, "lies in the input of 32 x 32"),
        ({"mask_rule": "halve"}, "did you mean 'half'"),
        ({"masks": torch.zeros(1, 2, 2)}, "torch.float32"),
        ({"masks": torch.zeros(2, 2, dtype=torch.bool)}, r"torch.bool \[2, 2\]"),
    ],
)
def test_bad_sizes_and_rules(options, why):
    given = {"masks": torch.ones(1, 2, 2, dtype=torch.bool), "input_size": (32, 32)} | options
    with pytest.raises(PrunexError, match=why):
        image_masks(**given)


@pytest.mark.parametrize("images", [torch.zeros(2, 2), torch.zeros(4, dtype=torch.uint8), "image"])
def test_bad_images_of_eight_bits(images):
    with pytest.raises(PrunexError, match=r"give uint8 \[..., h, w\]"):
        otsu_threshold(images)
