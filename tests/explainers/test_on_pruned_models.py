"""What holds for every explainer under every pruner: masked equals removed, one equals many, 1.0 equals dense."""

import pytest
import torch

import prunex
from prunex import PrunexError
from tests.explainers.quick import DIVIDES, EXPLAINERS, NOTHING_LEFT, ROWS, SIGNED, explain
from tests.vits import FAMILIES, QUICK_FAMILIES, images, images_for, quick, randomise, relative, tiny

PRUNERS = ["topk", "evit", "evit_unfused", "dynamicvit", "patch_slimming", "tome", "ppt", "diffrate"]
# HVT pools instead of keeping some: whatever has no keep ratio holds for it too.
ALL = [*PRUNERS, "hvt"]
FEW = ["atman", "tokentm", "attention_flow", "lrp", "integrated_gradients"]
VARYING = {  # images keep different numbers of patches
    "ia_red2": ("ia_red2", {"threshold": 0.45}),
    "dynamicvit_adaptive": ("dynamicvit", {"count": "adaptive"}),
    "evit_adaptive": ("evit", {"count": "adaptive", "threshold": 0.8}),
    "evit_shift": ("evit", {"count": "adaptive", "threshold": 0.8, "score": "shift"}),
}
SHOWN = ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class", "qk_norm", "layer_scale", "dynamic"]


def attach(model, pruner, **options):
    if pruner == "patch_slimming":
        return prunex.attach(model, pruner, keep=positions(model, **options))
    if pruner == "hvt":  # its counts follow from the stages alone
        options = {k: v for k, v in options.items() if k != "keep_ratio"}
    extra = {"fuse": False} if pruner == "evit_unfused" else {}
    if pruner in ("tome", "ppt"):
        extra = {"r": round(8 * (1 - options.pop("keep_ratio")))} | ({"tau": 0.01} if pruner == "ppt" else {})
    method, more = VARYING.get(pruner, (pruner.removesuffix("_unfused"), extra))
    pruning = prunex.attach(model, method, **(options | more))
    if pruner != "diffrate":  # what it learns are the counts themselves
        randomise(pruning.pruner)
    return pruning


def positions(model, keep_ratio, stages):
    """Sets of Patch Slimming that leave at each stage the share the others keep, the same positions in every image."""
    if model.global_pool != "token":
        pytest.skip("Patch Slimming needs a head that reads a class token")
    gh, gw = model.patch_embed.grid_size
    order = torch.randperm(gh * gw, generator=torch.Generator().manual_seed(1)).tolist()
    left, sets = gh * gw, []
    for block in range(len(model.blocks) - 1):
        left = max(1, round(left * keep_ratio)) if block in stages else left
        sets.append(sorted(order[:left]))
    return sets


def inputs(model, family, batch=3):
    dtype = next(model.parameters()).dtype
    return images(batch, (32, 56), dtype=dtype) if family == "dynamic" else images_for(model, batch)


def in_double(explainer):
    """Rules that divide by small sums, and eigenvectors, turn other roundings into more."""
    return 1e-8 if explainer in DIVIDES or explainer == "r_cut" else 1e-11


def check(family, pruner, explainer, dtype, tolerance, stages=(1, 2), ratio=0.6):
    model = tiny(family).to(dtype)
    x = inputs(model, "" if pruner in ("hvt", "patch_slimming") else family)  # their positions are for the model's size
    with attach(model, pruner, keep_ratio=ratio, stages=stages) as pruning:
        removed = explain(explainer, model, x)
        pruning.masked = True
        masked = explain(explainer, model, x)
        pruning.masked = None
        singles = [explain(explainer, model, x[i : i + 1]) for i in range(len(x))]
    assert removed.target.equal(masked.target)
    assert removed.trace.kept().equal(masked.trace.kept())
    assert relative(masked.logits, removed.logits) < tolerance
    assert relative(masked.maps, removed.maps) < tolerance
    assert relative(masked.raw, removed.raw) < tolerance
    assert relative(torch.cat([s.maps for s in singles]), removed.maps) < tolerance
    assert torch.cat([s.target for s in singles]).equal(removed.target)
    assert removed.maps.dtype == dtype
    assert removed.maps.shape == (3, *removed.trace.grid)
    assert torch.isfinite(removed.maps).all()
    return removed


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("pruner", ALL)
@pytest.mark.parametrize("family", quick(["vit", "dinov2_reg", "avg_pool"], ["vit"]))
def test_masked_equals_removed_and_one_equals_many(family, pruner, explainer):
    check(family, pruner, explainer, torch.float64, in_double(explainer))


@pytest.mark.parametrize(
    ("pruner", "explainer"),
    [
        pytest.param(p, e, marks=[] if p == "ia_red2" or e in FEW else pytest.mark.slow)
        for p in VARYING
        for e in EXPLAINERS
    ],
)
def test_images_of_different_lengths(pruner, explainer):
    found = check("vit", pruner, explainer, torch.float64, in_double(explainer))
    assert len(set(found.trace.kept().flatten(1).sum(1).tolist())) > 1


@pytest.mark.parametrize("explainer", ["atman", "rollout", "lrp", "integrated_gradients"])
@pytest.mark.parametrize("pruner", ["ia_red2", "dynamicvit_adaptive"])
def test_images_that_lose_every_patch_are_explained(pruner, explainer):
    model = tiny().double()
    with attach(model, pruner, stages=(1, 2)) as pruning:
        pruning.pruner.threshold = 1.0
        removed = explain(explainer, model, images_for(model))
        pruning.masked = True
        assert relative(explain(explainer, model, images_for(model)).maps, removed.maps) < 1e-11
    assert not removed.trace.kept().any()
    assert torch.isfinite(removed.maps).all()


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("family", ["vit", "dinov2_reg"])
def test_a_class_token_that_goes_on_alone(family, explainer):
    """Patch Slimming may keep no patch at all: what is read off patch tokens behind that is refused by name."""
    model = tiny(family).double()
    x = images_for(model)
    reads_patches = explainer in ("grad_cam", "r_cut", "vit_cx")
    with prunex.attach(model, "patch_slimming", keep=[list(range(6)), [], []]) as pruning:
        if reads_patches:
            with pytest.raises(PrunexError, match="no patch token enters block 3"):
                explain(explainer, model, x)
            return
        removed = explain(explainer, model, x)
        assert prunex.metrics.energy_inside(removed.upsample(), torch.ones(3, 32, 32, dtype=torch.bool)).shape == (3,)
        pruning.masked = True
        masked = explain(explainer, model, x)
    assert not removed.trace.kept().any()
    assert torch.isfinite(removed.maps).all()
    assert (masked.maps - removed.maps).abs().max() <= in_double(explainer) * (1 + removed.maps.abs().max())


def test_a_pruner_that_decides_anew_among_those_that_are_there():
    """Values of the game are those of single sequences, whatever else is in the chunk."""
    model = tiny().double()
    with attach(model, "ia_red2", stages=(0, 2)):
        several = explain("shap", model, images_for(model), selection="adaptive")
        alone = explain("shap", model, images_for(model), selection="adaptive", chunk=1)
    assert relative(several.maps, alone.maps) < 1e-11
    assert torch.isfinite(several.maps).all()


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("pruner", ALL)
def test_the_same_in_single_precision(pruner, explainer):
    check("vit", pruner, explainer, torch.float32, DIVIDES.get(explainer, 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("pruner", ALL)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stages", "ratio"), [((1, 2), 0.6), ((0, 3), 0.5), ((0, 1, 2, 3), 0.8)])
def test_every_family(family, pruner, explainer, stages, ratio):
    if pruner == "hvt" and len(stages) > 2:
        pytest.skip("16 patches cannot be pooled four times")
    check(family, pruner, explainer, torch.float64, in_double(explainer), stages, ratio)


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("family", quick(SHOWN, ["vit", "avg_pool_no_class", "dynamic"]))
def test_dense_batch_equals_singles(family, explainer):
    model = tiny(family)
    if explainer in DIVIDES:
        model = model.double()
    x = inputs(model, family)
    batch = explain(explainer, model, x)
    for i in range(3):
        one = explain(explainer, model, x[i : i + 1])
        assert relative(one.maps, batch.maps[i : i + 1]) < 1e-5
        assert one.target[0] == batch.target[i]
    assert batch.maps.shape == (3, *((4, 7) if family == "dynamic" else (4, 4)))


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_neighbours_do_not_matter_when_each_keeps_its_own(explainer):
    model = tiny()
    a, b = images(4, seed=1), images(4, seed=2)
    with attach(model, "dynamicvit", keep_ratio=0.5, stages=(1, 2)):
        first = explain(explainer, model, a)
        kept = first.trace.kept().flatten(1)
        assert len({tuple(k.tolist()) for k in kept}) > 1
        other = explain(explainer, model, torch.cat([b[:2], a[2:]]))
    assert relative(other.maps[2:], first.maps[2:]) < 1e-6
    assert other.trace.kept()[2:].equal(first.trace.kept()[2:])


@pytest.mark.parametrize("explainer", ["generic_attention", "tokentm"])
def test_targets_of_neighbours_do_not_matter(explainer):
    model = tiny()
    several = explain(explainer, model, images(), torch.tensor([4, 0, 2]))
    other = explain(explainer, model, images(), torch.tensor([4, 1, 3]))
    assert several.maps[0].equal(other.maps[0])
    assert relative(several.maps[1], other.maps[1]) > 1e-2


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", quick(["vit", "deit_distilled", "avg_pool_no_class"], ["vit"]))
def test_keep_ratio_one_is_the_dense_map_exactly(family, pruner, explainer):
    model = tiny(family)
    x = images_for(model)
    dense = explain(explainer, model, x)
    for masked in (None, True):
        with attach(model, pruner, keep_ratio=1.0, stages=(1, 2)) as pruning:
            pruning.masked = masked
            kept = explain(explainer, model, x)
        assert kept.maps.equal(dense.maps)
        assert kept.raw.equal(dense.raw)
    assert explain(explainer, model, x).maps.equal(dense.maps)  # after detaching too


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("family", ["vit", "avg_pool"])
def test_a_removed_patch_is_not_forced_to_zero(family, explainer):
    model = tiny(family)
    with attach(model, "topk", keep_ratio=0.5, stages=(2,)):
        e = explain(explainer, model, images_for(model))
    gone = ~e.trace.kept()
    assert gone.sum() == 3 * 8
    if explainer in NOTHING_LEFT:
        assert (e.maps[gone] == 0).all()
    elif explainer == "legrad":  # a patch may lower the score in both blocks
        assert (e.maps[gone] != 0).float().mean() > 0.8
    elif explainer != "vit_cx":  # its masks cover patches, kept or not
        assert (e.maps[gone] != 0).all()


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_one_token_left(explainer):
    model = tiny()
    with attach(model, "evit_unfused", keep_ratio=0.01, stages=(0, 1)) as pruning:
        e = explain(explainer, model, images())
        pruning.masked = True
        assert relative(explain(explainer, model, images()).maps, e.maps) < DIVIDES.get(explainer, 1e-5)
    assert e.trace.kept().flatten(1).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("explainer", EXPLAINERS)
@pytest.mark.parametrize("family", quick(FAMILIES, QUICK_FAMILIES))
def test_every_family_dense(family, explainer):
    model = tiny(family)
    x = inputs(model, family)
    e = explain(explainer, model, x)
    grid = (4, 7) if family == "dynamic" else tuple(model.patch_embed.grid_size)
    assert e.maps.shape == (3, *grid)
    assert e.maps.dtype == torch.float32
    assert e.raw.shape[0] == 3
    assert (e.maps >= 0).all() or explainer in SIGNED
    assert (e.maps != 0).any()
    assert e.upsample().shape == (3, *x.shape[2:])
    with torch.no_grad():
        logits = model(x)
    assert relative(e.logits, logits) < 1e-5
    assert e.target.equal(logits.argmax(1))
    # Relevance goes where patches are: rows of the grid are rows of the image.
    if explainer in ROWS:
        assert e.raw.shape == (3, model.num_prefix_tokens + grid[0] * grid[1])
        assert e.maps.flatten(1).equal(e.raw[:, model.num_prefix_tokens :])


@pytest.mark.parametrize("explainer", ["rollout", "generic_attention", "tokentm"])
def test_distilled_models_are_read_at_both_tokens(explainer):
    model = tiny("deit_distilled")
    with torch.no_grad():
        model.head_dist.weight.copy_(model.head.weight)
        model.head_dist.bias.copy_(model.head.bias)
        model.dist_token.copy_(model.cls_token)
        model.pos_embed[:, 1] = model.pos_embed[:, 0]
    raw = explain(explainer, model, images(), 1).raw
    assert relative(raw[:, 0], raw[:, 1]) < 1e-5


@pytest.mark.parametrize("explainer", [m for m in EXPLAINERS if m != "r_cut"])  # a cut has two sides, not one patch
def test_grid_is_in_raster_order(explainer):
    # Only one patch differs from a constant image, and positions are equal: the map shows where it is.
    model = tiny("no_pos_embed", img_size=(32, 48))
    x = torch.zeros(1, 3, 32, 48)
    x[:, :, 8:16, 24:32] = 3 * torch.randn(3, 8, 8)
    more = {"budget": 1000} if explainer == "shap" else {}  # sampled: one pair of orders is too noisy for this
    row = explain(explainer, model, x, 1, **more).maps[0]
    odd = (row - row.median()).abs().argmax().item()
    assert divmod(odd, 6) == (1, 3)
