"""FaithfulnessMonitor: whether explanations stay true while the model is pruned, as numbers after every epoch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import prunex
from prunex.callbacks.described import warn_once
from prunex.callbacks.monitor import (
    Monitor,
    explainers_of,
    first_write,
    log_share,
    run_folder,
    try_explainers,
)
from prunex.errors import PrunexError
from prunex.files import write_whole
from prunex.metrics.scoring import Measure, interval, measures, scores, without_pruning
from prunex.removal.game import ROUTES
from prunex.vit.readout import classifies, outputs
from prunex.vit.surroundings import answering

FILE = "faithfulness.csv"
COLUMNS = ("epoch", "step", "method", "metric", "mean", "low", "high", "images")


class FaithfulnessMonitor(Monitor):
    """Score explainers, after every validation epoch, on a few fixed validation images.

    The numbers are those of ``prunex score``: logged as ``prunex/<metric>/<method>``, and added with their bootstrap
    intervals to ``faithfulness.csv`` in the run folder. The class is the one predicted at the time; perturbation counts
    the label as right where batches have labels. Agreement judges a pruned model by the dense model of the same
    weights. A metric that nothing can be said of (localisation without masks, agreement without kept patches) is left
    out with a warning.

    All runs on rank zero, in eval mode, without touching train flags, gradients or the global random state.

    Args:
        methods: Names of explainers.
        metrics: Names of metrics, as ``prunex score`` takes them.
        images: How many validation images to watch.
        every_n_epochs: Watch every so many epochs.
        removal: How patches are taken away; None: as published, see :func:`prunex.metrics.scores`.
        chunk: Most altered images in one forward; None: what is fastest.
        model: Dotted path of the ViT in the module, when it holds several.
        options: Options of the explainers, by name and by method: ``{"rollout": {"discard_ratio": 0.9}}``.

    Raises:
        PrunexError: For an unknown explainer, option, metric or removal, at once.
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
    ) -> None:
        super().__init__(images, every_n_epochs, model, mean, std)
        self.methods, self.options = explainers_of(methods, options)
        if not (metrics is None or isinstance(metrics, list | tuple)):
            raise PrunexError(f"metrics={metrics!r} is not allowed: give a list, such as ['deletion']")
        self.metrics = measures(["deletion", "insertion"] if metrics is None else metrics)
        if removal is not None and removal not in ROUTES:
            raise PrunexError(f"removal={removal!r} is not allowed: give one of {', '.join(ROUTES)}, or None")
        self.removal = removal
        self.chunk = chunk

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
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn before training whether the model can be explained and scored.

        Raises:
            PrunexError: When a method refuses the ViT, or it has no classes and faithfulness is asked for.
        """
        if not trainer.is_global_zero:
            return
        vit = answering(pl_module, self.vit(pl_module))
        if not classifies(vit) and any(m.group == "faithfulness" for m in self.metrics):
            raise PrunexError("FaithfulnessMonitor: this ViT has no classifier, so removing patches changes no class")
        if outputs(vit) == 1 and any(m.kind in ("positive", "negative") for m in self.metrics):
            raise PrunexError(
                "FaithfulnessMonitor: this ViT has one output, whose class is always right: no perturbation"
            )
        try_explainers(vit, self.methods, self.options)

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Explain, score, log and write."""
        call = self.answered(trainer, pl_module, batch)
        vit, images, masks = call.vit, call.entered, batch.get("masks")
        mean, std = self.normalisation(trainer, pl_module)
        rows: list[list[Any]] = []
        dense: Any = None
        for name in self.methods:
            options = self.options.get(name, {})
            e = prunex.explain(name, vit, images, **options)
            kept, judge = None, None
            if any(m.group == "agreement" for m in self.metrics) and _chooses(e):
                dense = without_pruning(vit) if dense is None else dense
                target = e.target if bool((e.target >= 0).all()) else None
                kept, judge = e.trace.kept(), prunex.explain(name, dense, images, target, **options).maps
            chosen = [m for m in self.metrics if _applies(trainer, m, masks, kept)]
            if not chosen:
                continue
            device = e.maps.device
            found = scores(
                [m.name for m in chosen],
                vit,
                images,
                e.maps,
                e.target,
                labels=batch["labels"].to(device) if "labels" in batch else None,
                masks=None if masks is None else masks.to(device),
                pixels=e.pixels.float(),
                kept=kept,
                judge=judge,
                explainer=name,
                options=options,
                removal=self.removal,  # type: ignore[arg-type]
                mean=mean,
                std=std,
                chunk=self.chunk,
            )
            for metric, values in found.items():
                i = interval(metric, values)
                log_share(pl_module, self.key(f"prunex/{metric}/{name}"), i.mean)
                rows.append([trainer.current_epoch, trainer.global_step, name, metric, i.mean, i.low, i.high, i.images])
        if trainer.state.fn == "fit" and not getattr(trainer, "fast_dev_run", False):
            path = (self._folder or run_folder(trainer)) / FILE
            add_rows(path, trainer.current_epoch, rows, first=first_write(trainer, path))


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


def add_rows(path: Path, epoch: int, rows: Sequence[Sequence[Any]], first: bool = True) -> None:
    """Add an epoch's rows to the file, in place of the same cells where it holds them.

    Args:
        path: The file; it is replaced whole.
        epoch: The epoch of all rows.
        first: Whether nobody wrote in this training: what is there of this epoch and later ones is an earlier run's.
        rows: As :data:`COLUMNS` says; a number that is NaN becomes an empty cell.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    new = {tuple(map(str, row[:4])) for row in rows}
    if path.is_file():
        with open(path, newline="") as file:
            for old in csv.DictReader(file):
                earlier = str(old.get("epoch")).isdigit() and int(old["epoch"]) < epoch
                if earlier or (not first and tuple(old.get(name) for name in COLUMNS[:4]) not in new):
                    table.writerow([old.get(name, "") for name in COLUMNS])
    table.writerows([["" if isinstance(v, float) and math.isnan(v) else v for v in row] for row in rows])
    write_whole(path, text.getvalue().encode())
