"""MaskPruning: find out which heads and MLP channels a ViT needs while it is fine-tuned, and take the others out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

import prunex
from prunex.batches import Parts, parts
from prunex.callbacks.alone import add_up
from prunex.callbacks.averaging import SWA, Copies, averaging, callbacks_of
from prunex.callbacks.participant import Participant, options_of, progress
from prunex.callbacks.token_pruning import TokenPruning, move
from prunex.callbacks.training_batches import training_batches
from prunex.checks import check_budget, check_flag, check_number, check_whole
from prunex.errors import PrunexError
from prunex.handles.units import UnitPruning, schedule_done
from prunex.units.base import UnitPruner
from prunex.units.batches import entering
from prunex.units.correction import Cut, check_biases, check_correct, make_up, note
from prunex.units.xpruner import XPruner
from prunex.vit.sharded import check_gathered, is_sharded, named
from prunex.vit.surroundings import check_own_classes

LOOKING = ("images", "labels")  # what criteria may need to look at


class MaskPruning(Participant):
    """Attach a unit pruner in ``setup``, let it learn, choose and remove units, and fine-tune what is left.

    ``xpruner`` goes through its stages by the training's progress: while masks are learned the ViT's weights stand
    still, while thresholds are learned they train along, and from then on the closed units are gone and the rest is
    fine-tuned. Masks and thresholds have optimisers of their own (Adam, no weight decay), and the multiplier ascends
    after each step. The other criteria (``magnitude``, ``taylor``, ``relevance``, ``random``) look at what
    enters the ViT in the first training batches when training has come to ``start`` and remove units at once.

    What is validated is the model that would be exported: dense while masks are learned (they see the labels), with
    hard gates while thresholds are, narrow afterwards. Units are really removed, in the running training, where one
    process trains: the optimisers' states are cut to the same units. With several processes, or beside an average of
    the weights that somebody keeps (which would not follow), the gates stay hard to the end, which computes the same;
    :func:`prunex.slim` and ``SlimExport`` take the units out.

    With :class:`TokenPruning` in the same Trainer ``budget`` is what the model may cost with fewer tokens *and* fewer
    units; TokenPruning's own budget says how much of that tokens save.

    Logged every epoch: ``prunex/loss_*``, ``prunex/units_removed`` (share of the units' multiply-adds, by the gates
    now) and ``prunex/units_target``; in validation ``prunex/gmacs``.

    Args:
        method: "xpruner", or another unit criterion.
        budget: What the slim model may cost: a share of the dense multiply-adds in (0, 1], or "2.4GMACs".
        masks: Fraction of training in which ``xpruner`` learns masks.
        thresholds: Fraction of training in which it learns thresholds, after that; the rest is fine-tuning.
        start: Fraction of training before the other criteria decide.
        options: Further options of the method, such as ``{"round_to": 8}``.
        mask_lr: Adam's learning rate for the masks.
        threshold_lr: Adam's learning rate for the thresholds.
        images: Images that the other criteria, and a correction, look at.
        remove: Whether units leave during training; False keeps hard gates to the end.
        correct: Let the other weights make up for closed units at the moment at which these are chosen: "bias", or
            "refit" (True), see :func:`prunex.slim`. It looks at ``images`` of the first training batches, as they enter
            the ViT.
        model: Dotted path of the ViT in the module, when it holds several.

    Raises:
        PrunexError: At once for numbers out of range or fractions that leave nothing for fine-tuning; in ``setup`` for
            an unknown option, a budget out of reach, no ViT or several, manual optimisation or
            "16-mixed" precision with ``xpruner``; when training starts without an end, with an optimiser whose
            memory cannot be cut, or with layers that no correction can be written to (adapted, or without a bias).

    >>> from prunex.callbacks import MaskPruning
    >>> MaskPruning("xpruner", budget=0.5, options={"round_to": 8}).budget
    0.5
    """

    which: ClassVar[dict[str, bool]] = {"units": True}
    entry, hparam = "units", "unit_pruning"
    budget: float | str
    pruning: UnitPruning

    def __init__(
        self,
        method: str = "xpruner",
        budget: float | str = 0.5,
        masks: float = 0.25,
        thresholds: float = 0.25,
        start: float = 0.0,
        options: dict[str, Any] | None = None,
        mask_lr: float = 0.01,
        threshold_lr: float = 0.02,
        images: int = 512,
        remove: bool = True,
        model: str | None = None,
        correct: bool | str | None = None,
    ) -> None:
        super().__init__()
        registered = prunex.registry.lookup("pruner", method)
        make: Any = registered.make
        if not issubclass(make, UnitPruner):
            raise PrunexError(
                f"{method} prunes tokens: give it to TokenPruning; MaskPruning takes xpruner, taylor, ..."
            )
        check_budget(budget)
        self.method, self.budget = method, budget
        self.options = options_of(registered, options)
        self.masks, self.thresholds = check_number("masks", masks, 0, 1), check_number("thresholds", thresholds, 0, 1)
        if self.masks + self.thresholds > 1:
            raise PrunexError(
                f"masks={masks!r} and thresholds={thresholds!r} are more than the whole training: give fractions that "
                "leave something for fine-tuning, such as 0.25 and 0.25"
            )
        self.start = check_number("start", start, 0, 1)
        self.mask_lr = check_number("mask_lr", mask_lr, 0)
        self.threshold_lr = check_number("threshold_lr", threshold_lr, 0)
        self.images = check_whole("images", images, 1)
        self.remove = check_flag("remove", remove)
        self.model = model
        self.correct = check_correct(correct)
        self._learns = bool(make.trains)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._saved: dict[str, Any] = {}  # their states in a checkpoint, until they are there
        self._resting: set[str] = set()  # names of the ViT's own weights, while they stand still
        self._begun = False
        self._copies: Copies | None = None
        self._stays = False  # whether closed units stay in the model to the end

    def _check_training(self, trainer: Trainer, module: LightningModule) -> None:
        average = averaging(trainer) or averaging(trainer, SWA)
        if average is not None:
            raise PrunexError(
                "MaskPruning chooses and removes units while training, which the copy of the model in "
                f"{type(average).__name__} does not follow: prune first, and average while fine-tuning the slim model"
            )
        if self._learns and not module.automatic_optimization:
            raise PrunexError(
                f"{self.method} brings losses of its own, and this module optimises by hand: use its stages by "
                "hand (prunex.attach), or taylor"
            )
        if self._learns and str(trainer.precision) == "16-mixed":
            raise PrunexError(
                f"precision='16-mixed' scales gradients, which {self.method}'s own optimisers do not know: use "
                "'bf16-mixed' or '32-true'"
            )

    @property
    def _xpruner(self) -> XPruner | None:
        pruner = self.pruning.pruner
        return pruner if isinstance(pruner, XPruner) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the optimisers of masks and thresholds, or take a checkpoint's state over."""
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            raise PrunexError(
                "MaskPruning's stages are fractions of the training, and this one has no end: give max_epochs"
            )
        allowed = self.pruning.budget()
        # DDP's gradient buckets hold the parameters as they are when training begins.
        self._stays = not self.remove or trainer.world_size > 1 or is_sharded(pl_module)
        if not self._stays and not self.pruning.removed:
            self.pruning.check_removable(trainer.optimizers)
            self._copies = Copies(trainer, pl_module, self.pruning.model)
        if self.correct is not None and not self.pruning.decided:
            check_gathered(
                pl_module,
                f"correct={self.correct!r} would write them anew: give it to prunex.slim(), on prunex.whole()",
            )
            self.pruning.check_removable()  # what cannot be cut cannot be written to either
            check_biases(self.pruning.model, self.pruning.pruner.branches, self.correct)
        pruner = self._xpruner
        if pruner is not None:
            check_own_classes(pl_module, self.pruning.model, self.method, pruner.classes)
            self._optimizers = {
                "masks": torch.optim.Adam(pruner.masks(), self.mask_lr),
                # Far from the scores the gates' gradient is tiny, and all that counts of it is its sign.
                "thresholds": torch.optim.Adam([pruner.thresholds], self.threshold_lr, eps=1e-20),
            }
            for name, state in self._saved.items():
                self._optimizers[name].load_state_dict(state)
        self._saved = {}
        rank_zero_info(
            f"prunex: {self.method} looks at {len(self.pruning.pruner.branches)} branches of heads and MLP channels; "
            f"budget {self.budget} leaves {allowed / self.pruning.pruner.prunable():.1%} of their multiply-adds"
        )
        self._advance(trainer, pl_module, progress(trainer, 0))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the next stage where its time has come."""
        if not self._begun and not self.pruning.decided and self.pruning.pruner.needs in LOOKING:
            parts(batch).truth("calibration", "the training batch")  # refused now, not when ``start`` has come
        self._begun = True
        self._advance(trainer, pl_module, progress(trainer, batch_idx))

    def _advance(self, trainer: Trainer, module: LightningModule, done: float) -> None:
        """Go through the stages up to a share of the training."""
        pruner, pruning = self._xpruner, self.pruning
        before = pruning.decided
        if pruner is None:
            if not before and done >= self.start:
                self._calibrate_once(trainer, module, partial(self._calibrate, trainer))
        else:
            if pruner.stage == "masks" and done >= self.masks:
                pruner.stage = "thresholds"
                pruning.budget()
            if pruner.stage == "thresholds" and done >= self.masks + self.thresholds:
                searched = pruner.passed()
                pruning.conclude()
                if self.correct is not None:
                    self._calibrate_once(trainer, module, partial(self._make_up, trainer, searched))
            self._rest(trainer, pruner.stage == "masks")
        if pruning.decided and not before:
            branches = pruning.pruner.branches
            kept = [f"{b.key}: {int(pruning.pruner.open(b.key).sum())} of {b.units}" for b in branches]
            rank_zero_info(f"prunex: {self.method} keeps " + ", ".join(kept))
        if pruning.decided and not self._stays and not pruning.removed:
            self._take_out(trainer)

    def _calibrate(self, trainer: Trainer, pruning: UnitPruning, module: LightningModule) -> None:
        """Score the units, on the first training batches where the criterion looks at images."""
        pruner = pruning.pruner
        dense = {b.key: pruner.open(b.key).clone() for b in pruner.branches}
        if pruner.needs not in LOOKING:
            pruning.calibrate()
        else:
            with training_batches(trainer, module, pruning.model) as batches:
                pruning.calibrate(_first(batches, self.images), module, entered=True)
        self._make_up(trainer, dense, pruning, module)

    def _make_up(
        self, trainer: Trainer, before: Mapping[str, Tensor], pruning: UnitPruning, module: LightningModule
    ) -> None:
        """Correct the weights for units that were open before, bool [units] by branch, and are closed now."""
        if self.correct is None:
            return
        model, pruner = pruning.model, pruning.pruner
        chosen = {b.key: pruner.open(b.key).clone() for b in pruner.branches}
        cuts = [Cut(b, chosen[b.key].cpu(), (before[b.key] & ~chosen[b.key]).cpu()) for b in pruner.branches]
        # Looked at with the old units open, since what they gave is made up for, and at the token counts of the end.
        with (
            training_batches(trainer, module, model) as batches,
            schedule_done(model),
            pruner.reopened(before),
        ):
            done = make_up(model, cuts, entering(_first(batches, self.images), model), self.correct, self.images)
        note(model, done)
        rank_zero_info(f"prunex: {done.summary()}\n{done.table()}")

    def _take_out(self, trainer: Trainer) -> None:
        """Remove the closed units, unless something would not follow that was not there when training began."""
        average = None if self._copies is None else self._copies.moving()
        try:
            self.pruning.check_removable(trainer.optimizers)
            reason = average and f"{average} holds a copy of the weights, which does not follow removed units"
        except PrunexError as error:
            reason = str(error)
        if reason:
            self._stays = True
            rank_zero_warn(f"{reason}: units that {self.method} closed stay in the model, masked, until it is slimmed")
        else:
            self.pruning.remove(trainer.optimizers)

    def _rest(self, trainer: Trainer, resting: bool) -> None:
        """Let the ViT's own weights stand still, or move again."""
        if resting == bool(self._resting):
            return
        model = self.pruning.model
        if resting:
            weights = model.named_parameters()
            # What is attached is among the model's parameters too, and goes on learning.
            self._resting = {name for name, p in weights if not name.startswith("prunex") and p.requires_grad}
        # With several processes, or sharded weights, gradients are expected of all parameters.
        if trainer.world_size == 1 and not is_sharded(model):
            move(model, self._resting, not resting)
        if not resting:
            self._resting = set()

    def _training_step(self, module: LightningModule, step: Callable[[], STEP_OUTPUT], batch: Any) -> STEP_OUTPUT:
        pruner, fields = self._xpruner, parts(batch)
        if pruner is None or pruner.stage == "done":
            return self._end_step(module, step(), {}, fields)
        labels = fields.get("labels")
        # Masks have a row a class, so that stage cannot do without labels; thresholds are the same for all classes.
        if pruner.stage == "masks":
            if labels is None:
                raise PrunexError(
                    f"{self.method} learns masks by the images' labels, and this training batch "
                    f"({fields.kind}) holds none: {fields.why('labels')}"
                )
            with self.pruning.labelled(labels):
                output = step()
            _count(module, pruner, labels)
        else:
            output = step()
        images = 1 if labels is None else len(labels)
        if pruner.stage == "thresholds":
            removed = pruner.rate().detach()
            # A number would be copied to the device in every step.
            for name, value in (("removed", removed), ("target", torch.full_like(removed, pruner.target))):
                module.log(f"prunex/units_{name}", value, on_step=False, on_epoch=True, batch_size=images)
        losses = self.pruning.losses(fields.get("images"), labels)
        return self._end_step(module, output, losses, fields, images)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Step masks or thresholds with the gradients that this step has, then let the multiplier ascend."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        pruner = self._xpruner
        # Once a step, whatever optimisers the module has of its own.
        if pruner is None or pruner.stage == "done" or optimizer is not trainer.optimizers[0]:
            return
        learned: list[Tensor] = [pruner.thresholds]
        if pruner.stage == "masks":
            learned = pruner.masks()
            # Of several processes these have gradients, see _rest, and an optimiser would step by them.
            for p in named(self.pruning.model, self._resting):
                p.grad = None
        if trainer.world_size > 1:  # DDP knows parameters alone
            for tensor in learned:
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
                add_up(trainer, tensor.grad)
                tensor.grad /= trainer.world_size
        adam = self._optimizers[pruner.stage]
        adam.step()
        adam.zero_grad(set_to_none=True)
        if pruner.stage == "thresholds":
            pruner.ascend()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training that ends before its fine-tuning began still chooses its units."""
        if progress(trainer, 0) >= 1:
            self._advance(trainer, pl_module, 1.0)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log multiply-adds per image of the model as it would be exported now; beside TokenPruning that does it."""
        shown = self._validated(trainer)
        if shown and not any(isinstance(c, TokenPruning) for c in callbacks_of(trainer)):
            pl_module.log("prunex/gmacs", prunex.cost(self.pruning.model).gmacs, rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        """The optimisers of masks and thresholds."""
        return {"optimizers": {name: adam.state_dict() for name, adam in self._optimizers.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; the stage itself is in the model's state."""
        self._saved = dict(state_dict["optimizers"])

    def _restore(self) -> None:
        super()._restore()
        # However the run ended, the user's weights can be trained again.
        if self._resting:
            move(self.pruning.model, self._resting, True)
        self._resting = set()
        self._copies = None


def _count(module: LightningModule, pruner: XPruner, labels: Tensor) -> None:
    """Count the classes seen, those of all processes: DDP would give all of them rank zero's count."""
    before = pruner.updates.clone()
    pruner.saw(labels)
    trainer = module._trainer
    if trainer is not None and trainer.world_size > 1:
        added = pruner.updates - before
        add_up(trainer, added)
        pruner.updates.copy_(before + added)


def _first(batches: Iterable[Parts], count: int) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
    """The first images of some batches, with labels where there are any."""
    for fields in batches:
        images, labels = fields["images"][:count], fields.truth("calibration", "the training batch")
        yield images if labels is None else (images, labels[:count])
        count -= len(images)
        if count <= 0:
            break
