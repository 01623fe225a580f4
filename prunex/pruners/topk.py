"""Top-K: keep the patches that the class token looks at most. No parameters, no training needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from prunex.pruners.base import TokenPruner, ceil_share, top
from prunex.pruners.schedules import ScheduleOptions
from prunex.registry import register
from prunex.vit.anatomy import Anatomy
from prunex.vit.decisions import Keep, Mask, TokenState


@register("pruner", "topk", "Haurum et al., ICCVW 2023, arXiv 2308.04657", "nothing; works untrained")
class TopK(TokenPruner):
    """Plain Top-K pruning by class-token attention.

    Inside each stage's block, between attention and MLP: a = head mean of the class token's attention over the patches;
    the ceil(keep_ratio * n) largest of the n entering patches continue. This is EViT without its fused token; it is a
    strong baseline ("Which Tokens to Use?", arXiv 2308.04657, whose own counts are int(rate^(s+1) * P) instead).

    The model keeps its fused attention kernel: the class row is computed alone. Models that pool patches instead of
    reading a class token are scored by the mean attention their pooled tokens pay (this rule is ours, not the paper's).
    The rates may fall while training (``schedule``, ``shrink_start``, ``shrink_length``: see
    :class:`prunex.pruners.schedules.Schedule`); by default the base rates hold at once.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    >>> with prunex.attach(model, "topk", keep_ratio=0.7) as pruning, torch.no_grad():
    ...     _ = model(torch.zeros(1, 3, 224, 224))
    ...     [int(pruning.trace.kept(s).sum()) for s in range(3)]
    [138, 97, 68]
    """

    name = "topk"
    inside = True
    fuses = False

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] = 0.7,
        stages: Sequence[int] | None = None,
        **schedule: Unpack[ScheduleOptions],
    ) -> None:
        super().__init__(anatomy, keep_ratio, stages, **schedule)
        self.anatomy = anatomy

    def rows(self) -> frozenset[int]:
        """Blocks whose class row ranks the patches."""
        return frozenset(b for s, b in enumerate(self.stages) if self.rate(s) < 1)

    def between(self, block: int, state: TokenState) -> Keep | Mask | None:
        """Keep the best-attended patches of a stage's block."""
        n = state.left
        k = ceil_share(self.rate(self.stages.index(block)), n)
        if k >= n or state.row is None:
            return None
        score = state.row[:, state.anatomy.prefix :]
        return Keep(top(score, k, state.present), score, score if self.fuses else None)

    def counts(self, patches: int) -> list[int]:
        """Patch tokens (a fused one included) after each stage."""
        counts, n = [], patches
        for s in range(len(self.stages)):
            k = ceil_share(self.rate(s), n)
            n = n if k >= n else k + self.fuses
            counts.append(n)
        return counts

    def macs(self, entering: int) -> int:
        """The rows that rank (one of the class token; one a pooled token without it), and the fused token."""
        a = self.anatomy
        asking = 1 if a.readers else entering + a.prefix * a.pool_prefix
        return asking * (entering + a.prefix) * sum(a.heads) // a.depth * a.head_dim + self.fuses * entering * a.width
