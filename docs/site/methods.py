"""A page for every method, from its entry in the registry, its docstring, and what was measured of it."""

import inspect
import re
from pathlib import Path
from typing import Any

import prunex
from docs.site import measured
from prunex.registry import Method
from prunex.units.base import UnitPruner

FOLDERS = {  # of each kind: its folder, title, what it is, and the pages of docs/ that compare its methods
    "tokens": (
        "Token pruners",
        "They drop, merge or pool patches. [pruners.md](../../pruners.md) compares them, and says which to take.",
        ("pruners.md", "guidance.md", "dense_tasks.md"),
    ),
    "units": (
        "Unit criteria",
        "They choose heads and MLP channels that leave for good. [slimming.md](../../slimming.md) has figures.",
        ("slimming.md",),
    ),
    "explainers": (
        "Explainers",
        "They say which patches a prediction rests on. [explainers.md](../../explainers.md) compares what they need, "
        "cost and are good for, [metrics.md](../../metrics.md) how well they do.",
        ("explainers.md", "metrics.md"),
    ),
    "heads": (
        "Heads that explain themselves",
        "They take the place of timm's classifier and are trained. [heads.md](../../heads.md) compares them.",
        ("heads.md",),
    ),
    "metrics": (
        "Metrics",
        "They measure explanations and kept tokens. [metrics.md](../../metrics.md) says how to read them.",
        (),
    ),
}
ROOMS = {"pruner": "pruners", "explainer": "explainers", "metric": "metrics"}
TRAINED = "Drawn after `prunex fit --config configs/digits/{}.yaml`, on validation scenes."
# Methods that are drawn after a training, by docs/make_method_pictures.py, and the config that trains them.
CONFIGS = {
    ("tokens", "dynamicvit"): "dynamicvit",
    ("tokens", "ia_red2"): "ia_red2",
    ("tokens", "diffmask"): "diffmask",
    ("units", "xpruner"): "xpruner",
    ("explainers", "diffmask"): "diffmask",
    ("heads", "attributes"): "attributes",
    ("heads", "concept_transformer"): "concept_transformer",
    ("heads", "vit_net"): "vit_net",
}
UNTRAINED = {
    "tokens": "What it leaves of two scenes that the model never saw, stage by stage; nothing was trained for it.",
    "units": "What it leaves of the shipped model's heads and MLP channels at half of the multiply-adds.",
    "explainers": "Its maps of the shipped model's predictions, on scenes that training never saw.",
}
UNDRAWN = {
    ("explainers", "vit_shapley"): "Not drawn: its explainer has to be trained for half an hour.",
    ("heads", "mean_patch"): "Not drawn: it comes with classifiers of DINOv2's kind.",
    ("explainers", "mean_patch"): "Not drawn: it comes with classifiers of DINOv2's kind.",
}


def folder(method: Method) -> str:
    """Which folder of pages a method belongs to."""
    if method.kind == "pruner":
        return "units" if inspect.isclass(method.make) and issubclass(method.make, UnitPruner) else "tokens"
    return f"{method.kind}s"


def place(method: Method) -> str:
    """The page of a method, without its suffix.

    >>> place(prunex.methods("explainer")[0])
    'methods/explainers/atman'
    """
    return f"methods/{folder(method)}/{method.name}"


def dotted(method: Method) -> str:
    """The public name of what is behind a method; of a head the class's own."""
    room = getattr(prunex, ROOMS.get(method.kind, ""), None)
    names = [name for name in dir(room) if getattr(room, name) is method.make]
    if names:
        return f"prunex.{ROOMS[method.kind]}.{names[0]}"
    return f"{method.make.__module__}.{method.make.__qualname__}"


def drawn(method: Method) -> str | None:
    """What a method's picture shows, or None where there is none."""
    where = folder(method)
    if (where, method.name) in UNDRAWN:
        return None
    # A head is an explainer as well, drawn after the same training.
    config = CONFIGS.get((where, method.name)) or CONFIGS.get(("heads" if where == "explainers" else "", method.name))
    return TRAINED.format(config) if config else UNTRAINED.get(where)


def pages(root: Path) -> dict[str, str]:
    """All pages of methods, and one for each kind that lists them, by their names."""
    by_folder: dict[str, list[Method]] = {name: [] for name in FOLDERS}
    for method in prunex.methods():
        by_folder[folder(method)].append(method)
    made = {f"{place(m)}.md": page(m, root) for methods in by_folder.values() for m in methods}
    made |= {f"methods/{name}/index.md": index(name, methods) for name, methods in by_folder.items()}
    return made | {"methods/index.md": every(by_folder)}


def every(by_folder: dict[str, list[Method]]) -> str:
    """The page that lists all of them."""
    parts = [
        "# Every method",
        "A page each, made from its docstring, with its options, a picture and what was measured of it.",
    ]
    for name, methods in by_folder.items():
        title, about, _ = FOLDERS[name]
        links = ", ".join(f"[`{m.name}`]({name}/{m.name}.md)" for m in methods)
        parts += [f"## [{title}]({name}/index.md)", about.replace("../../", "../"), links]
    return "\n\n".join(parts) + "\n"


def index(name: str, methods: list[Method]) -> str:
    """The page that lists the methods of a kind."""
    title, about, _ = FOLDERS[name]
    rows = [f"| [`{m.name}`]({m.name}.md) | {summary(m)} | {with_links(m.paper)} | {m.needs} |" for m in methods]
    tree = ["```{toctree}", ":hidden:", "", *(m.name for m in methods), "```"]
    table = ["| name | what it does | paper | needs |", "|---|---|---|---|", *rows]
    return "\n".join([f"# {title}", "", about, "", *table, "", *tree, ""])


def summary(method: Method) -> str:
    """The first line of a docstring, as Markdown."""
    return markdown((inspect.getdoc(method.make) or "").split("\n\n")[0].replace("\n", " "))


def markdown(line: str) -> str:
    r"""A line of a docstring as Markdown: literals in single backticks, roles by their names; bars of tables escaped.

    >>> markdown(":func:`~prunex.vit.describe.describe` gives ``a | b``")
    '`describe` gives `a \\| b`'
    """
    line = re.sub(r":\w+:`~[\w.]*?(\w+)`", r"`\1`", line)
    line = re.sub(r":\w+:`([^`]+)`", r"`\1`", line)
    return line.replace("``", "`").replace("|", r"\|")


def with_links(paper: str) -> str:
    """A citation whose arXiv numbers lead there.

    >>> with_links("Liang et al., ICLR 2022, arXiv 2202.07800")
    'Liang et al., ICLR 2022, [arXiv 2202.07800](https://arxiv.org/abs/2202.07800)'
    """
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def page(method: Method, root: Path) -> str:
    """A method's page."""
    where = folder(method)
    title, _, compared = FOLDERS[where]
    parts = [f"# `{method.name}`", summary(method), f"**Paper** {with_links(method.paper)}. **Needs** {method.needs}."]
    parts += [f"```python\n{call(method)}\n```", options(method)]
    shows = drawn(method)
    if shows:
        parts += ["## What it shows", f"![{method.name}](../../pictures/{where}-{method.name}.png)", f"*{shows}*"]
    elif (where, method.name) in UNDRAWN:
        parts.append(f"*{UNDRAWN[where, method.name]}*")
    parts += ["## In full", f"```{{eval-rst}}\n.. {directive(method)}:: {dotted(method)}\n```"]
    rows = measured.of(method.name, root, compared)
    if rows:
        parts += ["## Measured", "The rows about it in the tables of these pages, which say how each was measured."]
        for name, heading, table in rows:
            link = f"[{name[:-3]}: {heading}](../../{name}#{measured.slug(heading)})"
            parts += [f"From {link}:", table.replace("](", "](../../")]
    return "\n\n".join(part for part in parts if part) + "\n"


def directive(method: Method) -> str:
    """What documents it."""
    return "autoclass" if inspect.isclass(method.make) else "autofunction"


def call(method: Method) -> str:
    """How it is used, in a few lines."""
    name, where = method.name, folder(method)
    first = next(iter(method.options.items()), None)
    if where == "tokens":
        rate = "keep_ratio=0.7" if "keep_ratio" in method.options else ""
        given = ", ".join(filter(None, [f'"{name}"', rate]))
        return f"pruning = prunex.attach(model, {given})\n# or, in a Trainer, TokenPruning({given})"
    if where == "units":
        given = f'"{name}", budget=0.5'
        return f"pruning = prunex.attach(model, {given})\n# or, in a Trainer, MaskPruning({given})"
    if where == "heads":
        named = 'concepts=["loop", "bar"]' if name == "concept_transformer" else ""
        given = ", ".join(filter(None, [f'"{name}"', named]))
        return f"head = prunex.attach(model, {given})\n# or, in a Trainer, ExplainableHead({given})"
    if where == "explainers":
        trained = ', explainer="runs/.../explainer"' if first and first[0] == "explainer" else ""
        return (
            f'e = prunex.explain("{name}", model, images{trained})\ne.show(images)  # the maps are e.maps [B, gh, gw]'
        )
    return f"from prunex.metrics import {name}"


def options(method: Method) -> str:
    """A table of options with their defaults."""
    if not method.options:
        return ""
    rows = [f"| `{name}` | `{shown(value)}` |" for name, value in method.options.items()]
    return "\n".join(["| option | default |", "|---|---|", *rows])


def shown(value: Any) -> str:
    """A default as it is written."""
    return repr(value).replace("|", r"\|")
