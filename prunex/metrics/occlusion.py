"""What a model makes of images with patches or pixels taken away: the questions that faithfulness metrics ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from prunex.checks import check_choice
from prunex.errors import PrunexError
from prunex.metrics.checks import check_maps
from prunex.relevance.features import patch_means
from prunex.removal.game import OUTPUTS, ROUTES, SELECTIONS, Output, Removal, RemovalOptions, score
from prunex.targets import Target
from prunex.vit.anatomy import ViT, check_images, find
from prunex.vit.aside import as_found
from prunex.vit.embedding import over_pixels
from prunex.vit.forward import own_anatomy
from prunex.vit.methods import check_methods
from prunex.vit.readout import classifies, scalar
from prunex.vit.recording import choose_target, rounded
from prunex.vit.surroundings import aimed

BITS = 40  # of an interpolated value that count
ULPS = 32  # by so many units in the last place a score may differ where nothing else does


class Occlusion:
    """A model and a batch of images, asked what is left of the prediction when parts are taken away.

    Gradients are off; the model answers in eval mode, and its flags and the trace of its last training forward stay.
    """

    def __init__(self, model: nn.Module, images: Tensor, **options: Unpack[RemovalOptions]) -> None:
        self.forwards = 0  # altered images the model has seen
        options = {"selection": "free", **options}
        check_choice("removal", options.get("removal", "drop"), ROUTES)
        check_choice("selection", options["selection"], SELECTIONS)
        vit: ViT = find(model)[1]
        check_methods(vit)
        anatomy = own_anatomy(vit)
        check_images(anatomy, images, values=True)
        if not classifies(vit):
            raise PrunexError("this model has no classifier (num_classes=0): removing patches changes no class score")
        # Images go where the model is, and in its precision: metrics are given what loaders give.
        weight = next(vit.parameters())
        self.model, self.images = vit, images.detach().to(weight.device, weight.dtype)
        self.size, self.patch = (images.shape[2], images.shape[3]), anatomy.patch
        with as_found(vit, train=False), torch.no_grad():
            self.game = Removal(vit, self.images, output="logit", **options)
            self.grid, self.patches = self.game.grid, self.game.players
            nothing = torch.zeros(len(images), self.patches, dtype=torch.bool, device=weight.device)
            self.clean = self.game.rows(torch.arange(len(images), device=weight.device), ~nothing)

    def __call__(self, image: Tensor, removed: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of R altered images, float64 [R, classes], each made of ``image`` int64 [R].

        ``removed`` gives for row numbers what is taken away in them: bool [r, P] patches, or [r, H * W] painted pixels.
        """
        if not len(image):
            return self.clean[:0]
        rows = torch.arange(len(image), device=self.images.device)
        # Rows whose tokens leave are sorted by how many are left, all at once; of pixels a table of all is too large.
        parts = rows.split(self.game.chunk) if self.game.painted else (rows,)
        with as_found(self.model, train=False), torch.no_grad():
            return torch.cat([self.game.rows(image[part], ~removed(part)) for part in parts])

    def answers(self, image: Tensor, removed: Callable[[Tensor], Tensor], count: Tensor) -> Tensor:
        """The same, where ``count`` [R] tells how many units are gone: rows without any are the clean image."""
        logits, rows = self.clean[image], count.nonzero()[:, 0]
        if len(rows):
            logits[rows] = self(image[rows], lambda part: removed(rows[part]))
            self.forwards += len(rows)
        return logits


class ClassOcclusion(Occlusion):
    """The class's score f of altered images, and the maps that say what to alter."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        maps: Tensor,
        target: Target = None,
        *,
        output: Output = "probability",
        **options: Unpack[RemovalOptions],
    ) -> None:
        check_choice("output", output, OUTPUTS)
        if callable(target):
            # The ViT that ends in the target's number has nothing else to choose from.
            model, target = aimed(model, target, images), 0
        super().__init__(model, images, **options)
        self.output: Output = "logit" if scalar(self.model) else output
        self.maps = check_maps(maps, self.images, self.grid)
        self.values = on_patches(self.maps, self.grid, self.patch)
        self.target = choose_target(self.clean, target)
        self.bad = self.maps.flatten(1).isnan().any(1)
        self.score = self._of_class(self.clean, torch.arange(len(self.maps), device=self.maps.device))

    def of_rows(self, image: Tensor, removed: Callable[[Tensor], Tensor], count: Tensor) -> Tensor:
        """F of rows [R], each of one image [R] with ``count`` [R] units gone."""
        return self._of_class(self.answers(image, removed, count), image)

    def of_sets(self, image: Tensor, removed: Tensor) -> Tensor:
        """F of sets of patches gone, bool [R, P]; none is asked of an image twice."""
        # Image and set as one row: equal sets of different images stay apart.
        code = torch.cat([image[:, None].to(torch.int32), removed.to(torch.int32)], 1)
        distinct, place = code.unique(dim=0, return_inverse=True)
        sets = distinct[:, 1:].bool()
        return self.of_rows(distinct[:, 0].long(), lambda part: sets[part], sets.sum(1))[place]

    def lost(self, after: Tensor) -> Tensor:
        """f(x) less f of altered images [B, K], float64; what the model's rounding alone keeps apart is made equal."""
        # Else a model that does not depend on what was removed would be judged by its last bits.
        # A unit in the last place of the largest score, or 32 of them where precision leaves room.
        info = torch.finfo(self.images.dtype)
        most = torch.maximum(self.score.abs(), after.abs().amax(1))[:, None]
        unit = most * info.eps * (ULPS if info.bits >= 32 else 1)
        steps = (self.score[:, None] - after) / unit.where(unit > 0, 1)
        return torch.where(unit > 0, steps.round() * unit, 0)

    def hide(self, values: Tensor) -> Tensor:
        """NaN for images with NaN in their map; values [B] or [B, ...]."""
        return values.masked_fill(self.bad.view(-1, *[1] * (values.ndim - 1)), torch.nan)

    def _of_class(self, logits: Tensor, image: Tensor) -> Tensor:
        return score(logits, self.output).gather(1, self.target[image, None])[:, 0]


def on_patches(maps: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """One value a patch, [B, P]: pixel maps by the mean over each patch."""
    return (maps if tuple(maps.shape[1:]) == grid else patch_means(maps, grid, patch)).flatten(1)


def on_pixels(maps: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """One value a pixel, [B, H * W]: maps of patches bilinearly, as an explanation's ``upsample``, but in float64."""
    if tuple(maps.shape[1:]) == size:
        return maps.flatten(1)
    covered = (maps.shape[1] * patch[0], maps.shape[2] * patch[1])
    # Interpolated in float64 and rounded: what rounding keeps apart would leave in an order of its own.
    fine = over_pixels(maps.double(), size, covered).flatten(1)
    return rounded(fine, BITS)
