"""Generic Attention as pure rules on lists of attention maps and their gradients (arXiv 2103.15679).

A stream is what attends to itself: text ``t``, image ``i``, object queries ``q``, or text and image together ``s``. A
role names the streams of a map, queries before keys: ``"tt"`` is text attending to itself, ``"ti"`` text attending to
the image. Relevance R_xy tells what each token of x owes to each of y; R_xx starts as the identity, the others at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.errors import PrunexError


@dataclass(frozen=True, eq=False, repr=False)
class Attended(Brief):
    """One attention map of one forward, and its gradient for one target.

    Attributes:
        role: Two letters, the stream that asks and the stream that is asked.
        attention: [B, H, queries, keys], after the softmax.
        gradient: The same shape: of the score that is explained; None where only the map is needed.
        path: The attention module's, for messages.
    """

    role: str
    attention: Tensor
    gradient: Tensor | None = None
    path: str = ""


@dataclass(frozen=True)
class Rules:
    """How maps are put together; the defaults are the paper's, made safe.

    Attributes:
        literal: Divide by a row's sum also where it is 0, as the authors' code does; what is not finite is then left
            out as a whole (a decoder layer may drop out), which is told. Without it such a row stays 0.
        normalise: Eqs. 8-9; without: the self relevance as it is.
        self_terms: Eq. 10's self relevance on both sides of a cross map; without: the cross map alone.
        accumulate: Add each layer to what was there; without: each layer in the place of what was there. The authors
            run this one without normalising.
    """

    literal: bool = False
    normalise: bool = True
    self_terms: bool = True
    accumulate: bool = True


@dataclass(eq=False, repr=False)
class Relevance(Brief):
    """Relevance between streams while it is put together.

    R_xx is kept without its identity: subtracting that again, as normalising asks, would lose the digits of small rows.

    Attributes:
        extra: By role, [B, x, y]: R_xy, and R_xx - I as long as its identity is there.
        identity: By stream, 1.0, or 0.0 once a layer has taken the place of what was there.
        dropped: For each cross map, [B]: whether its addition was not finite and was left out.
    """

    extra: dict[str, Tensor]
    identity: dict[str, float]
    dropped: list[Tensor] = field(default_factory=list)

    def times(self, mix: Tensor, role: str) -> Tensor:
        """Mix @ R of a role, [B, ., y]."""
        # R_xx is held less its identity, whose part in the product is the mix itself.
        product = mix @ self.extra[role]
        return product + self.identity[role[0]] * mix if role[0] == role[1] else product

    def matrices(self) -> dict[str, Tensor]:
        """R by its name, such as ``"R_tt"``; identities included."""
        named = {}
        for role, extra in self.extra.items():
            if role[0] == role[1] and self.identity[role[0]]:
                extra = extra + torch.eye(extra.shape[-1], dtype=extra.dtype, device=extra.device)
            named[f"R_{role}"] = extra
        return named


def gradient_of(map_: Attended) -> Tensor:
    """The gradient of the score in a map; an error where no score was led back to it."""
    if map_.gradient is None:
        raise PrunexError(
            f"the {map_.role} map {map_.path} has no gradient of the score: run backward from the score first"
        )
    return map_.gradient


def over_heads(map_: Attended) -> Tensor:
    """Mean over heads of max(0, attention * gradient), eq. 5: [B, queries, keys]."""
    return (map_.attention * gradient_of(map_)).clamp(min=0).mean(1)


def normalised(relevance: Relevance, stream: str, rules: Rules) -> Tensor:
    """(R - I) / its rows' sums + I of a stream's self relevance, eqs. 8-9: [B, n, n]; R itself without normalising."""
    extra = relevance.extra[2 * stream]
    eye = torch.eye(extra.shape[-1], dtype=extra.dtype, device=extra.device)
    if not rules.normalise:
        return extra + relevance.identity[stream] * eye
    # Where a layer took the place of what was there, R is kept, and not R - I.
    if not relevance.identity[stream]:
        extra = extra - eye
    sums = extra.sum(-1, keepdim=True)
    if not rules.literal:
        sums = torch.where(sums == 0, torch.ones_like(sums), sums)
    return extra / sums + eye


def propagate(groups: Sequence[Sequence[Attended]], crossed: Sequence[str], rules: Rules) -> Relevance:
    """Relevance from the first layer to the last, eqs. 5-11.

    Args:
        groups: Attention maps in the order of their layers; those of one group happen at once, from what was there
            before the group.
        crossed: Roles of cross relevance that are followed, such as ``("ti", "it")``.
        rules: Which variant.

    Returns:
        The relevance of every stream to itself, and of the crossed roles.
    """
    # Streams that never meet may differ in their number of samples: texts that many images are compared with.
    streams: dict[str, Tensor] = {}
    for group in groups:
        for map_ in group:
            streams |= _tokens(map_)
    extra = {2 * stream: tokens.new_zeros(*tokens.shape, tokens.shape[1]) for stream, tokens in streams.items()}
    for role in crossed:
        asks, asked = (streams[stream] for stream in role)
        extra[role] = asks.new_zeros(*asks.shape, asked.shape[1])
    relevance = Relevance(extra, dict.fromkeys(streams, 1.0))
    for group in groups:
        added = [_added(map_, relevance, rules) for map_ in group]
        for additions in added:
            for role, addition in additions.items():
                extra[role] = extra[role] + addition if rules.accumulate else addition
                if not rules.accumulate and role[0] == role[1]:
                    relevance.identity[role[0]] = 0.0
    return relevance


def _tokens(map_: Attended) -> dict[str, Tensor]:
    """For each stream of a map a tensor with its samples and tokens, [B, n]."""
    asks, asked = map_.role[0], map_.role[1]
    return {asked: map_.attention[:, 0, 0, :], asks: map_.attention[:, 0, :, 0]}


def _added(map_: Attended, relevance: Relevance, rules: Rules) -> dict[str, Tensor]:
    """What one map adds, by role."""
    mix, asks, asked = over_heads(map_), map_.role[0], map_.role[1]
    if asks == asked:
        # Eqs. 6-7: whatever the stream knows of any stream is mixed.
        return {role: relevance.times(mix, role) for role in relevance.extra if role[0] == asks}
    cross = mix
    if rules.self_terms:
        left = normalised(relevance, asks, rules)
        cross = left.transpose(-2, -1) @ mix @ normalised(relevance, asked, rules)
    if rules.literal:
        lost = ~cross.isfinite().all(-1).all(-1)
        relevance.dropped.append(lost)
        cross = torch.where(lost[:, None, None], torch.zeros_like(cross), cross)
    additions = {map_.role: cross}
    if asked + asks in relevance.extra:  # eq. 11, where the other stream asks as well
        additions[2 * asks] = mix @ relevance.extra[asked + asks]
    return additions


def row_of(matrix: Tensor, read: Tensor) -> Tensor:
    """The rows [B, n] of the tokens int64 [B] that are read, without what these owe to themselves."""
    every, read = torch.arange(len(matrix), device=matrix.device), read.to(matrix.device)
    row = matrix[every, read].clone()
    row[every, read] = 0
    return row


def rollout(maps: Sequence[Attended], normalise: bool = True) -> Tensor | None:
    """Product of (head mean + I) over the layers of one stream, later ones on the left (arXiv 2005.00928): [B, n, n].

    With ``normalise`` each factor's rows sum to 1. None for no maps.
    """
    product: Tensor | None = None
    for map_ in maps:
        mean = map_.attention.mean(1)
        factor = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        factor = factor / factor.sum(-1, keepdim=True) if normalise else factor
        product = factor if product is None else factor @ product
    return product


def between(left: Tensor | None, mix: Tensor, right: Tensor | None) -> Tensor:
    """Rolled-out streams on both sides of a cross map, left^T mix right: [B, queries, keys]; None is the identity."""
    mix = mix if left is None else left.transpose(-2, -1) @ mix
    return mix if right is None else mix @ right


def grad_cam(map_: Attended) -> Tensor:
    """max(0, mean over heads of attention * its head's mean gradient) (arXiv 1610.02391): [B, queries, keys]."""
    weights = gradient_of(map_).mean((-2, -1), keepdim=True)
    return (map_.attention * weights).mean(1).clamp(min=0)


def last(maps: Sequence[Attended], role: str) -> Attended:
    """The last map of a role."""
    return next(map_ for map_ in reversed(maps) if map_.role == role)


def by_role(maps: Sequence[Attended]) -> Mapping[str, list[Attended]]:
    """The maps of each role, in order."""
    sorted_: dict[str, list[Attended]] = {}
    for map_ in maps:
        sorted_.setdefault(map_.role, []).append(map_)
    return sorted_
