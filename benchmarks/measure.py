"""Timing several models beside each other in one process, so that a drifting machine moves all of them alike."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

import prunex

GEOMETRY = "deit_small_patch16_224"


@dataclass
class Timing:
    """Milliseconds of every round of one contestant, and of the reference in the same rounds."""

    name: str
    own: list[float]
    reference: list[float]
    macs: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Own time over the reference's, round by round."""
        return [a / b for a, b in zip(self.own, self.reference, strict=True)]


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
    chip = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        told = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in told if line.startswith("model name")]
        chip = f"{len(names)} cores {names[0]}" if names else chip
    if args.device.startswith("cuda"):
        chip = torch.cuda.get_device_name(args.device)
    how = f"{args.threads} threads; device {args.device}; {args.clock} time"
    print(f"machine: {chip}; {torch.backends.cpu.get_cpu_capability()}; {how}")
    print(
        f"versions: python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"prunex {prunex.__version__}"
    )


def side_by_side(
    contestants: Sequence[tuple[str, Callable[[], object]]],
    device: str,
    repeats: int,
    seconds: float,
    clock: str = "wall",
) -> list[Timing]:
    """Time callables in turn, round after round; the first is the reference.

    The order rotates, so that nobody always runs after the same neighbour (whose data fill the caches).

    Args:
        contestants: Name and callable.
        device: "cpu", or "cuda" to wait for it before the clock is read.
        repeats: Rounds; 0: what fits into ``seconds``, at least 7.
        seconds: See ``repeats``.
        clock: "wall", or "cpu" for processor time.

    Returns:
        One timing a contestant, in the order given.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    now = time.process_time if clock == "cpu" else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name, _ in contestants}
    for _, call in contestants:  # warm-up: allocator, kernels chosen by shape
        call()
        call()
    wait()
    began, done = time.perf_counter(), 0
    while done < repeats or (repeats == 0 and (done < 7 or time.perf_counter() - began < seconds)):
        turn = done % len(contestants)
        for name, call in [*contestants[turn:], *contestants[:turn]]:
            start = now()
            call()
            wait()
            spent[name].append(1e3 * (now() - start))
        done += 1
    reference = spent[contestants[0][0]]
    return [Timing(name, spent[name], reference) for name, _ in contestants]


def table(rows: Sequence[tuple[str, Timing]], first: str) -> str:
    """A markdown table: medians, the ratio's median and quartiles, and the ratio of the fastest rounds."""
    counted = any(t.macs is not None for _, t in rows)
    lines = [
        f"| {first} | | ms (median) | ratio to dense | quartiles | of the fastest rounds |" + " MACs |" * counted,
        "|---|---|---|---|---|---|" + "---|" * counted,
    ]
    for key, t in rows:
        low, middle, high = statistics.quantiles(t.ratios, n=4)
        macs = f" {t.macs:.3f} |" if t.macs is not None else " |" * counted
        fastest = min(t.own) / min(t.reference)
        lines.append(
            f"| {key} | {t.name} | {statistics.median(t.own):.1f} | **{middle:.3f}** | {low:.3f} to {high:.3f} "
            f"| {fastest:.3f} |{macs}"
        )
    return "\n".join(lines)


def told(timings: Sequence[Timing]) -> str:
    """One batch size in one line, for whoever waits for the others."""
    ratios = ", ".join(f"{t.name}: {statistics.median(t.ratios):.3f}" for t in timings[1:])
    return f"{len(timings[0].own)} rounds; {ratios}"
