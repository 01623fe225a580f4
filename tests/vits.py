"""Tiny timm ViTs of every supported family, with weights lively enough that attention is not uniform."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import RelPosMlp, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, ParallelScalingBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

# Those that between them have most of what families differ in.
QUICK_FAMILIES = [
    "deit_distilled",
    "dinov2_giant",
    "dinov2_reg",
    "avg_pool_prefix",
    "avg_pool_no_class",
    "clip",
    "eva02",
    "beit",
]


def quick(names, chosen):
    """Parameters of a test: the chosen names (or tuples of such), and the rest of them marked slow."""
    chosen, slow = set(chosen), pytest.mark.slow
    return [n if n in chosen else pytest.param(*(n if isinstance(n, tuple) else [n]), marks=slow) for n in names]


SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}

# Constructor arguments of each family; the first ones name published models, the rest single features of theirs.
FAMILIES = {
    "vit": {},
    "deit_distilled": {"cls": VisionTransformerDistilled},
    "deit3": {"no_embed_class": True, "init_values": 0.5},
    "dinov2": {"init_values": 0.5},
    "dinov2_giant": {"init_values": 0.5, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 8 / 3},
    "dinov2_reg": {"init_values": 0.5, "reg_tokens": 4, "no_embed_class": True},
    "avg_pool": {"global_pool": "avg"},
    "avg_pool_no_class": {"global_pool": "avg", "class_token": False},
    "avg_pool_no_class_reg": {"global_pool": "avg", "class_token": False, "reg_tokens": 2},
    "avg_pool_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "avgmax_pool": {"global_pool": "avgmax"},
    "max_pool": {"global_pool": "max"},
    "layer_scale": {"init_values": 0.3},
    "qk_norm": {"qk_norm": True},
    "attn_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_embed_class": {"no_embed_class": True},
    "clip": {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "no_pos_embed": {"pos_embed": "none"},
    "no_qkv_bias": {"qkv_bias": False},
    "not_square": {"img_size": (40, 24), "patch_size": 8},
    "dynamic": {"dynamic_img_size": True},
}

# timm 1.0.20 adds the MLP's own bias of such a block in another place, and such models are refused.
OLD_TIMM = not hasattr(ParallelScalingBlock, "reset_parameters")
ROPE = {"cls": Eva, "use_rot_pos_emb": True}
# Families of other blocks; tests/vit/families.py has one of every family.
MORE_FAMILIES = {
    "eva02": ROPE | {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "mlp_ratio": 8 / 3},
    "dinov3": ROPE
    | {
        "rope_type": "dinov3",
        "rope_temperature": 100.0,
        "rope_rotate_half": True,
        "use_abs_pos_emb": False,
        "num_reg_tokens": 4,
        "init_values": 0.5,
        "global_pool": "token",
        "dynamic_img_size": True,
    },
    "rope_mixed": ROPE | {"rope_type": "mixed", "no_embed_class": True, "global_pool": "token"},
    "beit": {"cls": Beit, "use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.5},
    "beit_shared": {"cls": Beit, "use_shared_rel_pos_bias": True, "global_pool": "token"},
    "relpos": {
        "cls": VisionTransformerRelPos,
        "rel_pos_type": "bias",
        "class_token": True,
        "global_pool": "token",
        "init_values": 0.5,
    },
    "relpos_shared": {
        "cls": VisionTransformerRelPos,
        "rel_pos_type": "mlp-swin",
        "rel_pos_dim": 20,
        "shared_rel_pos": True,
        "block_fn": ResPostRelPosBlock,
        "init_values": None,
        "qk_norm": True,
        "fc_norm": True,
        "img_size": (40, 24),
    },
    "cait": {"cls": Cait, "init_values": 0.5, "depth_token_only": 3, "mlp_ratio_token_only": 2.0, "img_size": (24, 40)},
    "cait_mean": {"cls": Cait, "init_values": 0.5, "depth_token_only": 1, "global_pool": "avg"},
    "differential": {"attn_layer": "diff", "qk_norm": True, "reg_tokens": 2, "scale_attn_norm": True},
    "siglip": {"class_token": False, "global_pool": "map"},
    "parallel_scaling": {"block_fn": ParallelScalingBlock, "qkv_bias": OLD_TIMM, "qk_norm": True},
    "res_post": {"block_fn": ResPostBlock, "class_token": False, "global_pool": "avg"},
}
ALL_FAMILIES = FAMILIES | MORE_FAMILIES


def tiny(family="vit", seed=0, **kwargs):
    """A tiny ViT of a family in eval mode; keyword arguments go to timm's constructor."""
    args = SIZES | ALL_FAMILIES[family] | kwargs
    if family == "rope_mixed" and OLD_TIMM:
        pytest.skip("this timm computes mixed rotary tables in float32 alone")
    if "attn_layer" in args and not hasattr(timm.layers, "DiffAttention"):
        pytest.skip("this timm has no differential attention")
    cls = args.pop("cls", VisionTransformer)
    model = lively(cls(**args), seed).eval()
    for pairs in (m for m in model.modules() if isinstance(m, RelPosMlp)):
        pairs.mlp.drop1.p = 0  # timm draws biases in training, without an option
    if args.get("pos_embed") == "none" and model._pos_embed(torch.zeros(1, 1, 1, model.embed_dim)).shape[1] == 1:
        pytest.skip("this timm leaves prefix tokens out where there is no position embedding")
    return model


def weightless(build, *args, **kwargs):
    """A model that needs no memory for its weights: counting needs shapes alone."""
    try:
        with torch.device("meta"):
            return build(*args, **kwargs).eval()
    except RuntimeError:  # timm 1.0.20 reads numbers while it builds
        return build(*args, **kwargs).eval().to("meta")


def geometry(name="deit_small_patch16_224", **kwargs):
    """A published geometry without weights."""
    return weightless(timm.create_model, name, **kwargs)


def gated(**kwargs):
    """A tiny ViT whose attention has sigmoid gates."""
    model = tiny(**kwargs)
    try:
        for block in model.blocks:
            block.attn = Attention(48, 3, qkv_bias=True, gated=True)
    except TypeError:
        pytest.skip("this timm's attention has no gates")
    return lively(model).eval()


def lively(model, seed=0):
    """Random weights whose attention is peaked but not saturated (timm's own start is nearly uniform)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
            if name.endswith(("gamma", "gamma_1", "gamma_2")):  # LayerScale
                p.mul_(1 + 0.2 * noise)
            elif p.ndim == 1:  # biases, or the scale of a norm
                p.copy_((1 if name.endswith("weight") else 0) + 0.1 * noise)
            elif "token" in name or "pos_embed" in name:
                p.copy_(0.5 * noise)
            else:
                gain = 1.8 if any(part in name for part in ("qkv", "q_proj", "k_proj", "in_proj")) else 1.0
                p.copy_(gain * noise / p[0].numel() ** 0.5)
    return model


def images(batch=3, size=(32, 32), seed=1, dtype=torch.float32):
    """Standard-normal images [B, 3, H, W]."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def images_for(model, batch=3, seed=1):
    """Images of a model's own size and dtype."""
    return images(batch, tuple(model.patch_embed.img_size), seed, next(model.parameters()).dtype)


def state_of(model):
    """A copy of everything ``attach`` might disturb: tensors, instance attributes, children, flags."""
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "children": [n for n, _ in model.named_modules()],
        "flags": [m.training for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "hooks": {n: [len(getattr(m, a)) for a in vars(m) if a.endswith("_hooks")] for n, m in model.named_modules()},
    }


def assert_same_state(model, before):
    """The model is what :func:`state_of` saw, bit for bit."""
    after = state_of(model)
    tensors = after.pop("tensors")
    wanted = before["tensors"]
    assert list(tensors) == list(wanted)
    for name, value in tensors.items():
        assert torch.equal(value, wanted[name]), name
    for key, value in after.items():
        assert value == before[key], key


def randomise(module, seed=0, std=0.3):
    """Normal noise in every parameter, so that a fresh predictor decides something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(std * torch.randn(p.shape, generator=generator).to(p))
    return module


def largest(a, b):
    """Largest absolute difference."""
    return float((a.detach().double() - b.detach().double()).abs().max())


def relative(a, b):
    """Largest absolute difference over the largest absolute value of ``b``."""
    return largest(a, b) / max(float(b.detach().abs().max()), 1e-30)
