"""Text and image in one stream: VisualBERT (arXiv 1908.03557) and ViLT (arXiv 2102.03334)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunex.errors import PrunexError
from prunex.multimodal.adapter import Adapter, Targets, known
from prunex.multimodal.recorder import Recording, outside_inference
from prunex.multimodal.rules import Attended, row_of


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
        row = row_of(matrices["R_ss"], self.read())
        return row[:, : self.length()], row[:, self.length() + self.cells()[0] :]

    def answering(self, targets: Targets, column: Tensor) -> Mapping[str, Tensor]:
        return {"ss": self.read()[:, None]}

    def grid(self, recording: Recording) -> tuple[int, int] | None:
        return self.cells()[1]


@known
class VisualBert(SingleStream):
    """VisualBERT: boxes without places; question answering reads the last token before [SEP]."""

    models: ClassVar[tuple[str, ...]] = ("VisualBertForQuestionAnswering",)
    roles = {r"encoder\.layer\.\d+\.attention\.self": ("ss",)}
    needs = ("input_ids", "attention_mask", "visual_embeds")
    image_parts = ("visual_attention_mask", "visual_embeds", "visual_token_type_ids")
    row_normalised = False  # as the authors roll it out

    def count(self) -> int:
        return self.config.num_hidden_layers

    def read(self) -> Tensor:
        lengths = self.inputs["attention_mask"].sum(1).long()
        if int(lengths.min()) < 2:
            raise PrunexError(
                "attention_mask holds a text of fewer than 2 tokens: the answer reads the one before [SEP]"
            )
        return lengths - 2

    def protected(self, length: int) -> list[int]:
        """[CLS], [SEP], and the token before it, which the answer reads."""
        return [0, length - 2, length - 1]

    def grad_cam(self, maps: Sequence[Attended]) -> dict[str, Tensor]:
        """Scaled over the whole matrix to 0..1, as the authors do, before a row is read; a map without values is 0."""
        matrix = super().grad_cam(maps)["R_ss"]
        low, high = matrix.amin((1, 2), keepdim=True), matrix.amax((1, 2), keepdim=True)
        return {"R_ss": (matrix - low) / torch.where(high > low, high - low, torch.ones_like(high))}


@known
class VisualBertReasoning(VisualBert):
    """VisualBERT that compares: it reads the first token."""

    models = ("VisualBertForVisualReasoning",)

    def read(self) -> Tensor:
        return SingleStream.read(self)

    def protected(self, length: int) -> list[int]:
        return SingleStream.protected(self, length)


@known
class Vilt(SingleStream):
    """ViLT: patches of an image, a class token of their own before them; the first text token answers.

    The model draws the order of an image's patches, and with ``max_image_length`` which of them it looks at: they are
    embedded here, by its own code, so that the places are known.
    """

    models = ("ViltForQuestionAnswering", "ViltForImageAndTextRetrieval")
    roles = {r"encoder\.layer\.\d+\.attention\.attention": ("ss",)}
    needs = ("input_ids", "pixel_values")

    def count(self) -> int:
        return self.config.num_hidden_layers

    def prepared(self) -> Mapping[str, Any]:
        others = {name: value for name, value in self.inputs.items() if name != "pixel_values"}
        embedded, seen, places = self._embedded(self.config.max_image_length)
        # The image's class token comes first, and lies on no cell.
        self._places, self._seen = places, seen[:, 1:].bool()
        return {**others, "image_embeds": embedded, "pixel_mask": seen}

    def _embedded(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens [B, 1 + n, D], which of them count [B, 1 + n], and the cells of the n patches, int64 [B, n]."""
        pixels, mask = self.inputs["pixel_values"], self.inputs.get("pixel_mask")
        mask = torch.ones_like(pixels[:, 0], dtype=torch.long) if mask is None else mask
        embeddings: Any = self.model.get_submodule("vilt.embeddings")
        pixels, mask = outside_inference(pixels), outside_inference(mask)
        tokens, seen, (index, grid) = embeddings.visual_embed(pixels, mask, max_image_length=most)
        self._grid = (int(grid[0]), int(grid[1]))
        return tokens, seen, index[..., 0] * self._grid[1] + index[..., 1]

    def cells(self) -> tuple[int, tuple[int, int] | None]:
        return 1, self._grid

    def rows(self, matrices: Mapping[str, Tensor], targets: Targets, column: Tensor) -> tuple[Tensor, Tensor]:
        text, drawn = super().rows(matrices, targets, column)
        # Padding among the patches has a place, too, and nothing to add there.
        cells = drawn.new_zeros(len(drawn), self._grid[0] * self._grid[1])
        return text, cells.scatter_add(1, self._places, drawn * self._seen)

    def image_valid(self, count: int, grid: tuple[int, int] | None) -> Tensor:
        """Patches that the model looked at."""
        none = torch.zeros(len(self._places), count, dtype=torch.long, device=self._places.device)
        return none.scatter_add(1, self._places, self._seen.long()) > 0

    def sample(self, sample: int, length: int, valid: Tensor) -> dict[str, Any]:
        """The part of the picture that lies on patches of the image."""
        alone = super().sample(sample, length, valid)
        if self.config.max_image_length >= 0:
            raise PrunexError(
                f"{type(self.model).__name__} draws which patches it looks at (max_image_length), so nothing can be "
                "removed from what it saw: set config.max_image_length = -1"
            )
        size = self.config.patch_size
        tall, wide = (size, size) if isinstance(size, int) else size
        pixels = alone["pixel_values"]
        cells = valid.view(pixels.shape[2] // tall, pixels.shape[3] // wide)
        pixels = pixels[:, :, : int(cells.any(1).sum()) * tall, : int(cells.any(0).sum()) * wide]
        return {**alone, "pixel_values": pixels, "pixel_mask": torch.ones_like(pixels[:, 0], dtype=torch.long)}

    def without(self, image: Tensor, places: Tensor) -> dict[str, Any]:
        """Patches leave once they are embedded, since a mask of pixels says where an image ends and no more."""
        text = {name: self.inputs[name][0][places] for name in self.text_parts if name in self.inputs}
        embedded, _, cells = self._embedded(-1)
        seen = torch.cat([image.new_ones(len(image), 1), image[:, cells[0]]], 1)
        return {**text, "image_embeds": embedded.expand(len(image), -1, -1), "pixel_mask": seen.long()}
