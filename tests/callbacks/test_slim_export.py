"""SlimExport: when it writes, what it writes, and what it leaves alone."""

import json
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback

import prunex
from prunex import PrunexError
from prunex.callbacks import SlimExport, TokenPruning
from tests.callbacks.modules import Plain, csv_logger, loader, trainer
from tests.vits import images, tiny


class Told(Plain):
    """Logs a metric whose values are given, epoch by epoch."""

    def __init__(self, values, **kwargs):
        super().__init__(**kwargs)
        self.values = values

    def validation_step(self, batch, batch_idx):
        self(batch[0])
        if not self.trainer.sanity_checking and self.values[self.current_epoch] is not None:
            self.log("told", self.values[self.current_epoch])
        elif self.trainer.sanity_checking:
            self.log("told", 1e9)


class Weights(L.Callback):
    """The model's logits after each epoch."""

    def __init__(self):
        self.logits = []

    def on_train_epoch_end(self, trainer, pl_module):
        with torch.no_grad():
            self.logits.append(prunex.slim(pl_module)(images()))


def logits(folder):
    with torch.no_grad():
        return prunex.load(folder)(images())


@pytest.mark.parametrize("method", ["evit", "dynamicvit", "topk"])
def test_at_the_end_with_the_modules_own_logits(tmp_path, method):
    module = Plain()
    run = trainer(tmp_path, TokenPruning(method, keep_ratio=0.6), SlimExport(str(tmp_path / "out"), formats=[]))
    run.fit(module, loader(8), loader(8))
    assert sorted(p.name for p in (tmp_path / "out" / "slim").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    module.eval()
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "out" / "slim"), module(images()))
    assert prunex.load(tmp_path / "out" / "slim").prunex.pruner.counts(16) == prunex.attached(module).counts()
    assert module.vit.prunex.pruner.options.get("teacher", True)  # the module itself keeps its teacher


def test_a_schedule_that_was_stopped_early_exports_the_rates_in_force(tmp_path):
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    module = Plain()
    pruning = TokenPruning("evit", keep_ratio=0.5, options={"shrink_length": 1.0})
    run = trainer(tmp_path, pruning, Stop(), SlimExport(str(tmp_path), formats=[]), max_epochs=3)
    run.fit(module, loader(8), loader(8))
    module.eval()
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "slim"), module(images()))


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", [0.2, 0.5, 0.5, 0.4], 1),
        ("min", [0.2, 0.1, 0.1, 0.3], 1),
        ("min", [0.5, 0.4, 0.3, 0.2], 3),
        ("max", [0.5, 0.4, 0.3, 0.2], 0),
        ("max", [float("nan"), 0.1, float("nan"), 0.05], 1),
        ("min", [None, 3.0, None, 4.0], 1),
    ],
)
def test_on_improvement(tmp_path, mode, values, best):
    weights = Weights()
    export = SlimExport(str(tmp_path), monitor="told", mode=mode, formats=[])
    run = trainer(tmp_path, TokenPruning("evit"), weights, export, max_epochs=4, num_sanity_val_steps=1)
    run.fit(Told(values), loader(8), loader(8))
    assert export.best == pytest.approx(values[best])
    assert torch.equal(logits(tmp_path / "slim"), weights.logits[best])


def test_a_metric_of_training_alone(tmp_path):
    export = SlimExport(str(tmp_path), monitor="train_loss", mode="min", formats=[])
    trainer(tmp_path, TokenPruning("evit"), export).fit(Plain(), loader(8))
    assert export.best is not None
    assert (tmp_path / "slim" / "config.json").is_file()


def test_a_metric_that_is_never_logged_is_told(tmp_path):
    export = SlimExport(str(tmp_path), monitor="val_acc", formats=[])
    with pytest.raises(PrunexError, match=r"SlimExport\(monitor='val_acc'\): no such metric was logged; .*val_loss"):
        trainer(tmp_path, TokenPruning("evit"), export).fit(Plain(), loader(8), loader(8))
    assert not (tmp_path / "slim").exists()


def test_validation_outside_fit_writes_nothing(tmp_path):
    export = SlimExport(str(tmp_path), monitor="val_loss", mode="min", formats=[])
    trainer(tmp_path, TokenPruning("evit"), export).validate(Plain(), loader(8), verbose=False)
    assert not (tmp_path / "slim").exists()


def resume(folder, values, epochs, checkpoint=None, out=None, **kwargs):
    export = SlimExport(out, monitor="told", formats=[])
    run = trainer(folder, TokenPruning("evit"), export, max_epochs=epochs, **kwargs)
    module = Told(values)
    run.fit(module, loader(8), loader(8), ckpt_path=checkpoint)
    return run, export


def test_a_resumed_run_keeps_the_best(tmp_path):
    values, out = [0.1, 0.9, 0.3, 0.2], str(tmp_path / "out")
    run, _ = resume(tmp_path, values, 2, out=out)
    run.save_checkpoint(tmp_path / "two.ckpt")
    best = logits(tmp_path / "out" / "slim")
    _, export = resume(tmp_path, values, 4, tmp_path / "two.ckpt", out=out)
    assert export.best == pytest.approx(0.9)
    assert torch.equal(logits(tmp_path / "out" / "slim"), best)
    # in a new run folder there is nothing to make graphs of: told, not raised
    with pytest.warns(UserWarning, match="told did not improve on 0.9, the best of the run that was resumed"):
        resume(tmp_path, values, 4, tmp_path / "two.ckpt", logger=csv_logger(tmp_path))
    assert not (tmp_path / "run" / "version_0" / "slim").exists()


def test_the_runs_own_folder(tmp_path):
    run = trainer(tmp_path, TokenPruning("evit"), SlimExport(formats=[]), logger=csv_logger(tmp_path))
    run.fit(Plain(), loader(8))
    assert (tmp_path / "run" / "version_0" / "slim" / "model.safetensors").is_file()


def test_two_of_them_in_one_trainer(tmp_path):
    exports = (
        SlimExport(str(tmp_path / "best"), monitor="told", formats=[]),
        SlimExport(str(tmp_path / "last"), formats=[]),
    )
    weights = Weights()
    run = trainer(tmp_path, TokenPruning("evit"), weights, *exports, max_epochs=2)
    run.fit(Told([0.9, 0.1]), loader(8), loader(8))
    assert torch.equal(logits(tmp_path / "best" / "slim"), weights.logits[0])
    assert torch.equal(logits(tmp_path / "last" / "slim"), weights.logits[1])


class Data(L.LightningDataModule):
    mean, std = (0.2, 0.5, 0.7), (0.1, 0.2, 0.4)

    def __init__(self, names):
        super().__init__()
        self.class_names = names

    def train_dataloader(self):
        return loader(8)


@pytest.mark.parametrize("names", [["ant", "bee", "cat", "dog", "emu"], ["too", "few"], [1, 2, 3, 4, 5]])
def test_what_the_data_module_knows_is_written_down(tmp_path, names):
    run = trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[]))
    run.fit(Plain(), datamodule=Data(names))
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.2, 0.5, 0.7]
    assert config["pretrained_cfg"]["std"] == [0.1, 0.2, 0.4]
    assert config.get("label_names") == (list(map(str, names)) if len(names) == 5 else None)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    folder = tmp_path / "slim"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "model.safetensors").write_text("old")
    module = Plain()
    trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[])).fit(module, loader(8))
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(list(folder.iterdir())) == 4
    with torch.no_grad():
        assert torch.equal(logits(folder), module.eval()(images()))
    assert {p.name for p in tmp_path.iterdir()} == {"slim", "prunex.json"}  # nothing half-written beside it


def test_a_path_that_is_a_file_is_told(tmp_path):
    (tmp_path / "slim").write_text("a file")
    with pytest.raises(PrunexError, match="slim is a file: give a folder"):
        trainer(tmp_path, TokenPruning("evit"), SlimExport(str(tmp_path), formats=[])).fit(Plain(), loader(8))


def test_random_numbers_and_training_are_left_alone(tmp_path):
    ends = []
    for extra in ((), (SlimExport(str(tmp_path), monitor="val_loss", mode="min", formats=[]),)):
        torch.manual_seed(0)
        module = Plain()
        torch.manual_seed(0)
        trainer(tmp_path, TokenPruning("dynamicvit"), *extra, max_epochs=2).fit(module, loader(8), loader(8))
        ends.append((module.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(v, ends[1][0][k]) for k, v in ends[0][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_dense_model_and_a_path_in_a_module_of_two(tmp_path):
    class Two(Plain):
        def __init__(self):
            super().__init__()
            self.other = tiny(seed=4)

    module = Two()
    trainer(tmp_path, SlimExport(str(tmp_path), formats=[], model="other")).fit(module, loader(8))
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "slim"), module.other.eval()(images()))


def graphs(folder, formats):
    module = Plain()
    export = SlimExport(str(folder), formats=formats)
    trainer(folder, TokenPruning("evit", keep_ratio=0.6), export).fit(module, loader(8))
    module.eval()
    return module


def test_the_exported_program(tmp_path):
    module = graphs(tmp_path, ["pt2"])
    assert not (tmp_path / "slim" / "model.onnx").exists()
    program = torch.export.load(tmp_path / "slim" / "model.pt2").module()
    for batch in (1, 5):
        x = images(batch)
        with torch.no_grad():
            found = program(x)
            found = found if isinstance(found, torch.Tensor) else found[0]
            assert torch.allclose(found, module(x), atol=1e-5)


@pytest.mark.slow
def test_both_graphs_by_default(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    module = graphs(tmp_path, None)
    assert (tmp_path / "slim" / "model.pt2").is_file()
    session = runtime.InferenceSession(tmp_path / "slim" / "model.onnx")
    for batch in (1, 5):
        x = images(batch)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), module(x), atol=1e-5)


def test_without_the_extra_onnx_is_left_out_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("prunex.callbacks.slim_export.find_spec", lambda name: None)
    monkeypatch.setattr("prunex.export", lambda model, path, format: path.write_text("graph"))
    with pytest.warns(UserWarning, match=r"no ONNX graph was written: pip install 'prunex-vit\[onnx\]'"):
        graphs(tmp_path, None)
    assert (tmp_path / "slim" / "model.pt2").is_file()
    assert not (tmp_path / "slim" / "model.onnx").exists()


def test_arguments():
    with pytest.raises(PrunexError, match="mode"):
        SlimExport(mode="maximum")
    with pytest.raises(PrunexError, match="onnx"):
        SlimExport(formats=["onxx"])
    with pytest.raises(PrunexError, match="format"):
        SlimExport(formats="pt2")


def test_a_schedule_that_was_cut_short_is_told(tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    for options, warns in (({"schedule": "cosine", "shrink_length": 0.8}, True), ({}, False)):
        pruning = TokenPruning("evit", keep_ratio=0.5, options=options)
        run = trainer(tmp_path, pruning, Stop(), SlimExport(tmp_path, formats=[]), max_epochs=10)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run.fit(Plain(), loader(8), loader(8))
        said = [str(w.message) for w in told if "still shrinking its rates" in str(w.message)]
        assert bool(said) == warns
    for method in ("patch_slimming", "hvt", "tome"):
        trainer(tmp_path, TokenPruning(method), SlimExport(tmp_path, formats=[])).fit(Plain(), loader(8), loader(8))
