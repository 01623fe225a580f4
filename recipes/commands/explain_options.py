"""The options of ``prunex explain`` and ``prunex score``: of the model, its images, the methods, and where it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunex.errors import PrunexError, unknown
from prunex.files import is_there
from prunex.recipes.commands import multimodal_options, options
from prunex.recipes.commands.listing import check_methods
from prunex.recipes.given import check_model, check_range
from prunex.recipes.report.score_table import LEFT
from prunex.spelling import SHOWN, read_target

SHEETS = 200  # images that get a contact sheet unless more are asked for
_THRESHOLD: dict[str, Any] = {"type": float, "help": "probability of detections that are explained; default 0.5"}


def parse_explain(arguments: Sequence[str]) -> Any:
    """Of ``prunex explain``."""
    parser = options.Parser(
        "prunex explain",
        description="Explain a model's predictions on your own images: a contact sheet an image, maps.npz, times.csv; "
        "of a folder that transformers' save_pretrained wrote also explained.csv, and words.csv where there is a text.",
    )
    add = parser.add_argument
    add("--images", required=True, help=options.IMAGES)
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
    group.add_argument("--threshold", **_THRESHOLD)
    args = parser.parse_args(arguments)
    args.folder = multimodal_options.folder_at(args.run)
    # Labels are read with each image, and are of ViTs alone.
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
        # The command whose file does the work, see own.worked_by.
        args.worker = "explain_multimodal"
    options.check_images_at(args.images, tars=args.folder is None)
    return args


def parse_score(arguments: Sequence[str]) -> Any:
    """Of ``prunex score``."""
    parser = options.Parser(
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
    group.add_argument("--threshold", **_THRESHOLD)
    group.add_argument("--mask-rule", choices=("reference", "half"), help="where a mask ends; default reference")
    args = parser.parse_args(arguments)
    options.check_counts(args, "images")
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
    for name in options.split_names(args.metrics):
        if name not in (*options.METRICS, "all", "perturbation"):
            raise unknown("metric", name, ["all", "perturbation", *options.METRICS])
    if not options.split_names(args.metrics):
        raise PrunexError(f"metrics={args.metrics!r} names no metric: give all, or names with commas between")
    # Random maps are no explainer, and may be all that is asked for.
    _check_processes(args)
    without_random = [name for name in args.methods.split(",") if name.strip() != options.RANDOM]
    if without_random:
        _check_explaining(args, ",".join(without_random))
    if args.data and not is_there(Path(args.data), Path.is_dir):
        raise PrunexError(
            f"--data {args.data} is not a folder: give one that holds val/<class>/<image>, or <class>/<image>"
        )
    return args


def _parse_protocol(args: Any) -> Any:
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
    names = options.split_names(args.methods)
    _check_basics(args, names, args.methods)
    multimodal_options.check_methods(names, [options.split_option(text)[:2] for text in args.option])


def _target(text: str, functions: bool) -> str | int:
    """A target's spelling that names something; without functions a class alone."""
    name, numbers = read_target(text, "--target")
    if name != "class" and not functions:
        raise PrunexError(f"--target {text}: models of text and image are explained by classes; give a class's number")
    return text if functions else numbers[0]


def _add_explaining(parser: options.Parser, batch: int) -> None:
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


def _add_processes(parser: options.Parser) -> Any:
    """Where a command runs that runs on Lightning's engine."""
    group = parser.add_argument_group(
        "many images", "as in prunex fit: on several devices and machines, started by Lightning, torchrun or a cluster"
    )
    group.add_argument("--devices", type=int, metavar="N", help="processes on each machine; default 1, or torchrun's")
    # Lightning spells it with an underscore, our other options with a hyphen.
    group.add_argument("--num_nodes", "--num-nodes", type=int, metavar="M", help="machines; default 1, or torchrun's")
    group.add_argument("--accelerator", help="cpu, gpu, cuda, mps, auto; default a GPU where there is one")
    return group


def _check_processes(args: Any) -> None:
    options.check_counts(args, "devices", "num_nodes")
    if args.device is not None and args.accelerator is not None:
        raise PrunexError("--device and --accelerator say the same: give one of them")
    if args.device is not None and ":" in args.device and args.devices not in (None, 1):
        raise PrunexError(f"--device {args.device} is one device, and --devices {args.devices}: leave out one of them")


def _sheets(text: str | None) -> int | str:
    if text is None or text == "all":
        return text or SHEETS
    if not text.isdecimal():
        raise PrunexError(f"--sheets {text} is not allowed: give a whole number, or all")
    return int(text)


def _check_basics(args: Any, names: list[str], methods: str) -> None:
    options.check_counts(args, "batch")
    if args.device is not None:
        options.check_device(args.device)
    check_range(args.range, "--range")
    if not names:
        raise PrunexError(f"methods={methods!r} names no explainer: give all, or names with commas between")
    for text in args.option:
        method = options.split_option(text)[0]
        if "all" not in names and method not in names:
            raise PrunexError(f"an option was given for {method}, which is not among the methods {names}")


def _check_explaining(args: Any, methods: str) -> None:
    """What ``explain`` and ``score`` of ViTs have in common, but for names of options, which signatures tell."""
    options.check_counts(args, "img_size")
    names = options.split_names(methods)
    check_methods([name for name in names if name != "all"], "explainer")
    check_methods([options.split_option(text)[0] for text in args.option], "explainer")
    _check_basics(args, names, methods)
    for name, values in (("--mean", args.mean), ("--std", args.std)):
        if values is not None and not all(math.isfinite(value) for value in values):
            raise PrunexError(f"{name} {' '.join(map(str, values))} is not allowed: give a finite number a channel")
    if args.std is not None and min(args.std) <= 0:
        raise PrunexError(f"--std {' '.join(map(str, args.std))} is not allowed: give numbers above 0")
    check_model(args.run, args.weights, args.img_size, args.pretrained)
