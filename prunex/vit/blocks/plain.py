"""timm's ``Block`` and ``ResPostBlock``, and what every kind of block must say of itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunex.vit import attention
from prunex.vit.arithmetic import Arithmetic, mlp
from prunex.vit.attention import KeyWeights
from prunex.vit.calls import inside
from prunex.vit.units import heads_left
from prunex.vit.weights import behind, effective, is_linear, scale_of, sizes, stands_for_linear


class Layout:
    """timm's ``Block``: ``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``.

    The halves of every kind are these two steps. Where timm computes both from one input (``parallel``), "between the
    halves" means: attention has been added, and the MLP will read the block's *entering* stream of the tokens that go
    on.
    """

    # Whether queries of some tokens can be computed alone, and images of different lengths packed into one sequence.
    opens = True
    parallel = False
    # Whether heads look in ways that are no shares: entries below 0, rows that do not sum to 1.
    signed = False
    # Whether attention is its matrix or nothing, since no kernel computes it without.
    matrices = False

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
        """Raise for hooks that would not fire as timm fires them where the block is opened, by their module."""

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
        # Closed heads are gone from the slim model: what they look at must not decide which tokens stay.
        q, k, v = attention.heads(block.attn, y, ops)
        left = heads_left(block.attn.proj)
        if left is None:
            return q, k, v
        return attention.some(q, left), attention.some(k, left), attention.some(v, left)

    def matrix(
        self,
        block: Any,
        q: Tensor,
        k: Tensor,
        policy: Tensor | None,
        keys: KeyWeights | None,
        queries: tuple[int, ...] | Tensor | None,
        *,
        ops: Arithmetic,
        relative: Tensor | None,
    ) -> Tensor:
        """What each head looks at, [B, H, m, N]; see :func:`prunex.vit.attention.matrix`."""
        scale = self.attentions(block)[0].scale
        return attention.matrix(q, k, scale, policy, keys, queries, ops, relative)

    def gather(self, block: Any, matrix: Tensor, v: Tensor, ops: Arithmetic) -> Tensor:
        """The heads' outputs, [B, H, m, d], by what they look at."""
        return ops.gather(self.attentions(block)[0].attn_drop(matrix), v)

    def through(
        self, block: Any, kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, ops: Arithmetic
    ) -> Tensor:
        """The heads' outputs by a kernel of softmax attention, without the matrix."""
        return kernel(q, k, v)

    def shown(self, block: Any, softmaxes: Tensor, ops: Arithmetic) -> Tensor:
        """What the heads look at [B, H, m, N], of softmaxes over queries and keys as :meth:`heads` gives them."""
        return softmaxes

    def project(self, block: Any, out: Tensor, y: Tensor, ops: Arithmetic) -> Tensor:
        """From the heads' outputs (or those of the open heads) to what :meth:`attend` gives."""
        count = block.attn.num_heads
        left = heads_left(block.attn.proj) if out.shape[1] != count else None
        if left is not None:
            # The projection wants all heads: closed ones say nothing.
            at = torch.tensor(left, dtype=torch.long, device=out.device)
            out = out.new_zeros(out.shape[0], count, *out.shape[2:]).index_copy(1, at, out)
        return attention.project(block.attn, out, y, ops)

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        """What is done to the attention branch before it is added: LayerScale, stochastic depth."""
        return block.drop_path1(ops.scaled(block.ls1, branch))

    def draw(self, block: Any, x: Tensor) -> Tensor | None:
        """What both branches are multiplied by, [B, 1, 1], where one draw of stochastic depth is for both."""
        return None

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        """The MLP branch, but for stochastic depth."""
        return ops.scaled(block.ls2, mlp(block.mlp, ops.norm(block.norm2, x), ops))

    def drop_fed(self, block: Any, branch: Tensor) -> Tensor:
        """Stochastic depth of the MLP branch."""
        return block.drop_path2(branch)

    def relative(self, block: Any) -> Tensor | None:
        """The block's own relative bias [H, prefix + P, prefix + P], or None."""
        return None

    def output(self, block: Any) -> Tensor:
        """From the heads' outputs, side by side, to the stream: [D, H * d], LayerScale taken in, bias left out."""
        return scaled(self._mixing(block), scale_of(block.ls1))

    def _mixing(self, block: Any) -> Tensor:
        """The projection's weight, the columns of open heads alone."""
        # Not the layer's own: an adapter or a mask takes part in what the layer computes.
        weight, left = effective(block.attn.proj)[0], heads_left(block.attn.proj)
        if left is None:
            return weight
        return attention.some(weight.unflatten(1, (block.attn.num_heads, -1)), left).flatten(1)

    def hidden(self, block: Any) -> int:
        """What the MLP's second linear layer reads; 0 where there is none."""
        last = [getattr(m, "fc2", None) for m in self.mlps(block)]
        return sum(sizes(m)[0] for m in last if is_linear(m))

    def width(self, block: Any) -> int:
        """Heads times head width."""
        return sum(sizes(a.proj)[0] for a in self.attentions(block))

    def macs(self, block: Any) -> tuple[int, int]:
        """Multiply-adds a token of the linear layers of either half."""
        return linear_macs(*self.attentions(block)), linear_macs(*self.mlps(block))

    def pair_macs(self, block: Any) -> int:
        """Multiply-adds of one query and one key: scores, and what is gathered by them."""
        return 2 * self.width(block)


class ResPost(Layout):
    """timm's ``ResPostBlock``: ``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``."""

    def read(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        return x

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        return block.drop_path1(ops.norm(block.norm1, branch))

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        return ops.norm(block.norm2, mlp(block.mlp, x, ops))

    def output(self, block: Any) -> Tensor:
        return self._mixing(block)


def scaled(weight: Tensor, gamma: Tensor | None) -> Tensor:
    """A projection's weight with the LayerScale behind it taken in."""
    return weight if gamma is None else weight * gamma[:, None]


def linear_macs(*modules: nn.Module) -> int:
    """Multiply-adds a token of all linear layers in some modules; one with an adapter counts as when it is merged."""
    return sum(_linear_macs(part, "") for part in modules)


def _linear_macs(module: nn.Module, name: str) -> int:
    # An adapter round a linear layer counts once, not with the layer in it.
    if stands_for_linear(module, name):
        return math.prod(sizes(module))
    return sum(_linear_macs(child, name) for name, child in behind(module).named_children())
