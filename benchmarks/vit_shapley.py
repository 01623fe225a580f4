"""How well a trained ViT Shapley explainer ranks patches: beside long permutation sampling of the game it has learnt.

    python benchmarks/vit_shapley.py runs/digits-vit-shapley/version_0

The game is the surrogate's probability of the class it predicts. Spearman's rank correlation is taken over the patches
of an image; a second, independent sampling run of the same length tells how far the reference itself can be trusted.
On validation scenes as the run's config has them, past those that its training chose an epoch by.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from scipy.stats import spearmanr
from torch import Tensor

import prunex
from prunex.explainers.shap import estimate
from prunex.learned.vit_shapley import load_explainer
from prunex.recipes.runs import instantiate, read_run
from prunex.removal.game import Removal


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each image's patches, [B] from [B, P]."""
    return torch.tensor([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


def told(name: str, found: Tensor) -> str:
    low, middle, high = found.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=found.dtype))
    return f"| {name} | **{middle:.3f}** | {low:.3f} to {high:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of prunex fit on digit scenes")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=100, help="antithetic pairs of the reference")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first", type=int, default=1000, help="number of the first validation scene")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    explainer = load_explainer(args.run / "explainer")
    surrogate = explainer.surrogate
    spec = read_run(args.run)["data"]
    more = {"val_size": args.first + args.images}
    data: Any = instantiate(LightningDataModule, {**spec, "init_args": {**spec["init_args"], **more}})
    images = data.dataset("val").__getitems__(list(range(args.first, args.first + args.images)))[0]

    began = time.process_time()
    learnt = prunex.explain("vit_shapley", surrogate, images, explainer=explainer)
    fast = time.process_time() - began
    target = learnt.target[:, None, None].expand(-1, learnt.raw.shape[1], 1)

    def sampled(pairs: int, seed: int) -> tuple[Tensor, Tensor]:
        game = Removal(surrogate, images)
        found = estimate(game, len(images), "permutation", 2 + 2 * (game.players - 1) * pairs, seed)
        return found.values.gather(2, target)[..., 0], found.errors.gather(2, target)[..., 0]

    began = time.process_time()
    reference, errors = sampled(args.pairs, 0)
    slow = time.process_time() - began
    again, _ = sampled(args.pairs, 1)
    few, _ = sampled(max(1, args.pairs // 20), 2)
    best = (reference + again) / 2
    mine = learnt.maps.flatten(1).double()
    print(
        f"{args.images} validation scenes; reference: {args.pairs} antithetic pairs, twice; mean standard error "
        f"{float(errors.mean()):.5f}, mean spread {float((reference.amax(1) - reference.amin(1)).mean()):.3f}"
    )
    print("| against the reference | Spearman, median | quartiles |\n|---|---|---|")
    print(told("vit_shapley", correlation(mine, best)))
    print(told(f"shap, {max(1, args.pairs // 20)} pairs", correlation(few, best)))
    print(told(f"shap, {args.pairs} pairs, against another such run", correlation(reference, again)))
    rest = (mine - best).pow(2).sum(1) / (best - best.mean(1, keepdim=True)).pow(2).sum(1)
    print(told("vit_shapley, share of variance not explained", rest))
    count = max(1, mine.shape[1] // 8)
    found = [
        len(set(m.topk(count)[1].tolist()) & set(b.topk(count)[1].tolist())) for m, b in zip(mine, best, strict=True)
    ]
    print(told(f"vit_shapley, share of the {count} best patches found", torch.tensor(found) / count))
    print(f"processor seconds an image: {fast / args.images:.4f} learnt, {slow / args.images:.2f} sampled")


if __name__ == "__main__":
    main()
