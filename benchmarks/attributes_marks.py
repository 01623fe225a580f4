"""Whether attributes find two planted marks that set the class together: counts over seeds, with and without diversity.

    python benchmarks/attributes_marks.py --seeds 5

Images of noise, 32 x 32 in patches of 4, with one mark of two kinds in the left half and one of two other kinds in the
right half, each on 2 x 2 patches anywhere there; the class is the pair of kinds, so that neither mark tells it alone. A
tiny ViT is trained from scratch with the head; two views of an image have the same marks and fresh noise. On held-out
images an attribute is at a mark if it puts more than half of its attention on the mark's patches, on average. A seed
holds if one attribute is at the left mark and another at the right one. An attribute that is at one of a mark's two
kinds alone has about half: such counts hang on little, and "most left, right" tells them.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import prunex

SIZE, PATCH, MARK = 32, 4, 8  # pixels
GRID = SIZE // PATCH


def kinds() -> Tensor:
    """The four marks, [4, MARK, MARK] of -1 and 1: stripes across and down for the left, two checkers for the right."""
    y, x = torch.meshgrid(torch.arange(MARK), torch.arange(MARK), indexing="ij")
    patterns = [y % 2, x % 2, (x + y) % 2, (x // 2 + y // 2) % 2]
    return torch.stack(patterns).float() * 2 - 1


def draw(count: int, noise: float, views: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor, Tensor]:
    """Views of so many images, each [count, 3, SIZE, SIZE], their classes, and where marks are: bool [count, 2, P]."""
    patterns = kinds()
    bits = torch.randint(0, 2, (count, 2), generator=generator)
    rows = torch.randint(0, GRID - 1, (count, 2), generator=generator)
    columns = torch.randint(0, GRID // 2 - 1, (count, 2), generator=generator) + torch.tensor([0, GRID // 2])
    clean = torch.zeros(count, SIZE, SIZE)
    where = torch.zeros(count, 2, GRID, GRID, dtype=torch.bool)
    for i in range(count):
        for side in range(2):
            r, c = int(rows[i, side]), int(columns[i, side])
            area = (slice(r * PATCH, r * PATCH + MARK), slice(c * PATCH, c * PATCH + MARK))
            clean[(i, *area)] = patterns[2 * side + int(bits[i, side])]
            where[i, side, r : r + 2, c : c + 2] = True
    drawn = [clean[:, None] + noise * torch.randn(count, 3, SIZE, SIZE, generator=generator) for _ in range(views)]
    return drawn, 2 * bits[:, 0] + bits[:, 1], where.flatten(2)


def train(seed: int, diversity: float, args: argparse.Namespace) -> tuple[float, float, Tensor]:
    """Accuracy, overlap of the attention, and each attribute's mean attention to each mark, [M, 2]."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=args.width, depth=args.depth, num_heads=4, num_classes=4
    )
    weights = {"diversity_weight": diversity, "discriminability_weight": args.discriminability}
    head = prunex.attach(model, "attributes", attributes=args.attributes, **weights)
    mine = {id(p) for p in head.head.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if id(p) not in mine], "lr": args.lr},
            {"params": [p for p in trained if id(p) in mine], "lr": args.lr * args.head_lr},
        ],
        weight_decay=0.01,
    )
    model.train()
    for step in range(args.steps):
        head.progress = step / args.steps
        views, labels, _ = draw(args.batch, args.noise, 2, generator)
        task = torch.stack([F.cross_entropy(model(view), labels) for view in views]).mean()
        loss = task + sum(head.losses().values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        for group, times in zip(optimizer.param_groups, (1, args.head_lr), strict=True):
            group["lr"] = args.lr * times * min(1.0, (step + 1) / 30, 2 * (args.steps - step) / args.steps)
        optimizer.step()
    (images,), labels, where = draw(256, args.noise, 1, generator)
    reading = head.read(images)
    masses = torch.einsum("bmp,bsp->ms", reading.attention, where.float()) / len(images)
    roots = reading.attention.sqrt()
    both = (roots @ roots.transpose(1, 2)).mean(0)
    overlap = (both.sum() - both.trace()) / (len(both) * (len(both) - 1))
    return float((reading.logits.argmax(1) == labels).float().mean()), float(overlap), masses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--diversity", type=float, nargs="+", default=[0.1, 0.0], help="weights to compare")
    parser.add_argument("--discriminability", type=float, default=0.5, help="weight of that loss, which parts too")
    parser.add_argument("--attributes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--head-lr", type=float, default=3.0, help="times the backbone's")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| diversity_weight | seed | accuracy | overlap | at the left mark | at the right mark | most left, right |")
    print("|---|---|---|---|---|---|---|")
    held = {}
    began = time.process_time()
    for weight in args.diversity:
        held[weight] = 0
        for seed in range(args.first, args.first + args.seeds):
            accuracy, overlap, masses = train(seed, weight, args)
            left, right = (masses > 0.5).sum(0).tolist()
            held[weight] += left > 0 and right > 0
            most = ", ".join(f"{v:.2f}" for v in masses.amax(0).tolist())
            row = f"| {weight:g} | {seed} | {100 * accuracy:.1f} % | {overlap:.2f} | {left} | {right} | {most} |"
            print(row, flush=True)
    for weight, count in held.items():
        print(f"diversity_weight {weight:g}: holds in {count} of {args.seeds} seeds")
    print(f"{time.process_time() - began:.0f} processor seconds")


if __name__ == "__main__":
    main()
