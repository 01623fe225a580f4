"""The units of a block that can be switched off or taken out: attention heads and MLP channels.

Units are gated from outside: the layer that mixes them (``proj`` behind heads, ``fc2`` behind channels) is given its
input times a gate. Weights, names and the block's own forward stay as they are, fused attention included, so a gate
acts in every forward alike, pruned tokens or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit.narrow import NarrowAttention
from prunex.vit.weights import OwnHook, is_linear, sizes

Kind = Literal["heads", "channels"]
Backbone = VisionTransformer | Eva | Beit | SwinTransformer
KINDS: tuple[Kind, Kind] = ("heads", "channels")
Gate = Callable[[str, int], Tensor | None]
Left = Callable[[str], Sequence[int] | None]

WORKS = "timm VisionTransformer (ViT, DeiT, DINO, DINOv2, CLIP, SigLIP), Eva and Beit (MLP channels), SwinTransformer"


@dataclass(frozen=True)
class Branch:
    """One half of one block, as far as its units go.

    Attributes:
        key: ``"3.heads"`` or ``"3.channels"``: the block's number and the kind; stable, state dicts use it.
        block: The block's number, counted through the whole model.
        path: Dotted path of the block in the model, such as ``"blocks.3"``.
        kind: "heads" or "channels".
        units: How many heads or channels there are.
        width: Inputs that one unit has in the layer behind it: the head's width, or 1.
        macs: Multiply-adds that one unit costs in one image.
    """

    key: str
    block: int
    path: str
    kind: Kind
    units: int
    width: int
    macs: int


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
    plain = type(attn) in (Attention, NarrowAttention)
    return plain and isinstance(getattr(attn, "norm", None), nn.Identity | None)


def opens_channels(block: Any) -> bool:
    """Whether a block's MLP channels can be; not where a norm between the layers reads all of them."""
    mlp: Any = getattr(block, "mlp", None)
    known = type(mlp) in (Mlp, GluMlp, SwiGLU)
    return known and isinstance(getattr(mlp, "norm", None), nn.Identity | None) and is_linear(mlp.fc2)


def last_layer(block: Any, kind: Kind) -> nn.Module:
    """The layer that mixes the units into the stream."""
    return block.attn.proj if kind == "heads" else block.mlp.fc2


def head_dim(attn: Any) -> int:
    """Width of one head; of an attention without any, what it had."""
    return sizes(attn.qkv)[1] // (3 * attn.num_heads) if attn.num_heads else int(attn.head_dim)


def branches(model: nn.Module, tokens: Sequence[tuple[int, int, int]] | None = None) -> list[Branch]:
    """The branches whose units can be gated, with what a unit costs.

    A head costs 4 n D d + 2 n m d multiply-adds (d its width, n tokens of m keys each: all n, or those of a window), an
    MLP channel 2 n D (3 n D where the MLP is gated). Where only q of n tokens ask: 2 n D d + 2 q D d + 2 q n d.

    Args:
        model: A supported backbone.
        tokens: Tokens in each block's attention, those of them that ask, and tokens in its MLP; None: those of the
            dense model.

    Raises:
        PrunexError: For a model none of whose units are known.
    """
    if not isinstance(model, Backbone):
        raise PrunexError(f"{type(model).__name__} has no units that are known; what works: {WORKS}")
    found: list[Branch] = []
    for number, (path, block) in enumerate(blocks_of(model)):
        if tokens is None:
            attending, feeding, keys = _tokens(model, path, block)
            asking = attending
        else:
            attending, asking, feeding = tokens[number]
            keys = attending
        if opens_heads(block):
            attn = block.attn
            width, d = sizes(attn.qkv)[0], head_dim(attn)
            macs = 2 * (attending + asking) * width * d + 2 * asking * keys * d
            found.append(Branch(f"{number}.heads", number, path, "heads", attn.num_heads, d, macs))
        if opens_channels(block):
            mlp = block.mlp
            layers = 2 if type(mlp) is Mlp else 3
            hidden, width = sizes(mlp.fc2)
            macs = layers * feeding * width
            found.append(Branch(f"{number}.channels", number, path, "channels", hidden, 1, macs))
    if not found:
        raise PrunexError(
            f"{type(model).__name__} with {type(next(blocks_of(model))[1]).__name__} has no units that are known; "
            f"what works: {WORKS}"
        )
    return found


def unit_params(model: nn.Module, branch: Branch) -> int:
    """Parameters of one unit of a branch: its rows in the layers before, and its columns in the layer behind."""
    block: Any = model.get_submodule(branch.path)
    if branch.kind == "heads":
        attn, d = block.attn, branch.width
        table = getattr(attn, "relative_position_bias_table", None)
        gate = getattr(attn, "gate", None)
        before = [(attn.qkv, 3 * d), *(((gate, d),) if gate is not None else ())]
        rest = d * sizes(attn.proj)[1] + (0 if table is None else table.shape[0])
    else:
        mlp = block.mlp
        before = [(getattr(mlp, n), 1) for n in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, n)]
        before = [(layer, 2 * n if type(mlp) is GluMlp else n) for layer, n in before]
        rest = sizes(mlp.fc2)[1]
    return rest + sum(rows * (sizes(layer)[0] + (getattr(layer, "bias", None) is not None)) for layer, rows in before)


def _tokens(model: Any, path: str, block: Any) -> tuple[int, int, int]:
    """Tokens in a block's attention (those that pad windows included) and in its MLP, and keys that a token sees."""
    if isinstance(model, SwinTransformer):
        (h, w), (wh, ww) = block.input_resolution, block.window_size
        padded = -(-h // wh) * wh * (-(-w // ww) * ww)
        return padded, h * w, wh * ww
    gh, gw = model.patch_embed.grid_size
    n = model.num_prefix_tokens + gh * gw
    return n, n, n


def put_gates(model: nn.Module, gate: Gate, left: Left | None = None) -> None:
    """Let a function say, in every forward, how far each unit is open.

    Args:
        model: A supported backbone.
        gate: From a branch's key and the number of images to None (all open), or factors for the inputs of the layer
            behind the units: [units * width], or [B, units * width] where images differ.
        left: From a branch's key to the units that are open, where its gates are 0 or 1 now; None where they are not,
            or all are open. See :func:`heads_left`.
    """
    for branch in branches(model):
        block = model.get_submodule(branch.path)
        windows = 1
        if branch.kind == "heads" and isinstance(model, SwinTransformer):
            padded, _, keys = _tokens(model, branch.path, block)
            windows = padded // keys
        hook = OwnHook(_through, gate, left, branch.key, windows)
        last_layer(block, branch.kind).register_forward_pre_hook(hook)


def check_gates(model: nn.Module) -> None:
    """See that nobody put other layers in the place of those that :func:`put_gates` put gates in front of.

    Raises:
        PrunexError: By layer.
    """
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


def let_through(module: nn.Module, x: Tensor) -> Tensor:
    """What the gates in front of a layer let through, for those who compute the layer themselves.

    At inference gates are 0 or 1, and asking twice is asking once.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, OwnHook):
            found = hook(module, (x,))
            x = x if found is None else found[0]
    return x


def heads_left(projection: nn.Module) -> tuple[int, ...] | None:
    """The heads in front of a projection that hard gates leave open, None for all of them.

    Whoever looks into attention asks: what closed heads look at reaches nothing, and is gone from the slim model, so
    that rankings and maps must not count it.
    """
    for hook in projection._forward_pre_hooks.values():
        if isinstance(hook, OwnHook) and hook.args[1] is not None:
            found = hook.args[1](hook.args[2])
            if found is not None:
                return tuple(found)
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
