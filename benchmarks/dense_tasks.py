"""What pruning costs where every pixel counts: segmentation and detection on the full grid of a pruned ViT.

    python benchmarks/dense_tasks.py --seeds 0 1 2 --epochs 4
    python benchmarks/dense_tasks.py --table dense_tasks.csv      the table of what is there

Scenes of one to three digits (`DigitScenes(task="segmentation")`, `"detection"`). The shipped weights, which know one
digit a scene, are tuned under a new decoder, dense and pruned alike, with as many epochs. On scenes that training never
saw: mean IoU, or COCO's box AP; and the share of the digits' patches that is left after the last stage. MACs are of ViT
and decoder together. Rows that a CSV file holds already are not computed again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from measure import append, fit, read_rows, start

import prunex
from prunex.callbacks import TokenPruning
from prunex.recipes import DetectionModel, DigitScenes, SegmentationModel
from prunex.recipes.runs import evaluate

VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
STAGES = [1, 3, 4]
BLOCKS = [0, 2, 5]  # one before anything leaves, one on the way, and the last
PRUNERS: dict[str, tuple[str, dict[str, Any], float | None]] = {  # method, options, fill
    "dense": ("", {}, None),
    "evit": ("evit", {}, None),
    "evit, not fused": ("evit", {"fuse": False}, None),
    "topk": ("topk", {}, None),
    "topk, zeros": ("topk", {}, 0.0),
    "dynamicvit": ("dynamicvit", {"teacher": False}, None),  # what the dense weights know is another task
}
TASKS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "segmentation": (SegmentationModel, 11, {"upscale": 4}),
    "detection": (DetectionModel, 10, {}),
}
KEY = ("task", "model", "seed", "epochs", "train_size")
FIELDS = (*KEY, "score", "share", "kept")


def train(task: str, name: str, seed: int, args: argparse.Namespace) -> Any:
    """A tuned module, pruned or dense."""
    lightning.seed_everything(seed, verbose=False)
    make, classes, more = TASKS[task]
    method, options, fill = PRUNERS[name]
    module = make(
        "vit_tiny_patch16_224", classes, VIT, weights="digits", blocks=BLOCKS, fill=fill, **more,
        learning_rate=args.learning_rate, head_lr_scale=args.head_lr_scale,
    )  # fmt: skip
    pruning = TokenPruning(method, keep_ratio=args.keep_ratio, stages=STAGES, options=options) if method else None
    data = DigitScenes(batch_size=64, train_size=args.train_size, task=task, seed=seed)
    fit(module, data, [] if pruning is None else [pruning], args.epochs, args.device)
    return module.cpu().eval()


def macs(module: Any) -> int:
    """Multiply-adds of ViT and decoder: the decoder's layers are convolutions on the grid."""
    decoder = [p for name, p in module.named_parameters() if not name.startswith("model.") and p.ndim == 4]
    gh, gw = module.model.patch_embed.grid_size
    return prunex.cost(module.model).macs + gh * gw * sum(p.numel() for p in decoder)


def work(path: Path, args: argparse.Namespace) -> None:
    """Compute what the file does not hold yet."""
    shape = {"epochs": args.epochs, "train_size": args.train_size}
    for seed in args.seeds:
        for task in args.tasks:
            for name in args.models:
                row: dict[str, Any] = {"task": task, "model": name, "seed": seed, **shape}
                if tuple(str(v) for v in row.values()) in {tuple(r[key] for key in KEY) for r in read_rows(path)}:
                    continue
                module = train(task, name, seed, args)
                test = DigitScenes(batch_size=50, val_size=args.val_size, task=task, seed=seed)
                measured = evaluate(module, test.test_dataloader())
                row |= {"score": measured[module.score], "kept": measured.get("kept_digit_cover", 1.0)}
                pruned, pruning = macs(module), prunex.attached(module)
                if pruning is not None:
                    pruning.detach()
                row["share"] = pruned / macs(module)
                append(path, FIELDS, {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
                print(row, flush=True)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Means over seeds, lowest and highest, and the difference to the dense model of the same seed."""
    lines = [
        "| task | model | of dense MACs | digit patches left | score | lowest to highest seed | to dense, by seed |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = {(row["task"], row["seed"]): float(row["score"]) for row in rows if row["model"] == "dense"}
    for task, name in dict.fromkeys((row["task"], row["model"]) for row in rows):
        some = [row for row in rows if (row["task"], row["model"]) == (task, name)]
        values = [100 * float(row["score"]) for row in some]
        points = [
            f"{v - 100 * dense[task, r['seed']]:+.1f}"
            for v, r in zip(values, some, strict=True)
            if (task, r["seed"]) in dense
        ]
        share, kept = (100 * statistics.mean(float(row[key]) for row in some) for key in ("share", "kept"))
        lines.append(
            f"| {task} | {name} | {share:.1f} % | {kept:.1f} % | **{statistics.mean(values):.1f} %** "
            f"| {min(values):.1f} to {max(values):.1f} | {', '.join(points) if name != 'dense' else ''} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dense_tasks.csv"))
    parser.add_argument("--table", type=Path, help="print the table of this file alone")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--models", nargs="+", default=list(PRUNERS), choices=list(PRUNERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train-size", type=int, default=3200)
    parser.add_argument("--val-size", type=int, default=1000)
    parser.add_argument("--keep-ratio", type=float, default=0.7)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--head-lr-scale", type=float, default=10.0, help="the decoder starts from nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(device="cpu", clock="wall")
    args = parser.parse_args(arguments)
    if args.table is None:
        start(args)
        work(args.out, args)
    print("\n" + table(read_rows(args.table or args.out)))


if __name__ == "__main__":
    main()
