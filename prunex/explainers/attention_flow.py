"""Attention flow: how much the head's token can draw from each patch when attention weights are pipe widths."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.registry import register
from prunex.relevance.explanation import Explanation, answer
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.attention import over_heads
from prunex.vit.forward import own_anatomy
from prunex.vit.recording import check_layer, recording
from prunex.vit.tape import Attended, Fed, Tape
from prunex.vit.trace import Stage

log = logging.getLogger("prunex")

Integers = NDArray[np.int64]

# Edges out of and into a token of the small network that is tried first; how many times smaller it must be to be tried.
STRONGEST, WORTH = 16, 5


@register("explainer", "attention_flow", "Abnar & Zuidema, ACL 2020, arXiv 2005.00928", "one forward, scipy; slow")
def attention_flow(
    model: ViT,
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    start_layer: int = 0,
    scale: int = 1_000_000,
    max_tokens: int = 65,
) -> Explanation:
    """Maximum flow from the head's token to each input token through 0.5 A + 0.5 I (arXiv 2005.00928, Sec. 3).

    One node a token and layer; block l joins token i above it to token j below it with capacity M_l[i, j], A being the
    head mean (of differential attention and talking heads as for ``rollout``). Every input token j is the only sink of
    a maximum flow f_j of its own, solved exactly on capacities rounded to 1 / scale: a cut of m edges is off by at most
    m / (2 * scale).

    The source feeds each token by what the head reads of it: 1 into the class token (the paper's only case), half each
    into class and distillation token, 1 / m into each of m pooled tokens. So no flow exceeds 1, and f_j is at least
    token j's rollout, which is one feasible flow. Where tokens leave, survivors are the nodes they were before, a fused
    token reaches its members by their shares, and a removed token or masked slot has no node above the block it left
    at.

    **Degenerate**: f_j <= min(1, c_j) with c_j the column sum of the first used M, and from some six layers on nearly
    every patch sits at that bound (97 % over four images in the digits ViT, 65 tokens and six layers). The map then
    says nothing about the layers above the first and ties all patches with c_j >= 1. The share of patches at the bound
    is logged under "prunex" once a call, as a warning when it is all of them; use rollout then. No class is known to
    it.

    Exact shortcut: a flow that meets the bound through the strongest edges of each token alone is the maximum flow, and
    only the other sinks are solved on all edges. It is tried where that is a small part, from some 100 tokens on.

    Args:
        start_layer: First block included.
        scale: Integer steps that a capacity of 1 is cut into, 1,000 to 1,000,000,000.
        max_tokens: Most input tokens, prefix included, before the method refuses for its cost of O(L n^3) an image.

    Returns:
        ``maps`` >= 0: the flows divided by their sum over all input tokens, as the authors' code does, so that they
        compare with rollout's; ``raw`` [B, prefix + P] in 0..1 up to rounding: the flows themselves, which compare
        between images. An image whose attention is not finite gets NaN.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    >>> prunex.explain("attention_flow", model, torch.randn(2, 3, 64, 64)).maps.shape
    torch.Size([2, 4, 4])
    """
    check_whole("scale", scale, 1_000, 1_000_000_000)
    check_whole("max_tokens", max_tokens, 1)
    start = check_layer(start_layer, len(model.blocks))
    _check_cost(own_anatomy(model), images, start, max_tokens)
    tape = Tape(attention=True, reduce=over_heads, shares=True)
    with recording(model, images, target, tape) as recorded:
        prefix, readout = recorded.anatomy.prefix, recorded.readout()
        tokens = prefix + recorded.trace.grid[0] * recorded.trace.grid[1]
        # Image by image: a network of its own each, for a solver that knows no batches.
        flows, at_bound = np.full((len(images), tokens), np.nan), []
        for i, read_by_head in enumerate(readout.double().cpu().numpy()):
            network = build(tape.steps, i, read_by_head, prefix, tokens, start, scale)
            if network is not None:
                carried = network.flows()
                flows[i] = carried / scale
                at_bound.append((carried == network.bounds())[prefix:])
        _report(at_bound)
        raw = readout.new_tensor(flows)
        return answer(recorded, raw / raw.sum(1, keepdim=True).clamp(min=1 / scale), raw)


@dataclass
class Network:
    """One image's layered graph, with the edges into the input tokens apart, since each sink uses its own alone.

    Nodes are numbered upwards from the input tokens; the source comes last.
    """

    # int64 [4, m]: tail (upper), head (lower), capacity, and 1 where the edge is one of either's strongest
    edges: Integers
    source: int  # node of the source
    entries: Integers  # int64 [source + 1, tokens], capacities of the edges from every node into each input token

    def bounds(self) -> Integers:
        """What no flow exceeds, [tokens]: the cut around the sink and the one around the source."""
        tail, head, capacity, _ = self.edges
        leaving = self.entries.sum(1) + np.bincount(tail, capacity, self.source + 1).astype(np.int64)
        first = tail == self.source
        fed = np.minimum(capacity[first], leaving[head[first]]).sum()
        return np.minimum(self.entries.sum(0), fed)

    def flows(self) -> Integers:
        """The maximum flow into each input token, [tokens]."""
        bounds = self.bounds()
        flows = np.zeros_like(bounds)
        left = np.flatnonzero(bounds)
        strong = self.edges[3] > 0
        # A flow that meets its bound through part of the edges is the maximum.
        if WORTH * strong.sum() < len(strong):
            flows[left] = self._solve(strong, left)
            left = left[flows[left] < bounds[left]]
        flows[left] = self._solve(np.ones_like(strong), left)
        return flows

    def _solve(self, chosen: NDArray[np.bool_], sinks: Integers) -> Integers:
        """Flows into some input tokens through some of the edges, [len(sinks)]; one matrix serves all of them."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow

        tail, head, capacity, _ = self.edges[:, chosen]
        sink, last = self.source + 1, np.flatnonzero(self.entries.any(1))
        # The only whole numbers that scipy's solver takes; ``scale`` is bounded by them.
        values = np.concatenate([capacity, np.ones_like(last)]).astype(np.int32)
        ends = np.concatenate([tail, last]), np.concatenate([head, np.full_like(last, sink)])
        graph = csr_array((values, ends), shape=(sink + 1, sink + 1))
        into = graph.indices == sink  # in the order of the rows, as ``last`` is
        flows = np.zeros(len(sinks), dtype=np.int64)
        for i, token in enumerate(sinks):
            graph.data[into] = self.entries[last, token]
            flows[i] = maximum_flow(graph, self.source, sink, method="dinic").flow_value
        return flows


def build(
    steps: Sequence[Attended | Fed | Stage],
    image: int,
    readout: NDArray[np.float64],
    prefix: int,
    tokens: int,
    start: int,
    scale: int,
) -> Network | None:
    """One image's network, from the input tokens up, of a tape with head-mean attention; None where that is not finite.

    ``readout`` [n_last] are the source's capacities. Blocks before ``start`` pass everything through, and stages there
    still count.
    """
    nodes, count = np.arange(tokens), tokens  # the node of each token that is there, -1 for a slot that holds none
    top = max((s.block for s in steps if isinstance(s, Attended)), default=start)
    parts = []
    for step in steps:
        # Upwards: every block adds a layer of nodes above the present ones.
        if isinstance(step, Stage):
            nodes, count, edges = _reduced(step, image, nodes, count, prefix, scale)
        elif isinstance(step, Attended) and step.block >= start:
            attention = torch.as_tensor(step.attention)[image].double().cpu().numpy()
            if not np.isfinite(attention).all():
                return None
            # The class token must fill all of its edges for a flow of 1, so the top block is never thinned.
            nodes, count, edges = _mixed(attention, nodes, count, scale, None if step.block == top else STRONGEST)
        else:
            continue
        parts.append(edges)
    capacity = np.rint(readout * scale).astype(np.int64)
    fed = np.flatnonzero((nodes >= 0) & (capacity > 0))
    parts.append(np.stack([np.full_like(fed, count), nodes[fed], capacity[fed], np.ones_like(fed)]))
    return _split(parts, count, tokens)


def _mixed(
    attention: NDArray[np.float64], nodes: Integers, count: int, scale: int, strongest: int | None
) -> tuple[Integers, int, Integers]:
    """A layer of new nodes above the present tokens, and the edges of one block."""
    present = np.flatnonzero(nodes >= 0)
    stay = 0.5 if attention.any() else 1  # without heads, a block mixes nothing
    mixing = 0.5 * attention[np.ix_(present, present)] + stay * np.eye(len(present))
    capacity = np.rint(mixing * scale).astype(np.int64)
    strong = np.ones_like(capacity)
    if strongest is not None and strongest < len(present):
        # The strongest edges out of and into each token make the small network.
        strong[:] = 0
        order = np.argpartition(-capacity, strongest, axis=1)[:, :strongest]
        np.put_along_axis(strong, order, 1, axis=1)
        order = np.argpartition(-capacity, strongest, axis=0)[:strongest]
        np.put_along_axis(strong, order, 1, axis=0)
    above = np.full_like(nodes, -1)
    above[present] = np.arange(count, count + len(present))
    i, j = capacity.nonzero()
    edges = np.stack([above[present[i]], nodes[present[j]], capacity[i, j], strong[i, j]])
    return above, count + len(present), edges


def _reduced(
    stage: Stage, image: int, nodes: Integers, count: int, prefix: int, scale: int
) -> tuple[Integers, int, Integers]:
    """The tokens after a stage: survivors keep their nodes, fused ones get new nodes above their members.

    No flow exceeds 1, so an edge that lets all of it through is the same as being one node.
    """
    group, before = stage.group[image].cpu().numpy(), nodes[prefix:]
    share = np.rint(stage.weight[image].double().cpu().numpy() * scale).astype(np.int64)
    if group.ndim == 2:  # a token may be part of several
        before, group, share = before.repeat(group.shape[1]), group.ravel(), share.ravel()
    above = np.concatenate([nodes[:prefix], np.full(stage.n_out, -1)])
    held = (group >= 0) & (before >= 0) & (share > 0)
    whole, part = held & (share >= scale), held & (share < scale)
    above[prefix + group[whole]] = before[whole]
    # Several members of one group share the new node above them.
    made = np.unique(prefix + group[part])
    made = made[above[made] < 0]
    above[made] = np.arange(count, count + len(made))
    edges = np.stack([above[prefix + group[part]], before[part], share[part], np.ones_like(share[part])])
    return above, count + len(made), edges


def _split(parts: list[Integers], source: int, tokens: int) -> Network:
    """Drop the edges nothing can flow through, and set those into input tokens apart."""
    # From the source down: an edge whose upper end it never reaches carries nothing.
    reached = np.zeros(source + 1, dtype=bool)
    reached[source] = True
    for i in reversed(range(len(parts))):
        parts[i] = parts[i][:, reached[parts[i][0]]]
        reached[parts[i][1]] = True
    edges = np.concatenate(parts, 1)
    lowest = edges[1] < tokens
    entries = np.zeros((source + 1, tokens), dtype=np.int64)
    entries[edges[0, lowest], edges[1, lowest]] = edges[2, lowest]
    return Network(edges[:, ~lowest], source, entries)


def _report(at_bound: list[NDArray[np.bool_]]) -> None:
    """Say once a call how many patches are at their bound."""
    every = np.concatenate(at_bound) if at_bound else np.zeros(0, dtype=bool)
    if not every.size:
        return
    if every.all():
        log.warning(
            "attention_flow: 100 % of the patches are at the bound min(1, c_j), so the maps hold nothing but the "
            "first used block's column sums: use rollout instead"
        )
    else:
        log.info("attention_flow: %.1f %% of the patches are at the bound min(1, c_j)", 100 * every.mean())


def _check_cost(anatomy: Anatomy, images: Tensor, start: int, most: int) -> None:
    """Refuse more tokens than asked for, with what they would cost."""
    (height, width), (h, w) = images.shape[2:], anatomy.patch
    tokens = anatomy.prefix + -(-height // h) * -(-width // w)
    if tokens <= most:
        return
    # Measured on one core: half a millisecond a sink and about 70 ns an edge, of the small network or of all.
    edges = (anatomy.depth - start) * tokens
    quick, slow = (tokens * (5e-4 + 7e-8 * edges * into) for into in (min(STRONGEST, tokens), tokens))
    raise PrunexError(
        f"{tokens} tokens are more than max_tokens={most}: attention_flow solves one maximum flow a token, about "
        f"{quick:.2g} to {slow:.2g} seconds an image here; allow it with max_tokens={tokens}, or use rollout"
    )
