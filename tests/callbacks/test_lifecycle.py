"""Coming and going: several calls with one callback, exceptions inside, copies, and what is left on the module."""

import copy

import lightning as L
import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.callbacks import KeptTokenMonitor, RelevancyMonitor, SlimExport, TokenPruning
from tests.callbacks.modules import Plain, loader, snapshot, trainer
from tests.vits import images


def untouched(module):
    """Nothing of a run is left on the module but its pruner."""
    assert "training_step" not in vars(module)
    assert "configure_model" not in vars(module)
    return True


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_fit_validate_test_predict_and_fit_again(tmp_path, method):
    module, callback = Plain(), TokenPruning(method, keep_ratio=0.6, backbone_lr_scale=0.5)
    run = trainer(tmp_path, callback)
    run.fit(module, loader(), loader(8))
    vit, names = module.vit, list(module.state_dict())
    pruner = vit.prunex.pruner
    teacher = getattr(pruner, "_teacher", None)
    assert untouched(module)
    logged = run.validate(module, loader(8), verbose=False)[0]
    assert logged["prunex/val_keep_ratio_stage1"] == pytest.approx(
        prunex.attached(module).trace.keep_ratios()[0].mean()
    )
    assert untouched(module)
    assert set(run.test(module, loader(8), verbose=False)[0]) == {"test_loss"}
    assert torch.cat(run.predict(module, loader(8))).shape == (8, 5)
    before = snapshot(module)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader(8))
    second = trainer(tmp_path, callback)
    second.fit(module, loader())
    assert untouched(module)
    assert module.vit.prunex.pruner is pruner
    assert getattr(pruner, "_teacher", None) is teacher  # still the dense model of the very beginning
    assert list(module.state_dict()) == names
    assert all(not torch.equal(p, before[n]) for n, p in module.named_parameters() if n.endswith("head.weight"))


def test_losses_are_added_once_after_several_setups(tmp_path):
    module, callback = Plain(), TokenPruning("dynamicvit")
    run = trainer(tmp_path, callback)
    for _ in range(3):
        callback.setup(run, module, "fit")
    x = loader()
    batch = next(iter(x))
    module.log = lambda *a, **k: None
    module.train()
    torch.manual_seed(1)
    loss = module.training_step(batch, 0)
    torch.manual_seed(1)
    wanted = type(module).training_step(module, batch, 0) + sum(prunex.attached(module).losses().values())
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()))
    callback.teardown(run, module, "fit")
    callback.teardown(run, module, "fit")
    assert untouched(module)


def test_a_second_callback_is_refused(tmp_path):
    module = Plain()
    with pytest.raises(PrunexError, match="2 TokenPruning callbacks in one Trainer: keep one"):
        trainer(tmp_path, TokenPruning("evit"), TokenPruning("topk")).fit(module, loader())
    assert not hasattr(module.vit, "prunex")


def test_a_callback_of_the_module_itself(tmp_path):
    class Brings(Plain):
        def configure_callbacks(self):
            return [TokenPruning("evit", keep_ratio=0.6)]

    module = Brings()
    trainer(tmp_path).fit(module, loader())
    assert prunex.attached(module).options["keep_ratio"] == 0.6


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("dynamicvit", {}, "has evit attached already: prunex.attached.module..detach"),
        ("evit", {"keep_ratio": 0.5}, r"has evit attached already with keep_ratio=0.6, not 0.5: detach it"),
        ("evit", {"keep_ratio": 0.6, "stages": [1]}, r"attached already with stages=\[1, 2, 3\], not \[1\]"),
    ],
)
def test_a_model_pruned_in_another_way_is_told(tmp_path, method, arguments, message):
    module = Plain()
    prunex.attach(module, "evit", keep_ratio=0.6)
    with pytest.raises(PrunexError, match=message):
        trainer(tmp_path, TokenPruning(method, **arguments)).fit(module, loader())
    assert prunex.attached(module).spec["keep_ratio"] == 0.6
    assert untouched(module)


def test_a_model_attached_before_is_taken_as_it_is(tmp_path):
    module = Plain()
    pruner = prunex.attach(module, "evit", keep_ratio=0.6, stages=(1, 2)).pruner
    trainer(tmp_path, TokenPruning("evit", keep_ratio=0.6, stages=[1, 2])).fit(module, loader())
    assert module.vit.prunex.pruner is pruner


def test_detach_after_fit_gives_a_dense_model_that_can_be_pruned_anew(tmp_path):
    module = Plain()
    trainer(tmp_path, TokenPruning("dynamicvit")).fit(module, loader())
    weights = {n: p for n, p in snapshot(module).items() if ".prunex." not in n}
    prunex.attached(module).detach()
    assert snapshot(module).keys() == weights.keys()
    assert all(torch.equal(p, weights[n]) for n, p in module.named_parameters())
    trainer(tmp_path, TokenPruning("evit", keep_ratio=0.5)).fit(module, loader())
    assert prunex.attached(module).method == "evit"


class Fails(Plain):
    error: type[BaseException] = RuntimeError

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise self.error("in the middle")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("error", "seen"), [(RuntimeError, RuntimeError), (KeyboardInterrupt, SystemExit)])
def test_the_module_is_itself_again_after_an_exception(tmp_path, error, seen):
    module, callback = Fails(), TokenPruning("dynamicvit", backbone_lr_scale=0.1)
    module.error = error
    run = trainer(tmp_path, callback, SlimExport(str(tmp_path), formats=[]))
    with pytest.raises(seen):
        run.fit(module, loader())
    assert untouched(module)
    assert callback._before == []
    assert not run.optimizers[0]._optimizer_step_pre_hooks
    assert not (tmp_path / "slim").exists()
    module.eval()
    with torch.no_grad():
        assert module(images()).shape == (3, 5)
    Plain.training_step.__get__(module)  # the class's own is there again


def test_an_exception_in_the_users_setup(tmp_path):
    class Breaks(Plain):
        def setup(self, stage):
            raise OSError("no data")

    module = Breaks()
    with pytest.raises(OSError, match="no data"):
        trainer(tmp_path, TokenPruning("evit")).fit(module, loader())
    assert untouched(module)


def test_an_instance_method_of_the_users_own_comes_back(tmp_path):
    module = Plain()
    own = module.training_step
    module.training_step = own
    trainer(tmp_path, TokenPruning("dynamicvit"), limit_train_batches=1).fit(module, loader())
    assert vars(module)["training_step"] is own


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_deep_copies_after_fit_are_independent(tmp_path, method):
    module = Plain()
    trainer(tmp_path, TokenPruning(method)).fit(module, loader())
    twin = copy.deepcopy(module)
    x = images()
    module.eval()
    twin.eval()
    with torch.no_grad():
        wanted = module(x)
        assert torch.equal(twin(x), wanted)
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(module(x), wanted)
    twin = copy.deepcopy(module).train()
    trainer(tmp_path, TokenPruning(method)).fit(twin, loader())
    with torch.no_grad():
        assert torch.equal(module(x), wanted)


def test_everything_in_a_fast_development_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callbacks = [
        TokenPruning("dynamicvit"),
        KeptTokenMonitor(images=2),
        RelevancyMonitor(images=2),
        SlimExport(str(tmp_path / "out"), monitor="val_loss", mode="min"),
    ]
    run = L.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False)
    run.fit(Plain(), loader(), loader(8))
    assert list(tmp_path.rglob("*")) == []


def test_processes_that_give_back_a_dense_module_are_told(tmp_path):
    run = trainer(tmp_path, TokenPruning("evit"), strategy="ddp_spawn", devices=2)
    module, callback = Plain(), run.callbacks[0]
    prunex.attach(module, "evit")
    callback.setup(run, module, "validate")
    with pytest.warns(UserWarning, match="spawns its processes gives the calling one a dense module back"):
        callback.on_train_start(run, module)
