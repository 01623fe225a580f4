"""Mosaics: the cells lie where the layout says, and shapes that do not fit are refused."""

import numpy as np
import pytest
from matplotlib import pyplot

from prunex import PrunexError
from prunex.pictures import dim_dropped, kept_mosaic, overlay, relevancy_mosaic, resized, share_mosaic
from prunex.pictures.mosaic import covered, spaced, tokens_left
from prunex.pictures.overlay import paint_groups


@pytest.fixture
def scenes():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    kept = rng.random((3, 2, 8, 8)) > 0.5
    masks = rng.random((2, 64, 64)) > 0.9
    return images, kept, masks


def holds(picture, cell):
    """Whether a picture shows a cell somewhere, pixel for pixel."""
    rows, columns = np.nonzero((picture == cell[0, 0]).all(-1))
    height, width = cell.shape[:2]
    return any(np.array_equal(picture[y : y + height, x : x + width], cell) for y, x in zip(rows, columns, strict=True))


def test_kept_mosaic_shows_every_stage_of_every_image(scenes):
    images, kept, _ = scenes
    picture = kept_mosaic(images, kept, [0, 1], [0, 0], ["cat", "dog"])
    assert picture.dtype == np.uint8
    cells = resized(images)
    for image in range(2):
        assert holds(picture, cells[image])
        for stage in range(3):
            assert holds(picture, dim_dropped(cells[image], kept[stage, image]))


def test_relevancy_mosaic_shows_every_method(scenes):
    images, _, _ = scenes
    maps = {name: np.random.default_rng(i).random((2, 8, 8)) for i, name in enumerate(("rollout", "tokentm"))}
    picture = relevancy_mosaic(images, maps)
    assert all(holds(picture, cell) for values in maps.values() for cell in overlay(resized(images), values))


def test_share_mosaic_shows_every_stage_of_every_image(scenes):
    images, _, masks = scenes
    shares = np.random.default_rng(0).random((2, 2, 8, 8))
    picture = share_mosaic(images, shares, [31, 15], [0, 1], masks=masks)
    drawn = [overlay(resized(images), stage, floor=0.0) for stage in shares]
    assert all(holds(picture, cell) for cells in drawn for cell in cells)
    for wrong, tokens in ((shares[0], [31]), (shares, [31]), (shares[:, :1], [31, 15])):
        with pytest.raises(PrunexError, match="shares"):
            share_mosaic(images, wrong, tokens)


def test_epochs_are_spread_over_few_columns():
    assert spaced(range(100), 4) == [0, 33, 66, 99]
    assert spaced([5], 4) == [5]
    assert spaced([1, 2, 3], 1) == [3]


def test_everything_at_once_and_odd_names(scenes):
    images, kept, masks = scenes
    names = ["$5 <b>", "very_" * 30]
    kept_mosaic(images, kept, [0, 1], [1, -1], names, masks, title="a $title$ " * 30)
    maps = {"signed": np.random.default_rng(0).normal(size=(2, 8, 8))}
    for targets in ([0, 1], [1, 0], [1, 1]):
        relevancy_mosaic(images, maps, kept[-1], {"signed": targets}, [0, 1], [1, 0], names, masks, title="t")
    kept_mosaic(images, kept, predicted=[0, 1], class_names=["猫", "犬"])


def test_large_and_oblong_images():
    picture = kept_mosaic(np.zeros((1, 518, 1036, 3), dtype=np.uint8), np.ones((1, 1, 37, 74), dtype=bool))
    assert max(picture.shape) < 400


def test_no_figure_is_left_in_pyplot(scenes):
    kept_mosaic(*scenes[:2])
    assert pyplot.get_fignums() == []


def test_covered():
    masks = np.zeros((2, 4, 4), dtype=bool)
    assert np.isnan(covered(np.ones((2, 2, 2), dtype=bool), masks))
    masks[0, 0] = True  # the second image has no object and does not count
    assert covered(np.array([[[True, False], [False, False]]] * 2), masks) == 0.5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda i, k, m: kept_mosaic(i, k[0]), r"kept of shape \(2, 8, 8\) cannot be drawn: give \[stages, images"),
        (lambda i, k, m: kept_mosaic(i[:1], k), r"kept of shape \(3, 2, 8, 8\) does not fit the images: give \[3, 1,"),
        (lambda i, k, m: kept_mosaic(i / 255, k), r"give uint8 \[M, H, W, 3\]"),
        (lambda i, k, m: kept_mosaic(i, k, labels=[1]), "1 class numbers for 2 images: give one for each image"),
        (lambda i, k, m: kept_mosaic(i, k, masks=m[:1]), "masks of shape"),
        (lambda i, k, m: relevancy_mosaic(i, {}), "no map to draw"),
        (lambda i, k, m: relevancy_mosaic(i, {"rollout": k[:, :1]}), "maps of rollout of shape"),
    ],
)
def test_refused(scenes, call, match):
    with pytest.raises(PrunexError, match=match):
        call(*scenes)


def test_merged_groups_are_painted_and_counted(scenes):
    images, kept, masks = scenes
    groups = np.random.default_rng(1).integers(-1, 20, (3, 2, 8, 8))
    picture = kept_mosaic(images, kept, masks=masks, groups=groups)
    cells = resized(images)
    assert all(holds(picture, paint_groups(cells[i], groups[s, i])) for s in range(3) for i in range(2))
    assert tokens_left(np.array([[[0, 0], [1, -1]], [[0, 1], [2, 3]]])) == 0.75
    with pytest.raises(PrunexError, match="groups of shape"):
        kept_mosaic(images, kept, groups=groups[:2])


def test_a_group_has_one_colour_and_a_single_patch_its_own_pixels():
    images = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    groups = np.arange(64).reshape(8, 8)
    assert np.array_equal(paint_groups(images, groups), images)
    groups[0, 0] = groups[5, 6] = 7  # together with patch (0, 7), nowhere near each other
    drawn = paint_groups(images, groups)
    members = [images[:8, :8], images[40:48, 48:56], images[:8, 56:]]
    mean = np.concatenate([m.reshape(-1, 3) for m in members]).mean(0).round()
    for y, x in ((0, 0), (40, 48), (0, 56)):
        assert (drawn[y : y + 7, x : x + 7] == mean).all()
    assert np.array_equal(drawn[16:32], images[16:32])
    groups[4, 4] = -1
    assert not np.array_equal(paint_groups(images, groups)[32:40, 32:40], images[32:40, 32:40])
