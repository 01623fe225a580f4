"""RunReport: at the end of fit, measure dense beside pruned and write report.html."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import prunex
from prunex.callbacks.run_folder import only_trying, run_folder
from prunex.errors import PrunexError
from prunex.recipes.modules.grid_model import GridModel
from prunex.recipes.report.page import write_report
from prunex.recipes.runs import SUMMARY, compare, slim_folder, table, token_pruning, write_summary
from prunex.untrusted import read_json
from prunex.vit.anatomy import find
from prunex.vit.mount import mounted, mounted_units
from prunex.vit.tail import with_another
from prunex.vit.units import Backbone


class RunReport(Callback):
    """Compare the model with what it started from, print the table, and write ``summary.json`` and ``report.html``.

    Rows: ``dense`` (the ViT as it was before anything was attached), the trained model, and Top-K at the same keep
    ratio and stages on the untrained dense model; where the method has no keep ratio and no parameters of its own
    (ToMe), the method itself on that model instead. Put it before ``TokenPruning`` and ``MaskPruning`` in the list of
    callbacks, so that it sees the dense model. Of a segmentation or detection model rows are of the whole module, but
    for multiply-adds and parameters, which are the ViT's.

    Args:
        dense_accuracy: Evaluate the dense model too; False where its classifier starts untrained.
        untrained_topk: Show that untrained baseline; needs ``dense_accuracy``.
        beside: Run folders whose trained model is shown in this table too.
        model: Dotted path of the ViT in the module, when it holds several.
    """

    def __init__(
        self,
        dense_accuracy: bool = True,
        untrained_topk: bool = True,
        beside: list[str] | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__()
        self.dense_accuracy = dense_accuracy
        self.untrained_topk = untrained_topk
        self.beside = [_trained_row(Path(run)) for run in beside or []]
        self.model = model
        self._dense: tuple[nn.Module, ...] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep a copy of the dense model."""
        # A resumed run has its pruner attached already, and no dense model any more.
        backbone = find(pl_module, self.model, Backbone)[1]
        if stage == "fit" and not self._dense and mounted(backbone) is None and mounted_units(backbone) is None:
            self._dense = (copy.deepcopy(backbone).eval().requires_grad_(False),)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, print, write."""
        if not trainer.is_global_zero or only_trying(trainer):
            return
        run, batches = run_folder(trainer), trainer.val_dataloaders
        if batches is None:  # nothing to compare models on
            return
        vit, trained = find(pl_module, self.model, Backbone)[1], prunex.slim(pl_module, self.model)
        pruning, units = token_pruning(trained), prunex.attached(pl_module, self.model, units=True)
        methods = [handle.method for handle in (pruning, units) if handle is not None]
        name = " + ".join(methods) or "dense, trained"
        models: dict[str, nn.Module] = {}
        evaluated = {name}
        if self._dense and methods:
            dense = self._dense[0].to(next(trained.parameters()).device)
            models["dense"] = _whole(pl_module, vit, dense)
            if self.dense_accuracy:
                evaluated.add("dense")
                # How far one comes without training, at the same cost.
                baseline = _untrained(pruning) if self.untrained_topk and pruning is not None else None
                if baseline is not None:
                    plain = copy.deepcopy(dense)
                    prunex.attach(plain, **baseline)
                    models[f"{baseline['method']}, untrained"] = _whole(pl_module, vit, plain)
                    evaluated.add(f"{baseline['method']}, untrained")
        models[name] = _whole(pl_module, vit, trained)
        most = trainer.num_val_batches[0] if isinstance(trainer.num_val_batches, list) else None
        limit = most if isinstance(most, int) else None  # inf for loaders without a length
        summary = compare(models, batches[0] if isinstance(batches, list) else batches, evaluated, limit)
        # What the others are compared with stands first.
        order = {"dense": 0, name: 1}
        summary["rows"] = sorted(summary["rows"] + self.beside, key=lambda r: order.get(r["model"], 2))
        write_summary(run, summary)
        print(f"\n{table(summary['rows'])}\n({summary['machine']})\n")
        print(f"report: {write_report(run)}")
        slim = slim_folder(run)
        if slim is not None:
            print(f"slim model: {slim}")


def _whole(module: LightningModule, vit: nn.Module, other: nn.Module) -> nn.Module:
    """What is measured of another ViT: a decoder that scores it comes along, a classifier is in it already."""
    return with_another(module, vit, other) if isinstance(module, GridModel) else other


def _untrained(pruning: prunex.Pruning) -> dict[str, Any] | None:
    """What shows how far one comes without training: how it is attached, or None."""
    options = pruning.options
    if "keep_ratio" in options:
        return {"method": "topk", "keep_ratio": options["keep_ratio"], "stages": options["stages"]}
    return None if any(True for _ in pruning.pruner.parameters()) else pruning.spec


def _trained_row(run: Path) -> dict:
    path = run / SUMMARY
    try:
        rows = [r for r in read_json(path)["rows"] if isinstance(r["model"], str)]
    except (ValueError, KeyError, TypeError) as error:  # a PrunexError is a ValueError
        raise PrunexError(f"beside={str(run)!r}: no whole {SUMMARY} there; give a run folder that finished") from error
    # The first row that is neither what the run started from nor the untrained baseline.
    trained = [r for r in rows if r["model"] != "dense" and not r["model"].endswith(", untrained")]
    if not trained:
        raise PrunexError(f"beside={str(run)!r}: its {SUMMARY} names no trained model")
    return trained[0]
