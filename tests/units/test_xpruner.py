"""X-Pruner: masks with a class axis, thresholds under a multiplier, hard gates, and what is saved and loaded."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from prunex.vit.units import branches
from tests.units.units import half_of_channels, planted, removed, swin
from tests.vits import assert_same_state, images, images_for, largest, state_of, tiny

LABELS = torch.tensor([3, 1, 3])


def pruned(model=None, **options):
    model = tiny() if model is None else model
    return model, prunex.attach(model, "xpruner", **{"budget": 0.5} | options)


def noisy(pruning, seed=0):
    """Masks away from 1, as if they had been learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask in pruning.pruner.masks():
            mask.copy_(torch.rand(mask.shape, generator=generator) + 0.5)
    return pruning


def in_stage(stage, **options):
    """A model whose masks are learned, as it is in a stage; "removed" is after the last."""
    model, pruning = pruned(**options)
    noisy(pruning)
    if stage != "masks":
        pruning.pruner.stage = "thresholds"
        with torch.no_grad():
            pruning.pruner.thresholds.add_(0.97)
            pruning.pruner.multiplier.fill_(0.25)
    if stage in ("done", "removed"):
        pruning.pruner.conclude()
    if stage == "removed":
        pruning.remove()
    return model, pruning


# --- the seven proofs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny, lambda: tiny("layer_scale"), lambda: tiny("dinov2_giant"), swin])
@pytest.mark.parametrize("training", [False, True])
def test_masks_of_one_leave_the_model_dense(make, training):
    model = make().train(training)
    x = images_for(model)
    names = [n for n, _ in model.named_parameters()]
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(x)
        _, pruning = pruned(model, budget=0.7)
        with pruning.labelled(LABELS):
            assert largest(model(x), wanted) < 1e-6
        assert largest(model(x), wanted) < 1e-6
    assert [n for n, _ in model.named_parameters()] == names
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in dense.items())
    assert all(k.startswith("prunex_units.xpruner.") for k in state if k not in dense)


def test_masks_multiply_the_channels_in_front_of_proj_and_fc2_by_the_labels_row():
    """The same as scaling columns of the last layers, image by image."""
    model, pruning = pruned(tiny().double())
    noisy(pruning)
    x = images_for(model)
    model.train()
    with pruning.labelled(LABELS), torch.no_grad():
        found = model(x)
    for i, label in enumerate(LABELS.tolist()):
        scaled = tiny().double()
        with torch.no_grad():
            for b in pruning.pruner.branches:
                block = scaled.get_submodule(b.path)
                last = block.attn.proj if b.kind == "heads" else block.mlp.fc2
                last.weight *= pruning.pruner.mask(b)[label].double()
            assert largest(found[i], scaled(x[i : i + 1])[0]) < 1e-10


def test_only_rows_of_labels_that_are_there_get_a_gradient():
    model, pruning = pruned(sparse=0.0, smooth=0.0)
    model.train().requires_grad_(False)
    with pruning.labelled(LABELS):
        F.cross_entropy(model(images_for(model)), LABELS).backward()
    for mask in pruning.pruner.masks():
        rows = mask.grad.abs().sum(1) > 0
        assert rows.tolist() == [False, True, False, True, False]
    assert all(p.grad is None for p in model.parameters())


def test_what_is_validated_never_sees_the_label():
    model, pruning = pruned()
    x = images_for(model)
    noisy(pruning)
    with torch.no_grad():
        dense = tiny()(x)
        with pruning.labelled(LABELS):
            assert torch.equal(model.eval()(x), dense)
        assert torch.equal(model.train()(x), dense)


def test_the_rate_never_falls_as_a_threshold_rises():
    _, pruning = in_stage("thresholds")
    pruner = pruning.pruner
    with torch.no_grad():
        for i in range(len(pruner.branches)):
            rates = []
            for value in torch.linspace(-2, 4, 25):
                pruner.thresholds[i] = value
                rates.append(float(pruner.rate()))
            assert all(b >= a - 1e-7 for a, b in zip(rates, rates[1:], strict=False))
            assert rates[-1] > rates[0]
            pruner.thresholds[i] = 0.0
        pruner.thresholds.fill_(-1e6)
        assert float(pruner.rate()) == 0
        pruner.thresholds.fill_(1e6)
        assert float(pruner.rate()) == 1


def test_the_rate_is_the_definition():
    _, pruning = in_stage("thresholds")
    pruner = pruning.pruner
    total = kept = 0.0
    for i, b in enumerate(pruner.branches):
        mean = pruner.mask(b).detach().double().abs().mean(0).view(b.units, b.width).mean(1)
        for u in range(b.units):
            gap = float(mean[u] / mean.mean()) - float(pruner.thresholds[i])
            kept += b.macs * 0.5 * (1 + float(torch.tanh(torch.tensor(10 * gap).double())))
            total += b.macs
    assert abs(float(pruner.rate()) - (1 - kept / total)) < 1e-5
    assert abs(pruner.target - (1 - pruning.budget() / total)) < 1e-9


def test_the_multiplier_climbs_and_pushes_thresholds_up_while_too_little_is_removed():
    model, pruning = pruned()
    noisy(pruning)
    pruner = pruning.pruner
    pruner.stage = "thresholds"
    with torch.no_grad():
        pruner.thresholds.fill_(0.5)
        assert float(pruner.rate()) < pruner.target
    seen = []
    for _ in range(5):
        pruner.ascend()
        seen.append(float(pruner.multiplier))
        (slope,) = torch.autograd.grad(pruning.losses()["rate"], pruner.thresholds)
        assert (slope < 0).all()
    assert seen[0] > 0
    assert all(b > a for a, b in zip(seen, seen[1:], strict=False))
    with torch.no_grad():  # and falls where too much is
        pruner.thresholds.fill_(2.0)
        assert float(pruner.rate()) > pruner.target
    pruner.ascend()
    assert float(pruner.multiplier) < seen[-1]
    assert pruner.multiplier.requires_grad is False
    assert model is pruning.model


@pytest.mark.parametrize("make", [tiny, lambda: tiny("dinov2_reg"), swin])
def test_hard_gates_equal_the_removed_model(make):
    model, pruning = pruned(make().double(), budget=0.6)
    noisy(pruning)
    pruning.pruner.stage = "thresholds"
    pruning.pruner.conclude()
    small, x = removed(model), images_for(model)
    with torch.no_grad():
        assert largest(model(x), small(x)) < 1e-6
        assert largest(model.train()(x), small(x)) < 1e-6
    dense = prunex.cost(make()).macs
    assert 0.594 < prunex.cost(small).macs / dense <= 0.6
    assert prunex.cost(small) == prunex.cost(model)


def test_thresholds_get_the_soft_gates_gradient_through_the_hard_gates():
    model, pruning = in_stage("thresholds")
    model.train()
    x = images_for(model)
    F.cross_entropy(model(x), LABELS).backward()
    assert (pruning.pruner.thresholds.grad != 0).all()
    assert all(m.grad is None for m in pruning.pruner.masks())
    with torch.no_grad():  # the value is the hard gates': the same in training and out of it
        assert largest(model(x), model.eval()(x)) < 1e-5
        closed = pruning.pruner.closed()
    assert sum(closed.values()) > 0


def test_channels_that_do_nothing_are_the_ones_removed():
    """Half of the second layers' columns are zero: masks and thresholds, trained a little, find exactly those."""
    model, dead = planted(depth=2, mlp_ratio=0.5)  # few channels, so that the task needs each that does something
    budget = half_of_channels(model)
    pruning = prunex.attach(model, "xpruner", budget=budget, sparse=0.1, smooth=0.0, min_channels=0)
    pruner, x = pruning.pruner, images(16)
    with torch.no_grad():
        labels = model(x).argmax(1)
    model.train().requires_grad_(False)
    optimizer = torch.optim.SGD(pruner.masks(), lr=30.0, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        with pruning.labelled(labels):
            logits = model(x)
        pruner.saw(labels)
        (F.cross_entropy(logits, labels) + sum(pruning.losses().values())).backward()
        optimizer.step()
    pruner.stage = "thresholds"
    optimizer = torch.optim.AdamW([pruner.thresholds], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), labels) + sum(pruning.losses().values())).backward()
        optimizer.step()
        pruner.ascend()
    pruner.conclude()
    assert not pruning.widths.heads
    for number, gone in dead.items():
        assert pruning.widths.channels[number] == tuple(sorted(set(range(24)) - set(gone.tolist())))
    assert pruner.updates.sum() == 150 * 16


# --- losses ----------------------------------------------------------------------------------------------------------


def test_penalties_are_their_definitions():
    _, pruning = pruned(sparse=0.3, smooth=0.7)
    noisy(pruning)
    pruner = pruning.pruner
    squares = count = rough = pairs = 0.0
    for b in pruner.branches:
        m = pruner.mask(b).detach().double()
        squares += float(m.square().sum())
        count += m.numel()
        groups = m.view(5, b.units, b.width) if b.kind == "heads" else m.view(5, 1, b.units)
        for row in groups.flatten(0, 1):
            for u in range(1, len(row) - 1):
                rough += abs(float(row[u - 1] - 2 * row[u] + row[u + 1]))
                pairs += 1
    losses = pruning.losses()
    assert abs(float(losses["sparse"]) - 0.3 * squares / count) < 1e-5
    assert abs(float(losses["smooth"]) - 0.7 * rough / pairs) < 1e-5
    assert set(pruned(sparse=0.0, smooth=0.0)[1].losses()) == set()
    fresh = pruned()[1].losses()
    assert float(fresh["smooth"]) == 0  # masks of one are smooth, their ends included
    assert set(in_stage("thresholds")[1].losses()) == {"rate"}
    assert in_stage("done")[1].losses() == {}


def test_the_constraint_is_its_definition():
    _, pruning = in_stage("thresholds", weight=7.0, beta=2.0)
    gap = pruning.pruner.target - float(pruning.pruner.rate())
    assert abs(float(pruning.losses()["rate"]) - 7 * (2 * gap**2 + 0.25 * gap)) < 1e-5


# --- class groups and the table --------------------------------------------------------------------------------------


def test_classes_of_a_group_share_a_row():
    model, pruning = pruned(class_groups=[0, 1, 0, 1, 2], sparse=0.0, smooth=0.0)
    assert {tuple(m.shape) for m in pruning.pruner.masks()} == {(3, 48), (3, 192)}
    noisy(pruning)
    model.train().requires_grad_(False)
    x = images_for(model)
    with pruning.labelled(torch.tensor([0, 1, 4])), torch.no_grad():
        one = model(x)
    with pruning.labelled(torch.tensor([2, 3, 4])):
        two = model(x)
    assert torch.equal(one, two)
    two[:2].sum().backward()
    assert all((m.grad.abs().sum(1) > 0).tolist() == [True, True, False] for m in pruning.pruner.masks())
    table = pruning.relevance_table()
    assert table.heads[0].shape == (5, 3)
    assert torch.equal(table.heads[1][0], table.heads[1][2])
    assert pruning.options["class_groups"] == [0, 1, 0, 1, 2]
    wide = prunex.attach(tiny(), **pruning.spec)
    assert wide.options == pruning.options


@pytest.mark.parametrize("bad", [[0, 1], [0, 1, 2, 3, 5], [0, 0, 0, 0, -1], [0, 1, 2, 3, 4.0], "01234", 5, [True] * 5])
def test_groups_that_are_none_are_refused(bad):
    with pytest.raises(PrunexError, match="class_groups"):
        pruned(class_groups=bad)


def test_the_table_says_what_the_masks_say():
    model, pruning = pruned()
    noisy(pruning)
    pruner = pruning.pruner
    pruner.saw(LABELS)
    pruner.conclude()
    table = pruning.relevance_table()
    mask = pruner.mask(pruner.branches[0]).detach()
    assert largest(table.heads[0], mask.abs().view(5, 3, 16).mean(2)) == 0
    assert table.channels[2].shape == (5, 192)
    assert table.updates.tolist() == [0, 1, 0, 2, 0]
    excess = {
        (block, head): float(t[3, head] - t[:, head].mean())
        for block, t in table.heads.items()
        for head in range(3)
        if bool(pruner.open(f"{block}.heads")[head])
    }
    best = table.top_heads(3, k=2)
    assert [b[:2] for b in best] == sorted(excess, key=excess.get, reverse=True)[:2]
    assert [c for c, _ in table.top_classes(1, 2, k=3)] == table.heads[1][:, 2].argsort(descending=True).tolist()[:3]
    rows = table.rows()
    assert len(rows) == 5 * 4 * 3
    assert {r["kept"] for r in rows} <= {True, False}
    assert rows[0] == {
        "class": 0,
        "block": 0,
        "head": 0,
        "relevance": round(float(table.heads[0][0, 0]), 6),
        "kept": bool(pruner.open("0.heads")[0]),
        "updates": 0,
    }
    with pytest.raises(PrunexError, match="without a class axis"):
        prunex.attach(tiny(), "random").relevance_table()
    assert model is pruning.model


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "labels are list"),
        (torch.tensor([0.0, 1.0]), r"torch.float32 \[2\]"),
        (torch.tensor([[0, 1]]), r"torch.int64 \[1, 2\]"),
        (torch.tensor([True, False]), "torch.bool"),
        (torch.tensor([], dtype=torch.long), r"\[0\]"),
        (torch.tensor([0, 5]), "run from 0 to 5, the model has 5 classes"),
        (torch.tensor([-1, 2]), "run from -1 to 2"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message):
    _, pruning = pruned()
    with pytest.raises(PrunexError, match=message), pruning.labelled(labels):
        pass
    assert pruning.model.prunex_units.labels is None


def test_labels_are_forgotten_whatever_is_raised():
    model, pruning = pruned()
    with pruning.labelled(LABELS):
        assert model.prunex_units.labels is LABELS
    assert model.prunex_units.labels is None
    model.train()
    with pytest.raises(PrunexError, match="pixels"), pruning.labelled(LABELS):
        prunex.explain("rollout", model, images(3, (24, 24)))
    assert model.prunex_units.labels is None


def test_labels_of_another_number_of_images_are_refused():
    model, pruning = pruned()
    model.train()
    with pytest.raises(PrunexError, match="given 2 labels for 3 images"), pruning.labelled(LABELS[:2]):
        model(images_for(model))
    with pytest.raises(PrunexError, match="given 3 labels for 6 images"), pruning.labelled(LABELS):
        model(images_for(model, 6))


def test_units_are_not_known_before_they_are_chosen():
    _, pruning = pruned()
    with pytest.raises(PrunexError, match="has not chosen units yet"):
        _ = pruning.widths
    with pytest.raises(PrunexError, match="learns its scores in training"):
        pruning.calibrate([images()])
    with pytest.raises(PrunexError, match="unknown stage 'fine-tuning'"):
        pruning.pruner.stage = "fine-tuning"
    with pytest.raises(PrunexError, match="pruned already by xpruner"):
        prunex.attach(pruning.model, "taylor")


@pytest.mark.parametrize("name", ["sparse", "smooth", "slope", "weight", "beta", "rho"])
@pytest.mark.parametrize("bad", [-0.1, float("nan"), "1", True])
def test_numbers_out_of_range_are_refused(name, bad):
    with pytest.raises(PrunexError, match=name):
        pruned(**{name: bad})


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(PrunexError, match="needs a model with a classifier"):
        pruned(tiny(num_classes=0))


# --- copies, types, files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["masks", "thresholds", "done", "removed"])
def test_a_copy_is_its_own(stage):
    model, pruning = in_stage(stage)
    x = images_for(model)
    twin = copy.deepcopy(model)
    handle = prunex.attached(twin, units=True)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(twin(x), before)
    assert handle.pruner is not pruning.pruner
    assert handle.pruner.stage == pruning.pruner.stage
    with torch.no_grad():
        for mask in handle.pruner.masks():
            mask.zero_()
        handle.pruner.thresholds.fill_(-9)
        assert torch.equal(model(x), before)
    if stage == "masks":
        twin.train()
        with handle.labelled(LABELS), torch.no_grad():
            assert largest(twin(x), before) > 1e-3  # its own masks of zero, not the first model's
    handle.detach()
    with torch.no_grad():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("stage", ["masks", "thresholds", "done", "removed"])
def test_half_precision_keeps_what_is_learned_in_float32(stage):
    model, pruning = in_stage(stage)
    closed = pruning.pruner.closed()
    model.to(torch.bfloat16)
    pruner = pruning.pruner
    for tensor in (*pruner.masks(), pruner.thresholds):
        assert tensor.dtype == torch.float32
        assert tensor.is_leaf
        assert tensor.requires_grad
    assert pruner.closed() == closed
    x = images_for(model)
    model.train()
    with pruning.labelled(LABELS):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    if stage == "masks":
        assert all(m.grad is not None and m.grad.dtype == torch.float32 for m in pruner.masks())
    if stage == "thresholds":
        assert pruner.thresholds.grad is not None


@pytest.mark.parametrize("stage", ["masks", "thresholds", "done", "removed"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_dict_comes_back(stage, wrapped):
    model, pruning = in_stage(stage)
    x = images_for(model)
    file = io.BytesIO()
    torch.save((torch.nn.ModuleDict({"vit": model}) if wrapped else model).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = tiny(seed=9)
    handle = prunex.attach(other, "xpruner", budget=0.5)
    (torch.nn.ModuleDict({"vit": other}) if wrapped else other).load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert handle.pruner.stage == pruning.pruner.stage
    assert handle.removed == (stage == "removed")
    assert handle.decided == (stage in ("done", "removed"))
    assert prunex.cost(other) == prunex.cost(model)
    for one, two in zip(handle.pruner.masks(), pruning.pruner.masks(), strict=True):
        assert torch.equal(one, two)
    if stage in ("done", "removed"):
        assert handle.widths == pruning.widths
    if stage == "thresholds":
        assert torch.equal(handle.pruner.multiplier, pruning.pruner.multiplier)


def test_a_state_dict_of_removed_units_loads_into_a_removed_model_too():
    model, pruning = in_stage("removed")
    other, _ = in_stage("removed")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(model.state_dict(), strict=True)
    x = images_for(model)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert pruning.removed


@pytest.mark.parametrize("stage", ["masks", "thresholds", "done"])
def test_a_dense_state_dict_loads_strictly(stage):
    model, pruning = in_stage(stage)
    masks = [m.clone() for m in pruning.pruner.masks()]
    dense = tiny(seed=4)
    model.load_state_dict(dense.state_dict(), strict=True)
    assert pruning.pruner.stage == stage.replace("removed", "done")
    assert all(torch.equal(m, n) for m, n in zip(pruning.pruner.masks(), masks, strict=True))
    pruning.detach()
    x = images_for(model)
    with torch.no_grad():
        assert torch.equal(model(x), dense(x))


def test_detach_gives_the_dense_model_back():
    model = tiny()
    before = state_of(model)
    _, pruning = pruned(model)
    noisy(pruning)
    pruning.pruner.stage = "thresholds"
    pruning.pruner.conclude()
    assert pruning.detach() is model
    assert_same_state(model, before)
    assert pruning.detach() is model
    with pytest.raises(PrunexError, match="was detached"):
        _ = pruning.options


def test_removal_keeps_optimizers_going():
    """Momenta of what stays are those of before, and the next step moves the narrow model."""
    model, pruning = pruned()
    noisy(pruning)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = images_for(model)
    model(x).square().sum().backward()
    optimizer.step()
    pruning.pruner.conclude()
    moments = optimizer.state[model.blocks[0].mlp.fc1.weight]["exp_avg"].clone()
    kept = list(pruning.widths.channels[0])
    pruning.remove([optimizer])
    weight = model.blocks[0].mlp.fc1.weight
    assert torch.equal(optimizer.state[weight]["exp_avg"], moments[kept])
    before = weight.detach().clone()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert largest(weight, before) > 0


def test_token_pruning_and_masks_in_one_model():
    """Images lose different tokens; each still gets its own label's rows."""
    model = tiny().double()
    prunex.attach(model, "evit", keep_ratio=0.5, stages=(1, 2))
    _, pruning = pruned(model)
    noisy(pruning)
    x = images_for(model)
    model.train()
    with pruning.labelled(LABELS), torch.no_grad():
        together = model(x)
    for i in range(3):
        with pruning.labelled(LABELS[i : i + 1]), torch.no_grad():
            assert largest(model(x[i : i + 1])[0], together[i]) < 1e-10
    assert 0 < pruning.pruner.target < 1
    assert len(branches(model)) == 8
