"""prunex bench: what it prints and writes is what the models are, and a run that is not whole ends in one line."""

import json

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import prunex
from prunex import PrunexError
from prunex.recipes.commands import bench as bench_command
from prunex.recipes.commands import cli
from prunex.recipes.commands.bench import measure, table
from prunex.recipes.commands.score_data import spread
from prunex.recipes.runs import evaluate, open_data
from prunex.recipes.timing import quartiles, side_by_side
from prunex.vit.units import branches
from prunex.vit.widths import WidthSpec, narrow

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 64, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
QUICK = ["--seconds", "0", "--batches", "2", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture
def without_onnx(monkeypatch):
    monkeypatch.setattr(bench_command, "_runtimes", lambda device, notes: [])


def vit(architecture="vit_tiny_patch16_224", sizes=SIZES, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(architecture, num_classes=10, **sizes)
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def run_folder(folder, model=None, architecture="vit_tiny_patch16_224", sizes=SIZES, **more):
    """A run folder as prunex fit leaves it, with its slim model."""
    classifier = {"architecture": architecture, "num_classes": 10, "model_args": sizes, **more}
    data = {"batch_size": 5, "train_size": 8, "val_size": 12}
    config = {
        "model": {"class_path": "prunex.recipes.ImageClassifier", "init_args": classifier},
        "data": {"class_path": "prunex.recipes.DigitScenes", "init_args": data},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if model is not None:
        prunex.save(prunex.slim(model), folder / "slim")
    return folder


def narrow_run(folder, spec=None, model=None, **more):
    """A run whose units were taken out, and its slim model."""
    model = narrow(vit(seed=1) if model is None else model, spec or WidthSpec({1: (0, 2)}, {0: tuple(range(40))}))
    return run_folder(folder, model, **more), model


def bench(run, *arguments):
    return cli.run(["bench", str(run), *QUICK, *map(str, arguments)])


def written(run):
    return json.loads((run / "bench.json").read_text())


def accuracy(model, run, limit=None):
    return evaluate(model, open_data(run).val_dataloader(), limit)["accuracy"]


def test_dense_and_slim_of_a_token_pruned_run(tmp_path, capsys):
    model = vit()
    run = run_folder(tmp_path / "run", model)
    dense = accuracy(model, run)
    prunex.attach(model, "evit", keep_ratio=0.5, stages=(0,))
    prunex.save(prunex.slim(model), run / "slim")
    assert bench(run) == 0
    streams, found = capsys.readouterr(), written(run)
    assert streams.out.splitlines()[-1] == str(run / "bench.json")
    assert "ONNX Runtime" in streams.err  # the progress bar
    first, second = found["rows"]
    assert (first["model"], second["model"]) == ("dense (evit taken off)", "slim: evit")
    assert first["accuracy"] == dense
    assert second["accuracy"] == accuracy(model, run)
    assert second["gmacs"] == prunex.cost(model).gmacs < first["gmacs"] == prunex.cost(vit()).gmacs
    assert second["file_mb"] == (run / "slim" / "model.safetensors").stat().st_size / 1e6
    assert first["file_mb"] == pytest.approx(second["file_mb"], rel=0.01)
    assert [(s["runtime"], s["batch"]) for s in found["speed"]] == [
        (runtime, batch) for runtime in ("torch", "onnxruntime") for batch in (2, 1)
    ]
    for entry in found["speed"]:
        assert entry["rounds"] == bench_command.LEAST
        assert [m["model"] for m in entry["models"]] == [first["model"], second["model"]]
        assert all(0 < m["low"] <= m["images_per_s"] <= m["high"] for m in entry["models"])
        assert all(0 < m["ratio_low"] <= m["ratio"] <= m["ratio_high"] for m in entry["models"])
        assert entry["models"][0]["ratio"] == 1
    assert found["threads"] == 1
    assert found["notes"] == []
    for wanted in (
        f"{100 * dense:.1f} %",
        "PyTorch, batch 2, 5 rounds",
        "ONNX Runtime, batch 1",
        "object kept",
        "torch",
    ):
        assert wanted in streams.out, wanted
    assert cli.run(["report", str(run)]) == 0
    assert "slim: evit" in (run / "report.html").read_text()


def test_the_graph_of_the_run_is_taken_while_it_is_newer_than_the_weights(tmp_path, monkeypatch):
    model = vit()
    prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,))
    run = run_folder(tmp_path / "run", model)
    graph = run / "slim" / "model.onnx"
    graph.write_bytes(b"no graph")
    exported = []
    monkeypatch.setattr(prunex, "export", lambda model, path: exported.append(path.name) or path)
    with monkeypatch.context() as context:
        context.setattr(bench_command, "session", lambda graph, threads: lambda images: None)
        assert [s["runtime"] for s in measure(run, (1,), 1, 0, accuracy=False)["speed"]] == ["torch", "onnxruntime"]
        assert exported == ["0.onnx"]
        prunex.save(prunex.slim(model), run / "slim")
        measure(run, (1,), 1, 0, accuracy=False)
        assert exported == ["0.onnx", "0.onnx", "1.onnx"]
    monkeypatch.setattr(prunex, "export", lambda model, path: graph)
    found = measure(run, (1,), 1, 0, accuracy=False)
    assert [s["runtime"] for s in found["speed"]] == ["torch"]
    assert any("model.onnx cannot be run" in note and "prunex export" in note for note in found["notes"])


def test_units_that_were_taken_out_leave_the_weights_the_run_started_from(tmp_path, without_onnx, capsys):
    start = vit(seed=3)
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    run, small = narrow_run(tmp_path / "run", weights=str(tmp_path / "start.safetensors"))
    bench(run)
    dense, slim = written(run)["rows"]
    assert (dense["model"], slim["model"]) == ("dense (start)", "slim: narrow")
    assert dense["accuracy"] == accuracy(start, run)
    assert slim["accuracy"] == accuracy(small, run)
    assert dense["gmacs"] == prunex.cost(start).gmacs > slim["gmacs"]
    assert dense["params_m"] > slim["params_m"]
    assert dense["file_mb"] > slim["file_mb"]
    assert "that the run started from, not fine-tuned ones" in capsys.readouterr().out


def other_classes(path):
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=4, **SIZES).state_dict(), path)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (None, "the config names no file"),
        ("gone.safetensors", "cannot be read"),
        ("other.safetensors", "have no classifier for these classes"),
    ],
)
def test_without_dense_weights_the_shape_is_timed(tmp_path, without_onnx, capsys, weights, says):
    other_classes(tmp_path / "other.safetensors")
    path = None if weights is None else str(tmp_path / weights)
    run, small = narrow_run(tmp_path / "run", weights=path, pretrained=True)
    bench(run)
    out, found = capsys.readouterr().out, written(run)
    assert "accuracy" not in found["rows"][0]
    assert found["rows"][1]["accuracy"] == accuracy(small, run)
    assert "unknown" in out
    assert any(says in note and "dense accuracy is unknown" in note for note in found["notes"])
    assert len(found["speed"][0]["models"]) == 2


def test_tokens_and_units(tmp_path, without_onnx):
    model = vit()
    prunex.attach(model, "evit", keep_ratio=0.5, stages=(1,))
    run, small = narrow_run(tmp_path / "run", model=model)
    found = measure(run, (1,), 1, 0, accuracy=False)
    assert [r["model"] for r in found["rows"]] == ["dense (start)", "slim: evit + narrow"]
    assert found["rows"][0]["gmacs"] == prunex.cost(vit()).gmacs
    assert found["rows"][1]["gmacs"] == prunex.cost(small).gmacs


def test_units_are_called_by_the_method_that_the_config_names():
    name = bench_command._unit_method
    model = {"model": {"init_args": {"unit_pruning": {"method": "taylor"}}}}
    callbacks = [{"class_path": "x.Other"}, {"class_path": "prunex.callbacks.MaskPruning"}]
    assert name(model) == "taylor"
    assert name(model | {"trainer": {"callbacks": callbacks}}) == "xpruner"
    callbacks[1]["init_args"] = {"method": "random"}
    assert name({"model": {}, "trainer": {"callbacks": callbacks}}) == "random"
    assert name({"model": {}, "trainer": {"callbacks": None}}) == "narrow"


def test_gates_that_are_still_on(tmp_path, monkeypatch, without_onnx):
    model = vit()
    pruning = prunex.attach(model, "xpruner", budget=0.8)
    pruning.pruner.decide({b.key: torch.rand(b.units) for b in pruning.pruner.branches})
    pruning.pruner.stage = "done"
    monkeypatch.setattr(bench_command, "open_model", lambda run: model)
    run = run_folder(tmp_path / "run")
    found = measure(run, (1,), 1, 0)
    assert [r["model"] for r in found["rows"]] == ["dense (xpruner taken off)", "slim: xpruner"]
    assert found["rows"][0]["accuracy"] == accuracy(vit(), run)
    assert any("still in the model" in note for note in found["notes"])


def test_a_swin(tmp_path, without_onnx):
    name = "swin_tiny_patch4_window7_224"
    model = vit(name, SWIN)
    spec = WidthSpec({b.block: (0,) for b in branches(model) if b.kind == "heads"})
    run, small = narrow_run(tmp_path / "run", spec, model, architecture=name, sizes=SWIN)
    found = measure(run, (1,), 1, 0)
    assert found["rows"][0]["gmacs"] > found["rows"][1]["gmacs"] == prunex.cost(small).gmacs
    assert found["rows"][1]["accuracy"] == accuracy(small, run)


def test_a_dense_run_has_one_row(tmp_path, without_onnx):
    run = run_folder(tmp_path / "run", vit())
    found = measure(run, (1,), 1, 0)
    assert [r["model"] for r in found["rows"]] == ["dense, trained"]
    assert any("pruned nothing" in note for note in found["notes"])
    assert "dense, trained" in table(found)


def test_few_images_and_none(tmp_path, without_onnx, monkeypatch):
    run = run_folder(tmp_path / "run", vit())
    sizes = []
    monkeypatch.setattr(
        bench_command, "evaluate", lambda model, batches: sizes.extend(len(b["images"]) for b in batches) or {}
    )
    bench(run, "--limit", 7)
    assert sizes == [5, 2]
    assert written(run)["notes"][-1] == "accuracy on some images: 7 of 12, evenly spaced over the validation data"
    bench(run, "--no-accuracy")
    assert sizes == [5, 2]
    assert "unknown" in table(written(run))


def test_some_images_are_of_all_classes():
    images, labels = torch.arange(20.0).view(20, 1, 1, 1), torch.arange(20) // 5
    loader, which = spread(DataLoader(TensorDataset(images, labels), 3), 8)
    assert torch.cat([y for _, y in loader]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert which == "images: 8 of 20, evenly spaced over the validation data"
    _, which = spread([DataLoader(TensorDataset(images), 3), "another"], 40)
    assert which.startswith("images: 20 of 20,")
    stream = [(images[:4], labels[:4])]
    assert spread(iter(stream), 8)[1] == "images: the first 8, since the validation data cannot be indexed"


def test_a_table_has_one_unit():
    def lines(*gmacs):
        rows = [{"model": "m", "gmacs": g, "params_m": 1.0, "file_mb": 1.0} for g in gmacs]
        return table({"rows": rows, "speed": [], "notes": [], "machine": "x"}).splitlines()[:3]

    assert [line.split()[1] for line in lines(4.608, 0.2)] == ["GMACs", "unknown", "unknown"]
    assert [line.split()[2] for line in lines(4.608, 0.2)[1:]] == ["4.61", "0.20"]
    assert [line.split()[2] for line in lines(0.04915, 0.0308)[1:]] == ["49.1", "30.8"]
    assert "MMACs" in lines(0.04915)[0]


def test_timed_on_validation_images_or_where_there_are_none_on_noise(tmp_path, without_onnx, monkeypatch):
    run = run_folder(tmp_path / "run", vit())
    seen = []
    monkeypatch.setattr(bench_command, "forward", lambda model, images: seen.append(images))
    measure(run, (20,), 1, 0, accuracy=False)
    wanted = torch.cat([batch[0] for batch in open_data(run).val_dataloader()])
    assert torch.equal(seen[0][:12], wanted)
    assert torch.equal(seen[0][12:], wanted[:8])

    def gone(run):
        raise PrunexError("root/ is no folder")

    monkeypatch.setattr(bench_command, "open_data", gone)
    found = measure(run, (2,), 1, 0, accuracy=False)
    assert seen[-1].shape == (2, 3, 64, 64)
    assert any("random images" in note and "root/ is no folder" in note for note in found["notes"])
    with pytest.raises(PrunexError, match="root/ is no folder .--no-accuracy times the models without data"):
        measure(run, (2,), 1, 0)


def test_what_onnx_runtime_needs_is_named(monkeypatch):
    notes = []
    monkeypatch.setattr(bench_command, "find_spec", lambda name: None if name == "onnxruntime" else name)
    assert bench_command._runtimes("cpu", notes) == []
    assert "onnxruntime not installed" in notes[0]
    monkeypatch.undo()
    assert bench_command._runtimes("cuda", notes) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batches", "0"], "--batches 0 is not allowed"),
        (["--threads", "-1"], "--threads -1"),
        (["--limit", "0"], "--limit 0"),
        (["--limit", "3", "--no-accuracy"], "give one of them"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--batches", "many"], "invalid int value"),
        (["--device", "tpu9"], "--device tpu9 cannot be used"),
        (["--device", "meta"], "--device meta is not allowed"),
    ],
)
def test_bad_options(tmp_path, arguments, says):
    run = run_folder(tmp_path / "run", vit())
    with pytest.raises(PrunexError, match=says):
        cli.run(["bench", str(run), *arguments])
    assert not (run / "bench.json").exists()


def test_what_is_no_whole_run(tmp_path):
    with pytest.raises(PrunexError, match="is no folder: give a run folder"):
        bench(tmp_path / "nowhere")
    with pytest.raises(PrunexError, match="has neither a slim model nor a checkpoint"):
        bench(run_folder(tmp_path / "empty"))
    run = run_folder(tmp_path / "run", vit())
    before = {"rows": "of an earlier call"}
    (run / "bench.json").write_text(json.dumps(before))
    file = run / "slim" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(PrunexError, match="damaged or was replaced"):
        bench(run)
    assert written(run) == before
    (run / "config.yaml").write_text("model: [")
    with pytest.raises(PrunexError, match="is damaged"):
        bench(run)


# ------------------------------------------------------------------------------------------------------------- timing


def test_contestants_take_turns():
    order = []
    calls = [(name, lambda name=name: order.append(name)) for name in "abc"]
    timings = side_by_side(calls, "cpu", 4, 0)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert [len(t.own) for t in timings] == [4] * 3
    assert timings[0].ratios == [1] * 4
    assert len(side_by_side(calls, "cpu", 0, 0, least=2)[0].own) == 2


def test_quartiles():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)
