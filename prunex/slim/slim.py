"""A copy of a pruned model without what only training needs."""

from __future__ import annotations

import copy

from torch import nn

from prunex.attach import CHILD
from prunex.vit.anatomy import ViT, find, read


def slim(model: nn.Module, path: str | None = None) -> ViT:
    """The pruned ViT as it is used: tokens really leave, no teacher, no schedule, eval mode, same logits.

    Args:
        model: A pruned (or dense) ViT, or a module that holds exactly one.
        path: Dotted path to the ViT when there are several.

    Returns:
        A copy of the ViT itself. Its parameters are its own; further training of ``model`` does not reach it.

    Raises:
        PrunexError: When there is no supported ViT.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    >>> _ = prunex.attach(model, "dynamicvit", keep_ratio=0.7)
    >>> small, x = prunex.slim(model), torch.randn(2, 3, 224, 224)
    >>> torch.equal(small(x), model(x))
    True
    """
    vit = find(model, path)[1]
    read(vit)
    attached = getattr(vit, CHILD, None)
    teacher: tuple[nn.Module, ...] = ()
    if attached is not None:  # a teacher is as large as the model: keep it out of the copy
        teacher, attached.pruner._teacher = getattr(attached.pruner, "_teacher", ()), ()
    try:
        small = copy.deepcopy(vit)
    finally:
        if attached is not None:
            attached.pruner._teacher = teacher
    small.eval()
    small.zero_grad(set_to_none=True)
    if attached is not None:
        copied = getattr(small, CHILD)
        copied.pruner.inference_only()
        copied.masked = None
    return small
