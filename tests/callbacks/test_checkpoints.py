"""Checkpoints: saved, resumed to the same weights, opened without the callback, and holding plain values only."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import prunex
from prunex import PrunexError
from prunex.callbacks import KeptTokenMonitor, RelevancyMonitor, SlimExport, TokenPruning, load_from_checkpoint
from tests.callbacks.modules import Plain, Seeded, loader, snapshot, trainer
from tests.vits import images, tiny

ARGUMENTS = {
    "evit": {"keep_ratio": 0.6, "options": {"shrink_length": 0.8}, "backbone_lr_scale": 0.5, "freeze_backbone": 0.3},
    "dynamicvit": {"keep_ratio": 0.6, "backbone_lr_scale": 0.5, "freeze_backbone": 0.3},
}


def fit(folder, method, epochs, resume=None, **kwargs):
    torch.manual_seed(0)
    module = Seeded(optimiser="adamw", lr=1e-3)
    torch.manual_seed(0)
    saver = ModelCheckpoint(str(folder / "checkpoints"), filename="{epoch}", save_top_k=-1)
    run = trainer(
        folder, TokenPruning(method, **ARGUMENTS[method]), saver, max_epochs=4, enable_checkpointing=True, **kwargs
    )

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch + 1 == epochs

    run.callbacks.insert(0, Stop())
    run.fit(module, loader(), loader(8), ckpt_path=resume)
    return module, folder / "checkpoints"


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, method):
    whole, _ = fit(tmp_path / "whole", method, 4)
    _, saved = fit(tmp_path / "parts", method, 2)
    resumed, _ = fit(tmp_path / "parts", method, 4, resume=saved / "epoch=1.ckpt")
    wanted = snapshot(whole)
    for name, p in resumed.named_parameters():
        assert torch.equal(p, wanted[name]), name
    assert prunex.attached(resumed).progress == 1.0


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_a_checkpoint_opens_without_the_callback(tmp_path, method):
    module, saved = fit(tmp_path, method, 4)
    x = images()
    module.eval()
    loaded = load_from_checkpoint(Seeded, saved / "epoch=3.ckpt")
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(x), module(x))
    assert prunex.attached(loaded).spec == prunex.attached(module).spec
    assert loaded.hparams.optimiser == "adamw"
    # hyperparameters can be given anew
    assert load_from_checkpoint(Seeded, str(saved / "epoch=3.ckpt"), lr=0.5).hparams.lr == 0.5
    with pytest.raises(RuntimeError, match="Unexpected key.*prunex.callbacks.load_from_checkpoint"):
        Seeded.load_from_checkpoint(saved / "epoch=3.ckpt")


def test_a_checkpoint_from_the_middle_of_a_schedule_computes_what_was_validated_then(tmp_path):
    module, saved = fit(tmp_path, "evit", 2)
    assert prunex.attached(module).progress == 0.5
    loaded = load_from_checkpoint(Seeded, saved / "epoch=1.ckpt")
    assert prunex.attached(loaded).progress == 0.5
    assert prunex.attached(loaded).counts() == prunex.attached(module).counts()
    assert prunex.attached(loaded).counts() != [11, 8, 5]
    fresh = Seeded(optimiser="adamw")
    run = trainer(tmp_path, TokenPruning("evit", **ARGUMENTS["evit"]))
    run.validate(fresh, loader(8), ckpt_path=saved / "epoch=1.ckpt", verbose=False)
    assert prunex.attached(fresh).counts() == prunex.attached(module).counts()


def test_everything_in_a_checkpoint_is_plain(tmp_path):
    module = Plain()
    callbacks = [
        TokenPruning("dynamicvit", keep_ratio=[0.8, 0.7], stages=[1, 2], backbone_lr_scale=0.1),
        KeptTokenMonitor(images=2),
        RelevancyMonitor(images=2),
        SlimExport(str(tmp_path), monitor="val_loss", mode="min", formats=[]),
        ModelCheckpoint(str(tmp_path), filename="last"),
    ]
    trainer(tmp_path, *callbacks, enable_checkpointing=True).fit(module, loader(), loader(8))
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert found["prunex"] == {
        "version": 1,
        "path": None,
        "pruning": prunex.attached(module).spec,
        "progress": 1.0,
    }
    assert found["prunex"]["pruning"]["keep_ratio"] == [0.8, 0.7]
    assert not any("teacher" in n for n in found["state_dict"])
    more = found["state_dict"].keys() - module.state_dict().keys()
    assert more == {"net.backbone.0.prunex.open_with.prunex.callbacks.load_from_checkpoint"}
    assert module.state_dict().keys() < found["state_dict"].keys()
    states = {k.split("{")[0]: v for k, v in found["callbacks"].items() if "ModelCheckpoint" not in k}
    assert states.keys() == {"SlimExport", "KeptTokenMonitor", "RelevancyMonitor"}
    assert states["SlimExport"]["best"] > 0
    assert states["KeptTokenMonitor"] == {"seen": 0}


def test_saving_after_fit_and_with_a_path_in_a_module_of_two(tmp_path):
    class Two(Plain):
        def __init__(self):
            super().__init__()
            self.other = tiny(seed=4)

    module = Two()
    run = trainer(tmp_path, TokenPruning("dynamicvit", model="net.backbone"))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    loaded = load_from_checkpoint(Two, tmp_path / "after.ckpt")
    assert hasattr(loaded.vit, "prunex")
    assert not hasattr(loaded.other, "prunex")
    module.eval()
    x = images()
    with torch.no_grad():
        assert torch.equal(loaded(x), module(x))


class OneDict(Plain):
    """Takes all hyperparameters as one dict."""

    def __init__(self, config):
        super(Plain, self).__init__()
        self.save_hyperparameters(config)
        self.net = nn.ModuleDict({"backbone": nn.Sequential(tiny().train())})
        self.norms = []


class Extra(Plain):
    """Saves more than its constructor takes."""

    def __init__(self, lr=0.1):
        super().__init__(lr=lr)
        self.save_hyperparameters({"lr": lr, "note": "not an argument"})


class Ignores(Plain):
    """Takes a module that it does not save."""

    def __init__(self, head, lr=0.1):
        super(Plain, self).__init__()
        self.save_hyperparameters({"returns": "tensor", "optimiser": "sgd"})
        self.save_hyperparameters(ignore=["head"])
        self.net = nn.ModuleDict({"backbone": nn.Sequential(tiny().train())})
        self.norms, self.extra = [], head


def test_constructors_as_lightning_knows_them(tmp_path):
    for made, given in (
        (OneDict({"lr": 0.02, "returns": "tensor", "optimiser": "sgd"}), {}),
        (Extra(0.02), {}),
        (Ignores(nn.Linear(2, 2), 0.02), {"head": nn.Linear(2, 2)}),
    ):
        run = trainer(tmp_path, TokenPruning("dynamicvit"))
        run.fit(made, loader())
        run.save_checkpoint(tmp_path / "x.ckpt")
        loaded = load_from_checkpoint(type(made), tmp_path / "x.ckpt", **given)
        assert loaded.hparams["lr"] == 0.02
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), made.parameters(), strict=True))


def test_dense_and_pruned_checkpoints_load_into_each_other(tmp_path):
    dense = Plain(seed=5)
    run = trainer(tmp_path)
    run.fit(dense, loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    module = Plain()
    run = trainer(tmp_path, TokenPruning("dynamicvit"))
    run.validate(module, loader(8), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    wanted = snapshot(dense)
    assert all(torch.equal(p, wanted[n]) for n, p in module.named_parameters() if n in wanted)
    missing, unexpected = dense.load_state_dict(module.state_dict(), strict=False)
    assert not missing
    assert all(".prunex." in n for n in unexpected)


def test_errors(tmp_path):
    with pytest.raises(PrunexError, match="there is no checkpoint at .*nothing.ckpt"):
        load_from_checkpoint(Plain, tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(PrunexError, match="text.ckpt is no checkpoint that loads safely"):
        load_from_checkpoint(Plain, tmp_path / "text.ckpt")
    torch.save({"state_dict": {}, "code": nn.Linear(1, 1)}, tmp_path / "code.ckpt")
    with pytest.raises(PrunexError, match=r"code.ckpt is no checkpoint that loads safely .*ignore=\[...\]\)"):
        load_from_checkpoint(Plain, tmp_path / "code.ckpt")
    for content in ({"state_dict": {}}, {"prunex": 3}, {"prunex": {"version": 1}}):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(PrunexError, match=r"was trained with none of .*: use Plain.load_from_checkpoint"):
            load_from_checkpoint(Plain, tmp_path / "other.ckpt")
    torch.save({"prunex": {"version": 2, "pruning": {}, "path": None}}, tmp_path / "later.ckpt")
    with pytest.raises(PrunexError, match="the checkpoint has prunex format 2: this prunex reads up to 1"):
        load_from_checkpoint(Plain, tmp_path / "later.ckpt")
