"""ViT-NeT: a binary tree of prototypes over patch tokens; a prediction is a walk down the tree."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.checks import check_choice, check_whole
from prunex.errors import PrunexError
from prunex.heads.base import TokenHead
from prunex.heads.final_tokens import FinalTokens
from prunex.heads.tree_modules import (
    Contexts,
    Leaves,
    distances_to,
    largest_of,
    numbers_of,
    official_tree,
    paths_to,
    similarity_of,
)
from prunex.heads.tree_patches import Nearest, NearestPatches
from prunex.heads.tree_reading import Node, TreeEvidence, TreeReading, check_classes, nodes_of
from prunex.heads.tree_routing import handed_round, log_of, reach, turns_worth, walk
from prunex.registry import register
from prunex.vit.anatomy import Anatomy
from prunex.vit.trace import TokenTrace

DEEPEST = 10  # context modules double with each level


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
        # Not persistent: both follow from the depth, and authors' checkpoints have neither.
        order = torch.tensor([numbers_of(path, self.depth)[1] for path in paths_to(self.depth)])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("place", order.argsort(), persistent=False)
        self._near = NearestPatches()

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
        if self.inference == "hard" and not self.training:
            return self.hard(tokens, classifier)
        return self.soft(tokens, classifier)

    def _check_whole(self, tokens: FinalTokens) -> None:
        """Refuse tokens that are no whole grid, which 2x2 windows need."""
        if tokens.counts is not None or tokens.trace is not None:
            raise _no_grid("some were pruned")
        (gh, gw), count = tokens.whole_grid, tokens.patches.shape[1]
        if count != gh * gw or min(gh, gw) < self.side:
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
        by_level = []
        for level, z in enumerate(inner):
            prototypes = self.prototypes[self.order[2**level - 1 : 2 ** (level + 1) - 1]]
            by_level.append(distances_to(z, prototypes.unsqueeze(0), tokens))
        arrived = largest_of(last, tokens)
        leaves = self.leaves(arrived, slice(None), scores)
        distances = torch.cat(by_level, 1)
        similarity = similarity_of(distances.amin(2))
        visited, path, leaf = walk(similarity, self.order, self.depth)
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
            arrived=arrived,
            scores=scores,
        )

    def _mixed(self, tokens: FinalTokens, leaves: Tensor, routing: Tensor, **parts: Any) -> TreeReading:
        """The reading of leaves [B, leaves, classes] mixed by shares [B, branches] that go left."""
        weights = reach(routing, self.order, self.depth)[-1]
        output = (weights.unsqueeze(2) * leaves).sum(1)
        return TreeReading(
            log_of(output), tokens, probabilities=output, routing=routing, leaves=leaves, weights=weights, **parts
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
            distances.append(distances_to(z, self.prototypes[branch].unsqueeze(1), tokens))
            side = (similarity_of(distances[-1].amin(2)) <= 0.5).long().squeeze(1)
            visited.append(branch)
            sides.append(side)
            place = 2 * place + side
            z = self.contexts(z, 2 ** (level + 1) - 2 + place, tokens)
        largest = largest_of(z, tokens)
        leaf = self.leaves(largest, place, scores)
        at, way = torch.stack(visited, 1), torch.cat(distances, 1)
        branches, ends = len(self.order), len(self.order) + 1
        unknown = way.new_full((batch, branches, way.shape[2]), torch.nan)
        spread = unknown.scatter(1, at.unsqueeze(2).expand_as(way), way)
        similarity = similarity_of(spread.amin(2))
        leaves, arrived = (
            at_end.new_full((batch, ends, at_end.shape[2]), torch.nan).scatter(
                1, place.reshape(-1, 1, 1).expand_as(at_end), at_end
            )
            for at_end in (leaf, largest)
        )
        output = leaf.squeeze(1)
        return TreeReading(
            log_of(output),
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
            arrived=arrived,
            scores=scores,
        )

    def _clipped(self, similarity: Tensor) -> Tensor:
        return similarity.clamp(0, 1) if self.routing == "clamp" else similarity

    def evidence(self, reading: Any, target: Tensor, trace: TokenTrace) -> TreeEvidence:
        """The path, what was near on it, and what each turn did to the target's score."""
        tokens, logits, batch = reading.tokens, reading.logits, len(target)
        reading = self._all_leaves(reading)
        steps = turns_worth(reading, target, self.order)
        positions = reading.cells.gather(1, reading.visited)
        # A right turn has no place: nothing in the image was near enough.
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
            gh, gw = tokens.whole_grid
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

    def _all_leaves(self, reading: TreeReading) -> TreeReading:
        """A reading that knows all leaves: a hard one has none to compare with, and is done again."""
        return self.soft(reading.tokens, reading.scores) if self.inference == "hard" else reading

    def _members(self, positions: Tensor, tokens: FinalTokens) -> Tensor:
        """The tokens [..., side^2] at positions, each the token itself or the four of its window."""
        if self.side == 1:
            return positions.unsqueeze(-1)
        gw = tokens.whole_grid[1]
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
        check_classes(labels, len(reading.logits), self.classes)
        right = self.right(reading, labels)
        # All answers at once, so that the device is waited for once.
        shares = torch.stack([*right.values()]).float().mean(1).tolist()
        return dict(zip(right, shares, strict=True))

    def right(self, reading: Any, labels: Tensor) -> dict[str, Tensor]:
        """For which images each of the answers of :meth:`controls` is right, bool [B], still on the device."""
        batch = len(reading.logits)
        with torch.no_grad():
            soft = self._all_leaves(reading)
            weights = reach(handed_round(soft.routing), self.order, self.depth)[-1]
            answers = {
                "soft": soft.probabilities,
                "hard": soft.leaves[torch.arange(batch, device=soft.leaf.device), soft.leaf],
                "classifier": soft.scores,
                "tree": (soft.weights.unsqueeze(2) * self.leaves(soft.arrived, slice(None), None)).sum(1),
                "shuffled": (weights.unsqueeze(2) * soft.leaves).sum(1),
            }
        return {n: a.argmax(1) == labels.to(a.device) for n, a in answers.items() if a is not None}

    @property
    def nearest(self) -> dict[int, list[Nearest]]:
        """By branch, what :meth:`collect` kept, the nearest first."""
        return self._near.by_branch

    def tree(self) -> list[Node]:
        """The tree's nodes in pre-order, with the training patches nearest each prototype where they were collected."""
        return nodes_of(self.depth, self.nearest)

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
        # Off a hard path there is no cell, and a similarity of NaN keeps any from being taken.
        patches = self._patches(reading.cells.clamp(min=0), reading.tokens)
        # On the images' device, which may be another one than the model's.
        values, patches = reading.similarity.to(images.device), patches.to(images.device)
        self._near.offer(values, patches, images, ids, reading.tokens.whole_grid, self.side)

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
        return official_tree(state, self.depth, self.state_dict())


def _no_grid(why: str) -> PrunexError:
    return PrunexError(
        f"prototype=2 compares 2 x 2 windows of the whole patch grid, and {why}: give prototype=1, or leave all "
        "patches in"
    )
