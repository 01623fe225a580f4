"""What is computed inside one attention module, as functions of queries, keys and values.

Shapes: q, k, v [B, H, N, d]; policy [B, N] with 1 for a token that is there and 0 for one that was dropped but still
has a slot, which :mod:`prunex.vit.policy` masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunex.brief import Brief
from prunex.vit import policy as masking
from prunex.vit.arithmetic import PLAIN, Arithmetic, fused_attention, mlp, pooled, promoted
from prunex.vit.weights import is_plain, sizes


@dataclass(eq=False, repr=False)
class KeyWeights(Brief):
    """How much each token counts as an attention key; 1 leaves it as it is."""

    factor: Tensor | None = None  # float [B, N], at least 0; None: 1 for all
    # "log": the softmax weight is multiplied (log factor added to the score; independent of the scores' scale).
    # "shift": the score's height above its row's lowest is multiplied. "scale": the score itself is.
    rule: Literal["log", "shift", "scale"] = "log"
    # float [B, N], above 0, or None: how many equal tokens each stands for. Whatever the rule makes of a score, its
    # softmax weight counts so many times (proportional attention, arXiv 2210.09461).
    sizes: Tensor | None = None

    def on_scores(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        """The weighted scores [B, H, m, N]; only keys that are seen make a row's lowest."""
        scores = self._ruled(scores, seen)
        return scores if self.sizes is None else scores + self.sizes[:, None, None, :].to(scores.dtype).log()

    def bias(self) -> Tensor | None:
        """What is added to the scores [B, N] under the "log" rule, or beside the "scale" rule; None for nothing."""
        logs = [] if self.sizes is None else [self.sizes.log()]
        if self.factor is not None and self.rule == "log":
            logs.append(self.factor.log())
        return sum(logs[1:], logs[0]) if logs else None

    def _ruled(self, scores: Tensor, seen: Tensor | None) -> Tensor:
        if self.factor is None:
            return scores
        factor = self.factor[:, None, None, :].to(scores.dtype)
        if self.rule == "log":
            return scores + factor.log()
        if self.rule == "shift":
            lowest = scores if seen is None else scores.masked_fill(~seen, float("inf"))
            scores = scores - lowest.amin(-1, keepdim=True)
        return scores * factor


Shown = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """What softmaxes show of plain attention: themselves."""
    return x


def over_heads(x: Tensor) -> Tensor:
    """Mean over axis 1, the heads; 0 where a block has none, which look at nothing."""
    return x.mean(1) if x.shape[1] else x.new_zeros(x.shape[0], *x.shape[2:])


def heads(attn: Any, x: Tensor, ops: Arithmetic = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of timm's ``Attention`` for normed tokens x [B, N, D]: three of [B, H, N, d]."""
    # A block whose heads were all taken out still has a width to unflatten by.
    width = -1 if attn.num_heads else attn.head_dim
    qkv = ops.linear(attn.qkv, x).unflatten(2, (3, attn.num_heads, width)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return ops.norm(attn.q_norm, q), ops.norm(attn.k_norm, k), v


def heads_of_some(attn: Any, x: Tensor, asking: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries of normed tokens ``asking`` [B, m, D] alone, keys and values of all x; None where rows are not apart."""
    qkv = attn.qkv
    if not is_plain(qkv):
        return None
    width = qkv.out_features // 3
    bias = (None, None) if qkv.bias is None else (qkv.bias[:width], qkv.bias[width:])
    d = -1 if attn.num_heads else attn.head_dim
    q = F.linear(asking, qkv.weight[:width], bias[0]).unflatten(2, (attn.num_heads, d)).transpose(1, 2)
    both = F.linear(x, qkv.weight[width:], bias[1]).unflatten(2, (2, attn.num_heads, d)).permute(2, 0, 3, 1, 4)
    k, v = both.unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def some(x: Tensor, places: tuple[int, ...] | Tensor, dim: int = 1) -> Tensor:
    """The tokens at some places, the same for all images; ``places`` as int64 [m], or as numbers."""
    return x.index_select(dim, places if isinstance(places, Tensor) else _on(x.device, tuple(places)))


def _on(device: torch.device, places: tuple[int, ...]) -> Tensor:
    """Places as int64 [m]; neighbours, such as prefix tokens, are counted there: a copy would make the device wait."""
    if places and places == tuple(range(places[0], places[-1] + 1)):
        return torch.arange(places[0], places[-1] + 1, device=device)
    return torch.tensor(places, dtype=torch.long, device=device)


def rotated_heads(
    attn: Any, x: Tensor, rope: Tensor | None = None, ops: Arithmetic = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values [B, H, N, d] of EVA's and BEiT's attention, maybe rotated by a [..., N - prefix, 2d]."""
    if attn.qkv is None:
        d = sizes(attn.q_proj)[1] // attn.num_heads  # timm 1.0.20 does not keep head_dim
        three = (ops.linear(p, x) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k, v = (t.unflatten(2, (-1, d)).transpose(1, 2) for t in three)
    else:
        qkv = _joint(attn, x, ops)
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if hasattr(attn, "q_norm"):
        q, k = ops.norm(attn.q_norm, q), ops.norm(attn.k_norm, k)
    if rope is not None:
        prefix, half = q.shape[2] - rope.shape[-2], bool(getattr(attn, "rotate_half", False))
        turned = ops.rotated(q[:, :, prefix:], k[:, :, prefix:], rope, half)
        q, k = (torch.cat([t[:, :, :prefix], r], 2).type_as(v) for t, r in zip((q, k), turned, strict=True))
    # Fewer keys than queries: each serves a group of heads.
    groups = attn.num_heads // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return q, k, v


def _joint(attn: Any, x: Tensor, ops: Arithmetic) -> Tensor:
    """Queries, keys and values side by side, [B, N, 3D]; EVA and BEiT keep their biases beside the layer."""
    q_bias = getattr(attn, "q_bias", None)
    if q_bias is None:
        return ops.linear(attn.qkv, x)
    bias = torch.cat((q_bias, attn.k_bias, attn.v_bias))
    return ops.linear(attn.qkv, x, bias) if attn.qkv_bias_separate else ops.affine(x, attn.qkv.weight, bias)


_AS_IT_IS = nn.Identity()


def project(attn: Any, out: Tensor, x: Tensor, ops: Arithmetic = PLAIN) -> Tensor:
    """From the heads' outputs [B, H, N, d] to the branch's output [B, N, D]; a gate reads its input x again."""
    if not out.shape[1] and torch.compiler.is_compiling():  # other runtimes know no tensors without entries
        bias = x.new_zeros(attn.proj.out_features) if attn.proj.bias is None else attn.proj.bias
        return bias.expand(*x.shape[:2], -1)
    y = ops.norm(getattr(attn, "norm", _AS_IT_IS), out.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        y = ops.gate(y, ops.linear(gate, x).sigmoid())
    return attn.proj_drop(ops.linear(attn.proj, y))


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    keys: KeyWeights | None = None,
    relative: Tensor | None = None,
) -> Tensor:
    """Plain attention without the matrix, [B, H, m, d] for q [B, H, m, d], keys and values [B, H, N, d].

    The "shift" rule of ``keys`` alone needs it. ``relative`` is added to the scores, broadcast to [B, H, m, N].
    """
    bias = None
    if keys is not None:
        if keys.factor is not None and keys.rule == "shift":
            return matrix(q, k, q.shape[-1] ** -0.5, keys=keys, relative=relative).to(v.dtype) @ v
        if keys.factor is not None and keys.rule == "scale":
            k = k * keys.factor[:, None, :, None].to(k.dtype)
        bias = keys.bias()
    if bias is not None:
        bias = bias.to(q.dtype)[:, None, None, :].expand(-1, -1, q.shape[2], -1)
    if relative is not None:
        bias = relative.to(q.dtype) if bias is None else bias + relative.to(q.dtype)
    return fused_attention(q, k, v, bias, dropout)


def matrix(
    q: Tensor,
    k: Tensor,
    scale: float,
    policy: Tensor | None = None,
    keys: KeyWeights | None = None,
    queries: tuple[int, ...] | Tensor | None = None,
    ops: Arithmetic = PLAIN,
    relative: Tensor | None = None,
) -> Tensor:
    """The softmax attention itself, [B, H, m, N], over the tokens that are there (and the query's own).

    At least float32, whatever the queries are: gradients of single entries are tiny. ``queries``: positions of the m
    rows of q [B, H, m, d] among the N tokens of k; None: all. ``relative`` is added to the scores before anything else.
    """
    seen = None if policy is None else masking.seen(policy, queries)
    return ops.softmax(_weighed(ops.scores(q, k, scale), seen, keys, relative, ops))


def _weighed(
    scores: Tensor, seen: Tensor | None, keys: KeyWeights | None, relative: Tensor | None, ops: Arithmetic = PLAIN
) -> Tensor:
    """Scores [B, H, m, N] in at least float32, biased, weighed by their keys, and -inf for keys that are not seen."""
    scores = promoted(scores)
    if relative is not None:
        scores = ops.biased(scores, relative.to(scores.dtype))
    if keys is not None:
        scores = keys.on_scores(scores, seen)
    return scores if seen is None else scores.masked_fill(~seen, float("-inf"))


def rows_of_heads(
    q: Tensor,
    k: Tensor,
    scale: float,
    policy: Tensor | None,
    counts: Tensor | None = None,
    keys: KeyWeights | None = None,
    relative: Tensor | None = None,
    shown: Shown = same,
) -> Tensor:
    """Attention of each head averaged over query rows q [B, H, m, d], [B, H, N]; ``counts`` [B, m] weigh the rows."""
    return mean_rows(shown(_rows(q, k, scale, policy, keys, relative)), counts)


def mean_rows(seen: Tensor, counts: Tensor | None) -> Tensor:
    """The mean of rows [B, H, m, N], weighed by ``counts`` [B, m]: [B, H, N]."""
    if counts is None:
        return seen.mean(2)
    counts = counts.to(seen.dtype)
    return torch.einsum("bm,bhmn->bhn", counts, seen) / counts.sum(1).clamp(min=1)[:, None, None]


def shares(seen: Tensor) -> Tensor:
    """What is looked at [..., N], entries below 0 and any sum, as shares: the positive part, rescaled to sum 1.

    Of a row without any, the magnitudes are.
    """
    positive = torch.where((seen > 0).any(-1, keepdim=True), seen, seen.abs()).clamp(min=0)
    return positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(seen.dtype).tiny)


def rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    policy: Tensor | None = None,
    chunk: int = 64,
    keys: KeyWeights | None = None,
    relative: Tensor | None = None,
    shown: Shown = same,
) -> Tensor:
    """Attention averaged over the given query rows q [B, H, m, d] and heads: [B, N] in at least float32, sum 1.

    ``shown`` makes of softmaxes [B, H, m, N] what is averaged.
    """
    # In chunks: the whole (of pooled models) would be the N x N matrix that nobody asked for.
    parts = q.split(chunk, 2)
    added = [None] * len(parts) if relative is None else relative.split(chunk, 2)
    pairs = zip(parts, added, strict=True)
    seen = [over_heads(shown(_rows(p, k, scale, policy, keys, r))).sum(1) for p, r in pairs]
    return sum(seen[1:], seen[0]) / q.shape[2]


def _rows(
    q: Tensor, k: Tensor, scale: float, policy: Tensor | None, keys: KeyWeights | None, relative: Tensor | None
) -> Tensor:
    """The softmax rows of some queries, [B, H, m, N], over the tokens that are there; in at least float32."""
    seen = None if policy is None else masking.present(policy)
    return _weighed(PLAIN.scores(q, k, scale), seen, keys, relative).softmax(-1)


def latent(pool: Any, x: Tensor, weight: Tensor | None = None, ops: Arithmetic = PLAIN) -> tuple[Tensor, Tensor]:
    """Timm's ``AttentionPoolLatent`` over tokens [B, N, D] that are there: [B, D], and what it looks at, [B, N].

    ``weight`` [B, N], at least 0, says how much each token counts in the softmax (None: 1); differentiable, also where
    it is 0. An image without any gets the pooling of nothing. The attention is the mean over heads and latents.
    """
    seen, v = looked_at(pool, x, weight, ops)
    return pooled_by(pool, seen, v, ops), seen.mean((1, 2))


def looked_at(pool: Any, x: Tensor, weight: Tensor | None = None, ops: Arithmetic = PLAIN) -> tuple[Tensor, Tensor]:
    """The first part of :func:`latent`: what latent queries look at, [B, H, latents, N], and values [B, H, N, d]."""
    # Learned queries are the same for all images: what they are made of is nobody's input.
    query = pool.q(pool.latent.expand(len(x), -1, -1)).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
    k, v = ops.linear(pool.kv, x).unflatten(2, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, k = pool.q_norm(query), ops.norm(pool.k_norm, k)
    scores = promoted(ops.latent_scores(query, k, pool.scale))
    return counted(scores, None if weight is None else weight[:, None, None, :], ops), v


def pooled_by(pool: Any, seen: Tensor, v: Tensor, ops: Arithmetic = PLAIN) -> Tensor:
    """The rest of it: what is gathered, through projection and MLP, [B, D]."""
    out = pool.proj_drop(ops.linear(pool.proj, ops.gather(seen, v).transpose(1, 2).flatten(2)))
    if pool.mlp is not None:
        out = ops.add(out, mlp(pool.mlp, ops.norm(pool.norm, out), ops))
    if pool.pool != "avg":
        return out[:, 0]
    return pooled(out, out.new_full(out.shape[:2], 1 / out.shape[1]), ops) if ops.opened else out.mean(1)


def counted(scores: Tensor, weight: Tensor | None, ops: Arithmetic) -> Tensor:
    """Softmax of scores [B, H, m, N] over keys that count by a weight [B, 1, 1 or m, N]; 0 in rows without any."""
    if weight is None:
        return ops.softmax(scores)
    w = weight.to(scores.dtype)
    nobody = (w <= 0).all(-1, keepdim=True)
    if ops.opened:  # weights are constants here
        weighed = torch.where(nobody, 0, scores + w.detach().log())
        return ops.softmax(weighed).masked_fill(nobody, 0)
    lowest = scores.detach().masked_fill(w <= 0, torch.finfo(scores.dtype).min)
    # An image without any must not be divided by next to nothing: gradients would be infinite.
    top = torch.where(nobody, scores.detach(), lowest).amax(-1, keepdim=True)
    raised = (scores - top).clamp(max=40).exp() * w
    return raised / torch.where(nobody, 1, raised.sum(-1, keepdim=True))
