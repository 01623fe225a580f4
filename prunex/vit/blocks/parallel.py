"""timm's parallel blocks: several attentions and MLPs side by side, or an attention beside an MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.arithmetic import PLAIN, Arithmetic, mlp
from prunex.vit.blocks.plain import Layout, scaled
from prunex.vit.calls import hooked, inside
from prunex.vit.weights import effective, scale_of


class Things(Layout):
    """timm's ``ParallelThingsBlock`` (arXiv 2203.09795): several attentions added at once, then several MLPs.

    The attentions are taken as one with all their heads; what it reads are their norms' outputs, side by side. Each
    part is scaled and dropped by itself.
    """

    opens = False

    def inside(self, block: Any, function: Callable[..., Tensor], y: Tensor, rope: Tensor | None) -> Tensor:
        return function(y, rope)

    def check_hooks(self, block: Any) -> None:
        """None on the attentions, which are opened together, nor on the sequences that hold them."""
        refuse_hooks(block, [m for part in block.attns for m in (part, part.attn)])

    def attentions(self, block: Any) -> tuple[Any, ...]:
        return tuple(part.attn for part in block.attns)

    def mlps(self, block: Any) -> tuple[Any, ...]:
        return tuple(part.mlp for part in block.ffns)

    def read(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        return torch.cat([ops.norm(part.norm, x) for part in block.attns], -1)

    def attend(self, block: Any, y: Tensor, rope: Tensor | None) -> Tensor:
        parts = zip(block.attns, y.chunk(len(block.attns), -1), strict=True)
        return torch.stack([p.drop_path(p.ls(p.attn(normed))) for p, normed in parts]).sum(0)

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        """Those of all attentions, one after the other."""
        parts = zip(block.attns, y.chunk(len(block.attns), -1), strict=True)
        q, k, v = zip(*(attention.heads(p.attn, normed, ops) for p, normed in parts), strict=True)
        return torch.cat(q, 1), torch.cat(k, 1), torch.cat(v, 1)

    def project(self, block: Any, out: Tensor, y: Tensor, ops: Arithmetic) -> Tensor:
        count = len(block.attns)
        parts = zip(block.attns, out.chunk(count, 1), y.chunk(count, -1), strict=True)
        branches = []
        for part, gathered, normed in parts:
            projected = attention.project(part.attn, gathered, normed, ops)
            branches.append(part.drop_path(ops.scaled(part.ls, projected)))
        return ops.total(branches)

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        return branch

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        return ops.total([_fed(part, x, ops) for part in block.ffns])

    # Each part has scaled and dropped its branch by itself, in project and feed.
    def drop_fed(self, block: Any, branch: Tensor) -> Tensor:
        return branch

    def output(self, block: Any) -> Tensor:
        return torch.cat([scaled(effective(p.attn.proj)[0], scale_of(p.ls)) for p in block.attns], 1)


class Scaling(Layout):
    """timm's ``ParallelScalingBlock`` (ViT-22B, arXiv 2302.05442): attention and MLP read one norm of one stream.

    ``x + ls(proj(attn(norm(x))) + out(act(mlp(norm(x)))))`` in two halves: first ``x + ls(attention's part)``, then the
    MLP's part, computed from the norm of the x that entered the block. The bias of a shared output projection is the
    MLP's. Stochastic depth is drawn once for both.
    """

    opens = False
    parallel = True

    def inside(self, block: Any, function: Callable[..., Tensor], y: Tensor, rope: Tensor | None) -> Tensor:
        return function(y, rope)

    def check_hooks(self, block: Any) -> None:
        """None on what both halves share, and each computes its part of."""
        shared = (block.in_norm, block.in_proj, fused_out(block), block.ls, block.drop_path)
        refuse_hooks(block, [m for m in shared if m is not None])

    def attentions(self, block: Any) -> tuple[Any, ...]:
        """The block itself, which holds its heads."""
        return (block,)

    def mlps(self, block: Any) -> tuple[Any, ...]:
        return ()

    def read(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        return ops.norm(block.in_norm, x)

    def attend(self, block: Any, y: Tensor, rope: Tensor | None) -> Tensor:
        q, k, v = self.heads(block, y, rope, PLAIN)
        dropout = block.attn_drop.p if block.training else 0.0
        out = self.through(block, partial(attention.fused, dropout=dropout), q, k, v, PLAIN)
        return self.project(block, out, y, PLAIN)

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        """From the last three parts of the input projection."""
        # The MLP's channels come first in the layer's outputs.
        three = side_by_side(block, y, ops)
        q, k, v = three.unflatten(2, (3, block.num_heads, block.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return ops.norm(block.q_norm, q), ops.norm(block.k_norm, k), v

    def project(self, block: Any, out: Tensor, y: Tensor, ops: Arithmetic) -> Tensor:
        """By attention's own projection, or its part of the shared one."""
        gathered = out.transpose(1, 2).flatten(2)
        if fused_out(block) is None:
            return ops.linear(block.attn_out_proj, gathered)
        # Without its bias, which is added once: with the MLP's part.
        return ops.affine(gathered, block.out_proj.weight[:, : gathered.shape[-1]])

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        """LayerScale; stochastic depth is drawn for both halves."""
        return ops.scaled(block.ls, branch)

    def draw(self, block: Any, x: Tensor) -> Tensor | None:
        """Stochastic depth of both branches, [B, 1, 1]."""
        # Of ones, so that timm's own module says which images are left out and how the others are scaled.
        if not block.training or isinstance(block.drop_path, nn.Identity):
            return None
        return block.drop_path(x.new_ones(x.shape[0], 1, 1))

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """From the stream that entered the block."""
        # timm adds the MLP's bias behind the joint projection, whose attention part has its own.
        first = _outputs(block.in_proj, 0, block.in_split[0])
        hidden = ops.affine(ops.norm(block.in_norm, x), *first, beside=block.mlp_bias)
        hidden = block.mlp_drop(ops.activation(block.mlp_act, hidden))
        if fused_out(block) is None:
            return ops.scaled(block.ls, ops.linear(block.mlp_out_proj, hidden))
        second = block.out_proj.weight[:, -hidden.shape[-1] :], block.out_proj.bias
        return ops.scaled(block.ls, ops.affine(hidden, *second))

    def drop_fed(self, block: Any, branch: Tensor) -> Tensor:
        return branch

    def output(self, block: Any) -> Tensor:
        if fused_out(block) is None:
            return scaled(effective(block.attn_out_proj)[0], scale_of(block.ls))
        return scaled(block.out_proj.weight[:, : self.width(block)], scale_of(block.ls))

    def hidden(self, block: Any) -> int:
        return block.in_split[0]

    def width(self, block: Any) -> int:
        return block.num_heads * block.head_dim

    def macs(self, block: Any) -> tuple[int, int]:
        width, hidden, inner = block.in_proj.in_features, block.in_split[0], self.width(block)
        return width * 3 * inner + inner * width, 2 * width * hidden


def side_by_side(block: Any, y: Tensor, ops: Arithmetic) -> Tensor:
    """Queries, keys and values of a parallel scaling block as its input projection makes them, [B, N, 3D]."""
    return ops.affine(y, *_outputs(block.in_proj, block.in_split[0], None))


def _fed(part: Any, x: Tensor, ops: Arithmetic) -> Tensor:
    """One of several MLP branches, stochastic depth included; opened within its own call."""
    if not ops.opened:
        return part(x)

    def opened(x: Tensor) -> Tensor:
        return part.drop_path(ops.scaled(part.ls, mlp(part.mlp, ops.norm(part.norm, x), ops)))

    out: Tensor = inside(part, opened, x)
    return out


def fused_out(block: Any) -> Any:
    """The one output projection of a parallel scaling block, or None where attention and MLP have their own."""
    return getattr(block, "out_proj", None)  # timm 1.0.20 has no such attribute


def refuse_hooks(block: nn.Module, modules: list[nn.Module]) -> None:
    """Raise for hooks on parts of a block that its halves do not call."""
    for module in modules:
        if hooked(module):
            name = next(n for n, m in block.named_modules() if m is module)
            raise PrunexError(
                f"hooks on {name} of a {type(block).__name__} cannot fire where its attention is looked into: remove "
                "them, or put them on the block"
            )


def _outputs(linear: Any, first: int, last: int | None) -> tuple[Tensor, Tensor | None]:
    """Some outputs of a linear layer: their weight and bias."""
    return linear.weight[first:last], None if linear.bias is None else linear.bias[first:last]
