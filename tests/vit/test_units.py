"""Gates close units in every forward alike; what they cost, and what looks inside attention, count the open ones."""

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prunex
from prunex import PrunexError
from prunex.vit.units import (
    branches,
    heads_left,
    let_through,
    put_gates,
    take_gates_off,
    unit_params,
)
from tests.vit.narrowed import hard, tiny_of, tiny_swin
from tests.vits import assert_same_state, images, images_for, state_of, tiny

FAMILIES = ["vit", "deit_distilled", "dinov2_giant", "no_qkv_bias", "res_post", "siglip", "swin"]


def flops(model, x):
    """Multiply-adds of one image as torch counts them."""
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2 / len(x)


def test_branches_of_a_vit():
    found = branches(tiny())
    assert [b.key for b in found[:3]] == ["0.heads", "0.channels", "1.heads"]
    n, d, width = 17, 16, 48
    assert (found[0].units, found[0].width, found[0].macs) == (3, d, 4 * n * width * d + 2 * n * n * d)
    assert (found[1].units, found[1].width, found[1].macs) == (192, 1, 2 * n * width)
    assert unit_params(tiny(), found[0]) == 3 * d * (width + 1) + d * width
    assert unit_params(tiny(), found[1]) == width + 1 + width


def test_branches_of_a_swin_count_windows():
    found = {b.key: b for b in branches(tiny_swin(window_size=3))}  # 8 x 8 patches pad to 9 x 9
    assert found["0.heads"].macs == 4 * 81 * 16 * 8 + 2 * 81 * 9 * 8
    assert found["0.channels"].macs == 2 * 64 * 16
    assert found["3.heads"].units == 4
    assert found["3.heads"].path == "layers.1.blocks.1"


@pytest.mark.parametrize("family", ["eva02", "beit", "parallel_scaling", "attn_norm", "qk_norm"])
def test_families_without_some_units(family):
    kinds = {
        "eva02": "none",
        "parallel_scaling": "none",
        "attn_norm": "none",
        "beit": {"channels"},
        "qk_norm": {"heads", "channels"},
    }[family]
    if kinds == "none":
        with pytest.raises(PrunexError, match="no units that are known"):
            branches(tiny(family))
    else:
        assert {b.kind for b in branches(tiny(family))} == kinds


def test_other_swins_are_refused_by_name():
    model = SwinTransformerV2(img_size=32, patch_size=4, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4)
    for call in (branches, prunex.slim, lambda m: prunex.attach(m, "xpruner"), lambda m: prunex.save(m, "nowhere")):
        with pytest.raises(PrunexError, match="SwinTransformerV2"):
            call(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_multiply_the_units_and_come_off_bit_for_bit(family):
    model = tiny_of(family)
    x, before = images_for(model), state_of(model)
    dense = model(x)
    put_gates(model, lambda key, batch: None)
    assert torch.equal(model(x), dense)
    take_gates_off(model)
    put_gates(model, lambda key, batch: torch.zeros(1) if key == "1.channels" else None)
    block = model.get_submodule(next(b.path for b in branches(model) if b.key == "1.channels"))
    found = model(x)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
    take_gates_off(model)
    assert torch.allclose(found, model(x), atol=1e-6)
    model.load_state_dict(before["tensors"])
    assert_same_state(model, before)


def test_gates_of_each_image_reach_its_own_windows():
    model, x = tiny_swin(), images(3)
    table = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    put_gates(model, lambda key, batch: table[:batch] if key == "0.heads" else None)
    together = model(x)
    for i in range(3):
        take_gates_off(model)
        put_gates(model, lambda key, batch, i=i: table[i] if key == "0.heads" else None)
        assert torch.allclose(model(x[i : i + 1]), together[i : i + 1], atol=1e-5)


def test_gates_of_each_image_in_a_vit():
    model, x = tiny(), images(2)
    table = torch.rand(2, 192, generator=torch.Generator().manual_seed(0))
    put_gates(model, lambda key, batch: table[:batch] if key == "2.channels" else None)
    together = model(x)
    take_gates_off(model)
    put_gates(model, lambda key, batch: table[1] if key == "2.channels" else None)
    assert torch.allclose(model(x[1:]), together[1:], atol=1e-5)


def test_what_a_gate_lets_through():
    model = tiny()
    hard(model, closed={"0.heads": [1], "1.channels": [0]})
    fc2, x = model.blocks[1].mlp.fc2, torch.ones(1, 2, 192)
    once = let_through(fc2, x)
    assert float(once[0, 0, 0]) == 0
    assert torch.equal(let_through(fc2, once), once)
    assert torch.equal(let_through(model.head, x), x)
    assert 1 not in heads_left(model.blocks[0].attn.proj)
    assert heads_left(model.head) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_cost_of_closed_units_is_that_of_the_slim_model(family):
    model = tiny_of(family)
    pruning = hard(model, closed={"1.channels": range(10), "2.channels": range(64)})
    found, small = prunex.cost(model), prunex.slim(model)
    assert pruning.pruner.closed()
    assert found == prunex.cost(small)
    assert found.params == sum(p.numel() for p in small.parameters())
    x = images_for(small, 2)
    near = 1e-2 if family == "swin" else 1e-6
    assert found.macs == pytest.approx(flops(small, x), rel=near)


def test_closed_form_of_a_plain_vit():
    small = prunex.slim(tiny(), widths=prunex.WidthSpec(heads={0: (0,), 1: ()}, channels={0: range(50), 3: ()}))
    n, d, width = 17, 16, 48
    heads, hidden = (1, 0, 3, 3), (50, 192, 192, 0)
    blocks = [4 * n * width * h * d + 2 * n * n * h * d + 2 * n * width * f for h, f in zip(heads, hidden, strict=True)]
    assert prunex.cost(small).macs == 16 * 3 * 64 * width + sum(blocks) + width * 5
    assert [b.macs for b in prunex.cost(small).blocks] == blocks


@pytest.mark.parametrize("method", ["evit", "topk", "tome", "ppt", "dynamicvit"])
def test_cost_with_tokens_pruned_too(method):
    model = tiny()
    prunex.attach(model, method, **({"r": 2} if method in ("tome", "ppt") else {"keep_ratio": 0.6}))
    hard(model, closed={"1.heads": [0], "3.heads": [0, 1]})
    small = prunex.slim(model)
    assert prunex.cost(model) == prunex.cost(small)
    assert prunex.attached(small)._attached.dense.heads == tuple(b.attn.num_heads for b in small.blocks)


# --- who looks inside attention sees what the slim model has

TRAINED = {"vit_shapley", "diffmask", "attributes", "concept_transformer", "mean_patch", "vit_net"}
EXPLAINERS = [m.name for m in prunex.methods("explainer") if m.name not in TRAINED]
CLOSED = {"dense": {"1.heads": [0, 1, 2], "3.heads": [0, 1, 2], "2.channels": range(192)}}
CLOSED |= {"evit": {"1.heads": [2]}, "tome": {"0.heads": [0, 1, 2]}}


@pytest.fixture(scope="module", params=list(CLOSED))
def gated_and_slim(request):
    model = tiny()
    if request.param != "dense":
        prunex.attach(model, request.param, **({"keep_ratio": 0.6} if request.param == "evit" else {"r": 2}))
    options = {} if request.param != "dense" else {"min_heads": 0, "min_channels": 0}
    hard(model, closed=CLOSED[request.param] if request.param != "tome" else {"0.heads": [0]}, **options)
    return model, prunex.slim(model)


@pytest.mark.filterwarnings("ignore:r_cut has no cut")
@pytest.mark.parametrize("name", EXPLAINERS)
def test_maps_of_a_gated_model_are_those_of_the_slim_one(name, gated_and_slim):
    model, small = gated_and_slim
    more = {"vit_cx": {"max_masks": 8}, "shap": {"budget": 32}}.get(name, {})
    found = [prunex.explain(name, m, images(2), **more) for m in (model, small)]
    assert torch.isfinite(found[1].maps).all()
    assert torch.allclose(found[0].maps, found[1].maps, atol=1e-5, rtol=1e-5)
    assert torch.allclose(found[0].logits, found[1].logits, atol=1e-6)


@pytest.mark.parametrize("options", [{"rule": "epsilon"}, {"rule": "gamma"}, {"rule": "attnlrp"}, {"rule": "cplrp"}])
def test_every_rule_of_lrp_sees_the_gates(options, gated_and_slim):
    model, small = gated_and_slim
    maps = [prunex.explain("lrp", m, images(2), **options).maps for m in (model, small)]
    assert torch.allclose(*maps, atol=1e-5, rtol=1e-5)


def test_a_block_without_heads_mixes_nothing():
    spec = prunex.WidthSpec(heads=dict.fromkeys(range(4), ()))
    small = prunex.slim(tiny(), widths=spec)
    rollout = prunex.explain("rollout", small, images(2))
    assert float(rollout.maps.abs().max()) == 0  # the class token stays itself
    assert torch.allclose(rollout.raw[:, 0], torch.ones(2))
    flow = prunex.explain("attention_flow", small, images(2))
    assert torch.allclose(flow.raw[:, 0], torch.ones(2), atol=1e-4)
    assert float(flow.raw[:, 1:].abs().max()) == 0
    assert float(prunex.explain("raw_attention", small, images(2)).maps.abs().max()) == 0
    for fusion in ("max", "min"):
        assert torch.isfinite(prunex.explain("rollout", small, images(2), head_fusion=fusion).maps).all()


def test_tokens_are_not_ranked_by_heads_that_are_not_there():
    spec = prunex.WidthSpec(heads={1: ()})
    small = prunex.slim(tiny(), widths=spec)
    with pytest.raises(PrunexError, match="block 1, which has no heads"):
        prunex.attach(small, "evit", keep_ratio=0.7, stages=(1, 2))
    with pytest.raises(PrunexError, match="block 1, which has no heads"):
        prunex.attach(small, "tome", r=2)
    prunex.attach(small, "evit", keep_ratio=0.7, stages=(2, 3))
    assert torch.isfinite(small(images())).all()
    model = tiny()
    prunex.attach(model, "evit", keep_ratio=0.7)
    with pytest.raises(PrunexError, match="min_heads=0"):
        prunex.attach(model, "xpruner", min_heads=0)
    assert prunex.attached(model, units=True) is None
    other = tiny()
    prunex.attach(other, "xpruner", min_heads=0)
    with pytest.raises(PrunexError, match="min_heads=0"):
        prunex.attach(other, "evit", keep_ratio=0.7)
    assert prunex.attached(other) is None


@pytest.mark.parametrize("method", ["evit", "tome", "ppt", "dynamicvit"])
def test_both_prunings_in_either_order_decide_alike(method):
    options = {"r": 2} if method in ("tome", "ppt") else {"keep_ratio": 0.6}
    models = [tiny(), tiny()]
    prunex.attach(models[0], method, **options)
    hard(models[0], closed={"2.heads": [0]})
    spec = prunex.attached(models[0], units=True).widths
    hard(models[1])
    pruner = prunex.attached(models[1], units=True).pruner
    for b in pruner.branches:
        kept = getattr(spec, b.kind).get(b.block, range(b.units))
        pruner.open(b.key).fill_(False)[list(kept)] = True
    pruner.refresh()
    prunex.attach(models[1], method, **options)
    if method == "dynamicvit":
        prunex.attached(models[1]).pruner.load_state_dict(prunex.attached(models[0]).pruner.state_dict())
    outs = [m(images()) for m in models]
    assert torch.allclose(*outs, atol=1e-6)
    slims = [prunex.slim(m) for m in models]
    for small, out in zip(slims, outs, strict=True):
        assert torch.allclose(small(images()), out, atol=1e-6)
        assert torch.equal(prunex.attached(small).trace.kept(), prunex.attached(models[0]).trace.kept())
