"""What checkpoints say of how their model is pruned: written into all, compared when read, opened without callbacks."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

import prunex
from prunex.callbacks.layers import put_round
from prunex.errors import PrunexError
from prunex.files import write_whole
from prunex.handles.base import MARK
from prunex.handles.heads import Head
from prunex.handles.tokens import Pruning
from prunex.handles.units import UnitPruning
from prunex.vit.mount import HEAD, TOKENS, UNITS, mounted, mounted_head, mounted_units

LAST = "last.ckpt"
CHECKPOINT_KEY = "prunex"
CHECKPOINT_VERSION = 1
_HOW = "ask for the options it was written with, or open it with prunex.callbacks.load_from_checkpoint"


def say_when_saved(module: LightningModule, path: str | None) -> None:
    """Let every checkpoint of a module say how the ViT at ``path`` is pruned, also one of weights only.

    Among its weights lies a key that a dense module refuses, and that names what opens the file: without it the weights
    of a method that has no parameters would load into a dense model, silently.
    """
    # On the module: of checkpoints of weights only Lightning asks no callback. It stays, as the pruning does.
    # A second callback, or a second fit, finds ours there already and does not wrap it again.
    before = vars(module).get("on_save_checkpoint")
    if isinstance(before, functools.partial) and before.func is _save:
        _, saved_path, before = before.args
        path = path if saved_path is None else saved_path
    module.__dict__["on_save_checkpoint"] = functools.partial(_save, module, path, before)


def _save(
    module: LightningModule, path: str | None, before: Callable[..., Any] | None, checkpoint: dict[str, Any]
) -> None:
    """Save what the module itself wants saved, then how what lies under the path is pruned."""
    if before is None:
        type(module).on_save_checkpoint(module, checkpoint)
    else:
        before(checkpoint)
    weights = checkpoint.get("state_dict")
    for name, part in module.named_modules():
        if path is not None and name != path and not name.startswith(f"{path}."):
            continue
        for child, entry in _entries(part).items():
            # torch.compile's wrapper hands its module's attributes on, and holds nothing itself.
            if child not in dict(part.named_children()):
                continue
            checkpoint.setdefault(CHECKPOINT_KEY, {"version": CHECKPOINT_VERSION, "path": path}).update(entry)
            if isinstance(weights, dict):
                weights[".".join(p for p in (name, child, MARK) if p)] = torch.empty(0)


def _entries(part: nn.Module) -> dict[str, dict[str, Any]]:
    """By what hangs on a module, what a checkpoint says of it; nothing of a module that is no pruned ViT."""
    entries: dict[str, dict[str, Any]] = {}
    if mounted(part) is not None:
        tokens = Pruning(part)
        entries[TOKENS] = {"pruning": tokens.spec, "progress": tokens.progress}
    if mounted_units(part) is not None:
        entries[UNITS] = {"units": UnitPruning(part).spec}
    if mounted_head(part) is not None:
        entries[HEAD] = {"head": Head(part).spec}
    return entries


def guard_loading(
    module: LightningModule,
    specs: Mapping[str, Callable[[], dict[str, Any]]],
    take_over: Callable[[Mapping[str, Any]], None] | None = None,
) -> list[Callable[[], None]]:
    """Let the module take no checkpoint that was written with other options, until the returned calls undo that.

    ``specs`` tell how the model is pruned now, by checkpoints' names for it; ``take_over`` is given what one says.
    """
    hparams: dict[str, Any] = {}

    def on_load_checkpoint(beneath: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        entry = checkpoint.get(CHECKPOINT_KEY)
        if isinstance(entry, dict):
            check_version(entry)
            for name in specs:
                if isinstance(entry.get(name), dict):
                    # What is left open here may have been decided out there: counts, a calibrated choice.
                    decided = {option: value for option, value in specs[name]().items() if value is not None}
                    other = differences(entry[name], decided)
                    if other:
                        raise PrunexError(f"the checkpoint was written with other options: {other}; {_HOW}")
            if take_over is not None:
                take_over(entry)
        # For load_state_dict, which comes later and is told of the weights alone.
        hparams.update(checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {})
        return beneath(checkpoint)

    def load_state_dict(beneath: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return beneath(*args, **kwargs)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            # torch's first line names the class, the second what is wrong with it.
            why = differences(hparams, dict(module.hparams)) or " ".join(lines[1:2] or lines)[:200]
            raise PrunexError(f"the checkpoint's weights do not fit this model: {why}; {_HOW}") from error

    layers = {"on_load_checkpoint": on_load_checkpoint, "load_state_dict": load_state_dict}
    return [put_round(module, name, layer) for name, layer in layers.items()]


def check_version(entry: Mapping[str, Any]) -> None:
    """Refuse what a later prunex wrote down in a checkpoint."""
    version = entry.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= CHECKPOINT_VERSION:
        raise PrunexError(
            f"the checkpoint has prunex format {version!r}: this prunex reads up to {CHECKPOINT_VERSION}; use the "
            "prunex that wrote it, or a later one"
        )


def differences(written: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between options of a checkpoint and those of this run, in words; "" when nothing does."""
    words = []
    for name, value in written.items():
        # Checkpoints hold plain values, in which a tuple is a list.
        present = list(now[name]) if isinstance(now.get(name), tuple) else now.get(name)
        if name in now and value != present and not name.startswith("_"):
            words.append(f"{name}={value!r} (now {present!r})")
    return ", ".join(words)


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
    """A checkpoint's plain values; a file that is missing, damaged or holds more than these is refused."""
    if Path(path).is_dir():
        raise PrunexError(
            f"{path} holds the parts that processes wrote (save_distributed_checkpoint=True): make one file of them "
            f"with python -m lightning.fabric.utilities.consolidate_checkpoint {path}"
        )
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
    if not isinstance(checkpoint, dict):
        raise PrunexError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}; give one of Lightning's")
    return checkpoint


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
    if pruning_entry(checkpoint) is None:
        raise PrunexError(
            f"{path} was trained with none of TokenPruning, MaskPruning and ExplainableHead: use "
            f"{module_class.__name__}.load_from_checkpoint"
        )
    return restore(module_class, checkpoint, path, **arguments)


def pruning_entry(checkpoint: Any) -> dict[str, Any] | None:
    """What prunex's callbacks wrote into a checkpoint of how its model is pruned, or explains itself, or None."""
    entry = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    return entry if isinstance(entry, dict) and {"pruning", "units", "head"} & set(entry) else None


def restore(module_class: type[LightningModule], checkpoint: Any, path: str, **arguments: Any) -> LightningModule:
    """The module of a checkpoint that was read, pruned where that was; only ``module_class`` is ever built."""
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
    entry = pruning_entry(checkpoint)
    if entry is not None:
        check_version(entry)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise PrunexError(f"{path} is no checkpoint of Lightning's: it has no state_dict")
    module = module_class(**_arguments(module_class, checkpoint, arguments))
    module.configure_model()
    # Units first: tokens may be ranked by the attention of heads that are left.
    for name in ("units", "pruning", "head"):
        spec, vit, kind = (entry or {}).get(name), (entry or {}).get("path"), {name: True} if name != "pruning" else {}
        if spec and prunex.attached(module, vit, **kind) is None:  # type: ignore[call-overload]
            prunex.attach(module, path=vit, **spec)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    if entry is not None and entry.get("pruning"):
        pruning: Any = prunex.attached(module, entry["path"])
        pruning.progress = entry.get("progress", 1.0)
    return module.eval()


def _arguments(module_class: type, checkpoint: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments from saved hyperparameters, as Lightning's own loader chooses them."""
    parameters = inspect.signature(module_class).parameters
    saved = dict(checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    holder = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_NAME)
    if holder in parameters and holder != "kwargs":  # save_hyperparameters(hparams): one argument holds them all
        saved = {holder: saved}
    # What starts with _ names classes to import and build: never what a file says.
    saved = {k: v for k, v in saved.items() if isinstance(k, str) and not k.startswith("_")}
    check = getattr(module_class, "check_saved", None)
    if check is not None:  # prunex's own modules look for no files and no network on a file's word
        saved = check(saved, given, checkpoint["state_dict"])
    chosen = {**saved, **given}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return chosen
    return {k: v for k, v in chosen.items() if k in parameters or k in given}
