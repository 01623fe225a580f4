"""The subcommands beside Lightning's: init, explain, score, export, bench, report, watch, methods, doctor, completion.

Each reads its arguments first and imports what it works with afterwards: a mistake is told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from prunex.recipes.commands import explain_options, options
from prunex.recipes.commands.listing import declared


def methods(arguments: Sequence[str]) -> int:
    """``prunex methods``: every method, its paper and what it needs; of those named also the options."""
    names = options.parse_methods(arguments).name
    defaults = {}
    # Their options are in signatures, for which the methods have to be imported.
    if names:
        import prunex

        defaults = {(m.kind, m.name): m.options for m in prunex.methods() if m.name in names}
    for entry in declared():
        if names and entry.name not in names:
            continue
        print(f"{entry.kind:<10} {entry.name:<18} {entry.paper:<52} {entry.needs}")
        for option, default in defaults.get((entry.kind, entry.name), {}).items():
            print(f"{'':<10} {option:<18} {default!r}")
    return 0


def report(arguments: Sequence[str]) -> int:
    """``prunex report RUN``: report.html from what the run wrote."""
    args = options.parse_report(arguments)
    from prunex.recipes.report.page import write_report

    print(write_report(args.run))
    return 0


def worked_by(name: str, parsers: Any = options) -> Callable[[Sequence[str]], int]:
    """The command that a file of that name does the work of, or the one that its options name, once these are read."""

    def run(arguments: Sequence[str]) -> int:
        args = getattr(parsers, f"parse_{name}")(arguments)
        worker = getattr(args, "worker", name)
        code: int = getattr(import_module(f"prunex.recipes.commands.{worker}"), worker)(args)
        return code

    return run


# name -> (one line of help, function of the remaining arguments that returns an exit code)
COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "init": ("a config for a folder of images, from four answers", worked_by("init")),
    "explain": ("maps and pictures of a trained model for one's own images", worked_by("explain", explain_options)),
    "score": (
        "explainers by metrics, dense beside slim, with intervals and costs",
        worked_by("score", explain_options),
    ),
    "export": (
        "the slim model as a checked graph: ONNX, torch.export, OpenVINO, ExecuTorch, TensorRT",
        worked_by("export"),
    ),
    "bench": ("accuracy, MACs, parameters and images/s, dense beside slim", worked_by("bench")),
    "report": ("report.html from what a run wrote", report),
    "watch": ("the report in a browser, following a training that goes on", worked_by("watch")),
    "methods": ("every pruner and explainer, its paper and what it needs", methods),
    "doctor": ("versions, devices, name clashes, and what would be refused of a model", worked_by("doctor")),
    "completion": ("a script for bash, zsh or fish", worked_by("completion")),
}
