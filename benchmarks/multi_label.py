"""What pruning costs where an image has several labels, and whether each label's map lies on its own object.

    python benchmarks/multi_label.py --seeds 0 1 2 --epochs 2
    python benchmarks/multi_label.py --table multi_label.csv      the tables of what is there

Scenes of two digits (`DigitScenes(task="several")`). The shipped weights, which know one digit a scene, are tuned by
binary cross-entropy, dense and pruned alike, with as many epochs. On scenes that training never saw: mean average
precision; of each label that is there, the share of its map's positive energy inside its own digit's mask, inside the
other digit's, and how often the first is larger. Rows that a CSV file holds already are not computed again.
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
from prunex.metrics import energy_inside
from prunex.recipes import DigitScenes, ImageClassifier
from prunex.recipes.runs import evaluate
from prunex.targets import MultiLabel

VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
STAGES = [1, 3, 4]
EXPLAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rollout": ("rollout", {}),
    "generic_attention": ("generic_attention", {}),
    "tokentm": ("tokentm", {}),
    "grad_cam": ("grad_cam", {}),
    "partial_lrp": ("partial_lrp", {}),
    "transformer_attribution": ("transformer_attribution", {}),
    "lrp, zplus": ("lrp", {"rule": "zplus"}),
    "lrp, attnlrp": ("lrp", {"rule": "attnlrp"}),
    "lrp, cplrp": ("lrp", {"rule": "cplrp"}),
    "atman": ("atman", {}),
    "shap, 2 pairs": ("shap", {"budget": 2 + 2 * 2 * 63, "output": "logit"}),
}
DEAR = ("atman", "shap, 2 pairs")  # of fewer scenes
MODELS = ("dense", "evit", "dynamicvit")
KEY = ("model", "seed", "epochs", "explainer")
FIELDS = (*KEY, "map", "share", "own", "other", "right", "scenes")


def train(model: str, seed: int, args: argparse.Namespace) -> Any:
    """A tuned module, pruned or dense."""
    lightning.seed_everything(seed, verbose=False)
    module = ImageClassifier(
        "vit_tiny_patch16_224", 10, VIT, weights="digits", task="multi_label", learning_rate=args.learning_rate
    )
    # What the dense weights know before they are tuned is another task: they teach nothing here.
    options: dict[str, Any] = {"options": {"teacher": False}} if model == "dynamicvit" else {}
    callbacks = [] if model == "dense" else [TokenPruning(model, keep_ratio=args.keep_ratio, stages=STAGES, **options)]
    data = DigitScenes(batch_size=64, train_size=args.train_size, task="several", seed=seed)
    fit(module, data, callbacks, args.epochs, args.device)
    return prunex.slim(module).cpu()


def locate(model: Any, method: str, options: dict[str, Any], data: DigitScenes, scenes: int) -> dict[str, float]:
    """Energy of each label's map on its own digit and on the other one."""
    own: list[float] = []
    other: list[float] = []
    for images, labels, _, more in data.test_dataloader():
        for image, there, masks in zip(images, labels, more["label_masks"], strict=True):
            shown = there.nonzero()[:, 0].tolist()
            maps = prunex.explain(method, model, image[None], MultiLabel(shown), **options)
            inside = {
                (a, b): energy_inside(e.pixels.float(), masks[b][None]).item()
                for a, e in zip(shown, maps, strict=True)
                for b in shown
            }
            own += [inside[label, label] for label in shown]
            other += [inside[a, b] for a, b in (shown, shown[::-1])]
            if len(own) >= 2 * scenes:
                break
        if len(own) >= 2 * scenes:
            break
    pairs = [(a, b) for a, b in zip(own, other, strict=True) if a == a and b == b]
    return {
        "own": statistics.mean(a for a, _ in pairs),
        "other": statistics.mean(b for _, b in pairs),
        "right": statistics.mean(a > b for a, b in pairs),
        "scenes": len(own) // 2,
    }


def work(path: Path, args: argparse.Namespace) -> None:
    """Compute what the file does not hold yet."""
    shape = {"epochs": args.epochs}
    for seed in args.seeds:
        for name in args.models:
            have = {tuple(row[key] for key in KEY) for row in read_rows(path)}
            wanted = [e for e in ("", *args.explainers) if (name, str(seed), str(args.epochs), e) not in have]
            if not wanted:
                continue
            model = train(name, seed, args)
            test = DigitScenes(batch_size=50, val_size=args.val_size, task="several", seed=seed)
            for explainer in wanted:
                row: dict[str, Any] = {"model": name, "seed": seed, **shape, "explainer": explainer}
                if explainer:
                    method, options = EXPLAINERS[explainer]
                    count = args.scenes // 4 if explainer in DEAR else args.scenes
                    row |= locate(model, method, options, test, count)
                else:
                    dense = ImageClassifier("vit_tiny_patch16_224", 10, VIT).model
                    row["map"] = evaluate(model, test.test_dataloader())["map"]
                    row["share"] = prunex.cost(model).macs / prunex.cost(dense).macs
                append(path, FIELDS, {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
                print(row, flush=True)


def tables(rows: Sequence[dict[str, str]]) -> str:
    """Means over seeds, lowest and highest where it is the result itself."""
    lines = [
        "| model | of dense MACs | mAP | lowest to highest seed | to dense, seed by seed |",
        "|---|---|---|---|---|",
    ]
    scored = [row for row in rows if not row["explainer"]]
    dense = {row["seed"]: float(row["map"]) for row in scored if row["model"] == "dense"}
    for name in dict.fromkeys(row["model"] for row in scored):
        some = [row for row in scored if row["model"] == name]
        values = [100 * float(row["map"]) for row in some]
        points = [f"{v - 100 * dense[r['seed']]:+.1f}" for v, r in zip(values, some, strict=True) if r["seed"] in dense]
        share = 100 * statistics.mean(float(row["share"]) for row in some)
        lines.append(
            f"| {name} | {share:.1f} % | **{statistics.mean(values):.1f} %** | {min(values):.1f} to {max(values):.1f} "
            f"| {', '.join(points) if name != 'dense' else ''} |"
        )
    lines += [
        "",
        "| explainer | model | on its own digit | on the other | own above other | scenes |",
        "|---|---|---|---|---|---|",
    ]
    for explainer, name in dict.fromkeys((row["explainer"], row["model"]) for row in rows if row["explainer"]):
        some = [row for row in rows if (row["explainer"], row["model"]) == (explainer, name)]
        own, other, right = (
            100 * statistics.mean(float(row[key]) for row in some) for key in ("own", "other", "right")
        )
        count = sum(int(row["scenes"]) for row in some)
        lines.append(f"| {explainer} | {name} | **{own:.1f} %** | {other:.1f} % | {right:.1f} % | {count} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("multi_label.csv"))
    parser.add_argument("--table", type=Path, help="print the tables of this file alone")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--explainers", nargs="*", default=list(EXPLAINERS), choices=list(EXPLAINERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-size", type=int, default=4800)
    parser.add_argument("--val-size", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=100, help="explained, of each seed")
    parser.add_argument("--keep-ratio", type=float, default=0.7)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(device="cpu", clock="wall")
    args = parser.parse_args(arguments)
    if args.table is None:
        start(args)
        work(args.out, args)
    print("\n" + tables(read_rows(args.table or args.out)))


if __name__ == "__main__":
    main()
