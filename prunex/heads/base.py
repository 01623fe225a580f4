"""What every head is: it reads final tokens in place of a classifier, and says what its answer is made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.heads.final_tokens import FinalTokens
from prunex.vit.anatomy import Anatomy, ViT
from prunex.vit.trace import TokenTrace


@dataclass(eq=False, repr=False)
class Reading(Brief):
    """What a head makes of final tokens; each head's own has more.

    Attributes:
        logits: [B, classes].
        tokens: What was read.
    """

    in_repr: ClassVar[tuple[str, ...]] = ("logits",)

    logits: Tensor
    tokens: FinalTokens


@dataclass(eq=False, repr=False)
class Evidence(Brief):
    """What a decision is made of; each head's own says more.

    Attributes:
        target: int64 [B], the class that it is evidence for.
        logits: [B, classes].
        row: float [B, prefix + P], the evidence by token, lifted to all patches; signed.
        trace: What the forward did to the patches.
    """

    in_repr: ClassVar[tuple[str, ...]] = ("target", "logits")

    target: Tensor
    logits: Tensor
    row: Tensor
    trace: TokenTrace

    @property
    def maps(self) -> Tensor:
        """The evidence on the patch grid, float [B, gh, gw]; what lies at prefix tokens is left out."""
        return self.row[:, self.trace.prefix :].unflatten(1, self.trace.grid)

    def info(self) -> dict[str, Tensor]:
        """The parts by name, tensors whose first dimension is B."""
        return {}


class TokenHead(nn.Module):
    """Base of the heads that explain themselves.

    A head says by class attributes what it needs, makes a :class:`Reading` of :class:`FinalTokens`, losses of a reading
    and evidence of a reading.

    Args:
        anatomy: Of the model that it is a head for.

    Attributes:
        name: As it is registered.
        options: Those in force, in plain values.
        progress: Share of training done, 0..1, for losses that warm up; 1 unless set.
        lr: The learning rate of what is new among pretrained weights; optimisers that step by groups' rates give it so
            much where their own is lower (the rate that works for the Concept Transformer's authors).
        trains_masked: As pruners say it: that it is learned in training.
        reads_patches: Whether it reads patch tokens, which then may not be left out of the last block.
        uses_classifier: Whether timm's own classifier has a part in it; else that one rests while the head is there.
    """

    name: ClassVar[str] = ""
    uses_classifier: ClassVar[bool] = False
    lr: ClassVar[float | None] = 4e-4
    trains_masked: ClassVar[bool] = True
    reads_patches = True

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        if anatomy.classes == 0:
            raise PrunexError(f"{self.name} needs classes, and this model has num_classes=0: give it a head first")
        self.classes, self.width, self.prefix = anatomy.classes, anatomy.width, anatomy.prefix
        self.options: dict[str, Any] = {}
        self.progress = 1.0
        self.forced: dict[str, float] = {}  # concepts whose attention is set by hand

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model whose forward, as a pruner may have altered it, does not give what this head reads."""

    def prepare(self, model: ViT) -> None:
        """Take from the model what it begins with, before it is mounted; the model stays as it is."""

    def check_pruned(self) -> None:
        """Refuse a token pruner beside this head, where it needs every patch."""

    @abstractmethod
    def forward(self, tokens: FinalTokens, classifier: Tensor | None) -> Reading:
        """Read tokens; ``classifier`` is what timm's own classifier gives, [B, classes], where that has a part."""

    def losses(
        self,
        reading: Reading,
        labels: Tensor | None = None,
        concepts: Tensor | None = None,
        spatial: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted auxiliary losses of one training forward, scalars by name."""
        return {}

    def losses_between(self, readings: Sequence[Any]) -> dict[str, Tensor]:
        """Weighted losses that compare the forwards of one step, such as two views of the same images."""
        return {}

    @abstractmethod
    def evidence(self, reading: Any, target: Tensor, trace: TokenTrace) -> Evidence:
        """What a reading's score of classes int64 [B] is made of."""

    @abstractmethod
    def macs(self, patches: int) -> int:
        """Multiply-adds for one image with so many patch tokens left."""

    def official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' entries under this module's names; refused where a head has no public code."""
        raise PrunexError(f"{self.name} has no official weights: train it, or load a state_dict of prunex")

    def official_names(self) -> set[str]:
        """Which of its own entries an official checkpoint must hold."""
        return set(self.state_dict())

    def force(self, values: Mapping[str, float]) -> None:
        """Set attention to concepts by hand; refused where a head has none."""
        raise PrunexError(f"{self.name} has no concepts to intervene in: concept_transformer has")

    def tree(self) -> Any:
        """The tree; refused where a head has none."""
        raise PrunexError(f"{self.name} has no tree: vit_net has one")

    def controls(self, reading: Any, labels: Tensor) -> dict[str, float]:
        """Accuracies with and without parts of the head, by name; refused where a head has no such controls."""
        raise PrunexError(f"{self.name} has no controls: vit_net has them")

    def outputs(self, reading: Any) -> dict[str, Tensor]:
        """What an exported graph may give beside logits, by name."""
        return {}


def on_grid(rows: Tensor, trace: TokenTrace) -> Tensor:
    """Values by patch token, [B, R, n], divided among the patches that each stands for: [B, R, gh, gw]."""
    lifted = trace.lift(F.pad(rows, (trace.prefix, 0)))
    return lifted[..., trace.prefix :].unflatten(-1, trace.grid)


def squared_distance(rows: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """The mean over valid rows of the squared distance between rows and targets, both [..., C]; 0 without any."""
    # Off the graph where invalid: NaN times zero is NaN in a backward pass.
    gap = torch.where(valid.unsqueeze(-1), rows - targets, 0)
    return gap.square().sum(-1).sum() / valid.sum().clamp(min=1)
