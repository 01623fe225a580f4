"""What hangs on a model: the one place that knows under which names."""

from __future__ import annotations

from typing import Any

TOKENS, UNITS = "prunex", "prunex_units"  # submodules of the backbone: its token pruner, and the gates of its units


def mounted(model: Any, kind: str = TOKENS) -> Any:
    """What hangs on a backbone: its token pruner (or, by ``UNITS``, the gates of its units), or None."""
    return getattr(model, kind, None)


def mounted_units(model: Any) -> Any:
    """The gates of a backbone's units, or None."""
    return mounted(model, UNITS)


def unmount(model: Any, kind: str) -> bool:
    """Take it off; whether there was anything."""
    return model._modules.pop(kind, None) is not None
