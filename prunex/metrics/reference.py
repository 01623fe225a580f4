"""What to print beside agreement: what chance scores, and masks and maps that know less or something else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunex.checks import check_whole
from prunex.metrics.agreement import ON_SCORES, on_mask, rank_biased_chance
from prunex.metrics.checks import check_kept, check_scores


def chance(kept: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """What each measure of :func:`agreement` scores by chance, per image, in closed form: by name float64 [B].

    ``equal_area_iou`` is the usual approximation rho / (2 - rho); ``rank_biased_overlap`` is for scores of all patches.

    >>> chance(torch.tensor([[[True, False]]]), torch.tensor([[[3.0, 1.0]]]))["mass_kept"]
    tensor([0.5000], dtype=torch.float64)
    """
    flat, relevance = check_kept(kept, maps)
    rho = flat.double().mean(1)
    nothing = torch.zeros_like(rho)
    corrected = ("corrected_overlap", "mass_efficiency", "rank_spearman", "rank_kendall", "depth_correlation")
    return dict.fromkeys(corrected, nothing) | {
        "equal_area_iou": rho / (2 - rho),
        "topk_overlap": rho,
        "mass_kept": rho,
        "kept_auc": nothing + 0.5,
        "sign_agreement": (relevance > 0).double().mean(1),
        "rank_biased_overlap": nothing + rank_biased_chance(flat.shape[1]),
    }


def baselines(
    kept: Tensor,
    maps: Tensor,
    *,
    other_maps: Tensor | None = None,
    random_maps: Tensor | None = None,
    draws: int = 20,
    seed: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """What to print beside every agreement: the same measures of masks and maps that know less, or something else.

    From ``kept`` bool and ``maps`` float [B, gh, gw], and further maps of the same shape, by baseline, by measure,
    float64 [B]; what does not fit is refused:

    - "random": the mean over ``draws`` random masks of the same K, with a ``seed``;
    - "centre": the K patches nearest to the centre (of those equally near, the first in row order);
    - "another_image": the same mask with the map of the next image of the batch, the last's with the first's; NaN for
      a batch of one. What a mask scores above it is specific to the image;
    - "other_method", with ``other_maps`` of another method: its K most relevant patches in place of the mask, and the
      rank measures of the two maps. Methods disagree: it is the ceiling;
    - "random_model", with ``random_maps``, of the model with random weights (:func:`prunex.metrics.randomised`): the
      mask judged by the random model's map.

    >>> measured = baselines(torch.tensor([[[True, False, False]]]), torch.tensor([[[3.0, 1.0, 2.0]]]))
    >>> sorted(measured), measured["centre"]["topk_overlap"]
    (['another_image', 'centre', 'random'], tensor([0.], dtype=torch.float64))
    """
    check_whole("draws", draws, 1)
    check_whole("seed", seed, 0)
    flat, _ = check_kept(kept, maps)
    grid, count, batch = kept.shape[1:], flat.sum(1), len(flat)
    # One set of orders for all images, so that an image's numbers do not depend on which batch it came in.
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in range(draws)]).to(flat.device)
    drawn = (orders < count[:, None, None]).flatten(0, 1).unflatten(1, grid)
    # Every image is judged under all draws at once, as so many images.
    random = on_mask(drawn, maps.repeat_interleave(draws, 0))
    central = _top(_nearness(grid, flat.device).expand(batch, -1), count)
    measured = {
        "random": {name: v.unflatten(0, (batch, draws)).mean(1) for name, v in random.items()},
        "centre": on_mask(central.unflatten(1, grid), maps),
        "another_image": on_mask(kept, maps.roll(-1, 0)),
    }
    # The next image of a batch of one is itself, which is no other image.
    if batch == 1:
        measured["another_image"] = {k: torch.full_like(v, torch.nan) for k, v in measured["another_image"].items()}
    if other_maps is not None:
        other, _ = check_scores("other_maps", other_maps, maps)
        on_grid = other.unflatten(1, grid)
        measured["other_method"] = on_mask(_top(other, count).unflatten(1, grid), maps)
        measured["other_method"] |= {name: measure(on_grid, maps) for name, measure in ON_SCORES.items()}
    if random_maps is not None:
        measured["random_model"] = on_mask(kept, random_maps)
    return measured


def _top(values: Tensor, count: Tensor) -> Tensor:
    """The ``count`` largest of each row, bool [B, P]; of ties the first."""
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places) < count[:, None]


def _nearness(grid: Any, device: torch.device) -> Tensor:
    """Minus the squared distance of each patch from the grid's centre, [P]; whole numbers, so that ties are ties."""
    down, right = (2 * torch.arange(n, device=device) - (n - 1) for n in grid)
    return -(down[:, None] ** 2 + right[None, :] ** 2).flatten()
