"""Explainable pruning of Vision Transformers while they are fine-tuned."""

import importlib as _importlib
import sys as _sys
import types as _types
import typing as _typing
from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "callbacks").is_dir() and str(_root) not in __path__:
    # In a checkout, callbacks/, recipes/ and configs/ lie beside this folder; an installed wheel has them inside it.
    __path__.append(str(_root))

from prunex.clash import warn_of_other as _warn_of_other
from prunex.version import __version__ as __version__

_warn_of_other(_root)

# Where public names live. Nothing of it is imported before it is used: `prunex --help` needs no torch.
_PLACES = {
    "Cost": "vit.cost",
    "Explanation": "relevance.explanation",
    "Head": "handles.heads",
    "Maps": "maps",
    "PrunexError": "errors",
    "Pruning": "handles.tokens",
    "WidthSpec": "vit.widths",
    "attach": "attach",
    "attached": "attach",
    "correction": "units.correction",
    "cost": "vit.cost",
    "explain": "explain",
    "export": "slim",
    "find_register_neurons": "relevance.registers",
    "from_transformers": "sources",
    "load": "slim",
    "load_pretrained": "sources",
    "methods": "catalogue",
    "open_maps": "maps",
    "push_to_hub": "slim",
    "quantise": "slim",
    "save": "slim",
    "slim": "slim",
    "whole": "vit.sharded",
    "with_registers": "relevance.registers",
}

# Rooms with public names of their own.
_ROOMS = (
    "callbacks",
    "configs",
    "explainers",
    "heads",
    "metrics",
    "multimodal",
    "pictures",
    "pruners",
    "recipes",
    "targets",
)

__all__ = [*_PLACES]

if _typing.TYPE_CHECKING:
    from prunex.attach import attach as attach, attached as attached
    from prunex.handles.heads import Head as Head
    from prunex.handles.tokens import Pruning as Pruning
    from prunex.catalogue import methods as methods
    from prunex.errors import PrunexError as PrunexError
    from prunex.explain import explain as explain
    from prunex.maps import Maps as Maps, open_maps as open_maps
    from prunex.relevance.explanation import Explanation as Explanation
    from prunex.relevance.registers import find_register_neurons as find_register_neurons
    from prunex.relevance.registers import with_registers as with_registers
    from prunex.slim.export import export as export
    from prunex.sources.convert import from_transformers as from_transformers
    from prunex.sources.pretrained import load_pretrained as load_pretrained
    from prunex.slim.files import load as load, save as save
    from prunex.slim.int8 import quantise as quantise
    from prunex.slim.push import push_to_hub as push_to_hub
    from prunex.slim.slim import slim as slim
    from prunex.units.correction import correction as correction
    from prunex.vit.cost import Cost as Cost, cost as cost
    from prunex.vit.sharded import whole as whole
    from prunex.vit.widths import WidthSpec as WidthSpec
    from prunex import callbacks as callbacks, configs as configs, explainers as explainers, heads as heads
    from prunex import metrics as metrics, multimodal as multimodal
    from prunex import pictures as pictures, pruners as pruners, recipes as recipes, targets as targets
else:

    def __getattr__(name):
        if name in _ROOMS:
            return _importlib.import_module(f"prunex.{name}")
        if name not in _PLACES:
            raise AttributeError(f"module 'prunex' has no attribute {name!r}", name=name, obj=_sys.modules[__name__])
        value = getattr(_importlib.import_module(f"prunex.{_PLACES[name]}"), name)
        globals()[name] = value
        return value

    class _Package(_types.ModuleType):
        """Importing prunex/attach.py would bind that file to ``prunex.attach``, which is the function."""

        def __setattr__(self, name, value):
            if not (name in _PLACES and isinstance(value, _types.ModuleType)):
                super().__setattr__(name, value)

    _sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__doc__", "__file__", "__path__", "__version__"])
