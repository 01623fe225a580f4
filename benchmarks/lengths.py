"""What images of different lengths cost in one batch, as ratios to the same blocks with one count for all.

    python benchmarks/lengths.py --threads 1 --clock cpu --batches 1 8 32

All blocks of the model run on images that kept between 10 % and 100 % of their patches, drawn evenly; the reference
runs on as many images that kept the mean of that. Ways: tokens packed with attention image by image (what prunex does
on a CPU) or over the padded slots (what it does elsewhere) or by torch's jagged nested tensors; and all slots computed,
up to the longest image, under a key mask. Random weights: time depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measure import Timing, options, side_by_side, start, table, told
from torch import Tensor

from prunex.vit import attention
from prunex.vit.packing import Packing

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def walk(blocks: Any, x: Tensor, attend: Attention) -> Tensor:
    """All blocks with one way of attention."""
    for block in blocks:
        y = block.norm1(x)
        x = x + block.ls1(attention.project(block.attn, attend(*attention.heads(block.attn, y)), y))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x


def packed(blocks: Any, x: Tensor, policy: Tensor, one_by_one: bool) -> Tensor:
    """The packing pays for itself in every block, as in prunex's forward."""
    packing = Packing.of(policy)
    for block in blocks:
        x = packing.unpack(walk([block], packing.pack(x), partial(packing.attend, one_by_one=one_by_one)))
    return x


def jagged(blocks: Any, x: Tensor, policy: Tensor) -> Tensor:
    """The same with attention over torch's nested tensors."""
    packing = Packing.of(policy)
    ends = torch.tensor([0, *packing.lengths], device=x.device).cumsum(0)

    def attend(*qkv: Tensor) -> Tensor:
        nested = [
            torch.nested.nested_tensor_from_jagged(t[0].transpose(0, 1).contiguous(), ends).transpose(1, 2) for t in qkv
        ]
        out: Any = F.scaled_dot_product_attention(nested[0], nested[1], nested[2])
        return out.transpose(1, 2).values().transpose(0, 1).unsqueeze(0)

    for block in blocks:
        x = packing.unpack(walk([block], packing.pack(x), attend))
    return x


def padded(blocks: Any, x: Tensor, policy: Tensor) -> Tensor:
    """Every slot is computed."""
    seen = (policy > 0)[:, None, None, :]
    return walk(blocks, x, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen))


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    args = parser.parse_args()
    start(args)
    model: Any = timm.create_model(args.model).eval().to(args.device)
    most, width, prefix = model.patch_embed.num_patches, model.embed_dim, model.num_prefix_tokens
    print(f"{args.model}, {most} patches, eval, no gradients\n")
    rows: list[tuple[str, Timing]] = []
    with torch.inference_mode():
        for batch in args.batches:
            shares = torch.linspace(0.1, 1, batch)[torch.randperm(batch)] if batch > 1 else torch.tensor([0.55])
            counts = prefix + (shares * most).round().long()
            slots = int(counts.max())
            policy = (torch.arange(slots) < counts[:, None]).float().to(args.device)
            x = torch.randn(batch, slots, width, device=args.device)
            even = x[:, : int(counts.float().mean().round())].contiguous()
            calls = [
                ("one count for all", partial(model.blocks, even)),
                ("packed, image by image", partial(packed, model.blocks, x, policy, True)),
                ("packed, attention padded", partial(packed, model.blocks, x, policy, False)),
                ("packed, attention jagged", partial(jagged, model.blocks, x, policy)),
                ("padded to the longest", partial(padded, model.blocks, x, policy)),
            ]
            there = policy.unsqueeze(-1) > 0
            wanted = calls[-1][1]()
            for name, call in calls[1:-1]:
                try:
                    gap = float(((call() - wanted) * there).abs().max())
                except RuntimeError as error:  # jagged attention asks the CUDA driver, also on a CPU
                    print(f"batch {batch}: left out {name}: {str(error).splitlines()[0]}")
                    calls = [c for c in calls if c[0] != name]
                    continue
                if gap > 1e-3:
                    raise SystemExit(f"{name} differs by {gap:.1e}")
            for timing in side_by_side(calls, args.device, args.repeats, args.seconds, args.clock):
                rows.append((str(batch), timing))
            print(f"batch {batch}: {told([t for k, t in rows if k == str(batch)])}", flush=True)
    print("\n" + table(rows, "batch").replace("ratio to dense", "ratio to one count for all"))


if __name__ == "__main__":
    main()
