"""Timing several models beside each other in one process, so that a drifting machine moves all of them alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Timing:
    """Milliseconds of every round of one contestant, and of the reference in the same rounds."""

    name: str
    own: list[float]
    reference: list[float]
    macs: float | None = None

    @property
    def median(self) -> float:
        """Median of the own times, in milliseconds."""
        return statistics.median(self.own)

    @property
    def ratios(self) -> list[float]:
        """Own time over the reference's, round by round."""
        return [a / b for a, b in zip(self.own, self.reference, strict=True)]


def side_by_side(
    contestants: Sequence[tuple[str, Callable[[], object]]],
    device: str,
    repeats: int,
    seconds: float,
    clock: str = "wall",
    least: int = 7,
) -> list[Timing]:
    """Time callables by name in turn, round after round; the first is the reference.

    There are ``repeats`` rounds or, with 0, as many as fit into ``seconds``, at least ``least``; the clock is "wall",
    or "cpu" for processor time.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    now = time.process_time if clock == "cpu" else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name, _ in contestants}
    for _, call in contestants:  # warm-up: allocator, kernels chosen by shape
        call()
        call()
    # What was queued on a GPU must not count in the first round.
    wait()
    began, done = time.perf_counter(), 0
    while done < repeats or (repeats == 0 and (done < least or time.perf_counter() - began < seconds)):
        # Whoever runs first in a round changes from round to round.
        turn = done % len(contestants)
        for name, call in [*contestants[turn:], *contestants[:turn]]:
            start = now()
            call()
            wait()
            spent[name].append(1e3 * (now() - start))
        done += 1
    reference = spent[contestants[0][0]]
    return [Timing(name, spent[name], reference) for name, _ in contestants]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value that value, three times.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def speeds(timing: Timing, batch: int) -> dict[str, float]:
    """Of batches of so many images, images a second and how many times the reference's that is, round by round.

    Medians, with lower and upper quartiles. On a machine that others use too the ratios are what holds: a round is
    slow for all.

    >>> speeds(Timing("pruned", [5.0, 50.0], [10.0, 100.0]), 1)["ratio"]
    2.0
    """
    low, middle, high = quartiles([1e3 * batch / ms for ms in timing.own])
    slower, ratio, faster = quartiles([1 / r for r in timing.ratios])
    speed = {"images_per_s": middle, "low": low, "high": high}
    return speed | {"ratio": ratio, "ratio_low": slower, "ratio_high": faster}


def chip(device: str = "cpu") -> str:
    """What the device is called."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    # On Linux platform.processor() seldom says more than the architecture.
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return f"{len(names)} cores {names[0]}"
    return platform.processor() or platform.machine()
