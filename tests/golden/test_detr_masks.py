"""Masks of detections against the public code: eight bits, thresholds, cells and masks of images, all to the bit."""

import pytest
import torch

from prunex.multimodal.masks import cell_masks, eight_bit, image_masks, otsu_threshold
from tests.explainers.reference import SEEDS, arrays, present

pytestmark = [present, pytest.mark.parametrize("seed", SEEDS)]
METHODS = [
    "ours_no_lrp",
    "ours_no_lrp_no_norm",
    "ablation_no_self_in_10",
    "ablation_no_aggregation",
    "raw_attn",
    "rollout",
    "attn_gradcam",
]


def pair(sizes):
    return [(int(h), int(w)) for h, w in sizes]


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_detections(method, seed):
    want = arrays("multimodal-detr-masks", seed)
    keep, maps = want["keep"], want[f"{method}_maps"]
    assert 3 <= keep[0].sum() < 7
    cells = cell_masks(maps[keep])
    assert torch.equal(eight_bit(maps[keep]), want[f"{method}_u8"][keep])
    assert torch.equal(cells.threshold, want[f"{method}_otsu"][keep].long())
    assert torch.equal(cells.masks, want[f"{method}_pred_masks"][keep] == 255)
    assert not cells.constant.any()
    (entered,), originals = pair(want["input_size"][None]), pair(want["orig_sizes"])
    for image, original in enumerate(originals):
        found = image_masks(cell_masks(maps[image]).masks & keep[image, :, None, None], entered, original)
        assert torch.equal(found, want[f"{method}_mask{image}"] > 0)


def test_a_batch_with_a_crop(seed):
    want = arrays("multimodal-detr-masks", seed)
    (entered,) = pair(want["input_size"][None])
    for image, (size, original) in enumerate(
        zip(pair(want["batch_sizes"]), pair(want["batch_orig_sizes"]), strict=True)
    ):
        found = image_masks(want["batch_pred_masks"][image] == 255, entered, original, size=size)
        assert found.any()
        assert torch.equal(found, want[f"batch_mask{image}"] > 0)


@pytest.mark.parametrize("shape", ["7x7", "5x9", "1x6"])
def test_plain_maps(shape, seed):
    want = {k.removeprefix(f"otsu_{shape}_"): v for k, v in arrays("multimodal-detr-masks", seed).items()}
    assert torch.equal(eight_bit(want["maps"]), want["u8"])
    cells = cell_masks(want["maps"])
    assert torch.equal(cells.threshold, want["threshold"].long())
    assert torch.equal(cells.masks, want["binary"] == 255)
    if "mask_sizes" in want:
        entered, original = pair(want["mask_sizes"])
        assert torch.equal(image_masks(cells.masks[:6], entered, original), want["mask_first6"] > 0)


def test_thresholds_of_images_of_eight_bits(seed):
    want = arrays("multimodal-detr-masks", seed)
    threshold = otsu_threshold(want["otsu8_in"])
    assert torch.equal(threshold, want["otsu8_threshold"].long())
    assert torch.equal(want["otsu8_in"] > threshold[:, None, None], want["otsu8_binary"] == 255)


def test_a_single_cell(seed):
    want = arrays("multimodal-detr-masks", seed)["single_cell_mask"] > 0
    cell = torch.zeros(1, 7, 7, dtype=torch.bool)
    rows, columns = want.any(1).nonzero()[:, 0], want.any(0).nonzero()[:, 0]
    cell[0, int(rows.float().mean()) // 32, int(columns.float().mean()) // 32] = True
    assert torch.equal(image_masks(cell, (224, 224))[0], want)
    assert want.sum() == 4096
