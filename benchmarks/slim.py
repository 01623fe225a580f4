"""How long a forward takes with half the heads and MLP channels taken out, as a ratio to the dense timm model's.

    python benchmarks/slim.py --threads 1 --clock cpu --batches 8 1 32
    python benchmarks/slim.py --swin swin_tiny_patch4_window7_224      and a Swin beside its own dense model

Each block keeps every other unit, so nothing about the layout helps. Random weights: time depends on shapes alone. A
forward is as fast as it should be when its ratio is at most 1.1 times its ratio of multiply-adds; the last column says
by which factor it is slower than that ratio. Where onnxruntime is installed the exported graphs are timed as well.
The last lines are markdown tables.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from measure import Timing, options, side_by_side, start, told
from torch import Tensor, nn

import prunex
from prunex.recipes.commands.bench import session
from prunex.recipes.timing import quartiles
from prunex.vit.units import branches
from prunex.vit.widths import WidthSpec, narrow

BOUND = 1.1  # times the ratio of multiply-adds


def halves(model: nn.Module, kinds: Sequence[str] = ("heads", "channels")) -> nn.Module:
    """The model with every other head and MLP channel of each block taken out; of an odd number the smaller half."""
    kept: dict[str, dict[int, tuple[int, ...]]] = {"heads": {}, "channels": {}}
    for branch in branches(model):
        if branch.kind in kinds:
            kept[branch.kind][branch.block] = tuple(range(0, branch.units - branch.units % 2, 2))
    return narrow(model, WidthSpec(**kept))


def narrowed(name: str, kinds: Sequence[str], keep_ratio: float | None = None) -> nn.Module:
    """A slim model: units first, then tokens where a keep ratio is given."""
    model = halves(timm.create_model(name).eval(), kinds)
    if keep_ratio is None:
        return model
    prunex.attach(model, "evit", keep_ratio=keep_ratio)
    return prunex.slim(model)


def contestants(args: Any) -> dict[str, nn.Module]:
    r, both = args.keep_ratio, ("heads", "channels")
    whole = timm.create_model(args.model).eval()
    tokens = timm.create_model(args.model).eval()
    prunex.attach(tokens, "evit", keep_ratio=r)
    return {
        "dense (timm)": whole,
        "half the heads": narrowed(args.model, ("heads",)),
        "half the channels": narrowed(args.model, ("channels",)),
        "half of both": narrowed(args.model, both),
        f"evit {r}": prunex.slim(tokens),
        f"evit {r}, half of both": narrowed(args.model, both, r),
    }


def measure(models: dict[str, nn.Module], calls: dict[str, Callable[[Tensor], Any]], args: Any) -> list[str]:
    """Rows of a markdown table."""
    dense = next(iter(models.values()))
    macs = {name: prunex.cost(m).macs / prunex.cost(dense).macs for name, m in models.items()}
    size: Any = dense.patch_embed.img_size  # type: ignore[union-attr]
    rows = []
    for batch in args.batches:
        images = torch.randn(batch, 3, *size, device=args.device)
        some = [(name, partial(calls[name], images)) for name in calls]
        with torch.inference_mode():
            timings = side_by_side(some, args.device, args.repeats, args.seconds, args.clock)
        print(f"  batch {batch}: {told(timings)}", flush=True)
        rows += [row(batch, t, macs[t.name]) for t in timings]
    return rows


def row(batch: int, t: Timing, macs: float) -> str:
    low, middle, high = quartiles(t.ratios)
    fastest = min(t.own) / min(t.reference)
    over = statistics.median(t.ratios) / macs
    verdict = "" if macs == 1 else f"{over:.2f} ({'holds' if over <= BOUND else 'does not hold'})"
    return (
        f"| {batch} | {t.name} | {t.median:.1f} | **{middle:.3f}** | {low:.3f} to {high:.3f} | {fastest:.3f} | "
        f"{macs:.3f} | {verdict} |"
    )


def table(title: str, rows: Sequence[str]) -> str:
    head = "| batch | | ms (median) | ratio to dense | quartiles | of the fastest rounds | MACs | ratio / MACs |"
    return "\n".join([f"\n{title}\n", head, "|---|---|---|---|---|---|---|---|", *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1, 32])
    parser.add_argument("--swin", default="swin_tiny_patch4_window7_224", help="a Swin to time as well; '' for none")
    parser.add_argument("--no-onnx", action="store_true", help="do not time exported graphs")
    args = parser.parse_args(arguments)
    start(args)
    tables = []
    models = contestants(args)
    groups = [(args.model, models)]
    if args.swin:
        swin = {
            "dense (timm)": timm.create_model(args.swin).eval(),
            "half of both": narrowed(args.swin, ("heads", "channels")),
        }
        groups.append((args.swin, swin))
    for name, group in groups:
        print(f"{name}, eval, no gradients, PyTorch")
        group = {key: model.to(args.device) for key, model in group.items()}
        tables.append(table(f"{name}, PyTorch", measure(group, dict(group), args)))
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing or args.no_onnx or args.device != "cpu":
        print("exported graphs are not timed" + (f": {', '.join(missing)} not installed" if missing else ""))
    else:
        print(f"{args.model}, exported, ONNX Runtime")
        with tempfile.TemporaryDirectory() as folder:
            graphs = {name: prunex.export(m, Path(folder) / f"{i}.onnx") for i, (name, m) in enumerate(models.items())}
            calls = {name: session(graph, args.threads) for name, graph in graphs.items()}
            tables.append(table(f"{args.model}, ONNX Runtime", measure(models, calls, args)))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
