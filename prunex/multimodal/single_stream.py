"""Text and image in one stream: VisualBERT (arXiv 1908.03557) and ViLT (arXiv 2102.03334)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunex.errors import PrunexError
from prunex.multimodal.adapter import Adapter, Targets, known
from prunex.multimodal.recorder import Recording
from prunex.multimodal.rules import Attended


class SingleStream(Adapter):
    """Text first, then the image; the answer reads one token's row, whose own entry says nothing."""

    needs: ClassVar[tuple[str, ...]] = ("input_ids",)

    def read(self) -> Tensor:
        """The token that the answer reads, int64 [B]."""
        return torch.zeros(len(self.inputs["input_ids"]), dtype=torch.long, device=self.inputs["input_ids"].device)

    def length(self) -> int:
        """The number of text tokens."""
        return int(self.inputs["input_ids"].shape[1])

    def cells(self) -> tuple[int, tuple[int, int] | None]:
        """Tokens between the text and the image's cells or boxes, and the grid of cells."""
        return 0, None

    def rows(self, matrices: Mapping[str, Tensor], targets: Targets, column: Tensor) -> tuple[Tensor, Tensor]:
        matrix = matrices["R_ss"]
        every, read = torch.arange(len(matrix), device=matrix.device), self.read().to(matrix.device)
        row = matrix[every, read].clone()
        row[every, read] = 0
        return row[:, : self.length()], row[:, self.length() + self.cells()[0] :]

    def image_valid(self, count: int, grid: tuple[int, int] | None) -> Tensor:
        ids = self.inputs["input_ids"]
        return torch.ones(len(ids), count, dtype=torch.bool, device=ids.device)

    def grid(self, recording: Recording) -> tuple[int, int] | None:
        return self.cells()[1]


@known
class VisualBert(SingleStream):
    """VisualBERT: boxes without places; question answering reads the last token before [SEP], reasoning the first."""

    models = ("VisualBertForQuestionAnswering", "VisualBertForVisualReasoning")
    roles = {r"encoder\.layer\.\d+\.attention\.self": ("ss",)}
    needs = ("input_ids", "attention_mask", "visual_embeds")
    row_normalised = False  # as the authors roll it out

    def count(self) -> int:
        return self.config.num_hidden_layers

    def read(self) -> Tensor:
        mask = self.inputs["attention_mask"]
        if "QuestionAnswering" not in type(self.model).__name__:
            return torch.zeros(len(mask), dtype=torch.long, device=mask.device)
        lengths = mask.sum(1).long()
        if int(lengths.min()) < 2:
            raise PrunexError(
                "attention_mask holds a text of fewer than 2 tokens: the answer reads the one before [SEP]"
            )
        return lengths - 2

    def grad_cam(self, maps: Sequence[Attended]) -> dict[str, Tensor]:
        """Scaled over the whole matrix to 0..1, as the authors do, before a row is read; a map without values is 0."""
        matrix = super().grad_cam(maps)["R_ss"]
        low, high = matrix.amin((1, 2), keepdim=True), matrix.amax((1, 2), keepdim=True)
        return {"R_ss": (matrix - low) / torch.where(high > low, high - low, torch.ones_like(high))}

    def image_valid(self, count: int, grid: tuple[int, int] | None) -> Tensor:
        mask: Any = self.inputs.get("visual_attention_mask")
        return super().image_valid(count, grid) if mask is None else mask.bool()


@known
class Vilt(SingleStream):
    """ViLT: patches of an image, a class token of their own before them; the first text token answers."""

    models = ("ViltForQuestionAnswering", "ViltForImageAndTextRetrieval")
    roles = {r"encoder\.layer\.\d+\.attention\.attention": ("ss",)}
    needs = ("input_ids", "pixel_values")

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        super().__init__(model, inputs)
        valid = self._patches()
        tall, wide = valid.any(2).sum(1), valid.any(1).sum(1)
        self._grids = [(int(h), int(w)) for h, w in zip(tall, wide, strict=True)]
        most = self.config.max_image_length
        if isinstance(most, int) and 0 <= most < max(h * w for h, w in self._grids):
            raise PrunexError(
                f"{type(model).__name__} looks at {most} patches drawn at random (max_image_length), and nobody knows "
                "which: set config.max_image_length = -1"
            )

    def count(self) -> int:
        return self.config.num_hidden_layers

    def _patches(self) -> Tensor:
        """Bool [B, h, w], which patches lie on the image."""
        pixels, size = self.inputs["pixel_values"], self.config.patch_size
        mask = self.inputs.get("pixel_mask")
        mask = torch.ones(len(pixels), *pixels.shape[2:], device=pixels.device) if mask is None else mask
        size = (size, size) if isinstance(size, int) else tuple(size)
        grid = (pixels.shape[2] // size[0], pixels.shape[3] // size[1])
        return F.interpolate(mask[:, None].float(), size=grid)[:, 0].bool()

    def cells(self) -> tuple[int, tuple[int, int] | None]:
        valid = self._patches()
        return 1, (int(valid.shape[1]), int(valid.shape[2]))

    def rows(self, matrices: Mapping[str, Tensor], targets: Targets, column: Tensor) -> tuple[Tensor, Tensor]:
        text, packed = super().rows(matrices, targets, column)
        # The model packs an image's own patches to the front, and pads to the largest image behind them.
        tall, wide = self.cells()[1] or (0, 0)
        cells = packed.new_zeros(len(packed), tall, wide)
        for image, (h, w) in enumerate(self._grids):
            cells[image, :h, :w] = packed[image, : h * w].view(h, w)
        return text, cells.flatten(1)

    def image_valid(self, count: int, grid: tuple[int, int] | None) -> Tensor:
        return self._patches().flatten(1)
