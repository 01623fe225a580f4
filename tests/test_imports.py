"""The law of the house: imports point from a room to those below it, and no file imports itself by a detour."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the ground up. Rooms of one line never meet, but for the ground, which is one.
GROUND = [
    "clash",
    "errors",
    "brief",
    "columns",
    "checks",
    "files",
    "later",
    "formats",
    "untrusted",
    "attributes",
    "batches",
    "version",
    "registry",
    "spelling",
    "targets",
    "configs",
    "lazy",
    "maps",
    "hub",
]
STOREYS = [
    GROUND,
    ["pictures"],
    ["vit"],
    ["relevance", "removal"],
    ["learned", "units", "heads"],
    ["pruners", "explainers"],
    ["handles"],
    ["attach", "explain"],
    ["metrics", "slim", "guidance", "split", "sources"],
    ["multimodal"],
    ["catalogue"],
    ["prunex"],
    ["callbacks"],
    ["recipes"],
]
STOREY = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}
# The rooms of recipes: what is given, its data, its models, its runs, their report, and the commands over all of them.
RECIPES = [["given", "tables", "timing"], ["data"], ["modules"], ["runs"], ["report"], ["commands"]]


def modules() -> dict[str, Path]:
    """Every file of the product by the name it is imported under."""
    files = [*(ROOT / "prunex").rglob("*.py")]
    files += [file for room in ("callbacks", "recipes", "configs") for file in (ROOT / room).rglob("*.py")]
    named = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "prunex" else ("prunex", *parts)
        named[".".join(parts).removesuffix(".__init__")] = file
    return named


def imported(file: Path, known: set[str]) -> set[str]:
    """What a file imports of ours, inside functions too; not what it imports for the type checker alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & known if inside <= known else inside & known | {str(node.module)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names & known


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


FILES = modules()
ARROWS = {module: imported(file, set(FILES)) - {module} for module, file in FILES.items()}


def test_every_room_has_its_storey():
    assert {room(module) for module in FILES} == set(STOREY)


def test_imports_point_down():
    back = [
        f"{module} -> {other}"
        for module, others in ARROWS.items()
        for other in others
        if room(module) != room(other)
        and STOREY[room(other)] >= STOREY[room(module)]
        and not {room(module), room(other)} <= set(GROUND)
    ]
    assert not back


def test_imports_of_recipes_point_down():
    storey = {f"prunex.recipes.{room}": number for number, rooms in enumerate(RECIPES) for room in rooms}
    inside = [module for module in FILES if module.startswith("prunex.recipes.")]
    place = {module: ".".join(module.split(".")[:3]) for module in inside}
    assert set(place.values()) == set(storey)
    back = [
        f"{module} -> {other}"
        for module in inside
        for other in ARROWS[module] & set(inside)
        if place[module] != place[other] and storey[place[other]] >= storey[place[module]]
    ]
    assert not back


def test_no_circle():
    try:
        TopologicalSorter(ARROWS).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_an_arrow_back_and_a_circle_are_found(tmp_path):
    file = tmp_path / "low.py"
    file.write_text(
        "def late():\n    import importlib\n\n    from prunex.callbacks import monitor\n"
        "    importlib.import_module('prunex.recipes')\n"
    )
    assert imported(file, set(FILES)) == {"prunex.callbacks.monitor", "prunex.recipes"}
