"""Accuracy and speed of pruners that were never trained, at equal budgets.

    python benchmarks/untrained.py runs/imagefolder-dense/version_0 --budgets 0.8 0.65 0.5
    python benchmarks/untrained.py digits:0 digits:1 digits:2 --methods topk topk,score=shift tome ppt
    python benchmarks/untrained.py SCENES0 SCENES1 --weights FILE --image-size 112

A source is a finished dense run, whose model and validation images are used as they are; ``digits:SEED``, the shipped
model and a draw of digit scenes; or, with --weights, a folder with train/<class>/ and val/<class>/. Then FILE holds
pretrained weights under timm's names, and a linear classifier of their features is fitted to train. Nothing else is
trained. Several sources are told as their mean and range. A method may carry options. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from measure import side_by_side, start
from torch import nn
from tqdm import tqdm

import prunex
from prunex.recipes import DigitScenes, ImageClassifier, ImageFolder
from prunex.recipes.runs import evaluate, open_data, open_model

DIGITS = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
DENSE = "dense"


def spelled(text: str) -> tuple[str, dict[str, Any]]:
    """A method and its options, from ``name,option=value``."""
    name, *pairs = text.split(",")
    options = dict(pair.split("=", 1) for pair in pairs)
    return name, {option: _value(told) for option, told in options.items()}


def _value(told: str) -> Any:
    try:
        return ast.literal_eval(told)
    except ValueError:  # a name
        return told


def opened(source: str, args: argparse.Namespace) -> tuple[nn.Module, Iterable[Any]]:
    """A dense model in eval mode and the batches it is tested on."""
    if source.startswith("digits"):
        model: nn.Module = ImageClassifier("vit_tiny_patch16_224", 10, DIGITS, weights="digits").model
        scenes = DigitScenes(batch_size=125, seed=int(source.partition(":")[2] or 0))
        return model.eval(), scenes.test_dataloader()
    if args.weights is None:
        data: Any = open_data(source)
        data.setup("validate")
        return open_model(source), data.val_dataloader()
    folder = ImageFolder(source, image_size=args.image_size, batch_size=args.batch, augment=False)
    model = ImageClassifier(
        args.architecture, folder.num_classes, {"img_size": args.image_size}, weights=args.weights
    ).model
    return probed(model.eval(), folder.train_dataloader()), folder.val_dataloader()


def probed(model: Any, batches: Iterable[Any]) -> nn.Module:
    """The model with a classifier fitted to its frozen features: cross-entropy with a little weight decay."""
    features, labels = [], []
    with torch.no_grad():
        for x, y, *_ in tqdm(batches, desc="features"):
            features.append(model.forward_head(model.forward_features(x), pre_logits=True))
            labels.append(y)
    x, y = torch.cat(features), torch.cat(labels)
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model.head(x), y) + 1e-3 * model.head.weight.square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(step)
    return model.requires_grad_(False)


def told(rows: list[dict[str, float]]) -> str:
    """Cost, accuracy and covered objects of one model over all sources."""
    accuracy = [100 * r["accuracy"] for r in rows]
    mean, spread = statistics.mean(accuracy), ""
    if len(rows) > 1:
        spread = f" ({min(accuracy):.1f} to {max(accuracy):.1f})"
    kept = [100 * r["kept_digit_cover"] for r in rows if "kept_digit_cover" in r]
    cover = f"{statistics.mean(kept):.1f} %" if kept else ""
    return f"{100 * rows[0]['share']:.1f} % | {rows[0]['gmacs']:.3g} | {mean:.1f} %{spread} | {cover}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="folders of dense runs, digits:SEED, or folders of images")
    parser.add_argument("--methods", nargs="+", default=["topk", "evit", "tome"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="of the dense MACs")
    parser.add_argument("--weights", help="safetensors file with timm's names, for folders of images")
    parser.add_argument("--architecture", default="vit_small_patch14_dinov2", help="of --weights")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side, for folders of images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8, help="images in a timed forward")
    parser.add_argument("--seconds", type=float, default=60.0, help="for timing all models side by side; 0: none")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: with --threads 1")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    start(args)
    rows: dict[str, list[dict[str, float]]] = {}
    models: dict[str, nn.Module] = {}
    for source in args.sources:
        model, batches = opened(source, args)
        dense = prunex.cost(model)

        def note(name: str, model: nn.Module, batches: Iterable[Any] = batches, dense: Any = dense) -> None:
            spent = prunex.cost(model)
            cost = {"share": spent.macs / dense.macs, "gmacs": spent.gmacs}
            rows.setdefault(name, []).append({**cost, **evaluate(model, batches)})
            models.setdefault(name, prunex.slim(model))

        note(DENSE, model)
        points = list(itertools.product(args.methods, args.budgets))
        for method, budget in tqdm(points, desc=source, unit="model"):
            name, options = spelled(method)
            with prunex.attach(model, name, budget=budget, **options):
                note(f"{method} {budget:g}", model)
    speeds = timed(models, batches, args) if args.seconds else dict.fromkeys(models, "")
    print(
        "\n| method | MACs of dense | GMACs | accuracy | object patches alone in a token | images/s | to dense |"
        "\n|---|---|---|---|---|---|---|"
    )
    for name, found in rows.items():
        print(f"| `{name.rsplit(' ', 1)[0]}` | {told(found)} | {speeds[name] or '|'} |")


def timed(models: dict[str, nn.Module], batches: Iterable[Any], args: argparse.Namespace) -> dict[str, str]:
    """Images a second, and their ratio to the dense model's, of slim models side by side on the first images."""
    images = torch.cat([b[0] for b in itertools.islice(batches, args.batch)])[: args.batch]

    def forward(model: nn.Module) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return model(images)

        return call

    contestants = [(name, forward(model)) for name, model in models.items()]
    timings = side_by_side(contestants, args.device, 0, args.seconds, args.clock)
    return {
        t.name: f"{1e3 * args.batch / statistics.median(t.own):.1f} | {1 / statistics.median(t.ratios):.2f}x"
        for t in timings
    }


if __name__ == "__main__":
    main()
