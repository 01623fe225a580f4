"""The training forwards of a step, and features that go to a reader of one's own."""

import gc
import weakref

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import prunex
from prunex.handles.steps import MOST
from tests.vits import images, images_for, largest, randomise, tiny

METHODS = ("dynamicvit", "ia_red2")


def pruned(method="dynamicvit", model=None, **options):
    model = tiny() if model is None else model
    pruning = prunex.attach(model, method, keep_ratio=0.5, stages=(1, 2), **options)
    randomise(pruning.pruner)
    return model.train(), pruning


def total(losses):
    return sum(losses.values(), torch.zeros(()))


def alone(model, pruning, x, seed):
    """The losses of one forward, by name, and what is drawn is the same for the same seed."""
    torch.manual_seed(seed)
    model(x)
    losses = {k: float(v.detach()) for k, v in pruning.losses().items()}
    pruning.forget()
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_two_views_add_up_and_each_has_its_gradient(method):
    model, pruning = pruned(method)
    a, b = images(3), images(2, seed=5)  # another number of images counts the same
    one, two = alone(model, pruning, a, 1), alone(model, pruning, b, 2)
    torch.manual_seed(1)
    model(a)
    torch.manual_seed(2)
    model(b)
    both = pruning.losses()
    assert {k: float(v.detach()) for k, v in both.items()} == pytest.approx({k: one[k] + two[k] for k in one}, rel=1e-5)
    total(both).backward()
    summed = [p.grad.clone() for p in pruning.pruner.parameters() if p.grad is not None]
    model.zero_grad()
    for x, seed in ((a, 1), (b, 2)):
        torch.manual_seed(seed)
        model(x)
        total(pruning.losses()).backward()
    assert summed
    for wanted, p in zip(summed, (p for p in pruning.pruner.parameters() if p.grad is not None), strict=True):
        assert largest(wanted, p.grad) < 1e-5


@pytest.mark.parametrize("aside", ["no_grad", "inference_mode", "eval", "eval features"])
def test_what_runs_beside_it_takes_nothing_away(aside):
    model, pruning = pruned()
    torch.manual_seed(1)
    model(images_for(model))
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(aside, torch.enable_grad)():
        model.train(not aside.startswith("eval"))
        (model.forward_features if aside.endswith("features") else model)(images(2))
    model.train()
    losses = pruning.losses()
    assert losses["ratio"].requires_grad
    assert {k: float(v.detach()) for k, v in losses.items()} == alone(model, pruning, images_for(model), 1)


def test_logits_go_to_the_forward_that_they_are_of():
    model, pruning = pruned()
    first, second = (model.forward_features(x) for x in (images(2), images(2, seed=3)))
    model.eval()(images(2))
    model.train()
    one, two = model.forward_head(first), model.forward_head(second * 1)  # changed on the way: the one that is left
    forwards = pruning._attached.steps.take()
    assert forwards[0].logits is one
    assert forwards[1].logits is two


def test_a_step_begins_after_the_losses_or_a_backward_pass():
    model, pruning = pruned(teacher=False)
    for _ in range(3):  # never asked
        model(images(2)).sum().backward()
        assert len(pruning._attached.steps.take()) == 1
    wanted = total(pruning.losses())
    assert total(pruning.losses()) == wanted  # the same again
    model(images(2)).sum().backward(retain_graph=True)
    model(images(2))
    assert len(pruning._attached.forwards) == 1  # the first can give no gradient any more
    total(pruning.losses()).backward()
    assert pruning.losses().keys() == {"ratio"}
    pruning.forget()
    assert pruning.losses() == {}


def test_a_gradient_penalty_keeps_its_forward():
    model, pruning = pruned(teacher=False)
    x = images(2).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        model(images(2))
        assert len(pruning._attached.forwards) == 2
        (slope.square().sum() + total(pruning.losses())).backward()


@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_checkpointing_adds_no_loss_twice(how):
    model, pruning = pruned(teacher=False)
    x = images(2).requires_grad_()
    wanted = alone(model, pruning, x, 4)
    model.set_grad_checkpointing(how == "blocks")
    torch.manual_seed(4)
    out = checkpoint(model, x, use_reentrant=False) if how == "whole" else model(x)
    losses = pruning.losses()
    assert {k: float(v.detach()) for k, v in losses.items()} == pytest.approx(wanted)
    (out.sum() + total(losses)).backward()
    assert not pruning._attached.forwards


def test_forwards_that_nobody_uses_do_not_pile_up():
    model, pruning = pruned(teacher=False)
    held = []
    for _ in range(MOST + 3):
        held.append(weakref.ref(model.forward_features(images(1))))
    gc.collect()
    assert sum(t() is not None for t in held) == MOST
    with pytest.warns(UserWarning, match=f"more than {MOST} training forwards"):
        pruning.losses()
    pruning.forget()
    gc.disable()  # no cycle goes through a graph
    try:
        held = weakref.ref(model.forward_features(images(1)))
        pruning.forget()
        assert held() is None
    finally:
        gc.enable()


def test_compiled_forwards_count_each():
    model, pruning = pruned(teacher=False)
    torch._dynamo.reset()
    made = []

    def backend(graph, example):
        made.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = images(2)
    for _ in range(3):
        compiled(x).sum().backward()
        assert pruning.losses().keys() == {"ratio"}
    assert len(made) == 1
    compiled(x)
    compiled(x)
    assert len(pruning._attached.forwards) == 2
    one, two = pruning._attached.forwards
    assert one.logits is not two.logits
    total(pruning.losses()).backward()
    torch._dynamo.reset()


def test_labels_go_to_every_view_that_they_fit():
    model, pruning = pruned()
    for count in (3, 2, 3):
        model(images(count))
    labels = torch.tensor([0, 1, 2])
    pruning.losses(labels)
    assert [f.labels is labels for f in pruning._attached.steps.take()] == [True, False, True]
    with pytest.raises(prunex.PrunexError, match=r"labels are \[4\]: give one class index for each of the 3 and 2 im"):
        pruning.losses(torch.zeros(4, dtype=torch.long))


def test_every_view_is_given_to_further_losses():
    model, pruning = pruned(teacher=False)
    counts = []
    pruning.also(lambda forward: counts.append(len(forward.images)) or {"own": forward.tokens.new_ones(())})
    model(images(3))
    model(images(2))
    assert float(pruning.losses()["own"]) == 2
    assert counts == [3, 2]


# ------------------------------------------------------------------------------------------------ a reader of one's own


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dynamicvit", {}),
        ("evit", {}),
        ("dynamicvit", {"count": "adaptive"}),
        ("tome", {"r": 3}),
        ("ppt", {"r": 3, "tau": 0.01}),
    ],
)
def test_pooled_patches_are_the_same_masked_and_gone(method, options, kind):
    model = tiny().eval()
    pruning = prunex.attach(model, method, **({} if "r" in options else {"keep_ratio": 0.5}), **options)
    randomise(pruning.pruner)
    x, pooled = images(3), {}
    with torch.no_grad():
        for masked in (True, False):
            pruning.masked = masked
            pooled[masked] = pruning.pool(model.forward_features(x), kind)
    assert largest(pooled[True], pooled[False]) < 1e-5


def test_pooling_by_hand_equals_the_head_s():
    model = tiny(global_pool="avg", num_classes=0, fc_norm=False).eval()
    pruning = prunex.attach(model, "tome", r=3)
    tokens = model.forward_features(images(2))
    assert largest(pruning.pool(tokens), model.forward_head(tokens)) < 1e-6
    with pytest.raises(prunex.PrunexError, match="unknown kind 'mean'"):
        pruning.pool(tokens, "mean")
    with pytest.raises(prunex.PrunexError, match="are of no forward of this model"):
        pruning.pool(tokens[:, 3:])


@pytest.mark.parametrize("mode", ["masked training", "adaptive counts"])
def test_features_read_past_the_head_are_warned_about_once(mode, recwarn):
    model, pruning = pruned(teacher=False, count="fixed" if mode == "masked training" else "adaptive")
    model.train(mode == "masked training")
    for _ in range(2):
        model.forward_features(images(4))[:, 1:].mean(1)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"prunex.attached\(model\).pool\(tokens\)"):
        model.forward_features(images(4))
    model.forward_features(images(4))
    assert len(recwarn.list) == 0


@pytest.mark.parametrize("reader", ["head", "pool", "views", "intermediates", "slots that are all there"])
def test_readers_who_know_are_not_warned_about(reader, recwarn):
    model, pruning = pruned(model=tiny(num_classes=0), teacher=False)
    if reader == "slots that are all there":
        model.eval()
    for _ in range(4):
        x = images(2)
        if reader == "head":
            model(x)
        elif reader == "pool":
            pruning.pool(model.forward_features(x))
        elif reader == "views":
            for tokens in [model.forward_features(x), model.forward_features(x)]:
                model.forward_head(tokens)
        elif reader == "intermediates":
            model.forward_intermediates(x)
        else:
            model.forward_features(x).mean(1)
    assert not recwarn.list
