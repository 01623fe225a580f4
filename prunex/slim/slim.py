"""A copy of a pruned model without what only training needs."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from prunex.attach import attached
from prunex.brief import brief
from prunex.checks import called_as
from prunex.errors import PrunexError
from prunex.units.batches import about, entering
from prunex.units.correction import Correct, check_biases, check_correct, cuts_of, make_up, note
from prunex.vit.anatomy import find
from prunex.vit.cuts import check_cuts
from prunex.vit.describe import outline
from prunex.vit.fold import copy_of, fold, wrapped_parts
from prunex.vit.mount import mounted, mounted_head, mounted_units
from prunex.vit.sharded import COPY, check_gathered
from prunex.vit.units import Backbone
from prunex.vit.widths import WidthSpec, narrow, places


@called_as("prunex.slim(model)")
def slim(
    model: nn.Module,
    path: str | None = None,
    widths: WidthSpec | None = None,
    correct: Correct | bool | None = None,
    images: Any = None,
) -> nn.Module:
    """The pruned ViT as it is used: tokens really leave, closed heads and channels are gone, eval mode, same logits.

    Heads and MLP channels that a unit pruner closed are taken out, gates and masks with them: what is left are timm's
    own blocks, each of its own width. A unit pruner that has not chosen yet leaves all units that an evaluation has
    open now, with a warning; so a training run may slim before its end. Teachers and schedules are left out too, with
    a warning attention that :meth:`~prunex.handles.heads.Head.intervene` has set by hand, and adapters, masks and
    reparametrisations of linear layers and the patch embedding are folded into their weights.

    Args:
        model: A pruned (or dense) ViT or timm Swin, or a module that holds exactly one.
        path: Dotted path to the ViT when there are several.
        widths: Further units to take out, by hand: heads and MLP channels (exact: as if they were masked), channels of
            queries, keys and values (exact where the same ones were zero), embedding channels and whole blocks (lossy).
        correct: Let the weights that are left make up for heads and MLP channels that are taken out, without training:
            "bias" adds what these gave on average to the next layer's bias, "refit" (or True) fits the next layer anew,
            by ridge least squares, to what all units together gave: :func:`prunex.units.correction.make_up`. Meant for
            the moment at which units were chosen: a model that was trained since without them has nothing to make up.
            :func:`prunex.correction` tells how much of it was.
        images: For a correction, some hundred images like those of the task, without labels: a data loader or any
            iterable of batches, or one batch [B, C, H, W], as ``model`` takes them. Looked at once, never kept.

    Returns:
        A copy of the ViT itself. Its parameters are its own; further training of ``model`` does not reach it.

    Raises:
        PrunexError: When there is no supported ViT, for widths that it does not have, or for layers that are quantised,
            or wrapped in something that is not linear. For a correction also: without images or with such as the model
            cannot take, for other widths than heads and channels, or "bias" where a layer has none.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    >>> _ = prunex.attach(model, "dynamicvit", keep_ratio=0.7)
    >>> small, x = prunex.slim(model), torch.randn(2, 3, 224, 224)
    >>> torch.equal(small(x), model(x))
    True
    >>> narrow = prunex.slim(model, widths=prunex.WidthSpec(heads={0: (0, 2)}, channels={0: range(96)}))
    >>> narrow.blocks[0].attn.num_heads, narrow.blocks[0].mlp.fc1.out_features
    (2, 96)
    >>> images, spec = torch.randn(8, 3, 224, 224), prunex.WidthSpec(channels={0: range(96)})
    >>> prunex.correction(prunex.slim(model, widths=spec, correct="bias", images=images)).summary()[:20]
    'bias on 8 images: th'
    """
    kind = check_correct(correct)
    _check_asked(kind, images, widths)
    vit = find(model, path, Backbone)[1]
    outline(vit)
    check_gathered(vit, COPY)
    # Adapters first: units are cut out of plain layers alone.
    small = _copy(vit)
    fold(small)
    small.eval()
    small.zero_grad(set_to_none=True)
    _end_intervention(small)
    tokens = mounted(small)
    if tokens is not None:
        tokens.pruner.inference_only()
        tokens.masked = None
    # Corrected before anything is cut: it takes all units' outputs to fit what is left to them.
    spec = _closed(small, kind)
    if kind is not None:
        batches = entering(images, vit, None if model is vit else model)
        _correct(small, spec, widths or WidthSpec(), kind, batches, about(images))
    if spec.plain():
        narrow(small, spec)
    if widths is not None:
        narrow(small, widths)
    if tokens is not None:
        tokens.refit(small)
    mark_slim(small)
    return small


def slim_of(vit: Any) -> Any:
    """The model itself where it is slim already, so that nothing is copied for nothing; else :func:`slim` of it."""
    tokens = mounted(vit)
    pruned = mounted_units(vit) is not None or (tokens is not None and not getattr(tokens, "slim", False))
    headed = mounted_head(vit)
    forced = headed is not None and bool(headed.head.forced)
    return slim(vit) if pruned or forced or next(wrapped_parts(vit), None) else vit


def mark_slim(small: Any) -> None:
    """Remember, where another pruner's attaching forgets it, that the token pruner has nothing of training left."""
    tokens = mounted(small)
    if tokens is not None:
        tokens.slim = True


def _end_intervention(small: Any) -> None:
    """Attention set by hand is a question put to a model, and no part of it."""
    headed = mounted_head(small)
    if headed is not None and headed.head.forced:
        warnings.warn(
            f"attention set by hand ({headed.head.forced}) is left out of the slim model, whose scores are those "
            "without it: end it with intervene({}) where that is not meant",
            stacklevel=3,
        )
        headed.head.force({})


def _copy(vit: Any) -> Any:
    """A deep copy without the teacher, which is as large as the model."""
    tokens = mounted(vit)
    if tokens is None:
        return copy_of(vit)
    # Off while it is copied, and back whatever happens: copying it would take the model's room once more.
    pruner = tokens.pruner
    teacher, pruner._teacher = getattr(pruner, "_teacher", ()), ()
    try:
        return copy_of(vit)
    finally:
        pruner._teacher = teacher


def _closed(small: nn.Module, correct: Correct | None) -> WidthSpec:
    """What a unit pruner has left open; the pruner and its gates are taken off."""
    units = attached(small, units=True)
    if units is None:
        return WidthSpec()
    if correct is not None and mounted_units(small).trained:
        warnings.warn(
            f"correct={correct!r}: the model trained while {units.method} had closed units, and what these gave before "
            "may be wanted no more: correct when they are chosen, as MaskPruning(correct=...) does",
            stacklevel=4,
        )
    if not units.decided:
        warnings.warn(
            f"{units.method} has not chosen units yet: the slim model has those that are open now. Train with it, or "
            "call calibrate(...), and slim again",
            stacklevel=4,
        )
    spec = WidthSpec() if units.removed else units.pruner.present()
    units.detach()
    return spec


def _check_asked(kind: Correct | None, images: Any, widths: WidthSpec | None) -> None:
    """Refuse a correction without images, and images or widths that no correction is for."""
    if kind is None and images is not None:
        raise PrunexError("images are for a correction: give correct='refit' or correct='bias' too, or leave them out")
    if kind is None:
        return
    if images is None:
        raise PrunexError(
            f"correct={kind!r} looks at images: give images=loader, or images=batch of some hundred [B, C, H, W]"
        )
    if not isinstance(widths, WidthSpec | None):
        raise PrunexError(f"widths={brief(widths)} is not allowed: give a prunex.WidthSpec")
    others = [name for name in (widths or WidthSpec()).plain() if name not in ("heads", "channels")]
    if others:
        raise PrunexError(
            f"correct={kind!r} makes up for heads and MLP channels alone, and widths name {', '.join(others)}: slim in "
            "two steps, the corrected one first"
        )


def _correct(small: Any, spec: WidthSpec, widths: WidthSpec, kind: Correct, batches: Any, count: int | None) -> None:
    """Make up, in what will be left of a model, for what gates and widths take out of it."""
    # Widths by hand are of units that the gates left open.
    both = WidthSpec(heads={**spec.heads, **widths.heads}, channels={**spec.channels, **widths.channels})
    if not both.plain():
        warnings.warn(f"correct={kind!r}: no units are taken out, so there is nothing to correct", stacklevel=4)
        return
    check_cuts(small, places(small, both))
    cuts = [cut for cut in cuts_of(small, both) if bool(cut.lost.any())]
    check_biases(small, [cut.branch for cut in cuts], kind)
    note(small, make_up(small, cuts, batches, kind, count))
