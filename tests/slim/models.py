"""Models that the tests of this folder save and load: every small family, and three pruners."""

from functools import partial

import torch
from timm.layers import SwiGLU, SwiGLUPacked
from timm.layers.activations import QuickGELU
from torch import nn

import prunex
from tests.vits import randomise, tiny

FAMILIES = {
    "vit": {},
    "deit_distilled": {"family": "deit_distilled"},
    "dinov2_reg": {"family": "dinov2_reg"},
    "dinov2_swiglu": {"family": "dinov2", "mlp_layer": SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 8 / 3},
    "dinov2_swiglu_packed": {"init_values": 0.5, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.0},
    "avg_pool_no_class": {"family": "avg_pool_no_class"},
    "avg_pool": {"family": "avg_pool"},
    "avg_pool_prefix": {"family": "avg_pool_prefix"},
    "max_pool": {"family": "max_pool"},
    "qk_norm": {"family": "qk_norm"},
    "attn_norm": {"family": "attn_norm"},
    "dynamic": {"family": "dynamic"},
    "dynamic_pad": {"family": "dynamic", "dynamic_img_pad": True},
    "clip_quick_gelu": {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5), "act_layer": QuickGELU},
    "no_pos_embed": {"family": "no_pos_embed"},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
    "not_square": {"family": "not_square"},
    "one_channel": {"in_chans": 1},
    "headless": {"num_classes": 0},
    "fc_norm": {"global_pool": "avg", "fc_norm": False, "final_norm": True},
}

METHODS = {
    "topk": {"keep_ratio": 0.6},
    "evit": {"keep_ratio": 0.6},
    "evit_not_fused": {"keep_ratio": [0.9, 0.6, 0.5], "fuse": False},
    "dynamicvit": {"keep_ratio": 0.6},
    "tome": {"r": 3},
    "diffrate": {"keep_ratio": 0.7},
    "ppt": {"r": 3, "tau": 0.01},
    "topk_shift": {"keep_ratio": 0.6, "score": "shift"},
}


def model_of(family="vit", method=None):
    """A tiny model of a family, pruned or dense, in eval mode, whose predictors decide something."""
    model = tiny(**FAMILIES[family])
    if method is not None:
        pruning = prunex.attach(model, method.split("_")[0], **METHODS[method])
        randomise(pruning.pruner)
    return model


def pixels(model, batch=3, size=None, seed=1):
    """Images of a model's own size, channels and dtype."""
    h, w = size or model.patch_embed.img_size
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model.patch_embed.proj.in_channels, h, w, generator=generator)
    return x.to(next(model.parameters()).dtype)
