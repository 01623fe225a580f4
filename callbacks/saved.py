"""What checkpoints say of how their model is pruned: written into all of them, compared whenever one is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from prunex.callbacks.layers import put_round
from prunex.errors import PrunexError
from prunex.handles.base import MARK
from prunex.handles.tokens import Pruning
from prunex.handles.units import UnitPruning
from prunex.vit.mount import TOKENS, UNITS, mounted

CHECKPOINT_KEY = "prunex"
CHECKPOINT_VERSION = 1
_HOW = "ask for the options it was written with, or open it with prunex.callbacks.load_from_checkpoint"


def say_when_saved(module: LightningModule, path: str | None) -> None:
    """Let every checkpoint of a module say how it is pruned, also one of weights only.

    Lightning asks callbacks about whole checkpoints alone, and the module about all of them. What is put on the module
    stays when a run ends, as the pruning does, since a checkpoint may still be saved; copies and pickles take it along.

    Among the weights of a checkpoint lies a key that a dense module refuses, and that names what opens the file:
    without it the weights of a method that has no parameters would load into a dense model, silently.

    Args:
        module: Its ``on_save_checkpoint`` is followed by ours.
        path: Dotted path of the ViT in the module, where one was given.
    """
    before = vars(module).get("on_save_checkpoint")
    if isinstance(before, functools.partial) and before.func is _save:
        _, known, before = before.args
        path = path if known is None else known
    module.__dict__["on_save_checkpoint"] = functools.partial(_save, module, path, before)


def _save(
    module: LightningModule, path: str | None, own: Callable[..., Any] | None, checkpoint: dict[str, Any]
) -> None:
    """Save what the module itself wants saved, then how what lies under the path is pruned."""
    if own is None:
        type(module).on_save_checkpoint(module, checkpoint)
    else:
        own(checkpoint)
    state = checkpoint.get("state_dict")
    for name, part in module.named_modules():
        if path is not None and name != path and not name.startswith(f"{path}."):
            continue
        for child, found in _told(part).items():
            checkpoint.setdefault(CHECKPOINT_KEY, {"version": CHECKPOINT_VERSION, "path": path}).update(found)
            if isinstance(state, dict):
                state[".".join(p for p in (name, child, MARK) if p)] = torch.empty(0)


def _told(part: nn.Module) -> dict[str, dict[str, Any]]:
    """By what hangs on a module, what a checkpoint says of it; nothing of a module that is no pruned ViT."""
    found: dict[str, dict[str, Any]] = {}
    if mounted(part) is not None:
        tokens = Pruning(part)
        found[TOKENS] = {"pruning": tokens.spec, "progress": tokens.progress}
    if mounted(part, UNITS) is not None:
        found[UNITS] = {"units": UnitPruning(part).spec}
    return found


def guard_loading(
    module: LightningModule,
    specs: Mapping[str, Callable[[], dict[str, Any]]],
    take_over: Callable[[Mapping[str, Any]], None] | None = None,
) -> list[Callable[[], None]]:
    """Let the module take no checkpoint that was written with other options, and say which they are.

    Args:
        module: Its ``on_load_checkpoint`` and ``load_state_dict`` get a layer each.
        specs: How the model is pruned now, by the name under which checkpoints tell it ("pruning", "units").
        take_over: Given what a checkpoint says that fits.

    Returns:
        Calls that take the layers off again.
    """
    written: dict[str, Any] = {}

    def on_load_checkpoint(beneath: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        told = checkpoint.get(CHECKPOINT_KEY)
        if isinstance(told, dict):
            check_version(told)
            for name, spec in specs.items():
                if isinstance(told.get(name), dict):
                    # What is left open here may have been found out there: counts, a calibrated choice.
                    found = differences(told[name], {k: v for k, v in spec().items() if v is not None})
                    if found:
                        raise PrunexError(f"the checkpoint was written with other options: {found}; {_HOW}")
            if take_over is not None:
                take_over(told)
        written.update(checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {})
        return beneath(checkpoint)

    def load_state_dict(beneath: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return beneath(*args, **kwargs)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            found = differences(written, dict(module.hparams)) or " ".join(lines[1:2] or lines)[:200]
            raise PrunexError(f"the checkpoint's weights do not fit this model: {found}; {_HOW}") from error

    return [
        put_round(module, "on_load_checkpoint", on_load_checkpoint),
        put_round(module, "load_state_dict", load_state_dict),
    ]


def check_version(told: Mapping[str, Any]) -> None:
    """Refuse what a later prunex wrote down in a checkpoint."""
    version = told.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= CHECKPOINT_VERSION:
        raise PrunexError(
            f"the checkpoint has prunex format {version!r}: this prunex reads up to {CHECKPOINT_VERSION}; use the "
            "prunex that wrote it, or a later one"
        )


def differences(written: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between options of a checkpoint and those of this run, in words; "" when nothing does."""
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in now.items()}
    found = [
        f"{name}={written[name]!r} (now {plain[name]!r})"
        for name in written
        if name in plain and written[name] != plain[name] and not name.startswith("_")
    ]
    return ", ".join(found)
