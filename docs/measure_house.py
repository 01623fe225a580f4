"""Print what the house measures: python docs/measure_house.py [ROOT] [--calls] [--folders].

ROOT is a clone, this one by default. Everything is read from the source, so that nothing is imported; ``--calls`` also
counts the calls into our own functions that attaching and explaining one image take, in this clone, which needs torch.
``--folders`` adds the lines of each folder and of the longest files.
"""

import argparse
import ast
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("prunex", "callbacks", "recipes")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.With, ast.Assert, ast.match_case)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DECISIONS = {"Keep", "Mask", "Drop", "Merge", "Pool"}
MOUNTED = {"CHILD", "UNITS"}


@dataclass
class File:
    """One file of the product: its tree, its lines, and the numbers of those that hold code or a comment alone."""

    path: Path
    name: str
    tree: ast.Module
    lines: int
    code: set[int]
    comments: set[int]

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """All of them, methods and inner ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS))

    def code_lines(self, node: ast.AST) -> int:
        """How many lines of code a part of the tree has, docstrings and comments left out."""
        return len(self.code.intersection(range(node.lineno, node.end_lineno + 1)))


def read(path: Path, root: Path) -> File:
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts if parts[0] == "prunex" else ("prunex", *parts)
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    code, comments = set(), set()
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                comments.add(token.start[0])
            elif token.string.strip():
                code.update(range(token.start[0], token.end[0] + 1))
    # A string that stands alone is a docstring: no code.
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, node.end_lineno + 1))
    name = ".".join(parts).removesuffix(".__init__")
    return File(path.relative_to(root), name, tree, len(text.splitlines()), code, comments - code)


def imported(file: File, known: set[str]) -> set[str]:
    """Our own modules that a file imports, inside functions too; not those for the type checker alone."""
    skipped = {
        inner
        for node in ast.walk(file.tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(file.tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside if inside <= known else inside | {str(node.module)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names & known - {file.name}


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other."""
    reach = {}
    for start in arrows:
        seen, left = set(), [start]
        while left:
            for other in arrows[left.pop()] - seen:
                seen.add(other)
                left.append(other)
        reach[start] = seen
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in arrows}
    return [set(group) for group in groups if group]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a caller may give: neither self nor cls, and ``*args`` or ``**options`` once."""
    a = function.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([n for n in names if n not in ("self", "cls")]) + (a.vararg is not None) + (a.kwarg is not None)


def branch_points(node: ast.AST) -> int:
    nodes = list(ast.walk(node))
    short = sum(len(n.values) - 1 for n in nodes if isinstance(n, ast.BoolOp))
    filters = sum(len(n.ifs) + 1 for n in nodes if isinstance(n, ast.comprehension))
    return short + filters + sum(isinstance(n, BRANCHES) for n in nodes)


def checking(file: File) -> set[int]:
    """Lines that only check: raising, ``if`` above nothing but a raise, calls of ``check``-functions."""
    lines: set[int] = set()
    for node in ast.walk(file.tree):
        raises = isinstance(node, ast.Raise | ast.Assert)
        if isinstance(node, ast.If):
            raises = not node.orelse and all(isinstance(n, ast.Raise) for n in node.body)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            raises = called(node.value).lstrip("_").startswith("check")
        if raises:
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines & executable(file)


def executable(file: File) -> set[int]:
    """Code lines inside functions, signatures left out."""
    bodies = [(f.body[0].lineno, f.end_lineno) for f in file.functions()]
    lines = {line for first, last in bodies for line in range(first, last + 1)}
    return lines & file.code


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def is_ladder(function: ast.AST) -> bool:
    """Whether a function tells three or more kinds of decisions apart."""
    kinds = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and called(node) == "isinstance":
            kinds |= {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name):
            kinds.add(node.cls.id)
    return len(kinds & DECISIONS) >= 3


def spells_mounted(file: File) -> set[int]:
    """Lines that name what hangs on a model: ``.prunex``, ``"prunex"`` as an attribute, CHILD, UNITS."""
    lines = set()
    for node in ast.walk(file.tree):
        if (isinstance(node, ast.Attribute) and node.attr == "prunex") or (
            isinstance(node, ast.Name) and node.id in MOUNTED
        ):
            lines.add(node.lineno)
        elif isinstance(node, ast.Call) and called(node) in ("getattr", "hasattr", "setattr", "delattr", "pop", "get"):
            lines |= {a.lineno for a in node.args if isinstance(a, ast.Constant) and a.value == "prunex"}
        elif isinstance(node, ast.Subscript | ast.Compare):
            inner = [node.slice] if isinstance(node, ast.Subscript) else [node.left]
            lines |= {c.lineno for c in inner if isinstance(c, ast.Constant) and c.value == "prunex"}
    return lines


def contract(files: list[File]) -> tuple[list[str], list[str]]:
    """Hooks and class flags of the token pruners' base class."""
    base = next(f for f in files if f.name == "prunex.pruners.base")
    kind = next(n for n in base.tree.body if isinstance(n, ast.ClassDef) and n.name == "TokenPruner")
    hooks = [n.name for n in kind.body if isinstance(n, FUNCTIONS) and not n.name.startswith("_")]
    flags = [ast.unparse(n.targets[0]) for n in kind.body if isinstance(n, ast.Assign)]
    flags += [n.target.id for n in kind.body if isinstance(n, ast.AnnAssign) and n.value is not None]
    return hooks, [f for f in flags if f != "name"]


def calls_into(root: Path, work: Callable[[], object]) -> Counter[object]:
    """How often each function of the product is entered while ``work`` runs."""
    inside = tuple(str(root / folder) for folder in FOLDERS)
    counts: Counter[object] = Counter()

    def entered(frame: object, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(inside):
            counts[frame.f_code] += 1

    sys.setprofile(entered)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counts


def explained_once(root: Path, method: str) -> Counter[object]:
    """The calls that attaching a pruner to a model of six blocks and explaining one image by TokenTM take."""
    sys.path.insert(0, str(root))
    import timm
    import torch

    import prunex

    def work(model: torch.nn.Module) -> None:
        prunex.attach(model, method)
        prunex.explain("tokentm", model, image)

    def tiny() -> torch.nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=6, num_classes=5)

    image = torch.randn(1, 3, 64, 64)
    work(tiny())  # what is imported at the first use
    model = tiny()
    return calls_into(root, lambda: work(model))


def rate(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}"


def rows(files: list[File]) -> Iterator[tuple[str, str, str]]:
    """What is measured, what it is now, and what is wanted."""
    known = {f.name for f in files}
    groups = circles({f.name: imported(f, known) for f in files})
    yield "import circles (files in them)", f"{len(groups)} ({sum(map(len, groups))})", "0"
    for name in ("prunex.vit.forward", "prunex.vit.halves"):
        file = next(f for f in files if f.name == name)
        for function in sorted(file.functions(), key=branch_points)[:-3:-1]:
            measured = f"{parameters(function)}, {branch_points(function)}, {file.code_lines(function)}"
            title = f"`{name.removeprefix('prunex.')}.{function.name}`: parameters, branch points, lines of code"
            yield title, measured, "<= 5, , <= 35"
    hooks, flags = contract(files)
    yield "pruner contract: hooks, class flags", f"{len(hooks)}, {len(flags)}", "10, 0"
    ladders = [f"{f.name}.{n.name}" for f in files for n in f.functions() if is_ladder(n)]
    yield "`isinstance` ladders over decisions", f"{len(ladders)} {' '.join(ladders)}".strip(), "0"
    spelling = [len(spells_mounted(f)) for f in files]
    spelled = f"{sum(spelling)} lines in {sum(map(bool, spelling))} files"
    yield "spellings of what hangs on a model", spelled, "one `mounted(model)`"
    many = [n.name for f in files for n in f.functions() if parameters(n) >= 12]
    yield "functions with >= 12 parameters", f"{len(many)} {' '.join(many)}".strip(), "<= 3"
    checks, running = sum(len(checking(f)) for f in files), sum(len(executable(f)) for f in files)
    yield "checking lines / executable lines, %", rate(checks, running), "<= 8"
    code = sum(len(f.code) for f in files)
    yield "comment lines / 100 code lines", rate(sum(len(f.comments) for f in files), code), ">= 4"
    nodes = Counter(type(n) for f in files for n in ast.walk(f.tree))
    yield "comprehensions / 100 code lines", rate(sum(nodes[kind] for kind in COMPREHENSIONS), code), "about 2"
    yield "conditional expressions / 100 code lines", rate(nodes[ast.IfExp], code), "about 2"
    yield "lines of the product", f"{sum(f.lines for f in files):,} in {len(files)} files", "<= 27,500"
    longest = max(files, key=lambda f: f.lines)
    yield "longest file", f"{longest.lines} {longest.path}", "<= 450"
    lengths = [(f.code_lines(n), f"{f.name}.{n.name}") for f in files for n in f.functions()]
    yield "longest function, lines of code", "{} {}".format(*max(lengths)), "<= 60"


def folders(files: list[File]) -> None:
    total: Counter[str] = Counter()
    for file in files:
        total[str(file.path.parent)] += file.lines
    print("\n| folder | lines |\n|---|---|")
    for folder, lines in sorted(total.items()):
        print(f"| {folder} | {lines:,} |")
    print("\n| longest files | lines |\n|---|---|")
    for file in sorted(files, key=lambda f: -f.lines)[:15]:
        print(f"| {file.path} | {file.lines} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent, help="a clone")
    parser.add_argument("--calls", action="store_true", help="count the calls of attaching and explaining too")
    parser.add_argument("--folders", action="store_true", help="lines of each folder and of the longest files")
    args = parser.parse_args()
    root = args.root.resolve()
    files = [read(path, root) for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    print("| what | now | wanted |\n|---|---|---|")
    for row in rows(files):
        print(f"| {' | '.join(row)} |")
    if args.calls:
        for method in ("topk", "dynamicvit"):
            counts = explained_once(root, method)
            title = f"attach {method} and explain one image: functions of ours, their calls"
            print(f"| {title} | {len(counts)}, {counts.total()} | fewer |")
    if args.folders:
        folders(files)


if __name__ == "__main__":
    main()
