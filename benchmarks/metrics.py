"""Images a second of the removal metrics, beside a loop of single forwards and beside Quantus, in one process.

    python benchmarks/metrics.py --threads 1 --clock cpu
    PYTHONPATH=DIRECTORY_WITH_QUANTUS python benchmarks/metrics.py --threads 1 --clock cpu

The small case: images of 96 x 96 pixels, 36 patches (Quantus wants steps that divide the pixels of one channel), random
weights and maps. Three loops: one forward an image and step, once for each metric (``loop``); the same, but each curve
once for all metrics (``shared loop``); and one forward a step for the whole batch, once for each metric (``batched
loop``). Each contestant's values are compared with ours before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from measure import Timing, options, side_by_side, start
from torch import Tensor

from prunex.metrics import curves as curve_metrics
from prunex.metrics import perturbation, removal_curves
from prunex.metrics.occlusion import on_pixels
from prunex.metrics.ranks import ranked
from prunex.removal.game import Removal

SIZE, STEPS = 96, tuple(k / 9 for k in range(10))  # four patches a step
CURVES = ("deletion", "insertion", "srg", "aopc", "log_odds", "comprehensiveness", "sufficiency")
KINDS = {"insertion": ("only",), "sufficiency": ("only",), "srg": ("without", "least")}  # others read "without"


class Case:
    """A model, images and maps, and what the contestants make of them."""

    def __init__(self, name: str, depth: int, batch: int, device: str) -> None:
        self.model = timm.create_model(name, img_size=SIZE, depth=depth, num_classes=100).eval().to(device)
        with torch.no_grad():
            for p in self.model.parameters():
                if p.ndim > 1:  # timm's own start says nearly the same of every image
                    p.normal_(0, p[0].numel() ** -0.5)
        self.images = torch.randn(batch, 3, SIZE, SIZE, device=device)
        self.grid = self.model.patch_embed.grid_size
        self.maps = torch.rand(batch, *self.grid, device=device)
        with torch.no_grad():
            self.target = self.model(self.images).argmax(1)

    def sets(self, kind: str) -> list[Tensor]:
        """Patches gone after each step, bool [B, P] each."""
        place = ranked(self.maps.flatten(1), "negative" if kind == "least" else "positive")[0]
        counts = [round(q * place.shape[1]) for q in STEPS]
        return [(place >= k) if kind == "only" else (place < k) for k in counts]

    def pixels(self, gone: Tensor) -> Tensor:
        """Patches as pixels, [B, 1, H, W]."""
        side = SIZE // self.grid[0]
        return gone.unflatten(1, self.grid).repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(1)

    def probability(self, logits: Tensor, part: slice) -> Tensor:
        """Of the images' classes, [b]."""
        return logits.double().softmax(1).gather(1, self.target[part, None])[:, 0]

    @torch.no_grad()
    def scores(self, kind: str, removal: str, single: bool) -> Tensor:
        """One curve of every image, [B, K], a forward a step."""
        columns = []
        for gone in self.sets(kind):
            parts = [slice(i, i + 1) for i in range(len(gone))] if single else [slice(0, len(gone))]
            found = []
            for part in parts:
                if removal == "drop":
                    game = Removal(self.model, self.images[part], output="logit")
                    logits = game(~gone[part, None])[:, 0]
                else:
                    logits = self.model(self.images[part].masked_fill(self.pixels(gone[part]), 0))
                found.append(self.probability(logits, part))
            columns.append(torch.cat(found))
        return torch.stack(columns, 1)

    def looped(self, removal: str, single: bool, shared: bool) -> dict[str, Tensor]:
        """All curve metrics by loops; ``shared``: each curve is made once and not once a metric."""
        known: dict[str, Tensor] = {}
        values = {}
        for metric in CURVES:
            known = known if shared else {}
            for kind in KINDS.get(metric, ("without",)):
                if kind not in known:
                    known[kind] = self.scores(kind, removal, single)
            filler = next(iter(known.values()))
            without = known.get("without", filler)
            curves = curve_metrics.curves_of(without, known.get("only", filler), known.get("least", filler))
            curves.clean = without[:, 0] if "without" in known else filler[:, -1]
            values[metric] = self.read(metric, curves)
        return values

    def ours(self, removal: str) -> dict[str, Tensor]:
        """All curve metrics."""
        curves = removal_curves(
            self.model, self.images, self.maps, self.target, steps=STEPS, removal=removal, mean=(0.5,), std=(0.5,)
        )
        return {metric: self.read(metric, curves) for metric in CURVES}

    def read(self, metric: str, curves: Any) -> Tensor:
        """One metric off its curves, [B]."""
        function = getattr(curve_metrics, metric)
        takes = metric in ("log_odds", "comprehensiveness", "sufficiency")
        return function(curves, fractions=STEPS[1:-1]) if takes else function(curves)

    @torch.no_grad()
    def perturbed(self, single: bool) -> Tensor:
        """Hits of the positive perturbation test with black pixels by a loop, [B, K]."""
        values = on_pixels(self.maps, (SIZE, SIZE), self.model.patch_embed.patch_size)
        place = ranked(values, "positive")[0].view(-1, 1, SIZE, SIZE)
        columns = []
        for k in range(10):
            gone = place < int(SIZE * SIZE * (k / 10))
            parts = [slice(i, i + 1) for i in range(len(gone))] if single else [slice(0, len(gone))]
            hits = [self.model(self.images[p].masked_fill(gone[p], -1)).argmax(1) == self.target[p] for p in parts]
            columns.append(torch.cat(hits))
        return torch.stack(columns, 1).double()

    def perturbed_at_once(self) -> Tensor:
        """The same by prunex."""
        options: dict[str, Any] = {"mean": (0.5,), "std": (0.5,)}
        return perturbation(self.model, self.images, self.maps, self.target, **options).hits


def quantus_curve(case: Case) -> Callable[[], Tensor] | None:
    """Pixel flipping of Quantus, whole patches a step, [B, K - 1]; None where it cannot be imported."""
    try:
        import quantus
    except ImportError as error:
        print(f"Quantus is left out: {error}\n")
        return None
    step = 3 * SIZE * SIZE // (len(STEPS) - 1)
    metric = quantus.PixelFlipping(
        features_in_step=step, normalise=False, perturb_baseline=0.0, disable_warnings=True, return_aggregate=False
    )
    x, y = case.images.cpu().numpy(), case.target.cpu().numpy()
    side = SIZE // case.grid[0]
    wide = case.maps.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None].expand(-1, 3, -1, -1)
    maps = wide.contiguous().cpu().numpy()
    print(f"Quantus {quantus.__version__}: PixelFlipping, {step} values a step, baseline 0, no normalisation\n")
    device = str(case.images.device)

    def call() -> Tensor:
        found = metric(model=case.model, x_batch=x, y_batch=y, a_batch=maps, device=device, batch_size=len(x))
        return torch.tensor(found, dtype=torch.float64)

    return call


def agree(name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Print the largest difference, and stop where it is none of rounding."""
    gap = float((found.cpu() - wanted.cpu()).abs().max())
    print(f"{name}: largest difference {gap:.1e}")
    if gap > tolerance:
        raise SystemExit(f"{name} does not agree with ours: the comparison would mean nothing")


def show(title: str, timings: list[Timing], batch: int) -> None:
    print(f"\n| {title} | images/s (median) | ours is faster by | quartiles |\n|---|---|---|---|")
    for t in timings:
        ratios = sorted(t.ratios)
        low, middle, high = (ratios[round(f * (len(ratios) - 1))] for f in (0.25, 0.5, 0.75))
        print(f"| {t.name} | {1000 * batch / t.median:.1f} | **{middle:.2f}** | {low:.2f} to {high:.2f} |")
    print(flush=True)


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.set_defaults(model="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--depth", type=int, default=4, help="blocks of the model")
    args = parser.parse_args()
    start(args)
    case = Case(args.model, args.depth, args.batch, args.device)
    print(f"{args.model} of {args.depth} blocks, {SIZE} x {SIZE} pixels, {case.maps[0].numel()} patches")
    print(f"float32, batch {args.batch}\n")
    measure = partial(
        side_by_side, device=args.device, repeats=args.repeats, seconds=args.seconds, clock=args.clock, least=3
    )

    agree("perturbation, loop", case.perturbed(True), case.perturbed_at_once(), 0)
    timings = measure(
        [
            ("ours", case.perturbed_at_once),
            ("loop", partial(case.perturbed, True)),
            ("batched loop", partial(case.perturbed, False)),
        ]
    )
    show("perturbation, 10 steps, black pixels", timings, args.batch)

    def deletion_alone() -> Tensor:
        more: dict[str, Any] = {"steps": STEPS, "orders": ("without",)}
        return curve_metrics.deletion(removal_curves(case.model, case.images, case.maps, case.target, **more))

    def deletion_loop(single: bool) -> Tensor:
        return curve_metrics.deletion(curve_metrics.curves_of(case.scores("without", "drop", single)))

    agree("deletion, drop, loop", deletion_loop(True), deletion_alone(), 1e-4)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("ours", deletion_alone),
        ("loop", partial(deletion_loop, True)),
        ("batched loop", partial(deletion_loop, False)),
    ]
    show("deletion alone, 10 points, drop", measure(calls), args.batch)

    for removal in ("drop", "grey"):
        wanted = case.ours(removal)
        for name, value in case.looped(removal, single=False, shared=False).items():
            agree(f"{name}, {removal}, batched loop", value, wanted[name], 1e-4)
        loops = [("loop", True, False), ("shared loop", True, True), ("batched loop", False, False)]
        calls = [("ours", partial(case.ours, removal))]
        calls += [(name, partial(case.looped, removal, single, shared)) for name, single, shared in loops]
        show(f"{len(CURVES)} curve metrics, 10 points, {removal}", measure(calls), args.batch)

    theirs = quantus_curve(case)
    if theirs is not None:

        def flipping() -> Tensor:
            more: dict[str, Any] = {"steps": STEPS[1:], "removal": "grey", "orders": ("without",)}
            return torch.as_tensor(removal_curves(case.model, case.images, case.maps, case.target, **more).without)

        agree("pixel flipping, Quantus", theirs(), flipping(), 1e-5)
        show("deletion curve, 9 steps, grey",
             measure([("ours", flipping), ("Quantus PixelFlipping", theirs)]), args.batch)  # fmt: skip


if __name__ == "__main__":
    main()
