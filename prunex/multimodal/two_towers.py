"""Text and image apart until they are compared: CLIP (arXiv 2103.00020) and OWL-ViT (arXiv 2205.06230)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunex.errors import PrunexError
from prunex.multimodal.adapter import Adapter, Pass, Targets, classes_of, known
from prunex.multimodal.detr import Detector
from prunex.multimodal.recorder import Recording
from prunex.multimodal.rules import row_of


def end_of_text(ids: Tensor, end: int | None) -> Tensor:
    """The token that a CLIP text tower reads, int64 [N]: the first that ends the text, or the largest number.

    Old configurations say 2, which no vocabulary means; the library then takes the largest, and so do we.
    """
    return ids.argmax(-1) if end is None or end == 2 else (ids == end).int().argmax(-1)


class TwoTowers(Adapter):
    """What models share whose image and texts meet only in the score."""

    reads = ("tt", "ii")
    needs: ClassVar[tuple[str, ...]] = ("input_ids", "pixel_values")
    compares = True

    def count(self) -> int:
        return self.config.text_config.num_hidden_layers + self.config.vision_config.num_hidden_layers

    def chosen(self, targets: Targets, column: Tensor) -> Tensor:
        """Each image's text among all texts, int64 [B]; an image that waits (column -1) has its first."""
        return self.texts(targets.classes).gather(1, column.clamp(min=0)[:, None])[:, 0]

    def of_pass(self, matrices: dict[str, Tensor], targets: Targets, column: Tensor) -> dict[str, Tensor]:
        # A text that several images share was run once, and has one matrix.
        texts = self.chosen(targets, column)
        return {name: m[texts] if name == "R_tt" else m for name, m in matrices.items()}

    def text_valid(self) -> Tensor | None:
        # A detector has no text of its own; which text belongs to which image, only targets know.
        return Adapter.text_valid(self)

    def grid(self, recording: Recording) -> tuple[int, int] | None:
        height, width = self.inputs["pixel_values"].shape[-2:]
        patch = self.config.vision_config.patch_size
        return height // patch, width // patch


@known
class Clip(TwoTowers):
    """CLIP: the score is the scaled cosine of one image and one text; a class is a text's number.

    With None each image is explained for the text it is most like.
    """

    models = ("CLIPModel",)
    roles = {
        r"text_model\.encoder\.layers\.\d+\.self_attn": ("tt",),
        r"vision_model\.encoder\.layers\.\d+\.self_attn": ("ii",),
    }
    scores = "logits_per_image"

    def texts(self, classes: Tensor) -> Tensor:
        return classes

    def targets(self, recording: Recording, target: Any, options: Mapping[str, Any]) -> Targets:
        """A text of each image, or K. Images that share a text wait for each other: it has one map a pass."""
        logits = self.logits(recording.outputs)
        classes = classes_of(target, logits)
        scores = logits.gather(1, classes)
        passes = []
        for k in range(classes.shape[1]):
            waiting = torch.ones(len(classes), dtype=torch.bool, device=classes.device)
            while waiting.any():
                taken: set[int] = set()
                column = torch.full((len(classes),), -1, device=classes.device)
                for image in waiting.nonzero()[:, 0].tolist():
                    text = int(classes[image, k])
                    # A shared text was run once: its map has room for one image's gradient a pass.
                    if text not in taken:
                        taken.add(text)
                        column[image] = k
                waiting &= column < 0
                passes.append(Pass(scores[column >= 0, k].sum(), column))
        single = not (isinstance(target, Tensor) and target.ndim == 2)
        return Targets(classes, passes, scores.detach(), single=single)

    def answering(self, targets: Targets, column: Tensor) -> Mapping[str, Tensor]:
        end = self.config.text_config.eos_token_id
        first = torch.zeros(len(column), 1, dtype=torch.long)
        return {"tt": end_of_text(self.inputs["input_ids"], end)[:, None], "ii": first}

    def rows(self, matrices: Mapping[str, Tensor], targets: Targets, column: Tensor) -> tuple[Tensor, Tensor]:
        """The end of the text, and the image's class token."""
        texts = self.chosen(targets, column)
        read = end_of_text(self.inputs["input_ids"][texts], self.config.text_config.eos_token_id)
        return row_of(matrices["R_tt"], read), matrices["R_ii"][:, 0, 1:]


@known
class OwlViT(TwoTowers, Detector):
    """OWL-ViT: every patch is an object query, and every text a class.

    A patch's score reads two tokens of the image, the patch and the class token that multiplies it: its relevance is
    the sum of both rows (ours; the paper of the rules has no such model).
    """

    models = ("OwlViTForObjectDetection",)
    roles = {
        r"owlvit\.text_model\.encoder\.layers\.\d+\.self_attn": ("tt",),
        r"owlvit\.vision_model\.encoder\.layers\.\d+\.self_attn": ("ii",),
    }

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        super().__init__(model, inputs)
        texts, images = len(inputs["input_ids"]), len(inputs["pixel_values"])
        if texts % images:
            raise PrunexError(
                f"inputs hold {texts} texts for {images} images: give as many for each, as the processor does"
            )
        self.per_image = texts // images

    def probability(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def texts(self, classes: Tensor) -> Tensor:
        """Each image has texts of its own."""
        return classes + torch.arange(len(classes), device=classes.device)[:, None] * self.per_image

    def targets(self, recording: Recording, target: Any, options: Mapping[str, Any]) -> Targets:
        """A text of each patch. Padding, whose first token is 0, is no text."""
        targets = super().targets(recording, target, options)
        padding = self.inputs["input_ids"][self.texts(targets.classes), 0] == 0
        if (padding & torch.as_tensor(targets.kept)).any():
            image, k = (padding & torch.as_tensor(targets.kept)).nonzero()[0].tolist()
            raise PrunexError(
                f"target: text {int(targets.classes[image, k])} of image {image} is padding (its first token is 0), "
                "which nothing resembles: give another"
            )
        return targets

    def answering(self, targets: Targets, column: Tensor) -> Mapping[str, Tensor]:
        patch = targets.query(column) + 1
        both = torch.stack([torch.zeros_like(patch), patch], 1)
        # Whatever the configuration says ends a text: this tower reads the largest number.
        return {"tt": end_of_text(self.inputs["input_ids"], None)[:, None], "ii": both}

    def rows(self, matrices: Mapping[str, Tensor], targets: Targets, column: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.inputs["input_ids"][self.chosen(targets, column)]
        every = torch.arange(len(column), device=column.device)
        # The class token is the first, so that patches are numbered from 1.
        image = matrices["R_ii"][every, targets.query(column) + 1] + matrices["R_ii"][:, 0]
        return row_of(matrices["R_tt"], end_of_text(ids, None)), image[:, 1:]
