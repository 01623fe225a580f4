"""Magnitude, Taylor, random and relevance: each against its slow definition, and what all four have in common."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, SwiGLU
from torch.utils.data import DataLoader, TensorDataset

import prunex
from prunex import PrunexError
from prunex.units.relevance import Relevance, _Rules
from prunex.vit.tape import Tape
from prunex.vit.units import branches, last_layer
from tests.units.units import batches, half_of_channels, planted, removed, swin
from tests.vits import assert_same_state, gated, images_for, largest, relative, state_of, tiny

CRITERIA = ["magnitude", "taylor", "random", "relevance"]
LOOKING = ["taylor", "relevance"]
ANYWHERE = ["magnitude", "taylor", "random"]


def scores_of(model, method, data=None, **options):
    """The raw scores of a method that is attached for the moment."""
    with prunex.attach(model, method, **options) as pruning:
        return pruning.pruner.scores(model, data)


def data_for(method, **kwargs):
    return batches(**kwargs) if method in LOOKING else None


# --- each against its definition -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["all", "out"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny("layer_scale"),
        lambda: tiny("no_qkv_bias"),
        lambda: tiny("dinov2", mlp_layer=SwiGLU, act_layer=torch.nn.SiLU, mlp_ratio=8 / 3),
        lambda: tiny("dinov2_giant"),
        gated,
        swin,
        lambda: tiny("beit"),
    ],
)
def test_magnitude_is_the_loop_over_weights(make, weights):
    model = make()
    found = scores_of(model, "magnitude", weights=weights)
    for b in branches(model):
        block = model.get_submodule(b.path)
        heads = b.kind == "heads"
        gamma = getattr(getattr(block, "ls1" if heads else "ls2", None), "gamma", None)
        gamma = getattr(block, "gamma_1" if heads else "gamma_2", None) if gamma is None else gamma
        out = last_layer(block, b.kind).weight.double()
        out = out if gamma is None else gamma.double()[:, None] * out
        for unit in range(0, b.units, 1 if heads else 17):
            inputs = range(unit * b.width, (unit + 1) * b.width)
            total = sum(float((out[:, i].detach() ** 2).sum()) for i in inputs)
            if weights == "all" and heads:
                attn = block.attn
                rows = [attn.qkv.weight[s * b.units * b.width + i] for s in range(3) for i in inputs]
                total += sum(float((row.double() ** 2).sum()) for row in rows)
                if getattr(attn, "gate", None) is not None:
                    total += sum(float((attn.gate.weight[i].double() ** 2).sum()) for i in inputs)
            elif weights == "all":
                mlp = block.mlp
                if isinstance(mlp, SwiGLU):
                    rows = [mlp.fc1_g.weight[unit], mlp.fc1_x.weight[unit]]
                elif isinstance(mlp, GluMlp):
                    rows = [mlp.fc1.weight[unit], mlp.fc1.weight[b.units + unit]]
                else:
                    rows = [mlp.fc1.weight[unit]]
                total += sum(float((r.double() ** 2).sum()) for r in rows)
            assert abs(float(found[b.key][unit]) - total**0.5) < 1e-9 * total**0.5


@pytest.mark.parametrize("make", [lambda: tiny("layer_scale"), lambda: tiny("dinov3"), swin])
def test_taylor_is_gradient_times_weight_of_single_images(make):
    """The paper's group form: the sum over a unit's output weights of weight times gradient, squared, per image."""
    model = make().double()
    data = batches(2, 3, dtype=torch.float64)
    found = scores_of(model, "taylor", data)
    wanted = {b.key: torch.zeros(b.units, dtype=torch.float64) for b in branches(model)}
    for x, y in data:
        for image, label in zip(x, y, strict=True):
            model.zero_grad()
            F.cross_entropy(model(image[None]), label[None]).backward()
            for b in branches(model):
                w = last_layer(model.get_submodule(b.path), b.kind).weight
                wanted[b.key] += (w * w.grad).sum(0).view(b.units, b.width).sum(1).square()
    for key, value in wanted.items():
        assert relative(found[key], value / 6) < 1e-9, key


def test_taylor_is_the_slope_of_the_loss_when_a_units_columns_are_scaled():
    model = tiny(depth=2).double()
    x, y = batches(1, 2, dtype=torch.float64)[0]
    found = scores_of(model, "taylor", [(x, y)])
    step = 1e-5

    def losses():
        with torch.no_grad():
            return F.cross_entropy(model(x), y, reduction="none")

    for b in branches(model):
        w = last_layer(model.get_submodule(b.path), b.kind).weight
        for unit in range(0, b.units, 1 if b.kind == "heads" else 31):
            part = slice(unit * b.width, (unit + 1) * b.width)
            before, ends = w.detach().clone(), []
            for factor in (1 + step, 1 - step):
                with torch.no_grad():
                    w[:, part] = before[:, part] * factor
                    ends.append(losses())
                    w.copy_(before)
            slope = (ends[0] - ends[1]) / (2 * step)
            assert abs(float(found[b.key][unit]) - float(slope.square().mean())) < 1e-6


@pytest.mark.parametrize("method", LOOKING)
def test_images_that_keep_their_own_numbers_of_tokens_are_scored_one_by_one(method):
    """Outside of calibration such images are packed into one sequence."""
    model = tiny().double()
    x, y = batches(1, 6, dtype=torch.float64)[0]
    tokens = prunex.attach(model, "topk", count="adaptive", keep_ratio=0.5, stages=(1, 2))
    tokens.calibrate(x)
    together = scores_of(model, method, [(x, y)])
    assert tokens.masked is None
    alone = [scores_of(model, method, [(x[i : i + 1], y[i : i + 1])]) for i in range(6)]
    for key, found in together.items():
        assert relative(found, sum(a[key] for a in alone) / 6) < 1e-7


def test_taylor_without_labels_takes_the_predictions():
    model = tiny()
    data = batches(2, labels=False)
    with torch.no_grad():
        said = [(x, model(x).argmax(1)) for x in data]
    one, two = scores_of(model, "taylor", data), scores_of(model, "taylor", said)
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = scores_of(model, "taylor", [(x, (y + 1) % 5) for x, y in said])
    assert any(not torch.allclose(one[k], other[k]) for k in one)


def positive_rule(x, weight, r):
    """R_j = sum_k (x_j w_jk)^+ / sum_i (x_i w_ik)^+ R_k, every product written out: x [n, in], r [n, out]."""
    products = (x[:, None, :] * weight[None]).clamp(min=0)
    total = products.sum(2)
    share = torch.where(total == 0, 0, r / (total + 1e-9))
    return (products * share[:, :, None]).sum(1)


def skip_rule(a, b, r):
    """In proportion, then rescaled so that each term gets its share of the whole."""
    out = a + b
    share = torch.where(out == 0, 0, r / (out + 1e-9))
    parts = [a * share, b * share]
    sums = [p.sum().abs() for p in parts]
    return [p / p.sum() * r.sum() * s / sum(sums) for p, s in zip(parts, sums, strict=True)]


def test_relevance_of_one_block_is_the_hand_written_pass():
    """z+ from the class token's logit to fc2's and proj's inputs, straight from the rules."""
    model = tiny(depth=1).double()
    x = images_for(model, 2)
    found = scores_of(model, "relevance", [(x, torch.tensor([3, 1]))])
    block, seen = model.blocks[0], {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=n: seen.__setitem__(n, args[0].detach()))
        for n, m in {"proj": block.attn.proj, "fc2": block.mlp.fc2, "fc1": block.mlp.fc1, "block": block}.items()
    ]
    wanted = {"0.heads": torch.zeros(3).double(), "0.channels": torch.zeros(192).double()}
    for image, label in zip(x, (3, 1), strict=True):
        with torch.no_grad():
            tokens = model.forward_features(image[None])[0]
            start = torch.zeros(1, 5, dtype=torch.float64)
            start[0, label] = 1
            last = positive_rule(tokens[:1], model.head.weight, start)  # the final norm passes it on
            proj, fc2, fc1, entering = (seen[n][0, :1] for n in ("proj", "fc2", "fc1", "block"))
            attended = block.attn.proj(proj)
            middle = entering + attended
            skipped, branch = skip_rule(middle, block.mlp.fc2(fc2), last)
            hidden = positive_rule(fc2, block.mlp.fc2.weight, branch)
            wanted["0.channels"] += hidden[0].abs()
            reached = skipped + positive_rule(fc1, block.mlp.fc1.weight, hidden)
            _, branch = skip_rule(entering, attended, reached)
            gathered = positive_rule(proj, block.attn.proj.weight, branch)
            wanted["0.heads"] += gathered[0].view(3, 16).sum(1).abs()
    for hook in hooks:
        hook.remove()
    for key, value in wanted.items():
        assert relative(found[key], value / 2) < 1e-6, key


@pytest.mark.parametrize("pruner", [None, "evit"])
@pytest.mark.parametrize("family", ["vit", "dinov2_giant", "avg_pool", "res_post"])
def test_relevance_is_conserved_from_branch_to_units(family, pruner):
    """The units' signed relevance sums to what the skip connection gave the branch, block by block, image by image."""
    model = tiny(family).double()
    if pruner is not None:
        prunex.attach(model, pruner, keep_ratio=0.6, stages=(1, 2))
    reached = []

    class Listening(_Rules):
        def add(self, a, b):
            b = b.view_as(b)
            reached.append(b)
            return super().add(a, b)

    ops = Listening({last_layer(model.get_submodule(b.path), b.kind): b.key for b in branches(model)})
    x = images_for(model).requires_grad_()
    tape = Tape(gradients=True, ops=ops)
    prunex.vit.forward.record(model, x, tape)
    ops.relevance = True
    skips, inputs = reached[-8:], list(ops.seen.values())
    start = torch.zeros_like(tape.logits).scatter_(1, torch.tensor([[4], [0], [2]]), 1)
    found = torch.autograd.grad(tape.logits, [*skips, *inputs], start)
    assert list(ops.seen) == [b.key for b in branches(model)]
    for branch, units in zip(found[:8], found[8:], strict=True):
        assert relative(units.sum((1, 2)), branch.sum((1, 2))) < 1e-5
        assert float(units.abs().sum()) > 0


@pytest.mark.parametrize("rule", ["zplus", "attnlrp"])
def test_relevance_does_not_depend_on_the_tokens_left_out_of_the_last_block(rule):
    """The read-out token alone goes through the last block: what the others would carry is 0."""
    model = tiny().double()
    with prunex.attach(model, "relevance", rule=rule) as pruning:
        found = pruning.pruner.relevance(model, images_for(model), torch.tensor([4, 0, 2]))
    assert found["3.heads"].shape == (3, 1, 3)
    assert found["2.channels"].shape == (3, 17, 192)
    assert isinstance(pruning.model, torch.nn.Module)


def test_attnlrp_without_biases_gives_the_last_branch_its_share_of_the_logit():
    """LRP-0 through linear layers: the last MLP's channels sum to fc2's output times its gradient."""
    model = tiny(depth=2).double()
    x = images_for(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    with prunex.attach(model, "relevance", rule="attnlrp") as pruning:
        found = pruning.pruner.relevance(model, x, torch.tensor([4, 0, 2]))
    said = {}
    model.blocks[1].mlp.fc2.register_forward_hook(lambda m, args, out: said.__setitem__("branch", out))
    model.norm.register_forward_pre_hook(lambda m, args: said.__setitem__("stream", args[0]))
    with torch.no_grad():
        model(x)
    stream, branch = said["stream"][:, 0], said["branch"][:, 0]
    deviation = (stream.var(1, unbiased=False, keepdim=True) + model.norm.eps).sqrt()
    weights = model.head.weight[[4, 0, 2]] * model.norm.weight / deviation
    share = ((branch - branch.mean(1, keepdim=True)) * weights).sum(1)
    assert largest(found["1.channels"].sum((1, 2)), share) < 1e-8


def test_random_is_its_own_generators_uniform_numbers():
    model = tiny()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = scores_of(model, "random", seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(11)
    for b in branches(model):
        assert torch.equal(found[b.key], torch.rand(b.units, generator=generator, dtype=torch.float64))
    assert not torch.equal(scores_of(model, "random", seed=12)["0.heads"], found["0.heads"])


# --- what all of them have in common ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude", {"weights": "out"}),
        ("taylor", {}),
        ("taylor", {"within": True}),
        ("relevance", {}),
        ("relevance", {"rule": "attnlrp", "within": True}),
    ],
)
def test_channels_whose_columns_are_zero_are_the_ones_removed(method, options):
    model, dead = planted()
    x = images_for(model)
    with torch.no_grad():
        before = model(x)
    pruning = prunex.attach(model, method, budget=half_of_channels(model), **options)
    widths = pruning.calibrate(data_for(method))
    assert not widths.heads
    for number, gone in dead.items():
        assert widths.channels[number] == tuple(sorted(set(range(192)) - set(gone.tolist())))
    with torch.no_grad():
        assert largest(model(x), before) < 1e-5


@pytest.mark.parametrize("method", LOOKING)
@pytest.mark.parametrize("labels", [True, False])
def test_how_images_are_split_into_batches_does_not_matter(method, labels):
    data = batches(1, 6, labels=labels)
    x, y = data[0] if labels else (data[0], None)
    splits = [[6], [4, 2], [1] * 6, [1, 5]]
    found = []
    for sizes in splits:
        parts, marks = x.split(sizes), None if y is None else y.split(sizes)
        found.append(scores_of(tiny(), method, parts if marks is None else list(zip(parts, marks, strict=True))))
    for other in found[1:]:
        assert all(relative(other[k], found[0][k]) < 1e-4 for k in other)
    chosen = []
    for sizes in splits:
        parts, marks = x.double().split(sizes), None if y is None else y.split(sizes)
        with prunex.attach(tiny().double(), method, budget=0.5) as pruning:
            chosen.append(pruning.calibrate(parts if marks is None else list(zip(parts, marks, strict=True))))
    assert chosen.count(chosen[0]) == len(splits)


@pytest.mark.parametrize("make", [tiny, lambda: tiny("dinov2_giant"), lambda: tiny("dinov3"), swin])
@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize("budget", [0.5, 0.8])
def test_the_budget_is_met(make, method, budget):
    model = make()
    dense = prunex.cost(model)
    if method == "relevance" and type(model).__name__ == "SwinTransformer":
        with pytest.raises(PrunexError, match="relevance cannot be led through"):
            prunex.attach(model, method, budget=budget)
        assert not hasattr(model, "prunex_units")
        return
    pruning = prunex.attach(model, method, budget=budget)
    pruning.calibrate(data_for(method))
    small = removed(model)
    found = prunex.cost(model)
    assert found == prunex.cost(small)
    assert 0.99 * budget < found.macs / dense.macs <= budget
    assert found.params == sum(p.numel() for p in small.parameters()) < dense.params
    x = images_for(model)
    with torch.no_grad():
        assert largest(model(x), small(x)) < 1e-5


@pytest.mark.parametrize("method", CRITERIA)
def test_rounded_widths_and_blocks_without_heads(method):
    model = tiny()
    pruning = prunex.attach(model, method, budget=0.35, round_to=16, min_heads=0, min_channels=16)
    widths = pruning.calibrate(data_for(method))
    assert all(len(units) % 16 == 0 and len(units) >= 16 for units in widths.channels.values())
    small, x = removed(model), images_for(model)
    assert prunex.cost(small).macs <= 0.35 * prunex.cost(tiny()).macs
    with torch.no_grad():
        assert largest(model(x), small(x)) < 1e-5


@pytest.mark.parametrize("method", CRITERIA)
def test_no_heads_at_all_leave_the_biases(method):
    model = tiny()
    least = prunex.cost(model).macs - sum(b.units * b.macs for b in branches(model))
    pruning = prunex.attach(model, method, budget=f"{least}MACs", min_heads=0, min_channels=0)
    widths = pruning.calibrate(data_for(method))
    assert all(not units for units in (*widths.heads.values(), *widths.channels.values()))
    assert prunex.cost(model).macs == prunex.cost(removed(model)).macs == least
    x = images_for(model)
    with torch.no_grad():
        assert largest(model(x), removed(model)(x)) < 1e-5


@pytest.mark.parametrize("method", CRITERIA)
def test_token_pruning_may_come_before_or_after(method):
    found = []
    for first in (True, False):
        model = tiny().double()
        if first:
            prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2))
        pruning = prunex.attach(model, method, budget=0.5)
        if not first:
            prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2))
        found.append(pruning.calibrate(data_for(method)))
        dense = prunex.cost(tiny()).macs
        assert 0.49 < prunex.cost(model).macs / dense <= 0.5
        assert prunex.cost(removed(model)).macs == prunex.cost(model).macs
    assert found[0] == found[1]
    alone = tiny().double()
    assert prunex.attach(alone, method, budget=0.5).calibrate(data_for(method)) != found[0]


@pytest.mark.parametrize("method", CRITERIA)
def test_calibration_leaves_everything_but_the_decision_as_it_was(method):
    model = tiny().train()
    tokens = prunex.attach(model, "evit", keep_ratio=0.6, stages=(1,))
    pruning = prunex.attach(model, method, budget=0.5)
    model.blocks[1].eval()
    model.head.weight.requires_grad_(False)
    model(images_for(model)).sum().backward()
    trace, forwards = model.prunex.trace, list(model.prunex.forwards)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = state_of(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 5), batch_size=4, shuffle=True)
    torch.set_rng_state(state)
    with torch.no_grad():
        pruning.calibrate(loader)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.prunex.trace is trace
    assert [id(f) for f in model.prunex.forwards] == [id(f) for f in forwards]
    assert tokens.losses() is not None
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n not in grads)
        assert p.grad is None or torch.equal(p.grad, grads[n])
    for key in [k for k in before["tensors"] if k.startswith("prunex_units")]:
        before["tensors"][key] = model.state_dict()[key].clone()
    assert_same_state(model, before)


@pytest.mark.parametrize("method", LOOKING)
@pytest.mark.parametrize("when", [0, 1])
def test_what_is_raised_on_the_way_leaves_the_model_as_it_was(method, when):
    model = tiny().train()
    pruning = prunex.attach(model, method, budget=0.5)
    before, state = state_of(model), torch.get_rng_state()

    def failing():
        if when:
            yield batches(1)[0]
        torch.rand(1)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        pruning.calibrate(failing())
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(model, before)
    assert not pruning.decided
    x = images_for(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), tiny()(x))


@pytest.mark.parametrize("method", CRITERIA)
def test_scoring_again_looks_at_all_units(method):
    """A decision that was made closes gates; the next calibration must not take it for the model."""
    model, data = tiny(), data_for(method)
    pruning = prunex.attach(model, method, budget=0.5)
    first = pruning.calibrate(data)
    assert pruning.calibrate(data) == first
    x = images_for(model)
    with torch.no_grad():
        assert largest(model(x), removed(model)(x)) < 1e-5
        assert torch.equal(pruning.detach()(x), tiny()(x))
    prunex.attach(model, "evit", keep_ratio=0.7, stages=(0, 1))  # looks into the attention of open heads
    pruning = prunex.attach(model, method, budget=0.5)
    before = pruning.pruner.scores(model, data)
    generator = torch.Generator().manual_seed(0)
    pruning.pruner.decide({b.key: torch.rand(b.units, generator=generator) for b in pruning.pruner.branches})
    assert {0, 1} <= set(pruning.widths.heads)
    after = pruning.pruner.scores(model, data)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("method", CRITERIA)
def test_frozen_weights_no_grad_and_inference_mode_do_not_matter(method):
    wanted = prunex.attach(tiny(), method, budget=0.5).calibrate(data_for(method))
    model = tiny().requires_grad_(False)
    pruning = prunex.attach(model, method, budget=0.5)
    with torch.inference_mode():
        assert pruning.calibrate(data_for(method)) == wanted
    model.grad_checkpointing = True
    assert pruning.calibrate(data_for(method)) == wanted
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", CRITERIA)
def test_half_precision_weights_are_scored_in_float32(method):
    model = tiny().to(torch.bfloat16)
    wide = copy.deepcopy(model).float()
    found, wanted = (prunex.attach(m, method, budget=0.5).calibrate(data_for(method)) for m in (model, wide))
    assert found == wanted
    assert next(model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.isfinite(model(images_for(model))).all()


@pytest.mark.parametrize("method", CRITERIA)
def test_the_spec_makes_the_same_pruning(method):
    model = tiny()
    with prunex.attach(model, method, budget=0.5, min_heads=0, round_to=8) as pruning:
        spec, wanted = pruning.spec, pruning.calibrate(data_for(method))
    assert spec["method"] == method
    assert prunex.attach(model, **spec).calibrate(data_for(method)) == wanted


@pytest.mark.parametrize("method", LOOKING)
@pytest.mark.parametrize("shape", ["loader", "dict", "pair", "tensor"])
def test_images_come_in_every_usual_way(method, shape):
    x, y = batches(1, 6)[0]
    pruning = prunex.attach(tiny(), method, budget=0.5)
    given = {
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "dict": [{"image": x, "label": y}],
        "pair": (x, y),
        "tensor": x,
    }[shape]
    labelled = pruning.calibrate(given)
    assert labelled == pruning.calibrate([x] if shape == "tensor" else [(x, y)])


@pytest.mark.parametrize("method", LOOKING)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "calibration got no images: give calibrate"),
        ([], "got no images"),
        (7, "got a int"),
        ("images", "got a str"),
        ([torch.zeros(2, 5)], "found no images in a Tensor"),
        ([torch.zeros(2, 3, 16, 16)], "16 x 16 pixels"),
        ([torch.zeros(2, 1, 32, 32)], r"images have shape \[2, 1, 32, 32\]"),
        ([torch.full((2, 3, 32, 32), float("nan"))], "NaN"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1, 2]))], r"labels \[3\] for 2 images"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 5]))], "run from 0 to 5: this model has classes 0..4"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])), torch.zeros(2, 3, 32, 32)], "some have none"),
    ],
)
def test_batches_that_do_not_fit_are_refused(method, given, message):
    pruning = prunex.attach(tiny(), method, budget=0.5)
    with pytest.raises(PrunexError, match=message):
        pruning.calibrate(given)
    assert not pruning.decided


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("random", {"seed": -1}, "seed=-1 is not allowed"),
        ("random", {"seed": 0.5}, "seed=0.5 is not allowed"),
        ("magnitude", {"weights": "in"}, "unknown weights 'in'"),
        ("taylor", {"within": 1}, "within=1 is not allowed"),
        ("relevance", {"rule": "gradcam"}, "unknown rule 'gradcam'"),
        ("relevance", {"within": None}, "within=None is not allowed"),
        ("taylor", {"rule": "zplus"}, "unknown option of taylor 'rule'"),
    ],
)
def test_options_out_of_range_are_refused(method, options, message):
    with pytest.raises(PrunexError, match=message):
        prunex.attach(tiny(), method, **options)


@pytest.mark.parametrize("method", LOOKING)
def test_models_without_a_classifier_are_refused(method):
    pruning = prunex.attach(tiny(num_classes=0), method, budget=0.5)
    with pytest.raises(PrunexError, match="no classifier"):
        pruning.calibrate(batches(labels=False))


def test_swin_images_are_checked():
    pruning = prunex.attach(swin(), "taylor", budget=0.5)
    for bad in (torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 32, 32), torch.zeros(0, 3, 32, 32)):
        with pytest.raises(PrunexError, match="this model takes"):
            pruning.calibrate([bad])
    with pytest.raises(PrunexError, match="NaN"):
        pruning.calibrate([torch.full((1, 3, 32, 32), float("inf"))])
    model = swin()
    model.reset_classifier(0)
    headless = prunex.attach(model, "taylor", budget=0.5)
    with pytest.raises(PrunexError, match="no classifier"):
        headless.calibrate([torch.zeros(1, 3, 32, 32)])


@pytest.mark.parametrize("method", CRITERIA)
def test_methods_are_listed_with_paper_and_needs(method):
    entry = next(m for m in prunex.methods("pruner") if m.name == method)
    assert entry.needs
    assert entry.paper
    assert Relevance.needs == "images"


def test_deit_small_at_half_its_cost():
    """The published shape: closed form and attached count agree, whatever the criterion says."""
    model = timm.create_model("deit_small_patch16_224")
    pruning = prunex.attach(model, "magnitude", budget="2.4GMACs", round_to=8)
    widths = pruning.calibrate()
    found = prunex.cost(model)
    assert 0.99 * 2.4e9 < found.macs <= 2.4e9
    assert all(len(units) % 8 == 0 for units in widths.channels.values())
    assert prunex.cost(removed(model)).macs == found.macs
