"""The ready-made runs of segmentation and detection, end to end: trained, drawn, scored, opened again, gone on with."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import prunex
from prunex import PrunexError
from prunex.callbacks import load_from_checkpoint
from prunex.recipes import DetectionModel, SegmentationModel
from prunex.recipes.commands import cli

QUICK = [
    "--data.init_args.train_size", "64", "--data.init_args.val_size", "32", "--data.init_args.batch_size", "32",
    "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
]  # fmt: skip
RUNS = {"segmentation": (SegmentationModel, "miou", "mIoU"), "detection": (DetectionModel, "box_ap", "box AP")}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_config_end_to_end(tmp_path, monkeypatch, capsys, name):
    module_class, score, shown = RUNS[name]
    monkeypatch.chdir(tmp_path)
    assert cli.run(["fit", "--config", f"configs/digits/{name}.yaml", *QUICK]) == 0
    captured = capsys.readouterr()
    assert shown in captured.out
    assert "has no forward" not in captured.err
    [run] = tmp_path.glob("runs/digits-*/version_0")
    rows = {row["model"]: row for row in json.loads((run / "summary.json").read_text())["rows"]}
    assert set(rows) == {"dense", "evit"}
    assert score not in rows["dense"]
    assert 0 <= rows["evit"][score] <= 1
    assert rows["evit"]["gmacs"] < rows["dense"]["gmacs"]
    assert shown in (run / "report.html").read_text()
    with np.load(run / "maps" / "epoch=000.npz", allow_pickle=False) as maps:
        assert maps["kept"].shape == (3, 8, 8, 8)
    assert f"val_{score}" in (run / "metrics.csv").read_text()

    [checkpoint] = (run / "checkpoints").glob("*.ckpt")
    module = load_from_checkpoint(module_class, str(checkpoint)).eval()
    vit, images = prunex.load(run / "slim"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        grids = vit.forward_intermediates(images, [0, 2, 5], norm=True, intermediates_only=True)
        torch.testing.assert_close(torch.cat(grids, 1), module.grid(images), rtol=1e-4, atol=1e-4)
    config = str(run / "config.yaml")
    assert cli.run(["validate", "--config", config, "--ckpt_path", "last"]) == 0
    assert f"val_{score}" in capsys.readouterr().out
    assert cli.run(["bench", str(run), "--batches", "1", "--seconds", "0"]) == 0
    assert "timed alone" in capsys.readouterr().out
    # What has no rows of probabilities has no table.
    with pytest.raises(PrunexError, match="no table can be made"):
        cli.run(["predict", "--config", config, "--ckpt_path", "last"])
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    more = ["--images", str(tmp_path / "x.png"), "--out", str(tmp_path / "explained"), "--device", "cpu"]
    assert cli.run(["explain", str(run), "--methods", "rollout", *more]) == 0
    with pytest.raises(PrunexError, match="no classifier"):
        cli.run(["explain", str(run), "--methods", "tokentm", *more])
    longer = ["fit", "--config", f"configs/digits/{name}.yaml", *QUICK, "--trainer.max_epochs", "2"]
    assert cli.run([*longer, "--ckpt_path", "last"]) == 0
    again = torch.load(sorted((run / "checkpoints").glob("*.ckpt"))[-1], weights_only=True)
    assert again["global_step"] == 4
