"""Positions as inputs of AttnLRP: added ones reach the pixels, rotary tables take half of their products."""

from functools import partial

import pytest
import torch

import prunex
from prunex.relevance.gradients import ModifiedGradients
from tests.vit.families import double
from tests.vits import images, images_for, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
explain = partial(prunex.explain, "lrp", rule="attnlrp")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("half", [False, True])
def test_products_with_sines_and_cosines_give_either_side_half(heads, half):
    """x_d cos_d and x_e sin_d, e the other channel of the pair with its sign: one product at a time."""
    q, k, angles = draw(2, 3, 5, 4), draw(2, 3, 5, 4, seed=1), draw(heads, 5, 2, seed=2)
    pairs = torch.cat([angles, angles], 2) if half else angles.repeat_interleave(2, 2)
    table = torch.cat([pairs.sin(), pairs.cos()], 2)
    ops, inputs = ModifiedGradients("attnlrp", positions=True), [q.requires_grad_(), k.requires_grad_()]
    out = ops.rotated(*inputs, table if heads > 1 else table[0], half)
    plain = ModifiedGradients("attnlrp").rotated(*inputs, table if heads > 1 else table[0], half)
    g = [draw(2, 3, 5, 4, seed=3), draw(2, 3, 5, 4, seed=4)]
    found = torch.autograd.grad(out, [*inputs, *ops.tables], g)
    wanted_table = torch.zeros(2, heads, 5, 8, dtype=torch.float64)
    for x, value, same, grad, r in zip(inputs, out, plain, g, found, strict=False):
        assert value.equal(same)
        wanted = torch.zeros_like(x)
        for b, h, n, d in torch.cartesian_prod(*(torch.arange(s) for s in x.shape)).tolist():
            if half:
                e, sign = (d + 2, -1) if d < 2 else (d - 2, 1)
            else:
                e, sign = (d + 1, -1) if d % 2 == 0 else (d - 1, 1)
            t = h if heads > 1 else 0
            straight = x[b, h, n, d] * pairs[t, n, d].cos() * grad[b, h, n, d]
            crossed = sign * x[b, h, n, e] * pairs[t, n, d].sin() * grad[b, h, n, d]
            wanted[b, h, n, d] += straight / 2
            wanted[b, h, n, e] += crossed / 2
            wanted_table[b, t, n, d] += crossed / 2
            wanted_table[b, t, n, 4 + d] += straight / 2
        assert relative(r * x, wanted) < 1e-12
    assert relative(found[2] * ops.tables[0], wanted_table) < 1e-12


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "deit_distilled", "avg_pool_no_class"])
def test_added_positions_reach_the_pixels(family):
    model = tiny(family).double()
    torch.nn.init.zeros_(model.patch_embed.proj.bias)
    x = images_for(model)
    plain, e = explain(model, x, TARGETS), explain(model, x, TARGETS, positions=True)
    assert e.maps.equal(plain.maps)  # they have their positions' part already
    assert relative(e.pixels.unflatten(2, (4, 8)).unflatten(1, (4, 8)).sum((2, 4)), e.maps) < 1e-9
    own = plain.pixels.unflatten(2, (4, 8)).unflatten(1, (4, 8)).sum((2, 4))
    assert relative(e.maps - own, e.info["positions"].unflatten(1, (4, 4))) < 1e-9
    assert relative(own, e.maps) > 0.01
    part = (e.raw - plain.raw).unflatten(3, (4, 8)).unflatten(2, (4, 8))
    assert relative(part, part.mean((1, 3, 5), keepdim=True).expand_as(part)) < 1e-9
    assert e.pixels.equal(e.raw.sum(1))


def test_rotary_tables_take_their_part_and_models_without_positions_have_none():
    model = tiny("dinov3").double()
    plain, e = explain(model, images_for(model), TARGETS), explain(model, images_for(model), TARGETS, positions=True)
    assert (e.info["positions"] > 0).all()
    assert relative(e.maps, plain.maps) > 0.01
    assert relative(e.logits, plain.logits) < 1e-12
    # The prefix is not turned.
    assert e.info["prefix"].shape == (3, 5)
    none = tiny("beit").double()
    plain, e = explain(none, images_for(none), TARGETS), explain(none, images_for(none), TARGETS, positions=True)
    assert (e.info["positions"] == 0).all()
    assert e.raw.equal(plain.raw)
    assert e.maps.equal(plain.maps)


@pytest.mark.parametrize("pruner", ["topk", "evit"])
@pytest.mark.parametrize("family", ["vit", "dinov3", "rope_mixed", "eva02", "pe", "sapiens2"])
def test_pruned(family, pruner):
    model = tiny().double() if family == "vit" else double(family)
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        removed = explain(model, x, TARGETS, positions=True)
        singles = [explain(model, x[i : i + 1], int(TARGETS[i]), positions=True) for i in range(3)]
        pruning.masked = True
        masked = explain(model, x, TARGETS, positions=True)
    for other in (masked.maps, torch.cat([s.maps for s in singles])):
        assert relative(other, removed.maps) < 1e-7
    assert relative(masked.raw, removed.raw) < 1e-7
    assert relative(masked.info["positions"], removed.info["positions"]) < 1e-7
    # What left a patch later than its embedding is still told where it was.
    assert (removed.info["positions"][~removed.trace.kept().flatten(1)] != 0).any()


def test_any_image_size():
    model = tiny("dynamic", dynamic_img_pad=True)
    e = explain(model, images(2, (29, 41)), 1, positions=True)
    assert e.raw.shape == (2, 3, 29, 41)
    assert e.pixels.shape == (2, 29, 41)
    assert torch.isfinite(e.raw).all()


def test_other_rules_have_no_positions():
    for rule in ("zplus", "epsilon", "gamma", "cplrp"):
        with pytest.raises(prunex.PrunexError, match=f"positions=True with rule='{rule}' is not allowed"):
            prunex.explain("lrp", tiny(), images(), rule=rule, positions=True)
    with pytest.raises(prunex.PrunexError, match="positions"):
        explain(tiny(), images(), positions="yes")
