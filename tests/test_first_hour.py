"""What somebody who meets the Python API for the first time types, and what comes back."""

import subprocess
import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import prunex
from prunex.errors import unknown
from prunex.pruners.base import accepted
from tests.explainers.quick import TRAINED
from tests.vits import images, tiny

CALLS = {
    "attach": 'call it as prunex.attach(model, "evit", keep_ratio=0.7)',
    "explain": 'call it as prunex.explain("tokentm", model, images)',
    "save": 'call it as prunex.save(model, "out/slim")',
    "export": 'call it as prunex.export(model, "model.onnx")',
}


def refused(call):
    with pytest.raises(prunex.PrunexError) as caught:
        call()
    text = str(caught.value)
    assert len(text) < 500
    return text


@pytest.mark.parametrize(
    ("door", "arguments", "what"),
    [
        ("attach", ("evit", tiny), "method=VisionTransformer is not allowed"),
        ("attach", (tiny,), "missing a required argument: 'method'"),
        ("attach", (tiny, "evit", 0.7), "too many positional arguments"),
        ("explain", (tiny, images), "missing a required argument: 'images'"),
        ("explain", (tiny, "rollout", images), "method=VisionTransformer is not allowed"),
        ("explain", ("rollout", images, tiny), "model=float32 [3, 3, 32, 32] is not allowed"),
        ("save", ("out/slim", tiny), "model='out/slim' is not allowed"),
        ("save", (tiny,), "missing a required argument: 'folder'"),
        ("export", ("model.onnx", tiny), "model='model.onnx' is not allowed"),
    ],
)
def test_arguments_forgotten_or_in_another_place(door, arguments, what):
    given = [a() if callable(a) else a for a in arguments]
    text = refused(lambda: getattr(prunex, door)(*given))
    assert what in text
    assert text.endswith(CALLS[door])


def test_names_in_another_spelling():
    assert "did you mean 'evit'? Known" in refused(lambda: prunex.attach(tiny(), "EViT"))
    assert "did you mean 'dynamicvit'?" in refused(lambda: prunex.attach(tiny(), "Dynamic-ViT"))
    assert "did you mean 'keep_ratio'?" in refused(lambda: prunex.attach(tiny(), "evit", Keep_Ratio=0.5))
    assert "did you mean 'start_layer'?" in refused(
        lambda: prunex.explain("generic_attention", tiny(), images(), startLayer=1)
    )
    assert "did you mean 'explainer'" in refused(lambda: prunex.methods("Explainers"))
    assert "it is of kind 'explainer'" in refused(lambda: prunex.attach(tiny(), "rollout"))
    assert "it is of kind 'pruner'" in refused(lambda: prunex.explain("evit", tiny(), images()))
    assert "did you mean 'AOPC'" in str(unknown("metric", "aopc", ["AOPC", "SRG"]))


@pytest.mark.parametrize("method", prunex.methods("pruner"), ids=lambda m: m.name)
def test_options_of_pruners_are_those_of_the_constructor(method):
    assert method.options
    assert list(method.options) == accepted(method.make)
    if "stages" not in method.options or method.name in ("hvt", "tome"):
        return
    made = prunex.attach(tiny(), method.name).options if method.name != "diffmask" else {}
    for name, value in method.options.items():
        if value is not None and name in made:
            assert made[name] == value, name


def test_options_of_schedules_and_explainers():
    options = {m.name: m.options for m in prunex.methods()}
    assert options["evit"]["shrink_length"] == 0.0
    assert options["evit"]["schedule"] == "cosine"
    assert options["magnitude"]["budget"] == 0.5
    assert "schedule" not in options["tome"]
    assert options["rollout"]["head_fusion"] == "mean"


IMAGES = {
    "3 dimensions": (torch.zeros(3, 32, 32), r"images[None]"),
    "channels last": (torch.zeros(2, 32, 32, 3), "images.permute(0, 3, 1, 2)"),
    "bytes": (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "x.float() / 255"),
    "numpy": (np.zeros((2, 3, 32, 32), np.float32), "give a float tensor [B, 3, 32, 32]"),
    "list": ([torch.zeros(3, 32, 32)], "torch.stack(images)"),
    "path": ("cat.jpg", "timm.data.create_transform"),
    "size": (torch.zeros(1, 3, 224, 224), "this model takes 32 x 32; resize them"),
    "nothing": (torch.zeros(0, 3, 32, 32), "give at least one image"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_another_kind(kind):
    given, remedy = IMAGES[kind]
    assert remedy in refused(lambda: prunex.explain("rollout", tiny(), given))
    if isinstance(given, torch.Tensor):
        model = tiny()
        prunex.attach(model, "topk")
        assert remedy in refused(lambda: model(given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions_of_images_and_models_that_differ(dtype):
    with torch.no_grad():
        assert prunex.explain("tokentm", tiny().to(dtype), images()).maps.isfinite().all()
        assert prunex.explain("tokentm", tiny(), images(dtype=dtype)).maps.isfinite().all()


def test_other_images_than_those_explained():
    e = prunex.explain("rollout", tiny(), images())
    assert e.overlay(images()).shape == (3, 32, 32, 3)
    assert "give those that were explained, 3 of them" in refused(lambda: e.overlay(images(1)))
    assert "images are a Image: give those" in refused(lambda: e.overlay(Image.new("RGB", (32, 32))))


@pytest.mark.parametrize("method", [m.name for m in prunex.methods("explainer")])
def test_explainers_say_whether_their_maps_are_of_a_class(method):
    if method in TRAINED:
        pytest.skip("needs a trained explainer")
    e = prunex.explain(method, tiny(), images(1))
    assert e.class_specific == (method not in ("attention_flow", "dino", "raw_attention", "rollout"))
    if method == "rollout":
        assert prunex.explain(method, tiny(), images(1), gradient=True).class_specific


def test_a_handle_out_of_turn():
    model = tiny()
    pruning = prunex.attach(model, "evit")
    assert "call the model on images first" in refused(lambda: pruning.trace)
    assert "detach() it first" in refused(lambda: prunex.attach(model, "topk"))
    assert "masked='yes' is not allowed" in refused(lambda: setattr(pruning, "masked", "yes"))
    model(images())
    assert "stage=last does not exist" in refused(lambda: pruning.trace.kept("last"))
    assert pruning.losses() == {}
    assert pruning.detach() is pruning.detach() is model
    assert "attach again" in refused(lambda: pruning.trace)
    assert prunex.attached(model) is None


def test_folders_and_files(tmp_path):
    assert "give one written by prunex.save" in refused(lambda: prunex.load(tmp_path / "nothing"))
    assert "has no config.json" in refused(lambda: prunex.load(tmp_path))
    for _ in range(2):  # a folder of ours is replaced
        prunex.save(tiny(), tmp_path / "slim")
    assert isinstance(prunex.load(tmp_path / "slim"), nn.Module)
    assert "must end in .onnx or .pt2" in refused(lambda: prunex.export(tiny(), tmp_path / "model.pth"))


def test_models_without_a_classifier_or_without_a_vit():
    headless = tiny(num_classes=0)
    assert prunex.explain("rollout", headless, images()).target.tolist() == [-1] * 3
    assert "use rollout" in refused(lambda: prunex.explain("tokentm", headless, images()))
    assert "no supported ViT in timm.ResNet" in refused(lambda: prunex.attach(timm.create_model("resnet18"), "evit"))
    assert "say which with path=" in refused(lambda: prunex.attach(nn.ModuleList([tiny(), tiny()]), "evit"))
    assert "got str" in refused(lambda: prunex.attach("vit_tiny_patch16_224", "evit"))


def test_rooms_are_attributes_and_names_are_listed():
    assert {"attach", "callbacks", "metrics", "recipes", "__version__"} <= set(dir(prunex))
    assert set(prunex.__all__) < set(dir(prunex))
    assert not [name for name in dir(prunex) if name.startswith("_") and not name.endswith("__")]
    with pytest.raises(AttributeError, match="has no attribute 'atach'") as caught:
        _ = prunex.atach
    assert caught.value.name == "atach"  # from which Python says "Did you mean: 'attach'?"


def test_importing_costs_what_it_did_and_rooms_come_when_they_are_used():
    late = ("lightning", "torchmetrics", "matplotlib", "sklearn", "jinja2")
    script = (
        "import sys, prunex\n"
        f"print([m for m in {late!r} if m in sys.modules])\n"
        "print(prunex.callbacks.TokenPruning.__name__, prunex.recipes.ImageFolder.__name__, prunex.metrics.SRG)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["[]", "TokenPruning ImageFolder <class 'prunex.metrics.curves.SRG'>"]
    assert all(isinstance(getattr(prunex, room), types.ModuleType) for room in ("callbacks", "pictures", "configs"))
