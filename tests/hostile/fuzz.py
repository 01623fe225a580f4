"""Many hostile cases of every kind: ``python -m tests.hostile.fuzz --count 10000 --seed 0 [--only configs]``.

Each must end in success or in one PrunexError. Prints one line a kind, and how to try again what ended otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from tests.hostile.kinds import KINDS, one
from tests.hostile.room import Broken, Room


@dataclass
class Tally:
    """How the cases of one kind ended."""

    succeeded: int = 0
    refused: int = 0
    seconds: float = 0.0
    broken: list[tuple[int, str]] = field(default_factory=list)


def shares(count: int, only: str | None = None) -> dict[str, int]:
    """How many cases of each kind."""
    if only:
        return {only: count}
    whole = sum(share for _, share in KINDS.values())
    return {kind: max(1, count * share // whole) for kind, (_, share) in KINDS.items()}


def fuzz(counts: dict[str, int], seed: int, room: Room, start: int = 0, bar: tqdm | None = None) -> dict[str, Tally]:
    """Try so many cases of each kind."""
    found = {}
    for kind, count in counts.items():
        tally = found[kind] = Tally()
        begun = perf_counter()
        for number in range(start, start + count):
            try:
                fine = one(kind, seed, number, room)
                tally.succeeded += fine
                tally.refused += not fine
            except Broken as error:
                tally.broken.append((number, str(error)))
                room.canary.exists() and room.canary.rmdir()
                room.before = room._outside()
            if bar is not None:
                bar.set_description(kind)
                bar.update()
        tally.seconds = perf_counter() - begun
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when any case ended otherwise than it may."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--start", type=int, default=0, help="number of the first case, to try one again")
    args = parser.parse_args(arguments)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        room, counts = Room(Path(folder) / "room"), shares(args.count, args.only)
        with tqdm(total=sum(counts.values()), unit="case", mininterval=2) as bar:
            found = fuzz(counts, args.seed, room, args.start, bar)
        os.chdir(here)
    for kind, tally in found.items():
        print(
            f"{kind:<12} {counts[kind]:>6} cases: {tally.succeeded:>5} succeeded, {tally.refused:>5} ended in one "
            f"PrunexError, {len(tally.broken):>3} otherwise, {tally.seconds:6.0f} s"
        )
    for kind, tally in found.items():
        for number, text in tally.broken[:20]:
            print(f"\n{kind}: again by --only {kind} --seed {args.seed} --start {number} --count 1\n{text}")
    return int(any(tally.broken for tally in found.values()))


if __name__ == "__main__":
    sys.exit(main())
