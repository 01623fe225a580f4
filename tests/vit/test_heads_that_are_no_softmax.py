"""Differential attention and talking heads: the maps are what the papers define, and who is not there has no part."""

import pytest
import timm
import torch
from torch import nn

import prunex
from prunex.errors import PrunexError
from prunex.vit import attention
from prunex.vit.anatomy import read
from prunex.vit.arithmetic import PLAIN
from prunex.vit.attention import KeyWeights
from prunex.vit.blocks import layout_of
from prunex.vit.forward import record
from prunex.vit.late import left_by
from prunex.vit.tape import Tape
from tests.vits import images_for, largest, lively, relative, tiny


def looked_at(model, x, **asked):
    """What every block's heads look at, [B, H, N, N] each."""
    with torch.no_grad():
        tape = Tape(attention=True, **asked)
        record(model, x, tape)
    return [step.attention for step in tape.attended()]


def entering(model, x, number):
    """What the attention of a block reads."""
    seen = []
    handle = model.blocks[number].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def test_a_differential_map_is_the_difference_of_two_softmaxes():
    model = tiny("differential").double()
    x = images_for(model)
    attn, y = model.blocks[2].attn, entering(model, x, 2)
    with torch.no_grad():
        q, k = (t.unflatten(2, (6, 8)).transpose(1, 2) for t in attn.qkv(y).chunk(3, 2)[:2])
        both = (attn.q_norm(q) @ attn.k_norm(k).transpose(2, 3) / 8**0.5).softmax(-1)
        paired = torch.exp((attn.lambda_q1 * attn.lambda_k1).sum()), torch.exp((attn.lambda_q2 * attn.lambda_k2).sum())
        factor = paired[0] - paired[1] + attn.lambda_init
        wanted = torch.stack([both[:, 2 * h] - factor * both[:, 2 * h + 1] for h in range(3)], 1)
    found = looked_at(model, x)[2]
    assert found.shape == (3, 3, 19, 19)
    assert largest(found, wanted) < 1e-6  # timm computes lambda in float32
    assert float(found.min()) < -1e-3
    assert largest(found.sum(-1), (1 - factor).expand(3, 3, 19)) < 1e-6
    positive = wanted.clamp(min=0)
    shares = looked_at(model, x, shares=True)[2]
    assert largest(shares, positive / positive.sum(-1, keepdim=True)) < 1e-6
    raw = prunex.explain("raw_attention", model, x, layer=2).raw
    assert largest(raw, shares[:, :, 0].mean(1)) < 1e-12
    assert float(prunex.explain("rollout", model, x).maps.min()) >= 0


def test_talking_heads_are_mixed_before_and_after_the_softmax():
    model = tiny("cait").double()
    x = images_for(model)
    attn, y = model.blocks[1].attn, entering(model, x, 1)
    with torch.no_grad():
        q, k, _ = attn.qkv(y).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhmn,gh->bgmn", q @ k.transpose(2, 3) / 4, attn.proj_l.weight)
        scores = scores + attn.proj_l.bias[:, None, None]
        mixed = torch.einsum("bhmn,gh->bgmn", scores.softmax(-1), attn.proj_w.weight) + attn.proj_w.bias[:, None, None]
    assert largest(looked_at(model, x)[1], mixed) < 1e-12
    assert float(mixed.min()) < 0
    rows = looked_at(model, x, shares=True)[1]
    assert largest(prunex.explain("raw_attention", model, x, layer=1).raw, rows.mean((1, 2))) < 1e-12


def matrix_of(block, q, k, policy=None, keys=None):
    return layout_of(block).matrix(block, q, k, policy, keys, None, ops=PLAIN, relative=None)


def test_a_policys_gradient_through_talking_heads():
    block = tiny("cait").double().blocks[0]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 16, generator=generator, dtype=torch.float64)
    policy = torch.tensor([[1.0, 0.3, 0.0, 1.0, 0.7], [0.0, 1.0, 1.0, 0.5, 1.0]], dtype=torch.float64)
    policy.requires_grad_()
    attn, eye = block.attn, torch.eye(5, dtype=torch.float64)

    def slow(policy):
        counts = policy[:, None, None, :] * (1 - eye) + eye
        scores = torch.einsum("bhmn,gh->bgmn", q @ k.transpose(2, 3) / 4, attn.proj_l.weight)
        weight = (scores + attn.proj_l.bias[:, None, None]).exp() * counts
        softmax = weight / weight.sum(-1, keepdim=True)
        return (
            torch.einsum("bhmn,gh->bgmn", softmax, attn.proj_w.weight) + attn.proj_w.bias[:, None, None] * counts
        ) @ v

    found, wanted = matrix_of(block, q, k, policy) @ v, slow(policy)
    assert largest(found, wanted) < 1e-12
    parts = [policy, attn.proj_w.weight, attn.proj_w.bias, attn.proj_l.weight]
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), parts) for out in (found, wanted)), strict=True):
        assert largest(a, b) < 1e-9


def test_a_token_of_two_equal_ones_is_looked_at_as_both_were():
    block = tiny("cait").double().blocks[0]
    q, k, v = torch.randn(3, 1, 3, 4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    twice = torch.tensor([0, 1, 2, 3, 3])
    sizes = torch.tensor([[1.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    with torch.no_grad():
        merged = matrix_of(block, q, k, keys=KeyWeights(sizes=sizes)) @ v
        apart = matrix_of(block, q[:, :, twice], k[:, :, twice]) @ v[:, :, twice]
    assert largest(merged, apart[:, :, :4]) < 1e-12


def test_a_late_class_token_reads_the_patches_that_are_left():
    model = tiny("cait").double()
    x = images_for(model)
    assert read(model).prefix == 0
    with prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,)) as pruning, torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape == (3, 1 + 8, 48)
        logits = model.forward_head(tokens)
        pruning.masked = True
        masked = model.forward_features(x)
        assert masked.shape == (3, 1 + 15, 48)
        assert largest(masked[:, 0], tokens[:, 0]) < 1e-12
        assert largest(model.forward_head(masked), logits) < 1e-12
        assert pruning.trace.prefix == 1
        assert pruning.trace.scatter(masked, 0.0).shape == (3, 3, 5, 48)
        assert largest(pruning.pool(masked), tokens[:, 1:].mean(1)) < 1e-12
        tape = Tape()
        state = record(model, x, tape, masked=False)
        assert tape.readout.shape == (3, 8)
        assert largest(tape.readout.sum(1), torch.ones(3)) < 1e-12
        assert left_by(state).fits(state.tokens)


def test_the_readout_of_a_late_class_token_is_what_one_block_saw():
    model = tiny("cait", depth_token_only=1).double()
    x = images_for(model)
    seen = []
    handle = model.blocks_token_only[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        tape = Tape()
        record(model, x, tape)
        handle.remove()
        attn = model.blocks_token_only[0].attn
        q, k = (t.unflatten(2, (3, 16)).transpose(1, 2) for t in (attn.q(seen[0][:, :1]), attn.k(seen[0])))
        row = attention.over_heads((q @ k.transpose(2, 3) / 4).softmax(-1))[:, 0, 1:]
    assert largest(tape.readout, row / row.sum(1, keepdim=True)) < 1e-12


@pytest.mark.parametrize("method", ["ia_red2", "patch_slimming"])
def test_pruners_that_need_the_class_token_in_the_blocks_say_so(method):
    with pytest.raises(PrunexError, match="one that enters behind the blocks|a class token that enters behind"):
        prunex.attach(tiny("cait"), method)


def test_heads_that_explain_themselves_say_so():
    with pytest.raises(PrunexError, match="Cait, whose class token enters behind its blocks"):
        prunex.attach(tiny("cait"), "mean_patch")


class Own(nn.Linear):
    """Somebody's layer."""


@pytest.mark.parametrize(
    ("path", "named"),
    [("blocks.1.attn.proj_w", "mixed by a Own"), ("blocks_token_only.0", "Own"), ("blocks_token_only.0.attn", "Own")],
)
def test_parts_of_a_cait_that_are_not_known_are_named(path, named):
    model = tiny("cait")
    part = nn.Linear(3, 3)
    if path.endswith("proj_w"):
        model.set_submodule(path, Own(3, 3))
    else:
        part = model.get_submodule(path)
        part.__class__ = type("Own", (type(part),), {"forward": lambda self, *args: args[-1]})
    with pytest.raises(PrunexError, match=named):
        prunex.attach(model, "topk")


def test_a_hook_on_the_second_mixing_is_refused():
    model = tiny("cait")
    model.blocks[1].attn.proj_w.register_forward_hook(lambda *_: None)
    pruning = prunex.attach(tiny("cait"), "topk")
    assert pruning.model is not model
    with pytest.raises(PrunexError, match="attn.proj_w of a LayerScaleBlock"):
        prunex.attach(model, "topk")


def test_differential_attention_in_blocks_side_by_side_is_named():
    timm_block = timm.models.vision_transformer.ParallelThingsBlock
    model = tiny("differential", block_fn=timm_block, qk_norm=False, scale_attn_norm=False)
    with pytest.raises(PrunexError, match="with DiffAttention"):
        prunex.attach(model, "topk")


def test_another_lambda_than_timms_is_not_saved(tmp_path):
    model = tiny("differential")
    model.blocks[1].attn.set_lambda_init(7)
    with pytest.raises(PrunexError, match="another lambda_init"):
        prunex.save(model, tmp_path)


def test_relative_biases_of_another_image_size():
    """They are made for the grid, and a pruned model's follow it."""
    model = tiny("relpos_shared").double()
    pruning = prunex.attach(model, "topk", keep_ratio=0.6, stages=(1,))
    model.set_input_size(img_size=(32, 48))
    lively(model)
    x = images_for(model)
    with torch.no_grad():
        removed = model(x)
        assert pruning.trace.grid == (4, 6)
        pruning.masked = True
        assert relative(model(x), removed) < 1e-12


@pytest.mark.parametrize("family", ["relpos", "relpos_shared", "cait", "cait_mean", "differential"])
def test_saved_loaded_and_trained(family, tmp_path):
    model = tiny(family)
    x = images_for(model)
    units = prunex.attach(model, "magnitude", budget=0.8)
    units.calibrate()
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 2))
    model.train()
    loss = model(x).square().mean() + sum(pruning.losses().values())
    loss.backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    # Nobody reads the class token of a CaiT that pools patches, nor what comes of it.
    assert all("token" in name for name in unreached) if family == "cait_mean" else not unreached
    small = prunex.slim(model.eval())
    again = prunex.load(prunex.save(small, tmp_path / "slim"))
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    assert prunex.cost(again) == prunex.cost(small)
    assert small.blocks[0].mlp.fc2.in_features < 192
