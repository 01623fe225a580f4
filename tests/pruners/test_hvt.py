"""HVT against a slow float64 rewrite of the whole forward and its published numbers; what pooling does to the trace."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prunex
from prunex import PrunexError
from prunex.vit.decisions import Pool, apply
from prunex.vit.embedding import embed
from prunex.vit.forward import answer, begin, encode, own_anatomy, predict, record, run
from prunex.vit.replay import Absent, Replay
from prunex.vit.state import TokenState
from prunex.vit.tape import Tape
from prunex.vit.trace import Stage, TokenTrace
from prunex.vit.turns import Turns
from tests.vits import (
    FAMILIES,
    assert_same_state,
    geometry,
    images,
    images_for,
    largest,
    randomise,
    relative,
    state_of,
    tiny,
)

SMALL = {"embed_dim": 384, "num_heads": 6, "depth": 12, "global_pool": "avg", "class_token": False, "fc_norm": False}


def hvt(model, **options):
    """An HVT on a model, with positions that are not 0."""
    pruning = prunex.attach(model, "hvt", **options)
    randomise(pruning.pruner)
    return pruning


def plain_model(**kwargs):
    """The authors' architecture: no class token, the norm before the mean."""
    return tiny("avg_pool_no_class", fc_norm=False, **kwargs)


# --- the definition, slowly


def slow_norm(x, module):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + module.eps).sqrt() * module.weight + module.bias


def slow_linear(x, module):
    return x @ module.weight.T + module.bias


def slow_block(x, block, heads):
    y = slow_norm(x, block.norm1)
    n, width = y.shape
    q, k, v = slow_linear(y, block.attn.qkv).reshape(n, 3, heads, width // heads).unbind(1)
    out = torch.zeros(n, heads, width // heads, dtype=x.dtype)
    for h in range(heads):
        attention = (q[:, h] @ k[:, h].T / (width // heads) ** 0.5).softmax(-1)
        out[:, h] = attention @ v[:, h]
    x = x + slow_linear(out.reshape(n, width), block.attn.proj)
    y = slow_linear(slow_norm(x, block.norm2), block.mlp.fc1)
    return x + slow_linear(torch.nn.functional.gelu(y), block.mlp.fc2)


def slow_pool(x):
    """Kernel 3, stride 2, no padding; every channel by itself."""
    rows, start = [], 0
    while start + 3 <= len(x):
        rows.append([max(float(x[start + i, c]) for i in range(3)) for c in range(x.shape[1])])
        start += 2
    return torch.tensor(rows, dtype=x.dtype)


def slow_pool_2d(x, grid):
    """3 x 3, stride 2, one patch of border; every channel by itself."""
    h, w = grid
    rows = []
    for top in range(-1, h - 1, 2):
        for left in range(-1, w - 1, 2):
            inside = [
                x[r * w + c] for r in range(top, top + 3) for c in range(left, left + 3) if 0 <= r < h and 0 <= c < w
            ]
            rows.append(torch.stack(inside).amax(0))
    return torch.stack(rows)


def slow_hvt(model, image, width, positions):
    """Steps 1 to 4 of the paper for one image [3, H, W], token by token."""
    size, proj = model.patch_embed.patch_size[0], model.patch_embed.proj
    tokens = []
    for top in range(0, image.shape[1], size):
        for left in range(0, image.shape[2], size):
            patch = image[:, top : top + size, left : left + size]
            tokens.append((proj.weight * patch).sum((1, 2, 3)) + proj.bias)
    x, used = torch.stack(tokens) + model.pos_embed[0], 0
    for i, block in enumerate(model.blocks):
        x = slow_block(x, block, 3)
        if i % width == 0:
            x = slow_pool(x) + positions[used][0]
            used += 1
    return slow_linear(slow_norm(x, model.norm).mean(0), model.head)


@pytest.mark.parametrize(("width", "size", "depth"), [(4, 32, 4), (3, 40, 4), (2, 40, 4), (2, 64, 5)])
def test_a_slow_rewrite_of_the_whole_forward(width, size, depth):
    model = plain_model(img_size=size, depth=depth).double()
    x = images(2, (size, size), dtype=torch.float64)
    pruning = hvt(model, pool_width=width)
    positions = [p.pos_embed for p in pruning.pruner.positions]
    with torch.no_grad():
        want = torch.stack([slow_hvt(model, image, width, positions) for image in x])
        assert relative(model(x), want) < 1e-12
        pruning.masked = True
        assert relative(model(x), want) < 1e-12
    assert len(positions) == len(range(0, depth, width)) == len(pruning.trace.stages)


# --- the sheet's list


def test_lengths_as_published():
    model = geometry(**SMALL)
    with torch.device("meta"):
        for width, lengths in ((3, [97, 48, 23, 11]), (4, [97, 48, 23]), (6, [97, 48]), (12, [97])):
            with prunex.attach(model, "hvt", pool_width=width) as pruning:
                assert pruning.counts() == lengths
                assert pruning.options["stages"] == list(range(0, 12, width))
                model(torch.zeros(1, 3, 224, 224))
                assert [s.n_out for s in pruning.trace.stages] == lengths
        with prunex.attach(model, "hvt") as pruning:
            assert pruning.counts() == [97]


PUBLISHED = [(384, 6, 12, 2.402), (384, 6, 6, 1.941), (384, 6, 4, 1.620), (384, 6, 3, 1.394), (192, 3, 12, 0.642)]


@pytest.mark.parametrize(("dim", "heads", "width", "gmacs"), PUBLISHED)
def test_macs_as_published_and_as_torch_counts_them(dim, heads, width, gmacs):
    model = geometry(**(SMALL | {"embed_dim": dim, "num_heads": heads}))
    with torch.device("meta"):
        prunex.attach(model, "hvt", pool_width=width)
        cost = prunex.cost(model)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(torch.randn(1, 3, 224, 224))
    assert cost.gmacs == pytest.approx(gmacs, abs=5e-4)
    assert cost.macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_parameters_as_published():
    model = geometry(**SMALL)
    with torch.device("meta"):
        dense = prunex.cost(model).params
        assert round(dense / 1e6, 2) == 22.05
        prunex.attach(model, "hvt", pool_width=12)
        assert prunex.cost(model).params - dense == 37_248
        assert round(prunex.cost(model).params / 1e6, 2) == 22.09


def test_without_pooling_it_is_timms_average_pooled_model():
    """One stage whose windows are single tokens pools nothing: what is left is the mean head."""
    model = plain_model().double()
    x = images_for(model)
    with torch.no_grad():
        want = model(x)
        pruning = prunex.attach(model, "hvt")
        pruning.pruner.plan = list
        assert relative(model(x), want) < 1e-12


def test_a_class_token_model_without_its_class_token_is_the_average_pooled_model():
    """Drop CLS and its position row, read the mean: what the conversion says, built a second time with timm alone."""
    model, other = tiny().double(), plain_model().double()
    state = {k: v for k, v in model.state_dict().items() if k != "cls_token"}
    state["pos_embed"] = state["pos_embed"][:, 1:]
    other.load_state_dict(state)
    x = images_for(model)
    with hvt(model, stages=(0, 2)) as first, hvt(other, stages=(0, 2)) as second, torch.no_grad():
        assert relative(model(x), other(x)) < 1e-12
        assert model.forward_features(x).shape == (3, 3, 48)
        assert largest(first.trace.share(), second.trace.share()) == 0


def shuffled(model, x, order):
    """Logits when patches and their positions are given in another order."""
    tokens, grid = embed(model, x)
    attached = prunex.attached(model)
    pruners = () if attached is None else (attached.pruner,)
    anatomy = own_anatomy(model)
    prefix = anatomy.prefix
    moved = torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, order]], 1)
    return answer(encode(begin(model, moved, grid, anatomy), Turns(pruners)))


def test_only_pooling_minds_the_order_of_patches():
    model = plain_model().double()
    x = images_for(model)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense = model(x)
        assert relative(shuffled(model, x, order), dense) < 1e-12
        with prunex.attach(model, "evit", keep_ratio=0.6, stages=(1, 2)):
            assert relative(shuffled(model, x, order), model(x)) < 1e-12
        for pool in ("1d", "2d"):
            with hvt(model, stages=(0, 2), pool=pool):
                assert relative(shuffled(model, x, torch.arange(16)), model(x)) < 1e-12
                assert relative(shuffled(model, x, order), model(x)) > 1e-2


# --- the decision itself


def state_for(tokens, prefix, grid, policy=None, masked=False):
    anatomy = prunex.vit.anatomy.read(tiny("dinov2_reg" if prefix else "avg_pool_no_class"))
    trace = TokenTrace(grid, prefix, len(tokens), tokens.device)
    return TokenState(tokens, anatomy, trace, masked, False, policy=policy, left=tokens.shape[1] - prefix)


@pytest.mark.parametrize("grid", [None, (4, 4), (3, 5), (1, 6), (5, 2)])
@pytest.mark.parametrize("prefix", [0, 5])
def test_windows_and_shares(grid, prefix):
    n = 11 if grid is None else grid[0] * grid[1]
    tokens = torch.randn(3, prefix + n, 48, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    state = state_for(tokens, prefix, (1, n))
    want = torch.stack([slow_pool(t) if grid is None else slow_pool_2d(t, grid) for t in tokens[:, prefix:]])
    position = torch.randn(1, want.shape[1], 48, dtype=torch.float64)
    (stage,) = apply(Pool(grid, position), 0, "after", state)
    assert torch.equal(state.tokens[:, prefix:], want + position)
    assert torch.equal(state.tokens[:, :prefix], tokens[:, :prefix])
    assert stage.n_out == state.left == stage.counted == want.shape[1]
    assert state.decisions[0].when == "after"
    whole = state.trace.composition()
    assert largest(whole.sum(1), torch.ones(3, stage.n_out)) < 1e-9  # shares of one token sum to 1
    for image in range(3):
        for out in range(stage.n_out):
            for patch in range(n):
                had = (tokens[image, prefix + patch] == want[image, out]).double().mean()
                assert abs(float(whole[image, patch, out]) - float(had)) < 1e-9


def test_ties_go_to_the_first():
    state = state_for(torch.zeros(1, 5, 48), 0, (1, 5))
    apply(Pool(), 0, "before", state)
    assert state.trace.composition()[0].tolist() == [[1, 0], [0, 0], [0, 1], [0, 0], [0, 0]]


def test_an_even_sequence_loses_its_last_token():
    state = state_for(torch.randn(2, 6, 48), 0, (2, 3))
    (stage,) = apply(Pool(), 0, "before", state)
    assert stage.n_out == 2
    assert (state.trace.composition()[:, 5] == 0).all()
    assert (state.trace.tokens()[:, 5] == -1).all()


@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_the_maximum_is_over_tokens_that_are_there(grid):
    tokens = torch.randn(3, 12, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy = torch.ones(3, 12, dtype=torch.float64)
    policy[0, [1, 2, 3, 4]] = policy[1, 5:] = policy[2] = 0
    state = state_for(tokens, 0, (3, 4), policy, masked=True)
    (stage,) = apply(Pool(grid), 0, "before", state)
    members = Pool(grid).layout(12, tokens.device)[0]
    whole = state.trace.composition()
    for image in range(3):
        for out, window in enumerate(members.tolist()):
            left = [t for t in window if t >= 0 and policy[image, t] > 0]
            assert float(state.policy[image, out]) == bool(left)
            if left:
                assert torch.equal(state.tokens[image, out], tokens[image, left].amax(0))
                assert float(whole[image, left, out].sum()) == pytest.approx(1)
            else:
                assert (state.tokens[image, out] == 0).all()
                assert (whole[image, :, out] == 0).all()
    assert stage.counted.tolist() == (state.policy > 0).sum(1).tolist()
    assert torch.isfinite(state.tokens).all()


# --- the trace


def slow_composition(trace, upto, image):
    """The part each patch has in each token after a stage, by a loop over every stage's entries."""
    whole = torch.eye(trace.grid[0] * trace.grid[1], dtype=torch.float64)
    for stage in trace.stages[: upto + 1]:
        after = torch.zeros(len(whole), stage.n_out, dtype=torch.float64)
        group = stage.group[image] if stage.group.ndim == 3 else stage.group[image][:, None]
        weight = stage.weight[image] if stage.group.ndim == 3 else stage.weight[image][:, None]
        for token in range(len(group)):
            for goes, share in zip(group[token].tolist(), weight[token].tolist(), strict=True):
                if goes >= 0:
                    after[:, goes] += whole[:, token] * share
        whole = after
    return whole


@pytest.mark.parametrize("pool", ["1d", "2d"])
@pytest.mark.parametrize("absent", [False, True])
def test_the_trace_equals_the_slow_composition(pool, absent):
    model = tiny("dinov2_reg", img_size=(40, 48)).double()
    x = images(3, (40, 48), dtype=torch.float64)
    hvt(model, stages=(0, 1, 3), pool=pool)
    pruners = (model.prunex.pruner,)
    if absent:
        present = torch.rand(3, 30, generator=torch.Generator().manual_seed(2)) > 0.4
        present[2] = False
        pruners = (Absent(present, masked=True), *pruners)
    with torch.no_grad():
        trace = run(model, x, pruners, masked=absent).trace
    assert trace.prefix == 0
    assert trace.pooled
    generator = torch.Generator().manual_seed(0)
    for s, stage in enumerate(trace.stages):
        share, tokens = trace.share(s).flatten(1), trace.tokens(s)
        if stage.group.ndim == 3:
            assert not trace.kept(s).any()
            assert torch.equal(trace.keep_ratios()[s], torch.as_tensor(stage.counted).expand(3).float() / 30)
        else:  # the patches that Absent took away
            assert trace.kept(s).flatten(1).equal(present)
        row = torch.randn(3, stage.n_out, generator=generator, dtype=torch.float64)
        several = torch.stack([row, 2 * row], 1)
        values = torch.rand(3, stage.group.shape[1], generator=generator, dtype=torch.float64)
        wholes = torch.stack([slow_composition(trace, s, i) for i in range(3)])
        assert largest(wholes.amax(2), share) < 1e-12
        found = wholes.gather(2, tokens.clamp(min=0)[:, :, None])[:, :, 0]
        assert largest(torch.where(tokens < 0, 0, found), wholes.amax(2)) < 1e-12
        step = Step.of(stage)
        assert largest(stage.lift(row, 0), (step @ row[:, :, None])[:, :, 0]) < 1e-12
        assert largest(stage.lift(several, 0)[:, 1], 2 * stage.lift(row, 0)) < 1e-12
        total = step.sum(2)
        if stage.group.ndim == 3:
            want = torch.where(total > 0, (step @ row[:, :, None])[:, :, 0] / total, 0)
            assert largest(stage.paint(row, 0), want) < 1e-12
            assert largest(stage.paint(several, 0)[:, 1], 2 * want) < 1e-12
        into = step.sum(1)
        want = torch.where(into > 0, (values[:, None] @ step)[:, 0], 1)
        assert largest(stage.push(values, 0), want) < 1e-12
        assert largest(torch.where(into > 0, into, 1), torch.ones_like(into)) < 1e-9
    assert torch.equal(trace.depth(), sum(trace.kept(i).long() for i in range(len(trace.stages))))
    assert not any(t.weight.requires_grad for t in trace.detach().stages)


class Step:
    """A stage as a whole matrix."""

    @staticmethod
    def of(stage):
        alone = TokenTrace((1, stage.group.shape[1]), 0, len(stage.group), stage.group.device, [stage])
        return alone.composition()


def test_stages_that_do_not_exist():
    trace = TokenTrace(
        (1, 4), 0, 1, torch.device("cpu"), [Stage(0, torch.zeros(1, 4, 2).long(), torch.ones(1, 4, 2), 1)]
    )
    for ask in (trace.kept, trace.share, trace.tokens, trace.composition):
        with pytest.raises(PrunexError, match="stage=1 does not exist"):
            ask(1)


# --- the laws


@pytest.mark.parametrize(
    ("family", "options"),
    [(f, {}) for f in FAMILIES]
    + [(f, o) for f in ("vit", "dinov2_reg", "not_square") for o in ({"class_token": "keep"}, {"pool": "2d"})],
)
def test_masked_equals_removed_batches_equal_singles_and_detach_restores(family, options):
    model = tiny(family)
    x = images_for(model)
    before = state_of(model)
    with torch.no_grad():
        dense = model(x)
        pruning = hvt(model, stages=(0, 2), **options)
        logits, share = model(x), pruning.trace.share()
        assert logits.shape == dense.shape
        assert relative(logits, dense) > 1e-3
        pruning.masked = True
        assert largest(model(x), logits) < 1e-5
        pruning.masked = None
        for i in range(3):
            assert largest(model(x[i : i + 1])[0], logits[i]) < 2e-6 * max(1, float(logits.abs().max()))
            assert largest(pruning.trace.share()[0], share[i]) < 1e-6
        assert torch.equal(prunex.slim(model)(x), logits)
        prefix = model.num_prefix_tokens if options.get("class_token") == "keep" else 0
        assert own_anatomy(model).prefix == prefix
        assert model.forward_features(x).shape[1] == prefix + pruning.counts()[-1]
        model.load_state_dict(dict(before["tensors"]), strict=True)  # a dense checkpoint
        assert largest(model(x), logits) < 1e-6
        pruning.detach()
        assert torch.equal(model(x), dense)
    assert_same_state(model, before)


def test_kept_prefix_tokens_are_never_pooled():
    model = tiny("dinov2_reg")
    x = images_for(model)
    seen = []
    with hvt(model, stages=(0, 3), class_token="keep") as pruning:
        real = pruning.pruner.decide

        def watch(turn, state):
            if turn.when == "after":
                seen.append((state, state.tokens[:, :5].clone()))
            return real(turn, state)

        pruning.pruner.decide = watch
        with torch.no_grad():
            model(x)
            final = record(model, x, Tape()).tokens
        assert torch.equal(seen[1][1], seen[1][0].tokens[:, :5]) is False  # the norm came after
        assert len(final[0]) == 5 + 3


def test_a_pooled_model_keeps_its_own_way_to_pool():
    for family, pool in (("avg_pool", "avg"), ("avgmax_pool", "avgmax"), ("max_pool", "max"), ("vit", "avg")):
        model = tiny(family)
        with hvt(model), torch.no_grad():
            tokens = model.forward_features(images_for(model))
            assert own_anatomy(model).pool == pool
            want = {"avg": tokens.mean(1), "max": tokens.amax(1), "avgmax": (tokens.mean(1) + tokens.amax(1)) / 2}
            assert largest(model.pool(tokens), want[pool]) < 1e-6
            assert largest(model.pool(tokens, pool_type="max"), want["max"]) == 0
            with pytest.raises(PrunexError, match="no class token"):
                model.pool(tokens, pool_type="token")


def test_both_heads_of_a_distilled_model_read_the_mean():
    model = tiny("deit_distilled")
    x = images_for(model)
    with hvt(model), torch.no_grad():
        mean = model.forward_features(x).mean(1)
        assert largest(model(x), (model.head(mean) + model.head_dist(mean)) / 2) < 1e-6
        assert largest(model.forward_head(model.forward_features(x), pre_logits=True), mean) < 1e-6
        model.train()
        model.set_distilled_training(True)
        first, second = model(x)
        assert largest(first, model.head(mean)) < 1e-6
        assert largest(second, model.head_dist(mean)) < 1e-6


def test_reset_classifier_and_a_user_s_own_features():
    model = tiny()
    x = images_for(model)
    with hvt(model), torch.no_grad():
        model.reset_classifier(7)
        assert model.eval()(x).shape == (3, 7)
        assert own_anatomy(model).classes == 7
        assert own_anatomy(model).prefix == 0
        model.reset_classifier(0)
        assert largest(model(x), model.forward_features(x).mean(1)) < 1e-6
    model.reset_classifier(5, global_pool="avg")
    assert model(x).shape == (3, 5)


@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class"])
def test_a_training_step_reaches_positions_and_backbone(family):
    model = tiny(family).train()
    pruning = prunex.attach(model, "hvt", stages=(0, 3))
    assert all((p.pos_embed == 0).all() for p in pruning.pruner.positions)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(model(images_for(model)), torch.tensor([0, 1, 2]))
    assert pruning.losses() == {}
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []  # DDP would wait for them
    own = dict(model.named_parameters())
    for s in range(2):
        assert (own[f"prunex.hvt.positions.{s}.pos_embed"].grad != 0).any()
    if family == "vit":
        assert (own["cls_token"].grad == 0).all()
        assert (own["pos_embed"].grad[:, 0] == 0).all()
    optimizer.step()
    assert all((p.pos_embed != 0).any() for p in pruning.pruner.positions)
    after = nn.functional.cross_entropy(model(images_for(model)), torch.tensor([0, 1, 2]))
    assert after < loss


def test_gradients_go_to_the_winner_of_each_channel():
    tokens = torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)
    state = state_for(tokens, 0, (1, 7))
    apply(Pool(), 0, "before", state)
    seed = torch.randn_like(state.tokens)
    (grad,) = torch.autograd.grad(state.tokens, tokens, seed)
    want = torch.zeros_like(tokens)
    for image in range(2):
        for out in range(3):
            for c in range(48):
                best = int(tokens[image, 2 * out : 2 * out + 3, c].argmax())
                want[image, 2 * out + best, c] += seed[image, out, c]
    assert largest(grad, want) < 1e-12


def test_checkpointed_gradients_are_the_same():
    model = tiny().train()
    hvt(model, stages=(0, 2, 3), class_token="keep")
    grads = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(images_for(model)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(largest(a, b) < 1e-4 * (1 + float(a.abs().max())) for a, b in zip(*grads, strict=True))


def test_replayed_decisions_for_any_selection_of_images():
    model = tiny().double()
    x = images_for(model)
    hvt(model, stages=(0, 2, 3))
    index = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        state = run(model, x)
        other = run(model, x[index], (Replay(state.decisions, index),))
    assert largest(other.tokens, state.tokens[index]) < 1e-12
    assert [s.n_out for s in other.trace.stages] == [7, 3, 1]
    assert all(d.when == "after" for d in other.decisions)
    assert all(not d.answer.position.requires_grad for d in other.decisions)


def test_absent_patches_do_not_matter_and_one_image_is_no_other_s_business():
    model = tiny().double()
    x = images_for(model)
    present = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) > 0.5
    hvt(model, stages=(0, 2))
    own = model.prunex.pruner

    def logits(images, there):
        return predict(model, images, (Absent(there, masked=True), own), masked=True).logits

    with torch.no_grad():
        want = logits(x, present)
        pixels = present.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        spoiled = torch.where(pixels, x, 1e3 * torch.randn_like(x))
        assert relative(logits(spoiled, present), want) < 1e-12
        assert relative(logits(x[1:2], present[1:2]), want[1:2]) < 1e-12
        assert torch.isfinite(logits(x, torch.zeros_like(present))).all()
        assert relative(logits(x, torch.ones_like(present)), model(x)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"class_token": "keep", "pool": "2d"}], ids=str)
def test_saved_and_loaded(tmp_path, options):
    model = tiny()
    x = images(3)
    hvt(model, stages=(0, 3), **options)
    small = prunex.slim(model)
    with torch.no_grad():
        want = small(x)
        loaded = prunex.load(prunex.save(small, tmp_path / "slim"))
        assert torch.equal(loaded(x), want)
        assert prunex.attached(loaded).spec == prunex.attached(model).spec


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"class_token": "keep", "pool": "2d"}, marks=pytest.mark.slow)], ids=str
)
def test_exported_with_any_batch(tmp_path, options):
    model = tiny("deit_distilled", depth=2)
    x = images(3)
    hvt(model, stages=(0, 1), **options)
    small = prunex.slim(model)
    with torch.no_grad():
        want = small(x)
        program = torch.export.load(prunex.export(small, tmp_path / "model.pt2", kept=True)).module()
        for batch in (1, 3):
            logits, kept = program(x[:batch])
            assert relative(logits, want[:batch]) < 1e-4
            assert kept.shape == (batch, 4, 4)
            assert not kept.any()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"class_token": "keep", "pool": "2d"}], ids=str)
def test_onnx_with_any_batch(tmp_path, options):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny(depth=2)
    hvt(model, stages=(0, 1), **options)
    path = prunex.export(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        x = images(batch)
        with torch.no_grad():
            want = model(x)
        assert relative(torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), want) < 1e-4


def official(model, positions, stages):
    """A checkpoint as the authors' code names it."""
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("prunex.")}
    return {"model": state | {f"blocks.{b}.pos_embed": p for b, p in zip(stages, positions, strict=True)}}


def test_official_checkpoints():
    model, other = plain_model(), plain_model(seed=1)
    x = images_for(model)
    first, second = hvt(model, stages=(0, 2)), prunex.attach(other, "hvt", stages=(0, 2))
    positions = [p.pos_embed.detach() for p in first.pruner.positions]
    second.load_official(official(model, positions, (0, 2)))
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    for stages, match in (((0,), "parameters are missing"), ((0, 2, 3), r"do not fit this model: blocks\.3")):
        with pytest.raises(PrunexError, match=match):
            second.load_official(official(model, [*positions, positions[0]][: len(stages)], stages))


def test_positions_to_train_from_scratch():
    torch.manual_seed(0)
    with prunex.attach(tiny(img_size=128), "hvt", init="trunc_normal") as pruning:
        (position,) = pruning.pruner.positions
        assert position.pos_embed.shape == (1, 127, 48)
        assert 0.018 < float(position.pos_embed.std()) < 0.022


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep_ratio": 0.7}, "keep_ratio"),
        ({"pool_width": 0}, "pool_width=0 is not allowed"),
        ({"pool_width": 1.5}, "pool_width=1.5 is not allowed"),
        ({"pool_width": True}, "pool_width=True is not allowed"),
        ({"stages": (1,), "pool_width": 2}, r"stages=\(1,\) and pool_width=2, which means \(0, 2\)"),
        ({"stages": (4,)}, "beyond the model's 4 blocks"),
        ({"stages": (2, 1)}, "must rise"),
        ({"pool_width": 1}, "1 patch tokens are left after block 3: too few"),
        ({"pool": "3d"}, "pool"),
        ({"pool": None}, "pool"),
        ({"class_token": True}, "class_token"),
        ({"init": "normal"}, "init"),
    ],
)
def test_bad_options(options, match):
    model = tiny()
    before = state_of(model)
    with pytest.raises(PrunexError, match=match):
        prunex.attach(model, "hvt", **options)
    assert_same_state(model, before)


def test_stages_and_width_may_both_be_given_when_they_agree():
    model = tiny(img_size=64)
    with prunex.attach(model, "hvt", pool_width=2) as pruning:
        spec = pruning.spec
        assert spec["stages"] == [0, 2]
        assert spec["pool_width"] == 2
    assert prunex.attach(model, **spec).spec == spec


@pytest.mark.parametrize("family", ["dynamic", "vit"])
def test_another_image_size_is_refused(family):
    model = tiny(family)
    pruning = prunex.attach(model, "hvt")
    if family == "vit":
        model.set_input_size(img_size=(32, 48))
    with pytest.raises(PrunexError, match=r"patch grid of 4 x 4, and was given 4 x 6 \(24 tokens\).*attach again"):
        model(images(1, (32, 48)))
    pruning.detach()
    if family == "vit":
        with prunex.attach(model, "hvt") as pruning, torch.no_grad():
            model(images(1, (32, 48)))
            assert pruning.counts() == [11]


def test_costs_of_other_sizes():
    model = tiny(img_size=64)
    with prunex.attach(model, "hvt", pool_width=2):
        assert prunex.cost(model).tokens == [64, 31, 31, 15]
        assert prunex.cost(model, (96, 96)).tokens == [144, 71, 71, 35]
        assert prunex.attached(model).counts(9) == [4, 1]
        with pytest.raises(PrunexError, match="too few"):
            prunex.cost(model, (16, 16))
    with prunex.attach(model, "hvt", pool_width=2, pool="2d"):
        assert prunex.cost(model).tokens == [64, 16, 16, 4]
        with pytest.raises(PrunexError, match="attached for 64"):
            prunex.cost(model, (96, 96))


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_reg", "avg_pool_no_class", "not_square"])
@pytest.mark.parametrize("options", [{}, {"class_token": "keep"}, {"pool": "2d"}], ids=str)
def test_tokens_of_every_block_are_those_a_forward_has(family, options):
    model = tiny(family)
    with prunex.attach(model, "hvt", stages=(0, 2), **options):
        cost, seen = prunex.cost(model), {"attn": [], "mlp": []}
        for block in model.blocks:
            for half, module in (("attn", block.attn.qkv), ("mlp", block.mlp)):
                module.register_forward_pre_hook(lambda _m, args, half=half: seen[half].append(args[0].shape[1]))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(images_for(model, 1))
    assert cost.tokens == seen["attn"]
    assert [b.mlp_tokens for b in cost.blocks] == seen["mlp"]
    assert cost.macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize("family", ["eva02", "dinov3", "rope_mixed"])
def test_rotary_models_without_their_class_token_rotate_every_token(family):
    """Timm's own attention would skip as many tokens as the model has prefix tokens."""
    model = tiny(family)
    x = images_for(model)
    with prunex.attach(model, "hvt", stages=(1,)), torch.no_grad():
        tape = Tape(rows=frozenset(range(4)))
        record(model, x, tape)  # asks for rows, so every block's attention is opened
        assert torch.allclose(model(x), tape.logits, atol=1e-5)
