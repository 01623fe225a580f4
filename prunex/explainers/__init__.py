"""One published explainer a file, named as its paper names it.

All take a supported ViT, pruned or dense, float images [B, C, H, W], a target (class index, int64 [B], or None for the
predicted class; methods that know no class write it down alone) and options of their own by name, of which one that is
not allowed raises a :class:`~prunex.PrunexError`. :func:`prunex.explain` is the door in front of them.
"""

from prunex.explainers.atman import atman as atman
from prunex.explainers.attention_flow import attention_flow as attention_flow
from prunex.explainers.beyond_intuition import beyond_intuition as beyond_intuition
from prunex.explainers.diffmask import diffmask as diffmask
from prunex.explainers.dino import dino as dino
from prunex.explainers.generic_attention import generic_attention as generic_attention
from prunex.explainers.grad_cam import grad_cam as grad_cam
from prunex.explainers.grad_sam import grad_sam as grad_sam
from prunex.explainers.head_maps import head_maps as head_maps
from prunex.explainers.inherent import attributes as attributes
from prunex.explainers.inherent import concept_transformer as concept_transformer
from prunex.explainers.inherent import mean_patch as mean_patch
from prunex.explainers.inherent import vit_net as vit_net
from prunex.explainers.integrated_gradients import integrated_gradients as integrated_gradients
from prunex.explainers.legrad import legrad as legrad
from prunex.explainers.lrp import lrp as lrp
from prunex.explainers.partial_lrp import partial_lrp as partial_lrp
from prunex.explainers.r_cut import r_cut as r_cut
from prunex.explainers.raw_attention import raw_attention as raw_attention
from prunex.explainers.rollout import rollout as rollout
from prunex.explainers.shap import shap as shap
from prunex.explainers.tokentm import tokentm as tokentm
from prunex.explainers.transformer_attribution import transformer_attribution as transformer_attribution
from prunex.explainers.vit_cx import vit_cx as vit_cx
from prunex.explainers.vit_shapley import vit_shapley as vit_shapley
