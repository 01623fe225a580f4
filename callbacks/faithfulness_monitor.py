"""FaithfulnessMonitor: whether explanations stay true while the model is pruned, as numbers after every epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import prunex
from prunex.callbacks.averaging import callbacks_of
from prunex.callbacks.described import warn_once
from prunex.callbacks.monitor import ExplainingMonitor, log_share
from prunex.callbacks.run_folder import add_rows, only_trying
from prunex.errors import PrunexError
from prunex.metrics.scoring import Measure, interval, measures, scores, without_pruning
from prunex.removal.game import ROUTES
from prunex.targets import Function, MultiLabel, spelt
from prunex.vit.readout import classifies, outputs

FILE = "faithfulness.csv"
COLUMNS = ("epoch", "step", "method", "metric", "mean", "low", "high", "images")


class FaithfulnessMonitor(ExplainingMonitor):
    """Score explainers, after every validation epoch, on a few fixed validation images.

    The numbers are those of ``prunex score``: logged as ``prunex/<metric>/<method>``, and added with their bootstrap
    intervals to ``faithfulness.csv`` in the run folder. The class is the one predicted at the time, unless ``target``
    says what else is explained and measured; perturbation counts the label as right where batches have one an image,
    else the predicted class. Agreement judges a pruned model by the dense model of the same
    weights. A metric that nothing can be said of (localisation without masks, agreement without kept patches) is left
    out with a warning.

    All runs on rank zero, in eval mode, without touching train flags, gradients or the global random state.

    Args:
        methods: Names of explainers.
        metrics: Names of metrics, as ``prunex score`` takes them.
        images: As all monitors', see :class:`~prunex.callbacks.monitor.Monitor`; so are those left out here.
        removal: How patches are taken away; None: as published, see :func:`prunex.metrics.scores`.
        chunk: Most altered images in one forward; None: what is fastest.
        options: Of the explainers, by method: ``{"rollout": {"discard_ratio": 0.9}}``.
        target: As of :class:`~prunex.callbacks.relevancy_monitor.RelevancyMonitor`; each of several labels has rows of
            its own, under ``<method>:<label>``.

    Raises:
        PrunexError: For an unknown explainer, option, metric, removal or target, at once.
    """

    def __init__(
        self,
        methods: list[str] | None = None,
        metrics: list[str] | None = None,
        images: int = 16,
        every_n_epochs: int = 1,
        removal: str | None = None,
        chunk: int | None = None,
        model: str | None = None,
        options: dict[str, dict[str, Any]] | None = None,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
        target: str | int | Function | MultiLabel | None = None,
    ) -> None:
        super().__init__(methods, options, images, every_n_epochs, model, mean, std, target=target)
        if not (metrics is None or isinstance(metrics, list | tuple)):
            raise PrunexError(f"metrics={metrics!r} is not allowed: give a list, such as ['deletion']")
        self.metrics = measures(["deletion", "insertion"] if metrics is None else metrics)
        if removal is not None and removal not in ROUTES:
            raise PrunexError(f"removal={removal!r} is not allowed: give one of {', '.join(ROUTES)}, or None")
        self.removal = removal
        self.chunk = chunk
        self._table = Path()  # where this run has written rows

    @property
    def state_key(self) -> str:
        """Lets one trainer hold several, by what they watch and score."""
        return self._generate_state_key(
            images=self.images,
            every_n_epochs=self.every_n_epochs,
            model=self.model,
            methods=self.methods,
            metrics=[m.name for m in self.metrics],
            **({"options": self.options} if self.options else {}),
            **({} if self.target is None else {"target": spelt(self.target)}),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run that has written nothing."""
        super().setup(trainer, pl_module, stage)
        self._table = Path()

    def check_model(self, vit: Any) -> None:
        """Refuse a ViT without classes where faithfulness is asked for, or with one class alone and perturbation."""
        if not (classifies(vit) or callable(self.target)) and any(m.group == "faithfulness" for m in self.metrics):
            raise PrunexError("FaithfulnessMonitor: this ViT has no classifier, so removing patches changes no class")
        if outputs(vit) == 1 and any(m.kind in ("positive", "negative") for m in self.metrics):
            raise PrunexError(
                "FaithfulnessMonitor: this ViT has one output, whose class is always right: no perturbation"
            )

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Explain, score, log and write."""
        call = self.answered(trainer, pl_module, batch)
        mean, std = self.normalisation(trainer, pl_module)
        rows: list[list[Any]] = []
        dense: Any = None
        if "multi_hot" in batch and any(m.kind in ("positive", "negative") for m in self.metrics):
            warn_once(
                trainer,
                "FaithfulnessMonitor: batches have several labels an image, so perturbation counts the predicted class "
                "as right",
            )
        for method, name, e in self.explained(call.vit, call.entered):
            options, target = self.options.get(method, {}), e.goal()
            tensors: dict[str, Any] = {
                part: batch[part].to(e.maps.device) for part in ("labels", "masks") if part in batch
            }
            # Agreement compares what was kept with what the dense model of the same weights rests on.
            kept, judge = None, None
            if any(m.group == "agreement" for m in self.metrics) and _chooses(e):
                dense = without_pruning(call.vit) if dense is None else dense
                kept, judge = e.trace.kept(), prunex.explain(method, dense, call.entered, target, **options).maps
            chosen = [m.name for m in self.metrics if _applies(trainer, m, tensors.get("masks"), kept)]
            if not chosen:
                continue
            values = scores(
                chosen,
                call.vit,
                call.entered,
                e.maps,
                e.target if e.function is None else target,
                **tensors,
                pixels=e.pixels.float(),
                kept=kept,
                judge=judge,
                explainer=method,
                options=options,
                removal=self.removal,  # type: ignore[arg-type]
                mean=mean,
                std=std,
                chunk=self.chunk,
            )
            for metric, per_image in values.items():
                i = interval(metric, per_image)
                log_share(pl_module, self.key(f"prunex/{metric}/{name}"), i.mean)
                shown = ["" if math.isnan(v) else v for v in (i.mean, i.low, i.high)]
                rows.append([trainer.current_epoch, trainer.global_step, name, metric, *shown, i.images])
        if trainer.state.fn == "fit" and not only_trying(trainer):
            path, others = self._folder / FILE, callbacks_of(trainer)
            # In this run several monitors may write into one table; before its first row all of it is an earlier run's.
            begun = any(isinstance(c, FaithfulnessMonitor) and c._table == path for c in others)
            add_rows(path, COLUMNS, trainer.current_epoch, rows, replace=4 if begun else None)
            self._table = path


def _applies(trainer: Trainer, measure: Measure, masks: Tensor | None, kept: Tensor | None) -> bool:
    """Whether the batch and the model bring what a metric is about; a warning the first time they do not."""
    lacks = {"localisation": masks is None, "agreement": kept is None}.get(measure.group, False)
    if lacks:
        what = "patches that are kept as themselves"
        if measure.group == "localisation":
            what = "object masks (bool [B, H, W]) in the validation batches"
        warn_once(trainer, f"FaithfulnessMonitor: there are no {what}, so {measure.group} is left out")
    return not lacks


def _chooses(e: prunex.Explanation) -> bool:
    """Whether the explained forward left a set of kept patches."""
    return bool(e.trace.stages) and not e.trace.pooled and not e.trace.merges()
