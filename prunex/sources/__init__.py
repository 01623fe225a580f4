"""Models from elsewhere: ViTs of transformers as their timm twins, and transformers' wrapper of timm models.

Nothing here imports transformers before it is used; it is the extra ``prunex-vit[transformers]``.
"""

from prunex.sources.convert import from_transformers as from_transformers
