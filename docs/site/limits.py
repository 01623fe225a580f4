"""One table of what prunex cannot do, refuses, has not tried, or follows without having been able to check it.

All of it is read from where it is said, the README, the pages and the docstrings, when the site is built.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import prunex
from docs.site.llms import SENTENCE
from docs.site.measured import slug
from docs.site.methods import markdown, place
from docs.site.source import docstrings

UNSURE = {  # what a docstring says where something could not be checked, and how the table calls it
    r"\bunverified\b": "unverified",
    r"\bsecond-hand\b": "second-hand",
    r"\b(?:papers?|publications?|code)\b[^.]*\bcould not be (?:read|checked|verified)\b": "not read",
    r"\bnot reproduced\b": "not reproduced",
}
INTRO = """# Limits, and what is unverified

Made from the README, the pages and every docstring when this site is built, so that nothing is missing that is said
there. *Unverified*: written after a publication or code that could not be read in that point. *Second-hand*: after
somebody else's account of it. *Not read*: what of a publication could not be had. *Refused*: ends in one error
line, which says what to do instead, before time is spent.
"""


@dataclass(frozen=True)
class Row:
    """A line of the table: what it concerns, as a link, which kind of limit it is, and the words."""

    where: str
    kind: str
    words: str


def pages(root: Path) -> dict[str, str]:
    """The page by its name."""
    parts = [INTRO]
    for title, rows_of in {"Limits": limits, "Refused, and not tried": refused, "Unverified": unsure}.items():
        lines = [f"| {row.where} | {row.kind} | {row.words} |" for row in rows_of(root)]
        parts += [f"## {title}", "\n".join(["| what | kind | as it is said |", "|---|---|---|", *lines])]
    return {"limits.md": "\n\n".join(parts) + "\n"}


def limits(root: Path) -> list[Row]:
    """The README's list of limits."""
    text = (root / "README.md").read_text().partition("\n## Limits\n")[2]
    names = {m.name.replace("_", ""): f"[`{m.name}`]({place(m)}.md)" for m in prunex.methods()}
    rows = []
    for words in items(text):
        # By its name, or as its paper writes it: with two capitals, since an attribute or a relevance is no method.
        called = re.findall(r"`([a-z_0-9]+)[`(]|\b((?:[A-Z][\w-]*){2,})", words)
        keys = dict.fromkeys(re.sub(r"[\W_]", "", plain or written).lower() for plain, written in called)
        concerned = [names[key] for key in keys if key in names]
        words = re.sub(r"\]\(docs/", "](", words).replace("|", r"\|")
        rows.append(Row(", ".join(concerned) or "prunex", "limit", words))
    return rows


def refused(root: Path) -> list[Row]:
    """What pages of docs/ list as refused by name, or as not tried."""
    rows = []
    for path in sorted((root / "docs").glob("*.md")):
        for part in re.split(r"^(?=##)", path.read_text(), flags=re.MULTILINE):
            heading = part.splitlines()[0].lstrip("# ") if part.startswith("#") else ""
            all_of_it = heading.startswith("What is refused")
            where = f"[{path.stem}: {heading}]({path.name}#{slug(heading)})"
            for words in items(part):
                if all_of_it or words.startswith("Refused by name"):
                    rows.append(Row(where, "refused", moved(words)))
            rows += [
                Row(where, "not tried", moved(words)) for words in re.findall(r"^Not tried: .+$", part, re.MULTILINE)
            ]
    return rows


def moved(words: str) -> str:
    """Words whose links to headings of their own page are taken out, with bars of tables escaped."""
    return re.sub(r"\[([^\]]+)\]\(#[^)]*\)", r"\1", words).replace("|", r"\|")


def items(text: str) -> Iterator[str]:
    """The items of the lists in a text, each in one line."""
    for block in re.findall(r"^[-*] .*(?:\n  .*)*", text, re.MULTILINE):
        yield " ".join(block[2:].split())


def unsure(root: Path) -> list[Row]:
    """What docstrings of the package and entries of the registry mark as unverified or second-hand."""
    named = {}  # where an object is documented as a method
    for method in prunex.methods():
        named[f"{method.make.__module__}.{method.make.__qualname__}"] = f"[`{method.name}`]({place(method)}.md)"
    rows = []
    for name, text in docstrings(root):
        where = named.get(name, f"`{name}`")
        rows += [Row(where, kind, markdown(words)) for kind, words in marked(text)]
    for method in prunex.methods():
        rows += [Row(f"[`{method.name}`]({place(method)}.md)", kind, words) for kind, words in marked(method.paper)]
    return rows


def marked(text: str) -> list[tuple[str, str]]:
    """The sentences of a text that say so, each with the first of the marks in it.

    >>> marked("We follow Doe et al. (2020). **Unverified**: the rate. All else is known.")
    [('unverified', '**Unverified**: the rate.')]
    """
    rows = []
    for paragraph in re.split(r"\n\s*\n", text):
        # A sentence ends before a capital, a literal or a bold word, and at no abbreviation.
        for sentence in re.split(SENTENCE + r"(?=[A-Z`*(\"])", " ".join(paragraph.split())):
            kinds = [kind for pattern, kind in UNSURE.items() if re.search(pattern, sentence, re.IGNORECASE)]
            rows += [(kinds[0], sentence)] if kinds else []
    return rows
