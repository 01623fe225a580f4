"""The script that corrects models whose units were taken out: what it keeps, and what its tables say."""

import re
import sys
from pathlib import Path

import pytest
import torch

import prunex
from prunex.vit.units import branches
from tests.vits import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    import weight_correction

    yield weight_correction
    torch.set_num_threads(threads)
    for name in ("weight_correction", "measure", "rates", "tradeoff"):
        sys.modules.pop(name, None)


def test_the_better_half_of_each_branch_stays(script):
    model = tiny()
    scores = {b.key: torch.arange(b.units).double().flip(0) for b in branches(model)}
    spec = script.better_half(model, scores, ("heads", "channels"))
    assert spec.heads[2] == [0, 1]
    assert spec.channels[3] == list(range(96))
    assert not script.better_half(model, scores, ("heads",)).channels


def test_every_criterion_scores_and_leaves_the_model_alone(script):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    for criterion in script.CRITERIA:
        scores = script.scored(model, criterion, batches, 0, 3)
        assert {b.key: b.units for b in branches(model)} == {key: len(s) for key, s in scores.items()}
        assert all(len(s.unique()) > 1 for s in scores.values()), criterion
    assert prunex.attached(model, units=True) is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_is_continued_and_its_table_has_means_and_errors(script, tmp_path, monkeypatch, capsys):
    class Few(script.Digits):
        def model(self):
            return tiny()

        def seen(self, seed):
            return [(torch.randn(30, 3, 32, 32), torch.arange(30) % 5)]

        test = seen

    monkeypatch.setattr(script, "Digits", Few)
    given = ["--criteria", "random", "--removed", "both", "--seeds", "0", "1", "--out", str(tmp_path)]
    script.main(given)
    rows = (tmp_path / "correction.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 3
    script.main(given)
    assert (tmp_path / "correction.csv").read_text().splitlines() == rows
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| `random`")]
    assert lines[0] == lines[1]
    assert lines[0][2].strip() == "both"
    none, bias, refit = (float(x) for x in lines[0][-2].replace("%", "").split("→"))
    assert none >= bias > refit


def test_the_cost_is_told_in_forwards(script, monkeypatch):
    monkeypatch.setattr(script.timm, "create_model", lambda name: tiny())
    text = script.cost(script.parser().parse_args(["--cost", "--images", "16"]))
    assert text.startswith("deit_small_patch16_224, 16 images")
    beyond, sums, forwards = (int(n) for n in re.findall(r"(\d+) beyond .* (\d+) sums; .* (\d+)$", text)[0])
    assert 0 < sums <= beyond
    assert forwards > 0
