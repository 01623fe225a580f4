"""Sixty foreign modules: each ends in the right numbers, a refusal before the first optimiser step, or one warning.

What is right is computed slowly and without prunex (``reference.py``): tokens counted at the final norm, Top-K as a
mask over the dense model, DynamicViT's loss from what was drawn, torch's count of multiply-adds, reloaded logits.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.optim.optimizer import register_optimizer_step_post_hook

import prunex
from prunex import PrunexError
from prunex.callbacks import (
    KeptTokenMonitor,
    MaskPruning,
    RelevancyMonitor,
    SlimExport,
    TokenPruning,
    load_from_checkpoint,
)
from tests.foreign import modules as m
from tests.foreign.reference import Draws, multiply_adds, patches_left, topk_logits

KEEP = 0.5
PATCHES = 16


@dataclass
class Case:
    """One module, what is asked of it, and how it has to end.

    Attributes:
        module: Its class.
        method: Of TokenPruning, or of MaskPruning.
        ends: "right", or a word that the refusal or the warning has to hold.
        data: Makes loaders or a data module.
        trainer: Arguments of the Trainer.
        callbacks: Makes further callbacks.
    """

    module: type
    method: str
    ends: str = "right"
    data: Any = m.pairs
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Any = tuple

    def __str__(self):
        more = [self.data.__name__] * (self.data is not m.pairs) + list(map(str, self.trainer.values()))
        more += [type(c).__name__ for c in self.callbacks()]
        return "-".join([self.module.__name__, self.method, *more])


def monitors():
    return (KeptTokenMonitor(2), RelevancyMonitor(["generic_attention"], 2))


def export():
    return (SlimExport("export", formats=[]),)


def everything():
    return (*monitors(), *export())


HOLD = [m.Foreign, m.Normalises, m.Resizes, m.HeadAfter, m.Remaps, m.InDict, m.InSequential, m.Configured, m.Nested]
HOLD += [m.TwoNames, m.Student, m.Features, m.Half, m.Checkpointed]
TRAIN = [m.DictLoss, m.TwoViews, m.PseudoLabels, m.LooksInEval, m.SkipsSteps, m.Mixes, m.Named]

TOKENS = [
    *(Case(module, "topk") for module in HOLD),
    *(Case(module, "dynamicvit", callbacks=export) for module in HOLD),
    *(Case(module, "dynamicvit") for module in TRAIN),
    Case(m.Foreign, "evit", callbacks=everything),
    Case(m.Normalises, "evit", callbacks=everything),
    Case(m.Remaps, "dynamicvit", callbacks=everything),
    Case(m.Hooked, "topk"),
    Case(m.ByHand, "evit"),
    Case(m.TwoOptimizers, "topk"),
    Case(m.Closures, "dynamicvit"),
    Case(m.Assigned, "evit", callbacks=export),
    Case(m.FourChannels, "evit", callbacks=everything),
    Case(m.FloatsInStep, "evit", data=m.bytes_, callbacks=monitors),
    Case(m.ByKey, "dynamicvit", data=m.dicts, callbacks=monitors),
    Case(m.Foreign, "evit", data=m.Hooks, callbacks=everything),
    Case(m.Foreign, "evit", data=m.Odd, callbacks=everything, ends="class"),
    Case(m.Foreign, "dynamicvit", trainer={"accumulate_grad_batches": 2}),
    Case(m.Foreign, "dynamicvit", trainer={"precision": "bf16-mixed"}),
]
UNITS = [
    Case(m.Foreign, "xpruner"),
    Case(m.InDict, "xpruner"),
    Case(m.ByKey, "xpruner", data=m.dicts),
    Case(m.Foreign, "xpruner", data=m.Hooks),
    Case(m.Normalises, "taylor"),
    Case(m.Configured, "taylor"),
    Case(m.Student, "magnitude"),
    Case(m.ByKey, "taylor", data=m.dicts),
    Case(m.Foreign, "taylor", data=m.Hooks),
    Case(m.TwoNames, "relevance"),
]
LOUD = [
    Case(m.WalksBlocks, "evit", "forward", callbacks=export),
    Case(m.WalksBlocks, "dynamicvit", "forward"),
    Case(m.RunsAnother, "topk", "did not run"),
    Case(m.Hidden, "evit", "ViT"),
    Case(m.Ambiguous, "evit", "ViTs"),
    Case(m.Subclassed, "evit", "OwnForward"),
    Case(m.EarlyOptimizer, "dynamicvit", "optimi"),
    Case(m.ByGroups, "dynamicvit", "optimi"),
    Case(m.FreezesAll, "dynamicvit", "predictors"),
    Case(m.Probes, "dynamicvit", "gradient"),
    Case(m.ByHand, "dynamicvit", "by hand"),
    Case(m.HeadOfItsOwn, "evit", "reset_classifier", callbacks=export),
    Case(m.Pools, "dynamicvit", "mask"),
    Case(m.OwnAverage, "magnitude", "average|copy|size|shape"),
    Case(m.Foreign, "xpruner", "label", data=m.unnamed),
    Case(m.Foreign, "taylor", "label", data=m.unnamed),
]


def fit(case, folder, module=None):
    """Train two epochs; the module, its Trainer, and what was said meanwhile."""
    module = case.module() if module is None else module
    if case in UNITS or case.method in ("xpruner", "taylor", "magnitude", "relevance"):
        options = {"masks": 0.25, "thresholds": 0.25} if case.method == "xpruner" else {"images": 16}
        prunes = MaskPruning(case.method, budget=0.7, model=module.path, **options)
    else:
        options = {"teacher": False} if case.method == "dynamicvit" else {}
        prunes = TokenPruning(case.method, keep_ratio=KEEP, stages=[1, 2, 3], model=module.path, options=options)
    backwards = Backwards()
    extra = list(case.callbacks())
    for callback in extra:
        callback.model = module.path
        if isinstance(callback, SlimExport):
            callback.folder = folder / "export"
    trainer = Trainer(
        max_epochs=2,
        callbacks=[prunes, *extra, backwards],
        logger=False,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **case.trainer,
    )
    data = case.data()
    loaders = {"datamodule": data} if isinstance(data, LightningDataModule) else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, **(loaders or {"train_dataloaders": data, "val_dataloaders": data}))
    return module, trainer, [str(w.message) for w in said], backwards


class Backwards(Callback):
    """Every loss that goes backward."""

    def __init__(self):
        self.losses = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(float(loss.detach()))


@pytest.mark.parametrize("case", TOKENS, ids=str)
def test_pruned_tokens_are_right(case, tmp_path, monkeypatch):
    draws = Draws(monkeypatch)
    torch.manual_seed(0)
    module = case.module()
    module, trainer, said, backwards = fit(case, tmp_path, module)
    vit = module.backbone()
    assert case.ends == "right" or any(case.ends in line for line in said), said
    trained_by_hand(case, module, trainer, draws, backwards)
    module.eval()
    images = m.pictures(4, seed=1)
    seen = []
    hook = vit.norm.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    with torch.no_grad():
        logits = module(images)
    hook.remove()
    assert seen == [1 + patches_left(PATCHES, KEEP, case.method)]
    if case.method == "topk":
        run = slow_topk(module, vit)
        torch.testing.assert_close(logits, module.surround(run, images), atol=1e-4, rtol=1e-4)
    inner = torch.randn(1, vit.patch_embed.proj.in_channels, 32, 32)
    if "prunex/gmacs" in trainer.callback_metrics:
        counted = multiply_adds(vit, inner)
        assert float(trainer.callback_metrics["prunex/gmacs"]) * 1e9 == pytest.approx(counted, rel=0.01)
    path = tmp_path / "last.ckpt"
    for weights_only in (False, True):
        trainer.save_checkpoint(path, weights_only=weights_only)
        again = load_from_checkpoint(case.module, str(path))
        with torch.no_grad():
            torch.testing.assert_close(again(images), logits)
    if any(isinstance(c, RelevancyMonitor) for c in trainer.callbacks):
        watched_is_what_ran(case, module, tmp_path)
    if any(isinstance(c, SlimExport) for c in trainer.callbacks):
        small = prunex.load(tmp_path / "export" / "slim")
        with torch.no_grad():
            torch.testing.assert_close(small(inner), vit(inner), atol=1e-5, rtol=1e-5)


def slow_topk(module, vit):
    """A function that stands in for the ViT: the dense model under a mask."""
    if isinstance(vit.head, torch.nn.Identity):
        from tests.foreign.reference import tokens_after_topk

        return lambda x: tokens_after_topk(vit, x, KEEP)[0][:, 0].float()
    return lambda x: topk_logits(vit, x, KEEP, getattr(module, "scale", None))


def watched_is_what_ran(case, module, folder):
    """The monitors' last picture is of what entered the ViT, and of the classes that the whole module predicts."""
    data = case.data()
    hooked = isinstance(data, LightningDataModule)
    batch = next(iter(data.val_dataloader() if hooked else data))
    batch = data.on_after_batch_transfer(batch, 0) if hooked else batch
    entered = []
    hook = module.backbone().patch_embed.register_forward_hook(lambda _, args, __: entered.append(args[0][:2]))
    predicted = []
    after = module.register_forward_hook(lambda _, __, logits: predicted.append(logits[:2].argmax(1)))
    with torch.no_grad():
        module.validation_step(batch, 0)
    hook.remove()
    after.remove()
    written = np.load(folder / "maps" / "epoch=001.npz")
    assert written["target/generic_attention"].tolist() == predicted[0].tolist()
    assert written["predicted"].tolist() == predicted[0].tolist()
    assert written["labels"].tolist() == [0, 1]
    if module.surround.__func__ in (m.Foreign.surround, m.Normalises.surround, m.FourChannels.surround):
        maps = prunex.explain("generic_attention", module.backbone(), entered[0]).maps
        np.testing.assert_allclose(written["relevance/generic_attention"], maps, atol=1e-6)


def trained_by_hand(case, module, trainer, draws, backwards):
    """What the pruner brought is in an optimiser, has moved, and its loss is the one that was computed by hand."""
    brought = [p for name, p in module.named_parameters() if "prunex" in name]
    if case.method != "dynamicvit":
        assert not brought
        return
    stepped = [id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
    assert all(stepped.count(id(p)) == 1 for p in brought)
    assert all(p.grad is not None or p.requires_grad for p in brought)
    if str(trainer.precision) != "32-true" or case.module is m.Closures:
        return
    wanted = draws.ratio_losses(KEEP)
    views = len(wanted) // len(module.tasks)
    assert views >= 1
    assert len(wanted) == views * len(module.tasks)
    share = trainer.accumulate_grad_batches
    for step, (task, loss) in enumerate(zip(module.tasks, backwards.losses, strict=True)):
        added = sum(wanted[step * views : (step + 1) * views])
        assert loss * share == pytest.approx(float(task) + added, rel=1e-4)


@pytest.mark.parametrize("case", UNITS, ids=str)
def test_pruned_units_are_right(case, tmp_path):
    torch.manual_seed(0)
    module, trainer, _, _ = fit(case, tmp_path)
    vit, images = module.backbone().eval(), m.pictures(4, seed=1)
    module.eval()
    with torch.no_grad():
        logits = vit(images)
    dense = multiply_adds(m.vit(), images[:1])
    assert multiply_adds(vit, images[:1]) <= 0.7 * dense * 1.005
    assert float(trainer.callback_metrics["prunex/gmacs"]) * 1e9 == pytest.approx(
        multiply_adds(vit, images[:1]), rel=0.01
    )
    live = {id(p) for p in vit.parameters()}
    stepped = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    assert live - stepped <= {id(p) for n, p in vit.named_parameters() if "prunex" in n}
    handle = prunex.attached(module, module.path, units=True)
    if case.method == "xpruner":  # every class of the labels was seen, and no more often than it came
        assert handle.pruner.updates.bool().all()
    for weights_only in (False, True):
        trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
        again = load_from_checkpoint(case.module, str(tmp_path / "last.ckpt"))
        with torch.no_grad():
            torch.testing.assert_close(again.backbone()(images), logits)
    prunex.save(prunex.slim(vit), tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(prunex.load(tmp_path / "small")(images), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", LOUD, ids=str)
def test_what_cannot_be_right_is_said(case, tmp_path):
    torch.manual_seed(0)
    module = case.module()
    stepped = []
    hook = register_optimizer_step_post_hook(lambda *_: stepped.append(1))
    try:
        said = fit(case, tmp_path, module)[2]
    except PrunexError as error:
        said = [str(error)]
        assert not stepped, "refused only after training had begun"
    finally:
        hook.remove()
    words = case.ends.split("|")
    assert any(word in line for line in said for word in words), said


def test_there_are_sixty():
    assert len(TOKENS) + len(UNITS) + len(LOUD) >= 60
