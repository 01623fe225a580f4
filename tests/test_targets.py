"""Anything that a model answers can be explained: targets beside classes, by every explainer, or refused by name."""

import pytest
import torch
from torch import nn

import prunex
from prunex.errors import PrunexError
from prunex.metrics import deletion, faithfulness_correlation, insertion, removal_curves
from prunex.targets import Class, Contrast, Entropy, Margin, MultiLabel, Regression, Similarity, part
from prunex.vit import forward
from tests.vits import tiny

QUICK = {"shap": {"budget": 40, "output": "logit"}, "integrated_gradients": {"steps": 4}, "vit_cx": {"max_masks": 3}}
NO_CLASS = ("raw_attention", "dino", "rollout", "attention_flow")
GRADIENTS = (
    *("generic_attention", "grad_cam", "grad_sam", "tokentm", "integrated_gradients", "beyond_intuition"),
    "legrad",
)
RULES = ("lrp", "partial_lrp", "transformer_attribution")
RUNS = ("atman", "shap", "vit_cx", "r_cut")
TRAINED = ("diffmask", "vit_shapley", "concept_transformer", "vit_net", "attributes", "mean_patch")


def images(batch=2, seed=1):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def explained(method, model, target, **options):
    return prunex.explain(method, model, images(), target, **{**QUICK.get(method, {}), **options})


def test_every_explainer_is_sorted_here():
    names = {m.name for m in prunex.methods("explainer")}
    assert names == {*NO_CLASS, *GRADIENTS, *RULES, *RUNS, *TRAINED}


@pytest.mark.parametrize("method", [*NO_CLASS, *GRADIENTS])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_function_that_is_a_class_is_that_class_bit_for_bit(method, pruned):
    model = tiny("vit", depth=3).eval()
    if pruned:
        prunex.attach(model, "topk", keep_ratio=0.7, stages=(1,))
    want = explained(method, model, 3)
    for target in (Class(3), lambda output: output[:, 3]):
        e = explained(method, model, target)
        assert torch.equal(e.maps, want.maps)
        assert torch.equal(e.raw, want.raw)
        assert e.function is target
        assert e.target.tolist() == [-1, -1]
        torch.testing.assert_close(e.logits[:, 0], want.logits[:, 3])


@pytest.mark.parametrize("method", RULES)
def test_rules_follow_a_linear_target(method):
    model = tiny("vit", depth=3).eval()
    torch.testing.assert_close(explained(method, model, Class(3)).maps, explained(method, model, 3).maps)
    explained(method, model, Contrast(1, 2))
    with pytest.raises(PrunexError, match="linear layers behind a ViT"):
        explained(method, model, Entropy())


@pytest.mark.parametrize("method", ["atman", "shap", "vit_cx", "r_cut"])
@pytest.mark.parametrize("target", [Class(3), Contrast(3, 1), Margin(), Margin(2), Entropy(), Regression(4)])
def test_methods_that_run_the_model_take_the_number_itself(method, target):
    model = tiny("vit", depth=3).eval()
    e = explained(method, model, target)
    assert e.maps.isfinite().all()
    assert e.maps.flatten(1).std(1).min() > 0
    with torch.no_grad():
        torch.testing.assert_close(e.logits[:, 0], target(model(images())), rtol=1e-4, atol=1e-5)


def test_shapley_values_of_a_function_are_those_of_its_class_and_sum_to_its_change():
    model = tiny("vit", depth=3).eval()
    want = explained("shap", model, 3)
    for output in ("logit", "probability"):  # a number of its own kind has no probability
        torch.testing.assert_close(explained("shap", model, Class(3), output=output).maps, want.maps)
    apart = explained("shap", model, 1).maps
    torch.testing.assert_close(explained("shap", model, Contrast(3, 1)).maps, want.maps - apart, rtol=1e-4, atol=1e-5)


def test_a_contrast_is_the_difference_for_methods_that_are_linear_in_the_target():
    model = tiny("vit", depth=3).eval()
    for method in ("integrated_gradients",):
        a, b, both = (explained(method, model, t).maps for t in (3, 1, Contrast(3, 1)))
        torch.testing.assert_close(both, a - b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", TRAINED)
def test_what_was_trained_for_classes_refuses_by_name(method):
    model = tiny("vit", depth=2).eval()
    with pytest.raises(PrunexError):
        explained(method, model, Class(3))


def test_an_embedding_model_is_explained_by_likeness():
    model = tiny("vit", depth=3, num_classes=0).eval()
    with torch.no_grad():
        reference = model(images(1, seed=5))[0]
    e = explained("tokentm", model, Similarity(reference))
    with torch.no_grad():
        want = torch.cosine_similarity(model(images()), reference[None])
    torch.testing.assert_close(e.logits[:, 0], want, rtol=1e-4, atol=1e-5)
    assert e.maps.flatten(1).std(1).min() > 0
    with pytest.raises(PrunexError, match="no classifier"):
        explained("tokentm", model, 0)
    with pytest.raises(PrunexError, match="embedding has 3 numbers"):
        explained("tokentm", model, Similarity(torch.ones(3)))


class Several(nn.Module):
    """Heads of two tasks in one dictionary."""

    def __init__(self):
        super().__init__()
        self.backbone = tiny("vit", depth=2, num_classes=0)
        self.kind, self.age = nn.Linear(self.backbone.embed_dim, 4), nn.Linear(self.backbone.embed_dim, 1)

    def forward(self, x):
        features = self.backbone(x)
        return {"kind": self.kind(features), "more": (features, self.age(features)[:, 0])}


def test_a_path_picks_the_head():
    torch.manual_seed(0)
    model = Several().eval()
    with pytest.raises(PrunexError):
        explained("generic_attention", model, Class(2, path="kin"))
    kind = explained("generic_attention", model, Class(2, path="kind"))
    age = explained("generic_attention", model, Regression(path="more.1"))
    assert not torch.equal(kind.maps, age.maps)
    with torch.no_grad():
        torch.testing.assert_close(age.logits[:, 0], model(images())["more"][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*GRADIENTS, *RULES, *RUNS, "rollout"])
def test_several_labels_are_those_one_by_one(method):
    model = tiny("vit", depth=3).eval()
    together = explained(method, model, MultiLabel([4, 0]))
    for e, label in zip(together, (4, 0), strict=True):
        want = explained(method, model, label)
        assert e.target.tolist() == [label, label]
        torch.testing.assert_close(e.maps, want.maps, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["generic_attention", "grad_cam", "grad_sam", "tokentm", "rollout", "legrad"])
def test_several_labels_share_a_forward(method, monkeypatch):
    model = tiny("vit", depth=3).eval()
    runs = []
    whole = forward.encode
    monkeypatch.setattr(forward, "encode", lambda *a, **k: runs.append(1) or whole(*a, **k))
    explained(method, model, 0)
    one = len(runs)
    assert one
    explained(method, model, MultiLabel([0, 1, 2, 3]))
    assert len(runs) == 2 * one


def test_metrics_measure_the_same_number():
    model = tiny("vit", depth=3).eval()
    e = explained("tokentm", model, Contrast(3, 1))
    both = removal_curves(model, images(), e.maps, Contrast(3, 1))
    each = [removal_curves(model, images(), e.maps, k, output="logit") for k in (3, 1)]
    for metric in (deletion, insertion):
        torch.testing.assert_close(metric(both), metric(each[0]) - metric(each[1]), rtol=1e-3, atol=1e-4)
    assert faithfulness_correlation(model, images(), e.maps, e.function, samples=20).isfinite().all()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Class(5), "outputs 0..4"),
        (Contrast(0, 9), "outputs 0..4"),
        (lambda output: output, "one floating-point number"),
        (lambda output: output.argmax(1), "one floating-point number"),
        (lambda output: output[:, 0] - output[:, 0].mean(), "answers by more than"),
        (lambda output: 1 / 0, "ZeroDivisionError"),
        ("cat", "not allowed"),
    ],
)
def test_bad_targets(target, message):
    with pytest.raises(PrunexError, match=message):
        explained("generic_attention", tiny("vit", depth=2).eval(), target)


def test_bad_parts():
    with pytest.raises(PrunexError, match="each once"):
        MultiLabel([1, 1])
    with pytest.raises(PrunexError, match="embedding"):
        Similarity(torch.zeros(3))
    with pytest.raises(PrunexError, match="say which"):
        part({"a": torch.zeros(1, 2), "b": torch.zeros(1, 3)})
    with pytest.raises(PrunexError, match="one output"):
        Entropy()(torch.zeros(2, 1))


def test_the_model_is_left_as_it_was():
    model = tiny("vit", depth=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explained("tokentm", model, Contrast(0, 1))
    assert model.training
    assert not model._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
