"""FaithfulnessMonitor: the numbers of the metrics themselves, epoch by epoch, and nothing else changed by it."""

import csv

import pytest
import torch

import prunex
from prunex import PrunexError
from prunex.callbacks import FaithfulnessMonitor, TokenPruning
from prunex.callbacks.faithfulness_monitor import COLUMNS
from prunex.callbacks.run_folder import add_rows
from prunex.metrics import corrected_overlap, energy_inside, perturbation, perturbation_auc, removal_curves
from prunex.metrics.curves import deletion, insertion
from prunex.metrics.scoring import scores, without_pruning
from prunex.targets import Contrast
from tests.callbacks.modules import Plain, csv_logger, data, loader, metrics, snapshot, trainer


def rows(folder):
    with open(folder / "faithfulness.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_the_metrics_own(tmp_path):
    module = Plain()
    wanted = ["perturbation_positive", "deletion", "insertion", "energy_inside", "corrected_overlap"]
    watch = FaithfulnessMonitor(["tokentm", "raw_attention"], wanted, images=6, removal="grey")
    run = trainer(
        tmp_path, TokenPruning("dynamicvit", keep_ratio=0.6), watch, logger=csv_logger(tmp_path), max_epochs=2
    )
    run.fit(module, loader(8), loader(8, masks=True))
    images, labels = (x[:6] for x in data(8))
    objects = torch.zeros(6, 32, 32, dtype=torch.bool)
    objects[:, :16, :16] = True
    written, logged = rows(tmp_path / "run" / "version_0"), metrics(run.log_dir)
    assert [(r["epoch"], r["method"], r["metric"]) for r in written] == [
        (e, m, k) for e in "01" for m in ("tokentm", "raw_attention") for k in wanted
    ]
    for name in ("tokentm", "raw_attention"):
        e = prunex.explain(name, module, images)
        curves = removal_curves(module, images, e.maps, e.target, removal="grey")
        judge = prunex.explain(name, without_pruning(module), images, e.target)
        hits = perturbation(module, images, e.maps, labels, removal="grey").hits
        truth = {
            "perturbation_positive": perturbation_auc(hits),
            "deletion": deletion(curves),
            "insertion": insertion(curves),
            "energy_inside": energy_inside(e.upsample(), objects),
            "corrected_overlap": corrected_overlap(e.trace.kept(), judge.maps),
        }
        for metric, values in truth.items():
            mean = float(values.nanmean())
            row = next(r for r in written if (r["epoch"], r["method"], r["metric"]) == ("1", name, metric))
            assert float(row["mean"]) == pytest.approx(mean, abs=1e-4)
            assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
            assert logged[f"prunex/{metric}/{name}"][-1] == pytest.approx(mean, abs=1e-4)
            assert len(logged[f"prunex/{metric}/{name}"]) == 2


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_training_is_the_same_without_it(tmp_path, method):
    ends = []
    for extra in ([], [FaithfulnessMonitor(["tokentm"], ["deletion", "kept_auc"], images=4)]):
        torch.manual_seed(1)
        module = Plain()
        flags = [m.training for m in module.modules()]
        run = trainer(tmp_path, TokenPruning(method, keep_ratio=0.6), *extra, max_epochs=2)
        run.fit(module, loader(8), loader(8))
        assert [m.training for m in module.modules()][: len(flags)] == flags
        ends.append((snapshot(module), torch.get_rng_state()))
    assert all(torch.equal(ends[0][0][k], ends[1][0][k]) for k in ends[0][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_what_cannot_be_measured_is_left_out_with_a_warning(tmp_path):
    watch = FaithfulnessMonitor(["rollout"], ["insertion", "energy_inside", "mass_kept"], images=3)
    with pytest.warns(UserWarning, match="FaithfulnessMonitor") as told:
        trainer(tmp_path, watch).fit(Plain(), loader(8), loader(8))
    said = [str(w.message) for w in told if "FaithfulnessMonitor" in str(w.message)]
    assert len(said) == 2
    assert "no object masks" in said[0]
    assert "agreement is left out" in said[1]
    assert {r["metric"] for r in rows(tmp_path)} == {"insertion"}


def test_validating_and_trying_write_nothing(tmp_path):
    watch = FaithfulnessMonitor(["rollout"], images=3)
    trainer(tmp_path, watch, fast_dev_run=True).fit(Plain(), loader(8), loader(8))
    run = trainer(tmp_path, watch)
    run.validate(Plain(), loader(8), verbose=False)
    assert not (tmp_path / "faithfulness.csv").exists()
    assert 0 <= float(run.callback_metrics["prunex/deletion/rollout"]) <= 1


def test_rows_of_a_run_that_was_there_before_go(tmp_path):
    path = tmp_path / "faithfulness.csv"
    for epoch, value in ((0, 0.5), (1, 0.6), (2, ""), (1, 0.7)):
        add_rows(path, COLUMNS, epoch, [[epoch, epoch, "rollout", "deletion", value, value, value, 3]])
    assert [(r["epoch"], r["mean"]) for r in rows(tmp_path)] == [("0", "0.5"), ("1", "0.7")]
    add_rows(path, COLUMNS, 1, [[1, 1, "rollout", "deletion", 0.8, 0.8, 0.8, 3]], replace=4)
    add_rows(path, COLUMNS, 1, [[1, 1, "rollout", "insertion", "", "", "", 0]], replace=4)
    assert [(r["epoch"], r["metric"], r["mean"]) for r in rows(tmp_path)[1:]] == [
        ("1", "deletion", "0.8"),
        ("1", "insertion", ""),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["faithfulness.csv"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": "tokentm"}, "give a list of explainers"),
        ({"methods": []}, "give a list of explainers"),
        ({"methods": ["tokentmm"]}, "tokentm"),
        ({"metrics": "deletion"}, "give a list"),
        ({"metrics": ["deletoin"]}, "deletion"),
        ({"removal": "white"}, "black"),
        ({"images": 0}, "at least 1"),
    ],
)
def test_mistakes_are_told_at_once(options, said):
    with pytest.raises(PrunexError, match=said):
        FaithfulnessMonitor(**options)


def test_a_model_without_classifier_is_refused_before_training(tmp_path):
    module = Plain(num_classes=0)
    run = trainer(tmp_path, FaithfulnessMonitor(["rollout"]))
    with pytest.raises(PrunexError, match="no classifier"):
        run.fit(module, loader(8), loader(8))
    assert run.global_step == 0


def test_two_monitors_share_the_file(tmp_path):
    both = (
        FaithfulnessMonitor(["rollout"], ["deletion"], images=3),
        FaithfulnessMonitor(["dino"], ["insertion"], images=3),
    )
    run = trainer(tmp_path, *both, max_epochs=2, logger=csv_logger(tmp_path))
    run.fit(Plain(), loader(8), loader(8))
    found = [(r["epoch"], r["method"], r["metric"]) for r in rows(tmp_path / "run" / "version_0")]
    assert found == [(e, m, k) for e in "01" for m, k in (("rollout", "deletion"), ("dino", "insertion"))]


def test_every_validation_of_an_epoch_has_its_rows(tmp_path):
    watch = FaithfulnessMonitor(["rollout"], ["deletion"], images=3)
    run = trainer(tmp_path, watch, max_epochs=1, val_check_interval=0.5, logger=csv_logger(tmp_path))
    run.fit(Plain(), loader(8), loader(8))
    found = rows(tmp_path / "run" / "version_0")
    assert len({r["step"] for r in found}) == len(found) == 2


def test_one_output_is_refused_before_training(tmp_path):
    module = Plain()
    module.vit.reset_classifier(1)
    with pytest.raises(PrunexError, match="one output"):
        trainer(tmp_path, FaithfulnessMonitor(metrics=["perturbation"])).fit(module, loader(8), loader(8))


def test_options_reach_explainer_judge_and_max_sensitivity(tmp_path):
    options, wanted = {"discard_ratio": 0.6}, ["deletion", "corrected_overlap", "max_sensitivity"]
    module = Plain()
    watch = FaithfulnessMonitor(["rollout"], wanted, images=4, options={"rollout": options})
    torch.manual_seed(5)
    run = trainer(tmp_path, TokenPruning("topk", keep_ratio=0.6), watch, logger=csv_logger(tmp_path))
    run.fit(module, loader(8), loader(8))
    x = data(8)[0][:4]
    e = prunex.explain("rollout", module, x, **options)
    judge = prunex.explain("rollout", without_pruning(module), x, e.target, **options)
    plain = {"explainer": "rollout", "kept": e.trace.kept()}
    truth = scores(wanted, module, x, e.maps, e.target, judge=judge.maps, options=options, **plain)
    without = scores(wanted[2:], module, x, e.maps, e.target, **plain)
    found = {r["metric"]: float(r["mean"]) for r in rows(tmp_path / "run" / "version_0")}
    assert list(found) == wanted
    for name, values in truth.items():
        assert found[name] == pytest.approx(float(values.mean()), abs=1e-5)
    assert abs(float((truth["max_sensitivity"] - without["max_sensitivity"]).mean())) > 1e-3
    same, other = (FaithfulnessMonitor(["rollout"], options=o).state_key for o in (None, {"rollout": options}))
    assert same != other


def test_other_targets_are_scored_as_the_metrics_do(tmp_path):
    module, images = Plain(), data(8)[0][:4]
    watch = [
        FaithfulnessMonitor(["tokentm"], ["deletion", "corrected_overlap"], images=4, target="contrast:2,0"),
        FaithfulnessMonitor(["tokentm"], ["deletion"], images=4, target="labels:1,3"),
    ]
    run = trainer(tmp_path, TokenPruning("topk", keep_ratio=0.6), *watch, logger=csv_logger(tmp_path))
    run.fit(module, loader(8), loader(8))
    written = {(r["method"], r["metric"]): float(r["mean"]) for r in rows(tmp_path / "run" / "version_0")}
    assert set(written) == {
        ("tokentm:contrast:2,0", "deletion"), ("tokentm:contrast:2,0", "corrected_overlap"),
        ("tokentm:1", "deletion"), ("tokentm:3", "deletion"),
    }  # fmt: skip
    for name, target in (("contrast:2,0", Contrast(2, 0)), ("1", 1), ("3", 3)):
        e = prunex.explain("tokentm", module, images, target)
        curve = deletion(removal_curves(module, images, e.maps, e.goal()))
        assert written[f"tokentm:{name}", "deletion"] == pytest.approx(float(curve.mean()), abs=1e-4)
    e = prunex.explain("tokentm", module, images, Contrast(2, 0))
    judge = prunex.explain("tokentm", without_pruning(module), images, Contrast(2, 0))
    overlap = corrected_overlap(e.trace.kept(), judge.maps)
    assert written["tokentm:contrast:2,0", "corrected_overlap"] == pytest.approx(float(overlap.nanmean()), abs=1e-4)
