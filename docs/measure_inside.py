"""Print how much of each method's relevance lies on the object: python docs/measure_inside.py RUN ROOT --images 120.

Relevance is taken at pixel size, for the predicted class. "Inside the object" is the mean share of positive relevance
on the object's mask, "peak inside" the share of images whose largest value lies on it (of tied ones, the share that
does). Chance for both is the mask's share of the area.
"""

from collections import defaultdict

import torch
from scenes import Scenes, parser
from torch import Tensor
from tqdm import tqdm

from prunex.metrics import energy_inside, pointing_game


def main() -> None:
    options = parser(__doc__, images=60)
    options.add_argument("--batch", type=int, default=8, help="images explained at once; default 8")
    args = options.parse_args()
    scenes = Scenes(args)
    inside, peaks = defaultdict(list), defaultdict(list)
    area, kept, right = [], [], []
    with tqdm(total=len(scenes) * len(scenes.explainers.names), unit="map") as bar:
        left = len(scenes)
        for images, labels, masks in scenes.batches(args.batch):
            found = scenes.explainers(scenes.vit, images, bar=bar, left=left)
            left -= len(images)
            first = next(iter(found.values()))
            right.append((first.logits.argmax(1).cpu() == labels).float())
            area.append(masks.float().mean((1, 2)).where(masks.any(2).any(1), torch.nan))
            if first.trace.stages:
                kept.append(first.trace.kept().float().mean((1, 2)).cpu())
            for name, e in found.items():
                pixels = e.pixels.float().cpu()
                inside[name].append(energy_inside(pixels, masks))
                peaks[name].append(pointing_game(pixels, masks))
    print("| method | relevance inside the object | peak inside | seconds an image |")
    print("|---|---|---|---|")
    for name in scenes.explainers.names:
        seconds = scenes.explainers.seconds(name)
        print(f"| `{name}` | {percent(inside[name])} | {percent(peaks[name])} | {seconds:.2f} |")
    print(f"| chance: the object's share of the area | {percent(area)} | {percent(area)} | |")
    told = f"{len(scenes)} validation images, {percent(right)} classified rightly"
    print(f"\n{told}; {percent(kept)} of the patches kept." if kept else f"\n{told}.")
    for name, reason in scenes.explainers.skipped.items():
        print(f"Left out: `{name}` ({reason}).")


def percent(values: list[Tensor]) -> str:
    """Mean over the images that have a value."""
    return f"{100 * float(torch.cat(values).nanmean()):.1f} %"


if __name__ == "__main__":
    main()
