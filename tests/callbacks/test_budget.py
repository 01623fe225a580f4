"""TokenPruning(budget=...): solved once, logged, resumed, refused where it does not fit."""

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import prunex
from prunex import PrunexError
from prunex.callbacks import TokenPruning, load_from_checkpoint
from prunex.recipes import ImageClassifier
from prunex.recipes.runs import instantiate
from tests.callbacks.modules import Plain, Seeded, csv_logger, data, loader, metrics, trainer
from tests.vits import images

METHODS = ["topk", "evit", "dynamicvit"]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_meets_the_budget_and_the_log_says_so(tmp_path, method, monkeypatch):
    said = []
    monkeypatch.setattr("prunex.callbacks.token_pruning.rank_zero_info", said.append)
    module = Plain()
    dense = prunex.cost(module).macs
    run = trainer(tmp_path, TokenPruning(method, budget=0.75), logger=csv_logger(tmp_path))
    run.fit(module, loader(), loader(8))
    spent = prunex.cost(module).macs
    assert spent == pytest.approx(0.75 * dense, rel=0.011)
    logged = metrics(run.log_dir)
    assert logged["prunex/gmacs"] == pytest.approx([spent / 1e9])
    assert logged["prunex/gmacs_budget"] == pytest.approx([0.75 * dense / 1e9])
    rate = prunex.attached(module).options["keep_ratio"]
    assert any(
        f"budget 0.75 gives keep_ratio={rate!r}" in line and f"{100 * spent / dense:.1f} %" in line for line in said
    )
    assert "budget" not in prunex.attached(module).spec


def test_a_schedule_is_logged_on_its_way_to_the_budget(tmp_path):
    callback = TokenPruning("evit", budget=0.7, options={"schedule": "linear", "shrink_length": 0.5})
    run = trainer(tmp_path, callback, max_epochs=4, logger=csv_logger(tmp_path))
    run.fit(Plain(), loader(), loader(4))
    logged = metrics(run.log_dir)
    assert logged["prunex/gmacs"][0] > logged["prunex/gmacs"][-1]
    assert logged["prunex/gmacs"][-1] == pytest.approx(logged["prunex/gmacs_budget"][-1], rel=0.03)


def fit(folder, epochs, resume=None, callback=None):
    torch.manual_seed(0)
    module = Seeded(optimiser="adamw", lr=1e-3)
    torch.manual_seed(0)
    saver = ModelCheckpoint(str(folder / "checkpoints"), filename="{epoch}", save_top_k=-1)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch + 1 == epochs

    callback = callback or TokenPruning("dynamicvit", budget=0.75)
    run = trainer(folder, Stop(), callback, saver, max_epochs=2, enable_checkpointing=True)
    run.fit(module, loader(), loader(8), ckpt_path=resume)
    return module, folder / "checkpoints"


def test_resuming_ends_where_an_uninterrupted_run_does_and_checkpoints_hold_plain_rates(tmp_path):
    whole, _ = fit(tmp_path / "whole", 2)
    _, saved = fit(tmp_path / "parts", 1)
    told = torch.load(saved / "epoch=0.ckpt", weights_only=True)["prunex"]["pruning"]
    assert "budget" not in told
    assert told == prunex.attached(whole).spec
    resumed, _ = fit(tmp_path / "parts", 2, resume=saved / "epoch=0.ckpt")
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    loaded = load_from_checkpoint(Seeded, saved / "epoch=0.ckpt")
    assert prunex.attached(loaded).spec == told


def test_a_pruned_model_must_meet_the_budget(tmp_path):
    module = Plain()
    prunex.attach(module, "topk", budget=0.75)
    trainer(tmp_path, TokenPruning("topk", budget=0.75)).fit(module, loader())
    trainer(tmp_path, TokenPruning("topk", budget=0.751)).fit(module, loader())  # as near as 16 patches allow
    with pytest.raises(
        PrunexError, match=r"pruned already with keep_ratio=.* does not meet budget=0.5: detach"
    ) as caught:
        trainer(tmp_path, TokenPruning("topk", budget=0.5)).fit(module, loader())
    assert "\n" not in str(caught.value)
    rate = prunex.attached(module).options["keep_ratio"]
    trainer(tmp_path, TokenPruning("topk", keep_ratio=rate)).fit(module, loader())
    with pytest.raises(PrunexError, match="keep_ratio"):
        trainer(tmp_path, TokenPruning("topk")).fit(module, loader())  # its default is another rate


def test_a_module_that_rebuilds_itself_takes_budgets_too(tmp_path):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    pruning = {"method": "evit", "budget": 0.75, "stages": [1, 2]}
    module = ImageClassifier("vit_tiny_patch16_224", 5, args, pruning=pruning, from_scratch=True)
    callback = TokenPruning("evit", budget=0.75, stages=[1, 2])
    x, y = data()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)
    saver = ModelCheckpoint(str(tmp_path), filename="last")
    trainer(tmp_path, callback, saver, enable_checkpointing=True).fit(module, batches)
    again = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    module.eval(), again.eval()
    assert torch.equal(again(images()), module(images()))
    assert again.hparams["pruning"] == prunex.attached(module).spec


@pytest.mark.parametrize("budget", [0.65, "2.9GMACs", "400MMACs"])
def test_from_yaml(budget):
    text = f"class_path: prunex.callbacks.TokenPruning\ninit_args: {{method: evit, budget: {budget}}}"
    callback = instantiate(Callback, yaml.safe_load(text))
    assert callback.budget == budget
    assert type(callback.budget) is type(budget)
    assert "keep_ratio" not in callback.options


def test_bad_budgets_are_refused_at_once():
    for bad in (0, 1.5, "65%", True):
        with pytest.raises(PrunexError, match="budget=.*is not allowed"):
            TokenPruning("evit", budget=bad)
    with pytest.raises(PrunexError, match=r"budget=0.6 and keep_ratio=0.7 both say"):
        TokenPruning("evit", keep_ratio=0.7, budget=0.6)
    with pytest.raises(PrunexError, match=r"budget=0.6 and keep_ratio=0.7 both say"):
        TokenPruning("evit", options={"keep_ratio": 0.7}, budget=0.6)._attach(Plain())
    module = Plain()
    with pytest.raises(PrunexError, match="budget=0.1 .* out of reach for evit"):
        TokenPruning("evit", budget=0.1)._attach(module)
    assert prunex.attached(module) is None


def test_without_budget_and_ratio_the_default_holds():
    assert TokenPruning("evit").options["keep_ratio"] == 0.7
    assert TokenPruning("evit", options={"keep_ratio": 0.5}).options["keep_ratio"] == 0.5
    assert TokenPruning("evit", keep_ratio=0.6).options["keep_ratio"] == 0.6
