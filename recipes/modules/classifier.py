"""The ready-made LightningModule: a timm classifier, its optimiser, and an optional loss on the patch tokens."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import Metric

from prunex.errors import PrunexError
from prunex.recipes.modules.backbone import create_model, load_weights
from prunex.recipes.modules.tasks import TaskName, make_task, only_single
from prunex.recipes.modules.training import Pruned, adamw, check_at_most, check_classes, images_of

PATCH_IS_DIGIT = 0.03  # share of a patch that must lie on the object for the patch to be labelled with its class


def patch_labels(masks: Tensor, labels: Tensor, grid: tuple[int, int], background: int) -> Tensor:
    """The class each patch shows: the image's label where the mask bool ``[B, H, W]`` touches it, else ``background``.

    Returns:
        int64 ``[B, gh * gw]`` in raster order, of a grid of patches down and across.

    >>> masks = torch.zeros(1, 4, 4, dtype=torch.bool); masks[0, 0, 3] = True
    >>> patch_labels(masks, torch.tensor([7]), (2, 2), 10).tolist()
    [[10, 7, 10, 10]]
    """
    covered = F.adaptive_avg_pool2d(masks.float()[:, None], grid).flatten(1)
    return torch.where(covered > PATCH_IS_DIGIT, labels[:, None], background)


class ImageClassifier(Pruned, LightningModule):
    """A timm classifier that trains with AdamW, warm-up and cosine, and saves nothing but plain values.

    Batches are ``(images [B, 3, H, W], labels)`` or ``(images, labels, masks bool [B, H, W])``; what else they hold is
    left to callbacks. Labels are whole numbers [B] of a ``single`` class an image, 0 and 1 [B, num_classes] of a
    ``multi_label`` task, or numbers [B] of a ``regression``.

    Args:
        architecture: Name of a timm model.
        num_classes: Number of classes or labels, 1 for a regression; on the command line, None takes it from the data
            module.
        model_args: Overrides for timm's constructor, such as ``img_size``, ``patch_size``, ``embed_dim``, ``depth``.
        weights: Path of a safetensors file, or the name of weights shipped with prunex (``digits``).
        pretrained: Download timm's weights; needs a network.
        from_scratch: Train from random weights: without it, and without weights, training is refused.
        learning_rate: Peak learning rate.
        head_lr_scale: The classifier's learning rate, as a multiple of the others'; a new head on pretrained weights
            learns little in few epochs at the rate that suits those.
        weight_decay: Not applied to biases, norms, position embeddings and class tokens.
        warmup: Share (0..1) of all steps over which the learning rate rises linearly; a cosine takes it to
            ``final_learning_rate`` times the peak afterwards.
        final_learning_rate: Learning rate of the last step, as a share (0..1) of the peak.
        label_smoothing: Of the classification loss, 0..1. This and what follows up to ``patch_label_weight`` goes with
            one class an image alone.
        mixup: Alpha of timm's Mixup; 0 is off. Masks are not mixed: batches that were mixed skip the patch loss.
        cutmix: Alpha of CutMix, likewise.
        patch_label_weight: Weight of an auxiliary loss in which a linear head on the final patch tokens names the
            class that each patch shows, or background; 0 is off. Needs masks, and serves training only.
        pruning: ``method`` and its options, as for ``prunex.attach``. Checkpoints carry it, also where the model was
            pruned by the callback ``TokenPruning``, so that ``load_from_checkpoint`` alone rebuilds a pruned model.
        unit_pruning: The same for heads and MLP channels, and the callback ``MaskPruning``.
        head: The same for a head that explains itself, and the callback ``ExplainableHead``.
        task: "single": cross-entropy, and accuracy (``val_accuracy``); "multi_label": binary cross-entropy, and the
            mean over labels of their average precision (``val_map``); "regression": mean squared error, and mean
            absolute error (``val_mae``).

    Raises:
        PrunexError: If an argument is outside its range, or the weights cannot be loaded.

    >>> module = ImageClassifier("vit_tiny_patch16_224", 10, {"img_size": 32, "depth": 2})
    >>> module(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        architecture: str = "vit_small_patch16_224",
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = False,
        learning_rate: float = 1e-3,
        head_lr_scale: float = 1.0,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        final_learning_rate: float = 0.01,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        patch_label_weight: float = 0.0,
        pruning: dict[str, Any] | None = None,
        unit_pruning: dict[str, Any] | None = None,
        from_scratch: bool = False,
        head: dict[str, Any] | None = None,
        task: TaskName = "single",
    ) -> None:
        super().__init__()
        num_classes = check_classes(num_classes)
        self.save_hyperparameters()
        of_single = ("label_smoothing", "mixup", "cutmix", "patch_label_weight")
        check_at_most(math.inf, self.hparams, "learning_rate", "head_lr_scale", "weight_decay", *of_single[1:])
        check_at_most(1.0, self.hparams, "warmup", "final_learning_rate", "label_smoothing")
        self.task = make_task(task, num_classes)
        only_single(self.task, self.hparams, *of_single)
        self.model = cast(Any, create_model(architecture, num_classes, model_args, pretrained))
        if weights:
            load_weights(self.model, weights)
        self.num_classes = num_classes
        self.patch_head: nn.Linear | None = None
        if patch_label_weight > 0:
            if not hasattr(self.model, "patch_embed") or not hasattr(self.model, "num_prefix_tokens"):
                raise PrunexError(f"patch_label_weight needs a ViT, not {architecture!r}: set it to 0")
            # One output more than classes: background.
            self.patch_head = nn.Linear(int(self.model.num_features), num_classes + 1)
        self.mix = (
            # It smooths labels itself, since mixed ones never come to the task's loss.
            Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
            if mixup or cutmix
            else None
        )
        self.train_score, self.val_score, self.test_score = (self.task.meter() for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, 3, H, W]``."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Classification loss, with the patch loss where it is on."""
        if len(batch) < 2:
            raise PrunexError("a training batch has one part: give (images, labels) or (images, labels, masks)")
        images, labels, masks = batch[0], batch[1], batch[2] if len(batch) > 2 else None
        labels = self.task.check(labels)
        # Mixup pairs images; a mixed image has no mask of its own.
        if self.mix is not None and len(images) % 2 == 0:
            images, targets = self.mix(images, labels)
            # By hand, since mixed labels are shares of two classes.
            loss = -(targets * F.log_softmax(self(images).float(), 1)).sum(1).mean()
        else:
            logits, tokens = self._logits_and_tokens(images) if self.patch_head is not None else (self(images), None)
            loss = self.task.loss(logits.float(), labels, self.hparams["label_smoothing"])
            self.train_score.update(logits.detach().float(), labels)
            # The meter itself: Lightning then gathers it over processes, and resets it after the epoch.
            self.log(f"train_{self.task.score}", self.train_score, on_step=False, on_epoch=True)
            if tokens is not None and self.patch_head is not None:
                patch_loss = self._patch_loss(self.patch_head, tokens, labels, masks)
                self.log("train_patch_loss", patch_loss, on_step=False, on_epoch=True)
                loss = loss + self.hparams["patch_label_weight"] * patch_loss
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def predict_step(self, batch: Tensor | tuple[Tensor, ...], batch_idx: int) -> Any:
        """Class probabilities [B, num_classes]; of other tasks ``label_probabilities`` or ``values`` [B, 1] by name."""
        return self.task.predict(self(images_of(batch)).float())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, weights decayed and others not, head and rest apart; warm-up and cosine, stepped every batch."""
        return adamw(self, lambda name: name.startswith(("model.head.", "model.head_dist.")))

    def _evaluate(self, stage: str, batch: tuple[Tensor, ...]) -> None:
        score: Metric = getattr(self, f"{stage}_score")
        images, labels = batch[0], self.task.check(batch[1])
        logits = self(images)
        score.update(logits.float(), labels)
        loss = self.task.loss(logits.float(), labels)
        self.log(f"{stage}_loss", loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}_{self.task.score}", score, batch_size=len(labels), prog_bar=True)

    def _logits_and_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, num_classes]`` and the final patch tokens ``[B, gh * gw, D]`` of one forward."""
        final: list[Tensor] = []
        # The tokens of the same forward, so that the patch loss costs no second one.
        handle = self.model.norm.register_forward_hook(lambda module, inputs, output: final.append(output))
        try:
            logits = self(images)
        finally:
            handle.remove()
        return logits, final[0][:, self.model.num_prefix_tokens :]

    def _patch_loss(self, head: nn.Linear, tokens: Tensor, labels: Tensor, masks: Tensor | None) -> Tensor:
        if masks is None:
            raise PrunexError(
                "patch_label_weight is set but the batch has no masks: give (images, labels, masks) or set 0"
            )
        height, width = self.model.patch_embed.grid_size
        if tokens.shape[1] != height * width:
            raise PrunexError(
                f"patch_label_weight needs all {height * width} patch tokens, {tokens.shape[1]} are left: "
                "set it to 0 while tokens are pruned"
            )
        targets = patch_labels(masks, labels, (height, width), background=self.num_classes)
        return F.cross_entropy(head(tokens).float().flatten(0, 1), targets.flatten())
