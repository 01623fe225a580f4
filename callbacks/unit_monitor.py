"""UnitMonitor: an epoch's table and pictures of which heads serve which class, and of what each block keeps."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

import prunex
from prunex.callbacks.described import names_of
from prunex.callbacks.monitor import Monitor
from prunex.callbacks.run_folder import add_rows, moment, only_trying
from prunex.checks import check_whole
from prunex.explainers.head_maps import head_maps
from prunex.handles.units import UnitPruning
from prunex.pictures import head_attention, save_png, unit_widths
from prunex.units.xpruner import UnitRelevance
from prunex.vit.anatomy import find
from prunex.vit.units import Backbone

COLUMNS = ("epoch", "class", "block", "head", "relevance", "kept", "updates")


class UnitMonitor(Monitor):
    """Write, after every validation epoch, what :class:`MaskPruning` has found out about heads and MLP channels.

    - ``units.csv`` in the run folder: a row an epoch, class and head, see :meth:`UnitRelevance.rows`, with the images
      seen of each class beside the relevance: a row of a class that was seldom seen says little.
    - ``maps/units-widths.png``: heads and channels that each block keeps.
    - ``maps/units-classes-epoch=NNN.png``: which heads matter for which class more than for the mean class.
    - ``maps/units-heads-epoch=NNN.png``: where the heads look that matter most for the watched images' classes (not for
      windowed attention, which has no class token's row).

    Criteria without a class axis give the first picture alone.

    Args:
        images: As all monitors', see :class:`~prunex.callbacks.monitor.Monitor`; so are those left out here.
        heads: How many of a class's heads to draw.

    Raises:
        PrunexError: For numbers below 1; in training for a model whose units nobody prunes.
    """

    def __init__(
        self,
        images: int = 4,
        heads: int = 3,
        every_n_epochs: int = 1,
        model: str | None = None,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
    ) -> None:
        super().__init__(images, every_n_epochs, model, mean, std)
        self.heads = check_whole("heads", heads, 1)

    def vit(self, pl_module: LightningModule) -> Any:
        """The backbone being watched."""
        return find(pl_module, self.model, Backbone)[1]

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Write the table, draw the pictures."""
        pruning = prunex.attached(pl_module, self.model, units=True)
        if pruning is None:
            raise prunex.PrunexError("UnitMonitor watches what MaskPruning does: add MaskPruning to the callbacks")
        if only_trying(trainer):
            return
        save_png(self._folder / "maps" / "units-widths.png", _widths(pruning))
        # Criteria without a class axis have nothing more to show.
        if not hasattr(pruning.pruner, "relevance"):
            return
        table = pruning.relevance_table()
        if trainer.state.fn == TrainerFn.FITTING:
            epoch = trainer.current_epoch
            values = itemgetter(*COLUMNS[1:])
            rows = [[epoch, *values(row)] for row in table.rows()]
            add_rows(self._folder / "units.csv", COLUMNS, epoch, rows)
        count = len(table.updates)
        names = names_of(trainer, pl_module, count) or [str(c) for c in range(count)]
        title = f"{moment(trainer)[1]}: heads that matter more for a class than on average"
        self.write(trainer, "units-classes", np.asarray(table.show(names, title)))
        vit = self.vit(pl_module)
        if "labels" in batch and not isinstance(vit, SwinTransformer):
            picture = self._look(trainer, vit, batch, table, names)
            if picture is not None:
                self.write(trainer, "units-heads", picture)

    def _look(
        self, trainer: Trainer, vit: Any, batch: dict[str, Tensor], table: UnitRelevance, names: list[str]
    ) -> np.ndarray | None:
        """Where the heads of each image's class look."""
        chosen = [table.top_heads(int(label), self.heads) for label in batch["labels"]]
        count = min(map(len, chosen))
        if count == 0:
            return None
        labels = [names[int(label)] for label in batch["labels"]]
        # Each pair of block and head is run once, however many images' classes it serves.
        pairs = sorted({(block, head) for heads in chosen for block, head, _ in heads})
        maps = head_maps(vit, batch["images"], pairs).float().cpu().numpy()  # [B, pairs, gh, gw]
        shown, titles = [], []
        for image, heads in enumerate(chosen):
            shown.append([maps[image, pairs.index((block, head))] for block, head, _ in heads[:count]])
            titles.append([f"{labels[image]}: head {block}.{head}" for block, head, _ in heads[:count]])
        pictures = self.common(trainer, vit, batch, (maps.shape[2], maps.shape[3]))["images"]
        title = f"{moment(trainer)[1]}: heads that matter most for the class"
        return np.asarray(head_attention(pictures, np.asarray(shown), titles, names=labels, title=title))


def _widths(pruning: UnitPruning) -> np.ndarray:
    """What each block keeps of its units, as the gates are now."""
    pruner = pruning.pruner
    closed = pruner.closed()
    blocks = 1 + max(b.block for b in pruner.branches)
    dense, kept = np.zeros((blocks, 2), int), np.zeros((blocks, 2), int)
    for b in pruner.branches:
        column = 0 if b.kind == "heads" else 1
        dense[b.block, column] = b.units
        left = int(pruner.open(b.key).sum()) if pruning.decided else b.units - closed.get(b.key, 0)
        kept[b.block, column] = left
    return np.asarray(unit_widths(dense, kept, title=f"{pruning.method}: what each block keeps"))
