"""Whether training and validation go through what hangs on the model: looked at once, since nothing else would tell."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from prunex.errors import PrunexError
from prunex.handles.base import Handle
from prunex.handles.units import UnitPruning
from prunex.vit.mount import HEAD, mounted
from prunex.vit.sharded import local
from prunex.vit.units import blocks_of


class Runs:
    """Which steps ran the ViT as it is pruned.

    A module may go through the blocks itself, or run a copy, a traced or a functional one: then nothing is pruned. The
    first gradients tell: weights that are trained by another way are refused, of a ViT that took no part one is told.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.steps = 0  # of training
        self.trained = False  # whether one of them ran it
        self.batches = 0  # of the present validation
        self.validated = False
        self._looked = self._warned = False
        self._blocks_moved: bool | None = None  # whether gradients reached the blocks; None while all are frozen
        self._pruner_moved = False  # whether some reached what the pruner learns
        self._name = type(handle.model).__name__
        self._works = f"{handle.method} {handle.does}"
        self._watched = f"{self._name} that {self._works}"

    def begin(self) -> None:
        """A step begins."""
        if self._holder is not None:
            self._holder.ran = False

    @property
    def now(self) -> bool:
        """Whether this step ran the pruned ViT."""
        return bool(getattr(self._holder, "ran", False))

    @property
    def in_vain(self) -> bool:
        """Whether there was training, and none of it ran the pruned ViT."""
        return self.steps > 0 and not self.trained

    @property
    def _holder(self) -> Any:
        return mounted(self.handle.model, self.handle.kind)

    @property
    def _unmarked(self) -> bool:
        """Whether nothing that hangs on the model could tell: units that were taken out have no gates any more."""
        return isinstance(self.handle, UnitPruning) and (self._holder is None or self.handle.removed)

    def end_training_step(self) -> None:
        """Count it."""
        self.steps += 1
        self.trained = self.trained or self.now or self._unmarked

    def end_validation_batch(self) -> None:
        """Count it."""
        self.batches += 1
        self.validated = self.validated or self.now or self._unmarked

    def end_validation(self, trying: bool) -> bool:
        """Whether a validation ran the pruned ViT; warns once where it did not and was no sanity check (``trying``)."""
        ran, missed = self.validated, self.batches > 0 and not self.validated
        self.batches, self.validated = 0, False
        if missed and not trying and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"validation did not run the {self._watched}, but a copy of it, "
                f"or none: its metrics are not those of the model that {self.handle.method} is on"
            )
        return ran

    def saw_gradients(self) -> None:
        """Look where the first gradients went."""
        if self._looked:
            return
        # Blocks alone: a head or a patch embedding may well be trained by another path.
        weights: list[nn.Parameter] = []
        for _, block in blocks_of(self.handle.model):
            weights += [p for p in block.parameters() if p.requires_grad]
        if weights and not self._blocks_moved:
            self._blocks_moved = any(p.grad is not None for p in weights)
        learned = self.handle.learner.parameters()
        self._pruner_moved |= any(p.grad is not None and bool(local(p.grad).any()) for p in learned)

    def look(self) -> None:
        """Before the first step of an optimiser (after it, where the module optimises by hand): is anything pruned?"""
        if self._looked or self.steps == 0:
            return
        self._looked = True
        method = self.handle.method
        # Weights that move without the pruned forward are trained wrongly; ones that do not may have their turn later.
        if not self.trained and self._blocks_moved:
            # A head that explains itself reads in the classifier's place, a pruner on the way there.
            how = (
                "pools tokens or calls the classifier itself, or runs a traced or functional copy; call the model or "
                "its forward_head, or give tokens to prunex.attached(self, head=True).from_tokens"
                if self.handle.kind == HEAD
                else "goes through the blocks itself, or runs a traced or functional copy; call the model, its "
                "forward_features or its forward_intermediates"
            )
            raise PrunexError(
                f"the training step trains the {self._name} without the forward that {self._works}: it {how}"
            )
        if not self.trained or (self._unmarked and self._blocks_moved is False):
            rank_zero_warn(
                f"the first training step did not run the {self._watched}, but a copy of it, "
                f"or none: until a step calls that one, {method} has no part in the training"
            )
        elif not self._pruner_moved and any(p.requires_grad for p in self.handle.learner.parameters()):
            rank_zero_warn(
                f"no gradient reached the parameters of {method} in the first training step: it learns nothing where "
                "the ViT runs under no_grad(), or where the loss does not depend on it"
            )
