"""``prunex predict``: a table of what a model says of every image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import Subset

import prunex
from prunex.callbacks import TokenPruning
from prunex.callbacks.described import names_of
from prunex.errors import PrunexError
from prunex.files import readable, write_whole
from prunex.recipes.tables import as_csv

FILE = "predictions.csv"


class PredictionTable(BasePredictionWriter):
    """Write a CSV file with a row an image: path, predicted class, its probability, kept share, all probabilities.

    Of several labels an image: the predicted ones (at least 0.5) with + between, and each one's probability. Of
    numbers: these.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)
        self._rows: dict[tuple[int, int], tuple[str, list[float], float | None]] = {}
        self._kind = "probabilities"

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Take a batch's rows."""
        self._kind, shares = numbers(prediction)
        loaders: Any = trainer.predict_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
        # Images of a stream have no numbers.
        if batch_indices is None or len(batch_indices) != len(shares):
            first = sum(number == dataloader_idx for number, _ in self._rows)
            batch_indices = range(first, first + len(shares))
        # Now: the next batch writes another trace.
        kept = _kept(trainer, pl_module, len(shares))
        for row, index in enumerate(batch_indices):
            share = None if kept is None else float(kept[row])
            name = path_of(getattr(loader, "dataset", None), index)
            self._rows[dataloader_idx, index] = (name, shares[row].tolist(), share)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file; of several processes the first writes what all have seen."""
        rows = self._rows
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, rows)
            # Samplers repeat some images, so that all processes have equally many.
            rows = {key: row for part in parts for key, row in part.items()}
        if not trainer.is_global_zero:
            return
        if not rows:
            raise PrunexError("there was nothing to predict: the data have no images for it")
        ordered = [rows[key] for key in sorted(rows)]
        names = names_of(trainer, pl_module, len(ordered[0][1]))
        write_whole(self.path, as_csv(_table(ordered, names, self._kind)))
        print(f"{self.path} ({len(rows):,} images)")


def numbers(prediction: Any) -> tuple[str, Tensor]:
    """What a ``predict_step`` returned, [B, C], and what it is: class "probabilities", or a mapping's own name for it.

    >>> numbers({"values": torch.tensor([[1.5]])})
    ('values', tensor([[1.5000]]))
    """
    for kind in ("label_probabilities", "values"):
        rows = prediction.get(kind) if isinstance(prediction, Mapping) else None
        if isinstance(rows, Tensor) and rows.ndim == 2 and rows.is_floating_point():
            return kind, _finite(rows)
    return "probabilities", probabilities(prediction)


def probabilities(prediction: Any) -> Tensor:
    """Class probabilities [B, C] of what a ``predict_step`` returned, as such or as logits; never guessed which.

    >>> probabilities(torch.tensor([[0.0, 0.0]])).tolist()
    [[0.5, 0.5]]
    """
    if isinstance(prediction, Mapping):
        prediction = next((prediction[key] for key in ("probabilities", "logits") if key in prediction), prediction)
    if not (isinstance(prediction, Tensor) and prediction.ndim == 2 and prediction.is_floating_point()):
        shape = f" {list(prediction.shape)} of {prediction.dtype}" if isinstance(prediction, Tensor) else ""
        raise PrunexError(
            f"no table can be made of what predict_step returned ({type(prediction).__name__}{shape}): return logits "
            "or probabilities [B, classes], or write it yourself with a BasePredictionWriter and trainer.predict"
        )
    values = _finite(prediction)
    # Numbers in 0..1 that add up to 1 are probabilities; others in 0..1 may be of several labels.
    within = bool(((values >= 0) & (values <= 1)).all())
    if within and torch.allclose(values.sum(1), torch.ones(len(values)), atol=1e-3):
        return values
    if values.shape[1] == 1 or (within and bool(values.any())):
        raise PrunexError(
            f"predict_step returned [B, {values.shape[1]}] numbers that may be logits or probabilities of several "
            "classes at once: return {'logits': ...}, {'label_probabilities': ...} of several labels an image, "
            "{'values': ...}, or probabilities that add up to 1"
        )
    return values.softmax(1)


def _finite(rows: Tensor) -> Tensor:
    values = rows.detach().float().cpu()
    if not values.isfinite().all():
        raise PrunexError("predict_step returned NaN or infinite numbers: take the weights of an earlier epoch")
    return values


def path_of(dataset: Any, index: int) -> str:
    """Where an image of a dataset lies, else its number.

    >>> path_of(None, 3)
    '3'
    """
    if isinstance(dataset, Subset):
        return path_of(dataset.dataset, int(dataset.indices[index]))
    # As torchvision's datasets have it.
    listed = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    try:
        entry = listed[index]  # type: ignore[index]
        where = entry[0] if isinstance(entry, tuple | list) else entry
    except (TypeError, LookupError):
        return str(index)
    return readable(str(where)) if isinstance(where, str | Path) else str(index)


def _kept(trainer: Trainer, module: LightningModule, count: int) -> Tensor | None:
    """The share of patches that each image of the last batch has kept; None without a token pruner that says it."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    pruning = next((c.pruning for c in callbacks if isinstance(c, TokenPruning)), None)
    # The module may have attached its pruner itself.
    if pruning is None:
        try:
            pruning = prunex.attached(module)
        except PrunexError:  # no ViT, or several
            return None
    if pruning is None or not pruning.trace.stages or pruning.trace.batch != count:
        return None
    return pruning.trace.keep_ratios()[-1].cpu()


def _table(
    rows: Sequence[tuple[str, list[float], float | None]], class_names: Sequence[str] | None, kind: str
) -> Iterator[list[str]]:
    """A heading and the rows in words; classes go by their names where these are known, else by their numbers."""
    classes = len(rows[0][1])
    names = [readable(name) for name in class_names or map(str, range(classes))]
    pruned = any(kept is not None for _, _, kept in rows)
    heads = {"probabilities": ["predicted", "probability"], "label_probabilities": ["predicted"], "values": []}[kind]
    columns = names if kind == "values" else [f"p({name})" for name in names]
    yield ["path", *heads, *["kept"] * pruned, *columns]
    for path, shares, kept in rows:
        # The first of equals, as argmax has it.
        best = max(range(classes), key=shares.__getitem__)
        said = [names[best], f"{shares[best]:.6f}"]
        if kind == "label_probabilities":
            said = [" + ".join(name for name, share in zip(names, shares, strict=True) if share >= 0.5)]
        left = ["" if kept is None else f"{kept:.4f}"] * pruned
        yield [path, *said[: len(heads)], *left, *(f"{share:.6f}" for share in shares)]
