"""The run's own folder, and what is written there: files named by the epoch, rows of tables, ``prunex.json``.

``prunex.json`` holds what ``prunex report`` and ``bench`` could not know, whatever loggers there are: "slim", where
the slim model is if not in ``slim/`` beside it; "run", beside a slim model elsewhere, the run's folder; and "metrics",
a row an epoch, where no logger of the run writes ``metrics.csv``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from prunex.callbacks.averaging import kinds_of
from prunex.callbacks.described import tell_once, warn_once
from prunex.errors import PrunexError
from prunex.files import write_whole
from prunex.untrusted import read_json

RECORD = "prunex.json"


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder, where Lightning puts checkpoints too; a broadcast: call it on all processes."""
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or isinstance(logger, CSVLogger | TensorBoardLogger):
        return Path(trainer.log_dir or trainer.default_root_dir)
    # The save_dir of other loggers is shared by all runs.
    folder, version = Path(logger.save_dir or trainer.default_root_dir, str(logger.name or "")), logger.version
    if version is not None:
        folder /= version if isinstance(version, str) else f"version_{version}"
    return Path(trainer.strategy.broadcast(str(folder)))


def only_trying(trainer: Trainer) -> bool:
    """Whether this is ``fast_dev_run``, a few batches that must not replace what earlier trainings wrote."""
    return bool(getattr(trainer, "fast_dev_run", False))


def moment(trainer: Trainer) -> tuple[str, str]:
    """What files and titles of a look are called: by the epoch of training, else by what runs ("validate")."""
    # The Trainer of a validation counts from epoch 0 as well, and may have the folder of the training.
    if trainer.state.fn == TrainerFn.FITTING:
        return f"epoch={trainer.current_epoch:03d}", f"epoch {trainer.current_epoch}"
    fn = str(getattr(trainer.state.fn, "value", trainer.state.fn))
    return fn, fn


def add_rows(
    path: Path, columns: Sequence[str], epoch: int, rows: Collection[Sequence[Any]], replace: int | None = None
) -> None:
    """Add an epoch's rows to a CSV file, in place of its rows of this epoch and later ones: an earlier run's.

    With ``replace`` only rows go that are a new one's in their first so many cells: another monitor's may lie there.
    """
    new = {tuple(map(str, row[:replace])) for row in rows}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    if path.is_file():
        with open(path, newline="") as file:
            for old in csv.DictReader(file):
                cells = [old.get(name) or "" for name in columns]
                earlier = cells[0].isdigit() and int(cells[0]) < epoch
                if earlier or (replace is not None and tuple(cells[:replace]) not in new):
                    table.writerow(cells)
    table.writerows(rows)
    # As one file that is whole: a report may read it while training goes on.
    write_whole(path, text.getvalue().encode())


def read_record(folder: Path) -> dict[str, Any]:
    """What callbacks have told of a run; nothing where they have not, or the file is damaged."""
    try:
        entries = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    except PrunexError:
        return {}
    return entries if isinstance(entries, dict) else {}


def record(folder: Path, **entries: Any) -> None:
    """Write something down in a run's folder, beside what is there."""
    write_whole(folder / RECORD, (json.dumps(read_record(folder) | entries, indent=1) + "\n").encode())


def record_slim(run: Path, slim: Path) -> None:
    """Have a run's folder and its slim model's know of each other, where they lie apart."""
    if slim.resolve() != (run / "slim").resolve():
        record(run, slim=str(slim.resolve()))
        record(slim.parent, run=str(run.resolve()))


def record_metrics(trainer: Trainer, folder: Path) -> None:
    """Note this epoch's metrics where the run's folder is no ``CSVLogger``'s; on rank zero, when a training epoch ends.

    A metric that stayed as it was is noted only in epochs that were validated: else it is the last validation's.
    """
    # The first logger's folder is the run's: a CSVLogger behind it writes into another one.
    if isinstance(trainer.logger, CSVLogger) or only_trying(trainer):
        return
    epoch = trainer.current_epoch
    rows: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for row in read_record(folder).get("metrics") or ():
        if isinstance(row, dict) and row.get("epoch", epoch) < epoch:  # others are an earlier run's
            rows.append(row)
            before.update(row)
    validated = (epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
    new: dict[str, float] = {"epoch": epoch, "step": trainer.global_step}
    for name, metric in trainer.callback_metrics.items():
        value = float(metric) if metric.numel() == 1 else float("nan")
        if (validated or before.get(str(name)) != value) and value - value == 0:  # finite
            new[str(name)] = value
    record(folder, metrics=[*rows, new])


def log_picture(trainer: Trainer, tag: str, picture: np.ndarray) -> None:
    """Hand one uint8 [H, W, 3] picture to every logger that takes images; files are written by the caller anyway.

    One that takes none is named once. A picture lies at the step of the numbers that Lightning logs beside it.
    """
    # Not global_step, which counts every optimiser's steps; Lightning's own callbacks log by this one.
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    for logger in trainer.loggers:
        name = type(logger).__name__
        send = _sender(logger)
        if send is None:
            tell_once(trainer, f"prunex: {name} takes no pictures: those of the monitors are files in maps/")
            continue
        try:
            send(tag, picture, step)
        except Exception as error:  # whatever a service raises: a picture must not end a training
            warn_once(trainer, f"{name} did not take the picture {tag}: {error}")


def _sender(logger: Any) -> Callable[[str, np.ndarray, int], object] | None:
    """How a logger takes a picture by its name and step; None: not at all."""
    kinds = kinds_of(logger)
    if "TensorBoardLogger" in kinds:
        return lambda tag, picture, step: logger.experiment.add_image(tag, picture, step, dataformats="HWC")
    if "MLFlowLogger" in kinds:
        return lambda tag, picture, step: logger.experiment.log_image(
            logger.run_id, picture, key=tag.replace("/", "."), step=step
        )
    if "CometLogger" in kinds:
        return lambda tag, picture, step: logger.experiment.log_image(picture, name=tag, step=step)
    if kinds & {"LitLogger", "LightningLogger"}:
        image = import_module("litlogger").Image
        return lambda tag, picture, step: logger.experiment[tag].append(image(picture), step=step)
    if callable(getattr(logger, "log_image", None)):  # as WandbLogger's, whose signature others follow
        return lambda tag, picture, step: logger.log_image(tag, images=[picture], step=step)
    return None
