"""Models of transformers in training: built from a configuration, without a network, by their own loss."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from prunex.callbacks.run_folder import only_trying, run_folder
from prunex.errors import PrunexError
from prunex.recipes.modules.training import check_at_most, scheduled, warm_cosine

INSTALL = "pip install 'prunex-vit[multimodal]'"


class TransformersModel(LightningModule):
    """A model of transformers that trains by its own loss with AdamW, warm-up and cosine, and is saved beside the run.

    Batches are dicts of what the model takes, labels among them; what it does not take stays out. Afterwards
    ``model/`` in the run's folder holds it as ``save_pretrained`` writes it, for ``prunex explain`` and
    ``prunex.multimodal``.

    Args:
        model: Name of the model's class, such as ``DetrForObjectDetection``.
        config: Its configuration's values; ``backbone_config`` may be a dict with ``model_type``.
        folder: A local folder to begin with, instead of a configuration.
        processor: Name and options of what prepares images for it, saved beside it, such as
            ``{"name": "DetrImageProcessor", "do_resize": false}``.
        train_norms: Have frozen batch norms (DETR's backbone) learn; they are saved frozen.
        learning_rate: Peak learning rate.
        weight_decay: Of all weights.
        warmup: Share (0..1) of all steps over which the rate rises; a cosine takes it to a hundredth afterwards.

    Raises:
        PrunexError: Without transformers; a class or a configuration that it does not have, both or neither of
            ``config`` and ``folder``; rates outside their ranges.
    """

    def __init__(
        self,
        model: str,
        config: dict[str, Any] | None = None,
        folder: str | None = None,
        processor: dict[str, Any] | None = None,
        train_norms: bool = False,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        if (config is None) == (folder is None):
            raise PrunexError("give a config to build the model from, or a folder that it is read from, and not both")
        self.save_hyperparameters()
        check_at_most(math.inf, self.hparams, "learning_rate", "weight_decay")
        check_at_most(1.0, self.hparams, "warmup")
        self.processor = None if processor is None else _processor(dict(processor))
        self.model: Any = _built(model, config) if folder is None else _read(model, folder)
        self.model.train()  # what is read from a folder comes back as it is for answers
        self._frozen = thaw_norms(self.model) if train_norms else []
        # A name of ours would hide one of the model's.
        self._takes = set(inspect.signature(self.model.forward).parameters)

    def forward(self, batch: dict[str, Any]) -> Any:
        """What the model makes of what it takes of a batch."""
        return self.model(**{name: value for name, value in batch.items() if name in self._takes})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The model's own loss."""
        loss: Tensor = self(batch).loss
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=_size(batch))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs ``val_loss``, and ``val_accuracy`` where labels are one class a sample."""
        output, size = self(batch), _size(batch)
        self.log("val_loss", output.loss, batch_size=size, sync_dist=True)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim == 1:
            scores = output["logits"] if "logits" in output else output["question_answering_score"]
            right = (scores.argmax(1) == labels).float().mean()
            self.log("val_accuracy", right, batch_size=size, sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW; warm-up and cosine, stepped every batch."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.hparams["learning_rate"], weight_decay=self.hparams["weight_decay"])
        total = self.trainer.estimated_stepping_batches
        return scheduled(optimizer, warm_cosine(total, self.hparams["warmup"] * total, 0.01))

    def on_train_end(self) -> None:
        """Write the model beside the run."""
        folder = run_folder(self.trainer) / "model"  # of all processes: finding it may be a broadcast
        if not only_trying(self.trainer):
            self.save(folder)

    @rank_zero_only
    def save(self, folder: str | Path) -> None:
        """The model as ``save_pretrained`` writes it, with its processor; norms that learned are frozen in it."""
        with_frozen(self._frozen, lambda: self.model.save_pretrained(folder))
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        rank_zero_info(f"prunex: the model is in {folder}")


def thaw_norms(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put batch norms in the place of frozen ones: (parent, name, frozen one) each."""
    frozen = []
    for parent in model.modules():
        for name, child in parent.named_children():
            # Each family of models has a class of its own for them, by such a name.
            if type(child).__name__.endswith("FrozenBatchNorm2d"):
                frozen.append((parent, name, child))
    for parent, name, child in frozen:
        learning = nn.BatchNorm2d(len(child.weight))  # type: ignore[arg-type]
        # Frozen norms count no batches.
        learning.load_state_dict(child.state_dict(), strict=False)
        setattr(parent, name, learning)
    # What froze them froze the convolutions between them.
    model.requires_grad_(True)
    return frozen


def with_frozen(frozen: list[tuple[nn.Module, str, nn.Module]], act: Any) -> None:
    """Act on the model with the frozen norms in their places, as they would be now."""
    learning = [getattr(parent, name) for parent, name, _ in frozen]
    try:
        for (parent, name, kept), norm in zip(frozen, learning, strict=True):
            kept.load_state_dict({key: value for key, value in norm.state_dict().items() if key in kept.state_dict()})
            setattr(parent, name, kept)
        act()
    finally:
        for (parent, name, _), norm in zip(frozen, learning, strict=True):
            setattr(parent, name, norm)


def _size(batch: dict[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise PrunexError(f"TransformersModel needs transformers: {INSTALL}") from error
    return transformers


def _class(name: str, base: str) -> Any:
    library = _library()
    kind = getattr(library, name, None) if name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, getattr(library, base)):
        raise PrunexError(f"transformers {library.__version__} has no {base} called {name!r}")
    return kind


def _built(name: str, config: dict[str, Any] | None) -> Any:
    kind = _class(name, "PreTrainedModel")
    try:
        return kind(kind.config_class(**(config or {})))
    except Exception as error:  # the library stumbles over bad values in many ways
        raise PrunexError(f"cannot build {name} from config={str(config)[:200]}: {str(error)[:300]}") from error


def _read(name: str, folder: str) -> Any:
    if not Path(folder).is_dir():
        raise PrunexError(f"folder={folder!r} does not exist: give what save_pretrained wrote")
    try:
        return _class(name, "PreTrainedModel").from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except OSError as error:
        raise PrunexError(f"cannot read {name} from {folder}: {str(error)[:300]}") from error


def _processor(options: dict[str, Any]) -> Any:
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise PrunexError("processor names no class: give {'name': 'DetrImageProcessor', ...}")
    kind = getattr(_library(), name, None) if name.isidentifier() and name.endswith("Processor") else None
    if not isinstance(kind, type):
        raise PrunexError(f"transformers has no processor called {name!r}")
    return kind(**options)
