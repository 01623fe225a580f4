"""Attaching: refused without a trace on the model, found inside other modules, read back from the model."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from torch import nn

import prunex
from tests.vits import assert_same_state, images, images_for, largest, randomise, state_of, tiny

NAN = float("nan")
BAD_OPTIONS = {
    "unknown method": ("evitt", {}, "unknown pruner 'evitt': did you mean 'evit'.*Known: .*dynamicvit, evit, .*topk"),
    "method none": (None, {}, "method=None is not allowed"),
    "explainer as pruner": ("rollout", {}, "unknown pruner 'rollout'"),
    "unknown option": ("evit", {"keep_ration": 0.5}, "option of evit 'keep_ration': did you mean 'keep_ratio'"),
    "another's option": ("topk", {"teacher": True}, "option of topk 'teacher'.*Known: .*keep_ratio, .*stages"),
    "anatomy as option": ("topk", {"anatomy": 1}, "option of topk 'anatomy'"),
    "zero": ("evit", {"keep_ratio": 0}, r"keep_ratio=0 .*\(0, 1\]"),
    "negative": ("evit", {"keep_ratio": -0.5}, "keep_ratio=-0.5"),
    "above one": ("topk", {"keep_ratio": 1.5}, "keep_ratio=1.5"),
    "nan": ("dynamicvit", {"keep_ratio": NAN}, "keep_ratio=nan"),
    "infinite": ("dynamicvit", {"keep_ratio": float("inf")}, "keep_ratio=inf"),
    "true": ("evit", {"keep_ratio": True}, "keep_ratio=True"),
    "text": ("evit", {"keep_ratio": "0.7"}, "keep_ratio='0.7'"),
    "none": ("evit", {"keep_ratio": None}, "keep_ratio=None"),
    "tensor": ("evit", {"keep_ratio": torch.tensor(0.7)}, "keep_ratio=tensor"),
    "two of three": ("evit", {"keep_ratio": [0.7, 0.5]}, r"\[0.7, 0.5\] has 2 values for 3 stages"),
    "four of three": ("dynamicvit", {"keep_ratio": [0.7] * 4}, "has 4 values for 3 stages"),
    "no values": ("topk", {"keep_ratio": []}, "has 0 values"),
    "one bad of three": ("topk", {"keep_ratio": [0.7, 0.0, 0.5]}, r"keep_ratio=\[0.7, 0.0, 0.5\]"),
    "beyond depth": (
        "evit",
        {"stages": (1, 4)},
        r"stages=\(1, 4\) goes beyond the model's 4 blocks: allowed are 0\.\.3",
    ),
    "negative stage": ("evit", {"stages": (-1,)}, r"stages=\(-1,\)"),
    "unordered": ("dynamicvit", {"stages": (2, 1)}, r"stages=\(2, 1\) must rise"),
    "twice": ("topk", {"stages": (1, 1)}, r"stages=\(1, 1\) must rise"),
    "no stages": ("topk", {"stages": ()}, r"stages=\(\)"),
    "text stages": ("evit", {"stages": "12"}, "stages='12'"),
    "float stages": ("evit", {"stages": (1.0, 2.0)}, r"stages=\(1.0, 2.0\)"),
    "true stages": ("evit", {"stages": [True, 2]}, r"stages=\[True, 2\]"),
    "set of stages": ("evit", {"stages": {1, 2}}, r"stages=\{1, 2\}"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused_and_the_model_is_unchanged(case):
    method, options, message = BAD_OPTIONS[case]
    model = tiny(drop_path_rate=0.1).train()
    model.blocks[2].eval()
    before = state_of(model)
    with pytest.raises(prunex.PrunexError, match=message) as caught:
        prunex.attach(model, method, **options)
    assert "\n" not in str(caught.value)
    assert_same_state(model, before)
    assert prunex.attached(model) is None
    prunex.attach(model, "dynamicvit").detach()  # and a good one works afterwards


def test_attaching_twice_is_refused_and_the_first_stays():
    model = tiny()
    x = images_for(model)
    pruning = prunex.attach(model, "evit", keep_ratio=0.5)
    logits = model(x)
    before = state_of(model)
    with pytest.raises(prunex.PrunexError, match=r"pruned already by evit: detach\(\)"):
        prunex.attach(model, "topk")
    assert_same_state(model, before)
    assert torch.equal(model(x), logits)
    pruning.detach()
    prunex.attach(model, "topk")


def test_no_vit_or_two_or_a_wrong_path():
    with pytest.raises(prunex.PrunexError, match="no supported ViT in .*Sequential.*what works"):
        prunex.attach(nn.Sequential(nn.Linear(2, 2)), "evit")
    two = nn.ModuleDict({"a": tiny(), "b": tiny(seed=1)})
    before = state_of(two)
    with pytest.raises(prunex.PrunexError, match=r"ModuleDict holds 2 timm ViTs \('a', 'b'\)"):
        prunex.attach(two, "evit")
    with pytest.raises(prunex.PrunexError, match="'c' does not exist in ModuleDict; timm ViTs there: 'a', 'b'"):
        prunex.attach(two, "evit", path="c")
    for bad in (None, "model.pt", 3, torch.zeros(1)):
        with pytest.raises(prunex.PrunexError, match="expected a torch.nn.Module"):
            prunex.attach(bad, "evit")
    assert_same_state(two, before)
    pruning = prunex.attach(two, "evit", path="b")
    assert pruning.model is two["b"]
    assert not hasattr(two["a"], "prunex")
    assert prunex.attached(two, "b").method == "evit"
    assert prunex.attached(two, "a") is None
    with pytest.raises(prunex.PrunexError, match="holds 2 timm ViTs"):
        prunex.attached(two)


class Classifier(nn.Module):
    """A user's own module around a ViT."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"backbone": tiny(num_classes=0)})
        self.classify = nn.Linear(48, 3)

    def forward(self, x):
        return self.classify(self.net["backbone"](x))


@pytest.mark.parametrize("method", ["topk", "evit", "dynamicvit", "ia_red2", "diffrate"])
def test_inside_a_module_of_ones_own(method):
    outer = Classifier().eval()
    x = images()
    dense = outer(x)
    before = state_of(outer)
    with prunex.attach(outer, method, keep_ratio=0.5, stages=(1, 2)) as pruning:
        assert pruning.model is outer.net["backbone"]
        assert largest(outer(x), dense) > 1e-4
        outer.train()
        logits = outer(x)
        losses = pruning.losses()  # the head is the user's, so there are no logits to distil
        own = {"dynamicvit": {"ratio", "tokens"}, "ia_red2": {"ratio"}, "diffrate": {"flops"}}
        assert set(losses) == own.get(method, set())
        (logits.square().sum() + sum(losses.values())).backward()
        assert outer.classify.weight.grad is not None
        outer.eval()
    assert_same_state(outer, before)
    assert torch.equal(outer(x), dense)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("topk", {"keep_ratio": [0.8, 0.6], "stages": (0, 3)}),
        ("evit", {"keep_ratio": 0.6, "fuse": False, "shrink_length": 0.5}),
        ("dynamicvit", {"keep_ratio": 0.6, "teacher": False, "ratio_weight": 3, "token_loss": "kl"}),
    ],
)
def test_spec_makes_the_same_pruning(method, options):
    model = tiny()
    pruning = prunex.attach(model, method, **options)
    spec = pruning.spec
    assert spec["method"] == method
    for key, value in options.items():
        assert spec[key] == (list(value) if isinstance(value, tuple) else value)
    twin = prunex.attach(tiny(), **spec)
    assert twin.spec == spec
    assert method in repr(twin)
    assert repr(twin) == repr(pruning)
    assert json.loads(json.dumps(spec)) == spec


def test_attached_reads_the_pruning_back():
    model = tiny()
    assert prunex.attached(model) is None
    pruning = prunex.attach(model, "evit", keep_ratio=0.5)
    again = prunex.attached(nn.Sequential(model))
    model(images_for(model))
    assert torch.equal(again.trace.kept(), pruning.trace.kept())
    again.detach()
    assert prunex.attached(model) is None
    with pytest.raises(prunex.PrunexError, match="was detached"):
        pruning.losses()


def test_masked_progress_and_repr():
    pruning = prunex.attach(tiny(), "evit", keep_ratio=0.5)
    assert pruning.masked is None
    pruning.masked = True
    assert pruning.masked is True
    assert pruning.progress == 1.0
    pruning.progress = 0.25
    assert pruning.progress == 0.25
    assert repr(pruning).startswith("Pruning('evit', keep_ratio=0.5")


def test_the_pruner_follows_the_model_s_mode_dtype_and_device():
    model = tiny().double().train()
    pruning = prunex.attach(model, "dynamicvit")
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert pruning.pruner.training
    model.eval()
    assert not pruning.pruner.training
    model.float()
    assert all(p.dtype == torch.float32 for p in pruning.pruner.parameters())
    assert model(images()).dtype == torch.float32


def test_the_random_state_moves_only_as_far_as_the_method_needs():
    for method in ("topk", "evit"):
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        model = tiny()
        after_building = torch.random.get_rng_state()
        pruning = prunex.attach(model, method)
        model(images())
        pruning.detach()
        assert torch.equal(torch.random.get_rng_state(), after_building)
        assert not torch.equal(before, after_building)


def test_detached_models_hold_nothing_back():
    model = tiny()
    pruning = prunex.attach(model, "dynamicvit")
    teacher = weakref.ref(pruning.pruner._teacher[0])
    model.train()
    model(images())
    pruning.detach()
    del pruning
    gc.collect()
    assert teacher() is None
    assert sorted(vars(model)) == sorted(vars(tiny()))


def test_official_backbones_load_under_parameter_free_pruners():
    model = tiny()
    pruning = prunex.attach(model, "evit")
    other = tiny(seed=4)
    pruning.load_official({"model": other.state_dict()})
    assert torch.equal(model.head.weight, other.head.weight)
    before = state_of(model)
    for bad, message in (
        ({"model": {}}, "no state dict"),
        ({"a": torch.zeros(1)}, "nothing in this state dict fits"),
        ({"head.weight": torch.zeros(7, 48)}, "head.weight"),
        ("weights.pth", "give a state dict"),
        (None, "give a state dict"),
        ([1], "give a state dict"),
    ):
        with pytest.raises(prunex.PrunexError, match=message):
            pruning.load_official(bad)
    assert_same_state(model, before)


@pytest.mark.parametrize("method", ["topk", "evit", "dynamicvit", "ia_red2"])
def test_training_a_pruned_model_changes_what_detach_gives_back(method):
    """Detach returns the structure; what was learned stays learned."""
    model = tiny()
    pruning = prunex.attach(model, method, keep_ratio=0.6)
    randomise(pruning.pruner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    (model(images()).square().sum() + sum(pruning.losses().values())).backward()
    optimizer.step()
    assert largest(model.blocks[0].attn.qkv.weight, before) > 0
    learned = model.blocks[0].attn.qkv.weight.detach().clone()
    pruning.detach().eval()
    assert torch.equal(model.blocks[0].attn.qkv.weight, learned)
    assert list(model.state_dict()) == list(tiny().state_dict())


@pytest.mark.parametrize(
    "method", ["evit", "topk", "dynamicvit", "tome", "ppt", "ia_red2", "hvt", "patch_slimming", "diffrate"]
)
def test_a_pruned_model_is_pickled_whole(method):
    """As torch.save of a model, and processes that are spawned, do; the copy's methods are its own."""
    model = tiny()
    prunex.attach(model, method)
    x = images()
    for whole in (model, prunex.slim(model)):
        again = pickle.loads(pickle.dumps(whole))  # our own bytes
        with torch.no_grad():
            assert again(x).equal(whole(x))
        assert prunex.attached(again) is not prunex.attached(whole)
        prunex.attached(again).detach()
        assert prunex.attached(again) is None
        assert prunex.attached(whole) is not None
        with torch.no_grad():
            assert whole(x).equal(copy.deepcopy(whole)(x))
            assert not again(x).equal(whole(x)) or method == "patch_slimming"
