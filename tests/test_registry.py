"""Every method by name."""

import re

import pytest

import prunex
from prunex.catalogue import methods
from prunex.registry import lookup


def test_every_method_says_what_it_is():
    found = methods()
    assert {"topk", "evit", "dynamicvit"} <= {m.name for m in found if m.kind == "pruner"}
    assert {"raw_attention", "rollout", "generic_attention", "tokentm"} <= {
        m.name for m in found if m.kind == "explainer"
    }
    assert found == sorted(found, key=lambda m: (m.kind, m.name))
    assert len({(m.kind, m.name) for m in found}) == len(found)
    for m in found:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", m.name)
        assert m.paper.strip()
        assert m.needs.strip()
        assert callable(m.make)
        assert m.make.__doc__
        assert lookup(m.kind, m.name) is m


def test_only_one_kind():
    assert {m.kind for m in prunex.methods("pruner")} == {"pruner"}
    with pytest.raises(prunex.PrunexError, match="unknown kind of method 'prunner': did you mean 'pruner'"):
        methods("prunner")


@pytest.mark.parametrize("name", ["evitt", "EViT", "", None, 3, ["evit"], "rollout"])
def test_unknown_names_list_what_is_known(name):
    with pytest.raises(prunex.PrunexError, match="Known: .*dynamicvit, evit, .*topk") as caught:
        lookup("pruner", name)
    assert "\n" not in str(caught.value)
