"""The one door to the explainers: what it takes, what it gives, and that it leaves everything as it was."""

import copy
import gc
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunex
from prunex import PrunexError
from tests.vits import assert_same_state, images, images_for, randomise, relative, state_of, tiny

EXPLAINERS = ["raw_attention", "rollout", "generic_attention", "tokentm"]
BY_GRADIENT = ["generic_attention", "tokentm"]
TARGETS = torch.tensor([4, 0, 2])

every = pytest.mark.parametrize("method", EXPLAINERS)


def test_these_are_all_of_them():
    assert [m.name for m in prunex.methods("explainer")] == sorted(EXPLAINERS)


# ----------------------------------------------------------------------------------------------- the caller's grad mode


@every
@pytest.mark.parametrize("pruner", [None, "evit", "dynamicvit"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_same_map_in_every_grad_mode(method, pruner, mode):
    model = tiny()
    if pruner:
        randomise(prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)).pruner)
    wanted = prunex.explain(method, model, images(), TARGETS)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x, target = images(), TARGETS.clone()  # inference tensors under inference mode
        e = prunex.explain(method, model, x, target)
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
        prunex.explain(method, model, images(), 9)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        with pytest.raises(PrunexError, match="out of range"):
            prunex.explain(method, model, images(), 9)
        assert not torch.is_grad_enabled()


@every
def test_a_model_made_under_inference_mode(method):
    with torch.inference_mode():
        model = tiny()
        if method in BY_GRADIENT:
            with pytest.raises(PrunexError, match="made under torch.inference_mode"):
                prunex.explain(method, model, images())
        else:
            assert prunex.explain(method, model, images()).maps.equal(prunex.explain(method, tiny(), images()).maps)


@every
@pytest.mark.parametrize("kind", ["images", "model"])
def test_inference_mode_and_autocast_of_a_validation_step(method, kind):
    # Weights cast inside the caller's autocast are cached; they must not end up in the explainer's graph.
    model, x = tiny(), images()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        if kind == "model":
            model(x)
        first = prunex.explain(method, model, x.clone(), 1)
        model(x)
        again = prunex.explain(method, model, x, 1)
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
        trace, last, losses = pruning.trace, pruning._attached.last, pruning.losses()
        own = vars(pruning._attached).copy()
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i))
    state, rng = state_of(model), torch.get_rng_state()
    e = prunex.explain(method, model, images())

    assert_same_state(model, state)
    assert torch.get_rng_state().equal(rng)
    assert all((p.grad == i).all() for i, p in enumerate(model.parameters()))
    if pruning:
        assert pruning.trace is trace
        assert pruning._attached.last is last
        assert vars(pruning._attached) == own
        assert {k: v.item() for k, v in pruning.losses().items()} == {k: v.item() for k, v in losses.items()}
    (logits.sum() + sum(losses.values() if pruning else [])).backward()  # the pending graph still works

    model.eval()
    assert prunex.explain(method, model, images()).maps.equal(e.maps)  # and it explained the eval forward


@every
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pruner", [None, "evit", "dynamicvit"])
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
                prunex.explain(method, model, images(seed=5))
            loss = F.cross_entropy(model(images()).float(), TARGETS)
            loss = loss + sum(pruning.losses().values() if pruning else [])
            if explains:
                prunex.explain(method, model, images(seed=6))
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

    handle = model.blocks[2].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        prunex.explain(method, model, images())
    handle.remove()
    state["attributes"] = state_of(model)["attributes"]
    assert_same_state(model, state)
    assert pruning.trace is trace
    assert pruning._attached.policy is None
    assert torch.is_grad_enabled()


@every
def test_frozen_parameters(method):
    model = tiny()
    wanted = prunex.explain(method, model, images(), TARGETS)
    model.requires_grad_(False)
    e = prunex.explain(method, model, images(), TARGETS)
    assert relative(e.maps, wanted.maps) < 1e-6
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert prunex.explain(method, model, images(), TARGETS).maps.equal(e.maps)


@every
def test_partly_frozen_and_images_that_ask_for_gradients(method):
    model = tiny()
    wanted = prunex.explain(method, model, images(), TARGETS)
    model.blocks[:2].requires_grad_(False)
    x = images().requires_grad_()
    assert relative(prunex.explain(method, model, x, TARGETS).maps, wanted.maps) < 1e-6
    assert x.grad is None
    assert x.requires_grad


@every
def test_gradient_checkpointing(method):
    model = tiny()
    wanted = prunex.explain(method, model, images(), TARGETS).maps
    model.set_grad_checkpointing()
    assert prunex.explain(method, model.train(), images(), TARGETS).maps.equal(wanted)
    assert model.grad_checkpointing


@every
def test_fused_attention_stays_as_it_was(method):
    model = tiny()
    flags = [b.attn.fused_attn for b in model.blocks]
    prunex.explain(method, model, images())
    assert [b.attn.fused_attn for b in model.blocks] == flags
    for block in model.blocks:
        block.attn.fused_attn = False
    assert prunex.explain(method, model, images()).maps.shape == (3, 4, 4)


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
        prunex.explain(method, model, images())
    gc.collect()
    before = alive()
    gc.disable()  # what only the cycle collector would free counts as left
    try:
        for _ in range(100):
            prunex.explain(method, model, images())
        after = alive()
    finally:
        gc.enable()
    assert after <= before + 2


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


@pytest.mark.skipif(not __import__("os").path.exists("/proc/self/statm"), reason="needs /proc for the resident size")
@pytest.mark.parametrize("method", BY_GRADIENT)
def test_no_graph_stays_in_memory(method):
    # One graph of this model holds more than 2 MB: 60 of them would show.
    model = tiny(img_size=64, depth=3)
    x = images(4, (64, 64))
    with prunex.attach(model, "evit", keep_ratio=0.9, stages=(1,)):
        for _ in range(10):
            prunex.explain(method, model, x)
        before = resident()
        kept = [prunex.explain(method, model, x) for _ in range(60)]  # explanations hold no graph either
        assert resident() - before < 40e6
    assert all(e.raw.grad_fn is None and all(s.weight.grad_fn is None for s in e.trace.stages) for e in kept)
    assert all(s.score.grad_fn is None for e in kept for s in e.trace.stages)


# ------------------------------------------------------------------------------------------------------------ precision


@every
@pytest.mark.parametrize("pruner", [None, "evit"])
@pytest.mark.parametrize("way", ["bfloat16 model", "float16 model", "bfloat16 autocast"])
def test_half_precision_gives_float32_relevance(method, pruner, way):
    model = tiny()
    if pruner:
        # The same patches must leave in both precisions for maps to be comparable: one stage, few near ties.
        prunex.attach(model, pruner, keep_ratio=0.8, stages=(2,))
    wanted = prunex.explain(method, model, images(), TARGETS)
    if way == "bfloat16 autocast":
        with torch.autocast("cpu", torch.bfloat16):
            e = prunex.explain(method, model, images(), TARGETS)
            assert torch.is_autocast_enabled("cpu")
    else:
        half = copy.deepcopy(model).to(getattr(torch, way.split()[0]))
        e = prunex.explain(method, half, images(), TARGETS)
    assert e.maps.dtype == e.raw.dtype == torch.float32
    if e.trace.kept().equal(wanted.trace.kept()):
        limit = {"raw_attention": 0.05, "rollout": 0.02}.get(method, 0.25)
        assert relative(e.maps, wanted.maps) < limit
        for a, b in zip(e.maps.flatten(1), wanted.maps.flatten(1), strict=True):
            assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.98


@every
def test_double_precision_stays_double(method):
    model = tiny()
    single = prunex.explain(method, model, images(), TARGETS)
    double = prunex.explain(method, model.double(), images(), TARGETS)  # images follow the model
    assert double.maps.dtype == torch.float64
    assert relative(single.maps, double.maps) < 1e-5


# -------------------------------------------------------------------------------------------------------- what it takes


@every
def test_targets(method):
    model = tiny()
    predicted = prunex.explain(method, model, images())
    assert predicted.target.equal(model(images()).argmax(1))
    assert predicted.target.dtype == torch.int64
    for target in (3, torch.tensor(3), torch.full((3,), 3), torch.full((3,), 3, dtype=torch.uint8)):
        e = prunex.explain(method, model, images(), target)
        assert e.target.tolist() == [3, 3, 3]
        assert e.target.dtype == torch.int64
        assert e.maps.equal(prunex.explain(method, model, images(), 3).maps)
    given = predicted.target.clone()
    e = prunex.explain(method, model, images(), given)
    assert e.maps.equal(predicted.maps)
    given.zero_()
    assert e.target.equal(predicted.target)  # not a view of the caller's


@every
@pytest.mark.parametrize(
    ("target", "says"),
    [
        (5, r"target=5 is out of range: this model has classes 0\.\.4"),
        (-1, r"target=-1 is out of range"),
        (2**70, "is out of range"),
        (torch.tensor([0, 5, 1]), r"values 0\.\.5, out of range: this model has classes 0\.\.4"),
        (torch.tensor([0, -1, 1]), r"values -1\.\.1, out of range"),
        (torch.tensor([0, 1]), r"shape \[2\] for 3 images"),
        (torch.tensor([[0], [1], [2]]), r"shape \[3, 1\] for 3 images"),
        (torch.tensor([0.0, 1.0, 2.0]), "dtype torch.float32"),
        (torch.tensor([True, False, True]), "dtype torch.bool"),
        (torch.tensor([1j, 1, 1]), "dtype torch.complex64"),
        (1.0, "target=1.0 is not allowed"),
        (True, "target=True is not allowed"),
        ("cat", "target='cat' is not allowed"),
        ([0, 1, 2], r"target=\[0, 1, 2\] is not allowed: give a class index, an integer tensor \[B\], or None"),
    ],
)
def test_bad_targets(method, target, says):
    model = tiny()
    with pytest.raises(PrunexError, match=says) as error:
        prunex.explain(method, model, images(), target)
    assert "\n" not in str(error.value)


@every
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.full((2, 3, 32, 32), float("nan")), r"images \[0, 1\] of the batch hold NaN or infinite"),
        (torch.zeros(2, 3, 32, 32).index_fill(0, torch.tensor([1]), float("inf")), r"images \[1\] of the batch"),
        (torch.zeros(2, 3, 48, 32), r"48 x 32 pixels: this model takes 32 x 32"),
        (torch.zeros(2, 1, 32, 32), r"shape \[2, 1, 32, 32\]"),
        (torch.zeros(3, 32, 32), r"images\[None\]"),
        (torch.zeros(0, 3, 32, 32), "empty batch"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "dtype torch.uint8"),
        (np.zeros((2, 3, 32, 32), np.float32), "images are a ndarray"),
        (None, "images are a NoneType"),
    ],
)
def test_bad_images(method, x, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain(method, tiny(), x)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("rolout", {}, "unknown explainer 'rolout': did you mean 'rollout'"),
        ("evit", {}, "unknown explainer 'evit'"),
        (None, {}, "unknown explainer None"),
        ("rollout", {"head_fuson": "max"}, "unknown option of rollout 'head_fuson': did you mean 'head_fusion'"),
        ("raw_attention", {"start_layer": 1}, "unknown option of raw_attention 'start_layer'.*Known: layer"),
        ("tokentm", {"varient": "x"}, "did you mean 'variant'"),
        ("generic_attention", {"images": 1}, None),
    ],
)
def test_unknown_names(method, options, says):
    with pytest.raises(PrunexError if says else TypeError, match=says):
        prunex.explain(method, tiny(), images(), **options)


@every
def test_a_pruned_model_refuses_the_same(method):
    model = tiny()
    with prunex.attach(model, "evit", keep_ratio=0.6), pytest.raises(PrunexError, match="NaN"):
        prunex.explain(method, model, images() * float("nan"))


# ----------------------------------------------------------------------------------------------------- heads and wholes


@pytest.mark.parametrize("method", ["raw_attention", "rollout"])
@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_a_model_without_a_head(method, pool):
    model = tiny(num_classes=0, global_pool=pool)
    e = prunex.explain(method, model, images())
    assert e.maps.shape == (3, 4, 4)
    assert e.target.tolist() == [-1, -1, -1]
    with pytest.raises(PrunexError, match="no classifier"):
        prunex.explain(method, model, images(), 1)


@pytest.mark.parametrize("method", BY_GRADIENT)
@pytest.mark.parametrize("target", [None, 1])
def test_a_class_needs_a_head(method, target):
    with pytest.raises(PrunexError, match="no classifier.*rollout"):
        prunex.explain(method, tiny(num_classes=0), images(), target)


@every
def test_a_head_put_on_or_taken_off_by_assignment(method):
    model = tiny()
    bare = tiny(num_classes=0)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    bare.head = copy.deepcopy(model.head)
    assert prunex.explain(method, bare, images(), 3).maps.equal(prunex.explain(method, model, images(), 3).maps)
    model.head = nn.Identity()
    if method in BY_GRADIENT:
        with pytest.raises(PrunexError, match="no classifier"):
            prunex.explain(method, model, images())
    else:
        assert prunex.explain(method, model, images()).target.tolist() == [-1, -1, -1]


@every
def test_unpooled_logits_are_refused(method):
    with pytest.raises(PrunexError, match="pooled head"):
        prunex.explain(method, tiny(global_pool=""), images())


@every
def test_a_new_classifier_after_attaching(method):
    model = tiny()
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)):
        model.reset_classifier(9)
        e = prunex.explain(method, model, images(), 8)
    assert e.logits.shape == (3, 9)


class Lit(nn.Module):
    """Shaped as a LightningModule often is: one ViT somewhere inside, a loss beside it."""

    def __init__(self, **vits):
        super().__init__()
        self.net = nn.ModuleDict(vits)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net["a"](x)


@every
def test_a_module_that_holds_one_vit(method):
    vit = tiny()
    wanted = prunex.explain(method, vit, images(), TARGETS)
    lit = Lit(a=vit)
    assert prunex.explain(method, lit, images(), TARGETS).maps.equal(wanted.maps)
    assert lit.training
    with prunex.attach(lit, "evit", keep_ratio=0.6, stages=(1, 2)):
        pruned = prunex.explain(method, lit, images(), TARGETS)
    assert not pruned.maps.equal(wanted.maps)


def test_a_module_that_holds_two_or_none():
    lit = Lit(a=tiny(), b=tiny(seed=1))
    with pytest.raises(PrunexError, match=r"holds 2 timm ViTs \('net.a', 'net.b'\)"):
        prunex.explain("rollout", lit, images())
    a, b = (prunex.explain("rollout", lit, images(), path=p).maps for p in ("net.a", "net.b"))
    assert a.equal(prunex.explain("rollout", lit.net["a"], images()).maps)
    assert not a.equal(b)
    with pytest.raises(PrunexError, match="'net.c' does not exist"):
        prunex.explain("rollout", lit, images(), path="net.c")
    for nothing in (nn.Linear(2, 2), Lit()):
        with pytest.raises(PrunexError, match="no supported ViT"):
            prunex.explain("rollout", nothing, images())
    with pytest.raises(PrunexError, match="expected a torch.nn.Module"):
        prunex.explain("rollout", "vit", images())


# -------------------------------------------------------------------------------------------------------- what it gives


@every
@pytest.mark.parametrize("family", ["vit", "not_square"])
def test_explanation(method, family):
    model = tiny(family)
    x = images_for(model)
    with prunex.attach(model, "topk", keep_ratio=0.6, stages=(1,)):
        e = prunex.explain(method, model, x, TARGETS)
        with torch.no_grad():
            logits = model(x)
    height, width = x.shape[2:]
    assert e.method == method
    assert e.options == {}
    assert e.signed is False
    assert e.image_size == (height, width)
    assert relative(e.logits, logits) < 1e-5
    assert e.trace.kept().flatten(1).sum(1).tolist() == [-(-e.maps[0].numel() * 6 // 10)] * 3
    assert e.upsample().shape == e.pixels.shape == (3, height, width)
    assert e.upsample((7, 9)).shape == (3, 7, 9)
    assert e.upsample().dtype == torch.float32
    assert e.upsample(tuple(e.maps.shape[1:])).equal(e.maps)
    assert e.upsample().min() >= e.maps.min() - 1e-6
    assert e.upsample().max() <= e.maps.max() + 1e-6
    pictures = e.overlay(x)
    assert pictures.shape == (3, height, width, 3)
    assert pictures.dtype == np.uint8


def test_options_are_kept():
    e = prunex.explain("rollout", tiny(), images(), head_fusion="max", start_layer=-2)
    assert e.options == {"head_fusion": "max", "start_layer": -2}


@pytest.mark.parametrize("size", [7, (7,), (0, 7), (7.0, 7), (7, -1), "7x7"])
def test_bad_sizes(size):
    e = prunex.explain("rollout", tiny(), images())
    with pytest.raises(PrunexError, match="give .height, width. in pixels"):
        e.upsample(size)


def test_overlay():
    e = prunex.explain("rollout", tiny(), images())
    shown = e.overlay(images())
    assert e.overlay(images().double().requires_grad_()).shape == shown.shape
    low, high = images().amin((1, 2, 3), keepdim=True), images().amax((1, 2, 3), keepdim=True)
    unit = (images() - low) / (high - low)
    assert (
        np.abs(e.overlay(unit).astype(int) - shown).max() <= 1
    )  # normalised images are brought to 0..1 image by image
    bytes_ = (unit.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    assert np.array_equal(e.overlay(bytes_), e.overlay(unit))
    dim = e.overlay(torch.full((3, 3, 32, 32), 0.25))  # images within 0..1 are not stretched
    assert dim.shape == shown.shape
    with torch.inference_mode():
        assert np.array_equal(e.overlay(images()), shown)
    grey = prunex.explain("rollout", tiny(in_chans=1), images()[:, :1])
    assert grey.overlay(images()[:, :1]).shape == (3, 32, 32, 3)
    for wrong in (
        images()[:2],
        images()[0],
        torch.zeros(3, 32, 32, 3),
        torch.zeros(3, 4, 32, 32),
        np.zeros((3, 32, 32, 3)),
    ):
        with pytest.raises(PrunexError):
            e.overlay(wrong)
