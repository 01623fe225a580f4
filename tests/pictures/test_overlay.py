"""Overlays and kept patches on single images."""

import numpy as np
import pytest
import torch

from prunex import PrunexError
from prunex.pictures import dim_dropped, outline, overlay
from prunex.pictures.overlay import KEPT

GREY = np.full((8, 8, 3), 128, dtype=np.uint8)


def colourful(picture):
    """Per pixel: how far it is from grey."""
    return np.ptp(picture.astype(int), axis=-1)


def test_unsigned_overlay_colours_the_high_patch_only():
    heat = np.array([[0.1, 0.1], [0.1, 0.7]])
    drawn = overlay(GREY, heat, cmap="viridis")
    assert drawn.shape == GREY.shape
    assert drawn.dtype == np.uint8
    assert colourful(drawn)[:4].max() == 0
    assert colourful(drawn)[4:, 4:].min() > 30


def test_each_image_has_its_own_scale():
    heat = np.stack([np.array([[0.0, 1.0]]), np.array([[0.0, 1e-6]])])
    drawn = overlay(np.stack([GREY, GREY]), heat)
    assert np.array_equal(drawn[0], drawn[1])


def test_a_batch_equals_its_singles():
    rng = np.random.default_rng(0)
    images, heat = rng.integers(0, 255, (3, 8, 8, 3), dtype=np.uint8), rng.random((3, 4, 4))
    for smooth in (False, True):
        together = overlay(images, heat, smooth=smooth)
        assert all(np.array_equal(together[i], overlay(images[i], heat[i], smooth=smooth)) for i in range(3))
    kept = rng.random((3, 4, 4)) > 0.5
    assert all(np.array_equal(dim_dropped(images, kept)[i], dim_dropped(images[i], kept[i])) for i in range(3))


def test_signed_overlay_is_centred_at_zero():
    drawn = overlay(GREY, np.array([[-1.0, 0.0, 0.0, 0.5]])).astype(int)
    blue, none, red = drawn[0, 0], drawn[0, 3], drawn[0, 7]
    assert blue[2] > blue[0]
    assert np.ptp(none) == 0
    assert red[0] > red[2]
    # Without negative values the caller may still say that 0 is the middle: 0 then has no colour, and 1 is red.
    drawn = overlay(GREY, np.array([[0.5, 1.0]]), signed=True).astype(int)
    assert colourful(drawn)[0, 0] > 0


@pytest.mark.parametrize("heat", [np.zeros((2, 2)), np.full((2, 2), 3.0), np.full((2, 2), np.nan)])
def test_constant_and_empty_maps_get_no_colour(heat):
    assert colourful(overlay(GREY, heat)).max() == 0


def test_not_finite_values_get_no_colour():
    drawn = overlay(GREY, np.array([[np.inf, 0.0], [np.nan, 1.0]]))
    assert colourful(drawn)[:, :4].max() == 0
    assert colourful(drawn)[4:, 4:].min() > 0


def test_tensors_and_pixel_maps_are_taken():
    heat = torch.rand(8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert overlay(torch.from_numpy(GREY), heat.bfloat16()).shape == (8, 8, 3)


def test_dim_dropped_keeps_the_kept():
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    kept = np.array([[True, False], [False, False]])
    drawn = dim_dropped(image, kept, boundary=False)
    assert np.array_equal(drawn[:4, :4], image[:4, :4])
    assert colourful(drawn)[4:].max() == 0
    assert drawn[4:].min() >= 168
    assert np.array_equal(dim_dropped(image, np.ones((2, 2), dtype=bool)), image)
    assert (drawn != image).any()


def test_boundary_lies_on_the_patch_edge():
    drawn = outline(GREY, np.array([[True, False]]))
    assert (drawn[:, 3] == KEPT).all()
    assert (drawn[:, 4] == 20).all()
    assert (drawn[:, :3] == 128).all()
    assert (drawn[:, 5:] == 128).all()
    assert (GREY == 128).all()  # the caller's image is left alone


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: overlay(GREY / 255, np.zeros((2, 2))), "float64 cannot be drawn: give uint8"),
        (lambda: overlay(GREY[..., 0], np.zeros((2, 2))), "cannot be drawn: give uint8"),
        (lambda: overlay(GREY, np.zeros(4)), r"heat of shape \(4,\) does not fit the images: give \[gh, gw\]"),
        (lambda: overlay(GREY[None], np.zeros((2, 2, 2))), r"give \[1, gh, gw\]"),
        (lambda: overlay(GREY, np.zeros((2, 2)), alpha=1.5), r"alpha=1.5 is not allowed: give a number in \[0, 1\]"),
        (lambda: overlay(GREY, np.zeros((2, 2)), cmap="infernal"), "cmap='infernal' is no matplotlib colormap"),
        (lambda: overlay(GREY, np.array([["a"]])), "cannot be drawn: give numbers"),
        (lambda: dim_dropped(GREY, np.zeros((3, 2, 2))), "kept of shape"),
    ],
)
def test_refused(call, match):
    with pytest.raises(PrunexError, match=match):
        call()
