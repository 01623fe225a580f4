"""What a tree of prototypes makes of images: readings, evidence, its nodes, and the patches nearest its prototypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.heads.base import Evidence, Reading
from prunex.heads.tree_modules import numbers_of
from prunex.heads.tree_patches import Nearest


@dataclass(eq=False, repr=False)
class TreeReading(Reading):
    """What a ViT-NeT makes of final tokens.

    Branches are in pre-order (a branch, its left subtree, its right one), leaves from left to right. Hard inference
    computes what lies on each image's path alone: elsewhere similarities, distances and what is of leaves are NaN.

    Attributes:
        probabilities: float [B, classes], the output itself; rows sum to 1. Under ``routing="raw"`` entries may be
            negative.
        similarity: float [B, branches], the largest similarity m of any token to each prototype, in (0, 9.2104).
        routing: float [B, branches], the share that goes left: m, clipped to 1 under ``routing="clamp"``.
        distances: float [B, branches, positions], from each token (of 2x2 prototypes: each window, row-major) to each
            prototype; infinite in slots of dropped tokens.
        path: int64 [B, depth], the hard path: 0 left, 1 right.
        visited: int64 [B, depth], the branches on it.
        leaf: int64 [B], where it ends.
        leaves: float [B, leaves, classes], each leaf's distribution.
        weights: float [B, leaves], each leaf's part in the output; rows sum to 1.
        arrived: float [B, leaves, d], the largest entries of the tokens that arrive at each leaf.
        scores: [B, classes], what timm's own classifier said, which all leaves add; or None.
    """

    in_repr = ("logits", "path", "leaf")

    probabilities: Tensor
    similarity: Tensor
    routing: Tensor
    distances: Tensor
    path: Tensor
    visited: Tensor
    leaf: Tensor
    leaves: Tensor
    weights: Tensor
    arrived: Tensor
    scores: Tensor | None

    @property
    def cells(self) -> Tensor:
        """The nearest position to each prototype, int64 [B, branches], -1 at branches not computed.

        A position is a token's place among the patch tokens that are left, without pruning the patch itself in raster
        order; of 2x2 prototypes the window's.
        """
        return self.distances.argmin(2).masked_fill(self.similarity.isnan(), -1)


@dataclass(eq=False, repr=False)
class TreeEvidence(Evidence):
    """How an image walked down the tree, and what each turn did to the target's score.

    A turn's ``steps`` entry is log p(target) with that branch going wholly the way that it went, minus the same going
    wholly the other way, all others mixing softly as they did: exact, since p is linear in each branch's routing (p is
    held at 0 from below under ``routing="raw"``). ``row`` has it at the token that is nearest the prototype (of 2x2
    prototypes a quarter at each of four) where the path went left, since that token is why. A right turn says that
    nothing in the image was near enough: it has no place, and stands in ``steps`` alone. So ``row`` is positive where a
    patch that was recognised speaks for the target, negative where against, and sums to the left turns' ``steps``.

    Attributes:
        path: int64 [B, depth], 0 left ("present"), 1 right ("absent").
        leaf: int64 [B], where it ends.
        visited: int64 [B, depth], the branches on the way, numbered in pre-order.
        similarity: float [B, depth], of the nearest token to each visited branch's prototype.
        cells: int64 [B, depth], the patch (row * gw + column) that it is at: the first of several that a merged or
            fused token stands for, the upper left one of a 2x2 window; -1 for none.
        steps: float [B, depth].
        similarity_maps: float [B, depth, gh, gw], similarity of each patch to each visited prototype; NaN at patches
            that are no token of their own any more. Of 2x2 prototypes the largest of the windows that a patch is in.
        distribution: float [B, classes], that of the leaf.
        weights: float [B, leaves], each leaf's part in a soft output.
    """

    in_repr = ("target", "logits", "path", "leaf")

    path: Tensor
    leaf: Tensor
    visited: Tensor
    similarity: Tensor
    cells: Tensor
    steps: Tensor
    similarity_maps: Tensor
    distribution: Tensor
    weights: Tensor

    def info(self) -> dict[str, Tensor]:
        """All of it by name."""
        names = ("path", "leaf", "visited", "similarity", "cells", "steps", "similarity_maps", "distribution")
        return {name: getattr(self, name) for name in (*names, "weights")}


@dataclass(eq=False, repr=False)
class Node(Brief):
    """A branch or a leaf of the tree.

    Attributes:
        number: Its place among all nodes, in pre-order.
        kind: "branch" or "leaf".
        index: Its place among branches (in pre-order) or leaves (from left to right).
        depth: 0 at the root.
        parent: The parent's number; None at the root.
        side: "left" or "right" of its parent; None at the root.
        children: A branch's left and right child by number; of a leaf ().
        nearest: Training patches nearest a branch's prototype, the nearest first, where they were collected.
    """

    number: int
    kind: str
    index: int
    depth: int
    parent: int | None
    side: str | None
    children: tuple[int, ...] = ()
    nearest: list[Nearest] = field(default_factory=list)


def nodes_of(depth: int, nearest: Mapping[int, Sequence[Nearest]]) -> list[Node]:
    """The nodes of a tree in pre-order, with what is nearest the prototypes of its branches."""
    nodes: list[Node] = []

    def grow(path: str, parent: int | None) -> int:
        number, index = numbers_of(path, depth)
        side = None if parent is None else ("left", "right")[path[-1] == "r"]
        branch = len(path) < depth
        node = Node(number, "branch" if branch else "leaf", index, len(path), parent, side)
        # Before its children are: that is pre-order.
        nodes.append(node)
        if branch:
            node.nearest = list(nearest.get(index, ()))
            node.children = (grow(path + "l", number), grow(path + "r", number))
        return number

    grow("", None)
    return nodes


def check_classes(labels: Any, batch: int, classes: int) -> None:
    """Refuse labels that are no class of each of so many images, or a single image."""
    whole = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    if not whole or len(labels) != batch or batch < 2:
        came = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise PrunexError(
            f"labels are {came} for {batch} images: give one class index an image, of at least two images to "
            "shuffle between"
        )
    # Both at once: whatever is read waits for the device.
    lowest, highest = torch.stack(torch.aminmax(labels)).tolist()
    if not 0 <= lowest <= highest < classes:
        raise PrunexError(f"labels run from {lowest} to {highest}, the model has {classes} classes")
