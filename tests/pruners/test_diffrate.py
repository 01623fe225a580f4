"""DiffRate: its rates, inference against a slow rewrite, training under masks, its loss, and what it refuses."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from prunex.callbacks import TokenPruning, load_from_checkpoint
from prunex.pruners.diffrate import DiffRate, Rate, evenly, least_decided, most_alike
from prunex.vit import forward
from prunex.vit.anatomy import read
from prunex.vit.cost import count
from prunex.vit.decisions import Merge, apply
from prunex.vit.state import TokenState
from prunex.vit.trace import TokenTrace
from tests.callbacks.modules import Plain, loader, snapshot, trainer
from tests.vit.test_cost import counted
from tests.vits import geometry, images, images_for, largest, relative, tiny

SHOWN = ["vit", "deit_distilled", "dinov2_reg", "avg_pool", "avg_pool_prefix", "avg_pool_no_class", "qk_norm"]
# Patches left by pruning and by merging in each of four blocks: both, one alone, and neither.
TABLE = [(16, 16), (14, 11), (10, 10), (9, 6)]


def tables(model, table=TABLE):
    prune, merge = ([k + model.num_prefix_tokens for k in counts] for counts in zip(*table, strict=True))
    return {"prune_kept": prune, "merge_kept": merge}


def pruned(family="vit", double=False, table=TABLE, **options):
    model = tiny(family).double() if double else tiny(family)
    return model, prunex.attach(model, "diffrate", **tables(model, table), **options)


# -------------------------------------------------------------------------------------------------------------- rates


def test_a_rate_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    for patches, g in ((16, 1), (16, 4), (10, 3)):
        logits = torch.randn(len(range(patches, 0, -g)), generator=generator, dtype=torch.float64)
        rate = Rate(patches, g, logits)
        chance, counts = logits.softmax(0), list(range(patches, 0, -g))
        assert rate.candidates.tolist() == counts
        mean = sum(float(p) * c for p, c in zip(chance, counts, strict=True))
        assert int(rate.kept().detach()) == math.ceil(mean)
        (gradient,) = torch.autograd.grad(rate.kept(), rate.logits)
        for k, c in enumerate(counts):
            assert float(gradient[k]) == pytest.approx(float(chance[k]) * (c - mean), abs=1e-12)
        survival = rate.survival(patches).detach()
        for i in range(patches):
            above = sum(float(p) for p, c in zip(chance, counts, strict=True) if c > i)
            assert float(survival[i]) == pytest.approx(above)
        mask = rate.mask(3, 8, patches)
        assert mask.tolist() == [0.0 if 3 <= i < 8 else 1.0 for i in range(patches)]
        weight = torch.randn(patches, generator=generator, dtype=torch.float64)
        (through_mask,) = torch.autograd.grad((mask * weight).sum(), rate.logits)
        (through_survival,) = torch.autograd.grad((rate.survival(patches) * weight).sum(), rate.logits)
        assert largest(through_mask, through_survival) < 1e-12


@pytest.mark.parametrize(("patches", "g"), [(16, 1), (196, 1), (196, 4), (50, 7)])
def test_starts_are_rounded_up_to_the_counts(patches, g):
    low = (patches - 1) % g + 2
    counts = [low, low + 1, patches // 2, patches - 1, patches]
    for logits, wanted in zip(least_decided(patches, g, counts), counts, strict=True):
        assert int(Rate(patches, g, logits).kept().detach()) == wanted
        # Of all distributions with a mean, that with linear logits has the largest entropy.
        steps = logits.diff()
        assert largest(steps, steps.mean().expand_as(steps)) < 1e-3 * max(1.0, float(steps.abs().max()))


def test_half_is_the_authors_uniform_start():
    (logits,) = least_decided(16, 1, [9])  # 8.5 is the mean of 1..16
    assert largest(logits, torch.zeros(16)) < 1e-6


def test_shares_halve_what_leaves_between_the_two():
    assert evenly((0.5, 1.0, 0.5), 16, 2) == [(12, 8), (8, 8), (6, 4)]
    assert evenly((0.01, 0.01), 16, 2) == [(9, 2), (2, 2)]


# ---------------------------------------------------------------------------------------------------------- inference


@torch.no_grad()
def slow(model, image, table):
    """One image in float64, sorted and cut token by token as published; logits, and the patches of each token."""
    prefix = model.num_prefix_tokens
    x = forward.embed(model, image[None])[0][0]
    size = torch.ones(len(x), dtype=x.dtype)
    members = [{p} for p in range(len(x) - prefix)]
    for block, (prune, merge) in zip(model.blocks, table, strict=True):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        scores = attn.q_norm(q) @ attn.k_norm(k).mT / math.sqrt(q.shape[-1]) + size.log()
        weights = scores.softmax(-1)
        x = x + block.ls1(attn.proj((weights @ v).transpose(0, 1).flatten(1)))
        if model.global_pool == "token":
            row = weights.mean(0)[0]
        else:
            start = 0 if model.pool_include_prefix else prefix
            rows = weights.mean(0)[start:]
            row = (rows * (size[start:] / size[start:].sum())[:, None]).sum(0)
        order = row[prefix:].argsort(descending=True).tolist()[:prune]
        stays, joins = order[:merge], order[merge:]
        body, sizes, sets = x[prefix:], size[prefix:], members
        groups, worth = {i: [i] for i in stays}, {i: float(sizes[i]) for i in stays}
        for j in joins:
            alike = [float(F.cosine_similarity(body[j], body[i], 0)) for i in stays]
            at = stays[alike.index(max(alike))]
            groups[at].append(j)
            worth[at] += float(sizes[j]) * max(alike)
        x = torch.cat([x[:prefix], torch.stack([body[g].mean(0) for g in groups.values()])])
        size = torch.cat([size[:prefix], torch.tensor(list(worth.values()), dtype=x.dtype)])
        members = [set().union(*(sets[i] for i in g)) for g in groups.values()]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if model.global_pool == "token":
        pooled = x[0]
    else:
        start = 0 if model.pool_include_prefix else prefix
        pooled = (x[start:] * size[start:, None]).sum(0) / size[start:].sum()
    if hasattr(model, "head_dist"):
        return (model.head(x[0]) + model.head_dist(x[1])) / 2, members
    return model.head(model.fc_norm(pooled)), members


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("family", SHOWN)
def test_inference_is_the_definition(family, learns):
    model, pruning = pruned(family, True, learns=learns)
    x = images_for(model, 4)
    with torch.no_grad():
        logits = model(x)
    groups = pruning.trace.groups().flatten(1)
    assert pruning.counts() == [11, 10, 6]
    assert pruning.trace.left().tolist() == [6] * 4
    for i in range(4):
        wanted, members = slow(model, x[i], TABLE)
        assert largest(logits[i], wanted) < 1e-9
        ours = [set((groups[i] == g).nonzero().flatten().tolist()) for g in range(6)]
        assert sorted(map(sorted, ours)) == sorted(map(sorted, members))


@pytest.mark.parametrize("family", SHOWN)
@pytest.mark.parametrize("learns", [False, True])
def test_masked_equals_removed(family, learns):
    model, pruning = pruned(family, True, learns=learns)
    x = images_for(model)
    with torch.no_grad():
        removed, share, kept = model(x), pruning.trace.share(), pruning.trace.kept()
        pruning.masked = True
        assert largest(model(x), removed) < 1e-9
    assert largest(pruning.trace.share(), share) < 1e-9
    assert pruning.trace.kept().equal(kept)
    assert not kept.all()


def test_counts_that_keep_all_leave_the_model_as_it_is():
    model = tiny()
    x = images_for(model)
    with torch.no_grad():
        dense = model(x)
        for options in (tables(model, [(16, 16)] * 4), tables(model, [(99, 40)] * 4), {"keep_ratio": 1.0}):
            for learns in (False, True):
                with prunex.attach(model, "diffrate", learns=learns, **options) as pruning:
                    assert torch.equal(model(x), dense)
                    assert pruning.trace.stages == []
                    assert prunex.cost(model).macs == pruning.dense_macs()
                    assert torch.equal(model.train()(x), dense)
                    model.eval()


def test_pruned_tokens_are_in_nobody_and_others_in_one():
    model, pruning = pruned()
    with torch.no_grad():
        model(images_for(model))
    trace = pruning.trace.check()
    part = trace.composition()
    assert ((part > 0).sum(2) <= 1).all()
    gone = trace.groups().flatten(1) < 0
    assert (part.sum(2)[gone] == 0).all()
    assert gone.sum(1).gt(0).all()
    assert [stage.merged for stage in trace.stages] == [True, False, True]
    assert all(stage.score is not None for stage in trace.stages)
    counts = [stage.counted for stage in trace.stages]
    assert counts == sorted(counts, reverse=True)


def test_the_most_alike_of_those_that_stay():
    x = torch.tensor([[[1.0, 0], [0, 2], [3, 1], [0, 0], [-1, -1]]])
    partner, cosine = most_alike(x, torch.tensor([[0, 1]]), torch.tensor([[2, 3, 4]]))
    assert partner.tolist() == [[0, 0, 0]]  # of equally alike ones the first; a token of length 0 is like nobody
    assert largest(cosine, torch.tensor([[3 / 10**0.5, 0, -(0.5**0.5)]])) < 1e-6


def test_sizes_count_members_by_their_worth_and_tokens_at_least_once():
    model = tiny("avg_pool_no_class")
    state = TokenState(torch.randn(1, 4, 48), read(model), TokenTrace((2, 2), 0, 1, torch.device("cpu")), False, False)
    state.sizes = torch.tensor([[1.0, 3.0, 1.0, 2.0]])
    x = state.tokens.clone()
    worth = torch.tensor([[1.0, 0.5, 1.0, -0.9]])
    apply(Merge(torch.tensor([[0, 0, 1, 1]]), 2, even=True, worth=worth), 1, "inside", state)
    assert torch.equal(state.sizes, torch.tensor([[2.5, 1.0]]))
    assert largest(state.tokens, torch.stack([x[:, :2].mean(1), x[:, 2:].mean(1)], 1)) < 1e-6


# ------------------------------------------------------------------------------------------------------- what it costs


def test_the_authors_table_costs_what_they_publish():
    """DeiT-S at 2.9 G; theirs embeds the class token too, and counts no ranking and no matching."""
    model = geometry()
    prune = [197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3]
    merge = [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]
    pruning = prunex.attach(model, "diffrate", prune_kept=prune, merge_kept=merge)
    assert pruning.pruner.stages == tuple(range(1, 12))
    assert pruning.counts() == [k - 1 for k in merge[1:]]
    whole = prunex.cost(model).macs
    pruning.pruner.macs = lambda *_: 0
    alone = count(model, pruning.pruner).macs
    assert (alone + 384 * 3 * 16 * 16) / 1e9 == pytest.approx(2.9053, abs=5e-5)
    assert alone < whole < 1.005 * alone


@pytest.mark.parametrize("learns", [False, True])
def test_cost_is_what_runs(learns):
    model, _ = pruned(learns=learns)
    assert prunex.cost(model).macs == pytest.approx(counted(model, images_for(model, 1)), rel=0.01)


@pytest.mark.parametrize("budget", [0.9, 0.65, 0.4, "2.9GMACs"])
def test_budgets(budget):
    model = geometry()
    pruning = prunex.attach(model, "diffrate", budget=budget)
    wanted = 2.9e9 if isinstance(budget, str) else budget * pruning.dense_macs()
    assert prunex.cost(model).macs == pytest.approx(wanted, rel=0.01)
    assert pruning.meets(budget)
    assert pruning.pruner.aim == pytest.approx(wanted / pruning.dense_macs(), rel=0.01)
    twin = geometry()
    again = prunex.attach(twin, **json.loads(json.dumps(pruning.spec)))
    assert again.counts() == pruning.counts()
    assert prunex.cost(twin).macs == prunex.cost(model).macs


# ----------------------------------------------------------------------------------------------------------- training


def learning(family="vit", double=True, **options):
    model, pruning = pruned(family, double, **options)
    return model.train(), pruning


def test_the_loss_is_the_square_of_what_the_cost_misses():
    model, pruning = learning(target=0.5, flops_weight=7.0)
    model(images_for(model))
    losses = pruning.losses()
    share = prunex.cost(model).macs / pruning.dense_macs()
    assert losses.keys() == {"flops"}
    assert float(losses["flops"].detach()) == pytest.approx(7 * (share - 0.5) ** 2, rel=1e-6)
    model, pruning = learning()
    model(images_for(model))
    assert float(pruning.losses()["flops"].detach()) == pytest.approx(0, abs=1e-12)  # it starts where it shall end


def test_the_cost_s_gradient_is_that_of_tokens_in_closed_form():
    """Of a block's counts both have the gradient of its MLP and of the next block's attention, and of nothing later."""
    model, pruning = learning()
    dense, width, prefix = pruning.dense_macs(), 48, 1
    pruning.pruner._share(model, (4, 4)).backward()
    left = [11, 10, 6]
    for s, alive in enumerate(left):
        slope = 8 * width**2
        if s < 2:
            slope += 4 * width**2 + 4 * (alive + prefix) * width
        for rates in (pruning.pruner.prune, pruning.pruner.merge):
            rate = rates[s]
            (wanted,) = torch.autograd.grad(rate.kept(), rate.logits)
            assert relative(rate.logits.grad, wanted * slope / dense) < 1e-6


def test_masks_and_gradients_are_those_of_ranks():
    """In the first block that cuts, before anything else is between: against ranks by hand."""
    model, pruning = learning(table=[(16, 16), (12, 9), (16, 16), (16, 16)])
    x = images_for(model)
    model(x)
    (stage,) = pruning.trace.stages
    made = pruning._attached.forwards[-1]
    score, mask = made.trace.stages[0].score.detach(), made.masks[-1]
    rank = (score.unsqueeze(1) > score.unsqueeze(2)).sum(2)
    assert torch.equal(mask.detach(), (rank < 9).double())
    assert stage.counted == 9
    weight = torch.randn(mask.shape, dtype=mask.dtype)
    for kind, alive in (("prune", (rank < 9) | (rank >= 12)), ("merge", rank < 12)):
        # The other mask is a factor: nothing passes where it is 0, which is among those that are there when it is made.
        rate = getattr(pruning.pruner, kind)[0]
        (got,) = torch.autograd.grad((mask * weight).sum(), rate.logits, retain_graph=True)
        (wanted,) = torch.autograd.grad((rate.survival(16)[rank] * weight * alive).sum(), rate.logits)
        assert largest(got, wanted) < 1e-9
    assert pruning.trace.kept().flatten(1).sum(1).le(9).all()


def test_what_is_masked_in_training_reaches_no_logit():
    model, pruning = learning()
    x = images_for(model)
    with torch.no_grad():
        logits = model(x)
        hidden = pruning._attached.trace.stages[1]
        gone = torch.ones(3, 16, dtype=torch.bool).scatter(1, hidden.group.clamp(min=0), False)
        assert gone.sum(1).tolist() == [6, 6, 6]
        real = model.blocks[3].norm1.forward

        def poisoned(t):
            t = t.clone()
            t[:, 1:][gone] = 50 * torch.randn(18, 48, dtype=t.dtype)
            return real(t)

        model.blocks[3].norm1.forward = poisoned
        assert largest(model(x), logits) < 1e-9


def test_training_on_what_is_pruned_alone_is_inference():
    """Without merging nothing is attenuated, so that masks in training and removal at inference agree."""
    model, pruning = learning(table=[(16, 16), (12, 16), (9, 16), (5, 16)])
    x = images_for(model)
    with torch.no_grad():
        trained = model(x)
        assert largest(model.eval()(x), trained) < 1e-9
    assert pruning.counts() == [12, 9, 5]


@pytest.mark.parametrize("family", ["vit", "avg_pool", "avg_pool_no_class", "dinov2_reg", "dinov3", "beit", "siglip"])
def test_gradients_reach_all_rates_that_remove_anything(family):
    model = tiny(family)
    pruning = prunex.attach(model, "diffrate", keep_ratio=0.7)
    assert pruning.pruner.stages == ((1, 2, 3) if model.global_pool == "token" else (1, 2))
    logits = model.train()(images_for(model))
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for rates in (pruning.pruner.prune, pruning.pruner.merge):
        for block, rate in zip(pruning.pruner.stages, rates, strict=True):
            read_later = block < 3 or model.global_pool != "token"
            assert (rate.logits.grad is not None) == read_later
            assert rate.logits.grad is None or float(rate.logits.grad.abs().max()) > 0
    sum(pruning.losses().values()).backward()
    assert all(p.grad is not None for p in pruning.pruner.parameters())


def test_a_batch_in_training_is_its_images():
    model, _ = learning()
    x = images_for(model, 4)
    with torch.no_grad():
        together = model(x)
        for i in range(4):
            assert largest(model(x[i : i + 1])[0], together[i]) < 1e-9


def test_rates_learn_the_target_by_hand_while_the_weights_stay():
    model = tiny().requires_grad_(False)
    pruning = prunex.attach(model, "diffrate", keep_ratio=0.9, target=0.5, flops_weight=1000.0)
    before = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("prunex")}
    optimizer = torch.optim.AdamW(pruning.pruner.parameters(), lr=0.2, weight_decay=0)
    x, labels = images(8), torch.arange(8) % 5
    start = prunex.cost(model).macs
    for _ in range(60):
        loss = F.cross_entropy(model.train()(x), labels) + sum(pruning.losses().values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert start / pruning.dense_macs() > 0.65
    assert prunex.cost(model).macs / pruning.dense_macs() == pytest.approx(0.5, abs=0.05)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_a_table_that_does_not_learn_is_fine_tuned_without_slots():
    model, pruning = pruned(learns=False)
    model.train()(images_for(model)).sum().backward()
    assert pruning.losses() == {}
    assert not list(pruning.pruner.parameters())
    assert pruning.trace.stages[-1].n_out == 6
    assert model.blocks[0].attn.qkv.weight.grad is not None


# ------------------------------------------------------------------------------------------------------- in a Trainer


def test_the_callback_holds_the_weights_still_and_gives_them_back(tmp_path):
    module = Plain(lr=0.01, optimiser="adamw")
    module.vit.blocks[0].norm1.requires_grad_(False)
    callback = TokenPruning("diffrate", keep_ratio=0.8, options={"target": 0.5})
    start = snapshot(module)
    run = trainer(tmp_path, callback, max_epochs=2)
    run.fit(module, loader())
    after = snapshot(module)
    assert all(torch.equal(after[n], p) for n, p in start.items())
    moved = [p for n, p in module.named_parameters() if ".prunex." in n]
    fresh = DiffRate(read(tiny()), 0.8, target=0.5)
    assert any(largest(p, q) > 0.01 for p, q in zip(moved, fresh.parameters(), strict=True))
    assert {n for n, p in module.vit.named_parameters() if not p.requires_grad} == {
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
    }


def test_whoever_wants_it_trains_both(tmp_path):
    module = Plain(lr=0.01, optimiser="adamw")
    start = snapshot(module)
    trainer(tmp_path, TokenPruning("diffrate", keep_ratio=0.8, backbone_lr_scale=1.0)).fit(module, loader())
    assert any(not torch.equal(snapshot(module)[n], p) for n, p in start.items())


def test_learned_rates_come_back_from_checkpoints_and_slim_models_hold_the_counts(tmp_path):
    module = Plain(lr=0.01, optimiser="adamw")
    callback = TokenPruning("diffrate", keep_ratio=0.9, options={"target": 0.5, "flops_weight": 1000.0}, lr_scale=20.0)
    run = trainer(tmp_path, callback, max_epochs=5)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    pruning = prunex.attached(module)
    assert pruning.counts() != DiffRate(read(tiny()), 0.9).counts(16)
    x = images(3)
    with torch.no_grad():
        wanted = module.eval()(x)
        again = load_from_checkpoint(Plain, tmp_path / "a.ckpt").eval()
        assert torch.equal(again(x), wanted)
        small = prunex.slim(module)
        assert torch.equal(small(x), wanted)
        options = prunex.attached(small).options
        assert "keep_ratio" not in options
        assert [k - 1 for k in options["merge_kept"]][0] == 16
        assert prunex.attached(small).counts() == pruning.counts()
        assert not list(prunex.attached(small).pruner.parameters())
        prunex.save(small, tmp_path / "small")
        loaded = prunex.load(tmp_path / "small")
        assert torch.equal(loaded(x), wanted)
        assert prunex.attached(loaded).spec == prunex.attached(small).spec


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_kept": [17, 9]}, r"prune_kept=\[17, 9\] is not allowed: give one count for each of the 4 blocks"),
        ({"merge_kept": 9}, "merge_kept=9 is not allowed: give one count for each"),
        ({"merge_kept": [17, 9.0, 8, 7]}, "merge_kept of a block=9.0 is not allowed: give a whole number"),
        ({"merge_kept": [17, 1, 8, 7]}, "merge_kept of a block=1 is not allowed: give a whole number of at least 2"),
        ({"merge_kept": [17, 9, 8, 2]}, "a count of 2 is not allowed with granularity=1, whose rates learn 3 and more"),
        (
            {"merge_kept": [17, 9, 8, 5], "granularity": 4},
            "a count of 5 is not allowed with granularity=4, whose rates learn 6 and more",
        ),
        ({"keep_ratio": 0.5, "prune_kept": [17, 9, 8, 7]}, "keep_ratio=0.5 and prune_kept all say how much is kept"),
        ({"keep_ratio": [0.5]}, r"keep_ratio=\[0.5\] has 1 values for 3 stages"),
        ({"granularity": 0}, r"granularity=0 is not allowed: give a whole number in 1..15"),
        ({"granularity": 16}, r"granularity=16 is not allowed"),
        ({"target": 1.5}, r"target=1.5 is not allowed: give a number in \(0, 1\]"),
        ({"flops_weight": -1}, "flops_weight=-1 is not allowed"),
        ({"learns": 1}, "learns=1"),
        ({"stages": [5]}, "goes beyond the model's 4 blocks"),
        ({"r": 3}, "unknown option of diffrate"),
    ],
)
def test_bad_options(options, message):
    model = tiny()
    with pytest.raises(PrunexError, match=message) as caught:
        prunex.attach(model, "diffrate", **options)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "prunex")


def test_smallest_counts_without_learning():
    model = tiny()
    pruning = prunex.attach(model, "diffrate", merge_kept=[17, 9, 5, 2], learns=False)
    with torch.no_grad():
        assert torch.isfinite(model(images_for(model))).all()
    assert pruning.counts() == [8, 4, 1]
    assert prunex.attach(tiny(), **pruning.spec).spec == pruning.spec


def test_images_of_another_size_are_cut_to_as_many():
    model = tiny("dynamic")
    pruning = prunex.attach(model, "diffrate", **tables(model))
    with torch.no_grad():
        for size in ((48, 48), (24, 24)):
            model(images(2, size))
            assert pruning.trace.left().tolist() == [pruning.counts(size[0] * size[1] // 64)[-1]] * 2
            assert prunex.cost(model, size).blocks[3].mlp_tokens == 1 + pruning.counts(size[0] * size[1] // 64)[-1]
    model.train()(images(2, (48, 48))).sum().backward()
    assert torch.isfinite(sum(pruning.losses().values()))
