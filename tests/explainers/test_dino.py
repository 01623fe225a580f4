import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.explainers.dino import dino, mass_mask  # noqa: F401  (registers it)
from tests.explainers.definitions import opened
from tests.vits import FAMILIES, images, images_for, largest, randomise, relative, tiny

PRUNERS = ["topk", "evit", "dynamicvit"]


@pytest.mark.parametrize("family", ["vit", "qk_norm", "dinov2_reg", "deit_distilled", "not_square"])
@pytest.mark.parametrize("layer", [0, 2, -1])
def test_rows_of_heads_equal_the_whole_matrix(family, layer):
    model = tiny(family).double()
    x = images_for(model)
    e = prunex.explain("dino", model, x, layer=layer)
    prefix = model.num_prefix_tokens
    for image, rows in zip(x, e.raw, strict=True):
        halves = [h for h in opened(model, image, 0).halves if h.kind == "attention"]
        assert largest(rows, halves[layer].matrix[:, 0, prefix:]) < 1e-12
    assert largest(e.maps.flatten(1), e.raw.mean(1)) < 1e-15


@pytest.mark.parametrize(
    ("family", "pooled"), [("avg_pool", 1), ("avg_pool_no_class", 0), ("avg_pool_no_class_reg", 2)]
)
def test_pooled_models_average_over_the_rows_that_are_pooled(family, pooled):
    model = tiny(family).double()
    x = images_for(model)
    e = prunex.explain("dino", model, x)
    for image, rows in zip(x, e.raw, strict=True):
        matrix = [h for h in opened(model, image, 0).halves if h.kind == "attention"][-1].matrix
        assert largest(rows, matrix[:, pooled:, model.num_prefix_tokens :].mean(1)) < 1e-12


def test_dense_head_mean_is_raw_attention():
    model = tiny()
    wanted = prunex.explain("raw_attention", model, images())
    e = prunex.explain("dino", model, images(), 2)
    assert relative(e.maps, wanted.maps) < 1e-6
    assert relative(e.logits, wanted.logits) < 1e-5
    assert e.target.tolist() == [2, 2, 2]
    assert not e.signed


# ---------------------------------------------------------------------------------------------------------- mass masks


def test_share_one_keeps_all_that_have_some_and_share_zero_none():
    row = torch.rand(4, 3, 30)
    row[0, 0, ::3] = 0
    row[1, 1] = 0
    assert mass_mask(row, 1).equal((row > 0).float())
    assert mass_mask(row, 1.0).equal((row > 0).float())
    assert mass_mask(row, 0).sum() == 0


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95])
def test_kept_mass_is_at_least_the_share_and_not_an_entry_more(share):
    row = torch.rand(50, 30, dtype=torch.float64) ** 4
    mask = mass_mask(row, share)
    mass = row / row.sum(-1, keepdim=True)
    kept = (mass * mask).sum(-1)
    smallest = mass.masked_fill(mask == 0, 2).amin(-1)
    assert (kept >= share - 1e-12).all()
    assert (kept < share + smallest + 1e-12).all()
    assert ((mass * (1 - mask)).amax(-1) <= smallest).all()


def test_scale_does_not_matter():
    row = torch.rand(50, 30)
    assert mass_mask(row, 0.6).equal(mass_mask(row * 4, 0.6))


def test_prefix_tokens_do_not_count():
    model = tiny("dinov2_reg").double()
    x = images_for(model)
    attention = prunex.explain("dino", model, x).raw
    e = prunex.explain("dino", model, x, threshold=0.6)
    assert e.raw.shape == (3, 3, 16)
    assert e.raw.equal(mass_mask(attention, 0.6))
    assert (attention.sum(-1) < 0.95).any()  # otherwise the prefix would not have mattered


# ------------------------------------------------------------------------------------------------------- pruned models


@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool"])
def test_masked_equals_removed_and_one_equals_many(family, pruner, threshold):
    model = tiny(family).double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        removed = prunex.explain("dino", model, x, threshold=threshold)
        alone = torch.cat([prunex.explain("dino", model, x[i : i + 1], threshold=threshold).raw for i in range(3)])
        pruning.masked = True
        masked = prunex.explain("dino", model, x, threshold=threshold)
    assert largest(masked.raw, removed.raw) < 1e-12
    assert largest(alone, removed.raw) < 1e-12
    assert (removed.maps[~removed.trace.kept()] == 0).all()


@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_keep_ratio_one_is_dense(pruner, threshold):
    model = tiny()
    dense = prunex.explain("dino", model, images(), threshold=threshold)
    with prunex.attach(model, pruner, keep_ratio=1.0, stages=(1, 2)):
        assert prunex.explain("dino", model, images(), threshold=threshold).raw.equal(dense.raw)


def test_mass_is_that_of_survivors_and_a_fused_token_is_left_out():
    model = tiny().double()
    x = images(dtype=torch.float64)
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)):
        e = prunex.explain("dino", model, x)
        whole = prunex.explain("raw_attention", model, x)
        mask = prunex.explain("dino", model, x, threshold=0.9).raw
    kept = e.trace.kept()
    assert (e.maps[~kept] == 0).all()
    assert (whole.maps[~kept] > 0).all()  # the fused token's share, where the docstring says
    assert largest(e.maps[kept], whole.maps[kept]) < 1e-12
    mass = e.raw / e.raw.sum(-1, keepdim=True)
    assert ((mass * mask).sum(-1) >= 0.9 - 1e-12).all()


def test_a_block_before_tokens_leave_shows_all():
    model = tiny()
    dense = prunex.explain("dino", model, images(), layer=1)
    for pruner in ("topk", "evit"):  # they act inside the block, after its attention
        with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)):
            assert relative(prunex.explain("dino", model, images(), layer=1).raw, dense.raw) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = tiny(family)
    x = images_for(model)
    e = prunex.explain("dino", model, x, threshold=0.6)
    grid = tuple(model.patch_embed.grid_size)
    assert e.maps.shape == (3, *grid)
    assert e.raw.shape == (3, 3, grid[0] * grid[1])
    assert set(e.raw.unique().tolist()) == {0.0, 1.0}
    with torch.no_grad():
        assert relative(e.logits, model(x)) < 1e-5


def test_half_precision_models_are_read_in_float32():
    model = tiny()
    wanted = prunex.explain("dino", model, images()).raw
    e = prunex.explain("dino", model.bfloat16(), images())
    assert e.raw.dtype == e.maps.dtype == torch.float32
    assert relative(e.raw, wanted) < 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 1.1}, r"\[0, 1\]"),
        ({"threshold": -0.1}, r"\[0, 1\]"),
        ({"threshold": float("nan")}, r"\[0, 1\]"),
        ({"threshold": True}, r"\[0, 1\]"),
        ({"threshold": "0.6"}, r"\[0, 1\]"),
        ({"layer": 4}, r"0\.\.3"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("dino", tiny(), images(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_of_merged_tokens_do_not_depend_on_the_batch(dtype):
    """A token's patches are equal but for rounding, and the last of them that fits is found by index, not by that."""
    for seed in range(3):
        model = tiny(seed=seed, img_size=64).to(dtype)
        prunex.attach(model, "tome", r=12)
        x = torch.randn(6, 3, 64, 64, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        together = prunex.explain("dino", model, x, threshold=0.6).raw
        alone = torch.cat([prunex.explain("dino", model, x[i : i + 1], threshold=0.6).raw for i in range(6)])
        assert together.equal(alone)
