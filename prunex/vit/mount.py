"""What hangs on a model: the one place that knows under which names."""

from __future__ import annotations

from typing import Any

# Submodules of the backbone: its token pruner, the gates of its units, and the head that explains itself.
TOKENS, UNITS, HEAD = "prunex", "prunex_units", "prunex_head"
PLACES = (TOKENS, UNITS, HEAD)


def mounted(model: Any, kind: str = TOKENS) -> Any:
    """What hangs on a backbone: its token pruner (or, by ``UNITS`` or ``HEAD``, what hangs there), or None."""
    return getattr(model, kind, None)


def mounted_units(model: Any) -> Any:
    """The gates of a backbone's units, or None."""
    return mounted(model, UNITS)


def mounted_head(model: Any) -> Any:
    """The head that explains itself in place of a backbone's classifier, or None."""
    return mounted(model, HEAD)


def unmount(model: Any, kind: str) -> bool:
    """Take it off; whether there was anything."""
    return model._modules.pop(kind, None) is not None
