"""``prunex explain``: maps, contact sheets and times of any explainers for one's own images."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from tqdm import tqdm

import prunex
from prunex.attributes import models_normalisation
from prunex.errors import PrunexError, unknown
from prunex.recipes.commands.explaining import Explaining, Images, MapWriter
from prunex.recipes.commands.options import split_names, split_option
from prunex.recipes.commands.processes import predict, quiet, trainer_of
from prunex.recipes.commands.score_record import digest
from prunex.recipes.commands.sheets import Sheets, name_of_model
from prunex.recipes.data.images import preparation
from prunex.recipes.data.tables import numbers_of
from prunex.recipes.runs import config_of, open_model_or_name, renormalise, run_of
from prunex.registry import lookup
from prunex.targets import MultiLabel, Regression, parse, spelt
from prunex.untrusted import read_json
from prunex.vit.anatomy import find, read
from prunex.vit.recording import choose_target
from prunex.vit.surroundings import ASKING

MANY = 1000  # forwards an image from which a method's cost is announced


def explain(args: Any) -> int:
    """Do what ``prunex explain`` was asked for, and give back the exit code."""
    explainers = Explainers(args.methods, own_explainer(Path(args.run), args.methods, read_options(args.option)))
    out = Path(args.out or Path("explained", name_of_model(args.run)))
    vit: Any = find(open_model_or_name(args.run, args.weights, args.img_size, args.pretrained))[1].float()
    renormalise(vit, args.mean, args.std)
    # What can be refused is refused before the first image is explained.
    labelled = args.target == "label"
    target = parse(args.target) if args.target is not None and not labelled else None
    check_target(vit, target)
    names = list(getattr(vit, "label_names", None) or []) or None
    data = Images(
        args.images,
        out,
        out if args.out else Path("explained"),
        facts_of(vit, explainers, args),
        preparation(vit),
        partial(batches, size=args.batch),
        None if args.sheets == "all" else args.sheets,
        args.range,
        args.workers,
        args.again,
        partial(numbers_of, class_names=names, classes=read(vit).classes) if labelled else None,
    )
    writer = MapWriter(data, Sheets(out, names, several=has_several_labels(args.run)))
    with quiet():
        trainer = trainer_of(args, writer)
        try:
            predict(trainer, Explaining(vit, explainers, target), data)
        except KeyboardInterrupt:
            if trainer.is_global_zero:
                count = f"{writer.done()} of {len(data.plan.inputs) if data.plan else 'the'}"
                said = f"maps of {count} images are in {out}; the same command goes on"
                print(f"\nprunex: interrupted: {said}", file=sys.stderr)
            return 130
        except SIGTERMException:
            print("prunex: terminated; the same command goes on", file=sys.stderr)
            return 143
    if trainer.is_global_zero:
        print(out)
    return 0


def facts_of(vit: Any, explainers: Explainers, args: Any) -> dict[str, Any]:
    """What maps depend on, in plain values: in a folder they are all of one kind."""
    anatomy = read(vit)
    mean, std = models_normalisation(vit, anatomy.channels)
    options = {}
    for name, given in sorted(explainers.options.items()):
        options[name] = {option: repr(value) for option, value in sorted(given.items())}
    # As JSON gives them back, since they are compared with what a file says.
    return {
        "prunex": prunex.__version__,
        "model": digest(vit),
        "asked": list(explainers.names),
        "options": options,
        "target": args.target or "predicted",
        "image": [*anatomy.image],
        "mean": [*map(float, mean)],
        "std": [*map(float, std)],
        "range": args.range,
    }


class Explainers:
    """Several explainers on one model, batch by batch, and what each of them took.

    With ``"all"`` among the methods, those that refuse the model on the first batch are left out, and ``skipped`` says
    why; a method that is named, or has options, must work.
    """

    def __init__(self, methods: str | Sequence[str] = "all", options: Mapping[str, Mapping[str, Any]] | None = None):
        self.options = dict(options or {})
        given = split_names(methods) if isinstance(methods, str) else list(methods)
        # What is registered when it is called: others may have registered theirs.
        every = [m.name for m in prunex.methods("explainer")] if "all" in given else []
        named = [name for name in given if name != "all"]
        self.names = list(dict.fromkeys([*every, *named]))
        self._required = set(named) | (set(self.options) if every else set())
        if not self.names:
            raise PrunexError(f"methods={methods!r} names no explainer: give all, or names with commas between")
        for name in self.names:
            lookup("explainer", name)
        for name in self.options:
            if name not in self.names:
                raise PrunexError(f"an option was given for {name}, which is not among the methods {self.names}")
        self.skipped: dict[str, str] = {}
        self.images = 0
        self.last: dict[str, tuple[float, float, int]] = {}  # seconds, forwards and images of the last call
        self._seconds = dict.fromkeys(self.names, 0.0)
        self._forwards = dict.fromkeys(self.names, 0.0)

    def __call__(
        self, model: nn.Module, images: Tensor, target: Any = None, bar: Any = None
    ) -> dict[str, prunex.Explanation]:
        """One explanation a method of normalised images; ``bar`` says which method is at work.

        Of several labels, one a label that the method tells apart, named ``<method>:<label>``.
        """
        bar = tqdm(disable=True) if bar is None else bar
        explanations: dict[str, prunex.Explanation] = {}
        self.last = {}
        for name in list(self.names):
            bar.set_postfix_str(name)
            start = perf_counter()
            try:
                with _forwards(find(model)[1]) as sizes:
                    several = by_label(name, prunex.explain(name, model, images, target, **self.options.get(name, {})))
            except PrunexError as error:
                # After the first batch a method has shown that it can take the model.
                # Some errors begin with the method's name already.
                if name in self._required or self.images:
                    raise PrunexError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
                self.names.remove(name)
                self.skipped[name] = str(error)
                bar.write(f"skipped {name}: {error}")
                continue
            # Waits for the device, so that its time counts.
            for e in several.values():
                e.maps = e.maps.float().cpu()
            explanations |= several
            self.last[name] = (perf_counter() - start, float(sum(sizes)), len(images))
        if not explanations:
            raise PrunexError(f"no explainer can take this model; the last one said: {[*self.skipped.values()][-1]}")
        check_outputs(next(iter(explanations.values())).logits)
        self.images += len(images)
        for name, (seconds, forwards, _) in self.last.items():
            self._seconds[name] += seconds
            self._forwards[name] += forwards
        return explanations

    def settle(self, names: Sequence[str], skipped: Mapping[str, str]) -> None:
        """Take what other images, or another process, have shown of the methods: these must work."""
        self.names, self.skipped, self._required = list(names), dict(skipped), set(names)

    def seconds(self, name: str) -> float:
        """Mean seconds an image."""
        return self._seconds[name] / max(1, self.images)

    def forwards(self, name: str) -> float:
        """Mean number of times that one image (or a changed copy of it) went through the model's last block."""
        return self._forwards[name] / max(1, self.images)

    def announcements(self, images: int) -> list[str]:
        """One line for each method that is expensive, with the time that so many images need."""
        return [
            f"{name} takes {self.forwards(name):,.0f} forwards an image: about "
            f"{self.seconds(name) * images / 60:.1f} minutes for the other {images}"
            for name in self.names
            if self.forwards(name) > MANY
        ]


def has_several_labels(where: str) -> bool:
    """Whether the run that a model is of trained it for several labels an image, each with a probability of its own."""
    run = run_of(Path(where))
    options = config_of(run).get("model", {}).get("init_args") if run is not None else None
    return isinstance(options, dict) and options.get("task") == "multi_label"


def by_label(name: str, explained: prunex.Explanation | list[prunex.Explanation]) -> dict[str, prunex.Explanation]:
    """A method's explanations by what they go by: of several labels one each, unless the method knows no class."""
    several = explained if isinstance(explained, list) else [explained]
    if several is not explained or not several[0].class_specific:
        return {name: several[0]}
    return {f"{name}:{int(e.target[0])}": e for e in several}


@contextmanager
def _forwards(vit: Any) -> Iterator[list[int]]:
    """Collect the batch sizes of all that goes through the last block for an explanation."""
    sizes: list[int] = []

    def count(module: nn.Module, inputs: Any) -> None:
        if not ASKING.get():
            sizes.append(len(inputs[0]))

    # Every forward passes the last block once, whichever way it was made.
    handle = vit.blocks[-1].norm1.register_forward_pre_hook(count)
    try:
        yield sizes
    finally:
        handle.remove()


def read_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by method from ``METHOD.NAME=VALUE``, values as YAML reads them.

    >>> read_options(["rollout.head_fusion=max", "rollout.discard_ratio=0.9"])
    {'rollout': {'head_fusion': 'max', 'discard_ratio': 0.9}}
    """
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        method, name, value = split_option(text)
        known = lookup("explainer", method).options
        if name not in known:
            raise unknown(f"option of {method}", name, known)
        options.setdefault(method, {})[name] = option_value(text, value)
    return options


def option_value(text: str, value: str) -> Any:
    """The value of an option as YAML reads it; ``text`` is what was typed."""
    try:
        read_as = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2001-99-99 is a ValueError
        raise PrunexError(f"--option {text[:100]!r}: {value[:100]!r} is no YAML value; put text into quotes") from error
    if isinstance(read_as, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", read_as):
        # YAML 1.1 reads 1e-3, without a dot, as text.
        return float(read_as)
    return read_as


def own_explainer(where: Path, methods: str, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options by method, with the explainer that a run has trained where its method is used and no other named."""
    run = run_of(where)
    config = None if run is None else run / "explainer" / "config.json"
    if config is not None and config.is_file():
        kind = str((read_json(config).get("prunex") or {}).get("kind"))
        names = split_names(methods)
        if kind in names or ("all" in names and kind in [m.name for m in prunex.methods("explainer")]):
            options.setdefault(kind, {}).setdefault("explainer", str(config.parent))
    return options


def batches(count: int, size: int) -> Iterator[range]:
    """The first image alone, since it shows what each method takes, then batches.

    >>> list(batches(6, 3))
    [range(0, 1), range(1, 4), range(4, 6)]
    """
    # From one image it is known what a method takes, before minutes are spent.
    yield range(min(1, count))
    for start in range(1, count, size):
        yield range(start, min(start + size, count))


def check_outputs(logits: Tensor) -> None:
    """Refuse a model whose outputs are not finite, before it is explained or scored."""
    if not logits.isfinite().all():
        raise PrunexError(
            "the model's outputs are NaN or infinite: its weights hold such values, or grow too large; take those of "
            "an earlier epoch"
        )


def check_target(vit: Any, target: Any) -> None:
    """Refuse a class that the model does not have before every method does."""
    classes = read(vit).classes
    if target is not None and classes == 0 and not isinstance(target, Regression):
        raise PrunexError(f"--target {spelt(target)}: this model has no classifier; leave --target out")
    if isinstance(target, MultiLabel | int):
        for label in target.which if isinstance(target, MultiLabel) else [target]:
            choose_target(torch.zeros(1, classes), label)
    elif target is not None:
        target(torch.zeros(1, classes or vit.num_features))
