"""PPT: at a few blocks each image drops its least significant tokens, or merges its most similar ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from prunex.checks import check_choice, check_number
from prunex.pruners.base import check_stages, row_macs, shares, top
from prunex.pruners.tome import ToMe, match, match_present, ranks
from prunex.registry import register
from prunex.vit.anatomy import Anatomy
from prunex.vit.decisions import Decision, Drop, Keep, Merge
from prunex.vit.state import TokenState
from prunex.vit.turns import Turn

TAU = {"variance": 7e-5, "effective": 0.4}  # the authors', without training; about that, of 146 tokens


@register("pruner", "ppt", "Wu et al., 2023, arXiv 2310.01812", "nothing; works untrained")
class PPT(ToMe):
    r"""Token pruning and pooling ("PPT", arXiv 2310.01812; rules of the authors' code, the paper's text was not read).

    Inside each stage's block, between attention and MLP, with A the softmax attention of its heads h, v_j the values of
    all heads side by side, and n patches entering::

        S_j = a_j / sum_k a_k,   a_j = (sum_h A[h, class, j]) ||v_j||          significance, as in ATS (2111.15667)
        V   = sum_j (S_j - 1/n)^2 / (n - 1)                                    of each image

    An image with V >= tau prunes: the n - r most significant patches continue, in falling order. Any other pools: r
    patches are merged away as by :class:`ToMe`, sizes, proportional attention and order included; its sizes follow the
    patches that continue. Either way n - r are left, with r at most n // 2, so images that decide differently stay one
    batch. The trace tells who did what: a pruned image has tokens of group -1 at that stage. What was dropped is lost,
    whatever the sizes. Gradients pass through means and kept tokens, not through significance, decision and matching.

    1 / sum_j S_j^2 is the effective number of tokens, 1 / (1/n + (n - 1) V): a concentrated significance prunes, a flat
    one pools. A tau of V belongs to its grid: 7e-5 is 53 effective tokens of 196, 59 of 96, and of 16 patches few
    images stay below it. ``spread="effective"`` compares the effective share of the tokens, 1 / (n sum_j S_j^2) in
    (0, 1], which does not (ours): an image prunes where it is at most tau.

    Departures from the authors' code: all prefix tokens are protected in both branches (theirs may prune a distillation
    token, and score registers); sizes are kept where attention is not proportional (theirs begin again with 1 at every
    stage); attention dropout does not touch the significance; of equal scores the first wins. Without a class token the
    pooled tokens' mean row takes its place, as for ``topk`` (ours).

    Args:
        r: Tokens removed at a stage, at least 0 (0 removes nothing). A sequence gives one number a stage, and 0 for the
            stages after its end. Never more than half of a block's patches.
        tau: The threshold. Of "variance" at least 0, by default the authors' 7e-5 (6e-5 for fine-tuning): 0 always
            prunes, from 1 on always pools. Of "effective" in [0, 1], by default 0.4: 1 always prunes, 0 always pools.
        spread: What tau is of, "variance" or "effective".
        proportional: Whether attention counts sizes.
        stages: Blocks that prune or pool; None: three, (3, 6, 9) of 12, as in the authors' commands.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    >>> pruning = prunex.attach(model, "ppt", r=50, tau=7e-5)
    >>> with torch.no_grad():
    ...     _ = model(torch.randn(1, 3, 224, 224))
    >>> pruning.counts(), int(pruning.trace.left()[0])
    ([146, 96, 48], 48)
    """

    name = "ppt"

    def __init__(
        self,
        anatomy: Anatomy,
        r: int | Sequence[int] = 50,
        tau: float | None = None,
        spread: Literal["variance", "effective"] = "variance",
        proportional: bool = True,
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__(anatomy, r, proportional, stages=check_stages(stages, anatomy.depth))
        check_choice("spread", spread, TAU)
        self.by_variance = spread == "variance"
        tau = TAU[spread] if tau is None else tau
        self.tau = check_number("tau", tau, 0) if self.by_variance else check_number("tau", tau, 0, 1)
        self.anatomy = anatomy
        # No variance of shares is above 1; where nothing is left to decide, nothing is computed for it.
        self.always_pools = self.tau >= 1 if self.by_variance else self.tau == 0
        self.always_prunes = self.tau == 0 if self.by_variance else self.tau == 1
        if self.always_prunes:
            self.shown = ("row", "values")
        elif not self.always_pools:
            self.shown = ("row", "values", "keys")
        # Without ToMe's ``inflect``: a few stages have no line to rise along.
        given = {name: self.options[name] for name in ("r", "proportional", "stages")}
        self.options = {"tau": self.tau, "spread": spread, **given}

    def decide(self, turn: Turn, state: TokenState) -> Decision | None:
        """Prune or pool the tokens of a stage's block."""
        r = min(self.removed[self.stages.index(turn.block)], state.left // 2)
        if self.always_pools or r <= 0:
            return super().decide(turn, state)
        present = state.present
        score = self.significance(state)
        if self.always_prunes and present is None:
            return Keep(top(score, state.left - r, None), score)
        n: int | Tensor = state.left if present is None else (present > 0).sum(1, keepdim=True)
        goes = min(r, n // 2) if isinstance(n, int) else (n // 2).clamp(max=r)
        place = ranks(score if present is None else score.masked_fill(present <= 0, float("-inf")))
        if self.always_prunes:
            return Drop(place < n - goes, score)
        pruned = place.masked_fill(place >= n - goes, -1)
        keys = torch.as_tensor(state.key_mean)[:, state.anatomy.prefix :]
        alike = match(keys, r, self.odd) if present is None else match_present(keys, r, self.odd, present > 0)
        group = torch.where(self.prunes(score, n, present), pruned, alike)
        return Merge(group, state.left - r, self.proportional, score)

    def significance(self, state: TokenState) -> Tensor:
        """S, each patch's share of the attention paid to the patches that are there, times its value's length."""
        seen = torch.as_tensor(state.row) * torch.as_tensor(state.value_norm)
        return shares(seen[:, state.anatomy.prefix :].detach(), state.present)

    def prunes(self, score: Tensor, n: int | Tensor, present: Tensor | None = None) -> Tensor:
        """Whether each image prunes, bool [B, 1], from the scores [B, n] of its n patches, 0 where none is present."""
        # Multiplied out, since scores that are all 0 would be divided by.
        if not self.by_variance:
            return score.square().sum(1, keepdim=True) * n * self.tau >= 1
        apart = score - score.sum(1, keepdim=True) / n
        if present is not None:
            apart = apart.masked_fill(present <= 0, 0)
        return apart.square().sum(1, keepdim=True) >= self.tau * (n - 1)

    def macs(self, entering: int, inner: int = 0) -> int:
        """The row and the lengths of values, and the similarities of all pairs; whichever an image may need."""
        ranking = 0 if self.always_pools else row_macs(self.anatomy, entering, inner) + entering * inner
        return ranking + (0 if self.always_prunes else super().macs(entering, inner))
