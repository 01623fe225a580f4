"""backbone_lr_scale and freeze_backbone: how far everything but the pruner moves, compared with a run without them."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex.callbacks import TokenPruning
from tests.callbacks.modules import Plain, loader, snapshot, trainer


class Recorder(L.Callback):
    """Parameters before the first batch and after every batch; random numbers begin anew with each batch."""

    def __init__(self):
        self.at = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.at:
            self.at.append(snapshot(pl_module))
        torch.manual_seed(trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.at.append(snapshot(pl_module))


def fit(folder, module, method="dynamicvit", *, batches=1, scale=1.0, freeze=0.0, **options):
    recorder = Recorder()
    torch.manual_seed(0)
    callback = TokenPruning(method, keep_ratio=0.6, backbone_lr_scale=scale, freeze_backbone=freeze)
    run = trainer(folder, callback, recorder, limit_train_batches=batches, **options)
    run.fit(module, loader())
    return recorder.at


def moved(steps, first=0, last=-1):
    """Largest movement of backbone and pruner between two records."""
    change = {n: float((steps[last][n] - p).abs().max()) for n, p in steps[first].items()}
    return (
        max(v for n, v in change.items() if ".prunex." not in n),
        max((v for n, v in change.items() if ".prunex." in n), default=None),
    )


def compare(plain, scaled, scale, tolerance=1e-6):
    """After one step the backbone went ``scale`` of the plain run's way, the pruner all of it."""
    for name, start in plain[0].items():
        assert torch.equal(start, scaled[0][name]), name
        share = 1 if ".prunex." in name else scale
        wanted = start + share * (plain[-1][name] - start)
        assert torch.allclose(scaled[-1][name], wanted, rtol=0, atol=tolerance), name
        if share == 0:
            assert torch.equal(scaled[-1][name], start), name
        if share == 1:
            assert torch.equal(scaled[-1][name], plain[-1][name]), name


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("scale", [0.0, 0.01, 0.2, 0.7, 1.0])
def test_one_step_moves_the_backbone_by_its_share(tmp_path, optimiser, scale):
    plain = fit(tmp_path, Plain(optimiser=optimiser))
    scaled = fit(tmp_path, Plain(optimiser=optimiser), scale=scale)
    compare(plain, scaled, scale)
    assert moved(plain)[0] > 1e-4


def test_accumulation(tmp_path):
    options = {"batches": 4, "accumulate_grad_batches": 4}
    plain, scaled = (fit(tmp_path, Plain(), scale=s, **options) for s in (1.0, 0.1))
    compare(plain, scaled, 0.1)
    assert moved(scaled, 0, 3)[0] == 0.0


def test_clipping_and_mixed_precision(tmp_path):
    options = {"gradient_clip_val": 0.1, "precision": "bf16-mixed"}
    plain, scaled = (fit(tmp_path, Plain(), scale=s, **options) for s in (1.0, 0.1))
    compare(plain, scaled, 0.1)
    # SGD's step is the rate times gradients whose norm is 0.1 at most.
    assert 0 < moved(scaled)[0] < moved(plain)[0] < 1.01 * 0.1 * 0.1


class Scheduled(Plain):
    """A learning rate that falls to a third with every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 / 3) ** step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_a_scale_with_a_schedule_equals_a_smaller_learning_rate(tmp_path):
    """With SGD over several steps: the same as giving the backbone a parameter group of its own with lr x scale."""

    class Groups(Scheduled):
        def configure_optimizers(self):
            own = [p for n, p in self.named_parameters() if ".prunex." in n]
            rest = [p for n, p in self.named_parameters() if ".prunex." not in n]
            optimizer = torch.optim.SGD([{"params": own}, {"params": rest, "lr": 0.01 * 0.2}], 0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 / 3) ** step)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    wanted = fit(tmp_path, Groups(lr=0.01), batches=4)
    scaled = fit(tmp_path, Scheduled(lr=0.01), batches=4, scale=0.2)
    for name, value in wanted[-1].items():
        assert torch.allclose(scaled[-1][name], value, rtol=0, atol=2e-6), name


def test_evit_has_nothing_of_its_own_so_all_is_scaled(tmp_path):
    plain, scaled = (fit(tmp_path, Plain(), "evit", scale=s) for s in (1.0, 0.25))
    compare(plain, scaled, 0.25)
    backbone, own = moved(plain)
    assert own is None
    assert backbone > 0
    assert moved(scaled)[0] == pytest.approx(0.25 * backbone, rel=1e-3)


@pytest.mark.parametrize(
    ("freeze", "options", "frozen"),
    [
        (0.5, {"batches": 4}, 2),
        (0.5, {"batches": 4, "max_epochs": 2}, 4),
        (0.3, {"batches": 4}, 2),
        (0.2, {"batches": 4}, 1),
        (0.5, {"batches": 4, "accumulate_grad_batches": 2}, 2),
        (0.4, {"max_epochs": -1, "max_steps": 5, "batches": 4}, 2),
        (1.0, {"batches": 4}, 4),
    ],
)
def test_frozen_for_a_fraction_then_released(tmp_path, freeze, options, frozen):
    steps = fit(tmp_path, Plain(), freeze=freeze, **options)
    held = moved(steps, 0, frozen)
    assert held[0] == 0.0  # bit for bit
    assert held[1] > 1e-4
    if frozen + 1 < len(steps):
        released = moved(steps, frozen, -1)
        assert released[0] > 1e-4
        # from the first step after the release on, not one later
        window = options.get("accumulate_grad_batches", 1)
        assert moved(steps, frozen, frozen + window)[0] > 1e-4


def test_frozen_then_scaled(tmp_path):
    """Released parameters take their share of the step, with the step's own gradient."""
    plain = fit(tmp_path, Plain(), freeze=0.5, batches=2)
    scaled = fit(tmp_path, Plain(), freeze=0.5, scale=0.1, batches=2)
    assert all(torch.equal(plain[1][n], v) for n, v in scaled[1].items())
    compare(plain[1:], scaled[1:], 0.1)


def test_two_optimisers_step_several_times_in_one_batch_by_hand(tmp_path):
    seen = []

    class Alternating(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second, first):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                before = snapshot(self)
                gradients = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
                optimizer.step()
                seen.append((optimizer is second, before, gradients, snapshot(self)))

        def configure_optimizers(self):
            head = list(self.vit.head.parameters())
            rest = [p for n, p in self.named_parameters() if ".head." not in n]
            return [torch.optim.SGD(rest, 0.1), torch.optim.SGD(head, 0.5)]

    fit(tmp_path, Alternating(), "evit", scale=0.2, batches=2)
    assert len(seen) == 6
    for is_head, before, gradients, after in seen:
        for name, p in before.items():
            rate = (0.5 if is_head else 0.1) if (".head." in name) == is_head else 0.0
            wanted = p - 0.2 * rate * gradients[name] if rate else p
            assert torch.allclose(after[name], wanted, rtol=0, atol=1e-6), name


def test_a_skipped_step_leaves_everything_and_the_next_one_counts(tmp_path):
    """As a gradient scaler does on overflow: hooks ran, the optimiser's step did not."""

    class Skips(Plain):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx == 0:
                optimizer_closure()  # gradients, but no step
                optimizer.zero_grad()
            else:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    steps = fit(tmp_path, Skips(), scale=0.1, batches=2)
    assert moved(steps, 0, 1) == (0.0, 0.0)
    backbone, own = moved(steps, 1, 2)
    assert 0 < backbone < own


def test_an_optimiser_that_evaluates_the_closure_several_times(tmp_path):
    class Quasi(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3, max_eval=3)

    plain, scaled = (fit(tmp_path, Quasi(), "evit", scale=s) for s in (1.0, 0.5))
    compare(plain, scaled, 0.5)
    assert moved(plain)[0] > 0
    assert moved(scaled)[0] == pytest.approx(0.5 * moved(plain)[0], rel=1e-3)


def test_hooks_leave_with_the_training(tmp_path):
    module = Plain()
    callback = TokenPruning("evit", backbone_lr_scale=0.1)
    run = trainer(tmp_path, callback, limit_train_batches=1)
    run.fit(module, loader())
    optimizer = run.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert callback._before == []


def test_no_copies_are_made_when_nothing_is_held_back(tmp_path):
    optimizers = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            optimizers.append(len(trainer.optimizers[0]._optimizer_step_pre_hooks))

    trainer(tmp_path, TokenPruning("evit"), Look(), limit_train_batches=1).fit(Plain(), loader())
    assert optimizers == [0]


def test_the_module_is_pruned_in_all_this(tmp_path):
    module = Plain()
    fit(tmp_path, module, scale=0.0)
    assert prunex.attached(module).counts() == [9, 5, 3]
