"""TokenTrace: which input patches each surviving token stands for, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunex.brief import Brief
from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.vit.stage import Stage as Stage
from prunex.vit.stage import parts_of
from prunex.vit.sums import grouped

if TYPE_CHECKING:
    from PIL.Image import Image


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

    def _upto(self, stage: int) -> list[Stage]:
        """The stages up to one and with it; without any, none. One that does not exist is refused."""
        count = len(self.stages)
        if count and (not isinstance(stage, int) or not -count <= stage < count):
            raise PrunexError(
                f"stage={stage} does not exist: this trace has stages 0..{count - 1} (or -1 for the last)"
            )
        return self.stages[: stage % count + 1] if count else []

    def _compose(self, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position [B, P] after ``stage`` (-1 removed; pooled: of the largest part), share of it, and whether alone."""
        stages = self._upto(stage)
        # Through windows a patch goes to several tokens: positions alone cannot be followed, the whole product can.
        if any(s.pooled for s in stages):
            share, where = self.composition(stage).max(-1)
            return where.masked_fill(share <= 0, -1), share, torch.zeros_like(share, dtype=torch.bool)
        patches = self.grid[0] * self.grid[1]
        where = torch.arange(patches, device=self.device).expand(self.batch, -1)
        share = torch.ones(self.batch, patches, device=self.device)
        alive = torch.ones(self.batch, patches, dtype=torch.bool, device=self.device)
        # Index by index, so that no [P, n] matrix is made; a share is the product along the way.
        for s in stages:
            gone = where < 0
            at = where.clamp(min=0)
            share = share * s.weight.gather(1, at).masked_fill(gone, 0)
            where = s.group.gather(1, at).masked_fill(gone, -1)
            alive = alive & (where >= 0)
            if s.fused:  # its last token is made of others
                alive = alive & (where != s.n_out - 1)
            share = share.masked_fill(where < 0, 0)
        return where, share, alive

    def check(self) -> TokenTrace:
        """The trace itself, its maps seen to be what :class:`Stage` says: for stages made by hand or read."""
        tokens = self.grid[0] * self.grid[1]
        for number, s in enumerate(self.stages):
            shape, n_out = tuple(s.group.shape[:2]), s.n_out
            if tokens == 0:
                raise PrunexError(f"stage {number} comes after one that left no tokens: leave it out")
            if shape != (self.batch, tokens):
                raise PrunexError(f"stage {number} maps [B, n_in] = {list(shape)}: give {[self.batch, tokens]}")
            if isinstance(n_out, bool) or not isinstance(n_out, int) or n_out < s.fused:
                raise PrunexError(f"stage {number}: n_out={n_out!r} is not allowed: give a number of tokens")
            low, high = (int(s.group.min()), int(s.group.max())) if s.group.numel() else (-1, -1)
            if low < -1 or high >= n_out:
                raise PrunexError(f"stage {number} has groups {low} to {high}: give -1 (removed) to {n_out - 1}")
            shares = s.weight.masked_fill(s.group < 0, 0)
            if not bool(torch.isfinite(shares).all()) or bool((shares < 0).any()):
                raise PrunexError(f"stage {number} has shares that are no numbers of at least 0")
            # Only groups that have a member have shares to sum.
            peopled = s._sums(torch.ones_like(shares)) > 0
            if bool(((s._sums(shares) - 1).abs() > 1e-2)[peopled].any()):
                raise PrunexError(f"stage {number} has shares of one group that do not sum to 1")
            tokens = n_out
        return self

    @property
    def pooled(self) -> bool:
        """Whether a stage made tokens of overlapping windows: no patch was chosen then, and none is kept as itself."""
        return any(s.pooled for s in self.stages)

    def composition(self, stage: int = -1) -> Tensor:
        """Which part each patch has in each token after a stage: float [B, P, n_out], columns summing to 1."""
        # The product of all maps, for pooled tokens that many patches are part of.
        whole = torch.eye(self.grid[0] * self.grid[1], device=self.device).expand(self.batch, -1, -1)
        for s in self._upto(stage):
            group, weight = parts_of(s)
            step = grouped(weight.flatten(0, 1), group.flatten(0, 1), s.n_out)
            whole = whole.to(step.dtype) @ step.view(*group.shape[:2], s.n_out)
        return whole

    def kept(self, stage: int = -1) -> Tensor:
        """Which patches continue as tokens of their own after a stage: bool [B, gh, gw] of the original grid.

        Args:
            stage: Which one; -1 is the last. Without any stage everything is kept. So for all that ask for a stage.

        Returns:
            A patch inside a fused token is not kept, nor is one that was merged with another; after a pooling none is.

        Raises:
            PrunexError: For a stage that does not exist.
        """
        where, _, alive = self._compose(stage)
        if self.merges(stage):
            alive = alive & (self._members(where).gather(1, where.clamp(min=0)) == 1)
        return alive.unflatten(1, self.grid)

    def merges(self, stage: int = -1) -> bool:
        """Whether some stage merged tokens, up to a stage and with it; -1 is the last."""
        return any(s.merged for s in self._upto(stage))

    def _members(self, where: Tensor) -> Tensor:
        """Number of patches in each token, float [B, tokens], from positions [B, P]."""
        # Every stage may have added the slot of a fused token. Floats: runtimes multiply no matrices of integers.
        ones = torch.ones(where.shape, device=self.device)
        return grouped(ones, where, where.shape[1] + len(self.stages))

    def left(self, stage: int = -1) -> Tensor:
        """Number of tokens that hold patches after a stage, -1 the last: int64 [B]."""
        return (self._members(self._compose(stage)[0]) > 0).sum(1)

    def groups(self, stage: int = -1) -> Tensor:
        """Which token each patch is part of after a stage, int64 [B, gh, gw]: a segmentation, where tokens are merged.

        Positions among the patch tokens, equal for patches that share a token (merged or fused); -1 for a removed
        patch.
        """
        return self._compose(stage)[0].unflatten(1, self.grid)

    def tokens(self, stage: int = -1) -> Tensor:
        """As :meth:`groups`, int64 [B, P], but -1 for a fused patch, too; pooled, the token in which it has most."""
        where, _, alive = self._compose(stage)
        pooled = any(s.pooled for s in self._upto(stage))
        return where if pooled else where.masked_fill(~alive, -1)

    def share(self, stage: int = -1) -> Tensor:
        """Which part each patch has in the token that stands for it after a stage: float [B, gh, gw] in 0..1.

        1 for a kept patch, its weight inside a fused or merged token, 0 if removed; after a pooling its largest part.
        """
        return self._compose(stage)[1].unflatten(1, self.grid)

    def scores(self, stage: int = -1) -> tuple[Tensor, Tensor]:
        """What a stage ranked by, patch by patch: float [B, P], with its gradient, and bool [B, P]: which had a score.

        False for those that were gone before, or continued in a fused token. A stage that ranked nothing is refused.
        """
        before, score = self._upto(stage)[:-1], self.stages[stage].score
        if score is None:
            raise PrunexError(f"stage {len(before)} ranked nothing: it has no scores")
        # Scores are of the tokens that entered the stage, which earlier stages have moved.
        place = replace(self, stages=before).tokens()
        return score.gather(1, place.clamp(0, score.shape[1] - 1)), (place >= 0) & (place < score.shape[1])

    def lift(self, row: Tensor) -> Tensor:
        """Carry row vectors from the tokens left to all patches, :meth:`Stage.lift` by stage: [..., prefix + P]."""
        for stage in reversed(self.stages):
            row = stage.lift(row, self.prefix)
        return row

    def paint(self, row: Tensor) -> Tensor:
        """Likewise, undivided: :meth:`Stage.paint` by stage."""
        for stage in reversed(self.stages):
            row = stage.paint(row, self.prefix)
        return row

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
        # Prefix tokens may be in front or not.
        left = self.stages[-1].n_out if self.stages else self.grid[0] * self.grid[1]
        fits = isinstance(tokens, Tensor) and tokens.ndim == 3 and tokens.is_floating_point()
        if not fits or tokens.shape[0] != self.batch or tokens.shape[1] not in (left, self.prefix + left):
            came = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise PrunexError(
                f"tokens {came} are not of this trace's forward: give floats [{self.batch}, {self.prefix + left}, D], "
                f"as forward_features returns them, or [{self.batch}, {left}, D] without prefix tokens"
            )
        body = tokens[:, -left:]
        filling = self.filling(fill, body, channels_first)
        full, present = self.unfold(body)
        full = torch.where(present.unsqueeze(-1), full, filling).unflatten(1, self.grid)
        return full.permute(0, 3, 1, 2).contiguous() if channels_first else full

    def unfold(self, body: Tensor, leaving: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """The tokens that are left, [B, n, D], given to the patches they stand for: [B, P, D], and which, bool [B, P].

        Removed ones get theirs of ``leaving``, the patch tokens [B, n_in, D] that each stage was given, else 0.
        """
        present = torch.ones(body.shape[:2], dtype=torch.bool, device=body.device)
        # From the last stage to the first; what left at a stage is known from there on.
        for number in reversed(range(len(self.stages))):
            body, present = self.stages[number].back(body, present)
            if leaving:
                body = torch.where(present.unsqueeze(-1), body, leaving[number])
                present = torch.ones_like(present)
        return body, present

    def filling(self, fill: Any, body: Tensor, channels_first: bool) -> Tensor:
        """What removed patches get by ``fill`` of :meth:`scatter`, ready to broadcast to [B, P, D]."""
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
        depth = torch.zeros(self.batch, *self.grid, dtype=torch.long, device=self.device)
        for number in range(len(self.stages)):
            depth += self.kept(number)
        return depth

    def keep_ratios(self) -> list[Tensor]:
        """Realised share of the original patches that are kept after each stage: a list of float [B].

        Where tokens were merged or pooled, no patch is lost: there it is the number of tokens over that of patches.
        """
        ratios = []
        for number, stage in enumerate(self.stages):
            if any(s.pooled for s in self._upto(number)):
                left = torch.zeros(self.batch, device=self.device) + stage.counted
            elif self.merges(number):
                left = self.left(number).float()
            else:
                left = self.kept(number).flatten(1).float().sum(1)
            ratios.append(left / (self.grid[0] * self.grid[1]))
        return ratios

    def show(self, images: Any = None, most: int = 16) -> Image:
        """What each stage leaves of the images: a row an image, a column a stage.

        Dropped patches are pale, merged ones have their mean colour, pooled ones are bright by the size of their part.

        Args:
            images: uint8 [B, H, W, 3], or float [B, C, H, W] of 1 or 3 channels, of which what lies outside 0..1 is
                stretched to that; the patch grid is laid over the whole of each. None: plain cells.
            most: Images drawn at most, the first ones.

        Returns:
            A PIL image: a notebook shows it, and ``trace.show(images).save("kept.png")`` keeps it.

        Raises:
            PrunexError: For images of another shape, number or type.

        >>> trace = TokenTrace((1, 2), 1, 1, torch.device("cpu"))
        >>> trace.stages.append(Stage(0, torch.tensor([[0, -1]]), torch.tensor([[1.0, 0.0]]), 1))
        >>> trace.show(torch.rand(1, 3, 32, 64)).mode
        'RGB'
        """
        from PIL import Image

        from prunex.vit.showing import trace_picture

        return Image.fromarray(trace_picture(self, images, check_whole("most", most, 1)))

    def _repr_html_(self) -> str:
        from prunex.vit.showing import trace_card

        return trace_card(self)

    def detach(self) -> TokenTrace:
        """The same trace without a link to the autograd graph."""
        stages = []
        for s in self.stages:
            score = None if s.score is None else _apart(s.score)
            counted = s.counted.detach() if isinstance(s.counted, Tensor) else s.counted
            stages.append(replace(s, weight=_apart(s.weight), score=score, counted=counted))
        return replace(self, stages=stages)


def _apart(values: Tensor) -> Tensor:
    """Off the graph; compiled, as a copy: torch rebuilds a view that a graph returns twice from a wrong base."""
    return values.detach().clone() if torch.compiler.is_compiling() else values.detach()
