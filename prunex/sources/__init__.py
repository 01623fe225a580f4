"""Models from elsewhere: ViTs of transformers as their timm twins, and transformers' wrapper of timm models.

Nothing here imports transformers before it is used; it is the extra ``prunex-vit[transformers]``.
"""

import typing as _typing

from prunex.lazy import later as _later

_PLACES = {"from_transformers": "convert", "load_pretrained": "pretrained"}

__all__ = [*_PLACES]

if _typing.TYPE_CHECKING:
    from prunex.sources.convert import from_transformers as from_transformers
    from prunex.sources.pretrained import load_pretrained as load_pretrained
else:
    __getattr__ = _later("prunex.sources", _PLACES)
