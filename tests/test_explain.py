"""The one door to the explainers: what it takes and what it gives."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError, registry
from prunex.metrics import removal_curves
from prunex.metrics.occlusion import on_pixels
from prunex.metrics.scoring import scores
from prunex.relevance.explanation import answer
from prunex.vit.recording import recording
from prunex.vit.tape import Tape
from tests.explainers.quick import EXPLAINERS, QUICK, SIGNED, TRAINED, explain
from tests.vits import images, images_for, relative, tiny

NO_CLASS = ["attention_flow", "dino", "raw_attention", "rollout"]
BY_GRADIENT = [m for m in EXPLAINERS if m not in NO_CLASS]
# Thresholds, divisions by small numbers or differences of nearly equal losses: rounding shows.
ROUNDING_SHOWS = ["atman", "lrp", "partial_lrp", "r_cut", "transformer_attribution", "vit_cx"]
TARGETS = torch.tensor([4, 0, 2])

every = pytest.mark.parametrize("method", EXPLAINERS)


def test_these_are_all_of_them():
    assert [m.name for m in prunex.methods("explainer")] == sorted([*EXPLAINERS, *TRAINED])
    assert set(DEFAULTS) == set(EXPLAINERS)


# ------------------------------------------------------------------------------------------------------------ precision


@every
@pytest.mark.parametrize("pruner", [None, "evit"])
@pytest.mark.parametrize("way", ["bfloat16 model", "float16 model", "bfloat16 autocast"])
def test_half_precision_gives_float32_relevance(method, pruner, way):
    model = tiny()
    if pruner:
        # The same patches must leave in both precisions for maps to be comparable: one stage, few near ties.
        prunex.attach(model, pruner, keep_ratio=0.8, stages=(2,))
    wanted = explain(method, model, images(), TARGETS)
    if way == "bfloat16 autocast":
        with torch.autocast("cpu", torch.bfloat16):
            e = explain(method, model, images(), TARGETS)
            assert torch.is_autocast_enabled("cpu")
    else:
        half = copy.deepcopy(model).to(getattr(torch, way.split()[0]))
        e = explain(method, half, images(), TARGETS)
    assert e.maps.dtype == e.raw.dtype == torch.float32
    assert torch.isfinite(e.maps).all()
    if e.trace.kept().equal(wanted.trace.kept()) and method not in ROUNDING_SHOWS:
        limit = {"raw_attention": 0.05, "rollout": 0.02}.get(method, 0.25)
        assert relative(e.maps, wanted.maps) < limit
        for a, b in zip(e.maps.flatten(1), wanted.maps.flatten(1), strict=True):
            assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.98


@every
def test_double_precision_stays_double(method):
    model = tiny()
    single = explain(method, model, images(), TARGETS)
    double = explain(method, model.double(), images(), TARGETS)  # images follow the model
    assert double.maps.dtype == torch.float64
    assert relative(single.maps, double.maps) < (0.2 if method in ROUNDING_SHOWS else 1e-5)


# -------------------------------------------------------------------------------------------------------- what it takes


@every
def test_targets(method):
    model = tiny()
    predicted = explain(method, model, images())
    assert predicted.target.equal(model(images()).argmax(1))
    assert predicted.target.dtype == torch.int64
    for target in (3, torch.tensor(3), torch.full((3,), 3), torch.full((3,), 3, dtype=torch.uint8)):
        e = explain(method, model, images(), target)
        assert e.target.tolist() == [3, 3, 3]
        assert e.target.dtype == torch.int64
        assert e.maps.equal(explain(method, model, images(), 3).maps)
    given = predicted.target.clone()
    e = explain(method, model, images(), given)
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
        explain(method, model, images(), target)
    assert "\n" not in str(error.value)


@every
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(2, 3, 32, 32, device="meta"), "images are on the meta device"),
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
        explain(method, tiny(), x)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("rolout", {}, "unknown explainer 'rolout': did you mean 'rollout'"),
        ("evit", {}, "unknown explainer 'evit'"),
        (None, {}, "method=None is not allowed"),
        ("rollout", {"head_fuson": "max"}, "unknown option of rollout 'head_fuson': did you mean 'head_fusion'"),
        ("raw_attention", {"start_layer": 1}, "unknown option of raw_attention 'start_layer'.*Known: layer"),
        ("tokentm", {"varient": "x"}, "did you mean 'variant'"),
        ("generic_attention", {"images": 1}, None),
    ],
)
def test_unknown_names(method, options, says):
    with pytest.raises(PrunexError if says else TypeError, match=says):
        explain(method, tiny(), images(), **options)


@every
def test_a_pruned_model_refuses_the_same(method):
    model = tiny()
    with prunex.attach(model, "evit", keep_ratio=0.6), pytest.raises(PrunexError, match="NaN"):
        explain(method, model, images() * float("nan"))


# ----------------------------------------------------------------------------------------------------- heads and wholes


@pytest.mark.parametrize("method", ["raw_attention", "rollout"])
@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_a_model_without_a_head(method, pool):
    model = tiny(num_classes=0, global_pool=pool)
    e = explain(method, model, images())
    assert e.maps.shape == (3, 4, 4)
    assert e.target.tolist() == [-1, -1, -1]
    with pytest.raises(PrunexError, match="no classifier"):
        explain(method, model, images(), 1)


@pytest.mark.parametrize("method", BY_GRADIENT)
@pytest.mark.parametrize("target", [None, 1])
def test_a_class_needs_a_head(method, target):
    with pytest.raises(PrunexError, match="no classifier.*rollout"):
        explain(method, tiny(num_classes=0), images(), target)


@every
def test_a_head_put_on_or_taken_off_by_assignment(method):
    model = tiny()
    bare = tiny(num_classes=0)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    bare.head = copy.deepcopy(model.head)
    assert explain(method, bare, images(), 3).maps.equal(explain(method, model, images(), 3).maps)
    model.head = nn.Identity()
    if method in BY_GRADIENT:
        with pytest.raises(PrunexError, match="no classifier"):
            explain(method, model, images())
    else:
        assert explain(method, model, images()).target.tolist() == [-1, -1, -1]


@every
def test_unpooled_logits_are_refused(method):
    with pytest.raises(PrunexError, match="pooled head"):
        explain(method, tiny(global_pool=""), images())


@every
def test_a_new_classifier_after_attaching(method):
    model = tiny()
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)):
        model.reset_classifier(9)
        e = explain(method, model, images(), 8)
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
    wanted = explain(method, vit, images(), TARGETS)
    lit = Lit(a=vit)
    assert explain(method, lit, images(), TARGETS).maps.equal(wanted.maps)
    assert lit.training
    with prunex.attach(lit, "evit", keep_ratio=0.6, stages=(1, 2)):
        pruned = explain(method, lit, images(), TARGETS)
    assert not pruned.maps.equal(wanted.maps)


def test_a_module_that_holds_two_or_none():
    lit = Lit(a=tiny(), b=tiny(seed=1))
    with pytest.raises(PrunexError, match=r"holds 2 timm ViTs \('net.a', 'net.b'\)"):
        prunex.explain("rollout", lit, images())
    a = prunex.explain("rollout", lit, images(), path="net.a").maps
    with pytest.warns(UserWarning, match="Lit has no forward that calls its VisionTransformer"):
        b = prunex.explain("rollout", lit, images(), path="net.b").maps
    assert a.equal(prunex.explain("rollout", lit.net["a"], images()).maps)
    assert not a.equal(b)
    with pytest.raises(PrunexError, match="'net.c' does not exist"):
        prunex.explain("rollout", lit, images(), path="net.c")
    for nothing in (nn.Linear(2, 2), Lit()):
        with pytest.raises(PrunexError, match="no supported ViT"):
            prunex.explain("rollout", nothing, images())
    with pytest.raises(PrunexError, match="model=.vit. is not allowed"):
        prunex.explain("rollout", "vit", images())


# -------------------------------------------------------------------------------------------------------- what it gives


DEFAULTS = {
    "atman": {"factor": 0.1, "similarity": None, "rule": "log", "freeze_selection": True, "chunk": None},
    "attention_flow": {"start_layer": 0, "scale": 1_000_000, "max_tokens": 65},
    "beyond_intuition": {"variant": "token", "start_layer": 1, "steps": 20, "feedback": "survivor", "chunk": 64},
    "dino": {"threshold": None, "layer": -1},
    "generic_attention": {"start_layer": 0, "full": False},
    "grad_cam": {"kind": "tokens", "layer": -1},
    "grad_sam": {"axis": "key", "lift": "direct"},
    "legrad": {"start_layer": -2, "pool": "mean"},
    "integrated_gradients": {
        "steps": 50,
        "baseline": 0.0,
        "space": "pixels",
        "rule": "gausslegendre",
        "chunk": None,
    },
    "lrp": {"rule": "zplus", "gamma": None, "rule_set": "conserving", "positions": False},
    "partial_lrp": {"rule_set": "conserving", "gradient": False},
    "r_cut": {"layer": -1, "threshold": 0.2, "orient": "peak", "objective": "probability"},
    "raw_attention": {"layer": -1},
    "rollout": {"head_fusion": "mean", "discard_ratio": 0.0, "start_layer": 0, "gradient": False},
    "shap": {
        "estimator": "permutation",
        "removal": "drop",
        "budget": None,
        "selection": "frozen",
        "output": "probability",
        "seed": 0,
        "chunk": None,
    },
    "tokentm": {"variant": "per_head", "necc_scale": None},
    "transformer_attribution": {"start_layer": 0, "gradient": True},
    "vit_cx": {
        "layer": -1,
        "distance": 0.1,
        "noise": 0.1,
        "seed": 0,
        "chunk": 50,
        "max_masks": None,
        "selection": "frozen",
    },
}


@every
@pytest.mark.parametrize("family", ["vit", "not_square"])
def test_explanation(method, family):
    model = tiny(family)
    x = images_for(model)
    with prunex.attach(model, "topk", keep_ratio=0.6, stages=(1,)):
        e = explain(method, model, x, TARGETS)
        with torch.no_grad():
            logits = model(x)
    height, width = x.shape[2:]
    assert e.method == method
    assert e.options == DEFAULTS[method] | QUICK.get(method, {})
    assert e.signed is (method in SIGNED and method != "vit_cx")
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


@pytest.mark.parametrize("fine", [True, False])
def test_methods_finer_than_a_patch_and_what_they_found_out(monkeypatch, fine):
    def toy(model, x, target=None):
        """Colour sums, and each image's own."""
        with recording(model, x, target, Tape()) as recorded:
            found = x.sum(1)
            row = torch.zeros(len(x), 17)
            extra = {"fine": found, "info": {"total": found.sum((1, 2))}} if fine else {}
            return answer(recorded, row, raw=x, signed=True, **extra)

    monkeypatch.setitem(registry.METHODS, ("explainer", "toy"), registry.Method("toy", "explainer", "", "", toy))
    x = images().requires_grad_()
    e = prunex.explain("toy", tiny(), x)
    assert e.raw.equal(x)
    if fine:
        assert e.pixels.equal(x.detach().sum(1))
        assert not e.pixels.requires_grad
        assert relative(e.info["total"], x.sum((1, 2, 3))) < 1e-5
    else:
        assert e.pixels.equal(e.upsample())
        assert e.info == {}
    assert e.upsample().equal(torch.zeros(3, 32, 32))  # always the patch grid


def test_options_are_kept():
    e = prunex.explain("rollout", tiny(), images(), head_fusion="max", start_layer=-2)
    assert e.options == {"head_fusion": "max", "discard_ratio": 0.0, "start_layer": -2, "gradient": False}


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


@pytest.mark.parametrize(
    ("size", "options"), [(36, {"img_size": 36}), (36, {"dynamic_img_size": True, "dynamic_img_pad": True})]
)
def test_maps_lie_where_their_patches_are(size, options):
    """Images of no whole number of patches: 4 of their pixels are never seen, or padded to a fifth patch."""
    e = prunex.explain("rollout", tiny(**options), torch.randn(1, 3, size, size))
    side = e.maps.shape[1]
    assert e.covered == (8 * side, 8 * side)
    assert side == (5 if "dynamic_img_size" in options else 4)
    e.maps = torch.zeros_like(e.maps)
    e.maps[0, 1, 2] = 1
    middle = (slice(None), slice(11, 13), slice(19, 21))
    found = e.upsample()
    assert found.shape == (1, size, size)
    assert (found[middle] > 0.87).all()
    assert found[:, 24:].max() == 0
    twice = e.upsample((2 * size, 2 * size))
    assert largest_place(twice[0]) == pytest.approx((24, 40), abs=1)
    pixels = on_pixels(e.maps, (size, size), (8, 8)).view(1, size, size)
    assert (pixels - found).abs().max() < 1e-6
    shown = e.overlay(np.full((1, size, size, 3), 90, dtype=np.uint8))
    assert shown[0, 11, 19].tolist() != shown[0, 30, 30].tolist()


def largest_place(values):
    """Row and column of the largest value."""
    return divmod(int(values.argmax()), values.shape[1])


def test_scores_place_maps_as_explanations_do():
    """A map hot in one patch of images that are no whole number of patches, against the mask of that patch."""
    model, x = tiny(img_size=36), torch.randn(1, 3, 36, 36)
    e = prunex.explain("rollout", model, x)
    e.maps = torch.zeros_like(e.maps)
    e.maps[0, 2, 2] = 1
    masks = torch.zeros(1, 36, 36, dtype=torch.bool)
    masks[0, 16:24, 16:24] = True
    names = ["energy_inside", "pointing_game", "mean_iou"]
    found = scores(names, model, x, e.maps, masks=masks)
    same = scores(names, model, x, e.maps, masks=masks, pixels=e.pixels)
    assert float(found["pointing_game"]) == 1
    for name in names:
        assert torch.allclose(found[name], same[name])


def test_a_model_without_weights_is_told():
    with pytest.raises(PrunexError, match="the model is on the meta device"):
        prunex.explain("rollout", tiny().to("meta"), images())


def test_a_model_with_a_forward_of_its_own_is_refused():
    """What goes through its blocks one by one would explain and measure another function."""
    model, x = tiny(), images()
    maps = torch.rand(len(x), 4, 4)
    model.forward = lambda x: -type(model).forward(model, x)
    with pytest.raises(PrunexError, match="has its own forward, set on the object"):
        prunex.explain("tokentm", model, x)
    with pytest.raises(PrunexError, match="has its own forward, set on the object"):
        removal_curves(model, x, maps)
    wanted = prunex.explain("tokentm", tiny(), x).maps
    model = tiny()
    model.forward = torch.compile(model.forward, backend="eager")  # the same function
    assert prunex.explain("tokentm", model, x).maps.equal(wanted)
    del model.forward
    prunex.attach(model, "evit")  # prunex' own
    assert prunex.explain("tokentm", model, x).maps.shape == wanted.shape
