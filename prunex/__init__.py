"""Explainable pruning of Vision Transformers while they are fine-tuned."""

import importlib as _importlib
import sys as _sys
import typing as _typing
from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "callbacks").is_dir() and str(_root) not in __path__:
    # In a checkout, callbacks/, recipes/ and configs/ lie beside this folder; an installed wheel has them inside it.
    __path__.append(str(_root))

__version__ = "0.1.0"

from prunex.errors import PrunexError
from prunex.attach import Pruning, attach, attached
from prunex.explain import Explanation, explain
from prunex.registry import methods
from prunex.vit.cost import Cost, cost
from prunex.slim import export, load, save, slim
from prunex.vit.widths import WidthSpec

__all__ = [
    "Cost",
    "Explanation",
    "PrunexError",
    "Pruning",
    "WidthSpec",
    "attach",
    "attached",
    "cost",
    "explain",
    "export",
    "load",
    "methods",
    "save",
    "slim",
]

# Rooms with public names of their own. What needs Lightning, torchmetrics or matplotlib is imported when it is used.
_ROOMS = ("callbacks", "configs", "explainers", "metrics", "pictures", "pruners", "recipes")

if _typing.TYPE_CHECKING:
    from prunex import callbacks as callbacks, configs as configs, explainers as explainers, metrics as metrics
    from prunex import pictures as pictures, pruners as pruners, recipes as recipes
else:

    def __getattr__(name):
        if name in _ROOMS:
            return _importlib.import_module(f"prunex.{name}")
        raise AttributeError(f"module 'prunex' has no attribute {name!r}", name=name, obj=_sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__doc__", "__file__", "__path__", "__version__"])
