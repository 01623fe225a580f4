import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prunex
from prunex import PrunexError
from tests.explainers.definitions import opened
from tests.vits import images, images_for, largest, relative, tiny


@pytest.mark.parametrize("family", ["vit", "qk_norm", "dinov2_reg", "not_square"])
@pytest.mark.parametrize("layer", [0, 2, -1])
def test_row_equals_the_row_of_the_whole_softmax(family, layer):
    model = tiny(family).double()
    x = images_for(model)
    e = prunex.explain("raw_attention", model, x, layer=layer)
    for image, row in zip(x, e.raw, strict=True):
        halves = [h for h in opened(model, image, 0).halves if h.kind == "attention"]
        assert largest(row, halves[layer].matrix[:, 0].mean(0)) < 1e-12
    assert largest(e.maps.flatten(1), e.raw[:, model.num_prefix_tokens :]) == 0


@pytest.mark.parametrize(
    ("family", "pooled"),
    [("avg_pool", 1), ("avg_pool_no_class", 0), ("avg_pool_no_class_reg", 2), ("avg_pool_prefix", 0)],
)
def test_pooled_models_average_over_the_rows_that_are_pooled(family, pooled):
    model = tiny(family).double()
    x = images_for(model)
    e = prunex.explain("raw_attention", model, x)
    for image, row in zip(x, e.raw, strict=True):
        record = opened(model, image, 0) if family != "avg_pool_prefix" else None
        if record is None:  # the slow definition pools patches only; its attention is all that is needed
            model.global_pool = "token"
            record = opened(model, image, 0)
            model.global_pool = "avg"
        a = [h for h in record.halves if h.kind == "attention"][-1].matrix
        assert largest(row, a[:, pooled:].mean((0, 1))) < 1e-12


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class"])
@pytest.mark.parametrize("pruner", [None, "topk", "evit"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_sums_to_one_over_all_tokens(family, pruner, layer):
    model = tiny(family).double()
    if pruner:
        prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2))
    e = prunex.explain("raw_attention", model, images_for(model), layer=layer)
    assert (e.raw >= 0).all()
    assert largest(e.raw.sum(1), torch.ones(3)) < 1e-12


@pytest.mark.parametrize("method", ["raw_attention", "rollout", "generic_attention", "tokentm"])
def test_permuting_patches_with_their_positions_permutes_the_map(method):
    model = tiny().double()
    x = images_for(model)
    before = prunex.explain(method, model, x, 1).maps.flatten(1)
    order = torch.randperm(16)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # [B, 3, 16, 8, 8]
    moved = patches[:, :, order].unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape_as(x)
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, order]
    assert relative(prunex.explain(method, model, moved, 1).maps.flatten(1), before[:, order]) < 1e-12


@pytest.mark.parametrize("pruner", ["topk", "evit"])
def test_removed_patches_have_none_left(pruner):
    model = tiny()
    with prunex.attach(model, pruner, keep_ratio=0.5, stages=(1, 2), **({"fuse": False} if pruner == "evit" else {})):
        e = prunex.explain("raw_attention", model, images())
    assert e.trace.kept().sum() == 3 * 4
    assert (e.maps[~e.trace.kept()] == 0).all()
    assert (e.maps[e.trace.kept()] > 0).all()


def test_members_of_a_fused_token_share_its_value():
    model = tiny()
    with prunex.attach(model, "evit", keep_ratio=0.5, stages=(1,)):
        e = prunex.explain("raw_attention", model, images())
    kept = e.trace.kept().flatten(1)
    fused = e.maps.flatten(1).masked_fill(kept, 0)
    share = e.trace.share().flatten(1).masked_fill(kept, 0)
    assert (fused[~kept] > 0).all()
    assert largest(fused, share * fused.sum(1, keepdim=True)) < 1e-7


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool"])
@pytest.mark.parametrize("stage", [0, 1])
def test_its_largest_at_the_reduction_block_are_what_evit_keeps(family, stage):
    model = tiny(family)
    x = images_for(model, 4)
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 3), fuse=False) as pruning:
        e = prunex.explain("raw_attention", model, x, layer=(1, 3)[stage])
        counts = pruning.counts()
    kept = e.trace.kept(stage).flatten(1)
    assert kept.sum(1).tolist() == [counts[stage]] * 4
    best = e.maps.flatten(1).topk(counts[stage], 1).indices
    assert torch.zeros_like(kept).scatter(1, best, True).equal(kept)


def test_no_matrix_is_formed():
    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    self.seen.add(tuple(t.shape[-2:]))
            return out

    model = tiny(img_size=40)  # 26 tokens, a number that no width here has
    with Shapes() as shapes:
        prunex.explain("raw_attention", model, images(2, (40, 40)))
    assert (26, 48) in shapes.seen
    assert (26, 26) not in shapes.seen
    with Shapes() as shapes:  # and the detector does detect
        prunex.explain("rollout", model, images(2, (40, 40)))
    assert (26, 26) in shapes.seen


@pytest.mark.parametrize("layer", [4, -5, 1.0, True, "last", None])
def test_a_layer_that_does_not_exist(layer):
    with pytest.raises(PrunexError, match=r"does not exist.*0\.\.3"):
        prunex.explain("raw_attention", tiny(), images(), layer=layer)


def test_class_does_not_matter():
    model = tiny()
    a, b = (prunex.explain("raw_attention", model, images(), t) for t in (0, 3))
    assert a.maps.equal(b.maps)
    assert b.target.tolist() == [3, 3, 3]
