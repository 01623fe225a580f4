"""The trade-off script: rows, resuming, methods without a rate, and what it writes."""

import csv
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import prunex
from prunex import registry
from prunex.pruners.topk import TopK

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tradeoff(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    import tradeoff

    yield tradeoff
    torch.set_num_threads(threads)
    for name in ("tradeoff", "measure"):
        sys.modules.pop(name, None)


class Halves(TopK):
    """A method without a free rate."""

    name = "halves"

    def __init__(self, anatomy, quarter=False):
        super().__init__(anatomy, 0.25 if quarter else 0.5)
        self.options = {"quarter": quarter}

    @classmethod
    def settings(cls, anatomy):
        return [{"quarter": False}, {"quarter": True}]


@pytest.fixture
def halves():
    known = dict(registry.METHODS)
    registry.register("pruner", "halves", "none", "nothing")(Halves)
    yield "halves"
    registry.METHODS.clear()
    registry.METHODS.update(known)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


SMALL = ["--epochs=0", "--val-size=50", "--repeats=2", "--seconds=0", "--batch=2", "--threads=1", "--seeds", "0"]


def test_rows_pictures_and_resuming(tradeoff, tmp_path, halves, monkeypatch, capsys):
    timed = tradeoff.side_by_side

    def at_the_edge(*arguments):  # 0.884996: two decimals of it are not those of its four
        return [dataclasses.replace(t, own=[1.0], reference=[0.884996]) for t in timed(*arguments)]

    monkeypatch.setattr(tradeoff, "side_by_side", at_the_edge)
    arguments = [*SMALL, "--out", str(tmp_path), "--budgets", "0.8", "0.6", "0.05", "--methods", "topk", halves]
    tradeoff.main(arguments)
    assert "topk leaves out budget 0.05" in capsys.readouterr().out
    found = rows(tmp_path / "tradeoff.csv")
    assert [(r["method"], r["setting"]) for r in found] == [
        ("dense", "1"),
        ("topk", "budget 0.8"),
        ("topk", "budget 0.6"),
        ("halves", "quarter False"),
        ("halves", "quarter True"),
    ]
    assert [float(r["share"]) for r in found[:3]] == pytest.approx([1, 0.8, 0.6], rel=0.01)
    assert all(0.1 < float(r["accuracy"]) <= 1 for r in found)
    model = tradeoff.classifier().model
    prunex.attach(model, "halves", quarter=True)
    assert float(found[4]["mmacs"]) == pytest.approx(prunex.cost(model).macs / 1e6, abs=1e-3)
    assert {(r["method"], r["setting"]) for r in rows(tmp_path / "speed.csv")} == {
        (r["method"], r["setting"]) for r in found
    }
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("tradeoff.png", "speed.png"))
    written = (tmp_path / "tradeoff.md").read_text()
    assert written.count("\n| ") == 6  # a head and five rows

    def never(*_):
        raise RuntimeError("trained again")

    monkeypatch.setattr(tradeoff, "train", never)
    monkeypatch.setattr(tradeoff, "side_by_side", never)
    tradeoff.main(arguments)  # all is there
    assert (tmp_path / "tradeoff.md").read_text() == written
    with pytest.raises(RuntimeError, match="trained again"):
        tradeoff.main([*arguments, "--seeds", "0", "1"])
    assert rows(tmp_path / "tradeoff.csv") == found


def test_keep_ratios_instead_of_budgets_and_training(tradeoff, tmp_path):
    training = ["--epochs", "1", "--train-size", "64", "--keep-ratios", "0.5", "--methods", "dynamicvit"]
    tradeoff.main([*SMALL, *training, "--out", str(tmp_path)])
    dense, pruned = rows(tmp_path / "tradeoff.csv")
    assert pruned["setting"] == "keep_ratio 0.5"
    assert float(pruned["share"]) < float(dense["share"]) == 1
    assert pruned["object_kept"] != "" == dense["object_kept"]
