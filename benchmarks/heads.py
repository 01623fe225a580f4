"""What do heads that explain themselves cost, and do they point better than explainers that come afterwards?

    python benchmarks/heads.py                              digit scenes from the shipped ViT: all heads, three seeds
    python benchmarks/heads.py --pruned                     the same beside EViT at 0.7, half of the units removed
    python benchmarks/heads.py --root DIR --weights FILE    a folder of images with masks, from pretrained weights

Every row trains as long as every other from the same weights; `linear` keeps timm's classifier. Digit scenes: `parity`
rows say whether a digit is even, by a Concept Transformer whose ten concepts are the digits, with and without its
explanation loss (`concepts`, `concepts-0`), beside `parity-linear`. On images that training never saw: accuracy; how
often the concept with most attention is present; the tree's controls (hard, classifier alone, tree without it, routing
shuffled). On --explained of them: the share of the head's evidence for the label (its positive part) that lies on the
object, and of TokenTM's map; and the perturbation test of both on the model itself by dropping tokens (positive: lower
is better, negative: higher). Rows that OUT/heads.csv holds already are skipped. Written: heads.csv and heads.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import torch
from measure import append, fit, read_rows, start
from rates import classifier as photo_classifier
from tqdm import tqdm
from tradeoff import ARCHITECTURE, MODEL_ARGS, STAGES

import prunex
from prunex.callbacks import ExplainableHead, MaskPruning, TokenPruning
from prunex.metrics import energy_inside, perturbation, perturbation_auc
from prunex.recipes import DigitScenes, ImageClassifier, ImageFolder
from prunex.recipes.runs import evaluate

KEY = ("data", "row", "pruned", "seed", "epochs")
TREE = ("hard", "classifier", "tree", "shuffled")
MAPS = ("energy", "positive", "negative")
FIELDS = (*KEY, "share", "accuracy", "top_concept", *TREE, *MAPS, *(f"tokentm_{m}" for m in MAPS))
DIGITS = ("linear", "vit_net", "attributes", "parity-linear", "concepts", "concepts-0")
CONCEPT_RATE = 3e-3  # concepts begin at random, and trainings here are short
PHOTOS = ("linear", "concept_transformer", "vit_net", "attributes")


def head_of(row: str, rate: float) -> ExplainableHead | None:
    """The callback of a row in a module of some rate; none where timm's classifier stays."""
    if row.endswith("linear"):
        return None
    if row.startswith("concepts"):
        weight = 0.0 if row.endswith("-0") else 2.0
        options = {"explanation_weight": weight, "sparsity_weight": 0.0}
        return ExplainableHead("concept_transformer", options, lr_scale=CONCEPT_RATE / rate)
    if row == "concept_transformer":
        options = {"spatial": 8, "sparsity_weight": 0.0}
        return ExplainableHead("concept_transformer", options, lr_scale=CONCEPT_RATE / rate)
    return ExplainableHead(row, {"depth": 4} if row == "vit_net" else {})


class Digits:
    """Digit scenes, and the shipped ViT."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def module(self, row: str) -> ImageClassifier:
        """What training starts from."""
        classes = 2 if row.startswith(("parity", "concepts")) else 10
        return ImageClassifier(ARCHITECTURE, classes, MODEL_ARGS, weights="digits", learning_rate=3e-4, warmup=0.05)

    def data(self, row: str, seed: int, batch: int = 64, size: int = 2000) -> DigitScenes:
        """Scenes of a seed, with their concepts where the row is about parity."""
        task = "parity" if row.startswith(("parity", "concepts")) else "digit"
        return DigitScenes(batch_size=batch, train_size=self.args.train_size, val_size=size, seed=seed, task=task)  # type: ignore[arg-type]

    def test(self, row: str, seed: int, batch: int, size: int) -> Iterable[Any]:
        """Batches that training never saw."""
        return self.data(row, seed, batch, size).test_dataloader()


class Photos:
    """A folder of images, and a ViT that was pretrained."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def module(self, row: str) -> ImageClassifier:
        """What training starts from."""
        return photo_classifier(self.args, self.args.weights)

    def data(self, row: str, seed: int, batch: int | None = None) -> ImageFolder:
        """The folder."""
        return ImageFolder(self.args.root, image_size=self.args.image_size, batch_size=batch or self.args.batch)

    def test(self, row: str, seed: int, batch: int, size: int) -> Iterable[Any]:
        """Batches that training never saw, as many of all as are asked for."""
        loader: Any = self.data(row, seed, batch).test_dataloader()
        # Folders are sorted by class: some of each are taken by a step through all of them.
        every = max(1, len(loader.dataset) // size)
        chosen = torch.utils.data.Subset(loader.dataset, range(0, len(loader.dataset), every))
        return islice(torch.utils.data.DataLoader(chosen, batch), -(-size // batch))


def train(source: Any, row: str, pruned: bool, seed: int, args: argparse.Namespace) -> Any:
    """A trained module."""
    lightning.seed_everything(seed, verbose=False)
    module = source.module(row)
    head = head_of(row, module.hparams["learning_rate"])
    callbacks: list[Any] = [] if head is None else [head]
    if pruned:
        stages = STAGES if isinstance(source, Digits) else None
        callbacks += [
            TokenPruning("evit", keep_ratio=0.7, stages=stages),
            MaskPruning("taylor", budget=0.5, start=0.25, images=512),
        ]
    fit(module, source.data(row, seed), callbacks, args.epochs, args.device)
    return module


def measure(source: Any, row: str, module: Any, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What became of it."""
    small: Any = prunex.slim(module).cpu()
    dense = source.module(row).model
    measured: dict[str, Any] = {"share": prunex.cost(small).macs / prunex.cost(dense).macs}
    measured["accuracy"] = evaluate(small, source.test(row, seed, 100, args.val_size))["accuracy"]
    head = prunex.attached(small, head=True)
    own = None if head is None else head.method
    sums: dict[str, list[float]] = {}
    hits: dict[str, list[torch.Tensor]] = {}
    for images, labels, _, *more in source.test(row, seed, 100, args.val_size):
        if own == "concept_transformer" and more:
            top = head.read(images).attention["global"].mean((1, 2)).argmax(1)
            sums.setdefault("top_concept", []).extend(more[0]["concepts"].gather(1, top[:, None])[:, 0].tolist())
        if own == "vit_net":
            for name, share in head.controls(images, labels).items():
                sums.setdefault(name, []).extend([share] * len(labels))
    for images, labels, masks, *_ in source.test(row, seed, 50, args.explained):
        for prefix, method in (("", own), ("tokentm_", "tokentm")):
            if method is None:
                continue
            e = prunex.explain(method, small, images, labels)
            energy = energy_inside(e.upsample().clamp(min=0), masks)
            sums.setdefault(f"{prefix}energy", []).extend(v for v in energy.tolist() if v == v)
            for order in ("positive", "negative"):
                test = perturbation(small, images, e.maps, labels, order=order, removal="drop")  # type: ignore[arg-type]
                hits.setdefault(f"{prefix}{order}", []).append(test.hits)
    measured |= {name: statistics.mean(values) for name, values in sums.items() if values and name in FIELDS}
    measured |= {name: float(perturbation_auc(torch.cat(h).double().mean(0))) for name, h in hits.items()}
    return {name: round(value, 5) for name, value in measured.items()}


def table(rows: Sequence[dict[str, str]]) -> str:
    """Means over seeds, and the spread where there are several."""
    shares = {"share", "accuracy", "top_concept", *TREE, "energy", "tokentm_energy"}
    shown = [name for name in FIELDS[len(KEY) :] if any(r[name] for r in rows)]
    lines = [f"| row | seeds | {' | '.join(n.replace('_', ' ') for n in shown)} |", "|" + "---|" * (2 + len(shown))]
    for name in dict.fromkeys(r["row"] for r in rows):
        same = [r for r in rows if r["row"] == name]
        cells = []
        for field in shown:
            values = [float(r[field]) * (100 if field in shares else 1) for r in same if r[field]]
            cells.append(
                "" if not values else f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            )
        lines.append(f"| `{name}` | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--root", type=Path, help="folder with train/<class>/, val/<class>/ and masks/; default: digits")
    made.add_argument("--weights", type=Path, help="safetensors file with timm's names, for the folder")
    made.add_argument("--architecture", default="vit_small_patch14_dinov2", help="timm's name, for the folder")
    made.add_argument("--image-size", type=int, default=224, help="pixels a side, for the folder")
    made.add_argument("--batch", type=int, default=16, help="images in a step, for the folder")
    made.add_argument("--learning-rate", type=float, default=3e-5, help="for the folder")
    made.add_argument("--rows", nargs="+", help="which; default: all")
    made.add_argument("--pruned", action="store_true", help="beside EViT at 0.7, with half of the units removed")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--epochs", type=int, default=3)
    made.add_argument("--train-size", type=int, default=4800, help="digit scenes an epoch")
    made.add_argument("--val-size", type=int, default=2000, help="images tested on, at most")
    made.add_argument("--explained", type=int, default=200, help="images explained")
    made.add_argument("--out", type=Path, default=Path("runs/heads"), help="folder to write to")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    made.set_defaults(clock="wall")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.root is not None and args.weights is None:
        raise SystemExit("--root needs --weights: a safetensors file with timm's names")
    start(args)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "heads.csv"
    source: Any = Digits(args) if args.root is None else Photos(args)
    data, names = ("digits", DIGITS) if args.root is None else (args.root.name, PHOTOS)
    pruned = "evit+units" if args.pruned else ""
    wanted = [(data, row, pruned, str(seed), str(args.epochs)) for seed in args.seeds for row in args.rows or names]
    with tqdm(wanted, unit="model") as bar:
        for key in bar:
            bar.set_postfix_str(f"{key[1]}, seed {key[3]}")
            if key in {tuple(r[k] for k in KEY) for r in read_rows(path)}:
                continue
            module = train(source, key[1], args.pruned, int(key[3]), args)
            append(
                path, FIELDS, {**dict(zip(KEY, key, strict=True)), **measure(source, key[1], module, int(key[3]), args)}
            )
    rows = [r for r in read_rows(path) if tuple(r[k] for k in KEY) in wanted]
    (args.out / "heads.md").write_text(f"{table(rows)}\n")
    print(f"\n{table(rows)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
