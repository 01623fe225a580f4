"""DiffRate against the public code: rates, inference with four tables, the training forward and its gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex.pruners.diffrate import Rate
from prunex.vit.cost import count
from tests.explainers.reference import GOLDEN, SEEDS, arrays, model_and_images, present
from tests.vits import largest, relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]

EMBEDDED = 48 * 3 * 8 * 8  # the reference counts the class token as an embedded patch


def test_a_rate_alone(seed):
    want = arrays("diffrate", seed)
    for g in (1, 4):
        stored = {k: want[f"diffrate_fn_g{g}_{k}"] for k in ("candidates", "logits", "kept", "grad", "mask15")}
        rate = Rate(16, g, stored["logits"])
        assert torch.equal(rate.candidates, stored["candidates"])
        kept = rate.kept()
        assert int(kept.detach()) + 1 == int(stored["kept"])  # theirs counts the class token
        survival = want[f"diffrate_fn_g{g}_token_probability"]
        assert largest(rate.survival(16), survival[1:]) < 1e-6
        assert float(survival[0]) == pytest.approx(1, abs=1e-6)
        mask = rate.mask(int(kept.detach()), 14, 16)
        assert torch.equal(mask, stored["mask15"][1:].round())
        (0.3 * kept + (mask * torch.linspace(-1, 1, 17)[1:]).sum()).backward()
        assert relative(rate.logits.grad, stored["grad"]) < 1e-6


def attached(seed, case, dtype=torch.float32, **more):
    model, images, _ = model_and_images(seed, dtype)
    want = arrays("diffrate", seed)
    tables = {f"{kind}_kept": want[f"diffrate_{case}_{kind}_kept"].tolist() for kind in ("prune", "merge")}
    return model, images, want, prunex.attach(model, "diffrate", **tables, **more)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["mixed", "prune", "merge", "dense"])
def test_inference(seed, case, masked, learns):
    model, images, want, pruning = attached(seed, case, learns=learns)
    pruning.masked = masked
    with torch.no_grad():
        tokens = model.forward_features(images)
        assert relative(model.forward_head(tokens), want[f"diffrate_{case}_logits"]) < 1e-5
    stages = dict(zip(pruning.pruner.stages, pruning.counts(), strict=True))
    left = [stages.get(0, 16)]
    for block in range(1, 6):
        left.append(stages.get(block, left[-1]))
    assert [n + 1 for n in left] == want[f"diffrate_{case}_tokens_per_block"].tolist()
    pruning.pruner.macs = lambda *_: 0
    assert count(model, pruning.pruner).macs + EMBEDDED == int(want[f"diffrate_{case}_flops"])


@pytest.mark.parametrize("case", ["mixed", "prune", "merge"])
def test_inference_in_double_precision(seed, case):
    model, images, want, _ = attached(seed, case, torch.float64)
    with torch.no_grad():
        assert relative(model(images), want[f"diffrate_{case}_logits__dbl"]) < 1e-6


@pytest.mark.parametrize("case", ["mixed", "prune", "merge"])
def test_who_is_in_which_token_and_how_large_it_is(seed, case):
    model, images, want, pruning = attached(seed, case)
    with torch.no_grad():
        tokens = model.forward_features(images)
    groups = pruning.trace.groups().flatten(1)
    sizes = pruning._attached.handover.take(tokens).sizes
    source, theirs = want[f"diffrate_{case}_source"][:, 1:, 1:], want[f"diffrate_{case}_block5_size"][:, 1:]
    for i in range(4):
        left = int(groups[i].max()) + 1
        assert left == source.shape[1]
        # Theirs are sorted by importance, ours lie in raster order.
        place = source[i].argmax(1)
        at = groups[i][place]
        ones = torch.zeros(left, 16).index_put((groups[i].clamp(min=0), torch.arange(16)), (groups[i] >= 0).float())
        assert torch.equal(ones[at], source[i])
        if case != "prune":
            assert relative(sizes[i, 1:][at], theirs[i]) < 1e-5


@pytest.mark.parametrize("case", ["mixed", "prune", "merge"])
def test_token_streams(seed, case):
    model, images, want, _ = attached(seed, case)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: streams.append(out))
    with torch.no_grad():
        model(images)
    for block in (1, 3, 5):
        theirs = want[f"diffrate_{case}_block{block}_out"]
        assert streams[block].shape == theirs.shape
        assert relative(streams[block][:, 0], theirs[:, 0]) < 1e-5
        nearest = torch.cdist(theirs[:, 1:].double(), streams[block][:, 1:].double()).argmin(2)
        assert torch.equal(nearest.sort(1).values, torch.arange(nearest.shape[1]).expand(4, -1))
        ours = streams[block][:, 1:].gather(1, nearest.unsqueeze(2).expand(-1, -1, 48))
        assert relative(ours, theirs[:, 1:]) < 1e-5


def dense_policy(eps):
    """Attention under a policy by whole matrices, with the reference's epsilon."""

    def under_policy(q, k, v, policy, scale, dropout=0.0, sizes=None, relative=None):
        scores = (q * scale) @ k.transpose(-2, -1)
        scores = scores if sizes is None else scores + sizes.log()[:, None, None, :].to(scores.dtype)
        n = scores.shape[-1]
        eye = torch.eye(n, dtype=scores.dtype)
        w = (scores - scores.amax(-1, keepdim=True)).exp() * (policy[:, None, None, :] * (1 - eye) + eye)
        return ((w + eps / n) / (w.sum(-1, keepdim=True) + eps)) @ v

    return under_policy


def trained(seed, dtype, monkeypatch, theirs):
    """The model after one training forward with the reference's rates, their pruner, logits and all stored arrays."""
    model, images, stored = model_and_images(seed, dtype)
    want = arrays("diffrate", seed)
    pruning = prunex.attach(model, "diffrate", granularity=2)
    pruning.load_official(
        {
            f"blocks.{block}.{kind}_ddp.selected_probability": want[f"diffrate_train_{kind}_prob/{block}"]
            for block in range(6)
            for kind in ("prune", "merge")
        }
    )
    if theirs:
        monkeypatch.setattr("prunex.vit.policy.under_policy", dense_policy(1e-6))
    logits = model.train()(images)
    return model, pruning, logits, F.cross_entropy(logits, stored["targets_fixed"].long()), want


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_forward(seed, dtype, theirs, monkeypatch):
    _, pruning, logits, loss, want = trained(seed, dtype, monkeypatch, theirs)
    tail = "__dbl" if dtype == torch.float64 else ""
    close = 1e-6 if dtype == torch.float64 and theirs else 1e-5  # their epsilon leaks 1e-6 to what was dropped
    assert relative(logits, want[f"diffrate_train_logits{tail}"]) < close
    assert float(loss.detach()) == pytest.approx(float(want[f"diffrate_train_ce{tail}"]), rel=close)
    table = pruning.pruner.table()
    for kind, counts in zip(("prune", "merge"), zip(*table, strict=True), strict=True):
        assert [k + 1 for k in counts] == want[f"diffrate_train_{kind}_kept"].tolist()[1:]
    forward = pruning._attached.forwards[-1]
    sizes = pruning._attached.handover.take(forward.tokens).sizes.detach()
    # Theirs are sorted by the last block's importance.
    both = [torch.stack([policy, size], 1) for policy, size in zip(forward.policy.detach(), sizes, strict=True)]
    stored = torch.stack([want["diffrate_train_mask"], want["diffrate_train_size"]], 2)
    for ours, other in zip(both, stored, strict=True):
        order = sorted(range(17), key=lambda i: tuple(ours[i].tolist()))
        other_order = sorted(range(17), key=lambda i: tuple(other[i].tolist()))
        assert largest(ours[order], other[other_order]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_the_loss_with_the_reference_s_own_softmax(seed, dtype, monkeypatch):
    _, pruning, _, loss, want = trained(seed, dtype, monkeypatch, True)
    loss.backward()
    tail, close = ("__dbl", 1e-5) if dtype == torch.float64 else ("", 5e-5)
    with np.load(GOLDEN / f"diffrate-seed{seed}.npz") as file:
        none = set(file["diffrate_train_ce_grad_none"].tolist())
    for kind in ("prune", "merge"):
        for stage, rate in enumerate(getattr(pruning.pruner, kind)):
            block = pruning.pruner.stages[stage]
            assert (rate.logits.grad is None) == (f"{kind}_grad/{block}" in none)
            if rate.logits.grad is not None:
                assert relative(rate.logits.grad, want[f"diffrate_train_ce_{kind}_grad/{block}{tail}"]) < close


def test_gradients_of_the_fused_kernel(seed, monkeypatch):
    """Without the reference's epsilon, which leaks into the attention to what was dropped."""
    _, pruning, _, loss, want = trained(seed, torch.float64, monkeypatch, False)
    loss.backward()
    for kind in ("prune", "merge"):
        for stage, rate in enumerate(getattr(pruning.pruner, kind)):
            block = pruning.pruner.stages[stage]
            if rate.logits.grad is not None:
                assert relative(rate.logits.grad, want[f"diffrate_train_ce_{kind}_grad/{block}__dbl"]) < 1e-4


def test_multiply_adds_and_their_gradients(seed, monkeypatch):
    model, pruning, _, _, want = trained(seed, torch.float32, monkeypatch, False)
    pruning.pruner.macs = lambda *_: 0
    dense = count(model, None).macs
    share = pruning.pruner._share(model, (4, 4))
    assert round(float(share.detach()) * dense) + EMBEDDED == int(want["diffrate_train_flops"])
    (share * dense / 1e6).backward()
    for kind in ("prune", "merge"):
        for stage, rate in enumerate(getattr(pruning.pruner, kind)):
            block = pruning.pruner.stages[stage]
            assert relative(rate.logits.grad, want[f"diffrate_train_mflops_{kind}_grad/{block}"]) < 1e-5


def test_the_same_counts_at_inference(seed, monkeypatch):
    model, _, logits, _, want = trained(seed, torch.float32, monkeypatch, False)
    _, images, _ = model_and_images(seed)
    with torch.no_grad():
        evaluated = model.eval()(images)
    assert relative(evaluated, want["diffrate_train_same_rates_eval_logits"]) < 1e-5
    assert largest(evaluated, logits) > 0.05
