"""Patch tokens at a block's first norm, against hooks on the block itself."""

import pytest
import torch

import prunex
from prunex.relevance.features import Features, features, features_tape, log_odds
from prunex.vit.recording import recording
from tests.vits import images_for, largest, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])


def read(model, x, layer, gradients=True):
    with recording(model, x, TARGETS[: len(x)], features_tape(layer, gradients), needs_class=True) as recorded:
        score = recorded.logits.gather(1, recorded.target[:, None])[:, 0] if gradients else None
        return features(recorded, layer, score)


def hooked(model, image, layer, target):
    """Output of norm1 and the gradient of the target's logit for it, from the model's own forward: [N, D] each."""
    found = []
    handle = model.blocks[layer].norm1.register_forward_hook(lambda _m, _i, out: found.append(out) or out)
    try:
        logit = model(image[None])[0, target]
    finally:
        handle.remove()
    return found[0][0].detach(), torch.autograd.grad(logit, found[0])[0][0]


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class"])
def test_equal_a_hook(family, layer):
    model = tiny(family).double()
    x = images_for(model)
    seen = read(model, x, layer)
    for i, image in enumerate(x):
        activation, gradient = hooked(model, image, layer, TARGETS[i])
        prefix = model.num_prefix_tokens
        assert largest(seen.activation[i], activation[prefix:]) < 1e-13
        assert relative(seen.gradient[i], gradient[prefix:]) < 1e-10
        assert relative(seen.weights()[i], gradient[prefix:].mean(0)) < 1e-10
    assert seen.gradient.abs().amax((1, 2)).min() > 0
    assert seen.present.all()
    assert seen.where.equal(torch.arange(16).expand(3, -1))
    assert read(model, x, layer, gradients=False).gradient is None
    assert read(model, x, layer, gradients=False).activation.equal(seen.activation)


@pytest.mark.parametrize("masked", [None, True])
@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_pruned(pruner, masked):
    model = tiny().double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3)) as pruning:
        randomise(pruning.pruner)
        pruning.masked = masked
        model(x)
        everything = torch.ones(3, 4, 4, dtype=torch.bool)
        kept_at = {1: everything, 2: pruning.trace.kept(0), 3: pruning.trace.kept(0)}
        if pruner == "dynamicvit":  # it decides before a block, the others inside it, behind its first norm
            kept_at = {0: everything, 1: pruning.trace.kept(0), 3: pruning.trace.kept(1)}
        seen_at = {layer: read(model, x, layer) for layer in kept_at}
        pruning.masked = None
        for layer, kept in kept_at.items():
            seen = seen_at[layer]
            placed = seen.on_grid(seen.activation.mT)
            weights = seen.weights()
            assert placed.shape == (3, 48, 4, 4)
            assert (seen.where >= 0).equal(kept.flatten(1))
            assert seen.present.sum(1).equal(kept.flatten(1).sum(1))
            assert (placed.masked_select(~kept[:, None]) == 0).all()
            fill = torch.tensor([-1.0, -2.0, -3.0]).double()
            assert seen.on_grid(seen.activation[..., 0], fill)[1][~kept[1]].eq(-2).all()
            for i, image in enumerate(x):
                activation, gradient = hooked(model, image, layer, TARGETS[i])
                n = int(kept[i].sum())  # a fused token comes behind these
                assert relative(placed[i][:, kept[i]].T, activation[1 : 1 + n]) < 1e-12
                assert relative(weights[i], gradient[1 : 1 + n].mean(0)) < 1e-10


def test_a_merged_token_counts_once_and_shows_on_all_its_patches():
    where = torch.tensor([[0, 1, 0, -1]])
    gradient = torch.tensor([[[2.0], [4.0], [9.0]]])
    seen = Features(gradient, gradient, torch.tensor([[True, True, False]]), where, (2, 2))
    assert seen.weights().tolist() == [[3.0]]
    assert seen.on_grid(torch.tensor([[5.0, 6.0, 7.0]]), -1.0).tolist() == [[[5.0, 6.0], [5.0, -1.0]]]


def test_log_odds():
    logits = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    p = logits.softmax(1).gather(1, TARGETS[:, None])[:, 0]
    odds = log_odds(logits, TARGETS)
    assert largest(odds, (p / (1 - p)).log()) < 1e-13
    of_p, of_odds = (torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (p, odds))
    assert largest(of_p, of_odds * (p * (1 - p))[:, None]) < 1e-15
    sure = torch.tensor([[90.0, 0.0, 1.0]]).requires_grad_()
    gradient = torch.autograd.grad(log_odds(sure, torch.tensor([0])).sum(), sure)[0]
    assert largest(gradient, torch.tensor([[1.0, -0.2689414, -0.7310586]])) < 1e-6
    assert log_odds(sure.bfloat16(), torch.tensor([0])).dtype == torch.float32
