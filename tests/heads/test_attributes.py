"""Attributes against a slow rewrite: sums that are exact, losses, what pruners leave, and the model as it was."""

import math

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from prunex.heads.attributes import apart, mistaken, overlap
from prunex.vit.aside import as_found
from tests.vits import assert_same_state, images, images_for, largest, randomise, state_of, tiny

PRUNERS = {
    "topk": {"keep_ratio": 0.5, "stages": (1, 2)},
    "evit": {"keep_ratio": 0.5, "stages": (1, 2)},
    "dynamicvit": {"keep_ratio": 0.5, "stages": (1, 2)},
    "tome": {"r": 3},
}
FAMILIES = ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class", "siglip"]


def headed(family="vit", **options):
    """A model in float64 with a head whose attributes differ in all they have."""
    model = tiny(family).double()
    head = prunex.attach(model, "attributes", **{"attributes": 4} | options)
    randomise(head.head)
    return model, head


def slow(head, tokens):
    """Attention, features, scores and assignment of patch tokens [n, D] of one image, one by one."""
    h = head.head
    cos = torch.zeros(len(tokens), h.count, dtype=torch.float64)
    for p, x in enumerate(tokens):
        for m, u in enumerate(h.attributes):
            a, b = h.of_tokens.weight @ x, h.of_attributes.weight @ u
            cos[p, m] = (a @ b) / (max(a.norm(), 1e-6) * max(b.norm(), 1e-6))
    e = (cos / head.options["temperature"]).exp()
    attention = (e / e.sum(0)).T
    features = torch.stack([sum(a[p] * tokens[p] for p in range(len(tokens))) for a in attention])
    w = (1 + h.strength.exp()).log()
    scores = torch.stack(
        [
            sum(w[m, k] * (h.values.weight[k] @ features[m]) for m in range(h.count)) + h.values.bias[k]
            for k in range(h.classes)
        ]
    )
    return attention, features, scores, e / e.sum(1, keepdim=True)


def slow_overlap(attention):
    total, pairs = 0.0, 0
    for m in range(len(attention)):
        for n in range(len(attention)):
            if m != n:
                total, pairs = total + (attention[m] * attention[n]).sqrt().sum(), pairs + 1
    return total / pairs


def slow_cos(a, b):
    return (a @ b) / (a.norm() * b.norm())


def slow_consistency(F, G):
    return sum(
        0.5 * (1 - slow_cos(f.sum(0), g.sum(0).detach())) + 0.5 * (1 - slow_cos(g.sum(0), f.sum(0).detach()))
        for f, g in zip(F, G, strict=True)
    ) / len(F)


def slow_discriminability(F, G):
    total, count = 0.0, 0
    for f, g in zip(F, G, strict=True):
        for one, other in ((f, g), (g, f)):
            for m in range(len(f)):
                e = torch.stack([(slow_cos(one[m], other[n]) / 0.2).exp() for n in range(len(f))])
                total, count = total - (e[m] / e.sum()).log(), count + 1
    return total / count


@torch.no_grad()
def test_the_forward_is_its_definition():
    model, head = headed()
    tokens = model.forward_features(images_for(model))
    reading = head.from_tokens(tokens)
    for i in range(3):
        attention, features, scores, assignment = slow(head, tokens[i, 1:])
        assert largest(reading.attention[i], attention) < 1e-12
        assert largest(reading.features[i], features) < 1e-12
        assert largest(reading.logits[i], scores) < 1e-12
        assert largest(reading.assignment[i], assignment) < 1e-12
    assert torch.equal(model.forward_head(tokens), reading.logits)


@pytest.mark.parametrize("pruner", [None, *PRUNERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_sums_to_the_scores(family, pruner):
    model, head = headed(family)
    x, target = images_for(model), torch.tensor([1, 0, 4])
    if pruner:
        prunex.attach(model, pruner, **PRUNERS[pruner])
    with torch.no_grad():
        logits = model(x)
    e = head.evidence(x, target)
    mine = torch.stack([e.contributions[i, :, k] for i, k in enumerate(target)])
    assert largest(e.contributions.sum(1) + e.bias, logits) < 1e-12
    assert largest(e.spatial.sum((2, 3)), mine) < 1e-6  # shares of merged patches are float32
    assert largest(e.spatial.sum(1), e.maps) < 1e-6
    assert largest(e.row.sum(1) + e.bias[target], logits.gather(1, target[:, None])[:, 0]) < 1e-6
    assert largest(e.attention.sum((2, 3)), torch.ones(3, 4)) < 1e-6
    assert not e.row[:, : e.trace.prefix].any()
    assert e.names == ("attribute 1", "attribute 2", "attribute 3", "attribute 4")
    assert all(len(value) == 3 for value in e.info().values())
    if pruner in ("topk", "dynamicvit"):
        gone = ~e.trace.kept()
        assert gone.any()
        assert not e.maps[gone].any()


def test_class_maps_are_their_definition():
    model, head = headed()
    x = images_for(model)
    e = head.evidence(x, 2)
    tokens = model.forward_features(x)[:, 1:]
    h = head.head
    maps = e.class_maps([2, 0])
    assert maps.shape == (3, 2, 4, 4)
    for i in range(3):
        for place, k in enumerate((2, 0)):
            attention = slow(head, tokens[i])[0]
            v, w = h.values.weight[k], h.weights[:, k]
            raw = torch.stack([(w * attention[:, p]).sum() * (v @ tokens[i, p]) for p in range(16)]).clamp(min=0)
            wanted = (raw - raw.min()) / (raw.max() - raw.min())
            assert largest(maps[i, place].flatten(), wanted) < 1e-10
    assert largest(e.class_maps(2), maps[:, :1]) < 1e-12
    assert largest(e.class_maps()[:, [2, 0]], maps) < 1e-12
    with pytest.raises(PrunexError, match=r"classes=5 does not exist: classes are 0\.\.4"):
        e.class_maps([5])


def test_the_losses_are_their_definitions():
    model, head = headed(consistency_weight=0.7, discriminability_weight=0.3, diversity_weight=0.2)
    model.train()
    first, second = (head.from_tokens(model.forward_features(images(3, seed=s).double())) for s in (1, 2))
    losses = head.losses()
    assert sorted(losses) == ["consistency", "discriminability", "diversity"]
    F, G = first.features, second.features
    wanted = {
        "consistency": 0.7 * slow_consistency(F, G),
        "discriminability": 0.3 * slow_discriminability(F, G),
        "diversity": 0.2 * sum(slow_overlap(a) / 3 for r in (first, second) for a in r.attention),
    }
    weights = list(head.head.parameters())
    for name, value in wanted.items():
        assert largest(losses[name], value) < 1e-12
        one, two = (
            torch.autograd.grad(v, weights, retain_graph=True, allow_unused=True) for v in (losses[name], value)
        )
        assert [a is None for a in one] == [b is None for b in two]
        assert max(largest(a, b) for a, b in zip(one, two, strict=True) if a is not None) < 1e-9


def test_one_view_has_no_losses_between_and_three_have_their_mean():
    model, head = headed()
    model.train()
    views = [head.from_tokens(model.forward_features(images(n, seed=s).double())) for n, s in ((3, 1), (2, 2))]
    assert sorted(head.losses()) == ["diversity"]
    views = [head.from_tokens(model.forward_features(images(3, seed=s).double())).features for s in range(3)]
    pairs = [(views[0], views[1]), (views[0], views[2]), (views[1], views[2])]
    assert largest(head.losses()["consistency"], 0.5 * sum(slow_consistency(*p) for p in pairs) / 3) < 1e-12


@pytest.mark.parametrize("count", [2, 3, 8])
def test_diversity_is_1_for_identical_and_0_for_disjoint_maps(count):
    one = torch.rand(2, 1, 64, dtype=torch.float64).softmax(-1).expand(-1, count, -1)
    assert abs(float(overlap(one)) - 1) < 1e-6
    peaked = (30 * torch.rand(2, 1, 64, dtype=torch.float64)).softmax(-1).expand(-1, count, -1)
    assert abs(float(overlap(peaked)) - 1) < 1e-6
    disjoint = torch.eye(count, dtype=torch.float64).repeat_interleave(4, 1).div(4).expand(2, -1, -1)
    assert abs(float(overlap(disjoint))) < 1e-6


def test_gradients_are_finite_where_attention_is_exactly_zero():
    attention = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.25, 0.75]]], requires_grad=True)
    value = overlap(attention)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.5)
    assert torch.isfinite(attention.grad).all()
    assert attention.grad[0, 1, 1] == pytest.approx(1.0)
    model, head = headed(temperature=0.01)  # peaked, and slots that nobody is left in
    prunex.attach(model, "topk", **PRUNERS["topk"]).masked = True
    model.train()
    x = images_for(model)
    (model(x).square().sum() + model(x + 0.1).sum() + sum(head.losses().values())).backward()
    assert (head.read(x, masked=True).attention == 0).any()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > len(list(head.head.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_consistency_is_0_for_identical_views_and_its_other_side_has_no_gradient():
    features, others = (torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert abs(float(apart(features, features))) < 1e-12
    apart(features, others.detach()).backward()
    assert features.grad.abs().sum() > 0
    model, head = headed(discriminability_weight=0, diversity_weight=0, consistency_weight=1)
    first = head.head(head.read(images_for(model)).tokens, None)
    pair = []
    for leaf in (features, others):
        reading = head.head(first.tokens, None)
        reading.features = leaf
        pair.append(reading)
    features.grad = None
    head.head.losses_between(pair)["consistency"].backward()
    for leaf, other in ((features, others), (others, features)):
        fixed = other.detach()
        alone = leaf.detach().requires_grad_()
        (0.5 * sum(1 - slow_cos(a.sum(0), b.sum(0)) for a, b in zip(alone, fixed, strict=True)) / 3).backward()
        assert largest(leaf.grad, alone.grad) < 1e-12


def test_discriminability_falls_where_attributes_are_found_again():
    own = torch.eye(4, dtype=torch.float64).expand(2, -1, -1)
    assert float(mistaken(own, own)) == pytest.approx(math.log(1 + 3 * math.exp(-5)))
    assert float(mistaken(own, own[:, [1, 0, 3, 2]])) > 5
    same = torch.ones(2, 4, 8, dtype=torch.float64)
    assert float(mistaken(same, same)) == pytest.approx(math.log(4))


def test_the_order_of_attributes_is_of_no_matter():
    model, head = headed()
    model.train()

    def step():
        logits = [model(images(3, seed=s).double()) for s in (1, 2)]
        return [*logits, *head.losses().values()]

    before = step()
    order = [2, 0, 3, 1]
    with torch.no_grad():
        head.head.attributes.copy_(head.head.attributes[order].clone())
        head.head.strength.copy_(head.head.strength[order].clone())
    after = step()
    assert len(before) == 5
    assert max(largest(a, b) for a, b in zip(before, after, strict=True)) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_masked_equals_removed_and_a_batch_equals_single_images(pruner, family):
    model, head = headed(family)
    x = images_for(model)
    with torch.no_grad():
        pruning = prunex.attach(model, pruner, **PRUNERS[pruner])
        removed = head.evidence(x, 1)
        singles = torch.cat([model(x[i : i + 1]) for i in range(3)])
        pruning.masked = True
        masked = head.evidence(x, 1)
    for name in ("logits", "row", "spatial", "attention", "contributions"):
        assert largest(getattr(masked, name), getattr(removed, name)) < 1e-9, name
    assert largest(singles, removed.logits) < 1e-9
    assert largest(masked.class_maps(), removed.class_maps()) < 1e-6


@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_keep_ratio_one_is_the_unpruned_score(pruner):
    model, _ = headed()
    x = images_for(model)
    with torch.no_grad():
        dense = model(x)
        prunex.attach(model, pruner, keep_ratio=1.0, stages=(1, 2))
        assert largest(model(x), dense) < 1e-12


def test_the_start():
    model = tiny()
    before = state_of(model)
    x = images_for(model)
    with torch.no_grad():
        dense = model(x)
        head = prunex.attach(model, "attributes", attributes=6)
        h = head.head
        assert largest(h.attributes @ h.attributes.T, 48 * torch.eye(6)) < 1e-3
        assert largest(h.weights, torch.full((6, 5), 1 / 6)) < 1e-6
        assert torch.equal(h.values.weight, model.head.weight)
        assert torch.equal(h.values.bias, model.head.bias)
        assert h.values.weight.data_ptr() != model.head.weight.data_ptr()
        assert not torch.equal(model(x), dense)
        head.detach()
        assert torch.equal(model(x), dense)
    assert_same_state(model, before)


def test_another_classifier_is_no_start():
    model = tiny()
    model.head = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 5))
    h = prunex.attach(model, "attributes").head
    assert not torch.equal(h.values.weight, model.head[1].weight)
    model = tiny()
    model.head = nn.Linear(48, 5, bias=False)
    h = prunex.attach(model, "attributes", attributes=60).head  # more than the model is wide
    assert torch.equal(h.values.weight, model.head.weight)
    assert not h.values.bias.any()
    assert largest(h.attributes.norm(dim=1), torch.full((60,), 48**0.5)) < 1e-4


@pytest.mark.parametrize(("progress", "share"), [(0, 0), (0.05, 0.25), (0.2, 1), (1, 1)])
def test_the_losses_warm_up(progress, share):
    model, head = headed(warmup=0.2)
    model.train()
    readings = [head.from_tokens(model.forward_features(images(3, seed=s).double())) for s in (1, 2)]
    whole = head.losses()
    assert len(whole) == 3
    head.progress = progress
    for name, value in (head.head.losses_between(readings)).items():
        assert float(value) == pytest.approx(share * float(whole[name]))
    both = sum(float(head.head.losses(r)["diversity"]) for r in readings)
    assert both == pytest.approx(share * float(whole["diversity"]))
    with pytest.raises(PrunexError, match=r"progress=2 is not allowed"):
        head.progress = 2


def test_what_weighs_nothing_or_has_no_other_is_absent():
    for options in ({"consistency_weight": 0, "discriminability_weight": 0, "diversity_weight": 0}, {"attributes": 1}):
        model, head = headed(**options)
        model.train()
        for s in (1, 2):
            model(images(3, seed=s).double())
        assert sorted(head.losses()) == (["consistency"] if "attributes" in options else [])


def test_macs_are_those_of_its_products():
    model, head = headed(attribute_width=7)
    patches, width, inner, count, classes = 16, 48, 7, 4, 5
    by_hand = 0
    by_hand += patches * width * inner + count * width * inner
    by_hand += patches * inner * count + count * patches * width
    by_hand += count * width * classes + count * classes
    assert head.head.macs(patches) == by_hand
    with as_found(model, train=False), torch.no_grad():
        reading = head.read(images_for(model))
    assert largest(head.head.outputs(reading)["attributes"].sum(1) + head.head.values.bias, reading.logits) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"attributes": 0},
        {"attributes": 1.5},
        {"attributes": True},
        {"temperature": 0},
        {"temperature": float("nan")},
        {"consistency_weight": -1},
        {"discriminability_weight": -0.1},
        {"diversity_weight": float("inf")},
        {"warmup": 2},
        {"attribute_width": 0},
    ],
)
def test_bad_options_leave_the_model_as_it_was(options):
    model = tiny()
    before = state_of(model)
    with pytest.raises(PrunexError, match=next(iter(options))) as caught:
        prunex.attach(model, "attributes", **options)
    assert "\n" not in str(caught.value)
    assert_same_state(model, before)


def test_it_claims_no_paper():
    model, head = headed()
    with pytest.raises(PrunexError, match="attributes has no official weights"):
        head.load_official(head.head.state_dict())
    assert next(m.paper for m in prunex.methods("head") if m.name == "attributes").startswith("ours; inspired by")
    model.reset_classifier(0)
    head.detach()
    with pytest.raises(PrunexError, match="attributes needs classes"):
        prunex.attach(model, "attributes")
