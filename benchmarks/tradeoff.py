"""Accuracy against multiply-adds of every pruner at equal budgets, on digit scenes, from the shipped ViT.

    python benchmarks/tradeoff.py --epochs 2                      every pruner, five budgets, three seeds
    python benchmarks/tradeoff.py --epochs 0 --val-size 1000      untrained: what methods do to a dense model
    python benchmarks/tradeoff.py --methods xpruner taylor evit+xpruner --budgets 0.5 --epochs 8   heads, channels

Every row trains the same number of epochs on the same scenes (dense too) and is then tested on others; seeds draw other
scenes and other initial predictors. A method without a rate that a budget can set takes part at each of its settings.
Rows that OUT/tradeoff.csv holds already are skipped, so an interrupted run goes on. Written: tradeoff.csv (a row a
training), speed.csv (all models side by side in one process), tradeoff.png, speed.png and tradeoff.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from measure import append, fit, read_rows, side_by_side, start
from torch import nn
from tqdm import tqdm

import prunex
from prunex.callbacks import MaskPruning, TokenPruning
from prunex.errors import PrunexError
from prunex.pictures import curves, save_png
from prunex.pruners.base import accepted
from prunex.recipes import DigitScenes, ImageClassifier
from prunex.recipes.runs import evaluate
from prunex.registry import lookup
from prunex.units.base import UnitPruner
from prunex.vit.anatomy import read

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
STAGES = [1, 3, 4]  # as the shipped configurations have them
EVERY_BLOCK = {"tome", "diffrate"}  # shrink a little in every block, as published: stages are not for them
# How a method is trained where that is not as the rest: the recipes of the shipped configurations.
RECIPES: dict[str, dict[str, Any]] = {
    "dynamicvit": {"learning_rate": 1e-3, "backbone_lr_scale": 0.1},
    "diffrate": {"learning_rate": 0.1, "backbone_lr_scale": None},  # its rates alone: the weights stay
}
# Where a method without a rate finds its own counts: the settings it takes part at.
POINTS: dict[str, list[dict[str, Any]]] = {
    "patch_slimming": [{"tolerance": t, "calibration_images": 512} for t in (0.02, 0.05, 0.1)],
}
DENSE = "dense"
DECIDE = {"xpruner": {"masks": 0.25, "thresholds": 0.125}}  # the others are told to start when xpruner has decided
LATER: dict[str, float] = {"start": 0.375}
FIELDS = (
    "method", "setting", "seed", "epochs", "train_size", "val_size", "share", "mmacs", "accuracy", "object_kept",
)  # fmt: skip
KEY = FIELDS[:6]

Setting = tuple[str, dict[str, Any]]  # what it is called, and the options for TokenPruning or attach


def classifier(**more: Any) -> ImageClassifier:
    return ImageClassifier(
        ARCHITECTURE, 10, MODEL_ARGS, weights="digits", **{"learning_rate": 3e-4, "warmup": 0.05, **more}
    )


def settings(
    method: str, budgets: Sequence[float], keep_ratios: Sequence[float] | None, stages: Sequence[int]
) -> list[Setting]:
    """At which points a method takes part: budgets, keep ratios, or its own settings where it has no rate."""
    if method == DENSE:
        return [("1", {})]
    if units_of(method):
        return [(f"budget {budget:g}", {"budget": budget}) for budget in budgets]
    model = classifier().model
    takes = accepted(lookup("pruner", method).make)
    staged = stages and "stages" in takes and method not in EVERY_BLOCK
    common: dict[str, Any] = {"stages": list(stages)} if staged else {}
    if keep_ratios is not None and "keep_ratio" in takes:
        return [(f"keep_ratio {r:g}", {**common, "keep_ratio": r}) for r in keep_ratios]
    found = []
    for budget in budgets:
        try:
            prunex.attach(model, method, budget=budget, **common).detach()
        except PrunexError as error:
            if "has no rate" in str(error):
                break
            print(f"{method} leaves out budget {budget:g}: {error}")
            continue
        found.append((f"budget {budget:g}", {**common, "budget": budget}))
    else:
        return found
    own = POINTS.get(method) or lookup("pruner", method).make.settings(read(model))  # type: ignore[attr-defined]
    if not own:
        print(f"{method} is left out: it has neither a rate nor settings")
    if "pool_width" in takes:
        common = {}  # it says the stages
    return [(", ".join(f"{k} {v}" for k, v in one.items()), {**common, **one}) for one in own]


def units_of(method: str) -> str | None:
    """The unit pruner in a method's name, or None."""
    name = method.rsplit("+", 1)[-1]
    make: Any = None if name == DENSE else lookup("pruner", name).make
    return name if make is not None and issubclass(make, UnitPruner) else None


def unit_callbacks(method: str, budget: float, tokens: float) -> list[Any]:
    """The callbacks of a unit pruner, and of the token pruner beside it."""
    units = units_of(method) or ""
    masks: Any = DECIDE.get(units, LATER)
    found: list[Any] = [MaskPruning(units, budget=budget, **masks)]
    if "+" in method:
        found.append(TokenPruning(method.split("+")[0], budget=tokens, stages=STAGES))
    return found


def train(method: str, setting: Setting, seed: int, args: argparse.Namespace) -> nn.Module:
    """The slim model of one method at one setting."""
    lightning.seed_everything(seed, verbose=False)
    recipe = dict(RECIPES.get(method, {}))
    if args.learning_rate is not None:
        recipe["learning_rate"] = args.learning_rate
    scale = recipe.pop("backbone_lr_scale", 1.0)
    module = classifier(**recipe)
    options = dict(setting[1])
    if args.epochs == 0:
        if units_of(method):
            raise SystemExit(f"{method} prunes units: give it some epochs")
        if method != DENSE:
            calibrated(prunex.attach(module, method, **options))
        return prunex.slim(module)
    callbacks: list[Any] = []
    if units_of(method):
        callbacks = unit_callbacks(method, options["budget"], args.token_budget)
    elif method != DENSE:
        own = {k: options.pop(k) for k in ("keep_ratio", "stages", "budget") if k in options}
        # All at the rate that was tuned for the model: what methods bring gets no other one.
        callbacks.append(TokenPruning(method, options=options, backbone_lr_scale=scale, lr_scale=1.0, **own))
    scenes = DigitScenes(batch_size=64, train_size=args.train_size, seed=seed)
    fit(module, scenes, callbacks, args.epochs, args.device)
    return prunex.slim(module).cpu()


def row(method: str, setting: Setting, seed: int, dense: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train, test and count one model."""
    model = train(method, setting, seed, args)
    scenes = DigitScenes(batch_size=125, val_size=args.val_size, seed=seed).test_dataloader()
    found, macs = evaluate(model, scenes), prunex.cost(model).macs
    return {
        "method": method,
        "setting": setting[0],
        "seed": seed,
        "epochs": args.epochs,
        "train_size": args.train_size,
        "val_size": args.val_size,
        "share": round(macs / dense, 5),
        "mmacs": round(macs / 1e6, 4),
        "accuracy": round(found["accuracy"], 5),
        "object_kept": round(found["kept_digit_cover"], 5) if "kept_digit_cover" in found else "",
    }


def calibrated(pruning: prunex.Pruning) -> None:
    """Show a method that looks at images before it decides the first training scenes."""
    if pruning.pruner.needs_calibration:
        pruning.calibrate(images for images, *_ in DigitScenes(batch_size=64).train_dataloader())


def measure(points: Sequence[tuple[str, Setting]], args: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Images a second as a multiple of the dense model's, of all models side by side (time depends on shapes alone)."""
    points = [p for p in points if not units_of(p[0])]  # their widths come from training: benchmarks/slim.py times some
    path = args.out / "speed.csv"
    known = {(r["method"], r["setting"]): float(r["speed_up"]) for r in read_rows(path)}
    if all((method, name) in known for method, (name, _) in points):
        return known
    models: dict[tuple[str, str], nn.Module] = {}
    for method, (name, options) in [(DENSE, ("1", {})), *(p for p in points if p[0] != DENSE)]:
        model = classifier().model
        if method != DENSE:
            calibrated(prunex.attach(model, method, **options))
        models[method, name] = prunex.slim(model).to(args.device)
    images = torch.randn(args.batch, 3, *models[DENSE, "1"].patch_embed.img_size, device=args.device)

    def forward(model: nn.Module) -> Any:
        def call() -> object:
            with torch.inference_mode():
                return model(images)

        return call

    contestants = [(f"{method}|{name}", forward(model)) for (method, name), model in models.items()]
    timings = side_by_side(contestants, args.device, args.repeats, args.seconds, args.clock)
    path.unlink(missing_ok=True)
    for key, timing in zip(models, timings, strict=True):
        known[key] = round(1 / statistics.median(timing.ratios), 4)  # as the file holds it: read again, the same table
        values = {
            "method": key[0],
            "setting": key[1],
            "images_per_s": round(1e3 * args.batch / statistics.median(timing.own), 1),
            "speed_up": known[key],
        }
        append(path, tuple(values), values)
    return known


def summarise(rows: Sequence[dict[str, str]], speeds: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of each method at each setting, in the order of the rows."""
    points: dict[tuple[str, str], list[dict[str, str]]] = {}
    for r in rows:
        points.setdefault((r["method"], r["setting"]), []).append(r)
    found = []
    for (method, setting), same in points.items():
        accuracy = [float(r["accuracy"]) for r in same]
        kept = [float(r["object_kept"]) for r in same if r["object_kept"] != ""]
        found.append(
            {
                "method": method,
                "setting": setting,
                "seeds": len(same),
                "share": statistics.mean(float(r["share"]) for r in same),
                "mmacs": statistics.mean(float(r["mmacs"]) for r in same),
                "accuracy": statistics.mean(accuracy),
                "low": min(accuracy),
                "high": max(accuracy),
                "kept": statistics.mean(kept) if kept else None,
                "speed_up": speeds.get((method, setting)),
            }
        )
    return sorted(found, key=lambda p: (p["method"] != DENSE, p["method"], -p["share"]))


def table(points: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| method | setting | MMACs | of dense | accuracy | lowest to highest seed | object kept | images/s to dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        kept = "" if p["kept"] is None else f"{100 * p['kept']:.1f} %"
        speed = "" if p["speed_up"] is None else f"{p['speed_up']:.2f}x"
        spread = f"{100 * p['low']:.1f} to {100 * p['high']:.1f} %"
        lines.append(
            f"| {p['method']} | {p['setting']} | {p['mmacs']:.1f} | {100 * p['share']:.1f} % "
            f"| **{100 * p['accuracy']:.1f} %** | {spread} | {kept} | {speed} |"
        )
    return "\n".join(lines)


def draw(points: Sequence[dict[str, Any]], by: str, scale: float, xlabel: str, title: str, path: Path) -> None:
    """Accuracy over the cost or the speed: a line a method, from the dense model on, and the spread over seeds."""
    dense = [p for p in points if p["method"] == DENSE]
    lines, bands = {}, {}
    for method in dict.fromkeys(p["method"] for p in points if p["method"] != DENSE):
        own = [p for p in dense + [p for p in points if p["method"] == method] if p[by] is not None]
        own.sort(key=lambda p: p["share"])
        x = [scale * p[by] for p in own]
        lines[method] = (x, [p["accuracy"] for p in own])
        bands[method] = ([p["low"] for p in own], [p["high"] for p in own])
    if lines:
        save_png(path, curves(lines, title, percent=True, xlabel=xlabel, size=(760, 460), bands=bands))


def many(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs/tradeoff"), help="folder to write to")
    made.add_argument("--methods", nargs="+", help="pruners; default: all that prune tokens")
    made.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5], help="of the dense MACs")
    made.add_argument(
        "--keep-ratios", type=float, nargs="+", help="these instead of budgets, for methods with the option"
    )
    made.add_argument(
        "--token-budget", type=float, default=0.65, help="of TOKENS+UNITS: what tokens alone are pruned to"
    )
    made.add_argument(
        "--stages",
        type=int,
        nargs="*",
        default=STAGES,
        help="blocks that shrink; none: each method's own. tome, diffrate: every block",
    )
    made.add_argument("--pruned-only", action="store_true", help="leave the dense model out")
    made.add_argument("--learning-rate", type=float, help="of every method; None: each one's own")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--epochs", type=int, default=2, help="0: untrained")
    made.add_argument("--train-size", type=int, default=4800, help="scenes an epoch")
    made.add_argument("--val-size", type=int, default=2000, help="scenes tested on")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; 1 on a busy machine")
    made.add_argument("--batch", type=int, default=32, help="images in a timed forward")
    made.add_argument("--repeats", type=int, default=0, help="timed rounds; 0: as many as fit into --seconds")
    made.add_argument("--seconds", type=float, default=20.0, help="for timing; 0: as few rounds as make a median")
    made.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time, with --threads 1")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    start(args)
    args.out.mkdir(parents=True, exist_ok=True)
    methods = args.methods or [m.name for m in prunex.methods("pruner") if not units_of(m.name)]
    methods = methods if args.pruned_only else [DENSE, *methods]
    points = [(m, s) for m in methods for s in settings(m, args.budgets, args.keep_ratios, args.stages)]
    path = args.out / "tradeoff.csv"
    done = {tuple(r[k] for k in KEY) for r in read_rows(path)}
    dense = prunex.cost(classifier().model).macs
    wanted = [(m, s, seed) for seed in args.seeds for m, s in points]
    with tqdm(wanted, unit="model") as bar:
        for method, setting, seed in bar:
            key = (method, setting[0], str(seed), str(args.epochs), str(args.train_size), str(args.val_size))
            bar.set_postfix_str(f"{method}, {setting[0]}, seed {seed}")
            if key not in done:
                append(path, FIELDS, row(method, setting, seed, dense, args))
    mine = {(m, s[0]) for m, s in points}
    sizes = {"epochs": args.epochs, "train_size": args.train_size, "val_size": args.val_size}
    rows = [
        r
        for r in read_rows(path)
        if (r["method"], r["setting"]) in mine
        and int(r["seed"]) in args.seeds
        and all(int(r[k]) == v for k, v in sizes.items())
    ]
    found = summarise(rows, measure(points, args))
    how = f"{many(args.epochs, 'epoch')} of {args.train_size} scenes" if args.epochs else "untrained"
    title = f"Digit scenes, {how}, {many(len(args.seeds), 'seed')}"
    draw(found, "share", 100, "multiply-adds of an image, % of the dense model's", title, args.out / "tradeoff.png")
    draw(found, "speed_up", 100, "images a second, % of the dense model's", title, args.out / "speed.png")
    (args.out / "tradeoff.md").write_text(f"{title}, {args.val_size} scenes tested on\n\n{table(found)}\n")
    print(f"\n{table(found)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
