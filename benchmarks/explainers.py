"""What each explainer costs, as a ratio to one dense fused forward of the same batch, measured side by side.

    python benchmarks/explainers.py --threads 2 --batch 8
    python benchmarks/explainers.py --methods atman,integrated_gradients --repeats 3

Random weights: time depends on shapes alone. The last lines are a markdown table. Methods of many passes take minutes a
round and get rounds of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from measure import Timing, options, side_by_side, start, table

import prunex
from prunex.learned.diffmask import DiffMaskExplainer
from prunex.learned.vit_shapley import ShapleyExplainer

# Name, explainer, options, passes: F forwards, B activation-only backwards, L backwards of one block, R relevance.
CHEAP: list[tuple[str, str, dict[str, Any], str]] = [
    ("raw_attention", "raw_attention", {}, "1F"),
    ("dino", "dino", {}, "1F"),
    ("rollout", "rollout", {}, "1F"),
    ("grad_cam", "grad_cam", {}, "1F + 1L"),
    ("grad_cam, attention", "grad_cam", {"kind": "attention"}, "1F + 1L"),
    ("partial_lrp", "partial_lrp", {}, "1F + 1L"),
    ("r_cut", "r_cut", {}, "1F + 1L + eigenvectors"),
    ("generic_attention", "generic_attention", {}, "1F + 1B"),
    ("grad_sam", "grad_sam", {}, "1F + 1B"),
    ("legrad", "legrad", {}, "1F + 2L"),
    ("legrad, all blocks", "legrad", {"start_layer": 0}, "1F + 1B"),
    ("tokentm", "tokentm", {}, "1F + 1B"),
    ("lrp, attnlrp", "lrp", {"rule": "attnlrp"}, "1F + 1B"),
    ("lrp, cplrp", "lrp", {"rule": "cplrp"}, "1F + 1B"),
    ("lrp, zplus", "lrp", {"rule": "zplus"}, "1F + 1R"),
    ("transformer_attribution", "transformer_attribution", {}, "1F + 1B + 1R"),
    ("transformer_attribution, start 1", "transformer_attribution", {"start_layer": 1}, "1F + 1B + 1R"),
    ("vit_shapley", "vit_shapley", {"explainer": ShapleyExplainer}, "3F and a head"),
    ("diffmask", "diffmask", {"explainer": DiffMaskExplainer}, "2F and gates"),
]
DEAR: list[tuple[str, str, dict[str, Any], str]] = [
    ("beyond_intuition, token", "beyond_intuition", {"variant": "token"}, "21F + 20L"),
    ("beyond_intuition, head", "beyond_intuition", {"variant": "head"}, "21F + 1B + 20L"),
    ("integrated_gradients, 50 steps", "integrated_gradients", {}, "51F + 50B"),
    ("integrated_gradients, tokens", "integrated_gradients", {"space": "tokens"}, "51F + 50B"),
    ("atman", "atman", {}, "197F"),
    ("vit_cx", "vit_cx", {}, "(1 + 2K)F, K of the image"),
    ("shap, 400 coalitions", "shap", {"budget": 400}, "400F of parts of the patches"),
    ("attention_flow", "attention_flow", {"max_tokens": 1000}, "1F + P maximum flows"),
]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--methods", default="cheap", help="names with commas between, cheap, dear or all")
    args = parser.parse_args()
    start(args)
    rows = {"cheap": CHEAP, "dear": DEAR, "all": CHEAP + DEAR}.get(args.methods)
    if rows is None:
        names = [name.strip() for name in args.methods.split(",")]
        known = sorted({r[1] for r in CHEAP + DEAR})
        for name in names:
            if name not in known:
                parser.error(f"--methods {name} is none of cheap, dear, all, {', '.join(known)}")
        rows = [r for r in CHEAP + DEAR if r[1] in names]
    model = timm.create_model(args.model).eval().to(args.device)
    images = torch.randn(args.batch, 3, *model.patch_embed.img_size, device=args.device)
    print(f"{args.model}, float32, batch {args.batch}, eval\n")

    def dense() -> None:
        with torch.inference_mode():
            model(images)

    timings: list[tuple[str, Timing]] = []
    for group in ([r for r in rows if r in CHEAP], *[[r] for r in rows if r in DEAR]):
        calls: list[tuple[str, Callable[[], object]]] = [("dense forward", dense)]
        for name, method, more, _ in group:
            made = {k: v(model) if isinstance(v, type) else v for k, v in more.items()}  # explainers, untrained
            calls.append((name, partial(prunex.explain, method, model, images, **made)))
        if group:
            passes = {name: p for name, _, _, p in group}
            for timing in side_by_side(calls, args.device, args.repeats, args.seconds, args.clock)[1:]:
                timings.append((passes[timing.name], timing))
                print(f"{timing.name}: {sorted(timing.ratios)[len(timing.ratios) // 2]:.2f}", flush=True)
    print("\n" + table(timings, "passes"))


if __name__ == "__main__":
    main()
