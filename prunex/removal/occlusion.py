"""What a model makes of images with patches or pixels taken away: the questions that faithfulness metrics ask.

*Drop* takes patches' tokens out before the first block. The other routes paint pixels: *black* is 0 before
normalisation, *grey* 0 after it (the mean colour of the data), *mean* the image's own mean colour, and *blur* the image
under a Gaussian (kernel 11, sigma 5). Numbers of different routes are not interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.checks import check_choice
from prunex.errors import PrunexError
from prunex.removal.game import OUTPUTS, Removal, score
from prunex.vit.anatomy import ViT, check_images, find
from prunex.vit.aside import as_found
from prunex.vit.decisions import Decision, Pruner, Replay
from prunex.vit.embedding import embed, over_pixels
from prunex.vit.forward import own_anatomy, own_pruners, record, resume
from prunex.vit.methods import check_methods
from prunex.vit.recording import check_chunk, choose_target, rounded, sequences
from prunex.vit.tape import Tape

Output = Literal["probability", "logit", "log_odds"]
Route = Literal["drop", "black", "grey", "mean", "blur"]
REMOVALS = ("drop", "black", "grey", "mean", "blur")
SELECTIONS = ("free", "frozen")
KERNEL, SIGMA = 11, 5.0  # of the blur, as RISE has them
BITS = 40  # of an interpolated value that count


class Occlusion:
    """A model and a batch of images, asked what is left of the prediction when parts are taken away.

    Gradients are off; the model answers in eval mode, and its flags and the trace of its last training forward stay.

    Args:
        model: A supported ViT, pruned or dense, or a module that holds exactly one.
        images: float [B, C, H, W], normalised as the model expects.
        removal: "drop", "black", "grey", "mean" or "blur".
        selection: Of a pruned model: "free", the pruner decides anew, or "frozen", as it decided on the whole image.
        mean: Of the normalisation, one number a channel; only "black" needs it. None: the model's ``pretrained_cfg``.
        std: Likewise.
        chunk: Most images in one forward: bounds memory, changes no result. None: what is fastest.

    Attributes:
        clean: float64 [B, classes], logits of the whole images, by the same route.
        grid: Patch grid.
        size: Height and width in pixels.

    Raises:
        PrunexError: For an option that is none of these, images the model cannot take, or a model without classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        removal: Route = "drop",
        selection: Literal["free", "frozen"] = "free",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        chunk: int | None = None,
    ) -> None:
        for name, value, known in (("removal", removal, REMOVALS), ("selection", selection, SELECTIONS)):
            check_choice(name, value, known)
        check_chunk(chunk)
        vit: ViT = find(model)[1]
        check_methods(vit)
        self.model, self.removal = vit, removal
        anatomy = own_anatomy(vit)
        check_images(anatomy, images, values=True)
        if isinstance(vit.head, nn.Identity):
            raise PrunexError("this model has no classifier (num_classes=0): removing patches changes no class score")
        weight = next(vit.parameters())
        self.images = images.detach().to(weight.device, weight.dtype)
        self.size, self.patch = (images.shape[2], images.shape[3]), anatomy.patch
        everything = torch.arange(len(images), device=weight.device)
        with as_found(vit, train=False), torch.no_grad():
            self.game: Removal | None = None
            if removal == "drop":
                how: Literal["adaptive", "frozen"] = "adaptive" if selection == "free" else "frozen"
                self.game = Removal(vit, self.images, selection=how, output="logit", chunk=chunk)
                self.grid, self.chunk = self.game.grid, self.game.chunk
                nothing = torch.zeros(len(images), self.patches, dtype=torch.bool, device=weight.device)
                self.clean = self.game.rows(everything, ~nothing)
                return
            self.substrate = substrate(self.images, removal, *_normalisation(vit, mean, std, removal))
            tokens, self.grid = embed(vit, self.images[:1])
            self.chunk = sequences(chunk, tokens, 128)
            self.decisions: list[Decision] | None = None
            self.masked = False
            if selection == "frozen" and own_pruners(vit):
                state = record(vit, self.images, Tape())
                self.decisions, self.masked = state.decisions, state.masked
            self.clean = torch.cat([self._logits(self.images[part], part) for part in everything.split(self.chunk)])

    @property
    def patches(self) -> int:
        """Number of patches P."""
        return self.grid[0] * self.grid[1]

    def __call__(self, image: Tensor, removed: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of R altered images.

        Args:
            image: int64 [R], which image each is made of.
            removed: From row numbers int64 [r] to what is taken away in them: bool [r, P] patches, or [r, H * W] pixels
                where pixels are painted.

        Returns:
            float64 [R, classes].
        """
        if not len(image):
            return self.clean[:0]
        rows = torch.arange(len(image), device=self.images.device)
        with as_found(self.model, train=False), torch.no_grad():
            if self.game is not None:
                return self.game.rows(image, ~removed(rows))
            return torch.cat([self._painted(image[part], removed(part)) for part in rows.split(self.chunk)])

    def _painted(self, image: Tensor, removed: Tensor) -> Tensor:
        if removed.shape[1] != self.size[0] * self.size[1]:
            removed = self._pixels_of(removed).flatten(1)
        gone = removed.view(-1, 1, *self.size)
        return self._logits(torch.where(gone, self.substrate[image], self.images[image]), image)

    def _pixels_of(self, patches: Tensor) -> Tensor:
        """Patches [r, P] as pixels [r, H, W]; pixels beyond the grid, which the model never sees, stay."""
        (ph, pw), (height, width) = self.patch, self.size
        fine = patches.unflatten(1, self.grid).repeat_interleave(ph, 1).repeat_interleave(pw, 2)[:, :height, :width]
        return F.pad(fine, (0, width - fine.shape[2], 0, height - fine.shape[1]))

    def _logits(self, images: Tensor, image: Tensor) -> Tensor:
        decides: Sequence[Pruner] = own_pruners(self.model)
        if self.decisions is not None:
            decides = [Replay(self.decisions, image)]
        return resume(self.model, embed(self.model, images)[0], self.grid, decides, masked=self.masked).double()


ULPS = 32  # by so many units in the last place a score may differ where nothing else does


class Asked:
    """The class's score f of altered images, and the maps that say what to alter.

    Attributes:
        clean: float64 [B], f(x).
        maps: As given, in at least float32.
        values: float [B, P], one a patch.
        forwards: Altered images the model has seen.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, maps: Tensor, target: int | Tensor | None, output: str, **options: Any
    ) -> None:
        check_choice("output", output, OUTPUTS)
        self.output, self.forwards = output, 0
        self.occlusion = Occlusion(model, images, **options)
        self.maps = check_maps(maps, self.occlusion.images, self.occlusion.grid)
        self.values = on_patches(self.maps, self.occlusion.grid, self.occlusion.patch)
        self.target = choose_target(self.occlusion.clean, target)
        self.bad = self.maps.flatten(1).isnan().any(1)
        self.clean = self._of_class(self.occlusion.clean, torch.arange(len(self.maps), device=self.maps.device))

    def of_rows(self, image: Tensor, removed: Callable[[Tensor], Tensor], count: Tensor) -> Tensor:
        """F of rows [R], each of one image [R] with ``count`` [R] units gone; rows without any are the clean image."""
        scores = self.clean[image]
        rows = count.nonzero()[:, 0]
        if len(rows):
            mine = image[rows]
            scores[rows] = self._of_class(self.occlusion(mine, lambda part: removed(rows[part])), mine)
            self.forwards += len(rows)
        return scores

    def of_sets(self, image: Tensor, removed: Tensor) -> Tensor:
        """F of sets of patches gone, bool [R, P]; none is asked of an image twice."""
        code = torch.cat([image[:, None].to(torch.int32), removed.to(torch.int32)], 1)
        one, again = code.unique(dim=0, return_inverse=True)
        sets = one[:, 1:].bool()
        return self.of_rows(one[:, 0].long(), lambda part: sets[part], sets.sum(1))[again]

    def lost(self, after: Tensor) -> Tensor:
        """F(x) less f of altered images [B, K], float64; what the model's rounding alone keeps apart is made equal.

        Else a model that does not depend on what was removed would be judged by its last bits, which other images in
        the batch may change.
        """
        info = torch.finfo(self.occlusion.images.dtype)
        most = torch.maximum(self.clean.abs(), after.abs().amax(1))[:, None]
        unit = most * info.eps * (ULPS if info.bits >= 32 else 1)
        steps = (self.clean[:, None] - after) / unit.where(unit > 0, 1)
        return torch.where(unit > 0, steps.round() * unit, 0)

    def hide(self, values: Tensor) -> Tensor:
        """NaN for images with NaN in their map; values [B] or [B, ...]."""
        return values.masked_fill(self.bad.view(-1, *[1] * (values.ndim - 1)), torch.nan)

    def _of_class(self, logits: Tensor, image: Tensor) -> Tensor:
        return score(logits, self.output).gather(1, self.target[image, None])[:, 0]


def substrate(images: Tensor, removal: str, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """What painted pixels become: [B, C, H, W], or what broadcasts to it for one colour an image.

    Args:
        images: float [B, C, H, W], normalised.
        removal: "black", "grey", "mean" or "blur".
        mean: Of the normalisation, [C, 1, 1]; for "black".
        std: Likewise.

    >>> substrate(torch.ones(1, 1, 2, 2), "black", torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.25)).unique()
    tensor([-2.])
    """
    if removal == "black":
        return (-torch.as_tensor(mean) / torch.as_tensor(std)).to(images).expand_as(images)
    if removal == "grey":
        return torch.zeros_like(images)
    if removal == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    return blurred(images)


def blurred(images: Tensor) -> Tensor:
    """A Gaussian blur of kernel 11 and sigma 5, border pixels repeated outwards: [B, C, H, W]."""
    half = KERNEL // 2
    weight = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=images.device, dtype=images.dtype) / SIGMA) ** 2)
    weight = (weight / weight.sum()).view(1, 1, 1, -1)
    flat = F.pad(images.flatten(0, 1).unsqueeze(1), (half, half, half, half), mode="replicate")
    return F.conv2d(F.conv2d(flat, weight), weight.mT).view_as(images)


def _normalisation(model: Any, mean: Any, std: Any, removal: str) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation as [C, 1, 1], where black needs them."""
    if removal != "black":
        return None, None
    config = getattr(model, "pretrained_cfg", None) or {}
    channels = read_channels(model)
    found = []
    for name, value in (("mean", mean), ("std", std)):
        if value is None:
            value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        try:
            numbers = torch.as_tensor(value, dtype=torch.float64).flatten()
        except (TypeError, ValueError, RuntimeError):
            numbers = torch.zeros(0)
        fits = len(numbers) in (1, channels) and bool(numbers.isfinite().all())
        if not fits or (name == "std" and bool((numbers <= 0).any())):
            raise PrunexError(
                f"{name}={value!r} is not allowed: removal='black' paints 0 before normalisation and needs its {name}, "
                f"{channels} numbers{' above 0' * (name == 'std')}, from you or the model's pretrained_cfg"
            )
        found.append(numbers.expand(channels).reshape(-1, 1, 1))
    return found[0], found[1]


def read_channels(model: Any) -> int:
    """Image channels of a ViT."""
    return int(model.patch_embed.proj.in_channels)


def ranked(values: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """The place of each unit when units leave in order, ties by the lower index first.

    Args:
        values: [B, U].
        order: "positive" (largest first) or "negative" (smallest first).

    Returns:
        int32 [B, U], 0 for who leaves first; and int64 [B], how many units share their value with another.

    >>> ranked(torch.tensor([[0.2, 0.7, 0.2, 0.9]]), "negative")
    (tensor([[0, 2, 1, 3]], dtype=torch.int32), tensor([2]))
    """
    found, index = values.sort(dim=1, descending=order == "positive", stable=True)
    place = torch.arange(values.shape[1], dtype=torch.int32, device=values.device).expand_as(index)
    same = F.pad(found[:, 1:] == found[:, :-1], (1, 1))
    ties = (same[:, 1:] | same[:, :-1]).sum(1)
    return torch.empty_like(place, memory_format=torch.contiguous_format).scatter_(1, index, place), ties


def check_maps(maps: Any, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [B, gh, gw] or [B, H, W] on the images' device, in at least float32.

    Raises:
        PrunexError: For other shapes or types.
    """
    size = (images.shape[2], images.shape[3])
    want = f"floats [{len(images)}, {grid[0]}, {grid[1]}] on the patch grid or [{len(images)}, {size[0]}, {size[1]}]"
    if not isinstance(maps, Tensor):
        raise PrunexError(f"maps are a {type(maps).__name__}: give {want}")
    if not maps.is_floating_point():
        raise PrunexError(f"maps have dtype {maps.dtype}: give {want}")
    if maps.ndim != 3 or len(maps) != len(images) or tuple(maps.shape[1:]) not in (grid, size):
        raise PrunexError(f"maps have shape {list(maps.shape)}: give {want}")
    return maps.detach().to(images.device, torch.promote_types(maps.dtype, torch.float32))


def on_patches(maps: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """One value a patch, [B, P]: pixel maps by the mean over each patch."""
    if tuple(maps.shape[1:]) == grid:
        return maps.flatten(1)
    seen = maps[:, None, : grid[0] * patch[0], : grid[1] * patch[1]]
    return F.avg_pool2d(seen, patch, ceil_mode=True).flatten(1)


def on_pixels(maps: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """One value a pixel, [B, H * W]: maps of patches bilinearly, as an explanation's ``upsample``, but in float64.

    Interpolated values lose their last bits: in a region of equal patches pixels are equal, not ordered by rounding.
    """
    if tuple(maps.shape[1:]) == size:
        return maps.flatten(1)
    covered = (maps.shape[1] * patch[0], maps.shape[2] * patch[1])
    fine = over_pixels(maps.double(), size, covered).flatten(1)
    return rounded(fine, BITS)


def check_steps(steps: Any, first: bool = False) -> tuple[float, ...]:
    """Rising fractions in [0, 1].

    Args:
        steps: What was given.
        first: Whether they must begin with 0.

    Raises:
        PrunexError: For anything else.
    """
    given = tuple(steps) if isinstance(steps, list | tuple) else ()
    good = all(isinstance(q, int | float) and not isinstance(q, bool) and 0 <= q <= 1 for q in given)
    if not given or not good or any(b <= a for a, b in zip(given, given[1:], strict=False)) or (first and given[0]):
        begin = " that begin with 0, the clean image" if first else ""
        raise PrunexError(f"steps={steps!r} is not allowed: give rising fractions in [0, 1]{begin}, as (0, 0.1, 0.2)")
    return tuple(float(q) for q in given)
