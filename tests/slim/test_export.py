"""Exported graphs give the model's logits at any batch size, and its kept map where asked."""

import importlib
import importlib.util
import json
import warnings

import pytest
import torch

import prunex
from prunex import PrunexError
from tests.slim.models import METHODS, model_of, pixels
from tests.vits import images, randomise, tiny

module = importlib.import_module("prunex.slim.export")  # the package also has a function of this name
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra prunex-vit[onnx]",
)
BATCHES = (1, 2, 5)


@pytest.fixture(scope="session")
def small():
    """The slim model that is exported once a run, fewer blocks than usual: an export takes seconds a block."""
    model = tiny(depth=2, embed_dim=24)
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1,))
    return prunex.slim(model)


@pytest.fixture(scope="session")
def pt2(small, tmp_path_factory):
    return prunex.export(small, tmp_path_factory.mktemp("pt2") / "model.pt2", kept=True)


@pytest.fixture(scope="session")
def onnx(small, tmp_path_factory):
    """Exported from an example of one image, which must not fix the batch at one."""
    return prunex.export(small, tmp_path_factory.mktemp("onnx") / "model.onnx", example=images(1), kept=True)


def onnx_session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def outputs(path, x):
    """Outputs of a written graph, as tensors."""
    if path.suffix == ".onnx":
        return [torch.from_numpy(v) for v in onnx_session(path).run(None, {"images": x.numpy()})]
    found = torch.export.load(path).module()(x)
    return list(found) if isinstance(found, tuple) else [found]


def agree(path, model, kept, x_of=pixels):
    """The graph's outputs are the model's at every batch size."""
    for batch in BATCHES:
        x = x_of(model, batch, seed=batch)
        with torch.no_grad():
            wanted, found = model(x), outputs(path, x)
        assert len(found) == 1 + kept
        assert found[0].shape == wanted.shape
        assert float((found[0] - wanted).abs().max()) < 1e-5
        if kept:
            assert found[1].dtype == torch.bool
            assert torch.equal(found[1], prunex.attached(model).trace.kept())


def test_pt2_agrees_at_every_batch_and_returns_the_kept_map(pt2, small):
    agree(pt2, small, kept=True)


@needs_onnx
def test_onnx_agrees_at_every_batch_and_returns_the_kept_map(onnx, small):
    agree(onnx, small, kept=True)


@needs_onnx
def test_onnx_names_a_dynamic_batch_and_its_outputs(onnx):
    session = onnx_session(onnx)
    (given,) = session.get_inputs()
    assert given.name == "images"
    assert given.shape == ["batch", 3, 32, 32]
    assert [o.shape[0] for o in session.get_outputs()] == ["batch"] * 2
    assert [o.name for o in session.get_outputs()] == ["logits", "kept"]
    assert [o.type for o in session.get_outputs()] == ["tensor(float)", "tensor(bool)"]


def test_metadata_of_pt2_tells_the_pruning(pt2, small):
    extra = {"prunex.json": ""}
    torch.export.load(pt2, extra_files=extra)
    told = json.loads(extra["prunex.json"])
    assert told["pruning"] == prunex.attached(small).spec
    assert told["input_size"] == [3, 32, 32]


@needs_onnx
def test_metadata_of_onnx_tells_the_pruning(onnx, small):
    told = json.loads(onnx_session(onnx).get_modelmeta().custom_metadata_map["prunex"])
    assert told["pruning"] == prunex.attached(small).spec
    assert told["input_size"] == [3, 32, 32]


@needs_onnx
def test_nothing_but_the_graph_lies_there(onnx, pt2):
    assert [p.name for p in onnx.parent.iterdir()] == ["model.onnx"]
    assert [p.name for p in pt2.parent.iterdir()] == ["model.pt2"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=needs_onnx)])
@pytest.mark.parametrize(
    ("family", "method"),
    [("vit", m) for m in (None, *METHODS)]
    + [(f, "evit") for f in ("deit_distilled", "dinov2_swiglu", "avg_pool_no_class", "clip_quick_gelu")],
)
def test_every_method_and_every_kind_of_model(tmp_path, family, method, suffix):
    model = model_of(family, method)
    path = prunex.export(model, tmp_path / f"deep/er/model{suffix}")
    agree(path, prunex.slim(model), kept=False)


@pytest.mark.slow
def test_models_in_training_on_request_masked_or_in_half_precision(tmp_path):
    model = model_of("vit", "dynamicvit")
    small = prunex.slim(model)
    prunex.attached(model.train()).masked = True
    agree(prunex.export(model, tmp_path / "model.pt2"), small, kept=False)
    assert model.training
    assert prunex.attached(model).masked is True
    half = prunex.slim(model).bfloat16()
    agree(prunex.export(half, tmp_path / "half.pt2"), small.bfloat16().float(), kept=False)
    assert next(half.parameters()).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_dynamic_model_is_fixed_at_the_examples_size(tmp_path):
    model = model_of("dynamic", "evit")
    path = prunex.export(model, tmp_path / "model.pt2", example=images(2, (48, 24)), kept=True)
    agree(path, prunex.slim(model), True, lambda m, batch, seed: pixels(m, batch, (48, 24), seed))


def refused(match, *args, **kwargs):
    with pytest.raises(PrunexError, match=match) as caught:
        prunex.export(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_exported_ends_in_one_line_and_leaves_no_file(small, tmp_path):
    for name in ("model.pt", "model", "model.onnx.txt", "model.ONNX2"):
        refused(r"must end in \.onnx or \.pt2 or \.xml or \.pte", small, tmp_path / name)
    path = tmp_path / "model.pt2"
    nan = images(2)
    nan[1, 0, 3, 3] = float("nan")
    refused("NaN", small, path, example=nan)
    refused("this model takes 32 x 32", small, path, example=images(2, (40, 40)))
    refused("shape", small, path, example=images(2)[:, :1])
    refused("empty batch", small, path, example=images(2)[:0])
    refused("dtype", small, path, example=torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    refused("give a float tensor", small, path, example=[1, 2])
    refused("no supported ViT", torch.nn.Linear(2, 2), path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(small, tmp_path, monkeypatch, missing):
    monkeypatch.setattr("prunex.formats.find_spec", lambda name: None if name == missing else True)
    refused(rf"needs {missing}: pip install 'prunex-vit\[onnx\]'", small, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["_write", "_check"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_the_old_file_and_no_other(small, tmp_path, monkeypatch, step, error):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")

    def stop(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.export, "export", lambda *a, **k: None)
    monkeypatch.setattr(module, "_write", lambda kind, program, waiting, *rest: waiting.write_bytes(b"half"))
    monkeypatch.setattr(module, step, stop)
    with pytest.raises(PrunexError if isinstance(error, OSError) else KeyboardInterrupt):
        prunex.export(small, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_bytes() == b"old"


def test_a_graph_that_disagrees_is_not_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: None)
    monkeypatch.setattr(module, "_write", lambda kind, program, waiting, *rest: waiting.write_bytes(b"wrong"))
    wrong = lambda x: {"logits": torch.full((len(x), 5), float("nan"))}  # noqa: E731
    monkeypatch.setattr(module, "open_graph", lambda *_: wrong)
    refused("differs from the model", small, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("gap", "warns"), [(0.0, True), (1e-7, True), (1e-2, False)])
def test_a_tie_is_no_wrong_graph(tmp_path, monkeypatch, gap, warns):
    """Predictors as before training: all scores are alike up to ``gap``, and the file ranks them as it likes."""
    model = tiny(depth=2, embed_dim=24)
    randomise(prunex.attach(model, "dynamicvit", keep_ratio=0.5, stages=(1,), teacher=False).pruner)
    small = prunex.slim(model)
    last = small.prunex.pruner.predictors[0].score[-1]
    with torch.no_grad():
        last.weight.mul_(gap), last.bias.zero_()
    real = module.open_graph

    def other(x):
        """As a runtime whose sums are off by a rounding."""
        noise = torch.Generator().manual_seed(len(x))
        hook = lambda m, args, out: out + 1e-7 * torch.randn(out.shape, generator=noise)  # noqa: E731
        handle = last.register_forward_hook(hook)
        try:
            return {"logits": module.Graph(small)(x)}
        finally:
            handle.remove()

    monkeypatch.setattr(module, "open_graph", lambda *_: other)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        path = prunex.export(small, tmp_path / "model.pt2")
    assert path.is_file()
    assert any("could not be compared" in str(w.message) for w in told) == warns
    if not warns:
        off = lambda *given: lambda x: {"logits": real(*given)(x)["logits"] + 1}  # noqa: E731
        monkeypatch.setattr(module, "open_graph", off)
        refused("differs from the model", small, tmp_path / "other.pt2")


def test_a_target_that_cannot_be_written(small, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused("cannot write", small, tmp_path / "file" / "model.pt2")
    (tmp_path / "model.pt2").mkdir()
    refused("cannot write|is a folder", small, tmp_path / "model.pt2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model.pt2"]
