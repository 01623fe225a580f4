"""``prunex doctor``: what is installed, what it runs on, and what prunex would refuse of a model."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import timm.layers
import torch
from packaging.requirements import Requirement
from torch import nn

import prunex
from prunex.clash import REMEDY, installed_beside
from prunex.errors import PrunexError
from prunex.files import is_there
from prunex.recipes.given import on_hub
from prunex.recipes.runs import forward, noise, open_model_or_name
from prunex.recipes.timing import chip
from prunex.slim.files import check_savable
from prunex.vit.cost import tally

PROJECT = "prunex-vit"
_GOOD, _BAD = "ok", "!!"
_QUICK = "one forward"  # explainers that need no more are tried; others would take minutes


def doctor(args: Any) -> int:
    """Print what was found; exit code 1 where something that is installed does not fit."""
    fine = True
    for good, line in [*environment(), *devices()]:
        print(f"{_GOOD if good else _BAD}  {line}")
        fine &= good
    if args.model is not None:
        print(f"\n{args.model}")
        for good, line in examined(opened(args)):
            print(f"{_GOOD if good else '--'}  {line}", flush=True)
    return 0 if fine else 1


def environment() -> Iterator[tuple[bool, str]]:
    """Python, prunex and what it needs: whether each fits, and a line."""
    folder = Path(str(prunex.__file__)).parent
    yield True, f"Python {platform.python_version()} on {platform.platform()}"
    yield True, f"{PROJECT} {prunex.__version__} in {folder}"
    for other in installed_beside(folder.parent):
        yield False, f"PyPI's project prunex ({other}) is in the same folder: {REMEDY}"
    needs: list[Requirement] = []
    with suppress(PackageNotFoundError):  # a clone on PYTHONPATH has no metadata
        needs = [Requirement(text) for text in requires(PROJECT) or []]
    for need in needs:
        # What extras ask for need not be installed.
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(need.name)
        except PackageNotFoundError:
            yield False, f"{need.name} is missing: pip install '{need}'"
            continue
        fits = need.specifier.contains(installed, prereleases=True)
        yield fits, f"{need.name} {installed}" + ("" if fits else f", and {PROJECT} needs {need.specifier}")


def devices() -> Iterator[tuple[bool, str]]:
    """What torch computes on, and by which kernels attention runs."""
    yield True, f"cpu: {chip()}, {torch.get_num_threads()} threads"
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield True, f"cuda:{number}: {about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
    if torch.backends.mps.is_available():
        yield True, "mps: Apple's GPU"
    backends = torch.backends.cuda
    kernels = {
        "flash": backends.flash_sdp_enabled() and backends.is_flash_attention_available(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "cuDNN": backends.cudnn_sdp_enabled() and torch.backends.cudnn.is_available(),
    }
    fused = bool(timm.layers.use_fused_attn())
    on_gpu = ", ".join(name for name, works in kernels.items() if works) or "none"
    said = "fused (scaled_dot_product_attention)" if fused else "not fused: TIMM_FUSED_ATTN=0 is set"
    yield True, f"attention is {said}" + (f"; on the GPU: {on_gpu}" if torch.cuda.is_available() else "")


def opened(args: Any) -> nn.Module:
    """The model that is meant; of a name without weights one of random ones, which refuses the same."""
    if args.weights is not None or on_hub(args.model) is not None or is_there(Path(args.model)):
        return open_model_or_name(args.model, args.weights, args.img_size)
    size = {} if args.img_size is None else {"img_size": args.img_size}
    try:
        model: nn.Module = timm.create_model(args.model, **size).eval()
    except Exception as error:  # timm, and every model of it, refuse in their own ways
        raise PrunexError(f"timm cannot make {args.model}: {' '.join(str(error).split())[:300]}") from error
    return model


def examined(model: nn.Module) -> Iterator[tuple[bool, str]]:
    """Method by method, whether it would take the model, with the reason where not."""
    # What is no ViT of ours cannot be counted either, and no method would take it.
    try:
        cost = tally(model)
    except PrunexError as error:
        yield False, f"all: {error}"
        return
    yield True, f"{cost.gmacs:.3g} GMACs and {cost.params:,} parameters an image"
    yield from _tried("slim and", [("save", lambda: check_savable(model))])
    images = noise(model, 1)
    if prunex.attached(model) is None and prunex.attached(model, units=True) is None:
        pruners = [m.name for m in prunex.methods("pruner")]
        yield from _tried("attach", [(name, partial(_attach, model, name, images)) for name in pruners])
    else:
        yield False, "attach: it is pruned already"
    explainers = prunex.methods("explainer")
    quick = [m.name for m in explainers if m.needs.startswith(_QUICK)]
    yield from _tried("explain", [(name, partial(prunex.explain, name, model, images)) for name in quick])
    others = ", ".join(m.name for m in explainers if m.name not in quick)
    yield True, f"explain, not tried, since they take many passes or something trained: {others}"


def _attach(model: nn.Module, name: str, images: torch.Tensor) -> None:
    # A copy each: nothing may hang on the model when the next method is tried.
    twin = copy.deepcopy(model)
    prunex.attach(twin, name)
    with torch.no_grad():
        forward(twin, images)


def _tried(what: str, calls: Sequence[tuple[str, Callable[[], object]]]) -> Iterator[tuple[bool, str]]:
    taken = []
    for name, call in calls:
        try:
            call()
            taken.append(name)
        except PrunexError as error:
            yield False, f"{what} {name}: {error}"
    if taken:
        yield True, f"{what}: {', '.join(taken)}"
