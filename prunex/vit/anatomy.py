"""Where a timm ViT keeps its prefix tokens, patch grid, blocks, attention and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, get_args

import timm
import torch
from timm.layers import AttentionPoolLatent, HybridEmbed, PatchEmbed
from timm.models.beit import Beit
from timm.models.cait import Cait, ClassAttn, LayerScaleBlockClassAttn
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.later import refuse
from prunex.vit.blocks import layout_of, unknown_part
from prunex.vit.mount import mounted_head
from prunex.vit.units import prefix_of
from prunex.vit.weights import convolution_of

ViT = VisionTransformer | Eva | Beit | VisionTransformerRelPos | Cait

WORKS = (
    "timm's ViT, DeiT, DINO, DINOv2, DINOv3, CLIP, SigLIP, AIMv2, EVA, EVA-02, PE, ROPE-ViT, BEiT, CaiT, "
    "relative-position and differential ViTs; plain, post-norm and parallel blocks, hybrid stems, registers, "
    "distillation tokens; class token, average, max or attention pooling"
)
# What other models of timm are, where it is known why tokens cannot leave them one by one.
_REASONS = {
    "windowed attention, whose windows have a fixed number of tokens": (
        "SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "VisionTransformerSAM", "Hiera", "HieraDet",
        "MaxxVit", "GlobalContextVit", "DaVit", "Twins", "FocalNet",
    ),
    "a pyramid of stages with convolutions, which need the whole grid": (
        "FastVit", "MetaFormer", "EfficientFormer", "EfficientFormerV2", "TinyVit", "PyramidVisionTransformerV2",
        "MultiScaleVit", "PoolingVisionTransformer", "Levit", "LevitDistilled", "NextVit", "EdgeNeXt", "CoaT",
        "Visformer", "Nest", "VOLO",
    ),
    "a patch grid of its own for each image, where all images of a batch must share one": ("NaFlexVit",),
    "attention between channels instead of tokens": ("Xcit",),
    "blocks of its own, which are not known from inside": (
        "ConVit", "CrossVit", "TNT", "DeepseekVitEncoder", "DeepseekVitClassifier",
        "Gemma4VitEncoder", "Gemma4VitClassifier", "Qwen3VitEncoder", "Qwen3VitClassifier",
    ),
}  # fmt: skip
_FORWARDS = {"forward", "forward_features", "_pos_embed", "pool", "forward_head"}
_POOLS = ("token", "avg", "avgmax", "max", "map", "")


@dataclass(frozen=True)
class Anatomy:
    """What one supported ViT is made of; sizes in tokens, pixels and channels."""

    depth: int  # number of blocks
    width: int  # embedding dimension D
    heads: tuple[int, ...]  # heads of each block
    head_dim: int  # width of one head
    hidden: tuple[int, ...]  # MLP hidden width of each block (what the second linear layer reads)
    prefix: int  # number of prefix tokens: class, distillation and register tokens
    grid: tuple[int, int]  # patch grid (gh, gw) at the model's own image size
    image: tuple[int, int]  # image size (h, w) in pixels
    patch: tuple[int, int]  # patch size (h, w) in pixels
    channels: int  # image channels
    classes: int  # outputs of the head; 0 without one
    pool: str  # timm's ``global_pool``
    dynamic: bool  # whether any image size is accepted
    readers: tuple[int, ...]  # prefix positions whose tokens the head reads; empty when it reads patches
    pool_prefix: bool = False  # whether pooling takes prefix tokens in
    pads: bool = False  # whether images are padded to whole patches
    rankers: tuple[int, ...] = ()  # prefix positions by whose attention patches are ranked: those timm's own head reads
    late: bool = False  # whether a class token enters behind the blocks (CaiT), and reads the patches there

    @property
    def dividing_heads(self) -> int:
        """The model's heads for a further attention over its whole width: as many as divide it, where blocks differ."""
        return max(h for h in range(1, max(1, *self.heads) + 1) if self.width % h == 0)

    @property
    def final_prefix(self) -> int:
        """Prefix tokens among the final ones."""
        return self.prefix + self.late

    def grid_at(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid of images of some size in pixels; what is left at the edges is padded to a whole patch."""
        return -(-height // self.patch[0]), -(-width // self.patch[1])

    def readout(self, tokens: int, policy: Tensor | None, like: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Which tokens the head reads, as weights: [B, tokens] summing to 1, of ``like``'s batch, device and dtype.

        The class token (with a distillation token, half each); of pooled models the mean over the tokens that are there
        (``policy`` [B, tokens]), by ``sizes``. With attention pooling this stands for "any of them": the head's own
        weights are :func:`prunex.vit.readout.pool_attention`'s.
        """
        row = like.new_zeros(like.shape[0], tokens)
        if self.readers:
            for place in self.readers:  # a list of them would be copied to the device
                row[:, place] = 1 / len(self.readers)
            return row
        start = 0 if self.pool_prefix else self.prefix
        row[:, start:] = 1 if policy is None else (policy[:, start:] > 0).to(row.dtype)
        if sizes is not None:
            row = row * sizes.to(row.dtype)
        return row / row.sum(1, keepdim=True).clamp(min=1)  # all 0 for an image whose patches were all dropped


def find(module: nn.Module, path: str | None = None, kinds: Any = ViT) -> tuple[str, Any]:
    """The one model of some ``kinds`` in a module, at ``path`` where there are several: path ("" for itself), model."""
    name, model = _only_model(module, path, kinds)
    # Inside of a wrapper a block's halves are out of reach, and one graph would be what was compiled before.
    part = next((n for n, m in model.named_modules() if "_orig_mod" in m._modules), None)
    if part is not None:
        raise PrunexError(
            f"{part} of this {type(model).__name__} is wrapped by torch.compile: compile the whole model instead "
            f"(torch.compile(model) or model.compile()), or parts in place, as in model.{part}.compile()"
        )
    return name, model


def _only_model(module: nn.Module, path: str | None, kinds: Any) -> tuple[str, Any]:
    if not isinstance(module, nn.Module):
        raise PrunexError(
            f"expected a torch.nn.Module that holds a timm ViT, got {type(module).__name__}: build it first"
        )
    vits = [(name, m) for name, m in module.named_modules() if isinstance(m, kinds)]
    if path is not None:
        return _at(module, path, kinds, vits)
    if len(vits) > 1:
        names = ", ".join(repr(n) for n, _ in vits)
        raise PrunexError(
            f"{type(module).__name__} holds {len(vits)} timm ViTs ({names}): say which with path=... "
            "(model=... in callbacks)"
        )
    if not vits:
        # By its parts as well: who passes a wrapper sees what is in it.
        children = sorted({type(m).__module__.split(".")[0] + "." + type(m).__name__ for m in module.children()})[:6]
        theirs = any(type(m).__module__.startswith("transformers.models.") for m in module.modules())
        hint = "; prunex.from_transformers makes the timm twin of a ViT of transformers" if theirs else ""
        raise PrunexError(
            f"no supported ViT in {type(module).__module__.split('.')[0]}.{type(module).__name__} "
            f"({_reason(module) or 'it holds ' + (', '.join(children) or 'nothing')}); what works: {WORKS}{hint}"
        )
    return vits[0]


def _at(module: nn.Module, path: str, kinds: Any, vits: list[tuple[str, Any]]) -> tuple[str, Any]:
    target = dict(module.named_modules()).get(path)
    inside = [] if target is None else [(n, m) for n, m in target.named_modules() if isinstance(m, kinds)]
    if len(inside) != 1:
        what = "does not exist" if target is None else f"is a {type(target).__name__} holding {len(inside)} timm ViTs"
        raise PrunexError(
            f"model={path!r} {what} in {type(module).__name__}; timm ViTs there: "
            f"{', '.join(repr(n) for n, _ in vits) or 'none'}"
        )
    return ".".join(p for p in (path, inside[0][0]) if p), inside[0][1]


def read(model: nn.Module) -> Anatomy:
    """What a timm ViT is made of; an unsupported family is refused by name, with the list of what works."""
    _check_supported(model)
    inner: Any = model
    embed, blocks = inner.patch_embed, list(inner.blocks)
    late = isinstance(model, Cait) and model.blocks_token_only is not None
    readers: tuple[int, ...] = ()
    # Two heads read two tokens, and their mean is the output.
    if isinstance(model, VisionTransformerDistilled):
        readers = (0, 1)
    elif late:
        readers = ()  # patches, by way of a class token that is in no block
    elif inner.global_pool == "token" or (inner.global_pool == "" and inner.cls_token is not None):
        readers = (0,)
    layouts = [layout_of(b) for b in blocks]
    counts = []
    for layout, block in zip(layouts, blocks, strict=True):
        # Where several attentions run side by side, the block has the heads of all.
        counts.append(sum(m.num_heads for m in layout.attentions(block)))
    attends_all = isinstance(model, Eva) and inner.global_pool == "map"  # its pooling takes prefix tokens in
    rankers, explainable = readers, mounted_head(model)
    if explainable is not None and explainable.reads_patches and readers:
        # It reads them beside the class token: no token may be left out, and any of them may hold what it goes by.
        readers, attends_all = (), True
    # A narrowed block may have no heads left, and then no width of one.
    widths = (y.width(b) // n for y, b, n in zip(layouts, blocks, counts, strict=True) if n)
    return Anatomy(
        depth=len(blocks),
        width=inner.embed_dim,
        heads=tuple(counts),
        head_dim=next(widths, 0),
        hidden=tuple(lay.hidden(b) for lay, b in zip(layouts, blocks, strict=True)),
        prefix=prefix_of(model),
        grid=tuple(embed.grid_size),
        image=tuple(embed.img_size),
        patch=pixels_of(embed),
        channels=channels_of(embed),
        classes=head_classes(model),
        pool=inner.global_pool,
        dynamic=bool(getattr(inner, "dynamic_img_size", False)),
        readers=readers,
        pool_prefix=bool(getattr(inner, "pool_include_prefix", False)) or attends_all,
        pads=bool(getattr(embed, "dynamic_img_pad", False)),
        rankers=rankers,
        late=late,
    )


def _check_supported(model: nn.Module) -> None:
    """Refuse what the one forward does not know, by name."""
    name, inner = type(model).__name__, cast(Any, model)
    if not isinstance(model, ViT):
        reason = _reason(model)
        raise PrunexError(f"{name} is not supported{f' ({reason})' if reason else ''}; what works: {WORKS}")
    unknown = _unknown(inner)
    if unknown is not None:
        raise PrunexError(f"{name} {unknown} is not supported; what works: {WORKS}")
    if not len(inner.blocks):
        raise PrunexError(f"{name} has no blocks: nothing to prune or explain")
    # Asked of timm's own method: some versions leave before prefix tokens are put in.
    bare = isinstance(model, VisionTransformer) and inner.pos_embed is None and inner.num_prefix_tokens
    if bare:
        empty = next(inner.parameters()).new_zeros(1, 1, 1, inner.embed_dim)
        if inner._pos_embed(empty).shape[1] == 1:
            raise PrunexError(
                f"timm {timm.__version__} leaves the prefix tokens out of a {name} without position embedding: install "
                "a later timm"
            )
    # PatchDropout takes patches out before the first block, and no token says which.
    if not isinstance(getattr(inner, "patch_drop", None), nn.Identity | None):
        raise PrunexError(f"{name} with patch_drop_rate > 0 is not supported: build it with patch_drop_rate=0")


def _unknown(model: Any) -> str | None:
    """What in a model of a supported family is not known from inside, or None."""
    overridden = sorted(_FORWARDS & _overridden(type(model)))
    if overridden:
        return f"has its own {', '.join(overridden)}() and"
    for i, block in enumerate(model.blocks):
        part = unknown_part(block)
        if part is not None:
            return f"with {part} (block {i})"
    if isinstance(model, Cait):
        for block in cast(Any, model).blocks_token_only or ():
            for part, known in ((block, LayerScaleBlockClassAttn), (block.attn, ClassAttn)):
                if type(part).forward is not known.forward:
                    return f"with {type(part).__name__}"
    if model.global_pool not in _POOLS:
        return f"with global_pool={model.global_pool!r}"
    pool, embed = model.attn_pool if model.global_pool == "map" else None, model.patch_embed
    # Positions of a pooling head are those of the whole grid, which dropped tokens leave.
    if pool is not None and (type(pool).forward is not AttentionPoolLatent.forward or pool.pos_embed is not None):
        return f"with {type(pool).__name__} as pooling"
    # Patches of pixels, or of the features that convolutions make of them: the sequence begins behind both.
    if type(embed).forward not in (PatchEmbed.forward, HybridEmbed.forward):
        return f"with {type(embed).__name__} as patch embedding"
    return None


def channels_of(embed: Any) -> int:
    """Image channels that a patch embedding takes."""
    if not isinstance(embed, HybridEmbed):
        convolution = convolution_of(embed.proj)
        if convolution is None:
            raise PrunexError(f"patch_embed.proj is a {type(embed.proj).__name__}, and no convolution is in it")
        return int(convolution.in_channels)
    return next(m.in_channels for m in embed.backbone.modules() if isinstance(m, nn.Conv2d))


def pixels_of(embed: Any) -> tuple[int, int]:
    """Height and width in pixels of what one token is made of, overlaps of convolutions left out."""
    stem = embed.feature_ratio if isinstance(embed, HybridEmbed) else (1, 1)
    return int(embed.patch_size[0] * stem[0]), int(embed.patch_size[1] * stem[1])


def head_classes(model: Any) -> int:
    """Outputs of a model's head, which tells better than ``num_classes``: heads are put on by assignment."""
    head = getattr(model.head, "fc", model.head)
    if isinstance(head, nn.Identity):
        return 0
    # Of a sequence, such as a small MLP, the last layer that tells.
    last = [m.out_features for m in (head, *reversed(list(head.modules()))) if hasattr(m, "out_features")]
    return int(last[0] if last else model.num_classes)


def _reason(model: nn.Module) -> str:
    """Why a model of timm is not supported, where that is known; else nothing."""
    return next((why for why, names in _REASONS.items() if type(model).__name__ in names), "")


def _overridden(cls: type) -> set[str]:
    """Methods a subclass brings that timm's own classes do not have."""
    known = (VisionTransformerDistilled, *get_args(ViT), nn.Module, object)
    names: set[str] = set()
    for c in cls.__mro__:
        if c not in known:
            names |= set(vars(c))
    return names


def check_images(anatomy: Anatomy, images: Any, values: bool = False) -> None:
    """Refuse what the model cannot take, in one line; ``values`` also looks for NaN (this waits for the device)."""
    a = anatomy
    want = f"[B, {a.channels}, " + ("H, W]" if a.dynamic else f"{a.image[0]}, {a.image[1]}]")
    if not isinstance(images, Tensor):
        hint = "timm.data.create_transform(**timm.data.resolve_model_data_config(model)) makes one of a picture"
        if isinstance(images, list | tuple):
            hint = "torch.stack(images) makes one of tensors"
        raise PrunexError(f"images are a {type(images).__name__}: give a float tensor {want}; {hint}")
    if not images.is_floating_point():
        raise PrunexError(f"images have dtype {images.dtype}: give normalised floats {want}, as in x.float() / 255")
    shape = list(images.shape)
    if images.ndim != 4 or shape[1] != a.channels:
        hint = "; add the batch dimension with images[None]" if images.ndim == 3 else ""
        if images.ndim == 4 and shape[3] == a.channels:
            hint = "; channels go first: images.permute(0, 3, 1, 2)"
        raise PrunexError(f"images have shape {shape}: this model takes {want}{hint}")
    if min(shape[2:]) < min(a.patch):
        raise PrunexError(f"images are {shape[2]} x {shape[3]} pixels: the smallest that has a patch is {a.patch}")
    if not a.dynamic and (shape[2], shape[3]) != a.image:
        raise PrunexError(
            f"images are {shape[2]} x {shape[3]} pixels: this model takes {a.image[0]} x {a.image[1]}; resize them, "
            "or build the model with img_size= or dynamic_img_size=True"
        )
    if a.dynamic and not a.pads and (shape[2] % a.patch[0] or shape[3] % a.patch[1]):
        raise PrunexError(f"images are {shape[2]} x {shape[3]} pixels: give multiples of the patch size {a.patch}")
    # A question to the batch's size would fix it in the graph.
    if torch.compiler.is_compiling():
        return
    if shape[0] == 0:
        raise PrunexError(f"images are an empty batch {shape}: give at least one image")
    if values:
        check_values(images)


def check_values(images: Tensor) -> None:
    """Refuse images that hold no values, or NaN; this waits for the device, but inside of ``prunex.later.Looks``."""
    if images.is_meta:
        raise PrunexError("images are on the meta device, which holds no values: give them on the CPU or a GPU")

    def describe() -> str:
        bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
        return f"images {bad[:8]} of the batch hold NaN or infinite values: clean them first"

    refuse(~torch.isfinite(images).all(), describe)
