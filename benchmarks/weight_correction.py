"""What is left of a model's accuracy when units are taken out and nothing is trained: corrected, and not.

    python benchmarks/weight_correction.py                              digit scenes, the shipped ViT, three seeds
    python benchmarks/weight_correction.py --root DIR --weights FILE    a folder of images, a pretrained ViT
    python benchmarks/weight_correction.py --cost                       processor time of a refit, random weights

Every criterion scores the same model, and of each block the better half of its MLP channels stays, or of its heads,
or of both (of three heads two). Scores and corrections see the same --images of training images; xpruner's masks learn
from them for --steps batches with the weights frozen. Seeds draw these, and of digit scenes the test too. The ViT of a
folder has a linear classifier by ridge regression from class tokens of --probe training images. Rows that
OUT/correction.csv holds already are skipped. Written: correction.csv and correction.md. With --cost: what a correction
of half of both takes beyond the forwards that it needs anyway, in forwards of one image.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from measure import GEOMETRY, append, read_rows, start
from rates import classifier as photo_classifier
from torch import Tensor
from tqdm import tqdm
from tradeoff import classifier as digit_classifier

import prunex
from prunex.recipes import DigitScenes, ImageFolder
from prunex.recipes.runs import evaluate
from prunex.units.moments import Moments
from prunex.vit.units import branches

KEY = ("data", "criterion", "removed", "correct", "seed", "images")
FIELDS = (*KEY, "share", "accuracy", "dense", "before", "after")
CRITERIA = ("random", "magnitude", "taylor", "relevance", "xpruner")
REMOVED = {"channels": ("channels",), "heads": ("heads",), "both": ("heads", "channels")}
CORRECT = (None, "bias", "refit")
MASK_RATE = 0.02  # of xpruner's masks, Adam
Batches = list[tuple[Tensor, Tensor]]


class Digits:
    """Digit scenes and the shipped ViT; seeds draw scenes to look at and scenes to test on."""

    name = "digits"

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def data(self, seed: int) -> DigitScenes:
        """Scenes of a seed."""
        return DigitScenes(batch_size=50, train_size=self.args.images, val_size=self.args.tested, seed=seed)

    def model(self) -> Any:
        """The shipped ViT."""
        return digit_classifier().model.eval()

    def seen(self, seed: int) -> Batches:
        """Training scenes."""
        return [(batch[0], batch[1]) for batch in self.data(seed).train_dataloader()]

    def test(self, seed: int) -> Batches:
        """Scenes that training never saw."""
        return [(batch[0], batch[1]) for batch in self.data(seed).test_dataloader()]


class Photos:
    """A folder of images and a pretrained ViT; seeds choose the training images that are looked at."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.name = args, args.root.name
        self.data = ImageFolder(args.root, image_size=args.image_size, batch_size=16, masks=None, augment=False)
        self.data.setup("fit")

    def model(self) -> Any:
        """The pretrained ViT with a linear classifier."""
        vit = photo_classifier(self.args, self.args.weights).model.eval()
        x, y = zip(*self.some(self.args.probe, 0), strict=True)
        with torch.no_grad():
            rows = torch.cat([vit.forward_head(vit.forward_features(images), pre_logits=True) for images in x]).double()
            wanted = torch.nn.functional.one_hot(torch.cat(y)).double()
            mean = rows.mean(0)
            c = (rows - mean).T @ (rows - mean)
            ridge = c.diagonal().mean() * torch.eye(len(c)).double()
            weight = torch.linalg.solve(c + ridge, (rows - mean).T @ (wanted - wanted.mean(0))).T
            vit.head.weight.copy_(weight)
            vit.head.bias.copy_(wanted.mean(0) - weight @ mean)
        return vit

    def some(self, count: int, seed: int) -> Batches:
        """Random training images of a seed."""
        dataset = self.data.train_dataloader().dataset
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(dataset), generator=generator)[:count].tolist()  # type: ignore[arg-type]
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, chosen), 16)
        return [(batch[0], batch[1]) for batch in loader]

    def seen(self, seed: int) -> Batches:
        """Training images."""
        return self.some(self.args.images, seed + 1)

    def test(self, seed: int) -> Batches:
        """All validation images."""
        return [(batch[0], batch[1]) for batch in self.data.test_dataloader()]


def scored(model: Any, criterion: str, batches: Batches, seed: int, steps: int) -> dict[str, Tensor]:
    """A criterion's scores of all units, by branch."""
    options = {"seed": seed} if criterion == "random" else {}
    with prunex.attach(model, criterion, budget=0.9, **options) as pruning:
        if criterion == "xpruner":
            learn_masks(model, pruning, batches, steps)
        scores: dict[str, Tensor] = pruning.pruner.scores(model, batches)
    return scores


def learn_masks(model: Any, pruning: Any, batches: Batches, steps: int) -> None:
    """X-Pruner's first stage by hand: masks learn, weights stand still."""
    adam = torch.optim.Adam(pruning.pruner.masks(), MASK_RATE)
    model.requires_grad_(False).train()
    for images, labels in islice(cycle(batches), steps):
        with pruning.labelled(labels):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        (loss + sum(pruning.losses().values())).backward()
        adam.step()
        adam.zero_grad()
    model.requires_grad_(True).eval()


def better_half(model: Any, scores: dict[str, Tensor], kinds: Sequence[str]) -> prunex.WidthSpec:
    """The better half of each branch of some kinds, rounded up."""
    kept: dict[str, dict[int, list[int]]] = {"heads": {}, "channels": {}}
    for b in branches(model):
        if b.kind in kinds:
            best = torch.sort(scores[b.key], descending=True, stable=True).indices[: -(-b.units // 2)]
            kept[b.kind][b.block] = sorted(best.tolist())
    return prunex.WidthSpec(**kept)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Accuracy in per cent, the mean over seeds with the lowest and highest, and the mean error of the branches."""
    lines = [
        "| units left by | taken out | MACs | without | `bias` | `refit` | error of the branches |",
        "|---|---|---|---|---|---|---|",
    ]
    for removed in REMOVED:
        for criterion in CRITERIA:
            same = [r for r in rows if (r["removed"], r["criterion"]) == (removed, criterion)]
            by_kind = [[r for r in same if r["correct"] == str(correct)] for correct in CORRECT]
            if not all(by_kind):
                continue
            cells = [spread([float(r["accuracy"]) for r in some]) for some in by_kind]
            _, bias, refit = by_kind
            pairs = ((bias, "before"), (bias, "after"), (refit, "after"))
            errors = [statistics.mean(float(r[name]) for r in some) for some, name in pairs]
            share = statistics.mean(float(r["share"]) for r in same)
            lines.append(
                f"| `{criterion}` | {removed} | {100 * share:.0f} % | {' | '.join(cells)} "
                f"| {' → '.join(f'{100 * e:.0f}' for e in errors)} % |"
            )
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    shown = f"{100 * statistics.mean(values):.1f}"
    return shown if len(values) == 1 else f"{shown} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def run(source: Any, args: argparse.Namespace) -> list[dict[str, str]]:
    """Measure what is not there yet; all the rows that were asked for."""
    path, model = args.out / "correction.csv", source.model()
    wanted = [
        (source.name, criterion, removed, str(correct), str(seed), str(args.images))
        for seed in args.seeds for criterion in args.criteria for removed in args.removed for correct in CORRECT
    ]  # fmt: skip
    known = {tuple(r[k] for k in KEY) for r in read_rows(path)}
    dense, scores = prunex.cost(model).macs, {}
    whole: dict[int, float] = {}
    for key in tqdm([w for w in wanted if w not in known], unit="model"):
        criterion, removed, correct, seed = key[1], key[2], None if key[3] == "None" else key[3], int(key[4])
        seen, test = source.seen(seed), source.test(seed)
        if seed not in whole:
            whole[seed] = evaluate(model, test)["accuracy"]
        if (criterion, seed) not in scores:
            scores[criterion, seed] = scored(model, criterion, seen, seed, args.steps)
        spec = better_half(model, scores[criterion, seed], REMOVED[removed])
        images = None if correct is None else (batch[0] for batch in seen)
        small = prunex.slim(model, widths=spec, correct=correct, images=images)  # type: ignore[arg-type]
        done = prunex.correction(small)
        mended = () if done is None else done.branches
        errors = {
            name: round(statistics.mean(getattr(m, name) / m.variance for m in mended), 5)
            for name in ("before", "after") if mended
        }  # fmt: skip
        values = {
            "share": round(prunex.cost(small).macs / dense, 5), "dense": round(whole[seed], 5),
            "accuracy": round(evaluate(small, test)["accuracy"], 5), **errors,
        }  # fmt: skip
        append(path, FIELDS, {**dict(zip(KEY, key, strict=True)), **values})
    return [r for r in read_rows(path) if tuple(r[k] for k in KEY) in wanted]


def seconds(function: Callable[[], Any]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def cost(args: argparse.Namespace) -> str:
    """What a refit of half of the units takes beyond its forwards, in forwards of one image."""
    model: Any = timm.create_model(args.geometry).eval()
    images = torch.randn(args.images, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    spec = better_half(model, scored(model, "magnitude", [], 0, 0), REMOVED["both"])
    with torch.no_grad():
        model(images[:1])
        one = statistics.median(seconds(lambda: model(images[:1])) for _ in range(15))
    bare = seconds(lambda: prunex.slim(model, widths=spec))
    inside, sums, began, add = [], [], [], Moments.add
    # slim's copy of the model has these hooks too; what they see of a forward holds the sums.
    model.register_forward_pre_hook(lambda *_: began.append(time.process_time()))
    model.register_forward_hook(lambda *_: inside.append(time.process_time() - began[-1]))
    with patch.object(Moments, "add", lambda *given: sums.append(seconds(lambda: add(*given)))):
        spent = seconds(lambda: prunex.slim(model, widths=spec, correct="refit", images=images.split(8)))
    forwards = sum(inside) - sum(sums)
    return (
        f"{args.geometry}, {args.images} images, half of both refitted, in forwards of one image ({1e3 * one:.0f} ms): "
        f"{(spent - bare - forwards) / one:.0f} beyond the forwards, of them {sum(sums) / one:.0f} sums; the forwards "
        f"themselves, eight images at once, {forwards / one:.0f}"
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--root", type=Path, help="folder with train/<class>/ and val/<class>/; default: digit scenes")
    made.add_argument("--weights", type=Path, help="safetensors file with timm's names, for the folder")
    made.add_argument("--architecture", default="vit_small_patch14_dinov2", help="timm's name, for the folder")
    made.add_argument("--image-size", type=int, default=224, help="pixels a side, for the folder")
    made.add_argument("--probe", type=int, default=400, help="training images of the folder's linear classifier")
    made.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=CRITERIA)
    made.add_argument("--removed", nargs="+", default=list(REMOVED), choices=list(REMOVED))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--images", type=int, default=128, help="training images looked at")
    made.add_argument("--tested", type=int, default=300, help="digit scenes tested on")
    made.add_argument("--steps", type=int, default=40, help="batches that xpruner's masks learn from")
    made.add_argument("--cost", action="store_true", help="measure the cost instead")
    made.add_argument("--geometry", default=GEOMETRY, help="timm's name, for --cost")
    made.add_argument("--out", type=Path, default=Path("runs/weight_correction"), help="folder to write to")
    made.add_argument("--threads", type=int, default=1, help="of torch")
    made.set_defaults(clock="cpu", device="cpu", batch=16, learning_rate=3e-5)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.root is not None and args.weights is None:
        raise SystemExit("--root needs --weights: a safetensors file with timm's names")
    start(args)
    if args.cost:
        print(f"\n{cost(args)}")
        return
    warnings.simplefilter("once")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = run(Digits(args) if args.root is None else Photos(args), args)
    dense = spread([float(r["dense"]) for r in {r["seed"]: r for r in rows}.values()])
    text = f"dense: {dense} %\n\n{table(rows)}\n"
    (args.out / "correction.md").write_text(text)
    print(f"\n{text}\nwritten to {args.out}")


if __name__ == "__main__":
    main()
