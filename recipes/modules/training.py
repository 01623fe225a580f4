"""What LightningModules of the recipes share: where weights come from, checks, the schedule, training an explainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

import prunex
from prunex.callbacks.run_folder import only_trying, run_folder
from prunex.checks import check_number
from prunex.errors import PrunexError
from prunex.recipes.modules.backbone import check_described, create_model, load_weights
from prunex.vit.anatomy import find

NOT_DECAYED = ("pos_embed", "cls_token", "reg_token", "dist_token")


def check_classes(num_classes: int | None) -> int:
    """The number of classes; PrunexError for none."""
    if num_classes is None or num_classes < 1:
        raise PrunexError(f"num_classes={num_classes!r} is not allowed: give the number of classes, at least 1")
    return num_classes


def check_at_most(most: float, options: Mapping[str, Any], *names: str) -> None:
    """Refuse options of these names outside 0..most."""
    for name in names:
        check_number(name, options[name], 0, most)


def cosine(done: float, floor: float = 0.0) -> float:
    """The share of the peak's learning rate where so much (0..1) of the way down to ``floor`` is done."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warm_cosine(total: float, warm: float, floor: float) -> Callable[[int], float]:
    """By step, the share of the peak's learning rate: up over ``warm`` of ``total`` steps, a cosine to ``floor``."""

    def factor(step: int) -> float:
        if math.isinf(total):  # an open-ended run has no cosine
            return 1.0
        if step < warm:
            return (step + 1) / (warm + 1)
        return cosine((step - warm) / max(1.0, total - warm), floor)

    return factor


def scheduled(optimizer: torch.optim.Optimizer, factor: Any) -> OptimizerLRSchedulerConfig:
    """An optimiser whose rates are multiplied by a function of the step, or one of each group."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    # Lightning steps schedules once an epoch where nothing else is said.
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def without_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a module, but for those by which it would look for a file of weights or download them."""
    nowhere = {"weights": None, "pretrained": False}
    return {name: nowhere.get(name, value) for name, value in options.items()}


def put_on(model: nn.Module, hparams: Mapping[str, Any]) -> None:
    """Attach to a timm model what hyperparameters tell of; what is on the model already stays as it is."""
    kinds: dict[str, dict[str, bool]] = {"pruning": {}, "unit_pruning": {"units": True}, "head": {"head": True}}
    for name, kind in kinds.items():
        spec = dict(hparams.get(name) or {})
        if not spec or prunex.attached(model, **kind) is not None:  # type: ignore[call-overload]
            continue
        if "method" not in spec:
            raise PrunexError(f"{name}={spec!r} names no method: give {{'method': 'evit', 'keep_ratio': 0.7}}")
        prunex.attach(model, **spec)


def shard(module: LightningModule, model: nn.Module) -> None:
    """Under a strategy that lets modules shard themselves: cut the weights up, block by block of a timm model."""
    mesh: Any = module.device_mesh
    if mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # fully_shard makes a module one of these, and cannot be called on it again.
    if not isinstance(module, FSDPModule):
        for part in (*getattr(model, "blocks", ()), module):
            fully_shard(part, mesh=mesh["data_parallel"])


def adamw(module: LightningModule, is_head: Callable[[str], bool]) -> OptimizerLRSchedulerConfig:
    """AdamW by a module's hyperparameters, weights decayed and others not, its head's rate ``head_lr_scale`` times.

    Warm-up and cosine, stepped every batch. ``is_head`` is asked for names of parameters.
    """
    options: Mapping[str, Any] = module.hparams
    rate, decay, scale = (options[k] for k in ("learning_rate", "weight_decay", "head_lr_scale"))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # Decay would pull norms and biases to zero, which nothing pushes back.
            decayed = parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NOT_DECAYED
            groups.setdefault((decayed, is_head(name)), []).append(parameter)
    settings: list[dict[str, Any]] = []
    for (decayed, head), parameters in groups.items():
        group = {"weight_decay": decay if decayed else 0.0, "lr": rate * scale if head else rate}
        settings.append({"params": parameters, **group})
    optimizer = torch.optim.AdamW(settings, lr=rate)
    total = module.trainer.estimated_stepping_batches
    return scheduled(optimizer, warm_cosine(total, options["warmup"] * total, options["final_learning_rate"]))


class Restored:
    """Mixed into modules that build a timm model from hyperparameters: where its weights come from, and evaluation."""

    _loaded = False  # whether load_state_dict has brought weights

    def setup(self, stage: str) -> None:
        """Before anything runs: images must have the model's size."""
        self.check_size(getattr(self.trainer, "datamodule", None))  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        """Before training, and after a checkpoint was read: weights must come from somewhere."""
        self.check_start()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``val_*``, see the class."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same as ``test_*``."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Any) -> None:
        raise NotImplementedError

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Torch's; weights that come this way are a start."""
        self._loaded = True
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """A checkpoint holds its weights, so reading it back must not ask for the file or download they began from."""
        checkpoint["hyper_parameters"] = dict(checkpoint.get("hyper_parameters", {}), weights=None, pretrained=False)

    def check_start(self) -> None:
        """Refuse to train from random weights unless that was asked for: it looks like training, and learns little."""
        options: Mapping[str, Any] = self.hparams  # type: ignore[attr-defined]
        if not (self._loaded or any(options.get(name) for name in ("weights", "pretrained", "from_scratch"))):
            raise PrunexError(
                f"{options.get('architecture')} would start from random weights: give weights=FILE (--model.weights "
                "FILE, a safetensors file), pretrained=True (--model.pretrained true downloads timm's), or "
                "from_scratch=True (--model.from_scratch true) where that is meant"
            )

    def check_size(self, data: Any) -> None:
        """Refuse images of another size (``data.image_size``) than the model's; timm would at the first step."""
        size = getattr(data, "image_size", None)
        # A module may hold several ViTs, such as a teacher.
        for vit in (m for m in self.modules() if hasattr(m, "patch_embed")):  # type: ignore[attr-defined]
            embed: Any = vit.patch_embed
            side = getattr(embed, "img_size", None)
            strict = getattr(embed, "strict_img_size", True) and not getattr(vit, "dynamic_img_size", False)
            if isinstance(size, int) and side is not None and strict and tuple(side) != (size, size):
                raise PrunexError(
                    f"the data's images are {size} x {size} pixels (data.image_size), the model takes "
                    f"{side[0]} x {side[1]} (model_args.img_size): give both the same number"
                )

    @classmethod
    def check_saved(
        cls, saved: Mapping[str, Any], given: Mapping[str, Any], state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A checkpoint's hyperparameters without files, downloads and models far larger than its weights."""
        chosen = without_files(saved)
        options = {**chosen, **given}
        architecture, args = options.get("architecture"), options.get("model_args")
        if not isinstance(architecture, str) or not isinstance(args, dict | None):
            return chosen
        if ":" in architecture and "architecture" not in given:
            raise PrunexError(
                f"the checkpoint names the architecture {architecture[:100]!r}, which would be looked up elsewhere: "
                "give architecture= yourself"
            )
        # A small file could describe a model that fills the memory.
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        check_described(architecture, options.get("num_classes"), dict(args or {}), tensors)
        return chosen


class Pruned(Restored):
    """Mixed into modules whose hyperparameters tell how their ``model`` is pruned, and rebuild it so."""

    rebuilds_pruning = True  # pruning callbacks keep the hyperparameters up to date

    def configure_model(self) -> None:
        """Put on what the hyperparameters tell of; what is on the model stays as it is. Then shard, if need be."""
        module: Any = self
        # In this order: what is attached has parameters too, which are cut up with the others.
        put_on(module.model, module.hparams)
        shard(module, module.model)


class ExplainerTraining(Restored, LightningModule):
    """Trains ``self.explainer`` (a module with ``save(folder)``); the best so far goes to ``explainer/`` in the run."""

    explainer: Any
    explaining = True  # whether the explainer is what trains now
    worst: Any = math.inf
    best: Any = math.inf

    @staticmethod
    def build_classifier(
        architecture: str,
        num_classes: int | None,
        model_args: dict[str, Any] | None,
        weights: str | None,
        pretrained: bool,
    ) -> nn.Module:
        """The classifier to explain, with all of its weights."""
        check_classes(num_classes)
        classifier = create_model(architecture, num_classes, model_args, pretrained)
        find(classifier)
        lacking = load_weights(classifier, weights) if weights else []
        if lacking:
            raise PrunexError(
                f"weights={weights!r} lack {', '.join(lacking[:3])}: give those of a trained classifier of "
                f"{num_classes} classes"
            )
        return classifier

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """What ``forward`` gives."""
        return self(images_of(batch))

    def score(self) -> Any:
        """How far from good the last validation was, to be compared with ``best``; None where it cannot be said."""
        raise NotImplementedError

    def on_validation_end(self) -> None:
        """Write the explainer where it is the best so far."""
        # Neither a validation of its own nor the check before training judges.
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        score = self.score() if fitting and self.explaining else None
        if score is not None and score < self.best:
            self.best = score
            self._write()

    def on_train_end(self) -> None:
        """Write the explainer where no validation chose one."""
        # Without validation data the last explainer is all there is.
        if self.explaining and self.best == self.worst:
            self._write()

    def _write(self) -> None:
        folder = run_folder(self.trainer) / "explainer"  # of all processes: finding it may be a broadcast
        if not only_trying(self.trainer):
            self._save(folder)

    @rank_zero_only
    def _save(self, folder: Path) -> None:
        self.explainer.save(folder)
        rank_zero_info(f"prunex: the explainer is in {folder}")


def images_of(batch: Any) -> Tensor:
    """The images of a batch of them alone, or of images with labels."""
    return batch if isinstance(batch, Tensor) else batch[0]
