"""prunex score: the table holds what the metrics say, is continued where it stopped, and mistakes end in one line."""

import csv
import json
import math

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import prunex
from prunex import PrunexError
from prunex.metrics import (
    bootstrap,
    corrected_overlap,
    deletion,
    energy_inside,
    kept_auc,
    mean_iou,
    object_share,
    perturbation,
    perturbation_auc,
    pixel_accuracy,
    removal_curves,
)
from prunex.metrics.scoring import interval, scores, without_pruning
from prunex.recipes.commands import cli, score_row
from prunex.recipes.commands.score_data import from_folder, from_run, spaced
from prunex.recipes.report.page import write_report
from prunex.recipes.report.score_table import Score, best, read_scores, table, write_scores
from prunex.recipes.runs import open_data
from prunex.targets import parse
from tests.vits import tiny

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 3}
FAST = "rollout,generic_attention"


def vit(sizes=SIZES, seed=0, classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **sizes)
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return model.eval()


@pytest.fixture
def run(tmp_path):
    """A run folder as prunex fit leaves it, with a pruned slim model."""
    classifier = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": SIZES}
    config = {
        "model": {"class_path": "prunex.recipes.ImageClassifier", "init_args": classifier},
        "data": {
            "class_path": "prunex.recipes.DigitScenes",
            "init_args": {"batch_size": 5, "train_size": 8, "val_size": 12},
        },
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    model = vit()
    prunex.attach(model, "topk", keep_ratio=0.5, stages=(1,))
    prunex.save(prunex.slim(model), folder / "slim")
    return folder


@pytest.fixture
def photos(tmp_path):
    """Six images in two class folders, and masks beside them."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for number in range(6):
        name = f"{'ant' if number < 3 else 'bee'}/{number}"
        for folder, suffix in (("val", "jpg"), ("masks/val", "png")):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            if suffix == "png":
                pixels = np.zeros((40, 50), dtype=np.uint8)
                pixels[:, 20:30] = 255
            Image.fromarray(pixels).save(root / folder / f"{name}.{suffix}")
    return root


def score(*arguments):
    return cli.run(["score", *map(str, arguments[:1]), "--device", "cpu", *map(str, arguments[1:])])


def written(folder):
    with open(folder / "scores.csv", newline="") as file:
        return {(r["model"], r["method"], r["metric"]): r for r in csv.DictReader(file)}


def values(folder, model, method):
    with np.load(folder / "values" / model / f"{method}.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_the_table_holds_what_the_metrics_say_dense_beside_slim(run, capsys):
    assert score(run, "--methods", FAST, "--images", 7, "--batch", 3) == 0
    said, found = capsys.readouterr().out, written(run / "score")
    scenes = from_run(open_data(run), 7)[:]
    slim = prunex.load(run / "slim")
    dense = without_pruning(slim)
    assert len(scenes.images) == 7
    for name, model in (("dense", dense), ("slim", slim)):
        e = prunex.explain("generic_attention", model, scenes.images)
        curves = removal_curves(model, scenes.images, e.maps, e.target)
        hits = perturbation(model, scenes.images, e.maps, scenes.labels, mean=[0.5] * 3, std=[0.5] * 3).hits
        each = {
            "deletion": deletion(curves),
            "perturbation_positive": perturbation_auc(hits),
            "energy_inside": energy_inside(e.upsample(), scenes.masks),
        }
        if name == "slim":
            judge = prunex.explain("generic_attention", dense, scenes.images, e.target)
            each["kept_auc"] = kept_auc(e.trace.kept(), judge.maps)
        for metric, one in each.items():
            row, expected = found[name, "generic_attention", metric], bootstrap(one)
            ends = (expected.mean, expected.low, expected.high)
            assert [float(row[k]) for k in ("mean", "low", "high")] == pytest.approx(ends, abs=1e-5)
            assert row["images"] == "7"
            assert float(row["seconds_per_image"]) > 0
        pixels = {"pixel_accuracy": pixel_accuracy, "mean_iou": mean_iou}
        for metric, of_all in pixels.items():
            row = found[name, "generic_attention", metric]
            assert float(row["mean"]) == pytest.approx(float(of_all(e.upsample(), scenes.masks)), abs=1e-6)
            assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
        chance = found[name, "chance", "energy_inside"]
        assert float(chance["mean"]) == pytest.approx(float(object_share(scenes.masks).mean()), abs=1e-6)
        assert (name, "random", "deletion") in found
        assert not {(name, "chance", metric) for metric in ("deletion", "mean_iou", "pixel_accuracy")} & set(found)
    assert ("dense", "rollout", "kept_auc") not in found
    assert found["slim", "chance", "kept_auc"]["mean"] == "0.5"
    assert "rollout" in said
    assert "random" in said
    assert "chance" in said
    page = (run / "report.html").read_text()
    assert "Scores: which explainer" in page
    assert page.count("<svg") >= 17


def test_all_methods_that_the_model_can_take_and_reasons_for_the_others(run, capsys):
    assert score(run, "--images", 2, "--metrics", "insertion", "--models", "slim", "--option", "shap.budget=32") == 0
    said, found = capsys.readouterr().out, written(run / "score")
    methods = {method for _, method, _ in found}
    assert {"rollout", "lrp", "shap", "atman", "random"} <= methods
    assert not {"vit_shapley", "diffmask", "attention_flow"} & methods
    for name in ("vit_shapley", "diffmask", "attention_flow"):
        assert f"skipped {name}" in said
    assert {model for model, *_ in found} == {"slim"}


def test_interrupted_and_continued(run, monkeypatch, capsys):
    calls, left = [], [5]

    def counted(names, *args, **kwargs):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        calls.append(tuple(names))
        return scores(names, *args, **kwargs)

    monkeypatch.setattr(score_row, "scores", counted)
    wanted = [run, "--methods", FAST, "--images", 4, "--metrics", "deletion,insertion,energy_inside,kept_auc"]
    assert score(*wanted) == 130
    assert "continues" in capsys.readouterr().err
    done = values(run / "score", "dense", "rollout")
    assert done["deletion"].shape == (4,)
    assert not (run / "score" / "scores.csv").exists()
    assert not list((run / "score").rglob(".*"))
    stamp = (run / "score" / "values" / "dense" / "rollout.npz").stat().st_mtime_ns
    before, left[0] = len(calls), 1000
    assert score(*wanted) == 0
    resumed = len(calls) - before
    assert (run / "score" / "values" / "dense" / "rollout.npz").stat().st_mtime_ns == stamp
    together = written(run / "score")
    calls.clear()
    assert score(*wanted) == 0
    assert calls == []
    assert written(run / "score") == together
    assert score(*wanted, "--again") == 0
    whole = len(calls)
    assert resumed < whole
    fields = ("mean", "low", "high", "images")
    assert {k: [r[f] for f in fields] for k, r in written(run / "score").items()} == {
        k: [r[f] for f in fields] for k, r in together.items()
    }


def test_only_what_an_option_changes_is_computed_again(run, monkeypatch):
    calls = []

    def counted(names, *args, **kwargs):
        calls.extend(names)
        return scores(names, *args, **kwargs)

    monkeypatch.setattr(score_row, "scores", counted)
    wanted = [run, "--methods", "rollout", "--images", 3, "--models", "dense", "--metrics"]
    score(*wanted, "deletion,energy_inside")
    calls.clear()
    score(*wanted, "deletion,insertion,energy_inside")
    assert set(calls) == {"insertion"}
    calls.clear()
    score(*wanted, "deletion,energy_inside", "--removal", "mean")
    assert set(calls) == {"deletion"}
    calls.clear()
    score(run, "--methods", "rollout", "--images", 2, "--models", "dense", "--metrics", "deletion")
    assert set(calls) == {"deletion"}
    calls.clear()
    other = vit(seed=5)
    prunex.attach(other, "topk", keep_ratio=0.5, stages=(1,))
    prunex.save(prunex.slim(other), run / "slim")
    score(*wanted, "deletion")
    assert set(calls) == {"deletion"}


def test_damaged_values_are_made_anew(run):
    wanted = [run, "--methods", "rollout", "--images", 2, "--models", "dense", "--metrics", "deletion"]
    score(*wanted)
    expected = written(run / "score")["dense", "rollout", "deletion"]["mean"]
    path = run / "score" / "values" / "dense" / "rollout.npz"
    path.write_bytes(path.read_bytes()[:100])
    score(*wanted)
    assert written(run / "score")["dense", "rollout", "deletion"]["mean"] == expected
    for change in ({"about": "seconds"}, {"deletion": np.zeros((2, 3))}):
        arrays = values(run / "score", "dense", "rollout")
        for name, value in change.items():
            told = json.loads(str(arrays[name])) if name == "about" else value
            arrays[name] = np.array(json.dumps({**told, value: []})) if name == "about" else value
        np.savez(path, **arrays)
        score(*wanted)
        assert written(run / "score")["dense", "rollout", "deletion"]["mean"] == expected


def test_signs_have_no_level_of_chance(run):
    score(run, "--methods", "lrp", "--images", 2, "--metrics", "sign_agreement,mass_kept")
    found = written(run / "score")
    assert ("slim", "lrp", "sign_agreement") in found
    assert ("slim", "chance", "mass_kept") in found
    assert ("slim", "chance", "sign_agreement") not in found


def test_a_timm_model_on_a_folder_with_masks_without_a_run(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = {"img_size": 48, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = vit(sizes, classes=2)
    metadata = {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(sizes)}
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata=metadata)
    name = ["vit_tiny_patch16_224", "--weights", tmp_path / "w.safetensors", "--img-size", 48, "--data", photos]
    assert score(*name, "--methods", "rollout") == 0
    found = written(tmp_path / "score")
    scenes = from_folder(photos, None, model, 100)[:]
    assert scenes.labels.tolist() == [0, 0, 0, 1, 1, 1]
    # 40 of 50 columns are seen, of which 10 are the object's
    assert float(object_share(scenes.masks).mean()) == pytest.approx(0.25, abs=0.03)
    e = prunex.explain("rollout", model, scenes.images)
    energy = float(energy_inside(e.upsample(), scenes.masks).mean())
    assert float(found["dense", "rollout", "energy_inside"]["mean"]) == pytest.approx(energy, abs=1e-5)
    assert {m for m, *_ in found} == {"dense"}
    capsys.readouterr()
    # Plain class folders without masks, and images alone without labels
    (photos / "masks").rename(tmp_path / "elsewhere")
    assert score(*name[:-1], photos / "val", "--methods", "rollout", "--out", "bare") == 0
    assert "localisation is left out: there are no object masks" in capsys.readouterr().out
    assert not any(metric == "energy_inside" for *_, metric in written(tmp_path / "bare"))
    assert score(*name[:-1], photos / "val" / "ant", "--methods", "rollout", "--out", "flat") == 0
    assert "labels are unknown" in capsys.readouterr().out
    hits = perturbation(model, scenes.images[:3], e.maps[:3], mean=[0.5] * 3, std=[0.5] * 3)
    mean = float(perturbation_auc(hits.hits).mean())
    assert float(written(tmp_path / "flat")["dense", "rollout", "perturbation_positive"]["mean"]) == pytest.approx(mean)
    masks = ["--masks", tmp_path / "elsewhere", "--out", "masked", "--metrics", "energy_inside"]
    assert score(*name[:-1], photos, "--methods", "rollout", *masks) == 0
    row = written(tmp_path / "masked")["dense", "rollout", "energy_inside"]
    assert float(row["mean"]) == pytest.approx(energy, abs=1e-5)


def test_a_slim_folder_has_its_dense_model_beside_it(photos, tmp_path):
    model = tiny()
    prunex.attach(model, "evit", keep_ratio=0.6)
    slim = prunex.save(prunex.slim(model), tmp_path / "slim", labels=["cat", "bee", "dog", "ant", "eel"])
    options = ["--methods", "rollout", "--metrics", "deletion,kept_auc,max_sensitivity", "--out", tmp_path / "out"]
    assert score(slim, "--data", photos, "--images", 4, *options) == 0
    found = written(tmp_path / "out")
    assert set(found) == {
        *((m, k, "deletion") for m in ("dense", "slim") for k in ("rollout", "random")),
        *((m, "rollout", "max_sensitivity") for m in ("dense", "slim")),
        *(("slim", k, "kept_auc") for k in ("rollout", "random", "chance")),
    }
    # the folders' names are the model's classes
    assert from_folder(photos, None, prunex.load(slim), 6)[:].labels.tolist() == [3, 3, 3, 1, 1, 1]


def test_a_model_without_classifier_is_scored_by_where_its_maps_lie(photos, tmp_path, capsys):
    slim = prunex.save(prunex.slim(tiny(num_classes=0)), tmp_path / "slim")
    options = ["--data", photos, "--images", 3, "--out", tmp_path / "out"]
    assert score(slim, *options, "--methods", "rollout") == 0
    said = capsys.readouterr().out
    assert "faithfulness is left out: this model has no classifier" in said
    assert "labels" not in said
    assert {metric for *_, metric in written(tmp_path / "out")} >= {"energy_inside", "mean_iou"}
    assert score(slim, *options, "--metrics", "energy_inside") == 0  # methods that need a class are left out
    methods = {method for _, method, _ in written(tmp_path / "out")}
    assert "rollout" in methods
    assert "lrp" not in methods
    assert "skipped grad_cam" in capsys.readouterr().out
    with pytest.raises(PrunexError, match="deletion cannot be measured: this model has no classifier"):
        score(slim, *options, "--methods", "rollout", "--metrics", "deletion")


def test_the_judge_explains_the_class_that_the_pruned_model_predicts(run):
    images, model = from_run(open_data(run), 12)[:].images, vit()
    with torch.no_grad():
        model.head.bias -= model(images).mean(0)  # now classes are close to each other
    prunex.attach(model, "topk", keep_ratio=0.2, stages=(0, 1))
    prunex.save(prunex.slim(model), run / "slim")
    slim = prunex.load(run / "slim")
    dense = without_pruning(slim)
    assert not torch.equal(slim(images).argmax(1), dense(images).argmax(1))
    judge = prunex.explain("generic_attention", dense, images, slim(images).argmax(1)).maps
    expected = kept_auc(prunex.explain("rollout", slim, images).trace.kept(), judge)
    for name, models in (("both", "dense,slim"), ("one", "slim")):
        options = ["--methods", "generic_attention", "--metrics", "kept_auc", "--models", models]
        score(run, *options, "--out", run / name)
        assert np.allclose(values(run / name, "slim", "generic_attention")["kept_auc"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--metrics", "deletoin"], "did you mean 'deletion'|deletion"),
        (["--methods", "rolout"], "rollout"),
        (["--models", "narrow"], "dense"),
        (["--images", 0], "at least 1"),
        (["--masks", "x"], "--masks goes with --data"),
        (["--removal", "white"], "black"),
        (["--data", "nowhere"], "not a folder"),
        (["--weights", "x"], "leave it out"),
        (["--metrics", ","], "names no metric"),
        (["--device", "nowhere"], "cannot be used"),
    ],
)
def test_mistakes(run, more, said):
    with pytest.raises(PrunexError, match=said):
        score(run, "--methods", "rollout", *more)


def test_mistakes_with_folders(photos, run, tmp_path):
    slim = prunex.save(prunex.slim(tiny()), tmp_path / "slim")
    with pytest.raises(PrunexError, match="brings no data: give --data"):
        score(slim)
    with pytest.raises(PrunexError, match="^vit_shapley needs a trained explainer"):
        score(run, "--methods", "vit_shapley", "--images", 2)
    (photos / "masks" / "val" / "ant" / "0.png").unlink()
    with pytest.raises(PrunexError, match=r"no mask .*0\.png"):
        score(slim, "--data", photos)
    Image.new("L", (5, 5)).save(photos / "masks" / "val" / "ant" / "0.png")
    with pytest.raises(PrunexError, match="must have its image's size"):
        score(slim, "--data", photos)
    with pytest.raises(PrunexError, match="kept_auc cannot be measured"):
        score(slim, "--data", photos / "val", "--metrics", "kept_auc", "--methods", "rollout", "--out", tmp_path / "o")
    with pytest.raises(PrunexError, match="energy_inside cannot be measured: there are no object masks"):
        score(slim, "--data", photos / "val", "--metrics", "energy_inside", "--methods", "rollout")


def test_the_terminal_table():
    def one(model, method, metric, higher, mean):
        return Score(model, method, metric, "faithfulness", higher, mean, mean - 0.1, mean + 0.1, 5, 0.01, 3)

    found = [
        one("dense", "rollout", "deletion", False, 0.3),
        one("dense", "tokentm", "deletion", False, 0.2),
        one("slim", "rollout", "deletion", False, 0.25),
        one("dense", "random", "deletion", False, 0.1),
        one("dense", "rollout", "perturbation_negative", True, 50.0),
        one("dense", "tokentm", "perturbation_negative", True, 40.0),
    ]
    # 0.2 ± 0.1 and 0.3 ± 0.1 are the same to within noise, and one explainer alone beats nobody.
    assert best(found) == {("dense", "perturbation_negative"): "rollout"}
    lines = table(found).splitlines()
    assert lines[0].split() == ["deletion", "perturbation", "seconds", "forwards"]
    assert lines[1].split() == ["↓", "negative", "↑", "an", "image", "an", "image"]
    assert lines[2].split() == ["probability", "0..90"]
    assert lines[3].split()[:6] == ["rollout", "dense", "0.300", "±.10", "50.0", "±0*"]
    assert [line.split()[:2] for line in lines[4:]] == [["rollout", "slim"], ["tokentm", "dense"], ["random", "dense"]]
    assert lines[5].split()[2:4] == ["0.200", "±.10"]
    assert len(table(found, width=40).split("\n\n")) > 1


def test_nobody_wins_within_the_noise_and_small_numbers_are_told_apart():
    def one(method, metric, mean, half, images=9):
        return Score("dense", method, metric, "faithfulness", False, mean, mean - half, mean + half, images)

    found = [
        one("rollout", "deletion", 0.25, 0.05), one("dino", "deletion", 0.25, 0.05), one("lrp", "deletion", 0.5, 0.0),
        one("rollout", "infidelity", 0.00123, 0.0004), one("dino", "infidelity", 0.00121, 0.0004),
        one("lrp", "infidelity", 0.0001, 0.00002),
        one("rollout", "log_odds", -3.0, math.nan, images=1), one("dino", "log_odds", -1.0, math.nan, images=1),
        one("rollout", "sufficiency", 0.25, 0.01), one("dino", "sufficiency", 0.27, 0.01),
    ]  # fmt: skip
    assert best(found) == {("dense", "infidelity"): "lrp"}
    rows = [line.split() for line in table(found[:6]).splitlines()[3:]]
    assert rows == [
        ["rollout", "dense", "0.250", "±.05", "1.2e-3±4e-4"],
        ["dino", "dense", "0.250", "±.05", "1.2e-3±4e-4"],
        ["lrp", "dense", "0.500", "1.0e-4±2e-5*"],  # no ± where all images agree
    ]


def test_who_judges_agreement_is_told_and_nobody_wins_it(run, capsys):
    assert score(run, "--methods", FAST, "--images", 4, "--metrics", "kept_auc,deletion") == 0
    rows = read_scores((run / "score" / "scores.csv").read_text())
    told = {(s.method, s.metric): s.judge for s in rows if s.model == "slim"}
    assert told["rollout", "kept_auc"] == "dense/rollout"
    assert told["random", "kept_auc"] == "random"
    assert told["rollout", "deletion"] == told["chance", "kept_auc"] == ""
    assert {metric for _, metric in best(rows)} <= {"deletion"}
    assert "against the dense model's map of the same explainer" in capsys.readouterr().out
    assert "map of the same explainer: this judges the pruner" in (run / "report.html").read_text()
    assert score(run, "--methods", "all,rollout", "--images", 2, "--metrics", "all") == 0
    said = capsys.readouterr()
    assert "not among --metrics all, by name only: " in said.out
    assert "sensitivity_n" in said.out


def test_how_patches_left_is_told(run, capsys):
    wanted = [run, "--methods", "rollout", "--images", 3, "--metrics"]
    assert score(*wanted, "deletion,perturbation_positive,saco,energy_inside") == 0
    said = capsys.readouterr().out
    assert "\ntokens dropped: deletion\n" in said
    assert "\npatches painted black: perturbation_positive\n" in said
    assert "\npatches painted in the mean colour: saco\n" in said
    rows = read_scores((run / "score" / "scores.csv").read_text())
    told = {(s.metric, s.removal) for s in rows}
    assert told == {
        ("deletion", "drop"), ("perturbation_positive", "black"), ("saco", "mean"), ("energy_inside", "")
    }  # fmt: skip
    assert "<b>patches painted black</b>: perturbation_positive" in (run / "report.html").read_text()
    assert score(*wanted, "deletion,saco", "--removal", "grey") == 0
    assert "\npatches painted grey: deletion, saco\n" in capsys.readouterr().out


def test_what_was_done_with_another_removal_option_or_model_stays(run, monkeypatch):
    calls = []

    def counted(names, *args, **kwargs):
        calls.append(tuple(names))
        return scores(names, *args, **kwargs)

    monkeypatch.setattr(score_row, "scores", counted)
    wanted = [run, "--methods", "rollout", "--images", 3, "--metrics", "deletion,energy_inside", "--models", "dense"]
    changes = [[], ["--removal", "black"], ["--option", "rollout.discard_ratio=0.5"], ["--images", 4]]
    tables = []
    for change in changes:
        before = len(calls)
        assert score(*wanted, *change) == 0
        assert len(calls) > before
        tables.append(written(run / "score"))
    assert len({str(t) for t in tables}) == 4
    before = len(calls)
    for change, told in zip(changes, tables, strict=True):
        assert score(*wanted, *change) == 0
        assert written(run / "score") == told
    assert len(calls) == before  # nothing was computed again
    assert score(*wanted, "--again") == 0
    assert len(calls) > before
    for path in (run / "score" / "values" / "dense").glob("rollout-*.npz"):  # half a file counts as none
        path.write_bytes(path.read_bytes()[:200])
    assert score(*wanted, *changes[2]) == 0
    rows = written(run / "score")
    assert {k: v["mean"] for k, v in rows.items()} == {k: v["mean"] for k, v in tables[2].items()}


def test_the_file_is_read_back_and_its_words_are_escaped(tmp_path):
    rows = [
        Score("<b>dense", "<script>x</script>", "deletion", "<i>", False, 0.5, 0.4, 0.6, 3),
        Score("<b>dense", "$x$", "insertion", "<i>", True, float("nan"), 0.4, 0.6, 3),
    ]
    write_scores(tmp_path / "score", rows)
    back = read_scores((tmp_path / "score" / "scores.csv").read_text())
    assert [(s.model, s.method, s.mean) for s in back] == [("<b>dense", "<script>x</script>", 0.5)]
    (tmp_path / "metrics.csv").write_text("step\n")
    (tmp_path / "score" / "about.json").write_text(json.dumps({"images": 3, "machine": "<u>", "notes": ["<em>"]}))
    page = write_report(tmp_path).read_text()
    for word in ("<script>x", "<b>dense", "<i>", "<u>", "<em>"):
        assert word not in page
    assert "3 images" in page
    (tmp_path / "score" / "scores.csv").write_text("model,method\n\x00,\n")
    assert "score/scores.csv" in write_report(tmp_path).read_text()


def test_images_are_spaced_over_all_of_them():
    assert spaced(100, 4) == [0, 25, 50, 75]
    assert spaced(3, 10) == [0, 1, 2]


def test_scores_are_the_same_in_batches_and_name_what_they_lack():
    model, images = vit(), torch.randn(3, 3, 64, 64)
    e = prunex.explain("rollout", model, images)
    names = ["perturbation_negative", "insertion", "srg", "saco"]
    whole = scores(names, model, images, e.maps, e.target)
    parts = [scores(names, model, images[i : i + 1], e.maps[i : i + 1], e.target[i : i + 1]) for i in range(3)]
    for name in names:
        assert torch.allclose(whole[name], torch.cat([p[name] for p in parts]), atol=1e-6)
        assert interval(name, whole[name]).images == 3
    with pytest.raises(PrunexError, match="mean_iou needs object masks"):
        scores(["mean_iou"], model, images, e.maps)
    with pytest.raises(PrunexError, match="mass_kept needs"):
        scores(["mass_kept"], model, images, e.maps)
    with pytest.raises(PrunexError, match="max_sensitivity needs"):
        scores(["max_sensitivity"], model, images, e.maps)


def test_random_may_be_named_though_it_is_always_there(run):
    assert score(run, "--methods", "random", "--images", 2, "--metrics", "insertion", "--models", "dense") == 0
    assert {method for _, method, _ in written(run / "score")} == {"random"}


def test_masks_without_an_object_are_told(run, photos, capsys):
    for mask in (photos / "masks").rglob("*.png"):
        Image.fromarray(np.zeros((40, 50), dtype=np.uint8)).save(mask)
    wanted = [run / "slim", "--data", photos, "--methods", "rollout", "--images", 2, "--out", run / "empty"]
    with pytest.raises(PrunexError, match="energy_inside cannot be measured: no mask holds an object"):
        score(*wanted, "--metrics", "energy_inside")
    assert score(*wanted) == 0
    assert "localisation is left out: no mask holds an object" in capsys.readouterr().out


def test_a_model_that_says_nothing_is_refused(run, photos, tmp_path):
    model = vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0] = torch.nan
    folder = prunex.save(model, tmp_path / "nan")
    with pytest.raises(PrunexError, match="the model's outputs are NaN or infinite"):
        score(folder, "--data", photos, "--methods", "rollout", "--images", 2, "--out", tmp_path / "scored")
    assert not (tmp_path / "scored").exists()


def test_the_normalisation_can_be_told(photos, run, tmp_path):
    wanted = [run / "slim", "--data", photos, "--methods", "rollout", "--metrics", "deletion"]
    assert score(*wanted, "--out", tmp_path / "a") == 0
    assert score(*wanted, "--out", tmp_path / "b", "--mean", 0.2, "--std", 0.3, 0.3, 0.3) == 0
    assert written(tmp_path / "a") != written(tmp_path / "b")
    with pytest.raises(PrunexError, match="--mean goes with --data"):
        score(run, "--mean", 0.2)


def test_the_label_may_be_explained_instead_of_the_prediction(run, photos, tmp_path):
    wanted = [run, "--methods", "generic_attention", "--metrics", "deletion", "--images", 6, "--models", "slim"]
    assert score(*wanted) == 0
    assert score(*wanted, "--target", "label", "--out", tmp_path / "label") == 0
    scenes, slim = from_run(open_data(run), 6)[:], prunex.load(run / "slim")
    labels = scenes.labels.long()
    e = prunex.explain("generic_attention", slim, scenes.images, labels)
    assert not e.target.equal(slim(scenes.images).argmax(1))  # or this would compare nothing
    found = values(tmp_path / "label", "slim", "generic_attention")
    assert np.array_equal(found["target"], labels.numpy())
    assert np.abs(found["maps"] - e.maps.numpy()).max() < 1e-5
    truth = deletion(removal_curves(slim, scenes.images, e.maps, labels))
    assert np.abs(found["deletion"] - truth.numpy()).max() < 1e-5
    assert written(run / "score") != written(tmp_path / "label")
    assert json.loads((tmp_path / "label" / "about.json").read_text())["target"] == "label"
    with pytest.raises(PrunexError, match="--target label: these images have no labels"):
        score(
            run / "slim",
            "--data",
            photos / "val" / "ant",
            "--target",
            "label",
            "--metrics",
            "deletion",
            "--methods",
            "dino",
        )


def test_anything_that_can_be_spelt_is_scored(run, tmp_path):
    wanted = [run, "--methods", "generic_attention", "--metrics", "deletion,corrected_overlap", "--images", 6]
    scenes, slim = from_run(open_data(run), 6)[:], prunex.load(run / "slim")
    dense = without_pruning(slim)
    for place, spelling in enumerate(("contrast:2,1", "margin", "3")):
        out = tmp_path / str(place)
        assert score(*wanted, "--target", spelling, "--out", out) == 0
        e = prunex.explain("generic_attention", slim, scenes.images, parse(spelling))
        found = values(out, "slim", "generic_attention")
        assert (found["target"] == (3 if spelling == "3" else -1)).all()
        assert np.abs(found["maps"] - e.maps.numpy()).max() < 1e-5
        truth = deletion(removal_curves(slim, scenes.images, e.maps, e.goal()))
        assert np.abs(found["deletion"] - truth.numpy()).max() < 1e-5
        judge = prunex.explain("generic_attention", dense, scenes.images, e.goal()).maps
        assert np.abs(found["corrected_overlap"] - corrected_overlap(e.trace.kept(), judge).numpy()).max() < 1e-5
        assert json.loads((out / "about.json").read_text())["target"] == spelling
        # What is there already is of this target.
        assert score(*wanted, "--target", "predicted", "--out", out) == 0
        assert not np.array_equal(values(out, "slim", "generic_attention")["maps"], found["maps"])
    with pytest.raises(PrunexError, match=r"b=99 .*0\.\."):
        score(*wanted, "--target", "contrast:2,99")
    with pytest.raises(PrunexError, match="--target labels:1,2: scores are of one thing"):
        score(*wanted, "--target", "labels:1,2")
