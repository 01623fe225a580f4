"""The core that the propagation methods share: the walk, the lift, and what it never does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prunex
from prunex.relevance.walk import propagate, times
from prunex.vit.tape import Attended, Fed, Tape
from prunex.vit.trace import Stage
from tests.explainers import definitions
from tests.vits import images, largest, randomise, relative, tiny


def as_matrix(stage, prefix):
    """S of a stage, [B, prefix + n_out, prefix + n_in]."""
    b, n = stage.group.shape
    s = torch.zeros(b, prefix + stage.n_out, prefix + n, dtype=stage.weight.dtype)
    s[:, range(prefix), range(prefix)] = 1
    for i in range(b):
        for j in range(n):
            if stage.group[i, j] >= 0:
                s[i, prefix + stage.group[i, j], prefix + j] = stage.weight[i, j]
    return s


@pytest.fixture
def stages():
    """Stages of an EViT forward, removed and masked, in float64."""
    model = tiny("dinov2_reg").double()
    with prunex.attach(model, "evit", keep_ratio=0.6, stages=(0, 2)) as pruning:
        found = []
        for masked in (None, True):
            pruning.masked = masked
            found += prunex.explain("raw_attention", model, images(dtype=torch.float64)).trace.stages
    return found


def test_lift_equals_the_product_with_s(stages):
    for stage in stages:
        s = as_matrix(stage, 5)
        row = torch.rand(3, 5 + stage.n_out, dtype=torch.float64)
        assert largest(stage.lift(row, 5), torch.einsum("bn,bnm->bm", row, s)) < 1e-14
        rows = torch.rand(3, 4, 5 + stage.n_out, dtype=torch.float64)
        assert stage.lift(rows, 5).shape == (3, 4, 5 + stage.group.shape[1])
        assert largest(stage.lift(rows, 5), rows @ s) < 1e-14


def test_lift_of_several_rows_equals_each_alone(stages):
    for stage in stages:
        rows = torch.rand(3, 4, 5 + stage.n_out, dtype=torch.float64)
        each = torch.stack([stage.lift(rows[:, r], 5) for r in range(4)], 1)
        assert stage.lift(rows, 5).equal(each)


def test_lift_keeps_sums_where_tokens_are(stages):
    for stage in stages[:2]:
        row = torch.rand(3, 5 + stage.n_out, dtype=torch.float64)
        assert largest(stage.lift(row, 5).sum(1), row.sum(1)) < 1e-12


def test_walk_is_the_product_in_order():
    generator = torch.Generator().manual_seed(3)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    group = torch.tensor([[0, -1, 1, 2], [0, 1, 2, 2]])
    weight = torch.tensor([[1, 0, 1, 1], [1, 1, 0.3, 0.7]], dtype=torch.float64)
    steps = [
        Attended(0, rand(2, 5, 5)), Fed(0, rand(2, 5)), Stage(1, group, weight, 3), Attended(1, rand(2, 4, 4)),
        Fed(1, rand(2, 4)), Attended(2, rand(2, 4, 4)), Fed(2, rand(2, 4)),
    ]  # fmt: skip
    tape = Tape(steps=steps)
    for start in (0, 1, 2):
        whole = torch.eye(5, dtype=torch.float64).expand(2, -1, -1)
        for step in steps:
            if isinstance(step, Stage):
                whole = as_matrix(step, 1) @ whole
            elif step.block >= start:
                whole = (step.attention if isinstance(step, Attended) else torch.diag_embed(step.before)) @ whole
        row, rows = rand(2, 4), rand(2, 3, 4)

        def mix(row, step):
            return times(row, step.attention)

        def feed(row, step):
            return row * (step.before if row.ndim == 2 else step.before[:, None])

        assert relative(propagate(tape, row, 1, mix, feed, start), torch.einsum("bn,bnm->bm", row, whole)) < 1e-12
        assert relative(propagate(tape, rows, 1, mix, feed, start), rows @ whole) < 1e-12


class Squares(TorchDispatchMode):
    """Notes every product of two matrices that are both n x n, for the given n."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul")

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.found = sizes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.PRODUCTS:
            shapes = [tuple(t.shape[-2:]) for t in args if isinstance(t, torch.Tensor)]
            if sum(s in {(n, n) for n in self.sizes} for s in shapes) > 1:
                self.found.append((func, shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pruner", [None, "evit"])
@pytest.mark.parametrize("method", ["raw_attention", "rollout", "generic_attention", "tokentm"])
def test_no_n_by_n_times_n_by_n(method, pruner):
    model = tiny(img_size=40)  # 25 patches: token counts that are no width or head size of the model
    sizes = {26}
    if pruner:
        pruning = prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2))
        sizes |= {1 + n for n in pruning.counts()}
        assert not sizes & {48, 16, 3, 5}
    with Squares(sizes) as squares:
        prunex.explain(method, model, images(2, (40, 40)))
    assert squares.found == []


def test_the_detector_finds_the_whole_matrix():
    with Squares({26}) as squares:
        prunex.explain("generic_attention", tiny(img_size=40), images(2, (40, 40)), full=True)
    assert len(squares.found) == 4


@pytest.mark.parametrize("masked", [None, True])
def test_dynamicvit_equals_explicit_matrices(masked):
    model = tiny().double()
    x = images(dtype=torch.float64)
    targets = torch.tensor([4, 0, 2])
    with prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 2)) as pruning:
        randomise(pruning.pruner)
        rolled = prunex.explain("rollout", model, x)
        kept = [rolled.trace.kept(s).flatten(1) for s in (0, 1)]
        assert not kept[0][0].equal(kept[0][1])  # images differ in what they keep
        pruning.masked = masked
        rolled = prunex.explain("rollout", model, x)
        generic = prunex.explain("generic_attention", model, x, targets)
        token = prunex.explain("tokentm", model, x, targets)
    for i, image in enumerate(x):
        first = kept[0][i].nonzero().flatten().tolist()
        second = [first.index(j) for j in kept[1][i].nonzero().flatten().tolist()]
        record = definitions.opened(model, image, targets[i], ("given", {1: first, 2: second}))
        assert relative(rolled.raw[i], definitions.rollout(record)[0]) < 1e-12
        assert relative(generic.raw[i], definitions.generic_attention(record)[0]) < 1e-12
        assert relative(token.raw[i], definitions.tokentm(model, record)[0]) < 1e-7
