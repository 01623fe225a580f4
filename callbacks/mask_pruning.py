"""MaskPruning: find out which heads and MLP channels a ViT needs while it is fine-tuned, and take the others out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

import prunex
from prunex.batches import Parts, parts
from prunex.callbacks.averaging import SWA, averaging, check_own_averages
from prunex.callbacks.copies import Copies
from prunex.callbacks.participant import Participant, progress, tell_hparams
from prunex.callbacks.runs import Runs
from prunex.callbacks.token_pruning import TokenPruning
from prunex.callbacks.training_batches import training_batches
from prunex.checks import check_budget, check_flag, check_number, check_options, check_whole
from prunex.errors import PrunexError
from prunex.handles.units import UnitPruning
from prunex.pruners.base import accepted
from prunex.units.base import UnitPruner
from prunex.units.xpruner import XPruner
from prunex.vit.surroundings import check_own_classes
from prunex.vit.units import Backbone

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
        images: Images that the other criteria look at.
        remove: Whether units leave during training; False keeps hard gates to the end.
        model: Dotted path of the ViT in the module, when it holds several.

    Raises:
        PrunexError: At once for numbers out of range or fractions that leave nothing for fine-tuning; in ``setup`` for
            an unknown option, a budget out of reach, no ViT or several, manual optimisation or
            "16-mixed" precision with ``xpruner``; when training starts without an end, or with an optimiser whose
            memory cannot be cut.

    >>> from prunex.callbacks import MaskPruning
    >>> MaskPruning("xpruner", budget=0.5, options={"round_to": 8}).budget
    0.5
    """

    sees_loss = True

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
    ) -> None:
        super().__init__()
        make: Any = prunex.registry.lookup("pruner", method).make
        self.make = make
        if not issubclass(make, UnitPruner):
            raise PrunexError(
                f"{method} prunes tokens: give it to TokenPruning; MaskPruning takes xpruner, taylor, ..."
            )
        check_budget(budget)
        self.method, self.budget = method, budget
        self.options = check_options(options)
        for name in self.options:
            if name not in accepted(self.make):
                raise prunex.errors.unknown(f"option of {method}", name, accepted(self.make))
        self.masks, self.thresholds = check_number("masks", masks, 0, 1), check_number("thresholds", thresholds, 0, 1)
        if self.masks + self.thresholds > 1:
            raise PrunexError(
                f"masks={masks!r} and thresholds={thresholds!r} are more than the whole training: give fractions that "
                "leave something for fine-tuning, such as 0.25 and 0.25"
            )
        self.start = check_number("start", start, 0, 1)
        self.mask_lr, self.threshold_lr = (
            check_number("mask_lr", mask_lr, 0),
            check_number("threshold_lr", threshold_lr, 0),
        )
        self.images = check_whole("images", images, 1)
        self.remove = check_flag("remove", remove)
        self.model = model
        self.pruning: UnitPruning | None = None
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._waiting: dict[str, Any] | None = None  # a checkpoint's, until the optimisers are there
        self._resting: list[nn.Parameter] = []
        self._begun = False
        self._copies: Copies | None = None
        self._stays = False  # whether closed units stay in the model to the end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach, before the optimiser is made and the checkpoint is read; harmless when done already."""
        super().setup(trainer, pl_module, stage)
        average = averaging(trainer) or averaging(trainer, SWA)
        if stage == "fit" and average is not None:
            raise PrunexError(
                "MaskPruning chooses and removes units while training, which the copy of the model in "
                f"{type(average).__name__} does not follow: prune first, and average while fine-tuning the slim model"
            )
        if stage == "fit" and self.pruning is None:
            check_own_averages(trainer, pl_module, self)
        if stage == "fit" and self.make.trains:
            if not pl_module.automatic_optimization:
                raise PrunexError(
                    f"{self.method} brings losses of its own, and this module optimises by hand: use its stages by "
                    "hand (prunex.attach), or taylor"
                )
            if str(trainer.precision) == "16-mixed":
                raise PrunexError(
                    f"precision='16-mixed' scales gradients, which {self.method}'s own optimisers do not know: use "
                    "'bf16-mixed' or '32-true'"
                )
        self._when_model_is_there(pl_module, self.model, self._attach, Backbone)
        self._guard_checkpoints(
            pl_module, self.model, "units", lambda: {} if self.pruning is None else self.pruning.spec
        )
        if stage == "fit":
            self._put_round(pl_module, "training_step", functools.partial(self._training_step, pl_module))

    def _attach(self, module: LightningModule) -> None:
        found = prunex.attached(module, self.model, units=True)
        if found is None:
            attached: Any = prunex.attach(module, self.method, path=self.model, budget=self.budget, **self.options)
            found = attached
        elif found.method != self.method:
            raise PrunexError(
                f"the model's units are pruned by {found.method} already: detach() it, or ask for {found.method} here"
            )
        for name, wanted in {"budget": self.budget, **self.options}.items():
            has = found.options.get(name)
            if (list(wanted) if isinstance(wanted, tuple) else wanted) != has:
                raise PrunexError(
                    f"the model's units are pruned already with {name}={has!r}, not {wanted!r}: detach() them first "
                    f"with prunex.attached(module, units=True).detach(), or ask for {has!r} here"
                )
        self.pruning, self.runs = found, Runs(found)
        tell_hparams(module, "unit_pruning", found.spec)

    @property
    def _xpruner(self) -> XPruner | None:
        pruner = None if self.pruning is None else self.pruning.pruner
        return pruner if isinstance(pruner, XPruner) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the optimisers of masks and thresholds, or take a checkpoint's state over."""
        if self.pruning is None:
            return
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            raise PrunexError(
                "MaskPruning's stages are fractions of the training, and this one has no end: give max_epochs"
            )
        self.pruning.budget()
        self._stays = not self.remove or trainer.world_size > 1
        if not self._stays and not self.pruning.removed:
            self.pruning.check_removable(trainer.optimizers)
            self._copies = Copies(trainer, pl_module, self.pruning.model)
        pruner = self._xpruner
        if pruner is not None:
            check_own_classes(pl_module, self.pruning.model, self.method, pruner.classes)
            self._optimizers = {
                "masks": torch.optim.Adam(pruner.masks(), self.mask_lr),
                # Far from the scores the gates' gradient is tiny, and all that counts of it is its sign.
                "thresholds": torch.optim.Adam([pruner.thresholds], self.threshold_lr, eps=1e-20),
            }
            if self._waiting is not None:
                for name, state in self._waiting.items():
                    self._optimizers[name].load_state_dict(state)
        self._waiting = None
        rank_zero_info(
            f"prunex: {self.method} looks at {len(self.pruning.pruner.branches)} branches of heads and MLP channels; "
            f"budget {self.budget} leaves {self.pruning.budget() / self.pruning.pruner.prunable():.1%} of their "
            "multiply-adds"
        )
        self._advance(trainer, pl_module, progress(trainer, 0))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the next stage where its time has come."""
        if self.pruning is not None:
            if not self._begun and not self.pruning.decided and self.pruning.pruner.needs in LOOKING:
                parts(batch).labels("calibration", "the training batch")  # refused now, not when ``start`` has come
            self._begun = True
            self._advance(trainer, pl_module, progress(trainer, batch_idx))

    def _advance(self, trainer: Trainer, module: LightningModule, done: float) -> None:
        """Go through the stages up to a share of the training."""
        if self.pruning is None:
            return
        pruner = self._xpruner
        if pruner is None:
            if not self.pruning.decided and done >= self.start:
                self._calibrate(trainer, module, self.pruning)
                self._say_widths(trainer)
        else:
            if pruner.stage == "masks" and done >= self.masks:
                pruner.stage = "thresholds"
                self.pruning.budget()
            if pruner.stage == "thresholds" and done >= self.masks + self.thresholds:
                self.pruning.conclude()
                self._say_widths(trainer)
            self._rest(trainer, pruner.stage == "masks")
        if self.pruning.decided and not self._stays and not self.pruning.removed:
            self._take_out(trainer, self.pruning)

    def _take_out(self, trainer: Trainer, pruning: UnitPruning) -> None:
        """Remove the closed units, unless something would not follow that was not there when training began."""
        average = None if self._copies is None else self._copies.moving()
        try:
            pruning.check_removable(trainer.optimizers)
            reason = average and f"{average} holds a copy of the weights, which does not follow removed units"
        except PrunexError as error:
            reason = str(error)
        if reason:
            self._stays = True
            rank_zero_warn(f"{reason}: units that {self.method} closed stay in the model, masked, until it is slimmed")
        else:
            pruning.remove(trainer.optimizers)

    def _rest(self, trainer: Trainer, resting: bool) -> None:
        """Let the ViT's own weights stand still, or move again."""
        if self.pruning is None or resting == bool(self._resting):
            return
        if resting:
            own = [
                p for n, p in self.pruning.model.named_parameters() if not n.startswith("prunex") and p.requires_grad
            ]
            self._resting = own
        if trainer.world_size == 1:  # with several processes gradients are expected of all parameters
            for p in self._resting:
                p.requires_grad_(not resting)
        if not resting:
            self._resting = []

    def _calibrate(self, trainer: Trainer, module: LightningModule, pruning: UnitPruning) -> None:
        """Score on the first training batches; rank zero does it, the others take over what it found."""
        if trainer.is_global_zero:
            if pruning.pruner.needs in LOOKING:
                with training_batches(trainer, module, pruning.model) as batches:
                    pruning.calibrate(_some(batches, self.images), module, entered=True)
            else:
                pruning.calibrate()
        if trainer.world_size > 1:
            state: Any = None
            if trainer.is_global_zero:
                state = {k: v.cpu() for k, v in pruning.pruner.state_dict().items()}
            pruning.pruner.load_state_dict(trainer.strategy.broadcast(state))

    def _say_widths(self, trainer: Trainer) -> None:
        if self.pruning is None:
            return
        pruner = self.pruning.pruner
        kept = [f"{b.key}: {int(pruner.open(b.key).sum())} of {b.units}" for b in pruner.branches]
        rank_zero_info(f"prunex: {self.method} keeps " + ", ".join(kept))

    def _training_step(self, module: LightningModule, beneath: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.runs is None:
            return beneath(*args, **kwargs)
        self.runs.begin()
        output = self._learning_step(module, beneath, *args, **kwargs)
        self.runs.end_training_step()
        return output

    def _learning_step(self, module: LightningModule, beneath: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        pruner, pruning = self._xpruner, self.pruning
        batch = args[0] if args else kwargs.get("batch")
        known = parts(batch)
        vit = None if pruning is None else pruning.model
        if pruner is None or pruning is None or pruner.stage == "done":
            return self._end_step(module, beneath(*args, **kwargs), {}, known, model=vit)
        labels = known.get("labels")
        if pruner.stage == "masks":
            if labels is None:
                raise PrunexError(
                    f"{self.method} learns masks by the images' labels, and this training batch "
                    f"({known.kind}) holds none: {known.why('labels')}"
                )
            with pruning.labelled(labels):
                output = beneath(*args, **kwargs)
            self._count(module, pruner, labels)
        else:
            output = beneath(*args, **kwargs)
        images = 1 if labels is None else len(labels)
        if pruner.stage == "thresholds":
            removed = pruner.rate().detach()
            module.log("prunex/units_removed", removed, on_step=False, on_epoch=True, batch_size=images)
            module.log("prunex/units_target", pruner.target, on_step=False, on_epoch=True, batch_size=images)
        losses = pruning.losses(known.get("images"), labels)
        return self._end_step(module, output, losses, known, images, model=vit)

    @staticmethod
    def _count(module: LightningModule, pruner: XPruner, labels: Tensor) -> None:
        """Count the classes seen, those of all processes: DDP would give all of them rank zero's count."""
        before = pruner.updates.clone()
        pruner.saw(labels)
        trainer = module._trainer
        if trainer is not None and trainer.world_size > 1:
            added = pruner.updates - before
            dist.all_reduce(added)
            pruner.updates.copy_(before + added)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Step masks or thresholds with the gradients that this step has, then let the multiplier ascend."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        pruner = self._xpruner
        if pruner is None or pruner.stage == "done" or optimizer is not trainer.optimizers[0]:
            return
        if pruner.stage == "masks":
            for p in self._resting:
                p.grad = None
        learned: list[Tensor] = pruner.masks() if pruner.stage == "masks" else [pruner.thresholds]
        if trainer.world_size > 1:
            for tensor in learned:
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
                dist.all_reduce(tensor.grad)
                tensor.grad /= trainer.world_size
        own = self._optimizers[pruner.stage]
        own.step()
        own.zero_grad(set_to_none=True)
        if pruner.stage == "thresholds":
            pruner.ascend()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training that ends before its fine-tuning began still chooses its units."""
        if self.pruning is not None and progress(trainer, 0) >= 1:
            self._advance(trainer, pl_module, 1.0)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log multiply-adds per image of the model as it would be exported now."""
        ran = self.runs is not None and self.runs.end_validation(trainer.sanity_checking)
        alone = not any(isinstance(c, TokenPruning) for c in trainer.callbacks)  # type: ignore[attr-defined]
        known = self.runs is not None and (ran or self.runs.trained)
        if self.pruning is not None and not trainer.sanity_checking and alone and known:
            pl_module.log("prunex/gmacs", prunex.cost(self.pruning.model).gmacs, rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        """The optimisers of masks and thresholds."""
        return {"optimizers": {name: own.state_dict() for name, own in self._optimizers.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; the stage itself is in the model's state."""
        self._waiting = dict(state_dict["optimizers"])

    def _restore(self) -> None:
        super()._restore()
        for p in self._resting:
            p.requires_grad_(True)
        self._resting = []
        self._copies = None


def _some(batches: Iterable[Parts], images: int) -> list[tuple[Tensor, Tensor] | Tensor]:
    """The first images of some batches, with labels where there are any."""
    taken: list[tuple[Tensor, Tensor] | Tensor] = []
    for known in batches:
        room = images
        some, labels = known["images"][:room], known.labels("calibration", "the training batch")
        taken.append(some if labels is None else (some, labels[:room]))
        images -= len(some)
        if images <= 0:
            break
    return taken
