"""Runs of one's own script: report and bench take what callbacks wrote, whatever loggers there are."""

import json

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

import prunex
from prunex import PrunexError
from prunex.callbacks import KeptTokenMonitor, MaskPruning, SlimExport, TokenPruning
from prunex.callbacks.run_folder import read_record
from prunex.recipes.commands import bench as bench_command
from prunex.recipes.commands import cli
from prunex.recipes.report.reading import metrics_of
from prunex.recipes.runs import home, open_model, slim_folder
from tests.callbacks.modules import Plain, csv_logger, loader, trainer
from tests.callbacks.test_monitor import WandbLogger
from tests.recipes.commands.test_bench import QUICK
from tests.vits import quick


@pytest.fixture(autouse=True)
def without_onnx(monkeypatch):
    monkeypatch.setattr(bench_command, "_runtimes", lambda device, notes: [])


LOGGERS = {
    "tensorboard": (lambda folder: TensorBoardLogger(str(folder)), "lightning_logs/version_0"),
    "csv": (csv_logger, "run/version_0"),
    "both": (lambda folder: [TensorBoardLogger(str(folder)), csv_logger(folder)], "lightning_logs/version_0"),
    "none": (lambda folder: False, "."),
    "service": (lambda folder: WandbLogger(str(folder)), None),
}


def fitted(folder, logger=False, slim=None, *callbacks, **options):
    callbacks = callbacks or (TokenPruning("evit", keep_ratio=0.5), KeptTokenMonitor(images=2))
    exported = SlimExport(None if slim is None else str(slim), formats=[])
    run = trainer(folder, *callbacks, exported, logger=logger, max_epochs=2, **options)
    run.fit(Plain(seed=1), loader(), loader(8))
    return run


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", quick(LOGGERS, ["csv", "none"]))
def test_report_and_bench(tmp_path, name, apart, capsys):
    made, where = LOGGERS[name]
    slim = tmp_path / "out" if apart else None
    fitted(tmp_path, made(tmp_path), slim)
    run = tmp_path / where if where else next(tmp_path.rglob("maps")).parent
    given = tmp_path / "out" / "slim" if apart else run
    assert slim_folder(run) == ((slim or run) / "slim")
    assert cli.run(["bench", str(given), *QUICK]) == 0
    assert "its data are not known: timed on random images" in capsys.readouterr().out
    found = json.loads((run / "bench.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["dense (evit taken off)", "slim: evit"]
    assert not any("no slim/" in note for note in found["notes"])
    assert cli.run(["report", str(given)]) == 0
    page = (run / "report.html").read_text()
    assert str((slim or run).resolve() / "slim") in page.replace((slim or run).as_posix(), str((slim or run).resolve()))
    assert "there is no model to load" not in page
    assert "so there are no curves" not in page
    assert {"train_loss", "val_loss"} <= set(metrics_of(run / "metrics.csv")[0])
    told = read_record(run)
    assert ("metrics" in told) == (name != "csv")
    if name != "csv":
        assert [row["epoch"] for row in told["metrics"]] == [0, 1]
        assert all({"train_loss", "val_loss"} <= set(row) for row in told["metrics"])


def test_a_run_that_goes_on_keeps_its_rows_and_old_values_are_not_new(tmp_path):
    first = fitted(tmp_path, check_val_every_n_epoch=2)
    rows = read_record(tmp_path)["metrics"]
    assert ["val_loss" in row for row in rows] == [False, True]
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(tmp_path, TokenPruning("evit", keep_ratio=0.5), KeptTokenMonitor(images=2), max_epochs=3)
    again.fit(Plain(seed=1), loader(), loader(8), ckpt_path=str(tmp_path / "a.ckpt"))
    told = read_record(tmp_path)["metrics"]
    assert told[:2] == rows
    assert [row["epoch"] for row in told] == [0, 1, 2]


def test_units_that_were_taken_out_leave_one_row(tmp_path, capsys):
    fitted(tmp_path, False, None, MaskPruning("random", budget=0.6))
    assert cli.run(["bench", str(tmp_path / "slim"), *QUICK]) == 0
    assert "the dense model is not known" in capsys.readouterr().out
    assert [row["model"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == ["slim: narrow"]


def test_a_slim_folder_alone_and_nothing(tmp_path):
    module = Plain(seed=1)
    prunex.attach(module, "topk", keep_ratio=0.5)
    alone = prunex.save(prunex.slim(module), tmp_path / "alone")
    assert home(alone) == alone
    assert cli.run(["bench", str(alone), *QUICK]) == 0
    assert (alone / "bench.json").is_file()
    assert cli.run(["report", str(alone)]) == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrunexError, match="has no config.yaml"):
        cli.run(["bench", str(tmp_path / "empty"), *QUICK])
    with pytest.raises(PrunexError, match="is not a run folder .*lightning_logs/version_0"):
        cli.run(["report", str(tmp_path / "empty")])


@pytest.mark.parametrize("text", ["{", "[1]", '{"slim": 3, "run": [], "metrics": [1, {"epoch": "x"}]}'])
def test_a_damaged_record_counts_as_none(tmp_path, text):
    fitted(tmp_path)
    (tmp_path / "prunex.json").write_text(text)
    assert slim_folder(tmp_path) == tmp_path / "slim"
    assert open_model(tmp_path) is not None
    assert cli.run(["report", str(tmp_path)]) == 0
