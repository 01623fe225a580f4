"""The options of our own commands, and every mistake in them that can be seen before torch is imported."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from prunex.errors import PrunexError, unknown
from prunex.files import is_there
from prunex.formats import FORMATS, check_format
from prunex.recipes.commands import multimodal_options
from prunex.recipes.commands.init import QUESTIONS, ask, check_answers, check_images
from prunex.recipes.commands.listing import check_methods
from prunex.recipes.given import (
    check_folder,
    check_model,
    check_range,
    check_run,
    image_files,
    on_hub,
    tar_files,
)
from prunex.recipes.report.score_table import LEFT
from prunex.spelling import SHOWN, read_target

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
SHEETS = 200  # images that get a contact sheet unless more are asked for
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
    _check_counts(args, "img_size")
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
    _check_counts(args, "img_size")
    check_images(Path(args.images))
    args.out = args.out or f"{Path(args.images).resolve().name}.yaml"
    if Path(args.out).exists():
        raise PrunexError(f"{args.out} is there already: give another --out FILE, or remove it")
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
    _check_counts(args, "limit")
    if not (math.isfinite(args.seconds) and args.seconds >= 0):
        raise PrunexError(f"--seconds {args.seconds} is not allowed: give a number of at least 0")
    if not is_there(Path(args.run), Path.is_file):
        check_run(args.run)
    for given in filter(None, (args.images, args.calibrate)):
        if not is_there(Path(given)) and not tar_files(given):
            image_files(Path(given))  # which says what it looked for
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
    _check_counts(args, "threads", "limit")
    if min(args.batches) < 1:
        raise PrunexError(f"--batches {min(args.batches)} is not allowed: give whole numbers of at least 1")
    if not (math.isfinite(args.seconds) and args.seconds >= 0):
        raise PrunexError(f"--seconds {args.seconds} is not allowed: give a number of at least 0")
    if args.no_accuracy and args.limit is not None:
        raise PrunexError("--limit goes with evaluating, which --no-accuracy leaves out: give one of them")
    _check_device(args.device)
    if not args.device.startswith(("cpu", "cuda")):
        raise PrunexError(f"--device {args.device} is not allowed: give cpu or cuda")
    check_run(args.run)
    return args


def parse_explain(arguments: Sequence[str]) -> Any:
    """Of ``prunex explain``."""
    parser = Parser(
        "prunex explain",
        description="Explain a model's predictions on your own images: a contact sheet an image, maps.npz, times.csv; "
        "of a folder that transformers' save_pretrained wrote also explained.csv, and words.csv where there is a text.",
    )
    add = parser.add_argument
    add("--images", required=True, help=IMAGES)
    add("--target", metavar="WHAT", help=f"{SHOWN}, label (each image's own); default the predicted class")
    add("--out", help="folder to write to; default explained/NAME-OF-THE-MODEL; one that was stopped goes on")
    add("--again", action="store_true", help="start over, whatever is there already")
    add("--sheets", metavar="N|all", help=f"images that get a contact sheet: the first N (default {SHEETS}), or all")
    _add_explaining(parser, batch=8)
    many = _add_processes(parser)
    many.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images; default 0")
    group = parser.add_argument_group(
        "models of text and image (a folder of transformers, with its processor)",
        f"{', '.join(multimodal_options.KINDS)}; methods: {', '.join(multimodal_options.METHODS)}",
    )
    group.add_argument("--text", action="append", default=[], help="a question (ViLT), or one of the texts; repeatable")
    group.add_argument("--threshold", type=float, help="probability of detections that are explained; default 0.5")
    args = parser.parse_args(arguments)
    args.folder = multimodal_options.folder_at(args.run)
    if args.target is not None and (args.folder is not None or args.target != "label"):
        args.target = _target(args.target, args.folder is None)
    if args.folder is None:
        _check_explaining(args, args.methods)
        _check_processes(args)
        if args.workers < 0:
            raise PrunexError(f"--workers {args.workers} is not allowed: give a whole number of at least 0")
        args.sheets = _sheets(args.sheets)
        for name in ("text", "threshold"):
            if getattr(args, name) not in (None, []):
                raise PrunexError(f"--{name} goes with a folder of transformers, and {args.run} is none: leave it out")
    else:
        _check_multimodal(args)
        args.folder.check(args)
        args.worker = "explain_multimodal"
    # A folder that is there is walked once, when the model has been opened.
    if not is_there(Path(args.images)) and not (args.folder is None and tar_files(args.images)):
        image_files(Path(args.images))  # which says what it looked for
    return args


def parse_score(arguments: Sequence[str]) -> Any:
    """Of ``prunex score``."""
    parser = Parser(
        "prunex score",
        description="Score explainers by faithfulness, localisation and agreement, dense and slim beside each other. "
        "What is done is kept: an interrupted start is continued by the same command.",
    )
    add = parser.add_argument
    add("--metrics", default="all", help="names with commas between, or all usual ones (default)")
    add("--images", type=int, default=100, metavar="N", help="validation images; default 100")
    add("--data", metavar="DIR", help="folder of images instead: val/<class>/, <class>/ or images alone")
    add("--masks", metavar="DIR", help="their masks, <class>/<image's stem>.png; default DIR/masks")
    add("--models", help="dense, slim, or both with a comma; default what there is")
    add("--removal", choices=list(LEFT), help="how patches leave; default black for perturbation, drop for curves")
    add(
        "--target",
        metavar="WHAT",
        default="predicted",
        help="what is explained and scored: the class predicted (default), label (the image's), or one thing for all: "
        "3, contrast:3,5, margin, margin:2, entropy or regression:0",
    )
    add("--out", help="folder to write to; default RUN/score, or score")
    add("--again", action="store_true", help="compute anew what is there already")
    _add_explaining(parser, batch=25)
    _add_processes(parser)
    group = parser.add_argument_group("models of text and image (a folder of transformers), by one of two protocols")
    group.add_argument(
        "--protocol",
        choices=list(multimodal_options.PROTOCOLS),
        help="masks: AP of a detector's maps as masks, --data DIR with annotations.json in COCO's format and images/; "
        "vqa: boxes and words taken away, --data DIR with .npz files of the model's inputs and answers",
    )
    group.add_argument("--threshold", type=float, help="probability of detections that are explained; default 0.5")
    group.add_argument("--mask-rule", choices=("reference", "half"), help="where a mask ends; default reference")
    args = parser.parse_args(arguments)
    _check_counts(args, "images")
    if args.protocol is not None:
        return _parse_protocol(args)
    for name in ("threshold", "mask_rule"):
        if getattr(args, name) is not None:
            raise PrunexError(f"--{name.replace('_', '-')} goes with --protocol: leave it out")
    if args.target not in ("predicted", "label") and read_target(args.target, "--target")[0] == "labels":
        raise PrunexError(f"--target {args.target}: scores are of one thing; give one label's number, as in --target 3")
    for name in ("masks", "mean", "std", "range"):
        if getattr(args, name) and not args.data:
            raise PrunexError(f"--{name} goes with --data: a run's own data bring their masks, and say what pixels are")
    for name in split_names(args.metrics):
        if name not in (*METRICS, "all", "perturbation"):
            raise unknown("metric", name, ["all", "perturbation", *METRICS])
    if not split_names(args.metrics):
        raise PrunexError(f"metrics={args.metrics!r} names no metric: give all, or names with commas between")
    # Random maps are no explainer, and may be all that is asked for.
    _check_processes(args)
    without_random = [name for name in args.methods.split(",") if name.strip() != RANDOM]
    if without_random:
        _check_explaining(args, ",".join(without_random))
    if args.data and not is_there(Path(args.data), Path.is_dir):
        raise PrunexError(
            f"--data {args.data} is not a folder: give one that holds val/<class>/<image>, or <class>/<image>"
        )
    return args


def _parse_protocol(args: Any) -> Any:
    """Of ``prunex score --protocol``."""
    known = multimodal_options.PROTOCOLS[args.protocol]
    args.folder = multimodal_options.folder_at(args.run, known, f"--protocol {args.protocol} scores")
    if args.folder is None:
        raise PrunexError(f"--protocol goes with a folder of transformers, and {args.run} is none: leave it out")
    _check_multimodal(args)
    args.folder.check_score(args)
    if args.target != "predicted":
        raise PrunexError(f"--target {args.target} does not go with --protocol, which says what is explained")
    args.target, args.mask_rule = None, args.mask_rule or "reference"
    args.worker = f"score_{args.protocol}"
    return args


def _check_multimodal(args: Any) -> None:
    """What explaining models of text and image has in common."""
    names = split_names(args.methods)
    _check_basics(args, names, args.methods)
    multimodal_options.check_methods(names, [split_option(text)[:2] for text in args.option])


def _target(text: str, functions: bool) -> str | int:
    """A target's spelling that names something; without functions a class alone."""
    name, numbers = read_target(text, "--target")
    if name != "class" and not functions:
        raise PrunexError(f"--target {text}: models of text and image are explained by classes; give a class's number")
    return text if functions else numbers[0]


def _add_explaining(parser: Parser, batch: int) -> None:
    """What ``explain`` and ``score`` are told of the model, its images and the methods."""
    add = parser.add_argument
    add(
        "run",
        help="run folder, slim folder, checkpoint, hf-hub:owner/name, a timm model name (with --weights), or "
        "transformers folder",
    )
    add("--methods", default="all", help="names with commas between, or all that the model can take (default)")
    add(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="an option of a method, such as rollout.head_fusion=max; may be repeated",
    )
    add("--batch", type=int, default=batch, help=f"images explained at once; default {batch}")
    add("--device", help="cpu, cuda, cuda:1")
    # Both would be weights.
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", help="safetensors file for a timm model name")
    source.add_argument("--pretrained", action="store_true", help="download timm's weights for a timm model name")
    add("--img-size", type=int, help="side of the images in pixels, for a timm model name")
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        says = f"{what} that the model's images are normalised by, of each channel (0..1); default what it says"
        add(f"--{name}", type=float, nargs="+", metavar="X", help=says)
    add(
        "--range",
        type=int,
        metavar="MAX",
        help="largest value of pixels of 16 bits, such as 4095 for 12; default the smallest that holds all images",
    )


def _add_processes(parser: Parser) -> Any:
    """Where a command runs that runs on Lightning's engine."""
    group = parser.add_argument_group(
        "many images", "as in prunex fit: on several devices and machines, started by Lightning, torchrun or a cluster"
    )
    group.add_argument("--devices", type=int, metavar="N", help="processes on each machine; default 1, or torchrun's")
    group.add_argument("--num_nodes", "--num-nodes", type=int, metavar="M", help="machines; default 1, or torchrun's")
    group.add_argument("--accelerator", help="cpu, gpu, cuda, mps, auto; default a GPU where there is one")
    return group


def _check_processes(args: Any) -> None:
    _check_counts(args, "devices", "num_nodes")
    if args.device is not None and args.accelerator is not None:
        raise PrunexError("--device and --accelerator say the same: give one of them")
    if args.device is not None and ":" in args.device and args.devices not in (None, 1):
        raise PrunexError(f"--device {args.device} is one device, and --devices {args.devices}: leave out one of them")


def _sheets(text: str | None) -> int | str:
    """How many images get a sheet."""
    if text is None or text == "all":
        return text or SHEETS
    if not text.isdecimal():
        raise PrunexError(f"--sheets {text} is not allowed: give a whole number, or all")
    return int(text)


def _check_basics(args: Any, names: list[str], methods: str) -> None:
    """What any explaining is told."""
    _check_counts(args, "batch")
    if args.device is not None:
        _check_device(args.device)
    check_range(args.range, "--range")
    if not names:
        raise PrunexError(f"methods={methods!r} names no explainer: give all, or names with commas between")
    for text in args.option:
        method = split_option(text)[0]
        if "all" not in names and method not in names:
            raise PrunexError(f"an option was given for {method}, which is not among the methods {names}")


def _check_explaining(args: Any, methods: str) -> None:
    """What ``explain`` and ``score`` of ViTs have in common, but for names of options, which signatures tell."""
    _check_counts(args, "img_size")
    names = split_names(methods)
    check_methods([name for name in names if name != "all"], "explainer")
    check_methods([split_option(text)[0] for text in args.option], "explainer")
    _check_basics(args, names, methods)
    for name, values in (("--mean", args.mean), ("--std", args.std)):
        if values is not None and not all(math.isfinite(value) for value in values):
            raise PrunexError(f"{name} {' '.join(map(str, values))} is not allowed: give a finite number a channel")
    if args.std is not None and min(args.std) <= 0:
        raise PrunexError(f"--std {' '.join(map(str, args.std))} is not allowed: give numbers above 0")
    check_model(args.run, args.weights, args.img_size, args.pretrained)


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


def _check_counts(args: Any, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise PrunexError(f"--{flag} {value} is not allowed: give a whole number of at least 1")


def _check_device(name: str) -> None:
    """Refuse what no device of torch's is called; whether it is here, torch will say."""
    if not re.fullmatch(r"(cpu|cuda|mps|xpu|hpu|mtia|meta|xla|vulkan|maia|privateuseone)(:\d+)?", name):
        raise PrunexError(f"--device {name} cannot be used: give cpu, cuda or cuda:1")
