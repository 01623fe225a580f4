"""Run folders: opening their model and data again, and measuring models beside each other."""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

import prunex
from prunex.attributes import class_names, read_normalisation
from prunex.batches import parts
from prunex.callbacks.checkpoints import read_checkpoint, restore, told
from prunex.callbacks.kept_token_monitor import object_kept
from prunex.callbacks.record import RECORD, read_record
from prunex.errors import PrunexError
from prunex.files import write_whole
from prunex.recipes.modules.backbone import create_model, model_from_weights
from prunex.recipes.modules.explainer_training import ExplainerTraining
from prunex.recipes.report.curves import macs_unit
from prunex.recipes.timing import quartiles, side_by_side
from prunex.untrusted import is_there, read_text
from prunex.vit.anatomy import find, head_classes
from prunex.vit.mount import mounted
from prunex.vit.surroundings import warn_of_the_rest
from prunex.vit.units import Backbone

SUMMARY = "summary.json"


def read_run(run: str | Path) -> dict[str, Any]:
    """The config.yaml of a run folder.

    Raises:
        PrunexError: When it is no folder of a run, or the file is damaged.
    """
    config = config_of(run)
    if not config:
        what = "model and data in its" if (Path(run) / "config.yaml").is_file() else ""
        raise PrunexError(f"{run} has no {f'{what} config.yaml'.strip()}: give a run folder that prunex fit wrote")
    return config


def config_of(run: str | Path) -> dict[str, Any]:
    """What :func:`read_run` gives, and nothing for a run of one's own script.

    Raises:
        PrunexError: When it is no folder, or its config.yaml is damaged.
    """
    folder = Path(run)
    path = folder / "config.yaml"
    if not is_there(folder, Path.is_dir):
        raise PrunexError(f"{run} is no folder: give a run folder, such as runs/digits-dynamicvit/version_0")
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that YAML reads and Python cannot
        raise PrunexError(f"{path} is damaged: {error}") from error
    parts = [config.get(key) for key in ("model", "data")] if isinstance(config, dict) else [None]
    whole = all(isinstance(part, dict) and isinstance(part.get("class_path"), str) for part in parts)
    return config if whole else {}


def home(where: str | Path) -> Path:
    """The folder of a run's results: that of the run which a slim model says it is of, else the folder itself."""
    folder = Path(where)
    around = folder.parent if folder.name == "slim" else folder
    told = read_record(around).get("run")
    if isinstance(told, str) and is_there(Path(told), Path.is_dir):
        return Path(told)
    inside = any((around / name).is_file() for name in ("config.yaml", "metrics.csv", RECORD))
    return around if inside else folder


def slim_folder(where: Path) -> Path | None:
    """Where the slim model of a run lies: the folder itself, its slim/, or where SlimExport says; None: nowhere."""
    told = read_record(where).get("slim")
    known = [where, where / "slim", *([Path(told)] if isinstance(told, str) else [])]
    return next((folder for folder in known if is_there(folder / "config.json", Path.is_file)), None)


def open_model(where: str | Path) -> nn.Module:
    """The slim model of a slim folder, a run folder (its slim/, else its newest checkpoint) or a checkpoint file.

    Args:
        where: ``runs/NAME/version_0``, ``.../slim`` or ``.../checkpoints/x.ckpt``.

    Returns:
        The ViT, pruned if it was trained so, in eval mode.

    Raises:
        PrunexError: When there is nothing to open.
    """
    path = Path(where)
    if is_there(path, Path.is_file):
        run = path.parent.parent
        if not (run / "config.yaml").is_file():
            raise PrunexError(
                f"{path} does not lie in a run: its config.yaml says what to build, so give RUN/checkpoints/x.ckpt as "
                "prunex fit wrote it, or a run or slim folder"
            )
        return _from_checkpoint(read_run(run), path)
    slim = slim_folder(path)
    if slim is not None:
        return prunex.load(slim)
    config = read_run(path)
    found = sorted((path / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise PrunexError(f"{path} has neither a slim model nor a checkpoint: train with prunex fit first")
    return _from_checkpoint(config, found[-1])


def run_of(where: Path) -> Path | None:
    """The run folder that a path is, or lies in."""
    for folder in (where, where.parent, where.parent.parent) if is_there(where) else ():
        if (folder / "config.yaml").is_file():
            return folder
    return None


def open_model_or_name(
    where: str, weights: str | None = None, image_size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """What `open_model` opens, or a timm model by name with weights from a file.

    Args:
        where: A path as for `open_model`, or a name known to ``timm.list_models()``.
        weights: Path of a safetensors file with timm's names, for a timm model.
        image_size: Side of the square images in pixels, for a timm model; None: what its weights were trained for.
        pretrained: Download timm's weights; needs a network.

    Returns:
        The model, in eval mode.

    Raises:
        PrunexError: When there is nothing to open, weights do not fit, or a timm model is named without weights.
    """
    if is_there(Path(where)):
        given = {"--weights": weights, "--img-size": image_size, "--pretrained": pretrained or None}
        for name, value in given.items():
            if value is not None:
                raise PrunexError(f"{name} goes with a timm model name, and {where} is a path: leave it out")
        return open_model(where)
    if weights is not None:
        return model_from_weights(where, weights, image_size)
    if pretrained:
        return create_model(where, None, None if image_size is None else {"img_size": image_size}, True).eval()
    if timm.is_model(where.split(".")[0]):
        raise PrunexError(
            f"{where} is a timm model name without weights: give --weights FILE.safetensors (nothing is downloaded "
            "unless --pretrained asks for it)"
        )
    raise PrunexError(
        f"{where} is neither a path nor a timm model name: give a run folder, such as "
        "runs/digits-dynamicvit/version_0, a slim folder, a checkpoint, or a timm model name with --weights FILE"
    )


def add_normalisation(parser: Any) -> None:
    """The arguments ``--mean`` and ``--std``, for :func:`renormalise`."""
    for name in ("mean", "std"):
        what = "standard deviation" if name == "std" else name
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{what} that the model's images are normalised by, of each channel (0..1); default what it says",
        )


def add_range(parser: Any) -> None:
    """The argument ``--range``, for :func:`~prunex.recipes.data.images.choose_range`."""
    parser.add_argument(
        "--range",
        type=int,
        metavar="MAX",
        help="largest value of pixels of 16 bits, such as 4095 for 12; default the smallest that holds all images",
    )


def renormalise(model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Say by what a model's images are normalised, where it does not itself: in its ``pretrained_cfg``.

    Args:
        model: A supported ViT, or a module that holds one.
        mean: A number a channel, or one for all; None leaves what is there.
        std: Likewise, above 0.

    Raises:
        PrunexError: For another number of numbers, or a spread that is none.
    """
    vit: Any = find(model)[1]
    channels = vit.patch_embed.proj.in_channels
    told = {}
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if len(values) not in (1, channels) or not all(math.isfinite(v) for v in values):
            raise PrunexError(f"--{name} {' '.join(map(str, values))} is not allowed: give {channels} numbers, or one")
        told[name] = tuple(values) * (channels if len(values) == 1 else 1)
    if min(told.get("std", (1.0,))) <= 0:
        raise PrunexError(f"--std {' '.join(map(str, told['std']))} is not allowed: give numbers above 0")
    vit.pretrained_cfg = {**dict(getattr(vit, "pretrained_cfg", None) or {}), **told}


def _from_checkpoint(config: dict[str, Any], path: Path) -> nn.Module:
    checkpoint = read_checkpoint(str(path))
    module_class = type(instantiate(LightningModule, config["model"]))
    ours: dict[str, Any] = {}
    if module_class.__module__.startswith("prunex."):  # whatever a checkpoint says, no other weights are looked for
        named = (config["model"].get("init_args") or {}).get("architecture")
        ours = {"weights": None, "pretrained": False} | ({} if named is None else {"architecture": named})
        ours = {k: v for k, v in ours.items() if k in inspect.signature(module_class).parameters}
    module = restore(module_class, checkpoint, str(path), **ours)
    explained = getattr(module, "classifier", module) if isinstance(module, ExplainerTraining) else module
    where = (told(checkpoint) or {}).get("path")
    warn_of_the_rest(explained, find(explained, where, Backbone)[1], "what a run is opened for")
    return as_the_data_tell(prunex.slim(explained, where), config["data"])


def as_the_data_tell(model: Any, spec: dict[str, Any]) -> nn.Module:
    """The model with its data's class names and normalisation, which a slim folder holds and a checkpoint does not."""
    data = instantiate(LightningDataModule, spec)
    model.label_names = class_names([data], head_classes(model), warn=_silent) or []
    pair = read_normalisation([data], model.patch_embed.proj.in_channels)
    said = {} if pair is None else {"mean": pair[0], "std": pair[1]}
    model.pretrained_cfg = {**dict(getattr(model, "pretrained_cfg", None) or {}), **said}
    return model


def _silent(text: str) -> None:
    """The data need not be there any more, and then tell no names; training has warned of others that do not fit."""


def instantiate(base: type, spec: dict[str, Any]) -> Any:
    """An object from ``class_path`` and ``init_args``, as configs hold them.

    Raises:
        PrunexError: When the class or its arguments are not as the config says.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "part")
    try:
        return parser.instantiate_classes(parser.parse_object({"part": spec})).part
    except PrunexError:
        raise
    except Exception as error:  # jsonargparse reports what it finds in several classes of its own
        raise PrunexError(f"cannot make {spec.get('class_path')} of the config: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says first, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def open_data(run: str | Path) -> LightningDataModule:
    """The data module a run was trained with, ready for validation."""
    data = instantiate(LightningDataModule, read_run(run)["data"])
    data.prepare_data()
    data.setup("validate")
    return data


def token_pruning(model: nn.Module) -> prunex.Pruning | None:
    """The handle of the token pruner on a backbone; None on a dense one, or one whose tokens cannot be pruned."""
    return prunex.attached(model) if mounted(find(model, kinds=Backbone)[1]) is not None else None


def evaluate(model: nn.Module, batches: Iterable[Any], limit: int | None = None) -> dict[str, float]:
    """Accuracy, and how much of the object the kept patches cover.

    Args:
        model: A ViT, dense or pruned.
        batches: Validation batches: images, labels and (optionally) object masks.
        limit: Look at no more than this many batches.

    Returns:
        ``accuracy`` 0..1, and ``kept_digit_cover`` 0..1 for a pruned model where masks are known.
    """
    weight = next(model.parameters())
    pruning = token_pruning(model)
    right = seen = 0
    cover: list[tuple[float, int]] = []
    model.eval()
    with torch.no_grad():
        for number, batch in enumerate(batches):
            if limit is not None and number >= limit:
                break
            known = parts(batch)
            images = known.need("images", "accuracy", "the validation batch")
            labels = known.need("labels", "accuracy", "the validation batch")
            predicted = model(images.to(weight)).argmax(1).cpu()
            right += int((predicted == labels.cpu()).sum())
            seen += len(predicted)
            if pruning is not None and "masks" in known and not pruning.trace.pooled:
                cover.append((object_kept(pruning.trace.kept().cpu(), known["masks"].cpu()), len(predicted)))
    if not seen:
        raise PrunexError("there are no validation images to evaluate on")
    measured = {"accuracy": right / seen}
    if cover:
        measured["kept_digit_cover"] = sum(c * n for c, n in cover) / sum(n for _, n in cover)
    return measured


def images_per_second(
    models: list[nn.Module], batch: int = 32, seconds: float = 1.0
) -> list[tuple[float, float, float]]:
    """Throughput of models that take turns in one process, round after round.

    Args:
        models: Backbones taking the same images.
        batch: Images in one forward.
        seconds: Measured time for each model, at least five rounds.

    Returns:
        For each model the lower quartile, the median and the upper quartile of images a second over the rounds.
    """
    images = noise(models[0], batch)
    calls = [(str(i), partial(forward, model, images)) for i, model in enumerate(models)]
    timings = side_by_side(calls, images.device.type, 0, seconds * len(models), least=5)
    return [quartiles([1e3 * batch / ms for ms in t.own]) for t in timings]


def noise(model: nn.Module, batch: int) -> Tensor:
    """Random images as a model takes them, [batch, C, H, W]."""
    embed: Any = find(model, kinds=Backbone)[1].patch_embed
    weight = next(model.parameters())
    size = (batch, embed.proj.weight.shape[1], *embed.img_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(weight)


def forward(model: nn.Module, images: Tensor) -> Any:
    """One forward as it is used: what is timed."""
    with torch.inference_mode():
        return model(images)


def compare(
    models: dict[str, nn.Module], batches: Iterable[Any], accuracy: bool | set[str] = True, limit: int | None = None
) -> dict[str, Any]:
    """What :func:`prunex.recipes.report.page.write_report` shows in its cost table.

    Args:
        models: ViTs by the name to show.
        batches: Validation batches, walked once for each model.
        accuracy: Whether to evaluate them, or the names of those to evaluate.
        limit: Look at no more than this many batches.

    Returns:
        ``{"machine": str, "rows": [...]}`` in plain values.
    """
    speeds = images_per_second(list(models.values()))
    rows = []
    for (name, model), (low, speed, high) in zip(models.items(), speeds, strict=True):
        cost = prunex.cost(model)
        row: dict[str, Any] = {"model": name, "gmacs": cost.gmacs, "params_m": cost.params / 1e6}
        row |= {"images_per_s": speed, "images_per_s_low": low, "images_per_s_high": high}
        if accuracy is True or (isinstance(accuracy, set) and name in accuracy):
            row |= evaluate(model, batches, limit)
        rows.append(row)
    return {"machine": machine(next(next(iter(models.values())).parameters())), "rows": rows}


def machine(weight: Tensor) -> str:
    """Where something was measured, in one line."""
    where = torch.cuda.get_device_name(weight.device) if weight.is_cuda else f"{os.cpu_count()} CPU cores"
    threads = f"{torch.get_num_threads()} threads, " if not weight.is_cuda else ""
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{where} ({platform.machine()}), {threads}{dtype}, batch 32, torch {torch.__version__}"


def write_summary(run: str | Path, summary: dict[str, Any]) -> Path:
    """Write ``summary.json`` into a run folder."""
    return write_whole(Path(run) / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def table(rows: list[dict[str, Any]]) -> str:
    """The cost table as text; images a second with their quartiles.

    >>> print(table([{"model": "dense", "accuracy": 0.9, "gmacs": 0.05, "params_m": 0.7, "images_per_s": 900.0}]))
    model                  accuracy   object kept      MMACs   params (M)   images/s
    dense                    90.0 %                     50.0         0.70        900
    """
    unit, macs = macs_column([r["gmacs"] for r in rows])
    lines = [f"{'model':<20} {'accuracy':>10} {'object kept':>13} {unit:>10} {'params (M)':>12} {'images/s':>10}"]
    for r, cost in zip(rows, macs, strict=True):
        shown = {k: f"{100 * r[k]:.1f} %" if r.get(k) is not None else "" for k in ("accuracy", "kept_digit_cover")}
        low, high = (r.get(f"images_per_s_{end}") for end in ("low", "high"))
        spread = "" if low is None or high is None else f"  ({low:.0f} to {high:.0f})"
        numbers = f"{cost:>10} {r['params_m']:>12.2f} {r['images_per_s']:>10.0f}{spread}"
        lines.append(f"{r['model']:<20} {shown['accuracy']:>10} {shown['kept_digit_cover']:>13} {numbers}")
    return "\n".join(lines)


def macs_column(gmacs: Sequence[float]) -> tuple[str, list[str]]:
    """Multiply-adds of a table in one unit, and that unit.

    >>> macs_column([4.608, 2.99]), macs_column([0.0492])
    (('GMACs', ['4.61', '2.99']), ('MMACs', ['49.2']))
    """
    factor, unit = macs_unit(gmacs)
    return unit, [f"{factor * g:,.1f}" if unit == "MMACs" else f"{factor * g:,.2f}" for g in gmacs]
