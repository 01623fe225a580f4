"""What the benchmarks share: arguments, what is told of the machine, short trainings, rows of CSV files, tables."""

from __future__ import annotations

import argparse
import csv
import logging
import platform
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import prunex
from prunex.recipes.timing import Timing, chip, quartiles, side_by_side

__all__ = [
    "GEOMETRY", "Timing", "append", "fit", "options", "read_rows", "side_by_side", "start", "table", "told",
]  # fmt: skip
GEOMETRY = "deit_small_patch16_224"


def options(description: str) -> argparse.ArgumentParser:
    """The arguments that every script here takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=GEOMETRY, help="timm architecture, random weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on a CPU")
    parser.add_argument("--repeats", type=int, default=0, help="rounds; 0: as many as fit into --seconds, at least 7")
    parser.add_argument("--seconds", type=float, default=40.0, help="time for each batch size where --repeats is 0")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time of this process, for a machine that others use too; only with --threads 1",
    )
    parser.add_argument("--keep-ratio", type=float, default=0.7, help="of every pruner")
    return parser


def start(args: argparse.Namespace) -> None:
    """Set threads and seed, and print what the numbers depend on."""
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        raise SystemExit(
            "--clock cpu needs --threads 1 and --device cpu: threads that wait for each other burn time too"
        )
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    how = f"{args.threads} threads; device {args.device}; {args.clock} time"
    print(f"machine: {chip(args.device)}; {torch.backends.cpu.get_cpu_capability()}; {how}")
    print(
        f"versions: python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"prunex {prunex.__version__}"
    )


def fit(module: Any, data: Any, callbacks: list[Any], epochs: int, device: str, **more: Any) -> None:
    """Train quietly, without validation and without a trace on disk."""
    import lightning

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    lightning.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator=device, devices=1, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, **more,
    ).fit(module, data)  # fmt: skip


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where it is not there."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, fields: Sequence[str], values: dict[str, Any]) -> None:
    """One more row, under a heading where the file is new."""
    new = not path.is_file()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerow(values)


def table(rows: Sequence[tuple[str, Timing]], first: str) -> str:
    """A markdown table: medians, the ratio's median and quartiles, and the ratio of the fastest rounds."""
    counted = any(t.macs is not None for _, t in rows)
    lines = [
        f"| {first} | | ms (median) | ratio to dense | quartiles | of the fastest rounds |" + " MACs |" * counted,
        "|---|---|---|---|---|---|" + "---|" * counted,
    ]
    for key, t in rows:
        low, middle, high = quartiles(t.ratios)
        macs = f" {t.macs:.3f} |" if t.macs is not None else " |" * counted
        fastest = min(t.own) / min(t.reference)
        lines.append(
            f"| {key} | {t.name} | {t.median:.1f} | **{middle:.3f}** | {low:.3f} to {high:.3f} | {fastest:.3f} |{macs}"
        )
    return "\n".join(lines)


def told(timings: Sequence[Timing]) -> str:
    """One batch size in one line, for whoever waits for the others."""
    ratios = ", ".join(f"{t.name}: {statistics.median(t.ratios):.3f}" for t in timings[1:])
    return f"{len(timings[0].own)} rounds; {ratios}"
