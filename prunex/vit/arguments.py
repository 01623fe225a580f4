"""What the constructor call of each family but ViT's own says of its blocks, in plain values."""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, LayerScale, Mlp, RelPosMlp, SwiGLU
from timm.models.eva import AttentionRope, EvaBlockPostNorm
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from torch import nn

from prunex.errors import PrunexError
from prunex.vit.anatomy import Anatomy

_ROPES = {
    "RotaryEmbeddingCat": "cat",
    "RotaryEmbeddingMixed": "mixed",
    "RotaryEmbeddingDinoV3": "dinov3",
    "RotaryEmbeddingMRope": "mrope",
}
_NORMS = ("LayerNorm", "RmsNorm", "SimpleNorm")


def eva(model: Any, a: Anatomy) -> dict[str, Any]:
    """What timm's ``Eva`` is called with, beside what every model is."""
    block = model.blocks[0]
    attn = block.attn
    if attn.num_heads * (attn.proj.in_features // attn.num_heads) != a.width or getattr(attn, "gate", None) is not None:
        raise PrunexError("cannot save a model with attn_head_dim or gated attention: timm cannot build it by name")
    args: dict[str, Any] = _mlp_of(block.mlp, a) | {
        "num_heads": attn.num_heads,
        "qkv_bias": getattr(attn, "q_bias", None) is not None or (attn.qkv or attn.q_proj).bias is not None,
        "qkv_fused": attn.qkv is not None,
        "scale_attn_inner": not isinstance(attn.norm, nn.Identity),
        "class_token": model.cls_token is not None,
        "num_reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": bool(model.no_embed_class),
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_rot_pos_emb": model.rope is not None,
        "use_post_norm": isinstance(block, EvaBlockPostNorm),
        "use_pre_transformer_norm": not isinstance(model.norm_pre, nn.Identity),
        "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
        "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "dynamic_img_size": a.dynamic,
        "dynamic_img_pad": a.pads,
        "norm_layer": norm_name(block.norm1),
    }
    if isinstance(attn, AttentionRope):
        args["attn_type"] = "rope"
        groups = [b.attn.num_heads // getattr(b.attn, "num_kv_groups", 1) for b in model.blocks]
        if groups != [attn.num_heads] * a.depth:
            args["num_kv_heads"] = groups
    if not isinstance(attn.q_norm, nn.Identity):
        args["qk_norm"] = True
    if getattr(block, "gamma_1", None) is not None:
        args["init_values"] = 1e-5  # whatever: the file holds what became of it
        if block.gamma_2 is None:
            args["attn_only_layer_scale"] = True
    if a.pool == "map":
        pool = model.attn_pool
        args["attn_pool_num_heads"] = pool.num_heads
        args["attn_pool_mlp_ratio"] = ratio(pool.mlp.fc1.out_features, a.width)
    return args | (_rope_args(model.rope, attn) if model.rope is not None else {})


def _rope_args(rope: Any, attn: Any) -> dict[str, Any]:
    kind = _ROPES.get(type(rope).__name__)
    if kind is None:
        raise PrunexError(f"cannot save a model with {type(rope).__name__}: known are {', '.join(_ROPES)}")
    args = {"rope_type": kind, "rope_temperature": float(rope.temperature), "rope_grid_indexing": rope.grid_indexing}
    if kind in ("cat", "dinov3"):
        args["rope_grid_offset"] = float(rope.grid_offset)
        args["rope_rotate_half"] = bool(getattr(attn, "rotate_half", False))
    if kind == "cat" and rope.ref_feat_shape is not None:
        args["ref_feat_shape"] = list(rope.ref_feat_shape)
    if kind == "mrope":
        args["rope_mrope_section"] = list(rope.mrope_section)
    return args


def beit(model: Any, a: Anatomy) -> dict[str, Any]:
    """The same of ``Beit``."""
    block = model.blocks[0]
    attn = block.attn
    if attn.num_heads * (attn.proj.in_features // attn.num_heads) != a.width or attn.proj.in_features != a.width:
        raise PrunexError("cannot save a model with attn_head_dim: timm cannot build it by name")
    args = _mlp_of(block.mlp, a) | {
        "num_heads": attn.num_heads,
        "qkv_bias": attn.q_bias is not None,
        "init_values": 1e-5 if block.gamma_1 is not None else None,
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_rel_pos_bias": attn.relative_position_bias_table is not None,
        "use_shared_rel_pos_bias": model.rel_pos_bias is not None,
        "norm_layer": norm_name(block.norm1),
    }
    norms_pooled = not isinstance(model.fc_norm, nn.Identity)
    if norms_pooled != (model.global_pool == "avg"):  # timm 1.0.20 knows the rule alone
        args["use_fc_norm"] = norms_pooled
    # timm's Beit has no such argument.
    args.pop("swiglu_align_to", None)
    return args


def relpos(model: Any, a: Anatomy) -> dict[str, Any]:
    """The same of ``VisionTransformerRelPos``."""
    block = model.blocks[0]
    attn, mlp, pairs = block.attn, block.mlp, model.shared_rel_pos or block.attn.rel_pos
    if type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity):
        raise PrunexError(f"cannot save a {type(model).__name__} with {type(mlp).__name__} blocks: known is Mlp")
    args: dict[str, Any] = {
        "num_heads": attn.num_heads,
        "mlp_ratio": ratio(a.hidden[0], a.width),
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "init_values": 1e-5 if isinstance(getattr(block, "ls1", None), LayerScale) else None,
        "class_token": model.cls_token is not None,
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "rel_pos_type": "bias",
        "shared_rel_pos": model.shared_rel_pos is not None,
        "norm_layer": norm_name(block.norm1),
        "act_layer": act_name(mlp.act),
    }
    if isinstance(pairs, RelPosMlp):
        args |= {"rel_pos_type": f"mlp-{pairs.mode}", "rel_pos_dim": pairs.mlp.fc1.out_features}
    if isinstance(block, ResPostRelPosBlock):
        args["block_fn"] = ["ResPostRelPosBlock", {}]
    return args


def cait(model: Any, a: Anatomy) -> dict[str, Any]:
    """The same of ``Cait``."""
    block, late = model.blocks[0], model.blocks_token_only
    # timm's constructor takes one MLP for all blocks, the late ones too.
    mlps = {(type(b.mlp), act_name(b.mlp.act), type(b.mlp.norm)) for b in (*model.blocks, *(late or ()))}
    if late is None or len(mlps) > 1 or (type(block.mlp), type(block.mlp.norm)) != (Mlp, nn.Identity):
        what = "without its last blocks" if late is None else "with other MLPs than timm's Mlp"
        raise PrunexError(f"cannot save a {type(model).__name__} {what}")
    args: dict[str, Any] = {
        "num_heads": block.attn.num_heads,
        "mlp_ratio": ratio(a.hidden[0], a.width),
        "qkv_bias": block.attn.qkv.bias is not None,
        "init_values": 1e-5,
        "depth_token_only": len(late),
        "norm_layer": norm_name(block.norm1),
        "act_layer": act_name(block.mlp.act),
    }
    if len(late):
        args["mlp_ratio_token_only"] = ratio(late[0].mlp.fc1.out_features, a.width)
    return args


def _mlp_of(mlp: Any, a: Anatomy) -> dict[str, Any]:
    """EVA's and BEiT's way to name an MLP; others than theirs are refused."""
    scaled = not isinstance(mlp.norm, nn.Identity)
    gated = type(mlp) in (SwiGLU, GluMlp) and isinstance(mlp.act, nn.SiLU)
    if not gated and (type(mlp) is not Mlp or act_name(mlp.act) != "gelu"):
        raise PrunexError(f"cannot save a model with {type(mlp).__name__} of {type(mlp.act).__name__} in this family")
    args = {"mlp_ratio": ratio(a.hidden[0], a.width), "swiglu_mlp": gated, "scale_mlp": scaled}
    if type(mlp) is SwiGLU and not scaled:
        args["swiglu_align_to"] = 1  # says which of two equal layers: the width is whole already
    return args


def ratio(hidden: int, width: int) -> float:
    """A ratio that timm's ``int(width * ratio)`` makes the hidden width of again."""
    # A product may come out just below the whole number that it stands for, which int() takes one lower.
    plain = hidden / width
    return plain if int(width * plain) == hidden else (hidden + 0.5) / width


def norm_name(norm: nn.Module) -> list[Any]:
    """Timm's name of a norm, and its epsilon."""
    # timm has a name of its own for those that compute in float32, the class's in small letters.
    name = type(norm).__name__
    if name.removesuffix("Fp32") not in _NORMS:
        raise PrunexError(f"cannot save a model with {name}: known are {', '.join(_NORMS)}")
    return [name.lower(), float(getattr(norm, "eps", 1e-6))]


def act_name(act: nn.Module | None) -> str:
    """Timm's name of an activation."""
    known = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu"}
    # torch has one class for both forms of GELU, timm a name for each.
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu_tanh"
    name = "GELU" if act is None else type(act).__name__
    if name not in known:
        raise PrunexError(f"cannot save a model with activation {name}: known are {', '.join(known)}")
    return known[name]
