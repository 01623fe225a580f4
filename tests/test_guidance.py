"""Guidance: the loss equals one written out, its gradient goes where it is said to, and what it costs is counted."""

import copy
import dataclasses

import pytest
import torch

import prunex
from prunex.guidance import Guidance, UnitGuidance
from tests.vits import images, tiny

METHOD = "generic_attention"


def prepared(method="dynamicvit", **options):
    model = tiny().train()
    pruning = prunex.attach(
        model, method, stages=(1, 2), keep_ratio=0.6, **({"teacher": False} if method == "dynamicvit" else {})
    )
    guide = Guidance(model, METHOD, **options)
    pruning.also(guide)
    return model, pruning, guide


def step(model, pruning, x, labels=None):
    torch.manual_seed(0)
    model(x)
    return pruning.losses(labels)


@pytest.mark.parametrize("method", ["dynamicvit", "evit", "topk"])
@pytest.mark.parametrize("loss", ["pearson", "kl"])
def test_the_loss_is_the_one_that_is_told(method, loss):
    """Image by image, in float64, from the trace's scores and the dense model's maps."""
    dense = tiny()
    model, pruning, _ = prepared(method, loss=loss, weight=0.7, temperature=2.0)
    x, labels = images(4), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(0)
    model(x)
    trace = pruning._attached.steps.take()[-1].trace
    found = float(pruning.losses(labels)["guidance"].detach())
    maps = prunex.explain(METHOD, dense, x, labels).maps.flatten(1).clamp(min=0).double()
    stages = []
    for s in range(len(trace.stages)):
        u, there = trace.scores(s)
        each = []
        for i in range(4):
            a, b = u[i][there[i]].detach().double(), maps[i][there[i]]
            a, b = ((v - v.mean()) / v.std(correction=0) for v in (a, b))
            if loss == "pearson":
                each.append(1 - (a * b).mean())
            else:
                p, q = (b / 2).softmax(0), (a / 2).softmax(0)
                each.append((p * (p / q).log()).sum())
        stages.append(torch.stack(each).mean())
    assert found == pytest.approx(0.7 * float(torch.stack(stages).mean()), rel=1e-4)


def test_scores_follow_patches_through_stages():
    model, pruning, _ = prepared("evit")
    model(images(2))
    trace = pruning.trace
    first, there = trace.scores(0)
    assert bool(there.all())
    assert torch.equal(first, trace.stages[0].score)
    second, there = trace.scores(1)
    assert torch.equal(there.view_as(trace.kept(0)), trace.kept(0))
    tokens = trace.tokens(0)
    for i in range(2):
        for p in range(there.shape[1]):
            if there[i, p]:
                assert second[i, p] == trace.stages[1].score[i, tokens[i, p]]
    with pytest.raises(prunex.PrunexError, match=f"stage={len(trace.stages)} does not exist"):
        trace.scores(len(trace.stages))
    model = tiny()
    with prunex.attach(model, "tome", r=2) as pruning:
        model(images(2))
        with pytest.raises(prunex.PrunexError, match="stage 0 ranked nothing"):
            pruning.trace.scores(0)


def test_the_gradient_goes_into_the_scores_alone():
    model, pruning, guide = prepared()
    step(model, pruning, images(4))["guidance"].backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert any("prunex.dynamicvit" in n for n in moved)
    assert not any(n.startswith(("head", "blocks.2", "blocks.3", "norm")) for n in moved)
    assert all(p.grad is None for p in guide.teacher.parameters())


def test_training_by_it_alone_makes_scores_follow():
    model, pruning, _ = prepared("evit")
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    x, seen = images(4), []
    for _ in range(15):
        loss = step(model, pruning, x)["guidance"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.5 * seen[0]


def test_dense_and_self_judge():
    dense = tiny()
    model, pruning, guide = prepared("evit", judge="dense")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model(images(2))
    forward = pruning._attached.steps.take()[-1]
    assert torch.allclose(guide.maps(forward, 2), prunex.explain(METHOD, dense, images(2)).maps, atol=1e-6)
    model, pruning, guide = prepared("evit", judge="self")
    assert guide.teacher is None
    model(images(2))
    forward = pruning._attached.steps.take()[-1]
    assert torch.allclose(guide.maps(forward, 2), prunex.explain(METHOD, model, images(2)).maps, atol=1e-6)
    assert model.training


def test_cost_is_bounded_by_share_every_and_cache():
    x = images(4)
    model, pruning, guide = prepared("evit", share=0.5)
    step(model, pruning, x)
    assert guide.explained == 2
    model, pruning, guide = prepared("evit", every=3)
    assert ["guidance" in step(model, pruning, x) for _ in range(4)] == [True, False, False, True]
    assert guide.explained == 8
    plain = [float(step(*prepared("evit")[:2], x)["guidance"].detach()) for _ in range(1)][0]
    model, pruning, guide = prepared("evit", cache=6)
    losses = [float(step(model, pruning, x)["guidance"].detach()) for _ in range(3)]
    assert guide.explained == 4
    assert losses == pytest.approx([plain] * 3, rel=1e-5)
    step(model, pruning, images(8, seed=5))
    assert len(guide._known) == 6
    step(model, pruning, x, torch.tensor([0, 1, 2, 3]))  # another class is another map
    assert guide.explained > 12


def test_copies_and_slim_models_do_not_have_it():
    model, pruning, _ = prepared("evit")
    assert "guidance" not in step(copy.deepcopy(model), prunex.attached(copy.deepcopy(model)), images(2))
    assert not prunex.attached(prunex.slim(model))._attached.more


def test_images_that_say_nothing_are_left_out():
    model, pruning, guide = prepared("evit")
    model(images(2))
    scores, maps = torch.rand(2, 16, requires_grad=True), torch.rand(2, 16)
    there = torch.ones(2, 16, dtype=torch.bool)
    one = guide._distance(scores[:1], maps[:1], there[:1])
    both = guide._distance(scores, torch.stack([maps[0], torch.zeros(16)]), there)
    assert float(one) == pytest.approx(float(both))
    loss = guide._distance(scores, torch.zeros(2, 16), there)
    loss.backward()
    assert float(loss) == 0
    assert bool(scores.grad.isfinite().all())


def test_masks_of_units_follow_relevance_of_the_class():
    model = tiny()
    pruning = prunex.attach(model, "xpruner", budget=0.6)
    guide = UnitGuidance(model, weight=1.0)
    pruning.also(guide)
    x, labels = images(6), torch.tensor([0, 0, 1, 1, 2, 2])
    optimiser = torch.optim.Adam(pruning.pruner.masks(), 0.02)
    with torch.no_grad():
        for m in pruning.pruner.masks():
            m.add_(0.01 * torch.rand_like(m))
    seen = []
    for _ in range(20):
        loss = pruning.losses(x, labels)["unit_guidance"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.6 * seen[0]
    assert all(p.grad is None for p in model.parameters())
    rows = pruning.pruner.mask(pruning.pruner.branches[0]).grad
    assert bool((rows[:3] != 0).any())
    assert bool((rows[3:] == 0).all())
    pruning.pruner.stage = "thresholds"
    assert "unit_guidance" not in pruning.losses(x, labels)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "tokentmm"}, "did you mean"),
        ({"judge": "teacher"}, "judge"),
        ({"loss": "mse"}, "loss"),
        ({"weight": -1}, "weight=-1"),
        ({"temperature": 0}, "temperature=0"),
        ({"share": 0}, "share=0"),
        ({"share": 1.5}, "share=1.5"),
        ({"every": 0}, "every=0"),
        ({"cache": -1}, "cache=-1"),
    ],
)
def test_wrong_options_are_refused(options, told):
    model = tiny()
    prunex.attach(model, "evit")
    with pytest.raises(prunex.PrunexError, match=told):
        Guidance(model, **options)


def test_a_model_without_scores_is_refused():
    with pytest.raises(prunex.PrunexError, match="attach one first"):
        Guidance(tiny())
    with pytest.raises(prunex.PrunexError, match="needs xpruner"):
        UnitGuidance(tiny())


@pytest.mark.parametrize("value", [1 / 197, 0.3, 0.98, 1.0])
def test_constant_scores_are_left_out_to_the_last_bit(value):
    """Rounding of their mean is no variation: scaled up it would be a gradient of 1e7."""
    _, _, guide = prepared("evit")
    there = torch.ones(2, 196, dtype=torch.bool)
    scores = torch.full((2, 196), value).requires_grad_()
    maps = torch.rand(2, 196, generator=torch.Generator().manual_seed(0))
    loss = guide._distance(scores, maps, there)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss == 0
    assert not gradient.any()
    mixed = torch.stack([scores.detach()[0], maps[1] * 1e-2 + value])
    assert float(guide._distance(mixed, maps, there)) == pytest.approx(0, abs=1e-4)  # a little variation counts


def test_masks_of_units_that_are_constant_are_left_out():
    model = tiny()
    pruning = prunex.attach(model, "xpruner")
    guide = UnitGuidance(model)
    with torch.no_grad():
        for b in pruning.pruner.branches:
            pruning.pruner.mask(b).fill_(0.98)
    loss = guide(images(3), torch.tensor([0, 1, 1]))["unit_guidance"]
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in pruning.pruner.parameters())


def test_one_output_has_no_class_to_explain():
    model = tiny(num_classes=1).train()
    pruning = prunex.attach(model, "evit", stages=(1, 2), keep_ratio=0.6)
    pruning.also(Guidance(model, METHOD))
    model(images(2))
    assert torch.isfinite(pruning.losses(torch.tensor([0, 1]))["guidance"])


def test_relevance_against_the_class_counts_as_none():
    model = tiny().train()
    pruning = prunex.attach(model, "evit", stages=(1,), keep_ratio=0.6)
    pruning.also(Guidance(model, "lrp", loss="pearson"))
    x, labels = images(4), torch.tensor([0, 1, 2, 3])
    found = float(step(model, pruning, x, labels)["guidance"].detach())
    model(x)
    scores = pruning._attached.steps.take()[-1].trace.stages[0].score.detach()
    maps = prunex.explain("lrp", tiny(), x, labels).maps.flatten(1)
    assert (maps < 0).any()
    told = [
        1 - float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(scores, m, strict=True)]).mean())
        for m in (maps.clamp(min=0), maps)
    ]
    assert found == pytest.approx(told[0], abs=1e-4)
    assert abs(found - told[1]) > 1e-3


def test_a_map_of_another_class_is_not_taken_from_the_cache():
    model, pruning, guide = prepared("evit", cache=20)
    x = images(3)
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 2])):
        model(x)
        forward = dataclasses.replace(pruning._attached.steps.take()[-1], labels=labels)
        wanted = prunex.explain(METHOD, tiny(), x, labels).maps
        assert torch.allclose(guide.maps(forward, 3), wanted, atol=1e-6)
    assert guide.explained == 5  # the third image came again with its class


def test_units_that_speak_against_the_class_count_as_relevant():
    model = tiny()
    pruning = prunex.attach(model, "xpruner", budget=0.6)
    guide = UnitGuidance(model)
    x, labels = images(3), torch.tensor([0, 1, 2])
    with torch.no_grad():
        for m in pruning.pruner.masks():
            m.copy_(torch.rand(m.shape, generator=torch.Generator().manual_seed(0)))
    found = float(guide(x, labels)["unit_guidance"].detach())
    relevance = guide.judge.relevance(model, x, labels)
    assert any((r.sum(1) < 0).any() for r in relevance.values())
    each = []
    for b in pruning.pruner.branches:
        mask = pruning.pruner.mask(b).detach()[labels].unflatten(1, (b.units, b.width)).mean(2)
        size = relevance[b.key].abs().sum(1)
        each += [1 - torch.corrcoef(torch.stack([m, r.to(m)]))[0, 1] for m, r in zip(mask, size, strict=True)]
    assert found == pytest.approx(float(torch.stack(each).mean()), abs=1e-4)


def test_maps_are_made_in_full_precision_under_autocast():
    model, pruning, guide = prepared("evit")
    x, labels = images(3), torch.tensor([0, 1, 2])
    model(x)
    forward = dataclasses.replace(pruning._attached.steps.take()[-1], labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = guide.maps(forward, 3)
    assert torch.allclose(found, prunex.explain(METHOD, tiny(), x, labels).maps, rtol=1e-5, atol=1e-8)


def test_scores_of_any_size_are_followed_alike():
    """Class attention over many patches may be tiny; squares of 1e-20 are lost in float32."""
    _, _, guide = prepared("evit")
    scores, maps = torch.rand(2, 16), torch.rand(2, 16)
    there = torch.ones(2, 16, dtype=torch.bool)
    wanted = guide._distance(scores, maps, there)
    for size in (1e-20, 1e-30, 1e10):
        assert float(guide._distance(scores * size, maps * size, there)) == pytest.approx(float(wanted), rel=1e-4)
