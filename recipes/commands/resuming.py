"""Going on with the last run: which folder and checkpoint ``--ckpt_path last`` means, and a config that is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from prunex.callbacks.checkpoints import LAST
from prunex.errors import PrunexError
from prunex.files import remove_drafts, write_whole
from prunex.recipes.runs import versions

LOGGERS = ("CSVLogger", "TensorBoardLogger")  # whose folders are save_dir/name/version_N


def go_on(config: Any, training: bool) -> bool:
    """Put the path of the last run's checkpoint in place of ``ckpt_path: last``, and let training use its folder again.

    The last run is the ``version_N`` of the highest number that has a checkpoint: other such folders are no runs.
    Returns whether the run's folder was chosen here, and not by the config.
    """
    logger = _logger(config.trainer.get("logger"))
    if logger is None:
        raise PrunexError(
            f"ckpt_path='last' needs a logger whose folders are numbered ({' or '.join(LOGGERS)}): give the path of "
            f"the checkpoint instead, as in runs/NAME/version_0/checkpoints/{LAST}"
        )
    root = Path(logger["save_dir"], logger.get("name") or "")
    # A config that names its version means that one.
    version = logger.get("version")
    chosen = version is None
    named = root / (version if isinstance(version, str) else f"version_{version}")
    folders = versions(root) if chosen else [folder for folder in [named] if folder.is_dir()]
    if not folders:
        if not training:
            raise PrunexError(f"ckpt_path='last': there is no run in {root}; train first, or give a path")
        rank_zero_info(f"prunex: there is no run in {root} yet, so this is the first")
        config["ckpt_path"] = None
        return False
    # A newer folder without a checkpoint was stopped before its first epoch had ended.
    run = next((f for f in folders if _last(f).exists()), folders[0])
    if not training and not _last(run).exists():
        raise PrunexError(f"ckpt_path='last': there is no {_last(run)}; give the path of a checkpoint")
    if training:
        logger["version"] = run.name
        # What a killed process was writing when it was killed.
        remove_drafts(run)
    if _last(run).exists():
        config["ckpt_path"] = str(_last(run))
        later = f"; {folders[0].name} is newer, but has no checkpoint" if run != folders[0] else ""
        rank_zero_info(f"prunex: going on from {_last(run)}{later}" if training else f"prunex: reading {_last(run)}")
    else:
        config["ckpt_path"] = None
        rank_zero_info(f"prunex: {run} was stopped before its first checkpoint, so it begins again")
    return chosen


def _last(run: Path) -> Path:
    return run / "checkpoints" / LAST


def _logger(logger: Any) -> Any:
    """The options of the first logger, where it numbers its runs' folders."""
    # The first logger's folder is the run's.
    if isinstance(logger, list):
        logger = logger[0] if logger else None
    path = logger.get("class_path", "") if hasattr(logger, "get") else ""
    if str(path).rsplit(".", 1)[-1] not in LOGGERS or not logger["init_args"].get("save_dir"):
        return None
    return logger["init_args"]


class SaveConfig(SaveConfigCallback):
    """Lightning's callback, writing ``config.yaml`` whole; of a run that is ``resumed``, as its first start did."""

    def __init__(self, *args: Any, resumed: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self._resumed = resumed
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn the folder; here, because all processes come by, and asking for it is a broadcast."""
        self._folder = None if self.already_saved or trainer.log_dir is None else Path(trainer.log_dir)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning on rank zero, once."""
        if self._folder is not None:
            config = self.config.clone()
            if self._resumed:
                config["ckpt_path"] = None
                _logger(config.trainer.get("logger"))["version"] = None
            text = self.parser.dump(config, skip_none=False)
            write_whole(self._folder / self.config_filename, text.encode())
