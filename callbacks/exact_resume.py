"""ExactResume: checkpoints from which an interrupted training goes on as if nothing had happened."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger

from prunex.callbacks.checkpoints import LAST, guard_loading
from prunex.callbacks.layers import Layered
from prunex.callbacks.participant import cuts_weights
from prunex.callbacks.run_folder import run_folder
from prunex.checks import check_whole
from prunex.files import DRAFT, put_in_place, remove_drafts

KEY = "prunex_metrics"


class ExactResume(Layered, Checkpoint):
    """Write ``checkpoints/last.ckpt`` between epochs, and give every epoch random numbers of its own.

    A training that is killed, interrupted or runs into an error, and is continued from that file, ends with the weights
    and metrics of one that nothing happened to, bit for bit on a CPU: ``prunex fit --ckpt_path last``, or
    ``trainer.fit(..., ckpt_path="<run folder>/checkpoints/last.ckpt")``. What was done since the epoch began is done
    again. The commands use this callback unless ``enable_checkpointing`` is off.

    The generators of Python, NumPy and torch are seeded when an epoch begins, from the run's seed, the epoch and the
    process's rank: data order, augmentation and noise do not depend on what was drawn before, and nothing about them
    needs to be saved. The checkpoint brings ``metrics.csv`` of a ``CSVLogger`` with it, so that a run that is continued
    has one file from its first epoch on.

    With this callback Lightning adds no ``ModelCheckpoint`` of its own; give one to keep the best epoch too.

    Args:
        every_n_epochs: Write every so many epochs; at the end of training anyway.

    Raises:
        PrunexError: For a number below 1; when the file cannot be written.

    >>> from prunex.callbacks import ExactResume
    >>> ExactResume(every_n_epochs=5).every_n_epochs
    5
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        super().__init__()
        self.every_n_epochs = check_whole("every_n_epochs", every_n_epochs, 1)
        self._seed = 0
        self._folder = Path()
        self._first = True  # epoch of this fit
        self._saving = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn folder and seed; here, because all processes come by, and asking is a broadcast."""
        if stage != "fit":
            return
        self._folder = run_folder(trainer) / "checkpoints"
        self._seed = trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        self._first = True
        self._undo = guard_loading(pl_module, {})
        if trainer.is_global_zero:
            remove_drafts(self._folder)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the epochs so far have made; then this epoch's random numbers begin."""
        epoch = trainer.current_epoch
        if not self._first and epoch % self.every_n_epochs == 0:
            self._save(trainer)
        resumed, self._first = self._first and epoch > 0, False
        # By rank too: processes must not augment alike.
        state = np.random.SeedSequence([self._seed, epoch, trainer.global_rank]).generate_state(2)
        random.seed(int(state[0]))
        np.random.seed(int(state[0]))  # noqa: NPY002  (augmentations draw from it)
        torch.manual_seed(int(state[0]) << 32 | int(state[1]))
        loop: Any = trainer.fit_loop
        # Lightning asks the loaders for a new iterator after this hook, but not in the first epochs of a fit.
        anew = epoch > 0 and not getattr(loop, "is_resuming", False) and not loop.epoch_loop.restarting
        if resumed and loop._data_fetcher is not None and not anew:
            iter(loop._data_fetcher)  # this epoch's order of images was drawn before the seed was set

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the trained model; other callbacks have had their say by now."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        path = draft = self._folder / LAST
        if cuts_weights(trainer):  # which may write a folder, file by file
            draft = path.with_name(f"{DRAFT}{LAST}")
        self._saving = True
        try:
            trainer.save_checkpoint(draft, weights_only=False)
        finally:
            self._saving = False
        if draft != path and trainer.is_global_zero:
            put_in_place(draft, path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the metrics so far beside the weights they are about."""
        if not self._saving:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        for counts in (progress["total"], progress["current"]):
            # The epoch that is about to begin is not part of it: Lightning would take it for one that was interrupted.
            counts["ready"] = min(counts["ready"], counts["completed"])
        for number, logger in _csv_loggers(trainer):
            logger.save()
            path = Path(logger.log_dir) / "metrics.csv"
            if path.is_file():
                checkpoint.setdefault(KEY, {})[str(number)] = path.read_text()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the metrics that the checkpoint brings."""
        tables = checkpoint.get(KEY)
        if not isinstance(tables, dict) or trainer.state.fn != "fit":
            return
        for number, logger in _csv_loggers(trainer):
            text = tables.get(str(number))
            if isinstance(text, str):
                rows: list[Any] = list(csv.DictReader(io.StringIO(text)))
                logger.experiment.metrics[:0] = rows
                logger.save()

    def state_dict(self) -> dict[str, Any]:
        """The seed that all epochs' numbers come from."""
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._seed = int(state_dict["seed"])


def _csv_loggers(trainer: Trainer) -> list[tuple[int, CSVLogger]]:
    """Rank zero's loggers that write metrics.csv, with their numbers; no other process has any."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [(number, logger) for number, logger in enumerate(loggers) if isinstance(logger, CSVLogger)]
