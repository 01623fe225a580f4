"""The Python of the site's own pages runs as it stands there, page by page, from top to bottom.

A comment in front of a block says what it needs: time (``<!-- slow -->``), a package (``<!-- needs: wandb -->``), or
what only a reader has (``<!-- needs: a folder of weights -->``).
"""

import re
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch
import pytest
import timm
import torch

import prunex
from prunex.recipes.commands.cli import LIGHTNING, packaged_configs
from prunex.recipes.commands.own import COMMANDS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "start.md", *sorted(set((DOCS / "howto").glob("*.md")) - {DOCS / "howto" / "index.md"})]
BLOCK = re.compile(r"(?:<!-- ([^>]*?) -->\n)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
TRAINS = "trainer.fit("


def blocks(page: Path) -> list[tuple[bool, str, str]]:
    """Of each block of a page whether it takes long, what it needs, and its code."""
    said = [((match[1] or "").split(", "), match[2]) for match in BLOCK.finditer(page.read_text())]
    return [
        ("slow" in notes or TRAINS in code, notes[-1].removeprefix("needs: ") if "needs: " in notes[-1] else "", code)
        for notes, code in said
    ]


def run(page: Path, slow: bool, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """Run a page's blocks one after another and count them; with ``slow`` those that train or take long, too."""
    made = timm.create_model
    monkeypatch.chdir(folder)
    monkeypatch.setattr(timm, "create_model", lambda *given, **named: made(*given, **{**named, "pretrained": False}))
    plain = lightning.pytorch.Trainer
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    monkeypatch.setattr(lightning.pytorch, "Trainer", lambda **named: plain(**{**quiet, **named}))
    space, count = {"__name__": "__main__"}, 0
    for long, needs, code in blocks(page):
        if (long and not slow) or (needs and (" " in needs or find_spec(needs) is None)):
            continue
        torch.manual_seed(0)
        exec(compile(code, f"{page.name}, a block", "exec"), space)  # noqa: S102
        count += 1
    return count


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_that_take_no_time_run(page, monkeypatch, tmp_path):
    ran = run(page, False, monkeypatch, tmp_path)
    assert ran or all(long or needs for long, needs, _ in blocks(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, monkeypatch, tmp_path):
    assert run(page, True, monkeypatch, tmp_path)


def test_commands_and_configs_of_the_pages_exist():
    text = "\n".join(page.read_text() for page in [*PAGES, DOCS / "which.md"])
    named = set(re.findall(r"^prunex (\w+)", text, re.MULTILINE))
    assert named
    assert named <= {*LIGHTNING, *COMMANDS}
    assert set(re.findall(r"configs/([\w/]+\.yaml)", text)) <= set(packaged_configs())


def test_methods_that_the_pages_name_exist():
    known = {m.name for m in prunex.methods()}
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r'(?:attach\(\w+, |explain\(|TokenPruning\(|MaskPruning\()"(\w+)"', text))
    assert len(named) > 5
    assert named <= known
