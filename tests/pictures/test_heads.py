"""Pictures of heads: bars, edges and cells as strong as their numbers, only what there is room for, misfits refused."""

import numpy as np
import pytest

from prunex import PrunexError
from prunex.pictures import attribute_rows, concept_contributions, prototype_tree
from prunex.pictures.curves import COLORS
from prunex.pictures.heads import AGAINST, FOR

BLUE = [int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5)]
END = [103, 0, 31]  # the red end of the scale


def images(count):
    return np.random.default_rng(0).integers(100, 120, (count, 32, 32, 3), dtype=np.uint8)


def area(picture, color, off=0):
    return int((np.abs(picture.astype(int) - np.asarray(color, int)) <= off).all(-1).sum())


# ---------------------------------------------------------------------------------------------------------- concepts


def concepts(values, targets=(0,), **more):
    values = np.asarray(values, dtype=float)
    return concept_contributions(
        images(len(values)), values, [f"c{i}" for i in range(values.shape[1])], targets, **more
    )


def test_bars_are_as_long_as_what_concepts_add_to_the_target():
    values = [[[2.0, 9.0], [-1.0, 9.0], [0.5, 9.0]]]
    picture = concepts(values)
    assert area(picture, FOR) == pytest.approx(2.5 * area(picture, AGAINST), rel=0.1)
    other = concepts(values, targets=(1,))
    assert area(other, AGAINST) == 0
    half = concepts([*values, [[1.0, 9.0], [0.0, 9.0], [0.0, 9.0]]], targets=(0, 0))
    assert area(half, FOR) == pytest.approx(area(picture, FOR) * 3.5 / 2.5, rel=0.1)


def test_only_the_strongest_concepts_of_an_image_have_bars():
    five = concepts(np.ones((1, 5, 2)))
    many = concepts(np.concatenate([np.ones((1, 5, 2)), np.full((1, 3, 2), 0.9)], 1))
    assert area(many, FOR) == area(five, FOR) > 0


def test_the_table_is_the_mean_over_images():
    same = concepts([[[1.0, 0.0], [0.0, 0.0]]] * 2, targets=(1, 1))
    opposed = concepts([[[1.0, 0.0], [0.0, 0.5]], [[-1.0, 0.0], [0.0, 0.5]]], targets=(1, 1))
    cell = area(same, END)
    assert cell > 1000
    assert area(opposed, END) == pytest.approx(cell, rel=0.1)  # of the other cell
    where = [np.argwhere((p == END).all(-1)).mean(0) for p in (same, opposed)]
    assert where[1][0] > where[0][0] + 15
    assert where[1][1] > where[0][1] + 15


def test_effects_take_the_table_and_leave_the_bars():
    values = [[[1.0, 0.0], [0.0, 0.0]]]
    plain = concepts(values, targets=(1,))
    told = concepts(values, targets=(1,), effects=[[0.0, 0.0], [0.0, 3.0]])
    assert area(plain, END) > 1000
    assert area(told, END) == pytest.approx(area(plain, END), rel=0.1)
    where = [np.argwhere((p == END).all(-1)).mean(0) for p in (plain, told)]
    assert (where[1] > where[0] + 15).all()
    with pytest.raises(PrunexError, match=r"effects of shape \(2, 3\) do not fit contributions: give \(2, 2\)"):
        concepts(values, targets=(1,), effects=np.ones((2, 3)))
    with pytest.raises(PrunexError, match="finite"):
        concepts(values, targets=(1,), effects=np.full((2, 2), np.nan))


def test_large_tables_show_the_strongest_and_fit_on_a_screen():
    values = np.zeros((1, 112, 200))
    values[0, 100, 150] = 1
    picture = concepts(values, class_names=[f"{i:03d}.A_bird_of_a_long_name" for i in range(200)], title="$x$ " * 80)
    assert picture.shape[0] < 900
    assert area(picture, END) > 100


def test_places_of_concepts_are_drawn_where_there_are_any():
    values, maps = np.ones((2, 3, 2)), np.zeros((2, 4, 4))
    maps[:, 0, 0] = 1
    with_maps, without = concepts(values, (0, 1), maps=maps), concepts(values, (0, 1))
    assert with_maps.shape[1] > without.shape[1] + 80
    reddish = (with_maps[..., 0].astype(int) - with_maps[..., 2] > 60).sum()
    assert reddish > (without[..., 0].astype(int) - without[..., 2] > 60).sum() + 500


@pytest.mark.parametrize(
    ("values", "targets", "says"),
    [
        (np.ones((1, 2)), [0], "contributions of shape .*give finite numbers"),
        (np.ones((2, 2, 3)), [0], "1 images and 2 concepts"),
        (np.full((1, 2, 3), np.nan), [0], "finite"),
        (np.ones((1, 2, 3)), [3], r"targets=\[3\] are not allowed: give one class of 0..2"),
        (np.ones((1, 2, 3)), [0, 1], "2 class numbers for 1 images"),
        (np.ones((1, 2, 3)), None, "targets=None"),
    ],
)
def test_concepts_that_do_not_fit(values, targets, says):
    with pytest.raises(PrunexError, match=says):
        concept_contributions(images(1), values, ["a", "b"], targets)


def test_maps_that_do_not_fit():
    with pytest.raises(PrunexError, match="maps of shape"):
        concepts(np.ones((1, 2, 2)), maps=np.ones((2, 4, 4)))


# -------------------------------------------------------------------------------------------------------------- tree


def grown(ends):
    """Counts by node in pre-order, from counts by leaf."""
    if len(ends) == 1:
        return [ends[0]]
    half = len(ends) // 2
    return [sum(ends), *grown(ends[:half]), *grown(ends[half:])]


def patches(branches, color=(200, 30, 30), count=3):
    return [np.full((count, 8, 8, 3), color, dtype=np.uint8) for _ in range(branches)]


def tree(ends, **more):
    ends = np.asarray(ends)
    leaves = np.where(ends[:, None] > 0, np.eye(4)[np.arange(len(ends)) % 4] * 0.7 + 0.075, np.nan)
    more.setdefault("patches", patches(len(ends) - 1))
    return prototype_tree(np.asarray(grown(ends.tolist())), leaves, **more)


def test_edges_are_as_wide_as_the_share_that_goes_along_them():
    def blue(ends):  # of the root's left edge alone, in one column
        picture = tree(ends)
        column = picture[:, picture.shape[1] // 3 + 20]
        return int((np.abs(column.astype(int) - BLUE) < 3).all(-1).sum())

    most, few, none = blue([90, 10]), blue([30, 70]), blue([0, 100])
    assert most > 1.8 * few > 0
    assert none == 0


def test_branches_that_no_image_visits_are_pale():
    color = (200, 30, 30)
    everywhere, left = tree([5, 5, 5, 5]), tree([10, 10, 0, 0])
    assert area(left, color) == pytest.approx(area(everywhere, color) * 2 / 3, rel=0.02)


def test_four_levels_are_drawn_whole_and_of_deeper_trees_the_most_visited_subtree():
    whole = tree([1] * 16)
    first, second = (50, 200, 50), (200, 50, 200)
    # The left half of a tree of depth 5 has one colour, the right half another; the root is in neither.
    colored = [*patches(16, first), *patches(15, second)]
    right = tree([1] * 16 + [2] * 16, patches=colored)
    assert area(right, second) == area(whole, (200, 30, 30))
    assert area(right, first) == 0
    assert right.shape[1] == whole.shape[1] < 1500
    left = tree([2] * 16 + [1] * 16, patches=colored)
    assert area(left, second) == 0


def test_a_tree_of_one_way_says_so():
    assert not np.array_equal(tree([8, 0]), tree([8, 1]))
    assert tree([8, 0], patches=patches(1, count=0)).std() > 5  # without training patches


@pytest.mark.parametrize(
    ("counts", "leaves", "branches", "says"),
    [
        ([3, 1, 2], np.ones((3, 2)), 1, "no full binary tree"),
        ([3, 1, 2], np.ones((2, 2)), 2, "patches of 2 branches"),
        ([3, 1], np.ones((2, 2)), 1, "no full binary tree"),
        ([3], np.ones((1, 2)), 0, "no full binary tree"),
        ([3, 1, 1], np.ones((2, 2)), 1, "as many as its two children"),
        ([3.0, 1.0, 2.0], np.ones((2, 2)), 1, "whole numbers"),
        ([1, -1, 2], np.ones((2, 2)), 1, "counts are no images"),
    ],
)
def test_trees_that_are_none(counts, leaves, branches, says):
    with pytest.raises(PrunexError, match=says):
        prototype_tree(counts, leaves, patches(branches))


def test_patches_that_are_no_pictures():
    with pytest.raises(PrunexError, match="patches of shape"):
        prototype_tree([3, 1, 2], np.ones((2, 2)), [np.ones((3, 8, 8))])


# -------------------------------------------------------------------------------------------------------- attributes


def rows(contributions, targets=(0,), **more):
    contributions = np.asarray(contributions, dtype=float)
    count, m = contributions.shape[:2]
    attention = np.zeros((count, m, 4, 4))
    attention[:, :, 1, 2] = 1
    return attribute_rows(images(count), attention, contributions, targets, **more)


def test_attention_is_paler_the_less_an_attribute_adds():
    picture = rows([[[2.0], [0.02]]])[50:140]  # without numbers and words
    bright = np.argwhere(picture[..., 0].astype(int) - picture[..., 2] > 40)
    columns = bright[:, 1]
    assert columns.min() > 100  # nothing on the input
    last = picture.shape[1] - 104
    assert (columns < last).all()
    strong = rows([[[2.0], [2.0]]])[50:140]
    assert (np.argwhere(strong[..., 0].astype(int) - strong[..., 2] > 40)[:, 1] > last).any()


def test_numbers_are_red_for_the_class_and_blue_against_it():
    both = rows([[[1.0, -1.0], [1.0, -1.0]]])
    against = rows([[[1.0, -1.0], [1.0, -1.0]]], targets=(1,))
    assert area(both, FOR, 3) > 20
    assert area(both, AGAINST, 3) == 0
    assert area(against, AGAINST, 3) > 20
    assert area(against, FOR, 3) == 0


def test_of_many_attributes_those_that_add_most_are_drawn():
    assert rows(np.ones((2, 40, 3)), (0, 1)).shape[1] == rows(np.ones((2, 10, 3)), (0, 1)).shape[1]


@pytest.mark.parametrize(
    ("attention", "values", "says"),
    [
        (np.ones((1, 4, 4)), np.ones((1, 2, 3)), r"attention of shape \(1, 4, 4\)"),
        (np.ones((2, 2, 4, 4)), np.ones((1, 2, 3)), "attention of shape .* does not fit the images"),
        (np.ones((1, 2, 4, 4)), np.ones((1, 3, 3)), "1 images and 2 attributes"),
        (np.ones((1, 2, 4, 4)), np.full((1, 2, 3), np.inf), "finite"),
    ],
)
def test_attributes_that_do_not_fit(attention, values, says):
    with pytest.raises(PrunexError, match=says):
        attribute_rows(images(1), attention, values, [0])
