"""Adapters on every layer that public fine-tuning puts them on: all that prunex does is done to the merged model."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import prunex
from prunex import PrunexError
from tests.vits import images, relative, state_of, tiny

X = images(2)
LAYERS = ["qkv", "proj", "fc1", "fc2"]  # "proj" is attention's and the patch embedding's


class LoRALinear(nn.Module):
    """As tutorials write it."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(0.2 * torch.randn(rank, linear.in_features))
        self.b = nn.Parameter(0.2 * torch.randn(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T

    def delta(self):
        return self.b @ self.a


class LoRAConv(nn.Module):
    def __init__(self, conv, rank=2):
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, rank, conv.kernel_size, conv.stride, bias=False)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))

    def delta(self):
        return torch.einsum("or,rchw->ochw", self.up.weight[:, :, 0, 0], self.down.weight)


class LoRASubclass(nn.Linear):
    """As loralib has it: the layer itself holds both."""

    def __init__(self, linear, rank=2):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.a = nn.Parameter(0.2 * torch.randn(rank, linear.in_features))
        self.b = nn.Parameter(0.2 * torch.randn(linear.out_features, rank))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b)

    def delta(self):
        return self.b @ self.a


class LowRank(nn.Module):
    """A parametrisation of any weight."""

    def __init__(self, weight, rank=2):
        super().__init__()
        self.a = nn.Parameter(0.2 * torch.randn(rank, weight[0].numel()))
        self.b = nn.Parameter(0.2 * torch.randn(len(weight), rank))

    def forward(self, weight):
        return weight + (self.b @ self.a).view_as(weight)


def slots(model):
    for block in model.blocks:
        yield from ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2"))
    yield model.patch_embed, "proj"
    yield model, "head"


def own(kinds):
    """Adapters of one's own on every layer, everything else frozen; and the same model of plain layers."""

    def make(model):
        model.requires_grad_(False)
        plain = copy.deepcopy(model)
        for (parent, name), (other, _) in zip(slots(model), slots(plain), strict=True):
            adapted = kinds(getattr(parent, name))
            setattr(parent, name, adapted)
            with torch.no_grad():
                getattr(other, name).weight += adapted.delta()
        return model.eval(), plain

    return make


def wrapped(layer):
    return LoRAConv(layer) if isinstance(layer, nn.Conv2d) else LoRALinear(layer)


def subclassed(layer):
    if isinstance(layer, nn.Conv2d):
        return LoRAConv(layer)
    made = LoRASubclass(layer)
    made.weight.requires_grad_(False)
    made.bias.requires_grad_(False)
    return made


def reparametrised(model):
    model.requires_grad_(False)
    plain = copy.deepcopy(model)
    for (parent, name), (other, _) in zip(slots(model), slots(plain), strict=True):
        layer = getattr(parent, name)
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
        with torch.no_grad():
            getattr(other, name).weight.copy_(layer.weight)
    return model.eval(), plain


def peft_of(change=lambda peft, model: None, **more):
    """A model under peft, and its merged copy."""

    def make(model):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        options = {"r": 2, "target_modules": LAYERS, "lora_dropout": 0.1, "init_lora_weights": False} | more
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
        change(peft, adapted)
        copied = copy.deepcopy(adapted)
        active = adapted.base_model.active_adapters
        off = any(layer.disable_adapters for layer in adapted.modules() if hasattr(layer, "lora_A"))
        plain = copied.unload() if off else copied.merge_and_unload(adapter_names=active)
        return adapted, plain

    return make


def injected(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, model).eval()
    return adapted, merged_by_hand(adapted)


def merged_by_hand(model):
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, layer in list(parent.named_children()):
            if hasattr(layer, "lora_A"):
                layer.merge()
                setattr(parent, name, layer.get_base_layer())
    return plain


def several(peft, model):
    more = peft.LoraConfig(r=3, target_modules=r".*attn\.proj|patch_embed\.proj", init_lora_weights=False)
    model.add_adapter("more", more)
    model.base_model.set_adapter(["default", "more"])


def switched(peft, model):
    with torch.no_grad():  # what was trained is no longer what was there
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.mul_(1.2)


MEMBERS = {
    "peft": peft_of(),
    "peft, all linear": peft_of(target_modules="all-linear"),
    "peft, DoRA": peft_of(use_dora=True),
    "peft, several": peft_of(several),
    "peft, merged": peft_of(lambda peft, model: model.merge_adapter()),
    "peft, off": peft_of(lambda peft, model: model.base_model.disable_adapter_layers()),
    "peft, modules saved": peft_of(switched, modules_to_save=["head", "norm", "norm1"]),
    "peft, injected": injected,
    "own wrapper": own(wrapped),
    "own subclass": own(subclassed),
    "own parametrisation": reparametrised,
}


RESTING = ("peft, merged", "peft, off")  # their adapters have no part in the forward


@pytest.fixture(params=MEMBERS)
def member(request):
    return made(request.param)


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    adapted, plain = MEMBERS[name](tiny(depth=2).to(dtype))
    adapted, plain = adapted.to(dtype), plain.to(dtype)
    with torch.no_grad():
        assert relative(adapted(X.to(dtype)), plain(X.to(dtype))) < 1e-4
    return adapted, plain


@pytest.mark.parametrize("name", MEMBERS)
def test_what_is_frozen_rests_and_all_else_learns(name):
    adapted, _ = made(name)
    free = {n for n, p in adapted.named_parameters() if p.requires_grad}
    pruning = prunex.attach(adapted, "dynamicvit", keep_ratio=0.6, teacher=False)
    adapted.train()
    start = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    (F.cross_entropy(adapted(X), torch.tensor([0, 1])) + sum(pruning.losses().values())).backward()
    optimizer.step()
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, start[n])}
    brought = {n for n in start if "prunex." in n}
    assert moved <= free | brought
    assert moved <= {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert moved & brought
    assert bool(moved & free) == (name not in RESTING)
    pruning.detach()
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == free


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lrp", {}),
        ("lrp", {"rule": "attnlrp"}),
        ("lrp", {"rule": "gamma"}),
        ("partial_lrp", {}),
        ("transformer_attribution", {}),
    ],
)
def test_relevance_goes_through_the_merged_weights(name, method, options):
    # Merged in double, too: relevance is divided by outputs that may be close to 0.
    a, b = (prunex.explain(method, m, X.double(), 1, **options).maps for m in made(name, torch.float64))
    assert relative(a, b) < 2e-3


def test_units_are_scored_and_left_out_as_of_the_merged_model(member):
    batches = [(X, torch.tensor([0, 1]))]
    pruned = [prunex.attach(m, "relevance", budget=0.6) for m in member]
    scores = [p.pruner.scores(p.model, batches) for p in pruned]
    assert all(relative(scores[0][key], scores[1][key]) < 5e-3 for key in scores[1])
    for p in pruned:
        p.calibrate(batches)
    assert pruned[0].widths == pruned[1].widths
    small = [prunex.slim(m) for m in member]
    with torch.no_grad():
        assert relative(small[0](X), member[0](X)) < 1e-4
    assert prunex.cost(small[0]) == prunex.cost(small[1])


def test_taking_units_out_of_the_running_model_needs_plain_layers(member):
    adapted, plain = member
    pruning = prunex.attach(adapted, "magnitude", budget=0.6)
    pruning.calibrate()
    before = state_of(adapted)
    with pytest.raises(PrunexError, match=r"blocks\.0\.attn\.qkv .*(merge the adapter|more than its weight|reparam)"):
        pruning.remove()
    assert state_of(adapted).keys() == before.keys()
    narrow = prunex.attach(plain, "magnitude", budget=0.6)
    narrow.calibrate()
    with torch.no_grad():
        assert relative(narrow.remove()(X), adapted(X)) < 1e-4


def test_the_embedding_is_cut_of_plain_layers_alone(member):
    adapted, _ = member
    vit = prunex.vit.anatomy.find(adapted)[1]
    spec = prunex.WidthSpec(embedding=tuple(range(24)))
    with pytest.raises(PrunexError, match=r"(blocks\.0|patch_embed|head|norm)\S* "):
        prunex.vit.widths.narrow(vit, spec)
    assert prunex.slim(adapted, widths=spec).embed_dim == 24


def test_slim_saved_and_loaded_it_is_timms_own(member, tmp_path):
    adapted, plain = member
    before = state_of(adapted)
    assert prunex.cost(adapted).macs == prunex.cost(plain).macs
    prunex.attach(adapted, "evit", keep_ratio=0.6)
    with torch.no_grad():
        wanted = adapted(X)
        small = prunex.slim(adapted)
        assert small.state_dict().keys() == plain.state_dict().keys()
        assert not any(parametrize.is_parametrized(m) for m in small.modules())
        assert relative(small(X), wanted) < 1e-4
        assert relative(prunex.load(prunex.save(adapted, tmp_path / "slim"))(X), wanted) < 1e-4
    prunex.attached(adapted).detach()
    assert state_of(adapted)["children"] == before["children"]
    assert all(torch.equal(v, before["tensors"][k]) for k, v in adapted.state_dict().items())


def test_exported_it_answers_the_same(member, tmp_path):
    adapted, _ = member
    prunex.attach(adapted, "evit", keep_ratio=0.6)
    file = prunex.export(adapted, tmp_path / "slim.pt2")  # which compares
    assert torch.export.load(file).module()(X).shape == (2, 5)


def test_an_onnx_graph_of_an_adapted_model(tmp_path):
    pytest.importorskip("onnxruntime")
    adapted, _ = MEMBERS["own wrapper"](tiny(depth=2))
    prunex.attach(adapted, "evit", keep_ratio=0.6)
    assert prunex.export(adapted, tmp_path / "slim.onnx").is_file()


# -------------------------------------------------------------------------------------- adapters that come afterwards


@pytest.mark.parametrize("method", ["dynamicvit", "ia_red2", "hvt", "evit"])
def test_adapters_on_what_a_pruner_brought_are_folded_too(tmp_path, method):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny(depth=3)
    prunex.attach(model, method)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        wanted = adapted(X)
        small = prunex.slim(adapted)
        assert not any("lora" in name for name, _ in small.named_parameters())
        assert relative(small(X), wanted) < 1e-4
        assert relative(prunex.load(prunex.save(adapted, tmp_path / "slim"))(X), wanted) < 1e-4
        assert relative(adapted.merge_and_unload()(X), wanted) < 1e-4


@pytest.mark.parametrize(("name", "options"), [("mean_patch", {}), ("attributes", {}), ("vit_net", {"depth": 2})])
def test_so_are_those_on_a_head_that_explains_itself(tmp_path, name, options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny(depth=2)
    head = prunex.attach(model, name, **options)
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    assert any("prunex_head" in n and "lora" in n for n, _ in adapted.named_parameters())
    with torch.no_grad():
        wanted = adapted(X)
        evidence = head.evidence(X)
        if hasattr(evidence, "contributions"):
            bias = getattr(evidence, "bias", None)
            total = evidence.contributions.sum(1) + (0 if bias is None else bias)
            assert relative(total, wanted) < 1e-4
        assert relative(prunex.load(prunex.save(adapted, tmp_path / "slim"))(X), wanted) < 1e-4


def test_peft_keeps_a_pruner_that_is_named_among_its_saved_modules(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def pruned():
        model = tiny(depth=3)
        prunex.attach(model, "dynamicvit")
        return model

    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["prunex"], init_lora_weights=False)
    adapted = peft.get_peft_model(pruned(), config)
    with torch.no_grad():
        for p in prunex.attached(adapted).pruner.parameters():
            p.add_(0.3 * torch.randn_like(p))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(pruned(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert relative(again(X), adapted(X)) < 1e-6
        assert relative(prunex.slim(again)(X), adapted(X)) < 1e-5


def test_swin_under_adapters(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
    model = timm.models.swin_transformer.SwinTransformer(img_size=32, patch_size=4, **options).eval()
    wanted = prunex.cost(model).macs
    names = [*LAYERS, "reduction"]
    config = peft.LoraConfig(r=2, target_modules=names, modules_to_save=["head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    assert prunex.cost(adapted).macs == wanted
    prunex.attach(adapted, "magnitude", budget=0.7).calibrate()
    with torch.no_grad():
        small = prunex.load(prunex.save(adapted, tmp_path / "slim"))
        assert relative(small(X), adapted(X)) < 1e-4
    assert prunex.cost(small).macs < wanted


# ------------------------------------------------------------------------------------------------ what cannot be right


def test_an_adapter_that_mixes_patches_is_refused_by_name():
    """A weight read from one patch alone would be another than the whole image's."""

    class Blurs(LoRAConv):
        def forward(self, x):
            return super().forward(x + x.roll(self.conv.kernel_size[0], -1))

    model = tiny(depth=2)
    model.patch_embed.proj = Blurs(model.patch_embed.proj)
    for refused in (prunex.slim, lambda m: prunex.explain("lrp", m, X, 1, rule="attnlrp")):
        with pytest.raises(PrunexError, match=r"patch_embed\.proj .*is not linear"):
            refused(model)


def test_so_is_peft_where_it_turns_pixels_across_patches():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.OFTConfig(target_modules=["proj"], oft_block_size=4)
    adapted = peft.get_peft_model(tiny(depth=2), config).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "oft_R" in name:
                p.normal_(0, 0.1)
    with pytest.raises(PrunexError, match=r"patch_embed\.proj \(peft\.Conv2d\) is not linear"):
        prunex.slim(adapted)


def test_a_patch_embedding_without_a_convolution_is_refused_by_name():
    model = tiny(depth=2)
    model.patch_embed.proj = nn.Flatten()
    with pytest.raises(PrunexError, match=r"patch_embed\.proj is a Flatten"):
        prunex.attach(model, "evit")
