"""What eight bits cost and save: the shipped ViT for digit scenes as ONNX graphs, dense and with fewer tokens.

    python benchmarks/int8.py --threads 1 --clock cpu

Each graph in float32, dynamic int8 and static int8 (both by prunex.quantise; the static one calibrated by training
scenes of several seeds), and static int8 by ONNX Runtime's own defaults, which take every product there is. Accuracy on
2,000 test scenes, and how many get the class of the graph in float32; the file's size; the time of a forward as a ratio
to the dense graph in float32, side by side in one process. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import options, side_by_side, start
from torch import Tensor

import prunex
from prunex.recipes.commands.bench import session
from prunex.recipes.data.digits import DigitScenes
from prunex.recipes.modules.backbone import model_from_weights

Run = Callable[[Tensor], Any]


def exported(folder: Path, keep_ratio: float) -> dict[str, Path]:
    """The graphs in float32, by name."""
    model = model_from_weights("vit_tiny_patch16_224", "digits").eval()
    graphs = {"dense": prunex.export(model, folder / "dense.onnx")}
    prunex.attach(model, "evit", keep_ratio=keep_ratio)
    graphs[f"evit {keep_ratio:g}"] = prunex.export(model, folder / "evit.onnx")
    return graphs


def by_defaults(source: Path, path: Path, images: Tensor) -> Path:
    """As ONNX Runtime quantises where nobody says anything."""
    from onnxruntime.quantization import quantize_static

    from prunex.slim.int8 import _quietly, _Reader

    with _quietly():
        quantize_static(str(source), str(path), _Reader("images", list(images.split(16))))
    return path


def quantised(name: str, source: Path, calibration: dict[int, Tensor]) -> dict[tuple[str, str], list[Path]]:
    """All graphs of one model: by its name and how it was made, one a seed."""

    def beside(how: str) -> Path:
        return source.with_name(f"{source.stem}.{how}.onnx")

    first = next(iter(calibration.values()))
    return {
        (name, "float32"): [source],
        (name, "int8, dynamic"): [prunex.quantise(source, beside("dynamic"))],
        (name, "int8, static"): [prunex.quantise(source, beside(f"static{s}"), x) for s, x in calibration.items()],
        (name, "int8, static, all products"): [by_defaults(source, beside("defaults"), first)],
    }


def classes(run: Run, images: Tensor) -> Tensor:
    """The class of each image, int64 [B]."""
    return torch.cat([torch.from_numpy(run(some)[0]).argmax(1) for some in images.split(50)])


def spread(values: Sequence[float], digits: str = ".1f") -> str:
    """A mean, and the lowest and highest where there are several."""
    text = f"{statistics.mean(values):{digits}}"
    return text if len(values) == 1 else f"{text} ({min(values):{digits}} to {max(values):{digits}})"


def times(runs: dict[tuple[str, str], Run], images: Tensor, args: argparse.Namespace) -> list[float]:
    """Each graph's median ratio to the first one's time."""
    contestants = [(" ".join(key), partial(run, images)) for key, run in runs.items()]
    timings = side_by_side(contestants, "cpu", args.repeats, args.seconds, args.clock)
    return [statistics.median(timing.ratios) for timing in timings]


def main(argv: Sequence[str] | None = None) -> None:
    parser = options("Accuracy, size and time of graphs in eight bits.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration scenes")
    parser.add_argument("--calibration", type=int, default=256, help="scenes to calibrate by")
    parser.add_argument("--images", type=int, default=2000, help="test scenes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images in a timed forward")
    args = parser.parse_args(argv)
    start(args)
    scenes = DigitScenes(batch_size=args.images, val_size=args.images)
    images, labels = next(iter(scenes.test_dataloader()))[:2]
    calibration = {
        seed: next(iter(DigitScenes(args.calibration, args.calibration, seed=seed).train_dataloader()))[0]
        for seed in args.seeds
    }
    with tempfile.TemporaryDirectory() as folder:
        graphs: dict[tuple[str, str], list[Path]] = {}
        for name, source in exported(Path(folder), args.keep_ratio).items():
            graphs |= quantised(name, source, calibration)
        runs = {key: [session(path, args.threads) for path in paths] for key, paths in graphs.items()}
        sizes = {key: paths[0].stat().st_size / 1e6 for key, paths in graphs.items()}
        given = {key: [classes(run, images) for run in some] for key, some in runs.items()}
        fastest = {key: some[0] for key, some in runs.items()}
        ratios = [times(fastest, images[:batch], args) for batch in args.batches]
    print(
        "\n| model | graph | accuracy | class of float32 | MB |" + "".join(f" time, batch {b} |" for b in args.batches)
    )
    print("|---|---|---|---|---|" + "---|" * len(args.batches))
    for number, (name, how) in enumerate(graphs):
        right = [100 * float((some == labels).float().mean()) for some in given[name, how]]
        same = [100 * float((some == given[name, "float32"][0]).float().mean()) for some in given[name, how]]
        row = [name, how, f"{spread(right)} %", f"{spread(same)} %", f"{sizes[name, how]:.2f}"]
        print(f"| {' | '.join([*row, *(f'{ratio[number]:.2f}' for ratio in ratios)])} |")


if __name__ == "__main__":
    main()
