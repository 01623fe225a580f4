"""One published explainer a file, named as its paper names it."""

from prunex.explainers.generic_attention import generic_attention
from prunex.explainers.raw_attention import raw_attention
from prunex.explainers.rollout import rollout
from prunex.explainers.tokentm import tokentm

__all__ = ["generic_attention", "raw_attention", "rollout", "tokentm"]
