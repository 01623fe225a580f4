"""Opening the checkpoint of a pruned model without the callbacks that trained it."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule

import prunex
from prunex.callbacks.participant import CHECKPOINT_KEY, CHECKPOINT_VERSION
from prunex.errors import PrunexError


def load_from_checkpoint(
    module_class: type[LightningModule], path: str, *, map_location: Any = None, **arguments: Any
) -> LightningModule:
    """A LightningModule from a checkpoint of :class:`TokenPruning` or :class:`MaskPruning`: attach first, load second.

    ``module_class.load_from_checkpoint`` alone does not know the pruner's parameters and ends in "Unexpected key(s)".

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


def read_checkpoint(path: str, map_location: Any = None) -> Any:
    """What a checkpoint holds; nothing but tensors and plain values is unpickled.

    Raises:
        PrunexError: A file that is missing, or no checkpoint.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about files of older versions
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise PrunexError(f"there is no checkpoint at {path}") from error
    except Exception as error:
        raise PrunexError(
            f"{path} is no checkpoint that loads safely ({type(error).__name__}): give one of Lightning's, of a module "
            "that saves plain values only, as save_hyperparameters(ignore=[...]) does"
        ) from error
    return checkpoint


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
    if found.get("version", 0) > CHECKPOINT_VERSION:
        raise PrunexError(f"{path} has prunex format {found['version']}: this prunex reads up to {CHECKPOINT_VERSION}")
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
