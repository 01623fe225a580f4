"""Noisy linear imputation against the dense linear system that defines it."""

import pytest
import torch

from prunex.removal import imputing
from prunex.removal.imputing import NOISE, imputed
from prunex.removal.painting import painter
from tests.vits import images


def solved(image, present):
    """One image [C, H, W] filled in where ``present`` bool [H, W] is false: the system written out pixel by pixel."""
    _, height, width = image.shape
    gone = [(y, x) for y in range(height) for x in range(width) if not present[y, x]]
    number = {place: i for i, place in enumerate(gone)}
    matrix = torch.zeros(len(gone), len(gone), dtype=torch.float64)
    right = torch.zeros(len(gone), image.shape[0], dtype=torch.float64)
    for (y, x), i in number.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                place = (y + dy, x + dx)
                if (dy, dx) == (0, 0) or not (0 <= place[0] < height and 0 <= place[1] < width):
                    continue
                weight = 1 / 6 if 0 in (dy, dx) else 1 / 12
                matrix[i, i] += weight
                if place in number:
                    matrix[i, number[place]] -= weight
                else:
                    right[i] += weight * image[:, place[0], place[1]].double()
    out = image.double().clone()
    for (y, x), value in zip(gone, torch.linalg.solve(matrix, right), strict=True):
        out[:, y, x] = value
    return out


def noise(shape):
    return NOISE * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_system_is_solved(share, dtype):
    x = images(3, (16, 12), dtype=dtype)
    present = torch.rand(3, 1, 16, 12, generator=torch.Generator().manual_seed(1)) >= share
    filled = imputed(x, present)
    for one, here, result in zip(x, present[:, 0], filled, strict=True):
        wanted = solved(one, here) + noise(x.shape[1:]).double() * ~here
        assert float((result.double() - wanted).abs().max()) < 2e-4


def test_large_holes_of_whole_patches():
    x = images(1, (32, 32))
    present = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    present[..., 8:16, 16:24] = True
    wanted = solved(x[0], present[0, 0]) + noise(x.shape[1:]).double() * ~present[0, 0]
    assert float((imputed(x, present)[0].double() - wanted).abs().max()) < 2e-3


def test_what_is_present_stays_and_a_plane_fills_its_hole():
    ramp = (torch.arange(10.0)[:, None] + 2 * torch.arange(10.0)).expand(1, 3, 10, 10)
    present = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    present[..., 3:7, 4:8] = False
    filled = imputed(ramp, present)
    assert torch.equal(filled[present.expand_as(filled)], ramp[present.expand_as(filled)])
    assert float((filled - ramp - noise((3, 10, 10)) * ~present).abs().max()) < 1e-3


def test_nothing_present_is_the_mean_colour_and_all_present_the_image():
    x = images(2, (8, 8))
    nobody = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    assert torch.equal(imputed(x, nobody), noise((3, 8, 8)).expand(2, -1, -1, -1))
    assert torch.equal(imputed(x, ~nobody), x)
    assert imputed(x.half(), nobody).dtype == torch.float16


@pytest.mark.parametrize("at_once", [2**17, 1600])
def test_an_image_does_not_depend_on_its_neighbours(at_once, monkeypatch):
    """Rounds of the solver go on for whoever needs them; who is done stands still. In parts, too."""
    monkeypatch.setattr(imputing, "_AT_ONCE", at_once)
    x = torch.cat([images(3, (16, 16)), torch.zeros(1, 3, 16, 16)])
    present = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(3)) > torch.tensor(
        [0.1, 0.95, 0.5, 0.5]
    ).view(4, 1, 1, 1)
    together = imputed(x, present)
    for i in range(4):
        assert float((imputed(x[i : i + 1], present[i : i + 1])[0] - together[i]).abs().max()) < 1e-6


def test_it_is_one_of_the_paints():
    x = images(2, (16, 16))
    present = torch.rand(3, 1, 16, 16) > 0.5
    rows = torch.tensor([1, 0, 1])
    assert torch.equal(painter(x, "impute")(rows, present), imputed(x[rows], present))
    grey = painter(x, "grey")(rows, present)
    assert torch.equal(grey, x[rows] * present)
