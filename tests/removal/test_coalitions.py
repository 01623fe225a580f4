from math import factorial

import pytest
import torch
from scipy.stats import chisquare

from prunex import PrunexError
from prunex.removal import coalitions
from prunex.removal.coalitions import kernel_shap, permutation_sampling, seeded
from tests.removal import games
from tests.vits import largest

ESTIMATORS = {
    "orders": lambda v, p, b, n, g: permutation_sampling(v, p, b, n // (p - 1), g, antithetic=False),
    "antithetic": lambda v, p, b, n, g: permutation_sampling(v, p, b, n // (p - 1) // 2 * 2, g),
    "kernel": lambda v, p, b, n, g: kernel_shap(v, p, b, n, g, paired=False),
    "paired": lambda v, p, b, n, g: kernel_shap(v, p, b, n // 2 * 2, g),
    "closed form": lambda v, p, b, n, g: kernel_shap(v, p, b, n // 2 * 2, g, closed_form=True),
}


def test_the_enumeration_itself_on_a_game_done_by_hand():
    # Left and right gloves: player 0 has a left one, 1 and 2 a right one each; a pair is worth 1.
    table = torch.zeros(8, 1)
    table[[0b011, 0b101, 0b111]] = 1
    assert largest(games.exact(table, 3)[:, 0], torch.tensor([2 / 3, 1 / 6, 1 / 6])) < 1e-7


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_converge_as_one_over_the_root_of_the_budget(name):
    game = games.toy()
    wanted = torch.stack([games.exact(t, 10) for t in game.table])
    budgets, errors = [360, 1440, 5760], []
    for budget in budgets:
        runs = [ESTIMATORS[name](game, 10, 2, budget, seeded(seed)).values for seed in range(12)]
        errors.append(float((torch.stack(runs) - wanted).pow(2).mean().sqrt()))
    slope = torch.tensor(errors).log().diff().sum() / torch.tensor(budgets).log().diff().sum()
    assert -0.65 < slope < -0.35
    assert errors[-1] < (0.1 if name == "closed form" else 0.05) * wanted.std()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_standard_errors_are_those_of_repeated_runs(name):
    game = games.toy()
    wanted = torch.stack([games.exact(t, 10) for t in game.table])
    runs = [ESTIMATORS[name](game, 10, 2, 1800, seeded(seed)) for seed in range(40)]
    found = torch.stack([r.values for r in runs]).var(0).sqrt()
    told = torch.stack([r.errors for r in runs]).pow(2).mean(0).sqrt()
    ratio = told.log().mean().exp() / found.log().mean().exp()
    assert 0.85 < ratio < 1.2
    off = torch.stack([(r.values - wanted).abs() / r.errors for r in runs])
    assert (off < 3).double().mean() > 0.95
    assert runs[0].uncertainty().shape == (2, 3)
    assert float(runs[0].uncertainty().max()) < 0.3


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("budget", [36, 90, 500])
def test_values_sum_to_what_everybody_adds(name, budget):
    game = games.toy(seed=3)
    e = ESTIMATORS[name](game, 10, 2, budget, seeded(0))
    total = game.table[:, -1] - game.table[:, 0]
    assert largest(e.values.sum(1), total) < 1e-12 * max(1, float(total.abs().max()))
    assert e.full.equal(game.table[:, -1])
    assert e.empty.equal(game.table[:, 0])
    assert e.evaluations == game.asked
    assert e.evaluations <= budget + 2


def test_additive_games_need_one_order_or_as_many_coalitions_as_players():
    weights = torch.randn(2, 12, 3, dtype=torch.float64)
    game = games.additive(weights)
    assert largest(permutation_sampling(game, 12, 2, 1, seeded(0), antithetic=False).values, weights) < 1e-12
    for paired in (True, False):
        assert largest(kernel_shap(game, 12, 2, 24, seeded(0), paired).values, weights) < 1e-10


def test_pairwise_games_need_one_antithetic_pair():
    weights = torch.randn(2, 9, 2, dtype=torch.float64)
    partners = torch.randn(2, 9, 9, 2, dtype=torch.float64)
    partners = (partners + partners.transpose(1, 2)) * (1 - torch.eye(9))[:, :, None]
    game = games.pairwise(weights, partners)
    wanted = weights + 0.5 * partners.sum(2)
    assert largest(permutation_sampling(game, 9, 2, 2, seeded(0)).values, wanted) < 1e-12
    assert largest(permutation_sampling(game, 9, 2, 2, seeded(0), antithetic=False).values, wanted) > 0.1
    several = permutation_sampling(game, 9, 2, 8, seeded(0))
    assert float(several.errors.max()) < 1e-12


@pytest.mark.parametrize("name", ESTIMATORS)
def test_who_adds_nothing_gets_nothing_and_equals_get_equal(name):
    z = games.every_coalition(8).double()
    together = z[:, 0] + z[:, 1]  # 0 and 1 are interchangeable, 7 is ignored
    table = torch.stack([torch.sin(together + z[:, 2:7] @ torch.arange(1.0, 6).double())], 1)[None]
    e = ESTIMATORS[name](games.Tabled(table), 8, 1, 4200, seeded(1))
    assert float(e.values[0, 7].abs()) <= (1e-12 if "o" in name and name != "closed form" else 4 * e.errors[0, 7])
    gap = e.values[0, 0] - e.values[0, 1]
    assert float(gap.abs()) < 3 * float((e.errors[0, 0] ** 2 + e.errors[0, 1] ** 2).sqrt())


@pytest.mark.parametrize("players", [2, 3, 10, 30])
def test_the_closed_form_matrix_is_what_draws_tend_to(players):
    z = coalitions.shapley_coalitions(20_000, players, seeded(0), paired=False).double()
    products = z[:, :, None] * z[:, None, :]
    mean, error = products.mean(0), products.std(0) / len(z) ** 0.5
    gap = (mean - coalitions.closed_form_matrix(players)).abs()
    assert bool((gap <= 4 * error + 1e-12).all())
    assert float((gap <= 3 * error + 1e-12).double().mean()) > 0.98


@pytest.mark.parametrize("paired", [False, True])
def test_sizes_are_drawn_in_proportion_to_one_over_s_times_the_rest(paired):
    players, count = 16, 40_000
    z = coalitions.shapley_coalitions(count, players, seeded(5), paired)
    sizes = z.sum(1)
    assert 1 <= int(sizes.min()) <= int(sizes.max()) <= players - 1
    # The weights of the definition: (P - 1) / (C(P, s) s (P - s)) for each of C(P, s) coalitions.
    weights = [1 / (s * (players - s)) for s in range(1, players)]
    seen = torch.bincount((sizes[::2] if paired else sizes) - 1, minlength=players - 1)
    wanted = torch.tensor(weights, dtype=torch.float64) / sum(weights) * int(seen.sum())
    assert chisquare(seen.numpy(), wanted.numpy()).pvalue > 1e-3
    if paired:
        assert bool((z[::2] ^ z[1::2]).all())
        both = torch.bincount(sizes - 1, minlength=players - 1).double() / count
        assert largest(both, torch.tensor(weights) / sum(weights)) < 0.01
    # Given its size a coalition is uniform: every player takes part equally often.
    threes = z[sizes == 3].double()
    assert largest(threes.mean(0), torch.full((players,), 3 / players)) < 5 * (0.16 / len(threes)) ** 0.5


def test_every_coalition_of_a_size_is_drawn_alike():
    z = coalitions.of_sizes(torch.full((12_000,), 2), 5, seeded(0))
    kinds = z.long() @ (2 ** torch.arange(5))
    counts = kinds.bincount()[kinds.unique()]
    assert len(counts) == factorial(5) // factorial(2) // factorial(3)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_sizes_of_uniform_coalitions_are_uniform():
    z = coalitions.uniform_coalitions(40_000, 9, seeded(2))
    assert chisquare(z.sum(1).bincount(minlength=10).numpy()).pvalue > 1e-3


def test_orders_are_uniform_and_antithetic_ones_are_reversed():
    ranks = coalitions.permutation_ranks(12_000, 4, seeded(0), antithetic=False)
    kinds = ranks @ (4 ** torch.arange(4))
    counts = kinds.bincount()[kinds.unique()]
    assert len(counts) == 24
    assert chisquare(counts.numpy()).pvalue > 1e-3
    ranks = coalitions.permutation_ranks(6, 7, seeded(0))
    assert bool((ranks[::2] + ranks[1::2] == 6).all())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_game_gives_the_same_alone_and_beside_others_and_in_smaller_bites(name, monkeypatch):
    game = games.toy(batch=3)
    together = ESTIMATORS[name](game, 10, 3, 900, seeded(0))
    alone = [ESTIMATORS[name](games.Tabled(t[None]), 10, 1, 900, seeded(0)) for t in game.table]
    assert largest(torch.cat([a.values for a in alone]), together.values) < 1e-12
    assert largest(torch.cat([a.errors for a in alone]), together.errors) < 1e-12
    monkeypatch.setattr(coalitions, "HELD", 2)
    bites = ESTIMATORS[name](game, 10, 3, 900, seeded(0))
    assert largest(bites.values, together.values) < 1e-12
    assert largest(bites.errors, together.errors) < 1e-12
    other = ESTIMATORS[name](game, 10, 3, 900, seeded(1))
    assert largest(other.values, together.values) > 1e-4


@pytest.mark.parametrize("players", [1, 2, 3])
def test_few_players(players):
    game = games.toy(players)
    wanted = torch.stack([games.exact(t, players) for t in game.table])
    orders = permutation_sampling(game, players, 2, 400, seeded(0))
    kernel = kernel_shap(game, players, 2, 400, seeded(0))
    assert largest(orders.values, wanted) < (1e-12 if players < 3 else 0.05)
    assert largest(kernel.values, wanted) < (1e-12 if players < 2 else 0.05)


def test_one_order_has_no_error_to_tell():
    e = permutation_sampling(games.toy(), 10, 2, 2, seeded(0))
    assert e.errors.isnan().all()


def test_draws_that_leave_values_open_are_refused(monkeypatch):
    always_the_first = torch.arange(10).expand(20, -1) < 1
    monkeypatch.setattr(coalitions, "shapley_coalitions", lambda *_: always_the_first)
    with pytest.raises(PrunexError, match="leave some of the 10 values open: draw more"):
        kernel_shap(games.toy(), 10, 2, 20, seeded(0))


def test_bad_input():
    game = games.toy()
    with pytest.raises(PrunexError, match=r"18 coalitions cannot determine 10 values: give at least 20"):
        kernel_shap(game, 10, 2, 18, seeded(0))
    with pytest.raises(PrunexError, match="cannot be paired"):
        kernel_shap(game, 10, 2, 41, seeded(0))
    with pytest.raises(PrunexError, match="cannot be paired"):
        permutation_sampling(game, 10, 2, 3, seeded(0))
    with pytest.raises(PrunexError, match="at least 2"):
        coalitions.shapley_coalitions(4, 1, seeded(0))
    with pytest.raises(PrunexError, match="without players"):
        permutation_sampling(game, 0, 2, 2, seeded(0))
