"""From images to the tokens that enter the first block, and back to what patches were embedded as."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from prunex.vit.anatomy import ViT
from prunex.vit.arithmetic import PLAIN, Arithmetic, unknown_layer
from prunex.vit.calls import inside
from prunex.vit.mount import mounted
from prunex.vit.units import prefix_of
from prunex.vit.weights import is_identity


def embed(model: ViT, images: Tensor, ops: Arithmetic = PLAIN) -> tuple[Tensor, tuple[int, int]]:
    """From images to the tokens entering the first block, and the patch grid of these images."""
    if ops.opened:
        return _embed_opened(model, images, ops)
    x = model.patch_embed(images)
    return enter(model, x)[0], grid_of(model, x)


def embed_patches(model: ViT, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The first part of :func:`embed`: what patches are embedded as, nothing added yet [B, P, D], and their grid."""
    x = model.patch_embed(images)
    return x.flatten(1, 2) if x.ndim == 4 else x, grid_of(model, x)


def place(model: ViT, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rest of :func:`embed`: embedded patches [B, P, D] get positions and prefix tokens, [B, prefix + P, D]."""
    return enter(model, patches.unflatten(1, grid) if getattr(model, "dynamic_img_size", False) else patches)[0]


def grid_of(model: ViT, x: Tensor) -> tuple[int, int]:
    """The patch grid of what ``patch_embed`` gave."""
    stem: Any = model.patch_embed
    return (x.shape[1], x.shape[2]) if x.ndim == 4 else tuple(stem.grid_size)


def enter(model: ViT, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """From embedded patches to the tokens entering the first block, and the rotary table of the blocks, if any."""
    inner: Any = model
    if isinstance(model, Eva):
        x, rope = inner._pos_embed(x)
        return _entering(model, inner.norm_pre(x)), rope
    if isinstance(model, Beit | VisionTransformerRelPos | Cait):
        return _entering(model, _placed(model, x)), None
    return _entering(model, inner.norm_pre(inner.patch_drop(inner._pos_embed(x)))), None


def _placed(model: ViT, x: Tensor) -> Tensor:
    """Embedded patches with positions and prefix tokens, before any norm: [B, prefix + P, D]."""
    # timm has this in a method for some families, and in the middle of forward_features for the others.
    inner: Any = model
    if isinstance(model, Beit):
        x = torch.cat([inner.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return inner.pos_drop(x if inner.pos_embed is None else x + inner.pos_embed)
    if isinstance(model, Cait):
        return inner.pos_drop(x + inner.pos_embed)
    if isinstance(model, VisionTransformerRelPos):
        return x if inner.cls_token is None else torch.cat([inner.cls_token.expand(x.shape[0], -1, -1), x], 1)
    placed = inner._pos_embed(x)
    return placed[0] if isinstance(model, Eva) else placed


def _entering(model: ViT, x: Tensor) -> Tensor:
    """The tokens that enter the first block: without prefix tokens that the attached pruner does not take along."""
    attached = mounted(model)
    left_out = 0 if attached is None else prefix_of(model) - attached.anatomy.prefix
    return x[:, left_out:] if left_out else x


def unplace(model: ViT, x: Tensor, grid: tuple[int, int], index: Tensor | None = None) -> Tensor:
    """What patches were embedded as, [B, n, D], from the tokens [B, prefix + n, D] that :func:`place` made of them.

    Up to rounding; ``index`` [B, n] says which patches of the grid these are (None: all). A norm in front of the blocks
    (CLIP) cannot be taken back: its models give the normed tokens as they are.
    """
    prefix = prefix_of(model)
    body = x[:, prefix:]
    if not is_identity(getattr(model, "norm_pre", None)):
        return body
    empty = body.new_zeros(1, grid[0] * grid[1], body.shape[2])
    # What positions add to patches of zeros is what they added.
    added = place(model, empty, grid)[:, prefix:]
    if index is not None:
        added = added.expand(len(index), -1, -1).gather(1, index.unsqueeze(-1).expand(-1, -1, body.shape[2]))
    return body - added


def _embed_opened(model: ViT, images: Tensor, ops: Arithmetic) -> tuple[Tensor, tuple[int, int]]:
    """The same by elementary operations: what positions add to patches is what they make of patches of zeros."""
    if isinstance(model.patch_embed, HybridEmbed):
        raise unknown_layer(model.patch_embed, "PatchEmbed")
    x = inside(model.patch_embed, partial(_patches_opened, model, ops), images)
    grid, dynamic = grid_of(model, x), x.ndim == 4
    x = x.flatten(1, 2) if dynamic else x
    with torch.no_grad():
        added = _placed(model, torch.zeros_like(x).unflatten(1, grid) if dynamic else torch.zeros_like(x))
    # Prefix tokens are parameters: no relevance goes past them.
    prefix = prefix_of(model)
    parts = (getattr(model, n, None) for n in ("cls_token", "dist_token", "reg_token"))
    tokens = [t for t in parts if t is not None] if prefix else []
    front = torch.cat([t.detach() for t in tokens], 1).expand(len(x), -1, -1) if tokens else added[:, :0]
    table: Tensor | None = None if getattr(model, "no_embed_class", False) else getattr(model, "pos_embed", None)
    at = torch.zeros_like(front) if table is None else table.detach()[:, :prefix].expand_as(front)
    x = ops.placed(torch.cat([front, x], 1), torch.cat([at, added[:, prefix:]], 1))
    norm = getattr(model, "norm_pre", None)
    return _entering(model, x if norm is None else ops.norm(norm, x)), grid


def _patches_opened(model: ViT, ops: Arithmetic, images: Tensor) -> Tensor:
    """What ``patch_embed`` gives, [B, P, D], or [B, gh, gw, D] where images may have any size."""
    inner: Any = model.patch_embed
    height, width = inner.patch_size
    if inner.dynamic_img_pad:
        images = nn.functional.pad(images, (0, -images.shape[3] % width, 0, -images.shape[2] % height))
    patches = ops.patches(inner.proj, images)
    x = ops.norm(inner.norm, patches.flatten(2).transpose(1, 2))
    return x.unflatten(1, patches.shape[2:]) if getattr(model, "dynamic_img_size", False) else x


def over_pixels(
    maps: Tensor, image: tuple[int, int], covered: tuple[int, int], size: tuple[int, int] | None = None
) -> Tensor:
    """Maps [B, gh, gw] of the patch grid laid over images of some size in pixels, bilinear: float [B, H, W].

    The grid lies over the ``covered`` part, from the upper left corner: pixels beyond it, which the model never sees,
    get 0; what is beyond the image, as where it was padded, is cut off. ``size``: of the result, where it is another
    one.

    >>> over_pixels(torch.ones(1, 1, 2), (3, 5), (2, 4))[0].int().tolist()
    [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    """
    if size is None:
        size = image
    covered = (max(1, round(covered[0] * size[0] / image[0])), max(1, round(covered[1] * size[1] / image[1])))
    fine = F.interpolate(maps[:, None], size=covered, mode="bilinear", align_corners=False)[:, 0]
    return fine if covered == size else F.pad(fine, (0, size[1] - covered[1], 0, size[0] - covered[0]))
