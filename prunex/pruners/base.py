"""What token pruners share: checked options, stages, keep rates and counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from prunex.batches import batches_in, parts
from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.pruners.schedules import Schedule, ScheduleOptions, check_schedule
from prunex.registry import options_of
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.decisions import Decision
from prunex.vit.state import TokenState
from prunex.vit.trace import TokenTrace
from prunex.vit.turns import Turn


@dataclass(eq=False, repr=False)
class Forward(Brief):
    """What the losses of one training forward are made from."""

    images: Tensor  # [B, C, H, W], what the model was given
    tokens: Tensor  # [B, prefix + n, D] after the final norm
    policy: Tensor | None  # [B, prefix + n] or None
    anatomy: Anatomy  # of the model
    masks: list[Tensor] = field(default_factory=list)  # differentiable policies [B, n], one a stage
    logits: Tensor | None = None  # [B, classes], or None when the user's own head read the features
    trace: TokenTrace | None = None  # what the forward did, its scores still part of the graph
    model: ViT | None = None  # the ViT itself, for losses that need another forward
    labels: Tensor | None = None  # int64 [B], the images' classes where they are known


class TokenPruner(nn.Module):
    """A small module that decides which patch tokens continue; it never touches them itself.

    A method says in :meth:`plan` where it decides, and in :meth:`decide` what. ``keep_ratio`` and ``stages`` mean the
    same for all that have them: the share of patch tokens kept at each of these blocks.

    Args:
        anatomy: Of the model to be pruned.
        keep_ratio: Share of patch tokens kept at a stage, in (0, 1]; or one share a stage. None: the method counts
            otherwise and has no such option; ``rates`` is empty.
        stages: Rising 0-based block indices. None: three, at a quarter, half and three quarters of the depth
            ((3, 6, 9) of 12).
        **schedule: How the rates fall while training, see :class:`prunex.pruners.schedules.ScheduleOptions`. A method
            that decides by :meth:`rate` offers them by a ``**schedule`` of its own, which it hands on.
    """

    name = ""
    trains_masked = False  # whether training keeps dropped tokens in their slots under a policy
    freezes_model = False  # whether it learns while the model's weights stay as they are
    shards = True  # whether its parameters may be cut up: looked at in forwards and losses alone, none a single number
    count = "fixed"  # or "adaptive": images keep as many tokens as they ask for
    # What its choice depends on: each image; the calibration alone, so that all images keep the same positions; or
    # the slots that tokens lie in, so that absent patches must keep theirs.
    chooses: Literal["image", "positions", "slots"] = "image"
    lr: float | None = None  # the peak rate at which Adam teaches what it brings; None: it brings nothing that learns
    handed_on: ClassVar[Mapping[str, object]] = Schedule().options  # what **schedule stands for

    def __init__(
        self,
        anatomy: Anatomy,
        keep_ratio: float | Sequence[float] | None = 0.7,
        stages: Sequence[int] | None = None,
        **schedule: Unpack[ScheduleOptions],
    ) -> None:
        super().__init__()
        self.stages = check_stages(stages, anatomy.depth)
        # None of a method that has the option is a user's mistake, which the check of rates tells.
        none = keep_ratio is None and "keep_ratio" not in accepted(type(self))
        self.rates: tuple[float, ...] = () if none else check_rates(keep_ratio, len(self.stages))
        self.progress = 1.0
        self.options: dict[str, Any] = {"stages": list(self.stages)}
        if keep_ratio is not None:
            given = list(self.rates) if isinstance(keep_ratio, Sequence) else float(keep_ratio)
            self.options = {"keep_ratio": given, **self.options}
        self.shrink = check_schedule(**schedule)
        if "schedule" in accepted(type(self)):
            self.options |= self.shrink.options

    @classmethod
    def knob(cls, anatomy: Anatomy, shares: Sequence[float]) -> dict[str, Any]:
        """The options that a budget sets, from one share in (0, 1] a stage (a single one: for all); 1 prunes nothing.

        Cost must not fall as a share rises. A method with nothing to turn may offer ``settings(anatomy)``, a
        list of options worth choosing between: whoever asks for a budget is told their cost.
        """
        return {"keep_ratio": shares[0] if len(set(shares)) == 1 else list(shares)}

    def plan(self) -> list[Turn]:
        """Where it decides in the forward that begins now; nowhere, unless overridden."""
        return []

    def decide(self, turn: Turn, state: TokenState) -> Decision | None:
        """Decide what goes on; None leaves all as it is. Asked at the turns of its plan alone."""
        return None

    def rate(self, stage: int) -> float:
        """The keep rate in force at a stage, at the present progress."""
        return self.shrink.rate(self.rates[stage], self.progress)

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        """Weighted auxiliary losses (scalars) of one training forward."""
        return {}

    def counts(self, patches: int) -> list[int]:
        """Patch tokens left after each stage at inference, for ``patches`` to start with."""
        raise PrunexError(f"{self.name} does not fix its token counts")

    def macs(self, entering: int, inner: int = 0) -> int:
        """Multiply-adds of one decision for ``entering`` patch tokens of one image, heads ``inner`` wide together."""
        return 0

    def alter(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy of the pruned forward: whether prefix tokens enter (all or none), and what the head reads."""
        return anatomy

    def prepare(self, model: ViT) -> None:
        """Called once with the dense model, before anything is attached to it."""

    @property
    def needs_calibration(self) -> bool:
        """Whether it has to see images before it can decide anything, and has not yet."""
        return False

    def calibrate(self, model: ViT, images: Any, **options: Any) -> Any:
        """Learn from images what it decides by; see the methods that do."""
        raise PrunexError(f"{self.name} needs no calibration: it decides image by image")

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The method's own parameters under this module's names, from its official code's state dict."""
        return {}

    def inference_only(self) -> None:
        """Drop what only training needs. The rates stay those in force now, so that logits stay as they were."""
        if self.shrink == Schedule():
            return
        self.rates = tuple(self.rate(s) for s in range(len(self.stages)))
        self.shrink = Schedule()
        # As short as a user would write it.
        even = len(set(self.rates)) == 1
        self.options |= {"keep_ratio": self.rates[0] if even else list(self.rates), **self.shrink.options}


def accepted(make: Callable[..., Any]) -> list[str]:
    """Names of the options that a pruner's constructor takes, those that it hands on as ``**schedule`` included.

    >>> from prunex.pruners import EViT
    >>> accepted(EViT)[:3], accepted(EViT)[-3:]
    (['keep_ratio', 'stages', 'fuse'], ['schedule', 'shrink_start', 'shrink_length'])
    """
    return list(options_of(make))


def calibration_images(source: Any, limit: int | None = None) -> list[Tensor]:
    """The first ``limit`` images of a loader, or of an iterable of batches, or of one tensor, in batches."""
    taken: list[Tensor] = []
    count = 0
    for batch in batches_in(source):
        taken.append(parts(batch).need("images", "calibration")[: None if limit is None else limit - count])
        count += len(taken[-1])
        if limit is not None and count >= limit:
            break
    if count == 0:
        raise PrunexError("calibration got no images: give a loader with at least one")
    return taken


def ranked(score: Tensor, k: int, present: Tensor | None) -> Tensor:
    """Positions of the k best tokens that are there, the best first: int64 [B, k]; of equal ones the first."""
    if present is not None:
        score = score.masked_fill(present <= 0, float("-inf"))
    if torch.compiler.is_exporting():  # ONNX has no stable sort; its TopK breaks ties so too
        return score.topk(k, dim=1).indices
    return score.sort(dim=1, descending=True, stable=True).indices[:, :k]


def top(score: Tensor, k: int, present: Tensor | None) -> Tensor:
    """Positions of the k best tokens that are there, in rising order: int64 [B, k]; of equal ones the first."""
    return ranked(score, k, present).sort(1).values


def row_macs(anatomy: Anatomy, entering: int, inner: int) -> int:
    """Multiply-adds of the rows that rank patches: one of the class token, without it one a pooled token."""
    asking = 1 if anatomy.rankers else entering + anatomy.prefix * anatomy.pool_prefix
    return asking * (entering + anatomy.prefix) * inner


def shares(values: Tensor, present: Tensor | None) -> Tensor:
    """Values [B, n], at least 0, as shares of their sum over the tokens that are there; 0 for others, or all at 0.

    >>> shares(torch.tensor([[1.0, 5.0, 3.0], [0.0, 7.0, 0.0]]), torch.tensor([[1, 0, 1], [1, 0, 1]])).tolist()
    [[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]]
    """
    if present is not None:
        values = values.masked_fill(present <= 0, 0)
    total = values.sum(1, keepdim=True)
    # Not by next to nothing, whose gradient would be infinite.
    return values / torch.where(total > 0, total, 1)


def ceil_share(rate: float, n: int) -> int:
    """ceil(rate * n), at least 1, not fooled by the last bit of a float product (0.55 * 100 is 55)."""
    return max(1, math.ceil(rate * n - 1e-9))


def floor_share(rate: float, n: int) -> int:
    """floor(rate * n), at least 1, not fooled by the last bit of a float product (0.29 * 100 is 29)."""
    return max(1, math.floor(rate * n + 1e-9))


def check_rates(keep_ratio: Any, stages: int) -> tuple[float, ...]:
    """One keep rate a stage, each in (0, 1]; anything else is refused."""
    many = isinstance(keep_ratio, Sequence) and not isinstance(keep_ratio, str)
    rates = list(keep_ratio) if many else [keep_ratio] * stages
    for r in rates:
        if isinstance(r, bool) or not isinstance(r, int | float) or not 0 < r <= 1:
            raise PrunexError(f"keep_ratio={keep_ratio!r} is not allowed: give a number in (0, 1], such as 0.7")
    if len(rates) != stages:
        raise PrunexError(
            f"keep_ratio={keep_ratio!r} has {len(rates)} values for {stages} stages: give one, or one a stage"
        )
    return tuple(float(r) for r in rates)


def check_stages(stages: Any, depth: int) -> tuple[int, ...]:
    """Rising block indices within the depth; anything else is refused."""
    if stages is None:
        # A set, since in a model of few blocks two quarters fall on one block.
        return tuple(sorted({min(depth - 1, max(1, depth * i // 4)) for i in (1, 2, 3)}))
    listed = [stages] if isinstance(stages, int) else stages
    good = isinstance(listed, Sequence) and not isinstance(listed, str) and len(listed) > 0
    if not good or any(isinstance(s, bool) or not isinstance(s, int) for s in listed):
        raise PrunexError(f"stages={stages!r} is not allowed: give block indices, such as (3, 6, 9)")
    if any(not 0 <= s < depth for s in listed):
        raise PrunexError(f"stages={tuple(listed)} goes beyond the model's {depth} blocks: allowed are 0..{depth - 1}")
    if any(b <= a for a, b in zip(listed, listed[1:], strict=False)):
        raise PrunexError(f"stages={tuple(listed)} must rise: give each block once, in order")
    return tuple(listed)


def strip_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of an official checkpoint under plain names: ``{"model": ...}`` opened, ``module.`` taken off."""
    if not isinstance(state, Mapping):
        raise PrunexError(
            f"got a {type(state).__name__}: give a state dict, as torch.load(path, weights_only=True) reads"
        )
    # How the authors' training scripts wrap their weights.
    for key in ("model", "state_dict", "model_ema"):
        inner = state.get(key)
        if isinstance(inner, Mapping):
            state = inner
            break
    plain = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not plain:
        raise PrunexError(f"this is no state dict: it holds {', '.join(map(str, list(state)[:5])) or 'nothing'}")
    return plain
