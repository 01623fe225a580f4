import copy
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from prunex.explainers.r_cut import normalised_cut, oriented
from tests.vits import FAMILIES, assert_same_state, images, images_for, largest, randomise, relative, state_of, tiny

TARGETS = torch.tensor([4, 0, 2])
PRUNERS = ["topk", "evit", "dynamicvit"]


def explain(model, x, target=TARGETS, **options):
    """R-Cut, with a warning turned into a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prunex.explain("r_cut", model, x, target, **options)


def everywhere(tokens):
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


# ------------------------------------------------------------------------------- the whole method once more, in NumPy


def affinity(tokens, threshold):
    n = len(tokens)
    w = np.full((n, n), 1e-5)
    for i in range(n):
        for j in range(n):
            cosine = tokens[i] @ tokens[j] / (np.linalg.norm(tokens[i]) * np.linalg.norm(tokens[j]))
            if cosine > threshold:
                w[i, j] = 1
    return w


def weighted_features(model, image, target, layer, objective, count):
    """alpha * A of the first ``count`` patch tokens, from a hook on the block and the plain objective: [count, D]."""
    found = []
    handle = model.blocks[layer].norm1.register_forward_hook(lambda _m, _i, out: found.append(out))
    logits = model(image[None])[0]
    handle.remove()
    score = logits.softmax(0)[target] if objective == "probability" else logits[target]
    prefix = model.num_prefix_tokens
    gradient = torch.autograd.grad(score, found[0])[0][0, prefix : prefix + count]
    activation = found[0][0, prefix : prefix + count].detach()
    return (gradient.mean(0) * activation).numpy()


def slow(model, image, target, layer=-1, threshold=0.2, orient="peak", objective="probability", kept=None):
    """The eigenvector on the grid, with a generalised solver; ``kept`` are the patches that are tokens, in order."""
    grid = tuple(model.patch_embed.grid_size)
    kept = list(range(grid[0] * grid[1])) if kept is None else kept
    tokens = weighted_features(model, image, target, layer, objective, len(kept))
    w = affinity(tokens, threshold)
    d = np.diag(w.sum(1))
    y = scipy.linalg.eigh(d - w, d)[1][:, 1]
    above = y > y.mean()
    if orient == "peak":
        flip = not above[np.abs(y).argmax()]
    else:
        cam = tokens.sum(1).clip(min=0)
        flip = cam[above].mean() < cam[~above].mean()
    y = -y if flip else y
    whole = np.full(grid[0] * grid[1], y.min())
    whole[kept] = y
    return torch.from_numpy(whole).view(grid)


@pytest.mark.parametrize(
    "family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class", "not_square"]
)
def test_equals_the_definition(family):
    model = tiny(family).double()
    x = images_for(model)
    e = explain(model, x)
    for i, image in enumerate(x):
        assert largest(e.raw[i], slow(model, image, TARGETS[i])) < 1e-9
    assert e.maps.equal(e.raw.clamp(min=0))
    assert not e.signed


@pytest.mark.parametrize(
    "options",
    [{"layer": 1}, {"threshold": 0.0}, {"threshold": 0.5}, {"orient": "grad_cam"}, {"objective": "logit"}],
    ids=str,
)
def test_options_equal_the_definition(options):
    model = tiny(patch_size=4).double()
    x = images_for(model)
    e = explain(model, x, **options)
    for i, image in enumerate(x):
        assert largest(e.raw[i], slow(model, image, TARGETS[i], **options)) < 1e-9
    assert largest(e.raw, explain(model, x).raw) > 1e-3


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("layer", [1, 3])
def test_pruned_equals_the_definition_on_kept_tokens(pruner, layer):
    model = tiny(patch_size=4).double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.7, stages=(0, 2)) as pruning:
        randomise(pruning.pruner)
        e = explain(model, x, layer=layer)
        kept = pruning_kept(model, pruning, x, 0 if layer == 1 else 1)
        for i, image in enumerate(x):
            there = kept[i].flatten().nonzero().flatten().tolist()
            assert largest(e.raw[i], slow(model, image, TARGETS[i], layer=layer, kept=there)) < 1e-9
    assert (e.maps[~kept] == 0).all()
    assert (e.raw[~kept] == e.raw.amin((1, 2))[:, None, None].expand_as(kept)[~kept]).all()


def pruning_kept(model, pruning, x, stage):
    model(x)
    return pruning.trace.kept(stage)


# ------------------------------------------------------------------------------------------------------ the cut itself


def test_two_orthogonal_blocks_are_split_exactly():
    tokens = torch.zeros(1, 9, 6, dtype=torch.float64)
    tokens[0, :4, :3] = torch.rand(4, 3, dtype=torch.float64) + 0.5
    tokens[0, 4:, 3:] = torch.rand(5, 3, dtype=torch.float64) + 0.5
    there = everywhere(tokens)
    y, arbitrary = normalised_cut(tokens, there, 0.2)
    assert not arbitrary.any()
    assert largest(y[0, :4], y[0, 0].expand(4)) < 1e-12
    assert largest(y[0, 4:], y[0, 4].expand(5)) < 1e-12
    assert y[0, 0] * y[0, 4] < 0
    up = oriented(y, there)  # the smaller block has the larger |y|
    assert (up[0, :4] > 0).all()
    assert (up[0, 4:] < 0).all()


def random_tokens(batch=4, n=12):
    """Loose groups of tokens, so that there is something to cut, at any scale."""
    centres = torch.randn(batch, 3, 8, dtype=torch.float64)
    group = torch.randint(3, (batch, n, 1))
    return centres.gather(1, group.expand(-1, -1, 8)) + 0.7 * torch.randn(batch, n, 8, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [-0.2, 0.2, 0.6])
def test_equals_a_generalised_solver(threshold):
    tokens = random_tokens(n=40)
    y, arbitrary = normalised_cut(tokens, everywhere(tokens), threshold)
    assert not arbitrary.any()
    for found, t in zip(y, tokens, strict=True):
        w = affinity(t.numpy(), threshold)
        d = w.sum(1)
        values, vectors = scipy.linalg.eigh(np.diag(d) - w, np.diag(d))
        other = torch.from_numpy(vectors[:, 1])
        assert F.cosine_similarity(found, other, dim=0).abs() > 1 - 1e-9
        assert (found.numpy() * d * found.numpy()).sum() == pytest.approx(1, abs=1e-10)
        assert abs((d * found.numpy()).sum()) < 1e-8  # orthogonal to the trivial vector
        assert abs(values[0]) < 1e-8
        residual = (np.diag(d) - w) @ found.numpy() - values[1] * d * found.numpy()
        assert np.abs(residual).max() < 1e-12


def test_scale_changes_nothing():
    tokens = random_tokens()
    there = everywhere(tokens)
    y = oriented(normalised_cut(tokens, there, 0.2)[0], there)
    for factor in (1e-280, 1e-30, 7.0, 1e30):
        assert largest(oriented(normalised_cut(factor * tokens, there, 0.2)[0], there), y) < 1e-6


def test_permuted_tokens_permute_the_cut():
    tokens = random_tokens()
    there = everywhere(tokens)
    order = torch.randperm(12)
    y, moved = (oriented(normalised_cut(t, there, 0.2)[0], there) for t in (tokens, tokens[:, order]))
    assert largest(moved, y[:, order]) < 1e-9


def test_absent_tokens_are_no_part_of_the_graph():
    tokens = random_tokens()
    there = torch.rand(4, 12) > 0.3
    there[0], there[1, :2] = True, True
    y, arbitrary = normalised_cut(tokens, there, 0.2)
    turned = oriented(y, there)
    for i in range(4):
        own = tokens[i : i + 1, there[i]]
        alone, alone_arbitrary = normalised_cut(own, everywhere(own), 0.2)
        assert arbitrary[i] == alone_arbitrary[0]
        assert largest(turned[i, there[i]], oriented(alone, everywhere(own))[0]) < 1e-9
        assert (y[i, ~there[i]] == 0).all()


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_tokens(count):
    tokens = torch.randn(2, count, 4, dtype=torch.float64)
    y, arbitrary = normalised_cut(tokens, everywhere(tokens), 0.2)
    assert y.shape == (2, count)
    assert arbitrary.tolist() == [count == 1] * 2
    if count == 2:
        assert (y[:, 0] * y[:, 1] < 0).all()


@pytest.mark.parametrize("case", ["all alike", "three equal groups", "nothing there but zeros"])
def test_a_second_eigenvector_that_is_arbitrary_is_noticed(case):
    tokens = torch.eye(3, dtype=torch.float64).repeat_interleave(3, 0)
    if case == "all alike":
        tokens = torch.ones(9, 3, dtype=torch.float64) + 0.1 * torch.rand(9, 3)
    elif case == "nothing there but zeros":
        tokens = torch.zeros(9, 3, dtype=torch.float64)
    tokens = torch.stack([tokens, random_tokens(1, 9)[0, :, :3]])
    y, arbitrary = normalised_cut(tokens, everywhere(tokens), 0.2)
    assert arbitrary.tolist() == [True, False]
    assert torch.isfinite(y).all()


def test_which_side_is_up():
    # Six patches of background and two of a strong object: the smaller part peaks. With the parts the other way round
    # the peak rule takes the background, and the class's own values say so.
    for object_size, right in ((2, True), (6, False)):
        y = torch.cat([torch.full((1, object_size), 1 / object_size), torch.full((1, 8 - object_size), -1.0)], 1)
        y[:, object_size:] /= 8 - object_size
        cam = torch.cat([torch.ones(1, object_size), torch.zeros(1, 8 - object_size)], 1)
        there = everywhere(y)
        for turned in (y, -y):
            assert bool(oriented(turned, there)[0, 0] > 0) is right
            assert oriented(turned, there, cam)[0, 0] > 0
            assert oriented(turned, there, 1 - cam)[0, 0] < 0
            assert oriented(turned, there, 0 * cam).equal(oriented(turned, there))
    tie = torch.tensor([[-1.0, -1.0, 1.0 + 1e-15, 1.0]], dtype=torch.float64)  # the first of equal peaks decides
    assert oriented(tie, everywhere(tie)).equal(-tie)


# ----------------------------------------------------------------------------------------------------- the whole method


def grad_cam(model, image, target, objective="probability"):
    tokens = weighted_features(model, image, target, -1, objective, 16)
    return torch.from_numpy(tokens.sum(1)).view(4, 4)


def test_alike_patches_get_the_grad_cam_map_and_a_warning():
    model = tiny().double()
    x = images_for(model)
    with pytest.warns(
        UserWarning, match=r"r_cut has no cut for images \[0, 1, 2\].*not a single one.*Grad-CAM"
    ) as seen:
        e = prunex.explain("r_cut", model, x, TARGETS, threshold=-1)
    assert seen[0].filename == __file__
    for i, image in enumerate(x):
        cam = grad_cam(model, image, TARGETS[i])
        assert relative(e.raw[i], cam) < 1e-9
        assert relative(e.maps[i], cam.clamp(min=0)) < 1e-9
    assert torch.isfinite(e.raw).all()
    with pytest.warns(UserWarning, match="r_cut"):
        e = prunex.explain("r_cut", model, x, TARGETS, threshold=-1, objective="logit")
    assert relative(e.raw[0], grad_cam(model, x[0], TARGETS[0], "logit")) < 1e-9


def test_the_fallback_on_a_pruned_model_leaves_pruned_patches_lowest():
    model = tiny()
    with prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,)), pytest.warns(UserWarning, match="r_cut"):
        e = prunex.explain("r_cut", model, images(), threshold=-1)
    gone = ~e.trace.kept()
    assert (e.maps[gone] == 0).all()
    lowest = e.raw.amin((1, 2), keepdim=True).expand_as(e.raw)
    assert (e.raw[gone] == lowest[gone]).all()


def test_no_gradient_is_said():
    model = tiny()
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.warns(UserWarning, match="no gradient of the class reaches"):
        e = prunex.explain("r_cut", model, images(), TARGETS)
    assert (e.raw == 0).all()


def test_one_token_left():
    model = tiny()
    with (
        prunex.attach(model, "evit", keep_ratio=0.01, stages=(0,), fuse=False),
        pytest.warns(UserWarning, match="r_cut"),
    ):
        e = prunex.explain("r_cut", model, images())
    assert torch.isfinite(e.raw).all()
    assert (e.maps[~e.trace.kept()] == 0).all()


def test_a_saturated_softmax_keeps_its_direction():
    # p rounds to 1 in float32, whose own softmax gradient would lose the class's part of it.
    model = tiny().double()
    x = images_for(model)
    predicted = model(x).argmax(1)
    with torch.no_grad():
        logits = model(x)
        margin = (logits.topk(2).values @ torch.tensor([1.0, -1.0]).double()).min()
        model.head.weight *= 25 / margin
        model.head.bias *= 25 / margin
    single = copy.deepcopy(model).float()
    assert (single(x.float()).softmax(1).amax(1) == 1).any()
    wanted = explain(model, x, predicted)
    assert relative(explain(single, x.float(), predicted).raw, wanted.raw) < 1e-4
    with torch.no_grad():
        model.head.weight *= 100
        model.head.bias *= 100
    assert explain(model, x, predicted).raw.abs().amax((1, 2)).min() > 0


def test_permuted_patches_permute_the_map():
    model = tiny().double()
    x = images_for(model)
    order = torch.randperm(16)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, order]
    patches = F.unfold(x, 8, stride=8)[:, :, order]
    e = explain(moved, F.fold(patches, (32, 32), 8, stride=8))
    assert largest(e.raw.flatten(1), explain(model, x).raw.flatten(1)[:, order]) < 1e-9


def test_scaled_classifier_weights_change_nothing_for_the_logit():
    model = tiny().double()
    x = images_for(model)
    wanted = explain(model, x, objective="logit").raw
    with torch.no_grad():
        model.head.weight *= 10
        model.head.bias *= 10
    assert largest(explain(model, x, objective="logit").raw, wanted) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = tiny(family)
    x = images(3, (32, 56)) if family == "dynamic" else images_for(model)
    e = prunex.explain("r_cut", model, x)
    assert e.maps.shape == e.raw.shape == (3, *e.trace.grid)
    assert e.maps.dtype == e.raw.dtype == torch.float32
    assert (e.maps >= 0).all()
    assert (e.maps.flatten(1) > 0).any(1).all()
    assert relative(e.logits, model(x)) < 1e-5
    for i in range(3):
        assert relative(prunex.explain("r_cut", model, x[i : i + 1]).raw, e.raw[i : i + 1]) < 1e-6


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_masked_equals_removed_and_one_equals_many(family, pruner):
    model = tiny(family, patch_size=4).double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        removed = prunex.explain("r_cut", model, x)
        pruning.masked = True
        assert largest(prunex.explain("r_cut", model, x).raw, removed.raw) < 1e-9
        pruning.masked = None
        for i in range(3):
            assert largest(prunex.explain("r_cut", model, x[i : i + 1]).raw, removed.raw[i : i + 1]) < 1e-9


@pytest.mark.parametrize("pruner", PRUNERS)
def test_keep_ratio_one_is_the_dense_map(pruner):
    model = tiny()
    dense = prunex.explain("r_cut", model, images())
    with prunex.attach(model, pruner, keep_ratio=1.0, stages=(1, 2)):
        assert prunex.explain("r_cut", model, images()).raw.equal(dense.raw)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_grad_mode_and_nothing_left_behind(mode):
    model = tiny(patch_size=4)
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)):
        model.train()
        wanted = prunex.explain("r_cut", model, images(), TARGETS)
        before, rng = state_of(model), torch.get_rng_state()
        with mode():
            e = prunex.explain("r_cut", model, images(), TARGETS)
        assert_same_state(model, before)
        assert torch.get_rng_state().equal(rng)
    assert all(p.grad is None for p in model.parameters())
    assert e.raw.equal(wanted.raw)
    assert not e.raw.requires_grad
    assert not e.raw.is_inference()
    model.requires_grad_(False)
    assert prunex.explain("r_cut", model, images(), TARGETS).raw.shape == (3, 8, 8)


def test_half_precision():
    model = tiny()
    e = prunex.explain("r_cut", copy.deepcopy(model).bfloat16(), images(), TARGETS)
    assert e.raw.dtype == e.maps.dtype == torch.float32
    assert torch.isfinite(e.raw).all()
    with torch.autocast("cpu", torch.bfloat16):
        e = prunex.explain("r_cut", model, images(), TARGETS)
    assert e.raw.dtype == torch.float32


def test_class_matters_and_neighbours_do_not():
    model = tiny()
    several = prunex.explain("r_cut", model, images(), torch.tensor([4, 0, 2]))
    other = prunex.explain("r_cut", model, images(), torch.tensor([4, 1, 3]))
    assert relative(several.maps[0], other.maps[0]) < 1e-6
    assert relative(several.maps[1], other.maps[1]) > 1e-2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer": 4}, r"does not exist.*0\.\.3"),
        ({"layer": 1.0}, "does not exist"),
        ({"threshold": 1}, r"threshold=1 is not allowed: give a cosine in \[-1, 1\)"),
        ({"threshold": float("nan")}, "cosine"),
        ({"threshold": True}, "cosine"),
        ({"threshold": "0.2"}, "cosine"),
        ({"orient": "gradcam"}, "did you mean 'grad_cam'"),
        ({"orient": None}, "Known: grad_cam, peak"),
        ({"objective": "probabilty"}, "did you mean 'probability'"),
        ({"objective": ["logit"]}, "Known: logit, probability"),
        ({"tau": 0.2}, "unknown option of r_cut"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("r_cut", tiny(), images(), **options)


def test_bad_models():
    with pytest.raises(PrunexError, match="no classifier"):
        prunex.explain("r_cut", tiny(num_classes=0), images())
    with pytest.raises(PrunexError, match="single class is always 1.*objective='logit'"):
        prunex.explain("r_cut", tiny(num_classes=1), images())
    assert prunex.explain("r_cut", tiny(num_classes=1), images(), objective="logit").maps.shape == (3, 4, 4)
    with torch.inference_mode():
        model = tiny()
    with pytest.raises(PrunexError, match="inference_mode"):
        prunex.explain("r_cut", model, images())


@pytest.mark.parametrize(("sizes", "open_to_doubt"), [((40, 40, 41), True), ((20, 40, 61), False)])
def test_eigenvalues_closer_than_a_millionth_leave_the_cut_open(sizes, open_to_doubt):
    """Three groups of nearly one size: which two of them the second eigenvector tells apart is anybody's guess."""
    group = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    tokens = torch.eye(3, dtype=torch.float64)[group][None]
    affinity = torch.where(group[:, None] == group, 1.0, 1e-5).double()
    root = affinity.sum(1).rsqrt()
    values = torch.linalg.eigvalsh(torch.eye(len(group)).double() - root[:, None] * affinity * root)
    assert bool(1e-12 < values[2] - values[1] < 1e-6) == open_to_doubt
    assert normalised_cut(tokens, everywhere(tokens), 0.2)[1].tolist() == [open_to_doubt]
