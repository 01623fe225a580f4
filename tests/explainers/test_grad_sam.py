import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.explainers.grad_sam import block_scores, grad_sam  # noqa: F401  (registers it)
from prunex.vit.recording import attention_gradients, recording
from prunex.vit.tape import Tape
from prunex.vit.trace import Stage
from tests.explainers import definitions
from tests.vits import FAMILIES, images, images_for, largest, randomise, relative, tiny

TARGETS = torch.tensor([4, 0, 2])
AXES = ["key", "query", "cls"]
LIFTS = ["direct", "presence"]


def slow(record, axis, lift, readers):
    """Block by block over whole matrices, with S from the input up to each block; one image, [N]."""
    n0 = len(record.embedded)
    back = torch.eye(n0, dtype=record.embedded.dtype)  # [n, N]: how the tokens now are made of the first ones
    total, lived, blocks = back.new_zeros(n0), back.new_zeros(n0), 0
    for half in record.halves:
        if half.kind == "reduce":
            back = half.matrix @ back
        elif half.kind == "attention":
            blocks += 1
            product = (half.matrix * half.grad.clamp(min=0)).mean(0)
            if axis == "query":
                vector = product.sum(1)
            elif axis == "key":
                vector = product.sum(0)
            else:
                vector = product[readers].sum(0)
            total = total + vector @ back
            lived = lived + back.sum(0)
    if lift == "presence":
        return torch.where(lived > 0, total / lived, 0) / n0
    return total / blocks / n0


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("lift", LIFTS)
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "qk_norm", "layer_scale", "avg_pool", "avg_pool_no_class"])
def test_equals_whole_matrices(family, lift, axis):
    model = tiny(family).double()
    x = images_for(model)
    e = prunex.explain("grad_sam", model, x, TARGETS, axis=axis, lift=lift)
    prefix = model.num_prefix_tokens
    readers = [0] if model.global_pool == "token" else list(range(prefix, prefix + 16))
    for i, image in enumerate(x):
        record = definitions.opened(model, image, TARGETS[i])
        assert relative(e.raw[i], slow(record, axis, lift, readers)) < 1e-12
    assert (e.raw >= 0).all()
    assert not e.signed


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("lift", LIFTS)
@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_pruned_equals_whole_matrices_with_s(pruner, lift, axis):
    model = tiny().double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3)) as pruning:
        randomise(pruning.pruner)
        e = prunex.explain("grad_sam", model, x, TARGETS, axis=axis, lift=lift)
        pruning.masked = True
        masked = prunex.explain("grad_sam", model, x, TARGETS, axis=axis, lift=lift)
    assert relative(masked.raw, e.raw) < 1e-12
    kept = [e.trace.kept(s).flatten(1) for s in (0, 1)]
    for i, image in enumerate(x):
        prune = (pruner, 0.6, (1, 3))
        if pruner == "dynamicvit":
            first = kept[0][i].nonzero().flatten().tolist()
            prune = ("given", {1: first, 3: [first.index(j) for j in kept[1][i].nonzero().flatten().tolist()]})
        record = definitions.opened(model, image, TARGETS[i], prune)
        assert relative(e.raw[i], slow(record, axis, lift, [0])) < 1e-12


@pytest.mark.parametrize("axis", ["key", "cls"])
def test_one_block_of_one_head_is_generic_attention_over_n(axis):
    model = tiny(depth=1, num_heads=1).double()
    x = images_for(model)
    e = prunex.explain("grad_sam", model, x, TARGETS, axis=axis)
    wanted = prunex.explain("generic_attention", model, x, TARGETS)
    assert relative(e.maps, wanted.maps / 17) < 1e-12
    query = prunex.explain("grad_sam", model, x, TARGETS, axis="query")
    assert (query.raw[:, 1:] == 0).all()  # the last block says nothing about patches on that axis
    assert relative(query.raw[:, 0], e.raw.sum(1)) < 1e-12


@pytest.mark.parametrize("pruner", [None, "evit"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("family", ["vit", "deit_distilled", "avg_pool"])
def test_streaming_equals_stored_maps(family, axis, pruner):
    model = tiny(family)
    x = images_for(model)
    if pruner:
        prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 3))
    e = prunex.explain("grad_sam", model, x, TARGETS, axis=axis)
    tape = Tape(attention=True, gradients=True)
    with recording(model, x, TARGETS, tape) as recorded:
        grads = attention_gradients(recorded)
        total = torch.zeros_like(recorded.readout())
        n = recorded.embedded.shape[1]
        stored = {
            step.block: block_scores(step.attention, grad, axis, recorded.anatomy).detach()
            for step, grad in zip(tape.attended(), grads, strict=True)
        }
        for step in reversed(tape.steps):
            if isinstance(step, Stage):
                total = step.lift(total, recorded.anatomy.prefix)
            elif step.block in stored:
                total = total + stored[step.block]
    assert relative(e.raw, total / len(stored) / n) < 1e-5


@pytest.mark.parametrize("axis", AXES)
def test_scale_of_the_logit_scales_the_map(axis):
    model = tiny()
    before = prunex.explain("grad_sam", model, images(), 1, axis=axis).maps
    with torch.no_grad():
        model.head.weight *= 4
    assert relative(prunex.explain("grad_sam", model, images(), 1, axis=axis).maps, 4 * before) < 1e-5


def test_class_rows_are_part_of_the_keys():
    model = tiny()
    keys, rows = (prunex.explain("grad_sam", model, images(), TARGETS, axis=a).raw for a in ("key", "cls"))
    assert (rows <= keys * (1 + 1e-5)).all()
    assert relative(rows, keys) > 0.05


def test_presence_gives_early_leavers_their_mean():
    model = tiny()
    with prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,)):
        direct, presence = (prunex.explain("grad_sam", model, images(), TARGETS, lift=lift) for lift in LIFTS)
    kept = direct.trace.kept()
    assert relative(presence.maps[kept], direct.maps[kept]) < 1e-6
    assert relative(presence.maps[~kept], 2 * direct.maps[~kept]) < 1e-6  # two of four blocks


@pytest.mark.parametrize("lift", LIFTS)
def test_removed_before_the_first_block(lift):
    model = tiny()
    with prunex.attach(model, "dynamicvit", keep_ratio=0.5, stages=(0,)):
        e = prunex.explain("grad_sam", model, images(), TARGETS, lift=lift)
    assert (e.maps[~e.trace.kept()] == 0).all()
    assert (e.maps[e.trace.kept()] > 0).all()


@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
@pytest.mark.parametrize("lift", LIFTS)
def test_keep_ratio_one_is_dense(pruner, lift):
    model = tiny()
    dense = prunex.explain("grad_sam", model, images(), lift=lift)
    with prunex.attach(model, pruner, keep_ratio=1.0, stages=(1, 2)):
        assert prunex.explain("grad_sam", model, images(), lift=lift).raw.equal(dense.raw)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_one_equals_many(family, axis):
    model = tiny(family)
    x = images_for(model)
    e = prunex.explain("grad_sam", model, x, TARGETS, axis=axis)
    assert e.maps.shape == (3, *model.patch_embed.grid_size)
    assert (e.maps >= 0).all()
    assert (e.maps > 0).any()
    for i in range(3):
        one = prunex.explain("grad_sam", model, x[i : i + 1], TARGETS[i : i + 1], axis=axis)
        assert relative(one.maps, e.maps[i : i + 1]) < 2e-6


def test_zero_gradient_gives_zeros():
    model = tiny()
    with torch.no_grad():
        model.head.weight.zero_()
    assert (prunex.explain("grad_sam", model, images(), 0).raw == 0).all()


def test_half_precision_models_are_read_in_float32():
    model = tiny()
    wanted = prunex.explain("grad_sam", model, images(), TARGETS).raw
    e = prunex.explain("grad_sam", model.bfloat16(), images(), TARGETS)
    assert e.raw.dtype == torch.float32
    assert largest(e.raw, wanted) < 0.2 * float(wanted.max())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"axis": "keys"}, "did you mean 'key'"),
        ({"axis": 0}, "Known: cls, key, query"),
        ({"lift": "present"}, "did you mean 'presence'"),
        ({"lift": ["direct"]}, "Known: direct, presence"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("grad_sam", tiny(), images(), **options)


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(PrunexError, match="no classifier"):
        prunex.explain("grad_sam", tiny(num_classes=0), images())
