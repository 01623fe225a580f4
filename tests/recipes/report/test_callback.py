"""RunReport: the rows it measures, by what was pruned."""

import json

import pytest

import prunex
from prunex.callbacks import MaskPruning, TokenPruning
from prunex.recipes import RunReport
from tests.callbacks.modules import Plain, csv_logger, loader, trainer


def rows(folder, *callbacks, **options):
    module = Plain(seed=1)
    run = trainer(folder, RunReport(**options), *callbacks, logger=csv_logger(folder), max_epochs=1)
    run.fit(module, loader(), loader(8))
    where = folder / "run" / "version_0"
    assert (where / "report.html").is_file()
    return module, {row["model"]: row for row in json.loads((where / "summary.json").read_text())["rows"]}


@pytest.mark.parametrize("tokens", [False, True])
def test_units_are_beside_the_dense_model(tmp_path, tokens):
    dense = prunex.cost(Plain(seed=1)).gmacs
    more = [TokenPruning("evit", keep_ratio=0.7)] if tokens else []
    module, found = rows(tmp_path, *more, MaskPruning("random", budget=0.6))
    name = "evit + random" if tokens else "random"
    assert list(found) == ["dense", name, *(["topk, untrained"] if tokens else [])]
    assert found["dense"]["gmacs"] == dense
    assert found[name]["gmacs"] == prunex.cost(module).gmacs < 0.61 * dense
    assert found[name]["params_m"] < found["dense"]["params_m"]
    for row in found.values():
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
        assert 0 < row["speed_ratio_low"] <= row["speed_ratio"] <= row["speed_ratio_high"]
    first = next(iter(found.values()))
    assert first["speed_ratio"] == first["speed_ratio_high"] == 1
    spread = f"{first['images_per_s_low']:,.0f} to {first['images_per_s_high']:,.0f}"
    assert spread in (tmp_path / "run" / "version_0" / "report.html").read_text()


def test_tokens_and_nothing(tmp_path):
    _, found = rows(tmp_path / "a", TokenPruning("evit", keep_ratio=0.7), dense_accuracy=False)
    assert list(found) == ["dense", "evit"]
    assert "accuracy" not in found["dense"]
    assert list(rows(tmp_path / "b")[1]) == ["dense, trained"]
