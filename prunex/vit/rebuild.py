"""From a description in plain values, which anyone may have written, the model it is of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import timm.layers
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunex.errors import PrunexError
from prunex.vit.blocks.differential import PARALLEL
from prunex.vit.weights import misfits
from prunex.vit.widths import WidthSpec, narrow

MLPS = {name: getattr(timm.layers, name) for name in ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked")}
BLOCKS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (ResPostBlock, ParallelThingsBlock, ParallelScalingBlock, ResPostRelPosBlock)
}
_KNOWN = (VisionTransformer, VisionTransformerDistilled, Eva, Beit, VisionTransformerRelPos, Cait, SwinTransformer)
if PARALLEL is not None:
    BLOCKS[PARALLEL.__name__] = PARALLEL
HYBRID, NAMED = "Hybrid", "prunex_architecture"  # a convolutional stem comes by timm's name alone, which is kept here
CLASSES = {cls.__name__: cls for cls in _KNOWN}
# A description may come from anywhere: what it may say, by kind, and how large that may be without a file to hold it.
_MAY_SAY = {
    "size": ("img_size", "patch_size", "window_size", "ref_feat_shape"),
    "whole": ("in_chans", "num_classes", "embed_dim", "depth", "reg_tokens", "num_reg_tokens", "swiglu_align_to",
              "rel_pos_dim", "depth_token_only"),
    "whole numbers": ("num_heads", "depths", "head_dim", "num_kv_heads", "attn_pool_num_heads", "rope_mrope_section"),
    "numbers": ("mlp_ratio", "attn_pool_mlp_ratio", "mlp_ratio_token_only", "init_values", "rope_temperature",
                "rope_grid_offset"),
    "name": ("global_pool", "pos_embed", "act_layer", "mlp_layer", "attn_type", "rope_type", "rope_grid_indexing",
             "rel_pos_type", "attn_layer", "architecture"),
    "norm": ("norm_layer", "embed_norm_layer"),
    "block": ("block_fn",),
    "flag": (
        "always_partition", "attn_only_layer_scale", "class_token", "dynamic_img_pad", "dynamic_img_size", "fc_norm",
        "final_norm", "no_embed_class", "pool_include_prefix", "pre_norm", "proj_bias", "qk_norm", "qkv_bias",
        "qkv_fused", "rope_rotate_half", "scale_attn_inner", "scale_attn_norm", "scale_mlp", "scale_mlp_norm",
        "shared_rel_pos", "strict_img_size", "swiglu_mlp", "use_abs_pos_emb", "use_fc_norm", "use_post_norm",
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
# A model that was narrowed was larger than its weights are, and has tables that no file holds; within reason.
_ROOM, _TIMES = 2**30, 64
_BLOCKS_AT_LEAST = 1000  # that may be described; more where the weights have as many tensors


def build(spec: Mapping[str, Any]) -> Any:
    """The model that :func:`~prunex.vit.describe.describe` described, fresh, in eval mode; narrowed if it was."""
    with _refused_in_one_line():
        return _narrowed(_dense_model(spec), spec)


def sketch(spec: Mapping[str, Any], held: Mapping[str, Tensor] | None = None) -> Any:
    """What :func:`build` makes, but parameters have shapes alone; tables that no file holds are computed.

    With ``held``, the tensors beside the description, nothing is built out of proportion to these.
    """
    with _refused_in_one_line(), torch.random.fork_rng(devices=[]):
        with Still():
            model = _dense_model(spec, held)
        # Only now, since timm computes tables from real numbers while it builds.
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(p.to("meta"), p.requires_grad))
        return _narrowed(model, spec)


def build_like(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """The described model with a file's tensors that begin with a prefix, in their dtype; any of it may be false."""
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model = sketch(spec, weights)
    names = model.state_dict()
    # What belongs to a pruner or a head is not this model's, and read by whoever puts that on.
    weights = {k: v for k, v in weights.items() if k in names}
    wrong = misfits(names, weights)
    if wrong:
        raise PrunexError(f"the description does not fit the weights ({', '.join(wrong[:4])})")
    dtype = next(v.dtype for k, v in weights.items() if v.is_floating_point() and k.startswith("patch_embed."))
    if dtype != torch.float32:
        model.to(dtype)  # for tables that no file holds, such as rotary ones
    model.load_state_dict(weights, assign=True)
    return model


@contextmanager
def _refused_in_one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # timm's constructors stumble over bad numbers in many ways
        raise PrunexError(
            f"cannot build the described model: {type(error).__name__} {str(error)[:200]}; was the file edited?"
        ) from error


def _dense_model(spec: Mapping[str, Any], held: Mapping[str, Tensor] | None = None) -> Any:
    args = dict(spec["args"])
    _check_arguments(args)
    if held is not None:
        _check_size(args, held)
    if spec["class"] == HYBRID:
        return _by_name(args)
    for name in {"norm_layer", "embed_norm_layer"} & {"norm_layer", *args}:
        norm, eps = args[name]
        args[name] = partial(timm.layers.get_norm_layer(norm), eps=eps)
    if "act_layer" in args:
        args["act_layer"] = timm.layers.get_act_layer(args["act_layer"])
    if "mlp_layer" in args:
        args["mlp_layer"] = MLPS[args["mlp_layer"]]
    if "block_fn" in args:
        block, options = args["block_fn"]
        args["block_fn"] = partial(BLOCKS[block], **options) if options else BLOCKS[block]
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    return CLASSES[spec["class"]](**args).eval()


def hybrids() -> frozenset[str]:
    """Architectures of timm whose patches are made by convolutions."""
    files = ("vision_transformer_hybrid", "vitamin")
    return frozenset(name for file in files for name in timm.list_models(module=file))


def _by_name(args: dict[str, Any]) -> Any:
    """One of :func:`hybrids`; its patch size is what its stem makes it."""
    name, _ = args.pop("architecture"), args.pop("patch_size")
    if name not in hybrids():
        raise ValueError(f"{name!r} is no architecture with a convolutional stem")
    model = timm.create_model(name, **args | {"img_size": tuple(args["img_size"])})
    model.__dict__[NAMED] = name
    return model.eval()


def _narrowed(dense: Any, spec: Mapping[str, Any]) -> Any:
    return narrow(dense, WidthSpec.read(spec["widths"])) if "widths" in spec else dense


class Still(TorchFunctionMode):
    """Leaves out the filling in of parameters' initial values, which takes most of the time of building a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FILLS:
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, nn.Parameter) or (isinstance(target, Tensor) and target.is_meta):
                return target
        return func(*args, **(kwargs or {}))


def _check_size(args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse far more bytes than the weights have, in closed form, or more blocks than they could fill."""
    depths = _several(args.get("depths", args.get("depth", 12)))
    parallel = args["block_fn"][1].get("num_parallel", 1) if "block_fn" in args else 1
    late = args.get("depth_token_only", 0)
    blocks, most = max(sum(depths), len(depths)) * parallel + late, max(len(weights), _BLOCKS_AT_LEAST)
    if blocks > most:
        raise PrunexError(f"more blocks than its weights have tensors for ({most})")
    width = args["embed_dim"] * 2 ** (len(depths) - 1)  # a Swin's is doubled from stage to stage
    (height, across), (down, side) = _pair(args["img_size"]), _pair(args["patch_size"])
    patches = (height // down) * (across // side)
    registers = args.get("reg_tokens", 0) + args.get("num_reg_tokens", 0)
    rows = args["in_chans"] * down * side + args["num_classes"] + patches + registers
    # Each block: attention, of which a Swin's heads may be wider than its stream, and an MLP of three layers at most.
    ratios = [
        r or 0
        for name in ("mlp_ratio", "attn_pool_mlp_ratio", "mlp_ratio_token_only")
        for r in _several(args.get(name, 4.0))
    ]
    groups = max(_several(args.get("num_kv_heads", 1)))
    inner = max(_several(args["num_heads"])) * max(_several(args.get("head_dim", 0)))
    rows += (blocks + 1) * (width * (8 + 2 * groups + 3 * max(ratios)) + 4 * inner)
    # Windows have a table of their tokens' pairs, and a mask for each of them; BEiT's window is the image.
    window = math.prod(_pair(args["window_size"])) if "window_size" in args else 0
    if args.get("use_rel_pos_bias") or args.get("use_shared_rel_pos_bias") or "rel_pos_type" in args:
        window = patches + 1
    size = 4.0 * width * rows + 8.0 * (blocks + 1) * window * max(window, patches)
    size += 4.0 * blocks * args.get("rel_pos_dim", 0) * (2 + max(_several(args["num_heads"])))
    held = sum(v.numel() * v.element_size() for v in weights.values())
    if size > _ROOM + _TIMES * held:
        raise PrunexError(f"it takes {size:.3g} bytes, its weights have {held:,}")


def _check_arguments(args: Mapping[str, Any]) -> None:
    """Refuse arguments that :func:`describe` never writes, of other types, or of images beyond all measure."""
    for name, value in args.items():
        if name not in _KIND_OF:
            raise ValueError(f"unknown argument {name!r}")
        if not _is(_KIND_OF[name], value):
            raise ValueError(f"{name}={str(value)[:40]!r} is no {_KIND_OF[name]}")
    (height, width), (down, across) = _pair(args["img_size"]), _pair(args["patch_size"])
    if (height // down) * (width // across) > _PATCHES or height * width * args["in_chans"] > _PIXELS:
        raise ValueError(f"images of {height} x {width} pixels in patches of {down} x {across} are too large")


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = _several(value)
    return first, rest[0] if rest else first


def _is(kind: str, value: Any) -> bool:
    """Whether a plain value is of one of the kinds of ``_MAY_SAY``."""
    # By type throughout: True is a whole number to Python, and no size.
    values = _several(value)
    whole = all(type(v) is int and v >= 0 for v in values)
    if kind == "size":
        return whole and len(values) in (1, 2) and min(values) > 0
    if kind == "whole":
        return whole and not isinstance(value, list | tuple)
    if kind == "whole numbers":
        return whole and len(values) > 0
    if kind == "numbers":
        return value is None or (len(values) > 0 and all(_finite(v) for v in values))
    if kind == "norm":
        return len(values) == 2 and isinstance(values[0], str) and _finite(values[1]) and values[1] >= 0
    if kind == "block":
        options = values[1] if len(values) == 2 else None
        kinds = {"num_parallel": int, "fuse_out_proj": bool}
        return isinstance(options, Mapping) and all(type(v) is kinds.get(k) for k, v in options.items())
    return isinstance(value, bool if kind == "flag" else str)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
