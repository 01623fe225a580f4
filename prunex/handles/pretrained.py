"""Pruned ViTs in transformers' wrapper of timm models: what ``save_pretrained`` writes says how they are pruned.

The wrapper builds its timm model by name, and would give a dense one back without a word. So its configuration is told
what hangs on the ViT while it saves, and the weights have a key more, which ``from_pretrained`` reports as unexpected
and which names the way in.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from prunex.handles.base import handle_on
from prunex.handles.heads import Head
from prunex.handles.tokens import Pruning
from prunex.handles.units import UnitPruning

MARK = "open_with.prunex.load_pretrained"
ENTRY = "prunex"  # of the configuration
PLACE = "timm_model"  # where the wrapper holds its ViT


def tell_on_save(root: nn.Module, vit: nn.Module) -> None:
    """Let the wrapper in a module that holds this ViT, if one does, say on ``save_pretrained`` how it is pruned."""
    for module in root.modules():
        wraps = getattr(module, PLACE, None) is vit and hasattr(type(module), "save_pretrained")
        if wraps and "save_pretrained" not in vars(module):
            module.__dict__["save_pretrained"] = functools.partial(_save, module)


def entries(vit: Any) -> dict[str, Any]:
    """What hangs on a ViT, in plain values; empty for a dense one."""
    said: dict[str, Any] = {}
    units, pruning, head = handle_on(UnitPruning, vit), handle_on(Pruning, vit), handle_on(Head, vit)
    if units is not None:
        said["units"] = units.spec
    if pruning is not None:
        said |= {"pruning": pruning.spec, "progress": pruning.progress}
    if head is not None:
        said["head"] = head.spec
    return said


def _save(wrapper: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    said = entries(getattr(wrapper, PLACE))
    save = type(wrapper).save_pretrained
    if not said:
        return save(wrapper, save_directory, *args, **kwargs)
    # Where transformers has these two, behind the folder: they may come without their names.
    bound = dict(zip(("is_main_process", "state_dict"), args, strict=False)) | kwargs
    state = bound.get("state_dict")
    bound["state_dict"] = {**(wrapper.state_dict() if state is None else state), MARK: torch.zeros(1)}
    # Only while it saves: what hangs on the ViT may be another thing next time.
    setattr(wrapper.config, ENTRY, {"version": 1, **said})
    try:
        return save(wrapper, save_directory, **bound)
    finally:
        delattr(wrapper.config, ENTRY)
