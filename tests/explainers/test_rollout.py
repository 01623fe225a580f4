from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.vit import attention, surroundings
from prunex.vit.recording import Recording
from prunex.vit.tape import Attended
from prunex.vit.trace import Stage, TokenTrace
from tests.explainers import definitions
from tests.vits import images, images_for, largest, relative, tiny


@pytest.mark.parametrize("size", [16, 32, 112])  # 5, 17 and 197 tokens
@pytest.mark.parametrize("start", [0, 1])
def test_row_vector_equals_the_whole_product(size, start):
    model = tiny(img_size=size, depth=3).double()
    x = images(2, (size, size), dtype=torch.float64)
    e = prunex.explain("rollout", model, x, start_layer=start)
    for image, row in zip(x, e.raw, strict=True):
        wanted, whole = definitions.rollout(definitions.opened(model, image, 0), start=start)
        assert largest(row, wanted) < 1e-13
        assert largest(row, whole[0]) < 1e-13


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool"])
def test_fusion_and_discard(fusion, discard, family):
    model = tiny(family).double()
    prefix = model.num_prefix_tokens
    x = images_for(model)
    e = prunex.explain("rollout", model, x, head_fusion=fusion, discard_ratio=discard)
    for image, row in zip(x, e.raw, strict=True):
        record = definitions.opened(model, image, 0)
        assert largest(row, definitions.rollout(record, fusion, discard, prefix=prefix)[0]) < 1e-13


@pytest.mark.parametrize("pruner", ["topk", "evit"])
@pytest.mark.parametrize(("fusion", "discard"), [("mean", 0.0), ("max", 0.0), ("mean", 0.5)])
def test_pruned_equals_the_whole_product_with_s(pruner, fusion, discard):
    model = tiny().double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)):
        e = prunex.explain("rollout", model, x, head_fusion=fusion, discard_ratio=discard)
    for image, row in zip(x, e.raw, strict=True):
        record = definitions.opened(model, image, 0, (pruner, 0.6, (1, 2)))
        assert largest(row, definitions.rollout(record, fusion, discard)[0]) < 1e-13


def test_masked_slots_do_not_use_up_what_is_discarded():
    model = tiny()
    with prunex.attach(model, "evit", keep_ratio=0.5, stages=(0, 2)) as pruning:
        for options in ({"discard_ratio": 0.6}, {"discard_ratio": 0.9, "head_fusion": "max"}):
            removed = prunex.explain("rollout", model, images(), **options).maps
            pruning.masked = True
            assert relative(prunex.explain("rollout", model, images(), **options).maps, removed) < 1e-5
            pruning.masked = None


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class"])
@pytest.mark.parametrize("pruner", [None, "topk", "evit", "dynamicvit"])
@pytest.mark.parametrize("options", [{}, {"head_fusion": "max"}, {"head_fusion": "min", "discard_ratio": 0.7}])
def test_sums_to_one_whatever_left(family, pruner, options):
    model = tiny(family).double()
    if pruner:
        prunex.attach(model, pruner, keep_ratio=0.6, stages=(0, 2))
    e = prunex.explain("rollout", model, images_for(model), **options)
    assert (e.raw >= 0).all()
    assert largest(e.raw.sum(1), torch.ones(3)) < 1e-12


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "avg_pool"])
def test_identity_attention_leaves_the_readout(monkeypatch, family):
    monkeypatch.setattr(
        attention, "matrix", lambda q, k, *_: torch.eye(k.shape[2])[: q.shape[2]].expand(*q.shape[:2], -1, -1)
    )
    monkeypatch.setattr(surroundings.Call, "check", lambda *_: None)  # this is another model, and meant to be
    model = tiny(family)
    e = prunex.explain("rollout", model, images())
    n = 16 + model.num_prefix_tokens
    wanted = {"vit": [1] + [0] * 16, "deit_distilled": [0.5, 0.5] + [0] * 16, "avg_pool": [0] + [1 / 16] * 16}[family]
    assert e.raw.shape == (3, n)
    assert largest(e.raw, torch.tensor(wanted).expand(3, -1)) < 1e-7


def test_uniform_attention_of_one_block():
    model = tiny(depth=1).double()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:96] = 0  # queries and keys
        model.blocks[0].attn.qkv.bias[:96] = 0
    row = prunex.explain("rollout", model, images(dtype=torch.float64)).raw
    assert largest(row[:, 0], torch.tensor(0.5 + 0.5 / 17, dtype=torch.float64)) < 1e-14
    assert largest(row[:, 1:], torch.tensor(0.5 / 17, dtype=torch.float64)) < 1e-14


def pencil(monkeypatch, steps, prefix, patches):
    """Rollout over steps written by hand, read at token 0."""
    module = import_module("prunex.explainers.rollout")  # the package's attribute of this name is the function

    @contextmanager
    def recording(model, images, target, tape, needs_class=False):
        tape.steps.extend(steps)
        anatomy = SimpleNamespace(
            prefix=prefix,
            patch=(8, 8),
            readout=lambda tokens, policy, like, sizes: torch.eye(tokens, dtype=like.dtype)[:1],
        )
        last = [s for s in steps if isinstance(s, Attended)][-1]
        tape.tokens, tape.logits = last.attention.shape[-1], torch.zeros(1, 2, dtype=torch.float64)
        trace = TokenTrace((1, patches), prefix, 1, torch.device("cpu"), [s for s in steps if isinstance(s, Stage)])
        state = SimpleNamespace(trace=trace, anatomy=anatomy)
        yield Recording(model, tape, state, torch.zeros(1, dtype=torch.long), (8, 8), (False, torch.bfloat16), False)

    monkeypatch.setattr(module, "recording", recording)
    return module.rollout(SimpleNamespace(blocks=[0, 0]), None)


def matrix(rows):
    return torch.tensor([rows], dtype=torch.float64)


def test_hand_case_one_of_three_tokens_leaves(monkeypatch):
    first = Attended(0, matrix([[1 / 2, 1 / 4, 1 / 4], [0, 1, 0], [1 / 2, 0, 1 / 2]]))
    leave = Stage(1, torch.tensor([[0, -1]]), matrix([1.0, 0.0]), 1)
    second = Attended(1, matrix([[1 / 2, 1 / 2], [1 / 4, 3 / 4]]))
    # M_1 = [[3/4, 1/4], ..] so the row is (3/4, 1/4); back to three tokens (3/4, 1/4, 0); times
    # M_0 = [[3/4, 1/8, 1/8], [0, 1, 0], [1/4, 0, 3/4]]: (9/16, 3/32 + 1/4, 3/32).
    answer = pencil(monkeypatch, [first, leave, second], 1, 2)
    assert largest(answer.raw, matrix([18 / 32, 11 / 32, 3 / 32])) == 0
    assert largest(answer.maps, matrix([[11 / 32, 3 / 32]])) == 0


def test_hand_case_two_tokens_are_fused(monkeypatch):
    first = Attended(0, torch.eye(4, dtype=torch.float64)[None])
    fuse = Stage(0, torch.tensor([[0, 1, 1]]), matrix([1.0, 1 / 4, 3 / 4]), 2, True)
    second = Attended(1, matrix([[1 / 2, 1 / 4, 1 / 4], [1, 0, 0], [0, 0, 1]]))
    answer = pencil(monkeypatch, [first, fuse, second], 1, 3)
    assert largest(answer.raw, matrix([3 / 4, 1 / 8, 1 / 32, 3 / 32])) == 0


def test_class_does_not_matter():
    model = tiny()
    a, b = (prunex.explain("rollout", model, images(), t) for t in (0, 3))
    assert a.maps.equal(b.maps)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"head_fusion": "maximum"}, "did you mean 'max'"),
        ({"head_fusion": ["mean"]}, "Known: max, mean, min"),
        ({"discard_ratio": 1}, r"\[0, 1\)"),
        ({"discard_ratio": -0.1}, r"\[0, 1\)"),
        ({"discard_ratio": float("nan")}, r"\[0, 1\)"),
        ({"discard_ratio": True}, r"\[0, 1\)"),
        ({"start_layer": 4}, r"0\.\.3"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        prunex.explain("rollout", tiny(), images(), **options)


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "qk_norm"])
@pytest.mark.parametrize(("discard", "start"), [(0.0, 0), (0.6, 0), (0.0, 2)])
def test_with_gradients_blocks_have_their_own(family, discard, start):
    model = tiny(family).double()
    x, targets = images_for(model), torch.tensor([4, 0, 2])
    e = prunex.explain("rollout", model, x, targets, discard_ratio=discard, start_layer=start, gradient=True)
    for i, image in enumerate(x):
        record = definitions.opened(model, image, targets[i])
        wanted, _ = definitions.rollout(record, "mean", discard, start, model.num_prefix_tokens, gradient=True)
        assert relative(e.raw[i], wanted) < 1e-10
    assert relative(e.raw.sum(1), torch.ones(len(x), dtype=torch.float64)) < 1e-10
    assert relative(e.maps, prunex.explain("rollout", model, x, targets).maps) > 1e-3
    other = prunex.explain("rollout", model, x, (targets + 1) % 5, gradient=True).maps
    assert relative(other, prunex.explain("rollout", model, x, targets, gradient=True).maps) > 1e-3


@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_with_gradients_on_a_pruned_model(pruner):
    model = tiny().double()
    x, targets = images_for(model), torch.tensor([4, 0, 2])
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        e = prunex.explain("rollout", model, x, targets, gradient=True)
        alone = torch.cat(
            [prunex.explain("rollout", model, x[i : i + 1], targets[i : i + 1], gradient=True).raw for i in range(3)]
        )
        pruning.masked = True
        masked = prunex.explain("rollout", model, x, targets, gradient=True)
    assert relative(alone, e.raw) < 1e-11
    assert relative(masked.raw, e.raw) < 1e-11
    for i, image in enumerate(x):
        record = definitions.opened(model, image, targets[i], (pruner, 0.6, (1, 2)))
        assert relative(e.raw[i], definitions.rollout(record, gradient=True)[0]) < 1e-10


def test_gradients_need_a_class_and_the_mean():
    with pytest.raises(PrunexError, match="head_fusion='max' goes without gradient=True"):
        prunex.explain("rollout", tiny(), images(), head_fusion="max", gradient=True)
    with pytest.raises(PrunexError, match="gradient='yes'"):
        prunex.explain("rollout", tiny(), images(), gradient="yes")
    with pytest.raises(PrunexError, match="no classifier"):
        prunex.explain("rollout", tiny(num_classes=0), images(), gradient=True)
