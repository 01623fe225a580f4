"""DynamicViT against the public code: evaluation, training under stored noise, loss parts and gradients."""

import pytest
import torch
import torch.nn.functional as F

import prunex
from tests.explainers.reference import SEEDS, arrays, model_and_images, present
from tests.vits import largest, relative

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]

GRADIENTS = {
    "dyvit_grad_kl_score_predictor.0.out_conv.4.weight": "prunex.dynamicvit.predictors.0.score.4.weight",
    "dyvit_grad_kl_score_predictor.1.out_conv.4.weight": "prunex.dynamicvit.predictors.1.score.4.weight",
    "dyvit_grad_kl_head.weight": "head.weight",
}


def attached(seed, dtype=torch.float32, **options):
    model, images, stored = model_and_images(seed, dtype)
    want = arrays("dynamicvit", seed)
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.7, stages=(1, 3), **options)
    pruning.load_official({k[3:]: v for k, v in want.items() if k.startswith("sd/")})
    return model, pruning, images, stored["targets_fixed"].long(), want


def use_stored_noise(monkeypatch, want):
    """The reference's Gumbel noise in torch's own formula, one stage a call."""
    noise = iter([want[f"dyvit_train_gumbel_noise_stage{s}"] for s in range(2)])

    def drawn(logits, tau=1.0, hard=False, dim=-1):
        assert hard
        soft = ((logits + next(noise).to(logits)) / tau).softmax(dim)
        chosen = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
        return chosen - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", drawn)


def dense_policy(eps=0.0, safe=True):
    """Attention under a policy by whole matrices: the exact definition, or with the reference's row maximum and eps."""

    def under_policy(q, k, v, policy, scale, dropout=0.0, relative=None):
        scores = (q * scale) @ k.transpose(-2, -1)
        n = scores.shape[-1]
        eye = torch.eye(n, dtype=scores.dtype)
        e = policy[:, None, None, :] * (1 - eye) + eye
        top = scores.masked_fill(e == 0, -1e9).amax(-1, keepdim=True).detach() if safe else scores.amax(-1, True)
        w = (scores - top).exp() * e
        return ((w + eps / n) / (w.sum(-1, keepdim=True) + eps)) @ v

    return under_policy


def gradients(seed, monkeypatch, kernel=None):
    """Gradients of the reference's total loss, relative errors against the stored ones, and by name."""
    model, pruning, images, labels, want = attached(seed, token_loss="kl")
    if kernel is not None:
        monkeypatch.setattr("prunex.vit.policy.under_policy", kernel)
    use_stored_noise(monkeypatch, want)
    model.train()
    total = F.cross_entropy(model(images), labels) + sum(pruning.losses().values())
    total.backward()
    named = dict(model.named_parameters())
    ours = {name: named[own].grad for name, own in GRADIENTS.items()}
    return ours, {name: relative(ours[name], want[name]) for name in GRADIENTS}


@pytest.mark.parametrize("masked", [False, True])
def test_evaluation(seed, masked):
    model, pruning, images, _, want = attached(seed)
    pruning.masked = masked
    with torch.no_grad():
        assert relative(model(images), want["dyvit_eval_logits"]) < 2e-5
    for s in range(2):
        kept = pruning.trace.kept(s).flatten(1).nonzero()[:, 1].view(4, -1)
        assert torch.equal(kept, want[f"dyvit_eval_realidx_stage{s}"].long().sort(1).values)
    score = pruning.trace.stages[0].score
    assert largest(score, want["dyvit_eval_logprob_stage0"][..., 0]) < 2e-5
    if not masked:  # the second stage scores the same patches, ours in raster order, theirs best first
        order = want["dyvit_eval_realidx_stage0"].long().argsort(1)
        theirs = want["dyvit_eval_logprob_stage1"][..., 0].gather(1, order)
        assert largest(pruning.trace.stages[1].score, theirs) < 2e-5


def test_token_streams_in_evaluation(seed):
    model, _, images, _, want = attached(seed)
    streams = []
    for block in model.blocks:  # nothing is asked from inside, so blocks are called whole and their hooks fire
        block.register_forward_hook(lambda m, args, out: streams.append(out))
    with torch.no_grad():
        model(images)
    for i in range(6):
        theirs = want[f"dyvit_eval_block{i}_out"]
        stage = (i >= 1) + (i >= 3)
        patches = want[f"dyvit_eval_realidx_stage{stage - 1}"].long() if stage else torch.arange(16).expand(4, -1)
        raster = patches.argsort(1).unsqueeze(-1).expand(-1, -1, 48)  # theirs come best first
        close = 2e-5 * float(theirs.abs().max())
        assert streams[i].shape == theirs.shape
        assert largest(streams[i][:, 0], theirs[:, 0]) < close
        assert largest(streams[i][:, 1:], theirs[:, 1:].gather(1, raster)) < close


@pytest.mark.parametrize("softmax", ["ours", "theirs"])
def test_training_forward_under_the_stored_noise(seed, softmax, monkeypatch):
    model, pruning, images, _, want = attached(seed)
    if softmax == "theirs":
        monkeypatch.setattr("prunex.vit.policy.under_policy", dense_policy(eps=1e-6, safe=False))
    use_stored_noise(monkeypatch, want)
    model.train()
    logits = model(images)
    last = pruning._attached.steps.take()[-1]
    assert relative(logits, want["dyvit_train_logits"]) < 2e-5
    # In seed 1 a dropped key lies far above the kept ones of one row: there the reference's eps leaks 1e-4.
    leak = 3e-4 if softmax == "ours" and seed == 1 else 2e-5
    assert relative(last.tokens[:, 1:], want["dyvit_train_features"]) < leak
    for s in range(2):
        mask = want[f"dyvit_train_mask_stage{s}"].view(4, 16)
        assert largest(last.masks[s], mask) < 1e-6
        assert torch.equal(pruning.trace.kept(s).flatten(1), mask > 0.5)
        assert largest(pruning.trace.stages[s].score, want[f"dyvit_train_logprob_stage{s}"][..., 0]) < 2e-5
    assert largest(last.masks[-1], want["dyvit_train_last_decision"].view(4, 16)) < 1e-6


@pytest.mark.parametrize("token_loss", ["kl", "mse"])
def test_loss_parts(seed, token_loss, monkeypatch):
    model, pruning, images, labels, want = attached(seed, token_loss=token_loss)
    use_stored_noise(monkeypatch, want)
    model.train()
    logits = model(images).detach()
    losses = {name: value.detach() for name, value in pruning.losses().items()}
    run = f"dyvit_loss_mse{int(token_loss == 'mse')}"
    cls, ratio, kl, token = want[f"{run}_parts_cls_ratio_clskl_token"].tolist()
    ours = F.cross_entropy(logits, labels)
    assert float(ours) == pytest.approx(cls, rel=1e-4)
    # The stored parts are unweighted, and so is the ratio's mean over stages; weights 2 and 0.5 come on top.
    assert float(losses["distill"]) == pytest.approx(0.5 * kl, rel=1e-4)
    assert float(losses["tokens"]) == pytest.approx(0.5 * token, rel=1e-4)
    assert float(losses["ratio"]) == pytest.approx(ratio, rel=1e-4)
    assert float(ours + sum(losses.values())) == pytest.approx(float(want[f"{run}_total"]), rel=1e-4)


def test_the_teacher_s_tokens(seed):
    _, pruning, images, _, want = attached(seed)
    with torch.no_grad():
        tokens = pruning.pruner._teacher[0].forward_features(images)[:, 1:]
    assert relative(tokens, want["dyvit_teacher_tokens"]) < 2e-5


def test_gradients_with_the_reference_s_own_softmax(seed, monkeypatch):
    """Everything around the attention gives the reference's gradients, once its eps is put in."""
    _, errors = gradients(seed, monkeypatch, dense_policy(eps=1e-6, safe=False))
    assert max(errors.values()) < 1e-4, errors


def test_gradients_of_the_fused_kernel_are_the_exact_definition_s(seed, monkeypatch):
    fused, _ = gradients(seed, monkeypatch)
    exact, _ = gradients(seed, monkeypatch, dense_policy())
    for name in GRADIENTS:
        assert relative(fused[name], exact[name]) < 1e-4, name


def test_gradients_of_the_fused_kernel_against_the_reference(seed, monkeypatch):
    """Equal where no dropped key dominates; seed 1 has one, and there the reference's eps leaks into its gradient."""
    _, errors = gradients(seed, monkeypatch)
    assert errors["dyvit_grad_kl_head.weight"] < 1e-4
    if seed == 0:
        assert max(errors.values()) < 1e-4, errors
    else:
        assert 1e-4 < max(errors.values()) < 1e-2, errors
