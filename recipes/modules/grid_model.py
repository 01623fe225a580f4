"""What segmentation and detection share: a timm ViT, pruned or not, under a decoder that reads its full patch grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import Metric

from prunex.checks import check_number
from prunex.errors import PrunexError
from prunex.recipes.modules.backbone import create_model, load_weights
from prunex.recipes.modules.training import Pruned, adamw, check_at_most, check_classes, images_of
from prunex.vit.anatomy import find
from prunex.vit.intermediates import chosen_blocks
from prunex.vit.mount import mounted

LARGEST = 1e4  # of a fill: features of a normalised grid are some units large


class GridModel(Pruned, LightningModule):
    """A ViT without a classifier, ``model``, and what its decoders share: grids, steps, optimiser, checkpoints.

    A subclass gives a decoder's ``forward``, its ``loss``, and its score: what it is called (``score``), its ``meter``
    and how that is updated and read. The score is logged as ``val_<score>``.
    """

    score: ClassVar[str]

    def __init__(
        self,
        architecture: str,
        num_classes: int | None,
        model_args: dict[str, Any] | None,
        weights: str | None,
        pretrained: bool,
        blocks: int | Sequence[int],
        fill: float | None,
        **rates: float,
    ) -> None:
        super().__init__()
        self.num_classes = check_classes(num_classes)
        check_at_most(math.inf, rates, "learning_rate", "head_lr_scale", "weight_decay")
        check_at_most(1.0, rates, "warmup", "final_learning_rate")
        self.fill = None if fill is None else check_number("fill", fill, -LARGEST, LARGEST)
        self.model = cast(Any, create_model(architecture, 0, model_args, pretrained))
        # Refuses what is no ViT before its weights are read.
        find(self.model)
        self.blocks = chosen_blocks(blocks, len(self.model.blocks))
        if weights:
            load_weights(self.model, weights)
        self.val_score, self.test_score = self.meter(), self.meter()

    @property
    def width(self) -> int:
        """Features of each cell of the grid."""
        return int(self.model.embed_dim) * len(self.blocks)

    def grid(self, images: Tensor) -> Tensor:
        """The patch grid after the chosen blocks, beside each other: [B, width, gh, gw], whatever left on the way."""
        # Of a dense model nothing is removed, and timm's own method knows no fill.
        fill = {} if mounted(self.model) is None else {"fill": self.fill}
        maps = self.model.forward_intermediates(images, self.blocks, norm=True, intermediates_only=True, **fill)
        return torch.cat(maps, 1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, weights decayed and others not, decoder and ViT apart; warm-up and cosine, stepped every batch."""
        return adamw(self, lambda name: not name.startswith("model."))

    def loss(self, output: Any, batch: Any) -> dict[str, Tensor]:
        """The parts of the loss by name, scalars that are summed."""
        raise NotImplementedError

    def meter(self) -> Metric:
        """The score, gathered over batches."""
        raise NotImplementedError

    def update(self, meter: Metric, output: Any, batch: Any) -> None:
        """Take a batch into a meter, wherever the batch lies."""
        raise NotImplementedError

    def read(self, meter: Metric) -> float:
        """The score in 0..1 of all that a meter has seen."""
        return float(meter.compute())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the losses; of several each is logged."""
        images = self.images(batch)
        losses = self.loss(self(images), batch)
        if len(losses) > 1:
            named = {f"train_{name}_loss": loss for name, loss in losses.items()}
            self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(images))
        total = torch.stack(list(losses.values())).sum()
        self.log("train_loss", total, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images))
        return total

    def on_validation_epoch_end(self) -> None:
        """Log the score."""
        self._tell("val", self.val_score)

    def on_test_epoch_end(self) -> None:
        """Log the score."""
        self._tell("test", self.test_score)

    @staticmethod
    def images(batch: Any) -> Tensor:
        """The images of a batch of (images, targets, ...)."""
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            what = f"{len(batch)} parts" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
            raise PrunexError(f"a batch is {what}: give (images, targets), as its docstring has them")
        return images_of(batch)

    def _evaluate(self, stage: str, batch: Any) -> None:
        images = self.images(batch)
        output = self(images)
        loss = torch.stack(list(self.loss(output, batch).values())).sum()
        self.log(f"{stage}_loss", loss, batch_size=len(images), sync_dist=True)
        self.update(getattr(self, f"{stage}_score"), output, batch)

    def _tell(self, stage: str, meter: Metric) -> None:
        # Every process computes the same from what all have gathered.
        self.log(f"{stage}_{self.score}", self.read(meter), prog_bar=True)
        meter.reset()
