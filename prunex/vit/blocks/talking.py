"""timm's CaiT blocks: attention whose heads talk to each other before and after the softmax, plain gammas."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prunex.vit import attention
from prunex.vit import policy as masking
from prunex.vit.arithmetic import Arithmetic, promoted
from prunex.vit.attention import KeyWeights
from prunex.vit.blocks.eva import Gamma, times
from prunex.vit.blocks.parallel import refuse_hooks
from prunex.vit.blocks.plain import linear_macs


class Talking(Gamma):
    """timm's ``LayerScaleBlock`` (CaiT, arXiv 2103.17239) with ``TalkingHeadAttn`` (arXiv 2003.02436).

    Scores of all heads are mixed linearly before the softmax, and what came out of it once more, with a bias: a head
    may look at a token negatively, and rows sum to anything. What is mixed last is the heads' map for everybody. A
    token that is not there gets nothing of that bias, one of several patches gets it as often as attention counts it.
    """

    signed = True
    matrices = True

    def check_hooks(self, block: Any) -> None:
        """None on the mixing layers, whose biases are added by themselves."""
        refuse_hooks(block, [block.attn.proj_l, block.attn.proj_w])

    def heads(self, block: Any, y: Tensor, rope: Tensor | None, ops: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        q, k, v = ops.linear(attn.qkv, y).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

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
        attn = block.attn
        scores = promoted(_mixed(attn.proj_l, ops.scores(q, k, attn.scale), None, ops))
        seen = None if policy is None else masking.weights(policy, queries).to(scores.dtype)
        if keys is not None:
            scores = keys.on_scores(scores, None if seen is None else seen > 0)
        softmaxes = attention.counted(scores, seen, ops)
        return _mixed(attn.proj_w, softmaxes, _counts(seen, keys), ops)

    def end(self, block: Any, branch: Tensor, ops: Arithmetic) -> Tensor:
        return block.drop_path(times(block.gamma_1, branch, ops))

    def drop_fed(self, block: Any, branch: Tensor) -> Tensor:
        return block.drop_path(branch)

    def macs(self, block: Any) -> tuple[int, int]:
        return linear_macs(block.attn.qkv, block.attn.proj), linear_macs(block.mlp)

    def pair_macs(self, block: Any) -> int:
        """With two mixings of all heads."""
        return 2 * self.width(block) + 2 * block.attn.num_heads**2


def _mixed(layer: Any, maps: Tensor, counts: Tensor | None, ops: Arithmetic) -> Tensor:
    """Maps of all heads [B, H, m, N] mixed by a linear layer; its bias as often as pairs ``counts`` (None: once)."""
    # A linear layer mixes the last axis: heads go there and come back.
    mixed = ops.mixed(maps.permute(0, 2, 3, 1), layer.weight.to(maps.dtype)).permute(0, 3, 1, 2)
    if layer.bias is None:
        return mixed
    bias = layer.bias.to(maps.dtype)[:, None, None]
    # The bias gives every pair its share of attention, also with a token that is not there: it has to be weighed.
    return ops.biased(mixed, bias if counts is None else bias * counts)


def _counts(seen: Tensor | None, keys: KeyWeights | None) -> Tensor | None:
    """How often attention counts each key, broadcast to [B, 1, m, N]; None: once."""
    weighed = None if keys is None else keys.bias()
    if weighed is None:
        return seen
    times_each = weighed[:, None, None, :].exp()
    return times_each if seen is None else seen * times_each
