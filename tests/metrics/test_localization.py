"""Localisation: hand values, the invariants of each measure, and chance."""

import pytest
import torch

from prunex import PrunexError
from prunex.metrics import energy_inside, foreground_f1, mean_iou, pixel_accuracy, pointing_game

MASK = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)


def random_masks(batch=6, size=(12, 9)):
    masks = torch.rand(batch, *size) < torch.linspace(0.1, 0.9, batch)[:, None, None]
    masks[:, 0, 0] = True
    return masks


def test_energy_by_hand():
    maps = torch.tensor([[[3.0, 1.0, 2.0], [-5.0, 2.0, 0.0]]])
    assert energy_inside(maps, MASK[None]).tolist() == [0.5]  # 4 of 8; the negative value counts nowhere
    assert energy_inside(-maps, MASK[None]).tolist() == [0.0]


def test_pointing_by_hand():
    maps = torch.zeros(4, 2, 3)
    maps[0, 0, 1], maps[1, 1, 1] = 2.0, 2.0
    maps[2, 0, 0] = maps[2, 1, 0] = maps[2, 1, 1] = 7.0  # three tied maxima, one inside
    maps[3] = -maps[0] - 1  # the least negative ones: five, of which the mask holds one
    assert pointing_game(maps, MASK.expand(4, -1, -1)).tolist() == pytest.approx([1, 0, 1 / 3, 1 / 5])


def test_the_mask_itself_is_perfect_and_its_complement_useless():
    masks = random_masks()
    for measure in (energy_inside, pointing_game):
        assert measure(masks.float(), masks).tolist() == [1.0] * 6
        assert measure((~masks).float(), masks).tolist() == [0.0] * 6


def test_constant_maps_score_the_share_of_the_area():
    masks = random_masks()
    area = masks.float().mean((1, 2))
    for measure in (energy_inside, pointing_game):
        assert torch.allclose(measure(torch.full(masks.shape, 0.3), masks), area, atol=1e-6)


def test_random_maps_score_about_chance():
    masks = (torch.rand(1, 10, 10) < 0.3).expand(4000, -1, -1)
    area = float(masks[0].float().mean())
    maps = torch.rand(masks.shape)
    error = (area * (1 - area) / 4000) ** 0.5
    assert abs(float(pointing_game(maps, masks).mean()) - area) < 3 * error
    assert abs(float(energy_inside(maps, masks).mean()) - area) < 3 * error  # its spread is smaller still


def test_scale_does_not_matter_and_images_do_not_meet():
    masks, maps = random_masks(), torch.randn(6, 12, 9)
    for measure in (energy_inside, pointing_game):
        whole = measure(maps, masks)
        for factor in (1e-30, 1e30):
            assert torch.allclose(measure(maps * factor, masks), whole, atol=1e-6)
        for i in range(6):
            assert torch.allclose(measure(maps[i : i + 1], masks[i : i + 1]), whole[i : i + 1], atol=1e-6)


def test_against_float64_written_out():
    masks, maps = random_masks(), torch.randn(6, 12, 9)
    inside, hits = energy_inside(maps, masks), pointing_game(maps, masks)
    for i in range(6):
        total = part = 0.0
        for value, there in zip(maps[i].double().flatten().tolist(), masks[i].flatten().tolist(), strict=True):
            total += max(value, 0)
            part += max(value, 0) * there
        assert float(inside[i]) == pytest.approx(part / total, abs=1e-6)
        row, column = divmod(int(maps[i].argmax()), 9)
        assert float(hits[i]) == float(masks[i, row, column])


def test_images_without_a_value_are_nan():
    maps = torch.ones(4, 2, 3)
    masks = MASK.repeat(4, 1, 1)
    masks[0] = False
    maps[1] = -1
    maps[2, 0, 0] = torch.nan
    assert energy_inside(maps, masks).isnan().tolist() == [True, True, True, False]
    assert pointing_game(maps, masks).isnan().tolist() == [True, False, True, False]


def test_half_precision_is_summed_in_float32():
    maps, masks = torch.full((1, 64, 64), 0.1, dtype=torch.bfloat16), torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, :16] = True
    found = energy_inside(maps, masks)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(0.25, abs=1e-5)
    assert pointing_game(maps, masks).tolist() == [0.25]


@pytest.mark.parametrize("measure", [energy_inside, pointing_game])
@pytest.mark.parametrize(
    ("maps", "masks", "match"),
    [
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), r"maps have shape \[2, 3\]: give a tensor \[B, H, W\]"),
        ([1.0], torch.ones(1, 2, 3, dtype=torch.bool), "maps are a list"),
        (torch.ones(1, 2, 3), MASK, r"masks have shape \[2, 3\]"),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3), "masks have dtype torch.float32: give booleans"),
        (torch.ones(1, 2, 3, dtype=torch.int64), MASK[None], "maps have dtype torch.int64: give floats"),
        (torch.ones(1, 2, 2), MASK[None], r"maps of shape \[1, 2, 2\] do not fit masks of shape \[1, 2, 3\].*upsample"),
        (torch.ones(0, 2, 3), MASK[None][:0], "do not fit"),
    ],
)
def test_refused(measure, maps, masks, match):
    with pytest.raises(PrunexError, match=match):
        measure(maps, masks)


def test_a_tolerance_is_a_disc_and_may_be_of_any_size():
    generator = torch.Generator().manual_seed(2)
    masks = torch.rand(6, 9, 13, generator=generator) < 0.05
    masks[:, 4, 6] = True
    maps = torch.rand(6, 9, 13, generator=generator)
    for tolerance in (0, 1, 1.5, 2, 2.9, 4, 1e200):
        wanted = []
        for m, mask in zip(maps, masks, strict=True):
            row, column = divmod(int(m.argmax()), 13)
            nearest = min(((r - row) ** 2 + (c - column) ** 2) ** 0.5 for r, c in mask.nonzero().tolist())
            wanted.append(float(nearest <= tolerance))
        assert pointing_game(maps, masks, tolerance=tolerance).tolist() == wanted


def test_infinite_relevance_is_no_segmentation():
    maps, masks = torch.rand(2, 4, 4), torch.rand(2, 4, 4) < 0.5
    masks[:, 0, 0] = True
    whole = [f(maps[:1], masks[:1]) for f in (pixel_accuracy, mean_iou)]
    maps[1, 1, 1] = torch.inf
    assert foreground_f1(maps, masks).isnan().tolist() == [False, True]
    assert [f(maps, masks) for f in (pixel_accuracy, mean_iou)] == whole
