"""Widths: which units of a dense model a narrower one has, and taking the others out for good."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.vit.cuts import check_cuts, whole_or_not
from prunex.vit.mount import mounted
from prunex.vit.narrow import NarrowAttention
from prunex.vit.optimisers import Slices, check_followed, follow, sliced
from prunex.vit.units import Backbone, blocks_of, head_dim, opens_channels, opens_heads
from prunex.vit.weights import sizes

Kept = tuple[int, ...]


@dataclass(frozen=True, repr=False)
class WidthSpec(Brief):
    """Which units of a model are kept: the one thing that mask learning, slimming, saving and counting exchange.

    All numbers are those of the dense model's units, rising. What is not named is kept whole.

    Attributes:
        heads: By block number, the heads kept; none of them leaves the projection's bias alone.
        channels: By block number, the MLP channels kept; likewise.
        query_dims: By block number, for each kept head the channels of queries and keys kept, as many in each head.
        value_dims: By block number, the same for values; ``query_dims`` and ``value_dims`` keep equally many, since
            timm's layers have one width for all three.
        embedding: Channels of the token stream kept, or None. **Not** what a mask would compute: norms read all.
        blocks: Blocks kept, or None. A block that is left out adds nothing any more, not even its biases.

    >>> spec = WidthSpec(heads={0: (0, 2)}, channels={1: tuple(range(96))})
    >>> WidthSpec.read(spec.plain()) == spec
    True
    """

    heads: Mapping[int, Sequence[int]] = field(default_factory=dict)
    channels: Mapping[int, Sequence[int]] = field(default_factory=dict)
    query_dims: Mapping[int, tuple[Kept, ...]] = field(default_factory=dict)
    value_dims: Mapping[int, tuple[Kept, ...]] = field(default_factory=dict)
    embedding: Kept | None = None
    blocks: Kept | None = None

    def __hash__(self) -> int:
        return hash(repr(self.plain()))

    def plain(self) -> dict[str, Any]:
        """In values that JSON holds; what is kept whole is left out."""
        told: dict[str, Any] = {}
        for name in ("heads", "channels", "query_dims", "value_dims"):
            found = getattr(self, name)
            if found:
                told[name] = {str(b): _lists(kept) for b, kept in sorted(found.items())}
        told |= {n: list(getattr(self, n)) for n in ("embedding", "blocks") if getattr(self, n) is not None}
        return told

    @classmethod
    def read(cls, told: Any) -> WidthSpec:
        """From :meth:`plain`'s values.

        Raises:
            PrunexError: For anything else.
        """
        parts: dict[str, Any] = {}
        try:
            for name, value in told.items():
                if name in ("embedding", "blocks"):
                    parts[name] = _whole(value)
                elif name in ("heads", "channels"):
                    parts[name] = {int(b): _whole(kept) for b, kept in value.items()}
                elif name in ("query_dims", "value_dims"):
                    parts[name] = {int(b): tuple(_whole(k) for k in kept) for b, kept in value.items()}
                else:
                    raise ValueError(f"{name!r} is no part of it")
        except (AttributeError, TypeError, ValueError) as error:
            raise PrunexError(f"these are no widths ({error}): give what WidthSpec.plain wrote") from error
        return cls(**parts)


def _lists(kept: Any) -> Any:
    return [_lists(k) if isinstance(k, Sequence) and not isinstance(k, str) else k for k in kept]


def _whole(values: Any) -> Kept:
    if not isinstance(values, list | tuple) or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ValueError(f"{values!r} are no whole numbers")
    return tuple(values)


@dataclass(frozen=True)
class Shape:
    """A dense model's own widths, which a narrow one remembers: its constructor call names them.

    Attributes:
        heads: Heads of each block and the width of one; None for blocks whose heads are not known one by one.
        hidden: MLP channels of each block, likewise.
        embedding: Channels of the token stream.
    """

    heads: tuple[tuple[int, int] | None, ...]
    hidden: tuple[int | None, ...]
    embedding: int


def dense_shape(model: nn.Module) -> Shape | None:
    """The widths that a narrowed model had when it was dense; None for any other."""
    return model.__dict__.get("prunex_dense")


def _shape(model: Any) -> Shape:
    found = [b for _, b in blocks_of(model)]
    heads = tuple((b.attn.num_heads, head_dim(b.attn)) if opens_heads(b) else None for b in found)
    hidden = tuple(sizes(b.mlp.fc2)[0] if opens_channels(b) else None for b in found)
    return Shape(heads, hidden, int(model.embed_dim))


def widths_of(model: nn.Module) -> WidthSpec:
    """What is left of a model that was narrowed, in the dense model's numbers; of any other, an empty one."""
    return getattr(model, "prunex_widths", None) or WidthSpec()


def narrow(
    model: nn.Module, spec: WidthSpec, optimizers: Iterable[torch.optim.Optimizer] = (), remember: bool = True
) -> nn.Module:
    """Take all units out that a spec does not keep, in place, for good.

    Heads and MLP channels leave what they computed behind exactly as if their gates were 0. Channels of queries, keys
    and values are exact against a model in which the same channels are zero: shrinking d to d' would rescale the scores
    by sqrt(d / d'), so the queries are multiplied by sqrt(d' / d). The embedding and whole blocks are lossy.

    Args:
        model: A supported backbone, dense, or narrowed before (numbers stay those of the dense model).
        spec: What is kept.
        optimizers: Whose parameters and states follow, wrapped ones' too: momenta of what stays are kept.
        remember: Whether :func:`widths_of` shall know.

    Returns:
        The model.

    Raises:
        PrunexError: For numbers that the model does not have, parts whose units cannot be taken out one by one, layers
            that are adapted, reparametrised, quantised or shared, or an optimiser that cannot follow. Model and
            optimisers are then unchanged, whatever was raised.
    """
    if not isinstance(model, Backbone):
        raise PrunexError(f"{type(model).__name__} cannot be narrowed: no layers of it are known")
    known, spec = widths_of(model), _tuples(spec)
    shape = dense_shape(model) or _shape(model)
    local, optimizers = _local(model, spec, known), list(optimizers)
    check_cuts(model, local)
    check_followed(optimizers)
    with whole_or_not(model, optimizers):
        follow(optimizers, _cut_all(model, local))
    if remember:
        model.__dict__["prunex_widths"] = _joined(known, spec, shape)
        model.__dict__["prunex_dense"] = shape
    return model


def _cut_all(model: Any, local: WidthSpec) -> Slices:
    """Take the units out that a spec in the model's present numbers does not keep."""
    slices: Slices = {}
    blocks = list(blocks_of(model))
    for number, kept in local.heads.items():
        _take_heads(blocks[number][1].attn, tuple(kept), slices)
    for number in local.query_dims:
        _take_dims(blocks[number][1].attn, local.query_dims[number], local.value_dims[number], slices)
    for number, kept in local.channels.items():
        _take_channels(blocks[number][1].mlp, tuple(kept), slices)
    if local.embedding is not None:
        _take_embedding(model, local.embedding, slices)
    if local.blocks is not None:
        _take_blocks(model, local.blocks)
    return slices


def _tuples(spec: Any) -> WidthSpec:
    """A spec with tuples of int, whatever sequences were given.

    Raises:
        PrunexError: For anything else.
    """
    try:
        told = spec.plain()
    except (AttributeError, TypeError, ValueError) as error:
        raise PrunexError(f"these are no widths ({error}): give a prunex.WidthSpec") from error
    return WidthSpec.read(told)


def _joined(known: WidthSpec, spec: WidthSpec, shape: Shape) -> WidthSpec:
    """Two narrowings as one: the later one's word counts, and what it does not name stays."""

    def still(dims: Mapping[int, tuple[Kept, ...]]) -> dict[int, tuple[Kept, ...]]:
        """The lists of heads that were left, without those of heads that have gone since."""
        found = dict(dims)
        for block in found.keys() & spec.heads.keys():
            before = known.heads.get(block, range((shape.heads[block] or (0, 0))[0]))
            found[block] = tuple(d for h, d in zip(before, found[block], strict=True) if h in spec.heads[block])
        return found

    return WidthSpec(
        heads={**known.heads, **spec.heads},
        channels={**known.channels, **spec.channels},
        query_dims={**still(known.query_dims), **spec.query_dims},
        value_dims={**still(known.value_dims), **spec.value_dims},
        embedding=known.embedding if spec.embedding is None else spec.embedding,
        blocks=known.blocks if spec.blocks is None else spec.blocks,
    )


def _local(model: Any, spec: WidthSpec, known: WidthSpec) -> WidthSpec:
    """The spec in the numbers that the model has now, checked.

    Raises:
        PrunexError: For numbers out of range, falling or repeated ones, and parts that cannot be narrowed.
    """
    found = list(blocks_of(model))
    depth = len(found) if known.blocks is None else max(known.blocks) + 1
    place = {b: i for i, b in enumerate(range(len(found)) if known.blocks is None else known.blocks)}

    def block(number: int, what: str) -> Any:
        if number not in place:
            raise PrunexError(f"widths name block {number} for its {what}: the model has blocks 0 to {depth - 1}")
        return found[place[number]][1]

    heads, channels, queries, values = {}, {}, {}, {}
    for number, kept in spec.heads.items():
        part = block(number, "heads")
        if not opens_heads(part):
            raise PrunexError(f"heads of block {number} ({type(part).__name__}) cannot be taken out one by one")
        heads[place[number]] = _renamed(kept, known.heads.get(number), part.attn.num_heads, f"heads of block {number}")
        if not kept and isinstance(part.attn, WindowAttention):
            raise PrunexError(f"block {number} would have no heads: timm's windowed attention needs one; keep one")
        if not kept and place[number] in _read_blocks(model):
            raise PrunexError(
                f"block {number} would have no heads, but {mounted(model).method} ranks tokens by its attention: "
                "keep one"
            )
    for number, kept in spec.channels.items():
        part = block(number, "channels")
        if not opens_channels(part):
            raise PrunexError(f"MLP channels of block {number} ({type(part).__name__}) cannot be taken out one by one")
        had = sizes(part.mlp.fc2)[0]
        channels[place[number]] = _renamed(kept, known.channels.get(number), had, f"channels of block {number}")
    if set(spec.query_dims) != set(spec.value_dims):
        raise PrunexError("query_dims and value_dims name different blocks: timm's layers have one width for both")
    for number in spec.query_dims:
        part = block(number, "head widths")
        if number in known.query_dims:
            raise PrunexError(f"the heads of block {number} were made narrower already: start from the dense model")
        queries[place[number]], values[place[number]] = _checked_dims(part, number, spec, heads.get(place[number]))
    embedding = spec.embedding
    if embedding is not None:
        if not isinstance(model, VisionTransformer) or model.global_pool == "map":
            raise PrunexError(f"the embedding of a {type(model).__name__} with this head cannot be made narrower")
        plain = (Attention, NarrowAttention)
        if any(
            type(getattr(b, "attn", None)) not in plain or type(b.mlp) not in (Mlp, GluMlp, SwiGLU) for _, b in found
        ):
            raise PrunexError(f"the embedding of {type(found[0][1]).__name__} blocks cannot be made narrower")
        heads_on = [h for h in (model.head, getattr(model, "head_dist", None)) if not isinstance(h, nn.Identity | None)]
        if not all(isinstance(h, nn.Linear) for h in heads_on):
            raise PrunexError(
                f"the embedding of a {type(model).__name__} whose head is a {type(heads_on[0]).__name__} cannot be "
                "made narrower: put a linear one on with model.reset_classifier(classes)"
            )
        if mounted(model) is not None:
            raise PrunexError("the embedding cannot be made narrower while tokens are pruned by it: detach() first")
        embedding = _renamed(embedding, known.embedding, int(model.embed_dim), "channels of the embedding")
        if not embedding:
            raise PrunexError("the embedding would have no channels: keep at least one")
    kept_blocks = spec.blocks
    if kept_blocks is not None:
        if isinstance(model, SwinTransformer) or not isinstance(model, VisionTransformer):
            raise PrunexError(f"blocks of a {type(model).__name__} cannot be taken out")
        if mounted(model) is not None:
            raise PrunexError("blocks cannot be taken out while tokens are pruned: their stages count blocks; detach()")
        kept_blocks = _renamed(kept_blocks, known.blocks, len(found), "blocks")
        if not kept_blocks:
            raise PrunexError("no block would be left: keep at least one")
    return WidthSpec(heads, channels, queries, values, embedding, kept_blocks)


def _read_blocks(model: Any) -> frozenset[int]:
    """Blocks whose attention an attached token pruner ranks by."""
    hooked = mounted(model)
    turns = [] if hooked is None else hooked.pruner.plan()
    return frozenset(turn.block for turn in turns if turn.shown)


def _renamed(kept: Sequence[int], known: Sequence[int] | None, count: int, what: str) -> Kept:
    """Dense numbers as places among what is left.

    Raises:
        PrunexError: For numbers that are not there, repeat, or do not rise.
    """
    there = {u: i for i, u in enumerate(range(count) if known is None else known)}
    rising = all(b > a for a, b in zip(kept, kept[1:], strict=False))
    if not rising or any(u not in there for u in kept):
        wrong = next((u for u in kept if u not in there), None)
        why = "must rise, each once" if wrong is None else f"has no {wrong}"
        raise PrunexError(f"widths for the {what}: the list {why}; there are {len(there)} of them")
    return tuple(there[u] for u in kept)


def _checked_dims(part: Any, number: int, spec: WidthSpec, heads: Kept | None) -> tuple[Any, Any]:
    attn = part.attn
    plain = type(attn) in (Attention, NarrowAttention)
    if not plain or not isinstance(attn.q_norm, nn.Identity) or not opens_heads(part):
        raise PrunexError(
            f"heads of block {number} ({type(attn).__name__}) cannot be made narrower: their scores are normed, "
            "rotated or biased channel by channel"
        )
    count, d = attn.num_heads if heads is None else len(heads), head_dim(attn)
    widths = set()
    for name, dims in (("query_dims", spec.query_dims[number]), ("value_dims", spec.value_dims[number])):
        if len(dims) != count:
            raise PrunexError(f"{name} of block {number} has {len(dims)} lists for {count} heads: give one a head")
        for kept in dims:
            _renamed(kept, None, d, f"{name} of block {number}")
            widths.add(len(kept))
    if len(widths) > 1 or 0 in widths:
        raise PrunexError(
            f"query_dims and value_dims of block {number} keep {sorted(widths)} channels: keep equally many, at least "
            "one, in every head"
        )
    return spec.query_dims[number], spec.value_dims[number]


def _take_heads(attn: Any, kept: Kept, slices: Slices) -> None:
    d, count = head_dim(attn), attn.num_heads
    if len(kept) == count:
        return
    places = torch.arange(count * d).view(count, d)[list(kept)].flatten()
    rows = torch.cat([places + s * count * d for s in range(3)])
    _cut(attn.qkv, rows, 0, slices)
    _cut(attn.proj, places, 1, slices)
    if getattr(attn, "gate", None) is not None:
        _cut(attn.gate, places, 0, slices)
    if isinstance(attn, WindowAttention):
        _swap(attn, "relative_position_bias_table", [(1, torch.tensor(kept))], slices)
    attn.num_heads, attn.head_dim = len(kept), d
    _settle(attn, d)


def _take_dims(attn: Any, queries: Any, values: Any, slices: Slices) -> None:
    count, d = attn.num_heads, head_dim(attn)
    left = len(queries[0])
    if left == d:
        return
    at = torch.arange(count * d).view(count, d)
    q = torch.cat([at[h][list(kept)] for h, kept in enumerate(queries)])
    v = torch.cat([at[h][list(kept)] for h, kept in enumerate(values)])
    _cut(attn.qkv, torch.cat([q, q + count * d, v + 2 * count * d]), 0, slices)
    _cut(attn.proj, v, 1, slices)
    if getattr(attn, "gate", None) is not None:
        _cut(attn.gate, v, 0, slices)
    with torch.no_grad():  # scores are scaled by the new width from now on
        attn.qkv.weight[: count * left] *= (left / d) ** 0.5
        if attn.qkv.bias is not None:
            attn.qkv.bias[: count * left] *= (left / d) ** 0.5
    attn.head_dim = left
    attn.scale = left**-0.5
    _settle(attn, left)


def _settle(attn: Any, d: int) -> None:
    """What timm's forward reads beside the weights; an older one, which takes widths to be equal, gets ours."""
    known = hasattr(attn, "attn_dim") or isinstance(attn, WindowAttention)
    if known:
        attn.attn_dim = attn.num_heads * d
    if type(attn) is Attention and not (known and attn.num_heads):
        attn.__class__ = NarrowAttention


def _take_channels(mlp: Any, kept: Kept, slices: Slices) -> None:
    count = mlp.fc2.in_features
    if len(kept) == count:
        return
    places = torch.tensor(kept, dtype=torch.long)
    if type(mlp) is Mlp:
        _cut(mlp.fc1, places, 0, slices)
    elif type(mlp) is GluMlp:
        _cut(mlp.fc1, torch.cat([places, places + count]), 0, slices)
    elif type(mlp) is SwiGLU:
        _cut(mlp.fc1_g, places, 0, slices)
        _cut(mlp.fc1_x, places, 0, slices)
    _cut(mlp.fc2, places, 1, slices)


def _take_embedding(model: Any, kept: Kept, slices: Slices) -> None:
    places = torch.tensor(kept, dtype=torch.long)
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        if getattr(model, name, None) is not None:
            _swap(model, name, [(2, places)], slices)
    _swap(model.patch_embed.proj, "weight", [(0, places)], slices)
    _swap(model.patch_embed.proj, "bias", [(0, places)], slices)
    model.patch_embed.proj.out_channels = len(kept)
    norms = [model.patch_embed.norm, model.norm_pre, model.norm, model.fc_norm]
    for _, block in blocks_of(model):
        for name in ("norm1", "norm2", "ls1", "ls2"):
            norms.append(getattr(block, name, nn.Identity()))
        for first in (block.attn.qkv, getattr(block.attn, "gate", None)):
            if first is not None:
                _cut(first, places, 1, slices)
        _cut(block.attn.proj, places, 0, slices)
        _settle(block.attn, head_dim(block.attn))
        for name in ("fc1", "fc1_g", "fc1_x"):
            if hasattr(block.mlp, name):
                _cut(getattr(block.mlp, name), places, 1, slices)
        _cut(block.mlp.fc2, places, 0, slices)
    for norm in norms:
        for name in ("weight", "bias", "gamma"):
            if isinstance(getattr(norm, name, None), nn.Parameter):
                _swap(norm, name, [(0, places)], slices)
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (len(kept),)
    for head in (model.head, getattr(model, "head_dist", None)):
        if isinstance(head, nn.Linear):
            _cut(head, places, 1, slices)
    model.embed_dim = model.num_features = model.head_hidden_size = len(kept)
    model.feature_info = [dict(entry, num_chs=len(kept)) for entry in getattr(model, "feature_info", [])]


def _take_blocks(model: Any, kept: Kept) -> None:
    blocks = list(model.blocks)
    model.blocks = nn.Sequential(*(blocks[i] for i in kept))
    model.feature_info = [dict(model.feature_info[i], module=f"blocks.{n}") for n, i in enumerate(kept)]


def _cut(linear: Any, places: Tensor, dim: int, slices: Slices) -> None:
    """Keep some outputs (dim 0) or inputs (dim 1) of a linear layer."""
    _swap(linear, "weight", [(dim, places)], slices)
    if dim == 0:
        if linear.bias is not None:
            _swap(linear, "bias", [(0, places)], slices)
        linear.out_features = len(places)
    else:
        linear.in_features = len(places)


def _swap(module: nn.Module, name: str, cuts: list[tuple[int, Tensor]], slices: Slices) -> None:
    """Put a sliced parameter in the place of a whole one, and note which came from which."""
    old = module._parameters[name]
    if old is None:
        return
    new = nn.Parameter(sliced(old.detach(), cuts), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = sliced(old.grad, cuts)
    setattr(module, name, new)
    first, before = next(((k, c) for k, (p, c) in slices.items() if p is old), (old, []))
    slices[first] = (new, [*before, *cuts])


def leading(spec: WidthSpec) -> WidthSpec:
    """A spec of the same widths that keeps the first units each time, for a model whose weights come from elsewhere."""

    def first(kept: Any) -> Any:
        return tuple(first(k) if isinstance(k, tuple) else i for i, k in enumerate(kept))

    found: dict[str, Any] = {}
    for name in ("heads", "channels", "query_dims", "value_dims"):
        found[name] = {b: first(kept) for b, kept in getattr(spec, name).items()}
    for name in ("embedding", "blocks"):
        kept = getattr(spec, name)
        found[name] = None if kept is None else copy.copy(first(kept))
    return WidthSpec(**found)
