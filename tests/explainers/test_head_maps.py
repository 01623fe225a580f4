import math

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.explainers import head_maps
from prunex.vit.widths import WidthSpec, narrow
from tests.explainers.definitions import opened
from tests.vits import images, images_for, largest, tiny

PAIRS = [(3, 1), (0, 2), (3, 0), (0, 2)]


def matrices(model, x):
    """Every block's attention [B, H, n, n], from timm's own blocks and the softmax's definition."""
    found = []

    def before(attn, inputs):
        y = inputs[0]
        q, k, _ = attn.qkv(y).reshape(*y.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        found.append((q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1))

    handles = [block.attn.register_forward_pre_hook(before) for block in model.blocks]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["vit", "qk_norm", "dinov2_reg", "deit_distilled", "not_square"])
def test_equals_the_rows_of_the_blocks_matrices(family):
    model = tiny(family).double()
    x = images_for(model)
    found, whole = head_maps(model, x, PAIRS), matrices(model, x)
    assert found.shape == (3, len(PAIRS), *model.patch_embed.grid_size)
    for place, (block, head) in enumerate(PAIRS):
        wanted = whole[block][:, head, 0, model.num_prefix_tokens :]
        assert largest(found[:, place].flatten(1), wanted) < 1e-12
    assert (found.sum((2, 3)) < 1).all()


def test_pooled_models_average_over_the_pooled_rows():
    model = tiny("avg_pool").double()
    x = images_for(model)
    found = head_maps(model, x, [(1, 2)])
    assert largest(found[:, 0].flatten(1), matrices(model, x)[1][:, 2, 1:, 1:].mean(1)) < 1e-12


@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_tokens_that_left_are_0_and_the_others_are_where_they_were(pruner):
    model = tiny().double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        found = head_maps(model, x, PAIRS)
        alone = torch.cat([head_maps(model, x[i : i + 1], PAIRS) for i in range(3)])
        pruning.masked = True
        masked = head_maps(model, x, PAIRS)
        pruning.masked = None
        model(x)
        kept = pruning.trace.kept()
    assert largest(alone, found) < 1e-12
    assert largest(masked, found) < 1e-12
    late, early = found[:, [0, 2]], found[:, 1]
    assert (late.movedim(1, -1)[~kept] == 0).all()
    assert (late.movedim(1, -1)[kept] > 0).all()
    assert (early > 0).all()
    for image, maps, here in zip(x, late, kept, strict=True):
        halves = [h for h in opened(model, image, 0, (pruner, 0.6, (1, 2))).halves if h.kind == "attention"]
        row = halves[3].matrix[:, 0, 1:]
        row = row[:, : int(here.sum())]  # without what EViT fused
        assert largest(maps[:, here], row[[1, 0]]) < 1e-12


def test_a_narrow_model_is_asked_in_the_dense_models_numbers():
    model = tiny().double()
    x = images_for(model)
    wanted = head_maps(model, x, [(0, 2), (1, 0)])
    narrow(model, WidthSpec(heads={0: (0, 2), 3: ()}))
    assert largest(head_maps(model, x, [(0, 2)]), wanted[:, :1]) < 1e-12
    with pytest.raises(PrunexError, match="block 0 has no head 1: it has 0, 2"):
        head_maps(model, x, [(0, 1)])
    with pytest.raises(PrunexError, match="block 3 has no head 0: it has none"):
        head_maps(model, x, [(3, 0)])


def test_blocks_that_were_taken_out_keep_the_others_numbers():
    model = tiny().double()
    x = images_for(model)
    narrow(model, WidthSpec(blocks=(0, 3)))
    assert largest(head_maps(model, x, [(3, 1)])[:, 0].flatten(1), matrices(model, x)[1][:, 1, 0, 1:]) < 1e-12
    with pytest.raises(PrunexError, match="block 1 is not there: this model has blocks 0, 3"):
        head_maps(model, x, [(1, 0)])


def test_half_precision_and_the_model_is_left_as_it_was():
    model = tiny().train()
    wanted = head_maps(model, images_for(model), PAIRS)
    assert model.training
    found = head_maps(model.bfloat16(), images_for(model), PAIRS)
    assert found.dtype == torch.float32
    assert largest(found, wanted) < 0.1


@pytest.mark.parametrize("pairs", [[], "ab", 3, [(0,)], [(0, 1, 2)], [(0, True)], [(0, 1.0)], [3], None])
def test_what_is_no_pair(pairs):
    with pytest.raises(PrunexError, match="give .block, head. pairs"):
        head_maps(tiny(), images_for(tiny()), pairs)


def test_what_is_not_there():
    model = tiny()
    for pairs, says in (([(4, 0)], "block 4 is not there"), ([(0, 3)], "has no head 3"), ([(-1, 0)], "block -1")):
        with pytest.raises(PrunexError, match=says):
            head_maps(model, images_for(model), pairs)
    with pytest.raises(PrunexError, match="images"):
        head_maps(model, torch.zeros(3, 32, 32), PAIRS)


def test_heads_behind_closed_gates_are_numbered_as_before_and_refused():
    model = tiny().eval()
    x = images(2)
    dense = head_maps(model, x, [(1, 0), (1, 2), (3, 1)])
    pruning = prunex.attach(model, "random", budget=0.9)
    pruning.pruner.open("1.heads")[1] = False
    pruning.pruner.decided.fill_(True)
    pruning.pruner.refresh()
    gated = head_maps(model, x, [(1, 0), (1, 2)])
    assert torch.allclose(gated, dense[:, :2], atol=1e-6)
    with pytest.raises(prunex.PrunexError, match=r"no head 1: it has 0, 2"):
        head_maps(model, x, [(1, 1)])
    assert torch.allclose(head_maps(prunex.slim(model), x, [(1, 0), (1, 2), (3, 1)])[:, :2], gated, atol=1e-6)
