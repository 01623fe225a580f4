"""Models of text and image, explained and measured; their libraries are the extra ``prunex-vit[multimodal]``.

Nothing here imports transformers: a model that was given has done so already.
"""

import typing as _typing

from prunex.lazy import later as _later

_PLACES = {
    "Adapter": "adapter",
    "MultimodalExplanation": "explanation",
    "Query": "explanation",
    "explain": "explaining",
    "image_masks": "masks",
    "known": "adapter",
    "models": "families",
    "register": "registering",
}

__all__ = [*_PLACES]

if _typing.TYPE_CHECKING:
    from prunex.multimodal.adapter import Adapter as Adapter
    from prunex.multimodal.adapter import known as known
    from prunex.multimodal.explaining import explain as explain
    from prunex.multimodal.explanation import MultimodalExplanation as MultimodalExplanation
    from prunex.multimodal.explanation import Query as Query
    from prunex.multimodal.families import models as models
    from prunex.multimodal.masks import image_masks as image_masks
    from prunex.multimodal.registering import register as register
else:
    __getattr__ = _later("prunex.multimodal", _PLACES)
