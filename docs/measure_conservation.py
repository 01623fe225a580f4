"""Print what share of the output each family's relevance sums to: python docs/measure_conservation.py --images 16.

Every family is a published architecture made small (as the tests build it), in float64, with random weights of lively
attention. Relevance of all tokens that enter the first block, class and register tokens included, over what the pass
started from; the median of the images. The last two columns are of the same models with all biases set to 0.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import prunex  # noqa: E402
from tests.vit.families import FAMILIES, double  # noqa: E402
from tests.vits import images_for  # noqa: E402

RULES = ("zplus", "cplrp", "attnlrp")


def share(model: nn.Module, rule: str, images: int) -> float:
    """Median over images of relevance over what the pass started from: 1 under "zplus", else the logit."""
    e = prunex.explain("lrp", model, images_for(model, images), rule=rule)
    relevance = e.maps.sum((1, 2)) + e.info["prefix"].sum(1)
    score = e.logits.gather(1, e.target[:, None])[:, 0]
    return float((relevance if rule == "zplus" else relevance / score).median())


def without_biases(model: nn.Module) -> nn.Module:
    """The model with all biases 0, in place."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="random images a family; default 16")
    args = parser.parse_args()
    print("| family | z+ | CP-LRP | AttnLRP | CP-LRP, no biases | AttnLRP, no biases |")
    print("|---|---|---|---|---|---|")
    for name, family in FAMILIES.items():
        model = double(name)
        shares = [share(model, rule, args.images) for rule in RULES]
        shares += [share(without_biases(model), rule, args.images) for rule in RULES[1:]]
        print(f"| {family.title} | {' | '.join(f'{s:.3f}' for s in shares)} |", flush=True)


if __name__ == "__main__":
    main()
