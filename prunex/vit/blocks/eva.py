"""timm's EVA blocks: rotary positions, separate or joint projections, plain gammas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from prunex.vit import attention
from prunex.vit.arithmetic import PLAIN, Arithmetic, mlp
from prunex.vit.blocks.plain import Layout, ResPost, scaled
from prunex.vit.calls import inside
from prunex.vit.weights import effective


class Gamma(Layout):
    """What EVA, BEiT and CaiT share: parameters that scale the branches, where ``Block`` has LayerScale modules."""

    opens = False

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        return attention.rotated_heads(block.attn, y, rope, ops)

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        return block.drop_path1(times(block.gamma_1, branch, ops))

    def feed(self, block: Any, x: Tensor, ops: Arithmetic) -> Tensor:
        return times(block.gamma_2, mlp(block.mlp, ops.norm(block.norm2, x), ops), ops)

    def output(self, block: Any) -> Tensor:
        return scaled(effective(block.attn.proj)[0], block.gamma_1)


class EvaLayout(Gamma):
    """timm's ``EvaBlock``: as ``Block``, with a rotary table beside the stream."""

    def given(self, rope: Tensor | None, shared: Tensor | None) -> dict[str, Tensor | None]:
        return {"rope": rope}

    def whole(self, block: Any, x: Tensor, rope: Tensor | None = None, shared: Tensor | None = None) -> Tensor:
        if not _rotates_all(block.attn, x, rope):
            return super().whole(block, x, rope)

        # Inside the block's own call, so that hooks on it see the stream as they would of timm's forward.
        def opened(x: Tensor, rope: Tensor | None = rope) -> Tensor:
            y = self.read(block, x, PLAIN)
            x = x + self.end(block, self.attend(block, y, rope), PLAIN)
            return x + self.drop_fed(block, self.feed(block, x, PLAIN))

        out: Tensor = inside(block, opened, x, rope=rope)
        return out

    def inside(self, block: Any, function: Callable[..., Tensor], y: Tensor, rope: Tensor | None) -> Tensor:
        branch: Tensor = inside(block.attn, function, y, rope=rope)
        return branch

    def attend(self, block: Any, y: Tensor, rope: Tensor | None) -> Tensor:
        if not _rotates_all(block.attn, y, rope):
            return block.attn(y, rope=rope)

        def opened(y: Tensor, rope: Tensor | None = rope) -> Tensor:
            # As timm's own, but for tokens in front that are not there.
            q, k, v = self.heads(block, y, rope, PLAIN)
            dropout = block.attn.attn_drop.p if block.training else 0.0
            return self.project(block, attention.fused(q, k, v, dropout), y, PLAIN)

        return self.inside(block, opened, y, rope)


class EvaPostLayout(ResPost, EvaLayout):
    """timm's ``EvaBlockPostNorm``: norms behind attention and MLP, no LayerScale."""


def times(gamma: Tensor | None, branch: Tensor, ops: Arithmetic) -> Tensor:
    """A branch scaled channel by channel, by a parameter where other blocks have a LayerScale."""
    return branch if gamma is None else ops.scaled(lambda x: gamma * x, branch)


def _rotates_all(attn: Any, x: Tensor, rope: Tensor | None) -> bool:
    """Whether prefix tokens did not enter: timm's attention would look for them in front of those it rotates."""
    return rope is not None and attn.num_prefix_tokens > 0 and rope.shape[-2] == x.shape[1]
