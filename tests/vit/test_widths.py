"""A narrowed model computes what the masked one does, its optimiser follows, and mistakes leave it as it was."""

import copy
from functools import partial

import pytest
import torch
from timm.layers import GluMlp, SwiGLU, set_fused_attn
from torch import nn

import prunex
from prunex import PrunexError, WidthSpec
from prunex.vit.describe import describe
from prunex.vit.rebuild import build
from prunex.vit.widths import dense_shape, narrow, widths_of
from tests.vit.narrowed import masked, tiny_of, tiny_swin
from tests.vits import assert_same_state, gated, images, images_for, state_of, tiny

MODELS = {
    "vit": {},
    "deit_distilled": {},
    "layer_scale": {},
    "res_post": {},
    "qk_norm": {},
    "no_qkv_bias": {},
    "siglip": {},
    "swin": {},
    "swiglu": {"family": "dinov2", "mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "glu": {"mlp_layer": partial(GluMlp, gate_last=False), "act_layer": nn.SiLU, "mlp_ratio": 5.0},
}
SPEC = WidthSpec(heads={0: (1,), 2: (0, 2)}, channels={0: tuple(range(0, 40, 3)), 1: (), 3: (7,)})


def model_of(name, **more):
    args = dict(MODELS[name])
    return tiny_of(args.pop("family", name if not args else "vit"), **args, **more)


@pytest.fixture(params=[True, False], ids=["fused", "not fused"])
def fused(request):
    set_fused_attn(request.param, experimental=request.param)  # windows fuse as an experiment only
    yield request.param
    set_fused_attn(True)


@pytest.mark.parametrize("name", list(MODELS))
def test_heads_and_channels_that_are_gone_are_those_that_were_masked(name, fused):
    model = model_of(name).double()
    x = images_for(model)
    wanted, dense = masked(model, SPEC)(x), model(x)
    assert not torch.allclose(wanted, dense, atol=1e-2)
    found = narrow(model, SPEC)(x)
    assert torch.allclose(found, wanted, atol=1e-10, rtol=0)
    single = model.float()(x.float())
    assert torch.allclose(single.double(), wanted, atol=1e-5, rtol=1e-5)
    assert widths_of(model) == SPEC


@pytest.mark.parametrize("family", ["eva02", "beit"])
def test_channels_of_eva_and_beit(family):
    more = {"scale_mlp": False} if family == "eva02" else {}
    model = tiny(family, **more).double()
    spec = WidthSpec(channels=SPEC.channels)
    wanted = masked(model, spec)(images_for(model))
    assert torch.allclose(narrow(model, spec)(images_for(model)), wanted, atol=1e-10)


def test_gated_attention():
    model = gated().double()
    x = images_for(model)
    wanted = masked(model, SPEC)(x)
    assert torch.allclose(narrow(model, SPEC)(x), wanted, atol=1e-10)
    assert model.blocks[0].attn.gate.out_features == 16


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "swin"])
def test_keeping_everything_changes_no_bit(name):
    model = model_of(name)
    before, x = state_of(model), images()
    wanted = model(x)
    heads = {i: range(b.attn.num_heads) for i, (_, b) in enumerate(blocks(model))}
    channels = {i: range(b.mlp.fc2.in_features) for i, (_, b) in enumerate(blocks(model))}
    narrow(model, WidthSpec(heads=heads, channels=channels), remember=False)
    assert_same_state(model, before)
    assert torch.equal(model(x), wanted)


def blocks(model):
    from prunex.vit.units import blocks_of

    return list(blocks_of(model))


def test_without_heads_or_channels_the_biases_are_left(fused):
    model = tiny("layer_scale")
    block, x = model.blocks[1], torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0))
    narrow(model, WidthSpec(heads={1: ()}, channels={1: ()}))
    wanted = x + block.ls1(block.attn.proj.bias) + block.ls2(block.mlp.fc2.bias)
    assert torch.allclose(block(x), wanted, atol=1e-6)
    assert block.attn.num_heads == 0


def zeroed(model, number, queries, values):
    """A copy in which channels of queries, keys and values are zero, by hand."""
    twin = copy.deepcopy(model)
    attn = twin.blocks[number].attn
    with torch.no_grad():
        for s, kept in ((0, queries), (1, queries), (2, values)):
            for h in range(3):
                gone = [s * 48 + h * 16 + i for i in range(16) if i not in kept[h]]
                attn.qkv.weight[gone] = 0
                attn.qkv.bias[gone] = 0
    return twin


def test_channels_of_queries_and_keys_need_their_scale_folded(fused):
    model = tiny().double()
    queries, values = [[0, 3, 5, 9], [1, 2, 3, 4], [0, 7, 8, 15]], [[1, 3, 5, 9], [2, 3, 4, 5], [0, 1, 8, 9]]
    wanted = zeroed(model, 1, queries, values)(images(dtype=torch.float64))
    narrow(model, WidthSpec(query_dims={1: queries}, value_dims={1: values}))
    x = images(dtype=torch.float64)
    assert torch.allclose(model(x), wanted, atol=1e-10)
    attn = model.blocks[1].attn
    assert (attn.head_dim, attn.scale, attn.qkv.out_features) == (4, 0.5, 36)
    with torch.no_grad():  # taken back, the scores are sqrt(16 / 4) too large
        attn.qkv.weight[:12] *= 2
        attn.qkv.bias[:12] *= 2
    assert float((model(x) - wanted).abs().max()) > 1e-3


def test_head_widths_beside_heads_and_heads_taken_later():
    together, later = tiny(), tiny()
    dims = [[0, 3], [1, 2], [0, 7]]
    spec = WidthSpec(heads={1: (0, 2)}, query_dims={1: [dims[0], dims[2]]}, value_dims={1: [dims[0], dims[2]]})
    narrow(together, spec)
    narrow(narrow(later, WidthSpec(query_dims={1: dims}, value_dims={1: dims})), WidthSpec(heads={1: (0, 2)}))
    assert torch.allclose(together(images()), later(images()), atol=1e-6)
    assert widths_of(together) == widths_of(later)
    assert build(describe(later)).blocks[1].attn.qkv.out_features == 12


def test_embedding_and_blocks():
    model = tiny("deit_distilled")
    x, kept = images(), tuple(range(0, 48, 2))
    dense = model(x)
    without = copy.deepcopy(model)
    without.blocks = nn.Sequential(*(model.blocks[i] for i in (0, 3)))
    narrow(model, WidthSpec(blocks=(0, 3)))
    assert torch.equal(model(x), without(x))
    narrow(model, WidthSpec(embedding=kept, heads={3: (0,)}))
    assert model(x).shape == dense.shape
    assert not torch.allclose(model(x), dense, atol=1e-2)
    assert (model.embed_dim, model.num_features, model.head.in_features, len(model.blocks)) == (24, 24, 24, 2)
    assert model.forward_features(x).shape == (3, 18, 24)
    assert [i["module"] for i in model.feature_info] == ["blocks.0", "blocks.1"]
    assert [f.shape[1] for f in model.forward_intermediates(x, intermediates_only=True)] == [24, 24]
    assert model.blocks[1].attn.num_heads == 1
    assert widths_of(model) == WidthSpec(heads={3: (0,)}, embedding=kept, blocks=(0, 3))
    assert prunex.cost(model).macs == prunex.cost(build(describe(model))).macs


def test_narrowing_twice_is_narrowing_once():
    once, twice = tiny(), tiny()
    narrow(once, WidthSpec(heads={0: (2,), 1: (1, 2)}, channels={0: (3, 50), 2: (1,)}))
    narrow(twice, WidthSpec(heads={0: (0, 2), 1: (1, 2)}, channels={0: (3, 9, 50)}))
    narrow(twice, WidthSpec(heads={0: (2,)}, channels={0: (3, 50), 2: (1,)}))
    assert torch.equal(once(images()), twice(images()))
    assert widths_of(once) == widths_of(twice)
    assert dense_shape(once) == dense_shape(twice)
    with pytest.raises(PrunexError, match="has no 0"):
        narrow(twice, WidthSpec(heads={0: (0,)}))


@pytest.mark.parametrize(
    "make", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.AdamW], ids=["sgd", "adamw"]
)
def test_training_goes_on_as_that_of_the_masked_model(make):
    x, labels = images(4), torch.tensor([0, 1, 2, 3])

    def step(model, optimizer):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    gates = masked(tiny(depth=2).double(), WidthSpec(heads={0: (1,)}, channels={0: (1, 5), 1: ()}))
    x = x.double()
    spec = WidthSpec(heads={0: (1,)}, channels={0: (1, 5), 1: ()})
    one = make(gates.parameters(), weight_decay=0)
    step(gates, one)
    small, two = copy.deepcopy((gates, one))
    narrow(small, spec, optimizers=[two])
    for m in small.modules():
        m._forward_pre_hooks.clear()
    step(gates, one)
    step(small, two)
    narrow(gates, spec, optimizers=[one])
    wanted = dict(gates.named_parameters())
    for name, p in small.named_parameters():
        assert torch.allclose(p, wanted[name], atol=1e-10), name
    assert {id(p) for g in two.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}
    for name, p in small.named_parameters():
        for key, value in two.state[p].items():
            assert torch.allclose(value, one.state[wanted[name]][key], atol=1e-10), (name, key)


WRONG = {
    "block": (WidthSpec(heads={9: (0,)}), "blocks 0 to 3"),
    "head": (WidthSpec(heads={0: (3,)}), "has no 3"),
    "falling": (WidthSpec(channels={0: (3, 1)}), "must rise"),
    "twice": (WidthSpec(channels={0: (1, 1)}), "must rise"),
    "fraction": (WidthSpec(channels={0: (0.5,)}), "no whole numbers"),
    "one of two": (WidthSpec(query_dims={0: ((0,), (0,), (0,))}), "name different blocks"),
    "too few lists": (WidthSpec(query_dims={0: ((0,),)}, value_dims={0: ((0,),)}), "one a head"),
    "uneven": (WidthSpec(query_dims={0: ((0,), (1,), (1,))}, value_dims={0: ((0, 1), (0, 1), (0, 1))}), "equally many"),
    "no embedding": (WidthSpec(embedding=()), "keep at least one"),
    "no block": (WidthSpec(blocks=()), "keep at least one"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_mistakes_leave_the_model_as_it_was(what):
    spec, match = WRONG[what]
    model = tiny()
    before = state_of(model)
    good = WidthSpec(heads={1: (0,)}, channels={2: (0,)})
    mixed = WidthSpec(
        heads={**good.heads, **spec.heads},
        channels={**good.channels, **spec.channels},
        query_dims=spec.query_dims,
        value_dims=spec.value_dims,
        embedding=spec.embedding,
        blocks=spec.blocks,
    )
    with pytest.raises(PrunexError, match=match):
        narrow(model, mixed)
    assert_same_state(model, before)


REFUSED = {
    "heads of EVA": ("eva02", WidthSpec(heads={0: (0,)}), "one by one"),
    "channels behind a norm": ("attn_norm", WidthSpec(channels={0: (0,)}), "one by one"),
    "heads behind a norm": ("attn_norm", WidthSpec(heads={0: (0,)}), "one by one"),
    "blocks of parallel parts": ("parallel_scaling", WidthSpec(channels={0: (0,)}), "one by one"),
    "embedding of parallel parts": ("parallel_scaling", WidthSpec(embedding=(0,)), "ParallelScalingBlock"),
    "normed queries": ("qk_norm", WidthSpec(query_dims={0: ((0,),) * 3}, value_dims={0: ((0,),) * 3}), "normed"),
    "embedding of a pooling head": ("siglip", WidthSpec(embedding=(0,)), "with this head"),
    "embedding of BEiT": ("beit", WidthSpec(embedding=(0,)), "Beit"),
    "blocks of BEiT": ("beit", WidthSpec(blocks=(0,)), "Beit"),
    "embedding of Swin": ("swin", WidthSpec(embedding=(0,)), "SwinTransformer"),
    "blocks of Swin": ("swin", WidthSpec(blocks=(0,)), "SwinTransformer"),
    "no heads in Swin": ("swin", WidthSpec(heads={0: ()}), "needs one"),
    "head widths of Swin": ("swin", WidthSpec(query_dims={0: ((0,),) * 2}, value_dims={0: ((0,),) * 2}), "biased"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_parts_that_cannot_be_narrowed_are_refused_by_name(what):
    family, spec, match = REFUSED[what]
    with pytest.raises(PrunexError, match=match):
        narrow(tiny_of(family), spec)


def test_other_models_are_refused():
    with pytest.raises(PrunexError, match="Linear cannot be narrowed"):
        narrow(nn.Linear(2, 2), WidthSpec())
    for spec in ({"heads": {0: [0]}}, WidthSpec(heads={0: 3}), WidthSpec(heads=[(0,)])):
        with pytest.raises(PrunexError, match="no widths"):
            narrow(tiny(), spec)


def test_embedding_and_blocks_stay_while_tokens_are_pruned():
    model = tiny()
    prunex.attach(model, "evit", keep_ratio=0.7)
    for spec in (WidthSpec(embedding=(0, 1)), WidthSpec(blocks=(0, 1))):
        with pytest.raises(PrunexError, match="detach"):
            narrow(model, spec)
    with pytest.raises(PrunexError, match="ranks tokens"):
        narrow(model, WidthSpec(heads={1: ()}))


def test_a_spec_is_plain_values_and_back():
    spec = WidthSpec({0: (0, 2)}, {1: ()}, {0: ((1,), (2,))}, {0: ((1,), (2,))}, (0, 5), (0, 1))
    assert WidthSpec.read(spec.plain()) == spec
    assert WidthSpec.read(WidthSpec().plain()) == WidthSpec()
    for told in ({"heads": [1]}, {"colour": 1}, {"heads": {"a": [1]}}, {"embedding": "ab"}, 3, {"blocks": [True]}):
        with pytest.raises(PrunexError, match="these are no widths"):
            WidthSpec.read(told)


def test_swin_windows_keep_their_bias():
    model = tiny_swin()
    table = model.layers[1].blocks[0].attn.relative_position_bias_table.clone()
    narrow(model, WidthSpec(heads={2: (1, 3)}))
    assert torch.equal(model.layers[1].blocks[0].attn.relative_position_bias_table, table[:, [1, 3]])
    assert copy.deepcopy(model)(images()).shape == (3, 5)
