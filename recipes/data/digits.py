"""Digit scenes: real handwritten digits on real photos, with the exact mask of every digit.

Both sources ship inside scikit-learn, so the data needs no network: 1,797 handwritten digits of 8 x 8 pixels and
two photos. A scene is a crop of a photo with one digit painted on it in lighter ink; its label is the digit, its mask
the painted pixels. Every fifth digit of each class and the left-hand part of each photo belong to validation alone.

Nothing is stored (see :mod:`prunex.recipes.data.draws`), and a whole batch is drawn at once.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes

from prunex.checks import check_choice, check_share, check_whole
from prunex.errors import PrunexError
from prunex.recipes.data.draws import SPLITS, DrawnData, DrawnDataset, Split, uniform

Batch = tuple[Any, ...]  # images, labels, masks; of some tasks a dict of more, too
Task = Literal["digit", "parity", "several", "count", "segmentation", "detection"]
CONCEPTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = tuple(str(digit) for digit in range(10))
TASKS: dict[str, tuple[str, ...]] = {  # names of the outputs
    "digit": DIGITS,
    "parity": ("even", "odd"),
    "several": DIGITS,
    "count": ("digits",),
    "segmentation": ("background", *DIGITS),
    "detection": DIGITS,
}
# Fewest and most digits of scenes that may have several.
MANY = {"several": (2, 2), "count": (1, 3), "segmentation": (1, 3), "detection": (1, 3)}

HELD_OUT_EVERY = 5  # every fifth digit of each class is never trained on
HELD_OUT_WIDTH = 0.3  # nor is the left-hand 30 % of each photo
ZOOMS = (1.0, 0.7, 0.5)  # photos are also shown scaled down, which makes their texture finer
STROKE = 48  # side of the enlarged digits, in pixels; at least the largest size they are painted at
LUMINANCE = (0.299, 0.587, 0.114)
DRAWS = 20  # random numbers a scene may use


@functools.cache
def _digits(held_out: bool) -> tuple[Tensor, Tensor]:
    """Strokes ``[N, 1, STROKE, STROKE]`` in [0, 1] and labels ``[N]`` of one side of the split."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # By class, so that both sides hold all digits in equal parts.
    held = np.zeros(len(labels), bool)
    for digit in range(10):
        held[np.flatnonzero(labels == digit)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    chosen = held if held_out else ~held
    coarse = torch.from_numpy(pixels[chosen]).float().view(-1, 1, 8, 8) / 16
    fine = F.interpolate(coarse, size=(STROKE, STROKE), mode="bicubic", align_corners=False)
    # A pen's edge instead of the blur of 8 x 8 pixels.
    strokes = ((fine - 0.38) / 0.2).clamp(0, 1)
    return strokes, torch.from_numpy(labels[chosen]).long()


@functools.cache
def _photos(held_out: bool, side: int) -> tuple[Tensor, Tensor]:
    """All photo parts in one picture ``[3, H, W]`` uint8, and for each its first row and the starts down and across."""
    from sklearn.datasets import load_sample_images

    parts = []
    for photo in load_sample_images().images:
        whole = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
        edge = round(whole.shape[2] * HELD_OUT_WIDTH)
        region = whole[:, :, :edge] if held_out else whole[:, :, edge:]
        # Scaled after the cut, so that no pixel crosses it.
        for zoom in ZOOMS:
            height, width = (max(side, round(n * zoom)) for n in region.shape[1:])
            small = F.interpolate(region[None].float(), size=(height, width), mode="bilinear", antialias=True)
            parts.append(small[0].round().clamp(0, 255).byte())
    # One picture, so that a batch of crops is one indexing, whichever photos they are of.
    atlas = torch.zeros(3, sum(p.shape[1] for p in parts), max(p.shape[2] for p in parts), dtype=torch.uint8)
    table, top = [], 0
    for part in parts:
        atlas[:, top : top + part.shape[1], : part.shape[2]] = part
        table.append((top, part.shape[1] - side + 1, part.shape[2] - side + 1))
        top += part.shape[1]
    return atlas, torch.tensor(table)


class DigitDataset(DrawnDataset):
    """The scenes of one split; index ``epoch * len(self) + i`` is scene ``i`` of that epoch.

    Arguments are those of :class:`DigitScenes`; ``"val"`` and ``"test"`` share digits and photo parts, not scenes.

    >>> images, labels, masks = DigitDataset("val", size=8).__getitems__([0, 5])
    >>> images.shape, labels.shape, masks.shape, masks.dtype
    (torch.Size([2, 3, 64, 64]), torch.Size([2]), torch.Size([2, 64, 64]), torch.bool)
    """

    def __init__(
        self,
        split: Split = "train",
        size: int = 10_000,
        image_size: int = 64,
        digit_size: tuple[int, int] = (22, 34),
        contrast: float = 0.45,
        curriculum: int = 0,
        seed: int = 0,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        task: Task = "digit",
        annotated: float = 1.0,
    ) -> None:
        check_choice("split", split, SPLITS)
        self.task, self.annotated = task, annotated if split == "train" else 1.0
        self.split, self.size, self.image_size, self.seed = split, size, image_size, seed
        self.digit_size, self.contrast, self.curriculum = digit_size, contrast, curriculum
        self.strokes, self.labels = _digits(held_out=split != "train")
        self.atlas, self.places = _photos(held_out=split != "train", side=image_size)
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def __getitem__(self, index: int) -> Batch:
        images, labels, masks, *more = self.__getitems__([index])
        rest = []
        for part in more:
            rest.append({name: rows[0] for name, rows in part.items()})
        return images[0], labels[0], masks[0], *rest

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch: images float32 [B, 3, H, W], normalised, labels as the task has them, masks bool [B, H, W], more."""
        numbers = np.asarray(indices, dtype=np.int64)
        pixels, labels, masks = self.paint(numbers)
        images = (pixels - self._mean) / self._std
        if self.task == "digit":
            return images, labels, masks
        if self.task in MANY:
            return self._labelled(images, masks)
        concepts = F.one_hot(labels, 10).float()
        known = uniform((self.seed, SPLITS[self.split]), numbers, DRAWS)[:, DRAWS - 1] < self.annotated
        return images, labels % 2, masks, {"concepts": concepts.masked_fill(~known.unsqueeze(1), math.nan)}

    def _labelled(self, images: Tensor, masks: Tensor) -> Batch:
        """A batch of scenes of several digits, with masks [B, 10, H, W], as the task has it."""
        shown, anywhere = masks.flatten(2).any(2), masks.any(1)
        if self.task == "count":
            return images, shown.sum(1).float(), anywhere
        if self.task == "segmentation":
            return images, torch.where(anywhere, masks.int().argmax(1) + 1, 0), anywhere
        if self.task == "detection":
            return images, [_boxes(of_image) for of_image in masks], anywhere
        return images, shown.float(), anywhere, {"label_masks": masks}

    def paint(self, numbers: np.ndarray) -> Batch:
        """Images in [0, 1], digits int64 [B] and masks bool [B, H, W]; of several digits [B, k] and [B, 10, H, W]."""
        u = uniform((self.seed, SPLITS[self.split]), numbers, DRAWS).unbind(1)
        ease = self._ease(numbers)
        photos = self._crops(u[1], u[2], u[3], flip=u[4] < 0.5)
        mean = photos.mean((2, 3), keepdim=True)
        # An easy scene has a faded photo.
        photos = mean + (photos - mean) * (1 - 0.8 * ease).view(-1, 1, 1, 1)
        if self.task in MANY:
            digits, inks = self._several(numbers, ease)
            alpha = inks.amax(1, keepdim=True)
            masks = torch.zeros(len(numbers), 10, *alpha.shape[2:], dtype=torch.bool)
            # Where ink of two meets, the later digit lies on top.
            for digit, ink in zip(digits.unbind(1), inks.unbind(1), strict=True):
                drawn = ink >= 0.5
                masks &= ~drawn[:, None]
                masks[torch.arange(len(numbers)), digit] |= drawn
        else:
            which = (u[0] * len(self.labels)).long()
            alpha = self._place(self.strokes[which], u[7:13], ease)
            digits, masks = self.labels[which], alpha[:, 0] >= 0.5
        photos, ink = self._light(photos, alpha, u[13:18])
        return photos + alpha * (ink - photos), digits, masks

    def _several(self, numbers: np.ndarray, ease: Tensor) -> tuple[Tensor, Tensor]:
        """Different digits int64 [B, k] and their ink [B, k, H, W], none of those beyond a scene's own number."""
        # Numbers of their own, so that scenes of one digit stay as they are.
        fewest, most = MANY[self.task]
        u = uniform((self.seed, SPLITS[self.split], 1), numbers, draws=15 + 7 * most)
        count = fewest + (u[:, 0] * (most - fewest + 1)).long()
        digits, quarters = u[:, 1:11].argsort(1)[:, :most], u[:, 11:15].argsort(1)[:, :most]
        order, sizes = self.labels.argsort(stable=True), self.labels.bincount(minlength=10)
        first = sizes.cumsum(0) - sizes
        inks = []
        for i in range(most):
            draws, digit, quarter = u[:, 15 + 7 * i : 22 + 7 * i].unbind(1), digits[:, i], quarters[:, i]
            which = order[first[digit] + (draws[0] * sizes[digit]).long()]
            corner = torch.stack([quarter % 2, quarter // 2], 1) - 0.5
            ink = self._place(self.strokes[which], draws[1:], ease, corner)[:, 0]
            inks.append(ink * (i < count).view(-1, 1, 1))
        return digits, torch.stack(inks, 1)

    def _ease(self, numbers: np.ndarray) -> Tensor:
        """1 for the first epoch's scenes, 0 once the curriculum is over; ``[B]``."""
        if self.split != "train" or self.curriculum <= 0:
            return torch.zeros(len(numbers))
        return torch.from_numpy(1 - numbers // self.size / self.curriculum).float().clamp(0, 1)

    def _crops(self, which: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
        top, height, width = self.places[(which * len(self.places)).long()].unbind(1)
        y, x = top + (down * height).long(), (right * width).long()
        # A view: nothing is copied before the crops are taken.
        windows = self.atlas.unfold(1, self.image_size, 1).unfold(2, self.image_size, 1)
        crops = windows[:, y, x].transpose(0, 1).float() / 255
        return torch.where(flip.view(-1, 1, 1, 1), crops.flip(3), crops)

    def _place(self, strokes: Tensor, u: Sequence[Tensor], ease: Tensor, corner: Tensor | None = None) -> Tensor:
        """Turn, slant, scale and move the digits; how much ink lies on each pixel ``[B, 1, H, W]``.

        ``corner`` [B, 2] is -0.5 or 0.5 across and down for digits that stay within a quarter.
        """
        span = self.image_size if corner is None else self.image_size // 2
        least, most = self.digit_size[0], min(self.digit_size[1], span)
        side = least + (most - least) * u[0]
        side = side + (0.7 * span - side).clamp(min=0) * ease
        angle, slant = math.radians(24) * (u[1] - 0.5), 0.3 * (u[2] - 0.5)
        stretch = torch.exp(0.3 * (u[3] - 0.5))
        # In half images, how far from the middle the centre may lie.
        room = (span - side) / self.image_size
        centre_x, centre_y = (2 * u[4] - 1) * room, (2 * u[5] - 1) * room
        if corner is not None:
            centre_x, centre_y = centre_x + corner[:, 0], centre_y + corner[:, 1]
        scale = self.image_size / side
        cos, sin = angle.cos() * scale, angle.sin() * scale
        a, b = cos * stretch, sin * stretch + slant * cos
        c, d = -sin / stretch, cos / stretch
        rows = (a, b, -a * centre_x - b * centre_y, c, d, -c * centre_x - d * centre_y)
        # The inverse map, from pixels of the scene to the digit, as affine_grid wants it.
        theta = torch.stack(rows, 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, [len(side), 1, self.image_size, self.image_size], align_corners=False)
        return F.grid_sample(strokes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _light(self, photos: Tensor, alpha: Tensor, u: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Photos dimmed where they leave no room above them, and lighter ink ``[B, 3, 1, 1]`` to paint with."""
        weights = torch.tensor(LUMINANCE).view(1, 3, 1, 1)
        behind = (photos * weights * alpha).sum((1, 2, 3)) / alpha.sum((1, 2, 3)).clamp(min=1)
        # Photos that are too light leave no room for lighter ink, and are dimmed.
        wanted = behind.clamp(max=0.15 + (0.8 - self.contrast) * u[0])
        photos = photos * (wanted / behind.clamp(min=1e-3)).clamp(max=1).view(-1, 1, 1, 1)
        level = wanted + self.contrast + (0.95 - self.contrast - wanted).clamp(min=0) * u[1]
        tint = 0.3 * (torch.stack(list(u[2:5]), 1).view(-1, 3, 1, 1) - 0.5)
        # Colour without a change of luminance, which is what contrast is measured in.
        tint = tint - (tint * weights).sum(1, keepdim=True)
        return photos, (level.view(-1, 1, 1, 1) + tint).clamp(0, 1)


def _boxes(masks: Tensor) -> dict[str, Tensor]:
    """Boxes round the digits that are there, of masks [10, H, W], and which digits they are."""
    labels = masks.flatten(1).any(1).nonzero()[:, 0]
    boxes = masks_to_boxes(masks[labels])
    # Its last row and column are inside, and a box ends behind them.
    boxes[:, 2:] += 1
    return {"boxes": boxes, "labels": labels}


class DigitScenes(DrawnData):
    """Batches of digit scenes: fresh ones every training epoch, always the same ones for validation and test.

    A batch is ``(images float32 [B, 3, H, W] normalised, labels int64 [B] in 0..9, masks bool [B, H, W])``; the masks
    are true where at least half of a pixel is ink. Digits and photo parts of validation are never trained on,
    whatever the seed. The test split draws other scenes from validation's digits and photo parts.

    With ``task="parity"`` labels are 0 for even digits and 1 for odd ones, and a batch has a fourth part,
    ``{"concepts": float32 [B, 10]}``: which digit it is, NaN where that is not told.

    With ``task="several"`` a scene has two different digits, each within a quarter of its own and at most half the
    image high: labels are float32 [B, 10], 1 for the digits that are there, and a batch has a fourth part,
    ``{"label_masks": bool [B, 10, H, W]}``, whose union the masks are. With ``task="count"`` it has one to three, and
    labels are their number, float32 [B].

    With ``task="segmentation"`` and ``"detection"`` the scenes are those of ``"count"``. For the first, labels are
    int64 [B, H, W]: 0 for background, d + 1 where digit d is; for the second a list of B dicts, as torchvision has
    them: ``boxes`` float32 [n, 4] (left, top, right, bottom, in pixels), one round each digit's mask, and ``labels``
    int64 [n] in 0..9.

    Args:
        batch_size: Scenes per batch (per process).
        train_size: Scenes per training epoch.
        val_size: Scenes for validation, and for test.
        image_size: Side of a scene in pixels, 32 to 128.
        min_digit: Smallest side of a digit's box in pixels.
        max_digit: Largest side of a digit's box in pixels.
        contrast: How much lighter, 0.1 to 0.5 of full luminance, the ink at least is than the mean of the photo behind
            it. Photos that are too light for that are dimmed.
        curriculum: Epochs over which training scenes go from easy (large digits, faded photos) to full difficulty;
            0 starts with full difficulty. Validation is always at full difficulty.
        seed: Another seed gives other scenes, from the same split of digits and photos.
        num_workers: Processes that draw ahead; 0 draws in the training process.
        task: What labels say: which "digit" it is, or its "parity"; which digits of "several", or their "count"; which
            digit each pixel shows ("segmentation"), or each digit's box ("detection").
        annotated: Share of the training scenes, in [0, 1], whose concepts are told.

    Raises:
        PrunexError: If an argument is outside its range.

    >>> data = DigitScenes(batch_size=4, train_size=8, val_size=8)
    >>> data.setup("fit")
    >>> [tuple(part.shape) for part in next(iter(data.train_dataloader()))]
    [(4, 3, 64, 64), (4,), (4, 64, 64)]
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(
        self,
        batch_size: int = 128,
        train_size: int = 10_000,
        val_size: int = 2_000,
        image_size: int = 64,
        min_digit: int = 22,
        max_digit: int = 34,
        contrast: float = 0.45,
        curriculum: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        task: Task = "digit",
        annotated: float = 1.0,
    ) -> None:
        super().__init__(batch_size, train_size, val_size, seed, num_workers)
        self.task: Task = task
        self.class_names = TASKS[check_choice("task", task, TASKS)]
        self.num_classes = len(self.class_names)
        self.concept_names = CONCEPTS if task == "parity" else ()
        self.annotated = check_share("annotated", annotated, zero=True)
        self.curriculum = check_whole("curriculum", curriculum, 0)
        if not 32 <= image_size <= 128:
            raise PrunexError(
                f"image_size={image_size!r} is not allowed: give 32 to 128 pixels, as the photos are small"
            )
        if not 8 <= min_digit <= max_digit <= image_size:
            raise PrunexError(
                f"min_digit={min_digit!r}, max_digit={max_digit!r} is not allowed: "
                f"give 8 <= min_digit <= max_digit <= image_size ({image_size})"
            )
        if task in MANY and min_digit > image_size // 2:
            raise PrunexError(
                f"min_digit={min_digit!r} is not allowed with task={task!r}: give at most half of image_size "
                f"({image_size // 2}), as every digit has a quarter of the image"
            )
        if not 0.1 <= contrast <= 0.5:
            raise PrunexError(f"contrast={contrast!r} is not allowed: give a number from 0.1 to 0.5")
        # Kept in checkpoints, and not logged: Lightning refuses a module whose own ``task`` is called otherwise.
        self.save_hyperparameters(logger=False)
        self.image_size, self.digit_size, self.contrast = image_size, (min_digit, max_digit), contrast

    def dataset(self, split: Split) -> DigitDataset:
        """The scenes of one split as a map-style dataset."""
        return DigitDataset(
            split,
            size=self.size_of(split),
            image_size=self.image_size,
            digit_size=self.digit_size,
            contrast=self.contrast,
            curriculum=self.curriculum,
            seed=self.seed,
            mean=self.mean,
            std=self.std,
            task=self.task,
            annotated=self.annotated,
        )
