"""Tasks of ImageClassifier: right losses and scores under right names, and refusals of what is of another task."""

import csv
import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import prunex
from prunex import PrunexError
from prunex.batches import parts
from prunex.callbacks import MaskPruning, RelevancyGuidance, SafeCheckpointIO, TokenPruning
from prunex.recipes import DigitScenes, ImageClassifier
from prunex.recipes.commands import bench
from prunex.recipes.commands.predictions import PredictionTable, numbers
from prunex.recipes.modules.tasks import make_task, task_of
from prunex.recipes.report.page import write_report
from prunex.recipes.runs import evaluate, table, write_summary

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
TASKS = {"multi_label": ("several", 10, "map"), "regression": ("count", 1, "mae")}


def small(task, outputs=None, **arguments):
    outputs = TASKS[task][1] if outputs is None else outputs
    return ImageClassifier("vit_tiny_patch16_224", outputs, dict(SMALL), from_scratch=True, task=task, **arguments)


def trainer(folder, **arguments):
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
        "plugins": [SafeCheckpointIO()], "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(**(defaults | arguments))


def scenes(task, **arguments):
    return DigitScenes(**({"batch_size": 8, "train_size": 24, "val_size": 16, "task": TASKS[task][0]} | arguments))


def average_precision(scores, labels):
    """The definition: precision at each positive, in the order of falling scores, averaged."""
    order = np.argsort(-scores, kind="stable")
    hits = labels[order]
    return float(np.mean([hits[: k + 1].mean() for k in range(len(hits)) if hits[k]]))


@pytest.mark.parametrize("task", TASKS)
def test_it_trains_logs_and_comes_back_from_its_checkpoint(tmp_path, task):
    module = small(task)
    run = trainer(tmp_path, callbacks=[TokenPruning("evit", keep_ratio=0.5, stages=[1])])
    run.fit(module, scenes(task))
    score = TASKS[task][2]
    assert {f"train_{score}", f"val_{score}", "val_loss"} <= set(run.callback_metrics)
    assert not any("accuracy" in name for name in run.callback_metrics)
    assert f"test_{score}" in run.test(module, scenes(task), verbose=False)[0]
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, map_location="cpu").eval()
    assert again.task.name == task
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), module.eval()(images))


@pytest.mark.parametrize("task", TASKS)
def test_what_is_logged_is_what_evaluate_measures_and_what_the_definition_says(tmp_path, task):
    module, data = small(task).eval(), scenes(task, val_size=60)
    logged = trainer(tmp_path).validate(module, data, verbose=False)[0]
    score = TASKS[task][2]
    measured = evaluate(module.model, data.val_dataloader())
    assert set(measured) == {score}
    assert logged[f"val_{score}"] == pytest.approx(measured[score], abs=1e-5)
    batches = list(data.val_dataloader())
    with torch.no_grad():
        logits = torch.cat([module(b[0]) for b in batches]).double()
    labels = torch.cat([b[1] for b in batches]).double()
    if task == "multi_label":
        each = [average_precision(logits[:, c].numpy(), labels[:, c].numpy()) for c in range(10)]
        assert measured["map"] == pytest.approx(np.mean(each), abs=1e-5)
        p = logits.sigmoid()
        loss = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    else:
        assert measured["mae"] == pytest.approx(float((logits[:, 0] - labels).abs().mean()), abs=1e-6)
        loss = ((logits[:, 0] - labels) ** 2).mean()
    assert logged["val_loss"] == pytest.approx(float(loss), abs=1e-4)


def test_labels_that_no_image_has_do_not_count():
    task = make_task("multi_label", 3)
    logits, labels = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]]), torch.tensor([[1, 0, 0], [0, 0, 0]])
    assert task.measure(logits, labels) == 1.0
    assert math.isnan(task.measure(logits, torch.zeros(2, 3, dtype=torch.long)))


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("multi_label", torch.arange(4), r"task='multi_label' takes labels \[B, 10\] of 0 and 1.*int64 \[4\]"),
        ("multi_label", torch.zeros(4, 7), r"\[B, 10\] of 0 and 1.*float32 \[4, 7\]"),
        ("multi_label", torch.full((4, 10), 0.5), r"run from 0\.5 to 0\.5"),
        ("regression", torch.zeros(4, 10), r"task='regression' takes labels \[B\].*\[4, 10\]"),
        ("regression", torch.tensor([0.0, 1.0, float("nan"), 2.0]), "NaN or infinite"),
        ("single", torch.zeros(4, 10), r"task='single' takes labels whole numbers \[B\].*float32 \[4, 10\]"),
        ("single", torch.rand(4), r"task='single' takes labels whole numbers"),
    ],
)
def test_labels_of_another_task_are_refused_in_one_line(tmp_path, task, labels, message):
    module = small(task, 10 if task == "single" else None)
    batch = (torch.randn(4, 3, 64, 64), labels)
    with pytest.raises(PrunexError, match=message) as caught:
        trainer(tmp_path).fit(module, DataLoader([batch], batch_size=None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "options", [{"mixup": 0.2}, {"cutmix": 1.0}, {"label_smoothing": 0.1}, {"patch_label_weight": 1.0}]
)
def test_what_needs_one_class_an_image_is_refused_elsewhere(task, options):
    ((name, value),) = options.items()
    with pytest.raises(PrunexError, match=rf"{name}={value} goes with task='single'"):
        small(task, **options)


def test_a_regression_has_one_output_and_tasks_have_names():
    with pytest.raises(PrunexError, match=r"num_classes=10 is not allowed with task='regression': give 1"):
        small("regression", 10)
    with pytest.raises(PrunexError, match=r"unknown task 'multilabel': did you mean 'multi_label'"):
        small("multilabel", 10)


def test_the_labels_say_what_is_measured():
    images = torch.zeros(4, 3, 8, 8)
    hot, whole = torch.eye(4), torch.tensor([1, 0, 2, 3])
    told = {
        "accuracy": (parts((images, whole)), 4),
        "map": (parts((images, hot)), 4),
        "mae": (parts((images, torch.rand(4))), 1),
    }
    for score, (batch, outputs) in told.items():
        assert task_of(batch, outputs, "accuracy", "the batch")[0].score == score
    # Whole numbers of a model of one output are no classes.
    assert task_of(told["accuracy"][0], 1, "accuracy", "the batch")[0].score == "mae"
    with pytest.raises(PrunexError, match="accuracy found no labels in the batch.*a number of each image"):
        task_of(told["mae"][0], 4, "accuracy", "the batch")
    with pytest.raises(PrunexError, match=r"some validation batches have labels and some multi_hot"):
        evaluate(small("single", 4).model, [(torch.zeros(4, 3, 64, 64), y) for y in (whole, hot)])


def test_tables_and_reports_name_the_score(tmp_path):
    cost = {"gmacs": 0.05, "params_m": 0.7, "images_per_s": 900.0}
    shares = [{"model": "dense", "map": 0.9, **cost}, {"model": "evit", "map": 0.885, **cost}]
    errors = [{"model": "dense", "mae": 0.25, **cost}, {"model": "evit", "mae": 0.3, **cost}]
    assert "mAP" in table(shares).splitlines()[0]
    assert "88.5 %" in table(shares)
    assert "MAE" in table(errors).splitlines()[0]
    assert " 0.3 " in table(errors).splitlines()[2]
    measured = {"speed": [], "notes": [], "machine": "here", "threads": 1, "dtype": "float32", "versions": {}}
    text = bench.table(measured | {"rows": [row | {"file_mb": 1.0} for row in errors]})
    assert text.splitlines()[0].split()[0] == "MAE"
    (tmp_path / "config.yaml").write_text("{}")
    for rows, words in ((shares, ("88.5%", "mAP", "−1.5 points")), (errors, ("MAE", "+0.05"))):
        write_summary(tmp_path, {"machine": "here", "rows": rows})
        page = write_report(tmp_path).read_text()
        for word in words:
            assert word in page
        assert ">accuracy<" not in page


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_told_as_what_they_are(tmp_path, task):
    path = tmp_path / "predictions.csv"
    module, data = small(task), scenes(task)
    predicted = trainer(tmp_path, callbacks=[PredictionTable(path)]).predict(module, data)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    if task == "regression":
        assert list(rows[0]) == ["path", "digits"]
        said = torch.tensor([float(row["digits"]) for row in rows])
        torch.testing.assert_close(said, torch.cat([p["values"] for p in predicted])[:, 0], atol=1e-5, rtol=0)
        return
    shares = torch.cat([p["label_probabilities"] for p in predicted])
    assert list(rows[0]) == ["path", "predicted", *(f"p({d})" for d in range(10))]
    for row, each in zip(rows, shares, strict=True):
        assert row["predicted"] == " + ".join(str(d) for d in range(10) if each[d] >= 0.5)
        assert float(row["p(3)"]) == pytest.approx(float(each[3]), abs=1e-5)


def test_numbers_that_are_not_finite_are_no_predictions():
    with pytest.raises(PrunexError, match="NaN or infinite"):
        numbers({"values": torch.tensor([[float("inf")]])})


@pytest.mark.parametrize(("method", "task"), [("taylor", "multi_label"), ("taylor", "regression")])
def test_taylor_scores_by_the_loss_of_the_task(method, task):
    """Against the squared slope of each image's own loss along one head's gate, by finite differences."""
    torch.manual_seed(0)
    model = small(task).model.double().eval()
    images, labels = next(iter(scenes(task).val_dataloader()))[:2]
    images, labels = images[:3].double(), labels[:3].double()
    pruning = prunex.attach(model, method, budget=0.9)
    scored = pruning.pruner.scores(model, [(images, labels)])
    key = next(b.key for b in pruning.pruner.branches if b.kind == "heads")
    pruning.detach()
    proj = model.blocks[0].attn.proj
    width = proj.in_features // 2

    def loss(gate):
        def scaled(module, inputs):
            x = inputs[0].clone()
            x[..., :width] *= gate
            return (x,)

        handle = proj.register_forward_pre_hook(scaled)
        logits = model(images)
        handle.remove()
        if task == "regression":
            return (logits[:, 0] - labels) ** 2
        p = logits.sigmoid()
        return -(labels * p.log() + (1 - labels) * (1 - p).log()).sum(1)

    with torch.no_grad():
        slope = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
    assert float(scored[key][0]) == pytest.approx(float(slope.square().mean()), rel=1e-4)


def test_criteria_that_cannot_use_labels_say_so_or_refuse(tmp_path):
    images = torch.randn(4, 3, 64, 64)
    one, ten = small("regression").model, small("multi_label").model
    with pytest.raises(PrunexError, match="one output, and no batch says what it should be"):
        prunex.attach(one, "taylor", budget=0.9).calibrate([images])
    with pytest.raises(PrunexError, match=r"\[4, 7\] of 0 and 1: this model has 10 outputs"):
        prunex.attach(ten, "taylor", budget=0.9).calibrate([(images, torch.zeros(4, 7))])
    prunex.attached(ten, units=True).detach()
    with pytest.warns(UserWarning, match="goes by the predicted classes: .*several labels an image"):
        prunex.attach(ten, "relevance", budget=0.9).calibrate([(images, torch.zeros(4, 10))])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_callbacks_that_read_labels_train_refuse_or_warn(tmp_path):
    trainer(tmp_path, callbacks=[MaskPruning("taylor", budget=0.9, images=8)]).fit(
        small("multi_label"), scenes("multi_label")
    )
    with pytest.raises(PrunexError, match="xpruner learns masks by the images' labels.*several labels an image"):
        trainer(tmp_path, callbacks=[MaskPruning("xpruner", budget=0.9)]).fit(
            small("multi_label"), scenes("multi_label")
        )
    guided = [TokenPruning("evit", keep_ratio=0.5, stages=[1]), RelevancyGuidance("generic_attention")]
    with pytest.warns(UserWarning, match="evit goes by the predicted classes: .*several labels an image"):
        trainer(tmp_path, callbacks=guided).fit(small("multi_label"), scenes("multi_label"))


def test_dynamicvit_distils_a_single_output_by_its_squared_error(tmp_path):
    module = small("regression")
    run = trainer(tmp_path, callbacks=[TokenPruning("dynamicvit", keep_ratio=0.5, stages=[1])], max_steps=2)
    run.fit(module, scenes("regression"))
    assert run.callback_metrics["prunex/loss_distill"] > 0
