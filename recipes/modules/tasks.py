"""What a model is trained for: its loss, its score, which labels it takes, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision
from torchmetrics.functional.classification import multilabel_average_precision

from prunex.batches import Parts
from prunex.checks import check_choice
from prunex.errors import PrunexError
from prunex.later import refuse

TaskName = Literal["single", "multi_label", "regression"]


class Task:
    """A task of a model with so many outputs.

    Attributes:
        name: As configs name it.
        score: What its score is called in logs (``val_<score>``), tables and files.
        part: What its labels are called among a batch's parts.
    """

    name: ClassVar[str]
    score: ClassVar[str]
    part: ClassVar[str]

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs

    def check(self, labels: Tensor) -> Tensor:
        """Labels as loss and score take them; PrunexError for such as are of another task."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean loss of float32 logits [B, outputs]."""
        raise NotImplementedError

    def meter(self) -> Metric:
        """The score, gathered over batches of logits and labels."""
        raise NotImplementedError

    def measure(self, logits: Tensor, labels: Tensor) -> float:
        """The score of all logits [N, outputs] at once."""
        raise NotImplementedError

    def predict(self, logits: Tensor) -> Any:
        """What ``predict_step`` returns."""
        raise NotImplementedError


class Single(Task):
    """One class an image, int64 [B]: cross-entropy, accuracy, softmax."""

    name, score, part = "single", "accuracy", "labels"

    def check(self, labels: Tensor) -> Tensor:
        """Classes that the model has."""
        if labels.is_floating_point() or labels.ndim != 1:
            raise PrunexError(_unlike(labels, "single", "whole numbers [B], one class an image"))
        refuse(
            ((labels < 0) | (labels >= self.outputs)).any(),
            lambda: (
                f"labels run from {int(labels.min())} to {int(labels.max())}, the model has {self.outputs} "
                "classes: set num_classes to the number of classes in the data"
            ),
        )
        return labels.clamp(0, self.outputs - 1)  # what is refused later must not end in a device's own assertion

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    def meter(self) -> Metric:
        """Share of images whose class is right."""
        return MulticlassAccuracy(self.outputs, average="micro")

    def measure(self, logits: Tensor, labels: Tensor) -> float:
        """Accuracy in 0..1."""
        return int((logits.argmax(1) == labels).sum()) / len(labels)

    def predict(self, logits: Tensor) -> Tensor:
        """Class probabilities [B, outputs]."""
        return logits.softmax(1)


class MultiLabel(Task):
    """Any number of labels an image, [B, outputs] of 0 and 1: binary cross-entropy, mean average precision, sigmoid."""

    name, score, part = "multi_label", "map", "multi_hot"

    def check(self, labels: Tensor) -> Tensor:
        """A column for each output, 1 where an image has that label."""
        wanted = f"[B, {self.outputs}] of 0 and 1, a column for each of the model's outputs"
        if labels.ndim != 2 or labels.shape[1] != self.outputs:
            raise PrunexError(_unlike(labels, "multi_label", wanted))
        refuse(
            ~((labels == 0) | (labels == 1)).all(),
            lambda: (
                f"task='multi_label' takes labels {wanted}: these run from {float(labels.min()):g} to "
                f"{float(labels.max()):g}"
            ),
        )
        return labels.long()

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Binary cross-entropy, mean over images and labels."""
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits))

    def meter(self) -> Metric:
        """Mean over labels of each one's average precision over images."""
        # Labels were looked at; the metric's own look would wait for the device.
        return MultilabelAveragePrecision(self.outputs, average="macro", validate_args=False)

    def measure(self, logits: Tensor, labels: Tensor) -> float:
        """The same mean in 0..1; NaN where no image has a label."""
        # A label that no image has has no precision.
        seen = labels.bool().any(0)
        if not seen.any():
            return float("nan")
        each = multilabel_average_precision(logits, labels.long(), self.outputs, average="none")
        return float(each[seen].double().mean())

    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """Each label's probability [B, outputs]."""
        return {"label_probabilities": logits.sigmoid()}


class Regression(Task):
    """One number an image, float [B]: mean squared error, mean absolute error, the number itself."""

    name, score, part = "regression", "mae", "values"

    def __init__(self, outputs: int) -> None:
        if outputs != 1:
            raise PrunexError(f"num_classes={outputs} is not allowed with task='regression': give 1, the number itself")
        super().__init__(outputs)

    def check(self, labels: Tensor) -> Tensor:
        """A finite number an image."""
        if labels.dtype == torch.bool or labels.ndim not in (1, 2) or labels[:1].numel() > 1:
            raise PrunexError(_unlike(labels, "regression", "[B], one number an image"))
        refuse(
            ~labels.isfinite().all(), lambda: "labels hold NaN or infinite numbers: leave such images out of the data"
        )
        return labels.flatten().float()

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(logits[:, 0], labels)

    def meter(self) -> Metric:
        """Mean absolute error."""
        return _Column()

    def measure(self, logits: Tensor, labels: Tensor) -> float:
        """Mean absolute error, in the labels' unit."""
        return float((logits[:, 0].double() - labels.double()).abs().mean())

    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """The numbers [B, 1]."""
        return {"values": logits}


class _Column(MeanAbsoluteError):
    """Mean absolute error of outputs [B, 1]."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds[:, 0].float(), target)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Single, MultiLabel, Regression)}


def make_task(name: str, outputs: int) -> Task:
    """A task by name.

    >>> make_task("multi_label", 10).score
    'map'
    """
    return TASKS[check_choice("task", name, TASKS)](outputs)


def task_of(batch: Parts, outputs: int, who: str, where: str) -> tuple[Task, Tensor]:
    """The task that a batch's labels are of, and these: it is the labels that say what a model can be scored by."""
    # Whole numbers of a model of one output are no classes.
    number = next((batch[name] for name in ("values", "labels") if name in batch), None)
    if outputs == 1 and number is not None:
        return Regression(1), Regression(1).check(number)
    task = MultiLabel(outputs) if "multi_hot" in batch else Single(outputs)
    return task, task.check(batch.need(task.part, who, where))


def _unlike(labels: Tensor, task: str, wanted: str) -> str:
    dtype = str(labels.dtype).removeprefix("torch.")
    return f"task={task!r} takes labels {wanted}: these are {dtype} {list(labels.shape)}"


def only_single(task: Task, options: Mapping[str, Any], *names: str) -> None:
    """Refuse options of a classifier of one class an image with another task."""
    for name in names:
        value = options[name]
        if value and not isinstance(task, Single):
            raise PrunexError(f"{name}={value!r} goes with task='single', one class an image: leave it out, or set 0")
