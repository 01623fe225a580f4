"""PrunexError is one line, whatever is put into it."""

import copy
import pickle

import pytest

import prunex
from prunex.errors import PrunexError, unknown


@pytest.mark.parametrize(
    "message", ["two\nlines", "a\r\nb", "tabs\tand   spaces", " trailing \n", "form\x0cfeed", "line\u2028separator"]
)
def test_one_line_always(message):
    text = str(PrunexError(message))
    assert len(text.splitlines()) == 1
    assert text == " ".join(message.split())


def test_it_is_a_value_error_under_one_name():
    assert issubclass(PrunexError, ValueError)
    assert prunex.PrunexError is PrunexError
    for twin in (copy.copy(PrunexError("a b")), pickle.loads(pickle.dumps(PrunexError("a b")))):
        assert isinstance(twin, PrunexError)
        assert str(twin) == "a b"


def test_unknown_offers_near_names_and_lists_all():
    text = str(unknown("pruner", "evitt", ["topk", "evit"]))
    assert text == "unknown pruner 'evitt': did you mean 'evit'? Known: evit, topk"
    assert "did you mean" not in str(unknown("pruner", "zzz", ["topk", "evit"]))
    assert str(unknown("pruner", "a\nb", [])).endswith("Known: none")
    assert "None" in str(unknown("pruner", None, ["evit"]))
    assert "['evit']" in str(unknown("pruner", ["evit"], ["evit"]))
