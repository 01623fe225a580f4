"""The search behind ``patch_slimming``: which patch positions each block computes, from the last block to the first."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor
from tqdm import tqdm

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.vit.anatomy import Anatomy, ViT, check_images
from prunex.vit.arithmetic import promoted
from prunex.vit.embedding import embed
from prunex.vit.forward import through
from prunex.vit.tape import Tape

CHUNK = 64  # images in one pass, and in one step of the fine-tuning
MATRICES = 16  # images whose attention matrices are held at once, in float64


class SearchOptions(TypedDict, total=False):
    """How the sets of positions are searched.

    Attributes:
        tolerance: Largest reconstruction error of a block, at least 0.
        step: Positions by which a candidate grows.
        epochs: Fine-tuning of a block a candidate; 0 is an approximation that changes no weight.
        learning_rate: Of that fine-tuning.
        criterion: Which error is held against the tolerance: "mean" squared, or "relative" to the features' square sum.
        seed: Of the order of the fine-tuning's steps.
    """

    tolerance: float
    step: int
    epochs: int
    learning_rate: float
    criterion: Literal["mean", "relative"]
    seed: int


SETTINGS: SearchOptions = {
    "tolerance": 0.01,
    "step": 10,
    "epochs": 3,
    "learning_rate": 1e-5,
    "criterion": "mean",
    "seed": 0,
}


@dataclass(frozen=True)
class Candidate:
    """One set that was tried for a block."""

    patches: int  # patch positions in it
    # squared Frobenius distance of what the next block makes of it from what the dense block made, summed over all
    # images
    raw: float
    mean: float  # the same a number: the mean squared error
    relative: float  # the same as a share of the dense features' own square sum


@dataclass(frozen=True, eq=False, repr=False)
class SlimmedBlock(Brief):
    """What was found for one block: positions entering and kept, the sets tried (the last was taken), and the score.

    ``score`` is the impact of each patch position, float64 [P], mean over images.
    """

    block: int
    entering: int
    kept: int
    candidates: tuple[Candidate, ...]
    score: Tensor


@dataclass(frozen=True, repr=False)
class Slimming(Brief):
    """The report of a search; printed, it is a table.

    Attributes:
        keep: The sets, rising positions, one list a block but the last.
        blocks: Block by block.
        images: Images looked at.
        criterion: Which of a candidate's errors was held against the tolerance.
        tolerance: The largest error allowed.
        distance: Of the slimmed model's logits from the dense one's on these images, ||a - b||^2 / ||b||^2. Errors of
            the search compare one pair of blocks at a time; this one compares the ends.
        agreement: Share of these images whose predicted class is the dense model's; nan without a classifier.
    """

    keep: list[list[int]]
    blocks: tuple[SlimmedBlock, ...]
    images: int
    criterion: str
    tolerance: float
    distance: float = math.nan
    agreement: float = math.nan

    def __str__(self) -> str:
        lines = ["block  entering  kept  tried  mean error  relative  raw"]
        for b in self.blocks:
            last = b.candidates[-1]
            lines.append(
                f"{b.block:5d}  {b.entering:8d}  {b.kept:4d}  {len(b.candidates):5d}  {last.mean:10.3e}  "
                f"{last.relative:8.2e}  {last.raw:.3e}"
            )
        lines.append(
            f"{self.images} images, {self.criterion} error up to {self.tolerance:g}; logits differ by "
            f"{self.distance:.2e} of their square sum, {self.agreement:.1%} of the predictions agree"
        )
        return "\n".join(lines)


def impact(attention: Sequence[Tensor], entering: Tensor) -> Tensor:
    """How much each token of a block reaches the model's output (Patch Slimming's Theorem 1; second-hand), [B, n].

    s_i = mean over head paths of ||A[:, i] U[i, :]||_F^2, with U = P |Z| the magnitude that row i of this block carries
    and A the product of the later blocks' attention, their rows restricted to what they keep. It is an outer product,
    so the column energy of A times the row energy of U. The paper leaves open which head follows which; here (a choice
    of ours) all paths count, by the recursion G <- mean_h P_h^T G P_h from the last block down, starting at G = I over
    the last block's outputs; the column energy of A is then diag(G).

    ``attention`` is this block's [B, H, n, n], then each later block's [B, H, m, n]: rows are the tokens it computes,
    columns those that enter it. ``entering`` is the residual stream entering this block, [B, n, D].
    """
    # A mean instead of a sum over heads scales all scores of a block alike.
    reach: Tensor | None = None  # G [B, n, n] over the tokens entering the block looked at
    column = entering.new_zeros(())
    for i in range(len(attention) - 1, 0, -1):
        p = attention[i].double()
        carried = p if reach is None else reach[:, None] @ p
        if i == 1:  # of the first of them only the diagonal is asked for
            column = (p * carried).sum(2).mean(1)
        else:
            reach = (p.transpose(2, 3) @ carried).mean(1)
    row = (attention[0].double() @ entering.double().abs()[:, None]).square().sum(3).mean(1)
    return column * row


def _learnable(block: Any) -> set[str]:
    return {name for name, parameter in block.named_parameters() if parameter.requires_grad}


class Search:
    """The top-down search (Patch Slimming's Algorithm 1; second-hand) over one model, which it leaves as it is.

    From the last block but one to the first: start with the set of the block after; rank the other positions by
    :func:`impact`, later blocks slimmed, earlier ones dense; add the best of them, ``step`` more a time, until this
    block and the next, from the dense model's input, reproduce the dense model's features after the next, on the
    positions computed there, up to ``tolerance``. For each candidate the block alone is fine-tuned a little.

    What the paper is not known to say, and is a choice of ours: the error held against the tolerance is the mean
    squared one (or the relative one); a block's weights carry over from candidate to candidate; AdamW without decay;
    everything runs in eval mode and in at least float32; a block that keeps every position gets its dense weights back;
    parameters that are frozen (``requires_grad=False``) stay as they are, and a block without any other is not tuned.
    ``settings`` are the pruner's own.
    """

    def __init__(
        self,
        model: ViT,
        anatomy: Anatomy,
        images: Sequence[Tensor],
        verbose: bool = False,
        **settings: Unpack[SearchOptions],
    ) -> None:
        self.model, self.anatomy, self.verbose = model, anatomy, verbose
        self.settings: SearchOptions = {**SETTINGS, **settings}
        self.generator = torch.Generator().manual_seed(self.settings["seed"])
        weight = next(model.parameters())
        blocks: Any = model.blocks
        if weight.dtype in (torch.float16, torch.bfloat16):  # steps of 1e-5 would be lost
            blocks = copy.deepcopy(blocks).float()
        self.teacher: Any = blocks
        self.student: Any = copy.deepcopy(blocks).eval().requires_grad_(False)
        # What is frozen is not ours to move: pretrained weights under an adapter, blocks that a user holds still.
        self.moving = [_learnable(block) for block in model.blocks]
        patches = anatomy.grid[0] * anatomy.grid[1]
        self.kept = torch.ones(anatomy.depth, patches, dtype=torch.bool)
        # The head reads prefix tokens alone, so that the last block computes no patch.
        self.kept[-1] = False
        self.embedded: list[Tensor] = []
        for batch in images:
            for part in batch.split(CHUNK):
                check_images(anatomy, part, values=True)
                x, grid = embed(model, part.to(weight.device, weight.dtype))
                if grid != anatomy.grid:
                    raise PrunexError(
                        f"calibration images have {grid[0]} x {grid[1]} patches, the model {anatomy.grid[0]} x "
                        f"{anatomy.grid[1]}: give images of the model's own size, {anatomy.image}"
                    )
                self.embedded.append(promoted(x))

    def run(self) -> Slimming:
        """Search all blocks; the fine-tuned ones are then in ``student``, their sets in ``kept``."""
        slimmed = []
        with tqdm(total=self.anatomy.depth - 1, desc="slimming", unit="block", disable=not self.verbose) as bar:
            for block in range(self.anatomy.depth - 2, -1, -1):
                slimmed.append(self._block(block))
                bar.set_postfix(block=block, kept=slimmed[-1].kept, error=slimmed[-1].candidates[-1].mean)
                bar.update()
        entering = [self.kept.shape[1], *(b.kept for b in reversed(slimmed))]
        blocks = tuple(replace(b, entering=n) for b, n in zip(reversed(slimmed), entering, strict=False))
        keep = [mask.nonzero().flatten().tolist() for mask in self.kept[:-1]]
        return Slimming(
            keep, blocks, sum(map(len, self.embedded)), self.settings["criterion"], self.settings["tolerance"]
        )

    def _block(self, block: int) -> SlimmedBlock:
        inputs, wanted, score = self._look(block)
        base = self.kept[block + 1]
        order = score.masked_fill(base, -math.inf).argsort(descending=True, stable=True)[: int((~base).sum())]
        tried: list[Candidate] = []
        # The last candidate has every position, so that some candidate is always taken.
        for added in [*range(0, len(order), self.settings["step"]), len(order)]:
            self.kept[block] = base.clone().index_fill(0, order[:added], True)
            # Nothing is left out, so nothing need be made up for.
            if self.kept[block].all():
                self.student[block].load_state_dict(self.teacher[block].state_dict())
            elif self.settings["epochs"] and self.moving[block]:
                self._tune(block, inputs, wanted)
            tried.append(self._error(block, inputs, wanted))
            if getattr(tried[-1], self.settings["criterion"]) <= self.settings["tolerance"]:
                break
        kept = int(self.kept[block].sum())
        return SlimmedBlock(block, self.kept.shape[1], kept, tuple(tried), score)

    @torch.no_grad()
    def _look(self, block: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The dense features entering a block and those after the next one that count, and the impact [P]."""
        inputs, wanted = [], []
        total = torch.zeros(self.kept.shape[1], dtype=torch.float64)
        for x in self.embedded:
            for earlier in self.teacher[:block]:
                x, _ = through(earlier, x, self.anatomy)
            inputs.append(x)
            after, _ = through(self.teacher[block], x, self.anatomy)
            rows = self._places(self.kept[block + 1])
            wanted.append(through(self.teacher[block + 1], after, self.anatomy, rows)[0])
            for part in x.split(MATRICES):
                total += self._impact(block, part)[:, self.anatomy.prefix :].sum(0).cpu()
        return inputs, wanted, total / sum(map(len, self.embedded))

    def _impact(self, block: int, x: Tensor) -> Tensor:
        """Impact [B, N] of a dense block's outputs, the later blocks slimmed."""
        maps, entering = [], x
        kept = [self.kept[block].clone().fill_(True), *self.kept[block + 1 :]]
        for i, later in enumerate(self.student[block:]):
            queries = None if i == 0 else self._places(kept[i], kept[i - 1])
            x, seen = through(later, x, self.anatomy, queries, Tape(attention=True), block + i)
            maps.append(torch.as_tensor(None if seen is None else seen.attention))
        return impact(maps, entering)

    def _places(self, kept: Tensor, among: Tensor | None = None) -> tuple[int, ...]:
        """Where prefix tokens and some patches are among all tokens, or among prefix tokens and other patches."""
        body = (kept if among is None else kept[among]).nonzero().flatten() + self.anatomy.prefix
        return (*range(self.anatomy.prefix), *body.tolist())

    def _pair(self, block: int, x: Tensor) -> Tensor:
        """A slimmed block and the next one, from the dense input."""
        x, _ = through(self.student[block], x, self.anatomy, self._places(self.kept[block]))
        rows = self._places(self.kept[block + 1], self.kept[block])
        return through(self.student[block + 1], x, self.anatomy, rows)[0]

    def _tune(self, block: int, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        """A little fine-tuning of one block; the next one passes gradients through and gets none."""
        named = self.student[block].named_parameters()
        parameters = [p.requires_grad_(True) for name, p in named if name in self.moving[block]]
        optimizer = torch.optim.AdamW(parameters, self.settings["learning_rate"], weight_decay=0.0)
        with torch.enable_grad():
            for _ in range(self.settings["epochs"]):
                for i in torch.randperm(len(inputs), generator=self.generator).tolist():
                    loss = (self._pair(block, inputs[i]) - wanted[i]).square().sum() / len(inputs[i])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        # Gradients of one block must not wait while others are tuned.
        optimizer.zero_grad()
        self.student[block].requires_grad_(False)

    @torch.no_grad()
    def _error(self, block: int, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Candidate:
        raw = size = count = 0.0
        for x, y in zip(inputs, wanted, strict=True):
            raw += float((self._pair(block, x).double() - y.double()).square().sum())
            size += float(y.double().square().sum())
            count += y.numel()
        return Candidate(int(self.kept[block].sum()), raw, raw / count, raw / max(size, 1e-300))

    @torch.no_grad()
    def install(self) -> None:
        """Give the model the fine-tuned blocks, in place; without fine-tuning nothing is touched."""
        if self.settings["epochs"]:
            for block, tuned, moving in zip(self.model.blocks, self.student, self.moving, strict=True):
                weights = dict(tuned.named_parameters())
                for name, parameter in block.named_parameters():
                    if name in moving:
                        parameter.copy_(weights[name])
