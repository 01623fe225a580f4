"""Explanations of a model whose tokens are pooled (HVT): relevance by shares, games with absent patches."""

import pytest
import torch

import prunex
from prunex.relevance.gradients import ModifiedGradients
from prunex.relevance.rules import RelevanceRules
from prunex.removal.game import Removal
from prunex.vit.decisions import Pool, apply
from prunex.vit.forward import record
from prunex.vit.state import TokenState
from prunex.vit.tape import Tape
from prunex.vit.trace import TokenTrace
from tests.explainers.quick import EXPLAINERS, explain
from tests.pruners.test_hvt import slow_block, slow_linear, slow_norm
from tests.vits import images_for, largest, randomise, relative, tiny


def pooled(family="vit", stages=(0, 2), **options):
    model = tiny(family, **({"fc_norm": False} if family.startswith("avg") else {})).double()
    pruning = prunex.attach(model, "hvt", stages=stages, **options)
    randomise(pruning.pruner)
    return model, images_for(model)


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("options", [{"class_token": "keep"}, {"pool": "2d"}], ids=str)
def test_every_explainer_has_a_map(explainer, options):
    model, x = pooled(stages=(0, 3), **options)
    e = explain(explainer, model, x)
    assert e.trace.pooled
    assert e.maps.shape == (3, 4, 4)
    assert torch.isfinite(e.maps).all()
    # What is cut off below 0 by definition may leave few of the tokens, and here a token is up to nine patches.
    assert (e.maps != 0).double().mean() > (0 if explainer in ("grad_cam", "r_cut") else 0.5)
    with torch.no_grad():
        assert relative(e.logits, model(x)) < 1e-9


def test_rollout_is_the_product_of_whole_matrices():
    model, x = pooled(stages=(0, 1, 3), family="vit")
    e = explain("rollout", model, x)
    tape = Tape(attention=True, reduce=lambda a: a.mean(1))
    with torch.no_grad():
        state = record(model, x, tape)
    row, stages = torch.ones(3, 1, 1, dtype=torch.float64), list(state.trace.stages)
    for step in reversed(tape.attended()):
        if stages and stages[-1].block == step.block:
            stage = stages.pop()
            alone = TokenTrace((1, stage.group.shape[1]), 0, 3, x.device, [stage])
            row = row @ alone.composition().transpose(1, 2)
        mixed = step.attention + torch.eye(step.attention.shape[1], dtype=torch.float64)
        row = row @ (mixed / mixed.sum(-1, keepdim=True))
    assert relative(e.maps.flatten(1), row[:, 0]) < 1e-9
    assert largest(e.raw.sum(1), torch.ones(3)) < 1e-9


@pytest.mark.parametrize("ops", [RelevanceRules("zplus"), RelevanceRules("epsilon"), ModifiedGradients("attnlrp")])
def test_relevance_goes_to_the_winner_of_each_channel(ops):
    tokens = torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)
    anatomy = prunex.vit.anatomy.read(tiny("avg_pool_no_class"))
    state = TokenState(tokens, anatomy, TokenTrace((1, 7), 0, 2, tokens.device), False, False, ops=ops, left=7)
    position = 0.3 * torch.randn(1, 3, 48, dtype=torch.float64)
    apply(Pool(None, position), 0, "before", state)
    relevance = torch.rand(2, 3, 48, dtype=torch.float64)
    if isinstance(ops, RelevanceRules):
        ops.relevance = True
        (found,) = torch.autograd.grad(state.tokens, tokens, relevance)
    else:  # relevance over value goes in, and comes out times the value
        found = torch.autograd.grad(state.tokens, tokens, relevance / state.tokens.detach())[0] * tokens.detach()
    want = torch.zeros_like(tokens)
    for image in range(2):
        parts = torch.zeros(3, 48, dtype=torch.float64)
        for out in range(3):
            window = tokens[image, 2 * out : 2 * out + 3].detach()
            parts[out] = relevance[image, out] * window.amax(0) / (window.amax(0) + position[0, out])
        if isinstance(ops, RelevanceRules) and ops.rule == "zplus":  # conserving skips share an image's whole by size
            rest = relevance[image] - parts
            share = parts.sum().abs() / (parts.sum().abs() + rest.sum().abs())
            parts = parts * share * relevance[image].sum() / parts.sum()
        for out in range(3):
            window = tokens[image, 2 * out : 2 * out + 3].detach()
            for c in range(48):
                want[image, 2 * out + int(window[:, c].argmax()), c] += parts[out, c]
    assert relative(found, want) < 1e-5  # the rules' own stabiliser is 1e-9 beside values of any size


def slow_value(model, pruning, image, present):
    """Logits of a mean-read HVT when only some patches exist: blocks see these alone, windows the places they have."""
    x = model.patch_embed(image[None])[0] + model.pos_embed[0, model.num_prefix_tokens :]
    slots = {i: x[i] for i in range(len(x)) if present[i]}
    n = len(x)
    for b, block in enumerate(model.blocks):
        places = sorted(slots)
        out = slow_block(torch.stack([slots[i] for i in places]), block, 3)
        slots = dict(zip(places, out, strict=True))
        if b in pruning.pruner.stages:
            position = pruning.pruner.positions[pruning.pruner.stages.index(b)].pos_embed[0]
            n = (n - 3) // 2 + 1
            after = {}
            for o in range(n):
                window = [slots[i] for i in range(2 * o, 2 * o + 3) if i in slots]
                if window:
                    after[o] = torch.stack(window).amax(0) + position[o]
            slots = after
    return slow_linear(slow_norm(torch.stack([slots[i] for i in sorted(slots)]), model.norm).mean(0), model.head)


@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class"])
def test_games_with_absent_patches_equal_the_slow_definition(family):
    model, x = pooled(family, stages=(0, 2))
    pruning = prunex.attached(model)
    coalitions = torch.rand(3, 6, 16, generator=torch.Generator().manual_seed(0)) > 0.55
    coalitions[:, 0] = True
    coalitions[:, :, 5] = True  # nobody is left without a token
    with torch.no_grad():
        want = torch.stack(
            [torch.stack([slow_value(model, pruning, x[i], c) for c in coalitions[i]]) for i in range(3)]
        )
        found = [
            Removal(model, x, removal=removal, selection=selection, output="logit", chunk=5)(coalitions)
            for removal, selection in (("drop", "frozen"), ("mask", "frozen"), ("drop", "adaptive"))
        ]
    for values in found:
        assert relative(values, want) < 1e-9


def test_a_game_of_nobody_has_a_value():
    for options in ({}, {"class_token": "keep"}, {"pool": "2d"}):
        model, x = pooled(**options)
        values = Removal(model, x)(torch.zeros(3, 1, 16, dtype=torch.bool))
        assert torch.isfinite(values).all()


def test_shapley_values_add_up():
    model, x = pooled()
    e = prunex.explain("shap", model, x, budget=80)
    game = Removal(model, x)
    ends = torch.stack([torch.ones(16), torch.zeros(16)]).bool().expand(3, -1, -1)
    whole, nothing = game(ends).unbind(1)
    assert relative(e.raw.sum(1), whole - nothing) < 1e-6
