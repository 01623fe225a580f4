"""ViT-NeT: a binary tree of prototypes over patch tokens; a prediction is a walk down the tree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.checks import check_choice, check_whole
from prunex.errors import PrunexError
from prunex.heads.base import Evidence, Reading, TokenHead
from prunex.heads.final_tokens import FinalTokens
from prunex.registry import register
from prunex.vit.anatomy import Anatomy
from prunex.vit.arithmetic import promoted
from prunex.vit.trace import TokenTrace

DEEPEST = 10  # context modules double with each level
NEAREST = 3  # training patches kept for each prototype
_FLOOR = 1e-12  # what the authors add to a probability before its logarithm
_EPS = 1e-5  # of all norms in the tree, whatever the backbone's is


@dataclass(eq=False, repr=False)
class TreeReading(Reading):
    """What a ViT-NeT makes of final tokens.

    Branches are in pre-order (a branch, its left subtree, its right one), leaves from left to right. Hard inference
    computes what lies on each image's path alone: elsewhere similarities, distances and leaves are NaN.

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
class Nearest(Brief):
    """A training patch that is near a prototype.

    Attributes:
        value: Its similarity.
        id: Of its image, as it was given.
        cell: (row, column) on the patch grid; of 2x2 prototypes of the upper left patch.
        pixels: [C, h, w], as they were given.
    """

    value: float
    id: Any
    cell: tuple[int, int]
    pixels: Tensor


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


class Contexts(nn.Module):
    """The context modules of all edges, level by level from left to right, each a step from a node's tokens to a child.

    c = sum_p a_p z_p with a = softmax over tokens of a linear map to one number; z' = sigmoid(LN(z + W_2 GELU(LN(W_1
    c)))). What a norm or a bias is made of is kept flat: optimisers that spare vectors from weight decay spare it.
    """

    def __init__(self, edges: int, width: int) -> None:
        super().__init__()
        self.attend, self.attend_bias = _uniform(width, edges, width), _uniform(width, edges)
        self.inner, self.inner_bias = _uniform(width, edges, width, width), _uniform(width, edges * width)
        self.norm, self.norm_bias = _norm(edges * width)
        self.outer, self.outer_bias = _uniform(width, edges, width, width), _uniform(width, edges * width)
        self.last, self.last_bias = _norm(edges * width)

    def forward(self, z: Tensor, at: slice | Tensor, tokens: FinalTokens) -> Tensor:
        """Tokens [B, G, n, d] of G nodes along edges: a level's, two a node, to [B, 2G, n, d]; or one an image's own.

        An image's own edges are int64 [B], where G is 1.
        """
        width = z.shape[3]
        whole = isinstance(at, slice)

        def part(weight: Tensor) -> Tensor:
            """[E, ...] of what is flat, the edges' own."""
            rows = weight if weight.ndim > 1 else weight.unflatten(0, (-1, width))
            return rows[at]

        by_side = part(self.attend).unflatten(0, (-1, 2 if whole else 1)).transpose(1, 2)  # [G or B, d, sides]
        bias = self.attend_bias[at].unflatten(0, (-1, 2 if whole else 1)).unsqueeze(1)
        scores = z @ (by_side if whole else by_side.unsqueeze(1)) + (bias if whole else bias.unsqueeze(1))
        groups = scores.shape[1::2]
        # Tokens come second, where it is known which are there and how often each counts.
        shares = tokens.softmax(scores.transpose(1, 2).flatten(2))
        shares = tokens.hide(shares, 0.0).unflatten(2, groups).permute(0, 2, 3, 1)
        context = (shares @ z).flatten(1, 2)  # [B, E, d]
        context = context.transpose(0, 1) if whole else context  # one product an edge, of all rows that take it
        context = context @ part(self.inner).transpose(1, 2) + part(self.inner_bias).unsqueeze(1)
        context = F.layer_norm(context, (width,), eps=_EPS)
        context = context * part(self.norm).unsqueeze(1) + part(self.norm_bias).unsqueeze(1)
        context = F.gelu(context) @ part(self.outer).transpose(1, 2) + part(self.outer_bias).unsqueeze(1)
        context = (context.transpose(0, 1) if whole else context).unflatten(1, groups)  # [B, G, sides, d]
        out = F.layer_norm(z.unsqueeze(2) + context.unsqueeze(3), (width,), eps=_EPS).flatten(1, 2)
        scale, shift = (part(t).unsqueeze(1) for t in (self.last, self.last_bias))
        out = out * (scale if whole else scale.unsqueeze(1)) + (shift if whole else shift.unsqueeze(1))
        return out.sigmoid()


class Leaves(nn.Module):
    """All leaves from left to right: softmax(LN(W v + b + g)) of the largest entries v of the tokens that arrive."""

    def __init__(self, leaves: int, width: int, classes: int) -> None:
        super().__init__()
        self.predict, self.predict_bias = _uniform(width, leaves, classes, width), _uniform(width, leaves * classes)
        self.norm, self.norm_bias = _norm(leaves * classes)

    def forward(self, z: Tensor, at: slice | Tensor, tokens: FinalTokens, scores: Tensor | None) -> Tensor:
        """Distributions [B, L, classes] for tokens [B, L, n, d] at all leaves, or with L = 1 at an image's own [B]."""
        classes = self.predict.shape[1]
        whole = isinstance(at, slice)
        rows = (self.predict_bias, self.norm, self.norm_bias)
        bias, scale, shift = (t.unflatten(0, (-1, classes))[at] for t in rows)
        if not whole:
            bias, scale, shift = bias.unsqueeze(1), scale.unsqueeze(1), shift.unsqueeze(1)
        largest = tokens.hide(z.transpose(1, 2), 0.0).amax(1)  # [B, L, d], of what is above 0
        product = (largest.transpose(0, 1) if whole else largest) @ self.predict[at].transpose(1, 2)
        out = (product.transpose(0, 1) if whole else product) + bias
        if scores is not None:
            out = out + scores.unsqueeze(1)
        return (promoted(F.layer_norm(promoted(out), (classes,), eps=_EPS)) * scale + shift).softmax(2)


@register(
    "head",
    "vit_net",
    "Kim et al., ICML 2022",
    "training",
)
class ViTNeT(TokenHead):
    """A neural tree on the patch tokens: each branch asks whether some patch looks like its prototype.

    With Z = sigmoid(X W) of the final tokens, d = D / 4 wide, branch n finds the smallest Euclidean distance of any
    token (or any 2x2 window of tokens) to its prototype and turns it into a similarity

        m_n = max_p log((dist_p + 1) / (dist_p + 1e-4)), in (0, 9.2104),

    which is 0.5 at a distance of 1.541, and sends m_n of an image left and 1 - m_n right. Each edge has a context
    module of its own (:class:`Contexts`), each leaf l a distribution q_l = softmax(LN(W_l v + b_l + g)), where v has
    the largest entries of the tokens that arrive and g the scores of timm's own classifier, which is trained along. The
    output is p = sum_l w_l q_l, w_l the product of the shares along the way. **m is no probability**: in the authors'
    code it is not clipped, so that shares and outputs may be negative (``routing="raw"``); "clamp", ours, clips it to
    [0, 1]. A branch whose m is above 1 for every image has no gradient then.

    The model's output, ``logits``, is log(p + 1e-12), p held at 0 from below, so that the module's cross-entropy is the
    authors' only loss; under "raw" theirs is NaN where p is negative, and ours has no gradient there. Log
    ``reading.routing`` to see how the tree is used: at the start m is about 0.23, and the mass lies on the right.

    Because every leaf adds g, **the tree may be decorative**: :meth:`controls` measures accuracy from g alone, without
    g, and with shuffled routing. LayerNorm over two numbers leaves only which is larger, so that with two classes
    hardly any gradient passes the leaves: a warning says so.

    Kim et al., *ViT-NeT: Interpretable Vision Transformers with Neural Tree Decoder*, ICML 2022; from the authors'
    code, the paper's own text was not read. Accuracies of the names of their checkpoints, Swin-B at
    448 pixels (unverified): CUB 91.59 at depth 4, Cars 95.04 at depth 6, Dogs 89.36 at depth 6 with 2x2 prototypes; on
    DeiT-S, as others measured, no gain on CUB (84.26 beside 84.28).

    Args:
        anatomy: Of the model.
        depth: Levels of branches, 1 to 10: 2^depth - 1 branches, 2^depth leaves, 2 (2^depth - 1) context modules of
            about 2 d^2 parameters each.
        prototype: Its side in tokens, 1 or 2. 2x2 ones need every patch of the grid, so no pruner.
        routing: "clamp", or "raw" as the authors have it.
        inference: How eval mode answers: "soft" as in training, or "hard" by the one leaf that the path of m > 0.5
            leads to, computing nothing beside that path. Training is always soft.

    Raises:
        PrunexError: For options out of range, fewer than two classes, a grid smaller than a prototype, or 2x2
            prototypes where a pruner takes tokens away.

    Attributes:
        nearest: By branch, what :meth:`collect` kept.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3).eval()
    >>> head = prunex.attach(model, "vit_net", depth=2)
    >>> evidence = head.evidence(torch.randn(5, 3, 64, 64))
    >>> evidence.path.shape, evidence.similarity_maps.shape, evidence.distribution.shape
    (torch.Size([5, 2]), torch.Size([5, 2, 4, 4]), torch.Size([5, 3]))
    >>> [(node.kind, node.depth, node.side) for node in head.tree()[:3]]
    [('branch', 0, None), ('branch', 1, 'left'), ('leaf', 2, 'left')]
    """

    name = "vit_net"
    uses_classifier = True
    order: Tensor  # the branch at each place, level by level from left to right
    place: Tensor  # the place of each branch

    def __init__(
        self,
        anatomy: Anatomy,
        depth: int = 4,
        prototype: Literal[1, 2] = 1,
        routing: Literal["clamp", "raw"] = "clamp",
        inference: Literal["soft", "hard"] = "soft",
    ) -> None:
        super().__init__(anatomy)
        self.depth = check_whole("depth", depth, 1, DEEPEST)
        self.side = check_whole("prototype", prototype, 1, 2)
        self.routing = check_choice("routing", routing, ("clamp", "raw"))
        self.inference = check_choice("inference", inference, ("soft", "hard"))
        self.options = {"depth": depth, "prototype": prototype, "routing": routing, "inference": inference}
        if self.classes < 2:
            raise PrunexError(f"vit_net tells classes apart, and this model has {self.classes}: give it two or more")
        if self.classes == 2:
            warnings.warn(
                "vit_net normalises the scores of two classes against each other, which leaves only which is larger: "
                "hardly any gradient reaches the classifier through the leaves; three classes or more train as usual",
                stacklevel=5,
            )
        self.check(anatomy)
        self.grid = anatomy.grid
        self.slim_width = max(1, self.width // 4)
        branches = 2**self.depth - 1
        self.project = nn.Linear(self.width, self.slim_width, bias=False)
        nn.init.xavier_normal_(self.project.weight, gain=nn.init.calculate_gain("sigmoid"))
        # The middle of what a sigmoid gives; branches in pre-order.
        self.prototypes = nn.Parameter(torch.empty(branches, self.slim_width, self.side, self.side))
        nn.init.normal_(self.prototypes, 0.5, 0.1)
        self.contexts = Contexts(2 * branches, self.slim_width)
        self.leaves = Leaves(branches + 1, self.slim_width, self.classes)
        order = torch.tensor([_numbers(path, self.depth)[1] for path in _paths(self.depth)])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("place", order.argsort(), persistent=False)
        self.nearest: dict[int, list[Nearest]] = {}

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a grid without room for a prototype."""
        if min(anatomy.grid) < self.side:
            raise PrunexError(
                f"prototype={self.side} needs a grid of 2 x 2 patches, this model's is {anatomy.grid}: give prototype=1"
            )

    def check_pruned(self) -> None:
        """Refuse 2x2 prototypes beside a token pruner."""
        if self.side > 1:
            raise _no_grid("a token pruner takes some away")

    def forward(self, tokens: FinalTokens, classifier: Tensor | None = None) -> TreeReading:
        """Walk down the tree; without ``classifier`` scores the leaves add nothing to their own."""
        if not tokens.patches.shape[1]:
            raise PrunexError("vit_net reads patch tokens, and there are none: keep at least one")
        if self.side > 1:
            self._check_whole(tokens)
        walk = self.hard if self.inference == "hard" and not self.training else self.soft
        return walk(tokens, classifier)

    def _check_whole(self, tokens: FinalTokens) -> None:
        """Refuse tokens that are no whole grid, which 2x2 windows need."""
        if tokens.counts is not None or tokens.trace is not None:
            raise _no_grid("some were pruned")
        (gh, gw), count = tokens.grid, tokens.patches.shape[1]
        if count != gh * gw:
            raise _no_grid(f"there are {count} patch tokens for a grid of {gh} x {gw}")

    def levels(self, tokens: FinalTokens) -> Iterator[Tensor]:
        """The tokens that enter the nodes of each level, root first, leaves last: [B, nodes, n, d]."""
        z = self.project(tokens.patches).sigmoid().unsqueeze(1)
        yield z
        for level in range(self.depth):
            z = self.contexts(z, slice(2 ** (level + 1) - 2, 2 ** (level + 2) - 2), tokens)
            yield z

    def soft(self, tokens: FinalTokens, scores: Tensor | None) -> TreeReading:
        """Every leaf's distribution, mixed by the shares along the way to it."""
        *inner, last = self.levels(tokens)
        each = []
        for level, z in enumerate(inner):
            here = self.prototypes[self.order[2**level - 1 : 2 ** (level + 1) - 1]]
            each.append(self._distances(z, here.unsqueeze(0), tokens))
        leaves = self.leaves(last, slice(None), tokens, scores)
        distances = torch.cat(each, 1)
        similarity = similarity_of(distances.amin(2))
        visited, path, leaf = self._walk(similarity)
        routing = self._clipped(similarity)
        return self._mixed(
            tokens,
            leaves=leaves,
            routing=routing[:, self.place],
            similarity=similarity[:, self.place],
            distances=distances[:, self.place],
            path=path,
            visited=visited,
            leaf=leaf,
            scores=scores,
        )

    def _mixed(self, tokens: FinalTokens, leaves: Tensor, routing: Tensor, **parts: Any) -> TreeReading:
        """The reading of leaves [B, leaves, classes] mixed by shares [B, branches] that go left."""
        weights = self._reach(routing)[-1]
        output = (weights.unsqueeze(2) * leaves).sum(1)
        logits = (output.clamp(min=0) + _FLOOR).log()
        return TreeReading(
            logits, tokens, probabilities=output, routing=routing, leaves=leaves, weights=weights, **parts
        )

    def hard(self, tokens: FinalTokens, scores: Tensor | None) -> TreeReading:
        """The leaf at the end of each image's own path, computing no other edge.

        Each image takes the weights of the edge that it goes along, so that one graph serves any batch.
        """
        z = self.project(tokens.patches).sigmoid().unsqueeze(1)
        batch = z.shape[0]
        place = torch.zeros(batch, dtype=torch.long, device=z.device)  # of the node in its level
        visited, sides, distances = [], [], []
        for level in range(self.depth):
            branch = self.order[2**level - 1 + place]
            distances.append(self._distances(z, self.prototypes[branch].unsqueeze(1), tokens))
            side = (similarity_of(distances[-1].amin(2)) <= 0.5).long().squeeze(1)
            visited.append(branch)
            sides.append(side)
            place = 2 * place + side
            z = self.contexts(z, 2 ** (level + 1) - 2 + place, tokens)
        leaf = self.leaves(z, place, tokens, scores)
        at, way = torch.stack(visited, 1), torch.cat(distances, 1)
        branches, ends = len(self.order), len(self.order) + 1
        unknown = way.new_full((batch, branches, way.shape[2]), torch.nan)
        spread = unknown.scatter(1, at.unsqueeze(2).expand_as(way), way)
        similarity = similarity_of(spread.amin(2))
        index = place.reshape(-1, 1, 1).expand(-1, 1, self.classes)
        leaves = leaf.new_full((batch, ends, self.classes), torch.nan).scatter(1, index, leaf)
        output = leaf.squeeze(1)
        return TreeReading(
            (output + _FLOOR).log(),
            tokens,
            probabilities=output,
            similarity=similarity,
            routing=self._clipped(similarity),
            distances=spread,
            path=torch.stack(sides, 1),
            visited=at,
            leaf=place,
            leaves=leaves,
            weights=output.new_zeros(batch, ends).scatter(1, place.unsqueeze(1), 1.0),
            scores=scores,
        )

    def _distances(self, z: Tensor, prototypes: Tensor, tokens: FinalTokens) -> Tensor:
        """Euclidean distances of tokens [B, G, n, d] to prototypes [1 or B, G, d, h, w]: [B, G, positions]."""
        # Differences, not products: those cancel where a token is near. At a distance of 0 the gradient is none.
        z, prototypes = promoted(z), promoted(prototypes)
        if self.side == 1:
            squares = (z - prototypes.flatten(3).transpose(2, 3)).square().sum(3)
        else:
            gh, gw = tokens.grid
            grid = z.unflatten(2, (gh, gw))
            corners = [
                (grid[:, :, i : gh - 1 + i, j : gw - 1 + j] - prototypes[:, :, None, None, :, i, j]).square().sum(4)
                for i in (0, 1)
                for j in (0, 1)
            ]
            squares = (corners[0] + corners[1] + corners[2] + corners[3]).flatten(2)
        apart = squares > 0
        distances = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
        return tokens.hide(distances.transpose(1, 2), torch.inf).transpose(1, 2)

    def _clipped(self, similarity: Tensor) -> Tensor:
        return similarity.clamp(0, 1) if self.routing == "clamp" else similarity

    def _walk(self, similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The hard path for similarities level by level: branches and turns [B, depth], and the leaf [B]."""
        place = torch.zeros_like(similarity[:, 0], dtype=torch.long)
        visited, sides = [], []
        for level in range(self.depth):
            at = 2**level - 1 + place
            visited.append(self.order[at])
            sides.append((similarity.gather(1, at.unsqueeze(1)).squeeze(1) <= 0.5).long())
            place = 2 * place + sides[-1]
        return torch.stack(visited, 1), torch.stack(sides, 1), place

    def _reach(self, routing: Tensor) -> list[Tensor]:
        """Which part of an image reaches each node, level by level, leaves last: [B, nodes], from shares that go left.

        A product of the shares along the way.
        """
        routing = routing[:, self.order]
        reach = [torch.ones_like(routing[:, :1])]
        for level in range(self.depth):
            left = routing[:, 2**level - 1 : 2 ** (level + 1) - 1]
            reach.append(torch.stack([reach[-1] * left, reach[-1] * (1 - left)], 2).flatten(1))
        return reach

    def losses(
        self, reading: Any, labels: Tensor | None = None, concepts: Tensor | None = None, spatial: Tensor | None = None
    ) -> dict[str, Tensor]:
        """None: the module's own cross-entropy is all that the tree is trained by."""
        return {}

    def evidence(self, reading: Any, target: Tensor, trace: TokenTrace) -> TreeEvidence:
        """The path, what was near on it, and what each turn did to the target's score."""
        tokens, logits, batch = reading.tokens, reading.logits, len(target)
        # A hard forward knows no other leaves to compare with.
        reading = reading if not bool(reading.leaves.isnan().any()) else self.soft(tokens, reading.scores)
        steps = self._steps(reading, target)
        positions = reading.cells.gather(1, reading.visited)
        left = steps.masked_fill(reading.path == 1, 0)
        row = left.new_zeros(batch, self.prefix + tokens.patches.shape[1])
        row = row.scatter_add(
            1,
            self.prefix + self._members(positions, tokens).flatten(1),
            (left / self.side**2).repeat_interleave(self.side**2, 1),
        )
        shown = reading.visited.unsqueeze(2).expand(-1, -1, reading.distances.shape[2])
        maps = similarity_of(reading.distances.gather(1, shown))
        if self.side > 1:
            gh, gw = tokens.grid
            # The largest of the windows that a patch is in: of one at corners, of four inside.
            windows = F.pad(maps.unflatten(2, (gh - 1, gw - 1)), (1, 1, 1, 1), value=-torch.inf)
            maps = F.max_pool2d(windows, 2, 1).flatten(2)
        by_patch, present = tokens.on_patches(maps.transpose(1, 2))
        by_patch = by_patch.masked_fill(~present.unsqueeze(2), torch.nan)
        return TreeEvidence(
            target,
            logits,
            trace.lift(row),
            trace,
            path=reading.path,
            leaf=reading.leaf,
            visited=reading.visited,
            similarity=reading.similarity.gather(1, reading.visited),
            cells=self._patches(positions, tokens),
            steps=steps,
            similarity_maps=by_patch.transpose(1, 2).unflatten(2, trace.grid),
            distribution=reading.leaves[torch.arange(batch, device=target.device), reading.leaf],
            weights=reading.weights,
        )

    def _steps(self, reading: TreeReading, target: Tensor) -> Tensor:
        """How log p(target) changes with the way that each visited branch went, [B, depth]; the rest is as it was."""
        routing = reading.routing[:, self.order]
        value = reading.leaves.gather(2, target.reshape(-1, 1, 1).expand(-1, reading.leaves.shape[1], 1)).squeeze(2)
        gains = []  # by level, deepest first: what more the left subtree gives than the right one
        for level in reversed(range(self.depth)):
            left = routing[:, 2**level - 1 : 2 ** (level + 1) - 1]
            gains.append(value[:, ::2] - value[:, 1::2])
            value = left * value[:, ::2] + (1 - left) * value[:, 1::2]
        output, reach = value, self._reach(reading.routing)  # [B, 1]
        gain = (torch.cat(reach[:-1], 1) * torch.cat(gains[::-1], 1)).gather(1, self.place[reading.visited])
        share = reading.routing.gather(1, reading.visited)
        left, right = (((output + gain * change).clamp(min=0) + _FLOOR).log() for change in (1 - share, -share))
        return torch.where(reading.path == 0, left - right, right - left)

    def _members(self, positions: Tensor, tokens: FinalTokens) -> Tensor:
        """The tokens [..., side^2] at positions, each the token itself or the four of its window."""
        if self.side == 1:
            return positions.unsqueeze(-1)
        gw = tokens.grid[1]
        first = positions // (gw - 1) * gw + positions % (gw - 1)
        return torch.stack([first, first + 1, first + gw, first + gw + 1], -1)

    def _patches(self, positions: Tensor, tokens: FinalTokens) -> Tensor:
        """The first patch, in raster order, of the tokens at positions [B, m]; -1 for none."""
        first = self._members(positions, tokens)[..., 0]
        if tokens.trace is None:
            return first
        held = tokens.trace.groups().flatten(1).unsqueeze(1) == first.unsqueeze(2)  # [B, m, P]
        return torch.where(held.any(2), held.to(torch.uint8).argmax(2), -1)

    def controls(self, reading: Any, labels: Tensor) -> dict[str, float]:
        """Whether the tree decides anything: accuracies on a batch of at least two images, each in [0, 1].

        Args:
            reading: Of the images, in eval mode.
            labels: int64 [B].

        Returns:
            ``soft`` and ``hard``, the tree in both modes; ``classifier``, timm's own classifier alone; ``tree``, the
            tree softly without that one's scores; ``shuffled``, softly, with the routing of each branch handed round
            among the images (always in the same way, none keeping its own).

        Raises:
            PrunexError: For labels that are none, or a single image.
        """
        batch = len(reading.logits)
        whole = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
        if not whole or len(labels) != batch or batch < 2:
            came = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise PrunexError(
                f"labels are {came} for {batch} images: give one class index an image, of at least two images to "
                "shuffle between"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise PrunexError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, the model has {self.classes} classes"
            )
        tokens, scores = reading.tokens, reading.scores
        with torch.no_grad():
            soft = self.soft(tokens, scores)
            generator = torch.Generator().manual_seed(0)
            rounds = torch.stack([torch.randperm(batch, generator=generator) for _ in range(len(self.order))], 1)
            source = torch.empty_like(rounds).scatter(0, rounds, rounds.roll(1, 0)).to(soft.routing.device)
            weights = self._reach(soft.routing.gather(0, source))[-1]
            answers = {
                "soft": soft.probabilities,
                "hard": self.hard(tokens, scores).probabilities,
                "classifier": scores,
                "tree": self.soft(tokens, None).probabilities,
                "shuffled": (weights.unsqueeze(2) * soft.leaves).sum(1),
            }
        labels = labels.to(reading.logits.device)
        return {n: float((a.argmax(1) == labels).float().mean()) for n, a in answers.items() if a is not None}

    def tree(self) -> list[Node]:
        """The tree's nodes in pre-order, with the training patches nearest each prototype where they were collected."""
        nodes: list[Node] = []

        def grow(path: str, parent: int | None) -> int:
            number, index = _numbers(path, self.depth)
            side = None if parent is None else ("left", "right")[path[-1] == "r"]
            branch = len(path) < self.depth
            node = Node(number, "branch" if branch else "leaf", index, len(path), parent, side)
            nodes.append(node)
            if branch:
                node.nearest = list(self.nearest.get(index, ()))
                node.children = (grow(path + "l", number), grow(path + "r", number))
            return number

        grow("", None)
        return nodes

    def collect(self, reading: Any, images: Tensor, ids: Sequence[Any]) -> None:
        """Keep, for each branch, the patches of the three images most similar to its prototype so far.

        Over all training images these are what a prototype stands for. The authors keep one. An image that comes again
        under its id is not counted twice. ``nearest.clear()`` begins anew, as one should once the weights changed.

        Args:
            reading: Of the images, in eval mode.
            images: [B, C, H, W], which pixels are cut from: as they entered, or as they look, of any size and type.
            ids: One an image, such as its place in the data set.

        Raises:
            PrunexError: For another number of images or ids.
        """
        batch = len(reading.logits)
        if images.ndim != 4 or len(images) != batch or len(ids) != batch:
            raise PrunexError(
                f"images are {list(images.shape)} with {len(ids)} ids for a reading of {batch}: give "
                f"[{batch}, C, H, W] and one id an image"
            )
        values = reading.similarity.detach().float()
        patches = self._patches(reading.cells.clamp(min=0), reading.tokens).tolist()
        best = values.nan_to_num(-1).topk(min(NEAREST, batch), 0)
        for branch, (top, rows) in enumerate(zip(best.values.T.tolist(), best.indices.T.tolist(), strict=True)):
            for value, row in zip(top, rows, strict=True):
                self._offer(branch, value, ids[row], images[row], patches[row][branch], reading.tokens.grid)

    def _offer(self, branch: int, value: float, name: Any, image: Tensor, patch: int, grid: tuple[int, int]) -> None:
        """Take an image's patch in among a branch's nearest ones, if it is."""
        held = self.nearest.get(branch, [])
        others = [n for n in held if n.id != name]
        again = [n for n in held if n.id == name and n.value >= value]
        if value < 0 or patch < 0 or again or (len(others) >= NEAREST and others[-1].value >= value):
            return
        row, column = divmod(patch, grid[1])
        (height, width), (gh, gw) = image.shape[1:], grid
        rows = slice(row * height // gh, (row + self.side) * height // gh)
        columns = slice(column * width // gw, (column + self.side) * width // gw)
        pixels = image[:, rows, columns].detach().cpu().clone()
        self.nearest[branch] = sorted([*others, Nearest(value, name, (row, column), pixels)], key=lambda n: -n.value)[
            :NEAREST
        ]

    def outputs(self, reading: Any) -> dict[str, Tensor]:
        """``path``: int64 [B, depth], 0 left, 1 right; read as a binary number it is the leaf."""
        return {"path": reading.path}

    def macs(self, patches: int) -> int:
        """Projection, distances, context modules, leaves and mixing: of the whole tree, or by a hard path's own."""
        hard = self.inference == "hard"
        branches, leaves = (self.depth, 1) if hard else (2**self.depth - 1, 2**self.depth)
        edges = self.depth if hard else 2 * branches
        width = self.slim_width
        gh, gw = self.grid
        positions = patches if self.side == 1 else (gh - 1) * (gw - 1)
        distances = branches * positions * width * self.side**2
        contexts = edges * (2 * patches * width + 2 * width**2)
        mixing = 0 if hard else leaves * self.classes
        return patches * self.width * width + distances + contexts + leaves * width * self.classes + mixing

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' parameter names.

        Rows of ``attrib_pvec`` are taken to be in pre-order. The authors' code binds them to branches by iterating a
        set, in an order that differs between processes and is stored nowhere, so that one of their checkpoints may
        belong to branches in another order.
        """
        start = next((k.removesuffix("attrib_pvec") for k in state if k.endswith("attrib_pvec")), "")
        names = {"prototypes": "attrib_pvec", "project.weight": "add_on.0.weight"}
        plain = {ours: state[start + theirs] for ours, theirs in names.items() if start + theirs in state}
        edges = [f"{_node(path[:-1])}.gcb_{path[-1]}" for path in _paths(self.depth + 1)[1:]]
        ends = [_node(path) for path in _paths(self.depth + 1)[-(2**self.depth) :]]
        for module, places, parts in (("contexts", edges, _EDGE), ("leaves", ends, _LEAF)):
            for ours, theirs in parts.items():
                wanted = [f"{start}{place}.{theirs}" for place in places]
                values = [state[name] for name in wanted if name in state]
                if len(values) < len(wanted) or any(v.shape != values[0].shape for v in values):
                    continue
                stacked = torch.stack(values)
                shape = getattr(getattr(self, module), ours).shape
                plain[f"{module}.{ours}"] = stacked.reshape(shape) if stacked.numel() == math.prod(shape) else stacked
        return plain


# Ours and the authors' names of what an edge and a leaf have.
_EDGE = {
    "attend": "cm.weight",
    "attend_bias": "cm.bias",
    "inner": "wv1.weight",
    "inner_bias": "wv1.bias",
    "norm": "norm.weight",
    "norm_bias": "norm.bias",
    "outer": "wv2.weight",
    "outer_bias": "wv2.bias",
    "last": "ffn_norm.weight",
    "last_bias": "ffn_norm.bias",
}
_LEAF = {
    "predict": "pred.weight",
    "predict_bias": "pred.bias",
    "norm": "norm_o.weight",
    "norm_bias": "norm_o.bias",
}


def similarity_of(distance: Tensor) -> Tensor:
    """log((distance + 1) / (distance + 1e-4)), falling from 9.2103 at 0 to 0 at infinity.

    >>> similarity_of(torch.tensor([0.0, 1.5412, torch.inf]))
    tensor([9.2103, 0.5000, 0.0000])
    """
    return torch.log1p((1 - 1e-4) / (distance + 1e-4))


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """As torch begins linear layers."""
    return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))


def _norm(count: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones(count)), nn.Parameter(torch.zeros(count))


def _paths(levels: int) -> list[str]:
    """The ways to all nodes of the first levels, each level from left to right: "", "l", "r", "ll", ..."""
    paths = [""]
    for path in paths:
        if len(path) + 1 < levels:
            paths += [path + "l", path + "r"]
    return paths


def _numbers(path: str, depth: int) -> tuple[int, int]:
    """A node's place among all nodes in pre-order, and among branches so, or among leaves from left to right."""
    number = branch = leaf = 0
    for level, side in enumerate(path):
        below = 2 ** (depth - level - 1)  # leaves of each subtree
        # Behind the parent, and to the right behind the whole left subtree.
        number += 1 + (2 * below - 1) * (side == "r")
        branch += 1 + (below - 1) * (side == "r")
        leaf += below * (side == "r")
    return number, branch if len(path) < depth else leaf


def _node(path: str) -> str:
    """The authors' name of a node."""
    return ".".join(["_root", *path])


def _no_grid(why: str) -> PrunexError:
    return PrunexError(
        f"prototype=2 compares 2 x 2 windows of the whole patch grid, and {why}: give prototype=1, or leave all "
        "patches in"
    )
