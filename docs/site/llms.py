"""``llms.txt``: every page of the site in one list, for programs that read (https://llmstxt.org)."""

import json
import re
from pathlib import Path

SECTIONS = {
    "": "Docs",
    "howto": "How to",
    "methods": "Methods",
    "notebooks": "Notebooks",
    "reference": "Reference",
    "project": "Optional",
}
# A sentence ends before a space, and at no abbreviation.
SENTENCE = (
    r"(?<!\bal\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)"
    r"(?<!\bEq\.)(?<!\bEqs\.)(?<!\bSec\.)(?<!\bFig\.)(?<!\bFigs\.)(?<!\bProp\.)(?<=[.!?])\s+"
)
PROJECT = ("changelog", "contributing", "security")
ABOUT = (
    "Explainable pruning of Vision Transformers while they are fine-tuned: Lightning callbacks around any timm ViT "
    "that drop patches, attention heads and MLP channels, and explanations and metrics of what is left. "
    "The distribution is called prunex-vit, the import prunex."
)


def text(out: Path) -> str:
    """The file's text, from the sources in a folder."""
    lines: dict[str, list[str]] = {name: [] for name in SECTIONS.values()}
    for path in pages(out):
        name = path.relative_to(out).with_suffix("").as_posix()
        section = "project" if name in PROJECT else name.partition("/")[0] if "/" in name else ""
        about = first_sentence(path)
        line = f"- [{title(path)}]({name}.html)" + (f": {about}" if about else "")
        lines[SECTIONS[section]].append(line)
    parts = [f"## {name}\n\n" + "\n".join(entries) for name, entries in lines.items() if entries]
    return "\n\n".join(["# prunex", f"> {ABOUT}", *parts]) + "\n"


def pages(out: Path) -> list[Path]:
    """All pages among the sources."""
    return sorted(path for path in out.rglob("*") if path.suffix in (".md", ".ipynb"))


def title(path: Path) -> str:
    """A page's first heading, without its markup."""
    heading = re.search(r"^# (.+)$", prose(path), re.MULTILINE)
    if heading is None:
        raise ValueError(f"{path} has no heading of the first level: write one")
    return plain(heading[1])


def first_sentence(path: Path) -> str:
    """The first sentence of a page's first paragraph."""
    for block in re.split(r"\n\s*\n", prose(path)):
        line = " ".join(block.split())
        if line and not re.match(r"[#|:!<>(-]|\*[^*]|\d+\. ", line):
            return re.split(SENTENCE, plain(line))[0].rstrip(":")
    return ""


def prose(path: Path) -> str:
    """A page's text without blocks of code; of a notebook its Markdown."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^(`{3,}|:{3,}).*?^\1", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def plain(line: str) -> str:
    """A line without Markdown's markup.

    >>> plain("**What** `evit` [keeps](pruners.md)")
    'What evit keeps'
    """
    line = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line).replace("`", "")
    return re.sub(r"(\*\*?)(\w[^*]*)\1", r"\2", line).strip()
