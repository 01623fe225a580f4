"""Vision DiffMask as a pruner: its keep set, what the first pass costs, and the laws that hold for every pruner."""

import math

import pytest
import torch
from torch import nn

import prunex
from prunex import PrunexError
from prunex.callbacks import TokenPruning, load_from_checkpoint
from prunex.learned.diffmask import DiffMaskExplainer, MaskGates, load_explainer
from prunex.removal.game import Removal
from prunex.vit.embedding import embed, embed_patches, place, unplace
from prunex.vit.forward import begin, look_ahead, resume
from prunex.vit.recording import recording
from prunex.vit.replay import Absent
from prunex.vit.tape import Tape
from tests.callbacks.modules import Plain, trainer
from tests.callbacks.modules import loader as module_loader
from tests.explainers.quick import EXPLAINERS, explain
from tests.explainers.test_diffmask import explainer, force, liven
from tests.vit.test_cost import counted
from tests.vits import FAMILIES, assert_same_state, images, images_for, largest, relative, state_of, tiny

WAYS = ("adaptive", "fixed")
ways = pytest.mark.parametrize("count", WAYS)


def attach(model, count="adaptive", seed=3, **options):
    """Lively gates, with which images keep some patches each."""
    options = {"keep_ratio": 0.6, "threshold": 0.01} | options
    pruning = prunex.attach(model, "diffmask", count=count, **options)
    liven(pruning.pruner, seed)
    return pruning


# --------------------------------------------------------------------------------------------------------- the decision


@pytest.mark.parametrize("layer", [0, 1, 3, -1])
@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool_no_class", "clip"])
def test_what_the_explainer_keeps_is_what_goes_on(family, layer):
    model = tiny(family).double()
    x = images_for(model, 4)
    found = explainer(model).double()
    with torch.no_grad():
        votes = found(x)[:, layer].exp()
        bound = float(votes.median())
        kept = votes > bound
        assert not kept.all()
        assert kept.any(1).all()
        with prunex.attach(model, "diffmask", explainer=found, threshold=bound, layer=layer) as pruning:
            dropped = model(x)
            assert pruning.trace.kept().flatten(1).equal(kept)
            assert largest(pruning.trace.stages[0].score.exp(), votes) < 1e-9
        # Dropping them is running the model on what is left of its embedded tokens.
        for i in range(4):
            tokens, _ = embed(model, x[i : i + 1])
            prefix = model.num_prefix_tokens
            rows = torch.cat([torch.arange(prefix), prefix + kept[i].nonzero()[:, 0]])
            assert largest(dropped[i], resume(model, tokens[:, rows], (1, len(rows) - prefix))[0]) < 1e-9


def test_a_fixed_count_keeps_the_likeliest():
    model = tiny()
    found = explainer(model)
    x = images(4)
    with torch.no_grad(), prunex.attach(model, "diffmask", explainer=found, count="fixed", keep_ratio=0.3) as pruning:
        model(x)
        kept = pruning.trace.kept().flatten(1)
        votes = found(x)[:, -1]
    assert kept.sum(1).tolist() == [5, 5, 5, 5]
    for i in range(4):
        assert votes[i][kept[i]].min() >= votes[i][~kept[i]].max()


@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class"])
def test_where_no_patch_is_wanted(family):
    model = tiny(family)
    pruning = attach(model)
    force(pruning.pruner, -50.0)
    with torch.no_grad():
        assert torch.isfinite(model(images(2))).all()
        kept = pruning.trace.kept().flatten(1).sum(1)
        # A class token goes on alone; a head that only pools patches has one.
        assert kept.tolist() == ([0, 0] if family == "vit" else [1, 1])
        force(pruning.pruner, 50.0)
        model(images(2))
        assert pruning.trace.kept().all()


@ways
@pytest.mark.parametrize("family", ["vit", "avg_pool"])
def test_keep_ratio_one_and_threshold_nought_are_dense(count, family):
    model = tiny(family)
    x = images_for(model)
    dense = prunex.cost(model).macs
    with torch.no_grad():
        logits = model(x)
        for options in ({"keep_ratio": 1.0}, {"threshold": 0.0}):
            if "threshold" in options and count == "fixed":
                continue
            with attach(model, count, **options) as pruning:
                for masked in (None, True, False):
                    pruning.masked = masked
                    assert model(x).equal(logits)
                    assert pruning.trace.kept().all()
                assert prunex.cost(model).macs == dense


# ------------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize(
    ("family", "count"),
    [(f, way) for f in FAMILIES for way in (WAYS if f in ("vit", "avg_pool_no_class", "clip") else WAYS[:1])],
)
def test_masked_equals_removed_and_one_equals_many(family, count):
    model = tiny(family).double()
    x = images_for(model)
    pruning = attach(model, count)
    with torch.no_grad():
        removed, kept, share = model(x), pruning.trace.kept(), pruning.trace.share()
        assert not kept.all()
        assert not kept[0].equal(kept[1])
        pruning.masked = True
        assert largest(model(x), removed) < 1e-9
        assert pruning.trace.kept().equal(kept)
        assert largest(pruning.trace.share(), share) < 1e-12
        pruning.masked = None
        for i in range(3):
            assert largest(model(x[i : i + 1])[0], removed[i]) < 1e-9
            assert pruning.trace.kept()[0].equal(kept[i])


@ways
def test_training_mode_decides_the_same_without_chance(count):
    model = tiny(drop_path_rate=0.5)
    x = images()
    pruning = attach(model, count)
    with torch.no_grad():
        model(x)
        kept = pruning.trace.kept()
        model.train()
        flags = [m.training for m in model.modules()]
        for _ in range(3):  # drop path is random, the first pass is not
            model(x)
            assert pruning.trace.kept().equal(kept)
        assert [m.training for m in model.modules()] == flags
    assert pruning.losses() == {}


@ways
def test_fine_tuning_moves_the_model_and_not_the_gates(count):
    model = tiny().train()
    pruning = attach(model, count)
    model(images()).square().sum().backward()
    assert all(p.grad is None for p in pruning.pruner.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("prunex."))


@ways
def test_one_image_cannot_poison_its_neighbours(count):
    model = tiny()
    x = images(3)
    pruning = attach(model, count)
    with torch.no_grad():
        clean = model(x)
        spoiled = x.clone()
        spoiled[1] = 1e4
        for masked in (None, True):
            pruning.masked = masked
            assert largest(model(spoiled)[[0, 2]], clean[[0, 2]]) < 2e-6


@ways
def test_prefix_tokens_are_left_alone(count):
    model = tiny("dinov2_reg").double()
    x = images_for(model)
    with attach(model, count), recording(model, x, None, Tape(streams=True)) as recorded:
        dense, _ = embed(model, x)
        entering = recorded.tape.attended()[0].before
    assert entering[:, :5].equal(dense[:, :5])


@ways
@pytest.mark.parametrize("train", [False, True])
def test_detach_restores_bit_for_bit(count, train):
    model = tiny(drop_path_rate=0.1).train(train)
    before = state_of(model)
    pruning = attach(model, count)
    model(images())
    pruning.detach()
    assert_same_state(model, before)


def test_dense_weights_load_strictly():
    model, other = tiny(), tiny(seed=5)
    pruning = attach(model)
    gates = {k: v.clone() for k, v in pruning.pruner.state_dict().items()}
    model.load_state_dict(other.state_dict(), strict=True)
    assert all(v.equal(gates[k]) for k, v in pruning.pruner.state_dict().items())
    with torch.no_grad():
        assert pruning.detach()(images()).equal(other(images()))


@ways
@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_every_explainer_works_on_it(explainer, count):
    model = tiny().double()
    x = images(2, dtype=torch.float64)
    tolerance = 1e-9 if explainer == "r_cut" else 1e-10
    with attach(model, count) as pruning:
        removed = explain(explainer, model, x)
        pruning.masked = True
        masked = explain(explainer, model, x)
        pruning.masked = None
        single = explain(explainer, model, x[1:])
    assert not removed.trace.kept().all()
    assert relative(masked.maps, removed.maps) < tolerance
    assert relative(single.maps[0], removed.maps[1]) < tolerance
    assert torch.isfinite(removed.maps).all()


# ------------------------------------------------------------------------------------------- decisions, again and again


@pytest.mark.parametrize("masked", [None, True])
@pytest.mark.parametrize("frozen", [True, False])
@ways
def test_unaltered_tokens_give_the_logits_of_the_forward(count, masked, frozen):
    model = tiny().double()
    attach(model, count).masked = masked
    x = images(dtype=torch.float64)
    index = torch.tensor([2, 0, 0, 1])
    with recording(model, x, None, Tape()) as recorded, torch.no_grad():
        found = recorded.again(recorded.embedded[index], index if frozen else None, frozen=frozen)
        assert relative(found, recorded.logits[index]) < 1e-12


@pytest.mark.parametrize("family", ["vit", "avg_pool", "dinov2_reg", "clip"])
@pytest.mark.parametrize("absent_masked", [False, True])
def test_it_decides_among_the_patches_that_are_there(family, absent_masked):
    """The first pass knows which patches the slots hold."""
    model = tiny(family).double()
    x = images_for(model, 2)
    prefix = model.num_prefix_tokens
    present = torch.zeros(2, 16, dtype=torch.bool)
    present[:, [1, 2, 4, 7, 8, 11, 13, 14]] = True
    present[1] = present[1].roll(1)
    pruning = attach(model)
    gates: MaskGates = pruning.pruner.gates
    with torch.no_grad():
        tokens, grid = embed(model, x)
        absent = Absent(present, masked=absent_masked)
        answers = resume(model, tokens, grid, (absent, pruning.pruner), masked=absent_masked)
        for i in range(2):
            rows = torch.cat([torch.arange(prefix), prefix + present[i].nonzero()[:, 0]])
            few = tokens[i : i + 1, rows]
            first = unplace(model, few, grid, present[i].nonzero().T)
            stream = look_ahead(begin(model, few, (1, 8), pruning._attached.anatomy), 4)
            states = [first, *(s[:, prefix:] for s in stream)]
            logits = gates(states)
            kept = (torch.sigmoid(logits + 0.2 * math.log(5)).prod(1) > 0.01)[0]
            assert 0 < int(kept.sum()) < 8
            few = few[:, torch.cat([torch.arange(prefix), prefix + kept.nonzero()[:, 0]])]
            assert largest(answers[i], resume(model, few, (1, few.shape[1] - prefix))[0]) < 1e-9


@pytest.mark.parametrize("family", ["vit", "avg_pool_no_class"])
@ways
def test_removal_games_of_both_routes_agree(count, family):
    model = tiny(family).double()
    x = images_for(model, 2)
    attach(model, count)
    coalitions = torch.rand(2, 6, 16, generator=torch.Generator().manual_seed(1)) < 0.6
    coalitions[:, 0], coalitions[:, 1] = True, False
    dropped, masked = (Removal(model, x, removal=r)(coalitions) for r in ("drop", "mask"))
    assert largest(dropped, masked) < 1e-9
    with torch.no_grad():
        assert largest(dropped[:, 0], model(x).softmax(1)) < 1e-9
    adaptive = Removal(model, x, selection="free")(coalitions)
    assert torch.isfinite(adaptive).all()
    assert largest(adaptive[:, 0], dropped[:, 0]) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_unplacing_takes_back_what_placing_adds(family):
    model = tiny(family).double()
    x = images_for(model, 2)
    with torch.no_grad():
        patches, grid = embed_patches(model, x)
        placed = place(model, patches, grid)
        found = unplace(model, placed, grid)
    wanted = placed[:, model.num_prefix_tokens :] if family == "clip" else patches
    assert largest(found, wanted) < 1e-12


# ------------------------------------------------------------------------------------------------ cost, files, training


@pytest.mark.parametrize("family", ["vit", "dinov2_giant", "avg_pool_no_class"])
@pytest.mark.parametrize("layer", [0, 1, 2, -1])
def test_the_cost_is_what_torch_counts(family, layer):
    model = tiny(family)
    attach(model, "fixed", layer=layer)
    assert counted(model, images_for(model)) == pytest.approx(prunex.cost(model).macs, rel=1e-9)


def test_the_first_pass_is_counted_to_the_first_block():
    model = tiny()
    dense = prunex.cost(model)
    costs = []
    for layer in range(6):
        with attach(model, "fixed", keep_ratio=0.5, layer=layer) as pruning:
            cost = prunex.cost(model)
            assert cost.tokens == [9] * 4
            gates = 16 * (layer + 1) * (2 * 48 * 12 + 12)
            few = cost.blocks[1].macs
            assert pruning.pruner.macs(16) == gates
            assert cost.blocks[0].macs == few + gates + max(0, layer - 1) * dense.blocks[0].macs
            costs.append(cost.macs)
    assert costs[0] < costs[1] < dense.macs < costs[5]


def test_measured_counts():
    model = tiny()
    pruning = attach(model)
    with torch.no_grad():
        model(images(6))
        share = pruning.trace.kept().float().mean()
    assert pruning.counts() == [10]  # of keep_ratio, before anything was measured
    assert pruning.calibrate(images(6)) == [pytest.approx(float(share))]
    assert pruning.counts() == [round(float(share) * 16)]
    assert pruning.options["expected"] == [pytest.approx(float(share))]


@ways
def test_slim_saved_and_loaded_it_says_the_same(count, tmp_path):
    model, found = tiny(), explainer()
    found.save(tmp_path / "explainer")
    prunex.attach(model, "diffmask", explainer=tmp_path / "explainer", count=count, threshold=0.2, layer=2)
    x = images()
    with torch.no_grad():
        logits = model(x)
        small = prunex.slim(model)
        assert small(x).equal(logits)
        prunex.save(small, tmp_path / "slim")
        for file in (tmp_path / "explainer").iterdir():  # nobody needs the explainer any more
            file.unlink()
        again = prunex.load(tmp_path / "slim")
        assert again(x).equal(logits)
    assert prunex.attached(again).spec == prunex.attached(model).spec
    assert "explainer" not in prunex.attached(model).spec


@ways
def test_the_callback_fine_tunes_with_gates_from_a_folder(tmp_path, count):
    module = Plain()
    folder = str(explainer(module.vit).save(tmp_path / "explainer"))
    options = {"explainer": folder, "count": count, "threshold": 0.01}
    run = trainer(tmp_path, TokenPruning("diffmask", keep_ratio=0.6, options=options))
    before = {n: p.clone() for n, p in module.named_parameters()}
    run.fit(module, module_loader(), module_loader())
    gates = {n: p for n, p in module.named_parameters() if ".prunex." in n}
    assert gates
    wanted = load_explainer(folder).gates.state_dict()
    for name, p in gates.items():
        assert p.equal(wanted[name.split(".gates.", 1)[1]])
    assert any(not p.equal(before[n]) for n, p in module.named_parameters() if n in before)
    assert "prunex/val_keep_ratio_stage1" in run.callback_metrics
    run.save_checkpoint(tmp_path / "run.ckpt")
    for file in (tmp_path / "explainer").iterdir():
        file.unlink()
    again = load_from_checkpoint(Plain, str(tmp_path / "run.ckpt"))
    with torch.no_grad():
        assert again(images()).equal(module.eval()(images()))


@pytest.mark.slow
def test_a_graph_is_exported(tmp_path):
    model = tiny(depth=2, embed_dim=24)
    attach(model, "fixed")
    path = prunex.export(model, tmp_path / "model.pt2")
    x = images(3)
    with torch.no_grad():
        assert largest(torch.export.load(path).module()(x), model(x)) < 1e-4


def test_gates_come_from_a_folder_a_module_or_a_pruned_model(tmp_path):
    found = explainer(no_placeholder=True)
    folder = found.save(tmp_path)
    wanted = found.gates.state_dict()
    holder = nn.ModuleDict({"inner": found})
    for given in (folder, str(folder), found, found.gates, holder):
        with prunex.attach(tiny(seed=9), "diffmask", explainer=given) as pruning:
            own = pruning.pruner.gates.state_dict()
            assert all(v.equal(wanted[k]) for k, v in own.items())
            assert own.keys() == wanted.keys()
            assert pruning.options["no_placeholder"]
            assert pruning.pruner.gates is not found.gates


def test_half_precision():
    full, half = tiny(), tiny().bfloat16()
    found = explainer()
    x = images(2)
    with torch.no_grad():
        for model, given in ((full, x), (half, x.bfloat16())):
            pruning = prunex.attach(model, "diffmask", explainer=found, count="fixed", keep_ratio=0.5)
            assert model(given).dtype == given.dtype
            assert pruning.trace.stages[0].score.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(full(x)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold=1.5 is not allowed: give a number in \[0, 1\]"),
        ({"threshold": "half"}, "threshold='half'"),
        ({"layer": 6}, "layer=6 does not exist"),
        ({"layer": 1.0}, "layer=1.0"),
        ({"count": "some"}, "unknown count 'some'"),
        ({"keep_ratio": 0}, "keep_ratio=0"),
        ({"stages": [1]}, "unknown option of diffmask 'stages'"),
        ({"mul": -1}, "mul=-1"),
        ({"explainer": 3}, "explainer=3 is not allowed"),
        ({"explainer": "nowhere"}, r"explainer='nowhere' has no config\.json"),
        ({"explainer": nn.Linear(2, 2)}, "Linear holds 0 diffmask explainers"),
        (
            {"explainer": DiffMaskExplainer(tiny(depth=2))},
            "width 48 and depth 2, this one has 48 and 4: train one for it",
        ),
        ({"explainer": MaskGates(24, 4)}, "width 24 and depth 4, this one has 48 and 4"),
    ],
)
def test_bad_options(options, message):
    model = tiny()
    before = state_of(model)
    with pytest.raises(PrunexError, match=message):
        prunex.attach(model, "diffmask", **options)
    assert_same_state(model, before)
