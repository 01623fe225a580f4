"""What a model costs: multiply-adds, parameters and tokens, block by block, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunex.errors import PrunexError
from prunex.vit.anatomy import Anatomy, find, read
from prunex.vit.layouts import layout_of, linear_macs


@dataclass(frozen=True)
class BlockCost:
    """One block's share: tokens (prefix included) in its attention and in its MLP, and its MACs.

    ``query_tokens`` are those whose queries are computed; None: all in the attention.
    """

    attention_tokens: int
    mlp_tokens: int
    macs: int
    query_tokens: int | None = None


@dataclass(frozen=True)
class Cost:
    """Cost of one image at inference.

    Attributes:
        macs: Multiply-adds (papers often call them FLOPs; torch's flop counter counts two each).
        params: Parameters, those of predictors included.
        blocks: Block by block; a pruner's decision counts to the block it is made at.
    """

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


def cost(model: nn.Module, image_size: tuple[int, int] | None = None) -> Cost:
    """Count multiply-adds, parameters and tokens of a ViT, dense or pruned, without running it.

    Per block 3 n D A + n A D + 2 n^2 A for attention (A = heads * head width) and the MLP's linear layers over the
    tokens that reach it; plus patch embedding, head and the pruner's own decisions. Norms, biases and activations are
    left out, as is usual. Where only m of n tokens ask, attention is 2 n D A + 2 m D A + 2 m n A. Where each image
    keeps its own number of tokens (``count="adaptive"``), this is the cost at the expected counts
    (:meth:`prunex.Pruning.calibrate`), not a mean of costs. A pass that a pruner makes over all patches only to
    decide counts to the block it decides at. A pooling head with attention of its own counts its projections over the
    pooled tokens.

    Args:
        model: A supported ViT, or a module that holds exactly one.
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
    vit = find(model)[1]
    a = read(vit)
    attached = getattr(vit, "prunex", None)
    return count(
        vit, None if attached is None else attached.pruner, a.grid if image_size is None else _grid(a, image_size)
    )


def count(vit: Any, pruner: Any, grid: tuple[int, int] | None = None) -> Cost:
    """What a ViT would cost under a pruner that need not be attached to it.

    Args:
        vit: A supported ViT.
        pruner: A token pruner made for it, or None for the dense model.
        grid: Patch grid (gh, gw); None: the model's own.

    Returns:
        The cost of one image; ``params`` are those the model has now.
    """
    a = read(vit) if pruner is None else pruner.alter(read(vit))
    gh, gw = a.grid if grid is None else grid
    patches = gh * gw
    left = dict(zip(pruner.stages, pruner.counts(patches), strict=True)) if pruner is not None else {}
    blocks, n = [], patches
    for i, block in enumerate(vit.blocks):
        decision = 0
        after = left.get(i, n)
        ahead = None if pruner is None else pruner.ahead()
        if pruner is not None and i in left and (after != n or ahead is not None):
            decision = pruner.macs(n)
            decision += sum(_block(b, a.prefix + n, a.prefix + n, 0).macs for b in list(vit.blocks)[: ahead or 0])
        behind = pruner is not None and pruner.behind
        entering = n if pruner is not None and (pruner.inside or behind) else after
        feeding = n if behind else after
        n = after
        asking = None if pruner is None else pruner.asking(i, n)
        if asking is None:
            blocks.append(_block(block, a.prefix + entering, a.prefix + feeding, decision))
        else:
            blocks.append(_slim_block(block, a.width, a.prefix + entering, a.prefix + asking, decision))
    projection = vit.patch_embed.proj
    embedding = patches * projection.weight.numel()
    heads = [h for h in (vit.head, getattr(vit, "head_dist", None)) if isinstance(h, nn.Linear)]
    head = sum(h.in_features * h.out_features for h in heads)
    if a.pool == "map":
        head += _pooling(vit.attn_pool, n + a.prefix * a.pool_prefix)
    params = sum(p.numel() for p in vit.parameters())
    return Cost(embedding + sum(b.macs for b in blocks) + head, params, tuple(blocks))


def _block(block: Any, attending: int, feeding: int, decision: int) -> BlockCost:
    layout = layout_of(block)
    linear, mlp = layout.macs(block)
    macs = attending * linear + 2 * attending * attending * layout.width(block) + feeding * mlp + decision
    return BlockCost(attending, feeding, macs)


def _slim_block(block: Any, width: int, attending: int, asking: int, decision: int) -> BlockCost:
    """A block that computes queries, and all that follows them, for some tokens only."""
    whole, layout = _block(block, attending, asking, decision), layout_of(block)
    inner = layout.width(block)
    # Where attention is not opened, only scores and what follows them are spared, not the queries' projection.
    linear = width * inner * (2 if layout.opens else 1)
    spared = (attending - asking) * (linear + 2 * attending * inner)
    return BlockCost(attending, asking, whole.macs - spared, asking)


def _pooling(pool: Any, tokens: int) -> int:
    """Attention pooling: keys and values of all tokens; everything else for the latent queries alone."""
    kv, latents = pool.kv.in_features * pool.kv.out_features, pool.latent_len
    return tokens * kv + latents * (linear_macs(pool) - kv + 2 * tokens * pool.num_heads * pool.head_dim)


def _grid(a: Anatomy, size: Sequence[int]) -> tuple[int, int]:
    whole = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(v, int) and v > 0 for v in size)
    if not whole or (not a.pads and (size[0] % a.patch[0] or size[1] % a.patch[1])):
        raise PrunexError(
            f"image_size={size!r} is not allowed: give (h, w) in pixels, multiples of the patch {a.patch}"
        )
    return -(-size[0] // a.patch[0]), -(-size[1] // a.patch[1])
