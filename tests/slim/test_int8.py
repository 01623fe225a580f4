"""Graphs in eight bits: what is quantised and what stays, what the file still says, and what is refused."""

import pytest
import torch

import prunex
from prunex import PrunexError
from tests.vits import images, relative, tiny

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

X = images(32)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Exported once: a dense model, and one that drops tokens and says which it kept."""
    folder = tmp_path_factory.mktemp("graphs")
    model = tiny(depth=2)
    dense = prunex.export(model, folder / "dense.onnx")
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1,))
    return {"dense": dense, "evit": prunex.export(model, folder / "evit.onnx", kept=True)}


def run(path, x=X):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [out.name for out in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": x.numpy()})), strict=True))


def floats_around(path, kinds):
    """Inputs of nodes of some kinds that come out of eight bits, and how many such nodes there are."""
    graph = onnx.load(str(path)).graph
    made = {out: node.op_type for node in graph.node for out in node.output}
    nodes = [node for node in graph.node if node.op_type in kinds]
    return [made.get(name) for node in nodes for name in node.input if made.get(name) == "DequantizeLinear"], len(nodes)


@pytest.mark.parametrize("name", ["dense", "evit"])
@pytest.mark.parametrize("given", [None, X, [(X[:16], torch.zeros(16).long()), (X[16:], torch.zeros(16).long())]])
def test_linear_layers_are_quantised_and_answers_stay(tmp_path, graphs, name, given):
    path = prunex.quantise(graphs[name], tmp_path / "small.onnx", given)
    graph, whole = onnx.load(str(path)), onnx.load(str(graphs[name]))
    kinds = [node.op_type for node in graph.graph.node]
    if given is None:
        assert kinds.count("MatMulInteger") == 4 * 2 + 1  # the head too
        assert "Conv" in kinds
    else:
        weights = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.INT8]
        assert len({t.name for t in weights if len(t.dims) > 1}) == 4 * 2 + 2  # the patch embedding and the head too
    assert [(p.key, p.value) for p in graph.metadata_props] == [(p.key, p.value) for p in whole.metadata_props]
    assert path.stat().st_size < 0.6 * graphs[name].stat().st_size
    small, wanted = run(path), run(graphs[name])
    assert small.keys() == wanted.keys()
    assert not torch.equal(small["logits"], wanted["logits"])
    same = torch.ones(len(X), dtype=torch.bool)
    if name == "evit":  # one that keeps other patches may answer otherwise
        same = (small["kept"] == wanted["kept"]).flatten(1).all(1)
        assert same.float().mean() > 0.5
    assert relative(small["logits"][same], wanted["logits"][same]) < 0.25
    assert run(path, X[:3])["logits"].shape == (3, 5)  # any batch size, still


def test_whatever_decides_who_stays_is_left_in_float(tmp_path, graphs):
    path = prunex.quantise(graphs["evit"], tmp_path / "small.onnx", X)
    deciding = ("Softmax", "TopK", "Gather", "GatherElements", "ScatterElements", "ReduceMean", "LayerNormalization")
    rounded, count = floats_around(path, deciding)
    assert count > 10
    assert not rounded
    products = [n for n in onnx.load(str(path)).graph.node if n.op_type == "MatMul"]
    made = {out: n.op_type for n in onnx.load(str(path)).graph.node for out in n.output}
    both = [[made.get(name) == "DequantizeLinear" for name in node.input] for node in products]
    assert [True, True] in both  # linear layers
    assert [False, False] in both  # attention
    assert all(a == b for a, b in both)


def test_scales_come_from_the_images(tmp_path, graphs):
    one, two, again = (prunex.quantise(graphs["dense"], tmp_path / f"{i}.onnx", x) for i, x in enumerate((X, 3 * X, X)))
    assert one.read_bytes() == again.read_bytes()
    assert not torch.equal(run(one)["logits"], run(two)["logits"])


def test_images_that_say_nothing_of_the_data_are_told(tmp_path, graphs):
    def loader():
        yield X
        yield 1e3 * X  # not normalised: the scales that these need leave nothing of the others

    with pytest.warns(UserWarning, match=r"small\.onnx gives .* of 64 images the class that dense\.onnx gives"):
        prunex.quantise(graphs["dense"], tmp_path / "small.onnx", loader())


def test_at_most_so_many_images_are_read(tmp_path, graphs):
    read = []

    def endless():
        while True:
            read.append(len(X))
            yield X

    prunex.quantise(graphs["dense"], tmp_path / "small.onnx", endless())
    assert sum(read) == 1024


@pytest.mark.parametrize(
    ("source", "path", "given", "match"),
    [
        ("dense.onnx", "dense.onnx", None, "is the graph itself: give another name"),
        ("none.onnx", "small.onnx", None, r"none\.onnx is no file: write it by prunex\.export"),
        ("dense.pt2", "small.onnx", None, r"'dense\.pt2' is no name of a graph to quantise: it must end in \.onnx"),
        ("dense.onnx", "small.pt2", None, r"must end in \.onnx"),
        ("broken.onnx", "small.onnx", None, r"broken\.onnx is no ONNX graph"),
        ("dense.onnx", "small.onnx", [], "got no images"),
        ("dense.onnx", "small.onnx", X[:0], "got no images"),
        ("dense.onnx", "small.onnx", X[:, :, :16], r"shape \[32, 3, 16, 32\]: dense\.onnx takes"),
        ("dense.onnx", "small.onnx", X / 0, "NaN or infinite"),
        ("dense.onnx", "small.onnx", [torch.zeros(3)], "images"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, graphs, source, path, given, match):
    (tmp_path / "dense.onnx").write_bytes(graphs["dense"].read_bytes())
    (tmp_path / "broken.onnx").write_bytes(b"\x00not a graph")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(PrunexError, match=match) as caught:
        prunex.quantise(tmp_path / source, tmp_path / path, given)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_graph_is_quantised_once(tmp_path, graphs):
    static = prunex.quantise(graphs["dense"], tmp_path / "small.onnx", X)
    with pytest.raises(PrunexError, match="quantise what prunex.export wrote, once"):
        prunex.quantise(static, tmp_path / "smaller.onnx", X)
