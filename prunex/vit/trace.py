"""TokenTrace: which input patches each surviving token stands for, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunex.errors import PrunexError


@dataclass
class Stage:
    """One reduction: a sparse, row-stochastic map from the patch tokens before it to the patch tokens after it.

    Each token before goes to at most one token after, so the map is two numbers a token instead of a matrix. Prefix
    tokens are not part of it: they always continue as themselves.

    Attributes:
        block: Index of the block in (or before) which the reduction happened.
        group: int64 [B, n_in], the position after the stage of each token before it; -1 where it was removed.
        weight: float [B, n_in], its share of that token; the shares of one group sum to 1.
        n_out: Number of patch tokens after the stage (in masked mode the slots stay, so it may equal ``n_in``).
        fused: Whether the last token after the stage is an extra one, made of several others.
        score: float [B, n_in] or None, what the pruner ranked by (larger is kept).
        counted: Patch tokens that the stage leaves for later blocks, also when masked slots are carried along;
            float [B] where images may differ (masked training, adaptive counts), else int.
    """

    block: int
    group: Tensor
    weight: Tensor
    n_out: int
    fused: bool = False
    score: Tensor | None = None
    counted: Tensor | int = 0

    def lift(self, row: Tensor, prefix: int) -> Tensor:
        """Carry row vectors over tokens one stage towards the input: ``row @ S``.

        Args:
            row: float [B, prefix + n_out], or several rows an image [B, R, prefix + n_out].
            prefix: Number of prefix tokens in front.

        Returns:
            float [..., prefix + n_in]; sums are unchanged, since every group's shares sum to 1.
        """
        group, weight = self.group, self.weight
        if row.ndim == 3:
            group, weight = (t.unsqueeze(1).expand(-1, row.shape[1], -1) for t in (group, weight))
        share = row[..., prefix:].gather(-1, group.clamp(min=0)) * weight
        return torch.cat([row[..., :prefix], share.masked_fill(group < 0, 0)], -1)

    def paint(self, row: Tensor, prefix: int) -> Tensor:
        """Carry values of tokens one stage towards the input undivided: each member of a group gets the group's.

        Args:
            row: float [B, prefix + n_out], or several rows an image [B, R, prefix + n_out].
            prefix: Number of prefix tokens in front.

        Returns:
            float [..., prefix + n_in]; 0 for tokens that were removed.
        """
        group = self.group if row.ndim == 2 else self.group.unsqueeze(1).expand(-1, row.shape[1], -1)
        body = row[..., prefix:].gather(-1, group.clamp(min=0)).masked_fill(group < 0, 0)
        return torch.cat([row[..., :prefix], body], -1)

    def push(self, values: Tensor, prefix: int) -> Tensor:
        """Carry one value a token through the stage: ``S @ values``, each group its members' weighted mean.

        Args:
            values: float [B, prefix + n_in].
            prefix: Number of prefix tokens in front.

        Returns:
            float [B, prefix + n_out]; 1 in slots that nobody is left in.
        """
        group = self.group.clamp(min=0)
        weight = self.weight.masked_fill(self.group < 0, 0).to(values.dtype)
        body = values.new_zeros(len(values), self.n_out)
        total = body.scatter_add(1, group, weight)
        body = body.scatter_add(1, group, weight * values[:, prefix:])
        return torch.cat([values[:, :prefix], torch.where(total > 0, body, 1)], 1)


@dataclass
class TokenTrace:
    """What one forward did to the patch tokens of a batch, in the coordinates of the original patch grid.

    Kept-token maps, explanations of pruned models, pictures, metrics and export read only this.

    Attributes:
        grid: Patch grid (gh, gw) of the images.
        prefix: Number of prefix tokens (class, distillation, register).
        batch: Number of images.
        device: Where the images were.
        stages: The reductions, in order.
    """

    grid: tuple[int, int]
    prefix: int
    batch: int
    device: torch.device
    stages: list[Stage] = field(default_factory=list)

    def _compose(self, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position [B, P] after ``stage`` (-1 removed), share [B, P] of it, and whether a patch is still itself."""
        count = len(self.stages)
        if count and not -count <= stage < count:
            raise PrunexError(
                f"stage={stage} does not exist: this trace has stages 0..{count - 1} (or -1 for the last)"
            )
        patches = self.grid[0] * self.grid[1]
        where = torch.arange(patches, device=self.device).expand(self.batch, -1)
        share = torch.ones(self.batch, patches, device=self.device)
        alive = torch.ones(self.batch, patches, dtype=torch.bool, device=self.device)
        for s in self.stages[: stage % count + 1] if count else []:
            gone = where < 0
            at = where.clamp(min=0)
            share = share * s.weight.gather(1, at).masked_fill(gone, 0)
            where = s.group.gather(1, at).masked_fill(gone, -1)
            alive = alive & (where >= 0)
            if s.fused:
                alive = alive & (where != s.n_out - 1)
            share = share.masked_fill(where < 0, 0)
        return where, share, alive

    def kept(self, stage: int = -1) -> Tensor:
        """Which patches continue as tokens of their own after a stage.

        Args:
            stage: Which one; -1 is the last. Without any stage everything is kept.

        Returns:
            bool [B, gh, gw], raster order of the original grid. A patch inside a fused token is not kept.

        Raises:
            PrunexError: For a stage that does not exist.
        """
        return self._compose(stage)[2].unflatten(1, self.grid)

    def tokens(self, stage: int = -1) -> Tensor:
        """Which token each patch continues as after a stage.

        Args:
            stage: Which one; -1 is the last.

        Returns:
            int64 [B, P], positions among the patch tokens; -1 for a patch that was removed or fused.
        """
        where, _, alive = self._compose(stage)
        return where.masked_fill(~alive, -1)

    def share(self, stage: int = -1) -> Tensor:
        """Which part each patch has in the token that stands for it after a stage.

        Args:
            stage: Which one; -1 is the last.

        Returns:
            float [B, gh, gw] in 0..1: 1 for a kept patch, its weight inside a fused or merged token, 0 if removed.
        """
        return self._compose(stage)[1].unflatten(1, self.grid)

    def depth(self) -> Tensor:
        """Number of stages each patch survived as a token of its own: int64 [B, gh, gw] in 0..len(stages)."""
        maps = [self.kept(i) for i in range(len(self.stages))]
        if not maps:
            return torch.zeros(self.batch, *self.grid, dtype=torch.long, device=self.device)
        return torch.stack(maps).sum(0)

    def keep_ratios(self) -> list[Tensor]:
        """Realised share of the original patches that are kept after each stage: a list of float [B]."""
        return [self.kept(i).flatten(1).float().mean(1) for i in range(len(self.stages))]

    def detach(self) -> TokenTrace:
        """The same trace without a link to the autograd graph."""
        stages = [
            Stage(
                s.block,
                s.group,
                s.weight.detach(),
                s.n_out,
                s.fused,
                None if s.score is None else s.score.detach(),
                s.counted.detach() if isinstance(s.counted, Tensor) else s.counted,
            )
            for s in self.stages
        ]
        return TokenTrace(self.grid, self.prefix, self.batch, self.device, stages)
