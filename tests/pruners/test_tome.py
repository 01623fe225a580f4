"""ToMe: a slow rewrite, what merging conserves, proportional attention, schedules, costs, and other patches missing."""

import math

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.pruners.tome import match, match_present, schedule
from prunex.removal.game import Removal
from prunex.vit import attention, forward
from prunex.vit.anatomy import read
from prunex.vit.attention import KeyWeights
from prunex.vit.decisions import Merge, apply
from prunex.vit.forward import resume
from prunex.vit.policy import under_policy
from prunex.vit.replay import Absent
from prunex.vit.state import TokenState
from prunex.vit.tape import Tape
from prunex.vit.trace import TokenTrace
from tests.vit.test_cost import counted
from tests.vits import geometry, images, images_for, largest, relative, tiny

SHOWN = ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_no_class", "avg_pool_no_class_reg", "qk_norm",
         "layer_scale", "avg_pool_prefix", "avgmax_pool"]  # fmt: skip


def slow_matching(keys, r, prefix):
    """One image's groups of patch positions, in the order of the tokens after merging; loops over the definition."""
    n, alternate = len(keys), prefix <= 2
    if min(r, n // 2) <= 0:
        return [[i] for i in range(n)]
    first = [i for i in range(n) if ((i + prefix) % 2 == 0 if alternate else i % 2 == 0)]
    second = [i for i in range(n) if i not in first]
    best = []
    for i in first:
        cosines = [float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm())) for j in second]
        best.append((max(cosines), i, second[cosines.index(max(cosines))]))
    chosen = sorted(best, key=lambda b: -b[0])[: min(r, n // 2)]
    gone = {i: j for _, i, j in chosen}
    return [[i] for i in first if i not in gone] + [[j] + [i for i in gone if gone[i] == j] for j in second]


@torch.no_grad()
def slow(model, image, rs, proportional=True):
    """One image through a merging ViT in float64, token by token where tokens merge; logits and groups of patches."""
    prefix = model.num_prefix_tokens
    x = forward.embed(model, image[None])[0][0]
    size = [1] * len(x)
    groups = [[p] for p in range(len(x) - prefix)]
    for block, r in zip(model.blocks, rs, strict=True):
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y).view(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        q, k = attn.q_norm(q), attn.k_norm(k)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if proportional:
            scores = scores + torch.tensor(size, dtype=x.dtype).log()
        out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + block.ls1(attn.proj(out))
        merged = slow_matching(k.mean(0)[prefix:], r, prefix)
        means = [sum(size[prefix + i] * x[prefix + i] for i in g) / sum(size[prefix + i] for i in g) for g in merged]
        groups = [sorted(p for i in g for p in groups[i]) for g in merged]
        size = size[:prefix] + [sum(size[prefix + i] for i in g) for g in merged]
        x = torch.cat([x[:prefix], torch.stack(means)])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x, weight = model.norm(x), torch.tensor(size, dtype=x.dtype)
    start = 0 if model.pool_include_prefix else prefix
    body, weight = x[start:], weight[start:]
    mean = (weight[:, None] * body).sum(0) / weight.sum()
    if model.global_pool == "token":
        pooled = x[0]
    else:
        pooled = mean if model.global_pool == "avg" else 0.5 * (mean + body.amax(0))
    if hasattr(model, "head_dist"):
        return (model.head(x[0]) + model.head_dist(x[1])) / 2, groups
    return model.head(model.fc_norm(pooled)), groups


@pytest.mark.parametrize("family", SHOWN)
@pytest.mark.parametrize("proportional", [True, False])
def test_a_slow_rewrite_gives_the_same(family, proportional):
    model = tiny(family).double()
    x = images_for(model, 2)
    with prunex.attach(model, "tome", r=[3, 5, 0, 1], proportional=proportional) as pruning, torch.no_grad():
        logits, groups = model(x), pruning.trace.groups().flatten(1)
    for i in range(2):
        wanted, patches = slow(model, x[i], [3, 5, 0, 1], proportional)
        assert largest(logits[i], wanted) < 1e-10
        assert [(groups[i] == g).nonzero()[:, 0].tolist() for g in range(len(patches))] == patches


@pytest.mark.parametrize("family", ["vit", "layer_scale", "qk_norm", "dinov2_reg", "attn_norm"])
@pytest.mark.parametrize("r", [0, [0, 0], []])
def test_nothing_merged_is_the_dense_model(family, r):
    model = tiny(family)
    x = images_for(model)
    with torch.no_grad():
        dense = model(x)
        with prunex.attach(model, "tome", r=r) as pruning:
            assert largest(model(x), dense) <= 1e-6
            assert pruning.trace.stages == []
            assert pruning.trace.kept().all()


@pytest.fixture
def merges(monkeypatch):
    """What every merge found and left: (tokens before, sizes before, state after), in order."""
    seen, real = [], apply

    def watched(answer, block, when, state, entered):
        before = state.tokens, state.sizes
        stages = real(answer, block, when, state, entered)
        if answer is not None:
            seen.append((*before, state.tokens, state.sizes, state.policy, stages[0]))
        return stages

    monkeypatch.setattr("prunex.vit.turns.apply", watched)
    return seen


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_a_merge_conserves(family, masked, merges):
    model = tiny(family).double()
    prefix = model.num_prefix_tokens
    with prunex.attach(model, "tome", r=4) as pruning, torch.no_grad():
        pruning.masked = masked
        model(images_for(model))
        trace = pruning.trace
    assert [s.counted for s in trace.stages][0] == 12
    assert len(merges) == 4
    for before, old, after, sizes, policy, stage in merges:
        old = torch.ones(before.shape[:2], dtype=torch.float64) if old is None else old
        there = torch.ones_like(sizes) if policy is None else policy
        assert (there[:, :prefix] == 1).all()
        assert torch.equal((sizes * there).sum(1), torch.full((3,), 16.0 + prefix, dtype=torch.float64))
        assert (sizes[:, :prefix] == 1).all()
        assert torch.equal(before[:, :prefix], after[:, :prefix])  # bit for bit
        old_there = torch.cat([torch.ones(3, prefix), (stage.group >= 0)], 1)
        first = ((old * old_there).unsqueeze(2) * before).sum(1)
        assert largest(((sizes * there).unsqueeze(2) * after).sum(1), first) < 1e-10
        shares = stage.push(torch.ones(3, prefix + stage.group.shape[1], dtype=torch.float64), prefix)
        assert largest(shares, torch.ones_like(shares)) < 1e-12  # shares of a group sum to 1
        if masked:
            assert after.shape[1] == prefix + 16
    counts = torch.nn.functional.one_hot(trace.groups().flatten(1), 16).sum(1)
    assert torch.equal(counts.sum(1), torch.tensor([16] * 3))
    assert largest(trace.share().flatten(1), 1 / counts.gather(1, trace.groups().flatten(1))) < 1e-6
    assert torch.equal(trace.kept().flatten(1), counts.gather(1, trace.groups().flatten(1)) == 1)
    assert trace.left().tolist() == [pruning_left(16, 4, 4)] * 3
    assert [float(v[0]) for v in trace.keep_ratios()] == [0.75, 0.5, 0.25, 0.125]
    assert torch.equal(trace.tokens(), trace.groups().flatten(1))


def pruning_left(n, r, blocks):
    """Patch tokens after blocks that merge r, never more than half."""
    for _ in range(blocks):
        n -= min(r, n // 2)
    return n


def test_garbage_in_emptied_slots_reaches_nobody():
    model = tiny().double()
    x = images_for(model)
    with prunex.attach(model, "tome", r=4, stages=(0, 1)) as pruning, torch.no_grad():
        pruning.masked = True
        logits, real = model(x), model.blocks[1].norm1.forward

        def poisoned(t):
            t = t.clone()
            t[:, 1 + 12 :] = 1e3 * torch.randn(3, 4, 48, dtype=t.dtype)
            return real(t)

        model.blocks[1].norm1.forward = poisoned
        assert largest(model(x), logits) < 1e-9


def test_a_token_of_size_k_is_k_tokens():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 8, generator=generator, dtype=torch.float64)
    times = torch.tensor([1, 3, 1, 2, 1, 5, 1])
    index = torch.arange(7).repeat_interleave(times)
    sizes = times.double().expand(2, -1)
    keys, scale = KeyWeights(sizes=sizes), 8**-0.5
    wanted = attention.fused(q[:, :, index], k[:, :, index], v[:, :, index])
    first = times.cumsum(0) - times  # one of each token's copies
    assert largest(attention.fused(q, k, v, keys=keys), wanted[:, :, first]) < 1e-12
    assert largest(attention.matrix(q, k, scale, keys=keys) @ v, wanted[:, :, first]) < 1e-12
    fewer = attention.rows(q[:, :, :1], k, scale, keys=keys)
    copies = attention.rows(q[:, :, :1], k[:, :, index], scale)
    assert largest(fewer, torch.zeros(2, 7, dtype=torch.float64).index_add(1, index, copies)) < 1e-12
    policy = torch.ones(2, 7, dtype=torch.float64)
    policy[0, 3:5] = 0
    policy.requires_grad_()
    masked = under_policy(q, k, v, policy, scale, sizes=sizes)
    whole = attention.matrix(q, k, scale, policy, keys) @ v
    assert largest(masked, whole) < 1e-10
    scores = (q * scale) @ k.mT + sizes.log()[:, None, None]
    own = torch.eye(7, dtype=torch.float64)
    weight = scores.exp() * (policy[:, None, None] * (1 - own) + own)
    exact = weight @ v / weight.sum(-1, keepdim=True)
    upstream = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    got, want = (torch.autograd.grad(t, policy, upstream, retain_graph=True)[0] for t in (masked, exact))
    assert relative(got, want) < 1e-10
    assert largest(masked, exact) < 1e-10


@pytest.mark.parametrize("rule", ["log", "shift", "scale"])
def test_sizes_and_other_weights_of_keys_hold_together(rule):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 8, generator=generator, dtype=torch.float64)
    factor, sizes = (torch.rand(2, 2, 7, generator=generator, dtype=torch.float64) + 0.5).unbind(0)
    scores = (q @ k.mT) * 8**-0.5
    f = factor[:, None, None]
    if rule == "log":
        scores = scores + f.log()
    else:
        lowest = scores.amin(-1, keepdim=True) if rule == "shift" else 0
        scores = (scores - lowest) * f
    wanted = (scores.exp() * sizes[:, None, None]) / (scores.exp() * sizes[:, None, None]).sum(-1, keepdim=True)
    keys = KeyWeights(factor, rule, sizes)
    assert largest(attention.matrix(q, k, 8**-0.5, keys=keys), wanted) < 1e-12
    assert largest(attention.fused(q, k, v, keys=keys), wanted @ v) < 1e-12
    assert largest(attention.rows(q, k, 8**-0.5, keys=keys), wanted.mean((1, 2))) < 1e-12


@pytest.mark.parametrize(("r", "tokens"), [(13, 41), (8, 101), (16, 11)])
def test_tokens_left_of_197(r, tokens):
    model = tiny(img_size=112, depth=12, embed_dim=12, num_heads=1)
    with prunex.attach(model, "tome", r=r) as pruning, torch.no_grad():
        assert model.forward_features(images_for(model, 1)).shape[1] == tokens
        assert pruning.counts()[-1] + 1 == tokens
        assert pruning.counts() == [int(pruning.trace.left(s)[0]) for s in range(len(pruning.trace.stages))]


def test_schedules():
    assert schedule(13, -1.0, 12) == (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)
    assert sum(schedule(13, -1.0, 12)) == 151
    assert schedule(13, 1.0, 12) == schedule(13, -1.0, 12)[::-1]
    assert schedule(13, 0.0, 12) == (13,) * 12
    assert schedule([3, 0, 4], 0.0, 5) == (3, 0, 4, 0, 0)
    assert schedule(5, -1.0, 1) == (10,)
    assert schedule(10, 0.9, 3)[0] == 1  # 10 (1 - 0.9) is 1, not the 0.999... of floats


@pytest.mark.parametrize(("r", "gmacs"), [(8, 3.42), (10, 3.13), (13, 2.70), (16, 2.29)])
def test_deit_small_costs_as_published(r, gmacs):
    model = geometry("deit_small_patch16_224")
    prunex.attach(model, "tome", r=r)
    found = prunex.cost(model)
    own = sum(prunex.attached(model).pruner.macs(n - 1) for n in found.tokens)
    assert (found.macs - own) / 1e9 == pytest.approx(gmacs, abs=0.006)
    assert own < 0.003 * found.macs
    with torch.device("meta"):
        assert found.macs == pytest.approx(counted(model, torch.randn(1, 3, 224, 224)), rel=0.01)


@pytest.mark.parametrize("family", SHOWN)
def test_costs_are_what_torch_counts_and_tokens_what_runs(family):
    model = tiny(family, img_size=64)
    prunex.attach(model, "tome", r=9, stages=(0, 2, 3))
    small, seen = prunex.slim(model), {"attn": [], "mlp": []}
    cost = prunex.cost(small)
    assert cost.macs == pytest.approx(counted(small, images(2, (64, 64))), rel=0.01)
    for block in small.blocks:
        for half, module in (("attn", block.attn.qkv), ("mlp", block.mlp)):
            module.register_forward_pre_hook(lambda _m, args, half=half: seen[half].append(args[0].shape[1]))
    small(images(1, (64, 64)))
    assert cost.tokens == seen["attn"]
    assert [b.mlp_tokens for b in cost.blocks] == seen["mlp"]


def test_ties_and_keys_of_length_zero():
    keys = torch.zeros(2, 6, 4)
    assert torch.equal(match(keys, 2)[0], torch.tensor([1, 1, 1, 2, 0, 3]))  # the earliest of equals
    keys[0, 3] = torch.tensor([1.0, 2.0, 0.0, 0.0])
    keys[0, 4] = 3 * keys[0, 3]
    group = match(keys, 1)
    assert group[0].tolist() == [0, 2, 1, 3, 3, 4]
    assert group[1].tolist() == match(keys[1:], 1)[0].tolist()
    for n in (2, 3, 5, 8):
        for odd in (False, True):
            found = match(torch.randn(3, n, 4, generator=torch.Generator().manual_seed(n)), n // 2, odd)
            assert all(set(row) == set(range(n - n // 2)) for row in found.tolist())


def test_tokens_that_are_not_there_take_no_part():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(4, 11, 5, generator=generator)
    present = torch.rand(4, 11, generator=generator) > 0.3
    present[3] = False
    present[3, 4] = True
    for odd in (False, True):
        found = match_present(keys, 3, odd, present)
        for i in range(4):
            own = keys[i, present[i]]
            wanted = match(own[None], min(3, len(own) // 2), odd)[0] if len(own) > 1 else torch.zeros(1)
            assert found[i, present[i]].tolist() == wanted.tolist()
            assert (found[i, ~present[i]] == -1).all()


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class"])
def test_absent_patches_hidden_or_gone_merge_alike(family):
    """The pruner decides anew among the patches that are there: in their slots, or without the others."""
    model = tiny(family).double()
    with prunex.attach(model, "tome", r=3) as pruning, torch.no_grad():
        x, grid = forward.embed(model, images_for(model))
        present = torch.ones(3, 16, dtype=torch.bool)
        present[:, 3:8] = present[1, 0] = False
        present[1, 5] = True
        gone = resume(model, x, grid, (Absent(present), pruning.pruner))
        hidden = resume(model, x, grid, (Absent(present, masked=True), pruning.pruner), masked=True)
        assert largest(hidden, gone) < 1e-10


@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class", "dinov2_reg"])
def test_frozen_merges_among_fewer_patches(family):
    """Removal games: dropped and hidden patches give the same values; all of them give the clean run's."""
    model = tiny(family).double()
    x = images_for(model, 2)
    coalitions = torch.rand(2, 6, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    coalitions[:, 0], coalitions[:, 1] = True, False
    coalitions[:, 2], coalitions[0, 2, 3] = False, True
    with prunex.attach(model, "tome", r=[3, 0, 5, 2]), torch.no_grad():
        values = [Removal(model, x, removal=how, output="logit")(coalitions) for how in ("drop", "mask")]
        assert largest(values[0], values[1]) < 1e-10
        assert largest(values[0][:, 0], model(x)) < 1e-10
        assert torch.isfinite(values[0]).all()
        adaptive = Removal(model, x, selection="free", output="logit")(coalitions)
        assert largest(adaptive[:, 0], model(x)) < 1e-10


def test_a_merge_among_absent_tokens_is_the_mean_of_the_others():
    model = tiny().double()
    anatomy = read(model)
    tokens = torch.randn(1, 5, 48, dtype=torch.float64)
    trace = TokenTrace((1, 4), 1, 1, tokens.device)
    state = TokenState(tokens, anatomy, trace, masked=True, training=False, left=4)
    state.policy = torch.tensor([[1.0, 1, 1, 0, 1]])
    apply(Merge(torch.tensor([[0, 1, 1, 1]]), 2), 0, "inside", state)
    assert largest(state.tokens[:, 1:3], torch.stack([tokens[:, 1], (tokens[:, 2] + tokens[:, 4]) / 2], 1)) < 1e-12
    assert state.policy.tolist() == [[1, 1, 1, 0, 0]]
    assert state.sizes.tolist() == [[1, 1, 2, 1, 1]]
    assert trace.groups().tolist() == [[[0, 1, -1, 1]]]
    assert trace.left().tolist() == [2]


def test_gradients_flow_through_the_means_alone():
    model = tiny("dinov2_reg").double().train()
    x = images_for(model)
    weight = model.blocks[1].mlp.fc2.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with prunex.attach(model, "tome", r=3) as pruning:
        model(x).square().sum().backward()
        analytic = float((weight.grad * direction).sum())
        groups, values = pruning.trace.groups(), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                weight.add_(step * direction)
                values.append(float(model(x).square().sum()))
                assert torch.equal(pruning.trace.groups(), groups)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert pruning.losses() == {}
    assert analytic == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_checkpointed_blocks_merge_alike():
    model = tiny().double().train()
    x = images_for(model)
    with prunex.attach(model, "tome", r=[3, 2, 4, 1]):
        found = []
        for recompute in (False, True):
            model.set_grad_checkpointing(recompute)
            model.zero_grad()
            model(x).square().sum().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert max(largest(found[0][n], found[1][n]) for n in found[0]) < 1e-12


def test_pooled_heads_count_patches_not_tokens():
    model = tiny("avg_pool_no_class").double()
    x = images_for(model)
    with prunex.attach(model, "tome", r=5) as pruning, torch.no_grad():
        features = model.forward_features(x)
        sizes = pruning._attached.handover.take(features).sizes
        by_size = (features * sizes.unsqueeze(2)).sum(1) / 16
        assert largest(model.forward_head(features, pre_logits=True), model.fc_norm(by_size)) < 1e-12
        assert largest(by_size, features.mean(1)) > 1e-3
        tape = Tape(rows=frozenset({3}))
        state = forward.record(model, x, tape)
        assert largest(tape.logits, model(x)) < 1e-12
        assert largest(tape.attended()[3].row.sum(1), torch.ones(3)) < 1e-12
        assert torch.equal(state.sizes, sizes)


def test_slim_save_and_load(tmp_path):
    model = tiny("deit_distilled")
    x = images_for(model)
    prunex.attach(model, "tome", r=[3, 1], proportional=False, stages=(1, 2, 3))
    with torch.no_grad():
        wanted, small = model(x), prunex.slim(model)
        assert torch.equal(small(x), wanted)
        loaded = prunex.load(prunex.save(small, tmp_path / "slim"))
        assert torch.equal(loaded(x), wanted)
    assert prunex.attached(loaded).spec == prunex.attached(model).spec
    assert prunex.attached(loaded).spec == {
        "method": "tome", "r": [3, 1], "proportional": False, "inflect": 0.0, "stages": [1, 2, 3]
    }  # fmt: skip


@pytest.mark.slow
def test_compiles_whole():
    from prunex.slim.export import Graph

    model = tiny(depth=2)
    prunex.attach(model, "tome", r=3)
    x = images_for(model)
    with torch.no_grad():
        wanted = model(x)
        assert relative(torch.compile(Graph(prunex.slim(model)).eval(), fullgraph=True)(x), wanted) < 1e-5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep_ratio": 0.7}, "unknown option of tome"),
        ({"r": -1}, "r=-1 is not allowed"),
        ({"r": 2.5}, "r=2.5 is not allowed"),
        ({"r": True}, "r=True is not allowed"),
        ({"r": "13"}, "r='13' is not allowed"),
        ({"r": (13, -1.0)}, r"the paper's pair \(r, f\) is r=r, inflect=f"),
        ({"r": [1, 2, 3, 4, 5]}, "has 5 values for 4 stages"),
        ({"r": [1, 2], "inflect": -1.0}, "a list says itself"),
        ({"r": 2, "inflect": 1.5}, "inflect=1.5 is not allowed"),
        ({"r": 2, "proportional": 1}, "proportional=1"),
        ({"r": 2, "stages": (4,)}, "goes beyond the model's 4 blocks"),
    ],
)
def test_bad_options_end_in_one_line(options, match):
    model = tiny()
    with pytest.raises(PrunexError, match=match) as caught:
        prunex.attach(model, "tome", **options)
    assert "\n" not in str(caught.value)
    assert prunex.attached(model) is None


def test_attention_pooling_counts_by_size():
    """A head that pools by attention sees a merged token as often as it has patches."""
    model = tiny("siglip").double()
    x = images_for(model)
    pruning = prunex.attach(model, "tome", r=[3, 0, 0, 0])
    with torch.no_grad():
        logits = model(x)
        tokens = model.forward_features(x)
        sizes = pruning._attached.handover.take(tokens).sizes
        pruning.masked = True
        assert largest(model(x), logits) < 1e-10
        for i in range(len(x)):
            spread = tokens[i].repeat_interleave(sizes[i].long(), 0)[None]
            wanted = model.fc_norm(model.attn_pool(spread))
            assert largest(model.head(wanted)[0], logits[i]) < 1e-10
        pruning.detach()
