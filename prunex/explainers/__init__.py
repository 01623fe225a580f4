"""One published explainer a file, named as its paper names it."""

from prunex.explainers.atman import atman
from prunex.explainers.attention_flow import attention_flow
from prunex.explainers.beyond_intuition import beyond_intuition
from prunex.explainers.diffmask import diffmask
from prunex.explainers.dino import dino
from prunex.explainers.generic_attention import generic_attention
from prunex.explainers.grad_cam import grad_cam
from prunex.explainers.grad_sam import grad_sam
from prunex.explainers.head_maps import head_maps
from prunex.explainers.integrated_gradients import integrated_gradients
from prunex.explainers.lrp import lrp
from prunex.explainers.partial_lrp import partial_lrp
from prunex.explainers.r_cut import r_cut
from prunex.explainers.raw_attention import raw_attention
from prunex.explainers.rollout import rollout
from prunex.explainers.shap import shap
from prunex.explainers.tokentm import tokentm
from prunex.explainers.transformer_attribution import transformer_attribution
from prunex.explainers.vit_cx import vit_cx
from prunex.explainers.vit_shapley import vit_shapley

__all__ = [
    "atman",
    "attention_flow",
    "beyond_intuition",
    "diffmask",
    "dino",
    "generic_attention",
    "grad_cam",
    "grad_sam",
    "head_maps",
    "integrated_gradients",
    "lrp",
    "partial_lrp",
    "r_cut",
    "raw_attention",
    "rollout",
    "shap",
    "tokentm",
    "transformer_attribution",
    "vit_cx",
    "vit_shapley",
]
