"""Every method by name, from all rooms."""

from __future__ import annotations

import prunex.explainers
import prunex.heads
import prunex.metrics
import prunex.pruners  # noqa: F401  (importing a room makes its methods known)
from prunex import registry
from prunex.errors import unknown
from prunex.registry import Method


def methods(kind: str | None = None) -> list[Method]:
    """Every pruner, explainer, head and metric, sorted by kind and name.

    Args:
        kind: Only this kind, or all.

    >>> import prunex
    >>> [m.name for m in prunex.methods("pruner")][:4]
    ['diffmask', 'diffrate', 'dynamicvit', 'evit']
    """
    kinds = {k for k, _ in registry.METHODS}
    if kind is not None and kind not in kinds:
        raise unknown("kind of method", kind, kinds)
    return sorted((m for (k, _), m in registry.METHODS.items() if kind in (None, k)), key=lambda m: (m.kind, m.name))
