"""One reduction of the patch tokens: which token after it each token before it is part of, and with which share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunex.brief import Brief, brief
from prunex.errors import PrunexError
from prunex.vit.sums import grouped


@dataclass(eq=False, repr=False)
class Stage(Brief):
    """One reduction: a sparse, row-stochastic map from the patch tokens before it to the patch tokens after it.

    Each token before goes to at most one token after, so the map is two numbers a token instead of a matrix; where
    windows overlap, to at most m tokens, and it is 2 m numbers. Prefix tokens are not part of it: they always continue
    as themselves.

    Attributes:
        block: Index of the block in (before, or after) which the reduction happened.
        group: int64 [B, n_in], the position after the stage of each token before it; -1 where it was removed. Or
            [B, n_in, m], all of its positions; -1 where it has fewer than m.
        weight: float [B, n_in] or [B, n_in, m], its share of that token; the shares of one group sum to 1.
        n_out: Number of patch tokens after the stage (in masked mode the slots stay, so it may equal ``n_in``).
        fused: Whether the last token after the stage is an extra one, made of several others.
        score: float [B, n_in] or None, what the pruner ranked by (larger is kept).
        counted: Patch tokens that the stage leaves for later blocks, also when masked slots are carried along;
            float [B] where images may differ (masked training, adaptive counts), else int.
        merged: Whether tokens became one as equals, so that each stays part of a token that stands for it.
        stays: Whether tokens that leave or go elsewhere are still in their slots, hidden (training under a policy).
    """

    block: int
    group: Tensor
    weight: Tensor
    n_out: int
    fused: bool = False
    score: Tensor | None = None
    counted: Tensor | int = 0
    merged: bool = False
    stays: bool = False

    def __post_init__(self) -> None:
        """Refuse maps of another form; what numbers they hold is :meth:`TokenTrace.check`'s, which reads them all."""
        group, weight = self.group, self.weight
        if not isinstance(group, Tensor) or group.dtype != torch.int64 or group.ndim not in (2, 3):
            raise PrunexError(f"group={brief(group)} is not allowed: give int64 [B, n_in] or [B, n_in, m]")
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != group.shape:
            raise PrunexError(f"weight={brief(weight)} is not allowed: give floats {list(group.shape)}, as group")
        if self.score is not None and not isinstance(self.score, Tensor):
            raise PrunexError(f"score={brief(self.score)} is not allowed: give a tensor or None")

    @property
    def pooled(self) -> bool:
        """Whether its tokens are overlapping windows."""
        return self.group.ndim == 3

    def lift(self, row: Tensor, prefix: int) -> Tensor:
        """Carry row vectors over tokens one stage towards the input, ``row @ S``; sums are unchanged.

        From [B, prefix + n_out], or several rows an image [B, R, prefix + n_out], to [..., prefix + n_in].
        """
        parts = self._parts(row[..., prefix:], self.weight)
        return torch.cat([row[..., :prefix], parts.sum(-1)], -1)

    def paint(self, row: Tensor, prefix: int) -> Tensor:
        """As :meth:`lift`, undivided: each member of a group gets the group's value, and removed tokens 0.

        A member of several groups gets their mean, weighted by its shares of them.
        """
        # A share of nearly 0 in the only group would lose digits on the way out and back.
        weight = self.weight if self.pooled else torch.ones_like(self.weight)
        body = row[..., prefix:]
        total = self._parts(torch.ones_like(body), weight).sum(-1)
        painted = self._parts(body, weight).sum(-1) / total.clamp(min=torch.finfo(row.dtype).tiny)
        return torch.cat([row[..., :prefix], painted], -1)

    def push(self, values: Tensor, prefix: int) -> Tensor:
        """Carry one value a token through the stage: ``S @ values``, each group its members' weighted mean.

        From [B, prefix + n_in] to [B, prefix + n_out]; 1 in slots that nobody is left in.
        """
        weight = self.weight.to(values.dtype)
        moved = values[:, prefix:].view(*values[:, prefix:].shape, *[1] * (weight.ndim - 2))
        body = torch.where(self._sums(weight) > 0, self._sums(weight * moved), 1)
        return torch.cat([values[:, :prefix], body], 1)

    def total(self, values: Tensor, prefix: int) -> Tensor:
        """As :meth:`push`, each group the plain sum of its members; tokens that stay in their slots keep theirs."""
        moved = values[:, prefix:]
        body = torch.where(self._sums(torch.ones_like(moved)) > 0, self._sums(moved), moved if self.stays else 1)
        return torch.cat([values[:, :prefix], body], 1)

    def back(self, values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Give each token before the stage the vector of the token it went into; of several ones, their mean.

        From [B, n_out, D], and bool [B, n_out]: which of them stand for something, to [B, n_in, D], 0 for tokens that
        were removed, and bool [B, n_in]: which were not.
        """
        group, _ = parts_of(self)
        b, n, m = group.shape
        if self.n_out == 0:  # nothing to gather from
            return values.new_zeros(b, n, values.shape[2]), present.new_zeros(b, n)
        at = group.clamp(min=0).flatten(1)
        parts = values.gather(1, at.unsqueeze(-1).expand(-1, -1, values.shape[2])).view(b, n, m, -1)
        used = (group >= 0) & present.gather(1, at).view(b, n, m)
        if self.pooled:  # a window counts a token that is not there with no weight
            used = used & (self.weight > 0)
        parts = parts.masked_fill(~used.unsqueeze(-1), 0)
        total = parts.squeeze(2) if m == 1 else parts.sum(2) / used.sum(2, keepdim=True).clamp(min=1)
        return total, used.any(2)

    def _parts(self, body: Tensor, weight: Tensor) -> Tensor:
        """What each token gets from each of its groups, [B, n_in, m] from [B, n_out], or with R rows an image."""
        # A gather for each token, not a product with the [n_in, n_out] matrix, nearly all of which is 0.
        group, weight = (t.reshape(*t.shape[:2], -1) for t in (self.group, weight))
        if body.ndim == 3:
            group, weight = (t.unsqueeze(1).expand(-1, body.shape[1], -1, -1) for t in (group, weight))
        if body.shape[-1] == 0:  # a class token may go on alone
            return body.new_zeros(group.shape)
        parts = body.gather(-1, group.clamp(min=0).flatten(-2)).view(group.shape) * weight
        return parts.masked_fill(group < 0, 0)

    def _sums(self, values: Tensor) -> Tensor:
        """Sums over each group's members, [B, n_out]; values are shaped as ``group``."""
        return grouped(values.flatten(1), self.group.flatten(1), self.n_out)


def parts_of(stage: Stage) -> tuple[Tensor, Tensor]:
    """A stage's groups and weights as [B, n_in, m], m = 1 where each token goes to one at most."""
    if stage.pooled:
        return stage.group, stage.weight
    return stage.group.unsqueeze(2), stage.weight.unsqueeze(2)
