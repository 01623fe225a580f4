"""prunex export: a graph of the slim model for another runtime, compared with the model on real images and timed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import prunex
from prunex.batches import parts
from prunex.errors import PrunexError
from prunex.formats import FORMATS
from prunex.recipes.commands.bench import LEAST, data_of, images_of
from prunex.recipes.data.images import choose_range, preparation, read_image
from prunex.recipes.data.inputs import open_inputs
from prunex.recipes.given import on_hub
from prunex.recipes.runs import forward, home, open_data, open_model, run_of, slim_folder, token_pruning
from prunex.recipes.tables import counted
from prunex.recipes.timing import quartiles, side_by_side
from prunex.slim.runtimes import Outputs, open_graph
from prunex.vit.anatomy import find
from prunex.vit.describe import outline
from prunex.vit.units import Backbone

CALIBRATION = 256  # images that int8 is calibrated by
BATCHES = (1, 8)


def export(args: Any) -> int:
    """Do what ``prunex export`` was asked for, and give back the exit code."""
    # Images are float32, whatever the weights were saved in.
    model: Any = find(open_model(args.run).float(), kinds=Backbone)[1]
    images = compared_on(args, model)
    calibration = calibrated_by(args, model) if args.int8 else None
    path = Path(args.out or target_folder(args.run) / FORMATS[args.format].file(args.format))
    tell(f"writing {path} and checking it against the model ...")
    began = perf_counter()
    prunex.export(model, path, images[:8], kept=args.kept, format=args.format)
    tell(f"it took {perf_counter() - began:.1f} s")
    report(args, path, model, images)
    if args.format == "tensorrt":
        tell(f"build an engine of it by: {trtexec(path, model)}")
    if calibration is not None:
        small = path.with_suffix(".int8.onnx")
        tell(f"writing {small}, calibrated by {len(calibration)} images ...")
        report(args, prunex.quantise(path, small, calibration), model, images)
    return 0


def tell(text: str) -> None:
    """Print a line beside what scripts read."""
    print(text, file=sys.stderr)


def target_folder(run: str) -> Path:
    """Where a graph goes: beside the slim model, or into a folder of the Hub's name."""
    where = Path(run)
    if on_hub(run) is not None:
        return home(run)
    # A checkpoint lies in RUN/checkpoints.
    return slim_folder(where) or (where.parent.parent if where.is_file() else where) / "slim"


def compared_on(args: Any, model: nn.Module) -> Tensor:
    """Images of the user's own, else of the run's validation, else random ones, which is said."""
    if args.images is not None:
        return from_files(args.images, model, args.limit)
    notes: list[str] = []
    run = run_of(Path(args.run))
    data = None if run is None else data_of(run, False, notes)
    if run is None:
        notes.append("no images are known: compared on random ones; --images DIR names others")
    images = images_of(model, data, args.limit, notes)
    for note in notes:
        tell(f"note: {note}")
    return images


def calibrated_by(args: Any, model: nn.Module) -> Tensor:
    """Training images: of the user's own, else of the run."""
    if args.calibrate is not None:
        return from_files(args.calibrate, model, CALIBRATION)
    run = run_of(Path(args.run))
    if run is None:
        raise PrunexError("--int8 needs images to calibrate by: give --calibrate DIR with some hundred training images")
    data = open_data(run)
    data.setup("fit")
    batches = (parts(batch).need("images", "calibration") for batch in data.train_dataloader())
    return torch.stack(list(islice(chain.from_iterable(batches), CALIBRATION)))


def from_files(given: str, model: nn.Module, count: int) -> Tensor:
    """Up to so many images, evenly spaced over those of a folder, as the model takes them."""
    inputs, prepare = open_inputs(given, Path("explained")), preparation(model)
    step = max(1, len(inputs) // count)
    files = [inputs.image(number) for number in range(0, len(inputs), step)][:count]
    scale = choose_range(files, whole=False, say=tell)
    return torch.stack([prepare(read_image(file, scale))[1] for file in files])


def report(args: Any, path: Path, model: nn.Module, images: Tensor) -> None:
    """Print the file's name, how far its answers are from the model's, and how its time is to PyTorch's."""
    print(path)
    runtime = FORMATS[args.format].runs
    if runtime is not None and find_spec(runtime) is None:
        print(f"not compared: {runtime} is not installed")
        return
    names = ["logits", "kept"] if args.kept else ["logits"]
    run = open_graph(args.format, path, names)
    pruning = token_pruning(model)
    alike = pruning is None or pruning.pruner.count == "fixed"
    lines = compared(run, model, images) if alike else ["not compared: it keeps as many patches of every image"]
    for line in chain(lines, timed(args, run, model, images)):
        print(f"  {line}")


def compared(run: Callable[[Tensor], Outputs], model: nn.Module, images: Tensor) -> Iterator[str]:
    """How a file's answers are to the model's, in lines."""
    differences, classes, maps = [], 0, 0
    given: Outputs = {}
    for some in images.split(max(BATCHES)):
        given, logits = run(some), forward(model, some)
        differences.append(float((given["logits"] - logits).abs().max() / logits.abs().max().clamp(min=1e-6)))
        classes += int((given["logits"].argmax(1) == logits.argmax(1)).sum())
        if "kept" in given:
            pruning = token_pruning(model)
            kept = torch.ones_like(given["kept"]) if pruning is None else pruning.trace.kept()
            maps += int((given["kept"].bool() == kept.bool()).flatten(1).all(1).sum())
    count = len(images)
    yield f"logits differ from PyTorch's by at most {max(differences):.1e} of the largest, on {count} images"
    alike = f", the same patches kept in {maps} of {count}" if "kept" in given else ""
    yield f"the same class in {classes} of {count}{alike}"


def timed(args: Any, run: Callable[[Tensor], Outputs], model: nn.Module, images: Tensor) -> Iterator[str]:
    """The time of a forward beside PyTorch's, in turn, a line a batch size."""
    if args.seconds == 0:
        return
    # ExecuTorch's graph takes one image at a time.
    for batch in BATCHES[: 1 if args.format == "executorch" else None]:
        some = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
        calls = [("torch", partial(forward, model, some)), ("graph", partial(run, some))]
        timings = side_by_side(calls, "cpu", 0, args.seconds, least=LEAST)
        low, middle, high = quartiles(timings[1].ratios)
        yield (
            f"batch {batch}: {timings[1].median:.2f} ms, {middle:.2f} of PyTorch's time ({low:.2f} to {high:.2f}, "
            f"{len(timings[1].own)} rounds in turn, {counted(torch.get_num_threads(), 'thread')})"
        )


def trtexec(path: Path, model: Any) -> str:
    """The line that makes an engine for one to 32 images, at its best for 8."""
    anatomy = outline(model)
    size = "x".join(map(str, (anatomy.channels, *anatomy.image)))
    shapes = " ".join(f"--{end}Shapes=images:{n}x{size}" for end, n in (("min", 1), ("opt", 8), ("max", 32)))
    return f"trtexec --onnx={path} {shapes} --saveEngine={path.with_suffix('.engine')}"
