"""The package's files, parsed and not imported."""

import ast
from collections.abc import Iterator
from pathlib import Path


def trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Every file of the package by the name it is imported under."""
    for room in ("prunex", "callbacks", "recipes"):
        for path in sorted((root / room).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts if parts[0] == "prunex" else ("prunex", *parts)).removesuffix(".__init__")
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Every docstring of the package by its object's dotted name."""
    for name, tree in trees(root):
        yield from _within(tree, name)


def _within(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, text
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _within(child, f"{name}.{child.name}")
