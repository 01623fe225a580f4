"""Patch Slimming: score and search against slow float64 rewrites, the slimmed block, its sets and their cost."""

import copy
import importlib.util
import itertools
import math

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from prunex.pruners.base import calibration_images
from prunex.pruners.patch_slimming_search import Search, impact
from prunex.removal.game import Removal
from prunex.vit.anatomy import read
from prunex.vit.embedding import embed
from prunex.vit.forward import resume, run, through
from prunex.vit.recorder import Recorder
from prunex.vit.replay import Absent, Replay
from prunex.vit.tape import Tape
from tests.vit.test_cost import counted
from tests.vits import FAMILIES, assert_same_state, geometry, images, images_for, largest, state_of, tiny

WITH_CLASS_TOKEN = [name for name in FAMILIES if not name.startswith(("avg", "max"))]  # pooled ones are refused
SIXTEEN = list(range(16))
KEEP = [[0, 1, 3, 4, 5, 6, 8, 9, 11, 12, 14], [0, 1, 4, 5, 8, 12, 14], [1, 5, 12]]


def keep_for(model, seed=0):
    """Random nested sets, the first one whole."""
    patches = math.prod(model.patch_embed.grid_size)
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(order[: round(patches * share)]) for share in (1.0, 0.7, 0.4)][-len(model.blocks) + 1 :]


def slimmed(model, keep=None, **options):
    return prunex.attach(model, "patch_slimming", keep=keep_for(model) if keep is None else keep, **options)


# --------------------------------------------------------------------------------------------------------------------
# The slimmed block and the slimmed model.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slim_block_computes_rows_of_the_dense_block(family):
    model, anatomy = tiny(family), read(tiny(family))
    x, _ = embed(model, images_for(model))
    block = model.blocks[1]
    dense = block(x).detach()
    every = tuple(range(x.shape[1]))
    assert largest(through(block, x, anatomy)[0], dense) == 0
    assert largest(through(block, x, anatomy, every)[0], dense) < 1e-6 * max(1, float(dense.abs().max()))
    some = (*range(anatomy.prefix), 5, 9, 10)
    for queries in (some, torch.tensor(some)):
        rows = through(block, x, anatomy, queries)[0]
        assert rows.shape == (3, anatomy.prefix + 3, 48)
        assert largest(rows, dense[:, list(some)]) < 1e-6 * max(1, float(dense.abs().max()))


@pytest.mark.parametrize("train", [False, True])
def test_only_the_queries_wanted_are_computed_with_gradients_of_the_dense_block(train):
    model, anatomy = tiny().double().train(train), read(tiny())
    x, _ = embed(model, images_for(model))
    x = x.detach().requires_grad_()
    block = model.blocks[1]
    some = torch.tensor([0, 3, 7])
    weight = torch.randn(3, 3, 48, generator=torch.Generator().manual_seed(0)).double()
    wanted = torch.autograd.grad((block(x)[:, some] * weight).sum(), [x, *block.parameters()], allow_unused=True)
    found = torch.autograd.grad(
        (through(block, x, anatomy, some)[0] * weight).sum(), [x, *block.parameters()], allow_unused=True
    )
    assert all((a is None) == (b is None) for a, b in zip(found, wanted, strict=True))
    assert max(largest(a, b) for a, b in zip(found, wanted, strict=True) if a is not None) < 1e-12


@pytest.mark.parametrize("instead", ["hook", "adapter"])
def test_somebodys_hook_or_adapter_on_qkv_is_still_called(instead):
    model = tiny()
    x = images_for(model)
    wanted = (model, model.blocks[1].attn.qkv)
    with slimmed(model), torch.no_grad():
        plain = model(x)
        seen = []

        class Adapter(nn.Linear):
            def forward(self, y):
                seen.append(y.shape[1])
                return super().forward(y)

        qkv = wanted[1]
        if instead == "hook":
            qkv.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
        else:
            adapter = Adapter(48, 144)
            adapter.load_state_dict(qkv.state_dict())
            model.blocks[1].attn.qkv = adapter
        assert largest(model(x), plain) < 1e-6
        assert seen == [17]


def by_hand(model, x, keep):
    """The slimmed model by timm's own blocks: each whole, then its set's rows taken."""
    tokens, _ = embed(model, x)
    prefix, before = model.num_prefix_tokens, list(range(tokens.shape[1] - model.num_prefix_tokens))
    for block, positions in zip(model.blocks, [*keep, []], strict=True):
        rows = [*range(prefix), *(prefix + before.index(p) for p in positions)]
        tokens, before = block(tokens)[:, rows], positions
    return type(model).forward_head(model, model.norm(tokens))


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_the_model_is_its_blocks_one_after_another_and_masked_equals_removed(family):
    model = tiny(family).double()
    x, keep = images_for(model), keep_for(model)
    with torch.no_grad():
        dense, wanted = model(x), by_hand(model, x, keep)
        pruning = slimmed(model, keep)
        removed = model(x)
        assert largest(removed, wanted) < 1e-12
        assert largest(removed, dense) > 1e-6
        maps = [pruning.trace.kept(s) for s in range(2)]
        for stage, positions in zip(maps, keep[1:], strict=True):
            assert all(k.flatten().nonzero().flatten().tolist() == positions for k in stage)
        pruning.masked = True
        assert largest(model(x), removed) < 1e-11
        assert all(torch.equal(pruning.trace.kept(s), maps[s]) for s in range(2))
        assert [s.block for s in pruning.trace.stages] == [1, 2]  # a set that leaves nothing out is no stage
        pruning.masked = None
        for i in range(3):
            assert largest(model(x[i : i + 1])[0], removed[i]) < 1e-12
    assert largest(pruning.detach()(x), dense) == 0


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg"])
def test_prefix_tokens_come_out_and_nothing_else(family):
    model = tiny(family)
    pruning = slimmed(model)
    features = model.forward_features(images_for(model))
    assert features.shape[1] == model.num_prefix_tokens
    assert pruning.trace.kept().flatten(1).sum(1).tolist() == [6, 6, 6]  # the last set chosen


def test_dense_heads_get_their_grids_and_are_told_where_there_is_none():
    model = tiny().double()
    x, keep = images_for(model), keep_for(model)
    with torch.no_grad():
        with slimmed(model, keep) as pruning:
            features = model.forward_features(x)
            with pytest.raises(PrunexError, match="computed prefix tokens alone.*forward_intermediates"):
                pruning.trace.scatter(features)
            final, grids = model.forward_intermediates(x, fill=0.0)
            pruning.masked = True
            slots = model.forward_features(x)
            hidden = pruning.trace.scatter(slots)
        assert final.shape[1] == 1 + len(keep[-1])
        assert largest(final[:, :1], features) < 1e-12
        tokens = embed(model, x)[0]
        left = SIXTEEN
        for block, positions, grid in zip(model.blocks, [*keep, keep[-1]], grids, strict=True):
            tokens = block(tokens)[:, [0, *(1 + left.index(p) for p in positions)]]
            left = positions
            flat = grid.flatten(2).transpose(1, 2)
            assert largest(flat[:, left], tokens[:, 1:]) < 1e-12
            assert (flat[:, [p for p in SIXTEEN if p not in left]] == 0).all()
        assert largest(hidden.flatten(1, 2)[:, left], model.norm(tokens)[:, 1:]) < 1e-11


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_masked_model(checkpointing):
    model = tiny().double().train()
    model.set_grad_checkpointing(checkpointing)
    x = images_for(model)
    pruning = slimmed(model)

    def step(masked):
        pruning.masked = masked
        model.zero_grad()
        model(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    removed, masked = step(None), step(True)
    assert max(largest(removed[n], masked[n]) / (1 + float(removed[n].abs().max())) for n in removed) < 1e-9


@pytest.mark.parametrize("train", [False, True])
def test_detach_restores_bit_for_bit(train):
    model = tiny().train(train)
    before, x = state_of(model), images_for(model)
    dense = model(x)
    pruning = slimmed(model)
    model(x)
    pruning.detach()
    assert_same_state(model, before)
    assert torch.equal(model(x), dense)


def test_freshly_attached_it_is_dense():
    model = tiny()
    x = images_for(model)
    dense = model(x)
    pruning = prunex.attach(model, "patch_slimming")
    assert pruning.pruner.needs_calibration
    assert pruning.options["keep"] is None
    for masked in (None, True):
        pruning.masked = masked
        assert largest(model(x), dense) < 1e-5
        assert pruning.trace.kept().all()
        assert not pruning.trace.stages
    assert pruning.counts() == [16, 16, 16]
    assert prunex.cost(model).blocks[-1].mlp_tokens == 1


def test_replaying_its_decisions_gives_its_logits():
    model = tiny().double()
    x = images_for(model)
    with slimmed(model), torch.no_grad():
        logits = model(x)
        tokens, grid = embed(model, x)
        for tape in (None, Tape(attention=True)):
            state = run(model, x, recorder=Recorder(tape))
            again = torch.tensor([2, 2, 0])
            assert largest(resume(model, tokens[again], grid, (Replay(state.decisions, again),)), logits[again]) < 1e-12


# --------------------------------------------------------------------------------------------------------------------
# Patches that were never there.


def test_sets_follow_original_positions_where_patches_are_absent():
    model = tiny().double()
    x = images_for(model)
    tokens, grid = embed(model, x)
    present = torch.ones(3, 16, dtype=torch.bool)
    present[:, [0, 2, 5, 13]] = False  # 5 lies in every set, 13 in none
    with slimmed(model, KEEP) as pruning, torch.no_grad():
        own = pruning.pruner
        gone = resume(model, tokens, grid, (Absent(present), own))
        hidden = resume(model, tokens, grid, (Absent(present, masked=True), own), masked=True)
        assert largest(gone, hidden) < 1e-11
        alone = tokens[:, [0, *(1 + p for p in range(16) if present[0, p])]]
        left = [p for p in range(16) if present[0, p]]
        for block, positions in zip(model.blocks, [*KEEP, []], strict=True):
            here = [p for p in positions if present[0, p]]
            alone = block(alone)[:, [0, *(1 + left.index(p) for p in here)]]
            left = here
        assert largest(gone, type(model).forward_head(model, model.norm(alone))) < 1e-11
        present[1, 5], present[1, 13] = True, True
        present[1, [4, 3]] = False  # as many lack, and as many of the first set, but not of the second
        with pytest.raises(PrunexError, match="different numbers of the patches") as caught:
            resume(model, tokens, grid, (Absent(present), own))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("removal", ["drop", "mask"])
def test_removal_games_on_sets_of_positions(removal):
    model = tiny(img_size=24, depth=3).double()
    x = images_for(model, 2)
    z = torch.rand(2, 20, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    z[:, 0], z[:, 1] = True, False
    with slimmed(model, [[0, 2, 3, 4, 6, 7, 8], [2, 3, 7]]) as pruning, torch.no_grad():
        value = Removal(model, x, removal=removal, output="logit")
        found = value(z)
        tokens, grid = embed(model, x)
        for j in range(20):
            hidden = (Absent(z[:, j], masked=True), pruning.pruner)
            assert largest(found[:, j], resume(model, tokens, grid, hidden, masked=True)) < 1e-11
        if removal == "drop":  # deciding anew is deciding the same
            assert largest(Removal(model, x, selection="free", output="logit")(z), found) < 1e-12


# --------------------------------------------------------------------------------------------------------------------
# Score and search.


def test_the_recursion_is_the_sum_over_head_paths():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 2, 4, 4, generator=generator).double() for _ in range(3)]
    maps = [m / m.sum(-1, keepdim=True) for m in maps]
    z = torch.randn(2, 4, 3, generator=generator).double()
    kept = [[0, 1, 3], [0, 2]]  # rows of the two later layers; positions that enter are those of the layer before
    later = [maps[1][:, :, kept[0]], maps[2][:, :, :2, :3]]
    found = impact([maps[0], *later], z)
    for b, i in itertools.product(range(2), range(4)):
        total, paths = 0.0, 0
        for h0, h1, h2 in itertools.product(range(2), repeat=3):
            a = later[1][b, h2] @ later[0][b, h1]
            u = maps[0][b, h0] @ z[b].abs()
            total += float(torch.outer(a[:, i], u[i]).square().sum())
            paths += 1
        assert abs(float(found[b, i]) - total / paths) < 1e-10


def test_full_matrices_with_rows_set_to_zero_give_the_same_score():
    """As the paper writes it: N x N products with diag(m)."""
    generator = torch.Generator().manual_seed(1)
    maps = [torch.rand(1, 2, 5, 5, generator=generator).double().softmax(-1) for _ in range(3)]
    z = torch.randn(1, 5, 3, generator=generator).double()
    first, second = [0, 1, 4], [0, 4]
    whole = torch.eye(5, dtype=torch.float64)
    for p, rows in ((maps[2][0], second), (maps[1][0], first)):
        m = torch.zeros(5, dtype=torch.float64)
        m[rows] = 1
        p = m[:, None] * p
        if rows == second:
            p = p * torch.zeros(5, dtype=torch.float64).index_fill(0, torch.tensor(first), 1)  # only these enter
        whole = torch.stack([p[h].T @ whole @ p[h] for h in range(2)]).mean(0)
    row = torch.stack([(maps[0][0, h] @ z[0].abs()).square().sum(1) for h in range(2)]).mean(0)
    slim = [maps[0], maps[1][:, :, first], maps[2][:, :, second][..., first]]
    assert largest(impact(slim, z)[0], whole.diagonal() * row) < 1e-12


def attention_of(block, x):
    """The softmax matrix of one timm block for one image [N, D], head by head, and its values."""
    attn, n = block.attn, x.shape[0]
    qkv = attn.qkv(block.norm1(x)).reshape(n, 3, attn.num_heads, -1)
    q, k = attn.q_norm(qkv[:, 0]), attn.k_norm(qkv[:, 1])
    return [torch.softmax(attn.scale * q[:, h] @ k[:, h].T, -1) for h in range(attn.num_heads)]


def slow_search(model, x, tolerance, step, epochs=0, lr=0.0):
    """Algorithm 1 with the docstring's choices, image by image, with N x N matrices and whole blocks."""
    teacher, blocks = model.blocks, copy.deepcopy(model.blocks)
    prefix, depth = model.num_prefix_tokens, len(blocks)
    z0 = embed(model, x)[0].detach()
    n, count = z0.shape[1], z0.shape[1] - prefix
    head = list(range(prefix))
    sets, tried = {depth - 1: []}, {}
    for level in range(depth - 2, -1, -1):
        score = torch.zeros(count, dtype=torch.float64)
        inputs, targets = [], []
        for i in range(len(x)):
            z = z0[i : i + 1]
            for b in teacher[:level]:
                z = b(z).detach()
            inputs.append(z)
            targets.append(teacher[level + 1](teacher[level](z)).detach())
            whole, here, maps = z, list(range(n)), []
            for j in range(level, depth):
                out = list(range(n)) if j == level else [*head, *(prefix + p for p in sets[j])]
                rows = torch.zeros(n, n, dtype=torch.float64)
                per_head = []
                for p in attention_of(blocks[j], whole[0]):
                    full = rows.clone()
                    for a, r in enumerate(here):
                        if r in out:
                            full[r, here] = p[a].detach()
                    per_head.append(full)
                maps.append(per_head)
                whole = blocks[j](whole)[:, [here.index(r) for r in out]].detach()
                here = out
            g = torch.zeros(n, n, dtype=torch.float64)
            g[head, head] = 1
            for per_head in reversed(maps[1:]):
                g = sum(p.T @ g @ p for p in per_head) / len(per_head)
            u = sum((p @ z[0].abs()).square().sum(1) for p in maps[0]) / len(maps[0])
            score += (g.diagonal() * u)[prefix:].detach() / len(x)
        base = sets[level + 1]
        others = sorted((p for p in range(count) if p not in base), key=lambda p: -float(score[p]))
        z, after = torch.cat(inputs), torch.cat(targets)
        tried[level] = []
        rows_after = [*head, *(prefix + p for p in base)]

        def pair(chosen, level=level, z=z, head=head, base=base):
            y = blocks[level](z)[:, [*head, *(prefix + p for p in chosen)]]
            return blocks[level + 1](y)[:, [*head, *(prefix + chosen.index(p) for p in base)]]

        r = 0
        while True:
            chosen = sorted([*base, *others[:r]])
            if len(chosen) == count:
                blocks[level].load_state_dict(teacher[level].state_dict())
            else:
                optimizer = torch.optim.AdamW(blocks[level].parameters(), lr, weight_decay=0)
                for _ in range(epochs):
                    blocks.zero_grad()
                    ((pair(chosen) - after[:, rows_after]) ** 2).sum().div(len(x)).backward()
                    optimizer.step()
            error = float(((pair(chosen) - after[:, rows_after]) ** 2).mean())
            tried[level].append((len(chosen), error))
            if error <= tolerance or len(chosen) == count:
                break
            r += step
        sets[level] = chosen
    return [sets[b] for b in range(depth - 1)], tried, blocks


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "qk_norm"])
@pytest.mark.parametrize("epochs", [0, 2])
def test_the_search_against_a_slow_one(family, epochs):
    model = tiny(family, depth=3).double()
    x = images_for(model, 5)
    keep, tried, blocks = slow_search(model, x, 0.3, 3, epochs, 1e-3)
    before = state_of(model)
    pruning = prunex.attach(model, "patch_slimming")
    report = pruning.calibrate(x, tolerance=0.3, step=3, epochs=epochs, learning_rate=1e-3)
    assert report.keep == keep == pruning.options["keep"]
    assert 1 < sum(len(b.candidates) for b in report.blocks) < 2 * 7
    for b in report.blocks:
        assert [c.patches for c in b.candidates] == [n for n, _ in tried[b.block]]
        for c, (_, error) in zip(b.candidates, tried[b.block], strict=True):
            assert c.mean == pytest.approx(error, rel=1e-7)
    own = dict(model.blocks.named_parameters())
    assert max(largest(own[n], p) for n, p in blocks.named_parameters()) < 1e-7
    if not epochs:
        pruning.detach()
        assert_same_state(model, before)
    else:
        assert any(not torch.equal(model.state_dict()[k], v) for k, v in before["tensors"].items())


def test_the_report_counts_errors_and_ends():
    model = tiny(img_size=64)
    x = images_for(model, 6)
    dense = model(x)
    pruning = prunex.attach(model, "patch_slimming", tolerance=0.02, epochs=1)
    report = pruning.calibrate([x[:4], (x[4:], torch.zeros(2))])
    assert report.images == 6
    assert pruning.counts() == [b.kept for b in report.blocks] == [len(s) for s in report.keep]
    assert [b.entering for b in report.blocks] == [64, *pruning.counts()[:-1]]
    assert pruning.counts() == sorted(pruning.counts(), reverse=True)
    previous = set()
    for b in reversed(report.blocks):
        growth = [c.patches for c in b.candidates]
        assert growth[0] == len(previous)
        assert all(y - x == 10 or y == 64 for x, y in itertools.pairwise(growth))
        assert previous <= set(report.keep[b.block])
        previous = set(report.keep[b.block])
        assert all(c.mean > 0.02 for c in b.candidates[:-1])
        assert b.candidates[-1].mean <= 0.02 or b.kept == 64
        assert b.candidates[-1].relative < 1
        assert b.score.shape == (64,)
        assert b.score.dtype == torch.float64
    logits = model(x)
    assert report.distance == pytest.approx(float((logits - dense).square().sum() / dense.square().sum()), rel=1e-3)
    assert report.agreement == float((logits.argmax(1) == dense.argmax(1)).double().mean())
    assert len(str(report).splitlines()) == 5
    assert pruning.options["tolerance"] == 0.02


def test_candidates_are_the_best_scored_of_the_others(monkeypatch):
    seen = []
    real = Search._error

    def watch(self, block, *args):
        seen.append((block, set(self.kept[block].nonzero().flatten().tolist())))
        return real(self, block, *args)

    monkeypatch.setattr(Search, "_error", watch)
    model = tiny(img_size=48)
    report = prunex.attach(model, "patch_slimming", epochs=0, tolerance=0.0).calibrate(images_for(model, 2))
    top = {b.block: b.score for b in report.blocks}[2]
    sets = [s for block, s in seen if block == 2]
    assert [len(s) for s in sets] == [0, 10, 20, 30, 36]
    for smaller, larger in itertools.pairwise(sets):
        assert smaller < larger
    assert sets[1] == set(top.topk(10).indices.tolist())


@pytest.mark.parametrize("epochs", [0, 2])
def test_tolerance_zero_is_dense_and_infinity_leaves_prefix_tokens(epochs):
    model = tiny()
    before, x = state_of(model), images_for(model)
    dense = model(x)
    with prunex.attach(model, "patch_slimming", epochs=epochs, learning_rate=1e-3) as pruning:
        report = pruning.calibrate(x, tolerance=0.0, step=7)
        assert pruning.counts() == [16, 16, 16]
        assert [len(b.candidates) for b in report.blocks] == [1, 1, 4]  # 0, 7, 14, 16
        assert not pruning.pruner.needs_calibration
        assert largest(model(x), dense) < 1e-5
        assert report.distance < 1e-10
    assert_same_state(model, before)  # a block that keeps all has its dense weights
    with prunex.attach(model, "patch_slimming", epochs=0) as pruning:
        pruning.calibrate(x, tolerance=math.inf)
        assert pruning.counts() == [0, 0, 0]
        assert model.forward_features(x).shape[1] == 1
        assert not pruning.trace.kept().any()
        logits = model(x)
        assert largest(logits, by_hand(model, x, [[], [], []])) < 1e-5
        pruning.masked = True
        assert largest(model(x), logits) < 1e-5
        assert torch.isfinite(prunex.explain("generic_attention", model, x).maps).all()


def test_gradients_reach_the_block_alone(monkeypatch):
    model = tiny()
    x = images_for(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    flags = [p.requires_grad for p in model.parameters()]
    seen = []
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        moved = [p for group in self.param_groups for p in group["params"]]
        with_gradient = [n for n, p in search.student.named_parameters() if p.grad is not None]
        seen.append((len(moved), sorted({n.split(".")[0] for n in with_gradient}), len(with_gradient)))
        assert all((p.grad == 1).all() for p in model.parameters())  # the teacher's are the user's own
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    search = Search(model, read(model), [x], tolerance=-1.0, step=8, epochs=2, learning_rate=1e-3)
    start = {n: p.clone() for n, p in search.student.named_parameters()}
    after = {}
    for block in (2, 1, 0):
        search._block(block)
        after[block] = {n: p.clone() for n, p in search.student.named_parameters()}
    each = len(list(model.blocks[0].parameters()))
    assert {s[0] for s in seen} == {s[2] for s in seen} == {each}
    assert [s[1] for s in seen] == [["2"]] * 4  # sizes 0 and 8, two steps each; then all, and all before it
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(after[2][n], p) for n, p in start.items())  # full sets: dense weights again
    search = Search(model, read(model), [x], tolerance=math.inf, epochs=1, learning_rate=1e-3)
    search._block(2)
    for n, p in search.student.named_parameters():
        unread = n.startswith("2.") and torch.equal(p, start[n])
        assert torch.equal(p, start[n]) == (not n.startswith("2.") or unread), n
    assert sum(not torch.equal(p, start[n]) for n, p in search.student.named_parameters()) >= each - 2


def test_the_search_is_reproducible_and_leaves_everything_else_alone():
    x = images_for(tiny(), 70)  # two chunks, so that the order counts
    found = []
    for seed in (0, 0, 1):
        model = tiny().train()
        model.blocks[1].eval()
        flags = [m.training for m in model.modules()]
        pruning = prunex.attach(model, "patch_slimming", tolerance=0.3, epochs=1, learning_rate=1e-3, seed=seed)
        torch.manual_seed(5)
        pruning.calibrate(x)
        drawn = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.rand(1))
        assert [m.training for n, m in model.named_modules() if not n.startswith("prunex")] == flags
        found.append({k: v.clone() for k, v in model.state_dict().items()})
        with pytest.raises(PrunexError, match="no forward has run yet"):
            _ = pruning.trace
    assert all(torch.equal(found[0][k], v) for k, v in found[1].items())
    assert any(not torch.equal(found[0][k], v) for k, v in found[2].items())


def test_a_failed_calibration_leaves_model_and_sets_as_they_were(monkeypatch):
    model = tiny()
    pruning = slimmed(model, KEEP, epochs=1)
    before, options = state_of(model), pruning.options
    monkeypatch.setattr(Search, "_error", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pruning.calibrate(images_for(model), learning_rate=0.1)
    assert_same_state(model, before)
    assert pruning.options == options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_tuned_in_single(dtype):
    model = tiny().to(dtype)
    x = images_for(model)
    pruning = prunex.attach(model, "patch_slimming", tolerance=0.3, epochs=1, learning_rate=1e-3)
    with torch.inference_mode():
        report = pruning.calibrate(x)
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(math.isfinite(b.candidates[-1].mean) for b in report.blocks)
    assert model(x).dtype == dtype


def test_calibrating_under_inference_mode_and_autocast():
    model = tiny()
    x = images_for(model)
    with prunex.attach(tiny(), "patch_slimming", tolerance=0.3, epochs=1) as other:
        plain = other.calibrate(x)
    pruning = prunex.attach(model, "patch_slimming", tolerance=0.3, epochs=1)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        report = pruning.calibrate(x.clone())
    assert report.keep == plain.keep
    assert report.blocks[0].candidates == plain.blocks[0].candidates


def test_loaders_of_every_shape():
    x = images(5)
    for source in (x, [x[:2], x[2:]], [(x, torch.arange(5))], [{"label": torch.arange(5), "image": x}], iter([x])):
        assert torch.equal(torch.cat(calibration_images(source, 4)), x[:4])
    for bad in (3, "images", [torch.arange(4)], [None], [], {"images": x}, x[0]):
        with pytest.raises(PrunexError, match="calibration (got|found)") as caught:
            calibration_images(bad, 4)
        assert "\n" not in str(caught.value)

    def endless():
        while True:
            yield x

    assert sum(map(len, calibration_images(endless(), 12))) == 12


# --------------------------------------------------------------------------------------------------------------------
# Sets as data: options, state dicts, files, graphs, cost.


def test_sets_travel_with_the_spec_and_with_the_state_dict(tmp_path):
    model, x = tiny(), images(3)
    pruning = prunex.attach(model, "patch_slimming", tolerance=0.2, epochs=0, step=3)
    pruning.calibrate(x)
    logits, kept = model(x), pruning.trace.kept()
    assert pruning.counts()[-1] < 16
    small = prunex.slim(model)
    assert torch.equal(small(x), logits)
    prunex.save(small, tmp_path / "slim")
    again = prunex.load(tmp_path / "slim")
    assert torch.equal(again(x), logits)
    assert prunex.attached(again).spec == pruning.spec
    assert torch.equal(prunex.attached(again).trace.kept(), kept)
    other = tiny(seed=9)
    fresh = prunex.attach(other, "patch_slimming")
    other.load_state_dict(model.state_dict())
    assert fresh.options["keep"] == pruning.options["keep"]
    assert not fresh.pruner.needs_calibration
    assert torch.equal(other(x), logits)
    spec = pruning.spec
    twin = tiny()
    assert prunex.attach(twin, **spec).spec == spec
    assert torch.equal(twin(x), logits)
    dense = {k: v for k, v in model.state_dict().items() if not k.startswith("prunex.")}
    twin.load_state_dict(dense)  # strictly: its sets stay
    assert torch.equal(twin(x), logits)
    model.to(torch.float64)
    assert largest(model(x.double()), logits) < 1e-4


def test_a_state_dict_whose_sets_are_not_nested_is_refused():
    model = tiny()
    slimmed(model, KEEP)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["prunex.patch_slimming.kept"][2, 15] = True
    with pytest.raises(PrunexError, match=r"keep\[2\] has position 15, which block 1 does not compute"):
        model.load_state_dict(state)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_graphs_gather_by_constants_and_rank_nothing(tmp_path, suffix):
    if suffix == "onnx" and any(importlib.util.find_spec(m) is None for m in ("onnx", "onnxscript", "onnxruntime")):
        pytest.skip("needs the extra prunex-vit[onnx]")
    model = tiny(depth=2, embed_dim=24)
    slimmed(model, [KEEP[1]])
    path = prunex.export(model, tmp_path / f"model.{suffix}")  # checked against the model there
    if suffix == "onnx":
        import onnx

        names = {node.op_type for node in onnx.load(path).graph.node}
        assert "Gather" in names
    else:
        names = {str(n.target) for n in torch.export.load(path).graph.nodes}
        assert any("index_select" in n for n in names)
    assert not [n for n in names if any(word in n.lower() for word in ("topk", "sort", "nonzero"))]


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_closed_form_cost_is_what_is_computed(family):
    model = tiny(family, img_size=(40, 24) if family == "not_square" else 64)
    slimmed(model)
    small = prunex.slim(model)
    cost = prunex.cost(small)
    assert cost.macs == pytest.approx(counted(small, images(2, tuple(model.patch_embed.img_size))), rel=0.01)
    if family == "vit":
        d, n = 48, [65, 65, 46, 27, 1]  # 64 patches, all, 0.7, 0.4 of them, none
        for block, (n_in, n_out) in zip(cost.blocks, itertools.pairwise(n), strict=True):
            assert block.macs == 2 * n_in * d**2 + 2 * n_out * d**2 + 2 * n_in * n_out * d + 8 * n_out * d**2
            assert (block.attention_tokens, block.mlp_tokens) == (n_in, n_out)
        assert [b.query_tokens for b in cost.blocks] == [None, 46, 27, 1]
        assert prunex.cost(small, (64, 64)) == cost


def test_geometries_without_weights_are_counted_and_saved_sizes_match():
    model = geometry()
    with torch.device("meta"):
        prunex.attach(model, "patch_slimming", keep=[range(100)] * 11)
        assert prunex.cost(model).tokens == [197, *[101] * 11]
    dense = geometry()
    assert prunex.cost(model).macs < 0.55 * prunex.cost(dense).macs


# --------------------------------------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize("family", ["avg_pool", "avg_pool_no_class", "avg_pool_prefix", "max_pool", "avgmax_pool"])
def test_pooled_models_are_refused_with_the_reason(family):
    model = tiny(family)
    before = state_of(model)
    with pytest.raises(PrunexError, match="needs a head that reads a class token, this model has global_pool="):
        prunex.attach(model, "patch_slimming")
    assert_same_state(model, before)


def test_a_head_that_comes_to_pool_patches_is_refused():
    model = tiny()
    slimmed(model)
    model.reset_classifier(3, "avg")
    with pytest.raises(PrunexError, match="needs a head that reads a class token"):
        model(images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 3}, "keep has int: give 3 lists of patch positions 0..15"),
        ({"keep": "all"}, "keep has str"),
        ({"keep": [[0]]}, "keep has 1 lists"),
        ({"keep": [[0], [0], 0]}, r"keep\[2\] is no list of whole numbers"),
        ({"keep": [[0.5], [], []]}, r"keep\[0\] is no list of whole numbers"),
        ({"keep": [[True], [], []]}, r"keep\[0\] is no list of whole numbers"),
        ({"keep": [[3, 1], [], []]}, r"keep\[0\] must rise"),
        ({"keep": [[1, 1], [], []]}, r"keep\[0\] must rise"),
        ({"keep": [[16], [], []]}, r"keep\[0\] has position 16: give 3 lists"),
        ({"keep": [[-1], [], []]}, r"keep\[0\] has position -1"),
        ({"keep": [[1, 2], [3], []]}, r"keep\[1\] has position 3, which block 0 does not compute"),
        ({"tolerance": -0.1}, "tolerance=-0.1 is not allowed"),
        ({"tolerance": math.nan}, "tolerance=nan is not allowed"),
        ({"tolerance": "small"}, "tolerance='small' is not allowed"),
        ({"step": 0}, "step=0 is not allowed: give a whole number of at least 1"),
        ({"step": 2.0}, "step=2.0 is not allowed"),
        ({"epochs": -1}, "epochs=-1 is not allowed: give a whole number of at least 0"),
        ({"epochs": True}, "epochs=True is not allowed"),
        ({"learning_rate": -1e-5}, "learning_rate=-1e-05 is not allowed"),
        ({"calibration_images": 0}, "calibration_images=0 is not allowed"),
        ({"criterion": "worst"}, "unknown criterion 'worst'.*Known: mean, relative"),
        ({"seed": None}, "seed=None is not allowed"),
        ({"budget": 0.5}, "patch_slimming has no rate that a budget could set: leave budget out"),
        ({"keep_ratio": 0.7}, "unknown option of patch_slimming 'keep_ratio'.*Known: .*tolerance"),
    ],
)
def test_bad_options_end_in_one_line(options, message):
    model = tiny()
    with pytest.raises(PrunexError, match=message) as caught:
        prunex.attach(model, "patch_slimming", **options)
    assert "\n" not in str(caught.value)
    assert prunex.attached(model) is None
    if not {"keep", "keep_ratio", "budget"} & set(options):
        with pytest.raises(PrunexError, match=message):
            prunex.attach(model, "patch_slimming").calibrate(images(), **options)


def test_bad_calibrations_end_in_one_line():
    model = tiny()
    pruning = prunex.attach(model, "patch_slimming", epochs=0)
    for source, options, message in (
        (images(), {"ratio": 0.5}, "unknown calibration option of patch_slimming 'ratio'"),
        (images(), {"keep": [[]] * 3}, "unknown calibration option of patch_slimming 'keep'"),
        (images(size=(40, 40)), {}, "images are 40 x 40 pixels"),
        (images() * math.nan, {}, "NaN or infinite"),
        ([], {}, "no images"),
    ):
        with pytest.raises(PrunexError, match=message) as caught:
            pruning.calibrate(source, **options)
        assert "\n" not in str(caught.value)
    assert pruning.pruner.needs_calibration
    with pytest.raises(PrunexError, match="tome needs no calibration: it decides image by image"):
        prunex.attach(tiny(), "tome").calibrate(images())
    with pytest.raises(PrunexError, match="at least two blocks"):
        prunex.attach(tiny(depth=1), "patch_slimming")


def test_images_of_another_size_are_refused_once_positions_were_chosen():
    model = tiny("dynamic")
    pruning = prunex.attach(model, "patch_slimming", epochs=0, tolerance=0.3)
    assert model(images(size=(48, 40))).shape == (3, 5)  # nothing chosen yet
    with pytest.raises(PrunexError, match="calibration images have 6 x 5 patches, the model 4 x 4"):
        pruning.calibrate(images(size=(48, 40)))
    pruning.calibrate(images())
    assert pruning.counts()[-1] < 16
    with pytest.raises(PrunexError, match="these images have 6 x 5 patches, the sets of patch_slimming are for 4 x 4"):
        model(images(size=(48, 40)))
    with pytest.raises(PrunexError, match="for 16 patches, not 30"):
        prunex.cost(model, (48, 40))
    model.set_input_size((64, 64))
    with pytest.raises(PrunexError, match="8 x 8 patches now, it had 4 x 4"):
        pruning.calibrate(images(size=(64, 64)))
    with torch.inference_mode():
        frozen = tiny()
    with pytest.raises(PrunexError, match="made under torch.inference_mode"):
        prunex.attach(frozen, "patch_slimming").calibrate(images())
