import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from prunex.explainers.vit_cx import causal_saliency, channel_masks, cluster_masks, clusters, enlarged
from prunex.recipes import DigitScenes
from prunex.recipes.modules.backbone import create_model, load_weights
from tests.explainers import definitions
from tests.vits import FAMILIES, assert_same_state, images, images_for, largest, randomise, relative, state_of, tiny

TARGETS = torch.tensor([4, 0, 2])
PRUNERS = ["topk", "evit", "dynamicvit"]
FEW = {"distance": 0.5}  # few clusters, so that tests are quick


# ------------------------------------------------------------------ the whole method once more, one mask after another


def complete_linkage(masks, threshold):
    """Naive: merge the two clusters whose farthest members are nearest, while that is below the threshold."""
    norms = np.linalg.norm(masks, axis=1)
    apart = 1 - (masks @ masks.T) / np.outer(norms, norms)
    groups = [[i] for i in range(len(masks))]
    while len(groups) > 1:
        pairs = [(max(apart[i, j] for i in a for j in b), a, b) for k, a in enumerate(groups) for b in groups[k + 1 :]]
        far, a, b = min(pairs, key=lambda p: p[0])
        if far >= threshold:
            break
        groups = [g for g in groups if g is not a and g is not b] + [a + b]
    return sorted((sorted(g) for g in groups), key=lambda g: g[0])


def slow(
    model,
    image,
    target,
    probability=None,
    layer=-1,
    distance=0.1,
    noise=0.1,
    seed=0,
    kept=None,
    groups_of=complete_linkage,
):
    """Pixel saliency [H, W] and K, for one image; ``kept`` are the patches that are tokens, in order."""
    found = []
    handle = model.blocks[layer].norm1.register_forward_hook(lambda _m, _i, out: found.append(out))
    with torch.no_grad():
        logits = model(image[None])[0]
    handle.remove()
    probability = probability or (lambda x: model(x[None])[0].softmax(0)[target])
    height, width = image.shape[1:]
    gh, gw = height // model.patch_embed.patch_size[0], width // model.patch_embed.patch_size[1]
    kept = list(range(gh * gw)) if kept is None else kept
    prefix = model.num_prefix_tokens
    maps = np.zeros((found[0].shape[2], gh * gw))
    for d, channel in enumerate(found[0][0, prefix : prefix + len(kept)].T.numpy()):
        maps[d, kept] = (channel - channel.min()) / (channel.max() - channel.min())
    generator = torch.Generator().manual_seed(seed)
    numerator, coverage = torch.zeros(height, width).double(), torch.zeros(height, width).double()
    groups = groups_of(maps, distance)
    clean = logits.softmax(0)[target]
    for group in groups:
        grid = torch.from_numpy(maps[group].sum(0)).view(1, 1, gh, gw)
        m = F.interpolate(grid, (height, width), mode="bilinear")[0, 0]
        m = (m - m.min()) / (m.max() - m.min())
        n = noise * torch.randn(image.shape, generator=generator).double() * (1 - m)
        with torch.no_grad():
            s = probability(image * m + n) - probability(image + n) + clean
        numerator += s * m
        coverage += m
    return numerator / coverage.clamp(min=1e-8) / len(groups), len(groups)


@pytest.mark.parametrize(
    "family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class", "not_square"]
)
def test_equals_the_definition(family):
    model = tiny(family).double()
    x = images_for(model, 2)
    e = prunex.explain("vit_cx", model, x, TARGETS[:2])
    for i, image in enumerate(x):
        wanted, count = slow(model, image, TARGETS[i])
        assert relative(e.raw[i], wanted) < 1e-9
        assert 2 < count <= 48
    gh, gw = e.maps.shape[1:]
    assert largest(e.maps, e.raw.view(2, gh, 8, gw, 8).mean((2, 4))) < 1e-15


@pytest.mark.parametrize(
    "options", [{"layer": 1}, {"distance": 0.3}, {"noise": 0.5}, {"seed": 7}, {"noise": 0}], ids=str
)
def test_options_equal_the_definition(options):
    model = tiny().double()
    x = images_for(model, 2)
    e = prunex.explain("vit_cx", model, x, TARGETS[:2], **options)
    for i, image in enumerate(x):
        assert relative(e.raw[i], slow(model, image, TARGETS[i], **options)[0]) < 1e-9
    assert relative(e.raw, prunex.explain("vit_cx", model, x, TARGETS[:2]).raw) > 1e-6


# -------------------------------------------------------------------------------------------------- pruned models


@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruned_and_choosing_anew_equals_the_definition(pruner):
    model = tiny().double()
    x = images_for(model, 2)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        e = prunex.explain("vit_cx", model, x, TARGETS[:2], selection="adaptive", **FEW)
        frozen = prunex.explain("vit_cx", model, x, TARGETS[:2], **FEW)
        kept = e.trace.kept().flatten(1)
        for i, image in enumerate(x):
            there = kept[i].nonzero().flatten().tolist()
            assert relative(e.raw[i], slow(model, image, TARGETS[i], kept=there, **FEW)[0]) < 1e-9
    assert relative(frozen.raw, e.raw) > 1e-6
    assert frozen.trace.kept().equal(e.trace.kept())


def test_pruned_and_frozen_equals_the_definition():
    model = tiny().double()
    x = images_for(model, 2)
    with prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        e = prunex.explain("vit_cx", model, x, TARGETS[:2], **FEW)
        first, second = (pruning_kept(model, pruning, x, stage) for stage in (0, 1))
        for i, image in enumerate(x):
            early, late = (k[i].flatten().nonzero().flatten().tolist() for k in (first, second))
            given = ("given", {1: early, 2: [early.index(p) for p in late]})

            def probability(masked, i=i, given=given):
                with torch.enable_grad():
                    return definitions.opened(model, masked, TARGETS[i], given).logits.detach().softmax(0)[TARGETS[i]]

            wanted, _ = slow(model, image, TARGETS[i], probability, kept=late, **FEW)
            assert relative(e.raw[i], wanted) < 1e-9


def pruning_kept(model, pruning, x, stage):
    model(x)
    return pruning.trace.kept(stage)


@pytest.mark.parametrize("selection", ["frozen", "adaptive"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_masked_equals_removed_and_one_equals_many(pruner, selection):
    model = tiny("dinov2_reg").double()
    x = images_for(model)
    options = FEW | {"selection": selection}
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        removed = prunex.explain("vit_cx", model, x, **options)
        pruning.masked = True
        assert relative(prunex.explain("vit_cx", model, x, **options).raw, removed.raw) < 1e-11
        pruning.masked = None
        for i in range(3):
            assert (
                relative(prunex.explain("vit_cx", model, x[i : i + 1], **options).raw, removed.raw[i : i + 1]) < 1e-11
            )


@pytest.mark.parametrize("selection", ["frozen", "adaptive"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_keep_ratio_one_is_the_dense_map(pruner, selection):
    model = tiny()
    dense = prunex.explain("vit_cx", model, images(2), **FEW)
    with prunex.attach(model, pruner, keep_ratio=1.0, stages=(1, 2)):
        kept = prunex.explain("vit_cx", model, images(2), selection=selection, **FEW)
    assert relative(kept.raw, dense.raw) < 1e-6


def test_patches_that_left_are_in_no_mask():
    model = tiny(img_size=64)  # 8 x 8 patches: some pruned ones touch no kept one
    x = images_for(model, 2)
    with prunex.attach(model, "topk", keep_ratio=0.2, stages=(1,)):
        e = prunex.explain("vit_cx", model, x, **FEW)
        kept = e.trace.kept()
        near = F.max_pool2d(kept.float()[:, None], 3, 1, 1)[:, 0] > 0
        assert (~near).any()
        assert (e.maps[~near] == 0).all()
        assert (e.maps[kept] != 0).all()


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_one_token_left_is_one_mask_of_it(noise):
    model = tiny()
    with prunex.attach(model, "evit", keep_ratio=0.01, stages=(0,), fuse=False):
        e = prunex.explain("vit_cx", model, images(), noise=noise)
    kept = e.trace.kept()
    assert kept.flatten(1).sum(1).tolist() == [1, 1, 1]
    assert e.maps.flatten(1).argmax(1).equal(kept.flatten(1).int().argmax(1))


# ------------------------------------------------------------------------------------------------ masks, clusters


def test_channel_masks():
    a = torch.tensor([[[2.0, 5.0, 0.0], [4.0, 5.0, -1.0], [3.0, 5.0, 1.0], [99.0, 7.0, 9.0]]])
    masks, lively = channel_masks(a, torch.tensor([[True, True, True, False]]))
    assert lively.tolist() == [[True, False, True]]
    assert masks.tolist() == [[[0, 1, 0.5, 0], [0, 0, 0, 0], [0.5, 0, 1, 0]]]


@pytest.mark.parametrize("distance", [0.05, 0.1, 0.3])
def test_clusters_are_complete_linkage(distance):
    masks = torch.rand(30, 16).double()
    masks[10:] += 3 * masks[:10].repeat(2, 1)
    labels = clusters(masks, distance)
    unit = F.normalize(masks, dim=1)
    apart = 1 - unit @ unit.T
    for label in labels.unique():
        mine = labels == label
        assert apart[mine][:, mine].max() <= distance
    groups = [(labels == k).nonzero().flatten().tolist() for k in range(int(labels.max()) + 1)]
    assert groups == complete_linkage(masks.numpy(), distance)
    firsts = [g[0] for g in groups]
    assert all(a < b for a, b in pairwise(firsts))


def test_identical_maps_collapse_and_distinct_ones_stay():
    same = torch.rand(1, 16).expand(9, -1) * torch.rand(9, 1)
    assert clusters(same, 0.1).tolist() == [0] * 9
    distinct = torch.rand(9, 16)
    assert clusters(distinct, 0.0).tolist() == list(range(9))
    assert clusters(distinct, 1e-9).tolist() == list(range(9))
    assert clusters(distinct[:1], 0.1).tolist() == [0]
    for most in (1, 4, 9):
        assert int(clusters(distinct, 0.0, most).max()) + 1 == most
    assert clusters(distinct, 0.0, 20).tolist() == list(range(9))


def test_cluster_masks_are_sums_and_constant_channels_are_left_out():
    masks = torch.rand(5, 2, 3)
    masks[3] = 2 * masks[0]
    lively = torch.tensor([True, False, True, True, True])
    there = torch.ones(2, 3)
    found = cluster_masks(masks, lively, there, 1e-6, None)
    assert largest(found, torch.stack([3 * masks[0], masks[2], masks[4]])) < 1e-6
    there[0, 1] = 0
    assert cluster_masks(masks, lively & False, there, 0.1, None).equal(there[None])


def test_enlarged():
    grid = torch.rand(4, 3, 5)
    fine = enlarged(grid, (8, 4), (24, 20))
    assert fine.shape == (4, 24, 20)
    assert fine.amin((1, 2)).eq(0).all()
    assert largest(fine.amax((1, 2)), torch.ones(4)) < 1e-6
    assert enlarged(torch.ones(1, 3, 5), (8, 4), (24, 20)).equal(torch.ones(1, 24, 20))
    # Images padded to whole patches: the masks lie where the patches do. Pixels behind the grid are in none.
    padded = enlarged(grid, (8, 4), (20, 18))
    plain = F.interpolate(grid[:, None], (24, 20), mode="bilinear")[:, 0, :20, :18]
    low, high = plain.amin((1, 2), keepdim=True), plain.amax((1, 2), keepdim=True)
    assert largest(padded, (plain - low) / (high - low)) < 1e-6
    behind = enlarged(grid, (8, 4), (27, 22))
    assert behind[:, :24, :20].equal(fine)
    assert behind[:, 24:].eq(0).all()
    assert behind[:, :, 20:].eq(0).all()


# --------------------------------------------------------------------------------------------- scores and saliency


def saliency(x, masks, noise=0.0, chunk=50, seed=0, seen=None):
    """Masks at pixel resolution; the class's probability is a plain function of the image."""

    def probability(masked, own):
        if seen is not None:
            seen.append(masked)
        return masked.double().tanh().mean((1, 2, 3)) + own

    clean = probability(x, torch.arange(len(x)))
    return clean, causal_saliency(x, masks, clean, probability, (1, 1), noise, seed, chunk)


def test_one_mask_of_ones_is_the_clean_probability():
    x = images(2)
    clean, found = saliency(x, [torch.ones(1, 32, 32)] * 2)
    assert largest(found, clean[:, None, None].expand_as(found)) < 1e-7


def test_two_halves_have_their_own_scores():
    x = images(1)
    left = torch.zeros(1, 32, 32)
    left[:, :, :16] = 1
    _, found = saliency(x, [torch.cat([left, 1 - left])])
    first, second = ((x * m).double().tanh().mean() for m in (left, 1 - left))
    assert largest(found[0, :, :16], (first / 2).expand(32, 16)) < 1e-7
    assert largest(found[0, :, 16:], (second / 2).expand(32, 16)) < 1e-7
    assert first * second < 0  # a negative score stays negative
    assert found.min() < 0


def test_masks_cover_every_pixel_once():
    # If every score is 1, saliency is the coverage-corrected sum of masks over K.
    masks = [torch.rand(6, 32, 32), torch.rand(3, 32, 32)]
    masks[0][:, 3, 5] = 0  # the minimum of every mask: nothing there, and no NaN
    ones = torch.ones(2).double()
    found = causal_saliency(images(2), masks, ones, lambda _x, own: ones[own], (1, 1), 0.1, 0, 4)
    count = torch.tensor([6.0, 3.0])[:, None, None]
    total = found * count
    assert total[0, 3, 5] == 0
    total[0, 3, 5] = 1
    assert largest(total, torch.ones(2, 32, 32)) < 1e-6


def test_noise_is_damped_where_the_mask_is():
    x = images(1)
    mask = torch.rand(1, 32, 32)
    mask = (mask - mask.min()) / (mask.max() - mask.min())
    seen = []
    saliency(x, [mask], noise=0.1, seen=seen)
    _, masked, noisy = seen
    n = noisy - x
    assert largest(masked, x * mask + n) < 1e-6
    assert largest(n, 0.1 * (1 - mask) * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))) < 1e-6
    assert largest(n[:, :, mask[0] == 1], torch.zeros(1)) < 1e-7


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_how_many_images_go_through_the_model(noise):
    seen = []
    saliency(images(2), [torch.rand(5, 32, 32), torch.rand(2, 32, 32)], noise=noise, chunk=3, seen=seen)
    assert [len(s) for s in seen] == [2, *([3, 3, 3, 3, 1, 1] if noise else [3, 3, 1])]


# ----------------------------------------------------------------------------------------------- the whole method


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = tiny(family)
    x = images(2, (32, 56)) if family == "dynamic" else images_for(model, 2)
    e = prunex.explain("vit_cx", model, x, **FEW)
    assert e.maps.shape == (2, *e.trace.grid)
    assert e.raw.shape == (2, *x.shape[2:])
    assert e.maps.dtype == e.raw.dtype == torch.float32
    assert (e.maps > 0).any()
    assert relative(e.logits, model(x)) < 1e-5
    assert e.target.equal(e.logits.argmax(1))


def test_images_padded_to_whole_patches():
    model = tiny(dynamic_img_size=True, dynamic_img_pad=True)
    e = prunex.explain("vit_cx", model, images(2, (36, 29)), **FEW)
    assert e.raw.shape == (2, 36, 29)
    assert e.maps.shape == (2, 5, 4)
    assert largest(e.maps[:, 4, 3], e.raw[:, 32:, 24:].mean((1, 2))) < 1e-6
    assert largest(e.maps[:, 0, 3], e.raw[:, :8, 24:].mean((1, 2))) < 1e-6


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_neighbours_and_chunks_change_nothing(noise):
    model = tiny()
    x = images(3)
    options = FEW | {"noise": noise}
    e = prunex.explain("vit_cx", model, x, TARGETS, **options)
    for i in range(3):
        one = prunex.explain("vit_cx", model, x[i : i + 1], TARGETS[i : i + 1], **options)
        assert relative(one.raw, e.raw[i : i + 1]) < 1e-6
    other = prunex.explain(
        "vit_cx", model, torch.cat([images(2, seed=5), x[2:]]), TARGETS.flip(0)[[0, 1, 0]], **options
    )
    mine = prunex.explain("vit_cx", model, x[2:], 2, **options)
    assert relative(other.raw[2:], mine.raw) < 1e-6
    for chunk in (1, 7, 10_000):
        assert relative(prunex.explain("vit_cx", model, x, TARGETS, chunk=chunk, **options).raw, e.raw) < 1e-6


def test_same_seed_same_map_bit_for_bit():
    model = tiny()
    a = prunex.explain("vit_cx", model, images(2), seed=3, **FEW)
    torch.manual_seed(99)
    assert prunex.explain("vit_cx", model, images(2), seed=3, **FEW).raw.equal(a.raw)
    assert not prunex.explain("vit_cx", model, images(2), seed=4, **FEW).raw.equal(a.raw)


def test_limit_of_masks():
    model = tiny()
    counts = []
    handle = model.patch_embed.register_forward_hook(lambda _m, i, _o: counts.append(len(i[0])))
    prunex.explain("vit_cx", model, images(2), distance=0, noise=0, max_masks=6)
    prunex.explain("vit_cx", model, images(2), distance=0, noise=0, max_masks=500)
    handle.remove()
    # 48 channels are at most 48 masks; the single image is compared with the model's own forward, once for each model.
    assert counts == [2, 12, 1, 2, 50, 46]


def ranks(values):
    return values.flatten().argsort().argsort().double()


@pytest.mark.slow
def test_seeds_agree_on_a_trained_model():
    args = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    model = create_model("vit_tiny_patch16_224", 10, args)
    load_weights(model, "digits")
    x, target, inside = DigitScenes(val_size=256).dataset("val").__getitems__(list(range(6)))
    maps = torch.stack([prunex.explain("vit_cx", model, x, target, seed=s, max_masks=20).maps for s in range(10)])
    correlations = []
    for image in maps.transpose(0, 1):
        correlations += torch.corrcoef(torch.stack([ranks(m) for m in image]))[torch.ones(10, 10).triu(1) > 0].tolist()
    assert np.mean(correlations) > 0.9
    # And the digit has more than its share.
    digit = F.avg_pool2d(inside.float()[:, None], 8)[:, 0]
    mean = maps.mean(0)
    assert ((mean * digit).sum() / digit.sum()) > mean.mean()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("selection", ["frozen", "adaptive"])
def test_any_grad_mode_and_nothing_left_behind(mode, selection):
    model = tiny()
    options = FEW | {"selection": selection}
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)) as pruning:
        model.train()
        model(images())
        trace = pruning.trace
        wanted = prunex.explain("vit_cx", model, images(), TARGETS, **options)
        before, rng = state_of(model), torch.get_rng_state()
        with mode():
            e = prunex.explain("vit_cx", model, images(), TARGETS, **options)
        assert_same_state(model, before)
        assert torch.get_rng_state().equal(rng)
        assert pruning.trace is trace
    assert e.raw.equal(wanted.raw)
    for t in (e.raw, e.maps, e.logits, e.target):
        assert not t.requires_grad
        assert not t.is_inference()
    with torch.inference_mode():
        made = tiny()
    assert prunex.explain("vit_cx", made, images(), **FEW).raw.equal(
        prunex.explain("vit_cx", tiny(), images(), **FEW).raw
    )


def test_half_precision():
    model = tiny()
    wanted = prunex.explain("vit_cx", model, images(), TARGETS, max_masks=8)
    e = prunex.explain("vit_cx", copy.deepcopy(model).bfloat16(), images(), TARGETS, max_masks=8)
    with torch.autocast("cpu", torch.bfloat16):
        under = prunex.explain("vit_cx", model, images(), TARGETS, max_masks=8)
        clean = model(images())
        assert torch.is_autocast_enabled("cpu")
    for other in (e, under):
        assert other.raw.dtype == other.maps.dtype == torch.float32
        assert torch.corrcoef(torch.stack([other.raw.flatten(), wanted.raw.flatten()]))[0, 1] > 0.8
    assert relative(under.logits, clean) < 1e-6


def test_autocast_holds_for_masked_images_too():
    model = tiny()
    kinds = []
    handle = model.head.register_forward_hook(lambda _m, _i, out: kinds.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        prunex.explain("vit_cx", model, images(1), **FEW)
    handle.remove()
    assert set(kinds) == {torch.bfloat16}


def test_attention_stays_fused(monkeypatch):
    from prunex.vit import attention

    def fail(*_args, **_kwargs):
        raise AssertionError("the matrix was made")

    monkeypatch.setattr(attention, "matrix", fail)
    model = tiny()
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)):
        e = prunex.explain("vit_cx", model, images(1), **FEW)
    assert len(e.trace.stages) == 2
    assert bool(e.maps.isfinite().all())
    assert float(e.maps.max()) > float(e.maps.min())


def test_a_model_that_sees_nothing_gets_one_mask_of_all():
    model = tiny()
    with torch.no_grad():
        model.blocks[-1].norm1.weight.zero_()  # every channel is constant
        model.blocks[-1].norm1.bias.fill_(0.3)
    e = prunex.explain("vit_cx", model, images(), noise=0)
    clean = model(images()).softmax(1).amax(1)
    assert largest(e.raw, clean[:, None, None].expand_as(e.raw)) < 1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer": -5}, r"does not exist.*0\.\.3"),
        ({"distance": 1.1}, r"distance=1.1 is not allowed: give a number in \[0, 1\]"),
        ({"distance": None}, r"in \[0, 1\]"),
        ({"distance": float("nan")}, r"in \[0, 1\]"),
        ({"noise": -0.1}, "noise=-0.1 is not allowed: give a number of at least 0"),
        ({"noise": float("inf")}, "of at least 0"),
        ({"noise": True}, "of at least 0"),
        ({"seed": -1}, r"seed=-1 is not allowed: give a whole number in 0\.\."),
        ({"seed": 0.5}, "seed=0.5"),
        ({"seed": None}, "seed=None"),
        ({"chunk": 0}, "chunk=0 is not allowed"),
        ({"chunk": True}, "chunk=True is not allowed"),
        ({"max_masks": 0}, "max_masks=0 is not allowed: give a whole number of at least 1"),
        ({"max_masks": "all"}, "max_masks='all'"),
        ({"selection": "freeze"}, "did you mean 'frozen'"),
        ({"selection": None}, "Known: adaptive, frozen"),
        ({"delta": 0.1}, "unknown option of vit_cx"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("vit_cx", tiny(), images(), **options)


def test_a_class_needs_a_head():
    with pytest.raises(PrunexError, match="no classifier"):
        prunex.explain("vit_cx", tiny(num_classes=0), images())


def test_one_output_is_a_probability_by_its_sigmoid():
    """As everywhere else; a softmax of one output would be 1 whatever is masked."""
    torch.manual_seed(3)
    one, two = tiny(num_classes=1), tiny(num_classes=2)
    two.load_state_dict({**two.state_dict(), **{k: v for k, v in one.state_dict().items() if "head." not in k}})
    with torch.no_grad():  # logits 0 and those of the one: their softmax is its sigmoid
        two.head.weight.copy_(torch.cat([torch.zeros_like(one.head.weight), one.head.weight]))
        two.head.bias.copy_(torch.cat([torch.zeros_like(one.head.bias), one.head.bias]))
    x = images(2)
    found = prunex.explain("vit_cx", one, x, 0, **FEW).maps
    assert relative(found, prunex.explain("vit_cx", two, x, 1, **FEW).maps) < 1e-5
    assert found.std() > 0
