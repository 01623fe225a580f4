"""Widths: which units of a dense model a narrower one has, and taking the others out for good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from prunex.brief import Brief
from prunex.errors import PrunexError
from prunex.vit.cuts import check_cuts, cut, whole_or_not
from prunex.vit.mount import mounted
from prunex.vit.narrow import NarrowAttention
from prunex.vit.optimisers import check_followed, follow
from prunex.vit.units import Backbone, blocks_of, head_dim, opens_channels, opens_heads
from prunex.vit.weights import is_identity, sizes

Kept = tuple[int, ...]
PLAIN = (Attention, NarrowAttention)  # attention without rotation or biases


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
        # Mappings have none, and equal specs may hold other kinds of sequences.
        return hash(repr(self.plain()))

    def plain(self) -> dict[str, Any]:
        """In values that JSON holds; what is kept whole is left out."""
        values: dict[str, Any] = {}
        for name in (*_PER_BLOCK, *_PER_HEAD):
            blocks = getattr(self, name)
            if blocks:
                values[name] = {str(block): _lists(kept) for block, kept in sorted(blocks.items())}
        for name in _OF_MODEL:
            if getattr(self, name) is not None:
                values[name] = list(getattr(self, name))
        return values

    @classmethod
    def read(cls, values: Any) -> WidthSpec:
        """From :meth:`plain`'s values; anything else is refused."""
        parts: dict[str, Any] = {}
        try:
            for name, value in values.items():
                if name in _OF_MODEL:
                    parts[name] = _numbers(value)
                elif name in _PER_BLOCK:
                    parts[name] = {int(block): _numbers(kept) for block, kept in value.items()}
                elif name in _PER_HEAD:
                    parts[name] = {int(block): tuple(map(_numbers, kept)) for block, kept in value.items()}
                else:
                    raise ValueError(f"{name!r} is no part of it")
        except (AttributeError, TypeError, ValueError) as error:
            raise PrunexError(f"these are no widths ({error}): give what WidthSpec.plain wrote") from error
        return cls(**parts)


_PER_BLOCK, _PER_HEAD, _OF_MODEL = ("heads", "channels"), ("query_dims", "value_dims"), ("embedding", "blocks")


def _lists(kept: Any) -> Any:
    return [_lists(k) if isinstance(k, Sequence) and not isinstance(k, str) else k for k in kept]


def _numbers(values: Any) -> Kept:
    # By type: True would count as 1.
    if not isinstance(values, list | tuple) or any(type(v) is not int for v in values):
        raise ValueError(f"{values!r} are no whole numbers")
    return tuple(values)


@dataclass(frozen=True)
class Shape:
    """A dense model's own widths, which a narrow one remembers: its constructor call names them.

    Heads of each block with the width of one, and MLP channels of each; None where units are not known one by one.
    """

    heads: tuple[tuple[int, int] | None, ...]
    hidden: tuple[int | None, ...]
    embedding: int


def dense_shape(model: nn.Module) -> Shape | None:
    """The widths that a narrowed model had when it was dense; None for any other."""
    return model.__dict__.get("prunex_dense")


def shape_of(model: Any) -> Shape:
    """The widths that a model has now."""
    blocks = [block for _, block in blocks_of(model)]
    heads = tuple((b.attn.num_heads, head_dim(b.attn)) if opens_heads(b) else None for b in blocks)
    hidden = tuple(sizes(b.mlp.fc2)[0] if opens_channels(b) else None for b in blocks)
    return Shape(heads, hidden, int(model.embed_dim))


def widths_of(model: nn.Module) -> WidthSpec:
    """What is left of a model that was narrowed, in the dense model's numbers; of any other, an empty one."""
    return getattr(model, "prunex_widths", None) or WidthSpec()


def narrow(
    model: nn.Module, spec: WidthSpec, optimizers: Iterable[torch.optim.Optimizer] = (), remember: bool = True
) -> nn.Module:
    """Take all units out that a spec does not keep, in place, for good; give the model back.

    Heads and MLP channels leave what they computed behind exactly as if their gates were 0. Channels of queries, keys
    and values are exact against a model in which the same channels are zero: shrinking d to d' would rescale the scores
    by sqrt(d / d'), so the queries are multiplied by sqrt(d' / d). The embedding and whole blocks are lossy.

    Args:
        model: A supported backbone, dense, or narrowed before (numbers stay those of the dense model).
        spec: What is kept.
        optimizers: Whose parameters and states follow, wrapped ones' too: momenta of what stays are kept.
        remember: Whether :func:`widths_of` shall know.

    Raises:
        PrunexError: For widths that the model does not have or that cannot be taken out, adapted, quantised or shared
            layers, an optimiser that cannot follow. Model and optimisers are unchanged, whatever was raised.
    """
    if not isinstance(model, Backbone):
        raise PrunexError(f"{type(model).__name__} cannot be narrowed: no layers of it are known")
    left, spec = widths_of(model), _tuples(spec)
    shape = dense_shape(model) or shape_of(model)
    # An iterator would be spent by the checks.
    kept, optimizers = places(model, spec), list(optimizers)
    check_cuts(model, kept)
    check_followed(optimizers)
    with whole_or_not(model, optimizers):
        follow(optimizers, cut(model, kept))
    if remember:
        model.__dict__["prunex_widths"] = _joined(left, spec, shape)
        model.__dict__["prunex_dense"] = shape
    return model


def places(model: nn.Module, spec: WidthSpec) -> WidthSpec:
    """A spec of the dense model's numbers in those that a model, narrowed or not, has now; refused as by narrow."""
    return _Places(model, _tuples(spec), widths_of(model)).spec()


def _tuples(spec: Any) -> WidthSpec:
    """A spec with tuples of int, whatever sequences were given."""
    try:
        values = spec.plain()
    except (AttributeError, TypeError, ValueError) as error:
        raise PrunexError(f"these are no widths ({error}): give a prunex.WidthSpec") from error
    return WidthSpec.read(values)


def _joined(before: WidthSpec, spec: WidthSpec, shape: Shape) -> WidthSpec:
    """Two narrowings as one: the later one's word counts, and what it does not name stays."""

    # Widths of single heads are listed head by head: those of heads that leave now leave the lists.
    def of_heads_left(dims: Mapping[int, tuple[Kept, ...]]) -> dict[int, tuple[Kept, ...]]:
        left = dict(dims)
        for block in left.keys() & spec.heads.keys():
            heads = before.heads.get(block, range((shape.heads[block] or (0, 0))[0]))
            left[block] = tuple(d for head, d in zip(heads, left[block], strict=True) if head in spec.heads[block])
        return left

    return WidthSpec(
        heads={**before.heads, **spec.heads},
        channels={**before.channels, **spec.channels},
        query_dims={**of_heads_left(before.query_dims), **spec.query_dims},
        value_dims={**of_heads_left(before.value_dims), **spec.value_dims},
        embedding=before.embedding if spec.embedding is None else spec.embedding,
        blocks=before.blocks if spec.blocks is None else spec.blocks,
    )


class _Places:
    """A spec in the numbers that a model has now, each checked: out of range, falling or repeated ones are refused."""

    def __init__(self, model: Any, kept: WidthSpec, left: WidthSpec) -> None:
        self.model, self.kept, self.left = model, kept, left
        self.blocks: list[Any] = [block for _, block in blocks_of(model)]
        numbers = range(len(self.blocks)) if left.blocks is None else left.blocks
        self.depth = max(numbers) + 1
        self.place = {number: place for place, number in enumerate(numbers)}
        self.pruned = mounted(model) is not None

    def spec(self) -> WidthSpec:
        kept = self.kept
        # Heads before their widths, of which there must be one list a head that stays.
        heads = {self.at(b, "heads"): self.heads(b, kept) for b, kept in kept.heads.items()}
        channels = {self.at(b, "channels"): self.channels(b, kept) for b, kept in kept.channels.items()}
        if set(kept.query_dims) != set(kept.value_dims):
            raise PrunexError("query_dims and value_dims name different blocks: timm's layers have one width for both")
        for b in kept.query_dims:
            self.check_dims(b, heads.get(self.at(b, "head widths")))
        queries = {self.place[b]: dims for b, dims in kept.query_dims.items()}
        values = {self.place[b]: dims for b, dims in kept.value_dims.items()}
        embedding = None if kept.embedding is None else self.embedding(kept.embedding)
        kept_blocks = None if kept.blocks is None else self.kept_blocks(kept.blocks)
        return WidthSpec(heads, channels, queries, values, embedding, kept_blocks)

    def at(self, number: int, what: str) -> int:
        if number not in self.place:
            raise PrunexError(f"widths name block {number} for its {what}: the model has blocks 0 to {self.depth - 1}")
        return self.place[number]

    def heads(self, number: int, kept: Sequence[int]) -> Kept:
        block = self.blocks[self.place[number]]
        if not opens_heads(block):
            raise PrunexError(f"heads of block {number} ({type(block).__name__}) cannot be taken out one by one")
        places = _renamed(kept, self.left.heads.get(number), block.attn.num_heads, f"heads of block {number}")
        if not kept and isinstance(block.attn, WindowAttention):
            raise PrunexError(f"block {number} would have no heads: timm's windowed attention needs one; keep one")
        if not kept and self.place[number] in _read_blocks(self.model):
            raise PrunexError(
                f"block {number} would have no heads, but {mounted(self.model).method} ranks tokens by its attention: "
                "keep one"
            )
        return places

    def channels(self, number: int, kept: Sequence[int]) -> Kept:
        block = self.blocks[self.place[number]]
        if not opens_channels(block):
            raise PrunexError(f"MLP channels of block {number} ({type(block).__name__}) cannot be taken out one by one")
        count = sizes(block.mlp.fc2)[0]
        return _renamed(kept, self.left.channels.get(number), count, f"channels of block {number}")

    def check_dims(self, number: int, heads: Kept | None) -> None:
        if number in self.left.query_dims:
            raise PrunexError(f"the heads of block {number} were made narrower already: start from the dense model")
        block = self.blocks[self.place[number]]
        attn = block.attn
        # A norm reads all channels of a head, rotation pairs them: none of them can go alone.
        if type(attn) not in PLAIN or not is_identity(attn.q_norm) or not opens_heads(block):
            raise PrunexError(
                f"heads of block {number} ({type(attn).__name__}) cannot be made narrower: their scores are normed, "
                "rotated or biased channel by channel"
            )
        count = attn.num_heads if heads is None else len(heads)
        widths = set()
        for name in _PER_HEAD:
            dims = getattr(self.kept, name)[number]
            if len(dims) != count:
                raise PrunexError(f"{name} of block {number} has {len(dims)} lists for {count} heads: give one a head")
            for kept in dims:
                _renamed(kept, None, head_dim(attn), f"{name} of block {number}")
                widths.add(len(kept))
        if len(widths) > 1 or 0 in widths:
            raise PrunexError(
                f"query_dims and value_dims of block {number} keep {sorted(widths)} channels: keep equally many, at "
                "least one, in every head"
            )

    def embedding(self, kept: Kept) -> Kept:
        model, name = self.model, type(self.model).__name__
        # Attention pooling would have to be narrowed too, and other families keep more along the stream.
        if not isinstance(model, VisionTransformer) or model.global_pool == "map":
            raise PrunexError(f"the embedding of a {name} with this head cannot be made narrower")
        for block in self.blocks:
            if type(getattr(block, "attn", None)) not in PLAIN or type(block.mlp) not in (Mlp, GluMlp, SwiGLU):
                raise PrunexError(f"the embedding of {type(block).__name__} blocks cannot be made narrower")
        for head in (model.head, getattr(model, "head_dist", None)):
            if not isinstance(head, nn.Identity | nn.Linear | None):
                raise PrunexError(
                    f"the embedding of a {name} whose head is a {type(head).__name__} cannot be made narrower: put a "
                    "linear one on with model.reset_classifier(classes)"
                )
        if self.pruned:
            raise PrunexError("the embedding cannot be made narrower while tokens are pruned by it: detach() first")
        places = _renamed(kept, self.left.embedding, int(model.embed_dim), "channels of the embedding")
        if not places:
            raise PrunexError("the embedding would have no channels: keep at least one")
        return places

    def kept_blocks(self, kept: Kept) -> Kept:
        if not isinstance(self.model, VisionTransformer):
            raise PrunexError(f"blocks of a {type(self.model).__name__} cannot be taken out")
        if self.pruned:
            raise PrunexError("blocks cannot be taken out while tokens are pruned: their stages count blocks; detach()")
        places = _renamed(kept, self.left.blocks, len(self.blocks), "blocks")
        if not places:
            raise PrunexError("no block would be left: keep at least one")
        return places


def _read_blocks(model: Any) -> frozenset[int]:
    """Blocks whose attention an attached token pruner ranks by."""
    hooked = mounted(model)
    turns = [] if hooked is None else hooked.pruner.plan()
    return frozenset(turn.block for turn in turns if turn.shown)


def _renamed(kept: Sequence[int], known: Sequence[int] | None, count: int, what: str) -> Kept:
    """Dense numbers as places among what is left."""
    numbers = range(count) if known is None else known
    places = {unit: place for place, unit in enumerate(numbers)}
    missing = next((u for u in kept if u not in places), None)
    rising = all(b > a for a, b in zip(kept, kept[1:], strict=False))
    if missing is not None or not rising:
        why = "must rise, each once" if missing is None else f"has no {missing}"
        raise PrunexError(f"widths for the {what}: the list {why}; there are {len(places)} of them")
    return tuple(places[u] for u in kept)
