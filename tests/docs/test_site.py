"""The sources of the site: every method has a page, docstrings' open points are in one table, links lead somewhere."""

import doctest
import importlib
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import prunex
from docs.site import limits, llms, measured, methods, tree
from docs.site.source import docstrings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """All sources of the site, without the pictures that are drawn for it."""
    out = tmp_path_factory.mktemp("site") / "docs"
    tree.stage(out, pictures=False)
    return out


def test_every_method_has_a_page_with_its_docstring_and_options(sources):
    for method in prunex.methods():
        page = (sources / f"{methods.place(method)}.md").read_text()
        assert methods.dotted(method) in page
        assert methods.with_links(method.paper) in page
        assert all(f"| `{name}` | `" in page for name in method.options)
        listed = (sources / f"methods/{methods.folder(method)}/index.md").read_text()
        assert f"({method.name}.md)" in listed


def test_what_documents_a_method_is_what_the_registry_has():
    for method in prunex.methods():
        module, _, name = methods.dotted(method).rpartition(".")
        assert getattr(importlib.import_module(module), name) is method.make


def test_every_public_name_is_documented_once(sources):
    text = "\n".join(path.read_text() for path in sources.rglob("*.md"))
    documented = re.findall(r"^\.\. auto\w+:: (prunex\.\S+)", text, re.MULTILINE)
    assert len(documented) == len(set(documented))
    for room in ("prunex", "prunex.callbacks", "prunex.recipes", "prunex.pruners", "prunex.multimodal"):
        names = {f"{room}.{name}" for name in importlib.import_module(room).__all__}
        assert names <= set(documented), names - set(documented)


def test_the_table_has_what_docstrings_mark(sources):
    page = (sources / "limits.md").read_text()
    marked = [name for name, text in docstrings(ROOT) if re.search(r"unverified|second-hand", text, re.IGNORECASE)]
    assert len(marked) > 10
    named = {f"{m.make.__module__}.{m.make.__qualname__}": m.name for m in prunex.methods()}
    for name in marked:
        assert f"[`{named.get(name)}`]" in page or f"| `{name}` |" in page, name


def test_a_new_mark_appears_in_the_table(tmp_path):
    for room in ("prunex", "callbacks", "recipes"):
        (tmp_path / room).mkdir()
    (tmp_path / "prunex" / "new.py").write_text('"""One. Its rate is\nunverified (Doe et al. 2020). Two."""\n')
    rows = [row for row in limits.unsure(tmp_path) if row.where == "`prunex.new`"]
    assert [(row.kind, row.words) for row in rows] == [("unverified", "Its rate is unverified (Doe et al. 2020).")]


def test_the_readmes_limits_are_all_in_the_table(sources):
    text = (ROOT / "README.md").read_text().partition("\n## Limits\n")[2]
    rows = (sources / "limits.md").read_text().count("| limit |")
    assert rows == len(re.findall(r"^- ", text, re.MULTILINE)) > 10


def test_llms_txt_has_every_page(sources):
    text = (sources / "llms.txt").read_text()
    assert text.startswith("# prunex\n\n> ")
    linked = re.findall(r"^- \[[^\]]+\]\(([^)]+)\.html\)", text, re.MULTILINE)
    assert sorted(linked) == sorted(str(p.relative_to(sources).with_suffix("")) for p in llms.pages(sources))


def test_every_page_is_in_a_list_of_contents(sources):
    listed = {"index"}
    for page in sources.rglob("*.md"):
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            names = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / name).relative_to(sources).as_posix() for name in names}
    assert listed == {str(page.relative_to(sources).with_suffix("")) for page in llms.pages(sources)}


def test_links_between_pages_lead_somewhere(sources):
    for page in sources.rglob("*.md"):
        text = re.sub(r"^(`{3,}).*?^\1|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
            path = (page.parent / target).resolve() if target else page
            drawn = "pictures/" in target  # when the site is built
            assert drawn or path.is_file(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
                assert anchor in map(measured.slug, headings), f"{page.name}: {target}#{anchor}"


def test_links_of_the_pages_lead_somewhere_in_the_repository_too():
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "howto").glob("*.md")]:
        text = re.sub(r"^(`{3,}).*?^\1|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", text):
            made_for_the_site = page.parent / target
            if not re.search(r"(pictures|methods)/|(limits|models|index)\.md", target):
                assert made_for_the_site.resolve().is_file(), f"{page.name}: {target}"


def test_trained_methods_have_their_pictures():
    names = {f"{kind}-{name}.png" for kind, name in methods.CONFIGS}
    names |= {f"explainers-{name}.png" for kind, name in methods.CONFIGS if kind == "heads"}
    files = {path.name for path in (ROOT / "docs" / "pictures").glob("*.png")}
    assert files == names


def test_figures_of_the_decision_path_stand_in_the_pages_it_cites():
    text = (ROOT / "docs" / "which.md").read_text()
    pages = {*re.findall(r"\(([a-z_]+\.md)", text)} - {"models.md", "limits.md"}
    cited = "\n".join((ROOT / "docs" / name).read_text() for name in pages)
    figures = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", text))
    assert len(figures) > 40
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", cited), figure


def test_the_comparison_counts_our_methods_as_they_are():
    text = (ROOT / "docs" / "comparison.md").read_text()
    folders = [methods.folder(m) for m in prunex.methods()]
    assert f"| tokens leave or merge | {folders.count('tokens')} methods |" in text
    assert f"| heads, channels leave | {folders.count('units')} criteria," in text
    assert f"| measures | {folders.count('metrics')} |" in text
    kept = [m for m in prunex.methods("metric") if re.search("kept-token mask|pruner's scores", m.needs)]
    assert f"| kept tokens judged against a dense model | {len(kept)} measures |" in text


def test_rows_that_were_measured_are_those_of_the_method():
    tables = measured.of("tome", ROOT, ("pruners.md",))
    rows = [row for _, _, table in tables for row in table.splitlines()[2:]]
    assert len(rows) > 10
    assert all("`tome`" in row or row.startswith(("| dense", "| random", "| chance")) for row in rows)


def test_notebooks_are_pages_where_there_are_any(tmp_path):
    (tmp_path / "notebooks").mkdir()
    cells = [{"cell_type": "markdown", "source": ["# First\n", "see [it](../docs/pruners.md#which-one)"]}]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "notebooks" / "first.ipynb").write_text(
        tree.mended_notebook("notebooks/first.ipynb", json.dumps(notebook))
    )
    made = tree.notebooks(tmp_path)
    assert "- [First](first.ipynb)" in made["notebooks/index.md"]
    assert "[it](../pruners.md#which-one)" in (tmp_path / "notebooks" / "first.ipynb").read_text()


@pytest.mark.parametrize("name", ["limits", "llms", "measured", "methods", "tree"])
def test_examples_of_what_builds_the_site(name):
    result = doctest.testmod(importlib.import_module(f"docs.site.{name}"))
    assert result.attempted
    assert not result.failed


@pytest.mark.slow
@pytest.mark.skipif(find_spec("furo") is None, reason="needs the extra docs")
def test_the_whole_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run([sys.executable, "-m", "docs.site", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in llms.pages(ROOT / "build" / "docs"):
        assert (tmp_path / page.relative_to(ROOT / "build" / "docs")).with_suffix(".html").is_file()
    text = "\n".join(path.read_text() for path in tmp_path.rglob("*.html"))
    # Nothing is asked of the network when a page is looked at.
    assert not re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"https?://[^\"]*\"", text)
    assert (tmp_path / "llms.txt").read_text().startswith("# prunex")
