"""What ``prunex explain`` takes beside explaining: time, memory as images go by, names of a million files, processes.

    python benchmarks/explain_many.py outside                     time outside the explainer, as a share of rollout's
    python benchmarks/explain_many.py memory --images 20000       of the process, at image 200 and later
    python benchmarks/explain_many.py memory --images 6000 --sheets all
    python benchmarks/explain_many.py names --images 1000000      seconds for whatever is done with names
    python benchmarks/explain_many.py processes --images 600      wall time of two processes as a share of one's

Random weights and drawn pictures: neither changes what is measured. One thread a process. "outside" runs the command
as it is typed, in this process, so that imports do not count: once for warming up and then --rounds times. Pictures are
JPEG files of 500 x 375. "memory" reads /proc of a process of its own (pictures of 64 px). "processes" starts one and
two processes under torchrun in turn and takes the whole of each, imports and opening the model included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

import prunex
from prunex.maps import read_listing, write_listing
from prunex.recipes.commands import cli
from prunex.recipes.commands.explaining import number_lines
from prunex.recipes.commands.sheets import sheets_of
from prunex.recipes.data.inputs import open_inputs

FIVE = "rollout,tokentm,transformer_attribution,lrp,integrated_gradients"
START = "from prunex.recipes.commands.cli import main\nif __name__ == '__main__':\n    main()\n"
PAGE = os.sysconf("SC_PAGE_SIZE")


def pictures(folder: Path, count: int, size: tuple[int, int], kinds: int = 100) -> Path:
    """So many JPEG files, of which some have the same content: colours that change slowly, with noise over them."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        file = folder / f"{number:07d}.jpg"
        if number >= kinds:
            os.link(folder / f"{number % kinds:07d}.jpg", file)
            continue
        few = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(few, np.int16) + rng.integers(-12, 13, (size[1], size[0], 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return folder


def command(model: Path, images: Path, out: Path, methods: str, *more: Any) -> list[str]:
    """What is typed."""
    arguments = ["explain", model, "--images", images, "--out", out, "--methods", methods, "--device", "cpu", *more]
    return [str(argument) for argument in arguments]


def outside(args: argparse.Namespace, top: Path) -> None:
    """Wall time less what explainers took, as a share of the latter."""
    few, many = pictures(top / "few", 8, (500, 375)), pictures(top / "many", args.images, (500, 375))
    print("| model | workers | explaining, ms an image | outside, ms an image | share |\n|---|---|---|---|---|")
    for name in args.models:
        model = prunex.save(timm.create_model(name).eval(), top / name)
        for workers in args.workers:
            shares, inside, beside = [], [], []
            for number in range(args.rounds + 1):
                out = top / f"{name}-{workers}-{number}"
                images, count = (many, args.images) if number else (few, 8)
                began = time.perf_counter()
                cli.run(command(model, images, out, "rollout", "--workers", workers, "--sheets", 0))
                wall = time.perf_counter() - began
                spent = prunex.open_maps(out).spent()["rollout"][0]
                if number:
                    shares.append((wall - spent) / spent)
                    inside.append(1000 * spent / count)
                    beside.append(1000 * (wall - spent) / count)
            low, high = min(shares), max(shares)
            middle = [statistics.median(x) for x in (inside, beside, shares)]
            cells = [
                name,
                workers,
                f"{middle[0]:.1f}",
                f"{middle[1]:.1f}",
                f"{middle[2]:.1%} ({low:.1%} to {high:.1%})",
            ]
            print("|", " | ".join(map(str, cells)), "|")


def memory(args: argparse.Namespace, top: Path) -> None:
    """Resident memory of the process as the number of images grows."""
    model = prunex.save(timm.create_model(args.models[0], img_size=64).eval(), top / "model")
    images, out = pictures(top / "images", args.images, (64, 64)), top / "out"
    goals = [200, *(args.images * part // 10 for part in range(1, 10)), args.images - 100]
    process = started(top, command(model, images, out, "rollout,raw_attention", "--sheets", args.sheets, "--batch", 8))
    seen: dict[int, float] = {}
    print("| image | resident memory, MB |\n|---|---|")
    while process.poll() is None:
        done = finished(out)
        for goal in goals:
            if done >= goal and goal not in seen:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                seen[goal] = pages * PAGE / 1e6
                print(f"| {done:,} | {seen[goal]:.0f} |", flush=True)
        time.sleep(0.2)
    values = list(seen.values())
    print(f"grown by {max(values) - values[0]:.0f} MB from image 200 to the most")


def finished(out: Path) -> int:
    """How many images have rows by now."""
    try:
        return len(prunex.open_maps(out))
    except (prunex.PrunexError, FileNotFoundError):
        return 0


def started(top: Path, arguments: list[str], processes: int = 0) -> subprocess.Popen[bytes]:
    """A command in a process of its own, or in some that torchrun starts."""
    script = top / "start.py"
    script.write_text(START)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, *several, str(script), *arguments], env=environment, stdout=quiet, stderr=quiet
    )


def names(args: argparse.Namespace, top: Path) -> None:
    """Everything that is done with names before the first image, and what is written of them."""
    folder = top / "images"
    for number in range(args.images):
        if number % 1000 == 0:
            (folder / f"{number // 1000:04d}").mkdir(parents=True)
        (folder / f"{number // 1000:04d}" / f"{number % 1000:03d}.jpg").touch()
    clock = [time.perf_counter()]
    inputs = open_inputs(str(folder), top / "out")
    clock.append(time.perf_counter())
    sheets_of(inputs.names)
    clock.append(time.perf_counter())
    known: tuple[list[str], list[str]] = ([], [])
    number_lines(inputs, None, *known)
    clock.append(time.perf_counter())
    write_listing(top / "out" / "maps", *known)
    clock.append(time.perf_counter())
    read_listing(top / "out" / "maps")
    clock.append(time.perf_counter())
    steps = ("listed", "sheets named", "sizes and times read", "listing written", "listing read")
    print(f"| {len(inputs):,} files | seconds |\n|---|---|")
    for step, start, end in zip(steps, clock, clock[1:], strict=False):
        print(f"| {step} | {end - start:.2f} |")
    print(f"| together | {clock[-1] - clock[0]:.2f} |")


def processes(args: argparse.Namespace, top: Path) -> None:
    """Wall time of two processes beside one's, in turn."""
    model = prunex.save(timm.create_model(args.models[0]).eval(), top / "model")
    images = pictures(top / "images", args.images, (500, 375))
    ratios, one = [], []
    for number in range(args.rounds):
        walls = []
        for count in (0, 2):
            out = top / f"{number}-{count}"
            began = time.perf_counter()
            code = started(top, command(model, images, out, FIVE, "--sheets", 0), count).wait()
            walls.append(time.perf_counter() - began)
            if code or finished(out) != args.images:
                raise SystemExit(f"the command ended with {code}, {finished(out)} images done")
        ratios.append(walls[1] / walls[0])
        one.append(args.images / walls[0])
    print(f"one process: {statistics.median(one):.1f} images a second; two take {statistics.median(ratios):.2f} of its")
    print(f"time ({min(ratios):.2f} to {max(ratios):.2f}, {args.rounds} rounds in turn)")


def main() -> None:
    """Measure one of these."""
    kinds = {each.__name__: each for each in (outside, memory, names, processes)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(kinds))
    parser.add_argument("--images", type=int, default=200, help="default 200")
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="default 0 2")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--sheets", default="0", help="of memory: a number, or all; default 0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as top:
        kinds[args.what](args, Path(top))


if __name__ == "__main__":
    main()
