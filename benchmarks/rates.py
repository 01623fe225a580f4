"""At which rate does what a pruner brings learn? Pruners beside the dense model trained as long, on a folder of images.

    python benchmarks/rates.py --root DIR --weights FILE                            dense, and dynamicvit as it comes
    python benchmarks/rates.py --root DIR --weights FILE --scales 1 10 30 100       a search of TokenPruning's lr_scale
    python benchmarks/rates.py --root DIR --weights FILE --methods dense hvt ia_red2

FILE holds pretrained weights under timm's names. A dense model is fine-tuned from them once, with a new classifier
(OUT/dense.safetensors, which may be put there beforehand); from it every row trains as long as every other, the dense
ones too, by the recipe of configs/imagefolder, and is tested on all of DIR/val. Seeds draw batches, crops and what is
new. Rows that OUT/rates.csv holds already are skipped, so an interrupted run goes on. Written: rates.csv and rates.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from measure import append, fit, read_rows, start
from tqdm import tqdm

import prunex
from prunex.callbacks import TokenPruning
from prunex.pruners.base import accepted
from prunex.recipes import ImageClassifier, ImageFolder
from prunex.recipes.modules.backbone import SaveWeights
from prunex.recipes.runs import evaluate
from prunex.registry import lookup

DENSE = "dense"
DEFAULT = "default"  # lr_scale=None
FIELDS = ("method", "lr_scale", "seed", "epochs", "batch", "learning_rate", "accuracy", "share")
KEY = FIELDS[:6]


def folder(args: argparse.Namespace) -> ImageFolder:
    return ImageFolder(args.root, image_size=args.image_size, batch_size=args.batch, masks=None)


def classifier(args: argparse.Namespace, weights: Path) -> ImageClassifier:
    """As configs/imagefolder has it."""
    return ImageClassifier(
        args.architecture,
        folder(args).num_classes,
        {"img_size": args.image_size},
        weights=str(weights),
        learning_rate=args.learning_rate,
        head_lr_scale=30.0,
        warmup=0.1,
        label_smoothing=0.1,
    )


def row(key: tuple[str, ...], dense: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train and test one model."""
    method, scale, seed = key[:3]
    lightning.seed_everything(int(seed), verbose=False)
    module = classifier(args, dense)
    whole, callbacks = prunex.cost(module.model).macs, []
    if method != DENSE:
        ratio = args.keep_ratio if "keep_ratio" in accepted(lookup("pruner", method).make) else None
        callbacks.append(TokenPruning(method, keep_ratio=ratio, lr_scale=None if scale == DEFAULT else float(scale)))
    fit(module, folder(args), callbacks, args.epochs, args.device)
    images = folder(args).test_dataloader()
    if method != DENSE and prunex.attached(module.model).pruner.count == "adaptive":
        prunex.attached(module.model).calibrate(batch[0] for batch in images)
    model = prunex.slim(module).cpu()
    share = prunex.cost(model).macs / whole
    found = {"accuracy": round(evaluate(model, images)["accuracy"], 5), "share": round(share, 5)}
    return {**dict(zip(KEY, key, strict=True)), **found}


def table(rows: Sequence[dict[str, str]], images: int) -> str:
    """Means over seeds and their standard errors; what is lost to the dense model is compared seed by seed."""
    dense = {r["seed"]: float(r["accuracy"]) for r in rows if r["method"] == DENSE}
    lines = [
        "| method | lr_scale | seeds | of dense MACs | accuracy | of one model's images | lost to dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, scale in dict.fromkeys((r["method"], r["lr_scale"]) for r in rows):
        same = [r for r in rows if (r["method"], r["lr_scale"]) == (method, scale)]
        accuracy = [float(r["accuracy"]) for r in same]
        lost = [dense[r["seed"]] - float(r["accuracy"]) for r in same if r["seed"] in dense and method != DENSE]
        mean, share = statistics.mean(accuracy), statistics.mean(float(r["share"]) for r in same)
        noise = math.sqrt(mean * (1 - mean) / images)
        lines.append(
            f"| {method} | {scale} | {len(same)} | {100 * share:.1f} % | **{points(accuracy)} %** "
            f"| ± {100 * noise:.1f} | {points(lost) if lost else ''} |"
        )
    return "\n".join(lines)


def points(values: Sequence[float]) -> str:
    """Mean of shares in per cent, and its standard error where there are several."""
    error = f" ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{error}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--root", type=Path, required=True, help="folder with train/<class>/ and val/<class>/")
    made.add_argument("--weights", type=Path, required=True, help="safetensors file with timm's names")
    made.add_argument("--architecture", default="vit_small_patch14_dinov2", help="timm's name")
    made.add_argument("--image-size", type=int, default=224, help="pixels a side")
    made.add_argument("--out", type=Path, default=Path("runs/rates"), help="folder to write to")
    made.add_argument("--methods", nargs="+", default=[DENSE, "dynamicvit"], help="dense, and pruners of tokens")
    made.add_argument("--scales", nargs="+", default=[DEFAULT], help="of each pruner: numbers, or 'default'")
    made.add_argument("--keep-ratio", type=float, default=0.7, help="of pruners that have one")
    made.add_argument("--learning-rate", type=float, default=3e-5, help="the module's")
    made.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    made.add_argument("--start-epochs", type=int, default=3, help="of the dense model that all rows start from")
    made.add_argument("--epochs", type=int, default=3, help="of every row")
    made.add_argument("--batch", type=int, default=16, help="images in a step")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    made.set_defaults(clock="wall")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    start(args)
    args.out.mkdir(parents=True, exist_ok=True)
    dense, path = args.out / "dense.safetensors", args.out / "rates.csv"
    if not dense.is_file():
        lightning.seed_everything(0, verbose=False)
        save = SaveWeights(str(dense))
        fit(classifier(args, args.weights), folder(args), [save], args.start_epochs, args.device)
    common = (str(args.epochs), str(args.batch), f"{args.learning_rate:g}")
    pairs = [(m, s) for m in args.methods for s in (["1"] if m == DENSE else args.scales)]
    wanted = [(method, scale, seed, *common) for seed in args.seeds for method, scale in pairs]
    with tqdm(wanted, unit="model") as bar:
        for key in bar:
            bar.set_postfix_str(f"{key[0]}, lr_scale {key[1]}, seed {key[2]}")
            if key not in {tuple(r[k] for k in KEY) for r in read_rows(path)}:
                append(path, FIELDS, row(key, dense, args))
    rows = [r for r in read_rows(path) if tuple(r[k] for k in KEY) in wanted]
    images = len(folder(args).test_dataloader().dataset)
    (args.out / "rates.md").write_text(f"{table(rows, images)}\n")
    print(f"\n{table(rows, images)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
