"""A ViT as a constructor call in plain values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import GluMlp, HybridEmbed, Mlp, SwiGLU
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import AttentionRope, Eva, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block
from torch import nn

from prunex.errors import PrunexError
from prunex.vit.anatomy import Anatomy, ViT, channels_of, head_classes, read
from prunex.vit.blocks.parallel import fused_out
from prunex.vit.mount import PLACES
from prunex.vit.rebuild import BLOCKS, MLPS, sketch
from prunex.vit.units import Backbone, blocks_of, head_dim
from prunex.vit.weights import misfits
from prunex.vit.widths import Shape, dense_shape, shape_of, widths_of

_ROPES = {
    "RotaryEmbeddingCat": "cat",
    "RotaryEmbeddingMixed": "mixed",
    "RotaryEmbeddingDinoV3": "dinov3",
    "RotaryEmbeddingMRope": "mrope",
}


def outline(model: Backbone) -> Anatomy:
    """What a model, also a timm Swin, looks like from outside; of that ``width`` is the last stage's."""
    if not isinstance(model, SwinTransformer):
        return read(model)
    if type(model).forward is not SwinTransformer.forward:
        raise PrunexError(
            f"{type(model).__name__} has its own forward() and is not supported: timm's SwinTransformer is"
        )
    inner: Any = model
    blocks: list[Any] = [block for _, block in blocks_of(model)]
    embed = inner.patch_embed
    return Anatomy(
        depth=len(blocks),
        width=inner.num_features,
        heads=tuple(b.attn.num_heads for b in blocks),
        head_dim=head_dim(blocks[0].attn),
        hidden=tuple(b.mlp.fc2.in_features for b in blocks),
        prefix=0,
        grid=tuple(embed.grid_size),
        image=tuple(embed.img_size),
        patch=tuple(embed.patch_size),
        channels=channels_of(embed),
        classes=head_classes(model),
        pool=inner.global_pool,
        dynamic=not embed.strict_img_size,
        readers=(),
    )


def describe(model: Backbone) -> dict[str, Any]:
    """The constructor call that makes an equal model, ``{"class": name, "args": {...}}``, as JSON holds it.

    Of a narrowed model the call makes the dense one, and ``"widths"`` says what is left of it
    (:meth:`~prunex.vit.widths.WidthSpec.plain`). Parts that plain values cannot name are refused.
    """
    spec = _windowed(model) if isinstance(model, SwinTransformer) else _described(model)
    widths = widths_of(model).plain()
    if widths:
        spec["widths"] = widths
    _check(model, spec)
    return spec


def _described(model: ViT) -> dict[str, Any]:
    if isinstance(model.patch_embed, HybridEmbed):
        raise PrunexError(
            f"cannot save a {type(model).__name__} with a convolutional stem: timm builds it by name alone"
        )
    a = _dense(read(model), dense_shape(model))
    if len(set(a.heads)) > 1 or len(set(a.hidden)) > 1:
        raise PrunexError("cannot save a model whose blocks differ in heads or MLP width")
    if isinstance(model, Eva):
        name, more = "Eva", _eva(model, a)
    elif isinstance(model, Beit):
        name, more = "Beit", _beit(model, a)
    else:
        distilled = isinstance(model, VisionTransformerDistilled)
        name, more = "VisionTransformerDistilled" if distilled else "VisionTransformer", _plain(model, a)
    return {"class": name, "args": _outside(a) | {"embed_dim": a.width, "depth": a.depth} | more}


def _outside(a: Anatomy) -> dict[str, Any]:
    return {
        "img_size": list(a.image),
        "patch_size": list(a.patch),
        "in_chans": a.channels,
        "num_classes": a.classes,
        "global_pool": a.pool,
    }


def _dense(a: Anatomy, shape: Shape | None) -> Anatomy:
    """A narrowed model's anatomy with the widths it had when it was dense."""
    if shape is None:
        return a
    heads = tuple(a.heads[0] if known is None else known[0] for known in shape.heads)
    hidden = tuple(a.hidden[0] if known is None else known for known in shape.hidden)
    d = next((known[1] for known in shape.heads if known is not None), a.head_dim)
    return replace(a, depth=len(heads), width=shape.embedding, heads=heads, head_dim=d, hidden=hidden)


def _windowed(model: Any) -> dict[str, Any]:
    """A Swin's constructor call."""
    a, shape = outline(model), dense_shape(model) or shape_of(model)
    blocks: list[Any] = [block for _, block in blocks_of(model)]
    if {(type(b.mlp), _act_name(b.mlp.act), type(b.mlp.norm)) for b in blocks} != {(Mlp, "gelu", nn.Identity)}:
        raise PrunexError("cannot save a Swin with other MLPs than timm's Mlp of GELU")
    depths = [len(stage.blocks) for stage in model.layers]
    heads, ratios, first = [], [], 0
    for depth in depths:
        stage = set(zip(shape.heads[first : first + depth], shape.hidden[first : first + depth], strict=True))
        if len(stage) > 1:
            raise PrunexError("cannot save a model whose blocks differ in heads or MLP width")
        heads.append(shape.heads[first] or (0, 0))
        ratios.append(_ratio(shape.hidden[first] or 0, blocks[first].dim))
        first += depth
    windows = [tuple(b.window_size) for b in blocks]
    args: dict[str, Any] = _outside(a) | {
        "embed_dim": model.embed_dim,
        "depths": depths,
        "num_heads": [count for count, _ in heads],
        "head_dim": [width for _, width in heads],
        "window_size": [max(w[0] for w in windows), max(w[1] for w in windows)],
        "always_partition": bool(blocks[0].always_partition),
        "strict_img_size": not a.dynamic,
        "mlp_ratio": ratios,
        "qkv_bias": blocks[0].attn.qkv.bias is not None,
        "norm_layer": _norm(model.norm),
    }
    return {"class": "SwinTransformer", "args": args}


def _check(model: Backbone, spec: dict[str, Any]) -> None:
    """Refuse what the description does not hold: another shape somewhere, or another table that no file keeps."""
    twin = sketch(spec)
    # What prunes a model hangs on it under these names, and is described elsewhere.
    state = {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in PLACES}
    wrong = misfits(twin.state_dict(), state)
    if wrong:
        hint = "; model.reset_classifier(n) makes a head that it builds" if wrong[0].startswith("head") else ""
        raise PrunexError(
            f"cannot save this {type(model).__name__}: timm builds it with other parts ({', '.join(wrong[:4])}){hint}"
        )
    tables = dict(model.named_buffers())
    for key, made in twin.named_buffers():
        table = tables.get(key, made.new_empty(0))
        if made.is_meta or table.is_meta:
            continue
        if table.shape != made.shape or not torch.allclose(table.float().cpu(), made.float(), atol=1e-2, rtol=1e-2):
            raise PrunexError(f"cannot save a {type(model).__name__} with this {key}: timm builds another one by name")
    if isinstance(model, SwinTransformer) and _windows(model) != _windows(twin):
        raise PrunexError("cannot save a Swin whose stages have windows of their own: timm builds it with other ones")


def _windows(model: SwinTransformer) -> list[tuple[Any, ...]]:
    return [(b.window_size, b.shift_size, tuple(b.input_resolution)) for _, b in blocks_of(model)]


def _plain(model: Any, a: Anatomy) -> dict[str, Any]:
    block = model.blocks[0]
    kind = next((n for n, c in BLOCKS.items() if isinstance(block, c)), None)
    if kind is None and type(block).forward is not Block.forward:  # it would be built again as a plain one
        raise PrunexError(
            f"cannot save a model with {type(block).__name__} blocks: known are Block, {', '.join(BLOCKS)}"
        )
    if kind == "ParallelScalingBlock":
        return _shared(model, a) | _scaling(block, a)
    if kind == "ParallelThingsBlock":
        norm, attn, mlp = block.attns[0].norm, block.attns[0].attn, block.ffns[0].mlp
        scaled = not isinstance(block.attns[0].ls, nn.Identity)
    else:
        norm, attn, mlp = block.norm1, block.attn, block.mlp
        scaled = kind is None and not isinstance(block.ls1, nn.Identity)
    mlp_name = next((n for n, c in MLPS.items() if type(mlp) is c), None)
    if mlp_name == "GluMlp" and not mlp.gate_last and isinstance(mlp.act, nn.SiLU):
        mlp_name = "SwiGLUPacked"
    if mlp_name is None:
        raise PrunexError(f"cannot save a model with {type(mlp).__name__} blocks: known are {', '.join(MLPS)}")
    first = mlp.fc1_g if mlp_name == "SwiGLU" else mlp.fc1
    count, each, hidden = attn.num_heads, attn.head_dim, first.out_features
    if dense_shape(model) is not None and kind != "ParallelThingsBlock":  # a narrowed one's own widths are not timm's
        count, each, hidden = a.heads[0], a.head_dim, a.hidden[0] * (2 if type(mlp) is GluMlp else 1)
    if count * each != a.width or getattr(attn, "gate", None) is not None:
        raise PrunexError("cannot save a model with attn_head_dim or gated attention: timm cannot build it by name")
    args: dict[str, Any] = _shared(model, a) | {
        "num_heads": count,
        "mlp_ratio": _ratio(hidden, a.width),
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "proj_bias": attn.proj.bias is not None,
        "init_values": 1e-5 if scaled else None,
        "norm_layer": _norm(norm),
        "act_layer": _act_name(getattr(mlp, "act", None)),
        "mlp_layer": mlp_name,
    }
    if kind is not None:
        args["block_fn"] = [kind, {"num_parallel": block.num_parallel} if kind == "ParallelThingsBlock" else {}]
    if not isinstance(attn.norm, nn.Identity):
        args["scale_attn_norm"] = True
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        args["scale_mlp_norm"] = True
    return args


def _shared(model: Any, a: Anatomy) -> dict[str, Any]:
    """What is around the blocks of a ``VisionTransformer``."""
    args: dict[str, Any] = {
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": bool(model.no_embed_class),
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "dynamic_img_size": a.dynamic,
        "dynamic_img_pad": bool(model.patch_embed.dynamic_img_pad),
    }
    if a.pool_prefix:
        args["pool_include_prefix"] = True
    if not isinstance(model.patch_embed.norm, nn.Identity):
        args["embed_norm_layer"] = _norm(model.patch_embed.norm)
    return args


def _scaling(block: Any, a: Anatomy) -> dict[str, Any]:
    """The parallel block of ViT-22B."""
    last = block.attn_out_proj if fused_out(block) is None else block.out_proj
    return {
        "num_heads": block.num_heads,
        "mlp_ratio": _ratio(block.in_split[0], a.width),
        "qkv_bias": block.in_proj.bias is not None,
        "qk_norm": not isinstance(block.q_norm, nn.Identity),
        "proj_bias": last.bias is not None,
        "init_values": None if isinstance(block.ls, nn.Identity) else 1e-5,
        "norm_layer": _norm(block.in_norm),
        "act_layer": _act_name(block.mlp_act),
        "block_fn": ["ParallelScalingBlock", {} if fused_out(block) is None else {"fuse_out_proj": True}],
    }


def _eva(model: Any, a: Anatomy) -> dict[str, Any]:
    block = model.blocks[0]
    attn = block.attn
    if attn.num_heads * (attn.proj.in_features // attn.num_heads) != a.width or getattr(attn, "gate", None) is not None:
        raise PrunexError("cannot save a model with attn_head_dim or gated attention: timm cannot build it by name")
    post = isinstance(block, EvaBlockPostNorm)
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
        "use_post_norm": post,
        "use_pre_transformer_norm": not isinstance(model.norm_pre, nn.Identity),
        "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
        "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "dynamic_img_size": a.dynamic,
        "dynamic_img_pad": a.pads,
        "norm_layer": _norm(block.norm1),
    }
    if isinstance(attn, AttentionRope):
        args["attn_type"] = "rope"
        groups = [b.attn.num_heads // getattr(b.attn, "num_kv_groups", 1) for b in model.blocks]
        if groups != [attn.num_heads] * a.depth:
            args["num_kv_heads"] = groups
    if not isinstance(attn.q_norm, nn.Identity):
        args["qk_norm"] = True
    if getattr(block, "gamma_1", None) is not None:
        args["init_values"] = 1e-5
        if block.gamma_2 is None:
            args["attn_only_layer_scale"] = True
    if a.pool == "map":
        pool = model.attn_pool
        args["attn_pool_num_heads"] = pool.num_heads
        args["attn_pool_mlp_ratio"] = _ratio(pool.mlp.fc1.out_features, a.width)
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


def _beit(model: Any, a: Anatomy) -> dict[str, Any]:
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
        "norm_layer": _norm(block.norm1),
    }
    norms_pooled = not isinstance(model.fc_norm, nn.Identity)
    if norms_pooled != (model.global_pool == "avg"):  # timm 1.0.20 knows the rule alone
        args["use_fc_norm"] = norms_pooled
    args.pop("swiglu_align_to", None)
    return args


def _mlp_of(mlp: Any, a: Anatomy) -> dict[str, Any]:
    """EVA's and BEiT's way to name an MLP; others than theirs are refused."""
    scaled = not isinstance(mlp.norm, nn.Identity)
    gated = type(mlp) in (SwiGLU, GluMlp) and isinstance(mlp.act, nn.SiLU)
    if not gated and (type(mlp) is not Mlp or _act_name(mlp.act) != "gelu"):
        raise PrunexError(f"cannot save a model with {type(mlp).__name__} of {type(mlp.act).__name__} in this family")
    args = {"mlp_ratio": _ratio(a.hidden[0], a.width), "swiglu_mlp": gated, "scale_mlp": scaled}
    if type(mlp) is SwiGLU and not scaled:
        args["swiglu_align_to"] = 1  # says which of two equal layers: the width is whole already
    return args


def _ratio(hidden: int, width: int) -> float:
    """A ratio that timm's ``int(width * ratio)`` makes the hidden width of again."""
    plain = hidden / width
    return plain if int(width * plain) == hidden else (hidden + 0.5) / width


_NORMS = ("LayerNorm", "RmsNorm", "SimpleNorm")


def _norm(norm: nn.Module) -> list[Any]:
    """Timm's name of a norm, and its epsilon."""
    name = type(norm).__name__
    if name.removesuffix("Fp32") not in _NORMS:
        raise PrunexError(f"cannot save a model with {name}: known are {', '.join(_NORMS)}")
    return [name.lower(), float(getattr(norm, "eps", 1e-6))]


def _act_name(act: nn.Module | None) -> str:
    known = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu"}
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu_tanh"
    name = "GELU" if act is None else type(act).__name__
    if name not in known:
        raise PrunexError(f"cannot save a model with activation {name}: known are {', '.join(known)}")
    return known[name]
