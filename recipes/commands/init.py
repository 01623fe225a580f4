"""``prunex init``: a config for a folder of images, from four answers; nothing heavy is imported."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunex.checks import check_budget
from prunex.errors import PrunexError, unknown
from prunex.files import folders_in, is_there, write_whole
from prunex.recipes.given import check_weights

METHODS = ("evit", "dynamicvit", "topk", "tome", "diffrate")  # those whose rates follow from a budget
# What is asked: the option, the question, and the answer of who says nothing.
QUESTIONS = (
    ("model", "timm model", "vit_small_patch14_dinov2"),
    ("weights", "weights: a safetensors file, pretrained (downloaded), or scratch", "pretrained"),
    ("method", f"pruner: {', '.join(METHODS)}", "evit"),
    ("budget", "budget: a share of the dense multiply-adds, or such as 2.9GMACs", "0.65"),
)


def ask(args: Any) -> None:
    """Fill in what was not typed: by asking where somebody sits at the terminal, else by what is usual."""
    open_ended = sys.stdin is not None and sys.stdin.isatty()
    for name, question, usual in QUESTIONS:
        if getattr(args, name) is None:
            setattr(args, name, (input(f"{question} [{usual}] ").strip() if open_ended else "") or usual)


def check_images(root: Path) -> int:
    """How many classes a folder of images has; one that no run could read is refused."""
    counts = []
    for split in ("train", "val"):
        folder = root / split
        classes = folders_in(folder) if is_there(folder, Path.is_dir) else []
        if not classes:
            raise PrunexError(
                f"{folder} holds no class: give a folder with train/<class>/<image> and val/<class>/<image>"
            )
        counts.append(set(classes))
    if counts[0] != counts[1]:
        odd = sorted(counts[0] ^ counts[1])[0]
        raise PrunexError(f"{root}: class {odd!r} is in one of train and val alone: give both the same classes")
    return len(counts[0])


def check_answers(args: Any) -> None:
    """Refuse answers that training would refuse, as far as they can be judged without a model."""
    if args.method not in METHODS:
        raise unknown("pruner for a folder of images under a budget", args.method, METHODS)
    if args.weights not in ("pretrained", "scratch"):
        check_weights(args.weights)
    with suppress(ValueError):  # what is no number is such as 2.9GMACs
        args.budget = float(args.budget)
    check_budget(args.budget)


def config(args: Any) -> dict[str, Any]:
    """The ready-made run of the method, with the answers in it."""
    import yaml

    ready: dict[str, Any] = yaml.safe_load(
        (files("prunex.configs") / "imagefolder" / f"{args.method}.yaml").read_text()
    )
    model, data = ready["model"]["init_args"], ready["data"]["init_args"]
    model["architecture"], model["model_args"] = args.model, {"img_size": args.img_size}
    if args.weights in ("pretrained", "scratch"):
        del model["weights"]
        model["pretrained" if args.weights == "pretrained" else "from_scratch"] = True
    else:
        model["weights"] = str(Path(args.weights).expanduser().resolve())
    # Whole paths: training may be started from another folder.
    data["root"], data["image_size"] = str(Path(args.images).resolve()), args.img_size
    for callback in ready["trainer"]["callbacks"]:
        if callback["class_path"].endswith(".TokenPruning"):
            # A budget says what the keep ratio is, and both together are refused.
            callback["init_args"].pop("keep_ratio", None)
            callback["init_args"]["budget"] = args.budget
    ready["trainer"]["logger"]["init_args"]["name"] = Path(args.out).stem
    return ready


def init(args: Any) -> int:
    """Do what ``prunex init`` was asked for, and give back the exit code."""
    import yaml

    classes = check_images(Path(args.images))
    text = yaml.safe_dump(config(args), sort_keys=False, allow_unicode=True, width=110)
    heading = f"# {args.method} on {classes} classes of images; every option: prunex fit --help all\n"
    print(write_whole(Path(args.out), (heading + text).encode()))
    print(f"train with: prunex fit --config {args.out}", file=sys.stderr)
    return 0
