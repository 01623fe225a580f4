"""Closed-form cost against published numbers, torch's flop counter and what a forward's trace shows."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prunex
from prunex import PrunexError
from tests.vits import ALL_FAMILIES, geometry, images, tiny

METHODS = {
    "topk": {},
    "evit": {},
    "evit, not fused": {"fuse": False},
    "dynamicvit": {"teacher": False},
}


def counted(model, x):
    """Multiply-adds of one image as torch counts them (two flops each).

    Attention is opened for it: not every torch counts the fused kernel of CPUs. Nothing may ask for gradients: torch's
    module tracker stumbles over a parameter that was expanded.
    """
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2 / len(x)


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [("deit_tiny_patch16_224", 1.25), ("deit_small_patch16_224", 4.60), ("deit_base_patch16_224", 17.56)],
)
def test_dense_models_as_published(name, gmacs):
    assert prunex.cost(geometry(name)).gmacs == pytest.approx(gmacs, abs=0.006)


PUBLISHED = [
    *[("deit_small_patch16_224", "dynamicvit", {}, r, g) for r, g in
      zip((0.9, 0.8, 0.7, 0.6, 0.5), (4.04, 3.46, 2.98, 2.57, 2.23), strict=True)],
    ("deit_base_patch16_224", "dynamicvit", {}, 0.7, 11.48),
    *[("deit_small_patch16_224", "evit", {}, r, g) for r, g in
      zip((0.9, 0.8, 0.7, 0.6, 0.5), (4.02, 3.48, 3.03, 2.64, 2.31), strict=True)],
    ("deit_small_patch16_224", "evit", {"fuse": False}, 0.7, 3.00),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "options", "ratio", "gmacs"), PUBLISHED)
def test_pruned_models_as_published(name, method, options, ratio, gmacs):
    model = geometry(name)
    if method == "dynamicvit":
        options = {"teacher": False}
    prunex.attach(model, method, keep_ratio=ratio, **options)
    assert prunex.cost(model).gmacs == pytest.approx(gmacs, abs=0.006)


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_within_one_percent_of_torchs_flop_counter(family, method):
    model = tiny(family, img_size=(40, 24) if family == "not_square" else 64)
    if method is not None:
        prunex.attach(model, method.split(",")[0], keep_ratio=0.7, **METHODS[method])
    small = prunex.slim(model)
    x = images(2, tuple(model.patch_embed.img_size))
    assert prunex.cost(small).macs == pytest.approx(counted(small, x), rel=0.01)


@pytest.mark.parametrize("method", list(METHODS))
def test_deit_small_within_one_percent_of_torchs_flop_counter(method):
    model = geometry("deit_small_patch16_224")
    with torch.device("meta"):
        prunex.attach(model, method.split(",")[0], keep_ratio=0.7, **METHODS[method])
        x = torch.randn(1, 3, 224, 224)
        assert prunex.cost(model).macs == pytest.approx(counted(model, x), rel=0.01)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class"])
@pytest.mark.parametrize("ratio", [0.5, 0.7, (1.0, 0.6, 0.3), 1.0])
def test_tokens_of_every_block_are_those_a_forward_has(family, method, ratio):
    model = tiny(family)
    prunex.attach(model, method.split(",")[0], keep_ratio=ratio, stages=(1, 2, 3), **METHODS[method])
    small = prunex.slim(model)
    cost = prunex.cost(small)
    seen = {"attn": [], "mlp": []}
    for block in small.blocks:
        for half, module in (("attn", block.attn.qkv), ("mlp", block.mlp)):
            module.register_forward_pre_hook(lambda _m, args, half=half: seen[half].append(args[0].shape[1]))
    small(images(1))
    assert cost.tokens == [b.attention_tokens for b in cost.blocks] == seen["attn"]
    assert [b.mlp_tokens for b in cost.blocks] == seen["mlp"]
    trace, prefix = prunex.attached(small).trace, small.num_prefix_tokens
    left = {s.block: s.n_out + prefix for s in trace.stages}
    n = 16 + prefix
    for i, block in enumerate(cost.blocks):
        n = left.get(i, n)
        assert block.mlp_tokens == n


def test_a_stage_of_dynamicvit_that_drops_nobody_scores_nobody():
    model = tiny(img_size=64)
    prunex.attach(model, "dynamicvit", keep_ratio=[0.6, 1.0, 0.6], teacher=False)
    small = prunex.slim(model)
    assert prunex.cost(small).macs == pytest.approx(counted(small, images(1, (64, 64))), rel=0.002)


def test_evit_in_the_middle_of_its_schedule_costs_what_it_runs():
    model = tiny(img_size=64)
    pruning = prunex.attach(model, "evit", keep_ratio=0.5, shrink_length=1.0)
    costs = []
    for pruning.progress in (0.0, 0.5, 1.0):
        costs.append(prunex.cost(model).macs)
        assert costs[-1] == pytest.approx(counted(model, images(1, (64, 64))), rel=0.01)
    assert costs == sorted(costs, reverse=True)


def test_parameters_are_all_that_infer_predictors_included():
    dense = tiny()
    own = sum(p.numel() for p in dense.parameters())
    assert prunex.cost(dense).params == own
    pruning = prunex.attach(dense, "dynamicvit")
    predictors = sum(p.numel() for p in pruning.pruner.parameters())
    assert predictors > 0
    assert prunex.cost(dense).params == own + predictors  # and not a teacher's
    assert sum(b.macs for b in prunex.cost(dense).blocks) < prunex.cost(dense).macs


def test_another_image_size_is_counted_without_building_it():
    model = tiny("dynamic")
    prunex.attach(model, "evit", keep_ratio=0.7)
    for size in ((32, 32), (48, 24), (64, 64)):
        assert prunex.cost(model, size).macs == pytest.approx(counted(model, images(1, size)), rel=0.01)
    assert prunex.cost(model, (32, 32)) == prunex.cost(model)
    larger = tiny(img_size=64)
    prunex.attach(larger, "evit", keep_ratio=0.7)
    assert prunex.cost(larger).tokens == prunex.cost(model, (64, 64)).tokens


def test_a_model_that_pads_counts_the_padded_patches():
    model = tiny("dynamic", dynamic_img_pad=True)
    assert prunex.cost(model, (30, 41)).macs == pytest.approx(counted(model, images(1, (30, 41))), rel=0.01)


@pytest.mark.parametrize("size", [(33, 32), (32, 0), (-8, 32), 32, (32,), (32.0, 32), "32"])
def test_sizes_that_are_none_end_in_one_line(size):
    with pytest.raises(PrunexError, match="image_size") as caught:
        prunex.cost(tiny("dynamic"), size)
    assert "\n" not in str(caught.value)


def test_a_vit_inside_a_module_is_found_and_its_absence_told():
    model = tiny()
    assert prunex.cost(nn.Sequential(nn.Identity(), model)) == prunex.cost(model)
    with pytest.raises(PrunexError, match="no supported ViT"):
        prunex.cost(nn.Linear(2, 2))


def test_counting_leaves_the_model_alone():
    model = tiny()
    prunex.attach(model, "evit")
    before = model(images())
    prunex.cost(model)
    assert torch.equal(model(images()), before)
