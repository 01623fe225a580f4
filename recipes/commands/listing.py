"""Every method's name, paper and needs, read from the sources: importing them takes seconds."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import prunex
from prunex import registry
from prunex.errors import unknown


class Entry(NamedTuple):
    """What ``@register`` is told of a method."""

    kind: str
    name: str
    paper: str
    needs: str


@cache
def declared() -> list[Entry]:
    """Every method that a decorator in the sources registers, sorted by kind and name."""
    entries: list[Entry] = []
    for file in Path(str(prunex.__file__)).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        # Most files register nothing, and need not be parsed.
        if "@register(" in text:
            entries += _entries(ast.parse(text))
    return sorted(entries)


def _entries(tree: ast.Module) -> list[Entry]:
    constants: dict[str, str] = {}
    entries = []
    for node in tree.body:
        # Papers that several methods share are constants.
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = _text(node.value, constants)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "register":
                    entries.append(Entry(*(_text(argument, constants) for argument in call.args[:4])))
    return entries


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    """What a text, the name of one, or an f-string of both says."""
    if isinstance(node, ast.Name):
        return constants.get(node.id, "")
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def check_methods(names: Iterable[str], kind: str | None = None) -> None:
    """Refuse names that no method (of a kind) has; near names are offered."""
    # Whoever calls from Python may have registered methods that lie in no file of ours.
    methods = {(entry.kind, entry.name) for entry in declared()} | set(registry.METHODS)
    for name in names:
        if kind is None and name not in {n for _, n in methods}:
            raise unknown("method", name, {n for _, n in methods})
        if kind is not None and (kind, name) not in methods:
            raise registry.no_method(kind, name, methods)
