"""Models of text and image, explained and measured; their libraries are the extra ``prunex-vit[multimodal]``.

Nothing here imports transformers: a model that was given has done so already.
"""

import typing as _typing

from prunex.lazy import later as _later

_PLACES = {
    "Adapter": "adapter",
    "ModelRemover": "removal",
    "MultimodalExplanation": "explanation",
    "Query": "explanation",
    "Question": "vqa",
    "cell_masks": "masks",
    "explain": "explaining",
    "image_masks": "masks",
    "known": "adapter",
    "models": "families",
    "questions": "removal",
    "register": "registering",
    "vqa_perturbation": "vqa",
}

__all__ = [*_PLACES]

if _typing.TYPE_CHECKING:
    from prunex.multimodal.adapter import Adapter as Adapter
    from prunex.multimodal.adapter import known as known
    from prunex.multimodal.explaining import explain as explain
    from prunex.multimodal.explanation import MultimodalExplanation as MultimodalExplanation
    from prunex.multimodal.explanation import Query as Query
    from prunex.multimodal.families import models as models
    from prunex.multimodal.masks import cell_masks as cell_masks
    from prunex.multimodal.masks import image_masks as image_masks
    from prunex.multimodal.registering import register as register
    from prunex.multimodal.removal import ModelRemover as ModelRemover
    from prunex.multimodal.removal import questions as questions
    from prunex.multimodal.vqa import Question as Question
    from prunex.multimodal.vqa import vqa_perturbation as vqa_perturbation
else:
    __getattr__ = _later("prunex.multimodal", _PLACES)
