"""What criteria that look at images share: labelled batches, the classes explained, and a model left as it was."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from prunex.batches import Parts, batches_in, parts
from prunex.errors import PrunexError
from prunex.units.base import Scores, UnitPruner
from prunex.vit.anatomy import channels_of, check_images, check_values, read
from prunex.vit.aside import as_found
from prunex.vit.mount import mounted, mounted_units
from prunex.vit.readout import outputs
from prunex.vit.recording import check_made_outside
from prunex.vit.surroundings import follow

P = TypeVar("P", bound=UnitPruner)
Batch = tuple[Tensor, Tensor | None]


def labelled_batches(source: Any, model: Any, truth: bool = False) -> Iterator[Batch]:
    """Batches of images, and labels int64 [B] or None, checked, on the model's device and in its dtype.

    With ``truth``, for whoever takes a loss, labels may also be several of each image, [B, C] of 0 and 1, or, of a
    model of one output, numbers [B]: floating both.

    The source is a data loader or any iterable of batches as :func:`prunex.batches.parts` reads them, or one such
    batch. All have labels, or none has; labels that are no class indices (scores of classes) count as none, with a
    warning.
    """
    weight, classes = next(model.parameters()), outputs(model)
    labelled, seen = None, 0
    if classes == 0:
        raise PrunexError("this model has no classifier (num_classes=0), so units have no class to matter for")
    for batch in _batches(source):
        given = parts(batch)
        images = given.need("images", "calibration")
        _check_images(model, images)
        labels = _truth(given, classes) if truth else given.labels("calibration")
        if labelled is not None and labelled != (labels is not None):
            raise PrunexError("some calibration batches have labels and some have none: give labels with all or none")
        labelled = labels is not None
        if labels is not None:
            labels = _graphable(_check_labels(labels, classes).to(weight.device))
        seen += len(images)
        # Loaders give float32, which layers of another precision refuse.
        yield _graphable(images.detach().to(weight.device, weight.dtype)), labels
    if seen == 0:
        raise PrunexError("calibration got no images: give a loader with at least one")


def entering(source: Any, model: Any, module: nn.Module | None = None) -> Iterator[Tensor]:
    """Batches of images alone, checked, as they enter the model, on its device and in its dtype; one at a time.

    ``module``: what the source's images are for, where that calls the model and may prepare them.
    """
    weight, seen = next(model.parameters()), 0
    for batch in _batches(source):
        images = parts(batch).need("images", "correction")
        if module is not None:
            with as_found(module, train=False):
                images = follow(module, model, images, "correction", named=True).entered
        _check_images(model, images)
        seen += len(images)
        yield images.detach().to(weight.device, weight.dtype)
    if seen == 0:
        raise PrunexError("correction got no images: give a loader with at least one")


def about(source: Any) -> int | None:
    """About how many images a source of batches will give, by its length and its first batch; None where unknown."""
    batches: Any = _batches(source)
    try:
        count, size = len(batches), getattr(batches, "batch_size", None)
    except TypeError:  # a generator, or a loader of a stream
        return None
    if size is None and isinstance(batches, Sequence) and count:
        size = len(parts(batches[0]).get("images", ()))
    return count * size if isinstance(size, int) and count else None


def as_they_enter(source: Any, module: nn.Module, model: Any) -> tuple[Any, list[Any]]:
    """The backbone, ending in what follows it in its module, and the module's batches as they enter it."""
    answering, entered = model, []
    with as_found(module, train=False):
        for batch in _batches(source):
            given = parts(batch)
            call = follow(module, model, given.need("images", "calibration"), "calibration", named=True)
            answering = call.vit
            labels = given.truth("calibration")
            entered.append(call.entered if labels is None else (call.entered, labels))
    return answering, entered


def _batches(source: Any) -> Iterable[Any]:
    """A source of batches, or one batch alone, as batches."""
    if source is None:
        raise PrunexError("calibration got no images: give calibrate() a data loader, or batches [B, C, H, W]")
    # Two tensors are one batch of images and labels, unless the second holds images too.
    pair = isinstance(source, tuple | list) and len(source) == 2 and all(isinstance(v, Tensor) for v in source)
    return [source] if pair and source[0].ndim == 4 and source[1].ndim != 4 else batches_in(source)


def _graphable(tensor: Tensor) -> Tensor:
    """The tensor as part of a graph: one that was made in the caller's inference mode cannot be."""
    return tensor.clone() if tensor.is_inference() else tensor


def _truth(given: Parts, classes: int) -> Tensor | None:
    """What a loss compares with; a number of each image says nothing of a model of several outputs."""
    rows = given.labels("calibration") if "values" in given and classes > 1 else given.truth("calibration")
    if rows is None or rows is given.get("labels"):
        return rows
    if rows.ndim == 2 and rows.shape[1] != classes:
        raise PrunexError(f"calibration labels are {list(rows.shape)} of 0 and 1: this model has {classes} outputs")
    return rows.float()


def _check_labels(labels: Tensor, classes: int) -> Tensor:
    if labels.is_floating_point():
        return labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise PrunexError(f"calibration labels run from {low} to {high}: this model has classes 0..{classes - 1}")
    return labels.long()


def _check_images(model: Any, images: Tensor) -> None:
    if not isinstance(model, SwinTransformer):
        check_images(read(model), images, values=True)
        return
    embed: Any = model.patch_embed
    wanted = [channels_of(embed), *embed.img_size]
    if list(images.shape[1:]) != wanted or len(images) == 0:
        raise PrunexError(f"images have shape {list(images.shape)}: this model takes {['B', *wanted]}, B at least 1")
    check_values(images)


@contextmanager
def undisturbed(model: nn.Module, graph: bool = True) -> Iterator[None]:
    """Look at a model in eval mode and full view of autograd, outside autocast; give all back as it was.

    Train flags, grad mode and random state (a shuffling loader draws from it), and what the token pruner's last forward
    left. Compiled parts run uncompiled. Nothing is accumulated into ``.grad`` as long as only activations are
    differentiated. Without a ``graph`` nothing is, and tokens leave as they do in any evaluation.
    """
    if graph:
        check_made_outside(model, "score units by magnitude or random")
    weight = next(model.parameters())
    devices = [weight.device] if weight.device.type == "cuda" else []
    tokens: Any = mounted(model)
    names = ("trace", "masked")
    left = {} if tokens is None else {n: getattr(tokens, n) for n in names}
    if tokens is not None and not graph:
        tokens.masked = None
    elif tokens is not None and tokens.pruner.count == "adaptive":
        tokens.masked = True  # images of different lengths would be packed into one sequence, and are told apart here
    try:
        with (
            torch.random.fork_rng(devices),
            as_found(model, train=False),
            torch.inference_mode(False) if graph else nullcontext(),
            torch.set_grad_enabled(graph),
            # A caller's autocast would compute in half precision again what float32 copies are made for.
            torch.autocast(weight.device.type, enabled=False),
            # A compiled block knows no hooks that come after it; where nothing was compiled, the import takes seconds.
            torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(),
        ):
            yield
    finally:
        for name, value in left.items():
            setattr(tokens, name, value)


def widened(model: nn.Module) -> Any:
    """The model in at least float32: a copy where its weights are of half precision, whose gradients are too coarse."""
    if next(model.parameters()).dtype in (torch.float32, torch.float64):
        return model
    # Weights that are made in a caller's inference mode can be part of no graph.
    with torch.inference_mode(False):
        return copy.deepcopy(model).float()


def mean_over_images(
    pruner: P, model: nn.Module, batches: Any, scores: Callable[..., Scores], truth: bool = False
) -> Scores:
    """A criterion's mean over images, float64 [units] a branch, all units open; ``scores`` makes the sum of a batch."""
    count = 0
    with undisturbed(model):
        totals = {b.key: torch.zeros(b.units, dtype=torch.float64) for b in pruner.branches}
        # Of half precision a copy is computed with, and its own pruner's gates are those that act there.
        working = widened(model)
        gates: P = mounted_units(working).pruner
        with gates.all_open():
            for images, labels in labelled_batches(batches, working, truth):
                for key, total in scores(gates, working, images, labels).items():
                    totals[key] += total
                count += len(images)
    return {key: total / count for key, total in totals.items()}


def loss_of(logits: Any, truth: Tensor | None) -> Tensor:
    """The summed loss of what each image is known to be: cross-entropy, with the predicted class where nothing is.

    Several labels, [B, C] of 0 and 1: the binary cross-entropies of all. A number, where the model has one output: the
    squared error.
    """
    classes = classes_of(logits, None if truth is None or truth.is_floating_point() else truth)
    # Sums: a mean over the batch would make an image's gradient smaller the more others come with it.
    if truth is not None and truth.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, truth.to(logits), reduction="sum")
    if logits.shape[1] > 1:
        return F.cross_entropy(logits, classes, reduction="sum")
    if truth is None:
        raise PrunexError(
            "this model has one output, and no batch says what it should be: give floating numbers [B] with the "
            "images, or score units by magnitude or relevance"
        )
    return F.mse_loss(logits[:, 0], truth.to(logits), reduction="sum")


def classes_of(logits: Any, labels: Tensor | None) -> Tensor:
    """The class each image is scored for, int64 [B]: its label, or the predicted class."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise PrunexError("this model gives no logits [B, classes]: score units of a model with a classifier")
    return logits.detach().argmax(1) if labels is None else labels
