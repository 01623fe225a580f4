import math

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from prunex.explainers.atman import atman, suppression  # noqa: F401  (registers it)
from prunex.vit.embedding import embed_patches
from tests.explainers import definitions
from tests.vits import FAMILIES, images, images_for, largest, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
RULES = ["log", "shift", "scale"]
PRUNERS = ["topk", "evit", "dynamicvit"]


def at(model, x, **options):
    return prunex.explain("atman", model, x, TARGETS[: len(x)], **options)


def slow(model, image, factor, rule, leave=None):
    """Logits of one image [3, H, W] with factors [N] of its tokens, opened once more.

    ``leave`` says what is multiplied at a place, (block, inside) to (tokens, factors): a frozen selection.
    """
    prefix, leave = model.num_prefix_tokens, leave or {}
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    for i, block in enumerate(model.blocks):
        if (i, False) in leave:
            forward, share = leave[i, False]
            x, factor = forward @ x, share @ factor
        attn, y = block.attn, block.norm1(x)
        h, d = attn.num_heads, y.shape[1] // attn.num_heads
        q, k, v = attn.qkv(y).reshape(len(x), 3, h, d).permute(1, 2, 0, 3)
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(1, 2) / math.sqrt(d)
        if rule == "log":
            weights = scores.exp() * factor
            a = weights / weights.sum(-1, keepdim=True)
        elif rule == "shift":
            a = ((scores - scores.min(-1, keepdim=True).values) * factor).softmax(-1)
        else:
            a = (scores * factor).softmax(-1)
        x = x + block.ls1(attn.proj((a @ v).permute(1, 0, 2).reshape(len(x), h * d)))
        if (i, True) in leave:
            forward, share = leave[i, True]
            x, factor = forward @ x, share @ factor
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    pooled = x[0] if model.global_pool == "token" else x[prefix:].mean(0)
    return model.head(model.fc_norm(pooled))


def frozen(model, image, pruner, trace, i):
    """What the unperturbed run of one image multiplied by, for blocks 1 and 3."""
    prefix = model.num_prefix_tokens
    if pruner == "dynamicvit":
        first, second = (trace.kept(s)[i].flatten().nonzero().flatten().tolist() for s in (0, 1))
        kept = {1: first, 3: [first.index(j) for j in second]}
        record = definitions.opened(model, image, 0, ("given", kept))
        return {(h.block, False): (h.matrix, h.matrix) for h in record.halves if h.kind == "reduce"}
    record = definitions.opened(model, image, 0, (pruner, 0.6, (1, 3)))
    maps = [h.matrix for h in record.halves if h.kind == "attention"]
    scores = {b: maps[b][:, 0, prefix:].mean(0) for b in (1, 3)}
    return {(b, True): definitions.reduction(s, prefix, 0.6, pruner == "evit") for b, s in scores.items()}


def damp(n, prefix, i, factor):
    factors = torch.ones(n, dtype=torch.float64)
    factors[prefix + i] = factor
    return factors


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "qk_norm", "layer_scale", "avg_pool", "avg_pool_no_class"])
def test_equals_opened_attention(family, rule):
    model = tiny(family).double()
    x = images_for(model, 2)
    e = at(model, x, rule=rule, factor=0.3)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        for i, image in enumerate(x):
            for j in (0, 7, 15):
                wanted = slow(model, image, damp(prefix + 16, prefix, j, 0.3), rule)
                assert relative(e.raw[i, j], wanted) < 1e-12
                rise = F.cross_entropy(wanted, TARGETS[i]) - F.cross_entropy(e.logits[i], TARGETS[i])
                assert largest(e.maps[i].flatten()[j], rise) < 1e-11
    assert e.signed
    assert (e.maps < 0).any()
    assert (e.maps > 0).any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruned_equals_opened_attention_with_the_clean_selection(pruner, rule):
    # Including the tokens that EViT fuses: one that holds a share u of the damped patch gets 1 - u (1 - f).
    model = tiny().double()
    x = images_for(model, 2)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3)) as pruning:
        randomise(pruning.pruner)
        e = at(model, x, rule=rule)
    for i, image in enumerate(x):
        leave = frozen(model, image, pruner, e.trace, i)
        with torch.no_grad():
            for j in range(16):
                assert relative(e.raw[i, j], slow(model, image, damp(17, 1, j, 0.1), rule, leave)) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"similarity": 0.0}, {"freeze_selection": False}])
@pytest.mark.parametrize("pruner", [None, *PRUNERS])
def test_factor_one_changes_nothing(pruner, options, rule):
    model = tiny().double()
    if pruner:
        prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3))
    assert largest(at(model, images(dtype=torch.float64), factor=1, rule=rule, **options).maps, torch.zeros(1)) < 1e-12


@pytest.mark.parametrize("factor", [0, 1e-12])
@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class"])
def test_a_vanishing_factor_is_a_masked_key(family, factor):
    model = tiny(family).double()
    x = images_for(model, 1)
    e = at(model, x, factor=factor)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        for j in range(16):
            assert relative(e.raw[0, j], slow(model, x[0], damp(prefix + 16, prefix, j, 0), "log")) < 1e-8
    single = at(model.float(), x.float(), factor=factor)
    assert relative(single.raw, e.raw) < 1e-4


def test_nothing_is_left_to_look_at_and_still_finite():
    # No prefix, equal patches: all keys are damped to 0, which is no preference at all.
    model = tiny("avg_pool_no_class")
    x = torch.full((1, 3, 32, 32), 0.5)
    assert largest(at(model, x, factor=0, similarity=0.5).maps, torch.zeros(1)) < 1e-5


def test_similarity_above_one_is_the_patch_alone():
    model = tiny()
    assert at(model, images(), similarity=1.5).raw.equal(at(model, images()).raw)


def test_patches_that_look_the_same_are_damped_together():
    model = tiny()
    x = images()
    x[:, :, :8, :8] = x[:, :, 16:24, 8:16]
    e = at(model, x, similarity=0.9)
    assert relative(e.raw[:, 0], e.raw[:, 9]) < 1e-5
    alone = at(model, x)
    assert relative(alone.raw[:, 0], alone.raw[:, 9]) > 1e-2
    with torch.no_grad():
        factors = suppression(embed_patches(model, x)[0], 0.1, 0.9)
    assert largest(factors[:, 0, [0, 9]], torch.full((3, 2), 0.1)) < 1e-6
    others = [j for j in range(16) if j not in (0, 9)]
    assert (factors[:, 0, others] == 1).all()


def test_factors_fall_with_similarity():
    vectors = torch.tensor([[[1.0, 0], [0, 2], [-3, 0], [3, 3]]])
    half = 0.5**0.5
    assert (
        largest(
            suppression(vectors, 0.2, 0.5),
            torch.tensor(
                [
                    [0.2, 1, 1, 0.8 * (1 - half) + 0.2],
                    [1, 0.2, 1, 0.8 * (1 - half) + 0.2],
                    [1, 1, 0.2, 1],
                    [0.8 * (1 - half) + 0.2, 0.8 * (1 - half) + 0.2, 1, 0.2],
                ]
            )[None],
        )
        < 1e-6
    )
    opposite = suppression(vectors, 0.2, 0)[0, 0, 2]
    assert opposite == 1


def test_similarity_is_of_patches_without_their_positions():
    # Position embeddings far larger than the patches would make all alike, or none.
    model, x = tiny(), images()
    before = suppression(embed_patches(model, x)[0], 0.1, 0.1)
    with torch.no_grad():
        model.pos_embed.mul_(100)
    assert suppression(embed_patches(model, x)[0], 0.1, 0.1).equal(before)
    assert embed_patches(tiny("dynamic"), images(2, (32, 56)))[0].shape == (2, 28, 48)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("pruner", [None, "evit", "dynamicvit"])
def test_replicas_equal_sequential_runs(pruner, chunk):
    model = tiny()
    if pruner:
        randomise(prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3)).pruner)
    e, other = at(model, images(), similarity=0.1), at(model, images(), similarity=0.1, chunk=chunk)
    assert relative(other.raw, e.raw) < 1e-5


@pytest.mark.parametrize("options", [{}, {"rule": "shift"}, {"rule": "scale"}, {"freeze_selection": False}])
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool"])
def test_masked_equals_removed_and_one_equals_many(family, pruner, options):
    model = tiny(family).double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3)) as pruning:
        randomise(pruning.pruner)
        removed = at(model, x, similarity=0.3, **options)
        for i in range(3):
            one = prunex.explain("atman", model, x[i : i + 1], TARGETS[i : i + 1], similarity=0.3, **options)
            assert relative(one.raw, removed.raw[i : i + 1]) < 1e-12
        pruning.masked = True
        masked = at(model, x, similarity=0.3, **options)
    assert relative(masked.raw, removed.raw) < 1e-12
    assert relative(masked.maps, removed.maps) < 1e-10


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_keep_ratio_one_is_dense(pruner, freeze):
    model = tiny()
    dense = at(model, images())
    with prunex.attach(model, pruner, keep_ratio=1.0, stages=(1, 2)):
        assert relative(at(model, images(), freeze_selection=freeze).raw, dense.raw) < 1e-6


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_free_selection_changes_when_patches_are_damped(pruner):
    model = tiny().double()
    with prunex.attach(model, pruner, keep_ratio=0.5, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        kept, free = (
            at(model, images(dtype=torch.float64), factor=0.01, freeze_selection=f).raw for f in (True, False)
        )
    gap = (kept - free).abs().amax(2)
    assert (gap > 1e-3).any()  # another set of tokens for some patches,
    if pruner != "evit":  # whose fused token takes its weights from the attention that is damped
        assert (gap < 1e-12).any()  # and the same set for others


def test_removed_before_the_first_block():
    model = tiny().double()
    with prunex.attach(model, "dynamicvit", keep_ratio=0.5, stages=(0,)):
        e = at(model, images(dtype=torch.float64))
    gone = ~e.trace.kept()
    assert largest(e.maps[gone], torch.zeros(1)) < 1e-12
    assert (e.maps[~gone].abs() > 1e-6).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_one_equals_many(family):
    model = tiny(family)
    x = images_for(model)
    e = at(model, x)
    patches = math.prod(model.patch_embed.grid_size)
    assert e.maps.shape == (3, *model.patch_embed.grid_size)
    assert e.raw.shape == (3, patches, 5)
    assert (e.maps.abs() > 1e-5).any()
    for i in range(3):
        one = prunex.explain("atman", model, x[i : i + 1], TARGETS[i : i + 1])
        assert relative(one.raw, e.raw[i : i + 1]) < 2e-6
    with torch.no_grad():
        assert relative(e.logits, model(x)) < 1e-5


def test_one_forward_a_patch_and_one_embedding():
    model, seen, embedded = tiny(), [], []
    handles = [
        model.blocks[0].norm1.register_forward_pre_hook(lambda m, args: seen.append(len(args[0]))),
        model.patch_embed.register_forward_pre_hook(lambda m, args: embedded.append(len(args[0]))),
    ]
    at(model, images(), chunk=10)
    for handle in handles:
        handle.remove()
    assert sum(seen) == 3 * 17 + 1  # one image through the model's own forward, to compare with
    assert max(seen) == 10
    assert embedded == [3, 1]


def test_weights_made_under_inference_mode_will_do():
    with torch.inference_mode():
        model = tiny()
    assert at(model, images()).raw.equal(at(tiny(), images()).raw)


def test_half_precision_models_are_read_in_float32():
    model = tiny()
    wanted = at(model, images()).raw
    e = at(model.bfloat16(), images(), similarity=0.9)
    assert e.maps.dtype == torch.float32
    assert relative(e.raw, wanted) < 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"factor": -0.1}, "at least 0"),
        ({"factor": float("inf")}, "at least 0"),
        ({"factor": float("nan")}, "at least 0"),
        ({"factor": True}, "at least 0"),
        ({"factor": None}, "at least 0"),
        ({"similarity": -0.5}, "at least 0"),
        ({"similarity": "0.6"}, "at least 0"),
        ({"rule": "shifted"}, "did you mean 'shift'"),
        ({"rule": 1}, "Known: log, scale, shift"),
        ({"freeze_selection": "no"}, "True or False"),
        ({"chunk": 0}, "at least 1"),
        ({"chunk": 2.5}, "at least 1"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("atman", tiny(), images(), **options)


def test_models_without_a_cross_entropy_are_refused():
    with pytest.raises(PrunexError, match="no classifier"):
        prunex.explain("atman", tiny(num_classes=0), images())
    with pytest.raises(PrunexError, match="always 0"):
        prunex.explain("atman", tiny(num_classes=1), images())
