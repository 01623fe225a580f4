"""How long a training step takes under a pruner, as a ratio to a dense timm step, measured side by side.

    python benchmarks/train_step.py --threads 2 --batches 8 32

A step: forward, cross entropy plus the pruner's losses, backward, AdamW. Random weights and images; DynamicViT's
predictors start at chance, so half of the patches are masked at its first stage; as all slots stay in the tensor,
that does not change its time. The last lines are a markdown table.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measure import Timing, options, side_by_side, start, table, told
from torch import Tensor, nn

import prunex


def step(
    model: nn.Module, pruning: prunex.Pruning | prunex.UnitPruning | None, images: Tensor, target: Tensor, amp: bool
) -> Callable:
    """One training step as a callable."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16) if amp else nullcontext():
            loss = F.cross_entropy(model(images), target)
            if pruning is not None:
                loss = loss + sum(pruning.losses().values())
        loss.backward()
        optimizer.step()
        if isinstance(pruning, prunex.Pruning):
            pruning.forget()

    return run


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    start(args)
    r = args.keep_ratio
    variants: list[tuple[str, str | None, dict[str, Any]]] = [
        ("dense (timm)", None, {}),
        (f"dynamicvit {r}, no teacher", "dynamicvit", {"teacher": False}),
        (f"dynamicvit {r}, with teacher", "dynamicvit", {"teacher": True}),
        (f"evit {r}", "evit", {}),
    ]
    models: dict[str, tuple[nn.Module, prunex.Pruning | None]] = {}
    for name, method, more in variants:
        model = timm.create_model(args.model).train()
        pruning = None if method is None else prunex.attach(model, method, keep_ratio=r, **more)
        models[name] = (model.to(args.device), pruning)
    dense = models["dense (timm)"][0]
    size = dense.patch_embed.img_size
    print(f"{args.model}, {'bfloat16 autocast' if args.amp else 'float32'}, {size[0]} x {size[1]} pixels\n")
    rows: list[tuple[str, Timing]] = []
    for batch in args.batches:
        images = torch.randn(batch, 3, *size, device=args.device)
        target = torch.randint(dense.num_classes, (batch,), device=args.device)
        calls = [(name, step(m, p, images, target, args.amp)) for name, (m, p) in models.items()]
        rows += [(str(batch), t) for t in side_by_side(calls, args.device, args.repeats, args.seconds, args.clock)]
        print(f"batch {batch}: {told([t for k, t in rows if k == str(batch)])}", flush=True)
    print("\n" + table(rows, "batch"))


if __name__ == "__main__":
    main()
