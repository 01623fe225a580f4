"""The authors' own DynamicViT, EViT and ToMe beside ours: the same weights, images/s in turns in one process, outputs.

    git clone https://github.com/raoyongming/DynamicViT; git clone https://github.com/youweiliang/evit
    git clone https://github.com/facebookresearch/ToMe
    python benchmarks/authors.py --dynamicvit DynamicViT --evit evit --tome ToMe --threads 1 --clock cpu

Their files are imported from these checkouts as they are; what they import beside torch and timm, and what forwards do
not need (loggers, counters of operations), is stood in for by empty modules. What does not run with the torch and timm
at hand is told with its error. Random weights: dense ones of timm, DynamicViT's predictors theirs. Largest differences
are told over the largest of their outputs, for float32; their attention makes whole matrices, as it is written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from measure import options, side_by_side, start
from torch import Tensor, nn

import prunex
from prunex.recipes.timing import quartiles

STAGES = (3, 6, 9)
# By method: where it is published, the file that says it is there, the module to import, and what stands in for others.
CHECKOUTS: dict[str, tuple[str, str, str, dict[str, dict[str, Any]]]] = {
    "dynamicvit": (
        "raoyongming/DynamicViT",
        "models/dyvit.py",
        "models.dyvit",
        {"torch._six": {"inf": float("inf")}, "tensorboardX": {"SummaryWriter": None}},
    ),
    "evit": (
        "youweiliang/evit",
        "evit.py",
        "evit",
        # Their registration would put models of theirs in the place of timm's, under the same names.
        {"torchprofile": {"profile_macs": None}, "timm.models.registry": {"register_model": lambda make: make}},
    ),
    "tome": ("facebookresearch/ToMe", "tome/patch/timm.py", "tome.patch.timm", {}),
}


class Missing(Exception):
    """What is no checkout."""


@contextmanager
def stand_ins(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Empty modules under some names, with a few attributes each."""
    before = {name: sys.modules.get(name) for name in modules}
    for name, attributes in modules.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def imported(folder: Path, name: str, modules: dict[str, dict[str, Any]]) -> Any:
    """A module of a checkout; its kin leave ``sys.modules`` again, since every checkout has a ``utils``."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        with stand_ins(modules):
            return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for other in set(sys.modules) - known:
            file = getattr(sys.modules[other], "__file__", None)
            if file is not None and Path(file).is_relative_to(folder):
                del sys.modules[other]


def dense(name: str) -> Any:
    """A timm model whose weights tell images apart, which timm's own start hardly does."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, p[0].numel() ** -0.5)
    return model


def dynamicvit(module: Any, name: str, rate: float) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours, of the same weights."""
    model = dense(name)
    theirs = module.VisionTransformerDiffPruning(
        embed_dim=model.embed_dim, depth=len(model.blocks), num_heads=model.blocks[0].attn.num_heads,
        pruning_loc=STAGES, token_ratio=[rate ** (i + 1) for i in range(len(STAGES))],
    ).eval()  # fmt: skip
    given(theirs, model, "score_predictor")
    pruning = prunex.attach(model, "dynamicvit", keep_ratio=rate, stages=STAGES)
    pruning.load_official(theirs.state_dict())
    return theirs, prunex.slim(model)


def evit(module: Any, name: str, rate: float) -> tuple[nn.Module, nn.Module]:
    """Theirs with its fused token, and ours."""
    model = dense(name)
    rates = [rate if block in STAGES else 1 for block in range(len(model.blocks))]
    theirs = module.EViT(
        embed_dim=model.embed_dim, depth=len(rates), num_heads=model.blocks[0].attn.num_heads, keep_rate=rates,
        fuse_token=True,
    ).eval()  # fmt: skip
    given(theirs, model)
    prunex.attach(model, "evit", keep_ratio=rate, stages=STAGES)
    return theirs, prunex.slim(model)


def tome(module: Any, name: str, rate: float) -> tuple[nn.Module, nn.Module]:
    """Theirs, which rewrites a timm model in place, and ours; 13 tokens a block, as they publish for DeiT-S."""
    theirs, model = dense(name), dense(name)
    module.apply_patch(theirs)
    theirs.r = 13
    prunex.attach(model, "tome", r=13)
    return theirs, prunex.slim(model)


def given(theirs: nn.Module, model: nn.Module, but: str = "none") -> None:
    """Give a model of theirs timm's weights; all have to fit, and nothing may be left out but what ``but`` names."""
    missing, foreign = theirs.load_state_dict(model.state_dict(), strict=False)
    if foreign or any(not name.startswith(but) for name in missing):
        raise RuntimeError(f"timm's weights do not fit: missing {missing[:3]}, foreign {foreign[:3]}")


MAKE: dict[str, Callable[[Any, str, float], tuple[nn.Module, nn.Module]]] = {
    "dynamicvit": dynamicvit, "evit": evit, "tome": tome,
}  # fmt: skip


def checkout(method: str, folder: Path) -> Path:
    """A folder that holds what is asked for; refused where it does not."""
    repository, file, _, _ = CHECKOUTS[method]
    if not (folder / file).is_file():
        raise Missing(
            f"--{method} {folder} holds no {file}: give a checkout, git clone https://github.com/{repository}"
        )
    return folder.resolve()


def compared(method: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """Rows of the table for one method."""
    _, _, module, modules = CHECKOUTS[method]
    with contextlib.redirect_stdout(io.StringIO()):  # theirs announce themselves
        theirs, ours = MAKE[method](imported(folder, module, modules), args.model, args.keep_ratio)
    models = {"theirs": theirs.to(args.device), "ours": ours.to(args.device)}
    with torch.no_grad():
        images = torch.randn(args.batch, 3, 224, 224, device=args.device)
        wanted, logits = models["theirs"](images), models["ours"](images)
        gap = float((wanted - logits).abs().max() / wanted.abs().max())
        agree = float((wanted.argmax(1) == logits.argmax(1)).double().mean())

        def forward(model: nn.Module) -> Tensor:
            answer: Tensor = model(images)
            return answer

        calls = [(name, partial(forward, model)) for name, model in models.items()]
        timings = side_by_side(calls, args.device, args.repeats, args.seconds, args.clock)
    rows = []
    for timing in timings:
        low, middle, high = quartiles(timing.ratios)
        speed = 1000 * args.batch / timing.median
        beside = "" if timing.name == "theirs" else f"{gap:.1e}, {agree:.0%}"
        rows.append(
            f"| {method} | {timing.name} | {speed:.1f} | **{middle:.3f}** | {low:.3f} to {high:.3f} | {beside} |"
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    for method, (repository, *_) in CHECKOUTS.items():
        parser.add_argument(f"--{method}", type=Path, metavar="DIR", help=f"a checkout of {repository}")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args(arguments)
    folders = {method: getattr(args, method) for method in CHECKOUTS if getattr(args, method) is not None}
    if not folders:
        parser.error("give at least one checkout: " + ", ".join(f"--{method} DIR" for method in CHECKOUTS))
    try:
        folders = {method: checkout(method, folder) for method, folder in folders.items()}
    except Missing as error:
        parser.error(str(error))
    start(args)
    print(f"{args.model}, float32, batch {args.batch}, keep ratio {args.keep_ratio}, ToMe's r 13\n", flush=True)
    rows = []
    for method, folder in folders.items():
        try:
            rows += compared(method, folder, args)
        except Exception as error:  # whatever code of others raises with versions that it does not know
            version = f"torch {torch.__version__} and timm {timm.__version__}"
            print(f"{method}: theirs does not run with {version}: {type(error).__name__}: {error}", flush=True)
    if rows:
        print("| | | images/s (median) | time over theirs | quartiles | largest difference, same class |")
        print("|---|---|---|---|---|---|")
        print("\n".join(rows))


if __name__ == "__main__":
    main()
