"""TokenPruning where images keep their own numbers of patches."""

import pytest

import prunex
from prunex.callbacks import TokenPruning
from tests.callbacks.modules import Plain, csv_logger, loader, metrics, trainer


def test_validation_measures_what_counts_and_gmacs_go_by(tmp_path):
    module = Plain(lr=0.01)
    options = {"count": "adaptive", "threshold": 0.6}
    callback = TokenPruning("topk", stages=[1, 2], options=options)
    run = trainer(tmp_path, callback, logger=csv_logger(tmp_path), max_epochs=2)
    run.fit(module, loader(), loader(seed=5))
    pruning = prunex.attached(module)
    found = metrics(tmp_path / "run" / "version_0")
    shares = [found[f"prunex/val_keep_ratio_stage{s + 1}"][-1] for s in (0, 1)]
    assert pruning.options["expected"] == pytest.approx(shares, abs=1e-6)
    assert pruning.counts() == [round(s * 16) for s in shares]
    assert found["prunex/gmacs"][-1] == pytest.approx(prunex.cost(module.vit).gmacs)
    assert 0 < shares[1] < shares[0] < 1
