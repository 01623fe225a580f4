"""A ViT as a constructor call in plain values, and from it an equal model with fresh weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import timm.layers
import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import AttentionRope, Eva, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunex.errors import PrunexError
from prunex.untrusted import odd_dtypes
from prunex.vit.anatomy import Anatomy, ViT, head_classes, read
from prunex.vit.blocks.parallel import fused_out
from prunex.vit.units import Backbone, blocks_of, head_dim
from prunex.vit.widths import Shape, WidthSpec, dense_shape, narrow, widths_of

_MLPS = {name: getattr(timm.layers, name) for name in ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked")}
_BLOCKS = {cls.__name__: cls for cls in (ResPostBlock, ParallelThingsBlock, ParallelScalingBlock)}
_CLASSES = {cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled, Eva, Beit, SwinTransformer)}
_ROPES = {
    "RotaryEmbeddingCat": "cat",
    "RotaryEmbeddingMixed": "mixed",
    "RotaryEmbeddingDinoV3": "dinov3",
    "RotaryEmbeddingMRope": "mrope",
}
# A description may come from anywhere: what it may say, by kind, and how large that may be without a file to hold it.
_MAY_SAY = {
    "size": ("img_size", "patch_size", "window_size", "ref_feat_shape"),
    "whole": ("in_chans", "num_classes", "embed_dim", "depth", "reg_tokens", "num_reg_tokens", "swiglu_align_to"),
    "whole numbers": ("num_heads", "depths", "head_dim", "num_kv_heads", "attn_pool_num_heads", "rope_mrope_section"),
    "numbers": ("mlp_ratio", "attn_pool_mlp_ratio", "init_values", "rope_temperature", "rope_grid_offset"),
    "name": ("global_pool", "pos_embed", "act_layer", "mlp_layer", "attn_type", "rope_type", "rope_grid_indexing"),
    "norm": ("norm_layer", "embed_norm_layer"),
    "block": ("block_fn",),
    "flag": (
        "always_partition", "attn_only_layer_scale", "class_token", "dynamic_img_pad", "dynamic_img_size", "fc_norm",
        "final_norm", "no_embed_class", "pool_include_prefix", "pre_norm", "proj_bias", "qk_norm", "qkv_bias",
        "qkv_fused", "rope_rotate_half", "scale_attn_inner", "scale_attn_norm", "scale_mlp", "scale_mlp_norm",
        "strict_img_size", "swiglu_mlp", "use_abs_pos_emb", "use_fc_norm", "use_post_norm",
        "use_post_transformer_norm", "use_pre_transformer_norm", "use_rel_pos_bias", "use_rot_pos_emb",
        "use_shared_rel_pos_bias",
    ),
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in _MAY_SAY.items() for name in names}
_PATCHES, _PIXELS = 2**16, 2**26  # of one image, the latter over all channels
_FILLS = {
    "add_", "clamp_", "constant_", "div_", "erfinv_", "fill_", "kaiming_uniform_", "mul_", "normal_", "trunc_normal_",
    "uniform_", "xavier_uniform_", "zero_",
}  # fmt: skip
_ROOM, _TIMES = 2**30, 64  # bytes of a model beside those of its weights: tables, and what was narrowed
_BLOCKS_AT_LEAST = 1000  # that may be described; more where the weights have as many tensors


def outline(model: Backbone) -> Anatomy:
    """What a model looks like from outside: images, classes, width and depth, of a timm Swin too.

    Of a Swin, ``width`` is that of its last stage, ``hidden`` and ``heads`` are those of all blocks, and there are no
    prefix tokens.

    Raises:
        PrunexError: For an unsupported family, by name.
    """
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
        channels=embed.proj.in_channels,
        classes=head_classes(model),
        pool=inner.global_pool,
        dynamic=not embed.strict_img_size,
        readers=(),
    )


def describe(model: Backbone) -> dict[str, Any]:
    """The constructor call that makes an equal model, in plain values.

    Args:
        model: A supported ViT or timm Swin, also one that was narrowed.

    Returns:
        ``{"class": name, "args": {...}}`` for :func:`build`; of a narrowed model the call makes the dense one, and
        ``"widths"`` says what is left of it (:meth:`~prunex.vit.widths.WidthSpec.plain`). JSON holds it.

    Raises:
        PrunexError: For parts that plain values cannot name.
    """
    spec = _windowed(model) if isinstance(model, SwinTransformer) else _described(model)
    widths = widths_of(model).plain()
    if widths:
        spec["widths"] = widths
    _check(model, spec)
    return spec


def _described(model: ViT) -> dict[str, Any]:
    a = _dense(read(model), dense_shape(model))
    if len(set(a.heads)) > 1 or len(set(a.hidden)) > 1:
        raise PrunexError("cannot save a model whose blocks differ in heads or MLP width")
    inner: Any = model
    args: dict[str, Any] = {
        "img_size": list(a.image),
        "patch_size": list(a.patch),
        "in_chans": a.channels,
        "num_classes": a.classes,
        "global_pool": a.pool,
        "embed_dim": a.width,
        "depth": a.depth,
    }
    if isinstance(model, Eva):
        name, more = "Eva", _eva(inner, a)
    elif isinstance(model, Beit):
        name, more = "Beit", _beit(inner, a)
    else:
        distilled = isinstance(model, VisionTransformerDistilled)
        name, more = "VisionTransformerDistilled" if distilled else "VisionTransformer", _plain(inner, a)
    return {"class": name, "args": args | more}


def _dense(a: Anatomy, shape: Shape | None) -> Anatomy:
    """A narrowed model's anatomy with the widths it had when it was dense."""
    if shape is None:
        return a
    heads = tuple(a.heads[0] if found is None else found[0] for found in shape.heads)
    hidden = tuple(a.hidden[0] if found is None else found for found in shape.hidden)
    d = next((found[1] for found in shape.heads if found is not None), a.head_dim)
    return replace(a, depth=len(heads), width=shape.embedding, heads=heads, head_dim=d, hidden=hidden)


def _windowed(model: Any) -> dict[str, Any]:
    """A Swin's constructor call."""
    a, shape = outline(model), dense_shape(model)
    depths = [len(stage.blocks) for stage in model.layers]
    firsts = [sum(depths[:s]) for s in range(len(depths))]
    blocks: list[Any] = [block for _, block in blocks_of(model)]
    if shape is None:
        heads = [(b.attn.num_heads, head_dim(b.attn)) for b in blocks]
        hidden = [b.mlp.fc2.in_features for b in blocks]
    else:
        heads, hidden = [h or (0, 0) for h in shape.heads], [h or 0 for h in shape.hidden]
    even = all(
        len(set(found[first : first + depth])) == 1
        for found in (heads, hidden)
        for first, depth in zip(firsts, depths, strict=True)
    )
    if not even:
        raise PrunexError("cannot save a model whose blocks differ in heads or MLP width")
    mlps = {(type(b.mlp), _act_name(b.mlp.act), type(b.mlp.norm)) for b in blocks}
    if mlps != {(timm.layers.Mlp, "gelu", nn.Identity)}:
        raise PrunexError("cannot save a Swin with other MLPs than timm's Mlp of GELU")
    windows = [tuple(b.window_size) for b in blocks]
    args: dict[str, Any] = {
        "img_size": list(a.image),
        "patch_size": list(a.patch),
        "in_chans": a.channels,
        "num_classes": a.classes,
        "global_pool": a.pool,
        "embed_dim": model.embed_dim,
        "depths": depths,
        "num_heads": [heads[first][0] for first in firsts],
        "head_dim": [heads[first][1] for first in firsts],
        "window_size": [max(w[0] for w in windows), max(w[1] for w in windows)],
        "always_partition": bool(blocks[0].always_partition),
        "strict_img_size": not a.dynamic,
        "mlp_ratio": [_ratio(hidden[first], blocks[first].dim) for first in firsts],
        "qkv_bias": blocks[0].attn.qkv.bias is not None,
        "norm_layer": _norm(model.norm),
    }
    return {"class": "SwinTransformer", "args": args}


def _check(model: Backbone, spec: dict[str, Any]) -> None:
    """Refuse what the description does not hold: another shape somewhere, or another rotary table.

    Raises:
        PrunexError: By name.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                twin: Any = build(spec)
        except PrunexError:  # older versions of timm read a tensor's values while they build
            twin = build(spec)
    again = twin.state_dict()
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("prunex.", "prunex_units."))}
    wrong = [k for k in {**again, **own} if k not in own or k not in again or own[k].shape != again[k].shape]
    wrong += odd_dtypes(again, own)
    if wrong:
        hint = "; model.reset_classifier(n) makes a head that it builds" if min(wrong).startswith("head") else ""
        raise PrunexError(
            f"cannot save this {type(model).__name__}: timm builds it with other parts "
            f"({', '.join(sorted(wrong)[:4])}){hint}"
        )
    inner: Any = model
    if isinstance(model, SwinTransformer):
        grids = [
            [(b.window_size, b.shift_size, tuple(b.input_resolution)) for _, b in blocks_of(m)] for m in (model, twin)
        ]
        if grids[0] != grids[1]:
            raise PrunexError(
                "cannot save a Swin whose stages have windows of their own: timm builds it with other ones"
            )
    if not isinstance(model, Eva) or inner.rope is None or next(model.parameters()).is_meta:
        return
    shallow = spec["args"] | {"depth": 1, "num_classes": 0}
    if isinstance(shallow.get("num_kv_heads"), list):
        shallow["num_kv_heads"] = shallow["num_kv_heads"][:1]
    with torch.random.fork_rng(devices=[]):
        small: Any = build({"class": "Eva", "args": shallow})
    tables = dict(small.rope.named_buffers())
    for key, value in inner.rope.named_buffers():
        made = tables.get(key, value.new_empty(0))
        if made.shape != value.shape or not torch.allclose(value.float().cpu(), made.float(), atol=1e-2, rtol=1e-2):
            raise PrunexError(
                f"cannot save a model with these rotary positions ({key}): timm builds other ones by name"
            )


def _plain(model: Any, a: Anatomy) -> dict[str, Any]:
    block = model.blocks[0]
    kind = next((n for n, c in _BLOCKS.items() if isinstance(block, c)), None)
    if kind == "ParallelScalingBlock":
        return _shared(model, a) | _scaling(block, a)
    if kind == "ParallelThingsBlock":
        norm, attn, mlp = block.attns[0].norm, block.attns[0].attn, block.ffns[0].mlp
        scaled = not isinstance(block.attns[0].ls, nn.Identity)
    else:
        norm, attn, mlp = block.norm1, block.attn, block.mlp
        scaled = kind is None and not isinstance(block.ls1, nn.Identity)
    mlp_name = next((n for n, c in _MLPS.items() if type(mlp) is c), None)
    if mlp_name == "GluMlp" and not mlp.gate_last and isinstance(mlp.act, nn.SiLU):
        mlp_name = "SwiGLUPacked"
    if mlp_name is None:
        raise PrunexError(f"cannot save a model with {type(mlp).__name__} blocks: known are {', '.join(_MLPS)}")
    first = mlp.fc1_g if mlp_name == "SwiGLU" else mlp.fc1
    count, each, hidden = attn.num_heads, attn.head_dim, first.out_features
    if dense_shape(model) is not None and kind != "ParallelThingsBlock":  # a narrowed one's own widths are not timm's
        count, each, hidden = a.heads[0], a.head_dim, a.hidden[0] * (2 if type(mlp) is timm.layers.GluMlp else 1)
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
        "qkv_bias": (attn.q_bias if getattr(attn, "q_bias", None) is not None else _first(attn).bias) is not None,
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
    """EVA's and BEiT's way to name an MLP.

    Raises:
        PrunexError: For one that they have not.
    """
    scaled = not isinstance(mlp.norm, nn.Identity)
    gated = type(mlp) in (timm.layers.SwiGLU, timm.layers.GluMlp) and isinstance(mlp.act, nn.SiLU)
    if not gated and (type(mlp) is not timm.layers.Mlp or _act_name(mlp.act) != "gelu"):
        raise PrunexError(f"cannot save a model with {type(mlp).__name__} of {type(mlp.act).__name__} in this family")
    args = {"mlp_ratio": _ratio(a.hidden[0], a.width), "swiglu_mlp": gated, "scale_mlp": scaled}
    if type(mlp) is timm.layers.SwiGLU and not scaled:
        args["swiglu_align_to"] = 1  # says which of two equal layers: the width is whole already
    return args


def build(spec: dict[str, Any]) -> Any:
    """A model from what :func:`describe` wrote, with fresh weights, in eval mode; narrowed if it was.

    Raises:
        PrunexError: For a description this version cannot build.
    """
    try:
        cls, args = _CLASSES[spec["class"]], dict(spec["args"])
        _check_said(args)
        args["norm_layer"] = _norm_class(*args["norm_layer"])
        if "embed_norm_layer" in args:
            args["embed_norm_layer"] = _norm_class(*args["embed_norm_layer"])
        if "act_layer" in args:
            args["act_layer"] = timm.layers.get_act_layer(args["act_layer"])
        if "mlp_layer" in args:
            args["mlp_layer"] = _MLPS[args["mlp_layer"]]
        if "block_fn" in args:
            name, more = args["block_fn"]
            args["block_fn"] = partial(_BLOCKS[name], **more) if more else _BLOCKS[name]
        args = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
        model = cls(**args).eval()
        return narrow(model, WidthSpec.read(spec["widths"])) if "widths" in spec else model
    except Exception as error:  # timm's constructors stumble over bad numbers in many ways
        raise PrunexError(
            f"cannot build the described model: {type(error).__name__} {str(error)[:200]}; was the file edited?"
        ) from error


def build_like(spec: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """What :func:`build` makes, for a description that need not be true: nothing is allocated before it fits a file.

    Args:
        spec: What :func:`describe` wrote, or what says so.
        tensors: Of the file beside it.
        prefix: Of the model's tensors among them.

    Returns:
        The model, each of whose tensors the file has, in its shape.

    Raises:
        PrunexError: For a description that this version cannot build, or of another model than the file's.
    """
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    held = sum(v.numel() * v.element_size() for v in own.values())
    twin = _sketched(spec, max(len(own), _BLOCKS_AT_LEAST), held) or build(spec)
    wrong = [k for k, v in twin.state_dict().items() if k not in own or own[k].shape != v.shape]
    if wrong:
        raise PrunexError(f"the description does not fit the weights ({', '.join(sorted(wrong)[:4])})")
    return build(spec)


def _sketched(spec: Any, blocks: int, held: int) -> Any:
    """The described model without memory; None where timm reads a tensor's values while it builds (older versions).

    Raises:
        PrunexError: For more blocks than that, or a model far larger than the bytes of its weights.
    """
    told = spec if isinstance(spec, Mapping) else {}
    whole = {k: v for k, v in told.items() if k != "widths"}
    said = told.get("args")
    args: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
    _check_blocks(args, blocks)
    try:
        with torch.device("meta"), Still():
            dense = build(whole)
            _check_bytes(sum(t.numel() * t.element_size() for t in (*dense.parameters(), *dense.buffers())), held)
            return narrow(dense, WidthSpec.read(told["widths"])) if "widths" in told else dense
    except PrunexError as error:
        if "meta tensor" not in str(error):
            raise
    _check_bytes(_estimate(args), held)
    return None


def _check_bytes(size: float, held: int) -> None:
    """A model that was narrowed was larger than its weights are, and has tables that no file holds; within reason."""
    if size > _ROOM + _TIMES * held:
        told = f"{size:,.0f}" if size < 1e18 else f"{size:.0e}"
        raise PrunexError(f"the described model takes {told} bytes, its weights have {held:,}: was it edited?")


class Still(TorchFunctionMode):
    """Leaves out the filling in of initial values, of which there are none without memory; it would take most time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", "") in _FILLS and isinstance(target, Tensor):
            return target
        return func(*args, **(kwargs or {}))


def _estimate(args: Mapping[str, Any]) -> float:
    """About how many bytes a model takes, rather too many than too few; for arguments that are checked."""
    depths, ratio = args.get("depths", [args.get("depth", 12)]), args.get("mlp_ratio", 4.0)
    width = args["embed_dim"] * 2 ** (len(depths) - 1)
    (down, across), (height, wide) = _pair(args["patch_size"]), _pair(args["img_size"])
    outside = args["in_chans"] * down * across + args["num_classes"] + (height // down) * (wide // across)
    more = args["block_fn"][1].get("num_parallel", 1) if "block_fn" in args else 1
    ratios = [r for r in (ratio if isinstance(ratio, list | tuple) else [ratio]) if isinstance(r, int | float)]
    each = width * (8 + 3 * max(ratios, default=4.0))
    return 4.0 * width * (sum(depths) * more * each + outside)


def _check_blocks(args: Mapping[str, Any], most: int) -> None:
    """Refuse so many blocks that building them would take long even without memory."""
    depths, block = args.get("depths", args.get("depth", 0)), args.get("block_fn")
    options = block[1] if isinstance(block, list | tuple) and len(block) == 2 else {}
    wide = options.get("num_parallel", 1) if isinstance(options, Mapping) else 1
    told = [n for n in (*(depths if isinstance(depths, list | tuple) else [depths]), wide) if isinstance(n, int)]
    if max(told, default=0) > most or sum(told[:-1]) * max(told[-1:], default=1) > most:
        raise PrunexError(f"cannot build the described model: more blocks than its weights have tensors for ({most})")


def _check_said(args: Mapping[str, Any]) -> None:
    """Refuse arguments that :func:`describe` never writes, of other types, or of images beyond all measure.

    Raises:
        ValueError: For the first one.
    """
    for name, value in args.items():
        if name not in _KIND_OF:
            raise ValueError(f"unknown argument {name!r}")
        if not _is(_KIND_OF[name], value):
            raise ValueError(f"{name}={str(value)[:40]!r} is no {_KIND_OF[name]}")
    sizes = [_pair(args[k]) for k in ("img_size", "patch_size")]
    (height, width), (down, across) = sizes
    if (height // down) * (width // across) > _PATCHES or height * width * args["in_chans"] > _PIXELS:
        raise ValueError(f"images of {height} x {width} pixels in patches of {down} x {across} are too large")


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _is(kind: str, value: Any) -> bool:
    """Whether a plain value is of one of the kinds of ``_MAY_SAY``."""
    each = list(value) if isinstance(value, list | tuple) else [value]
    whole = all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in each)
    if kind == "size":
        return whole and len(each) in (1, 2) and all(v > 0 for v in each)
    if kind == "whole":
        return whole and not isinstance(value, list | tuple)
    if kind == "whole numbers":
        return whole
    if kind == "numbers":
        return value is None or all(_finite(v) for v in each)
    if kind == "norm":
        return len(each) == 2 and isinstance(each[0], str) and _finite(each[1]) and each[1] >= 0
    if kind == "block":
        options = each[1] if len(each) == 2 else None
        known = {"num_parallel": int, "fuse_out_proj": bool}
        return isinstance(options, Mapping) and all(type(v) is known.get(k) for k, v in options.items())
    return isinstance(value, bool if kind == "flag" else str)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _first(attn: Any) -> nn.Linear:
    return attn.qkv if attn.qkv is not None else attn.q_proj


def _ratio(hidden: int, width: int) -> float:
    """A ratio that timm's ``int(width * ratio)`` makes the hidden width of again."""
    plain = hidden / width
    return plain if int(width * plain) == hidden else (hidden + 0.5) / width


def _norm(norm: nn.Module) -> list[Any]:
    return [_norm_name(norm), float(getattr(norm, "eps", 1e-6))]


def _norm_class(name: str, eps: float) -> Callable[..., nn.Module]:
    return partial(timm.layers.get_norm_layer(name), eps=eps)


def _norm_name(norm: nn.Module) -> str:
    known = {"layernorm": "LayerNorm", "rmsnorm": "RmsNorm", "simplenorm": "SimpleNorm"}
    for key, cls in known.items():
        if type(norm).__name__ in (cls, cls + "Fp32"):
            return key + ("fp32" if type(norm).__name__.endswith("Fp32") else "")
    raise PrunexError(f"cannot save a model with {type(norm).__name__}: known are {', '.join(known.values())}")


def _act_name(act: nn.Module | None) -> str:
    known = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu"}
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu_tanh"
    name = "GELU" if act is None else type(act).__name__
    if name not in known:
        raise PrunexError(f"cannot save a model with activation {name}: known are {', '.join(known)}")
    return known[name]
