"""Optimisers and averages that prunex did not make: what they step, what they remember, and how far the ViT moves."""

import copy
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning
from timm.optim import Lookahead
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import prunex
from prunex import PrunexError
from prunex.callbacks import MaskPruning, TokenPruning
from tests.callbacks.modules import Plain, loader, snapshot, trainer
from tests.vits import tiny

# ------------------------------------------------------------------------------------- parameters that nobody steps


class ByName(Plain):
    """Groups by the names that were there when it was written."""

    def configure_optimizers(self):
        groups = [p for n, p in self.named_parameters() if ".blocks." in n or ".head." in n]
        return torch.optim.SGD(groups, 0.1)


class Early(Plain):
    """Makes its optimiser when it is built."""

    def __init__(self):
        super().__init__()
        self.__dict__["made"] = torch.optim.SGD(self.parameters(), 0.1)

    def configure_optimizers(self):
        return self.made


class HeadAlone(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.vit.head.parameters(), 0.1)


class FreezesAll(Plain):
    """Freezes all but its head after setup."""

    def on_fit_start(self):
        self.vit.requires_grad_(False)
        self.vit.head.requires_grad_(True)


class AddsTheGroup(ByName):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.add_param_group({"params": prunex.attached(self).pruner.parameters()})
        return optimizer


@pytest.mark.parametrize("module", [ByName, Early, HeadAlone])
@pytest.mark.parametrize("method", ["dynamicvit", "ia_red2"])
def test_predictors_that_no_optimiser_steps_are_refused(tmp_path, module, method):
    module = module()
    before = snapshot(module)
    with pytest.raises(PrunexError, match=f"no optimiser steps .* of {method} .*add|no optimiser steps .* of {method}"):
        trainer(tmp_path, TokenPruning(method)).fit(module, loader())
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters() if n in before)
    trainer(tmp_path, TokenPruning("evit")).fit(type(module)(), loader())  # has nothing of its own to learn


def test_the_remedy_works(tmp_path):
    module = AddsTheGroup()
    recorded = {}

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            recorded.update(snapshot(pl_module))

    trainer(tmp_path, TokenPruning("dynamicvit"), Start()).fit(module, loader())
    assert all(
        not torch.equal(p, recorded[n]) for n, p in module.named_parameters() if ".prunex." in n and "2." not in n
    )


def test_parameters_frozen_after_setup(tmp_path):
    with pytest.raises(PrunexError, match="of dynamicvit .* were frozen after they were attached"):
        trainer(tmp_path, TokenPruning("dynamicvit")).fit(FreezesAll(), loader())
    module = Plain()
    prunex.attach(module, "dynamicvit").pruner.requires_grad_(False)  # deliberately, before
    trainer(tmp_path, TokenPruning("dynamicvit")).fit(module, loader())


class Split(Plain):
    """Has a backbone for Lightning's own callback, and something beside it."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(5, 5)

    def forward(self, x):
        return self.extra(super().forward(x))

    @property
    def backbone(self):
        return self.net["backbone"]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def test_backbone_finetuning_thaws_them_later(tmp_path):
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.1)
    module = Split()
    with pytest.warns(UserWarning, match="of dynamicvit .* were frozen after they were attached"):
        trainer(tmp_path, TokenPruning("dynamicvit"), thaw, max_epochs=2).fit(module, loader())
    assert all(p.requires_grad for p in prunex.attached(module).pruner.parameters())


# --------------------------------------------------------------------------------------------- what the backbone is


class Decoder(Plain):
    """A decoder, a second ViT, a parameter of its own, and one that it shares with the ViT."""

    def __init__(self):
        super().__init__(num_classes=0)
        self.fc, self.scale, self.second = nn.Linear(48, 5), nn.Parameter(torch.ones(())), tiny(seed=2)
        self.shared = self.vit.norm.weight

    def forward(self, x):
        return self.scale * self.fc(self.vit(x) * self.shared) + self.second(x)


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_frozen_is_the_vit_alone(tmp_path, method):
    module = Decoder()
    before = snapshot(module)
    options = {"options": {"teacher": False}} if method == "dynamicvit" else {}
    callback = TokenPruning(method, model="net.backbone", freeze_backbone=1.0, **options)
    trainer(tmp_path, callback).fit(module, loader())
    for name, p in module.named_parameters():
        if name in before:
            still = name == "shared" or name.startswith("net.backbone")
            assert torch.equal(p, before[name]) == still, name
    assert torch.equal(module.shared, before["shared"])
    assert module.shared is module.vit.norm.weight


def test_scaled_is_the_vit_alone(tmp_path):
    """One step of plain SGD: the ViT's own parameters, its head among them, go a tenth of the way."""
    ends = {}
    for scale in (1.0, 0.1):
        torch.manual_seed(0)
        module = Decoder()
        ends["start"] = snapshot(module)
        callback = TokenPruning("evit", model="net.backbone", backbone_lr_scale=scale)
        trainer(tmp_path, callback, limit_train_batches=1).fit(module, loader())
        ends[scale] = snapshot(module)
    for name, start in ends["start"].items():
        share = 0.1 if name.startswith("net.") or name == "shared" else 1.0
        wanted = start + share * (ends[1.0][name] - start)
        assert torch.allclose(ends[0.1][name], wanted, rtol=0, atol=1e-6), name


# ------------------------------------------------------------------------------------------------ wrapped optimisers


class Wrapped(Plain):
    wrapper = staticmethod(lambda base: Lookahead(base, k=2))
    base = staticmethod(lambda params: torch.optim.SGD(params, 0.1, momentum=0.9))

    def configure_optimizers(self):
        return self.wrapper(self.base(self.parameters()))


def test_lookahead_keeps_its_memory_when_units_leave(tmp_path):
    """What is left of slow weights and momenta is what they were before the removal, at the units kept."""
    held = {}

    class Look(L.Callback):
        def state(self, trainer, units):
            state = trainer.optimizers[0]._base_optimizer.state[units.model.blocks[0].mlp.fc1.weight]
            return {k: v.clone() for k, v in state.items()}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            units = prunex.attached(pl_module, units=True)
            if units.removed:
                held.setdefault("after", self.state(trainer, units))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            units = prunex.attached(pl_module, units=True)
            if not units.removed:
                held["before"] = self.state(trainer, units)

    module = Wrapped()
    trainer(tmp_path, MaskPruning("magnitude", budget=0.6, start=0.5), Look(), max_epochs=2).fit(module, loader())
    kept = list(prunex.attached(module, units=True).widths.channels[0])
    assert held["before"].keys() == {"momentum_buffer", "lookahead_slow_buff"}
    assert all(torch.equal(held["after"][k], v[kept]) for k, v in held["before"].items())


def test_lookahead_by_hand_cuts_what_it_remembers():
    model = tiny().train()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), k=1)
    pruning = prunex.attach(model, "magnitude", budget=0.6)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    optimizer.step()
    weight = model.blocks[0].mlp.fc1.weight
    before = {k: v.clone() for k, v in optimizer._base_optimizer.state[weight].items()}
    pruning.calibrate()
    pruning.remove([optimizer])
    now, kept = model.blocks[0].mlp.fc1.weight, list(pruning.widths.channels[0])
    state = optimizer._base_optimizer.state
    assert weight not in state
    assert all(torch.equal(state[now][k], v[kept]) for k, v in before.items())
    assert any(p is now for group in optimizer.param_groups for p in group["params"])
    assert optimizer.param_groups[0] is optimizer._base_optimizer.param_groups[0]


class Slow(torch.optim.Optimizer):
    """Somebody's Lookahead, with slow weights in a list of its own."""

    def __init__(self, base):
        self.base_optimizer, self.count = base, 0
        super().__init__(base.param_groups, base.defaults)
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    def step(self, closure=None):
        loss = self.base_optimizer.step(closure)
        for p, slow in zip((p for g in self.param_groups for p in g["params"]), self.slow, strict=True):
            slow.lerp_(p.detach(), 0.5)
            p.data.copy_(slow)
        return loss


class Owns(Wrapped):
    wrapper = Slow


class Quasi(Wrapped):
    wrapper = staticmethod(lambda base: base)
    base = staticmethod(lambda params: torch.optim.LBFGS(params, 0.01, max_iter=1))


class LateSlow(Slow):
    """The same, made at the first step."""

    def __init__(self, base):
        super().__init__(base)
        self.kept = None

    def step(self, closure=None):
        self.kept = self.kept or {p: p.detach().clone() for g in self.param_groups for p in g["params"]}
        return self.base_optimizer.step(closure)


class OwnsLate(Wrapped):
    @staticmethod
    def wrapper(base):
        made = LateSlow(base)
        del made.slow
        return made


@pytest.mark.parametrize("module", [Owns, Quasi])
def test_optimisers_whose_memory_cannot_be_cut_are_refused_by_name(tmp_path, module):
    with pytest.raises(PrunexError, match=r"(Slow|LBFGS) keeps tensors of the parameters beside its state"):
        trainer(tmp_path, MaskPruning("taylor", budget=0.7, images=8)).fit(module(), loader())
    trainer(tmp_path, MaskPruning("taylor", budget=0.7, images=8, remove=False)).fit(module(), loader())


def test_one_whose_memory_comes_later_keeps_the_units_masked(tmp_path):
    module = OwnsLate()
    with pytest.warns(UserWarning, match=r"LateSlow keeps tensors .*\(kept\).*masked, until it is slimmed"):
        trainer(tmp_path, MaskPruning("taylor", budget=0.6, images=8, start=0.5), max_epochs=2).fit(module, loader())
    units = prunex.attached(module, units=True)
    assert units.decided
    assert not units.removed


def test_memory_of_other_shapes_begins_anew(tmp_path):
    module = Wrapped()
    module.wrapper, module.base = lambda base: base, lambda params: torch.optim.Adafactor(params, 0.01)
    with pytest.warns(UserWarning, match="what Adafactor remembers .* begins anew"):
        trainer(tmp_path, MaskPruning("magnitude", budget=0.6, start=0.5), max_epochs=2).fit(module, loader())
    assert prunex.attached(module, units=True).removed


def test_lookahead_takes_a_scaled_step(tmp_path):
    """The step inside of the wrapper is scaled, and its slow weights follow: what a smaller learning rate gives."""

    class Smaller(Wrapped):
        base = staticmethod(lambda params: torch.optim.SGD(params, 0.1 * 0.2))

    class Same(Wrapped):
        base = staticmethod(lambda params: torch.optim.SGD(params, 0.1))

    scaled, smaller = Same(), Smaller()
    trainer(tmp_path, TokenPruning("evit", backbone_lr_scale=0.2)).fit(scaled, loader())
    trainer(tmp_path, TokenPruning("evit")).fit(smaller, loader())
    for (name, p), q in zip(scaled.named_parameters(), smaller.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-5), name


# ------------------------------------------------------------------------------------------------------ own averages


class Shadow(L.Callback):
    """An average as people write it: tensors by name."""

    def on_train_start(self, trainer, pl_module):
        self.shadow = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for n, p in pl_module.named_parameters():
            self.shadow[n] = 0.9 * self.shadow[n] + 0.1 * p.detach()


class Averages(L.Callback):
    def __init__(self, make, update):
        self.make, self.update, self.copy = make, update, None

    def on_train_start(self, trainer, pl_module):
        self.copy = self.make(pl_module.vit)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.update(self.copy, pl_module.vit)


def by_hand(average, model):
    with torch.no_grad():
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.lerp_(p, 0.1)


KEPT = {
    "shadow": lambda: Shadow(),
    "deep copy": lambda: Averages(copy.deepcopy, by_hand),
    "AveragedModel": lambda: Averages(AveragedModel, AveragedModel.update_parameters),
    "ModelEmaV3": lambda: Averages(lambda m: ModelEmaV3(m, foreach=False), lambda e, m: e.update(m)),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_beside_an_average_units_stay_masked_to_the_end(tmp_path, name, start):
    module, average = Plain(), KEPT[name]()
    run = trainer(tmp_path, average, MaskPruning("magnitude", budget=0.6, start=start), max_epochs=2)
    with pytest.warns(UserWarning, match=f"{type(average).__name__}.* holds a copy of the weights.*masked"):
        run.fit(module, loader())
    units = prunex.attached(module, units=True)
    assert units.decided
    assert not units.removed
    small, x = prunex.slim(module), torch.randn(2, 3, 32, 32)
    assert prunex.cost(small).params < prunex.cost(tiny()).params
    module.eval()
    with torch.no_grad():
        assert torch.allclose(small(x), module(x), atol=1e-5)


@pytest.mark.parametrize("make", [AveragedModel, ModelEmaV3])
@pytest.mark.parametrize("pruner", [TokenPruning("dynamicvit", model="net"), MaskPruning("magnitude", model="net")])
def test_averages_that_were_made_before_are_refused_by_name(tmp_path, make, pruner):
    class Has(Plain):
        def __init__(self):
            super().__init__()
            self.ema = make(self.vit)

    pruner = copy.copy(pruner)
    with pytest.raises(PrunexError, match=rf"Has.ema \({make.__name__}\) averages a model without what"):
        trainer(tmp_path, pruner).fit(Has(), loader())
    average = Averages(make, None)
    module = Plain()
    average.copy = make(module.vit)
    with pytest.raises(PrunexError, match=r"Averages.copy .* make it later, such as in on_fit_start"):
        trainer(tmp_path, average, pruner).fit(module, loader())
    assert not hasattr(module.vit, "prunex")


def test_a_teacher_never_changes_so_units_leave(tmp_path):
    class Distils(Plain):
        def __init__(self):
            super().__init__()
            self.__dict__["teacher"] = copy.deepcopy(self.vit).eval().requires_grad_(False)

        def training_step(self, batch, index):
            return super().training_step(batch, index) + F.mse_loss(self(batch[0]), self.teacher(batch[0]))

    module = Distils()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*holds a copy.*")
        run = trainer(tmp_path, MaskPruning("magnitude", budget=0.6, start=0.5), max_epochs=2)
        run.fit(module, loader())
    assert prunex.attached(module, units=True).removed


# -------------------------------------------------------------------------------------------------- hyperparameters


@pytest.mark.parametrize("value", [{"amount": 0.3}, None, {"method": "l1_unstructured"}, "evit"])
def test_a_hyperparameter_of_the_same_name_is_left_alone(tmp_path, value):
    class Foreign(Plain):
        def __init__(self, pruning, unit_pruning):
            super().__init__()
            self.save_hyperparameters()

    module = Foreign(value, value)
    run = trainer(tmp_path, TokenPruning("evit", keep_ratio=0.5), MaskPruning("magnitude", budget=0.6))
    run.fit(module, loader(), loader(8))
    assert module.hparams["pruning"] == module.hparams["unit_pruning"] == value


def test_hyperparameters_that_are_ours_follow(tmp_path):
    class Says(Plain):
        rebuilds_pruning = True

        def __init__(self, pruning=None, unit_pruning=None):
            super().__init__()
            self.save_hyperparameters()

    for module in (Says(), Says({"method": "evit", "keep_ratio": 0.5})):
        trainer(tmp_path, TokenPruning("evit", keep_ratio=0.5)).fit(module, loader())
        assert module.hparams["pruning"] == prunex.attached(module).spec


def test_the_budget_is_a_share_of_the_dense_model(tmp_path):
    dense = prunex.cost(tiny()).gmacs
    run = trainer(
        tmp_path, TokenPruning("evit", budget=0.8), MaskPruning("magnitude", budget=0.5, start=0.5), max_epochs=2
    )
    module = Plain()
    run.fit(module, loader(), loader(8))
    assert prunex.attached(module, units=True).removed
    assert float(run.callback_metrics["prunex/gmacs_budget"]) == pytest.approx(0.8 * dense)
    assert float(run.callback_metrics["prunex/gmacs"]) == pytest.approx(prunex.cost(module).gmacs)
    assert prunex.cost(module).gmacs <= 0.51 * dense
    run.validate(module, loader(8), verbose=False)  # units are gone: the rates are not measured against what is left
    assert float(run.callback_metrics["prunex/gmacs_budget"]) == pytest.approx(0.8 * dense)
