"""A slim model is the pruned one without its training parts, and a thing of its own."""

import gc
import weakref

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from tests.slim.models import FAMILIES, METHODS, model_of, pixels
from tests.vits import assert_same_state, randomise, state_of, tiny


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_slim_equals_the_pruned_model_bit_for_bit(family, method):
    model = model_of(family, method)
    small = prunex.slim(model)
    assert small is not model
    assert not small.training
    assert torch.equal(small(pixels(model)), model(pixels(model)))


@pytest.mark.parametrize("method", list(METHODS))
def test_tokens_really_leave(method):
    small = prunex.slim(model_of("vit", method))
    small(pixels(small))
    trace = prunex.attached(small).trace
    lengths = [s.n_out for s in trace.stages]
    assert lengths == prunex.attached(small).counts()
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 16
    assert small.forward_features(pixels(small)).shape[1] == lengths[-1] + 1


def test_no_teacher_comes_along_and_the_original_keeps_its_own():
    model = model_of("vit", "dynamicvit")
    own = prunex.attached(model)
    teacher = own.pruner._teacher[0]
    small = prunex.slim(model)
    assert own.pruner._teacher == (teacher,)
    assert own.options["teacher"] is True
    pruning = prunex.attached(small)
    assert pruning.pruner._teacher == ()
    assert pruning.options["teacher"] is False
    model.train()(pixels(model))
    assert set(own.losses()) == {"ratio", "distill", "tokens"}
    small.train()(pixels(model))  # fine-tuning a slim model further is allowed, without the teacher
    assert set(pruning.losses()) == {"ratio"}


def test_the_teacher_is_not_even_copied(monkeypatch):
    model = model_of("vit", "dynamicvit")
    teacher = prunex.attached(model).pruner._teacher[0]
    monkeypatch.setattr(type(teacher), "__deepcopy__", _refuse_teacher(teacher), raising=False)
    prunex.slim(model)


def _refuse_teacher(teacher):
    def copy(self, memo):
        if self is teacher:
            pytest.fail("the teacher was copied")
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        import copy as plain

        new.__dict__.update({k: plain.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return new

    return copy


def test_slimming_changes_nothing_on_the_original():
    model = model_of("vit", "dynamicvit").train()
    before = state_of(model)
    prunex.slim(model)
    assert_same_state(model, before)


@pytest.mark.parametrize("method", [None, "evit", "dynamicvit"])
def test_changing_one_does_not_change_the_other(method):
    model = model_of("vit", method)
    x = pixels(model)
    small = prunex.slim(model)
    wanted = model(x)
    randomise(model, seed=5)
    assert torch.equal(small(x), wanted)
    changed = model(x)
    assert not torch.equal(changed, wanted)
    randomise(small, seed=6)
    assert torch.equal(model(x), changed)
    if method is not None:
        prunex.attached(small).detach()
        assert prunex.attached(model) is not None
        assert torch.equal(model(x), changed)


def test_the_methods_of_a_copy_are_bound_to_the_copy():
    model = model_of("vit", "evit")
    small = prunex.slim(model)
    small(pixels(small))
    with pytest.raises(PrunexError, match="no forward has run"):
        prunex.attached(model).trace  # noqa: B018
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None  # a slim model does not hold on to the one it came from


@pytest.mark.parametrize("progress", [0.0, 0.4, 0.7, 1.0])
def test_evit_in_the_middle_of_its_schedule_keeps_its_logits(progress):
    model = tiny()
    pruning = prunex.attach(model, "evit", keep_ratio=0.5, shrink_start=0.1, shrink_length=0.8)
    pruning.progress = progress
    small = prunex.slim(model)
    x = pixels(model)
    assert torch.equal(small(x), model(x))
    theirs = prunex.attached(small)
    assert theirs.counts() == pruning.counts()
    assert theirs.options["shrink_length"] == 0.0
    assert pruning.options["shrink_length"] == 0.8
    theirs.progress = 1.0  # nothing in a finished model follows progress any more
    assert torch.equal(small(x), model(x))


def test_masked_on_request_is_not_carried_over():
    model = model_of("vit", "evit")
    prunex.attached(model).masked = True
    small = prunex.slim(model)
    assert prunex.attached(small).masked is None
    assert torch.allclose(small(pixels(model)), model(pixels(model)), atol=1e-5)


def test_gradients_and_graphs_stay_behind():
    model = model_of("vit", "dynamicvit").train()
    model(pixels(model)).sum().backward()
    small = prunex.slim(model)
    assert all(p.grad is None for p in small.parameters())
    assert any(p.grad is not None for p in model.parameters())
    with pytest.raises(PrunexError, match="no forward has run"):
        prunex.attached(small).trace  # noqa: B018


def test_the_vit_inside_a_module_comes_out_alone():
    model = model_of("vit", "topk")
    holder = nn.ModuleDict({"backbone": model, "other": nn.Linear(3, 3)})
    small = prunex.slim(holder)
    assert type(small) is type(model)
    assert torch.equal(small(pixels(model)), model(pixels(model)))
    two = nn.ModuleDict({"a": model, "b": tiny(num_classes=2)})
    with pytest.raises(PrunexError, match="path="):
        prunex.slim(two)
    assert prunex.slim(two, "b").num_classes == 2


def test_what_is_no_vit_is_refused():
    for wrong in (nn.Linear(2, 2), nn.Sequential(), "model", None):
        with pytest.raises(PrunexError) as caught:
            prunex.slim(wrong)
        assert "\n" not in str(caught.value)
