"""One published explainer a file, named as its paper names it."""

from prunex.explainers.generic_attention import generic_attention
from prunex.explainers.lrp import lrp
from prunex.explainers.partial_lrp import partial_lrp
from prunex.explainers.raw_attention import raw_attention
from prunex.explainers.rollout import rollout
from prunex.explainers.tokentm import tokentm
from prunex.explainers.transformer_attribution import transformer_attribution

__all__ = [
    "generic_attention",
    "lrp",
    "partial_lrp",
    "raw_attention",
    "rollout",
    "tokentm",
    "transformer_attribution",
]
