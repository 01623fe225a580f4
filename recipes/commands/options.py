"""The options of our own commands, and every mistake in them that can be seen before torch is imported.

Those of ``prunex explain`` and ``prunex score`` are in ``explain_options``.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from prunex.errors import PrunexError
from prunex.files import is_there
from prunex.formats import FORMATS, check_format
from prunex.recipes.commands.init import QUESTIONS, ask, check_answers, check_images
from prunex.recipes.commands.listing import check_methods
from prunex.recipes.given import check_folder, check_model, check_run, image_files, on_hub, tar_files

# Metrics of prunex score in the order of its table; "perturbation" stands for the first two.
METRICS = (
    *("perturbation_positive", "perturbation_negative", "deletion", "insertion", "aopc", "log_odds"),
    *("comprehensiveness", "sufficiency", "srg", "saco", "faithfulness_correlation", "sensitivity_n", "infidelity"),
    *("road", "completeness"),
    *("energy_inside", "pointing_game", "rank_accuracy", "mean_ap", "foreground_auc", "foreground_f1"),
    *("pixel_accuracy", "mean_iou", "corrected_overlap", "kept_auc", "mass_kept", "equal_area_iou", "topk_overlap"),
    *("mass_efficiency", "sign_agreement", "max_sensitivity", "sparseness", "complexity"),
)
IMAGES = (
    "folder of images, one image, a list of paths (.txt), a table of paths and labels (.csv, .parquet), tar files as "
    "of webdataset (one, a folder of some, or shards-{000..011}.tar), or a folder that datasets saved"
)
RANDOM = "random"  # the row of random maps, which is always in a table of scores


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours: one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise, where argparse would print its usage over several lines and leave by itself."""
        raise PrunexError(f"{self.prog}: {message}; see {self.prog} --help")


def parse_methods(arguments: Sequence[str]) -> Any:
    """Of ``prunex methods``."""
    parser = Parser("prunex methods", description="Every method by name, or the options of some with their defaults.")
    parser.add_argument("name", nargs="*", help="methods whose options are wanted")
    args = parser.parse_args(arguments)
    check_methods(args.name)
    return args


def parse_doctor(arguments: Sequence[str]) -> Any:
    """Of ``prunex doctor``."""
    parser = Parser(
        "prunex doctor",
        description="What is installed and whether it fits, what it runs on, and what prunex would refuse of a model.",
    )
    parser.add_argument(
        "--model", help="timm model name, run, slim folder, checkpoint, hf-hub:owner/name or folder of transformers"
    )
    parser.add_argument("--weights", help="safetensors file for a timm model name; without it weights are random")
    parser.add_argument("--img-size", type=int, help="side of the images in pixels, for a timm model name")
    args = parser.parse_args(arguments)
    check_counts(args, "img_size")
    if args.model is None and (args.weights or args.img_size):
        raise PrunexError("--weights and --img-size go with --model: give a timm model name")
    if args.model is not None:
        # Weights are not needed here, so that timm's name alone is enough.
        elsewhere = on_hub(args.model) is not None or is_there(Path(args.model))
        check_model(args.model, args.weights, args.img_size, pretrained=args.weights is None and not elsewhere)
    return args


def parse_init(arguments: Sequence[str]) -> Any:
    """Of ``prunex init``."""
    parser = Parser(
        "prunex init",
        description="Write a config that fine-tunes a pruned ViT on a folder of images: four questions, or as many "
        "options; without a terminal what is not typed is what is usual.",
    )
    add = parser.add_argument
    add("images", metavar="DIR", help="folder with train/<class>/<image> and val/<class>/<image>")
    for name, question, usual in QUESTIONS:
        add(f"--{name}", help=f"{question}; usual: {usual}")
    add("--img-size", type=int, default=224, help="side of the images in pixels, a multiple of the patch; default 224")
    add("--out", help="file to write; default NAME-OF-DIR.yaml")
    args = parser.parse_args(arguments)
    check_counts(args, "img_size")
    check_images(Path(args.images))
    args.out = args.out or f"{Path(args.images).resolve().name}.yaml"
    if Path(args.out).exists():
        raise PrunexError(f"{args.out} is there already: give another --out FILE, or remove it")
    # Nobody is asked before what was typed is known to be good.
    ask(args)
    check_answers(args)
    return args


def parse_completion(arguments: Sequence[str]) -> Any:
    """Of ``prunex completion``."""
    parser = Parser("prunex completion", description="A script that completes commands, options, configs and methods.")
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser.parse_args(arguments)


def parse_report(arguments: Sequence[str]) -> Any:
    """Of ``prunex report``."""
    parser = Parser("prunex report", description="Write report.html from what a run folder holds.")
    parser.add_argument("run")
    args = parser.parse_args(arguments)
    check_folder(args.run)
    return args


def parse_watch(arguments: Sequence[str]) -> Any:
    """Of ``prunex watch``."""
    parser = Parser(
        "prunex watch",
        description="Serve the report of a run to a browser on this machine, and renew it while training goes on. "
        "Nothing is written into the run, which need not be there yet.",
    )
    parser.add_argument("run", help="run folder, or one that holds version_0, version_1 ...: the newest is followed")
    parser.add_argument("--port", type=int, default=0, help="of this machine; default 0, a free one")
    parser.add_argument("--open", action="store_true", help="open the browser")
    args = parser.parse_args(arguments)
    if not 0 <= args.port < 2**16:
        raise PrunexError(f"--port {args.port} is not allowed: give a whole number from 0 (a free one) to 65535")
    if is_there(Path(args.run)) and not is_there(Path(args.run), Path.is_dir):
        raise PrunexError(f"{args.run} is a file: give a run folder, such as runs/digits-dynamicvit/version_0")
    return args


def parse_export(arguments: Sequence[str]) -> Any:
    """Of ``prunex export``."""
    parser = Parser(
        "prunex export",
        description="Write the slim model of a run (or slim folder) as a graph for another runtime; run it here, "
        "compare it with the model on real images, and time both side by side.",
    )
    add = parser.add_argument
    add("run", help="run folder, slim folder, checkpoint or hf-hub:owner/name")
    add("--format", choices=tuple(FORMATS), default="onnx", help="what to write; default onnx")
    add("--out", help="file to write; default model.SUFFIX beside the slim model, or NAME/ of the Hub")
    add("--kept", action="store_true", help="also return the kept-token map")
    add("--int8", action="store_true", help="also write model.int8.onnx, calibrated by training images")
    add("--calibrate", metavar="DIR", help=f"{IMAGES}; for --int8, in place of the run's training images")
    add("--images", metavar="DIR", help=f"{IMAGES}; to compare on, in place of the run's validation images")
    add("--limit", type=int, default=32, metavar="N", help="images to compare on; default 32")
    add("--seconds", type=float, default=3.0, help="to time each graph beside PyTorch, 0 for not at all; default 3")
    args = parser.parse_args(arguments)
    check_counts(args, "limit")
    _check_seconds(args.seconds)
    if not is_there(Path(args.run), Path.is_file):
        check_run(args.run)
    for given in filter(None, (args.images, args.calibrate)):
        check_images_at(given)
    _check_int8(args)
    check_format(args.format)
    return args


def _check_int8(args: Any) -> None:
    """Refuse eight bits of another format than ONNX, and without images to calibrate by."""
    if args.calibrate is not None and not args.int8:
        raise PrunexError("--calibrate goes with --int8: give both, or neither")
    if not args.int8:
        return
    if args.format != "onnx":
        raise PrunexError(f"--int8 goes with --format onnx, not {args.format}: OpenVINO reads that file too")
    run = Path(args.run)
    if args.calibrate is None and not any(is_there(f / "config.yaml", Path.is_file) for f in (run, *run.parents[:2])):
        raise PrunexError(
            "--int8 needs images to calibrate by, and this is no run that prunex fit wrote: give --calibrate DIR with "
            "some hundred training images"
        )
    if find_spec("onnxruntime") is None:
        raise PrunexError("--int8 needs onnxruntime: pip install 'prunex-vit[onnx]'")


def parse_bench(arguments: Sequence[str]) -> Any:
    """Of ``prunex bench``."""
    parser = Parser("prunex bench", description="Accuracy, MACs, parameters and images/s, dense beside slim.")
    add = parser.add_argument
    add("run", help="run folder, log folder of your own script, slim folder, or hf-hub:owner/name")
    add("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="batch sizes to time; default 1 8 32")
    add("--threads", type=int, default=None, help="of the processor; default what torch takes")
    add("--seconds", type=float, default=5.0, help="for each batch size and runtime; default 5")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1")
    add("--no-accuracy", action="store_true", help="do not evaluate, time alone")
    add("--limit", type=int, default=None, metavar="N", help="evaluate on N images alone, evenly spaced")
    args = parser.parse_args(arguments)
    check_counts(args, "threads", "limit")
    if min(args.batches) < 1:
        raise PrunexError(f"--batches {min(args.batches)} is not allowed: give whole numbers of at least 1")
    _check_seconds(args.seconds)
    if args.no_accuracy and args.limit is not None:
        raise PrunexError("--limit goes with evaluating, which --no-accuracy leaves out: give one of them")
    check_device(args.device)
    # Elsewhere nobody waits for what was queued, so that only the queueing would be timed.
    if not args.device.startswith(("cpu", "cuda")):
        raise PrunexError(f"--device {args.device} is not allowed: give cpu or cuda")
    check_run(args.run)
    return args


def typed(arguments: Sequence[str], *names: str) -> list[tuple[slice, str, str | None]]:
    """Where options are typed: the arguments that one takes, its name and its value, None where nothing follows.

    >>> typed(["--out", "x.csv", "--out=y.csv"], "--out")
    [(slice(0, 2, None), '--out', 'x.csv'), (slice(2, 3, None), '--out', 'y.csv')]
    """
    places: list[tuple[slice, str, str | None]] = []
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names and equals:
            places.append((slice(place, place + 1), name, value))
        elif name in names:
            following = arguments[place + 1] if place + 1 < len(arguments) else None
            places.append((slice(place, place + 2), name, following))
    return places


def split_names(text: str) -> list[str]:
    """Names with commas between.

    >>> split_names("rollout, tokentm,")
    ['rollout', 'tokentm']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def split_option(text: str) -> tuple[str, str, str]:
    """Method, name and value of ``METHOD.NAME=VALUE``."""
    key, equals, value = text.partition("=")
    method, dot, name = key.strip().partition(".")
    if not equals or not dot or not name:
        raise PrunexError(
            f"--option {text[:100]!r} is not allowed: give METHOD.NAME=VALUE, as in rollout.head_fusion=max"
        )
    return method, name, value


def check_images_at(given: str, tars: bool = True) -> None:
    """Refuse a path at which nothing lies, and that names no tar files; a folder is walked when its model is open."""
    if not is_there(Path(given)) and not (tars and tar_files(given)):
        image_files(Path(given))  # which says what it looked for


def _check_seconds(seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise PrunexError(f"--seconds {seconds} is not allowed: give a number of at least 0")


def check_counts(args: Any, *names: str) -> None:
    """Refuse numbers below 1, of options by their names in ``args``."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise PrunexError(f"--{flag} {value} is not allowed: give a whole number of at least 1")


def check_device(name: str) -> None:
    """Refuse what no device of torch's is called; whether it is here, torch will say."""
    # The types that torch.device knows, which takes seconds to ask.
    if not re.fullmatch(r"(cpu|cuda|mps|xpu|hpu|mtia|meta|xla|vulkan|maia|privateuseone)(:\d+)?", name):
        raise PrunexError(f"--device {name} cannot be used: give cpu, cuda or cuda:1")
