"""A recorded forward run again: in the same precision, with frozen or fresh decisions, with weighted keys."""

import pytest
import torch

import prunex
from prunex.vit import attention
from prunex.vit.attention import KeyWeights
from prunex.vit.recording import recording
from prunex.vit.tape import Tape
from prunex.vit.trace import Stage
from tests.vits import images, images_for, largest, randomise, relative, tiny


@pytest.mark.parametrize("pruner", [None, "topk", "evit", "dynamicvit"])
@pytest.mark.parametrize("masked", [None, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_unaltered_tokens_give_the_logits_of_the_forward(pruner, masked, frozen):
    model = tiny().double()
    if pruner:
        pruning = prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2))
        randomise(pruning.pruner)
        pruning.masked = masked
    x = images(dtype=torch.float64)
    index = torch.tensor([2, 0, 0, 1])
    with recording(model, x, None, Tape()) as recorded, torch.no_grad():
        found = recorded.again(recorded.embedded[index], index if frozen else None, frozen=frozen)
        assert relative(found, recorded.logits[index]) < 1e-12
        assert largest(recorded.embed(x), recorded.embedded) < 1e-12


def test_it_runs_in_the_callers_autocast():
    model = tiny()
    x = images()
    with recording(model, x, None, Tape()) as recorded, torch.no_grad():
        plain = recorded.logits
    with torch.autocast("cpu", torch.bfloat16), recording(model, x, None, Tape()) as recorded, torch.no_grad():
        assert relative(recorded.logits, plain) > 1e-3
        assert recorded.again(recorded.embedded).equal(recorded.again(recorded.embed(x)))
        assert relative(recorded.again(recorded.embedded), recorded.logits) < 1e-3
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("rule", ["log", "shift", "scale"])
@pytest.mark.parametrize("family", ["vit", "avg_pool"])
def test_rows_see_the_weights_of_keys(rule, family):
    # What a pruner ranks by under weighted keys is the weighted attention, with and without the matrix at hand.
    model = tiny(family).double()
    x = images_for(model)
    rows = []
    for whole in (False, True):
        tape = Tape(attention=whole, rows=frozenset({2}), head_rows=frozenset({2}))
        with recording(model, x, None, Tape()) as recorded, torch.no_grad():
            factor = torch.linspace(0.1, 2, 17, dtype=torch.float64).expand(3, -1)
            recorded.again(recorded.embedded, keys=KeyWeights(factor, rule), tape=tape)
        rows.append(tape.attended()[2])
    assert relative(rows[0].row, rows[1].row) < 1e-12
    assert relative(rows[0].head_rows.mean(1), rows[0].row) < 1e-12
    assert largest(rows[0].row.sum(1), torch.ones(3)) < 1e-12


def test_rows_of_dropped_keys_do_not_make_the_lowest_score():
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    k[:, :, 4] = -100 * q[:, :, 0]
    keys = KeyWeights(torch.full((2, 5), 0.5), "shift")
    policy = torch.ones(2, 5)
    policy[:, 4] = 0
    found = attention.rows_of_heads(q[:, :, :1], k, 0.5, policy, keys=keys)
    fewer = KeyWeights(keys.factor[:, :4], "shift")
    assert largest(found[..., :4], attention.rows_of_heads(q[:, :, :1], k[:, :, :4], 0.5, None, keys=fewer)) < 1e-6
    assert (found[..., 4] == 0).all()


def test_paint_gives_members_the_value_of_their_group():
    stage = Stage(0, torch.tensor([[0, -1, 1, 1]]), torch.tensor([[1.0, 0.0, 0.25, 0.75]]), 2, True)
    row = torch.tensor([[9.0, 5.0, 6.0]])
    assert stage.paint(row, 1).tolist() == [[9, 5, 0, 6, 6]]
    assert stage.paint(row[:, None].expand(-1, 3, -1), 1).tolist() == [[[9, 5, 0, 6, 6]] * 3]
    assert stage.lift(row, 1).equal(stage.paint(row, 1) * torch.tensor([1, 1, 0, 0.25, 0.75]))
