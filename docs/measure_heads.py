"""Do the heads that X-Pruner names for a class look at its objects? python docs/measure_heads.py RUN CHECKPOINT.

For every validation image: the share of attention inside the object's mask, of the heads that matter most and least for
the image's class beyond what head and class have on average, and of all heads. Chance is the mask's share of the area.
Also draws RUN/heads.png: an image a class beside its first heads.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import prunex
from prunex.callbacks import load_from_checkpoint
from prunex.explainers.head_maps import head_maps
from prunex.metrics import bootstrap, energy_inside
from prunex.pictures import from_tensor, head_attention, save_png
from prunex.recipes import ImageClassifier
from prunex.recipes.runs import open_data


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", type=Path)
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--heads", type=int, default=5, help="how many count as most, and as least")
    made.add_argument("--drawn", type=int, default=3)
    args = made.parse_args()
    module, data = load_from_checkpoint(ImageClassifier, str(args.checkpoint)), open_data(args.run)
    table = prunex.attached(module, units=True).relevance_table()
    pairs = [(b, h) for b, t in table.heads.items() for h in range(t.shape[1]) if bool(table.kept[f"{b}.heads"][h])]
    every = torch.stack([table.heads[b][:, h] for b, h in pairs], 1)
    excess = every - every.mean(0) - every.mean(1, keepdim=True) + every.mean()
    order = excess.argsort(1, descending=True)
    late = torch.tensor([b >= len(table.heads) // 2 for b, _ in pairs])
    groups: dict[str, list[torch.Tensor]] = {
        k: [] for k in ("most", "least", "most, late", "least, late", "all", "chance")
    }
    drawn: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for images, labels, masks in tqdm(data.val_dataloader()):
        maps = head_maps(module, images, pairs)
        pixels = F.interpolate(maps, images.shape[2:], mode="bilinear")
        inside = torch.stack([energy_inside(pixels[:, k], masks) for k in range(len(pairs))], 1)
        for i, label in enumerate(labels.tolist()):
            ranked = order[label]
            half = ranked[late[ranked]]
            chosen = {"most": ranked[: args.heads], "least": ranked[-args.heads :], "all": ranked}
            chosen |= {"most, late": half[: args.heads], "least, late": half[-args.heads :]}
            for name, at in chosen.items():
                groups[name].append(inside[i, at].nanmean())
            if label not in drawn:
                drawn[label] = (images[i], maps[i, ranked[: args.drawn]])
        groups["chance"] += list(masks.float().mean((1, 2)))
    print("| heads | attention inside the object (95 %) |\n|---|---|")
    for name, values in groups.items():
        told = bootstrap(torch.stack(values).double())
        print(f"| {name} | {100 * told.mean:.1f} % ({100 * told.low:.1f} to {100 * told.high:.1f}) |")
    names, labels = [str(n) for n in data.class_names], sorted(drawn)
    shown = from_tensor(torch.stack([drawn[c][0] for c in labels]), list(data.mean), list(data.std))
    looked = np.stack([drawn[c][1].numpy() for c in labels])
    titles = [
        [f"{names[c]}: head {pairs[k][0]}.{pairs[k][1]}" for k in order[c][: args.drawn].tolist()] for c in labels
    ]
    picture = head_attention(shown, looked, titles, names=[names[c] for c in labels])
    save_png(args.run / "heads.png", picture)


if __name__ == "__main__":
    main()
