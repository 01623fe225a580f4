"""What token pruners share: checked options, stages, keep rates and counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit.anatomy import Anatomy
from prunex.vit.decisions import Drop, Fill, Keep, Mask, TokenState
from prunex.vit.trace import TokenTrace


@dataclass
class Forward:
    """What the losses of one training forward are made from.

    Attributes:
        images: [B, C, H, W], what the model was given.
        tokens: [B, prefix + n, D] after the final norm.
        policy: [B, prefix + n] or None.
        masks: Differentiable policies [B, n], one a stage.
        logits: [B, classes], or None when the user's own head read the features.
        anatomy: Of the model.
        trace: What the forward did, its scores still part of the graph.
        model: The ViT itself, for losses that need another forward.
        labels: int64 [B], the images' classes where they are known.
    """

    images: Tensor
    tokens: Tensor
    policy: Tensor | None
    anatomy: Anatomy
    masks: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None
    trace: TokenTrace | None = None
    model: VisionTransformer | None = None
    labels: Tensor | None = None


class TokenPruner(nn.Module):
    """A small module that decides which patch tokens continue; it never touches them itself.

    Subclasses answer :meth:`before` a block or :meth:`between` its halves. ``keep_ratio`` and ``stages`` mean the same
    for all: the share of patch tokens kept at each of these blocks.

    Args:
        anatomy: Of the model to be pruned.
        keep_ratio: Share of patch tokens kept at a stage, in (0, 1]; or one share a stage.
        stages: Rising 0-based block indices. None: three, at a quarter, half and three quarters of the depth
            ((3, 6, 9) of 12).
    """

    name = ""
    inside = False  # whether tokens leave between a block's attention and its MLP instead of before the block
    trains_masked = False  # whether training keeps dropped tokens in their slots under a policy
    read_once: frozenset[str] = frozenset()  # options that only attaching reads; they are no part of ``options``
    count = "fixed"  # or "adaptive": images keep as many tokens as they ask for
    curriculum = False  # whether training moves only some parameters at a time, see resting()

    def __init__(
        self, anatomy: Anatomy, keep_ratio: float | Sequence[float] = 0.7, stages: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.stages = check_stages(stages, anatomy.depth)
        self.rates = check_rates(keep_ratio, len(self.stages))
        self.progress = 1.0
        self.options: dict[str, Any] = {
            "keep_ratio": list(self.rates) if isinstance(keep_ratio, Sequence) else float(keep_ratio),
            "stages": list(self.stages),
        }

    def rows(self) -> frozenset[int]:
        """Blocks whose read-out attention row is needed between the halves."""
        return frozenset()

    def acts_between(self, block: int) -> bool:
        """Whether :meth:`between` may decide something at this block."""
        return block in self.rows()

    def before(self, block: int, state: TokenState) -> Keep | Mask | Drop | Fill | None:
        """Decide before a block; None leaves all as it is."""
        return None

    def between(self, block: int, state: TokenState) -> Keep | Mask | Drop | None:
        """Decide between a block's attention and its MLP; None leaves all as it is."""
        return None

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        """Weighted auxiliary losses (scalars) of one training forward."""
        return {}

    def prepare(self, model: VisionTransformer) -> None:
        """Called once with the dense model, before anything is attached to it."""

    def counts(self, patches: int) -> list[int]:
        """Patch tokens left after each stage at inference, for ``patches`` to start with."""
        raise PrunexError(f"{self.name} does not fix its token counts")

    def macs(self, entering: int) -> int:
        """Multiply-adds of the decision itself at one stage, for ``entering`` patch tokens of one image."""
        return 0

    def ahead(self) -> int | None:
        """How many blocks are run on all patches only to decide; None where nothing is run twice."""
        return None

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The method's own parameters under this module's names, from its official code's state dict."""
        return {}

    def expect(self, shares: Sequence[float]) -> None:
        """Be told which share of the patches images kept on average after each stage."""

    def fix(self) -> None:
        """Turn to counts that are the same for all images."""

    def resting(self, model: VisionTransformer) -> list[nn.Parameter]:
        """Parameters of the model that training shall not move at the present progress (of a curriculum)."""
        return []

    def inference_only(self) -> None:
        """Drop what only training needs."""


def top(score: Tensor, k: int, present: Tensor | None) -> Tensor:
    """Positions of the k best tokens that are there, in rising order: int64 [B, k]."""
    if present is not None:
        score = score.masked_fill(present <= 0, float("-inf"))
    return score.topk(k, dim=1, sorted=False).indices.sort(1).values


def ceil_share(rate: float, n: int) -> int:
    """ceil(rate * n), at least 1, not fooled by the last bit of a float product (0.55 * 100 is 55)."""
    return max(1, math.ceil(rate * n - 1e-9))


def floor_share(rate: float, n: int) -> int:
    """floor(rate * n), at least 1, not fooled by the last bit of a float product (0.29 * 100 is 29)."""
    return max(1, math.floor(rate * n + 1e-9))


def check_rates(keep_ratio: Any, stages: int) -> tuple[float, ...]:
    """One keep rate a stage, each in (0, 1].

    Raises:
        PrunexError: For anything else.
    """
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
    """Rising block indices within the depth.

    Raises:
        PrunexError: For anything else.
    """
    if stages is None:
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
    """Tensors of an official checkpoint under plain names: ``{"model": ...}`` opened, ``module.`` taken off.

    Raises:
        PrunexError: When it holds no tensors.
    """
    if not isinstance(state, Mapping):
        raise PrunexError(
            f"got a {type(state).__name__}: give a state dict, as torch.load(path, weights_only=True) reads"
        )
    for key in ("model", "state_dict", "model_ema"):
        inner = state.get(key)
        if isinstance(inner, Mapping):
            state = inner
            break
    plain = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not plain:
        raise PrunexError(f"this is no state dict: it holds {', '.join(map(str, list(state)[:5])) or 'nothing'}")
    return plain
