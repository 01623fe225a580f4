"""How long a slim model's forward takes, as a ratio to the dense timm model's, measured side by side.

    python benchmarks/forward.py --threads 2 --batches 1 8 32
    python benchmarks/forward.py --threads 1 --clock cpu --batches 8 --methods ppt tome   # equal tokens in every block

Random weights: time depends on shapes alone. The last lines are a markdown table.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from measure import Timing, options, side_by_side, start, table, told

import prunex


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--methods", nargs="+", default=["evit", "dynamicvit", "topk"], help="also ppt, tome")
    args = parser.parse_args()
    start(args)
    dtype = getattr(torch, args.dtype)
    r = args.keep_ratio
    variants: list[tuple[str, str, dict[str, Any]]] = [
        (f"evit {r}", "evit", {"keep_ratio": r}),
        (f"evit {r}, not fused", "evit", {"keep_ratio": r, "fuse": False}),
        (f"dynamicvit {r}", "dynamicvit", {"keep_ratio": r, "teacher": False}),
        (f"topk {r}", "topk", {"keep_ratio": r}),
        (f"topk {r} by shift", "topk", {"keep_ratio": r, "score": "shift"}),
        # Random weights look at all patches alike, and images of them pool; ranked and matched are both in any case.
        ("ppt 50", "ppt", {"r": 50}),
        ("ppt 50, tau 0", "ppt", {"r": 50, "tau": 0}),
        ("tome 50 at the same blocks", "tome", {"r": 50, "stages": (3, 6, 9)}),
        ("tome 11 in every block", "tome", {"r": 11}),
    ]
    dense = timm.create_model(args.model).eval()
    models = {"dense (timm)": dense}
    for name, method, more in (v for v in variants if v[1] in args.methods):
        model = timm.create_model(args.model).eval()
        prunex.attach(model, method, **more)
        models[name] = prunex.slim(model)
    macs = {name: prunex.cost(m).macs / prunex.cost(dense).macs for name, m in models.items()}
    models = {name: m.to(args.device, dtype) for name, m in models.items()}
    size = dense.patch_embed.img_size
    print(f"{args.model}, {args.dtype}, {size[0]} x {size[1]} pixels, eval, no gradients\n")
    rows: list[tuple[str, Timing]] = []
    with torch.inference_mode():
        for batch in args.batches:
            images = torch.randn(batch, 3, *size, device=args.device, dtype=dtype)
            calls = [(name, partial(m, images)) for name, m in models.items()]
            for timing in side_by_side(calls, args.device, args.repeats, args.seconds, args.clock):
                timing.macs = macs[timing.name]
                rows.append((str(batch), timing))
            print(f"batch {batch}: {told([t for k, t in rows if k == str(batch)])}", flush=True)
    print("\n" + table(rows, "batch"))


if __name__ == "__main__":
    main()
