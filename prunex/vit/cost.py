"""What a model costs: multiply-adds, parameters and tokens, block by block, in closed form."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from timm.layers import HybridEmbed
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.checks import called_as
from prunex.errors import PrunexError
from prunex.vit.anatomy import Anatomy, find, read
from prunex.vit.blocks import layout_of
from prunex.vit.blocks.plain import linear_macs
from prunex.vit.late import class_macs
from prunex.vit.mount import mounted, mounted_head, mounted_units
from prunex.vit.units import Backbone, blocks_of, branches, head_dim, tokens_in, unit_params
from prunex.vit.weights import convolution_of, sizes


@dataclass(frozen=True)
class BlockCost:
    """One block's share: tokens (prefix included) in its attention and in its MLP, and its MACs."""

    attention_tokens: int
    mlp_tokens: int
    macs: int
    query_tokens: int | None = None  # whose queries are computed; None: all in the attention


@dataclass(frozen=True, repr=False)
class Cost(Brief):
    """Cost of one image at inference.

    Attributes:
        macs: Multiply-adds (papers often call them FLOPs; torch's flop counter counts two each).
        params: Parameters, those of predictors included.
        blocks: Block by block; a pruner's decision counts to the block it is made at.
    """

    in_repr = ("macs", "params", "tokens")

    macs: int
    params: int
    blocks: tuple[BlockCost, ...]

    @property
    def tokens(self) -> list[int]:
        """Tokens in each block's attention, prefix included."""
        return [b.attention_tokens for b in self.blocks]

    @property
    def gmacs(self) -> float:
        """Multiply-adds in units of 1e9."""
        return self.macs / 1e9

    def table(self) -> str:
        """A text to print: tokens and multiply-adds block by block, of what is outside of the blocks, and of all.

        >>> import prunex, timm
        >>> print(prunex.cost(timm.create_model("vit_tiny_patch16_224", depth=2)).table())
        block             tokens   in the MLP   MMACs    share
        0                    197          197   102.0    43.8%
        1                    197          197   102.0    43.8%
        embedding, head                          29.1    12.5%
        all                                     233.2   100.0%
        """
        from prunex.vit.showing import cost_table

        return cost_table(self)

    def _repr_html_(self) -> str:
        from prunex.vit.showing import cost_card

        return cost_card(self)


@called_as("prunex.cost(model)")
def cost(model: nn.Module, image_size: tuple[int, int] | None = None) -> Cost:
    """Count multiply-adds, parameters and tokens of a ViT, dense or pruned, without running it.

    Per block 3 n D A + n A D + 2 n^2 A for attention (A = heads * head width) and the MLP's linear layers over the
    tokens that reach it; plus patch embedding, head and the pruner's own decisions. Norms, biases and activations are
    left out, as is usual. Where only m of n tokens ask, attention is 2 n D A + 2 m D A + 2 m n A. Where each image
    keeps its own number of tokens (``count="adaptive"``), this is the cost at the expected counts
    (:meth:`prunex.Pruning.calibrate`), not a mean of costs. A pass that a pruner makes over all patches only to
    decide counts to the block it decides at. A pooling head with attention of its own counts its projections over the
    pooled tokens. Units whose gates were closed by a unit pruner count as taken out, as they will be. A linear layer
    with an adapter counts as when that is merged; parameters are those that are there.

    Args:
        model: A supported ViT or timm Swin, or a module that holds exactly one.
        image_size: (h, w) in pixels, which the model need not have been built for; None: its own.

    Returns:
        The cost of one image.

    Raises:
        PrunexError: No supported ViT, or a size that is not a multiple of the patch size.

    >>> import prunex, timm
    >>> model = timm.create_model("deit_small_patch16_224")
    >>> round(prunex.cost(model).gmacs, 2)
    4.6
    >>> _ = prunex.attach(model, "evit", keep_ratio=0.7)
    >>> round(prunex.cost(model).gmacs, 2)
    3.03
    """
    return tally(model, image_size)


def tally(model: nn.Module, image_size: tuple[int, int] | None = None, gates: bool = True, tokens: bool = True) -> Cost:
    """:func:`cost`, with or without what closed gates of units (``gates``) and the token pruner (``tokens``) save."""
    vit = find(model, kinds=Backbone)[1]
    units = mounted_units(vit) if gates else None
    closed = {} if units is None else units.pruner.closed()
    if isinstance(vit, SwinTransformer):
        full = count_windows(vit, image_size)
    else:
        a = read(vit)
        attached = mounted(vit) if tokens else None
        grid = a.grid if image_size is None else _grid(a, image_size)
        full = count(vit, None if attached is None else attached.pruner, grid, closed)
    return full if units is None else _without(vit, full, closed)


def _without(vit: Any, full: Cost, closed: Mapping[str, int]) -> Cost:
    """The cost when so many units of each branch were taken out, at the tokens counted."""
    tokens = None if isinstance(vit, SwinTransformer) else tokens_of(full)
    blocks, macs, params = list(full.blocks), full.macs, full.params
    for branch in branches(vit, tokens):
        count = closed.get(branch.key, 0)
        block = blocks[branch.block]
        blocks[branch.block] = replace(block, macs=block.macs - count * branch.macs)
        macs -= count * branch.macs
        params -= count * unit_params(vit, branch)
    return Cost(macs, params, tuple(blocks))


def count(vit: Any, pruner: Any, grid: tuple[int, int] | None = None, closed: Mapping[str, int] | None = None) -> Cost:
    """What a ViT would cost under a pruner (None: dense) that need not be on it, at a patch grid (gh, gw).

    ``closed`` says of branches how many units are closed: no token is ranked by these. What they cost is still counted.
    """
    # Some pruners leave the class token out, and so change what enters the blocks.
    a = read(vit) if pruner is None else pruner.alter(read(vit))
    gh, gw = a.grid if grid is None else grid
    n = patches = gh * gw
    left = {} if pruner is None else dict(zip(pruner.stages, pruner.counts(patches), strict=True))
    turns = {} if pruner is None else {turn.block: turn for turn in pruner.plan()}
    blocks = []
    for i, block in enumerate(vit.blocks):
        turn, before, after, decision = turns.get(i), n, left.get(i, n), 0
        ahead = None if turn is None else turn.ahead
        if pruner is not None and i in left and (after != before or ahead is not None):
            inner = layout_of(block).width(block)
            shut = (closed or {}).get(f"{i}.heads", 0)
            inner -= shut * head_dim(block.attn) if shut else 0
            # Who has the matrix reads who is looked at out of it.
            decision = pruner.macs(before, 0 if layout_of(block).matrices else inner)
            decision += sum(_block(b, a.prefix + n, a.prefix + n, 0).macs for b in list(vit.blocks)[: ahead or 0])
        # Who leaves before a block is in neither half of it, who leaves inside in the first alone.
        attending = after if turn is not None and turn.when == "before" else before
        feeding = before if turn is not None and turn.when == "after" else after
        n = after
        if turn is None or turn.only is None:
            blocks.append(_block(block, a.prefix + attending, a.prefix + feeding, decision))
        else:
            blocks.append(_slim_block(block, a.width, a.prefix + attending, len(turn.only), decision))
    embedding = _embedding(vit.patch_embed, a, (gh, gw))
    head = linear_macs(vit.head, getattr(vit, "head_dist", nn.Identity()))
    head += class_macs(vit, n)
    if a.pool == "map":
        head += _pooling(vit.attn_pool, n + a.prefix * a.pool_prefix)
    explainable = mounted_head(vit)
    if explainable is not None:
        head = explainable.head.macs(n) + head * explainable.head.uses_classifier
    params = sum(p.numel() for p in vit.parameters())
    return Cost(embedding + sum(b.macs for b in blocks) + head, params, tuple(blocks))


def count_windows(vit: Any, image_size: tuple[int, int] | None = None) -> Cost:
    """What a Swin costs: windowed attention over padded grids, MLPs, patch merging, embedding and head."""
    built_for = tuple(vit.patch_embed.img_size)
    if image_size is not None and tuple(image_size) != built_for:
        raise PrunexError(f"image_size={image_size!r} is not allowed: this Swin is built for {built_for}")
    units: dict[int, int] = {}
    for branch in branches(vit):
        units[branch.block] = units.get(branch.block, 0) + branch.units * branch.macs
    blocks = []
    for number, (_, block) in enumerate(blocks_of(vit)):
        padded, tokens, _ = tokens_in(vit, block)
        blocks.append(BlockCost(padded, tokens, units.get(number, 0)))
    gh, gw = vit.patch_embed.grid_size
    rest = gh * gw * _patch_macs(vit.patch_embed)
    for stage in vit.layers:
        merge = getattr(stage.downsample, "reduction", None)
        if merge is not None:
            h, w = stage.blocks[0].input_resolution
            rest += math.prod(sizes(merge)) * h * w
    rest += linear_macs(vit.head)
    params = sum(p.numel() for p in vit.parameters())
    return Cost(rest + sum(b.macs for b in blocks), params, tuple(blocks))


def tokens_of(counted: Cost) -> list[tuple[int, int, int]]:
    """Tokens in each block's attention, those of them that ask, and tokens in its MLP, prefix included."""
    return [(b.attention_tokens, b.query_tokens or b.attention_tokens, b.mlp_tokens) for b in counted.blocks]


def _block(block: Any, attending: int, feeding: int, decision: int) -> BlockCost:
    layout = layout_of(block)
    linear, mlp = layout.macs(block)
    macs = attending * linear + attending * attending * layout.pair_macs(block) + feeding * mlp + decision
    return BlockCost(attending, feeding, macs)


def _slim_block(block: Any, width: int, attending: int, asking: int, decision: int) -> BlockCost:
    """A block that computes queries, and all that follows them, for some tokens only."""
    whole, layout = _block(block, attending, asking, decision), layout_of(block)
    inner = layout.width(block)
    # Where attention is not opened, only scores and what follows them are spared, not the queries' projection.
    linear = width * inner * (2 if layout.opens else 1)
    spared = (attending - asking) * (linear + attending * layout.pair_macs(block))
    return BlockCost(attending, asking, whole.macs - spared, asking)


def _embedding(embed: Any, a: Anatomy, grid: tuple[int, int]) -> int:
    """Patch embedding: one product a patch; of a convolutional stem those of every place of its layers, too."""
    if not isinstance(embed, HybridEmbed):
        return grid[0] * grid[1] * _patch_macs(embed)
    # Shapes alone tell: no number is computed.
    stem, macs = copy.deepcopy(embed).to("meta").eval(), 0
    stem.strict_img_size = False

    def add_layer(module: Any, _args: Any, out: Tensor) -> None:
        nonlocal macs
        # A weight of each output channel is used once for each of that channel's numbers.
        macs += out[0].numel() // module.weight.shape[0] * module.weight.numel()

    for layer in stem.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add_layer)
    like = next(stem.parameters())
    stem(like.new_empty(1, a.channels, grid[0] * a.patch[0], grid[1] * a.patch[1]))
    return macs


def _patch_macs(embed: Any) -> int:
    kept = convolution_of(embed.proj)
    return 0 if kept is None else int(kept.weight.numel())


def _pooling(pool: Any, tokens: int) -> int:
    """Attention pooling: keys and values of all tokens; everything else for the latent queries alone."""
    kv, latents = math.prod(sizes(pool.kv)), pool.latent_len
    return tokens * kv + latents * (linear_macs(pool) - kv + 2 * tokens * pool.num_heads * pool.head_dim)


def _grid(a: Anatomy, size: Sequence[int]) -> tuple[int, int]:
    whole = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(v, int) and v > 0 for v in size)
    if not whole or (not a.pads and (size[0] % a.patch[0] or size[1] % a.patch[1])):
        raise PrunexError(
            f"image_size={size!r} is not allowed: give (h, w) in pixels, multiples of the patch {a.patch}"
        )
    return a.grid_at(size[0], size[1])
