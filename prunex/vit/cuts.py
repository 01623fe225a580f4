"""Taking units out of layers for good: every layer that is cut can be cut, and what fails leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit.fold import what_is_on, wrapped_parts
from prunex.vit.narrow import NarrowAttention
from prunex.vit.optimisers import Slices, chains, sliced
from prunex.vit.units import KINDS, blocks_of, first_layers, head_dim, last_layer
from prunex.vit.weights import Unread, by_name, stands_for_linear

_HEADS = ("qkv", "gate", "proj")
_CHANNELS = ("fc1", "fc1_g", "fc1_x", "fc2")


def check_cuts(model: Any, spec: Any) -> None:
    """Refuse, by name, layers of the spec's blocks that are more than their own weights, or not their own alone."""
    layers = dict(_to_cut(model, spec))
    with by_name(model):
        for path, layer in layers.items():
            what = what_is_on(layer)
            if what:
                raise Unread(layer, what, path)
    names = {id(p): f"{path}.{name}" for path, layer in layers.items() for name, p in layer.named_parameters()}
    _check_alone(model, names)


def _to_cut(model: Any, spec: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose parameters are cut, by their paths."""
    if spec.embedding is not None:  # which every layer reads or writes
        yield from ((path, part) for path, _, _, part in wrapped_parts(model))
        for name, m in model.named_modules():
            if stands_for_linear(m, name.rpartition(".")[2]) or next(m.children(), None) is None:
                yield name, m
        return
    for number, (path, block) in enumerate(blocks_of(model)):
        heads = number in spec.heads or number in spec.query_dims
        for half, names, cuts in (("attn", _HEADS, heads), ("mlp", _CHANNELS, number in spec.channels)):
            for name in names if cuts else ():
                layer = getattr(getattr(block, half, None), name, None)
                if layer is not None:
                    yield f"{path}.{half}.{name}", layer


def _check_alone(model: nn.Module, cut: dict[int, str]) -> None:
    """Refuse weights that two layers share: cut in one of them, they would no longer fit the other."""
    # torch leaves a shared parameter's further names out unless asked.
    paths: dict[int, list[str]] = {}
    for path, p in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(p), []).append(path)
    for key, path in cut.items():
        if len(paths.get(key, ())) > 1:
            raise PrunexError(
                f"{path} is the same tensor as {next(n for n in paths[key] if n != path)}: units cannot be taken out "
                "of one layer alone; give each its own copy first"
            )


@contextmanager
def whole_or_not(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> Iterator[None]:
    """Give model and optimisers back as they were where something is raised inside, such as memory that runs out."""
    # References alone: cutting puts new tensors in the place of old ones, and never writes into these.
    modules = [(m, type(m), dict(vars(m)), dict(m._parameters), dict(m._modules)) for m in model.modules()]
    states = []
    for optimizer in chains(optimizers):
        groups = [list(group["params"]) for group in optimizer.param_groups]
        states.append((optimizer, groups, dict(optimizer.state)))
    try:
        yield
    except BaseException:
        for m, kind, attributes, parameters, children in modules:
            m.__class__ = kind
            _refill(vars(m), attributes)
            _refill(m._parameters, parameters)
            _refill(m._modules, children)
        for optimizer, groups, state in states:
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"][:] = params
            optimizer.state.clear()
            optimizer.state.update(state)
        raise


def _refill(now: dict[str, Any], before: dict[str, Any]) -> None:
    now.clear()
    now.update(before)


def cut(model: Any, spec: Any) -> Slices:
    """Take the units out that a spec does not keep, in the numbers that the model has now."""
    slices: Slices = {}
    blocks = list(blocks_of(model))
    for number, kept in spec.heads.items():
        _take_heads(blocks[number][1].attn, tuple(kept), slices)
    for number in spec.query_dims:
        _take_dims(blocks[number][1].attn, spec.query_dims[number], spec.value_dims[number], slices)
    for number, kept in spec.channels.items():
        _take_channels(blocks[number][1], tuple(kept), slices)
    if spec.embedding is not None:
        _take_embedding(model, spec.embedding, slices)
    if spec.blocks is not None:
        _take_blocks(model, spec.blocks)
    return slices


def _take_heads(attn: Any, kept: tuple[int, ...], slices: Slices) -> None:
    d, count = head_dim(attn), attn.num_heads
    if len(kept) == count:
        return
    places = torch.arange(count * d).view(count, d)[list(kept)].flatten()
    # The joint layer makes queries of all heads, then keys of all, then values.
    rows = torch.cat([places + s * count * d for s in range(3)])
    _cut_attention(attn, rows, places, slices)
    if isinstance(attn, WindowAttention):  # a column of biases for each head
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
    _cut_attention(attn, torch.cat([q, q + count * d, v + 2 * count * d]), v, slices)
    with torch.no_grad():  # scores are scaled by the new width from now on
        attn.qkv.weight[: count * left] *= (left / d) ** 0.5
        if attn.qkv.bias is not None:
            attn.qkv.bias[: count * left] *= (left / d) ** 0.5
    attn.head_dim = left
    attn.scale = left**-0.5
    _settle(attn, left)


def _cut_attention(attn: Any, rows: Tensor, gathered: Tensor, slices: Slices) -> None:
    """Keep rows of the joint layer, and what the heads gather in places of what they gathered."""
    _cut(attn.qkv, rows, 0, slices)
    _cut(attn.proj, gathered, 1, slices)
    if getattr(attn, "gate", None) is not None:
        _cut(attn.gate, gathered, 0, slices)


def _settle(attn: Any, d: int) -> None:
    """What timm's forward reads beside the weights; an older one, which takes widths to be equal, gets ours."""
    known = hasattr(attn, "attn_dim") or isinstance(attn, WindowAttention)
    if known:
        attn.attn_dim = attn.num_heads * d
    if type(attn) is Attention and not (known and attn.num_heads):
        attn.__class__ = NarrowAttention


def _take_channels(block: Any, kept: tuple[int, ...], slices: Slices) -> None:
    count = block.mlp.fc2.in_features
    if len(kept) == count:
        return
    places = torch.tensor(kept, dtype=torch.long)
    for first, rows in first_layers(block, "channels"):
        # Of a gated MLP one layer may make both halves, one behind the other.
        _cut(first, torch.cat([places + half * count for half in range(rows)]), 0, slices)
    _cut(block.mlp.fc2, places, 1, slices)


def _take_embedding(model: Any, kept: tuple[int, ...], slices: Slices) -> None:
    places = torch.tensor(kept, dtype=torch.long)
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        if getattr(model, name, None) is not None:
            _swap(model, name, [(2, places)], slices)
    if not isinstance(model.patch_embed.proj, nn.Conv2d):
        raise PrunexError("the embedding of a stem without a projection cannot be narrowed: leave it whole")
    _swap(model.patch_embed.proj, "weight", [(0, places)], slices)
    _swap(model.patch_embed.proj, "bias", [(0, places)], slices)
    model.patch_embed.proj.out_channels = len(kept)
    norms = [model.patch_embed.norm, model.norm_pre, model.norm, model.fc_norm]
    for _, block in blocks_of(model):
        for name in ("norm1", "norm2", "ls1", "ls2"):
            norms.append(getattr(block, name, nn.Identity()))
        for kind in KINDS:
            for first, _ in first_layers(block, kind):
                _cut(first, places, 1, slices)
            _cut(last_layer(block, kind), places, 0, slices)
        # Heads keep their width, which timm would otherwise take from that of the stream.
        _settle(block.attn, head_dim(block.attn))
    for norm in norms:
        for name in ("weight", "bias", "gamma"):
            if isinstance(getattr(norm, name, None), nn.Parameter):
                _swap(norm, name, [(0, places)], slices)
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (len(kept),)
    for head in (model.head, getattr(model, "head_dist", None)):
        if isinstance(head, nn.Linear):
            _cut(head, places, 1, slices)
    # By these timm's reset_classifier makes the next head.
    model.embed_dim = model.num_features = model.head_hidden_size = len(kept)
    model.feature_info = [dict(entry, num_chs=len(kept)) for entry in getattr(model, "feature_info", [])]


def _take_blocks(model: Any, kept: tuple[int, ...]) -> None:
    blocks = list(model.blocks)
    model.blocks = nn.Sequential(*(blocks[i] for i in kept))
    # timm finds blocks by these names where features are taken from the middle.
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
    # Cut twice, as by heads and by the embedding: optimisers know the first one alone.
    first, before = next(((k, c) for k, (p, c) in slices.items() if p is old), (old, []))
    slices[first] = (new, [*before, *cuts])
