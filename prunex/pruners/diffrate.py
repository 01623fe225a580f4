"""DiffRate: how many tokens each block prunes and merges, learned by gradient while the weights stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.checks import check_flag, check_number, check_share, check_whole
from prunex.errors import PrunexError
from prunex.pruners.base import Forward, TokenPruner, ceil_share, ranked, row_macs, top
from prunex.registry import register
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.arithmetic import promoted
from prunex.vit.blocks import layout_of
from prunex.vit.cost import count
from prunex.vit.decisions import Keep, Mask, Merge
from prunex.vit.state import TokenState
from prunex.vit.turns import Turn

RATE = 0.9  # where nothing else is said, for blocks of ViTs as deep as DeiT


class Rate(nn.Module):
    """How many of P patch tokens a step keeps: a softmax over the candidates P, P - g, P - 2 g, ... above 0.

    Args:
        patches: P, of the model's own grid.
        granularity: g, at least 1.
        logits: float [C], where it starts; zeros are the uniform distribution.

    >>> rate = Rate(16, 4, torch.zeros(4))
    >>> rate.kept().item(), rate.survival(16)[[0, 3, 4, 15]].tolist(), rate.mask(10, 16, 16).sum().item()
    (10.0, [1.0, 1.0, 0.75, 0.25], 10.0)
    """

    def __init__(self, patches: int, granularity: int, logits: Tensor) -> None:
        super().__init__()
        self.patches, self.granularity = patches, granularity
        self.logits = nn.Parameter(logits.clone())

    @property
    def candidates(self) -> Tensor:
        """The counts to choose from, float [C], falling."""
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        return torch.arange(self.patches, 0, -self.granularity, device=self.logits.device).to(wide)

    def kept(self) -> Tensor:
        """The expected count, rounded up; its gradient is that of the expectation."""
        mean = promoted(self.logits).softmax(0) @ self.candidates
        return mean + (mean.ceil() - mean).detach()

    def survival(self, tokens: int) -> Tensor:
        """The probability that a token is kept, by its rank among so many, best first: float [tokens], falling."""
        rank = torch.arange(tokens, device=self.logits.device)
        return (self.candidates > rank.unsqueeze(1)).to(self.candidates.dtype) @ promoted(self.logits).softmax(0)

    def mask(self, kept: int, alive: int, tokens: int) -> Tensor:
        """By rank, 0 from ``kept`` up to ``alive`` and 1 for all others, with the gradient of :meth:`survival`."""
        survival = self.survival(tokens)
        hard = torch.ones_like(survival)
        hard[kept:alive] = 0
        return hard + (survival - survival.detach())


@dataclass(eq=False, repr=False)
class Cut(Turn):
    """A turn inside a block that prunes, merges, or both; numbers are of patch tokens."""

    stage: int = 0
    entering: int = 0  # of the model's own grid
    pruned: int = 0  # left by pruning
    merged: int = 0  # left by merging, as many where nothing is merged


@register(
    "pruner",
    "diffrate",
    "Chen et al., ICCV 2023, arXiv 2305.17997",
    "training: its rates are learned, the weights stay; or a table of counts",
)
class DiffRate(TokenPruner):
    r"""Differentiable compression rates (arXiv 2305.17997): a learned table of counts, for pruning and merging at once.

    Between attention and MLP of a block its patches are ranked by the class token's attention a, head mean (without a
    class token by the mean row of the pooled tokens; ours). The first K_p go on, the others are dropped. Of these the
    first K_m go on, and each of the others joins the one of them that is most like it, by the cosine of the stream
    after attention. What they become is the plain mean of its members, however many patches these stand for. A member's
    size counts by its cosine in the new size, and in every later attention log size is added to a key's scores.

    Each K is the expected count, rounded up, of a distribution over the candidates P, P - g, ... (:class:`Rate`). In
    training all tokens keep their slots: those beyond K are masked as attention keys, where a mask's gradient by rank i
    is that of the probability that more than i are kept. One auxiliary loss is added to the user's own, ``flops``:
    weight * ((F - F*) / F_dense)^2, with F the multiply-adds of one image (:func:`prunex.cost`). Its gradient reaches
    both counts of a block, whichever is the smaller, and no earlier block. Rates that remove nothing, and those of a
    last block whose patches no head reads, are moved by it alone.

    The model's weights stay as they are: ``TokenPruning`` holds them still, and by hand only ``pruning.pruner`` goes to
    the optimiser (the authors: AdamW at 0.01 without weight decay, three epochs of ImageNet). Slim models hold the
    counts alone, as the options ``prune_kept`` and ``merge_kept``. Counts are absolute: images of another size are cut
    to as many tokens. In training a member's size counts at least once, as in the authors' code and not at inference;
    so the same counts give other logits in training than at inference.

    Departures from the authors' code: it starts all rates uniform (half of the patches from its first block on) and
    weighs F in 1e9; ours start as undecided as their start counts allow, so that F begins at F*, and the loss is
    relative, as strict on small models as on large ones. Dropped keys leave the softmax exactly. A merged token counts
    at least once, whatever the cosines. All prefix tokens stay, and receive nobody. F is what ``prunex.cost`` says,
    with ranking and matching, and embeds patches alone (theirs the class token too). Followed is the code; of the paper
    only the abstract could be read.

    Args:
        keep_ratio: Share of the entering patches that a block keeps at the start, in (0, 1], one or one a stage; half
            of the others are pruned, half merged. None: 0.9, or what the tables say. Never below two counts (in general
            the smallest candidate and one more).
        stages: Blocks that may prune and merge. None: all but the first, and but the last where the head reads patches;
            with tables, those blocks that they cut.
        granularity: g, the distance of candidates (the authors' script: 4).
        prune_kept: Counts K_p of every block of the model at the start, prefix tokens included, as the authors publish
            them. One above the tokens that are there does nothing. None beside ``merge_kept``: nothing is pruned.
        merge_kept: Likewise K_m.
        target: F* as a share of the dense multiply-adds, in (0, 1]; None: what the start costs.
        flops_weight: Of the loss, at least 0. The authors' 5 GMACs^-2 is 106 on DeiT-S and 1545 on DeiT-B.
        learns: Whether there are rates to learn; else the counts stay, and training removes tokens as inference does.

    Raises:
        PrunexError: For an option out of range, a table without one count a block, a table beside ``keep_ratio``, or
            counts below what the candidates can learn.

    >>> import prunex, timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval().requires_grad_(False)
    >>> pruning = prunex.attach(model, "diffrate", budget=0.65)
    >>> optimizer = torch.optim.AdamW(pruning.pruner.parameters(), lr=0.01, weight_decay=0)
    >>> loss = model.train()(torch.randn(2, 3, 224, 224)).logsumexp(1).mean() + sum(pruning.losses().values())
    >>> loss.backward()
    >>> optimizer.step()
    """

    name = "diffrate"
    trains_masked = True
    freezes_model = True
    shards = False
    lr = 0.01

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] | None = None,
        stages: Sequence[int] | None = None,
        granularity: int = 1,
        prune_kept: Sequence[int] | None = None,
        merge_kept: Sequence[int] | None = None,
        target: float | None = None,
        flops_weight: float = 100.0,
        learns: bool = True,
    ) -> None:
        given = {"prune_kept": prune_kept, "merge_kept": merge_kept}
        tables = {name: check_table(name, table, anatomy) for name, table in given.items() if table is not None}
        if tables and keep_ratio is not None:
            raise PrunexError(
                f"keep_ratio={keep_ratio!r} and {' and '.join(tables)} all say how much is kept: give one of both"
            )
        self.patches = anatomy.grid[0] * anatomy.grid[1]
        if stages is None:
            cut = [b for b, counts in enumerate(zip(*tables.values(), strict=True)) if min(counts) < self.patches]
            last = anatomy.depth if anatomy.readers else anatomy.depth - 1
            stages = cut or list(range(1, last)) or [anatomy.depth - 1]
        super().__init__(anatomy, RATE if keep_ratio is None else keep_ratio, stages)
        self.learns = self.trains_masked = self.freezes_model = check_flag("learns", learns)
        self.anatomy = anatomy
        self.granularity = check_whole("granularity", granularity, 1, max(1, self.patches - 1))
        # The expected count is above the smallest candidate, and rounded up.
        self.least = min(self.patches, (self.patches - 1) % self.granularity + 2) if self.learns else 1
        if tables:
            all_stay = [self.patches] * anatomy.depth
            prune, merge = (tables.get(name, all_stay) for name in ("prune_kept", "merge_kept"))
            self.start = [(prune[b], merge[b]) for b in self.stages]
            self._check_learnable()
        else:
            self.start = evenly(self.rates, self.patches, self.least)
        self.target = None if target is None else check_share("target", target)
        self.flops_weight = check_number("flops_weight", flops_weight, 0)
        self.prune, self.merge = nn.ModuleList(), nn.ModuleList()
        if self.learns:
            for rates, counts in ((self.prune, [k for k, _ in self.start]), (self.merge, [k for _, k in self.start])):
                logits = least_decided(self.patches, self.granularity, counts)
                rates.extend(Rate(self.patches, self.granularity, row) for row in logits)
        if keep_ratio is None:
            del self.options["keep_ratio"]
        for name, table in tables.items():
            self.options[name] = [k + anatomy.prefix for k in table]
        self.options |= {"granularity": self.granularity, "target": self.target}
        self.options |= {"flops_weight": self.flops_weight, "learns": self.learns}

    def _check_learnable(self) -> None:
        low = min(min(pair) for pair in self.start)
        if low < self.least:
            raise PrunexError(
                f"a count of {low + self.anatomy.prefix} is not allowed with granularity={self.granularity}, whose "
                f"rates learn {self.least + self.anatomy.prefix} and more (prefix tokens included): give a smaller "
                "granularity, larger counts, or learns=False"
            )

    def prepare(self, model: ViT) -> None:
        """Count what the start costs, which is what the rates shall cost in the end."""
        if self.target is None and self.learns:
            self.aim = count(model, self).macs / count(model, None).macs
        else:
            self.aim = self.target or 1.0

    def table(self) -> list[tuple[int, int]]:
        """The patch tokens (K_p, K_m) that each stage's pruning and merging keep at most, as they are now."""
        if not self.learns or next(self.parameters()).is_meta:  # of a model without weights only the start is known
            return self.start
        rates = [cast(Rate, rate) for rate in (*self.prune, *self.merge)]
        # All at once: on a GPU every number that is read waits for it.
        chance = promoted(torch.stack([rate.logits.detach() for rate in rates])).softmax(1)
        counts = [int(k) for k in (chance @ rates[0].candidates).ceil().tolist()]
        half = len(self.stages)
        return list(zip(counts[:half], counts[half:], strict=True))

    def plan(self) -> list[Turn]:
        """Inside the blocks that remove anything."""
        return list(self.cuts())

    def cuts(self) -> list[Cut]:
        """The turns of :meth:`plan`, and what is left by each."""
        turns: list[Cut] = []
        alive = self.patches
        for s, (prune, merge) in enumerate(self.table()):
            left = min(prune, merge)
            if left < alive:
                block, pruned = self.stages[s], min(prune, alive)
                turns.append(Cut(block, "inside", ("row",), stage=s, entering=alive, pruned=pruned, merged=left))
                alive = left
        return turns

    def decide(self, turn: Turn, state: TokenState) -> Keep | Mask | Merge | None:
        """Drop and merge patches of a stage's block, or mask them while the rates learn."""
        cut, score = cast(Cut, turn), torch.as_tensor(state.row)[:, state.anatomy.prefix :]
        if self.learns and state.training and state.masked:
            return self._mask(cut, score, state)
        pruned = min(cut.pruned, state.left)
        merged = min(cut.merged, pruned)
        if merged >= state.left:
            return None
        if merged == pruned:
            return Keep(top(score, pruned, state.present), score)
        order = ranked(score, pruned, state.present)
        stays, joins = order[:, :merged], order[:, merged:]
        partner, cosine = most_alike(state.patches, stays, joins)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(1, stays, True)
        place = kept.long().cumsum(1) - 1
        group = place.masked_fill(~kept, -1).scatter(1, joins, place.gather(1, partner))
        worth = torch.ones_like(cosine[:, :1]).expand(score.shape).scatter(1, joins, cosine)
        return Merge(group, merged, score=score, even=True, worth=worth)

    def _mask(self, cut: Cut, score: Tensor, state: TokenState) -> Mask | Merge:
        """Tokens keep their slots, and masks with a gradient for the rates say who is there."""
        n, present = score.shape[1], state.present
        alive = n if present is None else min(n, cut.entering)
        pruned, merged = min(cut.pruned, alive), min(cut.merged, alive)
        order, slots = ranked(score, n, present), torch.arange(n, device=score.device).expand_as(score)
        # From the token of each rank to the rank of each token.
        rank = torch.empty_like(order).scatter(1, order, slots)
        policy = torch.ones_like(promoted(score)) if present is None else present
        if pruned < alive:
            policy = policy * cast(Rate, self.prune[cut.stage]).mask(pruned, alive, n)[rank]
        if merged == pruned:
            return Mask(policy, score)
        stays, joins = order[:, :merged], order[:, merged:pruned]
        partner, cosine = most_alike(state.patches, stays, joins)
        group = slots.masked_fill(policy <= 0, -1).scatter(1, joins, partner)
        sizes = torch.ones_like(cosine) if state.sizes is None else state.sizes[:, -n:].gather(1, joins)
        worth = torch.ones_like(policy).scatter(1, joins, ((sizes * cosine).clamp(min=1) / sizes).to(policy.dtype))
        policy = policy * cast(Rate, self.merge[cut.stage]).mask(merged, pruned, n)[rank]
        return Merge(group, merged, score=score, even=True, worth=worth, policy=policy)

    def counts(self, patches: int) -> list[int]:
        """Patch tokens after each stage, at the rates as they are now."""
        cuts, counts = {cut.stage: cut for cut in self.cuts()}, []
        for s in range(len(self.stages)):
            patches = min(patches, cuts[s].merged) if s in cuts else patches
            counts.append(patches)
        return counts

    def macs(self, entering: int, inner: int = 0) -> int:
        """The rows that rank, and the similarities of the tokens that join others to those that stay."""
        # Counts fall from cut to cut: the first that leaves fewer is the one that so many enter.
        cut = next((cut for cut in self.cuts() if cut.merged < entering), None)
        if cut is None:
            return 0
        pairs = (min(cut.pruned, entering) - cut.merged) * cut.merged
        return row_macs(self.anatomy, entering, inner) + pairs * self.anatomy.width

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        """``flops`` of one training forward, weighted."""
        if not self.learns or forward.model is None or forward.trace is None:
            return {}
        gap = self._share(forward.model, forward.trace.grid) - self.aim
        return {"flops": self.flops_weight * gap**2}

    def _share(self, model: ViT, grid: tuple[int, int]) -> Tensor:
        """What one image costs at the present rates, as a share of the dense model, with the rates' gradients."""
        dense, now = count(model, None, grid).macs, count(model, self, grid).macs
        prune = torch.stack([cast(Rate, rate).kept() for rate in self.prune])
        merge = torch.stack([cast(Rate, rate).kept() for rate in self.merge])
        # The smallest count is the value, and both have its gradient.
        passed = (prune - prune.detach()) + (merge - merge.detach())
        left = dict(zip(self.stages, zip(self.counts(grid[0] * grid[1]), passed, strict=True), strict=True))
        n, total = torch.as_tensor(grid[0] * grid[1] + self.anatomy.prefix), torch.zeros_like(passed[0])
        for number, block in enumerate(cast(Any, model).blocks):
            layout = layout_of(block)
            linear, mlp = layout.macs(block)
            # Attention's two products grow with the square of the tokens, all else with their number.
            total = total + n * (linear / dense) + n * n * (2 * layout.width(block) / dense)
            if number in left:
                n = left[number][0] + self.anatomy.prefix + left[number][1]
            total = total + n * (mlp / dense)
        # The value is what prunex.cost counts; the sum brings its gradient.
        return total - total.detach() + now / dense

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rates from the authors' names: ``blocks.{b}.{prune,merge}_ddp.selected_probability``, of the stages alone."""
        renamed = {}
        for s, block in enumerate(self.stages):
            for kind in ("prune", "merge"):
                logits = state.get(f"blocks.{block}.{kind}_ddp.selected_probability")
                if logits is not None:
                    renamed[f"{kind}.{s}.logits"] = logits
        return renamed

    def inference_only(self) -> None:
        """Keep the counts as they are now, and let what they were learned with go."""
        self.start = self.table()
        self.learns = self.trains_masked = self.freezes_model = False
        self.prune, self.merge = nn.ModuleList(), nn.ModuleList()
        prefix, kept = self.anatomy.prefix, dict(zip(self.stages, self.start, strict=True))
        whole = [kept.get(block, (self.patches, self.patches)) for block in range(self.anatomy.depth)]
        self.options.pop("keep_ratio", None)
        self.options |= {"prune_kept": [p + prefix for p, _ in whole], "merge_kept": [m + prefix for _, m in whole]}
        self.options["learns"] = False


def check_table(name: str, table: Any, anatomy: Anatomy) -> list[int]:
    """Counts of every block without prefix tokens; anything but one whole number a block is refused."""
    many = isinstance(table, Sequence) and not isinstance(table, str)
    if not many or len(table) != anatomy.depth:
        raise PrunexError(
            f"{name}={table!r} is not allowed: give one count for each of the {anatomy.depth} blocks, prefix tokens "
            f"included; {anatomy.grid[0] * anatomy.grid[1] + anatomy.prefix} keeps all"
        )
    return [check_whole(f"{name} of a block", k, anatomy.prefix + 1) - anatomy.prefix for k in table]


def evenly(rates: Sequence[float], patches: int, least: int) -> list[tuple[int, int]]:
    """Counts by shares of the entering patches, of which half are pruned and half merged, at least ``least`` of them.

    >>> evenly((0.5, 1.0, 0.5), 16, 2)
    [(12, 8), (8, 8), (6, 4)]
    """
    counts, n = [], patches
    for rate in rates:
        left = max(least, ceil_share(rate, n))
        counts.append(((n + left + 1) // 2, left))
        n = left
    return counts


def least_decided(patches: int, granularity: int, counts: Sequence[int]) -> Tensor:
    """The logits of the distributions over the candidates that are rounded up to some counts: float [S, C].

    Of all that have a mean the one of largest entropy, whose logits are linear in the candidates. Means lie half a
    token below the counts, within the candidates.
    """
    # Values are needed on the meta device too, where costs are compared.
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    candidates = torch.arange(patches, 0, -granularity, **wide)
    step = torch.arange(len(candidates), **wide)  # places, falling
    means = torch.tensor(counts, **wide).clamp(max=patches) - 0.5
    low, high = torch.full_like(means, -50.0), torch.full_like(means, 50.0)
    # The mean rises with the slope: fifty halvings leave an interval far below what single precision tells apart.
    for _ in range(50):
        slope = (low + high) / 2
        above = (-slope.unsqueeze(1) * step).softmax(1) @ candidates > means
        low, high = torch.where(above, low, slope), torch.where(above, slope, high)
    logits = -low.unsqueeze(1) * step
    # The largest is 0: numbers of half precision are finest there.
    return (logits - logits.amax(1, keepdim=True)).float()


@torch.no_grad()
def most_alike(x: Tensor, stays: Tensor, joins: Tensor) -> tuple[Tensor, Tensor]:
    """For the tokens ``joins`` int64 [B, j] of x [B, n, D] the one most like each among ``stays`` [B, k], by cosine.

    Positions int64 [B, j] and cosines [B, j]; of equally alike ones the first in ``stays``.
    """
    unit = F.normalize(promoted(x), dim=-1)
    kept, gone = (unit.gather(1, at.unsqueeze(2).expand(-1, -1, x.shape[2])) for at in (stays, joins))
    cosine, nearest = (gone @ kept.transpose(1, 2)).max(2)
    return stays.gather(1, nearest), cosine
