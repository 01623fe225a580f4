"""lr_scale: what a pruner brings moves at a rate of its own, compared with groups that a user would write by hand."""

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lookahead
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

import prunex
from prunex import PrunexError
from prunex.callbacks import TokenPruning
from prunex.callbacks.rates import PrunerRate, peak
from tests.callbacks.modules import Plain, Seeded, loader, snapshot, trainer

RATE = 3e-5  # of fine-tuning


class Told(Seeded):
    """Takes its optimiser, and perhaps a schedule of it, from a function of parameter groups and a rate."""

    def __init__(self, make, schedule=None, apart=None):
        super().__init__()
        for name in ("make", "schedule", "apart"):  # functions are nothing that a checkpoint may hold
            self.hparams.pop(name, None)
        self.make, self.schedule, self.apart = make, schedule, apart

    def configure_optimizers(self):
        new = [p for n, p in self.named_parameters() if ".prunex." in n]
        known = [p for n, p in self.named_parameters() if ".prunex." not in n]
        groups = [{"params": known + new}]
        if self.apart is not None:  # by hand
            groups = [{"params": known}, {"params": new, "lr": self.apart * RATE}]
        optimizer = self.make(groups, RATE)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def fit(folder, module, scale=None, *callbacks, method="dynamicvit", batches=4, **options):
    torch.manual_seed(0)
    callback = TokenPruning(method, lr_scale=scale)
    run = trainer(folder, callback, *callbacks, limit_train_batches=batches, **options)
    run.fit(module, loader())
    return run


def same(one, other):
    wanted = snapshot(other)
    return all(torch.equal(p, wanted[n]) for n, p in snapshot(one).items())


def sgd(groups, lr):
    return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=0.1)


def adamw(groups, lr):
    return torch.optim.AdamW(groups, lr, weight_decay=0.1)


def lookahead(groups, lr):
    return Lookahead(torch.optim.AdamW(groups, lr), alpha=0.5, k=2)


class Rateless(torch.optim.Optimizer):
    """Knows by itself how far to go, as Adafactor's relative steps do."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": None})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad.sign(), alpha=1e-4)


def falling(optimizer):
    return LambdaLR(optimizer, lambda step: 0.5**step)


def one_cycle(optimizer):
    rates = [g["lr"] for g in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=rates, total_steps=4)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 30.0])
def test_one_step_is_so_many_times_as_long_for_the_pruner_alone(tmp_path, optimiser, scale):
    seen = {}
    for s in (1.0, scale):
        module = Plain(lr=1e-3, optimiser=optimiser)

        class Start(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                seen["start"] = snapshot(pl_module)

        fit(tmp_path, module, s, Start(), batches=1)
        seen[s] = snapshot(module)
    for name, start in seen["start"].items():
        step = seen[1.0][name] - start
        if ".prunex." not in name:
            assert torch.equal(seen[scale][name], seen[1.0][name]), name
        else:
            assert torch.allclose(seen[scale][name], start + scale * step, rtol=0, atol=1e-5), name
    assert any(".prunex." in n and not torch.equal(p, seen["start"][n]) for n, p in seen[1.0].items())


@pytest.mark.parametrize("make", [sgd, adamw, lookahead])
@pytest.mark.parametrize("schedule", [None, falling, one_cycle])
def test_it_is_a_parameter_group_written_by_hand_bit_for_bit(tmp_path, make, schedule):
    by_hand = Told(make, schedule, apart=20)
    fit(tmp_path, by_hand, 1.0)
    scaled = Told(make, schedule)
    run = fit(tmp_path, scaled, 20.0)
    assert same(scaled, by_hand)
    assert len(run.optimizers[0].param_groups) == 1


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}]
)
def test_accumulation_clipping_and_mixed_precision(tmp_path, options):
    by_hand, scaled = Told(adamw, apart=20), Told(adamw)
    fit(tmp_path, by_hand, 1.0, **options)
    fit(tmp_path, scaled, 20.0, **options)
    wanted = snapshot(by_hand)
    # The norm that clips adds up in the groups' order.
    assert all(torch.allclose(p, wanted[n], rtol=0, atol=1e-7) for n, p in snapshot(scaled).items())


def test_two_optimisers_stepped_by_hand(tmp_path):
    seen = []

    class Alternating(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for number in (0, 1, 0):
                optimizer = self.optimizers()[number]
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                before = snapshot(self)
                gradients = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
                optimizer.step()
                seen.append((number, before, gradients, snapshot(self)))

        def configure_optimizers(self):
            new = [p for n, p in self.named_parameters() if ".prunex." in n]
            return [
                torch.optim.SGD([*self.vit.norm.parameters(), *new], 0.1),
                torch.optim.SGD(self.vit.head.parameters(), 0.2),
            ]

    fit(tmp_path, Alternating(), 3.0, method="hvt", batches=2)
    assert len(seen) == 6
    for number, before, gradients, after in seen:
        for name, p in before.items():
            rate = 0.2 if ".head." in name else 0.3 if ".prunex." in name else 0.1 if ".0.norm." in name else 0.0
            moves = rate > 0 and number == int(".head." in name)
            wanted = p - rate * gradients[name] if moves else p
            assert torch.allclose(after[name], wanted, rtol=0, atol=1e-6), name


def test_the_users_hooks_and_a_step_that_fails_see_whole_groups(tmp_path):
    seen = []

    class Looks(Plain):
        def on_before_optimizer_step(self, optimizer):
            seen.append([(len(g["params"]), g["lr"]) for g in optimizer.param_groups])
            optimizer.param_groups[0]["lr"] /= 2  # a schedule by hand

    class Fails(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            closure = None if closure is None else torch.enable_grad()(closure)
            loss = closure() if closure else None
            seen.append([(len(g["params"]), g["lr"]) for g in self.param_groups])
            if len(seen) == 4:
                raise KeyError("failed")
            return loss

    class Module(Looks):
        def configure_optimizers(self):
            self.optimizer = Fails(self.parameters(), 0.1)
            return self.optimizer

    module = Module()
    with pytest.raises(KeyError, match="failed"):
        fit(tmp_path, module, 4.0)
    count = len(list(module.parameters()))
    new = sum(".prunex." in n for n, _ in module.named_parameters())
    assert seen == [
        [(count, 0.1)],
        [(count - new, 0.05), (new, 0.2)],
        [(count, 0.05)],
        [(count - new, 0.025), (new, 0.1)],
    ]
    assert [(len(g["params"]), g["lr"]) for g in module.optimizer.param_groups] == [(count, 0.025)]
    assert not module.optimizer._optimizer_step_pre_hooks
    assert not module.optimizer._optimizer_step_post_hooks


def test_a_skipped_step_leaves_everything(tmp_path):
    class Skips(Plain):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()  # as a gradient scaler does on overflow
            optimizer.zero_grad()

    module = Skips(lr=RATE)
    before = snapshot(module)
    run = fit(tmp_path, module, 5.0)
    assert all(torch.equal(p, before[n]) for n, p in snapshot(module).items() if n in before)
    assert len(run.optimizers[0].param_groups) == 1


def plateau(optimizer):
    # Falls behind every epoch, so that what a checkpoint brings is no peak.
    return ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)


class Watched(Told):
    def configure_optimizers(self):
        optimizers, schedules = super().configure_optimizers()
        return optimizers, [{**schedules[0], "interval": "epoch", "monitor": "train_loss"}]


@pytest.mark.parametrize("schedule", [falling, plateau])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path, schedule):
    kind = Watched if schedule is plateau else Told

    def run(folder, epochs, checkpoint=None):
        module = kind(adamw, schedule)
        torch.manual_seed(0)
        fitted = trainer(folder, TokenPruning("dynamicvit"), max_epochs=epochs, limit_train_batches=2)
        fitted.fit(module, loader(), ckpt_path=checkpoint)
        return module, fitted

    whole, _ = run(tmp_path / "whole", 4)
    _, half = run(tmp_path / "half", 2)
    half.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    groups = torch.load(tmp_path / "half.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert len(groups) == 1  # as without lr_scale
    again, _ = run(tmp_path / "again", 4, tmp_path / "half.ckpt")
    assert same(again, whole)


def rates(method, groups, make=torch.optim.AdamW, scale=None):
    """Peak rates (of each group, of the pruner in it) for groups (rate, whether they hold the pruner's parameters)."""
    pruning = prunex.attach(Plain().vit, method)
    new = list(pruning.pruner.parameters())
    other = [torch.nn.Parameter(torch.zeros(2)) for _ in groups]
    share = len(new) // max(1, sum(holds for _, holds in groups))
    listed = []
    for (rate, holds), parameter in zip(groups, other, strict=True):
        mine = [new.pop() for _ in range(share)] if holds else []
        listed.append({"params": [parameter, *mine], "lr": rate})
    return PrunerRate(make(listed, lr=1.0), pruning.pruner, scale).rates()


def test_the_methods_rate_where_the_modules_is_lower_and_never_above():
    assert rates("dynamicvit", [(RATE, True)]) == [(RATE, pytest.approx(9e-4))]
    assert rates("dynamicvit", [(1e-3, True)]) == [(1e-3, 1e-3)]
    assert rates("dynamicvit", [(RATE, False), (1e-6, True), (5e-3, True)]) == [
        (1e-6, pytest.approx(9e-4)),
        (5e-3, 5e-3),
    ]
    assert rates("ia_red2", [(RATE, True)]) == [(RATE, pytest.approx(9e-4))]
    assert rates("hvt", [(RATE, True)]) == [(RATE, pytest.approx(3e-4))]
    assert rates("dynamicvit", [(0.0, True)]) == [(0.0, 0.0)]  # whoever stops it means it
    assert rates("dynamicvit", [(2e-3, True)], scale=30.0) == [(2e-3, pytest.approx(0.06))]
    assert rates("evit", [(RATE, True)]) == []


def test_peaks_of_schedules_that_begin_low_and_rates_that_rise_above_them():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], 1e-5)
    OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    assert peak(optimizer.param_groups[0]) == 1e-3
    optimizer = torch.optim.AdamW([weight], 1e-4)
    LambdaLR(optimizer, lambda step: (step + 1) / 100)
    assert peak(optimizer.param_groups[0]) == 1e-4
    pruner = prunex.attach(Plain().vit, "dynamicvit").pruner
    optimizer = torch.optim.AdamW(pruner.parameters(), RATE)
    watched = PrunerRate(optimizer, pruner)
    for now, wanted in ((RATE, 9e-4), (RATE / 3, 3e-4), (1e-4, 9e-4), (2e-3, 2e-3)):  # an average's constant rate
        assert watched._rate(0, now) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("method", "lr", "scale", "make", "said"),
    [
        ("dynamicvit", RATE, 1.0, adamw, r"at a rate of 3e-05 dynamicvit's .* move by 6e-05 .* or give 30$"),
        ("hvt", RATE, 2.0, adamw, r"at a rate of 6e-05 hvt's"),
        ("dynamicvit", RATE, 30.0, lambda g, lr: torch.optim.LBFGS(g[0]["params"], lr), "LBFGS does not step by"),
        ("dynamicvit", RATE, 30.0, Rateless, "Rateless does not step by"),
        ("evit", RATE, 30.0, adamw, "lr_scale=30 has no effect: evit brings no parameters"),
    ],
)
def test_what_cannot_learn_is_told_once(tmp_path, method, lr, scale, make, said):
    with pytest.warns(UserWarning, match=said) as caught:
        fit(tmp_path, Told(make), scale, method=method)
    assert len([w for w in caught if "rate" in str(w.message) or "lr_scale" in str(w.message)]) == 1


def test_nothing_is_said_or_done_where_it_can(tmp_path):
    hooks = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            hooks.append(len(trainer.optimizers[0]._optimizer_step_pre_hooks))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Told(adamw), None)
        fit(tmp_path, Told(Rateless), None)
        fit(tmp_path, Plain(lr=1e-3, optimiser="adamw"), None, Look(), batches=1)
        fit(tmp_path, Plain(lr=RATE, optimiser="adamw"), None, Look(), method="evit", batches=1)
    assert not [w for w in caught if "rate" in str(w.message) and "prunex" in str(w.filename)]
    assert hooks == [0, 0]


@pytest.mark.parametrize("bad", [-1, "30", True, float("nan")])
def test_bad_scales(bad):
    with pytest.raises(PrunexError, match=r"lr_scale=.* give a number of at least 0"):
        TokenPruning("dynamicvit", lr_scale=bad)


@pytest.mark.parametrize(("method", "said"), [("dynamicvit", 1), ("ia_red2", 1), ("hvt", 0), ("evit", 0)])
def test_sgd_that_steps_predictors_is_told_once(tmp_path, method, said):
    class Two(Told):
        def configure_optimizers(self):
            every = list(self.parameters())
            return torch.optim.SGD([{"params": every[::2]}, {"params": every[1::2]}], 0.1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Two(sgd), batches=1, method=method)
    assert sum(f"SGD hardly moves {method}'s predictors" in str(w.message) for w in caught) == said
