"""The site's sources in one folder: the repository's pages with their links mended, and those made from the package."""

import json
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from docs.site import commands, limits, llms, methods, models, reference

ROOT = Path(__file__).parents[2]
# Where files of the repository lie on the site; of docs/ all pages and pictures lie where they do there.
PLACES = {
    "docs/site/index.md": "index.md",
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]*)")


def stage(out: Path, root: Path = ROOT, pictures: bool = True) -> None:
    """Write all sources of the site into a folder, which is emptied first; without ``pictures`` none is drawn."""
    if out.exists():
        shutil.rmtree(out)
    for name in repository_pages(root):
        to = out / place(name)
        to.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".md"):
            to.write_text(mended(name, (root / name).read_text()))
        elif name.endswith(".ipynb"):
            to.write_text(mended_notebook(name, (root / name).read_text()))
        else:
            shutil.copyfile(root / name, to)
    made: dict[str, str] = {**methods.pages(root), **reference.pages(), **limits.pages(root), **models.pages(root)}
    made |= {**commands.pages(), **notebooks(out)}
    for name, text in made.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    front = out / "index.md"
    front.write_text(
        listing(front.read_text(), [path.relative_to(out).with_suffix("").as_posix() for path in llms.pages(out)])
    )
    (out / "llms.txt").write_text(llms.text(out))
    if pictures:
        from docs.site.pictures import draw

        draw(out / "pictures")


def repository_pages(root: Path) -> Iterator[str]:
    """Pages, notebooks and pictures of the repository that the site shows, by their paths."""
    yield from (name for name in PLACES if name != "README.md")
    for folder, kinds in (("docs", (".md", ".png")), ("notebooks", (".ipynb", ".png"))):
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.suffix in kinds and "/." not in name and name not in PLACES:
                yield name


def place(name: str) -> str:
    """Where a file of the repository lies on the site.

    >>> place("docs/howto/budget.md"), place("SECURITY.md"), place("notebooks/first.ipynb")
    ('howto/budget.md', 'security.md', 'notebooks/first.ipynb')
    """
    return PLACES.get(name, name.removeprefix("docs/"))


def mended(name: str, text: str) -> str:
    """A page whose relative links lead to where files lie on the site; code is left alone.

    >>> mended("docs/reliability.md", "see [security](../SECURITY.md#limits), `[x](y.md)`")
    'see [security](security.md#limits), `[x](y.md)`'
    """
    here = posixpath.dirname(place(name))

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), match[1]))
        return posixpath.relpath(place(target), here or ".")

    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if number % 2 else LINK.sub(moved, part) for number, part in enumerate(parts))


def mended_notebook(name: str, text: str) -> str:
    """A notebook whose texts have their links mended."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = mended(name, "".join(cell["source"]))
    return json.dumps(notebook)


def listing(front: str, pages: list[str]) -> str:
    r"""The front page, its lists completed by the notebooks and by pages of docs/ that it does not name.

    >>> listing("models\n\nbenchmarks\n", ["benchmarks", "howto/budget", "models", "new", "notebooks/index"])
    'models\nnotebooks/index\n\nbenchmarks\nnew\n'
    """
    named = {*re.findall(r"^[\w/]+$", front, re.MULTILINE), "index"}
    more = {"models": [page for page in pages if page == "notebooks/index"]}
    more["benchmarks"] = [page for page in pages if "/" not in page and page not in named]
    for last, others in more.items():
        front = re.sub(rf"^{last}$", "\n".join([last, *others]), front, flags=re.MULTILINE)
    return front


def notebooks(out: Path) -> dict[str, str]:
    """The page that lists the notebooks, where there are any."""
    stems = sorted(path.stem for path in (out / "notebooks").glob("*.ipynb"))
    if not stems:
        return {}
    lines = [f"- [{llms.title(out / 'notebooks' / f'{stem}.ipynb')}]({stem}.ipynb)" for stem in stems]
    listed = "\n".join(["```{toctree}", ":hidden:", "", *stems, "```"])
    about = "Each runs on a CPU; what is shown are the outputs of a run, stored with the notebook."
    return {"notebooks/index.md": "\n".join(["# Notebooks", "", about, "", *lines, "", listed, ""])}
