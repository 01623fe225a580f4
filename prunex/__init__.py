"""Explainable pruning of Vision Transformers while they are fine-tuned."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "callbacks").is_dir() and str(_root) not in __path__:
    # In a checkout, callbacks/, recipes/ and configs/ lie beside this folder; an installed wheel has them inside it.
    __path__.append(str(_root))

from prunex.errors import PrunexError
from prunex.attach import Pruning, attach, attached
from prunex.explain import Explanation, explain
from prunex.registry import methods

__version__ = "0.1.0"
__all__ = ["Explanation", "Pruning", "PrunexError", "attach", "attached", "explain", "methods"]
