"""RelevancyGuidance: joins the losses of whoever prunes, in any order, and leaves with the training."""

import copy

import pytest
import torch
from lightning.pytorch import Callback

import prunex
from prunex import PrunexError
from prunex.callbacks import MaskPruning, RelevancyGuidance, TokenPruning
from tests.callbacks.modules import Plain, csv_logger, loader, metrics, trainer
from tests.callbacks.test_mask_pruning import OPTIONS


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("method", ["dynamicvit", "evit"])
def test_its_loss_is_logged_and_trained(tmp_path, method, first):
    callbacks = [TokenPruning(method, keep_ratio=0.6), RelevancyGuidance("generic_attention", weight=2.0)]
    module = Plain(seed=1)
    run = trainer(tmp_path, *(callbacks[::-1] if first else callbacks), max_epochs=6, logger=csv_logger(tmp_path))
    torch.manual_seed(0)
    run.fit(module, loader())
    seen = metrics(run.log_dir)["prunex/loss_guidance"]
    assert len(seen) == 6
    assert seen[-1] < seen[0]
    assert not prunex.attached(module)._attached.more
    assert not callbacks[1]._teacher


def test_masks_are_guided_while_they_are_learned(tmp_path):
    module = Plain(seed=1)
    run = trainer(
        tmp_path, RelevancyGuidance(weight=1.0), MaskPruning(**OPTIONS), max_epochs=4, logger=csv_logger(tmp_path)
    )
    run.fit(module, loader())
    assert len(metrics(run.log_dir)["prunex/loss_unit_guidance"]) == 1  # of the first epoch of four
    assert prunex.attached(module, units=True).removed


def test_the_judge_is_the_model_that_training_starts_from(tmp_path):
    """Also on resume: what the constructor made, and not the checkpoint's weights."""
    first = Plain(seed=1)
    run = trainer(tmp_path / "a", TokenPruning("evit", keep_ratio=0.6), RelevancyGuidance(), max_epochs=1)
    run.fit(first, loader())
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)

    class Look(RelevancyGuidance):
        def on_fit_start(self, trainer, pl_module):
            super().on_fit_start(trainer, pl_module)
            self.seen = {n: p.clone() for n, p in self._teacher[0].named_parameters()}

    look = Look()
    again = trainer(tmp_path / "b", look, TokenPruning("evit", keep_ratio=0.6), max_epochs=2)
    again.fit(Plain(seed=1), loader(), ckpt_path=path)
    for name, p in Plain(seed=1).vit.named_parameters():
        assert torch.equal(look.seen[name], p), name


def test_refusals(tmp_path):
    with pytest.raises(prunex.PrunexError, match="did you mean"):
        RelevancyGuidance("tokentn")
    with pytest.raises(prunex.PrunexError, match="has neither"):
        trainer(tmp_path, RelevancyGuidance()).fit(Plain(), loader())
    pruners = [("tome", {"r": 2}), ("ppt", {"r": 2}), ("diffrate", {})]
    for pruning in (TokenPruning(name, options=options) for name, options in pruners):
        with pytest.raises(prunex.PrunexError, match="ranks no tokens by scores that training could move"):
            trainer(tmp_path, pruning, RelevancyGuidance()).fit(Plain(), loader())


@pytest.mark.parametrize("more", [TokenPruning("evit", keep_ratio=0.6), MaskPruning(**OPTIONS)])
def test_it_goes_on_at_the_step_where_it_was(tmp_path, more):
    guidance = RelevancyGuidance(every_n_steps=3)
    run = trainer(tmp_path / "a", copy.deepcopy(more), guidance, max_epochs=1)
    run.fit(Plain(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    steps = guidance.state_dict()["steps"]
    assert len(steps) == 1
    # Masks are learned, and guided, in the first part of a training alone.
    assert steps[0] == run.global_step if isinstance(more, TokenPruning) else 0 < steps[0] < run.global_step

    found = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            found.extend(guide.step for guide in again._guides)

    again = RelevancyGuidance(every_n_steps=3)
    on = trainer(tmp_path / "b", copy.deepcopy(more), again, Look(), max_epochs=2)
    on.fit(Plain(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert found == steps


def test_a_trainer_may_hold_two(tmp_path):
    both = RelevancyGuidance("tokentm"), RelevancyGuidance("generic_attention", every_n_steps=2)
    trainer(tmp_path, TokenPruning("evit", keep_ratio=0.6), *both, max_epochs=1).fit(Plain(), loader())
    assert all(guidance.state_dict()["steps"][0] > 0 for guidance in both)


def test_a_module_that_optimises_by_hand_is_told(tmp_path):
    module = Plain()
    module.automatic_optimization = False
    run = trainer(tmp_path, TokenPruning("evit", keep_ratio=0.6), RelevancyGuidance())
    with pytest.raises(PrunexError, match="RelevancyGuidance adds to the loss of training_step.*optimises by hand"):
        run.fit(module, loader(8))
    assert run.global_step == 0
