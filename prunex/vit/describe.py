"""A ViT as a constructor call in plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.layers import GluMlp, HybridEmbed, Mlp
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from prunex.errors import PrunexError
from prunex.vit.anatomy import Anatomy, ViT, channels_of, head_classes, read
from prunex.vit.arguments import act_name, beit, cait, eva, norm_name, ratio, relpos
from prunex.vit.blocks.differential import is_differential
from prunex.vit.blocks.parallel import fused_out
from prunex.vit.mount import PLACES
from prunex.vit.rebuild import BLOCKS, HYBRID, MLPS, NAMED, hybrids, sketch
from prunex.vit.units import Backbone, blocks_of, head_dim
from prunex.vit.weights import misfits
from prunex.vit.widths import Shape, dense_shape, shape_of, widths_of


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
    a = _dense(read(model), dense_shape(model))
    if len(set(a.heads)) > 1 or len(set(a.hidden)) > 1:
        raise PrunexError("cannot save a model whose blocks differ in heads or MLP width")
    if isinstance(model.patch_embed, HybridEmbed):
        return {"class": HYBRID, "args": _hybrid(model, a)}
    if isinstance(model, Eva):
        name, more = "Eva", eva(model, a)
    elif isinstance(model, Beit):
        name, more = "Beit", beit(model, a)
    elif isinstance(model, Cait):
        name, more = "Cait", cait(model, a)
    elif isinstance(model, VisionTransformerRelPos):
        name, more = "VisionTransformerRelPos", relpos(model, a)
    else:
        distilled = isinstance(model, VisionTransformerDistilled)
        name, more = "VisionTransformerDistilled" if distilled else "VisionTransformer", _plain(model, a)
    return {"class": name, "args": _outside(a) | {"embed_dim": a.width, "depth": a.depth} | more}


def _hybrid(model: Any, a: Anatomy) -> dict[str, Any]:
    """By timm's name, which says what the stem is, and what else is not as the name says; :func:`_check` compares."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    known = cfg.get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
    name = vars(model).get(NAMED, known)
    if name not in hybrids():
        raise PrunexError(
            f"cannot save a {type(model).__name__} with a convolutional stem that timm does not build by name: make it "
            "with timm.create_model"
        )
    args: dict[str, Any] = _outside(a) | {
        "architecture": name,
        "embed_dim": a.width,
        "depth": a.depth,
        "num_heads": a.heads[0],
        "dynamic_img_size": a.dynamic,
    }
    if a.hidden[0]:
        args["mlp_ratio"] = ratio(a.hidden[0], a.width)
    return args


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
    # Blocks whose units are not known one by one were not narrowed.
    heads = tuple(a.heads[0] if known is None else known[0] for known in shape.heads)
    hidden = tuple(a.hidden[0] if known is None else known for known in shape.hidden)
    d = next((known[1] for known in shape.heads if known is not None), a.head_dim)
    return replace(a, depth=len(heads), width=shape.embedding, heads=heads, head_dim=d, hidden=hidden)


def _windowed(model: Any) -> dict[str, Any]:
    a, shape = outline(model), dense_shape(model) or shape_of(model)
    blocks: list[Any] = [block for _, block in blocks_of(model)]
    if {(type(b.mlp), act_name(b.mlp.act), type(b.mlp.norm)) for b in blocks} != {(Mlp, "gelu", nn.Identity)}:
        raise PrunexError("cannot save a Swin with other MLPs than timm's Mlp of GELU")
    depths = [len(stage.blocks) for stage in model.layers]
    heads, ratios, first = [], [], 0
    for depth in depths:
        stage = set(zip(shape.heads[first : first + depth], shape.hidden[first : first + depth], strict=True))
        if len(stage) > 1:
            raise PrunexError("cannot save a model whose blocks differ in heads or MLP width")
        heads.append(shape.heads[first] or (0, 0))
        ratios.append(ratio(shape.hidden[first] or 0, blocks[first].dim))
        first += depth
    # timm makes a window no larger than its stage's grid: the largest one is what it was called with.
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
        "norm_layer": norm_name(model.norm),
    }
    return {"class": "SwinTransformer", "args": args}


def _check(model: Backbone, spec: dict[str, Any]) -> None:
    """Refuse what the description does not hold: another shape somewhere, or another table that no file keeps."""
    # The only proof that it builds the same model is to build it, without values.
    twin = sketch(spec)
    # What prunes a model hangs on it under these names, and is described elsewhere.
    state = {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in PLACES}
    wrong = misfits(twin.state_dict(), state)
    if wrong:
        hint = "; model.reset_classifier(n) makes a head that it builds" if wrong[0].startswith("head") else ""
        raise PrunexError(
            f"cannot save this {type(model).__name__}: timm builds it with other parts ({', '.join(wrong[:4])}){hint}"
        )
    if spec["class"] == HYBRID and _kinds(model) != _kinds(twin):
        differ = next(a[0] for a, b in zip(_kinds(model), _kinds(twin), strict=False) if a != b)
        raise PrunexError(
            f"cannot save this {type(model).__name__}: timm builds {spec['args']['architecture']} with another {differ}"
        )
    tables = dict(model.named_buffers())
    for key, made in twin.named_buffers():
        if key in state:  # it is in the file
            continue
        table = tables.get(key, made.new_empty(0))
        if made.is_meta or table.is_meta:  # no values to compare
            continue
        # Loosely, since a model in half precision has rounded ones.
        if table.shape != made.shape or not torch.allclose(table.float().cpu(), made.float(), atol=1e-2, rtol=1e-2):
            raise PrunexError(f"cannot save a {type(model).__name__} with this {key}: timm builds another one by name")
    if _lambdas(model) != _lambdas(twin):
        raise PrunexError(
            f"cannot save this {type(model).__name__}: timm gives its differential blocks another lambda_init, each by "
            "its number"
        )
    if isinstance(model, SwinTransformer) and _windows(model) != _windows(twin):
        raise PrunexError("cannot save a Swin whose stages have windows of their own: timm builds it with other ones")


def _kinds(model: nn.Module) -> list[tuple[str, ...]]:
    """What a model is made of, but for what only training needs."""
    kinds: list[tuple[str, ...]] = []
    for name, module in model.named_modules():
        if name.split(".")[0] not in PLACES and "drop" not in name:
            kinds.append((name, type(module).__name__, module.extra_repr()))
    return kinds


def _windows(model: SwinTransformer) -> list[tuple[Any, ...]]:
    return [(b.window_size, b.shift_size, tuple(b.input_resolution)) for _, b in blocks_of(model)]


def _lambdas(model: nn.Module) -> list[Any]:
    return [m.lambda_init for m in model.modules() if is_differential(m)]


def _plain(model: Any, a: Anatomy) -> dict[str, Any]:
    block = model.blocks[0]
    kind = next((n for n, c in BLOCKS.items() if isinstance(block, c)), None)
    if kind is None and type(block).forward is not Block.forward:  # it would be built again as a plain one
        raise PrunexError(
            f"cannot save a model with {type(block).__name__} blocks: known are Block, {', '.join(BLOCKS)}"
        )
    if kind in ("ParallelScalingBlock", "DiffParallelScalingBlock"):
        return _shared(model, a) | _scaling(block, a)
    if kind == "ParallelThingsBlock":
        norm, attn, mlp = block.attns[0].norm, block.attns[0].attn, block.ffns[0].mlp
        scaled = not isinstance(block.attns[0].ls, nn.Identity)
    else:
        norm, attn, mlp = block.norm1, block.attn, block.mlp
        scaled = kind is None and not isinstance(block.ls1, nn.Identity)
    mlp_name = _mlp_name(mlp)
    first = mlp.fc1_g if mlp_name == "SwiGLU" else mlp.fc1
    count, hidden = attn.num_heads, first.out_features
    d = attn.head_dim * (2 if is_differential(attn) else 1)  # two softmaxes share a head
    if dense_shape(model) is not None and kind != "ParallelThingsBlock":  # a narrowed one's own widths are not timm's
        count, d, hidden = a.heads[0], a.head_dim, a.hidden[0] * (2 if type(mlp) is GluMlp else 1)
    if count * d != a.width or getattr(attn, "gate", None) is not None:
        raise PrunexError("cannot save a model with attn_head_dim or gated attention: timm cannot build it by name")
    args: dict[str, Any] = _shared(model, a) | {
        "num_heads": count,
        "mlp_ratio": ratio(hidden, a.width),
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "proj_bias": attn.proj.bias is not None,
        # Whether there is a LayerScale; its values are in the file.
        "init_values": 1e-5 if scaled else None,
        "norm_layer": norm_name(norm),
        "act_layer": act_name(getattr(mlp, "act", None)),
        "mlp_layer": mlp_name,
    }
    if kind is not None:
        args["block_fn"] = [kind, {"num_parallel": block.num_parallel} if kind == "ParallelThingsBlock" else {}]
    if is_differential(attn):
        args["attn_layer"] = "diff"
    if not isinstance(attn.norm, nn.Identity):
        args["scale_attn_norm"] = True
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        args["scale_mlp_norm"] = True
    return args


def _mlp_name(mlp: Any) -> str:
    name = next((n for n, c in MLPS.items() if type(mlp) is c), None)
    # timm's name of a GluMlp built so: a partial, and no class of its own.
    if name == "GluMlp" and not mlp.gate_last and isinstance(mlp.act, nn.SiLU):
        return "SwiGLUPacked"
    if name is None:
        raise PrunexError(f"cannot save a model with {type(mlp).__name__} blocks: known are {', '.join(MLPS)}")
    return name


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
        args["embed_norm_layer"] = norm_name(model.patch_embed.norm)
    return args


def _scaling(block: Any, a: Anatomy) -> dict[str, Any]:
    """The parallel block of ViT-22B."""
    last = block.attn_out_proj if fused_out(block) is None else block.out_proj
    fused = {} if fused_out(block) is None else {"fuse_out_proj": True}
    return {
        "num_heads": block.num_heads,
        "mlp_ratio": ratio(block.in_split[0], a.width),
        "qkv_bias": block.in_proj.bias is not None,
        "qk_norm": not isinstance(block.q_norm, nn.Identity),
        "proj_bias": last.bias is not None,
        "init_values": None if isinstance(block.ls, nn.Identity) else 1e-5,
        "norm_layer": norm_name(block.in_norm),
        "act_layer": act_name(block.mlp_act),
        "block_fn": ["DiffParallelScalingBlock", {}] if is_differential(block) else ["ParallelScalingBlock", fused],
    }
