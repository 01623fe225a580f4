"""A tree of prototypes: what each branch looks for, how many images go which way, and what they are taken for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from prunex.errors import PrunexError
from prunex.pictures.arrays import Floats, Picture, as_numpy, as_pictures, resized
from prunex.pictures.curves import COLORS
from prunex.pictures.mosaic import class_name
from prunex.pictures.sheet import DPI, FAINT, GAP, INK, NOTE, Sheet, fitted, wrapped

LEVELS = 4  # of a tree that are drawn
_PALE = "#b9c0c7"


def prototype_tree(
    counts: Any,
    leaves: Any,
    patches: Sequence[Any],
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    images: str = "images",
    side: int = 48,
) -> Picture:
    """A tree of prototypes from the root down: what each branch looks for, how many go which way, and where they end.

    At a branch stand the training patches nearest its prototype. Where some patch of an image is like it the image
    goes left, else right; edges are as wide as the share of all images that go along them. A leaf names the classes
    that it takes its images for. Of trees deeper than four levels the most visited subtree is drawn, and a line says
    so.

    Args:
        counts: Whole numbers [nodes], images that pass each node, in pre-order (a node, its left subtree, its right
            one) of a full binary tree.
        leaves: Numbers [leaves, classes] from left to right, probabilities; NaN where no image ended.
        patches: For each branch, in pre-order, uint8 [n, h, w, 3] of patches, the nearest first; n may be 0.
        class_names: Names of the classes; numbers are shown without them.
        title: A line above everything.
        images: What was counted, in words.
        side: Wanted side of a patch, in pixels; see `resized`.

    Raises:
        PrunexError: Arrays that are not of one full binary tree, or more images below a node than at it.

    >>> patch = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    >>> prototype_tree([10, 4, 6], [[0.9, 0.1], [0.2, 0.8]], [patch], ["cat", "dog"]).dtype
    dtype('uint8')
    """
    passed, ends, depth = _whole_tree(counts, leaves, len(patches))
    nearest = [_patches(p, side) for p in patches]
    nodes = _nodes(depth)
    start, word = _drawn(passed, nodes, depth)
    wide = max((p.shape[2] for p in nearest if len(p)), default=side)
    tall = max((p.shape[1] for p in nearest if len(p)), default=side)
    most = max((len(p) for p in nearest), default=0) or 1
    box = most * (wide + 2) - 2
    shown = min(depth, LEVELS)
    slot = max(88, (box + 20) // 2 + 1, 560 // 2**shown)
    key = [
        "shown: the training patches nearest the prototype · left, blue: a patch is like it · right, grey: none is",
        f"width and per cent: share of {passed[0]:,} {images} by their hard paths · leaves: what these are taken for "
        "there, mean probability",
    ]
    width = 2 * GAP + slot * 2**shown
    lines = [line for text in key for line in wrapped(text, width - 2 * GAP)]
    if not any(len(p) for p in nearest):
        lines.append("no training patches were collected: they are while ExplainableHead trains")
    said = wrapped(word, width - 2 * GAP, 12)
    first, step = (30 if title else 8) + 17 * len(said) + 8, tall + 62
    sheet = Sheet(width, first + shown * step + 74 + 15 * len(lines))
    sheet.head(title)
    for number, line in enumerate(said):
        sheet.write(GAP, first - 12 - 17 * (len(said) - 1 - number), line, 12)
    # Edges are drawn in the sheet's own pixels, downwards.
    lane = sheet.axes(0, 0, sheet.width, sheet.height)
    lane.set_xlim(0, sheet.width)
    lane.set_ylim(sheet.height, 0)
    for path, (node, index) in nodes.items():
        level = len(path) - len(start)
        if not path.startswith(start):
            continue
        # A path read as a binary number is the node's place in its level.
        place = int("".join("01"[way == "r"] for way in path[len(start) :]) or "0", 2)
        x, y = GAP + slot * 2 ** (shown - level) * (place + 0.5), first + level * step
        if len(path) == depth:
            _leaf(sheet, x, y, ends[index], int(passed[node]), class_names, slot)
            continue
        _branch(sheet, x, y, nearest[index], (wide, tall), bool(passed[node]))
        for way, turn in (("l", -1), ("r", 1)):
            child = passed[nodes[path + way][0]]
            reach = slot * 2 ** (shown - level) / 4
            _edge(sheet, lane, (x, y + tall + 5), (x + turn * reach, y + step - 5), turn, child / max(1, passed[0]))
    sheet.notes(GAP, sheet.height - 8 - 15 * (len(lines) - 1), lines)
    return sheet.drawn()


def _drawn(passed: Any, nodes: dict[str, tuple[int, int]], depth: int) -> tuple[str, str]:
    """The way to the root of what is drawn, and what is said of the tree in words."""
    used = sum(passed[node] > 0 for path, (node, _) in nodes.items() if len(path) == depth)
    word = f"{used} of {2**depth} leaves reached"
    if used == 1:
        word += ": all images go the same way, and hard paths tell none of them apart"
    if depth <= LEVELS:
        return "", word
    start = max((path for path in nodes if len(path) == depth - LEVELS), key=lambda path: passed[nodes[path][0]])
    ways = " → ".join("left" if way == "l" else "right" for way in start)
    share = passed[nodes[start][0]] / max(1, passed[0])
    return start, (
        f"{word} · of a tree {depth} levels deep the most visited subtree is drawn: from the root {ways}, where "
        f"{share:.0%} of the images come by"
    )


def _whole_tree(counts: Any, leaves: Any, branches: int) -> tuple[Any, Floats, int]:
    """Checked counts [nodes] and leaves [leaves, classes], and the depth."""
    passed, ends = as_numpy(counts), as_numpy(leaves)
    depth = len(ends).bit_length() - 1 if ends.ndim == 2 else 0
    whole = ends.ndim == 2 and ends.shape[1] > 0 and depth > 0 and len(ends) == 2**depth
    if not whole or passed.shape != (2 * len(ends) - 1,) or branches != len(ends) - 1:
        raise PrunexError(
            f"counts of shape {passed.shape}, leaves of shape {ends.shape} and patches of {branches} branches are no "
            "full binary tree: give counts [2 n - 1], leaves [n, classes] and n - 1 branches, n a power of two"
        )
    nodes = _nodes(depth)
    inner = {path: node for path, (node, _) in nodes.items() if len(path) < depth}
    # Every image that comes to a branch goes on to one of its children.
    sums = [passed[node] - passed[nodes[p + "l"][0]] - passed[nodes[p + "r"][0]] for p, node in inner.items()]
    if not np.issubdtype(passed.dtype, np.integer) or (passed < 0).any() or any(sums):
        raise PrunexError("counts are no images: give whole numbers, at each branch as many as its two children have")
    return passed, ends.astype(float), depth


def _nodes(depth: int) -> dict[str, tuple[int, int]]:
    """By path ("", "l", "lr", ...), in pre-order: the node's number, and its number among branches or leaves."""
    nodes: dict[str, tuple[int, int]] = {}
    seen = [0, 0]

    def walk(path: str) -> None:
        leaf = len(path) == depth
        nodes[path] = (sum(seen), seen[leaf])
        seen[leaf] += 1
        if not leaf:
            walk(path + "l")
            walk(path + "r")

    walk("")
    return nodes


def _patches(pictures: Any, side: int) -> Picture:
    """A branch's patches, enlarged; none is an empty array."""
    values = as_numpy(pictures)
    return resized(as_pictures(values, 4, "patches"), side) if values.size else np.zeros((0, side, side, 3), np.uint8)


def _branch(sheet: Sheet, x: float, y: float, patches: Picture, size: tuple[int, int], visited: bool) -> None:
    """A branch's nearest patches side by side, pale where no image comes by; a box where there are none."""
    wide, tall = size
    if not len(patches):
        sheet.fill(x - wide / 2, y, wide, tall, (236, 239, 242))
        sheet.write(x, y + tall / 2 + 4, "?", 13, FAINT, anchor="center")
    # Where nobody goes is part of the tree, and no part of the answers.
    patches = patches if visited else (0.3 * patches + 0.7 * 255).round().astype(np.uint8)
    left = round(x - (len(patches) * (wide + 2) - 2) / 2)
    for number, patch in enumerate(patches):
        sheet.put(left + number * (wide + 2), round(y), patch)


def _edge(
    sheet: Sheet, lane: Any, start: tuple[float, float], end: tuple[float, float], turn: int, share: float
) -> None:
    """A line as wide as the share that goes along it, and that share above its middle."""
    color, size, anchor = _PALE, NOTE, "right" if turn < 0 else "left"
    if share:
        color, size = COLORS[0] if turn < 0 else "#78838e", 13
    pixels = 1 + 10 * share
    lane.plot(*zip(start, end, strict=True), color=color, linewidth=pixels * 72 / DPI, solid_capstyle="butt")
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    text = f"{share:.0%}" if share == 0 or share >= 0.01 else "<1%"
    away = 6 + pixels / 2
    sheet.write(x + turn * away, y - away / 2, text, size, INK if share else _PALE, bold=bool(share), anchor=anchor)


def _leaf(
    sheet: Sheet, x: float, y: float, chances: Floats, count: int, class_names: Sequence[str] | None, slot: int
) -> None:
    """The classes that a leaf takes its images for, the likeliest first."""
    if not count or not np.isfinite(chances).all():
        sheet.write(x, y + 14, "no image", NOTE, _PALE, anchor="center")
        return
    order = np.argsort(-chances, kind="stable")[:3]
    for number, k in enumerate(order.tolist()):
        if number and chances[k] < 0.05:
            break
        text = fitted(class_name(k, class_names), slot - 36, 12, 0.62)
        line = f"{text} · {chances[k]:.0%}"
        sheet.write(x, y + 14 + 17 * number, line, 12, FAINT if number else INK, bold=not number, anchor="center")
