"""What ran is what is explained: modules that do something before their ViT, behind it, or round it."""

import copy
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import prunex
from prunex import PrunexError
from tests.explainers.quick import EXPLAINERS, explain
from tests.vits import images, relative, tiny

every = pytest.mark.parametrize("method", EXPLAINERS)
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)


class Around(nn.Module):
    """Something before a ViT and something behind it."""

    def __init__(self, model, before=None, behind=None):
        super().__init__()
        self.model = model
        self.before, self.behind = before or nn.Identity(), behind or nn.Identity()

    def forward(self, x):
        return self.behind(self.model(self.before(x)))


class Prepared(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def normalised(x):
    return (x - MEAN) / STD


def resized(x):
    return F.interpolate(x, (32, 32), mode="bilinear", antialias=True)


def cropped(x):
    return x[:, :, 8:40, 8:40]


def pictures(size=32):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("pruner", [None, "evit", "tome"])
@pytest.mark.parametrize(("before", "size"), [(normalised, 32), (resized, 48), (cropped, 48)])
def test_what_enters_the_vit_is_explained(before, size, pruner):
    model = tiny()
    if pruner:
        prunex.attach(model, pruner, **({"r": 2} if pruner == "tome" else {"keep_ratio": 0.7, "stages": (1, 2)}))
    x = pictures(size)
    e = prunex.explain("generic_attention", Around(model, Prepared(before)), x)
    wanted = prunex.explain("generic_attention", model, before(x))
    assert e.maps.equal(wanted.maps)
    assert e.logits.equal(wanted.logits)
    assert torch.allclose(e.logits, model(before(x)), atol=1e-6)
    assert e.entered.equal(before(x))
    assert e.image_size == (32, 32)
    assert e.upsample().shape == (3, 32, 32)
    assert e.overlay().shape == (3, 32, 32, 3)


def test_a_map_of_another_size_lies_over_what_entered():
    e = prunex.explain("rollout", Around(tiny(), Prepared(cropped)), pictures(48))
    assert e.resized
    with pytest.raises(PrunexError, match=r"pictures have size \[48, 48\], and the maps .* \[32, 32\]: leave pictures"):
        e.overlay(pictures(48))
    assert np.array_equal(e.overlay(cropped(pictures(48))), e.overlay())


def test_a_normalised_image_is_looked_at_as_it_was():
    e = prunex.explain("rollout", Around(tiny(), Prepared(normalised)), pictures())
    assert not e.resized
    assert e.overlay(pictures()).shape == (3, 32, 32, 3)
    plain = prunex.explain("rollout", tiny(), pictures())
    assert plain.entered is None
    with pytest.raises(PrunexError, match=r"give them to overlay\(\), too"):
        plain.overlay()


def test_bytes_may_enter_a_module_that_makes_floats_of_them():
    model = tiny()
    pixels = (255 * pictures()).byte()
    e = prunex.explain("tokentm", Around(model, Prepared(lambda x: normalised(x / 255))), pixels)
    assert e.maps.equal(prunex.explain("tokentm", model, normalised(pixels / 255)).maps)


@every
@pytest.mark.parametrize("pruner", [None, "evit"])
def test_a_head_behind_the_vit_is_the_models_head(method, pruner):
    """The same weights as the ViT's own head and as a layer behind a ViT without one."""
    whole = tiny()
    body = tiny(num_classes=0)
    body.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("head.")})
    for model in (whole, body):
        if pruner:
            prunex.attach(model, pruner, keep_ratio=0.7, stages=(1, 2))
    module = Around(body, Prepared(normalised), copy.deepcopy(whole.head)).double()
    module.before.function = lambda x: (x - MEAN.double()) / STD.double()
    whole.double()
    x = pictures().double()
    e = explain(method, module, x, 3)
    wanted = explain(method, whole, module.before(x), 3)
    assert e.target.tolist() == [3, 3, 3]
    assert torch.allclose(e.logits, module(x))
    assert relative(e.maps, wanted.maps) < 1e-7


def test_the_classes_are_the_modules():
    module = Around(tiny(), behind=nn.Linear(5, 3))
    assert explain("tokentm", module, images()).logits.shape == (3, 3)
    with pytest.raises(PrunexError, match=r"target=4 is out of range: this model has classes 0\.\.2"):
        explain("tokentm", module, images(), 4)


def test_a_gradient_through_a_head_of_several_layers():
    """Attention times its gradient, written out from the model's own attention matrices."""
    model, behind = tiny(depth=2).double(), nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = images().double()
    tokens = model._pos_embed(model.patch_embed(x))
    maps = []
    for block in model.blocks:
        b, n, d = tokens.shape
        qkv = block.attn.qkv(block.norm1(tokens)).reshape(b, n, 3, 3, d // 3).permute(2, 0, 3, 1, 4)
        maps.append((qkv[0] @ qkv[1].transpose(2, 3) * (d // 3) ** -0.5).softmax(3))
        tokens = tokens + block.attn.proj((maps[-1] @ qkv[2]).transpose(1, 2).reshape(b, n, d))
        tokens = tokens + block.mlp(block.norm2(tokens))
    logits = behind(model.head(model.norm(tokens)[:, 0]))
    row = torch.zeros(3, 17, dtype=torch.float64)
    row[:, 0] = 1
    for a, g in reversed(list(zip(maps, torch.autograd.grad(logits[:, 1].sum(), maps), strict=True))):
        row = row + (row[:, None] @ (a * g).clamp(min=0).mean(1))[:, 0]
    e = explain("generic_attention", Around(model, behind=behind), x, 1)
    assert torch.allclose(e.logits, logits)
    assert torch.allclose(e.maps, row[:, 1:].view(3, 4, 4))


def test_a_softmax_is_part_of_what_is_explained():
    module = Around(tiny(), behind=nn.Softmax(1))
    e = explain("generic_attention", module, images())
    assert torch.allclose(e.logits.sum(1), torch.ones(3))
    with pytest.raises(PrunexError, match="relevance rules know linear layers behind a ViT"):
        explain("lrp", module, images())


@pytest.mark.parametrize("method", ["shap", "vit_cx", "atman", "r_cut"])
def test_no_softmax_is_taken_of_probabilities(method):
    model = tiny()
    wanted, e = explain(method, model, images()), explain(method, Around(model, behind=nn.Softmax(1)), images())
    assert torch.allclose(e.logits, wanted.logits.softmax(1))
    assert relative(e.maps, wanted.maps) < 1e-4


@dataclass
class Output:
    loss: None
    logits: torch.Tensor


@pytest.mark.parametrize(
    ("behind", "field"),
    [
        (lambda x: {"scores": x, "size": 3}, "scores"),
        (lambda x: {"logits": 2 * x, "features": x}, "logits"),
        (lambda x: (2 * x, x[0, 0]), "[0]"),
        (lambda x: Output(None, x), "logits"),
        (lambda x: x[:, 2], ""),
    ],
)
def test_logits_inside_an_output(behind, field):
    model = tiny()
    module = Around(model, behind=Prepared(behind))
    e = explain("generic_attention", module, images(), 0)
    assert e.output == field
    value = module(images())
    value = vars(value) if isinstance(value, Output) else value
    wanted = value if field == "" else value[0] if field == "[0]" else value[field]
    assert relative(e.logits, wanted.view(3, -1)) < 1e-5


class TwoViews(Around):
    def forward(self, x):
        return (self.model(x) + self.model(x.flip(3))) / 2


class TwoAtOnce(Around):
    def forward(self, x):
        return self.model(torch.cat([x, x.flip(3)])).view(2, len(x), -1).mean(0)


class Walks(Around):
    def forward(self, x):
        v = self.model
        return v.head(v.norm(v.blocks(v._pos_embed(v.patch_embed(x))))[:, 0])


class Colour(Around):
    def forward(self, x):
        return self.model(x) + x.mean((1, 2, 3))[:, None]


class OverBatch(Around):
    def forward(self, x):
        return self.model(x).softmax(0)


class Noisy(Around):
    def forward(self, x):
        out = self.model(x)
        return out + torch.randn_like(out)


class NeedsMore(Around):
    def forward(self, x, metadata):
        return self.model(x)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (TwoViews, "calls its VisionTransformer 2 times for one batch"),
        (TwoAtOnce, "gives its VisionTransformer 6 images for 3"),
        (Walks, "never calls its VisionTransformer as a whole"),
        (Colour, "answers by more than its VisionTransformer's output for each image"),
        (OverBatch, "answers by more than its VisionTransformer's output for each image"),
        (Noisy, "answers by more than its VisionTransformer's output for each image"),
        (NeedsMore, "raised TypeError when called on the images"),
    ],
)
@pytest.mark.parametrize("method", ["rollout", "generic_attention"])
def test_modules_that_cannot_be_followed(module, says, method):
    with pytest.raises(PrunexError, match=says) as error:
        explain(method, module(tiny()), images())
    assert "explain the ViT itself" in str(error.value)
    assert module.__name__ in str(error.value)


@pytest.mark.parametrize(
    ("behind", "says"),
    [
        (lambda x: {"a": x, "b": 2 * x}, r"several tensors \[B, classes\] \(a, b\) in its dict"),
        (lambda x: {"loss": x.mean()}, r"no tensor \[B, classes\] in its dict"),
        (lambda x: x.argmax(1), r"no tensor \[B, classes\] in its Tensor"),
    ],
)
def test_outputs_that_are_not_guessed_between(behind, says):
    with pytest.raises(PrunexError, match=says):
        explain("rollout", Around(tiny(), behind=Prepared(behind)), images())


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny()


class WithForward(Lit):
    def forward(self, x):
        return self.model(normalised(x))


def test_a_lightning_module_by_its_forward():
    module = WithForward()
    wanted = explain("rollout", module.model, normalised(pictures()))
    assert explain("rollout", module, pictures()).maps.equal(wanted.maps)
    bare = Lit()
    with pytest.warns(UserWarning, match="Lit has no forward that calls its VisionTransformer"):
        e = explain("rollout", bare, images())
    assert e.maps.equal(explain("rollout", bare.model, images()).maps)


def test_a_module_stays_as_it_was():
    model = tiny().train()
    prunex.attach(model, "dynamicvit", keep_ratio=0.7, stages=(1,))
    module = Around(model, Prepared(normalised), nn.Linear(5, 3)).train()
    module.behind.weight.requires_grad_(False)
    before = {name: (id(value), type(value)) for m in module.modules() for name, value in vars(m).items()}
    with torch.inference_mode():
        e = explain("tokentm", module, pictures())
    assert {name: (id(value), type(value)) for m in module.modules() for name, value in vars(m).items()} == before
    assert all(m.training for m in module.modules())
    assert all(p.grad is None for p in module.parameters())
    assert e.logits.shape == (3, 3)


def test_threads_explain_one_module_each_its_own_images():
    module = Around(tiny(), Prepared(normalised), nn.Linear(5, 3)).eval()
    x = [torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    wanted = [explain("generic_attention", module, v).maps for v in x]
    found = [None] * len(x)

    def work(i):
        found[i] = explain("generic_attention", module, x[i]).maps

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_compiled_modules():
    model = tiny().eval()
    module = Around(model, Prepared(normalised), nn.Linear(5, 3)).eval()
    wanted = explain("tokentm", module, pictures())
    for compiled in (
        torch.compile(module, backend="eager"),
        Around(torch.compile(model, backend="eager"), module.before, module.behind).eval(),
    ):
        compiled(pictures())
        assert torch.allclose(explain("tokentm", compiled, pictures()).maps, wanted.maps, atol=1e-6)


# ------------------------------------------------------------------------------------------------ hooks and such layers


def test_hooks_on_the_vit_itself_are_part_of_it():
    model = tiny().eval()
    wanted = explain("generic_attention", model, normalised(pictures()), 2)
    model.register_forward_pre_hook(lambda _, args: (normalised(args[0]),))
    model.register_forward_hook(lambda _, args, out: 2 * out)
    e = explain("generic_attention", model, pictures(), 2)
    assert torch.allclose(e.logits, model(pictures()), atol=1e-6)
    assert torch.allclose(e.logits, 2 * wanted.logits, atol=1e-6)
    assert e.entered.equal(normalised(pictures()))


def _agrees_or_refuses(method, model):
    try:
        e = explain(method, model, images())
    except PrunexError as error:
        said = str(error)
    else:
        return relative(e.logits, model(images())) < 1e-3
    return "would explain another model" in said


@every
@pytest.mark.parametrize("place", ["blocks.2", "blocks.2.attn", "blocks.2.mlp", "blocks.1.norm1", "norm", "head"])
def test_a_hook_that_changes_what_a_layer_gives(method, place):
    model = tiny().eval()
    explain(method, model, images())
    model.get_submodule(place).register_forward_hook(lambda _, args, out: 0.2 * out)
    assert _agrees_or_refuses(method, model)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@every
def test_parametrised_and_wrapped_layers(method):
    model = tiny().eval()
    parametrize.register_parametrization(model.blocks[1].attn.proj, "weight", Doubled())
    assert _agrees_or_refuses(method, model)


def test_a_vit_is_asked_once_for_each_of_its_states():
    model = tiny().eval()
    asked = []
    model.norm.register_forward_hook(lambda _, args, out: asked.append(len(args[0])))

    def times(method):
        asked.clear()
        explain(method, model, images())
        return sorted(asked)

    assert times("rollout") == [1, 3]
    assert times("rollout") == [3]
    assert times("tokentm") == [1, 3]
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert times("rollout") == [1, 3]


class Sometimes(Around):
    twice = False

    def forward(self, x):
        out = self.model(normalised(x))
        return 2 * out if self.twice or x.mean() > 0.9 else out


def test_a_module_that_gives_its_vits_output_on_is_asked_once_for_each_of_its_states():
    model = tiny().eval()
    module, asked = Sometimes(model).eval(), []
    model.norm.register_forward_hook(lambda _, args, out: asked.append(len(args[0])))

    def times():
        asked.clear()
        e = explain("rollout", module, pictures())
        seen = sorted(asked)
        assert torch.allclose(e.logits, module(pictures()), atol=1e-5)
        return seen

    assert times() == [3, 3]
    assert times() == [1, 3]  # now the ViT itself, once
    assert times() == [3]
    with pytest.raises(PrunexError, match="answers by more than its VisionTransformer's output"):
        explain("rollout", module, torch.ones(3, 3, 32, 32))
    assert times() == [3, 3]
    assert times() == [3]
    module.twice = True  # what nothing but its answer tells
    assert times() == [3, 3]
    module.twice = False
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert times() == [3, 3]


# -------------------------------------------------------------------------------------------- where no gradient arrives


class WithoutGraph(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Cut(nn.Module):
    def forward(self, x):
        return x.detach()


def _without_graph(model, names):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(names):
            layer.__class__ = WithoutGraph


BY_ATTENTION = ["generic_attention", "grad_sam", "tokentm", "transformer_attribution", "beyond_intuition"]


@pytest.mark.parametrize(
    "cut",
    [
        lambda m: _without_graph(m, ("qkv", "proj", "fc1", "fc2", "head")),
        lambda m: _without_graph(m, ("blocks.2.attn.proj",)),
        lambda m: setattr(m, "head", nn.Sequential(Cut(), m.head)),
    ],
    ids=["every layer", "one projection", "a detached head"],
)
@pytest.mark.parametrize("method", BY_ATTENTION)
def test_no_gradient_is_no_map_of_zeros(method, cut):
    model = tiny().eval()
    cut(model)
    options = {"variant": "head"} if method == "beyond_intuition" else {}
    with pytest.raises(PrunexError, match=f"{method} needs gradients|lets no gradient through|do not know"):
        explain(method, model, images(), **options)


@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients", "r_cut"])
def test_methods_without_attention_matrices_are_refused_likewise(method):
    model = tiny().eval()
    _without_graph(model, ("qkv", "proj", "fc1", "fc2", "head"))
    with pytest.raises(PrunexError, match=f"{method} needs gradients|lets no gradient through"):
        explain(method, model, images())


def test_a_head_behind_a_detached_vit():
    with pytest.raises(PrunexError, match="generic_attention needs gradients: no gradient of the class reached"):
        explain("generic_attention", Around(tiny(), behind=nn.Sequential(Cut(), nn.Linear(5, 3))), images())


def test_a_vit_that_its_module_runs_without_gradients_is_explained_all_the_same():
    class Probe(Around):
        def forward(self, x):
            with torch.no_grad():
                features = self.model(x)
            return self.behind(features)

    module = Probe(tiny(), behind=nn.Linear(5, 3))
    e = explain("generic_attention", module, images())
    assert e.maps.equal(explain("generic_attention", Around(module.model, behind=module.behind), images()).maps)
    assert bool(e.maps.any())


def test_quantised_weights():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny().eval()
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(PrunexError, match="lets no gradient through"):
        explain("generic_attention", model, images())
