"""One budget for tokens and units together."""

import math

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from prunex.split import search_split
from tests.units.units import batches, swin
from tests.vits import assert_same_state, state_of, tiny

SHARES = (0.0, 0.5, 1.0)


def larger():
    """A grid of 8 x 8, so that whole tokens come near a budget."""
    return tiny(patch_size=4)


@pytest.mark.parametrize(
    ("units", "labels"), [("magnitude", False), ("taylor", True), ("taylor", False), ("relevance", True)]
)
def test_each_row_is_what_attaching_by_hand_gives(units, labels):
    model, data = larger(), batches(2, 4, labels=labels)
    found = search_split(model, "evit", units, 0.6, data, SHARES, token_options={"stages": (1, 2)})
    assert (found.labels, found.images) == (labels, 8)
    dense = prunex.cost(model).macs
    assert found.dense_macs == dense
    losses = []
    for row in found.rows:
        hand = larger()
        if row.tokens > 0:
            prunex.attach(hand, **row.token_pruning)
            tokens = prunex.cost(hand).macs / dense
            assert abs(tokens - (1 - 0.4 * row.tokens)) < 0.015
        if row.tokens < 1:
            gated = prunex.attach(hand, **row.unit_pruning)
            widths = gated.calibrate(data)
            heads = sum(len(widths.heads.get(i, range(3))) for i in range(4))
            assert row.heads == heads
            assert row.channels == sum(len(widths.channels.get(i, range(192))) for i in range(4))
            assert 0.59 < row.macs / dense <= 0.6
        else:
            assert (row.heads, row.channels, row.unit_pruning) == (12, 768, None)
            assert abs(row.macs / dense - 0.6) < 0.01
        assert row.macs == prunex.cost(hand).macs
        total = right = 0.0
        with torch.no_grad():
            for batch in data:
                x, y = batch if labels else (batch, None)
                logits, before = hand(x).double(), larger()(x).double()
                for i in range(4):
                    if labels:
                        total += float(F.cross_entropy(logits[i : i + 1], y[i : i + 1]))
                        right += int(logits[i].argmax()) == int(y[i])
                    else:
                        p, q = before[i].softmax(0), logits[i].softmax(0)
                        total += float((p * (p / q).log()).sum())
                        right += int(logits[i].argmax()) == int(before[i].argmax())
        assert abs(row.loss - total / 8) < 1e-5
        assert row.agreement == right / 8
        losses.append(row.loss)
    assert found.best.loss == min(losses)
    assert found.rows[0].token_pruning is None
    if not labels:
        assert found.dense_loss == 0
    assert [t["best"] for t in found.table()].count(True) == 1
    assert [t["tokens"] for t in found.table()] == list(SHARES)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_exactly_as_it_was(fail, monkeypatch):
    model = larger().train()
    model.blocks[0].eval()
    holder = torch.nn.ModuleDict({"vit": model})
    x = torch.randn(4, 3, 32, 32)
    model(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before, state = state_of(holder), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(4)), 2, shuffle=True)
    torch.set_rng_state(state)
    if fail:
        monkeypatch.setattr("prunex.split._left", lambda vit: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            search_split(holder, "evit", "taylor", 0.6, loader, SHARES)
    else:
        search_split(holder, "evit", "taylor", 0.6, loader, SHARES)
    assert_same_state(holder, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_a_budget_in_macs_is_the_same_budget():
    model, data = larger(), batches(1, 4)
    macs = prunex.cost(model).macs * 6 // 10
    one = search_split(model, "topk", "magnitude", f"{macs}MACs", data, SHARES)
    two = search_split(model, "topk", "magnitude", macs / prunex.cost(model).macs, data, SHARES)
    assert [r.loss for r in one.rows] == [r.loss for r in two.rows]
    assert [r.macs for r in one.rows] == [r.macs for r in two.rows]


def test_shares_out_of_reach_are_told_and_the_others_tried():
    """Tokens that may leave in the last block alone cannot save the whole."""
    model, data = larger(), batches(1, 4)
    options = {"token_options": {"stages": (3,)}}
    found = search_split(model, "topk", "magnitude", 0.6, data, (0, 0.2, 1), **options)
    assert [bool(r.why_not) for r in found.rows] == [False, False, True]
    assert "out of reach for topk" in found.rows[2].why_not
    assert math.isnan(found.rows[2].loss)
    assert found.best in found.rows[:2]
    assert [t["best"] for t in found.table()][2] is False
    with pytest.raises(PrunexError, match="out of reach for every share"):
        search_split(model, "topk", "magnitude", 0.05, data, (0.0, 1.0), **options)
    assert not hasattr(model, "prunex_units")
    assert not hasattr(model, "prunex")


def test_no_more_images_are_looked_at_than_asked_for():
    model, seen = larger(), []

    def endless():
        while True:
            seen.append(1)
            yield batches(1, 4)[0]

    found = search_split(model, "topk", "taylor", 0.7, endless(), (0.5,), images=6)
    assert found.images == 6
    assert len(seen) == 2


def test_tokens_that_carry_nothing_are_found_to_be_the_ones_to_prune():
    """Patches add nothing to a class token that looks at itself alone: the split gives tokens the whole saving."""
    model = larger()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
    found = search_split(model, "evit", "random", 0.6, batches(1, 8, labels=False), (0.0, 0.5, 1.0))
    assert found.best.tokens == 1
    assert found.best.loss < 1e-5 < found.rows[1].loss


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("taylor", "evit", 0.6), {}, "token_method='taylor' prunes units"),
        (("evit", "topk", 0.6), {}, "unit_method='topk' prunes tokens"),
        (("evit", "xpruner", 0.6), {}, "learns in training"),
        (("evitt", "taylor", 0.6), {}, "unknown pruner 'evitt'"),
        (("dynamicvit", "magnitude", 0.6), {}, "dynamicvit has to be trained"),
        (("patch_slimming", "magnitude", 0.6), {}, "patch_slimming has"),
        (("topk", "magnitude", 0.6), {"token_options": {"count": "adaptive"}}, "leaves open what images cost"),
        (("evit", "taylor", 0), {}, "budget=0 is not allowed"),
        (("evit", "taylor", "900GMACs"), {}, "more than the dense model costs"),
        (("evit", "taylor", 0.6), {"shares": ()}, r"shares=\(\) is not allowed"),
        (("evit", "taylor", 0.6), {"shares": 0.5}, "shares=0.5 is not allowed"),
        (("evit", "taylor", 0.6), {"shares": (0, 1.5)}, "shares=1.5 is not allowed"),
        (("evit", "taylor", 0.6), {"images": 0}, "images=0 is not allowed"),
        (("evit", "taylor", 0.6), {"token_options": {"budget": 0.5}}, "budget in token_options"),
        (("evit", "taylor", 0.6), {"unit_options": {"budget": 0.5}}, "budget in unit_options"),
        (("evit", "taylor", 0.6), {"unit_options": {"rule": "zplus"}}, "unknown option of taylor 'rule'"),
        (("evit", "taylor", 0.6), {"token_options": {"keep_ratio": 0.5}}, "both say how much is kept"),
        (("evit", "taylor", 0.6), {"batches": []}, "got no images"),
        (("evit", "taylor", 0.6), {"batches": torch.zeros(2, 3, 8, 8)}, "8 x 8 pixels"),
    ],
)
def test_mistakes_are_refused(arguments, options, message):
    model = larger()
    before = state_of(model)
    with pytest.raises(PrunexError, match=message):
        search_split(model, *arguments, **{"batches": batches(1, 2), "shares": (0.5,)} | options)
    assert_same_state(model, before)


def test_a_model_that_is_pruned_already_is_refused():
    for method in ("evit", "magnitude"):
        model = larger()
        prunex.attach(model, method)
        with pytest.raises(PrunexError, match=f"pruned already by {method}"):
            search_split(model, "evit", "magnitude", 0.6, batches(1, 2))
    with pytest.raises(PrunexError, match="SwinTransformer"):
        search_split(swin(), "evit", "magnitude", 0.6, batches(1, 2))
