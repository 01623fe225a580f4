"""Contact sheets: every tile is there at its place, scales are honest, and words do not run into each other."""

from importlib import import_module

import numpy as np
import pytest

from prunex import PrunexError
from prunex.pictures import contact_sheet, dim_dropped, outline, overlay, resized
from prunex.pictures.overlay import OBJECT
from prunex.pictures.sheet import Sheet
from tests.pictures.test_mosaic import holds

SHEETS = import_module("prunex.pictures.contact_sheet")  # the function has the same name
NAMES = [f"transformer_attribution{'' if i == 0 else i}" for i in range(9)]


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (1, 224, 224, 3), dtype=np.uint8)
    maps = {name: rng.random((1, 14, 14)) for name in NAMES}
    return images, maps, rng.random((1, 14, 14)) > 0.5


def test_image_kept_patches_and_every_method_are_there(scene):
    images, maps, kept = scene
    sheet = contact_sheet(images, maps, kept=kept, heading=["a.jpg", "predicted: cat"])
    assert sheet.dtype == np.uint8
    assert holds(sheet, images[0])
    assert holds(sheet, dim_dropped(images, kept)[0])
    for values in maps.values():
        assert holds(sheet, outline(overlay(images, values, floor=0.0), kept, thick=1)[0])


def test_five_tiles_a_row_on_white(scene):
    images, maps, kept = scene
    one, two = contact_sheet(images, dict(list(maps.items())[:4])), contact_sheet(images, maps)
    assert one.shape[1] == two.shape[1] == 5 * (224 + 8) + 8
    assert 224 < two.shape[0] - one.shape[0] < 300  # one more row of tiles
    assert (two[:, -8:] == 255).all()
    assert (two[:8] == 255).all()


def test_unsigned_scales_begin_at_zero_and_signed_ones_are_centred():
    images = np.full((1, 224, 224, 3), 128, dtype=np.uint8)
    flat, grey = np.full((1, 14, 14), 0.9), overlay(images, np.zeros((1, 14, 14)))
    flat[0, 0, 0] = 1.0
    # Nearly constant relevance must look nearly constant, and does not on a scale from the smallest value.
    tile = overlay(images, flat, floor=0.0)
    assert holds(contact_sheet(images, {"rollout": flat}), tile[0])
    assert np.abs(tile[0, -1, -1].astype(int) - grey[0, -1, -1]).max() > 60
    signed = np.zeros((1, 14, 14))
    signed[0, 0, 0], signed[0, 0, 1], signed[0, 0, 2] = 2.0, -1.0, 1.0
    tile = overlay(images, signed, signed=True)
    assert holds(contact_sheet(images, {"lrp": signed}, signed=["lrp"]), tile[0])
    assert np.array_equal(tile[0, -1, -1], grey[0, -1, -1])  # zero has no colour


def test_the_bar_shows_the_colours_of_the_tiles():
    grey = np.full((1, 224, 224, 3), 128, dtype=np.uint8)
    values = np.zeros((1, 14, 14))
    values[0, 0, 0] = 5.0
    for signed in (False, True):
        sheet = contact_sheet(grey, {"m": values}, signed=["m"] if signed else [])
        tile = overlay(grey, values, signed=signed, floor=0.0)
        bar = SHEETS._bar(signed)
        assert holds(sheet, bar)
        assert np.array_equal(bar[0, -1], tile[0, 0, 0])
        middle = bar[0, 110] if signed else bar[0, 0]
        assert np.abs(middle.astype(int) - tile[0, -1, -1]).max() <= 2


@pytest.fixture
def sheets(monkeypatch):
    """Every sheet that is drawn."""
    seen = []
    original = Sheet.drawn
    monkeypatch.setattr(Sheet, "drawn", lambda self: seen.append(self) or original(self))
    return seen


def test_which_scales_are_shown_follows_the_maps(sheets, scene):
    images, _, _ = scene
    rng = np.random.default_rng(1)

    def words(values, signed=()):
        sheets.clear()
        contact_sheet(images, {"m": values}, signed=signed)
        return " ".join(t.get_text() for sheet in sheets for t in sheet.figure.texts)

    assert "− largest" not in words(rng.random((1, 4, 4)))
    assert "− largest" not in words(rng.random((1, 4, 4)) - 1e-6)  # rounding
    assert "negative: against" not in words(rng.normal(size=(1, 4, 4)))
    assert "− largest" in words(rng.normal(size=(1, 4, 4)))  # whatever the method says of itself
    told = words(rng.random((1, 4, 4)), signed=["m"])
    assert "− largest" in told
    assert "negative: against the explained class" in told
    assert "Each tile has its own scale" in told


@pytest.mark.parametrize("shape", [(224, 224), (64, 64), (518, 518), (96, 32), (32, 96)])
@pytest.mark.parametrize("methods", [1, 9])
def test_words_stay_on_the_sheet_and_apart(sheets, shape, methods):
    """Boxes of all texts, as matplotlib measures them: none leaves the sheet, meets another or a tile."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (1, *shape, 3), dtype=np.uint8)
    maps = {name: rng.normal(size=(1, 8, 8)) for name in NAMES[:methods]}
    heading = ["a/very/long/name of a file " * 9, "predicted: " + "class " * 60]
    contact_sheet(images, maps, NAMES[:1], np.ones((1, 8, 8), dtype=bool), heading=heading)
    assert sum(len(sheet.figure.texts) for sheet in sheets) > methods
    for sheet in sheets:
        canvas, height, width = sheet.pixels, sheet.height, sheet.width
        boxes = [text.get_window_extent(sheet.canvas.get_renderer()) for text in sheet.figure.texts]
        here = [(box.x0, height - box.y1, box.x1, height - box.y0) for box in boxes]
        for x0, y0, x1, y1 in here:
            assert x0 >= 0
            assert x1 <= width + 1
            assert y0 >= -1
            assert y1 <= height + 1
            under = canvas[max(0, int(y0) + 2) : int(y1) - 2, int(x0) + 1 : int(x1) - 1]
            assert (under == 255).all(), "text lies on a tile"
        for i, a in enumerate(here):
            for b in here[:i]:
                across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                assert across <= 1 or down <= 3  # line heights hold room for accents and descenders


def test_names_of_23_letters_are_written_whole_on_tiles_of_192(sheets):
    contact_sheet(np.zeros((2, 192, 192, 3), dtype=np.uint8), {NAMES[0]: np.ones((2, 8, 8))}, side=192)
    assert NAMES[0] in [text.get_text() for sheet in sheets for text in sheet.figure.texts]


def test_narrow_images_still_have_tiles_of_the_wanted_width():
    sheet = contact_sheet(np.zeros((1, 128, 32, 3), dtype=np.uint8), {"a": np.ones((1, 4, 1))})
    assert sheet.shape[1] >= 2 * 224
    assert sheet.shape[0] >= 4 * 224


def test_several_images_are_rows_and_stand_beside_every_band():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (3, 192, 192, 3), dtype=np.uint8)
    maps = {name: rng.random((3, 8, 8)) for name in NAMES[:5]}
    sheet = contact_sheet(images, maps, labels=[0, 1, 2], predicted=[0, 0, 2], class_names=["a", "b", "c"], side=192)
    for values in maps.values():
        assert all(holds(sheet, cell) for cell in overlay(images, values, floor=0.0))
    first = [y for y in range(len(sheet) - 192) if holds(sheet[y : y + 192], images[0])]
    assert len(first) == 2  # five methods are three and two
    assert sheet.shape[1] < 5 * 200 + 100


def test_maps_that_say_nothing(scene):
    images, _, _ = scene
    for values in (np.zeros((1, 4, 4)), np.full((1, 4, 4), np.nan)):
        grey = overlay(images, np.zeros((1, 4, 4)))
        assert holds(contact_sheet(images, {"m": values}), grey[0])


def test_masks_are_outlined():
    images = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8)
    mask = np.zeros((1, 64, 64), dtype=bool)
    mask[0, 20:40, 20:40] = True
    sheet = contact_sheet(images, {"m": np.ones((1, 8, 8))}, masks=mask)
    assert holds(sheet, outline(resized(images, 224), mask, OBJECT)[0])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda i, m: contact_sheet(i, {}), "no map to draw"),
        (lambda i, m: contact_sheet(i, m, across=1), "across=1 is not allowed: give at least 2"),
        (lambda i, m: contact_sheet(i / 255, m), r"give uint8 \[M, H, W, 3\]"),
        (lambda i, m: contact_sheet(i, {"rollout": np.ones((2, 4, 4))}), "maps of rollout of shape"),
        (lambda i, m: contact_sheet(i, m, kept=np.ones((2, 4, 4))), "kept of shape"),
        (lambda i, m: contact_sheet(i, m, labels=[1, 2]), "2 class numbers for 1 images"),
    ],
)
def test_refused(scene, call, match):
    with pytest.raises(PrunexError, match=match):
        call(scene[0], scene[1])
