"""Batches that others collate: which tensor holds the images, which the labels, which the object masks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.later import deferred

IMAGES = ("image", "images", "img", "imgs", "pixel_values", "x", "input", "inputs")
LABELS = ("label", "labels", "target", "targets", "y")
MASKS = ("mask", "masks")
CONCEPTS = ("concepts", "spatial_concepts")
_NAMES = {"images": IMAGES, "labels": LABELS, "masks": MASKS}
_REMEDY = {
    "images": "give batches that hold a float tensor [B, C, H, W]",
    "labels": "give batches with images and an integer [B], one class index an image",
    "masks": "give batches with a bool tensor [B, H, W], true on the object",
    "concepts": "give batches that hold 'concepts' [B, C] of 0, 1 and NaN (unknown)",
    "spatial_concepts": "give batches that hold 'spatial_concepts' [B, patches, C] of 0, 1 and NaN (unknown)",
}
# Whole numbers that tell samples apart and no classes; "class_id" and the like do.
_NUMBERS = re.compile(r"(?!class|label|target|categor)(.*_)?(index|indices|idx|ids?|views?)")
_DEPTH = 3  # containers in containers; what strangers put into a batch may hold anything, itself too


class Parts(dict[str, Tensor]):
    """What a batch holds: "images", "labels", "masks" and concept labels, as far as they are known.

    In the place of "labels" stand "multi_hot" where an image may have several, and "values" where it has a number.

    Attributes:
        unclear: By part, which tensors may be meant, or do not fit. Of several image tensors the first stands in the
            dict all the same, for pictures; labels and masks that are unclear do not.
        unfit: By part, what is there in a form that is of no use: images in bytes, labels as class scores.
        kind: The batch's type, for messages.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.unclear: dict[str, str] = {}
        self.unfit: dict[str, str] = {}

    def need(self, name: str, who: str, where: str | None = None) -> Tensor:
        """A part ("images", "labels", ...) that nothing can be done without.

        Raises:
            PrunexError: Where the batch has none, or several that may be meant: who needs it, and where it came from.
        """
        if name in self and name not in self.unclear:
            return self[name]
        place = f"a {self.kind}" if where is None else f"{where} ({self.kind})"
        raise PrunexError(f"{who} found no {name} in {place}: {self.why(name)}")

    def labels(self, who: str, where: str | None = None) -> Tensor | None:
        """Labels for whoever goes by predicted classes without them; refused where several tensors may be meant."""
        if "labels" in self.unclear:
            self.need("labels", who, where)
        if "labels" in self.unfit:
            warnings.warn(f"{who} goes by the predicted classes: {self.unfit['labels']}", stacklevel=2)
        return self.get("labels")

    def truth(self, who: str, where: str | None = None) -> Tensor | None:
        """What a loss compares outputs with: several labels or a number of each image, else as :meth:`labels`."""
        for name in ("multi_hot", "values"):
            if name in self and "labels" not in self.unclear:
                return self[name]
        return self.labels(who, where)

    def cpu(self) -> Parts:
        """The same on the CPU."""
        moved = Parts(self.kind)
        moved.update({name: tensor.detach().cpu() for name, tensor in self.items()})
        moved.unclear, moved.unfit = self.unclear, self.unfit
        return moved

    def why(self, name: str) -> str:
        """Why a part is not known, or what a batch must hold for it."""
        return self.unclear.get(name) or self.unfit.get(name) or _REMEDY[name]


def parts(batch: Any, images: Tensor | None = None) -> Parts:
    """Images, labels and masks of a batch; what may be meant by several tensors is not guessed.

    A batch is a tensor, a sequence, a mapping, a dataclass or any object with attributes, or nested ones of these.
    Names win, in any case of letters: ``image``, ``images``, ``img``, ``pixel_values``, ``x``, ``input`` or ``inputs``
    are images, ``label``, ``labels``, ``target``, ``targets`` or ``y`` labels, ``mask`` or ``masks`` masks. Without
    such a name a part is the one tensor that looks like it: floating [B, C, H, W]; whole numbers [B], unless they
    are called an index, an id or a view, or class scores [B, C] lie beside them; bool [B, H, W] or [B, 1, H, W] of the
    images' size.

    Args:
        batch: What a loader gives.
        images: float [B, C, H, W], where they are known already: what a model made of the batch's.

    Returns:
        images: float [B, C, H, W]; labels: whole numbers [B], class indices; masks: bool [B, H, W]. Where there are no
        such labels, multi_hot: [B, C] of 0 and 1, or bool, a column a label; or values: float [B]. By name alone
        concepts: [B, C], and spatial_concepts: [B, patches, C], of 0, 1 and NaN (unknown), or bool. Whatever goes by
        these names is taken for nothing else; whether it fits, the head says that reads it.

    >>> import torch
    >>> x, y = torch.zeros(2, 3, 8, 8), torch.tensor([4, 2])
    >>> parts((x, y))["labels"], parts({"view": torch.tensor([0, 1]), "image": x, "label": y})["labels"]
    (tensor([4, 2]), tensor([4, 2]))
    >>> parts((x, y, torch.arange(2))).unclear["labels"]
    "batch[1] and batch[2] may both be meant: give a dict that holds the right one as 'label'"
    """
    fields = Parts(type(batch).__name__)
    every = list(_leaves(batch))
    # Taken out first: a table of concepts looks like several labels, or class scores.
    leaves = [leaf for leaf in every if leaf.name not in CONCEPTS]
    for name in CONCEPTS:
        _concepts(fields, _distinct(leaf for leaf in every if leaf.name == name), name)
    if images is None:
        first = _images(fields, [leaf for leaf in leaves if leaf.value.ndim == 4 and not leaf.value.is_complex()])
    else:
        first = fields["images"] = images
    # Labels and masks are told by how many images there are, so nothing is made of them without images.
    if first is not None:
        _labels(fields, leaves, len(first))
        _masks(fields, leaves, first)
    return fields


def batches_in(source: Any) -> Iterable[Any]:
    """The batches of a loader or any iterable of them; images alone are one batch, and anything else is refused."""
    if isinstance(source, Tensor):
        return [source]
    if not isinstance(source, Iterable) or isinstance(source, str | Mapping):
        raise PrunexError(f"calibration got a {type(source).__name__}: give a data loader, or images [B, C, H, W]")
    return source


class _Leaf(NamedTuple):
    path: str  # as one would write it
    name: str  # the innermost key, in small letters
    value: Tensor

    def __str__(self) -> str:
        return f"{self.path} is {str(self.value.dtype).removeprefix('torch.')} {list(self.value.shape)}"


def _leaves(value: Any, path: str = "batch", name: str = "", depth: int = 0) -> Iterator[_Leaf]:
    if isinstance(value, Tensor):
        yield _Leaf(path, name.lower(), value)
    elif depth < _DEPTH:
        for step, key, inner in _entries(value, depth):
            yield from _leaves(inner, path + step, name if key is None else key, depth + 1)


def _entries(value: Any, depth: int) -> Iterable[tuple[str, str | None, Any]]:
    """What a container holds: the step that leads to it, its name, and itself."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", key if isinstance(key, str) else "", inner) for key, inner in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{key}", key, inner) for key, inner in zip(value._fields, value, strict=True)]
    if isinstance(value, str | bytes | int | float | nn.Module | type | None):
        return []
    if isinstance(value, Sequence):
        # Several mappings in a list are targets of single images (detection), and no tensor in them is a batch's.
        single = depth > 0 and len(value) > 1 and isinstance(value[0], Mapping)
        return [] if single else [(f"[{i}]", None, inner) for i, inner in enumerate(value)]
    # A dataclass with slots has no __dict__, and each of its bases names its own.
    slots = [s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ())]
    # Properties are found by the names that would count; walking all of a stranger's attributes could run anything.
    names = dict.fromkeys([*getattr(value, "__dict__", {}), *slots, *IMAGES, *LABELS, *MASKS, *CONCEPTS])
    return [(f".{key}", key, inner) for key in names if (inner := _attribute(value, key)) is not None]


def _attribute(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except Exception:  # a property of somebody else's class may raise anything
        return None


def _named(leaves: Sequence[_Leaf], part: str) -> list[_Leaf]:
    return [leaf for leaf in leaves if leaf.name in _NAMES[part]]


def _distinct(leaves: Iterable[_Leaf]) -> list[_Leaf]:
    """Each tensor once, also where it goes by two names."""
    return list({id(leaf.value): leaf for leaf in leaves}.values())


def _several(leaves: Sequence[_Leaf], part: str) -> str:
    paths = [leaf.path for leaf in leaves]
    which = " and ".join(paths) + " may both" if len(paths) == 2 else ", ".join(paths[:4]) + " may all"
    return f"{which} be meant: give a dict that holds the right one as {_NAMES[part][0]!r}"


def _images(fields: Parts, pictures: Sequence[_Leaf]) -> Tensor | None:
    """Find the images; give the tensor that tells how many there are, whatever its dtype."""
    candidates = _named(pictures, "images") or pictures
    floating = _distinct(leaf for leaf in candidates if leaf.value.is_floating_point())
    if floating:
        fields["images"] = floating[0].value
        if len(floating) > 1:
            fields.unclear["images"] = _several(floating, "images")
        return floating[0].value
    raw = [leaf for leaf in candidates if leaf.value.dtype == torch.uint8 or leaf.name in IMAGES]
    if not raw:
        return None
    fields.unfit["images"] = f"{raw[0]}: give float images, normalised as for the model, such as x.float() / 255"
    return raw[0].value


def _labels(fields: Parts, leaves: Sequence[_Leaf], count: int) -> None:
    named = _named(leaves, "labels")
    if named:
        lists = [leaf for leaf in named if _is_list(leaf.value, column=True)]
        others = [leaf for leaf in named if not _is_list(leaf.value, column=True)]
    else:
        # A sample's number looks just like a class; an unnamed label that stands beside class scores may be one.
        unnamed = [leaf for leaf in leaves if not _NUMBERS.fullmatch(leaf.name)]
        lists = [leaf for leaf in unnamed if _is_list(leaf.value)]
        others = [leaf for leaf in unnamed if leaf.value.ndim == 2 and len(leaf.value) == count]
    indices = _distinct(leaf for leaf in lists if len(leaf.value) == count)
    if len(indices) == 1 and (named or not others):
        fields["labels"] = indices[0].value.reshape(count)
    elif indices:
        fields.unclear["labels"] = _several(indices if named else [*indices, *others], "labels")
    elif others:
        first = others[0]
        fields.unfit["labels"] = f"{first} and no class index of each image: give those as integers [{count}]"
        if len(_distinct(others)) == 1:
            _in_place_of_labels(fields, first, count)
    elif lists:
        shape = list(lists[0].value.shape)
        fields.unclear["labels"] = f"{lists[0].path} holds labels {shape} for {count} images: give one class an image"
    else:
        single = _distinct(leaf for leaf in leaves if leaf.value.is_floating_point() and leaf.value.shape == (count,))
        if len(single) == 1:
            _in_place_of_labels(fields, single[0], count)


def _in_place_of_labels(fields: Parts, leaf: _Leaf, count: int) -> None:
    """Several labels of each image, or a number, from the one tensor that may be either."""
    rows = leaf.value
    table = rows.ndim == 2 and len(rows) == count and rows.shape[1] > 1
    # Only their values tell labels from scores. No step of a training asks, and none shall wait for the device.
    if table and not deferred(rows) and bool(((rows == 0) | (rows == 1)).all()):
        fields["multi_hot"] = rows
        fields.unfit["labels"] = f"{leaf}: several labels an image, and no one class of each"
    elif rows.is_floating_point() and rows.shape in ((count,), (count, 1)):
        fields["values"] = rows.reshape(count)
        fields.unfit["labels"] = f"{leaf}: a number of each image, and no class"


def _concepts(fields: Parts, leaves: Sequence[_Leaf], name: str) -> None:
    """Concept labels as they came: the names are common words, so whoever reads them says whether they fit."""
    if len(leaves) == 1:
        fields[name] = leaves[0].value
    elif leaves:  # a list of numbers a sample, which loaders collate to one tensor a concept
        paths = ", ".join(leaf.path for leaf in leaves[:4])
        fields.unclear[name] = f"{paths} may all be meant: give one tensor as {name!r}, a column for each concept"


def _masks(fields: Parts, leaves: Sequence[_Leaf], images: Tensor) -> None:
    fitting = []
    for leaf in leaves:
        mask = leaf.value[:, 0] if leaf.value.ndim == 4 and leaf.value.shape[1] == 1 else leaf.value
        if mask.dtype == torch.bool and mask.ndim == 3 and mask.shape[1:] == images.shape[2:]:
            fitting.append(leaf._replace(value=mask))
    candidates = _distinct(_named(fitting, "masks") or fitting)
    if len(candidates) == 1:
        fields["masks"] = candidates[0].value
    elif candidates:
        fields.unclear["masks"] = _several(candidates, "masks")


def _is_list(tensor: Tensor, column: bool = False) -> bool:
    """Whether it holds whole numbers, [n] or where columns count [n, 1]."""
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return whole and (tensor.ndim == 1 or (column and tensor.ndim == 2 and tensor.shape[1] == 1))
