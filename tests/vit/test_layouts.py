"""Kinds of blocks: what "between the halves" means in a parallel one, attention pooling, and what their parts give."""

import pytest
import torch
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

import prunex
from prunex import PrunexError
from prunex.vit import attention, blocks
from prunex.vit.anatomy import read
from prunex.vit.arithmetic import PLAIN
from prunex.vit.blocks import LAYOUTS, layout_of
from prunex.vit.blocks.plain import Layout
from prunex.vit.decisions import Keep
from prunex.vit.handover import Handed
from prunex.vit.policy import under_policy
from prunex.vit.readout import pool_attention
from tests.vits import MORE_FAMILIES, OLD_TIMM, SIZES, images_for, largest, lively, tiny


def fused_projection(**kwargs):
    """The parallel block with one output projection for both halves."""

    class Fused(ParallelScalingBlock):
        def __init__(self, **more):
            super().__init__(**more, fuse_out_proj=True)

    if OLD_TIMM:
        pytest.skip("this timm's blocks have two output projections")
    return lively(VisionTransformer(**SIZES, block_fn=Fused, qkv_bias=True, init_values=0.5, **kwargs)).eval()


PARALLEL = {"apart": lambda: tiny("parallel_scaling", init_values=0.5), "fused": fused_projection}


@pytest.mark.parametrize("kind", PARALLEL)
@pytest.mark.parametrize("fuse", [False, True])
def test_between_a_parallel_blocks_halves(kind, fuse):
    """Tokens leave after attention; the MLP reads the norm of the block's input of those that go on."""
    model = PARALLEL[kind]().double()
    x = images_for(model)
    kept = torch.tensor([[0, 2, 3, 7, 11], [1, 4, 5, 6, 15], [8, 9, 10, 12, 14]])
    weights = torch.rand(3, 16, dtype=torch.float64)
    entered = []
    with prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,)) as pruning, torch.no_grad():
        pruning.pruner.decide = lambda turn, state: Keep(kept, fuse=weights if fuse else None)
        model.blocks[0].register_forward_hook(lambda m, args, out: entered.append(out))
        after = []
        model.blocks[2].register_forward_pre_hook(lambda m, args: after.append(args[0]))
        model(x)
    block, stream = model.blocks[1], entered[0]
    with torch.no_grad():
        # timm's own block gives attention and MLP together; the MLP's part is a function of each token alone.
        whole = block(stream)
        mlp = layout_of(block).feed(block, stream, PLAIN)
        attended = whole - mlp
        rest = torch.ones(3, 16, dtype=torch.float64).scatter(1, kept, 0) * weights * fuse

        def reduced(tokens):
            parts = [tokens[:, :1], tokens[:, 1:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 48))]
            if fuse:
                parts.append(rest.unsqueeze(1) @ tokens[:, 1:])
            return torch.cat(parts, 1)

        wanted = reduced(attended) + layout_of(block).feed(block, reduced(stream), PLAIN)
    assert largest(after[0], wanted) < 1e-12


@pytest.mark.parametrize("kind", PARALLEL)
def test_stochastic_depth_is_drawn_once_for_both_halves(kind):
    model = PARALLEL[kind]().double()
    for block in model.blocks:
        block.drop_path = nn.Dropout(0.5)  # on [B, 1, 1] of ones: 0 or 2 for a whole image
    model.train()
    x = images_for(model, 8)
    with torch.no_grad(), prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,)) as pruning:
        pruning.pruner.decide = lambda turn, state: None
        entered, left = [], []
        model.blocks[0].register_forward_hook(lambda m, args, out: entered.append(out))
        model.blocks[2].register_forward_pre_hook(lambda m, args: left.append(args[0]))
        model(x)
        model.eval()
        branch = model.blocks[1](entered[0]) - entered[0]
    ratio = ((left[0] - entered[0]) / branch).flatten(1)
    assert largest(ratio, ratio.mean(1, keepdim=True).expand_as(ratio)) < 1e-6
    assert {round(float(r)) for r in ratio.mean(1)} == {0, 2}


@pytest.mark.parametrize("family", [*MORE_FAMILIES, "things"])
def test_the_output_map_is_what_the_heads_add(family):
    """From the heads' outputs to the stream, by linear parts alone: the branch moves with them."""
    if family == "things":
        model = lively(VisionTransformer(**SIZES, block_fn=ParallelThingsBlock, init_values=0.5)).eval().double()
    else:
        model = tiny(family).double()
    block = model.blocks[0]
    layout = layout_of(block)
    if family == "differential":
        block.attn.sub_norm = nn.Identity()
    if family in ("res_post", "relpos_shared"):
        block.norm1 = nn.Identity()  # the norm behind attention is left out of the map
    if getattr(getattr(block, "attn", None), "norm", None) is not None:
        block.attn.norm = nn.Identity()
    out = torch.randn(2, layout.width(block) // 16, 5, 16, dtype=torch.float64)
    y = layout.read(block, torch.randn(2, 5, 48, dtype=torch.float64), PLAIN)
    with torch.no_grad():
        change = layout.end(block, layout.project(block, out, y, PLAIN), PLAIN)
        change = change - layout.end(block, layout.project(block, 0 * out, y, PLAIN), PLAIN)
        assert largest(change, out.transpose(1, 2).flatten(2) @ layout.output(block).T) < 1e-12


def test_attention_pooling_over_the_tokens_that_are_there():
    model = tiny("siglip").double()
    pool = model.attn_pool
    x = torch.randn(3, 16, 48, dtype=torch.float64)
    weight = torch.ones(3, 16, dtype=torch.float64)
    weight[0, 3:] = 0
    weight[1, ::2] = 0
    with torch.no_grad():
        pooled, seen = attention.latent(pool, x)
        assert largest(pooled, pool(x)) < 1e-12
        assert largest(seen.sum(1), torch.ones(3, dtype=torch.float64)) < 1e-12
        hidden, seen = attention.latent(pool, x, weight)
        assert largest(hidden[0], pool(x[:1, :3])[0]) < 1e-12
        assert largest(hidden[1], pool(x[1:2, 1::2])[0]) < 1e-12
        assert float(seen[weight == 0].abs().max()) == 0
        x[0, 3:] = 1e6  # nobody reads it
        assert largest(attention.latent(pool, x, weight)[0][0], hidden[0]) < 1e-12
        nothing, seen = attention.latent(pool, x, 0 * weight)
        assert torch.isfinite(nothing).all()
        assert float(seen.abs().max()) == 0


def test_the_gradient_of_attention_pooling_for_its_weights():
    pool = tiny("siglip").double().attn_pool
    x = torch.randn(2, 6, 48, dtype=torch.float64)
    weight = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1]], dtype=torch.float64, requires_grad=True)
    attention.latent(pool, x, weight)[0].sum().backward()
    step = 1e-6
    for b, n in ((0, 1), (0, 2), (1, 3)):
        with torch.no_grad():
            up = weight.clone()
            up[b, n] += step
            numeric = (attention.latent(pool, x, up)[0].sum() - attention.latent(pool, x, weight)[0].sum()) / step
        assert float(weight.grad[b, n]) == pytest.approx(float(numeric), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", ["siglip", "pe"])
def test_what_an_attention_pooling_head_reads(family):
    """The read-out row is the head's own attention: of kept patches alone, prefix tokens where it takes them in."""
    if family == "pe":
        model = tiny("eva02", global_pool="map", attn_pool_num_heads=3).double()
    else:
        model = tiny("siglip", reg_tokens=2).double()
    x = images_for(model)
    prefix = model.num_prefix_tokens
    assert read(model).pool_prefix == (family == "pe")
    with torch.no_grad():
        row = pool_attention(model, model.forward_features(x), Handed(read(model)))
        assert row.shape == (3, prefix + 16)
        assert (float(row[:, :prefix].abs().max()) > 0) == (family == "pe")
        with prunex.attach(model, "topk", keep_ratio=0.5, stages=(3,)):
            last = prunex.explain("rollout", model, x)
            assert largest(last.raw.sum(1), torch.ones(3, dtype=torch.float64)) < 1e-9
            assert int(last.trace.kept().sum()) == 24


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("queries", [None, (0,)])
def test_a_relative_bias_is_added_to_the_scores_everywhere(policy, queries):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 6, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    p = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1]], dtype=torch.float64) if policy else None
    scores = q @ k.transpose(2, 3) * 8**-0.5 + bias
    if p is not None:
        scores = scores.masked_fill(~((p > 0)[:, None, None, :] | torch.eye(6, dtype=torch.bool)), float("-inf"))
    wanted = scores.softmax(-1)
    rows = slice(None) if queries is None else list(queries)
    found = attention.matrix(q[:, :, rows], k, 8**-0.5, p, queries=queries, relative=bias[:, :, rows])
    assert largest(found, wanted[:, :, rows]) < 1e-12
    if p is None:
        assert (
            largest(attention.fused(q[:, :, rows], k, v, relative=bias[:, :, rows]), (wanted @ v)[:, :, rows]) < 1e-12
        )
    elif queries is None:
        assert largest(under_policy(q, k, v, p, 8**-0.5, relative=bias), wanted @ v) < 1e-12
    only = scores[:, :, :2] if p is None else (q @ k.transpose(2, 3) * 8**-0.5 + bias)[:, :, :2]
    only = only if p is None else only.masked_fill(~(p > 0)[:, None, None, :], float("-inf"))
    found = attention.rows(q[:, :, :2], k, 8**-0.5, p, chunk=1, relative=bias[:, :, :2])
    assert largest(found, only.softmax(-1).mean((1, 2))) < 1e-12


def test_a_policys_gradient_under_a_relative_bias():
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(1, 2, 5, 5, generator=generator, dtype=torch.float64).requires_grad_()
    policy = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)

    def slow(policy, bias):
        eye = torch.eye(5, dtype=torch.float64)
        weight = (q @ k.transpose(2, 3) * 0.5 + bias).exp() * (policy[:, None, None, :] * (1 - eye) + eye)
        return (weight / weight.sum(-1, keepdim=True)) @ v

    mix = torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((under_policy(q, k, v, policy, 0.5, relative=bias) * mix).sum(), [policy, bias])
    wanted = torch.autograd.grad((slow(policy, bias) * mix).sum(), [policy, bias])
    assert largest(found[0], wanted[0]) < 1e-10
    assert largest(found[1], wanted[1]) < 1e-10


def test_every_layout_is_reached_by_a_test_family():
    from tests.vit.families import FAMILIES, build

    seen = {type(build(f).blocks[0]) for f in FAMILIES}
    assert set(LAYOUTS) <= seen


def test_a_bias_that_timm_adds_in_another_place_is_refused():
    model = VisionTransformer(**SIZES, block_fn=ParallelScalingBlock, qkv_bias=False)
    for block in model.blocks:  # as timm 1.0.20 has them
        block.qkv_bias = torch.zeros(3 * 48)
    with pytest.raises(PrunexError, match="ParallelScalingBlock without qkv_bias, whose bias this timm misplaces"):
        prunex.attach(model, "topk")


def test_no_kind_of_block_is_hidden_by_one_it_derives_from():
    kinds = list(LAYOUTS)
    hidden = [(k, before) for i, k in enumerate(kinds) for before in kinds[:i] if issubclass(k, before)]
    assert not hidden


class Halved(Block):
    """A block of which nothing in prunex knows."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) / 2
        return x + self.mlp(self.norm2(x)) / 2


class HalvedLayout(Layout):
    """All that has to be said of it."""

    def end(self, block, branch, ops):
        return super().end(block, branch, ops) / 2

    def feed(self, block, x, ops):
        return super().feed(block, x, ops) / 2

    def output(self, block):
        return super().output(block) / 2


def test_another_block_is_supported_by_its_layout_alone(monkeypatch, tmp_path):
    model = lively(VisionTransformer(**SIZES, block_fn=Halved)).double().eval()
    with pytest.raises(PrunexError, match="Halved"):
        read(model)
    monkeypatch.setattr(blocks, "LAYOUTS", {Halved: HalvedLayout(), **LAYOUTS})
    x = images_for(model)
    dense = model(x).detach()
    with prunex.attach(model, "evit", keep_ratio=0.5) as pruning:
        removed = prunex.explain("tokentm", model, x)
        pruning.masked = True
        assert torch.allclose(prunex.explain("tokentm", model, x).maps, removed.maps)
        pruning.masked = None
        assert largest(model(x), dense) > 1e-3
        # How such a model is built again is said elsewhere, and until then it is not saved as one of plain blocks.
        with pytest.raises(PrunexError, match="Halved blocks"):
            prunex.save(model, tmp_path / "saved")
    assert model(x).equal(dense)
