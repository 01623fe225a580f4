"""The command line, as ``--help`` tells it, and the ready-made configs by what their first lines say."""

import contextlib
import io

from prunex.recipes.commands.cli import LIGHTNING, main, packaged_configs
from prunex.recipes.commands.own import COMMANDS


def pages() -> dict[str, str]:
    """The two pages by their names."""
    parts = ["# Command line", "What `prunex --help` and `prunex COMMAND --help` print.", block([])]
    for command in (*LIGHTNING, *COMMANDS):
        parts += [f"## `prunex {command}`", block([command])]
    rows = [f"| `{name}` | {about(file.read_text())} |" for name, file in sorted(packaged_configs().items())]
    table = "\n".join(["| config | what it does |", "|---|---|", *rows])
    intro = "`prunex fit --config configs/NAME`, in a clone and out of it. [Pruners](../pruners.md) has figures."
    configs = f"# Ready-made configs\n\n{intro}\n\n{table}\n"
    return {"reference/commands.md": "\n\n".join(parts) + "\n", "reference/configs.md": configs}


def block(arguments: list[str]) -> str:
    """What a command prints of itself."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return f"```text\n{out.getvalue().strip()}\n```"


def about(config: str) -> str:
    """The comment a config begins with, without the command in it."""
    lines = []
    for line in config.splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").strip()
        if not text.startswith("prunex "):
            lines.append(text)
    return " ".join(lines).replace("|", r"\|")
