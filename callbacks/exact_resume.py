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
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from prunex.callbacks.checkpoints import LAST, guard_loading
from prunex.callbacks.generators import all_places, own_generators, reopen, set_generators, stateful
from prunex.callbacks.layers import Layered
from prunex.callbacks.participant import cuts_weights
from prunex.callbacks.run_folder import only_trying, run_folder
from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.files import DRAFT, put_in_place, remove_drafts

KEY = "prunex_metrics"


class ExactResume(Layered, Checkpoint):
    """Write ``checkpoints/last.ckpt`` between epochs, and give every epoch random numbers of its own.

    A training that is killed, interrupted or runs into an error, and is continued from that file, ends with the weights
    and metrics of one that nothing happened to, bit for bit on a CPU: ``prunex fit --ckpt_path last``, or
    ``trainer.fit(..., ckpt_path="<run folder>/checkpoints/last.ckpt")``. What was done since the epoch began is done
    again. The commands use this callback unless ``enable_checkpointing`` is off.

    With ``every_n_steps`` the file is written inside an epoch, too, where the training loader knows where it stands
    (``state_dict`` and ``load_state_dict``, as ``torchdata.stateful_dataloader.StatefulDataLoader`` has them): training
    goes on at the next batch, and no step is done twice. Of what is logged as an epoch's mean, that epoch has the mean
    of the steps after it went on. Another loader is told of once, and goes on from the epoch's beginning.

    The generators of Python, NumPy and torch are seeded when an epoch begins, from the run's seed, the epoch and the
    process's rank: data order, augmentation and noise do not depend on what was drawn before, and nothing about them
    needs to be saved. The checkpoint brings ``metrics.csv`` of a ``CSVLogger`` with it, so that a run that is continued
    has one file from its first epoch on.

    With this callback Lightning adds no ``ModelCheckpoint`` of its own; give one to keep the best epoch too.

    Args:
        every_n_epochs: Write every so many epochs; at the end of training anyway.
        every_n_steps: Write every so many steps of an optimiser as well; None: between epochs alone.

    Raises:
        PrunexError: For a number below 1; when the file cannot be written.

    >>> from prunex.callbacks import ExactResume
    >>> ExactResume(every_n_epochs=5).every_n_epochs
    5
    """

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int | None = None) -> None:
        super().__init__()
        self.every_n_steps = None if every_n_steps is None else check_whole("every_n_steps", every_n_steps, 1)
        self.every_n_epochs = check_whole("every_n_epochs", every_n_epochs, 1)
        self._seed = 0
        self._folder = Path()
        self._first = True  # epoch of this fit
        self._saving = False
        self._places: list[dict[str, Any]] = []  # where each process stands inside an epoch; none between epochs
        self._saved = 0  # the step after which it was written last

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
        for generator in own_generators(trainer):
            generator.manual_seed(int(state[0]) << 32 | int(state[1]))
        loop: Any = trainer.fit_loop
        # Lightning asks the loaders for a new iterator after this hook, but not in the first epochs of a fit.
        anew = epoch > 0 and not getattr(loop, "is_resuming", False) and not loop.epoch_loop.restarting
        if resumed and loop._data_fetcher is not None and not anew:
            iter(loop._data_fetcher)  # this epoch's order of images was drawn before the seed was set

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Inside an epoch, draw on where it was left: here, because the loaders have drawn what they need."""
        self._saved = trainer.global_step
        if self._places:
            set_generators(self._places[trainer.global_rank]["generators"])
            self._places, self._first = [], False
        if self.every_n_steps is not None and not stateful(trainer):
            rank_zero_warn(
                f"ExactResume(every_n_steps={self.every_n_steps}) writes between epochs alone: the training loader "
                "does not know where it stands (no state_dict and load_state_dict); give "
                "torchdata.stateful_dataloader.StatefulDataLoader"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save inside an epoch, where it is time to and the loader can go on there."""
        steps = trainer.global_step - self._saved
        # After the last batch comes validation, and what is between epochs; between steps gradients are in the air.
        if self.every_n_steps is None or steps < self.every_n_steps or trainer.is_last_batch or not stateful(trainer):
            return
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._places = all_places(trainer)
        self._save(trainer)
        # Whoever goes on from here opens the loaders anew, and that draws numbers: so does this run.
        reopen(trainer, self._places[trainer.global_rank])
        self._places = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the trained model; other callbacks have had their say by now."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if only_trying(trainer):
            return
        self._saved = trainer.global_step
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
        loop = checkpoint["loops"]["fit_loop"]
        # Lightning's is of the first process alone, and between epochs nothing is to be gone on with.
        loop["state_dict"].pop("combined_loader", None)
        for counts in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
            # The epoch that is about to begin is not part of it: Lightning would take it for one that was interrupted.
            if not self._places:
                counts["ready"] = min(counts["ready"], counts["completed"])
        for number, logger in _csv_loggers(trainer):
            logger.save()
            path = Path(logger.log_dir) / "metrics.csv"
            if path.is_file():
                checkpoint.setdefault(KEY, {})[str(number)] = path.read_text()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the metrics that the checkpoint brings."""
        # Callbacks get their own state later than this.
        places = ((checkpoint.get("callbacks") or {}).get(self.state_key) or {}).get("places", [])
        if places and trainer.state.fn == "fit":
            if len(places) != trainer.world_size:
                raise PrunexError(
                    f"the checkpoint was written inside an epoch by {len(places)} processes, and there are "
                    f"{trainer.world_size}: go on with as many"
                )
            mine = places[trainer.global_rank]["loaders"]
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = mine
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
        """The seed that all epochs' numbers come from, and where processes stand inside an epoch."""
        # A file that another callback writes meanwhile must not send a run into the middle of an epoch.
        inside = self._saving and self._places
        return {"seed": self._seed} | ({"places": self._places} if inside else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._seed = int(state_dict["seed"])
        self._places = state_dict.get("places", [])


def _csv_loggers(trainer: Trainer) -> list[tuple[int, CSVLogger]]:
    """Rank zero's loggers that write metrics.csv, with their numbers; no other process has any."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [(number, logger) for number, logger in enumerate(loggers) if isinstance(logger, CSVLogger)]
