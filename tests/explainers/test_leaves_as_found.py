"""Explaining inside somebody's training or validation step: any grad mode, and nothing disturbed or left behind."""

import gc
import os
import warnings

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from tests.explainers.quick import EXPLAINERS, explain
from tests.vits import assert_same_state, images, quick, randomise, relative, state_of, tiny

FORWARDS_ONLY = ["atman", "attention_flow", "dino", "raw_attention", "rollout", "shap", "vit_cx"]
BY_GRADIENT = [m for m in EXPLAINERS if m not in FORWARDS_ONLY]
TARGETS = torch.tensor([4, 0, 2])

every = pytest.mark.parametrize("method", EXPLAINERS)


# ----------------------------------------------------------------------------------------------- the caller's grad mode


@every
@pytest.mark.parametrize("pruner", quick([None, "evit", "dynamicvit"], ["evit"]))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_same_map_in_every_grad_mode(method, pruner, mode):
    model = tiny()
    if pruner:
        randomise(prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)).pruner)
    wanted = explain(method, model, images(), TARGETS)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x, target = images(), TARGETS.clone()  # inference tensors under inference mode
        e = explain(method, model, x, target)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert e.maps.equal(wanted.maps)
    for t in (e.maps, e.raw, e.logits, e.target):
        assert not t.requires_grad
        assert not t.is_inference()
    assert e.target.equal(TARGETS)


@every
def test_grad_mode_comes_back_after_an_error(method):
    model = tiny()
    with torch.inference_mode(), pytest.raises(PrunexError, match="out of range"):
        explain(method, model, images(), 9)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        with pytest.raises(PrunexError, match="out of range"):
            explain(method, model, images(), 9)
        assert not torch.is_grad_enabled()


@every
def test_a_model_made_under_inference_mode(method):
    with torch.inference_mode():
        model = tiny()
        if method in BY_GRADIENT:
            with pytest.raises(PrunexError, match="made under torch.inference_mode"):
                explain(method, model, images())
        else:
            assert explain(method, model, images()).maps.equal(explain(method, tiny(), images()).maps)


@every
@pytest.mark.parametrize("kind", ["images", "model"])
def test_inference_mode_and_autocast_of_a_validation_step(method, kind):
    # Weights cast inside the caller's autocast are cached; they must not end up in the explainer's graph.
    model, x = tiny(), images()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        if kind == "model":
            model(x)
        first = explain(method, model, x.clone(), 1)
        model(x)
        again = explain(method, model, x, 1)
    assert first.maps.equal(again.maps)


# ------------------------------------------------------------------------------------------------- nothing is disturbed


@every
@pytest.mark.parametrize("pruner", [None, "topk", "evit", "dynamicvit"])
def test_a_model_in_training_is_left_as_found(method, pruner):
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1)
    pruning = prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) if pruner else None
    model.train()
    model.blocks[1].eval()  # a user's own choice
    model.blocks[0].requires_grad_(False)
    logits = model(images())
    if pruning:
        trace, last, losses = pruning.trace, pruning._attached.steps.take()[-1], pruning.losses()
        own = vars(pruning._attached).copy()
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i))
    state, rng = state_of(model), torch.get_rng_state()
    e = explain(method, model, images())

    assert_same_state(model, state)
    assert torch.get_rng_state().equal(rng)
    assert all((p.grad == i).all() for i, p in enumerate(model.parameters()))
    if pruning:
        assert pruning.trace is trace
        assert pruning._attached.steps.take()[-1] is last
        assert vars(pruning._attached) == own
        assert {k: v.item() for k, v in pruning.losses().items()} == {k: v.item() for k, v in losses.items()}
    (logits.sum() + sum(losses.values() if pruning else [])).backward()  # the pending graph still works

    model.eval()
    assert explain(method, model, images()).maps.equal(e.maps)  # and it explained the eval forward


@every
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pruner", quick([None, "evit", "dynamicvit"], ["evit"]))
def test_gradients_of_a_training_step_around_it(method, precision, pruner):
    """Before the forward, and between forward and backward, inside one autocast."""
    found = []
    for explains in (False, True):
        torch.manual_seed(7)
        model = tiny(drop_path_rate=0.1)
        pruning = prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) if pruner else None
        model.train()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            if explains:
                explain(method, model, images(seed=5))
            loss = F.cross_entropy(model(images()).float(), TARGETS)
            loss = loss + sum(pruning.losses().values() if pruning else [])
            if explains:
                explain(method, model, images(seed=6))
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad is not None, name
        assert grad.equal(found[1][name]), name


@every
def test_an_exception_inside_leaves_all_as_found(method):
    model = tiny()
    pruning = prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2))
    model(images())
    model.train()
    trace = pruning.trace
    state = state_of(model)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.blocks[2].mlp.fc2.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        explain(method, model, images())
    handle.remove()
    state["attributes"] = state_of(model)["attributes"]
    assert_same_state(model, state)
    assert pruning.trace is trace
    assert not pruning._attached.steps.take()
    assert torch.is_grad_enabled()


@every
def test_frozen_parameters(method):
    model = tiny()
    wanted = explain(method, model, images(), TARGETS)
    model.requires_grad_(False)
    e = explain(method, model, images(), TARGETS)
    assert relative(e.maps, wanted.maps) < 1e-6
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert explain(method, model, images(), TARGETS).maps.equal(e.maps)


@every
def test_partly_frozen_and_images_that_ask_for_gradients(method):
    model = tiny()
    wanted = explain(method, model, images(), TARGETS)
    model.blocks[:2].requires_grad_(False)
    x = images().requires_grad_()
    assert relative(explain(method, model, x, TARGETS).maps, wanted.maps) < 1e-6
    assert x.grad is None
    assert x.requires_grad


@every
def test_gradient_checkpointing(method):
    model = tiny()
    wanted = explain(method, model, images(), TARGETS).maps
    model.set_grad_checkpointing()
    assert explain(method, model.train(), images(), TARGETS).maps.equal(wanted)
    assert model.grad_checkpointing


@every
def test_fused_attention_stays_as_it_was(method):
    model = tiny()
    flags = [b.attn.fused_attn for b in model.blocks]
    explain(method, model, images())
    assert [b.attn.fused_attn for b in model.blocks] == flags
    for block in model.blocks:
        block.attn.fused_attn = False
    assert explain(method, model, images()).maps.shape == (3, 4, 4)


@every
@pytest.mark.parametrize("pruner", [None, "evit"])
def test_nothing_stays_in_memory(method, pruner):
    model = tiny(depth=2)
    if pruner:
        prunex.attach(model, pruner, keep_ratio=0.6, stages=(1,))
    model.train()

    def alive():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    for _ in range(2):
        explain(method, model, images())
    gc.collect()
    before = alive()
    gc.disable()  # what only the cycle collector would free counts as left
    try:
        for _ in range(8):
            explain(method, model, images())
        after = alive()
    finally:
        gc.enable()
    assert after <= before + 2


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc for the resident size")
@pytest.mark.parametrize("method", BY_GRADIENT)
def test_no_graph_stays_in_memory(method):
    # One graph of this model holds more than 2 MB: 60 of them would show.
    model = tiny(img_size=64, depth=3)
    x = images(4, (64, 64))
    with prunex.attach(model, "evit", keep_ratio=0.9, stages=(1,)):
        for _ in range(10):
            explain(method, model, x)
        before = resident()
        kept = [explain(method, model, x) for _ in range(60)]  # explanations hold no graph either
        assert resident() - before < 40e6
    assert all(e.raw.grad_fn is None and all(s.weight.grad_fn is None for s in e.trace.stages) for e in kept)
    assert all(s.score.grad_fn is None for e in kept for s in e.trace.stages)
