"""What the monitors share: a fixed small set of validation images, files under maps/, pictures to every logger."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

import prunex
from prunex.attributes import Pair, given_normalisation
from prunex.batches import Parts, parts
from prunex.callbacks.averaging import averaged, averaging, stands_before
from prunex.callbacks.described import check_pixels, normalisation, shown_channels, warn_once
from prunex.callbacks.participant import check_strategy
from prunex.callbacks.record import record_metrics
from prunex.callbacks.step_watch import StepWatch, input_kind
from prunex.checks import check_options
from prunex.errors import PrunexError, unknown
from prunex.pictures import from_tensor, save_npz, save_png, under_grid
from prunex.registry import lookup
from prunex.untrusted import read_npz
from prunex.vit.anatomy import find, read
from prunex.vit.aside import as_found
from prunex.vit.surroundings import Call, follow, look
from prunex.vit.trace import TokenTrace

_WRITTEN: WeakKeyDictionary[Trainer, set[Path]] = WeakKeyDictionary()  # files that a trainer's monitors share


class Monitor(Callback):
    """Base of the monitors: collects images once, then calls :meth:`watch` after validation epochs on rank zero.

    Images are what enters the ViT in the steps of the first validation loader, whatever the module does to a batch
    before: the first that come, but rather of many classes than several of one where labels are known, since loaders
    are often sorted by class. Logits and classes are those of the module's forward, or of the outermost module round
    the ViT that a step calls, as :func:`prunex.explain` has them. Where a step runs the ViT several times (views,
    crops) the first time is watched, where it does not run it the batch's images are, with a warning.
    :func:`prunex.batches.parts` says which tensors of a batch are labels and object masks; what may be meant by several
    tensors is left out, with a warning, as are labels and masks that do not fit what entered the ViT.

    When the ViT's input size, channels or classes change, images are collected anew.

    Monitors of several models in one Trainer write into folders named by the models' paths, in the run folder.

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
        for name, value in (("images", images), ("every_n_epochs", every_n_epochs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PrunexError(f"{name}={value!r} is not allowed: give a whole number of at least 1")
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.model = model
        given_normalisation(mean, std)
        self.mean, self.std = mean, std
        self._parts: list[dict[str, Tensor]] = []  # of one image each where labels are known
        self._whole = False
        self._looked = False  # whether pixels of the images lie where they should
        self._step: StepWatch | None = None
        self._through: str | None = None  # path of the module by which is explained; None: the ViT alone
        self._kind: tuple[Any, ...] = ()
        self._seen = -1
        self._folder: Path | None = None
        self._run: Path | None = None
        self._several = False  # whether others watch another model

    @property
    def collected(self) -> int:
        """Images collected so far."""
        return sum(len(p["images"]) for p in self._parts)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a new set of images for a new run, and learn its folder."""
        check_strategy(trainer, self)
        self._parts = []
        self._whole = self._looked = False
        if self.mean is not None and not is_overridden("configure_model", pl_module):
            self.normalisation(trainer, pl_module)  # as many numbers as the model has channels, or refused
        self._seen = -1
        # Here, because all processes come by: asking for the folder is a broadcast, and files are written by one.
        self._run = self._folder = run_folder(trainer)
        paths = {c.model for c in trainer.callbacks if isinstance(c, Monitor) and c.model}  # type: ignore[attr-defined]
        self._several = len(paths) > 1
        if self._several and self.model:
            self._folder = self._folder / self.model

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

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look on while images are collected; from the start where the ViT takes other images than before."""
        if dataloader_idx != 0 or not trainer.is_global_zero:
            return
        kind = input_kind(self.vit(pl_module))
        if batch_idx == 0 and kind != self._kind:
            self._kind, self._parts, self._whole = kind, [], False
        if not self._whole:
            self._step = StepWatch(pl_module, self.model)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook on the module."""
        if self._step is not None:
            self._step.close()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect images in the first whole validation; the sanity check only tries a batch."""
        step, self._step = self._step, None
        if step is None:
            return
        step.close()
        part = self._part(trainer, step, parts(batch))
        if not self._looked:
            self._looked = True
            check_pixels(trainer, part["images"], *self.normalisation(trainer, pl_module))
        if trainer.sanity_checking:
            return
        first = self._parts[0] if self._parts else part
        if any(part[name].shape[1:] != first[name].shape[1:] for name in part if name in first):
            warn_once(trainer, f"{type(self).__name__} watches images of the size that came first; others are left out")
            return
        room = self.images - self.collected
        if "labels" in part:
            self._take(part)
        elif room:
            self._parts.append({k: v[:room].detach().cpu().clone() for k, v in part.items()})

    def _part(self, trainer: Trainer, step: StepWatch, found: Parts) -> dict[str, Tensor]:
        """What a step is watched by: the images that entered the ViT, what they were made from, labels and masks."""
        who, kind = type(self).__name__, type(step.vit).__name__
        outermost = step.outermost()
        if len(step.entered) == 1 and outermost is not None and len(outermost[1]) == len(step.entered[0]):
            self._through, given = outermost
            images = step.entered[0]
        elif step.entered:
            self._through, images = None, step.entered[0]
            given = images
            if len(step.entered) > 1:
                warn_once(
                    trainer,
                    f"{who}: a validation step runs the {kind} {len(step.entered)} times (views, crops): the images of "
                    "the first time are watched, and its own output",
                )
        else:
            images = given = found.need("images", who, "the validation batch")
            self._through = ""
            warn_once(
                trainer,
                f"{who}: the validation step does not run the {kind} (or is compiled, or runs a copy): the images of "
                "the batch are watched",
            )
        for name, why in found.unclear.items():
            if name != "images":
                warn_once(trainer, f"{who} leaves {name} out: {why}")
        part = {"images": images} if given is images else {"images": images, "given": given}
        if self._through and len(found.get("images", ())) == len(images):
            part["batch"] = found["images"]  # for a forward that was called as such, which no hook sees
        for name in ("labels", "masks"):
            if name not in found:
                continue
            own = found[name]
            if len(own) == len(images) and (name == "labels" or own.shape[1:] == images.shape[2:]):
                part[name] = own
            else:
                warn_once(
                    trainer, f"{who} leaves {name} {list(own.shape)} out: {list(images.shape)} entered the {kind}"
                )
        return part

    def answered(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> Call:
        """What the module made of the collected images, and the ViT by which it is explained."""
        vit = self.vit(pl_module)
        module = vit if self._through is None else pl_module.get_submodule(self._through)
        with as_found(pl_module, train=False), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call = self._by_forward(pl_module, vit, batch) if self._through else None
            if call is None:
                given = batch.get("given", batch["images"])
                call = follow(module, vit, given, type(self).__name__, named=True)
            if call.output is None and module is not vit:  # it could not be followed: what entered the ViT is known
                call = follow(vit, vit, batch["images"], type(self).__name__)
        for warning in told:
            warn_once(trainer, str(warning.message))
        return call

    def _by_forward(self, pl_module: LightningModule, vit: Any, batch: dict[str, Tensor]) -> Call | None:
        """The whole module's own call, where its forward gives the ViT what the step gave it."""
        for given in (batch[name] for name in ("batch", "given", "images") if name in batch):
            with suppress(PrunexError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = look(pl_module, vit, given, named=True)
                if call.output is not None and _same(call.entered, batch["images"]):
                    return call
        return None

    def _take(self, part: dict[str, Tensor]) -> None:
        """Take images while there is room, then in place of the last one of a class that has two more."""
        held = Counter(int(c) for p in self._parts for c in p.get("labels", ()))
        for i, label in enumerate(part["labels"].tolist()):
            if self.collected >= self.images:
                most, count = held.most_common(1)[0] if held else (label, 0)
                if count < held[label] + 2:
                    continue
                at = [j for j, p in enumerate(self._parts) if most in p.get("labels", ())]
                del self._parts[at[-1]]
                held[most] -= 1
            held[label] += 1
            self._parts.append({k: v[i : i + 1].detach().cpu().clone() for k, v in part.items()})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch, unless this is the sanity check."""
        if trainer.sanity_checking or not trainer.is_global_zero or not self._parts:
            return
        self._whole = True
        if not self._due(trainer):
            return
        self._seen = trainer.current_epoch
        keys = set.intersection(*(set(p) for p in self._parts))
        batch = {k: torch.cat([p[k] for p in self._parts]) for k in keys}
        # An average's own turn, when this epoch ends, takes its weights out of the model again.
        with averaged(trainer, pl_module, swapped=not stands_before(trainer, averaging(trainer), self)):
            self.watch(trainer, pl_module, batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics down where no CSVLogger does, for the report."""
        if trainer.is_global_zero and self._run is not None:
            record_metrics(trainer, self._run)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where there was nothing to watch."""
        if trainer.is_global_zero and not self._parts and self._seen < 0:
            rank_zero_warn(
                f"{type(self).__name__} has seen no validation batch and has written nothing: give trainer.fit "
                "validation data"
            )

    def _due(self, trainer: Trainer) -> bool:
        """Whether a multiple of ``every_n_epochs`` lies between the last watched epoch and this one, or training ends.

        Validation itself may come only every so many epochs, and several times in one.
        """
        if trainer.state.fn != "fit":
            return True
        epoch, every = trainer.current_epoch, self.every_n_epochs
        last = epoch + 1 == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step
        return last or epoch == self._seen or self._seen < 0 or epoch // every > self._seen // every

    def watch(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Tensor]) -> None:
        """Look at the model; ``batch`` holds images and, where known, labels and masks (on the CPU)."""

    def vit(self, pl_module: LightningModule) -> Any:
        """The ViT being watched."""
        return find(pl_module, self.model)[1]

    def normalisation(self, trainer: Trainer, pl_module: LightningModule) -> Pair:
        """Mean and standard deviation of the images' channels, for pixels in 0..1."""
        return normalisation(trainer, pl_module, self.vit(pl_module), self.mean, self.std)

    def common(
        self, trainer: Trainer, vit: Any, batch: dict[str, Tensor], grid: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """What both monitors write: labels, and pictures and masks as far as the patch grid lies over them."""
        height, width = read(vit).patch
        covered = (grid[0] * height, grid[1] * width)
        mean, std = self.normalisation(trainer, trainer.lightning_module)
        pictures = from_tensor(*shown_channels(batch["images"].float(), mean, std))
        found = {"images": under_grid(pictures, covered)}
        if "labels" in batch:
            found["labels"] = batch["labels"].numpy()
        if "masks" in batch:
            found["masks"] = under_grid(batch["masks"].numpy(), covered)
        return found

    def write(self, trainer: Trainer, name: str, arrays: dict[str, np.ndarray], picture: np.ndarray) -> None:
        """PNG and npz under maps/, and the picture to every logger that takes one; nothing in ``fast_dev_run``."""
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = (self._folder or run_folder(trainer)) / "maps"
        folder.mkdir(parents=True, exist_ok=True)
        when = moment(trainer)[0]
        save_png(folder / f"{name}-{when}.png", picture)
        path = folder / f"{when}.npz"
        if first_write(trainer, path):
            path.unlink(missing_ok=True)
        merge_npz(path, arrays)
        log_picture(trainer, self.key(f"prunex/{name}"), picture)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b.to(a), rtol=1e-3, atol=1e-4)


def explainers_of(methods: Any, options: Any) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The explainers that a monitor was given, and their options.

    Args:
        methods: Names; None for ``tokentm``.
        options: Options by name, by method; None for none.

    Raises:
        PrunexError: For anything else, unknown names, or options of a method that is not among them.

    >>> explainers_of(["rollout", "dino"], {"rollout": {"discard_ratio": 0.9}})
    (['rollout', 'dino'], {'rollout': {'discard_ratio': 0.9}})
    """
    if not (methods is None or isinstance(methods, list | tuple)) or methods in ([], ()):
        raise PrunexError(f"methods={methods!r} is not allowed: give a list of explainers, such as ['tokentm']")
    names = ["tokentm"] if methods is None else list(methods)
    known = {name: lookup("explainer", name).options for name in names}
    if not (options is None or isinstance(options, dict)):
        raise PrunexError(f"options={options!r} is not allowed: give options by method, as {{'rollout': {{...}}}}")
    own = {}
    for name, given in (options or {}).items():
        if name not in known:
            raise PrunexError(f"options were given for {name!r}, which is not among the methods {names}")
        own[name] = check_options(given)
        for option in own[name]:
            if option not in known[name]:
                raise unknown(f"option of {name}", option, known[name])
    return names, own


def try_explainers(vit: Any, methods: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Explain one empty image, so that what refuses a model does so before training.

    Args:
        vit: As :func:`answering` gives it.
        methods: Names.
        options: By method.

    Raises:
        PrunexError: What a method says of the model or its options.
    """
    for name in methods:
        prunex.explain(name, vit, blank(vit), **options.get(name, {}))


def blank(vit: Any) -> Tensor:
    """One empty image of a ViT's size."""
    return next(vit.parameters()).new_zeros(1, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)


def moment(trainer: Trainer) -> tuple[str, str]:
    """What files and titles of a look are called: by the epoch of training, else by what runs ("validate").

    The Trainer of a validation counts from epoch 0 as well, and may have the folder of the training.
    """
    if trainer.state.fn == TrainerFn.FITTING:
        return f"epoch={trainer.current_epoch:03d}", f"epoch {trainer.current_epoch}"
    fn = str(getattr(trainer.state.fn, "value", trainer.state.fn))
    return fn, fn


def first_write(trainer: Trainer, path: Path) -> bool:
    """Whether no monitor of this trainer has asked for this file yet: what is there is an earlier run's."""
    written = _WRITTEN.setdefault(trainer, set())
    first = path not in written
    written.add(path)
    return first


def parts_of(batch: Any) -> dict[str, Tensor]:
    """Images, labels and masks of a batch, see :func:`prunex.batches.parts`; empty without images."""
    found = parts(batch)
    return found if "images" in found else {}


def decisions(trace: TokenTrace, stages: Sequence[int]) -> list[int | None]:
    """For each of a pruner's stages the last decision in the trace by then; None while nothing was decided.

    A stage whose keep rate is 1 at present decides nothing and leaves no entry.
    """
    made = [s.block for s in trace.stages]
    return [max((i for i, block in enumerate(made) if block <= stage), default=None) for stage in stages]


def log_share(pl_module: LightningModule, name: str, value: float) -> None:
    """Log a share that rank zero found; one that has no value (no object in any image) is left out."""
    if not math.isnan(value):
        pl_module.log(name, value, rank_zero_only=True)


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder: the first logger's, where Lightning puts checkpoints too, or the trainer's root.

    Call it on all processes: it is a broadcast.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or isinstance(logger, CSVLogger | TensorBoardLogger):
        return Path(trainer.log_dir or trainer.default_root_dir)
    root, version = logger.save_dir or trainer.default_root_dir, logger.version
    named = version if isinstance(version, str) else None if version is None else f"version_{version}"
    # Their save_dir is shared by all runs.
    return Path(trainer.strategy.broadcast(str(Path(root, *(str(p) for p in (logger.name, named) if p)))))


def merge_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Add arrays to an npz file, replacing it whole."""
    found: dict[str, np.ndarray] = {}
    if path.is_file():
        found = dict(read_npz(path))
    save_npz(path, found | arrays)


def log_picture(trainer: Trainer, tag: str, picture: np.ndarray) -> None:
    """Hand one uint8 [H, W, 3] picture to every logger that takes images; files are written by the caller anyway."""
    step = trainer.global_step
    for logger in trainer.loggers:
        kinds = {c.__name__ for c in type(logger).__mro__}  # by name: none of these packages is required
        own: Any = logger
        try:
            if "TensorBoardLogger" in kinds:
                own.experiment.add_image(tag, picture, step, dataformats="HWC")
            elif "WandbLogger" in kinds:
                own.log_image(tag, images=[picture], step=step)
            elif "MLFlowLogger" in kinds:
                own.experiment.log_image(own.run_id, picture, key=tag.replace("/", "."), step=step)
            elif "CometLogger" in kinds:
                own.experiment.log_image(picture, name=tag, step=step)
        except Exception as error:  # whatever a service raises: a picture must not end a training
            rank_zero_warn(f"{type(logger).__name__} did not take the picture {tag}: {error}")
