"""Targets as they are spelt: one parser for command line, configs and callbacks, which needs no torch to refuse."""

import subprocess
import sys

import pytest
import torch

from prunex import PrunexError
from prunex.spelling import FORMS, read_target
from prunex.targets import Class, Contrast, Entropy, Margin, MultiLabel, Regression, as_target, parse, spelt

ROWS = torch.tensor([[0.5, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 2.5]])


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("contrast:3,1", Contrast(3, 1)),
        (" contrast: 3 , 1 ", Contrast(3, 1)),
        ("margin", Margin()),
        ("margin:2", Margin(2)),
        ("entropy", Entropy()),
        ("regression", Regression()),
        ("regression:2", Regression(2)),
        ("class:2", 2),
        ("2", 2),
        (2, 2),
        ("labels:1,3", MultiLabel((1, 3))),
        ("labels:1", MultiLabel((1,))),
    ],
)
def test_every_spelling_is_its_object(text, target):
    made = parse(text)
    assert type(made) is type(target)
    if callable(target):
        assert torch.equal(made(ROWS), target(ROWS))
    else:
        assert made == target
    # What is spelt reads back as the same.
    again = parse(spelt(made))
    assert torch.equal(again(ROWS), made(ROWS)) if callable(made) else again == made


@pytest.mark.parametrize(
    "text",
    ["", "contrast", "contrast:3", "contrast:3,3", "contrast:1,2,3", "contrast:a,b", "margin:1,2", "entropy:1",
     "regression:0,1", "labels", "labels:", "labels:1,1", "labels:1,,2", "class:1,2", "3:4", "1.5", "label:3",
     "similarity", "contrast:1,2\n3", "labels:" + "9" * 10, "x" * 10_000],
)  # fmt: skip
def test_what_is_spelt_wrong_is_refused_in_one_short_line(text):
    with pytest.raises(PrunexError) as caught:
        read_target(text, "--target")
    assert "--target" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_callbacks_take_spellings_objects_and_functions():
    own = lambda output: output[:, 0]  # noqa: E731
    for given in (None, own, Contrast(1, 2), MultiLabel([1, 2])):
        assert as_target(given) is given
    assert as_target("margin:1") == Margin(1)
    assert as_target(4) == 4
    for given in (True, 1.5, [1, 2], Contrast, torch.tensor([1])):
        with pytest.raises(PrunexError, match=r"target=.* is not allowed: give None, a function of the output, or 3, "):
            as_target(given)


def test_objects_without_a_spelling_show_themselves():
    assert spelt(Contrast(1, 2, path="main")) == "Contrast(path='main', a=1, b=2)"
    assert spelt(Class(3)) == "Class(path='', index=3)"
    assert spelt(test_objects_without_a_spelling_show_themselves).startswith("test_objects")
    assert set(FORMS) == {"class", "contrast", "entropy", "labels", "margin", "regression"}


def test_torch_is_not_needed_to_read_one():
    script = (
        "import sys; from prunex.spelling import read_target; read_target('contrast:1,2'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
