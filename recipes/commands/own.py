"""The subcommands beside Lightning's: explain, score, export, bench, report, methods."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import prunex
from prunex.checks import check_choice
from prunex.recipes.commands.arguments import Parser
from prunex.recipes.commands.bench import bench
from prunex.recipes.commands.explain import explain
from prunex.recipes.commands.score import score
from prunex.recipes.report.page import write_report
from prunex.recipes.runs import open_model, slim_folder


def methods(arguments: Sequence[str]) -> int:
    """``prunex methods``: every method, its paper and what it needs; of those named also the options."""
    parser = Parser("prunex methods", description="Every method by name, or the options of some with their defaults.")
    parser.add_argument("name", nargs="*", help="methods whose options are wanted")
    names, known = parser.parse_args(arguments).name, prunex.methods()
    for name in names:
        check_choice("method", name, {m.name for m in known})
    for m in known:
        if not names or m.name in names:
            print(f"{m.kind:<10} {m.name:<18} {m.paper:<52} {m.needs}")
            for option, default in m.options.items() if names else ():
                print(f"{'':<10} {option:<18} {default!r}")
    return 0


def report(arguments: Sequence[str]) -> int:
    """``prunex report RUN``: report.html from what the run wrote."""
    parser = Parser("prunex report", description="Write report.html from what a run folder holds.")
    parser.add_argument("run")
    print(write_report(parser.parse_args(arguments).run))
    return 0


def export(arguments: Sequence[str]) -> int:
    """``prunex export RUN``: a checked graph of the slim model."""
    parser = Parser("prunex export", description="Write the slim model of a run (or slim folder) as a checked graph.")
    parser.add_argument("run", help="run folder, slim folder or checkpoint")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx")
    parser.add_argument("--out", help="file to write; default model.<format> beside the slim model")
    parser.add_argument("--kept", action="store_true", help="also return the kept-token map")
    args = parser.parse_args(arguments)
    model, where = open_model(args.run), Path(args.run)
    folder = slim_folder(where) or (where.parent.parent if where.is_file() else where) / "slim"
    path, began = Path(args.out or folder / f"model.{args.format}"), perf_counter()
    print(f"writing {path} and checking it against the model ...", file=sys.stderr)
    prunex.export(model, path, kept=args.kept)
    print(f"it took {perf_counter() - began:.1f} s", file=sys.stderr)
    print(path)
    return 0


# name -> (one line of help, function of the remaining arguments that returns an exit code)
COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "explain": ("maps and pictures of a trained model for one's own images", explain),
    "score": ("explainers by metrics, dense beside slim, with intervals and costs", score),
    "export": ("the slim model as a checked ONNX or torch.export graph", export),
    "bench": ("accuracy, MACs, parameters and images/s, dense beside slim", bench),
    "report": ("report.html from what a run wrote", report),
    "methods": ("every pruner and explainer, its paper and what it needs", methods),
}
