"""What the README promises exists."""

import ast
import re
from pathlib import Path

import prunex
import prunex.callbacks
from prunex.recipes.commands.cli import LIGHTNING, packaged_configs
from prunex.recipes.commands.own import COMMANDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_every_method_is_in_the_table():
    rows = {tuple(c.strip(" `") for c in line.split("|")[1:-1]) for line in TEXT.splitlines() if line.startswith("| `")}
    assert {(m.name, m.kind, m.paper, m.needs) for m in prunex.methods() if m.kind != "metric"} <= rows


def test_every_metric_is_in_the_table_of_its_page():
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = {tuple(c.strip(" `") for c in line.split("|")[1:-1]) for line in text.splitlines() if line.startswith("| `")}
    assert {(m.name, m.paper, m.needs) for m in prunex.methods("metric")} <= rows


def test_every_config_named_exists():
    named = set(re.findall(r"configs/([\w/]+\.yaml)", TEXT))
    assert named
    assert named <= set(packaged_configs())


def test_every_command_named_exists():
    named = set(re.findall(r"^prunex (\w+)", TEXT, re.MULTILINE))
    assert named
    assert named <= {*LIGHTNING, *COMMANDS}


def test_python_snippets_parse_and_import_what_exists():
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(snippets) >= 3
    for snippet in snippets:
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module == "prunex.callbacks":
                assert all(hasattr(prunex.callbacks, name.name) for name in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "prunex":
                assert hasattr(prunex, node.attr), node.attr


def test_pictures_and_pages_are_there():
    for name in re.findall(r"\]\((docs/[\w.]+)\)|`(docs/[\w.]+)`", TEXT):
        path = name[0] or name[1]
        assert (ROOT / path).is_file(), path


def test_the_page_of_explainers_has_all_of_them_with_paper_and_cost():
    page = (ROOT / "docs" / "explainers.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in page if line.startswith("| `") and line.count("|") > 7]
    told = {row[0].strip("`"): row for row in rows}
    assert set(told) == {m.name for m in prunex.methods("explainer")}
    for m in prunex.methods("explainer"):
        row = told[m.name]
        for number in re.findall(r"arXiv (\d{4}\.\d{5})", m.paper):
            assert number in row[1], m.name
        assert re.match(r"\d", row[3]), m.name  # what it costs
