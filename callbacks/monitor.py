"""What the monitors share: a fixed small set of validation images, files under maps/, pictures to every logger."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

import prunex
from prunex.attributes import Pair, given_normalisation
from prunex.batches import parts
from prunex.callbacks.alone import agreed, alone
from prunex.callbacks.averaging import averaged, averaging, callbacks_of, stands_before
from prunex.callbacks.described import check_pixels, normalisation, shown_channels, warn_once
from prunex.callbacks.participant import check_strategy, options_of
from prunex.callbacks.run_folder import log_picture, moment, only_trying, record_metrics, run_folder
from prunex.callbacks.step_watch import StepWatch, input_kind, watched_part
from prunex.checks import check_whole
from prunex.errors import PrunexError
from prunex.pictures import from_tensor, save_npz, save_png, under_grid
from prunex.registry import lookup
from prunex.targets import MultiLabel, as_target, spelt
from prunex.vit.anatomy import channels_of, find, read
from prunex.vit.aside import as_found
from prunex.vit.readout import classifies
from prunex.vit.surroundings import Call, answering, follow, look


class Monitor(Callback):
    """Base of the monitors: collects images once, then calls :meth:`watch` after validation epochs on rank zero.

    Images are what enters the ViT in the steps of the first validation loader: the first that come, but rather of many
    classes than several of one where labels are known, since loaders are often sorted by class. Logits and classes are
    those of the module's forward, or of the outermost module round the ViT that a step calls. Where a step runs the ViT
    several times (views, crops) the first time is watched, where it does not run it the batch's images are, with a
    warning. What may be meant by several tensors of a batch (:func:`prunex.batches.parts`) is left out, with a warning,
    as are labels and masks that do not fit what entered the ViT.

    When the ViT's input size, channels or classes change, images are collected anew. Monitors of several models in one
    Trainer write into folders named by the models' paths, in the run folder.

    Args:
        images: How many validation images to watch.
        every_n_epochs: Watch every so many epochs.
        model: Dotted path of the ViT in the module, when it holds several.
        mean: What the images are normalised by, for pictures of them: a number, or one a channel. None: ``mean`` and
            ``std`` of the data module or the module, else what the model says.
        std: Likewise.
    """

    def __init__(
        self,
        images: int = 8,
        every_n_epochs: int = 1,
        model: str | None = None,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
    ) -> None:
        super().__init__()
        self.images = check_whole("images", images, 1)
        self.every_n_epochs = check_whole("every_n_epochs", every_n_epochs, 1)
        self.model = model
        given_normalisation(mean, std)
        self.mean, self.std = mean, std
        self._parts: list[dict[str, Tensor]] = []  # of one image each where labels are known
        self._complete = False  # whether a whole validation has been collected from
        self._looked = False  # whether pixels of the images lie where they should
        self._step: StepWatch | None = None
        self._through: str | None = None  # path of the module by which is explained; None: the ViT alone
        self._kind: tuple[Any, ...] = ()
        self._seen = -1
        self._several = False  # whether others watch another model
        self._run = self._folder = Path()  # the run's folder, and this model's in it
        self._arrays: tuple[Path, dict[str, np.ndarray]] = (Path(), {})  # the last look's, and their file

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a new set of images for a new run, and learn its folder."""
        check_strategy(trainer, self)
        self._parts, self._complete, self._looked = [], False, False
        self._seen, self._arrays = -1, (Path(), {})
        # A module that makes its ViT in configure_model has none yet.
        if self.mean is not None and not is_overridden("configure_model", pl_module):
            self.normalisation(trainer, pl_module)  # as many numbers as the model has channels, or refused
        # Here, because all processes come by: asking for the folder is a broadcast, and files are written by one.
        self._run = self._folder = run_folder(trainer)
        self._several = len({m.model for m in _monitors(trainer) if m.model}) > 1
        if self._several and self.model:
            self._folder = self._run / self.model

    def key(self, name: str) -> str:
        """What a number or a picture is logged as: with the model's path where several models are watched."""
        return f"{name}/{self.model}" if self._several and self.model else name

    @property
    def state_key(self) -> str:
        """Lets one trainer hold several, by what they watch."""
        return self._generate_state_key(images=self.images, every_n_epochs=self.every_n_epochs, model=self.model)

    def state_dict(self) -> dict[str, Any]:
        """The epoch last watched: a run that goes on watches when it would have."""
        return {"seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._seen = int(state_dict["seen"])

    @property
    def collected(self) -> int:
        """Images collected so far."""
        return sum(len(p["images"]) for p in self._parts)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look on while images are collected; from the start where the ViT takes other images than before."""
        if dataloader_idx != 0 or not trainer.is_global_zero:
            return
        # A finetuning schedule may change the image size, and images of the old one are of no use then.
        kind = input_kind(self.vit(pl_module))
        if batch_idx == 0 and kind != self._kind:
            self._kind, self._parts, self._complete = kind, [], False
        if not self._complete:
            self._step = StepWatch(pl_module, self.model)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook on the module."""
        if self._step is not None:
            self._step.close()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Collect images in the first whole validation; the sanity check only tries a batch."""
        step, self._step = self._step, None
        if step is None:
            return
        step.close()
        who = type(self).__name__
        self._through, part, complaints = watched_part(step, parts(batch), who)
        for complaint in complaints:
            warn_once(trainer, complaint)
        if not self._looked:
            self._looked = True
            check_pixels(trainer, part["images"], *self.normalisation(trainer, pl_module))
        if trainer.sanity_checking:
            return
        first = self._parts[0] if self._parts else part
        if any(part[name].shape[1:] != first[name].shape[1:] for name in part if name in first):
            warn_once(trainer, f"{who} watches images of the size that came first; others are left out")
        elif "labels" in part:
            self._take(part)
        elif self.collected < self.images:
            room = self.images - self.collected
            # Cloned: a view would keep its whole batch in memory.
            self._parts.append({name: rows[:room].detach().cpu().clone() for name, rows in part.items()})

    def _take(self, part: dict[str, Tensor]) -> None:
        """Take images while there is room, then in place of the last one of a class that has two more."""
        held = Counter(int(c) for p in self._parts for c in p.get("labels", ()))
        for i, label in enumerate(part["labels"].tolist()):
            if self.collected >= self.images:
                most, count = held.most_common(1)[0] if held else (label, 0)
                if count < held[label] + 2:
                    continue
                places = [j for j, p in enumerate(self._parts) if most in p.get("labels", ())]
                del self._parts[places[-1]]
                held[most] -= 1
            held[label] += 1
            self._parts.append({name: rows[i : i + 1].detach().cpu().clone() for name, rows in part.items()})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch, unless this is the sanity check."""
        if trainer.sanity_checking:
            return
        self._complete = self._complete or bool(self._parts)
        if not agreed(trainer, pl_module, bool(self._parts) and self._due(trainer)):
            return
        self._seen = trainer.current_epoch
        # An average's own turn, when this epoch ends, takes its weights out of the model again.
        with averaged(trainer, pl_module, swapped=not stands_before(trainer, averaging(trainer), self)):
            alone(trainer, pl_module, partial(self._watch, trainer))

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What is not known of all images, such as masks of some batches, is left out.
        batch = {}
        for name in set.intersection(*(set(part) for part in self._parts)):
            batch[name] = torch.cat([part[name] for part in self._parts])
        self.watch(trainer, pl_module, batch)

    def _due(self, trainer: Trainer) -> bool:
        """Whether a multiple of ``every_n_epochs`` lies behind the last watched epoch, or training ends."""
        if trainer.state.fn != "fit":
            return True
        # Validation itself may come only every so many epochs, and several times in one.
        epoch, every = trainer.current_epoch, self.every_n_epochs
        last = epoch + 1 == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step
        return last or epoch == self._seen or self._seen < 0 or epoch // every > self._seen // every

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics down where no CSVLogger does, for the report."""
        if trainer.is_global_zero:
            record_metrics(trainer, self._run)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where there was nothing to watch."""
        if trainer.is_global_zero and not self._parts and self._seen < 0:
            rank_zero_warn(
                f"{type(self).__name__} has seen no validation batch and has written nothing: give trainer.fit "
                "validation data"
            )

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Look at the model; ``batch`` holds images and, where known, labels and masks (on the CPU).

        The module is a whole copy on the CPU where its weights are sharded.
        """

    def vit(self, pl_module: LightningModule) -> Any:
        """The ViT being watched."""
        return find(pl_module, self.model)[1]

    def normalisation(self, trainer: Trainer, pl_module: LightningModule) -> Pair:
        """Mean and standard deviation of the images' channels, for pixels in 0..1."""
        return normalisation(trainer, pl_module, self.vit(pl_module), self.mean, self.std)

    def answered(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> Call:
        """What the module made of the collected images, and the ViT by which it is explained."""
        vit, who = self.vit(pl_module), type(self).__name__
        module = vit if self._through is None else pl_module.get_submodule(self._through)
        # By the module's whole forward, where that does what the step did; else by what the step called.
        with as_found(pl_module, train=False), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call = _by_forward(pl_module, vit, batch) if self._through else None
            if call is None:
                call = follow(module, vit, batch.get("given", batch["images"]), who, named=True)
            if call.output is None and module is not vit:  # it could not be followed: what entered the ViT is known
                call = follow(vit, vit, batch["images"], who)
        # Nothing is said of classes where neither the ViT nor what follows it has any, such as under a decoder.
        for warning in caught if classifies(call.vit) else ():
            warn_once(trainer, str(warning.message))
        return call

    def common(
        self, trainer: Trainer, vit: Any, batch: dict[str, Tensor], grid: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """What all monitors write: labels, and pictures and masks as far as the patch grid lies over them."""
        height, width = read(vit).patch
        covered = (grid[0] * height, grid[1] * width)
        mean, std = self.normalisation(trainer, trainer.lightning_module)
        pictures = from_tensor(*shown_channels(batch["images"].float(), mean, std))
        arrays = {"images": under_grid(pictures, covered)}
        if "labels" in batch:
            arrays["labels"] = batch["labels"].numpy()
        if "masks" in batch:
            arrays["masks"] = under_grid(batch["masks"].numpy(), covered)
        return arrays

    def write(
        self, trainer: Trainer, name: str, picture: np.ndarray, arrays: dict[str, np.ndarray] | None = None
    ) -> None:
        """PNG and npz under maps/, and the picture to every logger that takes one; nothing in ``fast_dev_run``."""
        if only_trying(trainer):
            return
        folder, when = self._folder / "maps", moment(trainer)[0]
        save_png(folder / f"{name}-{when}.png", picture)
        if arrays is not None:
            path = folder / f"{when}.npz"
            self._arrays = (path, arrays)
            # One file a look: what the other monitors of this model have to show of it lies there too.
            merged: dict[str, np.ndarray] = {}
            for monitor in _monitors(trainer):
                if monitor._arrays[0] == path:
                    merged |= monitor._arrays[1]
            save_npz(path, merged | arrays)
        log_picture(trainer, self.key(f"prunex/{name}"), picture)


class ExplainingMonitor(Monitor):
    """Base of the monitors that explain: names of explainers (None: ``tokentm``), their options, and what of.

    ``target`` is None for the predicted class, a class, a spelling such as "contrast:3,5" or "labels:1,4"
    (:func:`prunex.targets.parse`), an object of :mod:`prunex.targets`, or a function of the model's output.
    """

    def __init__(self, methods: Any, options: Any, *args: Any, target: Any = None) -> None:
        super().__init__(*args)
        self.target = as_target(target)
        if not (methods is None or isinstance(methods, list | tuple)) or methods in ([], ()):
            raise PrunexError(f"methods={methods!r} is not allowed: give a list of explainers, such as ['tokentm']")
        self.methods: list[str] = ["tokentm"] if methods is None else list(methods)
        known = {name: lookup("explainer", name) for name in self.methods}
        if not (options is None or isinstance(options, dict)):
            raise PrunexError(f"options={options!r} is not allowed: give options by method, as {{'rollout': {{...}}}}")
        self.options: dict[str, dict[str, Any]] = {}
        for name, given in (options or {}).items():
            if name not in known:
                raise PrunexError(f"options were given for {name!r}, which is not among the methods {self.methods}")
            self.options[name] = options_of(known[name], given)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain one empty image, so that what refuses the ViT or its options does so before training."""
        alone(trainer, pl_module, self._try)

    def _try(self, pl_module: LightningModule) -> None:
        vit = answering(pl_module, self.vit(pl_module))
        self.check_model(vit)
        size = vit.patch_embed.img_size
        image = next(vit.parameters()).new_zeros(1, channels_of(vit.patch_embed), *size)
        for _ in self.explained(vit, image):
            pass

    @property
    def state_key(self) -> str:
        """Lets one trainer hold several, by what they watch and explain."""
        asked = {} if self.target is None else {"target": spelt(self.target)}
        return self._generate_state_key(
            images=self.images, every_n_epochs=self.every_n_epochs, model=self.model, **asked
        )

    def explained(self, vit: Any, images: Tensor) -> Iterator[tuple[str, str, prunex.Explanation]]:
        """Each method, what its maps go by, and these: by the method alone for the predicted class, else of what, too.

        Of several labels there is one a label, unless the method knows no class.
        """
        for name in self.methods:
            options = self.options.get(name, {})
            if not isinstance(self.target, MultiLabel):
                words = "" if self.target is None else f":{spelt(self.target)}"
                e = prunex.explain(name, vit, images, self.target, **options)
                yield name, name + words if e.class_specific else name, e
                continue
            explanations = prunex.explain(name, vit, images, self.target, **options)
            for label, e in zip(self.target.which, explanations, strict=True):
                if not e.class_specific:
                    yield name, name, e
                    break
                yield name, f"{name}:{label}", e

    def check_model(self, vit: Any) -> None:
        """Refuse a ViT, as the module answers through it, of which nothing can be said."""


def _monitors(trainer: Trainer) -> list[Monitor]:
    return [c for c in callbacks_of(trainer) if isinstance(c, Monitor)]


def _by_forward(pl_module: LightningModule, vit: Any, batch: dict[str, Tensor]) -> Call | None:
    """The module's own call, where its forward gives the ViT what the step gave it."""
    images = batch["images"]
    for name in ("batch", "given", "images"):
        if name not in batch:
            continue
        with suppress(PrunexError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = look(pl_module, vit, batch[name], named=True)
            entered = call.entered
            same = entered.shape == images.shape and torch.allclose(entered, images.to(entered), rtol=1e-3, atol=1e-4)
            if call.output is not None and same:
                return call
    return None


def log_share(pl_module: LightningModule, name: str, value: float) -> None:
    """Log a share that rank zero computed; one that has no value (no object in any image) is left out."""
    if not math.isnan(value):
        pl_module.log(name, value, rank_zero_only=True)
