import logging
from importlib import import_module
from itertools import chain, combinations

import numpy as np
import pytest
import torch

import prunex
import prunex.explainers.attention_flow  # noqa: F401  (registers it)
from prunex import PrunexError
from prunex.vit import attention, surroundings
from prunex.vit.tape import Attended
from prunex.vit.trace import Stage
from tests.explainers import definitions
from tests.vits import images, images_for, largest, randomise, relative, tiny

module = import_module("prunex.explainers.attention_flow")  # the package's attribute of this name may be the function
SCALE = 1_000_000
ROUNDING = 21 / SCALE  # a cut around a node of the tiny models has up to 21 edges


def explain(model, x, **options):
    return prunex.explain("attention_flow", model, x, **options)


def solve(steps, readout, prefix, tokens, start=0, scale=SCALE):
    """Flows [tokens] through steps written by hand."""
    network = module.build(steps, 0, np.array(readout, dtype=float), prefix, tokens, start, scale)
    return network.flows() / scale


def attended(block, rows):
    return Attended(block, torch.tensor([rows], dtype=torch.float64))


def stage(block, group, weight, n_out, fused=False):
    return Stage(block, torch.tensor([group]), torch.tensor([weight], dtype=torch.float64), n_out, fused)


# --------------------------------------------------------------------- the definition once more, as the smallest cut


def layers(record, start=0):
    """Capacities [n_above, n_below] from the head down to the input tokens, the readout as a first row."""
    found = [record.readout[None]]
    for half in reversed(record.halves):
        if half.kind == "reduce":
            found.append(half.matrix)
        elif half.kind == "attention" and half.block >= start:
            fused = half.matrix.mean(0)
            found.append(0.5 * fused + 0.5 * torch.eye(len(fused), dtype=fused.dtype))
    return [m.detach().double().numpy() for m in found]


def smallest_cut(capacities, sink):
    """Minimum over every choice of the nodes on the source's side, layer by layer: exact, exponential in the tokens.

    A cut is one subset a layer; its cost adds up between neighbours, so the best one is found from the top down.
    """
    best = {(True,): 0.0}
    for i, matrix in enumerate(capacities):
        width = matrix.shape[1]
        if i == len(capacities) - 1:  # no other input token leads anywhere: it takes the cheaper side, the source's
            below = [tuple(j != sink for j in range(width))]
        else:
            below = [tuple(j in s for j in range(width)) for s in subsets(range(width))]
        best = {
            b: min(cost + matrix[np.ix_(np.array(a), ~np.array(b))].sum() for a, cost in best.items()) for b in below
        }
    return min(best.values())


def subsets(items):
    items = list(items)
    return chain.from_iterable(combinations(items, r) for r in range(len(items) + 1))


def cuts(capacities):
    return [smallest_cut(capacities, j) for j in range(capacities[-1].shape[1])]


def test_smallest_cut_of_a_case_done_by_pencil():
    # 0.5 A + 0.5 I of A = [[0, 1], [0, 1]]: the class token passes 1/2 to itself and 1/2 on, the patch keeps 1.
    matrix = np.array([[0.5, 0.5], [0.0, 1.0]])
    assert cuts([np.array([[1.0, 0.0]]), matrix]) == [0.5, 0.5]
    assert cuts([np.array([[1.0, 0.0]]), matrix, matrix]) == [0.25 + 0.25, 0.5 + 0.5]


# ------------------------------------------------------------------------------------------------------ hand examples


def test_three_tokens_and_two_blocks():
    first = attended(0, [[1 / 2, 1 / 4, 1 / 4], [0, 1, 0], [1 / 2, 0, 1 / 2]])
    second = attended(1, [[0.2, 0.6, 0.2], [0.3, 0.3, 0.4], [0.1, 0.1, 0.8]])
    # M_1's class row sends at most (0.6, 0.3, 0.1) to the second layer; M_0's columns take at most (3/4, 0, 1/4),
    # (1/8, 1, 0) and (1/8, 0, 3/4) of it: the flows are the sums of the smaller ones.
    wanted = [0.6 + 0.1, 0.125 + 0.3, 0.125 + 0.1]
    found = solve([first, second], [1, 0, 0], 1, 3)
    assert np.abs(found - wanted).max() < 3 / SCALE
    eye = np.eye(3)
    matrices = [0.5 * s.attention[0].numpy() + 0.5 * eye for s in (second, first)]
    assert np.abs(found - cuts([np.array([[1.0, 0, 0]]), *matrices])).max() < 3 / SCALE


def test_one_token_leaves():
    first = attended(0, [[1 / 2, 1 / 4, 1 / 4], [0, 1, 0], [1 / 2, 0, 1 / 2]])
    second = attended(1, [[1 / 2, 1 / 2], [1 / 4, 3 / 4]])
    # The class row sends (3/4, 1/4) to the tokens that are left; the patch that left gets what the class token takes.
    found = solve([first, stage(1, [0, -1], [1.0, 0.0], 1), second], [1, 0], 1, 3)
    assert np.abs(found - [3 / 4, 1 / 8 + 1 / 4, 1 / 8]).max() < 3 / SCALE


def test_two_tokens_are_fused():
    first = attended(0, np.eye(4).tolist())
    second = attended(1, [[0, 1 / 2, 1 / 2], [1, 0, 0], [0, 0, 1]])
    fuse = stage(0, [0, 1, 1], [1.0, 1 / 8, 7 / 8], 2, True)
    # A quarter reaches the fused token, whose edges to its members are 1/8 and 7/8 wide: a flow may use either fully.
    assert np.abs(solve([first, fuse, second], [1, 0, 0], 1, 4) - [1 / 2, 1 / 4, 1 / 8, 1 / 4]).max() < 3 / SCALE


def test_direction_is_from_query_to_key():
    # Only the patch looks at the class token, so nothing flows from the class token to it.
    assert solve([attended(0, [[1, 0], [1, 0]])], [1, 0], 1, 2).tolist() == [1, 0]


def test_small_networks_with_random_capacities():
    rng = np.random.default_rng(0)
    for case in range(12):
        n, depth = (3, 4) if case % 2 else (5, 3)
        maps = [rng.dirichlet(np.full(n, 0.4), n) for _ in range(depth)]
        readout = np.eye(n)[0] if case % 3 else np.array([0.5, 0.5] + [0.0] * (n - 2))
        found = solve([attended(i, a.tolist()) for i, a in enumerate(maps)], readout, 1, n)
        wanted = cuts([readout[None], *(0.5 * a + 0.5 * np.eye(n) for a in reversed(maps))])
        assert np.abs(found - wanted).max() < n * n / SCALE


def test_a_part_that_meets_the_bound_gives_the_same_flows(monkeypatch):
    rng = np.random.default_rng(1)
    steps = [attended(i, rng.dirichlet(np.full(60, 0.3), 60).tolist()) for i in range(5)]
    solved = []
    whole = module.Network._solve

    def counted(self, chosen, sinks):
        solved.append((int(chosen.sum()), len(sinks)))
        return whole(self, chosen, sinks)

    monkeypatch.setattr(module.Network, "_solve", counted)
    monkeypatch.setattr(module, "WORTH", 10**9)
    every = solve(steps, np.eye(60)[0], 1, 60)
    monkeypatch.setattr(module, "WORTH", 1)
    for strongest in (2, 8, 16):  # none, some or most of the sinks are settled early
        monkeypatch.setattr(module, "STRONGEST", strongest)
        assert (solve(steps, np.eye(60)[0], 1, 60) == every).all()
    (_, first), *rest = solved
    assert first == 60
    assert len(rest) == 6
    assert min(left for _, left in rest) < 60


# ------------------------------------------------------------------------------------------------- models, every bound


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class"])
@pytest.mark.parametrize("start", [0, 2, 3])
def test_between_rollout_and_the_bound(family, start):
    model = tiny(family).double()
    x = images_for(model, 2)
    e = explain(model, x, start_layer=start)
    rolled = prunex.explain("rollout", model, x, start_layer=start)
    assert (e.raw >= rolled.raw - ROUNDING).all()
    assert (e.raw <= 1).all()
    for image, row in zip(x, e.raw, strict=True):
        first = next(h for h in definitions.opened(model, image, 0).halves if h.block == start and h.kind[0] == "a")
        columns = 0.5 * first.matrix.mean(0).sum(0) + 0.5
        assert (row <= columns + ROUNDING).all()


def test_not_everything_sits_at_the_bound():
    # Else the tests above would hold for the bound itself.
    model = tiny().double()
    x = images(1, dtype=torch.float64)
    columns = 0.5 * definitions.opened(model, x[0], 0).halves[0].matrix.mean(0).sum(0) + 0.5
    gap = columns.clamp(max=1) - explain(model, x).raw[0]
    assert 1e-2 < gap.max() < 0.5


@pytest.mark.parametrize(
    ("family", "prune"),
    [("vit", None), ("avg_pool", None), ("vit", ("topk", 0.6, (1,))), ("vit", ("evit", 0.6, (1,)))],
)
def test_small_models_against_the_smallest_cut(family, prune):
    model = tiny(family, img_size=16, depth=3).double()  # 4 patches
    x = images(2, (16, 16), dtype=torch.float64)
    if prune:
        with prunex.attach(model, prune[0], keep_ratio=prune[1], stages=prune[2]):
            raw = explain(model, x).raw
    else:
        raw = explain(model, x).raw
    for image, row in zip(x, raw, strict=True):
        wanted = cuts(layers(definitions.opened(model, image, 0, prune)))
        assert np.abs(row.numpy() - wanted).max() < 25 / SCALE


def test_dynamicvit_against_the_smallest_cut():
    model = tiny(img_size=16, depth=3).double()
    x = images(2, (16, 16), dtype=torch.float64)
    with prunex.attach(model, "dynamicvit", keep_ratio=0.5, stages=(1,)) as pruning:
        randomise(pruning.pruner)
        e = explain(model, x)
    for image, row, kept in zip(x, e.raw, e.trace.kept().flatten(1), strict=True):
        record = definitions.opened(model, image, 0, ("given", {1: kept.nonzero().flatten().tolist()}))
        assert np.abs(row.numpy() - cuts(layers(record))).max() < 25 / SCALE


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "avg_pool_no_class"])
def test_identity_attention_leaves_the_readout(monkeypatch, family):
    monkeypatch.setattr(
        attention, "matrix", lambda q, k, *_: torch.eye(k.shape[2])[: q.shape[2]].expand(*q.shape[:2], -1, -1)
    )
    monkeypatch.setattr(surroundings.Call, "check", lambda *_: None)  # this is another model, and meant to be
    e = explain(tiny(family), images())
    wanted = {"vit": [1] + [0] * 16, "deit_distilled": [0.5, 0.5] + [0] * 16, "avg_pool_no_class": [1 / 16] * 16}
    assert largest(e.raw, torch.tensor(wanted[family]).expand(3, -1)) < 1e-6
    assert torch.isfinite(e.maps).all()


def test_one_block_is_rollout():
    model = tiny(depth=1)
    x = images()
    assert largest(explain(model, x).raw, prunex.explain("rollout", model, x).raw) < 1 / SCALE


def test_scale_does_not_matter():
    model = tiny()
    x = images()
    coarse, fine, finest = (explain(model, x, scale=s).raw for s in (100_000, 10_000_000, 1_000_000_000))
    assert largest(coarse, fine) < 17 / 100_000
    assert largest(fine, finest) < 17 / 10_000_000


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "avg_pool_no_class"])
def test_maps_are_the_flows_over_their_sum(family):
    model = tiny(family)
    e = explain(model, images())
    prefix = model.num_prefix_tokens
    assert e.maps.shape == (3, 4, 4)
    assert e.raw.shape == (3, prefix + 16)
    assert e.maps.dtype == e.raw.dtype == torch.float32
    assert largest(e.maps.flatten(1), e.raw[:, prefix:] / e.raw.sum(1, keepdim=True)) < 1e-7


def test_class_does_not_matter():
    model = tiny()
    a, b = (prunex.explain("attention_flow", model, images(), t) for t in (0, 3))
    assert a.maps.equal(b.maps)
    assert (a.target == 0).all()


def test_half_precision_and_inference_mode():
    model, x = tiny().bfloat16(), images(dtype=torch.bfloat16)
    with torch.inference_mode():
        e = explain(model, x)
    assert e.maps.dtype == torch.float32
    assert e.maps.equal(explain(model, x).maps)
    assert largest(e.raw, explain(tiny(), images()).raw) < 0.05


# ------------------------------------------------------------------------------------------------------ pruned, batched


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "avg_pool_no_class"])
@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
@pytest.mark.parametrize("stages", [(0, 2), (1, 3)])
def test_masked_equals_removed_and_one_equals_many(family, pruner, stages):
    model = tiny(family).double()
    x = images_for(model)
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=stages) as pruning:
        randomise(pruning.pruner)
        removed = explain(model, x)
        pruning.masked = True
        masked = explain(model, x)
        pruning.masked = None
        singles = [explain(model, x[i : i + 1]) for i in range(3)]
        late = explain(model, x, start_layer=3)
        rolled = prunex.explain("rollout", model, x)
        late_rolled = prunex.explain("rollout", model, x, start_layer=3)
    assert relative(masked.raw, removed.raw) < 1e-12
    assert relative(masked.maps, removed.maps) < 1e-12
    assert relative(torch.cat([s.maps for s in singles]), removed.maps) < 1e-12
    assert (removed.raw >= rolled.raw - ROUNDING).all()
    assert (late.raw >= late_rolled.raw - ROUNDING).all()
    assert ((late_rolled.raw > 1e-9) | (late.raw == 0)).all()  # flow goes only where a way leads


@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
def test_masked_equals_removed_in_single_precision(pruner):
    model = tiny()
    with prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        removed = explain(model, images())
        pruning.masked = True
        assert relative(explain(model, images()).raw, removed.raw) < 2e-5


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "avg_pool_no_class"])
@pytest.mark.parametrize("pruner", ["topk", "evit", "dynamicvit"])
@pytest.mark.parametrize("masked", [None, True])
def test_keep_ratio_one_is_the_dense_flow_exactly(family, pruner, masked):
    model = tiny(family)
    x = images_for(model)
    dense = explain(model, x)
    with prunex.attach(model, pruner, keep_ratio=1.0, stages=(1, 2)) as pruning:
        pruning.masked = masked
        assert explain(model, x).raw.equal(dense.raw)


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "avg_pool_no_class", "not_square"])
def test_dense_batch_equals_singles(family):
    model = tiny(family)
    x = images_for(model)
    batch = explain(model, x)
    for i in range(3):
        assert relative(explain(model, x[i : i + 1]).maps, batch.maps[i : i + 1]) < 2e-6


def test_a_removed_patch_keeps_what_the_others_took():
    model = tiny()
    with prunex.attach(model, "topk", keep_ratio=0.5, stages=(2,)):
        e = explain(model, images())
    assert (e.maps[~e.trace.kept()] > 0).all()


def test_attention_that_is_not_finite_gives_nan_for_that_image_alone(monkeypatch):
    model, x = tiny(), images()
    wanted = explain(model, x)
    found = attention.matrix

    def broken(*args):
        whole = found(*args).clone()
        whole[1] = float("nan")
        return whole

    monkeypatch.setattr(attention, "matrix", broken)
    e = explain(model, x)
    assert e.maps[1].isnan().all()
    assert e.raw[1].isnan().all()
    assert not e.maps[2].isnan().any()
    assert e.raw[0].equal(wanted.raw[0])


# ------------------------------------------------------------------------------------------------ what it says, refuses


def test_says_how_many_patches_sit_at_the_bound(caplog):
    with caplog.at_level(logging.INFO, "prunex"):
        explain(tiny(), images())
        explain(tiny("avg_pool", depth=6), images())
    some, all_of_them = caplog.records
    assert some.levelno == logging.INFO
    assert 0 < float(some.getMessage().split()[1]) < 100
    assert all_of_them.levelno == logging.WARNING
    assert "100 % of the patches" in all_of_them.getMessage()
    assert "use rollout" in all_of_them.getMessage()


def test_the_warning_is_true():
    model = tiny("avg_pool", depth=6).double()
    x = images(1, dtype=torch.float64)
    first = definitions.opened(model, x[0], 0).halves[0].matrix.mean(0)
    bound = (0.5 * first.sum(0) + 0.5).clamp(max=1)
    assert largest(explain(model, x).raw[0, 1:], bound[1:]) < ROUNDING


def test_too_many_tokens_are_refused_with_the_cost():
    model = tiny(img_size=80)
    with pytest.raises(PrunexError) as error:
        explain(model, images(1, (80, 80)))
    said = str(error.value)
    for part in ("101 tokens", "max_tokens=65", "seconds an image", "allow it with max_tokens=101", "use rollout"):
        assert part in said
    assert explain(model, images(1, (80, 80)), max_tokens=101).maps.shape == (1, 10, 10)


def test_tokens_of_a_dynamic_model_are_counted_from_its_images():
    model = tiny("dynamic")
    assert explain(model, images(1, (32, 56)), max_tokens=29).maps.shape == (1, 4, 7)
    with pytest.raises(PrunexError, match="29 tokens are more than max_tokens=28"):
        explain(model, images(1, (32, 56)), max_tokens=28)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": 999}, r"scale=999 is not allowed: give a whole number in 1000\.\.1000000000"),
        ({"scale": 2 * 10**9}, "give a whole number in"),
        ({"scale": 1e6}, "scale=1000000.0"),
        ({"scale": True}, "scale=True"),
        ({"max_tokens": 0}, "max_tokens=0 is not allowed: give a whole number of at least 1"),
        ({"max_tokens": None}, "max_tokens=None"),
        ({"start_layer": 4}, r"0\.\.3"),
        ({"start_layer": 1.0}, r"0\.\.3"),
        ({"layer": 1}, "start_layer"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(PrunexError, match=says):
        explain(tiny(), images(), **options)
