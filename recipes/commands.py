"""The subcommands beside Lightning's: explain, export, bench, report, methods."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

import prunex
from prunex.errors import PrunexError
from prunex.pictures import from_tensor, relevancy_mosaic, save_png
from prunex.recipes.report import write_report
from prunex.recipes.runs import compare, instantiate, open_data, open_model, read_run, table, write_summary
from prunex.registry import lookup
from prunex.vit.anatomy import find, read


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours: one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise PrunexError(f"{self.prog}: {message}; see {self.prog} --help")


def methods(arguments: Sequence[str]) -> int:
    """``prunex methods``: every method, its paper and what it needs."""
    _Parser("prunex methods", description="Every method by name.").parse_args(arguments)
    for m in prunex.methods():
        print(f"{m.kind:<10} {m.name:<18} {m.paper:<52} {m.needs}")
    return 0


def report(arguments: Sequence[str]) -> int:
    """``prunex report RUN``: report.html from what the run wrote."""
    parser = _Parser("prunex report", description="Write report.html from what a run folder holds.")
    parser.add_argument("run")
    print(write_report(parser.parse_args(arguments).run))
    return 0


def export(arguments: Sequence[str]) -> int:
    """``prunex export RUN``: a checked graph of the slim model."""
    parser = _Parser("prunex export", description="Write the slim model of a run (or slim folder) as a checked graph.")
    parser.add_argument("run", help="run folder, slim folder or checkpoint")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx")
    parser.add_argument("--out", help="file to write; default model.<format> beside the slim model")
    parser.add_argument("--kept", action="store_true", help="also return the kept-token map")
    args = parser.parse_args(arguments)
    model = open_model(args.run)
    where = Path(args.run)
    folder = (
        where if (where / "config.json").is_file() else (where.parent.parent if where.is_file() else where) / "slim"
    )
    print(prunex.export(model, args.out or folder / f"model.{args.format}", kept=args.kept))
    return 0


def bench(arguments: Sequence[str]) -> int:
    """``prunex bench RUN``: accuracy, cost and measured speed, dense beside slim."""
    parser = _Parser("prunex bench", description="Accuracy, MACs, parameters and images/s, dense beside slim.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--batches", type=int, default=None, help="validation batches to look at; default all")
    args = parser.parse_args(arguments)
    config = read_run(args.run)
    slim = open_model(args.run)
    module = instantiate(nn.Module, config["model"])
    dense = find(module)[1].eval()
    pruning = prunex.attached(slim)
    name = "trained" if pruning is None else pruning.method
    batches = open_data(args.run).val_dataloader()
    summary = compare({"dense (start)": dense, name: slim}, batches, limit=args.batches)
    write_summary(args.run, summary)
    print(table(summary["rows"]))
    print(f"({summary['machine']})")
    return 0


def explain(arguments: Sequence[str]) -> int:
    """``prunex explain RUN --images DIR``: maps and pictures for one's own images."""
    parser = _Parser("prunex explain", description="Explain a trained model's predictions on your own images.")
    parser.add_argument("run", help="run folder, slim folder or checkpoint")
    parser.add_argument("--images", required=True, help="folder of images (or one image)")
    parser.add_argument("--methods", default="all", help="names with commas between, or all")
    parser.add_argument("--target", type=int, default=None, help="class index; default the predicted class")
    parser.add_argument("--out", default="explained", help="folder for the pictures and maps.npz")
    args = parser.parse_args(arguments)
    model = open_model(args.run)
    known = [m.name for m in prunex.methods("explainer")]
    names = known if args.methods == "all" else [n.strip() for n in args.methods.split(",")]
    for name in names:
        lookup("explainer", name)
    files = image_files(Path(args.images))
    out = Path(args.out)
    prepare, mean, std = preprocessing(model)
    labels = list(getattr(model, "label_names", []) or [])
    maps: dict[str, list[np.ndarray]] = {n: [] for n in names}
    predicted: list[int] = []
    for file in tqdm(files, desc="images", unit="image"):
        image = prepare(read_image(file))[None]
        found = {n: prunex.explain(n, model, image, args.target) for n in names}
        first = next(iter(found.values()))
        predicted.append(int(first.logits.argmax()))
        for n, e in found.items():
            maps[n].append(e.maps[0].numpy())
        picture = relevancy_mosaic(
            np.asarray(from_tensor(image, mean, std)),
            {n: e.maps.numpy() for n, e in found.items()},
            first.trace.kept().numpy() if first.trace.stages else None,
            {n: e.target.numpy() for n, e in found.items()},
            predicted=predicted[-1:],
            class_names=labels or None,
            title=file.name,
            side=224,
        )
        out.mkdir(parents=True, exist_ok=True)
        save_png(out / f"{file.stem}.png", picture)
    arrays = {n: np.stack(m) for n, m in maps.items()}
    np.savez_compressed(out / "maps.npz", files=[f.name for f in files], predicted=predicted, **arrays)  # type: ignore[arg-type]
    print(out)
    return 0


def image_files(path: Path) -> list[Path]:
    """The images of a folder, sorted, or one image.

    Raises:
        PrunexError: When there are none.
    """
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS) if path.is_dir() else []
    if not files:
        raise PrunexError(f"no images in {path}: give a folder that holds {', '.join(IMG_EXTENSIONS)} files")
    return files


def read_image(path: Path) -> Image.Image:
    """One image as RGB.

    Raises:
        PrunexError: For a file that is no whole image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise PrunexError(f"{path} is no whole image: {error}") from error


def preprocessing(model: nn.Module) -> tuple[Callable[[Image.Image], Tensor], Sequence[float], Sequence[float]]:
    """How images become the model's input, and the mean and std they are normalised with."""
    a = read(model)
    known = getattr(model, "pretrained_cfg", None) or {}
    mean, std = known.get("mean", (0.5,) * 3), known.get("std", (0.5,) * 3)
    steps = [v2.Resize(min(a.image), antialias=True), v2.CenterCrop(a.image), v2.ToImage()]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])
    return transform, mean, std


# name -> (one line of help, function of the remaining arguments that returns an exit code)
COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "explain": ("maps and pictures of a trained model for one's own images", explain),
    "export": ("the slim model as a checked ONNX or torch.export graph", export),
    "bench": ("accuracy, MACs, parameters and images/s, dense beside slim", bench),
    "report": ("report.html from what a run wrote", report),
    "methods": ("every pruner and explainer, its paper and what it needs", methods),
}
