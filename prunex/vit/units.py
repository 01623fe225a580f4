"""The units of a block that can be switched off or taken out: attention heads and MLP channels.

Units are gated from outside: the layer that mixes them (``proj`` behind heads, ``fc2`` behind channels) is given its
input times a gate. Weights, names and the block's own forward stay as they are, fused attention included, so a gate
acts in every forward alike, pruned tokens or not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import Attention, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit.narrow import NarrowAttention
from prunex.vit.weights import OwnHook, is_identity, is_linear, sizes

Kind = Literal["heads", "channels"]
Backbone = VisionTransformer | Eva | Beit | VisionTransformerRelPos | Cait | SwinTransformer
KINDS: tuple[Kind, Kind] = ("heads", "channels")
Gate = Callable[[str, int], Tensor | None]
Left = Callable[[str], Sequence[int] | None]

WORKS = (
    "timm VisionTransformer (ViT, DeiT, DINO, DINOv2, CLIP, SigLIP), Eva, Beit, VisionTransformerRelPos and Cait "
    "(MLP channels), SwinTransformer"
)


@dataclass(frozen=True)
class Branch:
    """One half of one block, as far as its units go."""

    key: str  # ``"3.heads"`` or ``"3.channels"``: the block's number and the kind; stable, state dicts use it
    block: int  # the block's number, counted through the whole model
    path: str  # dotted path of the block in the model, such as ``"blocks.3"``
    kind: Kind  # "heads" or "channels"
    units: int  # how many heads or channels there are
    width: int  # inputs that one unit has in the layer behind it: the head's width, or 1
    macs: int  # multiply-adds that one unit costs in one image


def blocks_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every block with its dotted path, first to last."""
    inner: Any = model
    if isinstance(model, SwinTransformer):
        for s, stage in enumerate(inner.layers):
            yield from ((f"layers.{s}.blocks.{i}", block) for i, block in enumerate(stage.blocks))
        return
    yield from ((f"blocks.{i}", block) for i, block in enumerate(inner.blocks))


def opens_heads(block: Any) -> bool:
    """Whether a block's heads can be taken out one by one and leave the others as they are."""
    attn = getattr(block, "attn", None)
    if type(attn) is WindowAttention:
        return True
    # A norm over all heads' outputs would give the others other values.
    plain = type(attn) in (Attention, NarrowAttention)
    return plain and is_identity(getattr(attn, "norm", None))


def opens_channels(block: Any) -> bool:
    """Whether a block's MLP channels can be; not where a norm between the layers reads all of them."""
    mlp: Any = getattr(block, "mlp", None)
    supported = type(mlp) in (Mlp, GluMlp, SwiGLU)
    return supported and is_identity(getattr(mlp, "norm", None)) and is_linear(mlp.fc2)


def last_layer(block: Any, kind: Kind) -> nn.Module:
    """The layer that mixes the units into the stream."""
    return block.attn.proj if kind == "heads" else block.mlp.fc2


def head_dim(attn: Any) -> int:
    """Width of one head; of an attention without any, what it had."""
    return sizes(attn.qkv)[1] // (3 * attn.num_heads) if attn.num_heads else int(attn.head_dim)


def branches(model: nn.Module, tokens: Sequence[tuple[int, int, int]] | None = None) -> list[Branch]:
    """The branches whose units can be gated, with what a unit costs; refuses a model none of whose units are known.

    A head costs 4 n D d + 2 n m d multiply-adds (d its width, n tokens of m keys each: all n, or those of a window), an
    MLP channel 2 n D (3 n D where the MLP is gated). Where only q of n tokens ask: 2 n D d + 2 q D d + 2 q n d.
    ``tokens``: those in each block's attention, those of them that ask, and those in its MLP; None: the dense model's.
    """
    if not isinstance(model, Backbone):
        raise PrunexError(f"{type(model).__name__} has no units that are known; what works: {WORKS}")
    listed: list[Branch] = []
    for number, (path, block) in enumerate(blocks_of(model)):
        if tokens is None:
            attending, feeding, keys = tokens_in(model, block)
            asking = attending
        else:
            attending, asking, feeding = tokens[number]
            keys = attending
        if opens_heads(block):
            width, d = sizes(block.attn.qkv)[0], head_dim(block.attn)
            macs = 2 * (attending + asking) * width * d + 2 * asking * keys * d
            listed.append(Branch(f"{number}.heads", number, path, "heads", block.attn.num_heads, d, macs))
        if opens_channels(block):
            hidden, width = sizes(block.mlp.fc2)
            layers = 2 if type(block.mlp) is Mlp else 3
            listed.append(Branch(f"{number}.channels", number, path, "channels", hidden, 1, layers * feeding * width))
    if not listed:
        block = next(blocks_of(model))[1]
        raise PrunexError(
            f"{type(model).__name__} with {type(block).__name__} has no units that are known; what works: {WORKS}"
        )
    return listed


def unit_params(model: nn.Module, branch: Branch) -> int:
    """Parameters of one unit of a branch: its rows in the layers before, and its columns in the layer behind."""
    block: Any = model.get_submodule(branch.path)
    # As cuts takes them out: rows of the layers before with their biases, columns behind, whose bias stays.
    columns = branch.width * sizes(last_layer(block, branch.kind))[1]
    if branch.kind == "heads":
        table = getattr(block.attn, "relative_position_bias_table", None)
        columns += 0 if table is None else table.shape[0]
    for layer, rows in first_layers(block, branch.kind):
        has_bias = getattr(layer, "bias", None) is not None
        columns += rows * branch.width * (sizes(layer)[0] + has_bias)
    return columns


def first_layers(block: Any, kind: Kind) -> list[tuple[Any, int]]:
    """The layers that a branch's units are computed by, and how many rows for each of their inputs to the last one."""
    if kind == "heads":
        gate = getattr(block.attn, "gate", None)
        return [(block.attn.qkv, 3)] + ([] if gate is None else [(gate, 1)])
    if type(block.mlp) is GluMlp:
        return [(block.mlp.fc1, 2)]
    return [(getattr(block.mlp, name), 1) for name in ("fc1", "fc1_g", "fc1_x") if hasattr(block.mlp, name)]


def prefix_of(model: Any) -> int:
    """Prefix tokens that enter the first block: none of CaiT's, whose class token enters behind the last."""
    return 0 if isinstance(model, Cait) else model.num_prefix_tokens


def tokens_in(model: Any, block: Any) -> tuple[int, int, int]:
    """Tokens in a block's attention (those that pad windows included) and in its MLP, and keys that a token sees."""
    if isinstance(model, SwinTransformer):
        (h, w), (wh, ww) = block.input_resolution, block.window_size
        # timm pads the grid to whole windows, and attends from what it padded too.
        padded = -(-h // wh) * wh * (-(-w // ww) * ww)
        return padded, h * w, wh * ww
    gh, gw = model.patch_embed.grid_size
    n = prefix_of(model) + gh * gw
    return n, n, n


def put_gates(model: nn.Module, gate: Gate, left: Left | None = None) -> None:
    """Let functions say, in every forward, how far each unit is open.

    ``gate`` makes of a branch's key and the number of images None (all open), or factors for the inputs of the layer
    behind the units, [units * width] or [B, units * width]; ``left`` makes of a key the units that are open where gates
    are 0 or 1 now, else None.
    """
    for branch in branches(model):
        block = model.get_submodule(branch.path)
        # A Swin's attention sees each image as many windows, while gates are told one an image.
        windows = 1
        if branch.kind == "heads" and isinstance(model, SwinTransformer):
            padded, _, keys = tokens_in(model, block)
            windows = padded // keys
        hook = OwnHook(_through, gate, left, branch.key, windows)
        last_layer(block, branch.kind).register_forward_pre_hook(hook)
    _forget_graphs()


def check_gates(model: nn.Module) -> None:
    """Refuse a model in which others stand in the place of layers that :func:`put_gates` put gates in front of."""
    for branch in branches(model):
        layer = last_layer(model.get_submodule(branch.path), branch.kind)
        if not any(isinstance(hook, OwnHook) for hook in layer._forward_pre_hooks.values()):
            name = next(name for name, m in model.named_modules() if m is layer)
            raise PrunexError(
                f"{name} was replaced or wrapped after its units were gated, so that nothing gates it now: detach(), "
                "and attach again once the model is as it shall be"
            )


def take_gates_off(model: nn.Module) -> None:
    """Take off what :func:`put_gates` put on."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, OwnHook):
                del module._forward_pre_hooks[key]
    _forget_graphs()


def _forget_graphs() -> None:
    """Have compiled graphs traced anew: they do not look for hooks that came, or went, after them."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and the import takes seconds
        torch.compiler.reset()


def let_through(module: nn.Module, x: Tensor) -> Tensor:
    """What the gates in front of a layer let through, for those who compute the layer themselves."""
    for hook in module._forward_pre_hooks.values():
        gated = hook(module, (x,)) if isinstance(hook, OwnHook) else None
        x = x if gated is None else gated[0]
    return x


def heads_left(projection: nn.Module) -> tuple[int, ...] | None:
    """The heads in front of a projection that hard gates leave open, None for all of them."""
    # What closed heads look at reaches nothing and is gone from the slim model: nobody may rank or draw by it.
    for hook in projection._forward_pre_hooks.values():
        if isinstance(hook, OwnHook) and hook.args[1] is not None:
            left = hook.args[1](hook.args[2])
            if left is not None:
                return tuple(left)
    return None


def _through(
    gate: Gate, left: Left | None, key: str, windows: int, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Tensor] | None:
    x = args[0]
    factors = gate(key, x.shape[0] // windows)
    if factors is None:
        return None
    if factors.ndim == 2:
        factors = factors if windows == 1 else factors.repeat_interleave(windows, 0)  # an image's follow each other
        factors = factors.reshape(factors.shape[0], *(1,) * (x.ndim - 2), factors.shape[1])
    return (x * factors.to(x.dtype),)
