"""The ready-made runs of several labels and of numbers, end to end: trained, drawn, scored, explained, exported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import prunex
from prunex.recipes.commands import cli

QUICK = [
    "--data.init_args.train_size", "64", "--data.init_args.val_size", "32", "--data.init_args.batch_size", "32",
    "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "score", "shown"), [("multi_label", "map", "mAP"), ("regression", "mae", "MAE")])
def test_a_run_of_the_config_end_to_end(tmp_path, monkeypatch, capsys, name, score, shown):
    monkeypatch.chdir(tmp_path)
    targets = ["--relevancy.target", "labels:1,4" if name == "multi_label" else "regression:0"]
    assert cli.run(["fit", "--config", f"configs/digits/{name}.yaml", *QUICK, *targets]) == 0
    assert shown in capsys.readouterr().out
    [run] = tmp_path.glob("runs/digits-*/version_0")
    rows = json.loads((run / "summary.json").read_text())["rows"]
    assert all("accuracy" not in row for row in rows)
    own = next(row for row in rows if row["model"] in ("evit", "dynamicvit"))
    assert np.isfinite(own[score])
    assert shown in (run / "report.html").read_text()
    with np.load(run / "maps" / "epoch=000.npz", allow_pickle=False) as maps:
        drawn = {n for n in maps.files if n.startswith("relevance/tokentm")}
    labelled = {"relevance/tokentm:1", "relevance/tokentm:4"}
    assert drawn == (labelled if name == "multi_label" else {"relevance/tokentm:regression:0"})

    model = prunex.load(run / "slim")
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10 if name == "multi_label" else 1)
    assert cli.run(["bench", str(run), "--batches", "1", "--seconds", "0"]) == 0
    assert shown in capsys.readouterr().out
    target = ["--target", "4" if name == "multi_label" else "regression:0"]
    options = ["--methods", "tokentm", "--metrics", "deletion,energy_inside", "--images", "4", "--device", "cpu"]
    assert cli.run(["score", str(run), *options, *target]) == 0
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    more = ["--images", str(tmp_path / "x.png"), "--out", str(tmp_path / "explained"), "--device", "cpu"]
    assert cli.run(["explain", str(run), "--methods", "tokentm", *more, *target]) == 0
    assert (tmp_path / "explained" / "x.png").is_file()
    assert cli.run(["export", str(run), "--format", "pt2"]) == 0
    assert cli.run(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last"]) == 0
    table = (run / "predictions.csv").read_text().splitlines()
    assert len(table) == 33
    assert table[0].startswith("path,predicted,kept,p(0)" if name == "multi_label" else "path,kept,digits")
