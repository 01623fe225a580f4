"""Files for OpenVINO, ExecuTorch and TensorRT: they answer as the model does, or are refused by name."""

import importlib.util
import json

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from prunex.formats import FORMATS, check_format
from prunex.slim.operators import PLAIN, check_tensorrt
from prunex.slim.runtimes import open_graph
from tests.slim.models import METHODS, model_of, pixels
from tests.vits import tiny

MISSING = {name: [m for m in each.needs if importlib.util.find_spec(m) is None] for name, each in FORMATS.items()}


def pruned():
    model = tiny(depth=2, embed_dim=24)
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1,))
    return prunex.slim(model)


def agree(path, kind, model):
    run = open_graph(kind, path, ["logits", "kept"])
    for batch in (1, 2, 5):
        x = pixels(model, batch, seed=batch)
        with torch.no_grad():
            wanted, given = model(x), run(x)
        assert float((given["logits"] - wanted).abs().max()) < 1e-5
        assert torch.equal(given["kept"].bool(), prunex.attached(model).trace.kept())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openvino", "executorch", "tensorrt"])
@pytest.mark.parametrize("method", [None, *METHODS])
def test_every_method_in_every_format(tmp_path, kind, method):
    if MISSING[kind]:
        pytest.skip(f"{kind} needs {MISSING[kind][0]}: pip install '{FORMATS[kind].install}'")
    model = prunex.slim(pruned() if method is None else model_of("vit", method))
    path = prunex.export(model, tmp_path / FORMATS[kind].file(kind), kept=True, format=kind)
    agree(path, kind, model)
    files = {path.name, "model.bin"} if kind == "openvino" else {path.name}
    assert {p.name for p in tmp_path.iterdir()} == files


@pytest.mark.slow
def test_openvinos_file_says_what_its_user_has_to_know(tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'prunex-vit[openvino]'")
    model = pruned()
    path = prunex.export(model, tmp_path / "model.xml")
    spec = json.loads(openvino.Core().read_model(path).get_rt_info("prunex").value)
    assert spec["pruning"] == prunex.attached(model).spec
    assert spec["input_size"] == [3, 32, 32]


@pytest.mark.parametrize("kind", [name for name in FORMATS if FORMATS[name].needs])
def test_what_is_not_installed_is_named_with_the_line_to_write(monkeypatch, tmp_path, kind):
    lacking = FORMATS[kind].needs[-1]
    monkeypatch.setattr("prunex.formats.find_spec", lambda name: None if name == lacking else True)
    with pytest.raises(PrunexError, match=rf"export to {kind} needs {lacking}: pip install 'prunex-vit\[") as caught:
        prunex.export(pruned(), tmp_path / FORMATS[kind].file(kind), format=kind)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_formats_and_endings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(PrunexError, match=r"unknown format 'tensorflow'.*openvino"):
        check_format("tensorflow")
    with pytest.raises(PrunexError, match=r"'model\.onnx': a file for openvino must end in \.xml"):
        prunex.export(pruned(), tmp_path / "model.onnx", format="openvino")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- operations


class Operations(nn.Module):
    """What pruners do with whole numbers and flags, which not every runtime takes."""

    def forward(self, x):
        flags = x > 0
        kept = flags.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        first = flags.to(torch.uint8).argsort(dim=1, stable=True)
        marked = torch.zeros_like(flags).scatter(1, kept[:, :2], torch.ones_like(flags[:, :2]))
        also = torch.zeros_like(flags).scatter(1, kept[:, :1], True)
        place = (flags.cumsum(1) - 1).clamp(min=0)
        return x.sort(dim=1).values, kept, first, marked, also, place, place.clamp(max=2), x.cumsum(1), x.clamp(0, 1)


def test_operations_in_others_places_compute_the_same():
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Operations(), (x,)).run_decompositions(PLAIN)
    for given, wanted in zip(program.module()(x), Operations()(x), strict=True):
        assert given.dtype == wanted.dtype
        assert torch.equal(given, wanted)
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("sort" in name for name in names)
    assert sum("cumsum" in str(node.target) for node in program.graph.nodes) == 2


def graph_of(nodes, opset=20, functions=(), domain="", fixed=()):
    """A graph over ``x`` float [batch, 8], ``n`` int64 [8] and ``flags`` bool [8]."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    helper, kinds = onnx.helper, onnx.TensorProto
    given = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("x", kinds.FLOAT, ["batch", 8]),
            ("n", kinds.INT64, [8]),
            ("one", kinds.INT64, [1]),
            ("flags", kinds.BOOL, [8]),
        )
    ]
    inside = [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {}), domain=domain) for node in nodes]
    numbers = [helper.make_tensor(name, kinds.INT64, [1], [value]) for name, value in fixed]
    graph = helper.make_graph(inside, "graph", given, [], initializer=numbers)
    opsets = [helper.make_opsetid(d, opset) for d in ({"", domain} if domain else {""})]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions))


FIXED = (("axis", 0), ("k", 3), ("many", 4000))


@pytest.mark.parametrize(
    "nodes",
    [
        [("Add", ["x", "x"], ["y"])],
        [("CumSum", ["x", "axis"], ["y"])],
        [("TopK", ["x", "k"], ["y", "i"])],
        [("ReduceSum", ["n", "axis"], ["y"])],
        [("Where", ["flags", "n", "n"], ["y"])],
        [("ScatterElements", ["n", "n", "n"], ["y"], {"reduction": "none"})],
    ],
)
def test_what_tensorrt_lists_is_taken(nodes):
    check_tensorrt(graph_of(nodes, fixed=FIXED))


@pytest.mark.parametrize(
    ("nodes", "options", "match"),
    [
        ([("Unique", ["x"], ["y"])], {}, r"Unique \(1 times\)"),
        ([("CumSum", ["n", "axis"], ["y"])] * 1, {}, "CumSum of INT64"),
        ([("CumSum", ["x", "one"], ["y"])], {}, "CumSum along an axis that is computed"),
        ([("ScatterElements", ["flags", "n", "flags"], ["y"])], {}, "ScatterElements of BOOL"),
        ([("ScatterElements", ["n", "n", "n"], ["y"], {"reduction": "add"})], {}, "ScatterElements with a reduction"),
        ([("TopK", ["x", "one"], ["y", "i"])], {}, "TopK of a number that is computed"),
        ([("TopK", ["x", "many"], ["y", "i"])], {}, "TopK of 3840 or more"),
        ([("TopK", ["x", "k"], ["y", "i"], {"sorted": 0})], {}, "TopK unsorted"),
        ([("And", ["n", "n"], ["y"])], {}, "And of INT64"),
        ([("Add", ["x", "x"], ["y"])], {"opset": 21}, "operation set 21"),
        ([("Add", ["x", "x"], ["y"])], {"domain": "com.microsoft"}, r"operations of com\.microsoft"),
        ([("ReduceSum", ["n", "one"], ["y"])], {}, "ReduceSum along an axis that is computed"),
    ],
)
def test_what_tensorrt_does_not_list_is_refused_by_name(nodes, options, match):
    with pytest.raises(PrunexError, match=match) as caught:
        check_tensorrt(graph_of(nodes, fixed=FIXED, **options))
    assert "\n" not in str(caught.value)
