"""What criteria that look at images share: labelled batches, the classes explained, and a model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from prunex.batches import parts
from prunex.errors import PrunexError
from prunex.vit.anatomy import check_images, read
from prunex.vit.aside import as_found
from prunex.vit.mount import mounted
from prunex.vit.readout import outputs
from prunex.vit.surroundings import follow

Batch = tuple[Tensor, Tensor | None]


def labelled_batches(source: Any, model: nn.Module) -> Iterator[Batch]:
    """Batches of images with their labels, checked, on the model's device and in its dtype.

    Args:
        source: A data loader or any iterable of batches as :func:`prunex.batches.parts` reads them: images, and labels
            if there are any. Or one such batch: a tensor, or a pair of tensors.
        model: A supported backbone with a classifier.

    Yields:
        Images, and int64 [B] or None: all batches have labels, or none has. Labels that are no class indices (scores of
        classes, as mixing images makes them) count as none, with a warning.

    Raises:
        PrunexError: For something that holds no images, images that the model cannot take, labels that do not fit them
            or run out of the model's classes, several tensors that may be meant, or batches with and without labels.
    """
    weight, classes, labelled, seen = next(model.parameters()), _classes(model), None, 0
    for batch in _batches(source):
        known = parts(batch)
        images = known.need("images", "calibration")
        _check_images(model, images)
        labels = known.labels("calibration")
        if labelled is not None and labelled != (labels is not None):
            raise PrunexError("some calibration batches have labels and some have none: give labels with all or none")
        labelled = labels is not None
        if labels is not None:
            labels = _graphable(_check_labels(labels, classes).to(weight.device))
        seen += len(images)
        yield _graphable(images.detach().to(weight.device, weight.dtype)), labels
    if seen == 0:
        raise PrunexError("calibration got no images: give a loader with at least one")


def as_they_enter(source: Any, module: nn.Module, model: Any) -> tuple[Any, list[Any]]:
    """Batches as they enter a module's backbone, and the backbone as the module answers.

    Args:
        source: What the module takes, as for :func:`labelled_batches`.
        module: The module; it is called once for each batch.
        model: The backbone in it.

    Returns:
        The backbone, ending in what follows it in the module, and what entered it with the labels.

    Raises:
        PrunexError: For batches that hold no images.
    """
    answering, entered = model, []
    with as_found(module, train=False):
        for batch in _batches(source):
            found = parts(batch)
            call = follow(module, model, found.need("images", "calibration"), "calibration", named=True)
            answering = call.vit
            labels = found.labels("calibration")
            entered.append(call.entered if labels is None else (call.entered, labels))
    return answering, entered


def _batches(source: Any) -> Iterable[Any]:
    """A source of batches, or one batch alone, as batches."""
    if source is None:
        raise PrunexError("calibration got no images: give calibrate() a data loader, or batches [B, C, H, W]")
    batches: Any = [source] if isinstance(source, Tensor) or _is_pair(source) else source
    if not isinstance(batches, Iterable) or isinstance(batches, str | Mapping):
        raise PrunexError(f"calibration got a {type(source).__name__}: give a data loader, or images [B, C, H, W]")
    return batches


def _graphable(tensor: Tensor) -> Tensor:
    """The tensor as part of a graph: one that was made in the caller's inference mode cannot be."""
    return tensor.clone() if tensor.is_inference() else tensor


def _is_pair(source: Any) -> bool:
    """Whether it is one batch of images and labels and not two batches of images."""
    tensors = isinstance(source, tuple | list) and len(source) == 2 and all(isinstance(v, Tensor) for v in source)
    return tensors and source[0].ndim == 4 and source[1].ndim != 4


def _classes(model: Any) -> int:
    classes = outputs(model)
    if classes == 0:
        raise PrunexError("this model has no classifier (num_classes=0), so units have no class to matter for")
    return classes


def _check_labels(labels: Tensor, classes: int) -> Tensor:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise PrunexError(f"calibration labels run from {low} to {high}: this model has classes 0..{classes - 1}")
    return labels.long()


def _check_images(model: Any, images: Tensor) -> None:
    if not isinstance(model, SwinTransformer):
        check_images(read(model), images, values=True)
        return
    embed: Any = model.patch_embed
    wanted = [embed.proj.in_channels, *embed.img_size]
    if list(images.shape[1:]) != wanted or len(images) == 0:
        raise PrunexError(f"images have shape {list(images.shape)}: this model takes {['B', *wanted]}, B at least 1")
    if not torch.isfinite(images).all():
        raise PrunexError("images hold NaN or infinite values: clean them first")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Look at a model in eval mode and full view of autograd, outside autocast; give all back as it was.

    Train flags, the caller's grad mode and random state (a shuffling loader draws from it), and what the token pruner's
    last forward left are restored whatever is raised. Dimension 0 is always the images. Nothing is accumulated into
    ``.grad`` as long as only activations are differentiated.

    Raises:
        PrunexError: For weights that cannot be differentiated through.
    """
    if any(p.is_inference() for p in model.parameters()):
        raise PrunexError(
            "the model's weights were made under torch.inference_mode, and nothing can be differentiated through them: "
            "build or load the model outside of it"
        )
    weight = next(model.parameters())
    devices = [weight.device] if weight.device.type == "cuda" else []
    tokens: Any = mounted(model)
    names = ("trace", "forwards", "counted", "masked")
    left = {} if tokens is None else {n: getattr(tokens, n) for n in names}
    if tokens is not None and tokens.pruner.count == "adaptive":
        tokens.masked = True  # images of different lengths would be packed into one sequence, and are told apart here
    try:
        with (
            torch.random.fork_rng(devices),
            as_found(model, train=False),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(weight.device.type, enabled=False),
        ):
            yield
    finally:
        for name, value in left.items():
            setattr(tokens, name, value)


def widened(model: nn.Module) -> Any:
    """The model in at least float32: a copy where its weights are of half precision, whose gradients are too coarse."""
    if next(model.parameters()).dtype in (torch.float32, torch.float64):
        return model
    with torch.inference_mode(False):
        return copy.deepcopy(model).float()


def classes_of(logits: Any, labels: Tensor | None) -> Tensor:
    """The class each image is scored for, int64 [B]: its label, or the predicted class.

    Raises:
        PrunexError: For a model that gives no logits.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise PrunexError("this model gives no logits [B, classes]: score units of a model with a classifier")
    return logits.detach().argmax(1) if labels is None else labels
