"""MaskPruning: stages by progress, what moves in which, removal in the running training, resume, refusals."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex.callbacks import MaskPruning, TokenPruning, load_from_checkpoint
from prunex.callbacks.layers import put_round
from tests.callbacks.modules import Plain, Seeded, csv_logger, loader, metrics, trainer

OPTIONS = {"budget": 0.6, "masks": 0.25, "thresholds": 0.25, "threshold_lr": 0.6, "options": {"min_channels": 4}}


class Stages(L.Callback):
    """At every batch's end: the stage, copies of weights and masks, gradients of nothing left behind."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        units = prunex.attached(pl_module, units=True)
        own = {n: p.detach().clone() for n, p in units.model.named_parameters()}
        learned = {n: b.detach().clone() for n, b in units.pruner.named_buffers()}
        stage = getattr(units.pruner, "stage", None)
        self.seen.append((stage, own, learned, units.removed))


def fit(folder, module=None, method="xpruner", epochs=4, more=(), **options):
    module = Plain(seed=1) if module is None else module
    stages = Stages()
    callback = MaskPruning(method, **(OPTIONS if method == "xpruner" else {"budget": 0.6}) | options)
    run = trainer(folder, *more, callback, stages, max_epochs=epochs)
    torch.manual_seed(0)
    run.fit(module, loader(), loader(8))
    return module, stages.seen, callback


def test_stages_come_in_order_and_each_moves_its_own(tmp_path):
    module, seen, _ = fit(tmp_path)
    assert [s for s, *_ in seen] == ["masks"] * 4 + ["thresholds"] * 4 + ["done"] * 8
    start = dict(Plain(seed=1).vit.named_parameters())
    for stage, weights, learned, _ in seen[:4]:  # masks move, weights do not
        assert all(torch.equal(weights[n], p) for n, p in start.items()), stage
        assert not torch.equal(learned["mask_0_heads"], torch.ones_like(learned["mask_0_heads"]))
        assert bool((learned["thresholds"] == 0).all())
    masks, searched = seen[3][2], seen[7]
    assert all(torch.equal(searched[2][n], v) for n, v in masks.items() if n.startswith("mask_"))
    assert bool((searched[2]["thresholds"] != 0).all())
    assert float(searched[2]["thresholds"].mean()) > 0
    assert not torch.equal(searched[1]["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])
    assert not searched[3]
    assert all(removed for *_, removed in seen[8:])
    assert seen[8][1]["blocks.0.mlp.fc1.weight"].shape[0] < start["blocks.0.mlp.fc1.weight"].shape[0]
    assert all(p.requires_grad for p in module.parameters())
    assert "training_step" not in vars(module)


def test_the_budget_is_met_and_the_slim_model_computes_the_same(tmp_path):
    module, _, _ = fit(tmp_path)
    dense = prunex.cost(Plain().vit).macs
    assert prunex.cost(module.vit).macs == pytest.approx(0.6 * dense, rel=0.01)
    small, x = prunex.slim(module), torch.randn(2, 3, 32, 32)
    module.eval()
    assert (small(x) - module(x)).abs().max() < 1e-6
    assert not hasattr(small, "prunex_units")


def test_removing_changes_nothing_but_the_size(tmp_path):
    """Hard gates to the end, or units taken out and the optimiser cut: the same weights after the same steps."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    narrow, _, _ = fit(tmp_path / "a", Plain(seed=1, lr=0.05))
    wide, _, _ = fit(tmp_path / "b", Plain(seed=1, lr=0.05), remove=False)
    units = prunex.attached(wide, units=True)
    assert not units.removed
    units.remove()
    for (name, p), q in zip(narrow.vit.named_parameters(), wide.vit.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


def test_momenta_follow_their_units(tmp_path):
    module = Plain(seed=1, optimiser="adamw", lr=1e-3)
    fit(tmp_path, module)
    optimiser = module.trainer.optimizers[0]
    assert {id(p) for g in optimiser.param_groups for p in g["params"]} == {id(p) for p in module.parameters()}
    for p, state in optimiser.state.items():
        assert state["exp_avg"].shape == p.shape
        assert int(state["step"]) == 12  # none in the first stage, all since


def test_labels_are_counted_and_the_table_is_there(tmp_path):
    module, _, _ = fit(tmp_path)
    table = prunex.attached(module, units=True).relevance_table()
    assert table.updates.tolist() == [4, 3, 3, 3, 3]  # one epoch of 16 labels 0..4
    assert table.heads[0].shape == (5, 3)
    assert set(table.rows()[0]) == {"class", "block", "head", "relevance", "kept", "updates"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_tokens_and_units_share_a_budget_whatever_the_order(tmp_path, order):
    both = [TokenPruning("evit", budget=0.8), MaskPruning("xpruner", **OPTIONS | {"budget": 0.45})]
    module = Plain(seed=1)
    torch.manual_seed(0)
    run = trainer(tmp_path, *(both[i] for i in order), max_epochs=4, logger=csv_logger(tmp_path))
    run.fit(module, loader(), loader(8))
    dense = prunex.cost(Plain().vit).macs
    assert prunex.cost(module.vit).macs == pytest.approx(0.45 * dense, rel=0.02)
    assert prunex.attached(module).trace.kept().shape[1:] == (4, 4)
    assert metrics(run.log_dir)["prunex/gmacs"][-1] == pytest.approx(prunex.cost(module.vit).gmacs, rel=1e-4)
    small, x = prunex.slim(module), torch.randn(3, 3, 32, 32)
    module.eval()
    assert (small(x) - module(x)).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["magnitude", "taylor", "random"])
def test_other_criteria_look_once_and_fine_tune_the_rest(tmp_path, method):
    module, seen, _ = fit(tmp_path, method=method, epochs=2, start=0.5)
    assert [removed for *_, removed in seen] == [False] * 4 + [True] * 4
    dense = prunex.cost(Plain().vit).macs
    assert prunex.cost(module.vit).macs == pytest.approx(0.6 * dense, rel=0.02)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, stop):
    """Interrupted while masks are learned, while thresholds are, and after the units were removed."""
    whole = Seeded(seed=1, optimiser="adamw", lr=1e-3)
    trainer(tmp_path / "whole", MaskPruning(**OPTIONS), max_epochs=4).fit(whole, loader())
    first = Seeded(seed=1, optimiser="adamw", lr=1e-3)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == stop:
                trainer.should_stop = True

    run = trainer(tmp_path / "a", MaskPruning(**OPTIONS), Stop(), max_epochs=4)
    run.fit(first, loader())
    assert prunex.attached(first, units=True).removed == (stop == 3)
    path = tmp_path / "stopped.ckpt"
    run.save_checkpoint(path)
    second = Seeded(seed=7, optimiser="adamw", lr=1e-3)
    trainer(tmp_path / "b", MaskPruning(**OPTIONS), max_epochs=4).fit(second, loader(), ckpt_path=path)
    for (name, p), q in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("remove", [True, False])
def test_a_checkpoint_opens_without_the_callback(tmp_path, remove):
    module, _, _ = fit(tmp_path, remove=remove)
    path = tmp_path / "last.ckpt"
    module.trainer.save_checkpoint(path)
    again = load_from_checkpoint(Plain, str(path))
    module.eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), module(x))
    assert prunex.attached(again, units=True).removed == remove


def test_validation_sees_the_model_that_would_be_exported(tmp_path):
    class Look(L.Callback):
        found: list = []

        def on_validation_epoch_end(self, trainer, pl_module):
            x = torch.ones(1, 3, 32, 32)
            with torch.no_grad():
                self.found.append((pl_module(x), prunex.slim(pl_module)(x), prunex.cost(pl_module.vit).macs))

    look = Look()
    fit(tmp_path, more=[look])
    dense = prunex.cost(Plain().vit).macs
    assert look.found[0][2] == dense
    assert look.found[-1][2] < 0.61 * dense
    for shown, slimmed, _ in [look.found[0], *look.found[2:]]:
        assert (shown - slimmed).abs().max() < 1e-6


def test_layers_come_off_in_any_order():
    module = Plain()
    calls = []

    def layer(name, beneath, *args):
        calls.append(name)
        return beneath(*args)

    own = type(module).training_step
    for first in (0, 1):
        undo = [put_round(module, "training_step", lambda b, *a, n=n: layer(n, b, *a)) for n in ("inner", "outer")]
        calls.clear()
        module.training_step((torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)), 0)
        assert calls == ["outer", "inner"]
        undo[first]()
        calls.clear()
        module.training_step((torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)), 0)
        assert calls == [("outer", "inner")[first]]
        undo[1 - first]()
        assert "training_step" not in vars(module)
        assert module.training_step.__func__ is own


class NoLabels(Plain):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "evit"}, "prunes tokens"),
        ({"method": "xprunr"}, "did you mean"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"masks": 0.8, "thresholds": 0.4}, "more than the whole"),
        ({"masks": -0.1}, "masks=-0.1"),
        ({"options": {"roundto": 8}}, "round_to"),
        ({"remove": "no"}, "remove='no'"),
        ({"images": 0}, "images=0"),
        ({"mask_lr": -1}, "mask_lr"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, told):
    with pytest.raises(prunex.PrunexError, match=told):
        MaskPruning(**options)


def test_refusals_of_a_training(tmp_path):
    def refused(told, module=None, callbacks=None, batches=None, **kwargs):
        module = Plain() if module is None else module
        with pytest.raises(prunex.PrunexError, match=told):
            trainer(tmp_path, *(callbacks or [MaskPruning(**OPTIONS)]), **kwargs).fit(module, batches or loader())
        assert "training_step" not in vars(module)
        assert all(p.requires_grad for p in module.parameters())

    refused("has no end", max_epochs=-1)
    refused("out of reach", callbacks=[MaskPruning(budget=0.001)])
    refused("no supported ViT", module=NoViT())
    by_hand = Plain()
    by_hand.automatic_optimization = False
    refused("optimises by hand", module=by_hand)
    images = torch.utils.data.DataLoader(torch.randn(8, 3, 32, 32), 4)
    refused("holds none", module=NoLabels(), batches=[(b,) for b in images])
    pruned = Plain()
    prunex.attach(pruned.vit, "xpruner", budget=0.7)
    refused("already with budget=0.7", module=pruned)
    other = Plain()
    prunex.attach(other.vit, "random", budget=0.6)
    refused("has random attached already", module=other)


class NoViT(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3 * 32 * 32, 5)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
