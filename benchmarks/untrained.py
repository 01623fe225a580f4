"""Accuracy and speed of pruners that were never trained, on a finished dense run's validation images, at equal budgets.

    python benchmarks/untrained.py runs/imagefolder-dense/version_0 --methods topk evit tome --budgets 0.8 0.65 0.5

The run's own model and data are used as they are; nothing is trained. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measure import side_by_side, start
from torch import nn
from tqdm import tqdm

import prunex
from prunex.recipes.runs import evaluate, open_data, open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a dense run")
    parser.add_argument("--methods", nargs="+", default=["topk", "evit", "tome"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="of the dense MACs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8, help="images in a timed forward")
    parser.add_argument("--seconds", type=float, default=60.0, help="for timing all models side by side")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: with --threads 1")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    start(args)
    model, data = open_model(args.run), open_data(args.run)
    data.setup("validate")
    dense = prunex.cost(model)
    models: dict[str, nn.Module] = {}
    lines: dict[str, str] = {}

    def note(name: str, kind: str, told: nn.Module) -> None:
        spent, found = prunex.cost(told), evaluate(told, data.val_dataloader())
        kept = f"{100 * found['kept_digit_cover']:.1f} %" if "kept_digit_cover" in found else ""
        lines[name] = (
            f"| {kind} | {100 * spent.macs / dense.macs:.1f} % | {spent.gmacs:.2f} "
            f"| {100 * found['accuracy']:.1f} % | {kept} |"
        )
        models[name] = prunex.slim(told)

    note("dense", "dense", model)
    for method, budget in tqdm([(m, b) for m in args.methods for b in args.budgets], unit="model"):
        with prunex.attach(model, method, budget=budget):
            note(f"{method} {budget:g}", f"`{method}`", model)
    images = torch.cat([b[0] for b in itertools.islice(data.val_dataloader(), args.batch)])[: args.batch]

    def forward(told: nn.Module) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return told(images)

        return call

    contestants = [(name, forward(told)) for name, told in models.items()]
    timings = side_by_side(contestants, args.device, 0, args.seconds, args.clock)
    print(
        "\n| method | MACs of dense | GMACs | accuracy | object patches alone in a token | images/s | to dense |"
        "\n|---|---|---|---|---|---|---|"
    )
    for line, timing in zip(lines.values(), timings, strict=True):
        rate, ratio = 1e3 * args.batch / statistics.median(timing.own), 1 / statistics.median(timing.ratios)
        print(f"{line} {rate:.1f} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
