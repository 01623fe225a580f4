"""ExplainableHead: the ViT inside somebody's LightningModule is fine-tuned with a head that explains itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

import prunex
from prunex.batches import Parts, parts
from prunex.callbacks.alone import add_up
from prunex.callbacks.averaging import check_order
from prunex.callbacks.participant import Participant, check_single, options_of, progress
from prunex.callbacks.rates import check_stepped, give_rates
from prunex.checks import check_number
from prunex.errors import PrunexError
from prunex.heads.tree_patches import Nearest

# What validation measures of a head, by method: logged as prunex/val_*.
MEASURED = {
    "concept_transformer": ("top_concept",),
    "vit_net": ("tree_soft", "tree_hard", "tree_classifier", "tree_tree", "tree_shuffled"),
}


class ExplainableHead(Participant):
    """Attach a head that explains itself in ``setup`` and train it with the user's own loss, optimiser and precision.

    The module's loss goes by the head's logits, which ``model(images)`` gives; the head's own losses are added to what
    ``training_step`` returns and logged as ``prunex/loss_*``. Beside a token pruner and a unit pruner, in any order.

    Names of concepts that are not given are the data module's, ``concept_names`` and ``spatial_concept_names``, where
    it has such. Concept labels come from the batch, under their names alone: ``concepts`` [B, C] and
    ``spatial_concepts`` [B, patches, C] of 0, 1 and NaN, which stands for unknown, or bool; what is not annotated is
    left out row by row. They go to every forward of B images.

    In validation it logs, of ``concept_transformer``, ``prunex/val_top_concept``: how often the concept with most
    attention is present, where it is known which are. Of ``vit_net`` the controls, ``prunex/val_tree_*``, which say
    whether the tree decides anything, and a line prints them after each validation; while training the patches nearest
    its prototypes are collected from each epoch's images.

    The model keeps the head after ``fit``; ``prunex.attached(module, head=True).detach()`` gives the old one back.
    Checkpoints, of weights only too, say what was attached, see :func:`prunex.callbacks.load_from_checkpoint`.

    Args:
        method: A head's name: "concept_transformer", "vit_net", "attributes" or "mean_patch".
        options: Its options, such as ``{"concepts": ["loop", "bar"]}``.
        model: Dotted path of the ViT in the module, when it holds several.
        lr_scale: Learning rate of the head's parameters as a multiple of what the module gives them, at least 0. None:
            the head's own rate (4e-4), where the module's is lower.
        **more: Options too, as in ``ExplainableHead("vit_net", depth=4)``.

    Raises:
        PrunexError: At once for an unknown head or option; in ``setup`` for no ViT or several, options that do not fit
            the model, a second ExplainableHead, ``vit_net`` for several labels, or manual optimisation; in training for
            concept labels that do not fit.

    Warns:
        UserWarning: Once, where no batch brings labels for a head with named concepts.

    >>> from prunex.callbacks import ExplainableHead
    >>> ExplainableHead("vit_net", depth=4).options
    {'depth': 4}
    """

    which: ClassVar[dict[str, bool]] = {"head": True}
    entry, hparam = "head", "head"
    budget = None
    pruning: prunex.Head

    def __init__(
        self,
        method: str = "concept_transformer",
        options: dict[str, Any] | None = None,
        model: str | None = None,
        lr_scale: float | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        known = prunex.registry.lookup("head", method)
        self.method = method
        self.options = options_of(known, options, **more)
        self.model = model
        self.lr_scale = None if lr_scale is None else check_number("lr_scale", lr_scale, 0)
        self._learned: list[str] = []  # names of what the head shall learn
        self._seen = 0  # images of this training, by which collected patches tell theirs apart
        self._images: Tensor | None = None  # that entered the ViT last
        self._annotated = False  # whether a batch has brought concept labels
        self._unread = False  # whether it was told that validation cannot be measured
        self._resting = False  # whether it was told that the head rests in eval mode
        self._sums: dict[str, Tensor] = {}  # of this validation: a share's sum and its images, [2]

    @property
    def _head(self) -> Any:
        return self.pruning.head

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Name concepts as the data does, then attach as all do."""
        if self.method == "concept_transformer":
            self._name_concepts(getattr(trainer, "datamodule", None))
        super().setup(trainer, pl_module, stage)

    def _name_concepts(self, data: Any) -> None:
        """Take the data module's names where none are given; refuse other ones than it has labels for."""
        known = {"concepts": "concept_names", "spatial": "spatial_concept_names"}
        names = {option: list(getattr(data, attribute, None) or ()) for option, attribute in known.items()}
        if not {"concepts", "spatial", "unsupervised"} & set(self.options):
            self.options |= {option: given for option, given in names.items() if given}
        for option, labelled in names.items():
            given = self.options.get(option)
            if labelled and isinstance(given, list | tuple) and list(given) != labelled:
                raise PrunexError(
                    f"{option}={given!r}, and {type(data).__name__} has labels for {labelled}, in this order: give "
                    "these, or leave them out"
                )

    def _check_training(self, trainer: Trainer, module: LightningModule) -> None:
        check_single(trainer, ExplainableHead)
        if not module.automatic_optimization:
            raise PrunexError(
                f"{self.method} brings losses of its own, and this module optimises by hand: add "
                "sum(prunex.attached(self, head=True).losses().values()) to your loss and attach without the callback"
            )
        task = getattr(getattr(module, "task", None), "name", "single")
        if self.method == "vit_net" and task != "single":
            raise PrunexError(
                f"vit_net shares one probability among the classes, so it cannot be trained for task={task!r}: take "
                "concept_transformer, attributes or mean_patch, whose scores are logits of their own"
            )
        check_order(trainer, self)

    def _check_attached(self, handle: prunex.Head, foreign: bool, again: bool) -> None:
        self._learned = [name for name, p in handle.head.named_parameters() if p.requires_grad]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give what the head brings its learning rate: optimisers are there, and have read no checkpoint yet."""
        self._undo += give_rates(trainer, self._head, self.lr_scale)
        if self.method == "vit_net":
            embedding = self.pruning.model.patch_embed
            self._undo.append(embedding.register_forward_pre_hook(self._note_images).remove)

    def _note_images(self, module: nn.Module, entered: tuple[Tensor, ...]) -> None:
        """What enters the ViT, of which patches near prototypes are cut: the module may have prepared the batch's."""
        self._images = entered[0].detach()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that an optimiser steps what is new."""
        self._annotated = False
        check_stepped(trainer, self.pruning, self._learned)
        if self._head.forced:
            rank_zero_warn(
                f"training runs with attention set by hand ({self._head.forced}), which no checkpoint keeps: end it "
                "with prunex.attached(self, head=True).intervene({}) where that is not meant"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prototypes have moved: what was nearest to them is found again."""
        if self.method == "vit_net":
            self._head.nearest.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the head how far training is."""
        self.pruning.progress = progress(trainer, batch_idx)

    def _training_step(self, module: LightningModule, step: Callable[[], STEP_OUTPUT], batch: Any) -> STEP_OUTPUT:
        output, handle = step(), self.pruning
        forwards, fields = list(handle.waiting), parts(batch)
        if output is None or not forwards:  # a skipped batch, or a step that did not run the model
            self._tell_of_eval(output)
            handle.forget()
            return self._end_step(module, output, {}, fields)
        self._collect(forwards[-1])
        losses = handle.losses(fields.get("labels"), **self._concepts(fields))
        handle.forget()
        return self._end_step(module, output, losses, fields, forwards[-1].images)

    def _tell_of_eval(self, output: STEP_OUTPUT) -> None:
        """Say once that a step which ran the head in eval mode brings none of its losses."""
        if output is not None and self.runs.now and not self._head.training and not self._resting:
            self._resting = True
            rank_zero_warn(
                f"the training step runs {self.method} in eval mode, in which it brings no losses: call train() on the "
                "ViT before fit, or on prunex.attached(self, head=True).model.prunex_head where the ViT shall rest"
            )

    def _concepts(self, fields: Parts) -> dict[str, Tensor]:
        """The batch's concept labels that the head has concepts for."""
        head = self._head
        if self.method != "concept_transformer":
            return {}
        names = {"global": ("concepts", "concepts"), "spatial": ("spatial_concepts", "spatial")}
        for stream, (name, _) in names.items():
            if stream in head.streams and name in fields.unclear and head.explanation_weight > 0:
                fields.need(name, self.method, "the training batch")
        given = {to: fields[name] for stream, (name, to) in names.items() if stream in head.streams and name in fields}
        named = {"global", "spatial"} & set(head.streams)
        if named and not given and not self._annotated and head.explanation_weight > 0:
            rank_zero_warn(
                "no concept labels in the first training batch, so nothing ties concepts to their names: give batches "
                "that hold 'concepts' [B, C] or 'spatial_concepts' [B, patches, C] of 0, 1 and NaN (unknown)"
            )
        self._annotated = True
        return given

    def _collect(self, forward: Any) -> None:
        """Look for the patches nearest a tree's prototypes among the images of this step's last forward."""
        images, self._images = self._images, None
        known = forward.reading.tokens.grid is not None
        # Patches can be cut where the forward was of these images, on a grid that is known.
        if images is not None and known and len(images) == forward.images:
            names = [f"{self._seen + i}" for i in range(len(images))]
            self._head.collect(forward.reading, images, names)
            self._seen += len(images)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """What was read before is not of this batch."""
        super().on_validation_batch_start(*args, **kwargs)
        self.pruning.forget()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the head on this batch, where its labels say what is right."""
        super().on_validation_batch_end(trainer, pl_module)
        reading, fields = self.pruning.last, parts(batch)
        if not self.runs.now or dataloader_idx != 0 or trainer.sanity_checking:
            return
        if reading is None:
            if self.method in MEASURED and not self._unread:
                self._unread = True
                rank_zero_warn(
                    f"validation runs {self.method} compiled or with a graph, which leaves nothing to measure: "
                    "prunex/val_* are not logged; run it eagerly and without gradients, or ask "
                    "prunex.attached(self, head=True) for evidence"
                )
            return
        if self.method == "concept_transformer":
            with self._looks:
                self._log_concepts(reading, fields.get("concepts"))
        labels = fields.get("labels")
        # One of the controls takes other images' routing, so that one image alone has none.
        if self.method == "vit_net" and labels is not None and len(labels) == len(reading.logits) > 1:
            for name, right in self._head.right(reading, labels).items():
                self._sum(f"tree_{name}", right, torch.ones_like(right))

    def _log_concepts(self, reading: Any, concepts: Tensor | None) -> None:
        """How often the global concept with most attention is one that is present."""
        if (
            concepts is None
            or concepts.ndim == 0
            or "global" not in reading.attention
            or len(concepts) != len(reading.logits)
        ):
            return
        attention = reading.attention["global"].mean((1, 2))
        present = self._head.fitting("global", concepts, len(concepts), 1)[:, 0].to(attention)
        known = present.sum(1) > 0
        right = present.gather(1, attention.argmax(1, keepdim=True))[:, 0]
        self._sum("top_concept", torch.where(known, right, 0), known)

    def _sum(self, name: str, values: Tensor, images: Tensor) -> None:
        """Add up a share of this validation and the images it is of, on the device: [2]."""
        both = torch.stack([values.float().sum(), images.float().sum()])
        self._sums[name] = self._sums[name] + both if name in self._sums else both

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured, and print whether a tree decides anything."""
        shown = self._validated(trainer)
        measured, self._sums = self._sums, {}
        names = MEASURED.get(self.method, ())
        if trainer.sanity_checking or not names:
            return
        # Sums over all processes: each has images of its own, or none.
        sums = torch.zeros(len(names), 2, device=trainer.strategy.root_device)
        for i, name in enumerate(names):
            if name in measured:
                sums[i] += measured[name]
        add_up(trainer, sums)
        if not shown:
            return
        shares = {name: share / images for name, (share, images) in zip(names, sums.tolist(), strict=True) if images}
        for name, share in shares.items():
            pl_module.log(f"prunex/val_{name}", share, rank_zero_only=True)
        if "tree_soft" in shares:
            said = {name.removeprefix("tree_"): f"{share:.1%}" for name, share in shares.items()}
            rank_zero_info(
                f"prunex: tree {said['soft']} soft, {said['hard']} hard; controls: classifier alone "
                f"{said['classifier']}, tree without it {said['tree']}, routing shuffled {said['shuffled']}"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Losses that rise with training are at their full weight."""
        self.pruning.progress = 1.0

    @property
    def state_key(self) -> str:
        """Lets a second one be refused in our words."""
        return self._generate_state_key(method=self.method, model=self.model)

    def state_dict(self) -> dict[str, Any]:
        """Which patches were near a tree's prototypes, and how many images were looked through for them."""
        nearest = getattr(self._head, "nearest", {}) if self.pruning is not None else {}
        # As plain values: a checkpoint that is read safely holds no class of ours.
        rows = {}
        for branch, patches in nearest.items():
            rows[branch] = [vars(patch) for patch in patches]
        return {"seen": self._seen, "nearest": rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._seen = int(state_dict["seen"])
        for branch, patches in state_dict.get("nearest", {}).items():
            self._head.nearest[int(branch)] = [Nearest(**patch) for patch in patches]

    def _take_over(self, entry: Mapping[str, Any]) -> None:
        """Nothing beside weights and options."""
