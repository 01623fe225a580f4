"""What checkpoints of weights only hold: enough to open them, and enough that no dense module takes them silently."""

import copy
import functools

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import prunex
from prunex.callbacks import MaskPruning, TokenPruning, load_from_checkpoint
from tests.callbacks.modules import Plain, loader, trainer
from tests.vits import images

NAMED = "prunex.callbacks.load_from_checkpoint"
PRUNERS = {
    "evit": lambda: TokenPruning("evit", keep_ratio=0.5, options={"shrink_length": 0.5}),
    "topk": lambda: TokenPruning("topk", keep_ratio=0.6, options={"count": "adaptive", "threshold": 0.6}),
    "tome": lambda: TokenPruning("tome", options={"r": 2}),
    "ppt": lambda: TokenPruning("ppt", options={"r": 3, "tau": 0.01}),
    "topk, by shift": lambda: TokenPruning("topk", keep_ratio=0.6, options={"score": "shift"}),
    "dynamicvit": lambda: TokenPruning("dynamicvit", keep_ratio=0.6),
    "diffrate": lambda: TokenPruning("diffrate", keep_ratio=0.6, lr_scale=10),
    "patch_slimming": lambda: TokenPruning("patch_slimming"),
    "ia_red2": lambda: TokenPruning("ia_red2"),
    "taylor": lambda: MaskPruning("taylor", budget=0.7, images=8),
    "taylor, gates kept": lambda: MaskPruning("taylor", budget=0.7, images=8, remove=False),
    "xpruner": lambda: MaskPruning("xpruner", budget=0.7),
}


def logits(module, x):
    with torch.no_grad():
        return module.eval()(x)


@pytest.mark.parametrize("name", PRUNERS)
def test_weights_alone_open_with_the_same_logits(tmp_path, name):
    module = Plain()
    run = trainer(tmp_path, PRUNERS[name]())
    run.fit(module, loader(), loader(8))
    run.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    assert "callbacks" not in torch.load(tmp_path / "w.ckpt", weights_only=True)
    loaded = load_from_checkpoint(Plain, tmp_path / "w.ckpt")
    assert torch.equal(logits(loaded, images()), logits(module, images()))
    for units in (False, True):
        known, again = (prunex.attached(m, units=units) for m in (module, loaded))
        assert (None if known is None else known.spec) == (None if again is None else again.spec)
    with pytest.raises(RuntimeError, match=NAMED):
        Plain.load_from_checkpoint(tmp_path / "w.ckpt")


def test_in_the_middle_of_a_schedule(tmp_path):
    module, saver = Plain(), ModelCheckpoint(str(tmp_path), filename="{epoch}", save_top_k=-1, save_weights_only=True)
    run = trainer(tmp_path, PRUNERS["evit"](), saver, max_epochs=4, enable_checkpointing=True)
    run.fit(module, loader())
    loaded = load_from_checkpoint(Plain, tmp_path / "epoch=0.ckpt")
    assert prunex.attached(loaded).progress == 0.25
    assert prunex.attached(loaded).counts() != prunex.attached(module).counts()
    # validated by a Trainer, which takes what callbacks saved from whole checkpoints alone
    again = Plain()
    run = trainer(tmp_path, PRUNERS["evit"]())
    run.validate(again, loader(8), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert prunex.attached(again).counts() == prunex.attached(loaded).counts()
    assert torch.equal(logits(again, images()), logits(loaded, images()))


def test_tokens_and_units_together(tmp_path):
    module = Plain()
    run = trainer(tmp_path, PRUNERS["evit"](), PRUNERS["taylor"]())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    loaded = load_from_checkpoint(Plain, tmp_path / "w.ckpt")
    assert prunex.attached(loaded, units=True).removed
    assert torch.equal(logits(loaded, images()), logits(module, images()))


class Says(Plain):
    """Saves something of its own, and attaches its pruner itself when it is built."""

    def __init__(self):
        super().__init__()
        prunex.attach(self, "evit", keep_ratio=0.5)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = 3


def test_the_modules_own_words_stay_and_a_pruned_module_takes_its_checkpoint(tmp_path):
    module = Says()
    run = trainer(tmp_path, TokenPruning("evit", keep_ratio=0.5))
    run.fit(module, loader())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    assert torch.load(tmp_path / "w.ckpt", weights_only=True)["mine"] == 3
    assert torch.equal(logits(Says.load_from_checkpoint(tmp_path / "w.ckpt"), images()), logits(module, images()))
    assert vars(module)["on_save_checkpoint"].args[2] is None  # put on once


def test_copies_speak_for_themselves_and_detached_models_say_nothing(tmp_path):
    module = Plain()
    trainer(tmp_path, PRUNERS["evit"]()).fit(module, loader())
    twin = copy.deepcopy(module)
    assert vars(twin)["on_save_checkpoint"].args[0] is twin
    prunex.attached(module).detach()
    run = trainer(tmp_path)
    run.fit(twin, loader())
    run.save_checkpoint(tmp_path / "twin.ckpt", weights_only=True)
    loaded = load_from_checkpoint(Plain, tmp_path / "twin.ckpt")
    assert torch.equal(logits(loaded, images()), logits(twin, images()))
    run = trainer(tmp_path)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    assert torch.equal(logits(Plain.load_from_checkpoint(tmp_path / "dense.ckpt"), images()), logits(module, images()))


def test_a_method_of_the_object_itself_is_called(tmp_path):
    module = Plain()
    module.on_save_checkpoint = functools.partial(dict.update, mine=4)
    run = trainer(tmp_path, PRUNERS["tome"]())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    assert torch.load(tmp_path / "w.ckpt", weights_only=True)["mine"] == 4
    load_from_checkpoint(Plain, tmp_path / "w.ckpt")


def test_a_dense_module_in_a_trainer_refuses_it(tmp_path):
    run = trainer(tmp_path, PRUNERS["tome"]())
    run.fit(Plain(), loader())
    run.save_checkpoint(tmp_path / "w.ckpt")
    with pytest.raises(RuntimeError, match=NAMED):
        trainer(tmp_path).validate(Plain(), loader(8), ckpt_path=tmp_path / "w.ckpt", verbose=False)
