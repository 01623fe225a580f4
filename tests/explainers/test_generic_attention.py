import pytest
import torch

import prunex
from prunex.vit.recording import attention_gradients, recording
from prunex.vit.tape import Tape
from tests.explainers import definitions
from tests.vits import images, images_for, relative, tiny

TARGETS = torch.tensor([4, 0, 2])


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "qk_norm", "layer_scale", "avg_pool", "avg_pool_no_class"])
@pytest.mark.parametrize("start", [0, 2])
def test_equals_the_matrix_recursion(family, start):
    model = tiny(family).double()
    x = images_for(model)
    row = prunex.explain("generic_attention", model, x, TARGETS, start_layer=start)
    whole = prunex.explain("generic_attention", model, x, TARGETS, start_layer=start, full=True)
    assert relative(row.maps, whole.maps) < 1e-12
    for i, image in enumerate(x):
        record = definitions.opened(model, image, TARGETS[i])
        wanted, r = definitions.generic_attention(record, start)
        assert relative(row.raw[i], wanted) < 1e-12
        assert relative(whole.raw[i], r) < 1e-12


@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_pruned_equals_the_matrix_recursion_with_s(pruner):
    model = tiny().double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)):
        e = prunex.explain("generic_attention", model, x, TARGETS)
        full = prunex.explain("generic_attention", model, x, TARGETS, full=True)
    assert full.raw.shape == (3, 1 + {"topk": 6, "evit": 8}[pruner], 17)
    for i, image in enumerate(x):
        record = definitions.opened(model, image, TARGETS[i], (pruner, 0.6, (1, 2)))
        assert relative(e.logits[i], record.logits) < 1e-12
        wanted, r = definitions.generic_attention(record)
        assert relative(e.raw[i], wanted) < 1e-12
        assert relative(full.raw[i], r) < 1e-12


def test_one_block_gives_the_class_row_of_abar():
    model = tiny(depth=1).double()
    x = images_for(model)
    e = prunex.explain("generic_attention", model, x, TARGETS)
    for i, image in enumerate(x):
        half = next(h for h in definitions.opened(model, image, TARGETS[i]).halves if h.kind == "attention")
        abar = (half.grad * half.matrix).clamp(min=0).mean(0)
        assert relative(e.raw[i, 1:], abar[0, 1:]) < 1e-12


def test_clamp_comes_before_the_head_mean():
    model = tiny(depth=1).double()
    e = prunex.explain("generic_attention", model, images_for(model), TARGETS)
    half = next(h for h in definitions.opened(model, images_for(model)[0], 4).halves if h.kind == "attention")
    wrong = (half.grad * half.matrix).mean(0).clamp(min=0)[0, 1:]
    assert relative(wrong, e.raw[0, 1:]) > 1e-2
    assert (e.raw[0, 1:] >= wrong).all()


def test_zero_gradient_leaves_the_identity():
    model = tiny()
    with torch.no_grad():
        model.head.weight.zero_()
    e = prunex.explain("generic_attention", model, images(), 0, full=True)
    assert e.raw.equal(torch.eye(17).expand(3, -1, -1))
    assert (e.maps == 0).all()


def test_gradients_equal_finite_differences():
    # Of the logit, with respect to one entry of one head's attention in a middle block.
    from prunex.vit import attention

    model = tiny(depth=2).double()
    x = images(1, dtype=torch.float64)
    tape = Tape(attention=True, gradients=True)
    with recording(model, x, 2, tape) as recorded:
        grad = attention_gradients(recorded)[0][0, 1, 3, 5].item()

    def logit(by):
        plain, calls = attention.matrix, []

        def nudged(*args):
            a = plain(*args).clone()
            if not calls:
                a[0, 1, 3, 5] += by
            calls.append(1)
            return a

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(attention, "matrix", nudged)
            with recording(model, x, 2, Tape(attention=True)) as found:
                return found.logits[0, 2].item()

    assert abs((logit(1e-5) - logit(-1e-5)) / 2e-5 - grad) < 1e-8 * max(1, abs(grad))


def test_scale_of_the_logit_scales_the_gradient_only():
    model = tiny(depth=1)
    before = prunex.explain("generic_attention", model, images(), 1).maps
    with torch.no_grad():
        model.head.weight *= 4
    assert relative(prunex.explain("generic_attention", model, images(), 1).maps, 4 * before) < 1e-5


def test_classes_differ():
    model = tiny()
    a, b = (prunex.explain("generic_attention", model, images(), t).maps for t in (0, 3))
    assert relative(a, b) > 0.05


@pytest.mark.parametrize("value", [4, -5, True, "0"])
def test_a_start_that_does_not_exist(value):
    with pytest.raises(prunex.PrunexError, match=r"does not exist.*0\.\.3"):
        prunex.explain("generic_attention", tiny(), images(), start_layer=value)
