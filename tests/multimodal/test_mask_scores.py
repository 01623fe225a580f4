"""Mask AP and IoU: perfect, empty and shuffled masks, sizes, and COCO's own evaluation with the same thresholds."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch

from prunex.errors import PrunexError
from prunex.multimodal.coco import Objects
from prunex.multimodal.mask_scores import IOU_THRESHOLDS, Detections, MaskScorer, score_masks

pytest.importorskip("pycocotools", reason="needs the extra prunex-vit[multimodal]")


def rectangle(top, left, height, width, size=(128, 160)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def objects(*boxes, labels=None, size=(128, 160), **options):
    masks = torch.stack([rectangle(*box, size=size) for box in boxes]) if boxes else torch.zeros(0, *size).bool()
    return Objects(masks, torch.tensor(list(range(len(boxes)) if labels is None else labels)).long(), **options)


def detected(truth, masks=None, scores=None, constant=0):
    masks = truth.masks if masks is None else masks
    return Detections(masks, torch.linspace(0.9, 0.5, len(masks)) if scores is None else scores, truth.labels, constant)


# Small, medium and large, in the cells of a stride of 32.
WORLD = [
    objects((0, 0, 20, 20), (32, 32, 64, 64), (0, 32, 128, 128)),
    objects((64, 64, 32, 96), (0, 0, 10, 40), labels=[1, 0]),
    objects((32, 0, 96, 128), labels=[2]),
]


def test_thresholds_are_sixteen_and_are_the_evaluators():
    assert len(IOU_THRESHOLDS) == 16
    assert IOU_THRESHOLDS[0] == pytest.approx(0.20, abs=1e-9)
    assert IOU_THRESHOLDS[-1] == pytest.approx(0.95, abs=1e-9)
    assert np.diff(IOU_THRESHOLDS) == pytest.approx(0.05, abs=1e-9)
    assert MaskScorer()._precision.iou_thresholds == list(IOU_THRESHOLDS)


def test_the_objects_themselves_are_perfect():
    scores = score_masks(lambda truth: detected(truth, constant=1), [(truth, truth) for truth in WORLD])
    for numbers in (scores.ap, scores.ar, scores.iou):
        for number in (numbers.all, numbers.small, numbers.medium, numbers.large):
            assert number == pytest.approx(1)
    assert (scores.objects.all, scores.objects.small, scores.objects.medium, scores.objects.large) == (6, 2, 2, 2)
    assert (scores.images, scores.detections, scores.constant) == (3, 6, 3)


def test_one_cell_maps_by_half_are_near_perfect_and_constant_maps_are_counted():
    truth = objects((32, 32, 64, 96), (64, 0, 32, 64), labels=[1, 1])
    maps = torch.stack([truth.masks[0, 16::32, 16::32], truth.masks[1, 16::32, 16::32]]).float()
    size = (128, 160)
    found = Detections.of_maps(maps, torch.tensor([0.9, 0.8]), truth.labels, size, mask_rule="half")
    near = score_masks(lambda _: found, [(None, truth)])
    assert near.iou.all > 0.9
    assert near.ap.all > 0.9
    grown = Detections.of_maps(maps, torch.tensor([0.9, 0.8]), truth.labels, size)
    wide = score_masks(lambda _: grown, [(None, truth)])
    assert wide.iou.all < near.iou.all
    flat = Detections.of_maps(torch.zeros(2, 4, 5), torch.tensor([0.9, 0.8]), truth.labels, size)
    nothing = score_masks(lambda _: flat, [(None, truth)])
    assert (nothing.constant, nothing.ap.all, nothing.iou.all) == (2, 0, 0)


def test_cell_maps_at_the_grids_size_are_perfect():
    # The nearest enlargement of aligned rectangles has no corner to lose.
    truth = objects((32, 32, 64, 96), (64, 0, 32, 64), labels=[1, 2])
    maps = truth.masks[:, 16::32, 16::32].float()
    found = Detections.of_maps(maps, torch.tensor([0.9, 0.8]), truth.labels, (4, 5), (128, 160), mask_rule="half")
    assert score_masks(lambda _: found, [(None, truth)]).ap.all == pytest.approx(1)


def test_empty_masks_score_nothing():
    empty = score_masks(lambda truth: detected(truth, torch.zeros_like(truth.masks)), [(t, t) for t in WORLD])
    assert (empty.ap.all, empty.ar.all, empty.iou.all) == (0, 0, 0)
    none = score_masks(
        lambda truth: Detections(truth.masks[:0], torch.zeros(0), truth.labels[:0]), [(t, t) for t in WORLD]
    )
    assert (none.ap.all, none.iou.all, none.detections) == (0, 0, 0)


def test_shuffled_masks_score_near_nothing():
    generator = torch.Generator().manual_seed(0)

    def shuffled(truth):
        flat = truth.masks.flatten(1)
        order = torch.randperm(flat.shape[1], generator=generator)
        return detected(truth, flat[:, order].view_as(truth.masks))

    small = [objects((i * 8, 8, 16, 40), (60, 100, 40, 30 + i)) for i in range(5)]
    scores = score_masks(shuffled, [(t, t) for t in small])
    assert scores.ap.all < 0.05
    assert scores.iou.all < 0.1


def test_an_iou_between_thresholds():
    # 40 of 64 columns: IoU 0.625 passes 0.20 to 0.60, nine of sixteen.
    truth = objects((0, 0, 64, 64))
    scores = score_masks(lambda _: detected(truth, rectangle(0, 0, 64, 40)[None]), [(None, truth)])
    assert scores.iou.all == pytest.approx(0.625)
    assert scores.ap.all == pytest.approx(9 / 16)
    assert scores.ap.medium == pytest.approx(9 / 16)
    assert math.isnan(scores.ap.large)
    assert math.isnan(scores.iou.small)


def test_a_mask_of_another_class_is_no_match():
    truth = objects((0, 0, 64, 64), labels=[1])
    found = Detections(truth.masks, torch.tensor([0.9]), torch.tensor([2]))
    scores = score_masks(lambda _: found, [(None, truth)])
    assert (scores.ap.all, scores.iou.all) == (0, 0)


def test_detections_where_nothing_is_count():
    truth, empty = objects((0, 0, 64, 64), labels=[1]), objects()
    wrong = Detections(truth.masks, torch.tensor([0.95]), torch.tensor([1]))
    pairs = [(detected(truth, scores=torch.tensor([0.5])), truth), (wrong, empty)]
    scores = score_masks(lambda found: found, pairs)
    assert scores.ap.all == pytest.approx(0.5)
    assert scores.objects.all == 1
    assert math.isnan(score_masks(lambda _: wrong, [(None, empty)]).ap.all)


def test_crowds_are_neither_wanted_nor_wrong():
    truth = objects((0, 0, 64, 64), (64, 0, 64, 160), labels=[1, 1], crowd=torch.tensor([False, True]))
    inside = torch.stack([truth.masks[0], rectangle(70, 10, 30, 30)])
    found = Detections(inside, torch.tensor([0.5, 0.9]), torch.tensor([1, 1]))
    scores = score_masks(lambda _: found, [(None, truth)])
    assert scores.ap.all == pytest.approx(1)
    assert (scores.objects.all, scores.iou.all) == (1, 1)


def test_areas_that_are_given_decide_on_sizes():
    truth = objects((0, 0, 64, 64), areas=torch.tensor([100.0]))
    scores = score_masks(detected, [(truth, truth)])
    assert scores.ap.small == pytest.approx(1)
    assert (scores.objects.small, scores.objects.medium) == (1, 0)
    assert math.isnan(scores.ap.medium)


def random_world(seed, images=12, classes=3):
    """Objects, and detections that are shifted, missed, of a wrong class, or of nothing."""
    r = np.random.default_rng(seed)
    pairs = []
    for _ in range(images):
        boxes = [(*r.integers(0, 80, 2), *r.integers(8, 120, 2)) for _ in range(r.integers(0, 5))]
        truth = objects(
            *boxes, labels=r.integers(0, classes, len(boxes)), crowd=torch.from_numpy(r.random(len(boxes)) < 0.2)
        )
        moved = [(max(0, t + r.integers(-6, 7)), max(0, left + r.integers(-6, 7)), h, w) for t, left, h, w in boxes]
        moved += [(*r.integers(0, 80, 2), *r.integers(8, 60, 2)) for _ in range(r.integers(0, 3))]
        found = objects(*moved, labels=[*truth.labels.tolist(), *r.integers(0, classes, len(moved) - len(boxes))])
        pairs.append((Detections(found.masks, torch.from_numpy(r.random(len(moved))).float(), found.labels), truth))
    return pairs


def by_coco(pairs):
    """AP and AR, all and by size, from COCO's own evaluation with its threshold vector set."""
    from pycocotools import mask as coco
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rle(mask):
        return coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    height, width = pairs[0][1].masks.shape[1:]
    there = {
        "info": {},
        "images": [{"id": i, "height": height, "width": width} for i in range(len(pairs))],
        "categories": [{"id": k, "name": str(k)} for k in range(3)],
        "annotations": [],
    }
    found = []
    for i, (detections, truth) in enumerate(pairs):
        for mask, label, crowd in zip(truth.masks, truth.labels, truth.crowd, strict=True):
            number = len(there["annotations"]) + 1
            entry = {"id": number, "image_id": i, "category_id": int(label), "iscrowd": int(crowd)}
            there["annotations"].append({**entry, "segmentation": rle(mask), "area": float(mask.sum())})
        for mask, score, label in zip(detections.masks, detections.scores, detections.labels, strict=True):
            entry = {"image_id": i, "category_id": int(label), "score": float(score)}
            found.append({**entry, "segmentation": rle(mask)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = there
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "segm")
        evaluation.params.iouThrs = np.linspace(0.2, 0.95, 16)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[[0, 3, 4, 5]], evaluation.stats[[8, 9, 10, 11]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_are_cocos(seed):
    pairs = random_world(seed)
    assert any(not len(truth.labels) and len(found.labels) for found, truth in pairs)
    scores = score_masks(lambda found: found, pairs)
    for mine, theirs in zip((scores.ap, scores.ar), by_coco(pairs), strict=True):
        assert [mine.all, mine.small, mine.medium, mine.large] == pytest.approx(list(theirs), abs=1e-6)
        assert 0.05 < mine.all < 0.95


def test_nothing_is_printed(capsys):
    score_masks(detected, [(truth, truth) for truth in WORLD])
    assert capsys.readouterr() == ("", "")


GOOD = objects((0, 0, 8, 8))


@pytest.mark.parametrize(
    ("found", "truth", "why"),
    [
        (GOOD, GOOD, "detections are a Objects: give Detections"),
        (detected(GOOD), {"masks": GOOD.masks}, "objects are a dict"),
        (detected(GOOD, GOOD.masks.float()), GOOD, "torch.float32"),
        (detected(GOOD, GOOD.masks[:, :64]), GOOD, "original_size"),
        (detected(GOOD, scores=torch.rand(2)), GOOD, r"scores of detections are torch.float32 \[2\]"),
        (detected(GOOD, scores=torch.tensor([math.nan])), GOOD, "NaN or infinity"),
        (detected(GOOD, scores=[0.5]), GOOD, "scores of detections are a list"),
        (Detections(GOOD.masks, torch.rand(1), torch.tensor([1.0])), GOOD, "give int64"),
        (detected(GOOD), Objects(GOOD.masks, torch.tensor([1, 2])), r"labels of objects are torch.int64 \[2\]"),
        (detected(GOOD), Objects(GOOD.masks, GOOD.labels, torch.zeros(2)), "crowd of objects"),
        (detected(GOOD), Objects(GOOD.masks, GOOD.labels, None, torch.tensor([math.inf])), "areas of objects"),
    ],
)
def test_bad_input(found, truth, why):
    with pytest.raises(PrunexError, match=why):
        MaskScorer().update(found, truth)


def test_no_images_and_no_pycocotools(monkeypatch):
    with pytest.raises(PrunexError, match="no image was scored"):
        score_masks(detected, [])
    monkeypatch.setattr("prunex.multimodal.coco.find_spec", lambda name: None)
    with pytest.raises(PrunexError, match=r"pip install 'prunex-vit\[multimodal\]'"):
        MaskScorer()
