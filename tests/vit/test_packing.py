"""Images of different lengths share a tensor: packed equals masked equals alone, and what repeats fits."""

import pytest
import torch

import prunex
from prunex.vit.anatomy import read
from prunex.vit.attention import matrix
from prunex.vit.decisions import Drop, Keep
from prunex.vit.embedding import embed
from prunex.vit.forward import answer, begin, encode, predict
from prunex.vit.packing import Packing
from prunex.vit.replay import Replay
from prunex.vit.turns import Turn, Turns
from tests.vits import images_for, largest, relative, tiny

SHOWN = ["vit", "dinov2_reg", "avg_pool_no_class", "max_pool", "attn_norm"]


class Scripted:
    """Drops given patches before (or inside) given blocks; answers are looked up by the patches that are left."""

    def __init__(self, present, inside=(), fuse=False):
        self.present, self.inside, self.fuse = present, inside, fuse

    def plan(self):
        return [Turn(block, "inside" if block in self.inside else "before") for block in self.present]

    def decide(self, turn, state):
        where = state.trace.tokens()  # slot of each patch
        wanted = self.present[turn.block].to(where.device)
        count = state.patches.shape[1]
        slots = torch.zeros(len(where), count + 1, dtype=torch.bool)
        slots.scatter_(1, where.masked_fill(where < 0, count), wanted & (where >= 0))
        weights = torch.full((len(where), count), 0.5, dtype=state.tokens.dtype) if self.fuse else None
        return Drop(slots[:, :count], fuse=weights)


def script(counts, seed=0, **options):
    """Nested random selections: ``counts`` {block: patches of each image}."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(next(iter(counts.values())))
    rank = torch.stack([torch.randperm(16, generator=generator) for _ in range(batch)])
    return Scripted({block: rank < torch.tensor(n)[:, None] for block, n in counts.items()}, **options)


def logits(model, x, pruner, masked=False, grid=None):
    prediction = predict(model, x, (pruner,), masked=masked)
    return prediction.logits, prediction.state


@pytest.mark.parametrize("inside", [(), (2,)])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("family", SHOWN)
def test_packed_equals_masked_equals_alone(family, fuse, inside):
    model = tiny(family).double()
    x = images_for(model, 5)
    counts = {1: (16, 9, 1, 12, 3), 2: (11, 9, 0, 2, 3)}
    with torch.no_grad():
        packed, state = logits(model, x, script(counts, inside=inside, fuse=fuse))
        masked, other = logits(model, x, script(counts, inside=inside, fuse=fuse), masked=True)
        assert largest(packed, masked) < 1e-12
        for i in range(2):
            assert state.trace.kept(i).equal(other.trace.kept(i))
            assert largest(state.trace.share(i), other.trace.share(i)) < 1e-12
            assert state.trace.stages[i].counted.equal(other.trace.stages[i].counted)
            groups = state.trace.stages[i]
            sums = torch.zeros(5, groups.n_out).scatter_add(1, groups.group.clamp(min=0), groups.weight.float())
            assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all()
        assert [r.tolist() for r in state.trace.keep_ratios()] == [[n / 16 for n in c] for c in counts.values()]
        for i in range(5):
            mine = script(counts, inside=inside, fuse=fuse)
            mine.present = {b: p[i : i + 1] for b, p in mine.present.items()}
            alone, _ = logits(model, x[i : i + 1], mine)
            assert largest(alone[0], packed[i]) < 1e-12


def test_only_tokens_that_are_there_are_computed(monkeypatch):
    model = tiny()
    rows, last = [], model.blocks[3].mlp
    plain = last.forward
    monkeypatch.setattr(last, "forward", lambda x: rows.append(x.shape) or plain(x))
    with torch.no_grad():
        _, state = logits(model, images_for(model), script({1: (16, 2, 5)}))
        assert rows == [(1, 3 + 16 + 2 + 5, 48)]
        assert state.trace.stages[0].counted.tolist() == [16, 2, 5]
        _, state = logits(model, images_for(model), script({1: (5, 5, 5)}))
        assert rows[1] == (3, 6, 48)  # equal counts are as if they were fixed
        last.register_forward_hook(lambda *_: None)
        logits(model, images_for(model), script({1: (16, 2, 5)}))
    assert rows[2][0] == 3  # hooks expect images
    assert state.policy is None


def test_nothing_left_in_any_image():
    model = tiny()
    with torch.no_grad():
        out, state = logits(model, images_for(model), script({0: (0, 0, 0), 2: (0, 0, 0)}, fuse=False))
        masked, _ = logits(model, images_for(model), script({0: (0, 0, 0), 2: (0, 0, 0)}), masked=True)
    assert torch.isfinite(out).all()
    assert largest(out, masked) < 1e-5
    assert not state.trace.kept().any()


def test_gradients_through_packed_equal_masked():
    model = tiny().double()
    x = images_for(model)
    found = []
    for masked in (False, True):
        leaf = x.clone().requires_grad_()
        out, _ = logits(model, leaf, script({1: (16, 4, 0), 2: (7, 4, 0)}), masked=masked)
        found.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert largest(*found) < 1e-10


@pytest.mark.parametrize("one_by_one", [True, False])
def test_attention_is_its_definition(one_by_one):
    generator = torch.Generator().manual_seed(0)
    policy = (torch.rand(4, 9, generator=generator) > 0.4).double()
    policy[:, 0] = 1
    packing = Packing.of(policy)
    slots = torch.randn(3, 4, 9, 2 * 5, dtype=torch.float64, generator=generator)
    q, k, v = (packing.pack(t).unflatten(2, (2, 5)).transpose(1, 2) for t in slots)
    out = packing.unpack(packing.attend(q, k, v, one_by_one).transpose(1, 2).flatten(2))
    for i in range(4):
        there = policy[i] > 0
        a, b, c = (t[i, there].unflatten(1, (2, 5)).transpose(0, 1)[None] for t in slots)
        wanted = (matrix(a, b, 5**-0.5) @ c)[0].transpose(0, 1).flatten(1)
        assert largest(out[i, there], wanted) < 1e-12
        assert (out[i, ~there] == 0).all()


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("index", [None, [2, 2, 0], [1], [3, 1, 0, 2, 3]])
def test_decisions_repeat_for_any_selection_of_images(index, masked, fuse):
    """Slots of later decisions are those of the clean batch, whatever the longest image of the selection is."""
    model = tiny("dinov2_reg").double()
    x = images_for(model, 4)
    counts = {1: (14, 3, 5, 8), 2: (2, 3, 0, 8)}
    with torch.no_grad():
        clean, state = logits(model, x, script(counts, fuse=fuse), masked=masked)
        rows = torch.arange(4) if index is None else torch.tensor(index)
        tokens, grid = embed(model, x[rows])
        again = Replay(state.decisions, None if index is None else rows)
        state = encode(begin(model, tokens, grid, read(model), masked), Turns((again,)))
        assert largest(answer(state), clean[rows]) < 1e-12


def test_a_keep_after_a_drop_hides_slots():
    """Other decisions may follow where images differ already."""
    model = tiny().double()
    x = images_for(model)

    class Both(Scripted):
        def plan(self):
            return [*super().plan(), Turn(2)]

        def decide(self, turn, state):
            if turn.block == 2:
                return Keep(torch.arange(3).expand(3, -1))
            return super().decide(turn, state)

    with torch.no_grad():
        _, state = logits(model, x, Both(script({1: (16, 2, 5)}).present))
        assert state.trace.kept(0).flatten(1).sum(1).tolist() == [16, 2, 5]
        assert state.trace.kept().flatten(1).sum(1).tolist() == [3, 2, 3]


def test_half_precision():
    model = tiny().bfloat16()
    x = images_for(model)
    with torch.no_grad():
        out, _ = logits(model, x, script({1: (16, 4, 1)}))
        wanted, _ = logits(model.float(), x.float(), script({1: (16, 4, 1)}))
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), wanted) < 0.05


def test_autocast():
    model = tiny()
    x = images_for(model)
    with torch.no_grad():
        wanted, _ = logits(model, x, script({1: (16, 4, 1)}))
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = logits(model, x, script({1: (16, 4, 1)}))
    assert relative(out.float(), wanted) < 0.05


def test_features_hold_the_longest_image():
    model = tiny()
    pruning = prunex.attach(model, "topk", count="adaptive", threshold=0.6, stages=(1, 2))
    with torch.no_grad():
        features = model.forward_features(images_for(model))
    assert features.shape[1] == 1 + max(int(s) for s in pruning.trace.stages[-1].counted)
