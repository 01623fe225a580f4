"""Drawn shapes: one to three coloured shapes in an image, with boxes and exact masks, as detectors take them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.checks import check_choice, check_whole
from prunex.errors import PrunexError
from prunex.recipes.data.draws import SPLITS, DrawnData, DrawnDataset, Split, uniform

Batch = dict[str, Any]
SHAPES = ("circle", "square", "triangle")
PLACES = 4  # a shape lies in a quarter of the image of its own
CLOUDS = 6  # points a side between which the background's grey goes smoothly
# Colours whose channels are dark or light, but for grey ones.
COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]).float()


class DrawnShapeDataset(DrawnDataset):
    """The images of one split; arguments are those of :class:`DrawnShapes`.

    >>> batch = DrawnShapeDataset("val", size=8).__getitems__([0, 5])
    >>> batch["pixel_values"].shape, {name: part.dtype for name, part in batch["labels"][0].items()}
    (torch.Size([2, 3, 96, 96]), {'class_labels': torch.int64, 'boxes': torch.float32, 'masks': torch.bool})
    """

    def __init__(
        self,
        split: Split = "train",
        size: int = 10_000,
        image_size: int = 96,
        sides: tuple[int, int] = (24, 44),
        most: int = 3,
        seed: int = 0,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    ) -> None:
        check_choice("split", split, SPLITS)
        self.split, self.size, self.seed = split, size, seed
        self.image_size, self.sides, self.most = image_size, sides, most
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([index])
        return {name: part[0] for name, part in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch of these images, see :class:`DrawnShapes`."""
        sizes = [1, PLACES, 4 * self.most, 4 * self.most, CLOUDS**2]
        numbers = np.asarray(indices, dtype=np.int64)
        draws = uniform((self.seed, SPLITS[self.split]), numbers, sum(sizes))
        number, by_place, form, paint, clouds = draws.split(sizes, 1)
        counts = 1 + (number[:, 0] * self.most).long()
        form, paint = form.view(-1, self.most, 4), paint.view(-1, self.most, 4)
        kinds = (form[..., 0] * len(SHAPES)).long()
        masks = self._masks(kinds, by_place.argsort(1)[:, : self.most], form[..., 1:])
        # As many as are drawn at most, so that a batch is one tensor; the rest are empty.
        masks &= (torch.arange(self.most) < counts[:, None])[:, :, None, None]
        pixels = self._paint(masks, paint, clouds)
        labels = []
        for kind, mask, count in zip(kinds, masks, counts.tolist(), strict=True):
            shown = mask[:count]
            labels.append({"class_labels": kind[:count], "boxes": boxes_of(shown), "masks": shown})
        return {"pixel_values": (pixels - self._mean) / self._std, "labels": labels}

    def _masks(self, kinds: Tensor, quarters: Tensor, u: Tensor) -> Tensor:
        """Pixels of shapes of these kinds ``[B, N]`` in these quarters of the image, bool ``[B, N, S, S]``."""
        half, (least, most) = self.image_size // 2, self.sides
        side = least + (u[..., 0] * (most - least + 1)).long()
        left, top = (
            start * half + (free * (half - side + 1)).long()
            for start, free in ((quarters % 2, u[..., 1]), (quarters // 2, u[..., 2]))
        )
        side, left, top = (part[..., None, None].float() for part in (side, left, top))
        centres = torch.arange(self.image_size) + 0.5
        # From -1 to 1 across the shape's square.
        x, y = 2 * (centres - left) / side - 1, 2 * (centres[:, None] - top) / side - 1
        inside = (x.abs() < 1) & (y.abs() < 1)
        forms = torch.stack([x**2 + y**2 < 1, inside, inside & (x.abs() < (y + 1) / 2)], 2)
        return forms.gather(2, kinds[..., None, None, None].expand(-1, -1, 1, *forms.shape[3:]))[:, :, 0]

    def _paint(self, masks: Tensor, u: Tensor, clouds: Tensor) -> Tensor:
        """Images in [0, 1] ``[B, 3, S, S]`` of shapes before a grey sky."""
        grey = 0.3 + 0.4 * clouds.view(-1, 1, CLOUDS, CLOUDS)
        sky = F.interpolate(grey, size=masks.shape[-2:], mode="bilinear", align_corners=True)
        colours = COLOURS[(u[..., 0] * len(COLOURS)).long()]
        colours = 0.2 * u[..., 1:] + 0.8 * colours
        ink = torch.einsum("bnhw,bnc->bchw", masks.float(), colours)
        return torch.where(masks.any(1, keepdim=True), ink, sky)


def boxes_of(masks: Tensor) -> Tensor:
    """The boxes round masks bool ``[N, H, W]``: centre x, centre y, width, height ``[N, 4]``, as shares of the image.

    >>> mask = torch.zeros(1, 4, 8, dtype=torch.bool); mask[0, 1:3, 2:6] = True
    >>> boxes_of(mask).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    """
    edges = []
    for across in (masks.any(1), masks.any(2)):
        length = across.shape[1]
        # Of equals argmax gives the first.
        first = across.float().argmax(1)
        last = length - across.flip(1).float().argmax(1)
        edges.append(torch.stack([first, last], 1) / length)
    (x1, x2), (y1, y2) = (e.unbind(1) for e in edges)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)


class DrawnShapes(DrawnData):
    """Batches of drawn shapes, for DETR and its kin; nothing is read or downloaded.

    A batch is a dict: ``pixel_values`` float32 [B, 3, S, S], normalised, and ``labels``, a dict for each image of n
    shapes: ``class_labels`` int64 [n] (circle, square, triangle), ``boxes`` float32 [n, 4], centre x, centre y, width
    and height as shares of the image, and ``masks`` bool [n, S, S]. Shapes do not overlap, and their colours say
    nothing of their class.

    Args:
        batch_size: Images per batch (per process).
        train_size: Images per training epoch.
        val_size: Images for validation, and for test.
        image_size: Side of an image in pixels, even, 16 to 512.
        min_side: Smallest side of a shape in pixels, at least 8.
        max_side: Largest side of a shape in pixels, at most half of the image's.
        most: Most shapes in an image, 1 to 4; each has as many of 1 to ``most``, with equal chances.
        seed: Another seed gives other images.
        num_workers: Processes that draw ahead; 0 draws in the training process.

    Raises:
        PrunexError: If an argument is outside its range.

    >>> data = DrawnShapes(batch_size=4, train_size=8, val_size=8)
    >>> batch = next(iter(data.val_dataloader()))
    >>> batch["pixel_values"].shape, [SHAPES[i] for i in batch["labels"][0]["class_labels"]]
    (torch.Size([4, 3, 96, 96]), ['circle', 'triangle', 'circle'])
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    class_names = SHAPES
    num_classes = len(SHAPES)

    def __init__(
        self,
        batch_size: int = 32,
        train_size: int = 4_000,
        val_size: int = 500,
        image_size: int = 96,
        min_side: int = 24,
        max_side: int = 44,
        most: int = 3,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, train_size, val_size, seed, num_workers)
        self.image_size = check_whole("image_size", image_size, 16, 512)
        self.most = check_whole("most", most, 1, PLACES)
        check_whole("min_side", min_side, 8)
        check_whole("max_side", max_side, 8)
        if image_size % 2 or not min_side <= max_side <= image_size // 2:
            raise PrunexError(
                f"image_size={image_size}, min_side={min_side}, max_side={max_side} is not allowed: give an even "
                "image_size and min_side <= max_side <= image_size / 2"
            )
        self.sides = (min_side, max_side)
        self.save_hyperparameters()

    def dataset(self, split: Split) -> DrawnShapeDataset:
        """The images of one split as a map-style dataset."""
        return DrawnShapeDataset(
            split, self.size_of(split), self.image_size, self.sides, self.most, self.seed, self.mean, self.std
        )
