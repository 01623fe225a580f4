"""TokenPruning where images keep their own numbers of patches, and where a pruner learns from labels in turns."""

import pytest
import torch

import prunex
from prunex.callbacks import TokenPruning
from tests.callbacks.modules import Plain, csv_logger, loader, metrics, snapshot, trainer


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


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_who_moves_follows_the_curriculum(tmp_path, optimiser):
    """Four epochs, two groups: interpreter, blocks, interpreter, blocks."""
    module = Plain(lr=0.05, optimiser=optimiser)
    seen = []

    class Watch(TokenPruning):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(snapshot(pl_module))

    callback = Watch("ia_red2", keep_ratio=0.6, stages=[0, 2], options={"train": "reward"})
    run = trainer(tmp_path, callback, max_epochs=4)
    run.fit(module, loader())
    seen.append(snapshot(module))
    moved = [
        {n.split("0.", 1)[1] for n, p in after.items() if not torch.equal(p, before[n])}
        for before, after in zip(seen, seen[1:], strict=False)
    ]
    assert {n.rsplit(".", 2)[0] for n in moved[0]} == {"prunex.ia_red2.interpreters.0"}
    assert {n.rsplit(".", 2)[0] for n in moved[2]} == {"prunex.ia_red2.interpreters.1"}
    assert {n.split(".")[0] for n in moved[1]} == {n.split(".")[0] for n in moved[3]} == {"blocks", "norm", "head"}
    assert {n.split(".")[1] for n in moved[1] if n.startswith("blocks")} == {"0", "1", "2", "3"}
    assert {n.split(".")[1] for n in moved[3] if n.startswith("blocks")} == {"2", "3"}


def test_labels_are_found_in_the_batch(tmp_path, monkeypatch):
    given = []
    real = prunex.pruners.IARED2.losses
    monkeypatch.setattr(prunex.pruners.IARED2, "losses", lambda self, f: (given.append(f.labels), real(self, f))[1])
    module = Plain()
    trainer(tmp_path, TokenPruning("ia_red2", options={"train": "reward"})).fit(module, loader())
    assert torch.cat(given).equal(torch.arange(16) % 5)
