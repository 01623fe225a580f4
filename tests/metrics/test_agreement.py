"""Agreement of kept patches with relevance: slow rewrites, chance, hand values, traces."""

import math
from itertools import product

import pytest
import torch
from scipy.stats import kendalltau, spearmanr

import prunex
from prunex import PrunexError
from prunex.metrics import (
    CorrectedOverlap,
    DepthCorrelation,
    EqualAreaIoU,
    KeptAUC,
    MassEfficiency,
    MassKept,
    RankBiasedOverlap,
    RankKendall,
    RankSpearman,
    SignAgreement,
    TopKOverlap,
    agreement,
    baselines,
    chance,
    corrected_overlap,
    depth_correlation,
    equal_area_iou,
    keep_scores,
    kept_auc,
    kept_share,
    mass_efficiency,
    mass_kept,
    rank_biased_chance,
    rank_biased_overlap,
    rank_kendall,
    rank_spearman,
    sign_agreement,
    topk_overlap,
)
from prunex.vit.trace import Stage, TokenTrace
from tests.vits import images, tiny

MASKED = {
    EqualAreaIoU: equal_area_iou,
    TopKOverlap: topk_overlap,
    CorrectedOverlap: corrected_overlap,
    MassKept: mass_kept,
    MassEfficiency: mass_efficiency,
    KeptAUC: kept_auc,
    SignAgreement: sign_agreement,
}
RANKED = {
    RankSpearman: rank_spearman,
    RankKendall: rank_kendall,
    RankBiasedOverlap: rank_biased_overlap,
    DepthCorrelation: depth_correlation,
}


def cases(batch=5, size=(4, 5), coarse=False):
    maps = torch.randn(batch, *size)
    kept = torch.rand(batch, *size) < torch.linspace(0.2, 0.8, batch)[:, None, None]
    kept[:, 0, 0], kept[:, 0, 1] = True, False
    scores = maps + torch.randn(maps.shape)
    return kept, ((maps * 2).round(), (scores * 2).round())[:2] if coarse else (maps, scores)


def slow(kept, relevance):
    """Every measure on a mask, of one image without ties, from its formula."""
    m, r = kept.flatten().tolist(), relevance.double().flatten().tolist()
    p, k = len(m), sum(m)
    rho = k / p
    top = set(sorted(range(p), key=lambda i: -r[i])[:k])
    both = sum(m[i] for i in top)
    positive = [max(v, 0) for v in r]
    mass = sum(v for v, there in zip(positive, m, strict=True) if there) / sum(positive)
    best = sum(positive[i] for i in top) / sum(positive)
    pairs = [(a > b) + 0.5 * (a == b) for (a, i), (b, j) in product(zip(r, m, strict=True), repeat=2) if i and not j]
    return {
        equal_area_iou: both / (2 * k - both),
        topk_overlap: both / k,
        corrected_overlap: (both / k - rho) / (1 - rho),
        mass_kept: mass,
        mass_efficiency: (mass - rho) / (best - rho),
        kept_auc: sum(pairs) / len(pairs),
        sign_agreement: sum(v > 0 for v, there in zip(r, m, strict=True) if there) / k,
    }


def test_masks_against_formulas():
    kept, (maps, _) = cases()
    for i in range(len(kept)):
        for measure, wanted in slow(kept[i], maps[i]).items():
            assert float(measure(kept, maps)[i]) == pytest.approx(wanted, abs=1e-9), measure


def test_auc_counts_ties_half():
    kept, (maps, _) = cases(coarse=True)
    for i in range(len(kept)):
        assert float(kept_auc(kept, maps)[i]) == pytest.approx(slow(kept[i], maps[i])[kept_auc], abs=1e-12)


def test_ties_for_the_last_places_are_taken_on_average():
    kept, (maps, _) = cases(coarse=True)
    found = topk_overlap(kept, maps)
    for i in range(len(kept)):
        k = int(kept[i].sum())
        draws = torch.stack(
            [
                kept[i].flatten()[(maps[i].flatten() + 1e-3 * torch.rand(20)).topk(k).indices].double().mean()
                for _ in range(2000)
            ]
        )
        assert float(found[i]) == pytest.approx(float(draws.mean()), abs=3 * float(draws.std()) / 2000**0.5 + 1e-9)


def test_ranks_against_scipy_with_ties():
    _, (maps, scores) = cases(coarse=True)
    for i in range(len(maps)):
        a, b = scores[i].flatten().numpy(), maps[i].flatten().numpy()
        assert float(rank_spearman(scores, maps)[i]) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
        assert float(rank_kendall(scores, maps)[i]) == pytest.approx(kendalltau(a, b).statistic, abs=1e-9)
        assert float(depth_correlation(scores.long(), maps)[i]) == pytest.approx(
            spearmanr(scores[i].long().flatten().numpy(), b).statistic, abs=1e-9
        )
    whole = scores.long()
    assert torch.equal(depth_correlation(whole, maps, kind="kendall"), rank_kendall(whole.double(), maps))


def test_five_tokens_by_hand():
    scores, maps = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 2.0]]]), torch.tensor([[[0.9, 0.7, 0.8, 0.1, 0.3]]])
    kept = torch.tensor([[[True, True, False, False, True]]])
    # Ranks 5 4 3 1.5 1.5 and 5 3 4 1 2: the squared deviations sum to 9.5 and 10, the products to 8.5.
    assert float(rank_spearman(scores, maps)) == pytest.approx(8.5 / math.sqrt(9.5 * 10))
    # 10 pairs: 1 tied in scores, 1 the other way round, 8 the same way.
    assert float(rank_kendall(scores, maps)) == pytest.approx(7 / math.sqrt(9 * 10))
    # Kept .9 .7 .3 against .8 .1: right are .9 twice, .7 once, .3 once.
    assert float(kept_auc(kept, maps)) == pytest.approx(4 / 6)
    assert float(topk_overlap(kept, maps)) == pytest.approx(2 / 3)
    assert float(equal_area_iou(kept, maps)) == pytest.approx(2 / 4)
    assert float(mass_kept(kept, maps)) == pytest.approx(1.9 / 2.8)
    # Tops of 1, 2, 3 share 1, 1, 3; the fourth place of the scores is a tie, the map's is the fifth token.
    p = 0.9
    shared = [1, 1, 3, 3.5, 5]
    wanted = p**5 + (1 - p) / p * sum(p ** (d + 1) * x / (d + 1) for d, x in enumerate(shared))
    assert float(rank_biased_overlap(scores, maps, persistence=p)) == pytest.approx(wanted)


def test_the_top_is_perfect_and_the_bottom_nothing():
    maps = torch.randn(3, 4, 5)
    order = maps.flatten(1).argsort(1, descending=True).argsort(1).view_as(maps)
    top, bottom = order < 7, order >= 13
    for measure in (equal_area_iou, topk_overlap, corrected_overlap, kept_auc, mass_efficiency):
        assert torch.allclose(measure(top, maps), torch.ones(3, dtype=torch.float64)), measure
    for measure in (equal_area_iou, topk_overlap, kept_auc):
        assert bool((measure(bottom, maps) == 0).all())
    for measure in (rank_spearman, rank_kendall, rank_biased_overlap):
        assert torch.allclose(measure(maps.exp(), maps), torch.ones(3, dtype=torch.float64)), measure
        assert bool(
            (measure(-maps, maps) < (rank_biased_chance(20) if measure is rank_biased_overlap else -0.99)).all()
        )


def test_random_masks_score_chance():
    draws, patches, count = 1000, 196, 98
    maps = torch.randn(1, 14, 14).expand(draws, -1, -1)
    kept = (torch.rand(draws, patches).argsort(1) < count).view(draws, 14, 14)
    scores = torch.rand(draws, 14, 14)
    level = chance(kept[:1], maps[:1])
    for measure in (topk_overlap, corrected_overlap, mass_kept, mass_efficiency, kept_auc, sign_agreement):
        found = measure(kept, maps)
        assert abs(float(found.mean() - level[measure.__name__])) < 3 * float(found.std()) / draws**0.5, measure
    for measure in (rank_spearman, rank_biased_overlap):
        found = measure(scores[:300], maps[:300])
        assert abs(float(found.mean() - level[measure.__name__])) < 3 * float(found.std()) / 300**0.5, measure
    shared = topk_overlap(kept, maps) * count
    assert abs(float(shared.mean()) - count**2 / patches) < 3 * float(shared.std()) / draws**0.5
    assert float(equal_area_iou(kept, maps).mean()) == pytest.approx(float(level["equal_area_iou"]), abs=0.01)


def test_kendall_of_random_scores_is_about_zero():
    found = rank_kendall(torch.rand(400, 5, 5), torch.rand(400, 5, 5))
    assert abs(float(found.mean())) < 3 * float(found.std()) / 20


def test_growing_maps_change_only_mass():
    kept, (maps, scores) = cases()
    for measure in (equal_area_iou, topk_overlap, corrected_overlap, kept_auc):
        assert torch.equal(measure(kept, maps.exp()), measure(kept, maps))
    for measure in (rank_spearman, rank_kendall, rank_biased_overlap):
        assert torch.equal(measure(scores, maps.exp()), measure(scores, maps))
    assert not torch.allclose(mass_kept(kept, maps.exp()), mass_kept(kept, maps))


def test_all_or_nothing_kept():
    maps = torch.rand(1, 3, 3)
    everything, nothing = torch.ones(1, 3, 3, dtype=torch.bool), torch.zeros(1, 3, 3, dtype=torch.bool)
    assert topk_overlap(everything, maps).tolist() == [1.0]
    assert float(mass_kept(everything, maps)) == pytest.approx(1)
    assert equal_area_iou(everything, maps).tolist() == [1.0]
    for measure in (corrected_overlap, kept_auc, mass_efficiency):
        assert measure(everything, maps).isnan().all()
        assert measure(nothing, maps).isnan().all()
    for measure in (topk_overlap, equal_area_iou, sign_agreement):
        assert measure(nothing, maps).isnan().all()


def test_maps_that_say_nothing_are_nan():
    kept, (maps, scores) = cases(batch=4)
    maps[0], maps[1, 0, 0], maps[2, 0, 0] = 0.7, torch.nan, torch.inf
    for measure in MASKED.values():
        assert measure(kept, maps).isnan().tolist() == [True, True, True, False], measure
    for measure in RANKED.values():
        assert measure(scores, maps).isnan().tolist() == [True, True, True, False], measure
    scores[3] = 1.0
    for measure in RANKED.values():
        assert measure(scores, maps).isnan().all(), measure
    assert mass_kept(kept, -maps.abs())[3].isnan()


def test_patches_without_a_score_are_left_out():
    _, (maps, scores) = cases(batch=3)
    there = torch.rand(3, 20) < 0.6
    part = scores.masked_fill(~there.view_as(scores), torch.nan)
    for measure in (rank_spearman, rank_kendall, rank_biased_overlap):
        for i in range(3):
            alone = measure(scores[i].flatten()[there[i]][None, None], maps[i].flatten()[there[i]][None, None])
            assert float(measure(part, maps)[i]) == pytest.approx(float(alone), abs=1e-12), measure


def test_rank_biased_chance_is_the_mean_over_permutations():
    for p in (0.5, 0.98):
        found = rank_biased_overlap(torch.rand(3000, 3, 4), torch.rand(3000, 3, 4), persistence=p)
        assert float(found.mean()) == pytest.approx(rank_biased_chance(12, p), abs=3 * float(found.std()) / 3000**0.5)


def test_large_batches_go_in_parts(monkeypatch):
    _, (maps, scores) = cases(coarse=True)
    whole = [f(scores, maps) for f in (rank_kendall, rank_biased_overlap)]
    monkeypatch.setattr("prunex.metrics.ranks._ROOM", 900)
    for before, f in zip(whole, (rank_kendall, rank_biased_overlap), strict=True):
        assert torch.equal(f(scores, maps), before)


@pytest.mark.parametrize("made", [*MASKED, *RANKED])
def test_classes_equal_functions_however_batches_are_split(made):
    kept, (maps, scores) = cases(batch=6)
    maps[2] = 0.5
    told = kept if made in MASKED else scores
    whole, parts = made(judge="self"), made(keep=True)
    whole.update(told, maps)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.update(told[part], maps[part])
    wanted = {**MASKED, **RANKED}[made](told, maps)
    assert float(whole.compute()) == pytest.approx(float(wanted.nanmean()), abs=1e-12)
    assert float(parts.compute()) == pytest.approx(float(whole.compute()), abs=1e-12)
    assert (whole.judge, parts.judge, int(whole.undefined)) == ("self", "dense", 1)
    assert torch.allclose(parts.values(), wanted, equal_nan=True)
    assert "self" in repr(whole)
    assert whole.higher_is_better
    with pytest.raises(PrunexError, match="judge='dence' is not allowed: give 'dense'"):
        made(judge="dence")


def three_stages():
    """A trace of 2 images that drops 3, 2 and 2 of 12 patches, and which patches each stage kept, by their ids."""
    ids = torch.arange(12).expand(2, -1)
    trace, tags = TokenTrace((3, 4), 1, 2, torch.device("cpu")), []
    for block, drop in enumerate((3, 2, 2)):
        n = ids.shape[1]
        score = torch.rand(2, n)
        keep = score.topk(n - drop).indices.sort(1).values
        group = torch.full((2, n), -1).scatter(1, keep, torch.arange(n - drop).expand(2, -1))
        trace.stages.append(Stage(block, group, (group >= 0).float(), n - drop, score=score))
        tags.append((ids, score, keep))
        ids = ids.gather(1, keep)
    return trace, tags, ids


def test_three_stages_compose_to_what_tags_say():
    trace, tags, last = three_stages()
    for i in range(2):
        assert trace.kept()[i].flatten().nonzero()[:, 0].tolist() == last[i].tolist()
        for stage, (ids, score, _) in enumerate(tags):
            found = keep_scores(trace, stage)[i].flatten()
            assert torch.equal(found[ids[i]], score[i])
            assert int(found.isnan().sum()) == 12 - ids.shape[1]
    assert torch.equal(keep_scores(trace).nan_to_num(-1), keep_scores(trace, 2).nan_to_num(-1))
    maps = torch.randn(2, 3, 4)
    found = agreement(trace, maps)
    assert found.pop("judge") == "dense"
    assert torch.equal(found["kept_share"], torch.full((2,), 5 / 12, dtype=torch.float64))
    for measure in MASKED.values():
        assert torch.equal(found[measure.__name__], measure(trace.kept(), maps))
    for measure in (rank_spearman, rank_kendall, rank_biased_overlap):
        assert torch.equal(found[measure.__name__], measure(keep_scores(trace), maps))
    depth = torch.zeros(2, 12)
    for ids in (tags[1][0], tags[2][0], last):
        depth = depth.scatter_add(1, ids, torch.ones(ids.shape))
    assert torch.equal(found["depth_correlation"], rank_spearman(depth.view(2, 3, 4), maps))
    early = agreement(trace, maps, stage=0, judge="self")
    assert early["judge"] == "self"
    assert torch.equal(early["kept_auc"], kept_auc(trace.kept(0), maps))
    given = agreement(trace.kept(), maps, scores=maps)
    assert torch.allclose(given["rank_spearman"], torch.ones(2, dtype=torch.float64))
    assert "depth_correlation" not in given


@pytest.mark.parametrize("method", ["evit", "dynamicvit", "tome", "ppt", "hvt"])
def test_on_pruned_models(method):
    model, pictures = tiny(global_pool="avg" if method == "hvt" else "token"), images(2)
    dense = prunex.explain("grad_cam", model, pictures)
    options = {"tome": {"r": 3}, "ppt": {"r": 3}, "hvt": {}}.get(method, {"keep_ratio": 0.7, "stages": (1, 2)})
    with prunex.attach(model, method, **options) as pruning, torch.no_grad():
        model(pictures)
        trace = pruning.trace
        found = agreement(trace, dense)
        alone = []
        for i in (0, 1):
            model(pictures[i : i + 1])
            alone.append(agreement(pruning.trace, dense.maps[i : i + 1]))
        own = agreement(trace, prunex.explain("grad_cam", model, pictures))
        with pytest.raises(PrunexError, match="judge='dense' contradicts the explanation.*dropped tokens"):
            agreement(trace, prunex.explain("rollout", model, pictures), judge="dense")
    assert (found.pop("judge"), own["judge"]) == ("dense", "self")
    assert all(v.shape == (2,) and v.dtype == torch.float64 for v in found.values())
    selects = method in ("evit", "dynamicvit")
    assert bool(found["kept_auc"].isnan().all()) is not selects
    assert bool(found["kept_share"].isnan().all()) is not selects
    assert ("depth_correlation" in found) is selects
    if selects:
        assert not found["rank_spearman"].isnan().any()
        for i, single in enumerate(alone):
            for name, value in found.items():
                assert float(single[name]) == pytest.approx(float(value[i]), abs=1e-6), name


def test_baselines():
    kept, (maps, other) = cases(batch=4, size=(5, 5))
    found = baselines(kept, maps, other_maps=other, random_maps=other.flip(0), draws=400)
    assert set(found) == {"random", "centre", "another_image", "other_method", "random_model"}
    level = chance(kept, maps)
    for name, value in found["random"].items():
        if name != "equal_area_iou":
            assert torch.allclose(value, level[name], atol=0.1), name
    assert torch.equal(found["another_image"]["kept_auc"], kept_auc(kept, maps[[1, 2, 3, 0]]))
    assert torch.equal(found["random_model"]["mass_kept"], mass_kept(kept, other.flip(0)))
    assert torch.equal(found["other_method"]["rank_kendall"], rank_kendall(other, maps))
    same = baselines(kept, maps, other_maps=maps)["other_method"]
    assert torch.allclose(same["topk_overlap"], torch.ones(4, dtype=torch.float64))
    alone = baselines(kept[1:2], maps[1:2], draws=400)
    assert alone["another_image"]["kept_auc"].isnan().all()
    for name, value in alone["random"].items():
        assert torch.equal(value, found["random"][name][1:2])
    cross = torch.zeros(1, 5, 5, dtype=torch.bool)
    cross[0, 2, 1:4] = cross[0, 1:4, 2] = True
    assert baselines(cross, cross.float() + 1)["centre"]["topk_overlap"].tolist() == [1.0]


def test_refused():
    kept, (maps, scores) = cases(batch=2)
    for measure in (*MASKED.values(), kept_share):
        given = (maps,) if measure is not kept_share else ()
        with pytest.raises(PrunexError, match="kept has dtype torch.float32: give booleans"):
            measure(kept.float(), *given)
        with pytest.raises(PrunexError, match=r"kept have shape \[2, 20\]: give a tensor \[B, H, W\]"):
            measure(kept.flatten(1), *given)
    for measure in MASKED.values():
        with pytest.raises(PrunexError, match="do not fit maps .* without prefix tokens"):
            measure(kept[:, :3], maps)
        with pytest.raises(PrunexError, match="maps have dtype torch.bool"):
            measure(kept, kept)
    for measure in (rank_spearman, rank_kendall, rank_biased_overlap):
        with pytest.raises(PrunexError, match="scores have dtype torch.int64"):
            measure(scores.long(), maps)
        with pytest.raises(PrunexError, match="scores of shape"):
            measure(scores[:1], maps)
    with pytest.raises(PrunexError, match="kind='pearson'"):
        depth_correlation(scores, maps, kind="pearson")
    with pytest.raises(PrunexError, match="depths are a list"):
        depth_correlation([1], maps)
    for p in (0, 1, "high", True):
        with pytest.raises(PrunexError, match="persistence"):
            rank_biased_overlap(scores, maps, persistence=p)
    with pytest.raises(PrunexError, match="persistence=2"):
        RankBiasedOverlap(persistence=2)
    with pytest.raises(PrunexError, match="judge='me'"):
        agreement(kept, maps, judge="me")
    with pytest.raises(PrunexError, match="maps are a str"):
        agreement(kept, "rollout")
    with pytest.raises(PrunexError, match="trace is a Tensor"):
        keep_scores(kept)
    with pytest.raises(PrunexError, match="stage=3 does not exist: this trace has 3 stages"):
        keep_scores(three_stages()[0], 3)
    for given in ({"draws": 0}, {"seed": -1}, {"other_maps": scores[:1]}, {"random_maps": scores[:, :2]}):
        with pytest.raises(PrunexError):
            baselines(kept, maps, **given)
