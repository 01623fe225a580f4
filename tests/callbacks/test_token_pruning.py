"""TokenPruning around a user's unmodified LightningModule: what is trained, added, scheduled and logged."""

import lightning as L
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

import prunex
from prunex import PrunexError
from prunex.callbacks import TokenPruning
from prunex.callbacks.token_pruning import decisions
from tests.callbacks.modules import Plain, csv_logger, data, loader, metrics, snapshot, trainer
from tests.vits import tiny


def by_hand(method, batches, lr=0.1, accumulate=1, clip=None, autocast=False, **options):
    """The same training without Lightning: the loss, the pruner's losses, SGD. Gives the module and the losses."""
    module = Plain()
    torch.manual_seed(0)
    pruning = prunex.attach(module, method, **options)
    optimizer = torch.optim.SGD(module.parameters(), lr)
    losses = []
    for i, (x, y) in enumerate(batches):
        if i == 0:
            torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(module(x), y)
            for value in pruning.losses().values():
                loss = loss + value
        losses.append(loss.item())
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return module, losses


class SeedAtStart(L.Callback):
    """Random numbers begin anew with the first batch (the loader has drawn its own by then)."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0 and batch_idx == 0:
            torch.manual_seed(7)


class Watch(L.Callback):
    """What each batch returned, and the schedule's state in it."""

    def __init__(self):
        self.losses, self.progress, self.validated = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.progress.append(prunex.attached(pl_module).progress)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_validation_epoch_start(self, trainer, pl_module):
        self.validated.append(prunex.attached(pl_module).progress)


def same(a, b, tolerance=0.0):
    a, b = snapshot(a), snapshot(b)
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= tolerance, name


CASES = {
    "tensor": ({}, {}),
    "dict": ({"returns": "dict"}, {}),
    "accumulated": ({}, {"accumulate_grad_batches": 2}),
    "clipped": ({}, {"gradient_clip_val": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["dynamicvit", "evit", "topk"])
def test_trains_as_the_same_loop_by_hand(tmp_path, method, case):
    arguments, options = CASES[case]
    module, watch = Plain(**arguments), Watch()
    run = trainer(tmp_path, TokenPruning(method, keep_ratio=0.6), SeedAtStart(), watch, **options)
    torch.manual_seed(0)
    run.fit(module, loader())
    torch.manual_seed(0)
    accumulate = options.get("accumulate_grad_batches", 1)
    wanted, losses = by_hand(
        method, loader(), accumulate=accumulate, clip=options.get("gradient_clip_val"), keep_ratio=0.6
    )
    same(module, wanted, 1e-7)
    assert watch.losses == pytest.approx([v / accumulate for v in losses], rel=1e-6)
    start = snapshot(Plain())
    assert all(not torch.equal(p, start[n]) for n, p in module.named_parameters() if n in start and "k_norm" not in n)


def test_dynamicvit_losses_are_really_in_the_loss_and_reach_the_predictors(tmp_path):
    module, plain = Plain(), Plain()
    watch = Watch()
    trainer(tmp_path, TokenPruning("dynamicvit", keep_ratio=0.3), watch, limit_train_batches=1).fit(module, loader())
    own = dict(module.vit.prunex.named_parameters())
    assert len(own) == 3 * 10
    assert watch.losses[0] > float(F.cross_entropy(plain(data()[0][:4]), data()[1][:4])) - 1
    fresh = Plain()
    torch.manual_seed(0)
    assert set(dict(fresh.named_parameters())) < set(dict(module.named_parameters()))


def test_bfloat16_mixed_precision(tmp_path):
    module, watch = Plain(), Watch()
    run = trainer(tmp_path, TokenPruning("dynamicvit", keep_ratio=0.6), SeedAtStart(), watch, precision="bf16-mixed")
    torch.manual_seed(0)
    run.fit(module, loader())
    wanted, losses = by_hand("dynamicvit", loader(), autocast=True, keep_ratio=0.6)
    same(module, wanted, 1e-6)
    assert watch.losses == pytest.approx(losses, rel=1e-5)
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_true_bfloat16_trains_and_validates(tmp_path):
    module = Plain()
    trainer(tmp_path, TokenPruning("dynamicvit"), precision="bf16-true").fit(module, loader(), loader(8))
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in module.parameters())


def test_a_step_that_returns_none_takes_no_step(tmp_path):
    module, watched = Plain(returns="none"), []

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            watched.append(trainer.global_step)
            assert not prunex.attached(pl_module)._attached.steps.take()  # its graph was let go

    trainer(tmp_path, TokenPruning("dynamicvit"), Steps()).fit(module, loader())
    assert watched == [1, 1, 2, 2] or watched == [1, 2, 3, 4]  # Lightning counts a skipped closure as a step
    same_as = Plain(returns="none")
    assert not torch.equal(module.vit.pos_embed, same_as.vit.pos_embed)


def test_a_loss_of_another_kind_is_told(tmp_path):
    class Odd(Plain):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return {"total": 1}

    with pytest.raises(PrunexError, match="returned dict: give the loss as a tensor"):
        trainer(tmp_path, TokenPruning("dynamicvit")).fit(Odd(), loader())


# ------------------------------------------------------------------------------------------------ finding the model


class Two(Plain):
    """A student and a frozen other ViT."""

    def __init__(self):
        super().__init__()
        self.other = tiny(seed=4)


def test_two_models_need_a_path_and_the_path_is_followed(tmp_path):
    with pytest.raises(PrunexError, match=r"Two holds 2 timm ViTs .*'net.backbone.0', 'other'.*model="):
        trainer(tmp_path, TokenPruning("evit")).fit(Two(), loader())
    module = Two()
    trainer(tmp_path, TokenPruning("evit", model="net.backbone"), limit_train_batches=1).fit(module, loader())
    assert hasattr(module.vit, "prunex")
    assert not hasattr(module.other, "prunex")


def test_no_model_and_a_wrong_path_are_told(tmp_path):
    class Empty(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

    with pytest.raises(PrunexError, match="no supported ViT in .*Empty"):
        trainer(tmp_path, TokenPruning("evit")).fit(Empty(), loader())
    with pytest.raises(PrunexError, match="model='net.nothing' does not exist in Plain"):
        trainer(tmp_path, TokenPruning("evit", model="net.nothing")).fit(Plain(), loader())


def test_a_headless_model_under_the_users_own_head(tmp_path):
    class Own(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.features, self.head = tiny(num_classes=0).train(), nn.Linear(48, 5)

        def training_step(self, batch):  # Lightning lets a step leave batch_idx out
            return F.cross_entropy(self.head(self.features.forward_features(batch[0])[:, 0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Own()
    run = trainer(tmp_path, TokenPruning("dynamicvit"), logger=csv_logger(tmp_path))
    run.fit(module, loader())
    assert {n for n in metrics(run.log_dir) if "loss" in n} == {"prunex/loss_ratio", "prunex/loss_tokens"}


class Later(L.LightningModule):
    """Builds its ViT in ``configure_model``, as large models do."""

    def __init__(self):
        super().__init__()
        self.vit = None

    def configure_model(self):
        if self.vit is None:
            self.vit = tiny().train()

    training_step = Plain.training_step
    validation_step = Plain.validation_step

    def forward(self, x):
        return self.vit(x)

    @property
    def hparams(self):
        return type("H", (dict,), {"returns": "tensor"})()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_model_built_in_configure_model(tmp_path):
    module, callback = Later(), TokenPruning("dynamicvit", keep_ratio=0.6)
    run = trainer(tmp_path, callback)
    run.fit(module, loader(), loader(8))
    assert prunex.attached(module).counts() == [9, 5, 3]
    inside = {id(p) for g in run.optimizers[0].param_groups for p in g["params"]}
    assert {id(p) for p in module.vit.prunex.parameters()} <= inside
    assert "configure_model" not in vars(module)
    run.validate(module, loader(8), verbose=False)


# -------------------------------------------------------------------------------------------- parameters and names


def test_the_optimiser_gets_the_predictors_and_not_the_teacher(tmp_path):
    module = Plain()
    dense = list(module.state_dict())
    run = trainer(tmp_path, TokenPruning("dynamicvit"), limit_train_batches=1)
    run.fit(module, loader())
    teacher = module.vit.prunex.pruner._teacher[0]
    inside = {id(p) for g in run.optimizers[0].param_groups for p in g["params"]}
    assert {id(p) for p in module.vit.prunex.parameters()} <= inside
    hidden = {id(p) for p in teacher.parameters()}
    assert hidden
    assert not hidden & ({id(p) for p in module.parameters()} | inside)
    names = list(module.state_dict())
    assert [n for n in names if ".prunex." not in n] == dense
    assert all(n.startswith("net.backbone.0.prunex.dynamicvit.predictors.") for n in names if ".prunex." in n)
    assert sum(p.numel() for p in module.parameters()) < 2 * sum(p.numel() for p in teacher.parameters())
    assert all(not p.requires_grad for p in teacher.parameters())
    start = Plain().vit
    for (n, p), q in zip(start.named_parameters(), teacher.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_hyperparameters_called_pruning(tmp_path):
    class Rebuilds(Plain):
        rebuilds_pruning = True

        def __init__(self, pruning=None):
            super().__init__()
            self.save_hyperparameters()

    module = Rebuilds()
    trainer(tmp_path, TokenPruning("evit"), limit_train_batches=1).fit(module, loader())
    assert module.hparams["pruning"] == prunex.attached(module).spec
    module = Rebuilds(pruning=0.25)  # the user's own argument, which only shares the name
    trainer(tmp_path, TokenPruning("evit"), limit_train_batches=1).fit(module, loader())
    assert module.hparams["pruning"] == 0.25


# ------------------------------------------------------------------------------------------------ manual optimisation


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimisation_with_evit(tmp_path):
    module, watch = Manual(), Watch()
    watch.on_train_batch_end = lambda *_: None
    callback = TokenPruning("evit", keep_ratio=0.6, options={"fuse": False})
    run = trainer(tmp_path, callback, watch, logger=csv_logger(tmp_path))
    run.fit(module, loader())
    wanted, _ = by_hand("evit", loader(), keep_ratio=0.6, fuse=False)
    same(module, wanted, 1e-7)
    assert watch.progress == [0, 0.25, 0.5, 0.75]
    assert metrics(run.log_dir)["prunex/keep_ratio_stage3"] == pytest.approx([4 / 16])


def test_manual_optimisation_with_dynamicvit_is_refused_before_anything_changed(tmp_path):
    module = Manual()
    with pytest.raises(PrunexError, match="dynamicvit brings losses of its own, and this module optimises by hand"):
        trainer(tmp_path, TokenPruning("dynamicvit")).fit(module, loader())
    assert not hasattr(module.vit, "prunex")
    assert "training_step" not in vars(module)
    trainer(tmp_path, TokenPruning("dynamicvit")).validate(module, loader(8), verbose=False)  # no losses needed


def test_progress_counts_batches_where_two_optimisers_step_in_each(tmp_path):
    class Alternating(Manual):
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.01), torch.optim.SGD(self.vit.head.parameters(), 0.01)]

    watch = Watch()
    watch.on_train_batch_end = lambda *_: None
    trainer(tmp_path, TokenPruning("evit"), watch, max_epochs=2).fit(Alternating(), loader())
    assert watch.progress == [i / 8 for i in range(8)]


# --------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("options", "wanted", "validated"),
    [
        ({"max_epochs": 2}, [i / 8 for i in range(8)], [0.5, 1.0]),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75], [0.5, 1.0]),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, [0, 0, 0, 0.25, 0.5, 0.5, 0.5, 0.75], [0.5, 1.0]),
        ({"max_epochs": -1, "max_steps": 5}, [0, 0.2, 0.4, 0.6, 0.8], [0.8]),
        ({"max_epochs": 4, "max_steps": 6}, [i / 6 for i in range(6)], [4 / 6]),
        ({"max_epochs": 1, "limit_train_batches": 2}, [0, 0.5], [1.0]),
    ],
)
def test_progress(tmp_path, options, wanted, validated):
    watch = Watch()
    module = Plain()
    run = trainer(tmp_path, TokenPruning("evit"), watch, **options)
    run.fit(module, loader(), loader(4))
    assert watch.progress == pytest.approx(wanted)
    assert watch.validated == pytest.approx(validated)
    assert prunex.attached(module).progress == 1.0


def test_progress_with_accumulation_that_changes(tmp_path):
    watch, module = Watch(), Plain()
    run = trainer(tmp_path, TokenPruning("evit"), watch, GradientAccumulationScheduler({0: 1, 1: 2}), max_epochs=2)
    run.fit(module, loader())
    assert watch.progress == [0, 1 / 8, 2 / 8, 3 / 8, 0.5, 0.5, 0.75, 0.75]
    assert prunex.attached(module).progress == 1.0


def test_progress_of_a_run_without_known_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from zip(*data(8), strict=True)

    stream = torch.utils.data.DataLoader(Stream(), 4)
    watch, module = Watch(), Plain()
    trainer(tmp_path, TokenPruning("evit"), watch, max_epochs=2).fit(module, stream)
    assert watch.progress == [0, 0, 0.5, 0.5]
    assert prunex.attached(module).progress == 1.0

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 2

    watch = Watch()
    run = trainer(tmp_path, TokenPruning("evit", freeze_backbone=0.5), watch, Stop(), max_epochs=-1)
    with pytest.warns(UserWarning, match="this one has no end: nothing is frozen"):
        run.fit(Plain(), stream)
    assert watch.progress == [1, 1]


def test_an_early_stop_keeps_the_rates_in_force(tmp_path):
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    module = Plain()
    run = trainer(tmp_path, TokenPruning("evit", options={"shrink_length": 1.0}), Stop(), max_epochs=2)
    run.fit(module, loader(), loader(4))
    assert prunex.attached(module).progress == 0.5
    assert prunex.attached(module).counts() == prunex.slim(module).prunex.pruner.counts(16)


def test_evit_schedule_follows_and_is_logged(tmp_path):
    options = {"shrink_start": 0.25, "shrink_length": 0.5, "fuse": False}
    callback = TokenPruning("evit", keep_ratio=0.5, stages=[1, 2], options=options)
    run = trainer(tmp_path, callback, max_epochs=4, logger=csv_logger(tmp_path))
    run.fit(Plain(), loader(), loader(4))
    logged = metrics(run.log_dir)
    # rates at validation after each epoch: everything until a quarter, then the cosine, then the base
    rates = [1.0, 0.75, 0.5, 0.5]
    assert logged["prunex/val_keep_ratio_stage1"] == pytest.approx(rates)
    assert logged["prunex/val_keep_ratio_stage2"] == pytest.approx([1.0, 9 / 16, 0.25, 0.25])
    assert logged["prunex/keep_ratio_stage1"][0] == 1.0
    assert logged["prunex/keep_ratio_stage1"][3] == 0.5
    assert (
        logged["prunex/gmacs"][0] > logged["prunex/gmacs"][1] > logged["prunex/gmacs"][2] == logged["prunex/gmacs"][3]
    )


# --------------------------------------------------------------------------------------------------------------- logs


def test_logged_names_and_values(tmp_path):
    module = Plain()
    run = trainer(tmp_path, TokenPruning("dynamicvit", keep_ratio=0.5), SeedAtStart(), logger=csv_logger(tmp_path))
    torch.manual_seed(0)
    run.fit(module, loader(), loader(8))
    logged = metrics(run.log_dir)
    ours = {n for n in logged if n.startswith("prunex/")}
    stages = {f"prunex/{kind}keep_ratio_stage{s + 1}" for kind in ("", "val_") for s in range(3)}
    assert ours == stages | {"prunex/loss_ratio", "prunex/loss_distill", "prunex/loss_tokens", "prunex/gmacs"}
    assert [logged[f"prunex/val_keep_ratio_stage{s + 1}"] for s in range(3)] == [[0.5], [0.25], [0.125]]
    assert logged["prunex/gmacs"] == pytest.approx([prunex.cost(module).gmacs])
    # the same by hand
    hand = Plain()
    torch.manual_seed(0)
    pruning = prunex.attach(hand, "dynamicvit", keep_ratio=0.5)
    optimizer = torch.optim.SGD(hand.parameters(), 0.1)
    shares, parts = [], []
    for x, y in loader():
        if not parts:
            torch.manual_seed(7)
        loss = F.cross_entropy(hand(x), y)
        parts.append({k: float(v) for k, v in pruning.losses().items()})
        shares.append([float(r.mean()) for r in pruning.trace.keep_ratios()])
        optimizer.zero_grad()
        (loss + sum(pruning.losses().values())).backward()
        optimizer.step()
    for name in parts[0]:
        wanted = sum(p[name] for p in parts) / len(parts)
        assert logged[f"prunex/loss_{name}"] == pytest.approx([wanted], rel=1e-4)
    for s in range(3):
        wanted = sum(share[s] for share in shares) / len(shares)
        assert logged[f"prunex/keep_ratio_stage{s + 1}"] == pytest.approx([wanted], rel=1e-5)


def test_a_stage_that_keeps_everything_keeps_its_number(tmp_path):
    callback = TokenPruning("topk", keep_ratio=[1.0, 0.5, 1.0], stages=[1, 2, 3])
    run = trainer(tmp_path, callback, logger=csv_logger(tmp_path))
    module = Plain()
    run.fit(module, loader(), loader(8))
    logged = metrics(run.log_dir)
    for kind in ("", "val_"):
        assert [logged[f"prunex/{kind}keep_ratio_stage{s + 1}"] for s in range(3)] == [[1.0], [0.5], [0.5]]
    trace = prunex.attached(module).trace
    assert decisions(trace, [1, 2, 3]) == [None, 0, 0]


def test_the_batch_size_is_not_guessed_from_the_batch(tmp_path):
    class Wrapped(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch.x), batch.y)

    class Batch:
        def __init__(self, items):
            self.x, self.y = torch.stack([i[0] for i in items]), torch.stack([i[1] for i in items])

    images, labels = data(8)
    odd = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), 4, collate_fn=Batch)
    run = trainer(tmp_path, TokenPruning("dynamicvit"))
    run.fit(Wrapped(), odd)
    assert run.global_step > 0
    assert "prunex/loss_ratio" in run.callback_metrics


# ------------------------------------------------------------------------------------------------------------- errors


def test_arguments_are_checked_at_once():
    with pytest.raises(PrunexError, match="dynamicvit"):
        TokenPruning("dynamicvitt")
    for method in ("random", "xpruner"):
        with pytest.raises(
            PrunexError, match=f"{method} prunes attention heads and MLP channels: give it to MaskPruning"
        ):
            TokenPruning(method, keep_ratio=0.7)
    with pytest.raises(PrunexError, match="options='fuse' is not allowed: give a dict"):
        TokenPruning("evit", options="fuse")
    for bad in (-0.1, 1.1, "much", True, float("nan")):
        with pytest.raises(PrunexError, match=r"backbone_lr_scale=.* give a number in \[0, 1\]"):
            TokenPruning("evit", backbone_lr_scale=bad)
        with pytest.raises(PrunexError, match=r"freeze_backbone=.* give a number in \[0, 1\]"):
            TokenPruning("evit", freeze_backbone=bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_ratio": 0}, r"keep_ratio=0 is not allowed"),
        ({"stages": [9]}, r"stages=\(9,\) goes beyond"),
        ({"options": {"fusing": True}}, "fuse"),
    ],
)
def test_wrong_options_end_in_setup_and_change_nothing(tmp_path, arguments, message):
    module = Plain()
    with pytest.raises(PrunexError, match=message):
        trainer(tmp_path, TokenPruning("evit", **arguments)).fit(module, loader())
    assert not hasattr(module.vit, "prunex")
    assert "training_step" not in vars(module)


def test_an_unsupported_family_is_refused_by_name(tmp_path):
    class Convolutional(Plain):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model("resnet10t", num_classes=5)

    with pytest.raises(PrunexError, match="no supported ViT"):
        trainer(tmp_path, TokenPruning("evit")).fit(Convolutional(), loader())


def test_a_model_in_eval_mode_is_told(tmp_path):
    module = Plain()
    module.eval()
    with pytest.warns(UserWarning, match="the ViT is in eval mode"):
        trainer(tmp_path, TokenPruning("dynamicvit")).fit(module, loader())


def test_merging_trains_as_the_same_loop_by_hand_and_logs_tokens_left(tmp_path):
    module, watch = Plain(), Watch()
    callback = TokenPruning("tome", options={"r": 3})
    run = trainer(tmp_path, callback, SeedAtStart(), watch, logger=csv_logger(tmp_path))
    torch.manual_seed(0)
    run.fit(module, loader(), loader())
    torch.manual_seed(0)
    wanted, losses = by_hand("tome", loader(), r=3)
    same(module, wanted, 1e-7)
    assert watch.losses == pytest.approx(losses, rel=1e-6)
    logged = metrics(run.log_dir)
    for s, tokens in enumerate((13, 10, 7, 4)):
        assert logged[f"prunex/val_keep_ratio_stage{s + 1}"] == pytest.approx([tokens / 16])
        assert logged[f"prunex/keep_ratio_stage{s + 1}"] == pytest.approx([tokens / 16])
    assert logged["prunex/gmacs"] == pytest.approx([prunex.cost(module).gmacs])


def test_options_are_the_method_s_own_unless_given():
    assert TokenPruning("evit").options == {"keep_ratio": 0.7}
    assert TokenPruning("evit", keep_ratio=[0.5], stages=[1]).options == {"keep_ratio": [0.5], "stages": [1]}
    assert TokenPruning("tome", stages=[1, 2]).options == {"stages": [1, 2]}
    with pytest.raises(PrunexError, match="keep_ratio=0.7 is not allowed: tome has no such option") as caught:
        TokenPruning("tome", keep_ratio=0.7)
    assert "\n" not in str(caught.value)
