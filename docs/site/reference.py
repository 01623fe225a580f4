"""The reference: every public name, from its docstring; methods have pages of their own."""

import ast
import dataclasses
import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import prunex
from docs.site.methods import dotted, place
from docs.site.source import trees

ROOMS = {  # public rooms with names of their own: title, and whether members of classes are shown
    "prunex": ("prunex", True, "The names that `import prunex` gives."),
    "prunex.callbacks": ("prunex.callbacks", False, "Lightning callbacks; what their hooks do is told by the class."),
    "prunex.recipes": ("prunex.recipes", False, "Ready-made modules and data, for configs and for scripts."),
    "prunex.targets": ("prunex.targets", False, "What can be explained instead of a class."),
    "prunex.explainers": (
        "prunex.explainers",
        False,
        "Explainers as functions of a ViT; `prunex.explain` is the door.",
    ),
    "prunex.pruners": ("prunex.pruners", False, "Classes of pruners; `prunex.attach` makes them by name."),
    "prunex.metrics": ("prunex.metrics", False, "Functions of tensors, and a torchmetrics class around each."),
    "prunex.multimodal": ("prunex.multimodal", False, "Models of text and image of transformers."),
    "prunex.pictures": ("prunex.pictures", False, "Draws from arrays, never from a model."),
}
# What lies in no public room and is worth reading: public names take it, give it, or are made of it.
INSIDE = (
    "prunex.batches.parts",
    "prunex.callbacks.monitor.Monitor",
    "prunex.guidance.Guidance",
    "prunex.handles.units.UnitPruning",
    "prunex.pruners.adaptive.AdaptiveOptions",
    "prunex.pruners.adaptive.CountOptions",
    "prunex.pruners.patch_slimming.CalibrationOptions",
    "prunex.pruners.patch_slimming_search.Search",
    "prunex.pruners.schedules.Schedule",
    "prunex.pruners.schedules.ScheduleOptions",
    "prunex.registry.Method",
    "prunex.removal.game.RemovalOptions",
    "prunex.removal.game.ScoreOptions",
    "prunex.removal.imputing.imputed",
    "prunex.split.search_split",
    "prunex.units.base.UnitOptions",
    "prunex.units.xpruner.UnitRelevance",
    "prunex.vit.stage.Stage",
    "prunex.vit.trace.TokenTrace",
)


def pages() -> dict[str, str]:
    """All pages of the reference by their names."""
    made = {f"reference/{name}.md": room(name, *about) for name, about in ROOMS.items()}
    return made | {"reference/inside.md": inside(), "reference/index.md": index()}


def index() -> str:
    """The page that lists the others."""
    rows = [f"- [`{title}`]({name}.md): {about}" for name, (title, _, about) in ROOMS.items()]
    rows += ["- [Behind the doors](inside.md): what public docstrings lead to."]
    rows += ["- [Command line](commands.md)", "- [Ready-made configs](configs.md)"]
    tree = ["```{toctree}", ":hidden:", "", *ROOMS, "inside", "commands", "configs", "```"]
    return "\n".join(["# Reference", "", *rows, "", *tree, ""])


def room(name: str, title: str, members: bool, about: str) -> str:
    """The page of a public room: methods by links, all else in full."""
    module = import_module(name)
    known = {dotted(m): m for m in prunex.methods()}
    methods, others = [], []
    for public in public_names(module):
        # What several rooms offer is told in the first.
        if name == "prunex" or getattr(module, public) not in [getattr(prunex, n) for n in prunex.__all__]:
            (methods if f"{name}.{public}" in known else others).append(public)
    parts = [f"# `{title}`", about, f"```{{eval-rst}}\n.. py:module:: {name}\n```"]
    if methods:
        links = [f"[`{public}`](../{place(known[f'{name}.{public}'])}.md)" for public in methods]
        parts.append(f"On pages of their own: {', '.join(links)}.")
    kinds = [public for public in others if inspect.isclass(getattr(module, public))]
    functions = [public for public in others if callable(getattr(module, public)) and public not in kinds]
    for heading, chosen in (("Functions", functions), ("Classes", kinds)):
        if chosen:
            documented = [documentation(f"{name}.{public}", getattr(module, public), members) for public in chosen]
            parts += [f"## {heading}", "```{eval-rst}\n" + "\n".join(documented) + "```"]
    return "\n\n".join(parts) + "\n"


def public_names(module: Any) -> Sequence[str]:
    """What a room offers: ``__all__``, or what it defines or imports of ours without an underscore."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    ours = [name for name in dir(module) if not name.startswith("_") and not inspect.ismodule(getattr(module, name))]
    return [name for name in ours if getattr(getattr(module, name), "__module__", "").startswith(f"{module.__name__}")]


def documentation(name: str, thing: Any, members: bool) -> str:
    """The directive that documents an object."""
    if not inspect.isclass(thing):
        return f".. autofunction:: {name}\n\n"
    shown = f"   :members:{fields(thing)}\n" if members and not issubclass(thing, BaseException) else ""
    return f".. autoclass:: {name}\n{shown}\n"


def fields(thing: type) -> str:
    """A dataclass's fields are told by its docstring, and left out among the members."""
    if not dataclasses.is_dataclass(thing):
        return ""
    return "\n   :exclude-members: " + ", ".join(f.name for f in dataclasses.fields(thing))


def inside() -> str:
    """The page of what public docstrings lead to."""
    documented = [documentation(name, resolved(name), True) for name in INSIDE]
    about = "What lies in no public room, and public docstrings lead to."
    return f"# Behind the doors\n\n{about}\n\n" + "```{eval-rst}\n" + "\n".join(documented) + "```\n"


def defined(root: Path) -> set[str]:
    """Every name that the package's files define, by its dotted path, read without importing them."""
    names = set()
    for module, tree in trees(root):
        names.add(module)
        scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [(module, tree)]
        for name, scope in scopes:
            for node in scope.body:
                if isinstance(node, ast.ClassDef):
                    scopes.append((f"{name}.{node.name}", node))
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    names.add(f"{name}.{node.name}")
                assigned = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                names |= {f"{name}.{target.id}" for target in assigned if isinstance(target, ast.Name)}
    return names


def resolved(name: str) -> Any:
    """The object of a dotted name."""
    module, _, last = name.rpartition(".")
    return getattr(import_module(module), last)
