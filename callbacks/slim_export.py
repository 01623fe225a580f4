"""SlimExport: write the smaller model at the end of training, or whenever a metric improves."""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

import prunex
from prunex.attributes import given_normalisation
from prunex.batches import parts
from prunex.callbacks.alone import agreed, alone
from prunex.callbacks.averaging import averaged, callbacks_of, check_swa_order
from prunex.callbacks.described import check_pixels, names_of, normalisation, said_normalisation
from prunex.callbacks.participant import Participant, check_strategy
from prunex.callbacks.run_folder import only_trying, record_metrics, record_slim, run_folder
from prunex.checks import check_choice
from prunex.errors import PrunexError, unknown
from prunex.formats import FORMATS, check_format
from prunex.pruners.budget import in_words
from prunex.slim.files import CONFIG, check_savable
from prunex.vit.anatomy import find, head_classes
from prunex.vit.sharded import is_sharded


class SlimExport(Callback):
    """Write ``<folder>/slim`` (safetensors, config.json, card) and its exported graphs.

    ``prunex.load("<folder>/slim")`` gives the module back; ``model.pt2`` and ``model.onnx`` in it take any batch.

    Args:
        folder: Where ``slim/`` goes; None: the run's own folder.
        monitor: A logged metric; the model is written at each improvement. None: once, at the end of fit.
        mode: Whether more or less of the metric is better.
        formats: Graphs made once, at the end of fit: names of :data:`prunex.formats.FORMATS`. None makes "pt2" and
            "onnx", and leaves ONNX out with a warning where the extra ``prunex-vit[onnx]`` is not installed.
        model: Dotted path of the ViT in the module, when it holds several.
        mean: What the slim model's images are normalised by: a number, or one a channel. None: ``mean`` and ``std`` of
            the data module or the module, else what the model says.
        std: Likewise.

    Raises:
        PrunexError: For an unknown mode or format, or numbers that are no normalisation, at once; before training, for
            a model that plain values do not describe (a head of several layers, layers of somebody's own that are not
            linear) or a format that was named and is not installed; at the end, for a metric that is never logged, or a
            model that no training step ran.
    """

    def __init__(
        self,
        folder: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        formats: list[str] | None = None,
        model: str | None = None,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("min", "max"))
        for name in [formats] if isinstance(formats, str) else formats or ():
            if name not in FORMATS or isinstance(formats, str):
                raise unknown("format", name, FORMATS)
        self.folder = None if folder is None else Path(folder)
        self.monitor, self.mode, self.formats, self.model = monitor, mode, formats, model
        given_normalisation(mean, std)
        self.mean, self.std = mean, std
        self._looked = False  # whether pixels of the images lie where they should
        self.best: float | None = None
        self._run = Path()

    @property
    def state_key(self) -> str:
        """Lets one trainer hold several, by what they watch."""
        more = {} if self.model is None else {"model": self.model}
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, **more)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best = state_dict["best"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn the run's folder; here, because all processes come by, and asking for it is a broadcast."""
        check_strategy(trainer, self)
        self._looked = False
        if self.mean is not None and not is_overridden("configure_model", pl_module):
            normalisation(trainer, pl_module, find(pl_module, self.model)[1], self.mean, self.std)
        if stage == "fit":
            check_swa_order(trainer, self)
            for name in self.formats or ():
                check_format(name)
        self._run = run_folder(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that could not be written when training has ended; its own setup has had its say by now."""
        vit = find(pl_module, self.model)[1]
        if is_sharded(vit):
            alone(trainer, vit, check_savable)
        else:  # every process looks for itself, and raises
            check_savable(vit)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the first batch: whether the slim model will say what its images are normalised by."""
        if self._looked or not trainer.is_global_zero:
            return
        self._looked = True
        vit, images = find(pl_module, self.model)[1], parts(batch).get("images")
        # Not at the end of training, when somebody would have to train again.
        pair = normalisation(trainer, pl_module, vit, self.mean, self.std)
        if images is not None and images.shape[1] == len(pair[0]):
            check_pixels(trainer, images, *pair)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model if the metric improved."""
        self._save_if_improved(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for metrics of training, which are whole only now; without a CSVLogger they are written down."""
        self._save_if_improved(trainer, pl_module)
        if trainer.is_global_zero:
            record_metrics(trainer, self._run)

    def _save_if_improved(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit" or only_trying(trainer):
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            return
        sign = 1 if self.mode == "max" else -1
        better = not math.isnan(value) and (self.best is None or sign * float(value) > sign * self.best)
        if agreed(trainer, pl_module, better and self._in_vain(trainer, pl_module) is None):  # else its turn may come
            self.best = float(value)
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        alone(trainer, find(pl_module, self.model)[1], partial(self._save, trainer, pl_module))

    def _save(self, trainer: Trainer, pl_module: LightningModule, vit: Any) -> None:
        mean, std = said_normalisation(trainer, pl_module, vit, self.mean, self.std) or (None, None)
        labels = names_of(trainer, pl_module, head_classes(vit))
        # What is exported is what was validated.
        with averaged(trainer, pl_module):
            slim = prunex.slim(vit)
        prunex.save(slim, self.path(trainer), labels=labels, mean=mean, std=std)

    def path(self, trainer: Trainer) -> Path:
        """The slim folder."""
        return (self.folder or self._run) / "slim"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model, unless a better one is there, and the graphs."""
        if only_trying(trainer):
            return
        pruner = self._in_vain(trainer, pl_module)
        if pruner is not None:
            raise PrunexError(
                f"no training step ran the model that {type(pruner).__name__} prunes, so there is no slim model to "
                "write: call that model in training_step"
            )
        if self.monitor is not None and self.best is None:
            known = ", ".join(sorted(map(str, trainer.callback_metrics))) or "none"
            raise PrunexError(f"SlimExport(monitor={self.monitor!r}): no such metric was logged; there are: {known}")
        # With a metric the best model is written already, maybe of an earlier epoch.
        if self.monitor is None:
            self._write(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        folder = self.path(trainer)
        if self.monitor is None:
            self._check_schedule(pl_module)
        elif not (folder / CONFIG).is_file():
            rank_zero_warn(
                f"no slim model was written to {folder}: {self.monitor} did not improve on {self.best:g}, the best of "
                "the run that was resumed; its own slim folder holds that model"
            )
            return
        record_slim(self._run, folder)
        self._export(folder)

    def _in_vain(self, trainer: Trainer, pl_module: LightningModule) -> Participant | None:
        """A callback that prunes the model, where no training step has run it so far."""
        vit = find(pl_module, self.model)[1]
        for callback in callbacks_of(trainer):
            if isinstance(callback, Participant) and callback.pruning.model is vit and callback.runs.in_vain:
                return callback
        return None

    def _check_schedule(self, pl_module: LightningModule) -> None:
        """Say so where training ended before a schedule had shrunk the rates to what was asked for."""
        pruning = prunex.attached(pl_module, self.model)
        if pruning is not None and pruning.progress < 1:
            spent, wanted, dense = prunex.cost(pruning.model).macs, pruning.macs(), pruning.dense_macs()
            if spent > 1.01 * wanted:
                rank_zero_warn(
                    f"training ended while the schedule of {pruning.method} was still shrinking its rates: the slim "
                    f"model costs {in_words(spent, dense)}, not the {in_words(wanted, dense)} asked for"
                )

    def _export(self, folder: Path) -> None:
        # From the file and not from memory: what is exported is what a user will load.
        small = prunex.load(folder)
        for name in ("pt2", "onnx") if self.formats is None else self.formats:
            if self.formats is None and any(find_spec(module) is None for module in FORMATS[name].needs):
                rank_zero_warn("no ONNX graph was written: pip install 'prunex-vit[onnx]' for one")
                continue
            path, began = folder / FORMATS[name].file(name), perf_counter()
            rank_zero_info(f"prunex: writing {path} and checking it against the model ...")
            prunex.export(small, path, format=name)
            rank_zero_info(f"prunex: {path.name} took {perf_counter() - began:.1f} s")
        cfg: Any = getattr(small, "pretrained_cfg", None) or {}
        rank_zero_info(
            f"prunex: the slim model is in {folder}; its images are normalised by mean {cfg.get('mean')} and std "
            f"{cfg.get('std')}"
        )
