"""Semantic segmentation by a linear decoder on the full grid of a pruned ViT."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.recipes.modules.grid_model import GridModel
from prunex.recipes.modules.training import images_of


class SegmentationModel(GridModel):
    """A timm ViT and a linear decoder that names the class of every pixel; trains as ``ImageClassifier`` does.

    The decoder of Segmenter's "Linear" (Strudel et al., ICCV 2021, arXiv 2105.05633): one linear layer on each cell of
    the patch grid, and bilinear upsampling to the images' size. With ``upscale`` the layer says so many cells across
    and down of each patch. On a pruned model the grid comes from ``forward_intermediates(fill=...)``: it is whole, and
    the decoder need not know that anything left.

    Batches are ``(images [B, 3, H, W], maps int64 [B, H, W])``, a class a pixel or ``ignore_index``; what else they
    hold is left to callbacks. The score is the mean over classes of intersection over union, of all pixels that were
    seen together, ``val_miou``.

    Args:
        architecture: Name of a timm model.
        num_classes: Number of classes, background among them; on the command line, None takes it from the data module.
        model_args: Overrides for timm's constructor, such as ``img_size``, ``patch_size``, ``embed_dim``, ``depth``.
        weights: Path of a safetensors file, or the name of weights shipped with prunex (``digits``). A classifier in
            them is left out.
        pretrained: Download timm's weights; needs a network.
        blocks: After which blocks grids are taken, as timm's ``indices``: how many last ones, or a list of blocks.
        fill: What patches that were removed hold: a number, or None for their token as it left. Members of a fused or
            merged token hold that token either way.
        upscale: Cells that the linear layer says for each patch, across and down.
        ignore_index: The class of pixels that neither loss nor score look at.
        learning_rate: Peak learning rate.
        head_lr_scale: The decoder's learning rate, as a multiple of the ViT's.
        weight_decay: Not applied to biases, norms, position embeddings and class tokens.
        warmup: Share (0..1) of all steps over which the learning rate rises linearly; a cosine follows.
        final_learning_rate: Learning rate of the last step, as a share (0..1) of the peak.
        pruning: ``method`` and its options, as for ``prunex.attach``; checkpoints carry it, also where the callback
            ``TokenPruning`` did the pruning.
        unit_pruning: The same for heads and MLP channels, and the callback ``MaskPruning``.
        from_scratch: Train from random weights: without it, and without weights, training is refused.

    Raises:
        PrunexError: If an argument is outside its range, the weights cannot be loaded, or the ViT is not supported.

    >>> import torch
    >>> module = SegmentationModel("vit_tiny_patch16_224", 11, {"img_size": 32, "depth": 2})
    >>> module(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 11, 32, 32])
    """

    score = "miou"

    def __init__(
        self,
        architecture: str = "vit_small_patch16_224",
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool = False,
        blocks: int | list[int] = 1,
        fill: float | None = None,
        upscale: int = 1,
        ignore_index: int = 255,
        learning_rate: float = 1e-3,
        head_lr_scale: float = 1.0,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        final_learning_rate: float = 0.01,
        pruning: dict[str, Any] | None = None,
        unit_pruning: dict[str, Any] | None = None,
        from_scratch: bool = False,
    ) -> None:
        # Before the base's constructor, whose meters look at it.
        self.ignore_index = ignore_index
        super().__init__(
            architecture, num_classes, model_args, weights, pretrained, blocks, fill, learning_rate=learning_rate,
            head_lr_scale=head_lr_scale, weight_decay=weight_decay, warmup=warmup,
            final_learning_rate=final_learning_rate,
        )  # fmt: skip
        self.save_hyperparameters()
        self.upscale = check_whole("upscale", upscale, 1)
        self.decoder = nn.Conv2d(self.width, self.num_classes * self.upscale**2, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes, H, W] of images [B, 3, H, W]."""
        logits = F.pixel_shuffle(self.decoder(self.grid(images)), self.upscale)
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    def loss(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        """Cross-entropy, mean over pixels."""
        maps = self._maps(batch)
        # A batch of ignored pixels alone has no mean.
        seen = (maps != self.ignore_index).sum().clamp(min=1)
        total = F.cross_entropy(output.float(), maps, ignore_index=self.ignore_index, reduction="sum")
        return {"loss": total / seen}

    def meter(self) -> Metric:
        """Mean over classes of intersection over union."""
        return MulticlassJaccardIndex(self.num_classes, ignore_index=self.ignore_index, validate_args=False)

    def update(self, meter: Metric, output: Tensor, batch: Any) -> None:
        """Count pixels by class and prediction."""
        meter.update(output.argmax(1), self._maps(batch).to(output.device))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The class of every pixel, int64 [B, H, W]."""
        return self(images_of(batch)).argmax(1)

    def _maps(self, batch: Any) -> Tensor:
        """A batch's classes, [B, H, W]."""
        images, maps = self.images(batch), batch[1]
        wanted = [len(images), *images.shape[-2:]]
        if not isinstance(maps, Tensor) or maps.is_floating_point() or list(maps.shape) != wanted:
            what = f"{maps.dtype} {list(maps.shape)}" if isinstance(maps, Tensor) else f"a {type(maps).__name__}"
            raise PrunexError(f"the targets are {what}: give whole numbers {wanted}, a class a pixel")
        known = maps[maps != self.ignore_index]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < self.num_classes:
            raise PrunexError(
                f"classes of pixels run from {int(known.min())} to {int(known.max())}, the model has "
                f"{self.num_classes}: set num_classes, or ignore_index (now {self.ignore_index}) for pixels of none"
            )
        return maps.long()
