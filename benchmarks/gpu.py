"""Everything that only a GPU can say, in one command: slim models, training steps, explainers, scores, attention.

    python benchmarks/gpu.py                         all of it, below nine minutes; OUT/gpu.json and OUT/gpu.md
    python benchmarks/gpu.py --parts slim attention  some of it
    python benchmarks/gpu.py --dry                   a tiny model on the CPU: does the campaign run at all?
    python benchmarks/gpu.py --device cpu --parts explain scores --batch 8   what a CPU can say, too

Random weights: time depends on shapes alone. All of one comparison are timed in turn in one process, each told as a
ratio to what it stands beside: slim models to the dense timm model in the same mode (eager, compiled, a CUDA graph),
training steps to a dense step, explainers and scores to a dense forward, attention under a policy to the same without.
What cannot be built or does not fit is told with its error, and the campaign goes on. Of the ways to attend under a
policy the fastest that is as exact as bfloat16 allows is named; a CPU needs TRITON_INTERPRET=1 for the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
import torch.nn.functional as F
from explainers import CHEAP
from measure import side_by_side, start
from torch import Tensor, nn
from train_step import step

import prunex
from prunex.guidance import Guidance
from prunex.metrics import removal_curves
from prunex.recipes.timing import chip, quartiles
from prunex.removal.game import Removal
from prunex.vit.policy import under_policy

Call = Callable[[], object]
Row = dict[str, Any]
BUDGET = 0.65  # of the dense multiply-adds
TINY = "vit_tiny_patch16_224"  # of a dry run
SMALLER = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3}
WANTED = {
    "slim": ">= 0.95 of the MACs ratio", "dynamicvit": "<= 1.10", "with teacher": "<= 1.40", "evit": "<= 0.70",
    "curves at once": ">= 10 times as fast as a loop of steps",
}  # fmt: skip
# Of results of about 1 in bfloat16: what rounding alone may make of an output, and of a gradient over its largest.
ROUNDING = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


class Campaign:
    """What is measured on one device, and how long each part may take."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.dry = args, args.dry
        self.device = args.device
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.rows: list[Row] = []
        self.chosen: str | None = None  # the way to attend under a policy

    def names(self, *names: str) -> tuple[str, ...]:
        """Architectures to measure; of a dry run a tiny one in the place of all."""
        return (TINY,) if self.dry else names

    def model(self, name: str) -> nn.Module:
        """A timm model of random weights."""
        return timm.create_model(name, **(SMALLER if self.dry else {}))

    def images(self, model: Any, batch: int, dtype: torch.dtype | None = None) -> Tensor:
        """Noise of the model's size."""
        return torch.randn(batch, 3, *model.patch_embed.img_size, device=self.device, dtype=dtype)

    def batch(self, size: int) -> int:
        """A batch size: as asked for; of a dry run 2 at most."""
        return min(2, size) if self.dry else self.args.batch or size

    def compare(self, part: str, what: str, contestants: list[tuple[str, Call]], **more: Any) -> None:
        """Time contestants beside the first and keep a row of each; one that fails is told and left out."""
        able: list[tuple[str, Call]] = []
        peaks: dict[str, float] = {}
        for name, call in contestants:
            try:
                peaks[name] = self.peak(call)
                able.append((name, call))
            except Exception as error:  # of compilers, too, which have errors of their own
                if not able:  # without its reference there is nothing to compare with
                    raise
                self.rows.append({"part": part, "what": what, "name": name, "error": str(error).splitlines()[0][:200]})
        seconds = 0.0 if self.dry else self.args.seconds
        for timing in side_by_side(able, self.device, 0, seconds, self.args.clock, least=3):
            low, middle, high = quartiles(timing.ratios)
            row = {
                "part": part, "what": what, "name": timing.name, "ms": round(timing.median, 4),
                "ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4), "rounds": len(timing.own),
                "peak_mib": round(peaks[timing.name], 1), **{k: v[timing.name] for k, v in more.items()},
            }  # fmt: skip
            self.rows.append(row)
            print(f"  {what}: {timing.name} {timing.median:.3g} ms, {middle:.3f}", flush=True)

    def peak(self, call: Call) -> float:
        """MiB that a call takes at its most beyond what is there; 0 on a CPU. Warms up on the way."""
        call()
        if self.device == "cpu":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    # ----------------------------------------------------------------------------------------------------------- parts

    def slim(self) -> None:
        """Slim models beside dense ones, batch 256 and 1: eager, compiled, and as a CUDA graph."""
        for name in self.names("deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224"):
            models = {"dense": self.model(name).eval()}
            for method in ("evit", "topk", "tome"):
                model = self.model(name).eval()
                prunex.attach(model, method, budget=BUDGET)
                models[method] = prunex.slim(model)
            whole = prunex.cost(models["dense"]).macs
            macs = {method: round(prunex.cost(model).macs / whole, 4) for method, model in models.items()}
            models = {method: model.to(self.device, self.dtype) for method, model in models.items()}
            for batch in (2,) if self.dry else (self.args.batch or 256, 1):
                images = self.images(models["dense"], batch, self.dtype)
                for mode, make in self.modes().items():
                    if mode == "compiled" and name.startswith("vit_large"):
                        continue  # minutes of compiling for what the smaller ones tell
                    torch.compiler.reset()
                    calls = [(method, self.inference(make, model, images)) for method, model in models.items()]
                    self.compare("slim", f"{name}, batch {batch}, {mode}", calls, macs=macs)

    def modes(self) -> dict[str, Callable[[nn.Module, Tensor], Call]]:
        """How a forward may be run."""
        # The dry run has no compiler: it shows that the graph is captured.
        compiled = partial(torch.compile, backend="eager" if self.dry else "inductor", dynamic=False)
        modes = {"eager": lambda m, x: partial(m, x), "compiled": lambda m, x: partial(compiled(m), x)}
        return modes if self.device == "cpu" else {**modes, "CUDA graph": captured}

    @staticmethod
    def inference(make: Callable[[nn.Module, Tensor], Call], model: nn.Module, images: Tensor) -> Call:
        """A forward without gradients, made when it is first called, so that a failure is its own."""
        made: list[Call] = []

        def run() -> object:
            with torch.no_grad():
                if not made:
                    made.append(make(model, images))
                return made[0]()

        return run

    def train(self) -> None:
        """Training steps in bfloat16 autocast beside a dense one."""
        (name,), r = self.names("deit_small_patch16_224"), 0.7
        made: dict[str, tuple[str | None, dict[str, Any]]] = {
            "dense": (None, {}),
            "evit": ("evit", {"keep_ratio": r}),
            "dynamicvit": ("dynamicvit", {"keep_ratio": r, "teacher": False}),
            "dynamicvit, with teacher": ("dynamicvit", {"keep_ratio": r, "teacher": True}),
            "dynamicvit, guided": ("dynamicvit", {"keep_ratio": r, "teacher": False}),
            "xpruner, masks": ("xpruner", {"budget": 0.7}),
            "xpruner, thresholds": ("xpruner", {"budget": 0.7}),
        }
        contestants: list[tuple[str, Call]] = []
        for label, (method, options) in made.items():
            model = self.model(name).train()
            pruning: Any = None if method is None else prunex.attach(model, method, **options)
            model.to(self.device)
            images = self.images(model, self.batch(128))
            target = torch.randint(model.num_classes, (len(images),), device=self.device)  # type: ignore[arg-type]
            if label.endswith("guided"):
                pruning.also(Guidance(model, every=1))
            if label.endswith("thresholds"):
                pruning.pruner.stage = "thresholds"
            run = step(model, pruning, images, target, amp=True)
            contestants.append((label, labelled(pruning, target, run) if "xpruner" in label else run))
        self.compare("train", f"{name}, batch {self.batch(128)}, bfloat16 autocast", contestants)

    def explain(self) -> None:
        """Explainers at batch 64 beside a dense forward."""
        (name,) = self.names("deit_small_patch16_224")
        model = self.model(name).eval().to(self.device)
        images = self.images(model, self.batch(64))
        calls: list[tuple[str, Call]] = [("dense forward", self.inference(lambda m, x: partial(m, x), model, images))]
        for label, method, options, _ in CHEAP:
            made = {k: v(model) if isinstance(v, type) else v for k, v in options.items()}
            calls.append((label, partial(prunex.explain, method, model, images, **made)))
        self.compare("explain", f"{name}, batch {len(images)}, float32", calls)

    def scores(self) -> None:
        """Removal curves by dropping tokens beside a loop of one forward a step with masked attention."""
        (name,), steps = self.names("deit_small_patch16_224"), tuple(k / 10 for k in range(11))
        model: Any = self.model(name).eval().to(self.device)
        images = self.images(model, self.batch(64))
        maps = torch.rand(len(images), *model.patch_embed.grid_size, device=self.device)
        with torch.no_grad():
            target = model(images).argmax(1)
        place = maps.flatten(1).argsort(1, descending=True).argsort(1)

        def loop() -> None:
            for image in range(len(images)):
                for share in steps:
                    kept = place[image] >= round(share * place.shape[1])
                    Removal(model, images[image : image + 1], output="logit")(kept[None, None])

        def at_once() -> None:
            removal_curves(model, images, maps, target, steps=steps, removal="drop", orders=("without",))

        dense = self.inference(lambda m, x: partial(m, x), model, images)
        what = f"{name}, batch {len(images)}, {len(steps)} steps, float32"
        self.compare("scores", what, [("dense forward", dense), ("curves at once", at_once), ("a loop of steps", loop)])

    def attention(self) -> None:
        """Ways to attend under a differentiable policy, forward and backward, and how exact each is in bfloat16."""
        b, h, n, d = (2, 2, 17, 16) if self.dry else (128, 6, 197, 64)
        generator = torch.Generator().manual_seed(0)
        q, k, v, r = (torch.randn(b, h, n, d, generator=generator) for _ in range(4))
        policy = (torch.rand(b, n, generator=generator) > 0.4).float()
        policy[:, 0] = 1
        # Rounded first: what is compared is the arithmetic, not the rounding of what goes in.
        q, k, v, r = (t.to(self.dtype) for t in (q, k, v, r))
        exact = results(by_definition, *(t[:2].double() for t in (q, k, v, policy, r)))
        errors: dict[str, dict[str, Any]] = {"largest_error": {}, "gradients": {}}
        calls: list[tuple[str, Call]] = []
        q, k, v, r, policy = (t.to(self.device) for t in (q, k, v, r, policy))
        ways = {"no policy": unmasked, "value columns": columns, "bias": biased, "flex": flexible, "triton": kernel}
        for label, attend in ways.items():
            first: Any = None
            grads: Any = None
            if label != "no policy":
                try:
                    # The gradient of a policy of 0 is out of a bias's reach.
                    ours = results(attend, *(t[:2] for t in (q, k, v, policy, r)))
                    first, grads = differences(ours, exact, policy[:2] > 0 if label in ("bias", "flex") else None)
                except Exception as error:  # told again, and in full, where it is timed
                    print(f"  {label} gives no result to compare: {type(error).__name__}", flush=True)
            errors["largest_error"][label], errors["gradients"][label] = first, grads
            leaves = [t.detach().requires_grad_() for t in (q, k, v, policy)]
            calls.append((label, both_ways(attend, *leaves, r)))
        what = f"B {b}, H {h}, N {n}, d {d}, forward and backward"
        self.compare("attention", what, calls, **errors)
        self.chosen = choice([row for row in self.rows if row["part"] == "attention"], ROUNDING[self.dtype])
        print(f"  choose: {self.chosen}", flush=True)


def choice(rows: list[Row], most: float) -> str:
    """The fastest way to attend under a policy whose output and gradients, of policies of 0 too, are exact enough."""
    able = [row for row in rows if row.get("largest_error") is not None and "error" not in row]
    exact = [row for row in able if row["name"] in WHOLE and max(row["largest_error"], row["gradients"]) <= most]
    return min(exact, key=lambda row: row["ms"])["name"] if exact else "none is exact enough"


def results(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, policy: Tensor, r: Tensor) -> list[Tensor]:
    """Output and gradients of one way to attend, float64 on the CPU; zeros for what it gives no gradient to."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, policy)]
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, r, allow_unused=True)
    known = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [t.detach().double().cpu() for t in (out, *known)]


def differences(ours: list[Tensor], exact: list[Tensor], where: Tensor | None) -> tuple[float, float]:
    """The largest difference of an output, and of gradients over their largest; of policies ``where`` alone."""
    gaps = []
    for number, (a, b) in enumerate(zip(ours[1:], exact[1:], strict=True)):
        gap = (a - b).abs()
        if number == 3 and where is not None:
            gap = gap[where.cpu()]
        gaps.append(float(gap.max() / b.abs().max().clamp(min=1e-2)))  # 0 where every token sees itself alone
    return float((ours[0] - exact[0]).abs().max()), max(gaps)


def captured(model: nn.Module, images: Tensor) -> Call:
    """A forward as a CUDA graph, which a fixed number of tokens allows."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # type: ignore[no-untyped-call]
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    return graph.replay


def labelled(pruning: Any, target: Tensor, run: Call) -> Call:
    """A step whose masks know the images' classes."""

    def call() -> None:
        with pruning.labelled(target):
            run()

    return call


def both_ways(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, policy: Tensor, r: Tensor) -> Call:
    """Forward and backward of one way to attend."""

    def call() -> None:
        wanted = [t for t in (q, k, v, policy) if t.requires_grad]
        torch.autograd.grad(attend(q, k, v, policy), wanted, r, allow_unused=True)

    return call


def unmasked(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
    """Fused attention of all tokens."""
    return F.scaled_dot_product_attention(q, k, v)


def columns(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
    """What prunex does: further value columns and one key in ordinary fused attention."""
    return under_policy(q, k, v, policy, q.shape[-1] ** -0.5)


def biased(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
    """A mask [B, 1, N, N] of log policies, with the gradient of a policy above 0 alone."""
    eye = torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
    bias = policy[:, None, None, :].log().masked_fill(eye, 0).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias)


def flexible(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
    """FlexAttention, whose kernel reads the policy itself; compiled, as it has to be."""
    from torch.nn.attention.flex_attention import flex_attention

    logs = policy.log()

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i == j, value, value + logs[b, j])

    attend: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    return attend(q, k, v, score_mod=score)


def kernel(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
    """Triton kernels."""
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError("Triton runs on a CPU in its interpreter alone: set TRITON_INTERPRET=1")
    from policy_kernel import fused

    return fused(q, k, v, policy)


WHOLE = ("value columns", "triton")  # give the gradient of a policy of 0, too, which straight-through training needs
_FLEX: list[Any] = []


def _compiled(function: Any) -> Any:
    if not _FLEX:
        _FLEX.append(torch.compile(function, dynamic=False))
    return _FLEX[0]


def by_definition(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
    """DynamicViT's Eqs. 9-10, written out."""
    eye = torch.eye(policy.shape[1], dtype=torch.bool)
    weight = (q @ k.mT * q.shape[-1] ** -0.5).exp() * torch.where(eye, 1.0, policy[:, None, None, :])
    return weight / weight.sum(-1, keepdim=True) @ v


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as Markdown, a table a comparison."""
    for part, what in dict.fromkeys((row["part"], row["what"]) for row in rows):
        some = [row for row in rows if (row["part"], row["what"]) == (part, what)]
        extra = [k for k in ("macs", "largest_error", "gradients") if any(k in row for row in some)]
        yield f"\n**{part}: {what}**\n\n| | ms | ratio | quartiles | peak MiB |" + "".join(f" {k} |" for k in extra)
        yield "|---|---|---|---|---|" + "---|" * len(extra)
        for row in some:
            if "error" in row:
                yield f"| {row['name']} | failed: {row['error']} | | | |" + " |" * len(extra)
                continue
            more = "".join(f" {'' if row[k] is None else format(row[k], '.3g')} |" for k in extra)
            yield (
                f"| {row['name']} | {row['ms']:.3g} | **{row['ratio']:.3f}** | {row['low']:.3f} to {row['high']:.3f} "
                f"| {row['peak_mib']:.0f} |{more}"
            )


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    about: dict[str, Any] = {
        "device": chip(device), "python": platform.python_version(), "torch": torch.__version__,
        "timm": timm.__version__, "lightning": lightning.__version__, "prunex": prunex.__version__,
    }  # fmt: skip
    if device == "cuda":
        about |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
        try:
            about |= {"clock_mhz": torch.cuda.clock_rate(), "power_w": torch.cuda.power_draw() / 1000}
        except (RuntimeError, ModuleNotFoundError) as error:  # they need NVIDIA's own bindings
            about["clock_mhz"] = f"unknown: {type(error).__name__}"
    return about


def main(arguments: list[str] | None = None) -> None:
    parts = ("slim", "train", "explain", "scores", "attention")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument("--seconds", type=float, default=6.0, help="for the rounds of one comparison")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder to write to")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, three rounds")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, help="in the place of each part's own")
    args = parser.parse_args(arguments)
    args.device = "cpu" if args.dry else args.device
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: --dry runs the campaign small, on the CPU")
    args.threads = torch.get_num_threads()
    args.clock = "cpu" if args.device == "cpu" and args.threads == 1 else "wall"  # others may use the processor, too
    start(args)
    campaign, began, taken = Campaign(args), time.perf_counter(), {}
    for part in args.parts:
        print(part, flush=True)
        since = time.perf_counter()
        getattr(campaign, part)()
        taken[part] = round(time.perf_counter() - since, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {**machine(args.device), "seconds": taken, "wanted": WANTED, "attention": campaign.chosen}
    (args.out / "gpu.json").write_text(json.dumps({"machine": about, "rows": campaign.rows}, indent=1) + "\n")
    lines = [f"{about['device']}, torch {about['torch']}", *table(campaign.rows)]
    if campaign.chosen is not None:
        lines.append(f"\nAttention under a policy, to choose by these rows: {campaign.chosen}.")
    (args.out / "gpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    failed = sum("error" in row for row in campaign.rows)
    spent = time.perf_counter() - began
    print(f"\n{len(campaign.rows)} rows, {failed} failed, {spent:.0f} s; written to {args.out}")


if __name__ == "__main__":
    main()
