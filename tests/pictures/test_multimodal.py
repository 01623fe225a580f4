import numpy as np
import pytest

from prunex import PrunexError
from prunex.pictures import Detection, boxes_over, colored_words, detection_sheet, relevance_bars

GREY = np.full((60, 80, 3), 120, dtype=np.uint8)


def background(picture, line, x):
    """Colour at the upper edge of the word that begins at x."""
    return picture[4 + 30 * line + 1, x].astype(int)


def darkness(color):
    return 255 * 3 - int(color.sum())


def test_the_more_relevant_a_word_the_darker_it_is():
    picture = colored_words(["aa", "bb", "cc"], [0.0, 0.5, 1.0])
    backgrounds = [background(picture, 0, x) for x in (9, 9 + 35, 9 + 70)]
    assert darkness(backgrounds[0]) < darkness(backgrounds[1]) < darkness(backgrounds[2])


def test_the_scale_is_the_texts_own():
    values = np.array([0.1, 0.2, 0.4])
    assert not np.array_equal(colored_words(["a", "b", "c"], values), colored_words(["a", "b", "c"], values[::-1]))
    # The number at the end of the scale differs, the colours of words do not.
    head = slice(0, 34)
    large, small = (colored_words(["a", "b", "c"], factor * values)[head] for factor in (1, 1e-6))
    assert np.array_equal(large, small)


def test_a_mark_takes_no_colour_from_words():
    words, marks = ["[CLS]", "cat"], [True, False]
    quiet, loud = (colored_words(words, [value, 0.3], marks) for value in (0.0, 100.0))
    assert np.array_equal(quiet[:34, 80:], loud[:34, 80:])
    grey = background(loud, 0, 9)
    assert grey.max() - grey.min() < 3
    assert darkness(grey) > darkness(background(quiet, 0, 9))
    # Of marks alone the largest is the scale's end.
    assert darkness(background(colored_words(["[SEP]"], [3.0], [True]), 0, 9)) > 0


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, -4.0])
def test_what_is_no_relevance_gets_no_colour(odd):
    assert np.array_equal(colored_words(["a", "b"], [odd, 1.0]), colored_words(["a", "b"], [0.0, 1.0]))


def test_long_texts_go_on_in_further_lines_and_parts_of_a_word_stay_together():
    words = ["word"] * 40
    assert len(colored_words(words, np.ones(40), width=300)) > len(colored_words(words, np.ones(40), width=900))
    two = ["w" * 20, "pag", "o" * 16]
    broken, whole = (colored_words(two, [0, 1, 1], joined=[False, False, j], width=400) for j in (False, True))
    # Side by side "pag" would fit on the first line; with what goes on it, it does not.
    assert darkness(background(broken, 0, 8 + 260)) > 0
    assert darkness(background(whole, 0, 8 + 260)) == 0
    assert darkness(background(whole, 1, 10)) > 0


def test_a_word_longer_than_a_line_is_cut():
    picture = colored_words(["x" * 400, "cat"], [1.0, 0.5], width=300)
    assert picture.shape[1] == 300
    assert darkness(background(picture, 1, 10)) > 0


def test_a_script_that_the_font_lacks_is_no_warning(recwarn):
    colored_words(["\U0001f9a5", "文"], [1.0, 2.0])
    assert not recwarn


@pytest.mark.parametrize(
    ("words", "relevance", "more"),
    [
        (["a"], [1.0, 2.0], {}),
        ([], [], {}),
        (["a"], ["x"], {}),
        (["a", "b"], [1, 2], {"marks": [True]}),
        (["a", "b"], [1, 2], {"joined": [True]}),
    ],
)
def test_what_are_no_words_with_relevance(words, relevance, more):
    with pytest.raises(PrunexError, match="give"):
        colored_words(words, relevance, **more)


def test_the_strongest_box_is_on_top_and_thickest():
    boxes = [[0.1, 0.1, 0.6, 0.9], [0.5, 0.2, 0.9, 0.8]]
    large = GREY.repeat(4, 0).repeat(4, 1)
    drawn = boxes_over(large, boxes, [1.0, 0.3])
    # Where the right side of the first box crosses the upper side of the second.
    x, y = int(0.6 * 320) - 1, int(0.2 * 240)
    assert drawn[y, x].sum() > 600  # bright, the strongest's
    row = drawn[120].astype(int)
    lines = [np.ptp(row, axis=1) > 60][0]
    assert lines[32 : 32 + 4].all()  # four pixels of the left side
    weak = drawn[int(0.8 * 240) - 3, int(0.75 * 320)]
    assert not np.array_equal(weak, drawn[int(0.9 * 240) - 2, int(0.3 * 320)])


def test_corners_may_come_in_any_order():
    one, other = boxes_over(GREY, [[0.1, 0.2, 0.6, 0.9]], [1.0]), boxes_over(GREY, [[0.6, 0.9, 0.1, 0.2]], [1.0])
    assert np.array_equal(one, other)


def test_boxes_that_mean_nothing_are_pale_and_unnamed():
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9]]
    drawn = boxes_over(GREY, boxes, [0.0, 0.0])
    assert np.ptp(drawn.astype(int), axis=2).max() == 0
    named = boxes_over(GREY, boxes, [1.0, 0.0], ["7", "8"])
    assert not np.array_equal(named, boxes_over(GREY, boxes, [1.0, 0.0], ["3", "8"]))
    assert np.array_equal(named, boxes_over(GREY, boxes, [1.0, 0.0], ["7", "3"]))


@pytest.mark.parametrize(
    ("boxes", "relevance", "says"),
    [
        ([[10, 20, 300, 200]], [1.0], "shares of the image's width and height"),
        ([[0.1, 0.2, np.nan, 0.3]], [1.0], "shares of the image's width and height"),
        ([[0.1, 0.2, 0.3]], [1.0], r"give \[n, 4\]"),
        ([[0.1, 0.2, 0.3, 0.4]], [1.0, 2.0], "does not fit 1 boxes"),
    ],
)
def test_what_are_no_boxes(boxes, relevance, says):
    with pytest.raises(PrunexError, match=says):
        boxes_over(GREY, boxes, relevance)


def test_bars_are_in_the_order_of_relevance_and_say_what_is_left_out():
    short = relevance_bars([f"box {i}" for i in range(5)], [0.1, 0.9, 0.3, 0.2, 0.05], most=3)
    lengths = [int((short[6 + 22 * row + 10].astype(int) != 255).any(-1)[90:520].sum()) for row in range(3)]
    assert lengths == sorted(lengths, reverse=True)
    assert len(short) == 6 + 22 * 3 + 20
    assert len(relevance_bars(["a", "b"], [0.0, np.nan])) == 6 + 22 * 2 + 6
    with pytest.raises(PrunexError, match="at least one name"):
        relevance_bars([], [])


def detection(methods=("rollout",), box=(0.25, 0.25, 0.75, 0.75)):
    cells = np.zeros((3, 4))
    cells[0, 0] = 1.0
    return Detection("cat", "97%\nquery 3", box, dict.fromkeys(methods, cells), dict.fromkeys(methods, cells > 0))


def test_a_detections_map_mask_and_box_are_where_they_are():
    picture = GREY.repeat(3, 0).repeat(3, 1)  # 180 x 240, which a tile of 180 leaves as it is
    sheet = detection_sheet(picture, [detection()], side=180)
    # The second tile lies 8 + 240 + 8 pixels from the left, below a title of two lines.
    tile = sheet[8 + 34 + 4 :][:180, 256 : 256 + 240].astype(int)
    assert tile[20, 20].min() < tile[20, 20].max() - 40  # the glowing cell
    assert np.ptp(tile[150, 200]) == 0  # grey elsewhere
    assert tile[46, 120].min() == 255  # the upper side of the box
    cyan = (tile == (0, 229, 255)).all(-1)
    assert cyan[:62, :62].any()
    assert not cyan[70:].any()


def test_with_several_methods_a_detection_is_a_row():
    one = detection_sheet(GREY, [detection()] * 2)
    methods = ("rollout", "grad_cam", "raw_attention")
    two = detection_sheet(GREY, [detection(methods)] * 2)
    assert two.shape[0] > one.shape[0]
    assert two.shape[1] > one.shape[1]
    many = detection_sheet(GREY, [detection()] * 6, across=4)
    assert many.shape[1] == detection_sheet(GREY, [detection()] * 3, across=4).shape[1]
    assert many.shape[0] > one.shape[0]


def test_boxes_beyond_the_image_are_cut_and_masks_may_be_empty():
    each = detection(box=(-0.2, -0.1, 1.3, 1.2))
    nothing = Detection(each.label, each.note, each.box, each.maps, {"rollout": np.zeros((60, 80), dtype=bool)})
    assert not (detection_sheet(GREY, [nothing]) == (0, 229, 255)).all(-1).any()


def test_a_map_without_any_relevance_says_so():
    each = detection()
    zero = Detection(each.label, each.note, each.box, {"rollout": np.zeros((3, 4))}, {"rollout": np.zeros((3, 4)) > 0})
    # White letters on black in the corner of the second tile.
    corner = detection_sheet(GREY.repeat(3, 0).repeat(3, 1), [zero], side=180)[46:66, 256:380]
    assert corner.max() == 255
    assert corner.min() < 40


def test_detections_need_the_same_methods():
    with pytest.raises(PrunexError, match="the same methods"):
        detection_sheet(GREY, [])
    with pytest.raises(PrunexError, match="the same methods"):
        detection_sheet(GREY, [detection(), detection(("grad_cam",))])
