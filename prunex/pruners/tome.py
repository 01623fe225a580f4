"""ToMe: in every block, tokens with similar keys are averaged. No parameters, no training needed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.checks import check_flag, check_number
from prunex.errors import PrunexError
from prunex.pruners.base import TokenPruner
from prunex.registry import register
from prunex.vit.anatomy import Anatomy
from prunex.vit.decisions import Decision, Merge
from prunex.vit.state import TokenState
from prunex.vit.turns import Shown, Turn


@register("pruner", "tome", "Bolya et al., ICLR 2023, arXiv 2210.09461", "nothing; works untrained")
class ToMe(TokenPruner):
    r"""Token merging (arXiv 2210.09461, Sec. 3).

    Between a block's attention and its MLP, r patch tokens are merged away: tokens alternate between two sets; each of
    the first finds its most similar partner in the second, by the cosine of the keys (mean over heads, as attention
    uses them); the r most similar pairs become one token each, the mean of its patches. Several may share a partner.
    Gradients pass through the means, not through the matching.

    A token of s patches counts s times: in every later attention log s is added to its key's scores (proportional
    attention, Eq. 1), and heads that average tokens average patches. Training and inference do the same.

    Which tokens alternate: with one prefix token (class) or two (class and distillation) the positions of the whole
    sequence, as in the authors' code, so that the class token is the first set's and a distillation token the second's;
    neither is ever merged. With none, or with register tokens making them more than two, the patches alone, the first
    of them in the first set. Afterwards the rest of the first set comes before the second, each in its order.

    Departures from the authors' code: register tokens are never merged; LayerScale, norms of queries and keys and
    whatever else a block has stay in force; averaged heads count patches (theirs do so for MAE alone); the rest of the
    first set keeps its order without a class token too; a key of length 0 is similar to nobody (theirs gives NaN); of
    equal similarities the earlier wins.

    Args:
        r: Tokens merged away at a stage, at least 0 (13 suits ViT-S and ViT-B at 224; 0 merges nothing). A sequence
            gives one number a stage, and 0 for the stages after its end. Never more than half of a block's patches.
        proportional: Whether attention counts sizes. The authors turn it off for untrained use of MAE's weights alone.
        inflect: The paper's schedules, in [-1, 1]: stages rise (or fall, below 0) in a line from int(r (1 - inflect))
            to 2 r minus that, each truncated to a whole number. 0 is the same r everywhere; -1 falls from 2 r to 0.
        stages: Blocks that merge; None: all of them.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    >>> pruning = prunex.attach(model, "tome", r=13)
    >>> with torch.no_grad():
    ...     _ = model(torch.randn(1, 3, 224, 224))
    >>> pruning.counts()[-1], pruning.trace.groups().shape, int(pruning.trace.left()[0])
    (40, torch.Size([1, 14, 14]), 40)
    """

    name = "tome"

    def __init__(
        self,
        anatomy: Anatomy,
        r: int | Sequence[int] = 13,
        proportional: bool = True,
        inflect: float = 0.0,
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__(anatomy, None, range(anatomy.depth) if stages is None else stages)
        inflect = check_number("inflect", inflect, -1, 1)
        self.removed = schedule(r, inflect, len(self.stages))
        self.proportional = check_flag("proportional", proportional)
        self.odd = anatomy.prefix == 1  # the class token takes the first place of the first set
        self.pair_width = anatomy.head_dim
        self.shown: tuple[Shown, ...] = ("keys",)
        given = list(r) if isinstance(r, Sequence) else r
        self.options = {"r": given, "proportional": proportional, "inflect": inflect, **self.options}

    @classmethod
    def knob(cls, anatomy: Anatomy, shares: Sequence[float]) -> dict[str, Any]:
        """``r`` from shares: 1 merges nothing, 0 half of the grid in every block; parts of a token are saved up."""
        half = anatomy.grid[0] * anatomy.grid[1] / 2
        if len(shares) == 1:
            return {"r": round((1 - shares[0]) * half)}
        # Rounding what is due in all, not a stage at a time, loses no part of a token.
        leaving = [1 - share for share in shares]
        due = [round(half * d) for d in itertools.accumulate(leaving, initial=0.0)]
        r = [after - before for before, after in itertools.pairwise(due)]
        return {"r": r[0] if len(set(r)) == 1 else r}

    def plan(self) -> list[Turn]:
        """Inside the blocks that merge."""
        return [Turn(b, "inside", shown=self.shown) for b, r in zip(self.stages, self.removed, strict=True) if r]

    def decide(self, turn: Turn, state: TokenState) -> Decision | None:
        """Merge the most similar pairs of a stage's block."""
        r = min(self.removed[self.stages.index(turn.block)], state.left // 2)
        if r <= 0:
            return None
        keys = torch.as_tensor(state.key_mean)[:, state.anatomy.prefix :]
        if state.present is None:
            return Merge(match(keys, r, self.odd), state.left - r, self.proportional)
        return Merge(match_present(keys, r, self.odd, state.present > 0), state.left - r, self.proportional)

    def counts(self, patches: int) -> list[int]:
        """Patch tokens after each stage."""
        counts = []
        for r in self.removed:
            patches -= min(r, patches // 2)
            counts.append(patches)
        return counts

    def macs(self, entering: int, inner: int = 0) -> int:
        """The similarities of all pairs across the two sets."""
        return entering // 2 * ((entering + 1) // 2) * self.pair_width


def schedule(r: Any, inflect: float, stages: int) -> tuple[int, ...]:
    """How many tokens each stage merges away, for ``r`` a number or one a stage, and ``inflect`` in [-1, 1].

    >>> schedule(13, -1.0, 12)
    (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)
    """
    many = isinstance(r, Sequence) and not isinstance(r, str)
    listed = list(r) if many else [r]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in listed):
        raise PrunexError(
            f"r={r!r} is not allowed: give a whole number of tokens, such as 13, or one a stage; "
            "the paper's pair (r, f) is r=r, inflect=f"
        )
    if not many:
        # In whole numbers: a line of floats may lie a last bit below the number that it should reach.
        first, steps = int(r * (1 - inflect) + 1e-9), max(1, stages - 1)
        rise = 2 * r - 2 * first
        return tuple((first * steps + rise * i) // steps for i in range(stages))
    if len(listed) > stages:
        raise PrunexError(f"r={r!r} has {len(listed)} values for {stages} stages: give one, or at most one a stage")
    if inflect:
        raise PrunexError(f"inflect={inflect} is not allowed beside r={r!r}: a list says itself how it changes")
    return (*listed, *[0] * (stages - len(listed)))


def match(keys: Tensor, r: int | Tensor, odd: bool = False, present: Tensor | None = None) -> Tensor:
    """Bipartite soft matching of keys [B, n, d] (arXiv 2210.09461, Sec. 3 and App. D): which tokens become one.

    ``r`` tokens are merged away, at most floor(n / 2) (or one number an image, [B, 1], with ``present``). The first
    set, whose tokens are merged into the second's, is the ``odd`` positions or the even ones. ``present`` bool [B,
    n]: the tokens that take part, the first ones of each image. Groups are int64 [B, n] in 0..n-r-1: the rest of
    the first set, then the second set; -1 for tokens that take no part.
    """
    n = keys.shape[1]
    first, second = (torch.arange(start, n, 2, device=keys.device) for start in (int(odd), int(not odd)))
    unit = F.normalize(keys, dim=-1)
    similar = unit[:, int(odd) :: 2] @ unit[:, int(not odd) :: 2].transpose(1, 2)
    if present is not None:
        both = present[:, first].unsqueeze(2) & present[:, second].unsqueeze(1)
        similar = similar.masked_fill(~both, float("-inf"))
    # Each of the first set has one partner; partners may be shared, so no assignment is solved.
    partner = similar.argmax(2)
    goes = ranks(similar.amax(2)) < r
    stays = ~goes if present is None else ~goes & present[:, first]
    before = stays.long().cumsum(1)
    left = before[:, -1:]
    both_sets = [torch.where(goes, left + partner, before - 1), left + (second // 2).expand(keys.shape[0], -1)]
    # From the two sets one behind the other to the order in which the tokens came.
    position = torch.arange(n, device=keys.device)
    group = torch.cat(both_sets, 1)[:, position // 2 + (position % 2 != int(odd)) * len(first)]
    return group if present is None else group.masked_fill(~present, -1)


def ranks(values: Tensor) -> Tensor:
    """How many of a row's values come before each, largest first and equal ones in order: int64 [B, n]."""
    # By counting, since graphs for other runtimes have no stable sort.
    value, rival = values.unsqueeze(2), values.unsqueeze(1)
    place = torch.arange(values.shape[1], device=values.device)
    earlier = place < place.unsqueeze(1)
    return ((rival > value) | ((rival == value) & earlier)).sum(2)


def match_present(keys: Tensor, r: int, odd: bool, present: Tensor) -> Tensor:
    """For :func:`match` among the tokens that are there (bool [B, n]), as if the others did not exist; -1 for these."""
    # Those that are there come first, so that they alternate among themselves.
    order = (~present).to(torch.uint8).argsort(dim=1, stable=True)
    most = (present.sum(1, keepdim=True) // 2).clamp(max=r)
    moved = keys.gather(1, order.unsqueeze(2).expand_as(keys))
    group = match(moved, most, odd, present.gather(1, order))
    return torch.empty_like(group).scatter(1, order, group)
