"""MaskPruning(correct=...): weights make up for closed units at the moment at which these are chosen, and once."""

import lightning as L
import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.callbacks import MaskPruning, SlimExport, TokenPruning, load_from_checkpoint, mask_pruning
from tests.callbacks.modules import Plain, data, loader, trainer
from tests.vits import relative

XPRUNER = {"budget": 0.6, "masks": 0.25, "thresholds": 0.25, "options": {"min_channels": 4}}


def fit(folder, module=None, method="magnitude", epochs=4, more=(), **options):
    """A short run; without a learning rate nothing but the choice of units and their correction happens."""
    module = Plain(seed=1, lr=0.0) if module is None else module
    callback = MaskPruning(method, **(XPRUNER if method == "xpruner" else {"budget": 0.6}) | options)
    run = trainer(folder, *more, callback, max_epochs=epochs)
    torch.manual_seed(0)
    run.fit(module, loader(), loader(8))
    return module.eval(), run


@pytest.mark.parametrize("method", ["magnitude", "taylor", "relevance", "random", "xpruner"])
@pytest.mark.parametrize("correct", ["bias", True])
def test_it_is_what_slim_makes_of_the_dense_model(tmp_path, method, correct):
    # X-Pruner's gates are all open until it concludes where its thresholds do not move.
    options = {"threshold_lr": 0.0} if method == "xpruner" else {}
    module, _ = fit(tmp_path, method=method, correct=correct, **options)
    units = prunex.attached(module, units=True)
    assert units.removed
    images = data()[0]
    wanted = prunex.slim(Plain(seed=1).vit, widths=units.widths, correct=correct, images=images)
    with torch.no_grad():
        assert relative(module(images), wanted(images)) < 1e-4
    done = prunex.correction(module.vit)
    assert done.images == 16
    assert done.kind == ("refit" if correct is True else correct)
    for ours, theirs in zip(done.branches, prunex.correction(wanted).branches, strict=True):
        assert ours.after == pytest.approx(theirs.after, rel=1e-3)
    assert prunex.correction(prunex.slim(module)) == done


def test_it_looks_at_as_many_images_as_it_is_told(tmp_path):
    module, _ = fit(tmp_path, correct="bias", images=6)
    assert prunex.correction(module.vit).images == 6


def test_without_being_asked_nothing_is_corrected(tmp_path):
    module, _ = fit(tmp_path)
    assert prunex.correction(module.vit) is None


@pytest.mark.parametrize("method", ["taylor", "xpruner"])
def test_removing_changes_nothing_but_the_size(tmp_path, method):
    weights = []
    for name, remove in (("a", True), ("b", False)):
        (tmp_path / name).mkdir()
        module, _ = fit(tmp_path / name, Plain(seed=1, lr=0.05), method, remove=remove, correct="refit")
        units = prunex.attached(module, units=True)
        assert units.removed is remove
        units.remove()
        weights.append(dict(module.vit.named_parameters()))
    for name, p in weights[0].items():
        assert torch.allclose(p, weights[1][name], atol=1e-5), name


class Thresholds(L.Callback):
    """Thresholds that close a fifth of each branch when the search is about to end."""

    def on_train_epoch_end(self, trainer, pl_module):
        pruner = prunex.attached(pl_module, units=True).pruner
        if pruner.stage == "thresholds":
            lowest = [pruner.score(b).quantile(0.2) for b in pruner.branches]
            pruner.thresholds.detach().copy_(torch.stack(lowest))


def test_what_thresholds_had_closed_before_is_not_missed(tmp_path, monkeypatch):
    seen = []

    def make_up(model, cuts, *args):
        pruner = prunex.attached(model, units=True).pruner
        seen.extend((cut, pruner.open(cut.branch.key).clone()) for cut in cuts)
        return prunex.units.correction.make_up(model, cuts, *args)

    monkeypatch.setattr(mask_pruning, "make_up", make_up)
    module, _ = fit(tmp_path, method="xpruner", correct="refit", more=[Thresholds()])
    pruner = prunex.attached(module, units=True).pruner
    for cut, reference in seen:
        assert torch.equal(cut.kept, pruner.open(cut.branch.key))
        assert not (cut.kept & cut.lost).any()
        assert torch.equal(reference, cut.kept | cut.lost)  # the gates while images were looked at
    closed = sum(int((~cut.kept).sum()) for cut, _ in seen)
    assert 0 < sum(int(cut.lost.sum()) for cut, _ in seen) < closed


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_beside_a_token_pruner(tmp_path, order):
    both = [TokenPruning("evit", budget=0.8), MaskPruning("taylor", budget=0.45, correct="refit")]
    module = Plain(seed=1, lr=0.0)
    trainer(tmp_path, *(both[i] for i in order), max_epochs=2).fit(module, loader(), loader(8))
    images, tokens = data()[0], prunex.attached(module)
    dense = Plain(seed=1).vit
    prunex.attach(dense, **tokens.spec)
    wanted = prunex.slim(
        dense, widths=prunex.attached(module, units=True).widths, correct="refit", images=images.split(4)
    )
    with torch.no_grad():
        assert relative(module.eval()(images), wanted(images)) < 1e-4


def test_a_checkpoint_and_the_slim_folder_hold_the_corrected_weights(tmp_path):
    module, run = fit(tmp_path, Plain(seed=1, lr=0.05), correct="refit", more=[SlimExport(str(tmp_path), formats=[])])
    run.save_checkpoint(tmp_path / "run.ckpt")
    images = data()[0]
    again = load_from_checkpoint(Plain, tmp_path / "run.ckpt")
    with torch.no_grad():
        assert relative(again.eval()(images), module(images)) < 1e-6
        assert relative(prunex.load(tmp_path / "slim")(images), module(images)) < 1e-6
    assert prunex.correction(prunex.load(tmp_path / "slim")) == prunex.correction(module.vit)


@pytest.mark.parametrize("wrong", ["mean", 1, ["bias"]])
def test_another_kind_is_refused_at_once(wrong):
    with pytest.raises(PrunexError, match="unknown correct"):
        MaskPruning("taylor", correct=wrong)


def test_layers_that_cannot_be_corrected_are_refused_before_training(tmp_path):
    with pytest.raises(PrunexError, match=r"attn\.proj has no bias.*refit"):
        fit(tmp_path, Plain(proj_bias=False), correct="bias", start=0.5)
    shared = Plain()
    shared.vit.blocks[1].mlp.fc2.weight = shared.vit.blocks[0].mlp.fc2.weight
    with pytest.raises(PrunexError, match="is the same tensor as"):
        fit(tmp_path, shared, correct="refit", start=0.5, remove=False)
