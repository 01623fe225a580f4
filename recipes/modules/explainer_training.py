"""What LightningModules share that train an explainer: where it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from prunex.callbacks.monitor import run_folder
from prunex.recipes.modules.backbone import Restored


class ExplainerTraining(Restored, LightningModule):
    """Trains ``self.explainer``, a module with ``save(folder)``; it goes to ``explainer/`` in the run's folder."""

    explainer: Any

    def _write(self) -> None:
        fast: Any = self.trainer
        folder = run_folder(self.trainer) / "explainer"
        if not fast.fast_dev_run:
            self._save(folder)

    @rank_zero_only
    def _save(self, folder: Path) -> None:
        self.explainer.save(folder)
        rank_zero_info(f"prunex: the explainer is in {folder}")
