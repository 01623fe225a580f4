"""The training patches nearest a tree's prototypes, gathered on the device that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunex.brief import Brief

NEAREST = 3  # training patches kept for each prototype
_STEPS, _NUMBERS = 32, 2**23  # of training, and pixels of their patches, that wait on the device at most


@dataclass(eq=False, repr=False)
class Nearest(Brief):
    """A training patch that is near a prototype.

    Attributes:
        value: Its similarity.
        id: Of its image, as it was given.
        cell: (row, column) on the patch grid; of 2x2 prototypes of the upper left patch.
        pixels: [C, h, w], as they were given.
    """

    value: float
    id: Any
    cell: tuple[int, int]
    pixels: Tensor


@dataclass(eq=False, repr=False)
class _Step(Brief):
    """What one step offers each branch, where it trains: [n, branches], and pixels [n, branches, C, h, w]."""

    ids: list[Any]  # n a branch
    value: Tensor
    row: Tensor  # of the image in its batch
    patch: Tensor
    pixels: Tensor
    columns: int  # of the patch grid


class NearestPatches:
    """Patches of those images that are most similar to each branch's prototype, over many steps.

    What a step offers stays on its device and is looked at some steps later: to look is to wait for the device.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[Nearest]] = {}
        self._waiting: list[_Step] = []

    @property
    def by_branch(self) -> dict[int, list[Nearest]]:
        """By branch, the nearest first; branches that no image came by are left out."""
        self._catch_up()
        return self._kept

    def _catch_up(self) -> None:
        waiting, self._waiting = self._waiting, []
        for step in waiting:
            self._look(step)

    def offer(
        self,
        values: Tensor,
        patches: Tensor,
        images: Tensor,
        ids: Sequence[Any],
        grid: tuple[int, int],
        side: int,
    ) -> None:
        """Offer the images of one step.

        Args:
            values: float [B, branches], each image's similarity, below 0 or NaN for none.
            patches: int64 [B, branches], the patch that it is of, of windows the upper left one; -1 for none.
            images: [B, C, H, W], to cut patches from.
            ids: One an image.
            grid: The patch grid.
            side: Patches a side of what is cut.
        """
        # The best of a step are enough: no other of its images can be among the best of all.
        best = values.detach().float().nan_to_num(-1).topk(min(NEAREST, len(values)), 0)
        at = patches.gather(0, best.indices)
        pixels = _cut(images.detach(), best.indices, at.clamp(min=0), grid, side)
        value = best.values.masked_fill(at < 0, -1)
        self._waiting.append(_Step(list(ids), value, best.indices, at, pixels, grid[1]))
        if len(self._waiting) == _STEPS or sum(s.pixels.numel() for s in self._waiting) > _NUMBERS:
            self._catch_up()

    def _look(self, step: _Step) -> None:
        """Take a step's patches in among the nearest, where they are."""
        values, rows, patches = step.value.T.tolist(), step.row.T.tolist(), step.patch.T.tolist()
        for branch, offered in enumerate(zip(values, rows, patches, strict=True)):
            for n, (value, row, patch) in enumerate(zip(*offered, strict=True)):
                name, held = step.ids[row], self._kept.get(branch, [])
                # One patch an image: several of the same one say less of what a prototype stands for.
                others = [near for near in held if near.id != name]
                again = any(near.id == name and near.value >= value for near in held)
                if value < 0 or again or (len(others) >= NEAREST and others[-1].value >= value):
                    continue
                pixels = step.pixels[n, branch].cpu().clone()
                near = Nearest(value, name, divmod(patch, step.columns), pixels)
                self._kept[branch] = sorted([*others, near], key=lambda near: -near.value)[:NEAREST]


def _cut(images: Tensor, rows: Tensor, patches: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The pixels of patches [n, m] of images [B, C, H, W] at ``rows`` [n, m]: [n, m, C, h, w]; no step waits for it."""
    (gh, gw), (height, width) = grid, images.shape[2:]
    top, left = patches // gw * height // gh, patches % gw * width // gw
    down = torch.arange(max(1, side * height // gh), device=images.device)
    along = torch.arange(max(1, side * width // gw), device=images.device)
    y, x = top[..., None, None] + down[:, None], left[..., None, None] + along
    return images[rows[..., None, None], :, y.clamp(max=height - 1), x.clamp(max=width - 1)].movedim(-1, 2)
