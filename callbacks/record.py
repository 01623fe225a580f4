"""``prunex.json`` in a run's folder: what ``prunex report`` and ``bench`` could not know, whatever loggers there are.

It holds "slim", where the slim model is if not in ``slim/`` beside it; "run", beside a slim model elsewhere, the run's
folder; and "metrics", a row an epoch, where no logger of the run writes ``metrics.csv``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from prunex.errors import PrunexError
from prunex.files import write_whole
from prunex.untrusted import read_json

RECORD = "prunex.json"

_ROWS: WeakKeyDictionary[Trainer, list[dict[str, float]]] = WeakKeyDictionary()  # callbacks of a trainer share them


def read_record(folder: Path) -> dict[str, Any]:
    """What callbacks have told of a run; nothing where they have not, or the file is damaged."""
    try:
        found = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    except PrunexError:
        return {}
    return found if isinstance(found, dict) else {}


def record(folder: Path, **told: Any) -> None:
    """Write something down in a run's folder, beside what is there."""
    write_whole(folder / RECORD, (json.dumps(read_record(folder) | told, indent=1) + "\n").encode())


def record_slim(run: Path, slim: Path) -> None:
    """Have a run's folder and its slim model's know of each other, where they lie apart."""
    if slim.resolve() != (run / "slim").resolve():
        record(run, slim=str(slim.resolve()))
        record(slim.parent, run=str(run.resolve()))


def record_metrics(trainer: Trainer, folder: Path) -> None:
    """Note this epoch's metrics where the run's folder is no ``CSVLogger``'s; the same epoch once, whoever asks.

    Call it on rank zero, when a training epoch ends. A metric that stayed as it was is noted only in epochs that were
    validated: else it is the last validation's, which the Trainer still holds.
    """
    # The first logger's folder is the run's: a CSVLogger behind it writes into another one.
    if isinstance(trainer.logger, CSVLogger) or getattr(trainer, "fast_dev_run", False):
        return
    epoch = trainer.current_epoch
    if trainer not in _ROWS:
        before = read_record(folder).get("metrics") if epoch > 0 else None  # of the run that goes on here
        _ROWS[trainer] = [r for r in before or () if isinstance(r, dict) and r.get("epoch", epoch) < epoch]
    rows = _ROWS[trainer]
    if rows and rows[-1]["epoch"] == epoch:
        return
    every = trainer.check_val_every_n_epoch or 1
    known = {name: value for row in rows for name, value in row.items()}
    values = {str(name): float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    changed = {n: v for n, v in values.items() if (epoch + 1) % every == 0 or known.get(n) != v}
    rows.append({"epoch": epoch, "step": trainer.global_step, **{n: v for n, v in changed.items() if v - v == 0}})
    record(folder, metrics=rows)
