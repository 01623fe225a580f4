"""The segmentation protocol and rank measures against slow rewrites, scikit-learn and hand values."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from prunex import PrunexError
from prunex.metrics import (
    EnergyInMask,
    ForegroundAUC,
    ForegroundF1,
    MeanAP,
    MeanIoU,
    ObjectShare,
    PixelAccuracy,
    PointingGame,
    RankAccuracy,
    TopKIntersection,
    energy_inside,
    foreground_auc,
    foreground_f1,
    mean_ap,
    mean_iou,
    object_share,
    pixel_accuracy,
    pointing_game,
    rank_accuracy,
    segmentation_counts,
    topk_intersection,
)

PER_IMAGE = {
    EnergyInMask: energy_inside,
    PointingGame: pointing_game,
    RankAccuracy: rank_accuracy,
    ForegroundAUC: foreground_auc,
    MeanAP: mean_ap,
    ForegroundF1: foreground_f1,
}
OVERALL = {PixelAccuracy: pixel_accuracy, MeanIoU: mean_iou}


def scenes(batch=5, size=(7, 6), ignored=True):
    """Maps of few values, so that many tie, and masks with ignored pixels."""
    maps = (torch.randn(batch, *size) * 2).round() / 4
    masks = (torch.rand(batch, *size) < torch.linspace(0.2, 0.7, batch)[:, None, None]).long()
    if ignored:
        masks[torch.rand(masks.shape) < 0.15] = -1
    masks[:, 0, 0], masks[:, 0, 1] = 1, 0
    return maps, masks


def scaled(values):
    low, high = min(values), max(values)
    return [0.0 if high == low else (v - low) / (high - low) for v in values]


def slow_sums(maps, masks):
    """Right, labelled, and intersection and union of both classes over a data set, pixel by pixel."""
    right = labelled = 0
    inter, union = [0, 0], [0, 0]
    for m, t in zip(maps, masks, strict=True):
        values = scaled(m.double().flatten().tolist())
        mean = sum(values) / len(values)
        for value, label in zip(values, t.flatten().tolist(), strict=True):
            if label < 0:
                continue
            found = int(value > mean)
            right += found == label
            labelled += 1
            for c in (0, 1):
                inter[c] += found == c == label
                union[c] += c in (found, label)
    return right, labelled, inter, union


@pytest.mark.parametrize("ignored", [True, False])
def test_protocol_against_pixel_by_pixel(ignored):
    maps, masks = scenes(ignored=ignored)
    right, labelled, inter, union = slow_sums(maps, masks)
    assert float(pixel_accuracy(maps, masks)) == pytest.approx(right / labelled, abs=1e-12)
    assert float(mean_iou(maps, masks)) == pytest.approx((inter[0] / union[0] + inter[1] / union[1]) / 2, abs=1e-12)
    for i in range(len(maps)):
        values = (maps[i] - maps[i].min()).flatten() / (maps[i].max() - maps[i].min())
        target, there = masks[i].flatten() == 1, masks[i].flatten() >= 0
        scores = torch.cat([1 - values[there], values[there]])  # in float32, where which of them tie is decided
        both = torch.cat([~target[there], target[there]])
        assert float(mean_ap(maps, masks)[i]) == pytest.approx(average_precision_score(both, scores), abs=1e-6)
        found = (values.double() > values.double().mean())[there]
        assert float(foreground_f1(maps, masks)[i]) == pytest.approx(f1_score(target[there], found), abs=1e-12)
        auc = roc_auc_score(target[there], values[there])
        assert float(foreground_auc(maps, masks)[i]) == pytest.approx(auc, abs=1e-12)


def test_rank_accuracy_is_the_mean_over_orders_of_ties():
    maps, masks = scenes(batch=3)
    for measure, k in ((rank_accuracy, None), (topk_intersection, 9)):
        given = {} if k is None else {"k": k}
        found = measure(maps, masks, **given)
        for i in range(3):
            there = masks[i].flatten() >= 0
            values, target = maps[i].flatten()[there].double(), masks[i].flatten()[there] == 1
            count = int(target.sum()) if k is None else k
            means = []
            for _ in range(3000):
                order = (values + 1e-6 * torch.rand(len(values), dtype=torch.float64)).argsort(descending=True)
                means.append(float(target[order[:count]].double().mean()))
            means = torch.tensor(means)
            assert float(found[i]) == pytest.approx(float(means.mean()), abs=3 * float(means.std()) / 3000**0.5 + 1e-9)


def test_six_pixels_by_hand():
    maps = torch.tensor([[[0.0, 0.125, 0.375], [0.625, 0.875, 1.0]]])
    masks = torch.tensor([[[0, 0, 1], [0, 1, 1]]])
    # Mean 0.5: foreground is the last row. Ranked down, both channels: 1 1 | 7 7 | 5 5 | 3 3 | 1 1 | 0 0 (eighths).
    assert segmentation_counts(maps, masks).tolist() == [[4, 6, 2, 4, 2, 4]]
    assert float(mean_iou(maps, masks)) == 0.5
    right = [2, 2, 0, 2, 0, 0]  # at 5/8: pixel 3 as object, pixel 2 as background, both wrong
    wanted = sum(r / 6 * sum(right[: i + 1]) / (2 * i + 2) for i, r in enumerate(right))
    assert float(mean_ap(maps, masks)) == pytest.approx(wanted)
    assert float(rank_accuracy(maps, masks)) == pytest.approx(2 / 3)
    assert topk_intersection(maps, masks, k=2).tolist() == [1.0]


def test_the_mask_is_perfect_and_its_complement_the_worst():
    _, masks = scenes()
    maps = (masks == 1).float()
    perfect = [f(maps, masks) for f in (*PER_IMAGE.values(), *OVERALL.values())]
    assert all(bool((v == 1).all()) for v in perfect)
    for measure in (*OVERALL.values(), energy_inside, pointing_game, foreground_auc, foreground_f1):
        assert bool((measure(1 - maps, masks) == 0).all())


def test_iou_is_of_the_data_set_and_no_mean_of_images():
    masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    masks[0, :1], masks[1, :9] = True, True
    maps = torch.zeros(2, 10, 10)
    maps[0, :2], maps[1, :8] = 1.0, 1.0  # a row too much, a row too little
    # Objects: (10 + 80) / (20 + 90). Backgrounds: (80 + 10) / (90 + 20).
    assert float(mean_iou(maps, masks)) == pytest.approx(90 / 110)
    single = [float(mean_iou(maps[i : i + 1], masks[i : i + 1])) for i in (0, 1)]
    assert sum(single) / 2 == pytest.approx((10 / 20 + 80 / 90) / 2)
    metric = MeanIoU()
    for i in (0, 1):
        metric.update(maps[i : i + 1], masks[i : i + 1])
    assert float(metric.compute()) == pytest.approx(90 / 110)


def test_ignored_pixels_act_through_scale_and_mean_alone():
    maps, masks = scenes()
    masks[:, 3, 3] = -1
    other = maps.clone()
    other[:, 3, 3] = 0.05  # neither smallest nor largest
    for measure in (energy_inside, rank_accuracy, foreground_auc, mean_ap, pointing_game):
        assert torch.allclose(measure(other, masks), measure(maps, masks), atol=1e-12), measure
    lifted = maps.clone()
    lifted[:, 3, 3] = 1e4  # the mean now lies above every labelled pixel
    assert torch.equal(segmentation_counts(lifted, masks)[:, 4], torch.zeros(5, dtype=torch.float64))
    for measure in (energy_inside, rank_accuracy, foreground_auc, pointing_game):
        assert torch.equal(measure(lifted, masks), measure(maps, masks)), measure
    assert torch.allclose(object_share(masks), (masks == 1).flatten(1).sum(1) / (masks >= 0).flatten(1).sum(1).double())


@pytest.mark.parametrize("value", [0.0, 0.3, -7.1])
def test_constant_maps_score_chance(value):
    _, masks = scenes()
    maps = torch.full(masks.shape, value)
    share = object_share(masks)
    assert torch.allclose(rank_accuracy(maps, masks), share)
    assert torch.allclose(pointing_game(maps, masks).double(), share, atol=1e-6)
    assert bool((foreground_auc(maps, masks) == 0.5).all())
    assert bool((mean_ap(maps, masks) == 0.5).all())
    assert bool((foreground_f1(maps, masks) == 0).all())
    assert bool((segmentation_counts(maps, masks)[:, 4] == 0).all())  # no foreground, whatever the mean is rounded to


def test_scale_and_shift_do_not_matter_to_ranks():
    maps, masks = scenes()
    for measure in (rank_accuracy, foreground_auc, pointing_game):
        assert torch.equal(measure(maps.exp(), masks), measure(maps, masks))


@pytest.mark.parametrize("tolerance", [1, 1.5, 2.3, 15])
def test_pointing_within_a_distance(tolerance):
    masks = torch.zeros(1, 7, 9, dtype=torch.bool)
    masks[0, 2, 3] = masks[0, 3, 3] = masks[0, 6, 8] = True
    spots = [(r, c) for r in range(7) for c in range(9)]
    maps = torch.zeros(len(spots), 7, 9)
    for i, (r, c) in enumerate(spots):
        maps[i, r, c] = 1
    found = pointing_game(maps, masks.expand(len(spots), -1, -1), tolerance=tolerance)
    inside = masks[0].nonzero().tolist()
    wanted = [float(any(math.dist(s, p) <= tolerance for p in inside)) for s in spots]
    assert found.tolist() == wanted


def test_images_without_a_number_are_nan():
    maps, masks = scenes(batch=4, ignored=False)
    masks[0] = 0
    maps[1, 0, 0] = torch.nan
    masks[2] = -1
    undefined = torch.tensor([True, True, True, False])
    for measure in (energy_inside, pointing_game, rank_accuracy, foreground_auc, foreground_f1):
        assert torch.equal(measure(maps, masks).isnan(), undefined), measure
    assert torch.equal(topk_intersection(maps, masks, k=3).isnan(), undefined)
    assert mean_ap(maps, masks).isnan().tolist() == [False, True, True, False]  # a background is enough
    assert float(pixel_accuracy(maps, masks)) == pytest.approx(float(pixel_accuracy(maps[[0, 3]], masks[[0, 3]])))
    assert math.isnan(float(pixel_accuracy(maps[2:3], masks[2:3])))
    assert math.isnan(float(mean_iou(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))))
    full = torch.ones(1, 2, 2, dtype=torch.bool)
    assert foreground_auc(torch.rand(1, 2, 2), full).isnan().all()
    assert topk_intersection(torch.rand(1, 2, 2), torch.tensor([[[1, 0], [-1, -1]]]), k=3).isnan().all()


@pytest.mark.parametrize("made", [*PER_IMAGE, *OVERALL, ObjectShare, lambda: TopKIntersection(k=4)])
def test_classes_equal_functions_however_batches_are_split(made):
    maps, masks = scenes(batch=6)
    maps[1, 0, 0] = torch.nan
    whole, parts = made(), made()
    whole.update(maps, masks)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.update(maps[part], masks[part])
    assert float(parts.compute()) == pytest.approx(float(whole.compute()), abs=1e-12)
    assert whole.compute().dtype == torch.float64
    function = {**PER_IMAGE, **OVERALL}.get(made)
    if function is not None:
        assert float(whole.compute()) == pytest.approx(float(function(maps, masks).nanmean()), abs=1e-6)
    if made is not ObjectShare:  # which reads no map
        assert whole.undefined == parts.undefined == 1
        assert whole.higher_is_better
    assert whole.count == 6 - int(whole.undefined)
    whole.reset()
    assert whole.count == 0
    assert not bool(whole.total.any())


def test_refused():
    maps, masks = scenes(batch=1)
    with pytest.raises(PrunexError, match="labels from -2 to 1"):
        rank_accuracy(maps, masks - (masks < 0).long())
    with pytest.raises(PrunexError, match="labels from .* to 255"):
        mean_ap(maps, (masks == 1).to(torch.uint8) * 255)
    with pytest.raises(PrunexError, match="k=43 is more than the 42 pixels"):
        topk_intersection(maps, masks, k=43)
    with pytest.raises(PrunexError, match="k=0"):
        TopKIntersection(k=0)
    with pytest.raises(PrunexError, match="tolerance=-1"):
        pointing_game(maps, masks, tolerance=-1)
    with pytest.raises(PrunexError, match="tolerance='far'"):
        PointingGame(tolerance="far")
    with pytest.raises(PrunexError, match="keep='yes'"):
        MeanAP(keep="yes")
    with pytest.raises(PrunexError, match="make it with keep=True"):
        MeanAP().values()
    with pytest.raises(PrunexError, match=r"masks have shape \[7, 6\]"):
        object_share(masks[0])
    for measure in (*PER_IMAGE.values(), *OVERALL.values(), topk_intersection):
        with pytest.raises(PrunexError, match="masks have dtype torch.float32"):
            measure(maps, masks.float())
        with pytest.raises(PrunexError, match="do not fit"):
            measure(maps[:, :3], masks)


def test_numbers_of_images_can_be_kept():
    maps, masks = scenes(batch=4)
    maps[1, 0, 0] = torch.nan
    metric = RankAccuracy(keep=True)
    assert metric.values().shape == (0,)
    for i in range(0, 4, 2):
        metric.update(maps[i : i + 2], masks[i : i + 2])
    assert torch.equal(metric.values().nan_to_num(-1), rank_accuracy(maps, masks).nan_to_num(-1))
    metric.reset()
    assert metric.values().shape == (0,)
