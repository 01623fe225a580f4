"""What exported graphs are made of: nothing in them adds into a scattered place, which other runtimes get wrong."""

import importlib.util

import pytest
import torch

import prunex
from prunex.pruners.base import TokenPruner
from tests.vits import quick, randomise, tiny

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra prunex-vit[onnx]",
)
OPTIONS = {
    "topk": {"keep_ratio": 0.6},
    "evit": {"keep_ratio": 0.6},
    "dynamicvit": {"keep_ratio": 0.6},
    "ia_red2": {"keep_ratio": 0.6},
    "hvt": {},
    "patch_slimming": {"keep": [range(12)]},
    "tome": {"r": 3},
    "ppt": {"r": 3, "tau": 0.01, "stages": (0, 1)},
    "diffrate": {"keep_ratio": 0.6},
    "diffmask": {"keep_ratio": 0.6},
}
ADDS = ("scatter_add", "scatter_reduce", "index_add", "index_reduce", "bincount", "histc")
CASES = [("vit", method) for method in OPTIONS] + [(f, "tome") for f in ("avg_pool", "eva02", "beit")]
QUICK = [("vit", "evit"), ("vit", "tome"), ("vit", "ppt")]


def slim_model(family, method):
    """Two blocks, since a graph takes seconds a block."""
    model = tiny(family, depth=2)
    randomise(prunex.attach(model, method, **OPTIONS[method]).pruner)
    return prunex.slim(model)


def test_every_pruner_is_read():
    assert {m.name for m in prunex.methods("pruner") if issubclass(m.make, TokenPruner)} == set(OPTIONS)


@pytest.mark.filterwarnings("ignore:.*a graph cannot let images differ", "ignore:.*could not be compared")
@pytest.mark.parametrize(("family", "method"), quick(CASES, QUICK))
def test_no_graph_adds_by_scattering(tmp_path, family, method):
    """The file is compared with the model before it appears; here its operations are read."""
    path = prunex.export(slim_model(family, method), tmp_path / "model.pt2", kept=True)
    nodes = [node for node in torch.export.load(path).graph.nodes if node.op == "call_function"]
    assert len(nodes) > 50
    assert not [node for node in nodes if any(bad in str(node.target) for bad in ADDS)]
    puts = [node for node in nodes if "index_put" in str(node.target)]
    assert not any(True in node.args[3:] or node.kwargs.get("accumulate") for node in puts)


@needs_onnx
@pytest.mark.parametrize(("family", "method"), [("vit", "tome"), pytest.param("vit", "evit", marks=pytest.mark.slow)])
def test_no_onnx_node_has_a_reduction(tmp_path, family, method):
    import onnx

    nodes = onnx.load(str(prunex.export(slim_model(family, method), tmp_path / "model.onnx", kept=True))).graph.node
    reductions = {a.s.decode() for node in nodes for a in node.attribute if a.name == "reduction"}
    assert len(nodes) > 100
    assert reductions <= {"none"}
