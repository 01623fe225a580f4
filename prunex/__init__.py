"""Explainable pruning of Vision Transformers while they are fine-tuned."""

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
