"""What reads a run leaves it as it is, but for files of its own; and which run is the last."""

import csv
import hashlib
import shutil

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, Subset, TensorDataset

from prunex import PrunexError
from prunex.recipes.commands import cli
from prunex.recipes.commands.predictions import path_of, probabilities
from tests.recipes.interrupted import callback
from tests.vits import quick

MONITORS = [
    {"class_path": "prunex.recipes.RunReport"},
    callback("TokenPruning", method="evit", keep_ratio=0.5, stages=[1]),
    callback("KeptTokenMonitor", images=2),
    callback("RelevancyMonitor", images=2, methods=["rollout"]),
    callback("SlimExport", formats=[]),
]
QUICK = ["--trainer.enable_progress_bar", "false"]


def config_of(folder, callbacks=MONITORS, **trainer):
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 3}
    classifier = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": sizes, "from_scratch": True}
    data = {"image_size": 32, "min_digit": 16, "max_digit": 24, "batch_size": 8, "train_size": 16, "val_size": 12}
    config = {
        "model": {"class_path": "prunex.recipes.ImageClassifier", "init_args": classifier},
        "data": {"class_path": "prunex.recipes.DigitScenes", "init_args": data},
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_model_summary": False,
            "num_sanity_val_steps": 0, "log_every_n_steps": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder / "runs"), "name": "small"},
            },
            "callbacks": callbacks, **trainer,
        },
    }  # fmt: skip
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that was trained for an epoch and resumed once, for another."""
    folder = tmp_path_factory.mktemp("made")
    threads = torch.get_num_threads()
    config = str(config_of(folder))
    cli.run(["fit", "--config", config, *QUICK])
    cli.run(["fit", "--config", config, *QUICK, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A folder of one's own with a copy of that run."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    config_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def hashes(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def photo(folder):
    from PIL import Image

    folder.mkdir()
    Image.new("RGB", (40, 32), (200, 40, 20)).save(folder / "a.png")


READERS = {
    "validate": (["--ckpt_path", "CKPT"], set()),
    "test": (["--ckpt_path", "CKPT"], set()),
    "predict": (["--ckpt_path", "CKPT"], {"predictions.csv"}),
    "explain": (["--images", "photos", "--methods", "rollout"], set()),
    "score": (["--methods", "rollout", "--images", "4", "--metrics", "deletion"], {"report.html", "score/*"}),
    "bench": (["--seconds", "0", "--batches", "1", "--threads", "1"], {"bench.json"}),
    "export": (["--format", "pt2"], {"slim/model.pt2"}),
    "report": ([], {"report.html"}),
}


@pytest.mark.parametrize("command", quick(READERS, [name for name in READERS if name not in ("bench", "export")]))
def test_what_reads_a_run_leaves_it_as_it_is(place, command):
    run = place / "runs" / "small" / "version_0"
    more, allowed = READERS[command]
    photo(place / "photos")
    before, outside = hashes(run), {p.name for p in place.iterdir()}
    first = ["--config", str(run / "config.yaml"), *QUICK] if command in cli.LIGHTNING else [str(run)]
    more = [str(run / "checkpoints" / "last.ckpt") if a == "CKPT" else a for a in more]
    assert cli.run([command, *first, *more]) == 0
    after = hashes(run)
    new = {name for name in after if after[name] != before.get(name)}
    assert set(before) <= set(after)
    assert {f"{name.split('/')[0]}/*" if name.startswith("score/") else name for name in new} == allowed
    assert [p.name for p in (place / "runs" / "small").iterdir()] == ["version_0"]
    assert {p.name for p in place.iterdir()} - outside == ({"explained"} if command == "explain" else set())


def test_a_resumed_run_still_says_what_it_was_started_with(place):
    told = yaml.safe_load((place / "runs" / "small" / "version_0" / "config.yaml").read_text())
    assert told["ckpt_path"] is None
    assert told["trainer"]["logger"]["init_args"]["version"] is None
    assert told["trainer"]["max_epochs"] == 2


@pytest.mark.parametrize("reader", quick(["validate", "predict", "test"], ["validate"]))
def test_after_a_look_training_goes_on_in_the_same_run(place, reader, capsys):
    cli.run([reader, "--config", "own.yaml", *QUICK, "--ckpt_path", "last"])
    (place / "runs" / "small" / "version_7" / "maps").mkdir(parents=True)  # whoever made it: it is no run
    capsys.readouterr()
    more = ["--trainer.max_epochs", "3", "--ckpt_path", "last"]
    assert cli.run(["fit", "--config", "own.yaml", *QUICK, *more]) == 0
    with open(place / "runs" / "small" / "version_0" / "metrics.csv") as file:
        epochs = {int(row["epoch"]) for row in csv.DictReader(file)}
    assert epochs == {0, 1, 2}
    assert list((place / "runs" / "small" / "version_7").iterdir()) == [place / "runs" / "small" / "version_7" / "maps"]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_of_predictions(place, capsys):
    run = place / "runs" / "small" / "version_0"
    cli.run(["predict", "--config", "own.yaml", *QUICK, "--ckpt_path", "last", "--out", "elsewhere/x.csv"])
    assert capsys.readouterr().out.strip().endswith("elsewhere/x.csv (12 images)")
    assert not (run / "predictions.csv").exists()
    found = rows("elsewhere/x.csv")
    assert [row["path"] for row in found] == [str(i) for i in range(12)]
    for row in found:
        shares = {name: float(value) for name, value in row.items() if name.startswith("p(")}
        assert len(shares) == 10
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        best = max(shares, key=shares.get)
        assert row["predicted"] == best[2:-1]
        assert float(row["probability"]) == shares[best]
        assert float(row["kept"]) == 0.5


class Own(L.LightningModule):
    """Somebody's module without a ViT, whose predict_step gives what it is told."""

    def __init__(self, gives: str = "logits"):
        super().__init__()
        self.gives = gives

    def predict_step(self, batch, batch_idx):
        logits = batch[0].flatten(1)[:, :3]
        if self.gives == "dict":
            return {"logits": logits}
        return {"logits": logits, "two": logits > 0, "sigmoid": logits.sigmoid()}[self.gives]


class Listed(TensorDataset):
    samples = [(f"photos/{i}.png", 0) for i in range(5)]


class OwnData(L.LightningDataModule):
    class_names = ["ant", "bee", "cat"]

    def predict_dataloader(self):
        data = Listed(torch.arange(60.0).view(5, 3, 2, 2))
        return DataLoader(Subset(data, [4, 2, 0]), batch_size=2)


def own_run(folder, gives):
    config = {
        "model": {"class_path": "tests.recipes.test_reading.Own", "init_args": {"gives": gives}},
        "data": {"class_path": "tests.recipes.test_reading.OwnData"},
        "trainer": {"accelerator": "cpu", "logger": False},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    return cli.run(["predict", "--config", "own.yaml", *QUICK])


@pytest.mark.parametrize("gives", ["logits", "dict"])
def test_predictions_of_ones_own_module(tmp_path, monkeypatch, gives, capsys):
    monkeypatch.chdir(tmp_path)
    assert own_run(tmp_path, gives) == 0
    found = rows(tmp_path / "predictions.csv")
    assert [row["path"] for row in found] == ["photos/4.png", "photos/2.png", "photos/0.png"]
    assert list(found[0]) == ["path", "predicted", "probability", "p(ant)", "p(bee)", "p(cat)"]
    assert found[0]["predicted"] == "cat"
    assert float(found[0]["p(cat)"]) == pytest.approx(float(torch.tensor([48.0, 49, 50]).softmax(0)[2]), abs=1e-5)


@pytest.mark.parametrize(("gives", "says"), [("two", "of torch.bool"), ("sigmoid", "may be logits or probabilities")])
def test_what_is_no_prediction_is_refused(tmp_path, monkeypatch, gives, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrunexError, match=says):
        own_run(tmp_path, gives)
    assert [p.name for p in tmp_path.iterdir()] == ["own.yaml"]


def test_paths_and_probabilities():
    assert path_of(["no samples"], 2) == "2"
    assert path_of(Subset(Listed(torch.zeros(5)), [3]), 0) == "photos/3.png"
    given = torch.tensor([[0.25, 0.75]])
    assert torch.equal(probabilities({"probabilities": given}), given)
    with pytest.raises(PrunexError, match="NaN"):
        probabilities(given * torch.nan)
    with pytest.raises(PrunexError, match=r"\[B, 1\]"):
        probabilities(torch.tensor([[3.0]]))


def test_what_the_data_cannot_give_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(config_of(tmp_path, callbacks=[]).read_text())
    config["model"] = {"class_path": "tests.recipes.test_reading.Own"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        cli.main(["validate", "--config", "own.yaml", *QUICK])
    assert stop.value.code == 2
    assert "No `validation_step()` method defined" in capsys.readouterr().err.splitlines()[-1]
