"""Top-K: keep the patches that the class token looks at most. No parameters, no training needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor

from prunex.checks import check_choice
from prunex.pruners.adaptive import Adaptive, AdaptiveOptions, reaching
from prunex.pruners.base import ceil_share, row_macs, shares, top
from prunex.pruners.schedules import Schedule
from prunex.registry import register
from prunex.vit.anatomy import Anatomy
from prunex.vit.decisions import Drop, Keep
from prunex.vit.state import TokenState
from prunex.vit.turns import Turn

SCORES = ("attention", "shift")


@register("pruner", "topk", "Haurum et al., ICCVW 2023, arXiv 2308.04657", "nothing; works untrained")
class TopK(Adaptive):
    """Plain Top-K pruning by class-token attention, or by how far tokens are moved.

    Inside each stage's block, between attention and MLP: a = head mean of the class token's attention over the patches;
    the ceil(keep_ratio * n) largest of the n entering patches continue. This is EViT without its fused token; it is a
    strong baseline ("Which Tokens to Use?", arXiv 2308.04657, whose own counts are int(rate^(s+1) * P) instead).

    The model keeps its fused attention kernel: the class row is computed alone. Models that pool patches instead of
    reading a class token are scored by the mean attention their pooled tokens pay (this rule is ours, not the paper's).
    With ``score="shift"`` patches are ranked by Representation Shift ("Unifying Token Compression with FlashAttention",
    arXiv 2508.00367): how far one layer F moves token i, ||F(x)_i - x_i||. F is the MLP of the stage's block with its
    residual, so this is the length of what the MLP adds, LayerScale taken in and stochastic depth left out. Patches
    leave after that block, whose MLP still runs on all of them. Neither attention map nor class token is needed. The
    score is each patch's share of the sum over the patches there. Unverified, since no code was read: which layer, what
    becomes of the residual, where tokens leave, the ratios.

    The rates may fall while training (``schedule``, ``shrink_start``, ``shrink_length``: see
    :class:`prunex.pruners.schedules.Schedule`); by default the base rates hold at once.

    With ``count="adaptive"`` an image keeps the fewest patches that hold ``threshold`` of the attention which a spends
    on the patches still there (a rule of ours too): one glance at one thing needs few. Likewise of the shift.

    Args:
        keep_ratio: Share of the entering patch tokens kept at a stage, in (0, 1].
        stages: Blocks that shrink.
        score: What patches are ranked by, "attention" or "shift".
        **shared: See :class:`~prunex.pruners.adaptive.AdaptiveOptions`: ``threshold`` is of the attention (or shift)
            held, and an image keeps at least one patch.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    >>> with prunex.attach(model, "topk", keep_ratio=0.7) as pruning, torch.no_grad():
    ...     _ = model(torch.zeros(1, 3, 224, 224))
    ...     [int(pruning.trace.kept(s).sum()) for s in range(3)]
    [138, 97, 68]
    """

    name = "topk"
    fuses = False
    handed_on = {"count": "fixed", "threshold": 0.9, "expected": None, **Schedule().options}

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] = 0.7,
        stages: Sequence[int] | None = None,
        score: Literal["attention", "shift"] = "attention",
        **shared: Unpack[AdaptiveOptions],
    ) -> None:
        super().__init__(anatomy, keep_ratio, stages, **shared)
        self.anatomy = anatomy
        self.score = check_choice("score", score, SCORES)
        self.options["score"] = self.score

    def plan(self) -> list[Turn]:
        """Inside the blocks whose class row ranks the patches, or after those whose MLP does."""
        # All of the attention is held by all patches alone: no row is needed.
        if self.adaptive and self.mass() >= 1:
            return []
        blocks = [b for s, b in enumerate(self.stages) if self.rate(s) < 1]
        if self.score == "shift":
            return [Turn(b, "after", shown=("shift",)) for b in blocks]
        return [Turn(b, "inside", shown=("row",)) for b in blocks]

    def mass(self) -> float:
        """The share of the scores that is kept now, where counts are adaptive: it falls as keep rates do."""
        return self.shrink.rate(self.threshold, self.progress)

    def scored(self, state: TokenState) -> Tensor:
        """What the patches are ranked by, [B, n]."""
        prefix = state.anatomy.prefix
        if self.score == "shift":
            return shares(torch.as_tensor(state.shift)[:, prefix:], state.present)
        return torch.as_tensor(state.row)[:, prefix:]

    def decide(self, turn: Turn, state: TokenState) -> Keep | Drop | None:
        """Keep the best patches of a stage's block."""
        score = self.scored(state)
        fuse = score if self.fuses else None
        if self.adaptive:
            return Drop(reaching(score.detach(), self.mass(), state.present), score, fuse)
        k = ceil_share(self.rate(self.stages.index(turn.block)), state.left)
        return None if k >= state.left else Keep(top(score, k, state.present), score, fuse)

    def counts(self, patches: int) -> list[int]:
        """Patch tokens (a fused one included) after each stage; expected ones where counts are adaptive.

        Measured shares are those of patches: earlier fused tokens that were kept are not among the expected counts.
        """
        likely = self.likely(patches, int(self.fuses))
        if likely is not None:
            return likely
        counts, n = [], patches
        for s in range(len(self.stages)):
            k = ceil_share(self.rate(s), n)
            # Where nobody leaves there is nobody to fuse.
            n = n if k >= n else k + self.fuses
            counts.append(n)
        return counts

    def macs(self, entering: int, inner: int = 0) -> int:
        """What ranks (rows of attention, or the lengths of what the MLP adds), and the fused token."""
        width = self.anatomy.width
        ranking = entering * width if self.score == "shift" else row_macs(self.anatomy, entering, inner)
        return ranking + self.fuses * entering * width
