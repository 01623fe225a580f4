"""Rotary tables and relative biases of the tokens that are there, against a slow composition with dense matrices."""

import pytest
import torch

import prunex
from prunex.vit.embedding import embed
from prunex.vit.forward import resume, run
from prunex.vit.positions import Places, Positions, joins, positions_of
from prunex.vit.recorder import Recorder
from prunex.vit.tape import Tape
from prunex.vit.trace import Stage
from prunex.vit.turns import Turn
from tests.vits import images, images_for, largest, randomise, tiny


def keep(group, weight=None, n_out=None, fused=False):
    group = torch.tensor(group)
    weight = (group >= 0).double() if weight is None else torch.tensor(weight, dtype=torch.float64)
    return Stage(0, group, weight, n_out or int(group.max()) + 1, fused)


# Of five patches; two images each.
KEPT = keep([[0, -1, 1, 2, -1], [-1, 0, 1, -1, 2]])
FUSED = keep([[0, 2, 1, 2, 2], [2, 0, 2, 1, 2]], [[1, 0.2, 1, 0.5, 0.3], [0.7, 1, 0.2, 1, 0.1]], 3, True)
AGAIN = keep([[1, -1, 0], [0, 1, -1]])
AGAIN_FUSED = keep([[0, 1, 1], [1, 0, 1]], [[1, 0.4, 0.6], [0.9, 1, 0.1]], 2, True)
CHAINS = {
    "kept": [KEPT],
    "kept_twice": [KEPT, AGAIN],
    "fused": [FUSED],
    "fused_and_kept": [FUSED, AGAIN],
    "fused_twice": [FUSED, AGAIN_FUSED],
    "kept_and_fused": [KEPT, AGAIN_FUSED],
}


def matrices(chain):
    """Row-stochastic [B, n, 5] from patches to the tokens after a chain of stages."""
    whole = torch.eye(5, dtype=torch.float64).expand(2, -1, -1)
    for stage in chain:
        step = torch.zeros(2, stage.n_out, stage.group.shape[1], dtype=torch.float64)
        for b in range(2):
            for i, (g, w) in enumerate(zip(stage.group[b].tolist(), stage.weight[b].tolist(), strict=True)):
                if g >= 0:
                    step[b, g, i] += w
        whole = step @ whole
    return whole


def after(positions, chain):
    for stage in chain:
        positions = positions.after(stage)
    return positions


@pytest.mark.parametrize("chain", CHAINS)
def test_tables_of_tokens_are_the_means_of_their_patches(chain):
    mixing = matrices(CHAINS[chain])
    for prefix in (0, 1):
        one = torch.randn(5, 6, dtype=torch.float64)
        many = torch.randn(2, 3, 5, 6, dtype=torch.float64)  # blocks, heads
        found = after(Positions(prefix, rope=one), CHAINS[chain]).rope_of(1)
        assert largest(found, (mixing @ one).unsqueeze(1)) < 1e-12
        found = after(Positions(prefix, rope=many), CHAINS[chain]).rope_of(1)
        assert largest(found, torch.einsum("bnp,hpc->bhnc", mixing, many[1])) < 1e-12
        own, shared = torch.randn(2, 3, prefix + 5, prefix + 5, dtype=torch.float64)
        at = after(Positions(prefix, shared=shared, relative=True), CHAINS[chain])
        wide = torch.zeros(2, prefix + mixing.shape[1], prefix + 5, dtype=torch.float64)
        wide[:, :prefix, :prefix] = torch.eye(prefix)
        wide[:, prefix:, prefix:] = mixing
        wanted = torch.einsum("bip,hpq,bjq->bhij", wide, own + shared, wide)
        assert largest(at.relative_of(own), wanted) < 1e-12
        assert not at.whole


def test_without_stages_everything_is_as_timm_has_it():
    one, bias = torch.randn(5, 6), torch.randn(3, 6, 6)
    assert Positions(1, rope=one).rope_of(3) is one
    at = Positions(1, shared=bias, relative=True)
    assert at.whole
    assert torch.equal(at.relative_of(None), bias[None])
    assert Positions(1, rope=one).relative_of(bias) is None


def test_a_pooling_stage_shares_a_token_out():
    """A stage whose tokens go to several groups at once, as overlapping pooling has it."""
    group = torch.tensor([[[0, -1], [0, 1], [1, -1]]])
    weight = torch.tensor([[[0.5, 0.0], [0.5, 0.25], [0.75, 0.0]]], dtype=torch.float64)
    table = torch.randn(3, 4, dtype=torch.float64)
    stage = Stage(0, group, weight, 2)
    assert joins(stage)
    found = Positions(0, rope=table).after(stage).rope_of(0)
    wanted = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]], dtype=torch.float64) @ table
    assert largest(found[0, 0], wanted) < 1e-12


def test_empty_slots_keep_their_places():
    stage = Stage(0, torch.tensor([[0, -1, 2]]), torch.tensor([[1.0, 0.0, 1.0]]), 3)
    table = torch.randn(3, 4)
    assert torch.equal(Positions(0, rope=table).after(stage).rope_of(0)[0, 0], table)


@pytest.mark.parametrize("family", ["eva02", "dinov3", "rope_mixed", "beit", "beit_shared"])
def test_a_pruned_block_attends_as_the_dense_one_among_the_kept(family):
    """Keeping chosen patches from the first block on equals running timm's blocks with the others hidden as keys."""
    model = tiny(family, depth=1).double()
    x = images_for(model)
    kept = torch.tensor([[0, 3, 5, 6, 10, 15]] * 3)
    with prunex.attach(model, "topk", keep_ratio=0.5, stages=(0,)) as pruning, torch.no_grad():
        pruning.pruner.plan = lambda: [Turn(0)]
        pruning.pruner.decide = lambda turn, state: prunex.vit.decisions.Keep(kept)
        features = model.forward_features(x)
    prefix = model.num_prefix_tokens
    hidden = torch.ones(3, prefix + 16, dtype=torch.bool)
    hidden[:, :prefix] = False
    hidden.scatter_(1, prefix + kept, False)
    hook = hide(model.blocks[0].attn, hidden)
    with torch.no_grad():
        dense = model.forward_features(x)
    hook.undo()
    assert largest(features[:, :prefix], dense[:, :prefix]) < 1e-12
    assert largest(features[:, prefix:], dense[:, prefix:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 48))) < 1e-12


class hide:
    """timm's own attention with some keys hidden, by the mask its fused kernel takes."""

    def __init__(self, attn, hidden):
        self.fused = torch.nn.functional.scaled_dot_product_attention
        mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))[:, None, None]

        def masked(q, k, v, attn_mask=None, **more):
            return self.fused(q, k, v, attn_mask=mask if attn_mask is None else attn_mask + mask, **more)

        torch.nn.functional.scaled_dot_product_attention = masked

    def undo(self):
        torch.nn.functional.scaled_dot_product_attention = self.fused


@pytest.mark.parametrize("family", ["eva02", "rope_mixed", "beit"])
def test_a_shortened_sequence_knows_its_places(family):
    model = tiny(family).double()
    x, grid = embed(model, images_for(model))
    present = torch.zeros(3, 16, dtype=torch.bool)
    slots = torch.tensor([[1, 2, 7, 12], [0, 5, 6, 15], [3, 4, 8, 9]])
    present.scatter_(1, slots, True)
    with torch.no_grad():
        wanted = resume(model, x, grid, (prunex.vit.replay.Absent(present),))
        short = torch.cat([x[:, :1], x[:, 1:].gather(1, slots.unsqueeze(-1).expand(-1, -1, 48))], 1)
        found = resume(model, short, (1, 4), places=Places(slots, grid))
        assert largest(found, wanted) < 1e-12
        assert largest(resume(model, short, (1, 4), places=Places(slots * 0, grid)), wanted) > 1e-3


@pytest.mark.parametrize("family", ["eva02", "dinov3", "beit", "siglip"])
@pytest.mark.parametrize("method", [None, "topk", "evit"])
def test_removal_games_drop_and_mask_alike(family, method):
    model = tiny(family).double()
    x = images_for(model, 2)
    if method is not None:
        prunex.attach(model, method, keep_ratio=0.6, stages=(1, 2))
    dropped = prunex.explain("shap", model, x, budget=40, removal="drop")
    masked = prunex.explain("shap", model, x, budget=40, removal="mask")
    assert largest(dropped.raw, masked.raw) < 1e-12


def test_rotary_tables_follow_the_image_size():
    model = tiny("dinov3")
    for size in ((32, 32), (48, 24), (16, 64)):
        x = images(2, size)
        with torch.no_grad():
            wanted = model(x)
            assert (
                largest(
                    run(model, x, recorder=Recorder(Tape(rows=frozenset(range(4))))).tokens, model.forward_features(x)
                )
                < 1e-5
            )
            with prunex.attach(model, "evit", keep_ratio=1.0):
                assert largest(model(x), wanted) <= 1e-6
            with prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2)) as pruning:
                removed = model(x)
                pruning.masked = True
                assert largest(model(x), removed) < 1e-5


@pytest.mark.parametrize("family", ["eva02", "beit", "beit_shared", "siglip", "parallel_scaling"])
def test_another_input_size_while_pruned(family):
    model = tiny(family)
    if not hasattr(model, "set_input_size"):
        pytest.skip("this timm's model keeps its input size")
    with prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2)) as pruning, torch.no_grad():
        model.set_input_size(img_size=(48, 40))
        x = images(2, (48, 40))
        removed = model(x)
        assert pruning.trace.kept().shape == (2, 6, 5)
        pruning.masked = True
        assert largest(model(x), removed) < 1e-5


@pytest.mark.parametrize("seed", [11, 12, 31])
def test_dropped_keys_far_above_the_kept_ones_give_finite_gradients_through_two_stages(seed):
    """Without a norm before attention the scores are large, and two policies' gradients are multiplied."""
    model = tiny("res_post").double().train()
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 2), teacher=False)
    randomise(pruning.pruner)
    torch.manual_seed(seed)
    model(images_for(model)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in pruning.pruner.parameters())


@pytest.mark.parametrize("family", ["eva02", "beit", "siglip", "parallel_scaling", "res_post"])
def test_dynamicvit_trains_and_hidden_patches_do_not_matter(family):
    """The policy's gradient is finite everywhere and hidden patches do not matter to the others."""
    model = tiny(family).double().train()
    x = images_for(model)
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=0.6, stages=(1, 2), teacher=False)
    randomise(pruning.pruner)
    torch.manual_seed(3)
    out = model(x)
    (out.sum() + sum(pruning.losses().values())).backward()
    for name, p in pruning.pruner.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert float(p.grad.abs().sum()) > 0 or "4.bias" in name, name
    # What is hidden at the first stage changes nothing: disturb it just before.
    hidden = pruning.trace.kept(0).flatten(1)
    prefix = model.num_prefix_tokens

    def disturb(module, args, out):
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
        keep = torch.nn.functional.pad(hidden, (prefix, 0), value=True)
        return torch.where(keep.unsqueeze(-1), out, out + noise)

    decide = pruning.pruner.decide
    decisions = {}
    torch.manual_seed(3)
    with torch.no_grad():
        pruning.pruner.decide = lambda turn, state: decisions.setdefault(turn.block, decide(turn, state))
        wanted = model(x)
        pruning.pruner.decide = lambda turn, state: decisions[turn.block]
        handle = model.blocks[0].register_forward_hook(disturb)
        assert largest(model(x), wanted) < 1e-10
        handle.remove()


def test_models_without_tables_carry_none():
    model = tiny()
    assert positions_of(model, 1, (4, 4)) is None
    assert positions_of(tiny("eva02", use_rot_pos_emb=False), 1, (4, 4)) is None
    assert positions_of(tiny("beit", use_rel_pos_bias=False), 1, (4, 4)) is None
    assert positions_of(tiny("beit"), 1, (4, 4)).relative
