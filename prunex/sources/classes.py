"""Which classes of transformers are known here, by name; told without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunex.errors import PrunexError

WRAPPERS = ("TimmWrapperForImageClassification", "TimmWrapperModel")  # of timm models, which need no twin
Answer = Literal["class token", "tokens", "pooler_output", "image_embeds", "logits"]


@dataclass(frozen=True)
class Known:
    """One class of transformers.

    Attributes:
        tower: Path of the image tower; empty for the model itself.
        head: Path of the linear layer behind the tower, if there is one.
        pool: What the head, or the answer, is of, as timm's ``global_pool`` has it.
        answer: What of the model's output its twin gives.
        both: Whether the head reads the class token beside the mean patch.
        pooled_norm: Whether the tower's last norm lies between its blocks and this answer.
    """

    tower: str = ""
    head: str = ""
    pool: str = "token"
    answer: Answer = "logits"
    both: bool = False
    pooled_norm: bool = True


CLASSES = {
    "ViTModel": Known(answer="class token"),
    "ViTForImageClassification": Known("vit", "classifier"),
    "DeiTModel": Known(answer="class token"),
    "DeiTForImageClassification": Known("deit", "classifier"),
    "DeiTForImageClassificationWithTeacher": Known("deit", "cls_classifier"),
    "Dinov2Model": Known(answer="class token"),
    "Dinov2ForImageClassification": Known("dinov2", "classifier", both=True),
    "Dinov2WithRegistersModel": Known(answer="class token"),
    "Dinov2WithRegistersForImageClassification": Known("dinov2_with_registers", "classifier", both=True),
    "DINOv3ViTModel": Known(answer="class token"),
    "CLIPModel": Known("vision_model", "visual_projection", answer="image_embeds"),
    "CLIPVisionModel": Known(answer="pooler_output"),
    "CLIPVisionModelWithProjection": Known("vision_model", "visual_projection", answer="image_embeds"),
    "CLIPForImageClassification": Known("vision_model", "classifier", "avg", pooled_norm=False),
    "SiglipModel": Known("vision_model", pool="map", answer="image_embeds"),
    "SiglipVisionModel": Known(pool="map", answer="pooler_output"),
    "SiglipForImageClassification": Known("vision_model", "classifier", "avg"),
    "Siglip2Model": Known("vision_model", pool="map", answer="image_embeds"),
    "Siglip2VisionModel": Known(pool="map", answer="pooler_output"),
    "Siglip2ForImageClassification": Known("vision_model", "classifier", "avg"),
    "BeitModel": Known(answer="pooler_output"),
    "BeitForImageClassification": Known("beit", "classifier"),
}


def no_twin(name: str) -> PrunexError:
    """The error for a class that has none."""
    hint = ""
    if name in WRAPPERS:
        hint = "; it holds a timm model, which prunex.attach and prunex.explain take as it is"
    return PrunexError(f"{name} has no timm twin that is known{hint}; known are {', '.join(CLASSES)}")
