"""Pictures of units: bars as long as what is kept, cells as strong as the relevance, and misfits refused."""

import numpy as np
import pytest
from matplotlib import colormaps, pyplot

from prunex import PrunexError
from prunex.pictures import class_heads, head_attention, overlay, resized, unit_widths
from prunex.pictures.curves import COLORS
from tests.pictures.test_mosaic import holds

HEADS, CHANNELS = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS[:2])
GONE = [0xE3, 0xE6, 0xE9]


def area(picture, color):
    return (picture == color).all(-1).sum()


def test_bars_are_as_long_as_what_is_kept():
    dense = [[20, 1536]] * 4
    full = unit_widths(dense, dense)
    half = unit_widths(dense, [[20, 768]] * 4)
    none = unit_widths(dense, [[0, 1536], *dense[1:]])
    assert area(full, GONE) == 0
    assert area(half, CHANNELS) == pytest.approx(area(full, CHANNELS) / 2, rel=0.04)
    assert area(half, GONE) == pytest.approx(area(full, CHANNELS) / 2, rel=0.04)
    assert area(half, HEADS) == pytest.approx(area(full, HEADS), rel=0.02)
    bar = area(none, GONE)
    assert area(full, HEADS) - area(none, HEADS) == pytest.approx(bar, rel=0.05)
    assert full.dtype == np.uint8


def test_few_heads_are_drawn_one_by_one():
    picture = unit_widths([[6, 100]] * 3, [[4, 100]] * 3)
    heads = (picture == HEADS).all(-1)
    gone = (picture == GONE).all(-1)
    column = np.flatnonzero(gone.any(0))[3]

    def runs(mask):
        return int((np.diff(mask[:, column].astype(int), prepend=0) == 1).sum())

    assert (runs(heads), runs(gone)) == (4, 2)


@pytest.mark.parametrize("blocks", [1, 12, 60])
def test_any_depth_fits_on_a_screen(blocks):
    picture = unit_widths([[12, 3072]] * blocks, [[5, 1500]] * blocks, title="a $title$ " * 40)
    assert picture.shape[1] < 2600
    unit_widths([[0, 3072]] * blocks, [[0, 12]] * blocks)  # a family without heads to take out


@pytest.mark.parametrize(
    ("dense", "kept", "says"),
    [
        ([[6, 10]], [[7, 10]], "do not fit the dense ones"),
        ([[6, 10]], [[6, 10]] * 2, "do not fit the dense ones"),
        ([6, 10], [6, 10], r"dense units of shape \(2,\).*whole numbers \[blocks, 2\]"),
        ([[6, 10]], [[6, -1]], "kept units"),
        ([[6, 10]], [[6.0, 1.0]], "kept units.*float64"),
        (np.zeros((0, 2), dtype=int), np.zeros((0, 2), dtype=int), "dense units"),
    ],
)
def test_widths_that_do_not_fit(dense, kept, says):
    with pytest.raises(PrunexError, match=says):
        unit_widths(dense, kept)


def table(values, kept=None, **more):
    values = np.asarray(values, dtype=float)
    names = [f"class {i}" for i in range(len(values))]
    return class_heads(values, names, [f"{i // 3}.{i % 3}" for i in range(values.shape[1])], kept, **more)


def test_cells_are_red_above_the_mean_blue_below_and_strongest_at_the_largest():
    picture = table([[1.0, -0.5, 0.0], [-1.0, 0.5, 0.0]]).astype(int)
    rows = [line for line in picture if (np.abs(np.diff(line, axis=0)).sum(1) > 0).sum() > 2]
    line = next(r for r in rows if (r == [103, 0, 31]).all(-1).sum() > 20)  # the red end of the scale
    half = (np.array(colormaps["RdBu_r"](0.25)[:3]) * 255).round()  # half as blue as the end
    light, strong = [(abs(line - c) <= 1).all(-1) for c in (half, [103, 0, 31])]
    assert light.sum() == pytest.approx(strong.sum(), abs=2)
    assert np.flatnonzero(light).min() > np.flatnonzero(strong).max()
    assert any((r == [5, 48, 97]).all(-1).sum() > 20 for r in rows)  # and the blue end


def test_removed_heads_have_no_colour_and_do_not_set_the_scale():
    values = [[9.0, 0.5, 0.0], [-9.0, -0.5, 0.0]]
    kept = table(values, [False, True, True])
    assert area(kept, [0xD4, 0xD8, 0xDC]) > 300
    alone = table([[0.5, 0.0], [-0.5, 0.0]])
    assert area(kept, [103, 0, 31]) == pytest.approx(area(alone, [103, 0, 31]), rel=0.1)
    other = table([[-3.0, 0.5, 0.0], [3.0, -0.5, 0.0]], [False, True, True])
    assert np.array_equal(kept, other)


def test_of_many_classes_the_strongest_are_shown():
    values = np.zeros((500, 6))
    values[123, 2] = 1
    few, more = table(values, most=10), table(values, most=20)
    assert few.shape[0] < more.shape[0]
    assert area(few, [103, 0, 31]) > 100
    table(np.zeros((2, 3)))  # nothing stands out
    table(np.zeros((2, 3)), [False] * 3)


def test_odd_names():
    class_heads(np.eye(3), ["$5 <b>", "very_" * 30, "猫"], ["0.0", "0.1", "11.10"], title="a $title$ " * 30)
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.ones((2, 3)), ["a"], ["0.0"] * 3), r"shape \(2, 3\) for 1 classes and 3 heads"),
        ((np.ones((2, 3)), ["a", "b"], ["0.0"]), "for 2 classes and 1 heads"),
        ((np.full((1, 1), np.nan), ["a"], ["0.0"]), "finite numbers"),
        ((np.ones((1, 2)), ["a"], ["0.0", "0.1"], [True]), "one boolean a head"),
        ((np.ones((0, 2)), [], ["0.0", "0.1"]), "relevance of shape"),
        ((np.ones((1, 1)), ["a"], ["0.0"], None, None, 0), "most=0"),
    ],
)
def test_tables_that_do_not_fit(arguments, says):
    with pytest.raises(PrunexError, match=says):
        class_heads(*arguments)


def test_head_attention_shows_every_head_of_every_image():
    rng = np.random.default_rng(0)
    images, maps = rng.integers(0, 255, (2, 64, 48, 3), dtype=np.uint8), rng.random((2, 3, 8, 6))
    titles = [[f"cat: head {i}.{k}" for k in range(3)] for i in range(2)]
    picture = head_attention(images, maps, titles, ["$cat$", "dog " * 40], title="where heads look")
    cells = resized(images)
    for i in range(2):
        assert holds(picture, cells[i])
        for k in range(3):
            assert holds(picture, overlay(cells[i], maps[i, k], floor=0.0))


@pytest.mark.parametrize(
    ("maps", "titles", "names", "says"),
    [
        (np.ones((2, 8, 8)), [["a"]] * 2, None, r"give \[images, heads, gh, gw\]"),
        (np.ones((3, 1, 8, 8)), [["a"]] * 2, None, "does not fit the images"),
        (np.ones((2, 1, 8, 8)), [["a"]], None, "give 1 for each of 2 images"),
        (np.ones((2, 1, 8, 8)), [["a", "b"]] * 2, None, "captions"),
        (np.ones((2, 1, 8, 8)), [["a"]] * 2, ["x"], "one name an image"),
    ],
)
def test_attention_that_does_not_fit(maps, titles, names, says):
    with pytest.raises(PrunexError, match=says):
        head_attention(np.zeros((2, 64, 64, 3), dtype=np.uint8), maps, titles, names)
