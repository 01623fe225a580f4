"""TokenTrace: which input patches each surviving token stands for, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunex.brief import Brief, brief
from prunex.errors import PrunexError


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
    """

    block: int
    group: Tensor
    weight: Tensor
    n_out: int
    fused: bool = False
    score: Tensor | None = None
    counted: Tensor | int = 0
    merged: bool = False

    def __post_init__(self) -> None:
        """Refuse maps of another form; what numbers they hold is :meth:`TokenTrace.check`'s, which reads them all.

        Raises:
            PrunexError: By name.
        """
        group, weight = self.group, self.weight
        if not isinstance(group, Tensor) or group.dtype != torch.int64 or group.ndim not in (2, 3):
            raise PrunexError(f"group={brief(group)} is not allowed: give int64 [B, n_in] or [B, n_in, m]")
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != group.shape:
            raise PrunexError(f"weight={brief(weight)} is not allowed: give floats {list(group.shape)}, as group")
        if self.score is not None and not isinstance(self.score, Tensor):
            raise PrunexError(f"score={brief(self.score)} is not allowed: give a tensor or None")

    def lift(self, row: Tensor, prefix: int) -> Tensor:
        """Carry row vectors over tokens one stage towards the input: ``row @ S``.

        Args:
            row: float [B, prefix + n_out], or several rows an image [B, R, prefix + n_out].
            prefix: Number of prefix tokens in front.

        Returns:
            float [..., prefix + n_in]; sums are unchanged, since every group's shares sum to 1.
        """
        group, weight = self.group, self.weight
        if group.ndim == 3:
            return torch.cat([row[..., :prefix], self._parts(row[..., prefix:]).sum(-1)], -1)
        if row.ndim == 3:
            group, weight = (t.unsqueeze(1).expand(-1, row.shape[1], -1) for t in (group, weight))
        share = _take(row[..., prefix:], group) * weight
        return torch.cat([row[..., :prefix], share.masked_fill(group < 0, 0)], -1)

    def paint(self, row: Tensor, prefix: int) -> Tensor:
        """Carry values of tokens one stage towards the input undivided: each member of a group gets the group's.

        A member of several groups gets their mean, weighted by its shares of them.

        Args:
            row: float [B, prefix + n_out], or several rows an image [B, R, prefix + n_out].
            prefix: Number of prefix tokens in front.

        Returns:
            float [..., prefix + n_in]; 0 for tokens that were removed.
        """
        if self.group.ndim == 3:
            total = self._parts(torch.ones_like(row[..., prefix:])).sum(-1)
            body = self._parts(row[..., prefix:]).sum(-1) / total.clamp(min=torch.finfo(row.dtype).tiny)
            return torch.cat([row[..., :prefix], body], -1)
        group = self.group if row.ndim == 2 else self.group.unsqueeze(1).expand(-1, row.shape[1], -1)
        body = _take(row[..., prefix:], group).masked_fill(group < 0, 0)
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
        moved = values[:, prefix:]
        if group.ndim == 3:
            moved = moved.unsqueeze(-1).expand_as(weight).flatten(1)
            group, weight = group.flatten(1), weight.flatten(1)
        if self.n_out == 0:
            return values[:, :prefix]
        body = values.new_zeros(len(values), self.n_out)
        total = body.scatter_add(1, group, weight)
        body = body.scatter_add(1, group, weight * moved)
        return torch.cat([values[:, :prefix], torch.where(total > 0, body, 1)], 1)

    def back(self, values: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Give each token before the stage the vector of the token it went into; of several ones, their mean.

        Args:
            values: float [B, n_out, D].
            there: bool [B, n_out], which of them stand for something.

        Returns:
            float [B, n_in, D] of the same dtype (0 for tokens that were removed), and bool [B, n_in]: which were not.
        """
        group = self.group if self.group.ndim == 3 else self.group.unsqueeze(-1)
        b, n, m = group.shape
        if self.n_out == 0:
            return values.new_zeros(b, n, values.shape[2]), there.new_zeros(b, n)
        at = group.clamp(min=0).flatten(1)
        found = values.gather(1, at.unsqueeze(-1).expand(-1, -1, values.shape[2])).view(b, n, m, -1)
        used = (group >= 0) & there.gather(1, at).view(b, n, m)
        if self.group.ndim == 3:  # a pooled window counts a token that is not there with no weight
            used = used & (self.weight > 0)
        found = found.masked_fill(~used.unsqueeze(-1), 0)
        total = found.squeeze(2) if m == 1 else found.sum(2) / used.sum(2, keepdim=True).clamp(min=1)
        return total, used.any(2)

    def total(self, values: Tensor, prefix: int) -> Tensor:
        """Carry one number a token through the stage as a sum over each group's members.

        Args:
            values: float [B, prefix + n_in].
            prefix: Number of prefix tokens in front.

        Returns:
            float [B, prefix + n_out]; 1 in slots that nobody is left in.
        """
        if self.n_out == 0:
            return values[:, :prefix]
        member = (self.group >= 0).to(values.dtype)
        group, body = self.group.clamp(min=0), values.new_zeros(values.shape[0], self.n_out)
        members = body.scatter_add(1, group, member)
        body = body.scatter_add(1, group, member * values[:, prefix:])
        return torch.cat([values[:, :prefix], torch.where(members > 0, body, 1)], 1)

    @property
    def gone(self) -> Tensor:
        """Bool [B, n_in], the tokens before the stage that are no part of any token after it."""
        if self.group.ndim == 2:
            return self.group < 0
        return (self.weight.masked_fill(self.group < 0, 0) <= 0).all(-1)

    def _parts(self, body: Tensor) -> Tensor:
        """What each token gets from each of its groups, [B, n_in, m] from [B, n_out], or with R rows an image."""
        group, weight = self.group, self.weight
        if body.ndim == 3:
            group, weight = (t.unsqueeze(1).expand(-1, body.shape[1], -1, -1) for t in (group, weight))
        found = _take(body, group.flatten(-2)).view_as(group)
        return (found * weight).masked_fill(group < 0, 0)


def _take(body: Tensor, group: Tensor) -> Tensor:
    """What each token gets from its group, zeros where no token was left: a class token may go on alone."""
    return body.gather(-1, group.clamp(min=0)) if body.shape[-1] else body.new_zeros(group.shape)


@dataclass(eq=False, repr=False)
class TokenTrace(Brief):
    """What one forward did to the patch tokens of a batch, in the coordinates of the original patch grid.

    Kept-token maps, explanations of pruned models, pictures, metrics and export read only this.

    Attributes:
        grid: Patch grid (gh, gw) of the images.
        prefix: Number of prefix tokens (class, distillation, register).
        batch: Number of images.
        device: Where the images were.
        stages: The reductions, in order.
        bare: Whether the last block computed prefix tokens alone, which is all that the head reads: no patch is chosen
            there, so it is no stage, but no patch token comes out either.
    """

    grid: tuple[int, int]
    prefix: int
    batch: int
    device: torch.device
    stages: list[Stage] = field(default_factory=list)
    bare: bool = False

    def _compose(self, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position [B, P] after ``stage`` (-1 removed), share [B, P] of it, and whether it is no fused token.

        After a pooling none is: the position is that of the token it has the largest part in.
        """
        if self._pooled_by(stage):
            share, where = self.composition(stage).max(-1)
            return where.masked_fill(share <= 0, -1), share, torch.zeros_like(share, dtype=torch.bool)
        count = len(self.stages)
        if count and (not isinstance(stage, int) or not -count <= stage < count):
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

    def check(self) -> TokenTrace:
        """Whether the stages follow one another and their maps are what :class:`Stage` says, number by number.

        A trace that a pruner left needs no check; one whose stages were made by hand or read from somewhere does.

        Returns:
            The trace.

        Raises:
            PrunexError: For the first stage that does not fit, by number.
        """
        tokens = self.grid[0] * self.grid[1]
        for number, s in enumerate(self.stages):
            shape, n_out = tuple(s.group.shape[:2]), s.n_out
            if tokens == 0:
                raise PrunexError(f"stage {number} comes after one that left no tokens: leave it out")
            if shape != (self.batch, tokens):
                raise PrunexError(f"stage {number} maps [B, n_in] = {list(shape)}: give {[self.batch, tokens]}")
            if isinstance(n_out, bool) or not isinstance(n_out, int) or n_out < (1 if s.fused else 0):
                raise PrunexError(f"stage {number}: n_out={n_out!r} is not allowed: give a number of tokens")
            low, high = (int(s.group.min()), int(s.group.max())) if s.group.numel() else (-1, -1)
            if low < -1 or high >= n_out:
                raise PrunexError(f"stage {number} has groups {low} to {high}: give -1 (removed) to {n_out - 1}")
            shares = s.weight.masked_fill(s.group < 0, 0)
            if not bool(torch.isfinite(shares).all()) or bool((shares < 0).any()):
                raise PrunexError(f"stage {number} has shares that are no numbers of at least 0")
            total = shares.new_zeros(self.batch, n_out)
            total = total.scatter_add(1, s.group.clamp(min=0).flatten(1), shares.flatten(1)) if n_out else total
            member = (s.group >= 0).flatten(1).to(shares.dtype)
            members = total * 0
            members = members.scatter_add(1, s.group.clamp(min=0).flatten(1), member) if n_out else members
            if bool(((total - 1).abs() > 1e-2)[members > 0].any()):
                raise PrunexError(f"stage {number} has shares of one group that do not sum to 1")
            tokens = n_out
        return self

    @property
    def pooled(self) -> bool:
        """Whether a stage made tokens of overlapping windows: no patch was chosen then, and none is kept as itself."""
        return any(s.group.ndim == 3 for s in self.stages)

    def _pooled_by(self, stage: int) -> bool:
        count = len(self.stages)
        known = isinstance(stage, int) and -count <= stage < count
        return known and any(s.group.ndim == 3 for s in self.stages[: stage % count + 1])

    def composition(self, stage: int = -1) -> Tensor:
        """Which part each patch has in each token after a stage, whole: float [B, P, n_out], columns summing to 1.

        Args:
            stage: Which one; -1 is the last.

        Raises:
            PrunexError: For a stage that does not exist, or a trace without any.
        """
        count = len(self.stages)
        if not -count <= stage < count:
            raise PrunexError(f"stage={stage} does not exist: this trace has {count} stages")
        patches = self.grid[0] * self.grid[1]
        whole = torch.eye(patches, device=self.device).expand(self.batch, -1, -1)
        for s in self.stages[: stage % count + 1]:
            group, weight = (t if t.ndim == 3 else t.unsqueeze(-1) for t in (s.group, s.weight))
            step = weight.new_zeros(*group.shape[:2], s.n_out)
            if s.n_out:
                step = step.scatter_add(2, group.clamp(min=0), weight.masked_fill(group < 0, 0))
            whole = whole.to(step.dtype) @ step
        return whole

    def kept(self, stage: int = -1) -> Tensor:
        """Which patches continue as tokens of their own after a stage.

        Args:
            stage: Which one; -1 is the last. Without any stage everything is kept.

        Returns:
            bool [B, gh, gw], raster order of the original grid. A patch inside a fused token is not kept, nor is one
            that was merged with another; after a pooling none is.

        Raises:
            PrunexError: For a stage that does not exist.
        """
        where, _, alive = self._compose(stage)
        if self.merges(stage):
            alive = alive & (self._members(where).gather(1, where.clamp(min=0)) == 1)
        return alive.unflatten(1, self.grid)

    def merges(self, stage: int = -1) -> bool:
        """Whether some stage merged tokens, up to a stage and with it; -1 is the last."""
        count = len(self.stages)
        return any(s.merged for s in self.stages[: stage % count + 1]) if count else False

    def _members(self, where: Tensor) -> Tensor:
        """Number of patches in each token, [B, tokens], from positions [B, P]."""
        # Every stage may have added the slot of a fused token.
        room = torch.zeros(self.batch, where.shape[1] + len(self.stages), dtype=torch.long, device=self.device)
        return room.scatter_add(1, where.clamp(min=0), (where >= 0).long())

    def left(self, stage: int = -1) -> Tensor:
        """Number of tokens that hold patches after a stage: int64 [B].

        Args:
            stage: Which one; -1 is the last.
        """
        return (self._members(self._compose(stage)[0]) > 0).sum(1)

    def groups(self, stage: int = -1) -> Tensor:
        """Which token each patch is part of after a stage: a segmentation, where tokens are merged.

        Args:
            stage: Which one; -1 is the last. Without any stage every patch is its own.

        Returns:
            int64 [B, gh, gw], positions among the patch tokens, equal for patches that share a token (merged or
            fused); -1 for a patch that was removed.

        Raises:
            PrunexError: For a stage that does not exist.
        """
        return self._compose(stage)[0].unflatten(1, self.grid)

    def tokens(self, stage: int = -1) -> Tensor:
        """Which token each patch continues as after a stage.

        Args:
            stage: Which one; -1 is the last.

        Returns:
            int64 [B, P], positions among the patch tokens, the same for patches that were merged; -1 for a patch that
            was removed or fused. After a pooling the token in which the patch has its largest part.
        """
        where, _, alive = self._compose(stage)
        if self._pooled_by(stage):
            return where
        return where.masked_fill(~alive, -1)

    def scores(self, stage: int = -1) -> tuple[Tensor, Tensor]:
        """What a stage ranked by, patch by patch, and which patches had a score there.

        Args:
            stage: One that ranks; -1 is the last.

        Returns:
            float [B, P], with its gradient, of any value where a patch had none; bool [B, P], false for patches that
            were gone before, or continued in a fused token.

        Raises:
            PrunexError: For a stage that does not exist, or ranked nothing.
        """
        count = len(self.stages)
        if not -count <= stage < count:
            raise PrunexError(f"stage={stage} does not exist: this trace has {count} stages")
        number = stage % count
        score = self.stages[number].score
        if score is None:
            raise PrunexError(f"stage {number} ranked nothing: it has no scores")
        if number == 0:
            score = score[:, : self.grid[0] * self.grid[1]]
            return score, torch.ones_like(score, dtype=torch.bool)
        place = self.tokens(number - 1)
        return score.gather(1, place.clamp(0, score.shape[1] - 1)), (place >= 0) & (place < score.shape[1])

    def share(self, stage: int = -1) -> Tensor:
        """Which part each patch has in the token that stands for it after a stage.

        Args:
            stage: Which one; -1 is the last.

        Returns:
            float [B, gh, gw] in 0..1: 1 for a kept patch, its weight inside a fused or merged token, 0 if removed.
            After a pooling the largest part it has in any token.
        """
        return self._compose(stage)[1].unflatten(1, self.grid)

    def scatter(self, tokens: Tensor, fill: float | Tensor = 0.0, channels_first: bool = False) -> Tensor:
        """The dense grid back from the tokens that are left, for heads that need one vector a patch.

        A kept patch gets its token, members of a fused or merged token get that token (of several pooled ones their
        mean), removed patches get ``fill``. Gradients flow into the tokens and into ``fill``.

        Args:
            tokens: float [B, prefix + n, D], as ``forward_features`` returns them, or [B, n, D] without prefix tokens;
                n is what the last stage left.
            fill: A number; one vector, such as a mask token (D values, any shape of D alone); or a dense feature, as
                [B, gh, gw, D] or [B, gh * gw, D] (with ``channels_first``: [B, D, gh, gw]), B may be 1.
            channels_first: Return timm's NCHW.

        Returns:
            [B, gh, gw, D], or [B, D, gh, gw], in the dtype of the tokens.

        Raises:
            PrunexError: For tokens of another forward or of one that left none, or a ``fill`` that does not fit.

        >>> trace = TokenTrace((1, 3), 1, 1, torch.device("cpu"))
        >>> trace.stages.append(Stage(0, torch.tensor([[0, -1, 1]]), torch.tensor([[1.0, 0.0, 1.0]]), 2))
        >>> trace.scatter(torch.tensor([[[9.0], [1.0], [2.0]]]), fill=-1.0).flatten().tolist()
        [1.0, -1.0, 2.0]
        """
        if self.bare:
            raise PrunexError(
                "the last block of this forward computed prefix tokens alone, there is no grid in them: take one from "
                "model.forward_intermediates(images), or set pruning.masked = True"
            )
        left = self.stages[-1].n_out if self.stages else self.grid[0] * self.grid[1]
        fits = isinstance(tokens, Tensor) and tokens.ndim == 3 and tokens.is_floating_point()
        if not fits or tokens.shape[0] != self.batch or tokens.shape[1] not in (left, self.prefix + left):
            came = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise PrunexError(
                f"tokens {came} are not of this trace's forward: give floats [{self.batch}, {self.prefix + left}, D], "
                f"as forward_features returns them, or [{self.batch}, {left}, D] without prefix tokens"
            )
        body = tokens[:, -left:]
        filling = self._filling(fill, body, channels_first)
        full, there = self.unfold(body)
        full = torch.where(there.unsqueeze(-1), full, filling).unflatten(1, self.grid)
        return full.permute(0, 3, 1, 2).contiguous() if channels_first else full

    def unfold(self, body: Tensor, leaving: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """The tokens that are left, given back to the patches they stand for.

        Args:
            body: float [B, n, D], the patch tokens after the last stage.
            leaving: The patch tokens [B, n_in, D] that each stage was given: removed ones keep theirs. Empty: they
                get 0.

        Returns:
            float [B, P, D], and bool [B, P]: which patches something is known of.
        """
        there = torch.ones(body.shape[:2], dtype=torch.bool, device=body.device)
        for number in reversed(range(len(self.stages))):
            body, there = self.stages[number].back(body, there)
            if leaving:
                body = torch.where(there.unsqueeze(-1), body, leaving[number])
                there = torch.ones_like(there)
        return body, there

    def _filling(self, fill: Any, body: Tensor, channels_first: bool) -> Tensor:
        """What removed patches get, ready to broadcast to [B, P, D]."""
        if not isinstance(fill, Tensor):
            if isinstance(fill, bool) or not isinstance(fill, int | float):
                raise PrunexError(f"fill={fill!r} is not allowed: give a number or a tensor")
            return body.new_full((1, 1, 1), fill)
        width, patches = body.shape[2], self.grid[0] * self.grid[1]
        batches = (1, self.batch)
        grid = (width, *self.grid) if channels_first else (*self.grid, width)
        if fill.numel() == 1 or (fill.numel() == width and fill.shape[-1] == width):
            filling = fill.reshape(1, 1, -1)
        elif fill.ndim == 4 and fill.shape[0] in batches and fill.shape[1:] == grid:
            filling = (fill.permute(0, 2, 3, 1) if channels_first else fill).flatten(1, 2)
        elif fill.ndim == 3 and fill.shape[0] in batches and fill.shape[1:] == (patches, width):
            filling = fill
        else:
            raise PrunexError(
                f"fill of shape {list(fill.shape)} does not fit: give a number, one vector [{width}], or a dense "
                f"feature [{self.batch}, {', '.join(map(str, grid))}] or [{self.batch}, {patches}, {width}]"
            )
        return filling.to(body.dtype)

    def depth(self) -> Tensor:
        """Number of stages each patch survived as a token of its own: int64 [B, gh, gw] in 0..len(stages)."""
        maps = [self.kept(i) for i in range(len(self.stages))]
        if not maps:
            return torch.zeros(self.batch, *self.grid, dtype=torch.long, device=self.device)
        return torch.stack(maps).sum(0)

    def keep_ratios(self) -> list[Tensor]:
        """Realised share of the original patches that are kept after each stage: a list of float [B].

        Where tokens were merged or pooled, no patch is lost: there it is the number of tokens over that of patches.
        """
        return [self._ratio(i, s) for i, s in enumerate(self.stages)]

    def _ratio(self, number: int, stage: Stage) -> Tensor:
        patches = self.grid[0] * self.grid[1]
        if self._pooled_by(number):
            counted = torch.as_tensor(stage.counted, dtype=torch.float32, device=self.device)
            return counted.expand(self.batch) / patches
        if self.merges(number):
            return self.left(number).float() / patches
        return self.kept(number).flatten(1).float().mean(1)

    def detach(self) -> TokenTrace:
        """The same trace without a link to the autograd graph."""
        stages = [
            Stage(
                s.block,
                s.group,
                _apart(s.weight),
                s.n_out,
                s.fused,
                None if s.score is None else _apart(s.score),
                s.counted.detach() if isinstance(s.counted, Tensor) else s.counted,
                s.merged,
            )
            for s in self.stages
        ]
        return TokenTrace(self.grid, self.prefix, self.batch, self.device, stages, self.bare)


def _apart(values: Tensor) -> Tensor:
    """Off the graph; compiled, as a copy: torch rebuilds a view that a graph returns twice from a wrong base."""
    return values.detach().clone() if torch.compiler.is_compiling() else values.detach()
