"""UnitMonitor: the table by epoch, the pictures, and what it does without a class axis."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import prunex
from prunex.callbacks import MaskPruning, TokenPruning, UnitMonitor
from tests.callbacks.modules import Plain, csv_logger, loader, trainer
from tests.callbacks.test_mask_pruning import OPTIONS


def fit(folder, method="xpruner", epochs=4, more=(), **options):
    module = Plain(seed=1)
    told = OPTIONS if method == "xpruner" else {"budget": 0.6}
    callbacks = [*more, MaskPruning(method, **told), UnitMonitor(images=2, **options)]
    run = trainer(folder, *callbacks, max_epochs=epochs, logger=csv_logger(folder))
    run.fit(module, loader(), loader(8))
    return module, folder / "run" / "version_0"


def rows(run):
    with open(run / "units.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_pictures_of_every_epoch(tmp_path):
    module, run = fit(tmp_path)
    found = rows(run)
    assert list(found[0]) == ["epoch", "class", "block", "head", "relevance", "kept", "updates"]
    assert len(found) == 4 * 5 * 4 * 3  # epochs, classes, blocks, heads
    table = prunex.attached(module, units=True).relevance_table()
    for row in found[-60:]:
        block, head, label = int(row["block"]), int(row["head"]), int(row["class"])
        assert float(row["relevance"]) == pytest.approx(float(table.heads[block][label, head]), abs=1e-5)
        assert (row["kept"] == "True") == bool(table.kept[f"{block}.heads"][head])
    names = {p.name for p in (run / "maps").iterdir()}
    assert names == {"units-widths.png"} | {
        f"units-{what}-epoch={e:03d}.png" for what in ("classes", "heads") for e in range(4)
    }
    for name in names:
        assert np.asarray(Image.open(run / "maps" / name)).std() > 5


def test_heads_are_named_as_in_the_dense_model_after_they_were_removed(tmp_path):
    module, run = fit(tmp_path, more=[TokenPruning("evit", keep_ratio=0.7)])
    assert prunex.attached(module, units=True).removed
    last = [r for r in rows(run) if r["epoch"] == "3"]
    assert {(r["block"], r["head"]) for r in last} == {(str(b), str(h)) for b in range(4) for h in range(3)}
    assert any(r["kept"] == "False" for r in last)


def test_a_continued_run_replaces_its_epochs(tmp_path):
    module, run = fit(tmp_path, epochs=3)
    first = rows(run)
    pictures = UnitMonitor(images=2)
    module = Plain(seed=1)
    trainer(run, MaskPruning(**OPTIONS), pictures, max_epochs=1).fit(module, loader(), loader(8))
    again = rows(run)
    assert {r["epoch"] for r in first} == {"0", "1", "2"}
    assert {r["epoch"] for r in again} == {"0"}


def test_a_criterion_without_classes_gives_widths_alone(tmp_path):
    _, run = fit(tmp_path, method="random", epochs=1)
    assert {p.name for p in (run / "maps").iterdir()} == {"units-widths.png"}
    assert not (run / "units.csv").exists()


def test_refusals(tmp_path):
    with pytest.raises(prunex.PrunexError, match="heads=0"):
        UnitMonitor(heads=0)
    with pytest.raises(prunex.PrunexError, match="add MaskPruning"):
        trainer(tmp_path, UnitMonitor()).fit(Plain(), loader(), loader(8))


def test_nothing_is_written_in_a_trial(tmp_path):
    module = Plain(seed=1)
    run = trainer(tmp_path, MaskPruning(**OPTIONS), UnitMonitor(), fast_dev_run=True, max_epochs=None)
    torch.manual_seed(0)
    run.fit(module, loader(), loader(8))
    assert not (tmp_path / "maps").exists()


def test_one_image_of_each_class_is_watched(tmp_path):
    monitor = UnitMonitor(images=3)
    images, labels = torch.randn(12, 3, 32, 32), torch.tensor([0] * 5 + [1] * 5 + [2, 3])
    sorted_by_class = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 4)
    module = Plain(seed=1)
    trainer(tmp_path, MaskPruning(**OPTIONS), monitor, max_epochs=1).fit(module, loader(), sorted_by_class)
    assert torch.cat([p["labels"] for p in monitor._parts]).tolist() == [0, 1, 2]
    assert torch.equal(torch.cat([p["images"] for p in monitor._parts]), images[[0, 5, 10]])
