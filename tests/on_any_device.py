"""What holds on any device: tests/test_gpu.py runs all of it on a GPU, tests/test_on_the_cpu.py some of it here."""

import copy
import math

import lightning as L
import pytest
import torch

import prunex
from prunex.callbacks import ExactResume
from tests.callbacks.every import CASES, Module, batches
from tests.callbacks.modules import trainer
from tests.vits import images, largest, randomise, relative, tiny

# What learns with optimisers of its own, which know nothing of scaled gradients, and says so.
NOT_SCALED = {name for name in CASES if "xpruner" in name or "units" in name}
TOKEN_PRUNERS = {
    "topk": {}, "evit": {}, "dynamicvit": {}, "ia_red2": {}, "hvt": {}, "tome": {"r": 3}, "ppt": {"r": 3},
    "diffrate": {"keep_ratio": 0.7}, "patch_slimming": {"keep": [range(0, 16, 2)] * 3},
}  # fmt: skip


class Finite(L.Callback):
    """Looks at the losses, and at where the weights are."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer, module):
        kind = trainer.strategy.root_device.type
        assert {p.device.type for p in module.parameters()} == {kind}
        assert {b.device.type for b in module.buffers()} <= {kind}


def fit(folder, name, accelerator, epochs=2, checkpoint=None, callbacks=(), **options):
    """Train with the callbacks of that name, from the same seeds each time."""
    L.seed_everything(0, verbose=False)
    module = Module()
    kept = {"enable_checkpointing": True} if any(isinstance(c, ExactResume) for c in callbacks) else {}
    run = trainer(
        folder, *callbacks, *CASES[name](folder), accelerator=accelerator, max_epochs=epochs, **kept, **options
    )
    loader = batches()
    run.fit(module, loader, loader, ckpt_path=checkpoint)
    return module, run


def trains(folder, name, accelerator, precision):
    """Two epochs: every loss is finite, weights move and stay on the device; what cannot be scaled says so."""
    watch, before = Finite(), {n: p.clone() for n, p in Module().named_parameters()}
    if precision == "16-mixed" and name in NOT_SCALED:
        with pytest.raises(prunex.PrunexError, match="precision='16-mixed' scales gradients"):
            fit(folder, name, accelerator, precision=precision)
        return
    module, run = fit(folder, name, accelerator, precision=precision, callbacks=[watch])
    assert len(watch.losses) == 12
    assert all(map(math.isfinite, watch.losses))
    # What was learned is in float32, whatever was computed in.
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    after = dict(module.named_parameters())
    kept = [n for n, p in before.items() if n in after and after[n].shape == p.shape]
    moved = len(kept) < len(before) or any(not torch.equal(before[n], after[n].cpu()) for n in kept)
    learned = prunex.attached(module.vit)
    assert moved or (learned is not None and learned.pruner.freezes_model)
    module.eval()
    with torch.no_grad():
        assert torch.isfinite(module(images(2).to(module.device))).all()


def resumes(folder, name, accelerator, exact=True):
    """One epoch, and on from its checkpoint: the end is that of a run that nothing happened to."""
    whole, _ = fit(folder / "whole", name, accelerator, callbacks=[ExactResume()])
    with pytest.raises(Interrupted):
        fit(folder / "parts", name, accelerator, callbacks=[ExactResume(), Stop()])
    (last,) = (folder / "parts").rglob("last.ckpt")
    again, _ = fit(folder / "parts", name, accelerator, checkpoint=last, callbacks=[ExactResume()])
    wanted = whole.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    for key, value in again.state_dict().items():
        if exact:
            assert torch.equal(value, wanted[key]), key
        else:
            assert value.shape == wanted[key].shape, key
            assert relative(value.float(), wanted[key].float()) < 1e-3, key


class Interrupted(Exception):
    """What ends a run."""


class Stop(L.Callback):
    """Ends a run in its second epoch, as an interruption does."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.current_epoch == 1:
            raise Interrupted


def compiles(method, options, device, backend):
    """Compiled, logits and gradients are the eager ones'."""
    model = tiny().to(device).train()
    pruning = prunex.attach(model, method, **options)
    randomise(pruning.pruner)
    x, results = images(4).to(device), []
    torch._dynamo.reset()
    try:
        for call in (model, torch.compile(model, backend=backend)):
            model.zero_grad()
            torch.manual_seed(0)
            logits = call(x)
            (logits.square().mean() + sum(pruning.losses().values())).backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append((logits.detach(), grads))
    finally:
        torch._dynamo.reset()
    (wanted, eager), (logits, grads) = results
    assert relative(logits, wanted) < 1e-3
    assert grads.keys() == eager.keys()
    for name, grad in grads.items():
        assert largest(grad, eager[name]) < 1e-3 * max(1.0, float(eager[name].abs().max())), name


def runs_beside_itself(method, options, device, lanes):
    """Two forwards, backwards and explanations on lanes of their own, of two models: as one after the other."""
    models = []
    for seed in (0, 1):
        model = tiny(seed=seed).to(device).eval()
        randomise(prunex.attach(model, method, **options).pruner, seed)
        models.append(model)
    x = images(4).to(device)

    def work(model):
        logits = model(x)
        logits.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        maps = prunex.explain("generic_attention", model, x, 1).maps
        return [logits.detach(), maps, *grads]

    wanted = []
    for model in copy.deepcopy(models):
        wanted.append(work(model))
    if x.is_cuda:
        torch.cuda.synchronize()
    results = []
    for lane, model in zip(lanes, models, strict=True):
        with lane:
            results.append(work(model))
    if x.is_cuda:
        torch.cuda.synchronize()
    for ours, theirs in zip(results, wanted, strict=True):
        assert len(ours) == len(theirs)
        assert all(relative(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))
