"""Is relevancy worth training the pruner for? Guided against unguided token pruning, several seeds.

    python benchmarks/guidance.py --epochs 2                    dynamicvit and evit, keep 0.7 and 0.5, three seeds
    python benchmarks/guidance.py --run RUN --epochs 1          the same from a dense run on a folder with masks

Trained alike but for the guidance, from the shipped ViT on digit scenes, or from the dense model of a run of prunex fit
on the data of that run (all its validation images are then tested on). On scenes that training never saw: accuracy;
how well the kept set agrees with what the *dense* model rests on, by an explainer that was not trained on (--judge):
chance-corrected overlap and ROC-AUC, 0 and 0.5 by chance; the share of the pruned model's own relevance (--own) that
lies on the object; and the perturbation test of that map on the pruned model by dropping tokens (positive: lower is
better; maximum 90).
With --tune all of that is measured on images of the training split that this training leaves out: to choose a weight.
Rows that OUT/guidance.csv (tuning.csv with --tune) holds already are skipped; OUT is in RUN where there is one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningDataModule
from measure import append, fit, read_rows, start
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from tradeoff import RECIPES, STAGES, classifier

import prunex
from prunex.callbacks import RelevancyGuidance, TokenPruning
from prunex.metrics import agreement, energy_inside, perturbation, perturbation_auc
from prunex.recipes import DigitScenes, ImageClassifier
from prunex.recipes.commands.score_data import spaced
from prunex.recipes.runs import evaluate, instantiate, read_run

HELD_OUT_EVERY = 5  # of the training images of a folder, with --tune
KEY = ("method", "keep_ratio", "weight", "seed", "epochs", "train_size")
MEASURES = ("accuracy", "share", "object_kept", "overlap", "kept_auc", "energy", "positive", "negative")
FIELDS = (*KEY, *MEASURES)


class Digits:
    """Digit scenes and the shipped ViT; a seed draws scenes of its own."""

    def start(self, method: str) -> tuple[ImageClassifier, dict[str, Any]]:
        """The dense module that training starts from, and options of its `TokenPruning`."""
        recipe = dict(RECIPES.get(method, {}))
        scale = recipe.pop("backbone_lr_scale", 1.0)
        return classifier(**recipe), {"stages": STAGES, "backbone_lr_scale": scale}

    def training(self, seed: int, args: argparse.Namespace) -> LightningDataModule:
        """What is trained on."""
        return DigitScenes(batch_size=64, train_size=args.train_size, seed=seed)

    def steps(self, args: argparse.Namespace) -> int | None:
        """At most so many steps an epoch."""
        return None

    def test(self, seed: int, args: argparse.Namespace, batch: int, size: int) -> Iterable[Any]:
        """Batches of images, labels and masks that were not trained on."""
        if args.tune:  # other scenes of the digits and photo parts that are trained on
            return DigitScenes(batch_size=batch, train_size=size, seed=seed + 1000).train_dataloader()
        return DigitScenes(batch_size=batch, val_size=size, seed=seed).test_dataloader()


class Photos:
    """A dense run of ``prunex fit`` on an `ImageFolder` with masks."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.checkpoint = run / "checkpoints" / "last.ckpt"
        self.spec = read_run(run)["data"]

    def start(self, method: str) -> tuple[ImageClassifier, dict[str, Any]]:
        """As for `Digits`."""
        return ImageClassifier.load_from_checkpoint(self.checkpoint, weights=None), {}

    def training(self, seed: int, args: argparse.Namespace) -> LightningDataModule | DataLoader[Any]:
        """What is trained on."""
        if not args.tune:
            return self.data()
        whole: Any = self.data().train_dataloader()
        rest = [i for i in range(len(whole.dataset)) if i % HELD_OUT_EVERY]
        return DataLoader(Subset(whole.dataset, rest), whole.batch_size, shuffle=True, drop_last=True)

    def steps(self, args: argparse.Namespace) -> int | None:
        """At most so many steps an epoch."""
        return max(1, args.train_size // self.spec["init_args"]["batch_size"])

    def data(self, **more: Any) -> LightningDataModule:
        """The run's data, with other options."""
        return instantiate(LightningDataModule, {**self.spec, "init_args": {**self.spec["init_args"], **more}})

    def test(self, seed: int, args: argparse.Namespace, batch: int, size: int) -> Iterable[Any]:
        """Batches of images, labels and masks that were not trained on."""
        if args.tune:
            whole: Any = self.data(augment=False).train_dataloader().dataset
            held = range(0, len(whole), HELD_OUT_EVERY)
            return DataLoader(Subset(whole, [held[i] for i in spaced(len(held), size)]), batch)
        data = self.data(batch_size=batch)
        data.setup("test")
        return itertools.islice(data.test_dataloader(), -(-size // batch))


def train(scenes: Any, method: str, keep_ratio: float, weight: float, seed: int, args: argparse.Namespace) -> Any:
    """A trained module, pruned, guided where the weight is not 0."""
    lightning.seed_everything(seed, verbose=False)
    module, options = scenes.start(method)
    callbacks: list[Any] = [TokenPruning(method, keep_ratio=keep_ratio, **options)]
    if weight > 0:
        callbacks.append(RelevancyGuidance(args.guide, weight=weight, share=args.share))
    data, steps = scenes.training(seed, args), scenes.steps(args)
    fit(module, data, callbacks, args.epochs, args.device, limit_train_batches=steps)
    return module


def measure(scenes: Any, module: Any, dense: Any, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """What became of it, on scenes of the test split."""
    small = prunex.slim(module).cpu()
    found = evaluate(small, scenes.test(seed, args, 125, args.val_size))
    told: dict[str, list[float]] = {name: [] for name in ("overlap", "kept_auc", "energy")}
    hits: dict[str, list[torch.Tensor]] = {"positive": [], "negative": []}
    for images, labels, masks in scenes.test(seed, args, 50, args.explained):
        with torch.no_grad():
            small(images)
        trace = prunex.attached(small).trace  # type: ignore[union-attr]
        judged = agreement(trace, prunex.explain(args.judge, dense, images, labels))
        told["overlap"] += judged["corrected_overlap"].tolist()
        told["kept_auc"] += judged["kept_auc"].tolist()
        own = prunex.explain(args.own, small, images, labels)
        told["energy"] += energy_inside(own.upsample(), masks).tolist()
        for order, rows in hits.items():
            rows.append(perturbation(small, images, own.maps, labels, order=order, removal="drop").hits)  # type: ignore[arg-type]
    areas = {o: float(perturbation_auc(torch.cat(rows).double().mean(0))) for o, rows in hits.items()}
    means = {name: statistics.mean(v for v in values if v == v) for name, values in told.items()}
    return {
        "accuracy": found["accuracy"],
        "share": prunex.cost(small).macs / prunex.cost(dense).macs,
        "object_kept": found["kept_digit_cover"],
        **means,
        **areas,
    }


def table(rows: Sequence[dict[str, str]]) -> str:
    """Mean and spread over seeds."""
    titles = (
        "accuracy | object kept | overlap with the dense map | kept AUC | own energy on object | positive | negative"
    )
    lines = [f"| method | keep ratio | guidance | MACs | {titles} |", "|" + "---|" * 11]
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in KEY[:3]), []).append(row)
    for (method, keep, weight), same in sorted(groups.items()):
        cells = [f"{100 * statistics.mean(float(r['share']) for r in same):.1f} %"]
        for name, scale, unit in (
            ("accuracy", 100, " %"), ("object_kept", 100, " %"), ("overlap", 1, ""), ("kept_auc", 1, ""),
            ("energy", 100, " %"), ("positive", 1, ""), ("negative", 1, ""),
        ):  # fmt: skip
            values = [scale * float(r[name]) for r in same]
            digits = 3 if scale == 1 and name in ("overlap", "kept_auc") else 1
            cells.append(
                f"{statistics.mean(values):.{digits}f}{unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"
            )
        lines.append(
            f"| `{method}` | {keep} | {'none' if float(weight) == 0 else weight} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="folder to write to; default RUN/guidance, or runs/guidance")
    made.add_argument("--run", type=Path, help="a dense run on a folder with masks; default: digit scenes")
    made.add_argument("--methods", nargs="+", default=["dynamicvit", "evit"])
    made.add_argument("--keep-ratios", type=float, nargs="+", default=[0.7, 0.5])
    made.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0], help="of the guidance; 0: none")
    made.add_argument("--tune", action="store_true", help="measure on images left out of training, not on unseen ones")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--epochs", type=int, default=2)
    made.add_argument("--train-size", type=int, default=3200, help="scenes an epoch, at most")
    made.add_argument("--val-size", type=int, default=2000, help="scenes tested on")
    made.add_argument("--explained", type=int, default=300, help="scenes explained")
    made.add_argument("--guide", default="generic_attention", help="explainer trained on")
    made.add_argument("--judge", default="lrp", help="explainer of the dense model that judges the kept set")
    made.add_argument("--own", default="tokentm", help="explainer of the pruned model")
    made.add_argument("--share", type=float, default=0.5, help="of each batch that is explained in training")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.set_defaults(clock="wall")
    args = made.parse_args(arguments)
    start(args)
    out = args.out or (args.run or Path("runs")) / "guidance"  # rows do not tell on which data they were measured
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("tuning.csv" if args.tune else "guidance.csv")
    scenes = Digits() if args.run is None else Photos(args.run)
    dense = scenes.start("")[0].model.eval()
    done = {tuple(r[k] for k in KEY) for r in read_rows(path)}
    wanted = list(itertools.product(args.seeds, args.methods, args.keep_ratios, args.weights))
    for seed, method, keep, weight in tqdm(wanted, unit="model"):
        key = (method, f"{keep:g}", f"{weight:g}", str(seed), str(args.epochs), str(args.train_size))
        if key in done:
            continue
        module = train(scenes, method, keep, weight, seed, args)
        found = measure(scenes, module, dense, seed, args)
        append(path, FIELDS, dict(zip(KEY, key, strict=True)) | {n: round(found[n], 5) for n in MEASURES})
    told = table(read_rows(path))
    path.with_suffix(".md").write_text(told + "\n")
    print(f"\n{told}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
