"""The rules on maps alone: by hand, against a slow rewrite of the paper's equations, and what must hold of any maps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunex import PrunexError
from prunex.multimodal.rules import (
    Attended,
    Rules,
    between,
    by_role,
    grad_cam,
    last,
    over_heads,
    propagate,
    rollout,
)

SIZES = {"t": 4, "i": 3, "q": 2}
LXMERT = ("tt", "ii", ("ti", "it"), "tt", "ii", ("ti", "it"), "tt", "ii", "ti", "tt")
DETR = ("ii", "ii", "qq", "qi", "qq", "qi", "qq", "qi")
ORDERS = {
    "lxmert": (LXMERT, ("ti", "it")),
    "detr": (DETR, ("qi",)),
    "one stream": (("tt", "tt", "tt"), ()),
    "apart": (("tt", "ii", "tt"), ()),
}
VARIANTS = [
    Rules(literal, normalise, self_terms, accumulate)
    for literal in (False, True)
    for normalise in (True, False)
    for self_terms in (True, False)
    for accumulate in (True, False)
]


def plain(role, rows):
    """A map of one sample and one head whose eq. 5 is the map itself."""
    attention = torch.tensor(rows, dtype=torch.float64)[None, None]
    return Attended(role, attention, torch.ones_like(attention))


def drawn(order, seed=0, batch=2, heads=3, least=None):
    """Random maps in an order; with ``least`` every entry of eq. 5 is at least that, so that no row is zero."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for step in order:
        group = []
        for role in (step,) if isinstance(step, str) else step:
            shape = (batch, heads, SIZES[role[0]], SIZES[role[1]])
            attention = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)
            gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
            gradient = gradient if least is None else gradient.abs() + least / attention
            group.append(Attended(role, attention, gradient))
        groups.append(group)
    return groups


def slow(groups, crossed, rules):
    """The equations, sample by sample in NumPy, as the paper writes them."""
    first = groups[0][0].attention
    answers = []
    for sample in range(len(first)):
        streams = {role[k] for group in groups for m in group for role in [m.role] for k in (0, 1)}
        r = {2 * s: np.eye(SIZES[s]) for s in streams}
        r |= {role: np.zeros((SIZES[role[0]], SIZES[role[1]])) for role in crossed}

        def bar(m, sample=sample):
            heads = [
                np.maximum((a * g).numpy(), 0) for a, g in zip(m.attention[sample], m.gradient[sample], strict=True)
            ]
            return sum(heads) / len(heads)

        def normal(matrix):
            if not rules.normalise:
                return matrix
            eye = np.eye(len(matrix))
            with np.errstate(all="ignore"):
                quotient = (matrix - eye) / (matrix - eye).sum(1, keepdims=True)
            return (quotient if rules.literal else np.nan_to_num(quotient, nan=0.0)) + eye

        for group in groups:
            new = {}
            for m in group:
                s, q = m.role
                if s == q:
                    new |= {role: bar(m) @ r[role] for role in r if role[0] == s}
                    continue
                added = normal(r[s + s]).T @ bar(m) @ normal(r[q + q]) if rules.self_terms else bar(m)
                new[s + q] = added if np.isfinite(added).all() else np.zeros_like(added)
                if q + s in r:
                    new[s + s] = bar(m) @ r[q + s]
            for role, added in new.items():
                r[role] = r[role] + added if rules.accumulate else added
        answers.append(r)
    return {f"R_{role}": torch.tensor(np.stack([r[role] for r in answers])) for role in answers[0]}


def test_two_text_and_two_image_tokens_by_hand():
    text, image = plain("tt", [[1, 0], [2, 1]]), plain("ii", [[0, 3], [1, 0]])
    cross = [plain("ti", [[1, 0], [0, 2]]), plain("it", [[0, 1], [1, 0]])]
    thirds = {
        name: 3 * m[0] for name, m in propagate([[text], [image], cross], ("ti", "it"), Rules()).matrices().items()
    }
    # N(R_tt) = [[2, 0], [2/3, 4/3]], N(R_ii) = [[1, 1], [1, 1]]; R_ti and R_it were 0, so eq. 11 adds nothing.
    assert thirds["R_tt"].tolist() == [[6, 0], [6, 6]]
    assert thirds["R_ii"].tolist() == [[3, 9], [3, 3]]
    torch.testing.assert_close(thirds["R_ti"], torch.tensor([[10.0, 10], [8, 8]]).double())
    torch.testing.assert_close(thirds["R_it"], torch.tensor([[8.0, 4], [8, 4]]).double())
    # A second cross layer from the state at its entry, then one more self step of text.
    matrices = propagate([[text], [image], cross, cross, [text]], ("ti", "it"), Rules()).matrices()
    thirds = {name: 3 * m[0] for name, m in matrices.items()}
    torch.testing.assert_close(thirds["R_tt"], torch.tensor([[28.0, 8], [72, 36]]).double())
    torch.testing.assert_close(thirds["R_ti"], torch.tensor([[40.0, 40], [72, 72]]).double())
    torch.testing.assert_close(thirds["R_ii"], torch.tensor([[11.0, 17], [13, 13]]).double())
    torch.testing.assert_close(thirds["R_it"], torch.tensor([[16.0, 8], [16, 8]]).double())


def test_heads_are_multiplied_then_clamped_then_averaged():
    attention = torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)
    assert over_heads(Attended("tt", attention, torch.tensor([2.0, -8.0]).view(1, 2, 1, 1))).item() == 0.5


@pytest.mark.parametrize("rules", VARIANTS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_equations_written_slowly(order, rules):
    order, crossed = ORDERS[order]
    for seed in range(3):
        groups = drawn(order, seed)
        matrices, want = propagate(groups, crossed, rules).matrices(), slow(groups, crossed, rules)
        assert matrices.keys() == want.keys()
        for name, matrix in matrices.items():
            torch.testing.assert_close(matrix, want[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("order", ORDERS)
def test_safe_is_literal_where_no_row_is_zero(order):
    order, crossed = ORDERS[order]
    groups = drawn(order, least=1e-3)
    safe, literal = propagate(groups, crossed, Rules()), propagate(groups, crossed, Rules(literal=True))
    assert not any(lost.any() for lost in literal.dropped)
    for name, matrix in safe.matrices().items():
        torch.testing.assert_close(matrix, literal.matrices()[name], rtol=1e-7, atol=0)


def test_a_zero_row_drops_a_layer_literally_in_its_sample_alone_and_costs_nothing_safely():
    groups = drawn(("ii", "qq", "qi", "qq", "qi"), least=1e-3)
    groups[1][0].gradient[0, :, 1] = -1  # of the first sample, no head lets query 1 rest on anything
    literal = propagate(groups, ("qi",), Rules(literal=True))
    assert [lost.tolist() for lost in literal.dropped] == [[True, False], [False, False]]
    safe = propagate(groups, ("qi",), Rules())
    assert safe.dropped == []
    for name, matrix in safe.matrices().items():
        assert matrix.isfinite().all()
        torch.testing.assert_close(matrix[1], literal.matrices()[name][1])
    # The paper's equations with that row of the normalised matrix at the identity's.
    want = slow(groups, ("qi",), Rules())
    torch.testing.assert_close(safe.matrices()["R_qi"], want["R_qi"])
    assert (safe.matrices()["R_qi"][0] > literal.matrices()["R_qi"][0]).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), zeros=st.floats(0, 1), order=st.sampled_from(sorted(ORDERS)))
def test_safe_relevance_is_finite_and_never_negative(seed, zeros, order):
    order, crossed = ORDERS[order]
    groups = drawn(order, seed)
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        for m in group:
            m.gradient[torch.rand(m.gradient.shape, generator=generator) < zeros] = 0
    for matrix in propagate(groups, crossed, Rules()).matrices().values():
        assert matrix.isfinite().all()
        assert (matrix >= 0).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(3)))
def test_image_tokens_in_another_order_are_the_same_map_in_that_order(seed, order):
    groups = drawn(LXMERT, seed)

    def moved(m):
        pair = [m.attention, m.gradient]
        for axis, stream in ((2, m.role[0]), (3, m.role[1])):
            if stream == "i":
                pair = [values.index_select(axis, torch.tensor(order)) for values in pair]
        return Attended(m.role, *pair)

    before = propagate(groups, ("ti", "it"), Rules()).matrices()
    after = propagate([[moved(m) for m in group] for group in groups], ("ti", "it"), Rules()).matrices()
    torch.testing.assert_close(after["R_ti"], before["R_ti"][:, :, order])
    torch.testing.assert_close(after["R_ii"], before["R_ii"][:, order][:, :, order])
    torch.testing.assert_close(after["R_tt"], before["R_tt"])


@pytest.mark.parametrize("rules", [Rules(), Rules(literal=True)], ids=str)
def test_samples_do_not_touch_each_other(rules):
    groups = drawn(LXMERT, batch=3)
    together = propagate(groups, ("ti", "it"), rules).matrices()
    for sample in range(3):
        cut = slice(sample, sample + 1)
        alone = [[Attended(m.role, m.attention[cut], m.gradient[cut]) for m in group] for group in groups]
        for name, matrix in propagate(alone, ("ti", "it"), rules).matrices().items():
            torch.testing.assert_close(matrix, together[name][cut])


def test_small_relevance_keeps_its_digits_in_single_precision():
    """R - I of numbers that 1 + x swallows is normalised like any other."""
    small = [[1e-9, 3e-9], [2e-9, 2e-9]]
    groups = [[plain("tt", small)], [plain("ii", small)], [plain("ti", [[1, 2], [3, 4]])]]
    single = [[Attended(m.role, m.attention.float(), m.gradient.float()) for m in group] for group in groups]
    want, got = (propagate(each, ("ti",), Rules()).matrices()["R_ti"] for each in (groups, single))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_streams_that_never_meet_may_differ_in_their_number_of_samples():
    text, image = drawn(("tt", "tt"), batch=5), drawn(("ii",), batch=2)
    matrices = propagate([*text, *image], (), Rules()).matrices()
    assert matrices["R_tt"].shape == (5, 4, 4)
    torch.testing.assert_close(matrices["R_tt"], propagate(text, (), Rules()).matrices()["R_tt"])
    torch.testing.assert_close(matrices["R_ii"], propagate(image, (), Rules()).matrices()["R_ii"])


def test_rollout_by_hand_and_its_rows_sum_to_one():
    maps = [plain("tt", [[0.5, 0.5], [0, 1]]), plain("tt", [[1, 0], [1, 0]])]
    # Factors (A + I) / 2: [[.75, .25], [0, 1]], then [[1, 0], [.5, .5]] on its left.
    assert torch.as_tensor(rollout(maps))[0].tolist() == [[0.75, 0.25], [0.375, 0.625]]
    assert torch.as_tensor(rollout(maps, normalise=False))[0].tolist() == [[3, 1], [1.5, 2.5]]
    random = [m for group in drawn(("tt",) * 4) for m in group]
    torch.testing.assert_close(torch.as_tensor(rollout(random)).sum(-1), torch.ones(2, 4).double())
    assert rollout([]) is None


def test_between_is_the_cross_map_where_streams_do_nothing():
    left, mix, right = torch.rand(2, 3, 3), torch.rand(2, 3, 4), torch.rand(2, 4, 4)
    assert torch.equal(between(None, mix, None), mix)
    torch.testing.assert_close(between(left, mix, right), torch.einsum("bki,bkj,bjl->bil", left, mix, right))


def test_grad_cam_weighs_heads_by_their_mean_gradient():
    attention = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).view(1, 2, 1, 2)  # two heads, one query, two keys
    gradient = torch.tensor([[1.0, 3.0], [-6.0, 2.0]]).view(1, 2, 1, 2)  # means 2 and -2
    assert grad_cam(Attended("qi", attention, gradient)).flatten().tolist() == [0.0, 0.5]


@pytest.mark.parametrize("rule", [over_heads, grad_cam])
def test_a_map_to_which_no_score_was_led_back_is_named(rule):
    with pytest.raises(PrunexError, match="the qi map decoder.0.cross has no gradient"):
        rule(Attended("qi", torch.ones(1, 2, 1, 2), path="decoder.0.cross"))


def test_maps_by_role_keep_their_order():
    maps = [m for group in drawn(DETR) for m in group]
    roles = by_role(maps)
    assert {role: len(each) for role, each in roles.items()} == {"ii": 2, "qq": 3, "qi": 3}
    assert last(maps, "qi") is roles["qi"][-1]
    assert roles["qq"][0] is maps[2]
