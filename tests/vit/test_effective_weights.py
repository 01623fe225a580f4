"""Weights that layers compute with, whatever was put on them: merged copies are right, everything else is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import prunex
from prunex import PrunexError
from prunex.vit.weights import Unread, check_gradients, effective, is_plain, scale_of, sizes, wrapped_layers
from tests.vits import images, relative, tiny

X = images(2)


class QkvAdapter(nn.Module):
    """As public fine-tuning code wraps ``qkv``: low-rank updates of queries and values, added in place."""

    def __init__(self, qkv, rank=2):
        super().__init__()
        self.qkv, self.dim = qkv, qkv.in_features
        self.a_q, self.a_v = (nn.Linear(self.dim, rank, bias=False) for _ in range(2))
        self.b_q, self.b_v = (nn.Linear(rank, self.dim, bias=False) for _ in range(2))

    def forward(self, x):
        qkv = self.qkv(x)  # [B, N, 3 * D]
        qkv[:, :, : self.dim] += self.b_q(self.a_q(x))
        qkv[:, :, -self.dim :] += self.b_v(self.a_v(x))
        return qkv


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Bent(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Mixing(nn.Linear):
    """Looks at the neighbouring token, so that no weight alone says what it does."""

    def forward(self, x):
        return super().forward(x) + 0.5 * super().forward(x.roll(1, -2))


class Squared(nn.Module):
    def forward(self, weight):
        return weight * weight.abs()


def adapted(kind):
    """A model whose layers compute with more than ``weight``, and an equal one of plain layers."""
    model = tiny(depth=3)
    torch.manual_seed(0)
    if kind in PEFT:
        peft = pytest.importorskip("peft")
        wrapped = PEFT[kind](peft, model).eval()
        merged = copy.deepcopy(wrapped)
        if kind == "disabled":
            merged = merged.unload()
        elif kind == "two_active":
            merged = merged.merge_and_unload(adapter_names=["default", "more"])
        else:
            merged = merged.merge_and_unload()
        return wrapped, merged
    plain = copy.deepcopy(model)
    for block, twin in zip(model.blocks, plain.blocks, strict=True):
        OWN[kind](block, twin)
    return model, plain


def lora(peft, model, targets=r".*\.(qkv|proj|fc1|fc2)", **more):
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, exclude_modules=["patch_embed.proj"],
                             init_lora_weights=False, lora_dropout=0.1, **more)  # fmt: skip
    return peft.get_peft_model(model, config)


def two_active(peft, model):
    wrapped = lora(peft, model)
    wrapped.add_adapter("more", peft.LoraConfig(r=2, target_modules=r".*attn\.proj", init_lora_weights=False))
    wrapped.base_model.set_adapter(["default", "more"])
    return wrapped


def merged_in_place(peft, model):
    wrapped = lora(peft, model)
    wrapped.merge_adapter()
    return wrapped


def disabled(peft, model):
    wrapped = lora(peft, model)
    wrapped.base_model.disable_adapter_layers()
    return wrapped


def ia3(peft, model):
    config = peft.IA3Config(target_modules=r".*\.(proj|fc1|fc2)", feedforward_modules=r".*\.fc2",
                            exclude_modules=["patch_embed.proj"], init_ia3_weights=False)  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if "ia3" in name:
            nn.init.normal_(p, 1, 0.3)
    return wrapped


PEFT = {
    "lora": lora,
    "rslora": lambda peft, model: lora(peft, model, use_rslora=True),
    "dora": lambda peft, model: lora(peft, model, use_dora=True),
    "two_active": two_active,
    "merged_in_place": merged_in_place,
    "disabled": disabled,
    "ia3": ia3,
    "head_too": lambda peft, model: lora(peft, model, modules_to_save=["head"]),
}


def _layers(block):
    return [
        (m, n) for m in (block.attn, block.mlp) for n, _ in m.named_children() if n in ("qkv", "proj", "fc1", "fc2")
    ]


def _both(block, twin, put, weigh):
    """Put something on every layer of a block; what it makes of the weights goes into the twin's."""
    for (parent, name), (other, _) in zip(_layers(block), _layers(twin), strict=True):
        layer, plain = getattr(parent, name), getattr(other, name)
        setattr(parent, name, put(layer) or layer)
        with torch.no_grad():
            weigh(plain)


def weight_normed(block, twin):
    def put(layer):
        parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.5)

    _both(block, twin, put, lambda plain: plain.weight.mul_(1.5))


def old_weight_norm(block, twin):
    def put(layer):
        weight_norm(layer)
        with torch.no_grad():
            layer.weight_g.mul_(0.5)  # layer.weight is what it was until the next forward

    _both(block, twin, put, lambda plain: plain.weight.mul_(0.5))


def reparametrised(block, twin):
    def put(layer):
        parametrize.register_parametrization(layer, "weight", Squared())

    _both(block, twin, put, lambda plain: plain.weight.copy_(plain.weight * plain.weight.abs()))


def masked(block, twin):
    def put(layer):
        prune.l1_unstructured(layer, "weight", amount=0.5)
        with torch.no_grad():
            layer.weight_orig.mul_(3)  # as an optimiser's step would: layer.weight is stale

    def weigh(plain):
        prune.l1_unstructured(plain, "weight", amount=0.5)
        prune.remove(plain, "weight")
        plain.weight.data.mul_(3)

    _both(block, twin, put, weigh)


def doubled(block, twin):
    def put(layer):
        other = Doubled(layer.in_features, layer.out_features)
        other.load_state_dict(layer.state_dict())
        return other.eval()

    _both(block, twin, put, lambda plain: [p.mul_(2) for p in plain.parameters()])


def hooked(block, twin):
    def put(layer):
        layer.register_forward_hook(lambda module, args, out: 0.3 * out)

    _both(block, twin, put, lambda plain: [p.mul_(0.3) for p in plain.parameters()])


def watched(block, twin):
    def put(layer):
        layer.register_forward_hook(lambda module, args, out: None)

    _both(block, twin, put, lambda plain: None)


def own_adapter(block, twin):
    block.attn.qkv = wrapper = QkvAdapter(block.attn.qkv).eval()
    with torch.no_grad():
        for at, a, b in ((slice(0, 48), wrapper.a_q, wrapper.b_q), (slice(96, 144), wrapper.a_v, wrapper.b_v)):
            twin.attn.qkv.weight[at] += b.weight @ a.weight


OWN = {
    "weight_norm": weight_normed,
    "old_weight_norm": old_weight_norm,
    "reparametrised": reparametrised,
    "masked": masked,
    "doubled": doubled,
    "hooked": hooked,
    "watched": watched,
    "own_adapter": own_adapter,
}
KINDS = [*PEFT, *OWN]
QUICK = ["lora", "dora", "masked", "own_adapter"]


def vit_of(model):
    return prunex.vit.anatomy.find(model)[1]


def close(a, b, tolerance=2e-4):
    assert relative(a, b) < tolerance, relative(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_merged_copy(kind):
    model, plain = adapted(kind)
    close(model(X), plain(X))
    vit, layers = vit_of(model), dict(plain.named_modules())
    changed = list(wrapped_layers(vit))
    assert changed
    for path, _, _, layer in changed:
        weight, bias = effective(layer)
        close(weight, layers[path].weight)
        close(bias, layers[path].bias)
        assert sizes(layer) == (layers[path].in_features, layers[path].out_features)


@pytest.mark.parametrize("training", [True, False])
def test_reading_leaves_a_layer_as_it_was(training):
    layer = nn.Linear(8, 4)
    parametrizations.spectral_norm(layer)
    layer.train(training)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        wanted = copy.deepcopy(layer).eval().weight
    close(effective(layer)[0], wanted, 1e-6)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())  # no step of the power iteration
    assert layer.training == training


@pytest.mark.parametrize("method", ["tokentm", "beyond_intuition", "lrp", "partial_lrp", "transformer_attribution"])
@pytest.mark.parametrize("kind", QUICK)
def test_explanations_are_those_of_the_merged_copy(kind, method):
    model, plain = adapted(kind)
    a, b = (prunex.explain(method, m, X, 1) for m in (model, plain))
    close(a.maps, b.maps, 2e-3)
    close(a.logits, b.logits)


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "attnlrp", "cplrp"])
def test_so_is_relevance_by_any_rule(rule):
    model, plain = adapted("dora")
    a, b = (prunex.explain("lrp", m, X, 1, rule=rule).maps for m in (model, plain))
    close(a, b, 5e-3)


@pytest.mark.parametrize("method", [m.name for m in prunex.methods("explainer")])
def test_every_explainer_takes_an_adapted_model(method):
    model, plain = adapted("own_adapter")
    try:
        wanted = prunex.explain(method, plain, X, 1)
    except PrunexError:  # the two that are trained
        return
    close(prunex.explain(method, model, X, 1).maps, wanted.maps, 1e-2)


def test_a_layer_scale_of_ones_own():
    class Scale(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.gain = nn.Parameter(torch.linspace(0.5, 2, dim))

        def forward(self, x):
            return x * self.gain.square()

    model, plain = tiny("dinov2", depth=2), tiny("dinov2", depth=2)
    for block, twin in zip(model.blocks, plain.blocks, strict=True):
        block.ls1 = Scale(48)
        twin.ls1.gamma.data = torch.linspace(0.5, 2, 48).square()
    close(scale_of(model.blocks[0].ls1), plain.blocks[0].ls1.gamma)
    close(*(prunex.explain("tokentm", m, X, 1).maps for m in (model, plain)))
    scores = [prunex.attach(m, "magnitude").pruner.scores(m) for m in (model, plain)]
    close(scores[0]["0.heads"], scores[1]["0.heads"])
    model.blocks[1].ls1 = nn.Tanh()
    with pytest.raises(PrunexError, match=r"blocks\.1\.ls1 .*Tanh"):
        prunex.explain("tokentm", model, X, 1)


@pytest.mark.parametrize("cls", [Bent, Mixing])
def test_what_is_not_linear_is_refused_by_its_dotted_name(cls):
    model = tiny(depth=2)
    odd = cls(48, 48).eval()
    odd.load_state_dict(model.blocks[1].attn.proj.state_dict())
    model.blocks[1].attn.proj = odd
    with pytest.raises(Unread, match="not linear"):
        effective(odd)
    for method in ("tokentm", "lrp", "beyond_intuition"):
        with pytest.raises(PrunexError, match=r"blocks\.1\.attn\.proj \(.*is not linear") as caught:
            prunex.explain(method, nn.Sequential(model), X, 1)
        assert "\n" not in str(caught.value)
    with pytest.raises(PrunexError, match=r"blocks\.1\.attn\.proj"):
        prunex.attach(model, "magnitude").calibrate()
    if cls is Bent:  # what mixes tokens is no ViT's layer, and refused by all
        assert prunex.explain("generic_attention", model, X, 1).maps.abs().max() > 0  # needs no weights


def quantised(config):
    """A quantised model, and a plain one of the same weights unpacked."""
    quantization = pytest.importorskip("torchao.quantization")
    model, plain = tiny(depth=2), tiny(depth=2)
    quantization.quantize_(model, getattr(quantization, config)())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            plain.get_submodule(name).weight.data = layer.weight.dequantize().detach()
    return model, plain


CONFIGS = ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"]


@pytest.mark.parametrize("config", CONFIGS)
def test_quantised_weights_are_read_by_dequantising(config):
    model, plain = quantised(config)
    layer = model.blocks[0].attn.proj
    assert not is_plain(layer)
    assert torch.equal(effective(layer)[0], plain.blocks[0].attn.proj.weight)
    a, b = (prunex.attach(m, "magnitude").pruner.scores(m)["0.channels"] for m in (model, plain))
    assert torch.equal(a, b)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_quantised_model_is_right_or_refused_by_name(tmp_path, config):
    model, plain = quantised(config)
    loose = 5e-2 if "Dynamic" in config else 2e-3
    close(prunex.explain("rollout", model, X).maps, prunex.explain("rollout", plain, X).maps, loose)
    for method in ("generic_attention", "tokentm", "lrp"):
        if "Dynamic" in config:
            with pytest.raises(PrunexError, match=r"blocks\.0\.attn\.qkv .*no gradient"):
                prunex.explain(method, model, X, 1)
        else:
            close(*(prunex.explain(method, m, X, 1).maps for m in (model, plain)), loose)
    for refused in (prunex.slim, lambda m: prunex.save(m, tmp_path / "slim")):
        with pytest.raises(PrunexError, match=r"blocks\.0\.attn\.qkv .*quantised"):
            refused(model)
    assert not any(tmp_path.iterdir())
    pruning = prunex.attach(model, "magnitude", budget=0.7)
    pruning.calibrate()
    with pytest.raises(PrunexError, match="quantised"):
        pruning.remove()
    pruning.detach()
    if "Dynamic" in config:
        with pytest.raises(PrunexError, match="no gradient"):
            prunex.attach(model, "taylor")


def test_a_layer_that_detaches_is_refused_where_gradients_count():
    class Straight(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(0.5 * x) + super().forward(0.5 * x.detach())

    for cls, how in ((Straight, "no gradient"), (Half, "a part of the gradient")):
        model = tiny(depth=2)
        model.blocks[1].mlp.fc1 = cls(48, 192)
        with pytest.raises(PrunexError, match=rf"blocks\.1\.mlp\.fc1 .*{how}"):
            check_gradients(model, "rollout")
        with pytest.raises(PrunexError, match=how):
            prunex.explain("generic_attention", model, X, 1)
        for method in ("taylor", "xpruner"):
            with pytest.raises(PrunexError, match=how):
                prunex.attach(model, method)
        assert prunex.attached(model, units=True) is None


def test_adapters_count_as_merged():
    model, plain = adapted("lora")
    assert prunex.cost(model).macs == prunex.cost(plain).macs
    assert prunex.vit.anatomy.read(vit_of(model)) == prunex.vit.anatomy.read(plain)


def test_timms_own_reading_of_qkv_is_not_an_adapters():
    model = tiny("beit")
    model.blocks[1].attn.qkv = Doubled(48, 144, bias=False)
    with pytest.raises(PrunexError, match=r"Attention around a Doubled.*block 1"):
        prunex.attach(model, "evit")
