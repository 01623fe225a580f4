"""The perturbation test against a loop of single forwards, and by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import prunex
from prunex import PrunexError
from prunex.metrics import PerturbationAUC, perturbation, perturbation_auc, perturbation_maximum
from prunex.metrics.occlusion import Occlusion
from prunex.removal.game import Removal
from tests.metrics.models import MEAN, PRUNED, STD, dropped, painted, pruned, sighted
from tests.vits import assert_same_state, images, largest, state_of, tiny

STEPS = tuple(k / 10 for k in range(10))
ROUTES = ["black", "grey", "mean", "blur", "drop"]


def case(batch=3, seed=0):
    model, x = tiny().double(), images(batch, dtype=torch.float64)
    maps = torch.rand(batch, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return model, x, maps


def removed_by_hand(values, q, order, dropping):
    """Units gone, bool [U], by sorting (value, index) pairs."""
    values = values.double().mul(1e9).round().tolist()  # interpolated corners are equal but for their last bits
    sign = -1 if order == "positive" else 1
    line = sorted(range(len(values)), key=lambda i: (sign * values[i], i))
    count = round(q * len(values)) if dropping else int(len(values) * q)
    gone = torch.zeros(len(values), dtype=torch.bool)
    gone[line[:count]] = True
    return gone


@pytest.mark.parametrize("order", ["positive", "negative"])
@pytest.mark.parametrize("removal", ROUTES)
def test_against_one_forward_at_a_time(removal, order):
    model, x, maps = case(2)
    labels = torch.tensor([1, 4])
    steps = (0, 0.1, 0.5, 0.9) if removal != "blur" else (0, 0.1)
    found = perturbation(model, x, maps, labels, order=order, steps=steps, removal=removal, mean=MEAN, std=STD)
    for b, (k, q) in itertools.product(range(2), enumerate(steps)):
        if removal == "drop":
            logits = dropped(model, x[b], removed_by_hand(maps[b].flatten(), q, order, True))
        else:
            fine = F.interpolate(maps[b, None, None], size=(32, 32), mode="bilinear", align_corners=False)[0, 0]
            gone = removed_by_hand(fine.flatten(), q, order, False).view(32, 32)
            assert int(gone.sum()) == int(1024 * q) == int(found.removed[k])
            with torch.no_grad():
                logits = model(painted(x[b], gone, removal)[None])[0]
        p = logits.softmax(0)
        mine = labels[b]
        assert float(found.hits[b, k]) == float(logits.argmax() == mine)
        assert largest(found.logit[b, k], logits[mine]) < 1e-10
        assert largest(found.probability[b, k], p[mine]) < 1e-10
        assert largest(found.top_probability[b, k], p.max()) < 1e-10
        assert largest(found.top_logit[b, k], logits.max()) < 1e-10
        second = p.sort(descending=True).values[1]
        assert largest(found.dissimilarity[b, k], (p[mine] / second).log()) < 1e-9
    assert found.units == ("patches" if removal == "drop" else "pixels")


def test_areas_by_hand():
    assert float(perturbation_auc(torch.ones(10))) == pytest.approx(90)
    assert perturbation_maximum() == pytest.approx(90)
    assert float(perturbation_auc(torch.tensor([1.0] + [0.0] * 9))) == pytest.approx(5)
    assert float(perturbation_auc(1 - torch.arange(10) / 10)) == pytest.approx(49.5)
    accuracy = torch.rand(4, 10, dtype=torch.float64)
    by_formula = 10 * (accuracy[:, 0] / 2 + accuracy[:, 1:9].sum(1) + accuracy[:, 9] / 2)
    assert largest(perturbation_auc(accuracy), by_formula) < 1e-12
    assert float(perturbation_auc(torch.ones(3), (0, 0.5, 0.7))) == pytest.approx(70)  # steps not evenly spaced


@pytest.mark.parametrize("removal", ROUTES)
def test_constant_maps_leave_both_orders_alike(removal):
    model, x, maps = case()
    both = [
        perturbation(model, x, torch.full_like(maps, 0.3), order=o, removal=removal, mean=MEAN, std=STD)
        for o in ("positive", "negative")
    ]
    assert both[0].logit.equal(both[1].logit)
    assert both[0].ties.tolist() == [16 if removal == "drop" else 1024] * 3


def test_random_maps_leave_both_orders_alike_but_for_chance():
    model, x = tiny(), images(64)
    maps = torch.rand(64, 4, 4)
    both = [perturbation(model, x, maps, order=o, removal="drop").hits for o in ("positive", "negative")]
    gap = perturbation_auc(both[0]) - perturbation_auc(both[1])
    assert abs(float(gap.mean())) < 2.5 * float(gap.std()) / 8  # within the paired standard error
    assert 20 < float(perturbation_auc(both[0].mean(0))) < 90


def test_altered_pixels_are_counted_exactly_and_nested(monkeypatch):
    model, x, maps = case(2)
    seen = []
    logits = Removal._logits_of

    def spy(self, altered, image):
        seen.extend(zip(image.tolist(), altered, strict=True))
        return logits(self, altered, image)

    monkeypatch.setattr(Removal, "_logits_of", spy)
    found = perturbation(model, x, maps, removal="black", mean=(9, 9, 9), std=(1, 1, 1))  # no pixel is black already
    assert found.removed.tolist() == [int(1024 * q) for q in STEPS]
    assert [int(50176 * q) for q in STEPS][1:3] == [5017, 10035]
    for b in range(2):
        altered = [(picture != x[b]) for image, picture in seen if image == b]
        assert len(altered) == 10
        for a in altered:
            assert a[0].equal(a[1])
            assert a[0].equal(a[2])  # all channels of a pixel
        assert [int(a[0].sum()) for a in altered] == found.removed.tolist()
        for fewer, more in itertools.pairwise(altered):
            assert not (fewer & ~more).any()


@pytest.mark.parametrize("family", ["vit", "dinov2_reg", "avg_pool_no_class", "deit_distilled", "eva02"])
def test_dropping_nothing_is_the_clean_image_and_dropping_all_no_image(family):
    model, x, maps = tiny(family), images(3), torch.rand(3, 4, 4)
    with torch.no_grad():
        clean = model(x)
    found = perturbation(model, x, maps, clean.argmax(1), steps=(0, 1), removal="drop")
    asked = Occlusion(model, x)
    assert largest(asked.clean, clean) < 1e-5 * max(1, float(clean.abs().max()))
    assert largest(found.top_logit[:, 0], clean.amax(1)) < 1e-5 * max(1, float(clean.abs().max()))
    assert found.hits[:, 0].tolist() == [1, 1, 1]
    empty = asked(torch.arange(3), lambda rows: torch.ones(len(rows), 16, dtype=torch.bool))
    assert largest(empty, empty[:1].expand(3, -1)) < 1e-6


def test_clean_logits_to_1e6_in_double():
    model, x, _ = case()
    with torch.no_grad():
        assert largest(Occlusion(model, x).clean, model(x)) < 1e-12
        assert largest(Occlusion(model.float(), x.float()).clean, model.float()(x.float())) < 1e-5


@pytest.mark.parametrize("removal", ["grey", "drop"])
def test_a_model_that_reads_one_patch(removal):
    x = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    x[0, :, 8:16, 24:32] = 1.0
    x[1, :, 0:8, 0:8] = 1.0
    maps = x[:, 0].clone()
    model = sighted()
    areas = []
    for order in ("positive", "negative"):
        metric = PerturbationAUC(order, removal=removal)
        metric.update(model, x, maps, 1)
        areas.append(float(metric.compute()))
        assert metric.accuracy()[0] == 1
    assert areas == pytest.approx([5, 90])


def test_class_agnostic_maps_have_equal_rows_for_predicted_and_target():
    model, x, _ = case()
    labels = torch.tensor([0, 1, 2])
    for method, equal in (("rollout", True), ("grad_cam", False)):
        rows = []
        for target in (None, labels):
            maps = prunex.explain(method, model, x, target).maps
            rows.append(perturbation(model, x, maps, labels, removal="drop").probability)
        assert rows[0].equal(rows[1]) is equal


@pytest.mark.parametrize("removal", ["black", "drop"])
@pytest.mark.parametrize("selection", ["free", "frozen"])
@pytest.mark.parametrize("pruner", list(PRUNED))
def test_pruned_models(pruner, selection, removal):
    model = pruned(pruner)
    x, maps = images(3, dtype=torch.float64), torch.rand(3, 4, 4, dtype=torch.float64)
    before = state_of(model)
    options = {"removal": removal, "selection": selection, "mean": MEAN, "std": STD, "steps": (0, 0.3, 0.7)}
    whole = perturbation(model, x, maps, **options)
    assert_same_state(model, before)
    with torch.no_grad():
        assert largest(whole.top_logit[:, 0], model(x).amax(1)) < 1e-10
    for b in range(3):
        one = perturbation(model, x[b : b + 1], maps[b : b + 1], chunk=2, **options)
        assert largest(one.logit, whole.logit[b : b + 1]) < 1e-10
    if removal == "black" and selection == "free":
        with torch.no_grad():
            for b, (k, q) in itertools.product(range(3), enumerate((0, 0.3, 0.7))):
                fine = F.interpolate(maps[b, None, None], size=(32, 32), mode="bilinear", align_corners=False)
                gone = removed_by_hand(fine.flatten(), q, "positive", False).view(32, 32)
                assert largest(model(painted(x[b], gone, "black")[None]).max(), whole.top_logit[b, k]) < 1e-10


@pytest.mark.parametrize("removal", ["grey", "drop"])
def test_frozen_is_not_free_where_the_pruner_would_choose_otherwise(removal):
    model, x, maps = pruned("evit"), images(3, dtype=torch.float64), torch.rand(3, 4, 4)
    free, frozen = (perturbation(model, x, maps, removal=removal, selection=s).logit for s in ("free", "frozen"))
    assert largest(free[:, 0], frozen[:, 0]) < 1e-10
    assert largest(free, frozen) > 1e-3
    dense = tiny().double()
    same = [perturbation(dense, x, maps, removal=removal, selection=s).logit for s in ("free", "frozen")]
    assert same[0].equal(same[1])


def test_frozen_painting_keeps_the_patches_of_the_clean_image():
    model, x = pruned("evit"), images(2, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    kept = model.prunex.trace.kept()
    maps = torch.where(kept, 0.0, 1.0).repeat_interleave(8, 1).repeat_interleave(8, 2)  # those dropped leave first
    found = perturbation(model, x, maps, steps=(0, 0.2), removal="grey", selection="frozen")
    inner = pruned(None)
    inner.load_state_dict(model.state_dict(), strict=False)
    assert largest(found.logit[:, 0], found.logit[:, 1]) > 0  # EViT's fused token still sees them
    assert model.prunex.trace.kept().equal(kept)


@pytest.mark.parametrize("removal", ["black", "drop"])
def test_batches_and_processes_add_up(removal):
    model, x, maps = case(5)
    labels = torch.tensor([0, 1, 2, 3, 4])
    options = {"removal": removal, "mean": MEAN, "std": STD, "keep": True}
    whole = PerturbationAUC(**options)
    whole.update(model, x, maps, labels)
    parts = [PerturbationAUC(**options) for _ in range(2)]
    parts[0].update(model, x[:1], maps[:1], labels[:1])
    parts[0].update(model, x[1:3], maps[1:3], labels[1:3])
    parts[1].update(model, x[3:], maps[3:], labels[3:])
    parts[0].merge_state(parts[1])
    assert float(parts[0].compute()) == pytest.approx(float(whole.compute()), abs=1e-9)
    assert parts[0].count.tolist() == [5] * 10
    assert sorted(parts[0].values().tolist()) == pytest.approx(sorted(whole.values().tolist()))
    assert float(whole.values().mean()) == pytest.approx(float(whole.compute()))
    assert whole.maximum == pytest.approx(90)


def test_direction():
    assert PerturbationAUC("negative").higher_is_better is True
    assert PerturbationAUC("positive").higher_is_better is False
    assert PerturbationAUC().is_differentiable is False
    assert torch.isnan(PerturbationAUC().accuracy()).all()


def test_nan_maps_count_nowhere():
    model, x, maps = case()
    maps[1, 0, 0] = torch.nan
    metric = PerturbationAUC(removal="drop", keep=True)
    metric.update(model, x, maps)
    assert (int(metric.count[0]), int(metric.undefined[0])) == (2, 1)
    assert metric.values().isnan().tolist() == [False, True, False]
    found = perturbation(model, x, maps, removal="drop")
    assert found.hits.isnan().any(1).tolist() == [False, True, False]
    alone = perturbation(model, x[2:], maps[2:], removal="drop")
    assert largest(alone.logit, found.logit[2:]) < 1e-12


def test_black_reads_the_normalisation_of_the_model():
    model, x, maps = case()
    model.pretrained_cfg = {"mean": MEAN, "std": STD}
    found = perturbation(model, x, maps, steps=(0, 0.5))
    given = perturbation(tiny().double(), x, maps, steps=(0, 0.5), mean=MEAN, std=STD)
    assert found.logit.equal(given.logit)


def test_flags_and_caller_are_left_as_found():
    model, x, maps = case()
    model.train()
    model.blocks[1].eval()
    before = state_of(model)
    with torch.inference_mode():
        perturbation(model, x.clone(), maps, removal="drop")
    perturbation(model, x.requires_grad_(), maps, removal="grey")
    assert_same_state(model, before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"order": "posive"}, "unknown order 'posive': did you mean 'positive'"),
        ({"removal": "white"}, "unknown removal 'white'.*black, blur, drop, grey, impute, mean"),
        ({"selection": "adaptive"}, "unknown selection 'adaptive'.*free, frozen"),
        ({"steps": (0.1, 0.2)}, "begin with 0"),
        ({"steps": (0, 0.2, 0.2)}, "rising fractions"),
        ({"steps": (0, 1.1)}, r"fractions in \[0, 1\]"),
        ({"steps": 10}, "steps=10"),
        ({"chunk": 0}, "chunk=0"),
        ({"removal": "black"}, "mean=None is not allowed: removal='black' paints 0 before normalisation"),
        ({"removal": "black", "mean": MEAN, "std": (1, 0, 1)}, r"std=\(1, 0, 1\).*3 numbers above 0"),
        ({"removal": "black", "mean": "x", "std": STD}, "mean='x'"),
        ({"maps": torch.rand(3, 4, 5)}, r"maps have shape \[3, 4, 5\]: give floats \[3, 4, 4\] on the patch grid or"),
        ({"maps": torch.rand(2, 4, 4)}, r"maps have shape \[2, 4, 4\]"),
        ({"maps": torch.ones(3, 4, 4, dtype=torch.int64)}, "maps have dtype torch.int64"),
        ({"maps": [1]}, "maps are a list"),
        ({"labels": 7}, "labels=7 is out of range"),
        ({"labels": torch.tensor([0, 1])}, "labels has shape"),
        ({"images": torch.rand(3, 3, 16, 16)}, "16 x 16 pixels"),
        ({"model": torch.nn.Linear(2, 2)}, "no supported ViT"),
        ({"model": tiny(num_classes=0)}, "no classifier"),
        ({"model": tiny(num_classes=1)}, "one output"),
    ],
)
def test_refused(change, match):
    model, x, maps = case()
    given = {"model": model, "images": x, "maps": maps, "labels": None, "removal": "drop"} | change
    with pytest.raises(PrunexError, match=match) as caught:
        perturbation(given.pop("model"), given.pop("images"), given.pop("maps"), given.pop("labels"), **given)
    assert "\n" not in str(caught.value)


def test_refused_by_the_area_and_the_class():
    with pytest.raises(PrunexError, match=r"accuracy is \[9\]: give floats \[..., 10\]"):
        perturbation_auc(torch.ones(9))
    with pytest.raises(PrunexError, match="unknown order"):
        PerturbationAUC("up")
    with pytest.raises(PrunexError, match="keep='yes'"):
        PerturbationAUC(keep="yes")


@pytest.mark.parametrize("removal", ["drop", "black"])
def test_between_forward_and_backward_of_a_bf16_step(removal):
    """Under torch 2.9 a weight cast without a graph would be taken for the training forward, whose gradient is lost."""
    found = []
    for measures in (False, True):
        model = tiny()
        with torch.autocast("cpu", torch.bfloat16):
            if measures:
                perturbation(model, images(), torch.rand(3, 4, 4), removal=removal, mean=MEAN, std=STD)
            pruning = prunex.attach(model, "topk", keep_ratio=0.5, stages=[1])  # looks at the model itself
            model.train()
            F.cross_entropy(model(images()).float(), torch.tensor([4, 0, 2])).backward()
        pruning.detach()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None, name
        assert found[1][name] is not None, name
        assert gradient.equal(found[1][name]), name
