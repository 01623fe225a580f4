"""How each kind of timm block is laid out: what its halves read, where queries come from, how a branch ends.

A layout opens a block of its kind for :mod:`prunex.vit.halves`; it holds no state. The halves of every kind are the
same two steps: attention is added to the stream, then an MLP is. Where timm computes both from the same input
(:class:`Scaling`), "between the halves" means: attention has been added, and the MLP will read the block's *entering*
stream of the tokens that go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import AttentionRope, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.arithmetic import PLAIN, Arithmetic, mlp
from prunex.vit.calls import hooked, inside
from prunex.vit.narrow import NarrowAttention
from prunex.vit.units import heads_left
from prunex.vit.weights import effective, is_linear, scale_of, sizes, stands_for_linear


class Layout:
    """timm's ``Block``: ``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``.

    Attributes:
        opens: Whether its elementary operations go through an :class:`Arithmetic`, so that relevance rules reach them.
        parallel: Whether attention and MLP read the same stream.
    """

    opens = True
    parallel = False

    def given(self, rope: Tensor | None, shared: Tensor | None) -> dict[str, Tensor | None]:
        """What timm's models call a block with, beside the stream."""
        return {}

    def whole(self, block: Any, x: Tensor, rope: Tensor | None = None, shared: Tensor | None = None) -> Tensor:
        """The block as timm runs it, [B, N, D]."""
        out: Tensor = block(x, **self.given(rope, shared))
        return out

    def inside(self, block: Any, function: Callable[..., Tensor], y: Tensor, rope: Tensor | None) -> Tensor:
        """A function in place of the attention's forward, within the attention's own call; see :meth:`attend`."""
        branch: Tensor = inside(block.attn, function, y)
        return branch

    def check_hooks(self, block: Any) -> None:
        """Refuse hooks that do not fire as timm would fire them where the block is opened.

        Raises:
            PrunexError: By the module that they are on.
        """

    def attentions(self, block: Any) -> tuple[Any, ...]:
        """The modules that hold heads; the first says scale and dropout."""
        return (block.attn,)

    def mlps(self, block: Any) -> tuple[Any, ...]:
        """The modules of the second half."""
        return (block.mlp,)

    def read(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """What attention reads of the stream."""
        return ops.norm(block.norm1, x)

    def attend(self, block: Any, y: Tensor, rope: Tensor | None) -> Tensor:
        """Timm's own attention, nothing opened."""
        return block.attn(y)

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, H, N, d] each; of the heads alone that hard gates leave open."""
        q, k, v = attention.heads(block.attn, y, ops)
        left = heads_left(block.attn.proj)
        if left is None:
            return q, k, v
        return attention.some(q, left), attention.some(k, left), attention.some(v, left)

    def project(self, block: Any, out: Tensor, y: Tensor, ops: Arithmetic) -> Tensor:
        """From the heads' outputs (or those of the open heads) to what :meth:`attend` gives."""
        count = block.attn.num_heads
        left = heads_left(block.attn.proj) if out.shape[1] != count else None
        if left is not None:
            at = torch.tensor(left, dtype=torch.long, device=out.device)
            out = out.new_zeros(out.shape[0], count, *out.shape[2:]).index_copy(1, at, out)
        return attention.project(block.attn, out, y, ops)

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        """What is done to the attention branch before it is added, but for dropping it."""
        return ops.scaled(block.ls1, branch)

    def drop(self, block: Any, branch: Tensor) -> Tensor:
        """Stochastic depth of the attention branch."""
        return block.drop_path1(branch)

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """The MLP branch, but for dropping it."""
        return ops.scaled(block.ls2, mlp(block.mlp, ops.norm(block.norm2, x), ops))

    def drop_fed(self, block: Any, branch: Tensor) -> Tensor:
        """Stochastic depth of the MLP branch."""
        return block.drop_path2(branch)

    def relative(self, block: Any) -> Tensor | None:
        """The block's own relative bias [H, prefix + P, prefix + P], or None."""
        return None

    def output(self, block: Any) -> Tensor:
        """From the heads' outputs, side by side, to the stream: [D, H * d], LayerScale taken in, bias left out."""
        return _scaled(self._mixing(block), scale_of(block.ls1))

    def _mixing(self, block: Any) -> Tensor:
        """The projection's weight, the columns of open heads alone."""
        weight, left = effective(block.attn.proj)[0], heads_left(block.attn.proj)
        if left is None:
            return weight
        return attention.some(weight.unflatten(1, (block.attn.num_heads, -1)), left).flatten(1)

    def hidden(self, block: Any) -> int:
        """What the MLP's second linear layer reads; 0 where there is none."""
        last = [getattr(m, "fc2", None) for m in self.mlps(block)]
        return sum(sizes(m)[0] if is_linear(m) else 0 for m in last)

    def width(self, block: Any) -> int:
        """Heads times head width."""
        return sum(sizes(a.proj)[0] for a in self.attentions(block))

    def macs(self, block: Any) -> tuple[int, int]:
        """Multiply-adds a token of the linear layers of either half."""
        return linear_macs(*self.attentions(block)), linear_macs(*self.mlps(block))


class ResPost(Layout):
    """timm's ``ResPostBlock``: ``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``."""

    def read(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """The stream itself."""
        return x

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        """The norm behind attention."""
        return ops.norm(block.norm1, branch)

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """The norm behind the MLP."""
        return ops.norm(block.norm2, mlp(block.mlp, x, ops))

    def output(self, block: Any) -> Tensor:
        """Without the norm behind it."""
        return self._mixing(block)


class Things(Layout):
    """timm's ``ParallelThingsBlock`` (arXiv 2203.09795): several attentions added at once, then several MLPs.

    The attentions are taken as one with all their heads; what it reads are their norms' outputs, side by side.
    """

    opens = False

    def inside(self, block: Any, function: Callable[..., Tensor], y: Tensor, rope: Tensor | None) -> Tensor:
        """In none of them: all are opened at once."""
        return function(y, rope)

    def check_hooks(self, block: Any) -> None:
        """None on the attentions, which are opened together, nor on the sequences that hold them."""
        _refuse_hooks(block, [m for part in block.attns for m in (part, part.attn)])

    def attentions(self, block: Any) -> tuple[Any, ...]:
        """All that run side by side."""
        return tuple(part.attn for part in block.attns)

    def mlps(self, block: Any) -> tuple[Any, ...]:
        """All that run side by side."""
        return tuple(part.mlp for part in block.ffns)

    def read(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """[B, N, parts * D]."""
        return torch.cat([part.norm(x) for part in block.attns], -1)

    def attend(self, block: Any, y: Tensor, rope: Tensor | None) -> Tensor:
        """Their sum, scaled and dropped one by one as timm does."""
        parts = zip(block.attns, y.chunk(len(block.attns), -1), strict=True)
        return torch.stack([p.drop_path(p.ls(p.attn(own))) for p, own in parts]).sum(0)

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        """Those of all attentions, one after the other."""
        parts = zip(block.attns, y.chunk(len(block.attns), -1), strict=True)
        q, k, v = zip(*(attention.heads(p.attn, own, ops) for p, own in parts), strict=True)
        return torch.cat(q, 1), torch.cat(k, 1), torch.cat(v, 1)

    def project(self, block: Any, out: Tensor, y: Tensor, ops: Arithmetic) -> Tensor:
        """Each attention's heads by its own projection."""
        count = len(block.attns)
        parts = zip(block.attns, out.chunk(count, 1), y.chunk(count, -1), strict=True)
        return torch.stack([p.drop_path(p.ls(attention.project(p.attn, o, own, ops))) for p, o, own in parts]).sum(0)

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        """Nothing: each part has ended."""
        return branch

    def drop(self, block: Any, branch: Tensor) -> Tensor:
        """Nothing: each part was dropped."""
        return branch

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """The MLPs' sum, scaled and dropped one by one."""
        return torch.stack([part(x) for part in block.ffns]).sum(0)

    def drop_fed(self, block: Any, branch: Tensor) -> Tensor:
        """Nothing: each part was dropped."""
        return branch

    def output(self, block: Any) -> Tensor:
        """[D, parts * H * d]."""
        return torch.cat([_scaled(effective(p.attn.proj)[0], scale_of(p.ls)) for p in block.attns], 1)


class Scaling(Layout):
    """timm's ``ParallelScalingBlock`` (ViT-22B, arXiv 2302.05442): attention and MLP read one norm of one stream.

    ``x + ls(proj(attn(norm(x))) + out(act(mlp(norm(x)))))`` in two halves: first ``x + ls(attention's part)``, then the
    MLP's part, computed from the norm of the x that entered the block. The bias of a shared output projection is the
    MLP's. Stochastic depth is drawn once for both.
    """

    opens = False
    parallel = True

    def inside(self, block: Any, function: Callable[..., Tensor], y: Tensor, rope: Tensor | None) -> Tensor:
        """In none: timm has no module for it."""
        return function(y, rope)

    def check_hooks(self, block: Any) -> None:
        """None on what both halves share, and each computes its part of."""
        shared = (block.in_norm, block.in_proj, fused_out(block), block.ls, block.drop_path)
        _refuse_hooks(block, [m for m in shared if m is not None])

    def attentions(self, block: Any) -> tuple[Any, ...]:
        """The block itself, which holds its heads."""
        return (block,)

    def mlps(self, block: Any) -> tuple[Any, ...]:
        """None apart from the block."""
        return ()

    def read(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """The one norm."""
        return block.in_norm(x)

    def attend(self, block: Any, y: Tensor, rope: Tensor | None) -> Tensor:
        """Fused attention; timm has no module of its own for it."""
        q, k, v = self.heads(block, y, rope, PLAIN)
        dropout = block.attn_drop.p if block.training else 0.0
        return self.project(block, attention.fused(q, k, v, dropout), y, PLAIN)

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        """From the last three parts of the input projection."""
        three = F.linear(y, *_rows(block.in_proj, block.in_split[0], None))
        q, k, v = three.unflatten(2, (3, block.num_heads, block.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return block.q_norm(q), block.k_norm(k), v

    def project(self, block: Any, out: Tensor, y: Tensor, ops: Arithmetic) -> Tensor:
        """By attention's own projection, or its part of the shared one."""
        gathered = out.transpose(1, 2).flatten(2)
        if fused_out(block) is None:
            return block.attn_out_proj(gathered)
        return F.linear(gathered, block.out_proj.weight[:, : gathered.shape[-1]])

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        """LayerScale."""
        return block.ls(branch)

    def drop(self, block: Any, branch: Tensor) -> Tensor:
        """Nothing: the draw is for both halves, see :func:`draw`."""
        return branch

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """From the stream that entered the block."""
        hidden = F.linear(block.in_norm(x), *_rows(block.in_proj, 0, block.in_split[0]))
        hidden = hidden if block.mlp_bias is None else hidden + block.mlp_bias
        hidden = block.mlp_drop(block.mlp_act(hidden))
        if fused_out(block) is None:
            return block.ls(block.mlp_out_proj(hidden))
        return block.ls(F.linear(hidden, block.out_proj.weight[:, -hidden.shape[-1] :], block.out_proj.bias))

    def drop_fed(self, block: Any, branch: Tensor) -> Tensor:
        """Nothing, as for attention."""
        return branch

    def output(self, block: Any) -> Tensor:
        """Attention's part."""
        if fused_out(block) is None:
            return _scaled(effective(block.attn_out_proj)[0], scale_of(block.ls))
        return _scaled(block.out_proj.weight[:, : self.width(block)], scale_of(block.ls))

    def hidden(self, block: Any) -> int:
        """Width of the MLP."""
        return block.in_split[0]

    def width(self, block: Any) -> int:
        """Heads times head width."""
        return block.num_heads * block.head_dim

    def macs(self, block: Any) -> tuple[int, int]:
        """The projections' parts."""
        width, hidden, inner = block.in_proj.in_features, block.in_split[0], self.width(block)
        return width * 3 * inner + inner * width, 2 * width * hidden


class EvaLayout(Layout):
    """timm's ``EvaBlock``: as ``Block``, with rotary positions, separate or joint projections, and plain gammas."""

    opens = False

    def given(self, rope: Tensor | None, shared: Tensor | None) -> dict[str, Tensor | None]:
        """The rotary table."""
        return {"rope": rope}

    def whole(self, block: Any, x: Tensor, rope: Tensor | None = None, shared: Tensor | None = None) -> Tensor:
        """With its rotary table."""
        if not _rotates_all(block.attn, x, rope):
            return super().whole(block, x, rope)

        def opened(x: Tensor, rope: Tensor | None = rope) -> Tensor:
            y = self.read(block, x, PLAIN)
            x = x + self.drop(block, self.end(block, self.attend(block, y, rope), PLAIN))
            return x + self.drop_fed(block, self.feed(block, x, PLAIN))

        out: Tensor = inside(block, opened, x, rope=rope)
        return out

    def inside(self, block: Any, function: Callable[..., Tensor], y: Tensor, rope: Tensor | None) -> Tensor:
        """With its rotary table."""
        branch: Tensor = inside(block.attn, function, y, rope=rope)
        return branch

    def read(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """The first norm."""
        return block.norm1(x)

    def attend(self, block: Any, y: Tensor, rope: Tensor | None) -> Tensor:
        """With its rotary table."""
        if not _rotates_all(block.attn, y, rope):
            return block.attn(y, rope=rope)

        def opened(y: Tensor, rope: Tensor | None = rope) -> Tensor:
            q, k, v = self.heads(block, y, rope, PLAIN)
            dropout = block.attn.attn_drop.p if block.training else 0.0
            return self.project(block, attention.fused(q, k, v, dropout), y, PLAIN)

        return self.inside(block, opened, y, rope)

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated by their places."""
        return attention.rotated_heads(block.attn, y, rope)

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        """LayerScale."""
        return branch if block.gamma_1 is None else block.gamma_1 * branch

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """LayerScale last."""
        branch = block.mlp(block.norm2(x))
        return branch if block.gamma_2 is None else block.gamma_2 * branch

    def output(self, block: Any) -> Tensor:
        """LayerScale taken in."""
        return _scaled(effective(block.attn.proj)[0], block.gamma_1)


class EvaPostLayout(EvaLayout):
    """timm's ``EvaBlockPostNorm``: norms behind attention and MLP, no LayerScale."""

    def read(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """The stream itself."""
        return x

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        """The norm behind attention."""
        return block.norm1(branch)

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """The norm behind the MLP."""
        return block.norm2(block.mlp(x))

    def output(self, block: Any) -> Tensor:
        """Without the norm behind it."""
        return effective(block.attn.proj)[0]


class BeitLayout(EvaLayout):
    """timm's BEiT block: plain gammas, and a relative bias on the scores."""

    def given(self, rope: Tensor | None, shared: Tensor | None) -> dict[str, Tensor | None]:
        """The shared bias; the block adds its own."""
        return {"shared_rel_pos_bias": shared}

    def whole(self, block: Any, x: Tensor, rope: Tensor | None = None, shared: Tensor | None = None) -> Tensor:
        """With the shared bias."""
        return Layout.whole(self, block, x, rope, shared)

    def attend(self, block: Any, y: Tensor, rope: Tensor | None) -> Tensor:
        """Without a bias: where there is one, attention is opened."""
        return block.attn(y)

    def inside(self, block: Any, function: Callable[..., Tensor], y: Tensor, rope: Tensor | None) -> Tensor:
        """Likewise."""
        return Layout.inside(self, block, function, y, rope)

    def relative(self, block: Any) -> Tensor | None:
        """From its table."""
        attn = block.attn
        return None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()[0]


def _rotates_all(attn: Any, x: Tensor, rope: Tensor | None) -> bool:
    """Whether prefix tokens did not enter: timm's attention would look for them in front of those it rotates."""
    return rope is not None and attn.num_prefix_tokens > 0 and rope.shape[-2] == x.shape[1]


def _refuse_hooks(block: nn.Module, modules: list[nn.Module]) -> None:
    for module in modules:
        if hooked(module):
            name = next(n for n, m in block.named_modules() if m is module)
            raise PrunexError(
                f"hooks on {name} of a {type(block).__name__} cannot fire where its attention is looked into: remove "
                "them, or put them on the block"
            )


def _scaled(weight: Tensor, gamma: Tensor | None) -> Tensor:
    return weight if gamma is None else weight * gamma[:, None]


def _rows(linear: Any, first: int, last: int | None) -> tuple[Tensor, Tensor | None]:
    """Some outputs of a linear layer: their weight and bias."""
    return linear.weight[first:last], None if linear.bias is None else linear.bias[first:last]


def linear_macs(*modules: nn.Module) -> int:
    """Multiply-adds a token of all linear layers in some modules; one with an adapter counts as when it is merged."""
    return sum(_linear_macs(part, "") for part in modules)


def _linear_macs(module: nn.Module, name: str) -> int:
    if stands_for_linear(module, name):
        return math.prod(sizes(module))
    return sum(_linear_macs(child, name) for name, child in module.named_children())


LAYOUTS: dict[type[nn.Module], Layout] = {
    Block: Layout(),
    ResPostBlock: ResPost(),
    ParallelThingsBlock: Things(),
    ParallelScalingBlock: Scaling(),
    EvaBlock: EvaLayout(),
    EvaBlockPostNorm: EvaPostLayout(),
    BeitBlock: BeitLayout(),
}
ATTENTIONS: tuple[type[nn.Module], ...] = (Attention, NarrowAttention, EvaAttention, AttentionRope, BeitAttention)


def layout_of(block: nn.Module) -> Layout:
    """How a block is laid out.

    Raises:
        TypeError: For a block of no known kind; :func:`prunex.vit.anatomy.read` refuses such models by name.
    """
    for kind, layout in LAYOUTS.items():
        if isinstance(block, kind):
            return layout
    raise TypeError(f"{type(block).__name__} is no block that is known from inside")


def fused_out(block: Any) -> Any:
    """The one output projection of a parallel scaling block, or None where attention and MLP have their own.

    timm 1.0.20 knows these alone, and has no such attribute.
    """
    return getattr(block, "out_proj", None)


def unknown_part(block: nn.Module) -> str | None:
    """The name of what in a block is not known from inside, or None when all is."""
    kind = next((k for k in LAYOUTS if isinstance(block, k)), None)
    if kind is None or type(block).forward is not kind.forward:
        return type(block).__name__
    if kind is ParallelScalingBlock:
        inner: Any = block
        parts = (inner.in_proj, fused_out(inner))
        plain = all(type(m) is nn.Linear for m in parts if m is not None)
        if not plain:
            return f"{type(block).__name__} with other than plain linear layers"
        # timm 1.0.20 keeps zeros for the missing bias, and puts them in front of the MLP's, whose channels come first.
        misplaced = getattr(inner, "qkv_bias", None) is not None
        return f"{type(block).__name__} without qkv_bias, whose bias this timm misplaces," if misplaced else None
    for attn in LAYOUTS[kind].attentions(block):
        if not any(type(attn).forward is known.forward for known in ATTENTIONS):
            return type(attn).__name__
        reads = getattr(attn, "q_bias", None) is not None and attn.qkv is not None and not attn.qkv_bias_separate
        if reads and type(attn.qkv).forward is not nn.Linear.forward:
            return (
                f"{type(attn).__name__} around a {type(attn.qkv).__name__}, which it passes by (it reads qkv.weight "
                "itself unless built with qkv_bias_separate=True),"
            )
    return None


def draw(block: Any, layout: Layout, x: Tensor) -> Tensor | None:
    """Stochastic depth of a block whose halves share one draw: what both branches are multiplied by, [B, 1, 1]."""
    if not layout.parallel or not block.training or isinstance(block.drop_path, nn.Identity):
        return None
    return block.drop_path(x.new_ones(x.shape[0], 1, 1))
