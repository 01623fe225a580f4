"""IA-RED^2: its interpreter, its dropping, its reward and curriculum, and what it refuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex.pruners.ia_red2 import IARED2, Interpreter, bounded, policy_loss, reward
from prunex.vit.anatomy import read
from prunex.vit.decisions import Keep
from prunex.vit.forward import run
from prunex.vit.readout import head
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

                def rows(self):
                    return frozenset()

                def key_means(self):
                    return frozenset()

                def acts_after(self, block):
                    return False

                def acts_between(self, block):
                    return False

                def before(self, block, state):
                    found = self.script.get(block)
                    return None if found is None else Keep(found.nonzero().T)

            tokens, state = run(model, x[i : i + 1], a, (Gather(script),))
            assert tokens.shape[1] == a.prefix + counts[i]
            assert largest(head(model, tokens, None, a)[0], masked[i]) < 1e-12


@pytest.mark.parametrize("train", ["straight_through", "reward"])
@pytest.mark.parametrize("training", [False, True])
def test_dropping_is_permanent_and_scores_of_the_dropped_are_zero(train, training):
    model, pruning = pruned(stages=(0, 1, 2), training=training, train=train)
    policies = []
    real = prunex.vit.forward.apply

    def apply(answer, block, inside, state):
        stages = real(answer, block, inside, state)
        if answer is not None:
            policies.append(state.policy.detach().clone())
        return stages

    patch = pytest.MonkeyPatch()
    patch.setattr("prunex.vit.forward.apply", apply)
    pruning.masked = True
    try:
        for progress in (0.4, 0.9):
            policies.clear()
            pruning.progress = progress
            model(images_for(model, 6))
            assert len(policies) == (2 if train == "reward" and progress == 0.4 else 3)
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


def test_the_cost_proxy_by_hand():
    """Kept 0.5, 0.25, 0.25 in groups of 4 of 12 blocks: 1 - (0.5 + 0.75 + 0.75) / 3 = 1/3."""
    model, pruning = pruned(model=tiny(depth=12), stages=(0, 4, 8), count="fixed", keep_ratio=[0.5, 0.5, 1.0])
    with torch.no_grad():
        model(images_for(model))
    assert largest(pruning.pruner.proxy(pruning.trace), torch.full((3,), 1 / 3)) < 1e-6


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
        masks = pruning._attached.take()[-1].masks
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


def test_no_gradient_of_the_user_s_loss_passes_the_hard_policy():
    model, pruning = pruned(training=True, train="reward")
    for progress in (0.0, 0.3, 0.6, 0.9):
        pruning.progress = progress
        F.cross_entropy(model(images_for(model)), torch.tensor([0, 1, 2])).backward()
        assert all(p.grad is None for p in pruning.pruner.parameters())
    assert model.blocks[0].attn.qkv.weight.grad is not None


def test_the_policy_s_gradient_reaches_its_interpreter_alone():
    model, pruning = pruned(training=True, train="reward")
    pruning.progress = 0.5
    x = images_for(model, 16)
    model(x)
    losses = pruning.losses(torch.arange(16) % 5)
    assert set(losses) == {"policy"}
    losses["policy"].backward()
    first, second = (list(i.parameters()) for i in pruning.pruner.interpreters)
    assert all((p.grad == 0).all() for p in first)
    assert all(p.grad.abs().max() > 0 for p in second)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("prunex."))


def exact(p, value, baseline, bound):
    """d/dp of the expected reward, summed over all 2^N policies."""
    p = p.clone().requires_grad_()
    likely = bounded(p, bound)
    total = 0
    for bits in itertools.product((0.0, 1.0), repeat=len(p)):
        u = torch.tensor(bits, dtype=p.dtype)
        chance = (u * likely + (1 - u) * (1 - likely)).prod()
        total = total + chance * (value(u[None])[0] - baseline)
    return torch.autograd.grad(total, p)[0]


@pytest.mark.parametrize("bound", [0.8, 1.0])
def test_the_estimated_gradient_is_the_enumerated_one(bound):
    """N = 4, 1e5 draws: within 2 %."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.3, 0.6, 0.5, 0.8], dtype=torch.float64)

    def value(u):
        return reward(u.mean(1), (u[:, 1] > 0) & (u[:, 2:].sum(1) < 2), 1.0)

    baseline = float(value((p > 0.5).double()[None])[0])
    leaf = p.clone().requires_grad_()
    many = leaf.expand(100_000, -1)
    drawn = bounded(many.detach(), bound).bernoulli(generator=generator)
    loss = policy_loss(many, drawn, torch.ones_like(drawn, dtype=torch.bool), value(drawn) - baseline, bound)
    found, wanted = -torch.autograd.grad(loss, leaf)[0], exact(p, value, baseline, bound)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_patches_that_are_gone_have_no_part_in_the_gradient():
    p = torch.full((2, 3), 0.4).requires_grad_()
    there = torch.tensor([[True, False, True], [False, False, False]])
    drawn = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    policy_loss(p, drawn, there, torch.tensor([1.0, 1.0]), 0.8).backward()
    assert (p.grad[~there] == 0).all()
    assert (p.grad[there] != 0).all()
    assert p.grad[0, 0] < 0 < p.grad[0, 2]  # what paid becomes likelier


def test_reward_by_hand():
    found = reward(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([True, False, True]), 2.0)
    assert found.tolist() == [0.75, -2.0, 1.0]


def test_the_policy_loss_is_its_definition():
    """Against the greedy forward and labels put together by hand."""
    model, pruning = pruned(training=True, train="reward", stages=(1, 2), double=True, penalty=0.5, count="fixed")
    pruning.progress = 0.5  # the second group's turn
    x, labels = images_for(model, 8), torch.arange(8) % 5
    logits = model(x)
    trace, drawn = pruning.trace, pruning._attached.take()[-1].masks[-1]
    loss = pruning.losses(labels)["policy"]
    p, there = trace.stages[1].score, trace.kept(0).flatten(1)
    other = tiny().double()
    prunex.attach(other, "ia_red2", stages=(1, 2), keep_ratio=0.6)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        greedy = other(x).argmax(1)
    kept = prunex.attached(other).trace.kept().flatten(1).double().mean(1)
    mine = torch.where(logits.argmax(1) == labels, 1 - drawn.mean(1) ** 2, -0.5)
    base = torch.where(greedy == labels, 1 - kept**2, -0.5)
    q = 0.8 * p + 0.2 * (1 - p)
    chance = (there * (drawn * q.log() + (1 - drawn) * (1 - q).log())).sum(1)
    assert largest(loss, -((mine - base) * chance).mean()) < 1e-9
    assert pruning.pruner.count == "fixed"
    assert model.training


def test_without_labels_the_dense_prediction_counts_as_right():
    model, pruning = pruned(training=True, train="reward", stages=(1,))
    pruning.progress = 0.0
    x = images_for(model, 8)
    torch.manual_seed(0)
    model(x)
    alone = pruning.losses()["policy"]
    with torch.no_grad():
        dense = tiny()(x).argmax(1)
    assert largest(pruning.losses(dense)["policy"], alone) < 1e-6
    assert largest(pruning.losses((dense + 1) % 5)["policy"], alone) > 1e-3


def test_the_curriculum_moves_one_thing_at_a_time():
    model, pruning = pruned(training=True, train="reward", stages=(0, 2))
    names = {id(p): n for n, p in model.named_parameters()}
    everything = set(names.values())

    def moving(progress):
        pruning.progress = progress
        return everything - {names[id(p)] for p in pruning.pruner.resting(model)}

    def of(*starts):
        return {n for n in everything if n.startswith(starts)}

    first, second = ("prunex.ia_red2.interpreters." + g for g in "01")
    assert moving(0.0) == of(first)
    assert moving(0.3) == of("blocks.", "norm.", "head.")
    assert moving(0.5) == of(second)
    assert moving(0.8) == moving(1.0) == of("blocks.2", "blocks.3", "norm.", "head.")
    pruning.progress = 0.3
    model(images_for(model))
    assert [s.block for s in pruning.trace.stages] == [0]  # the second group had no turn yet
    assert float(pruning.losses()["policy"].detach()) == 0
    model.eval()
    small = prunex.slim(model)
    with torch.no_grad():
        assert torch.equal(small(images_for(model)), model(images_for(model)))
    assert prunex.attached(small).options["keep_ratio"] == [0.6, 1.0]
    straight = prunex.attach(tiny(), "ia_red2").pruner
    assert straight.resting(model) == []


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
        ({"train": "rewards"}, "unknown train 'rewards': did you mean 'reward'"),
        ({"count": "variable"}, "unknown count 'variable'"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"penalty": -1}, "penalty=-1"),
        ({"bound": 2}, "bound=2"),
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


def test_reward_needs_the_model_s_own_head():
    model, pruning = pruned(model=tiny(num_classes=0), training=True, train="reward")
    pruning.progress = 0.0
    model(images_for(model))
    with pytest.raises(prunex.PrunexError, match="it gave no logits"):
        pruning.losses()


@pytest.mark.parametrize("labels", [torch.zeros(2, dtype=torch.long), torch.zeros(3), [0, 1, 2]])
def test_labels_that_do_not_fit(labels):
    model, pruning = pruned(training=True, train="reward")
    model(images_for(model))
    with pytest.raises(prunex.PrunexError, match="give one class index for each of the 3 images"):
        pruning.losses(labels)


def lamp(count, generator):
    """4 x 4 patches of noise; the sixth is bright or dark, and that is the class."""
    x = 0.5 * torch.randn(count, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    x[:, :, 8:16, 8:16] += (2.0 * labels - 1)[:, None, None, None]
    return x, labels


@pytest.mark.slow
def test_the_policy_finds_the_one_patch_that_decides_the_class():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = tiny(depth=2, num_classes=2).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(150):
        x, labels = lamp(64, generator)
        optimiser.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimiser.step()
    pruning = prunex.attach(model, "ia_red2", stages=(0,), train="reward", keep_ratio=0.5)
    pruning.progress = 0.0
    optimiser = torch.optim.Adam(pruning.pruner.parameters(), 2e-3)
    for _ in range(1500):
        x, labels = lamp(64, generator)
        optimiser.zero_grad()
        model(x)
        pruning.losses(labels)["policy"].backward()
        optimiser.step()
    model.eval()
    x, labels = lamp(500, generator)
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == labels).float().mean())
    kept = pruning.trace.kept().flatten(1).float().mean(0)
    print(accuracy, kept)
    assert accuracy > 0.97
    assert kept[5] > 0.99
    assert float(kept.sum()) < 2


def test_the_class_is_registered():
    assert prunex.registry.lookup("pruner", "ia_red2").make is IARED2
