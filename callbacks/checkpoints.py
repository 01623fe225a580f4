"""Opening the checkpoint of a pruned model without the callbacks that trained it."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO

import prunex
from prunex.callbacks.saved import CHECKPOINT_KEY, check_version
from prunex.errors import PrunexError
from prunex.files import write_whole

LAST = "last.ckpt"


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that run no code when they are read, and are never half-written: for ``Trainer(plugins=[...])``.

    Files are read with ``weights_only=True`` unless ``weights_only=False`` is asked for in so many words, and written
    beside their place and moved there. Addresses (``s3://...``) are written as Lightning writes them, and not read.

    Raises:
        PrunexError: For a file that is missing, damaged or holds more than plain values, or cannot be written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it whole, or leave what was there."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_whole(Path(path), lambda draft: torch.save(checkpoint, draft))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as its own error
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise PrunexError(
                f"cannot write {path}: {reason}; the checkpoint before it is whole: make room, then go on from there"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read plain values and tensors, onto the CPU where no other place is named."""
        if weights_only is False:
            return dict(super().load_checkpoint(path, map_location, False))
        if "://" in str(path):
            raise PrunexError(
                f"{path} is an address, and what is downloaded could run code: download it, give the file"
            )
        return read_checkpoint(path, map_location)


def read_checkpoint(path: Any, map_location: Any = None) -> dict[str, Any]:
    """A checkpoint's plain values.

    Raises:
        PrunexError: For a file that is missing, damaged, no checkpoint, or holds more than plain values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about files of older versions
            found = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise PrunexError(f"there is no checkpoint at {path}") from error
    except Exception as error:
        raise PrunexError(
            f"{path} is no checkpoint that loads safely ({type(error).__name__}): give one of Lightning's, of a module "
            "that saves plain values only, as save_hyperparameters(ignore=[...]) does"
        ) from error
    if not isinstance(found, dict):
        raise PrunexError(f"{path} is no checkpoint: it holds a {type(found).__name__}; give one of Lightning's")
    return found


def load_from_checkpoint(
    module_class: type[LightningModule], path: str, *, map_location: Any = None, **arguments: Any
) -> LightningModule:
    """A LightningModule from a checkpoint of :class:`TokenPruning` or :class:`MaskPruning`: attach first, load second.

    Checkpoints of weights only will do. ``module_class.load_from_checkpoint`` alone builds a dense model, and ends in
    "Unexpected key(s)" with the name of this function; with ``strict=False`` it loads the dense weights.

    Args:
        module_class: The user's own class.
        path: The checkpoint.
        map_location: As for ``torch.load``.
        **arguments: For the class's constructor, over the saved hyperparameters.

    Returns:
        The module with its pruned model, weights loaded, in eval mode.

    Raises:
        PrunexError: A file that is missing, no checkpoint, or holds no word of prunex.
    """
    checkpoint = read_checkpoint(path, map_location)
    if told(checkpoint) is None:
        raise PrunexError(
            f"{path} was trained with neither TokenPruning nor MaskPruning: use "
            f"{module_class.__name__}.load_from_checkpoint"
        )
    return restore(module_class, checkpoint, path, **arguments)


def told(checkpoint: Any) -> dict[str, Any] | None:
    """What TokenPruning and MaskPruning wrote into a checkpoint; None where neither did."""
    found = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    return found if isinstance(found, dict) and ("pruning" in found or "units" in found) else None


def restore(module_class: type[LightningModule], checkpoint: Any, path: str, **arguments: Any) -> LightningModule:
    """The module of a checkpoint that was read, pruned where that was; only ``module_class`` is ever built.

    Raises:
        PrunexError: A checkpoint of a later version, or one that does not fit the class.
    """
    try:
        return _restored(module_class, checkpoint, path, arguments)
    except PrunexError:
        raise
    except Exception as error:  # a constructor's, attach's or load_state_dict's, about whatever the file says
        reason = " ".join(str(error).split())[:300]
        raise PrunexError(
            f"{path} does not fit {module_class.__name__} ({type(error).__name__}: {reason}): give a checkpoint of it"
        ) from error


def _restored(
    module_class: type[LightningModule], checkpoint: Any, path: str, arguments: dict[str, Any]
) -> LightningModule:
    found = told(checkpoint) or {}
    if found:
        check_version(found)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise PrunexError(f"{path} is no checkpoint of Lightning's: it has no state_dict")
    module = module_class(**_arguments(module_class, checkpoint, arguments))
    module.configure_model()
    if found.get("units") and prunex.attached(module, found["path"], units=True) is None:
        prunex.attach(module, path=found["path"], **found["units"])
    pruning: Any = None
    if found.get("pruning"):
        where = found["path"]
        pruning = prunex.attached(module, where) or prunex.attach(module, path=where, **found["pruning"])
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    if pruning is not None:
        pruning.progress = found.get("progress", 1.0)
    return module.eval()


def _arguments(module_class: type, checkpoint: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments from saved hyperparameters, as Lightning's own loader chooses them."""
    parameters = inspect.signature(module_class).parameters
    saved = dict(checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    whole = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_NAME)
    if whole in parameters and whole != "kwargs":  # save_hyperparameters(hparams): one argument holds them all
        saved = {whole: saved}
    # What starts with _ names classes to import and build: never what a file says.
    saved = {k: v for k, v in saved.items() if isinstance(k, str) and not k.startswith("_")}
    check = getattr(module_class, "check_saved", None)
    if check is not None:  # prunex's own modules look for no files and no network on a file's word
        saved = check(saved, given, checkpoint["state_dict"])
    chosen = {**saved, **given}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return chosen
    return {k: v for k, v in chosen.items() if k in parameters or k in given}
