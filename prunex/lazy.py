"""Packages whose public names are imported when they are first used (PEP 562)."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def later(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package, from public names to the modules below it that hold them."""

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    # LightningCLI takes a short class_path from the classes that exist, and whoever has imported Lightning already
    # has nothing to save.
    if "lightning" in sys.modules:
        sys.modules[package].__dict__["__getattr__"] = get  # modules that are imported now may ask for a name already
        for name in modules:
            get(name)
    return get
