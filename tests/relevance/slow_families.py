"""Relevance of rotary, multi-query, parallel and attention-pooled blocks once more, slowly: one image, every product.

Nothing here comes from ``prunex``: a forward notes its steps, and they are walked back, straight from the rules. Under
"zplus" positive products alone count and skips are rescaled; under "cplrp" attention, deviations and queries are
constants and everything else shares by signed proportion.
"""

import math
from functools import partial

import torch
from timm.layers import GluMlp
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock

from tests.relevance.definitions import divided


class Signal:
    """A value of the forward, and the relevance that has come to it so far."""

    def __init__(self, value):
        self.value, self.relevance = value.detach(), torch.zeros_like(value)


class Walk:
    """A forward that notes its steps."""

    def __init__(self, rule):
        self.positive, self.steps = rule == "zplus", []

    def note(self, value, *shares):
        """A value made of signals, each with the function from the value's relevance to its share."""
        made = Signal(value)
        self.steps.append((made, shares))
        return made

    def divided(self, a, b):
        """The published layers' stabiliser belongs to the positive rules alone."""
        return divided(a, b) if self.positive else torch.where(b == 0, 0, a / b)

    def back(self):
        for made, shares in reversed(self.steps):
            for signal, share in shares:
                signal.relevance = signal.relevance + share(made.relevance)

    def shared(self, products, out):
        """From the products [n, in, out] of a sum over inputs to its rule."""
        if self.positive:
            products = products.clamp(min=0)
            out = products.sum(1)
        return lambda r: (products * self.divided(r, out)[:, None]).sum(2)

    def linear(self, x, weight, bias=None):
        products = x.value[:, :, None] * weight.detach().T[None]
        out = products.sum(1) + (0 if bias is None else bias.detach())
        return self.note(out, (x, self.shared(products, out)))

    def layer(self, x, module):
        return self.linear(x, module.weight, module.bias)

    def norm(self, x, module):
        out = module(x.value).detach()
        if self.positive or isinstance(module, torch.nn.Identity):
            return self.note(out, (x, lambda r: r))
        width = x.value.shape[-1]
        mean = 1 / width if isinstance(module, torch.nn.LayerNorm) else 0
        centred = x.value - width * mean * x.value.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
        matrix = (torch.eye(width).double() - mean) * module.weight.detach()
        products = x.value[:, :, None] * matrix[None] / deviation[:, :, None]
        return self.note(out, (x, lambda r: (products * (r / out)[:, None]).sum(2)))

    def through(self, x, function):
        """A non-linearity or a constant factor: all that comes goes on."""
        return self.note(function(x.value), (x, lambda r: r))

    def product(self, a, b):
        return self.note(a.value * b.value, (a, lambda r: r / 2), (b, lambda r: r / 2))

    def sum(self, *terms):
        out = sum(t.value for t in terms)
        shares = [lambda r, t=t: self.divided(t.value * r, out) for t in terms]
        if self.positive:
            plain = shares

            def rescaled(r, which):
                sums = [s(r).sum() for s in plain]
                return plain[which](r) * (sums[which].abs() / sum(s.abs() for s in sums) * r.sum() / sums[which])

            shares = [partial(rescaled, which=i) for i in range(len(terms))]
        return self.note(out, *zip(terms, shares, strict=True))

    def heads(self, x, count):
        """[n, count * d] to [count, n, d]."""
        return self.note(x.value.unflatten(1, (count, -1)).transpose(0, 1), (x, lambda r: r.transpose(0, 1).flatten(1)))

    def side_by_side(self, x):
        count = len(x.value)
        value = x.value.transpose(0, 1).flatten(1)
        return self.note(value, (x, lambda r: r.unflatten(1, (count, -1)).transpose(0, 1)))

    def repeated(self, x, groups):
        value = x.value.repeat_interleave(groups, 0)
        return self.note(value, (x, lambda r: r.unflatten(0, (-1, groups)).sum(1)))

    def first(self, x):
        def only(r):
            return torch.cat([r, r.new_zeros(len(x.value) - 1, r.shape[1])])

        return self.note(x.value[:1], (x, only))

    def turned(self, x, table, half):
        """Each pair of channels of the patches turned by its angle: a matrix for every token."""
        h, n, d = x.value.shape
        sin, cos = table.chunk(2, -1)
        front = n - table.shape[0]
        matrix = torch.eye(d).double().expand(n, d, d).clone()  # [token, in, out]
        for token in range(front, n):
            c, s = cos[token - front], sin[token - front]
            matrix[token] = torch.diag(c)
            for pair in range(d // 2):
                a, b = (pair, pair + d // 2) if half else (2 * pair, 2 * pair + 1)
                matrix[token, b, a] = -s[a]
                matrix[token, a, b] = s[b]
        products = x.value[:, :, :, None] * matrix[None]
        out = products.sum(2)
        return self.note(out, (x, lambda r: (products * self.divided(r, out)[:, :, None]).sum(3)))

    def attention(self, q, k, v):
        """Half to the values and a quarter to queries and keys each; under "cplrp" all to the values."""
        scale = 1 / math.sqrt(q.value.shape[-1])
        scores = torch.einsum("hmd,hnd->hmn", q.value, k.value)
        a = (scores * scale).softmax(-1)
        parts = a[..., None] * v.value[:, None]  # [H, m, n, d]
        out = parts.sum(2)
        if not self.positive:
            return self.note(out, (v, lambda r: (parts * self.divided(r, out)[:, :, None]).sum(1)))

        def to_scores(r):
            return (parts * self.divided(r, out)[:, :, None]).sum(3) / 2

        def to_products(r):
            return q.value[:, :, None] * k.value[:, None] * self.divided(to_scores(r), scores)[..., None] / 2

        return self.note(
            out,
            (q, lambda r: to_products(r).sum(2)),
            (k, lambda r: to_products(r).sum(1)),
            (v, lambda r: (parts * self.divided(r, out)[:, :, None]).sum(1) / 2),
        )

    def pooled(self, x, pool):
        """One learned query: half to the values and half to the keys; under "cplrp" all to the values."""
        weights, biases = pool.kv.weight.chunk(2), pool.kv.bias.chunk(2)
        k, v = (self.heads(self.linear(x, w, b), pool.num_heads) for w, b in zip(weights, biases, strict=True))
        query = pool.q(pool.latent[0]).detach().unflatten(1, (pool.num_heads, -1)).transpose(0, 1)
        scores = torch.einsum("hmd,hnd->hmn", query, k.value)
        a = (scores / math.sqrt(query.shape[-1])).softmax(-1)
        parts = a[..., None] * v.value[:, None]
        out = parts.sum(2)
        half = 2 if self.positive else 1
        shares = [(v, lambda r: (parts * self.divided(r, out)[:, :, None]).sum(1) / half)]
        if self.positive:

            def to_keys(r):
                came = (parts * self.divided(r, out)[:, :, None]).sum(3) / 2
                return (query[:, :, None] * k.value[:, None] * self.divided(came, scores)[..., None]).sum(1)

            shares.append((k, to_keys))
        projected = self.layer(self.side_by_side(self.note(out, *shares)), pool.proj)
        return self.sum(projected, self.mlp(self.norm(projected, pool.norm), pool.mlp))

    def mlp(self, x, module):
        if isinstance(module, GluMlp):
            (g, u), (gb, ub) = module.fc1.weight.chunk(2), module.fc1.bias.chunk(2)
            hidden = self.product(self.through(self.linear(x, g, gb), module.act), self.linear(x, u, ub))
        else:
            hidden = self.through(self.layer(x, module.fc1), module.act)
        return self.layer(hidden, module.fc2)


def plain_heads(walk, y, attn):
    """Queries, keys and values of joint or separate projections."""
    if attn.qkv is None:
        made = [walk.layer(y, p) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
        count = attn.k_proj.out_features // attn.head_dim
        q, k, v = (walk.heads(x, n) for x, n in zip(made, (attn.num_heads, count, count), strict=True))
    else:
        weights, biases = attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)
        made = [walk.linear(y, w, b) for w, b in zip(weights, biases, strict=True)]
        q, k, v = (walk.heads(x, attn.num_heads) for x in made)
    if walk.positive:
        return walk.norm(q, attn.q_norm), walk.norm(k, attn.k_norm), v
    return Signal(attn.q_norm(q.value)), Signal(attn.k_norm(k.value)), v


def eva(walk, x, block, rope):
    attn = block.attn
    q, k, v = plain_heads(walk, walk.norm(x, block.norm1), attn)
    if rope is not None:
        q, k = (walk.turned(t, rope, attn.rotate_half) for t in (q, k))
    groups = len(q.value) // len(k.value)
    out = walk.attention(q, walk.repeated(k, groups), walk.repeated(v, groups))
    branch = walk.layer(walk.side_by_side(out), attn.proj)
    x = walk.sum(x, scaled(walk, branch, block.gamma_1))
    return walk.sum(x, scaled(walk, walk.mlp(walk.norm(x, block.norm2), block.mlp), block.gamma_2))


def scaled(walk, branch, gamma):
    return branch if gamma is None else walk.through(branch, lambda value: value * gamma.detach())


def things(walk, x, block, rope):
    branches = []
    for part in block.attns:
        out = walk.attention(*plain_heads(walk, walk.norm(x, part.norm), part.attn))
        branches.append(walk.through(walk.layer(walk.side_by_side(out), part.attn.proj), part.ls))
    x = walk.sum(x, walk.sum(*branches))
    fed = [walk.through(walk.mlp(walk.norm(x, part.norm), part.mlp), part.ls) for part in block.ffns]
    return walk.sum(x, walk.sum(*fed))


def scaling(walk, x, block, rope):
    """Attention is added first, then the MLP of the same norm; a joint projection's bias is the MLP's."""
    y, hidden = walk.norm(x, block.in_norm), block.in_split[0]
    bias = block.in_proj.bias
    parts = block.in_proj.weight.split(block.in_split)
    biases = [None] * 4 if bias is None else list(bias.split(block.in_split))
    biases[0] = block.mlp_bias if bias is None else biases[0]
    q, k, v = (walk.heads(walk.linear(y, w, b), block.num_heads) for w, b in zip(parts[1:], biases[1:], strict=True))
    if walk.positive:
        q, k = walk.norm(q, block.q_norm), walk.norm(k, block.k_norm)
    else:
        q, k = Signal(block.q_norm(q.value)), Signal(block.k_norm(k.value))
    gathered = walk.side_by_side(walk.attention(q, k, v))
    fed = walk.through(walk.linear(y, parts[0], biases[0]), block.mlp_act)
    if getattr(block, "out_proj", None) is None:
        attended, fed = walk.layer(gathered, block.attn_out_proj), walk.layer(fed, block.mlp_out_proj)
    else:
        weight = block.out_proj.weight
        attended = walk.linear(gathered, weight[:, :-hidden])
        fed = walk.linear(fed, weight[:, -hidden:], block.out_proj.bias)
    return walk.sum(walk.sum(x, walk.through(attended, block.ls)), walk.through(fed, block.ls))


def walked(model, image, target, rule):
    """Relevance [N, D] of the tokens that enter the first block, for one image [3, H, W]; and the logits [classes]."""
    with torch.no_grad():
        placed = model._pos_embed(model.patch_embed(image[None]))
        placed, rope = placed if isinstance(model, Eva) else (placed, None)
        start = Signal(model.norm_pre(placed)[0])
        walk, x = Walk(rule), start
        kinds = {ParallelScalingBlock: scaling, ParallelThingsBlock: things}
        for block in model.blocks:
            step = next((step for kind, step in kinds.items() if isinstance(block, kind)), eva)
            x = step(walk, x, block, rope)
        x = walk.norm(x, model.norm)
        x = walk.pooled(x, model.attn_pool) if model.global_pool == "map" else walk.first(x)
        logits = walk.layer(x, model.head)
        seed = torch.zeros_like(logits.value)
        seed[0, target] = 1 if rule == "zplus" else logits.value[0, target]
        logits.relevance = seed
        walk.back()
    return start.relevance, logits.value[0]
