"""IA-RED^2: its interpreter, its dropping, its training, and what it refuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex.pruners.ia_red2 import IARED2, Interpreter
from prunex.vit.anatomy import read
from prunex.vit.decisions import Keep
from prunex.vit.forward import predict
from prunex.vit.turns import Turn
from tests.vits import images_for, largest, randomise, state_of, tiny


def pruned(family="vit", double=False, training=False, stages=(1, 2), keep_ratio=0.6, model=None, std=0.3, **options):
    model = tiny(family) if model is None else model
    model = model.double() if double else model
    pruning = prunex.attach(model, "ia_red2", keep_ratio=keep_ratio, stages=stages, **options)
    randomise(pruning.pruner, std=std)
    model.train(training)
    return model, pruning


def test_the_interpreter_is_its_definition():
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    policy = torch.tensor([[1, 1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0, 1]], dtype=torch.float64)
    own = randomise(Interpreter(12, 3)).double()
    for u in (None, policy):
        p = own(x, 2, u)
        weight, bias = own.qk.weight, own.qk.bias
        for b in range(2):
            y = x[b] if u is None else x[b] * u[b][:, None]
            y = F.layer_norm(y, (12,), eps=1e-5)
            q, k = weight[:12] @ y[0] + bias[:12], y @ weight[12:].T + bias[12:]
            for j in range(5):
                parts = [q[4 * h : 4 * h + 4] @ k[2 + j, 4 * h : 4 * h + 4] / 2 for h in range(3)]
                assert largest(p[b, j], torch.stack(parts).sigmoid().mean()) < 1e-12
    assert sum(v.numel() for v in own.parameters()) == 2 * (12 * 12 + 12)


def test_groups_are_equal_and_the_first_decides_before_block_0():
    assert prunex.attach(tiny(depth=12), "ia_red2").options["stages"] == [0, 4, 8]
    assert prunex.attach(tiny(depth=12), "ia_red2", groups=4).options["stages"] == [0, 3, 6, 9]
    assert prunex.attach(tiny(depth=2), "ia_red2").options["stages"] == [0, 1]
    pruning = prunex.attach(tiny(), "ia_red2")
    assert prunex.attach(tiny(), **pruning.spec).spec == pruning.spec
    assert pruning.options["heads"] == 3


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool"])
def test_a_policy_of_ones_is_the_dense_model(family):
    model = tiny(family)
    x = images_for(model)
    with torch.no_grad():
        dense = model(x)
        _, pruning = pruned(model=model, threshold=0.0)
        for masked in (None, True):
            pruning.masked = masked
            assert largest(model(x), dense) < 1e-5
            assert pruning.trace.kept().all()
            assert len(pruning.trace.stages) == 2


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg"])
def test_masked_equals_gathering_each_image_s_own_tokens(family):
    model, pruning = pruned(family, double=True, stages=(0, 2), threshold=0.48)
    x = images_for(model, 6)
    a = read(model)
    with torch.no_grad():
        pruning.masked = True
        masked = model(x)
        trace = pruning.trace
        pruning.masked = None
        assert largest(model(x), masked) < 1e-12
        counts = [int(n) for n in trace.kept().flatten(1).sum(1)]
        assert len(set(counts)) > 2
        for i in range(6):
            script = {0: trace.kept(0)[i].flatten(), 2: trace.kept(1)[i].flatten()[trace.kept(0)[i].flatten()]}

            class Gather:
                def __init__(self, script):
                    self.script = script

                def plan(self):
                    return [Turn(block) for block in self.script]

                def decide(self, turn, state):
                    return Keep(self.script[turn.block].nonzero().T)

            alone = predict(model, x[i : i + 1], (Gather(script),))
            assert alone.state.tokens.shape[1] == a.prefix + counts[i]
            assert largest(alone.logits[0], masked[i]) < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_dropping_is_permanent_and_scores_of_the_dropped_are_zero(training):
    model, pruning = pruned(stages=(0, 1, 2), training=training)
    policies = []
    real = prunex.vit.turns.apply

    def apply(answer, block, when, state, entered):
        stages = real(answer, block, when, state, entered)
        if answer is not None:
            policies.append(state.policy.detach().clone())
        return stages

    patch = pytest.MonkeyPatch()
    patch.setattr("prunex.vit.turns.apply", apply)
    pruning.masked = True
    try:
        model(images_for(model, 6))
        assert len(policies) == 3
        for earlier, later in itertools.pairwise(policies):
            assert (later <= earlier + 1e-6).all()
        for before, stage in zip(policies, pruning.trace.stages[1:], strict=False):
            assert (stage.score[before[:, 1:] == 0] == 0).all()
        assert all((u[:, 0] == 1).all() for u in policies)
        assert (policies[-1][:, 1:] == 0).any()
    finally:
        patch.undo()


def test_the_threshold_is_strict_and_scores_are_the_map():
    model, pruning = pruned(stages=(0, 2))
    with torch.no_grad():
        model(images_for(model))
        score = pruning.trace.stages[0].score
        assert score.shape == (3, 16)
        assert pruning.trace.kept(0).flatten(1).equal(score > 0.5)
        pruning.pruner.threshold = float(score[1].max())
        model(images_for(model))
    assert not pruning.trace.kept(0)[1].any()


def test_fixed_counts_keep_the_best_scored():
    model, pruning = pruned(count="fixed", stages=(0, 2))
    with torch.no_grad():
        removed = model(images_for(model))
        trace = pruning.trace
        assert [t.flatten(1).sum(1).tolist() for t in (trace.kept(0), trace.kept(1))] == [[9] * 3, [5] * 3]
        best = trace.stages[0].score.topk(9).indices
        assert trace.kept(0).flatten(1).equal(torch.zeros(3, 16, dtype=torch.bool).scatter(1, best, True))
        pruning.masked = True
        assert largest(model(images_for(model)), removed) < 1e-5
    assert pruning.counts() == [9, 5]


def test_macs_are_those_of_the_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    own = prunex.attach(tiny(), "ia_red2").pruner
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        own.interpreters[0](torch.randn(1, 17, 48), 1)
    assert counter.get_total_flops() == 2 * own.macs(16)


def test_straight_through_training_follows_the_target():
    model, pruning = pruned(training=True, stages=(1,), keep_ratio=0.4, std=0.1)
    optimiser = torch.optim.Adam(pruning.pruner.parameters(), 0.02)
    x = images_for(model, 8)
    for _ in range(30):
        optimiser.zero_grad()
        model(x)
        losses = pruning.losses()
        masks = pruning._attached.steps.take()[-1].masks
        assert set(losses) == {"ratio"}
        assert largest(losses["ratio"], 2 * (masks[0].mean() - 0.4) ** 2) < 1e-6  # of the batch, not of each image
        losses["ratio"].backward()
        optimiser.step()
    kept = torch.stack([(model(x), pruning.trace.kept().float().mean())[1] for _ in range(20)]).mean()
    assert abs(float(kept) - 0.4) < 0.08


def test_straight_through_gradients_reach_interpreters():
    model, pruning = pruned(training=True)
    model(images_for(model)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in pruning.pruner.interpreters[0].parameters())


def test_a_factor_of_one_is_no_group():
    model, pruning = pruned(training=True, stages=(0, 1, 2), keep_ratio=[0.5, 1.0, 0.5])
    model(images_for(model))
    assert [s.block for s in pruning.trace.stages] == [0, 2]
    assert torch.isfinite(pruning.losses()["ratio"])
    assert not any(p.requires_grad for p in pruning.pruner.interpreters[1].parameters())
    assert pruning.counts() == [8, 8, 4]


def test_official_projections_lose_their_value_third():
    model, pruning = pruned(stages=(0, 2))
    generator = torch.Generator().manual_seed(5)
    state = {}
    for g in range(2):
        state[f"policy_net.{g}.qkv.weight"] = torch.randn(144, 48, generator=generator)
        state[f"policy_net.{g}.qkv.bias"] = torch.randn(144, generator=generator)
    state["blocks.0.attn.qkv.weight"] = torch.randn(144, 48, generator=generator)
    pruning.load_official({"model": state})
    for g, own in enumerate(pruning.pruner.interpreters):
        assert own.qk.weight.equal(state[f"policy_net.{g}.qkv.weight"][:96])
        assert own.qk.bias.equal(state[f"policy_net.{g}.qkv.bias"][:96])
    assert model.blocks[0].attn.qkv.weight.equal(state["blocks.0.attn.qkv.weight"])
    with pytest.raises(prunex.PrunexError, match="parameters are missing"):
        pruning.load_official({k: v for k, v in state.items() if "policy_net.1" not in k})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups=0 is not allowed: give a whole number in 1..4"),
        ({"groups": 5}, "groups=5"),
        ({"groups": True}, "groups=True"),
        ({"groups": 2, "stages": (0, 2)}, "say the same thing"),
        ({"heads": 5}, "heads=5 is not allowed: give a number that divides the width 48"),
        ({"heads": True}, "heads=True"),
        ({"count": "variable"}, "unknown count 'variable'"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"ratio_weight": -2}, "ratio_weight=-2"),
        ({"expected": [0.5]}, "expected="),
    ],
)
def test_bad_options(options, message):
    model = tiny()
    before = sorted(state_of(model)["tensors"])
    with pytest.raises(prunex.PrunexError, match=message):
        prunex.attach(model, "ia_red2", **options)
    assert sorted(model.state_dict()) == before


@pytest.mark.parametrize("family", ["avg_pool_no_class", "avg_pool_no_class_reg"])
def test_a_model_without_a_class_token_is_refused(family):
    with pytest.raises(prunex.PrunexError, match="this VisionTransformer has none: use dynamicvit"):
        prunex.attach(tiny(family), "ia_red2")


@pytest.mark.parametrize("labels", [torch.zeros(2, dtype=torch.long), torch.zeros(3), [0, 1, 2]])
def test_labels_that_do_not_fit(labels):
    model, pruning = pruned(training=True)
    model(images_for(model))
    with pytest.raises(prunex.PrunexError, match="give one class index for each of the 3 images"):
        pruning.losses(labels)


def test_the_class_is_registered():
    assert prunex.registry.lookup("pruner", "ia_red2").make is IARED2
