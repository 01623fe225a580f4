"""Accuracy of pruners that were never trained, on the validation images of a finished dense run, at equal budgets.

    python benchmarks/untrained.py runs/imagefolder-dense/version_0 --methods topk evit tome --budgets 0.8 0.65 0.5

The run's own model and data are used as they are; nothing is trained. Prints a markdown table.
"""

from __future__ import annotations

import argparse

import torch
from measure import start
from tqdm import tqdm

import prunex
from prunex.recipes.runs import evaluate, open_data, open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a dense run")
    parser.add_argument("--methods", nargs="+", default=["topk", "evit", "tome"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="of the dense MACs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(device="cpu", clock="wall")
    args = parser.parse_args()
    start(args)
    model, data = open_model(args.run), open_data(args.run)
    data.setup("validate")
    dense = prunex.cost(model)
    lines = [
        f"| dense | 100 % | {dense.gmacs:.2f} | {100 * evaluate(model, data.val_dataloader())['accuracy']:.1f} % | |"
    ]
    for method, budget in tqdm([(m, b) for m in args.methods for b in args.budgets], unit="model"):
        with prunex.attach(model, method, budget=budget):
            spent, found = prunex.cost(model), evaluate(model, data.val_dataloader())
        kept = f"{100 * found['kept_digit_cover']:.1f} %" if "kept_digit_cover" in found else ""
        lines.append(
            f"| `{method}` | {100 * spent.macs / dense.macs:.1f} % | {spent.gmacs:.2f} "
            f"| {100 * found['accuracy']:.1f} % | {kept} |"
        )
    print("\n| method | MACs of dense | GMACs | accuracy | object patches alone in a token |\n|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
