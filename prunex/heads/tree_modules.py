"""The modules of a tree of prototypes, all edges and all leaves at once, and where nodes lie in its orders."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.heads.final_tokens import FinalTokens
from prunex.vit.arithmetic import promoted

EPS = 1e-5  # of all norms in the tree, whatever the backbone's is
# Ours and the authors' names of what an edge and a leaf have.
EDGE = {
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
LEAF = {
    "predict": "pred.weight",
    "predict_bias": "pred.bias",
    "norm": "norm_o.weight",
    "norm_bias": "norm_o.bias",
}


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

        # Both edges of a node look at the same tokens: their maps are two columns of one product.
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
        context = F.layer_norm(context, (width,), eps=EPS)
        context = context * part(self.norm).unsqueeze(1) + part(self.norm_bias).unsqueeze(1)
        context = F.gelu(context) @ part(self.outer).transpose(1, 2) + part(self.outer_bias).unsqueeze(1)
        context = (context.transpose(0, 1) if whole else context).unflatten(1, groups)  # [B, G, sides, d]
        out = F.layer_norm(z.unsqueeze(2) + context.unsqueeze(3), (width,), eps=EPS).flatten(1, 2)
        scale, shift = (part(t).unsqueeze(1) for t in (self.last, self.last_bias))
        out = out * (scale if whole else scale.unsqueeze(1)) + (shift if whole else shift.unsqueeze(1))
        return out.sigmoid()


class Leaves(nn.Module):
    """All leaves from left to right: softmax(LN(W v + b + g)) of the largest entries v of the tokens that arrive."""

    def __init__(self, leaves: int, width: int, classes: int) -> None:
        super().__init__()
        self.predict, self.predict_bias = _uniform(width, leaves, classes, width), _uniform(width, leaves * classes)
        self.norm, self.norm_bias = _norm(leaves * classes)

    def forward(self, arrived: Tensor, at: slice | Tensor, scores: Tensor | None) -> Tensor:
        """Distributions [B, L, classes] for v [B, L, d] at all leaves, or with L = 1 at an image's own [B]."""
        classes = self.predict.shape[1]
        whole = isinstance(at, slice)
        rows = (self.predict_bias, self.norm, self.norm_bias)
        bias, scale, shift = (t.unflatten(0, (-1, classes))[at] for t in rows)
        if not whole:
            bias, scale, shift = bias.unsqueeze(1), scale.unsqueeze(1), shift.unsqueeze(1)
        product = (arrived.transpose(0, 1) if whole else arrived) @ self.predict[at].transpose(1, 2)
        out = (product.transpose(0, 1) if whole else product) + bias
        if scores is not None:
            out = out + scores.unsqueeze(1)
        return (promoted(F.layer_norm(promoted(out), (classes,), eps=EPS)) * scale + shift).softmax(2)


def largest_of(z: Tensor, tokens: FinalTokens) -> Tensor:
    """The largest entries of tokens [B, L, n, d], which are above 0, at each of L leaves: [B, L, d]."""
    return tokens.hide(z.transpose(1, 2), 0.0).amax(1)


def distances_to(z: Tensor, prototypes: Tensor, tokens: FinalTokens) -> Tensor:
    """Euclidean distances of tokens [B, G, n, d] to prototypes [1 or B, G, d, h, w]: [B, G, positions].

    Prototypes of 2 x 2 are compared with all windows of the grid, row-major.
    """
    # Differences, not products: those cancel where a token is near. At a distance of 0 the gradient is none.
    z, prototypes = promoted(z), promoted(prototypes)
    if prototypes.shape[-1] == 1:
        squares = (z - prototypes.flatten(3).transpose(2, 3)).square().sum(3)
    else:
        gh, gw = tokens.whole_grid
        grid = z.unflatten(2, (gh, gw))
        corners = [
            (grid[:, :, i : gh - 1 + i, j : gw - 1 + j] - prototypes[:, :, None, None, :, i, j]).square().sum(4)
            for i in (0, 1)
            for j in (0, 1)
        ]
        squares = (corners[0] + corners[1] + corners[2] + corners[3]).flatten(2)
    apart = squares > 0
    # Both choices: a root at 0 has an infinite gradient, which times the 0 of the outer choice would be NaN.
    distances = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
    # Infinitely far, so that the nearest token is none that a pruner dropped.
    return tokens.hide(distances.transpose(1, 2), torch.inf).transpose(1, 2)


def similarity_of(distance: Tensor) -> Tensor:
    """log((distance + 1) / (distance + 1e-4)), falling from 9.2103 at 0 to 0 at infinity.

    >>> similarity_of(torch.tensor([0.0, 1.5412, torch.inf]))
    tensor([9.2103, 0.5000, 0.0000])
    """
    # One logarithm: of two, the difference would cancel where tokens are far.
    return torch.log1p((1 - 1e-4) / (distance + 1e-4))


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """As torch begins linear layers."""
    return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))


def _norm(count: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones(count)), nn.Parameter(torch.zeros(count))


def paths_to(levels: int) -> list[str]:
    """The ways to all nodes of the first levels, each level from left to right: "", "l", "r", "ll", ..."""
    paths = [""]
    # The list grows while it is walked, which is breadth first: level by level.
    for path in paths:
        if len(path) + 1 < levels:
            paths += [path + "l", path + "r"]
    return paths


def numbers_of(path: str, depth: int) -> tuple[int, int]:
    """A node's place among all nodes in pre-order, and among branches so, or among leaves from left to right."""
    number = branch = leaf = 0
    for level, side in enumerate(path):
        below = 2 ** (depth - level - 1)  # leaves of each subtree
        # Behind the parent, and to the right behind the whole left subtree.
        number += 1 + (2 * below - 1) * (side == "r")
        branch += 1 + (below - 1) * (side == "r")
        leaf += below * (side == "r")
    return number, branch if len(path) < depth else leaf


def official_node(path: str) -> str:
    """The authors' name of a node."""
    return ".".join(["_root", *path])


def official_tree(state: Mapping[str, Tensor], depth: int, needed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' entries of a tree of some depth under our names, in the shapes that are needed where they fit."""
    # The tree may be part of a larger model in the checkpoint: its prototypes' entry tells by which prefix.
    start = next((k.removesuffix("attrib_pvec") for k in state if k.endswith("attrib_pvec")), "")
    names = {"prototypes": "attrib_pvec", "project.weight": "add_on.0.weight"}
    plain = {ours: state[start + theirs] for ours, theirs in names.items() if start + theirs in state}
    edges = [f"{official_node(path[:-1])}.gcb_{path[-1]}" for path in paths_to(depth + 1)[1:]]
    ends = [official_node(path) for path in paths_to(depth + 1)[-(2**depth) :]]
    for module, places, parts in (("contexts", edges, EDGE), ("leaves", ends, LEAF)):
        for ours, theirs in parts.items():
            wanted = [f"{start}{place}.{theirs}" for place in places]
            values = [state[name] for name in wanted if name in state]
            # Left out, an entry is missed by name where the weights are loaded.
            if len(values) < len(wanted) or any(v.shape != values[0].shape for v in values):
                continue
            stacked = torch.stack(values)
            shape = needed[f"{module}.{ours}"].shape
            plain[f"{module}.{ours}"] = stacked.reshape(shape) if stacked.numel() == math.prod(shape) else stacked
    return plain
