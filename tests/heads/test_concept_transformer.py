"""The Concept Transformer: scores are sums of contributions, losses by hand, interventions, labels that do not fit."""

import math

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from tests.vits import images, images_for, largest, randomise, relative, state_of, tiny

NAN = float("nan")
BOTH = {"concepts": ["loop", "bar"], "spatial": ["ink", "paper", "edge"], "unsupervised": 2}


def attach(model=None, **options):
    model = tiny().double() if model is None else model
    head = prunex.attach(model, "concept_transformer", **(BOTH | options))
    randomise(head.head)
    return model, head


def slow_scores(head, tokens):
    """The definition, one query and one head at a time."""
    module, total = head.head, 0
    for stream, attention in module.streams.items():
        keys, values = attention.kv(attention.concepts).chunk(2, -1)
        width = module.width // attention.heads
        for image in range(len(tokens)):
            for query in tokens[image, 1:] if stream == "spatial" else tokens[image, :1]:
                count = tokens.shape[1] - 1 if stream == "spatial" else 1
                gathered = []
                for h in range(attention.heads):
                    at = slice(h * width, (h + 1) * width)
                    q = attention.q.weight[at] @ query
                    weights = torch.stack([q @ k[at] / math.sqrt(width) for k in keys]).softmax(0)
                    gathered.append(sum(w * v[at] for w, v in zip(weights, values, strict=True)))
                score = attention.proj.weight @ torch.cat(gathered) + attention.proj.bias
                one = F.one_hot(torch.tensor(image), len(tokens)).to(score)[:, None]
                total = total + one * score / count
    return total


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_scores_are_what_the_definition_says(heads):
    model, head = attach(heads=heads)
    tokens = torch.randn(2, 17, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reading = head.from_tokens(tokens)
    assert relative(reading.logits, slow_scores(head, tokens)) < 1e-12
    for attention in reading.attention.values():
        assert largest(attention.sum(-1), torch.ones(())) < 1e-12


def test_contributions_and_bias_are_the_scores():
    model, head = attach()
    x = images_for(model)
    for target in range(5):
        evidence = head.evidence(x, target)
        assert evidence.names == ("loop", "bar", "ink", "paper", "edge", "unsupervised 1", "unsupervised 2")
        assert relative(evidence.contributions.sum(1) + evidence.bias, evidence.logits) < 1e-12
        assert relative(evidence.row.sum(1) + evidence.bias[target], evidence.logits[:, target]) < 1e-12
        assert relative(evidence.spatial.sum((2, 3)), evidence.contributions[:, 2:5, target]) < 1e-12
        assert relative(evidence.maps, evidence.spatial.sum(1)) < 1e-12


def test_explanation_loss_by_hand():
    model, head = attach(
        concepts=["a", "b", "c", "d"], spatial=0, unsupervised=0, explanation_weight=1, sparsity_weight=0
    )
    reading = head.from_tokens(torch.randn(2, 17, 48).double())
    even = torch.full((2, 2, 1, 4), 0.25).double()
    reading.attention = {"global": even}
    for labels, want in (([1, 0, 0, 0], 0.75), ([1, 1, 0, 0], 0.25), ([1, 1, 1, 1], 0.0)):
        losses = head.head.losses(reading, concepts=torch.tensor([labels, labels]))
        assert abs(float(losses["explanation"]) - want) < 1e-7
    # An image without annotation has no part in the mean, nor has one that has nothing at all.
    for skipped in ([NAN] * 4, [0, 0, 0, 0], [1, NAN, 0, 0]):
        losses = head.head.losses(reading, concepts=torch.tensor([[1.0, 0, 0, 0], skipped]))
        assert abs(float(losses["explanation"]) - 0.75) < 1e-7


def test_without_annotation_the_loss_is_exactly_zero_and_gradients_are_finite():
    model, head = attach()
    model.train()
    model(images_for(model))
    concepts, spatial = torch.full((3, 2), NAN), torch.full((3, 16, 3), NAN)
    losses = head.losses(concepts=concepts, spatial=spatial)
    assert float(losses["explanation"]) == 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in head.head.parameters() if p.grad is not None)


def test_a_batch_is_the_row_weighted_mean_of_its_images():
    model, head = attach(dropout=0.0, sparsity_weight=0)
    x = images_for(model, 4)
    generator = torch.Generator().manual_seed(0)
    spatial = (torch.rand(4, 16, 3, generator=generator) < 0.5).float()
    spatial[torch.rand(4, 16, generator=generator) < 0.4] = NAN
    rows = (spatial.sum(-1) > 0).sum(1).double()
    model.train()

    def loss(images, labels):
        head.forget()
        model(images)
        return head.losses(spatial=labels)["explanation"].double()

    singles = torch.stack([loss(x[i : i + 1], spatial[i : i + 1]) for i in range(4)])
    assert len(set(rows.tolist())) > 1
    assert relative((singles * rows).sum() / rows.sum(), loss(x, spatial)) < 1e-12


def test_the_order_of_concepts_changes_nothing():
    model, head = attach(dropout=0.0)
    x, order = images_for(model), torch.tensor([2, 0, 1])
    labels = (torch.rand(3, 16, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    model.train()
    before, losses = model(x), head.losses(spatial=labels)
    with torch.no_grad():
        concepts = head.head.streams["spatial"].concepts
        concepts.copy_(concepts[order].clone())
    after, again = model(x), head.losses(spatial=labels[:, :, order])
    assert relative(after, before) < 1e-12
    assert all(relative(again[k], losses[k]) < 1e-12 for k in losses)


def test_an_intervention_takes_exactly_the_contribution():
    model, head = attach()
    prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2))
    x = images_for(model)
    evidence, logits = head.evidence(x), model(x)
    for i, name in enumerate(evidence.names):
        with head.intervene({name: 0}):
            assert relative(model(x), logits - evidence.contributions[:, i]) < 1e-12
        assert model(x).equal(logits)
    head.intervene({"loop": 0, "ink": 0})
    assert relative(model(x), logits - evidence.contributions[:, 0] - evidence.contributions[:, 2]) < 1e-12
    head.intervene({})
    assert model(x).equal(logits)
    with head.intervene({"loop": 1}), head.intervene({"bar": 0}):
        pass
    assert head.head.forced == {}


def test_dropped_patches_take_their_labels_with_them():
    """Masked training and removed inference see the same rows."""
    model, head = attach(dropout=0.0)
    pruning = prunex.attach(model, "topk", keep_ratio=0.5, stages=(1, 2))
    labels = (torch.rand(3, 4, 4, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    x, values = images_for(model), []
    for masked in (False, True):
        pruning.masked = masked
        model.train()
        model(x)
        values.append(head.losses(spatial=labels))
        kept = pruning.trace.kept()
    assert all(relative(values[1][k], values[0][k]) < 1e-9 for k in values[0])
    # Only rows of kept patches count: labels elsewhere are not looked at.
    model(x)
    other = torch.where(kept.unsqueeze(3), labels, 1 - labels)
    assert relative(head.losses(spatial=other)["explanation"], values[0]["explanation"]) < 1e-9


def test_none_is_the_concept_of_patches_that_have_nothing():
    model, head = attach(none=True, dropout=0.0, explanation_weight=1, sparsity_weight=0)
    assert head.head.names["spatial"] == ("ink", "paper", "edge", "none")
    model.train()
    reading = head.from_tokens(model.forward_features(images_for(model)))
    nothing = torch.zeros(3, 16, 3)
    attention = reading.attention["spatial"].mean(1)
    want = torch.tensor([0, 0, 0, 1.0]).double()
    assert relative(head.losses(spatial=nothing)["explanation"], (attention - want).square().sum(-1).mean()) < 1e-7
    with pytest.raises(PrunexError, match="none=True is for spatial concepts"):
        attach(spatial=0, none=True)


def test_losses_are_those_of_this_step():
    model, head = attach(dropout=0.0)
    x, concepts = images_for(model), torch.tensor([[1.0, 0], [0, 1], [NAN, NAN]])
    model.train()
    model(x)
    once = head.losses(concepts=concepts)
    assert {k: float(v) for k, v in head.losses(concepts=concepts).items()} == {k: float(v) for k, v in once.items()}
    model(x), model(x)
    twice = head.losses(concepts=concepts)
    assert all(relative(twice[k], 2 * once[k]) < 1e-12 for k in once)
    head.forget()
    assert head.losses(concepts=concepts) == {}
    model.eval()
    model(x)
    with torch.no_grad():
        model.train()(x)
    assert head.losses() == {}


def test_a_pooled_query_needs_no_class_token():
    model = tiny("avg_pool_no_class").double()
    with pytest.raises(PrunexError, match="asked by the class token, and this model's head reads none"):
        attach(model)
    model, head = attach(model, query="pooled")
    x = images_for(model)
    evidence = head.evidence(x, 1)
    assert relative(evidence.contributions.sum(1) + evidence.bias, evidence.logits) < 1e-12
    assert relative(evidence.row.sum(1) + evidence.bias[1], evidence.logits[:, 1]) < 1e-12
    assert head.spec["query"] == "pooled"


def test_a_pruner_that_pools_the_class_token_away_is_refused():
    model, _ = attach(tiny())
    before = state_of(model)
    with pytest.raises(PrunexError, match="asked by the class token"):
        prunex.attach(model, "hvt", stages=(1,))
    assert list(state_of(model)["tensors"]) == list(before["tensors"])
    model = tiny()
    prunex.attach(model, "hvt", stages=(1,))
    with pytest.raises(PrunexError, match="asked by the class token"):
        attach(model)
    attach(model, concepts=0, unsupervised=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": 0, "spatial": 0, "unsupervised": 0}, "has no concepts: give concepts"),
        ({"concepts": ["loop", "ink"]}, r"\['ink'\] are named twice"),
        ({"concepts": "loop"}, "concepts='loop' is not allowed: give a list of names"),
        ({"concepts": ["loop", 3]}, "give a list of names"),
        ({"concepts": -1}, "concepts=-1 is not allowed"),
        ({"concepts": True}, "give a list of names"),
        ({"heads": 5}, "heads=5 does not divide the model's width 48"),
        ({"heads": 0}, "heads=0 is not allowed"),
        ({"query": "patch"}, "unknown query 'patch'"),
        ({"dropout": 1.5}, "dropout=1.5 is not allowed"),
        ({"explanation_weight": -1}, "explanation_weight=-1 is not allowed"),
        ({"parity": "no"}, "parity='no' is not allowed"),
    ],
)
def test_bad_options(options, message):
    model = tiny()
    before = list(model.state_dict())
    with pytest.raises(PrunexError, match=message):
        attach(model, **options)
    assert list(model.state_dict()) == before


def test_labels_that_do_not_fit():
    model, head = attach()
    model.train()
    model(images_for(model))
    with pytest.raises(PrunexError, match=r"global concept labels have shape \[3, 3\]: give \[3, 2\], .* loop, bar"):
        head.losses(concepts=torch.zeros(3, 3))
    model(images_for(model))
    with pytest.raises(PrunexError, match=r"spatial concept labels have shape \[3, 9, 3\]: give \[3, 16, 3\]"):
        head.losses(spatial=torch.zeros(3, 9, 3))
    model(images_for(model))
    with pytest.raises(PrunexError, match="other numbers than 0, 1 and NaN"):
        head.losses(concepts=torch.full((3, 2), 0.5))
    model(images_for(model))
    with pytest.raises(PrunexError, match="concepts has 2 rows for a forward of 3 images"):
        head.losses(concepts=torch.zeros(2, 2))
    with pytest.raises(PrunexError, match="unknown concept 'lop': did you mean 'loop'"):
        head.intervene({"lop": 0})
    with pytest.raises(PrunexError, match="intervene: loop=2 is not allowed"):
        head.intervene({"loop": 2})
    with pytest.raises(PrunexError, match="has no tree: vit_net has one"):
        head.tree()
    with pytest.raises(PrunexError, match="no official concept_transformer of these options: missing"):
        head.load_official({"concepts": torch.zeros(1, 2, 48)})
    model, head = attach(concepts=0, unsupervised=0)
    model.train()
    model(images_for(model))
    with pytest.raises(PrunexError, match="there are global concept labels, and this head has no global concepts"):
        head.losses(concepts=torch.zeros(3, 2))


@pytest.mark.parametrize("stream", ["global", "spatial", "unsupervised"])
def test_effects_are_what_all_attention_on_a_concept_adds(stream):
    model = tiny()
    options = {"global": {"concepts": ["a", "b", "c"]}, "spatial": {"spatial": ["a", "b", "c"]}}
    head = prunex.attach(model, "concept_transformer", **options.get(stream, {"unsupervised": 3}))
    effects, names = head.head.effects(), head.head.all_names
    bias = head.evidence(images()).bias
    for number, name in enumerate(names):
        with head.intervene({other: float(other == name) for other in names}), torch.no_grad():
            assert largest(model(images()), (bias + effects[number]).expand(3, -1)) < 1e-5
