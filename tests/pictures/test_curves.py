"""Curves as a picture and as SVG for a page."""

from xml.etree import ElementTree

import numpy as np
import pytest

from prunex import PrunexError
from prunex.pictures import curves, curves_svg
from prunex.pictures.curves import COLORS, _running_mean, _span

LINES = {"train/loss": (np.arange(200), np.linspace(2, 1, 200)), "_val <loss> $x$": ([0, 100], [1.5, float("nan")])}


def test_picture_has_the_size_and_the_colours():
    picture = curves(LINES, title="Loss $5", size=(400, 240))
    assert picture.shape == (240, 400, 3)
    assert picture.dtype == np.uint8
    color = [int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert (picture == color).all(-1).sum() > 50


@pytest.mark.parametrize(
    ("values", "percent", "ends"),
    [
        ([0.9680, 0.9681], True, (0.94, 1.01)),  # noise of a hundredth of a point is no cliff
        ([0.2, 0.9], True, (0.0, 1.01)),
        ([0.0, 0.001], True, (0.0, 0.06)),
        ([100.0, 100.1], False, (97.0, 103.0)),
        ([1e-5, 1e-4], False, (0.0, 1.1e-4)),
        ([0.0, 0.0], False, (-0.6, 0.6)),
        ([-3.0, 5.0], False, (-3.5, 5.5)),
    ],
)
def test_axes_are_not_zoomed_into_noise(values, percent, ends):
    low, high = _span(min(values), max(values), percent)
    assert ends[0] <= low <= min(values) <= max(values) <= high <= ends[1]
    assert high - low >= (0.05 if percent else 0.05 * max(map(abs, values)))


def test_svg_is_sound_and_follows_the_page():
    svg = curves_svg(LINES, title="Loss", percent=True)
    root = ElementTree.fromstring(svg)
    words = ["".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "_val <loss> $x$" in words
    assert "currentColor" in svg
    assert "<metadata" not in svg
    assert "font-family" not in svg
    assert "DejaVu" not in svg


def test_svgs_do_not_share_ids_and_are_reproducible():
    def ids(svg):
        return {element.attrib["id"] for element in ElementTree.fromstring(svg).iter() if "id" in element.attrib}

    first, second = curves_svg(LINES, title="a"), curves_svg(LINES, title="b")
    assert not ids(first) & ids(second)
    assert curves_svg(LINES, title="a") == first


def test_running_mean_of_a_constant_is_the_constant():
    assert np.allclose(_running_mean(np.full(100, 3.0), 9), 3.0)


def test_a_band_lies_around_its_line():
    line = {"a": ([0, 1], [0.5, 0.5]), "b": ([0, 1], [0.2, 0.8])}
    plain = curves(line, size=(300, 200)).astype(int)
    spread = curves(line, size=(300, 200), bands={"a": ([0.4, 0.4], [0.6, 0.6])}).astype(int)
    changed = (plain != spread).any(-1)
    assert 0.02 < changed.mean() < 0.3
    with pytest.raises(PrunexError, match=r"the band of 'a' has \(1,\) values for \(2,\) points"):
        curves(line, bands={"a": ([0.4], [0.6, 0.6])})


def test_refused():
    with pytest.raises(PrunexError, match=r"curve 'a' has steps \(2,\) and values \(1,\): give two lists"):
        curves({"a": ([0, 1], [1.0])})
    with pytest.raises(PrunexError, match=r"no value to draw in \['a'\]"):
        curves({"a": ([0], [float("nan")])})
