"""Bars: as long as they should be, safe in a page, and drawn whatever is missing."""

import math
import re

import numpy as np
import pytest

from prunex import PrunexError
from prunex.pictures import bars, bars_svg
from prunex.pictures.curves import COLORS

BLUE, ORANGE = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in COLORS[:2])


def near(picture, color):
    """Pixels of a colour on white, somewhat transparent."""
    faded = 255 - 0.85 * (255 - np.array(color))
    return np.abs(picture.astype(float) - faded).sum(-1) < 12


def test_a_bar_is_as_long_as_its_mean():
    picture = bars({"a": {"x": (0.8, math.nan, math.nan)}, "b": {"x": (0.4, math.nan, math.nan)}}, width=400)
    lengths = near(picture, BLUE).sum(1)
    first, second = (part[part > 0] for part in np.array_split(lengths[: len(lengths) - 40], 2))
    assert np.median(first) / np.median(second) == pytest.approx(2, abs=0.05)


def test_a_series_keeps_its_colour_where_others_are_missing():
    picture = bars({"a": {"slim": (0.8, 0.7, 0.9)}}, order=["dense", "slim"])
    assert near(picture, ORANGE).sum() > 500
    assert near(picture, BLUE).sum() < 200  # nothing but the edges of letters and lines
    both = bars({"a": {"dense": (0.8, 0.7, 0.9), "slim": (0.8, 0.7, 0.9)}})
    assert near(both, BLUE).sum() > 500


def test_what_is_compared_with_is_grey():
    assert near(bars({"a": {"x": (0.8, 0.7, 0.9)}}, faint=["a"]), BLUE).sum() == 0


def test_words_are_escaped_and_follow_the_page():
    svg = bars_svg({"<b>$x$": {"<i>": (0.5, 0.4, 0.6), "_y": (0.2, 0.1, 0.3)}}, "<script>", {"<u>": 0.3})
    assert svg.startswith("<svg")
    for word in ("<b>", "<i>", "<script>", "<u>"):
        assert word not in svg
    assert "&lt;b&gt;$x$" in svg
    assert "currentColor" in svg
    assert re.search(r">\s*_y<", svg)


def test_missing_numbers_are_left_out():
    rows = {"a": {"x": (0.5, math.nan, 0.6)}, "b": {"x": (math.nan, 0.1, 0.2)}, "c": {"y": (-0.5, -0.6, -0.4)}}
    assert bars(rows, lines={"chance": math.nan}).shape[1:] == (520, 3)


@pytest.mark.parametrize("rows", [{}, {"a": {}}, {"a": {"x": (math.nan, 0.0, 1.0)}}])
def test_nothing_to_draw(rows):
    with pytest.raises(PrunexError, match="at least one finite mean"):
        bars(rows)
