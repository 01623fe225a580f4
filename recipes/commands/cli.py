"""The ``prunex`` command: reads what was typed and hands it on; nothing heavy is imported before it makes sense."""

import os
import sys
from collections.abc import Sequence
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path

from prunex.errors import PrunexError, unknown
from prunex.files import is_there
from prunex.recipes.commands.mistakes import DEBUG, as_mistake
from prunex.recipes.commands.options import typed
from prunex.recipes.commands.own import COMMANDS
from prunex.recipes.commands.usage import command_usage, usage
from prunex.recipes.given import check_checkpoint_path

LIGHTNING = ("fit", "validate", "test", "predict")
DEFAULT_CONFIG = "digits/dynamicvit.yaml"
EVERYTHING = ["--help", "all"]


def packaged_configs() -> dict[str, Traversable]:
    """The ready-made runs by name, as in ``"digits/dense.yaml"``.

    >>> "digits/dense.yaml" in packaged_configs()
    True
    """
    # Configs lie in the package, which may be a zip file.
    root = files("prunex.configs")
    configs: dict[str, Traversable] = {}
    for folder in (entry for entry in root.iterdir() if entry.is_dir()):
        configs |= {f"{folder.name}/{file.name}": file for file in folder.iterdir() if file.name.endswith(".yaml")}
    return configs


def find_config(name: str) -> str:
    """A path to a config file: the user's own where it exists, else the packaged one of that name, in full or short."""
    if is_there(Path(name), Path.is_file):
        return name
    known = packaged_configs()
    short = Path(name).as_posix().removeprefix("./").removeprefix("configs/")
    # Names are typed as they are seen in a clone, or short.
    for candidate in (short, f"{short}.yaml"):
        if candidate in known:
            with as_file(known[candidate]) as path:
                return str(path)
    raise unknown("config (no such file either)", name, known)


def resolve_configs(arguments: Sequence[str], default: str | None = None) -> list[str]:
    """Arguments in which every ``--config`` is a path that exists; the default is added where there is none."""
    resolved = list(arguments)
    configs = [config for config in typed(arguments, "--config", "-c") if config[2] is not None]
    for place, name, value in configs:
        path = find_config(str(value))
        # As many arguments as before, so that places after it stay.
        resolved[place] = [name, path] if place.stop - place.start == 2 else [f"{name}={path}"]
    asks_for_help = any(a in ("-h", "--help") or a.startswith("--help=") for a in resolved)
    if default is not None and not configs and not asks_for_help:
        resolved[:0] = ["--config", find_config(default)]
    return resolved


def take_out(arguments: list[str]) -> str | None:
    """Take ``--out FILE`` from the arguments of predict, which Lightning does not know.

    >>> arguments = ["--out", "x.csv", "--data.root", "photos"]
    >>> take_out(arguments), arguments
    ('x.csv', ['--data.root', 'photos'])
    """
    file = None
    # From the last on, so that places before it stay as they are.
    for place, _, file in reversed(typed(arguments, "--out")):
        if file is None:
            raise PrunexError("--out needs the name of a file, such as predictions.csv")
        del arguments[place]
    return file


def run_lightning(arguments: Sequence[str]) -> int:
    """``fit``, ``validate``, ``test`` or ``predict`` with a config, see ``prunex fit --help``."""
    if arguments[1:] == EVERYTHING:
        arguments = [arguments[0], "--help"]
    subcommand, rest = arguments[0], resolve_configs(arguments[1:], DEFAULT_CONFIG)
    out = take_out(rest) if subcommand == "predict" else None
    # A checkpoint that is not there is told at once; with --weights_only it is Lightning's business.
    if not any(argument.startswith("--weights_only") for argument in rest):
        for _, _, path in typed(rest, "--ckpt_path"):
            if path is not None:
                check_checkpoint_path(path)
    # Lightning is imported when there is something for it to do.
    from prunex.recipes.commands.lightning_cli import run_cli

    return run_cli(subcommand, rest, out)


def run(arguments: Sequence[str]) -> int:
    """Dispatch on the first argument, and give back the exit code; PrunexError is the user's mistake."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(packaged_configs()))
        return 0
    command = arguments[0]
    if command in LIGHTNING and {"-h", "--help"} & set(arguments) and arguments[1:] != EVERYTHING:
        print(command_usage(command, packaged_configs()))
        return 0
    for argument in arguments:
        _check_argument(argument)
    if command == "--version":
        import prunex

        print(f"prunex {prunex.__version__}")
        return 0
    if command in LIGHTNING:
        return run_lightning(arguments)
    if command in COMMANDS:
        return COMMANDS[command][1](arguments[1:])
    raise unknown("command", command, [*LIGHTNING, *COMMANDS])


def _check_argument(argument: str) -> None:
    """Refuse what no operating system hands over, but whoever calls :func:`main` might."""
    # Surrogates and zero bytes would otherwise surface wherever a path is first opened.
    try:
        fine = b"\0" not in os.fsencode(argument)
    except UnicodeEncodeError:
        fine = False
    if not fine:
        raise PrunexError(f"the argument {argument[:100]!r} is no text that a command line can hold: leave it out")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a user's mistake ends in one line on stderr and exit code 2; with ``PRUNEX_DEBUG`` a traceback."""
    try:
        code = run(sys.argv[1:] if arguments is None else list(arguments))
    except Exception as error:
        mistake = as_mistake(error)
        if mistake is None or os.environ.get(DEBUG):
            raise
        print(f"prunex: error: {mistake}", file=sys.stderr)
        code = 2
    except SystemExit as stop:
        # Lightning's has code 0, which a scheduler would take for success.
        if type(stop).__name__ != "SIGTERMException":
            raise
        print("prunex: terminated; the same command with --ckpt_path last goes on", file=sys.stderr)
        code = 143
    # 130 is what a shell says of Ctrl-C.
    except KeyboardInterrupt:
        if os.environ.get(DEBUG):
            raise
        print("\nprunex: interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)
