"""Run folders: opening their model and data again, and measuring models beside each other."""

from __future__ import annotations

import inspect
import json
import os
import platform
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

import prunex
from prunex.attributes import class_names, read_normalisation
from prunex.batches import Parts, parts
from prunex.callbacks.checkpoints import pruning_entry, read_checkpoint, restore
from prunex.callbacks.kept_token_monitor import object_kept
from prunex.callbacks.run_folder import RECORD, read_record
from prunex.columns import line, macs_column
from prunex.errors import PrunexError
from prunex.files import is_there, write_whole
from prunex.recipes.given import check_folder, check_model, on_hub
from prunex.recipes.modules.backbone import create_model, model_from_weights
from prunex.recipes.modules.grid_model import GridModel
from prunex.recipes.modules.tasks import Task, task_of
from prunex.recipes.modules.training import ExplainerTraining
from prunex.recipes.tables import SCORES, counted, score_of, score_text, share
from prunex.recipes.timing import side_by_side, speeds
from prunex.sources.classes import WRAPPERS
from prunex.sources.folder import class_in, holds_vit
from prunex.sources.said import label_names
from prunex.untrusted import read_json, read_text
from prunex.vit.anatomy import channels_of, find, head_classes
from prunex.vit.mount import mounted
from prunex.vit.surroundings import warn_of_the_rest
from prunex.vit.units import Backbone

SUMMARY = "summary.json"


def read_run(run: str | Path) -> dict[str, Any]:
    """The config.yaml of a run folder; refused where it is damaged or there is none."""
    config = config_of(run)
    if not config:
        lacks = "model and data in its config.yaml" if (Path(run) / "config.yaml").is_file() else "config.yaml"
        raise PrunexError(f"{run} has no {lacks}: give a run folder that prunex fit wrote")
    return config


def config_of(run: str | Path) -> dict[str, Any]:
    """What :func:`read_run` gives, and nothing for a run of one's own script."""
    if on_hub(str(run)) is not None:
        return {}
    path = check_folder(run) / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that YAML reads and Python cannot
        raise PrunexError(f"{path} is damaged: {error}") from error
    sections = [config.get(key) for key in ("model", "data")] if isinstance(config, dict) else [None]
    return config if all(isinstance(s, dict) and isinstance(s.get("class_path"), str) for s in sections) else {}


def home(where: str | Path) -> Path:
    """The folder of a run's results: that of the run which a slim model says it is of, else the folder itself.

    Of a model on the Hub, one of its name.
    """
    folder = Path(on_hub(str(where)) or where)
    # A slim model lies in its run, or says where that is.
    around = folder.parent if folder.name == "slim" else folder
    run = read_record(around).get("run")
    if isinstance(run, str) and is_there(Path(run), Path.is_dir):
        return Path(run)
    inside = any((around / name).is_file() for name in ("config.yaml", "metrics.csv", RECORD))
    return around if inside else folder


def slim_folder(where: Path) -> Path | None:
    """Where the slim model of a run lies: the folder itself, its slim/, or where SlimExport says; None: nowhere."""
    elsewhere = read_record(where).get("slim")
    folders = [where, where / "slim", *([Path(elsewhere)] if isinstance(elsewhere, str) else [])]
    return next((folder for folder in folders if is_there(folder / "config.json", Path.is_file)), None)


def run_of(where: Path) -> Path | None:
    """The run folder that a path is, or lies in."""
    for folder in (where, where.parent, where.parent.parent) if is_there(where) else ():
        if (folder / "config.yaml").is_file():
            return folder
    return None


def versions(root: Path) -> list[Path]:
    """The ``version_N`` folders below one, the highest number first."""
    numbered: dict[int, Path] = {}
    for folder in root.glob("version_*"):
        number = folder.name.removeprefix("version_")
        if number.isdecimal() and folder.is_dir():
            numbered[int(number)] = folder
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def open_model(where: str | Path) -> nn.Module:
    """The slim model of a slim folder, a run (its slim/, else its newest checkpoint), a checkpoint or the Hub's name.

    Of a folder of transformers, the timm twin of its ViT; of one with its wrapper of timm models, the ViT in it. In
    eval mode.
    """
    if on_hub(str(where)) is not None:
        return prunex.load(str(where))
    path = Path(where)
    if is_there(path, Path.is_file):
        run = path.parent.parent
        if not (run / "config.yaml").is_file():
            raise PrunexError(
                f"{path} does not lie in a run: its config.yaml says what to build, so give RUN/checkpoints/x.ckpt as "
                "prunex fit wrote it, or a run or slim folder"
            )
        return _from_checkpoint(read_run(run), path)
    if holds_vit(path):
        return _of_transformers(path)
    # What was exported last is what the run is for; a checkpoint stands in for it.
    slim = slim_folder(path)
    if slim is not None:
        return prunex.load(slim)
    config = read_run(path)
    checkpoints = sorted((path / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    if not checkpoints:
        raise PrunexError(f"{path} has neither a slim model nor a checkpoint: train with prunex fit first")
    return _from_checkpoint(config, checkpoints[-1])


def _of_transformers(folder: Path) -> nn.Module:
    """The ViT in a folder of transformers, with names and normalisation."""
    if class_in(read_json(folder / "config.json")) not in WRAPPERS:
        twin: nn.Module = prunex.from_transformers(folder)
        return twin
    wrapper = prunex.load_pretrained(folder)
    vit = find(wrapper)[1]
    vit.label_names = label_names(wrapper.config, head_classes(vit))
    said = getattr(wrapper.config, "pretrained_cfg", None) or {}
    _describe(vit, **{name: said[name] for name in ("mean", "std") if said.get(name) is not None})
    return vit


def open_model_or_name(
    where: str, weights: str | None = None, image_size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """What `open_model` opens, or a timm model by name, with images of ``image_size`` (None: what its weights had)."""
    check_model(where, weights, image_size, pretrained)
    if on_hub(where) is not None or is_there(Path(where)):
        return open_model(where)
    if weights is not None:
        return model_from_weights(where, weights, image_size)
    return create_model(where, None, None if image_size is None else {"img_size": image_size}, True).eval()


def renormalise(model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Say in a model's ``pretrained_cfg`` by what its images are normalised: a number a channel, or one for all."""
    vit: Any = find(model)[1]
    channels = channels_of(vit.patch_embed)
    chosen = {name: tuple(values) for name, values in (("mean", mean), ("std", std)) if values is not None}
    for name, values in chosen.items():
        if len(values) not in (1, channels):
            raise PrunexError(f"--{name} {' '.join(map(str, values))} is not allowed: give {channels} numbers, or one")
        if len(values) == 1:
            chosen[name] = values * channels
    _describe(vit, **chosen)


def _describe(vit: Any, **options: Any) -> None:
    """Put something into a model's ``pretrained_cfg``, where timm and prunex look for it."""
    vit.pretrained_cfg = {**dict(getattr(vit, "pretrained_cfg", None) or {}), **options}


def to_device(name: str | None, models: Iterable[nn.Module]) -> torch.device:
    """Bring models to a device (None: a GPU where there is one), as float32, which images are."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        for model in models:
            model.to(device).float()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for the device
        raise PrunexError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _from_checkpoint(config: dict[str, Any], path: Path) -> nn.Module:
    checkpoint = read_checkpoint(str(path))
    module_class = type(instantiate(LightningModule, config["model"]))
    ours: dict[str, Any] = {}
    if module_class.__module__.startswith("prunex."):  # whatever a checkpoint says, no other weights are looked for
        # The config says what is built; a checkpoint may come from anywhere.
        named = (config["model"].get("init_args") or {}).get("architecture")
        ours = {"weights": None, "pretrained": False} | ({} if named is None else {"architecture": named})
        ours = {k: v for k, v in ours.items() if k in inspect.signature(module_class).parameters}
    module = restore(module_class, checkpoint, str(path), **ours)
    # Of a module that trains an explainer, the model is the classifier that it explains.
    explained = getattr(module, "classifier", module) if isinstance(module, ExplainerTraining) else module
    where = (pruning_entry(checkpoint) or {}).get("path")
    warn_of_the_rest(explained, find(explained, where, Backbone)[1], "what a run is opened for")
    return as_the_data_tell(prunex.slim(explained, where), config["data"])


def as_the_data_tell(model: Any, spec: dict[str, Any]) -> nn.Module:
    """The model with its data's class names and normalisation, which a slim folder holds and a checkpoint does not."""
    data = instantiate(LightningDataModule, spec)
    # Data that are not there any more tell no names, and training has warned of names that do not fit.
    model.label_names = class_names([data], head_classes(model), warn=lambda text: None) or []
    pair = read_normalisation([data], channels_of(model.patch_embed))
    if pair is not None:
        _describe(model, mean=pair[0], std=pair[1])
    return model


def deny_imports() -> None:
    """Have jsonargparse refuse configs that name parts of Python which run commands or touch files, where it can."""
    if "import_path_denylist" in inspect.signature(set_parsing_settings).parameters:
        set_parsing_settings(import_path_denylist=[])  # its own list, which otherwise only warns


def instantiate(base: type, spec: dict[str, Any]) -> Any:
    """An object from ``class_path`` and ``init_args``, as configs hold them."""
    deny_imports()
    # jsonargparse knows how configs name classes, links and types.
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "part")
    try:
        return parser.instantiate_classes(parser.parse_object({"part": spec})).part
    except PrunexError:
        raise
    except Exception as error:  # jsonargparse reports what it finds in several classes of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise PrunexError(f"cannot make {spec.get('class_path')} of the config: {reason}") from error


def open_data(run: str | Path) -> LightningDataModule:
    """The data module a run was trained with, ready for validation."""
    data = instantiate(LightningDataModule, read_run(run)["data"])
    # As a Trainer would.
    data.prepare_data()
    data.setup("validate")
    return data


def token_pruning(model: nn.Module) -> prunex.Pruning | None:
    """The handle of the token pruner on a backbone; None on a dense one, or one whose tokens cannot be pruned."""
    return prunex.attached(model) if mounted(find(model, kinds=Backbone)[1]) is not None else None


def evaluate(model: nn.Module, batches: Iterable[Any], limit: int | None = None) -> dict[str, float]:
    """How well a model does on so many batches; of a pruned one also ``kept_digit_cover``, where they have masks.

    Labels say by what: ``accuracy`` (0..1) for one class an image, ``map`` (0..1, mean average precision) for 0 and 1
    of several labels, ``mae`` (mean absolute error) for numbers. A :class:`GridModel` has a score of its own, such as
    ``miou``.
    """
    weight, pruning = next(model.parameters()), token_pruning(model)
    scorer = _GridScore(model) if isinstance(model, GridModel) else _ClassScore()
    cover: list[tuple[float, int]] = []
    seen = 0
    model.eval()
    with torch.no_grad():
        for number, batch in enumerate(batches):
            if limit is not None and number >= limit:
                break
            named = parts(batch)
            images = named.need("images", "accuracy", "the validation batch")
            scorer.update(model(images.to(weight)), batch, named)
            seen += len(images)
            # Pooled tokens are no patches, so that none of them covers an object.
            if pruning is not None and "masks" in named and not pruning.trace.pooled:
                cover.append((object_kept(pruning.trace.kept().cpu(), named["masks"].cpu()), len(images)))
    if not seen:
        raise PrunexError("there are no validation images to evaluate on")
    measured = scorer.measured()
    if cover:
        measured["kept_digit_cover"] = sum(c * n for c, n in cover) / sum(n for _, n in cover)
    return measured


class _ClassScore:
    """The score of logits, by the task that the batches' labels are of."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.answers: list[Tensor] = []
        self.truths: list[Tensor] = []

    def update(self, logits: Tensor, batch: Any, named: Parts) -> None:
        task, labels = task_of(named, logits.shape[1], "accuracy", "the validation batch")
        if self.task is not None and task.name != self.task.name:
            raise PrunexError(f"some validation batches have {self.task.part} and some {task.part}: give all the same")
        self.task = task
        self.answers.append(logits.float().cpu())
        self.truths.append(labels.cpu())

    def measured(self) -> dict[str, float]:
        task, logits, labels = self.task, torch.cat(self.answers), torch.cat(self.truths)
        return {} if task is None else {task.score: task.measure(logits, labels)}


class _GridScore:
    """The score that a segmentation or detection model has."""

    def __init__(self, model: GridModel) -> None:
        self.model, self.meter = model, model.meter().to(next(model.parameters()).device)

    def update(self, output: Any, batch: Any, named: Parts) -> None:
        self.model.update(self.meter, output, batch)

    def measured(self) -> dict[str, float]:
        return {self.model.score: self.model.read(self.meter)}


def noise(model: nn.Module, batch: int) -> Tensor:
    """Random images as a model takes them, [batch, C, H, W]."""
    embed: Any = find(model, kinds=Backbone)[1].patch_embed
    size = (batch, channels_of(embed), *embed.img_size)
    # The same for every model, since what pruners keep depends on it.
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))


def forward(model: nn.Module, images: Tensor) -> Any:
    """One forward as it is used: what is timed."""
    with torch.inference_mode():
        return model(images)


def compare(
    models: dict[str, nn.Module], batches: Iterable[Any], evaluated: set[str], limit: int | None = None
) -> dict[str, Any]:
    """Cost, speed and score of models that take turns in one process: what the report's cost table shows.

    Those whose names are in ``evaluated`` go through validation batches (at most ``limit``). Returns plain values,
    ``{"machine": str, "rows": [...]}``, with images a second, how many times the first model's that is round by round,
    and the quartiles of both; of a machine that others kept busy ``machine`` says so.
    """
    batch, first = 32, next(iter(models.values()))
    images = noise(first, batch)
    # In turn, round after round: a busy machine then slows all of them alike.
    calls = [(name, partial(forward, model, images)) for name, model in models.items()]
    timings = side_by_side(calls, images.device.type, 0, seconds=float(len(models)), least=15)
    rows = []
    for (name, model), timing in zip(models.items(), timings, strict=True):
        speed = speeds(timing, batch)
        cost = prunex.cost(model)
        row: dict[str, Any] = {"model": name, "gmacs": cost.gmacs, "params_m": cost.params / 1e6}
        row |= {"images_per_s": speed["images_per_s"], "speed_ratio": speed["ratio"]}
        for end in ("low", "high"):
            row |= {f"images_per_s_{end}": speed[end], f"speed_ratio_{end}": speed[f"ratio_{end}"]}
        if name in evaluated:
            row |= evaluate(model, batches, limit)
        rows.append(row)
    where = torch.cuda.get_device_name(images.device) if images.is_cuda else f"{os.cpu_count()} CPU cores"
    threads = "" if images.is_cuda else f"{counted(torch.get_num_threads(), 'thread')}, "
    dtype = str(images.dtype).removeprefix("torch.")
    rounds = len(timings[0].own)
    how = f"{threads}{dtype}, batch {batch}, {rounds} rounds in turn, torch {torch.__version__}"
    # Between quartiles of one model, on a quiet machine, lie some per cent.
    if rows[0]["images_per_s_high"] > 1.5 * rows[0]["images_per_s_low"]:
        how += "; the machine was busy, so measure again: prunex bench"
    return {"machine": f"{where} ({platform.machine()}), {how}", "rows": rows}


def write_summary(run: str | Path, summary: dict[str, Any]) -> Path:
    """Write ``summary.json`` into a run folder."""
    return write_whole(Path(run) / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def table(rows: list[dict[str, Any]]) -> str:
    """The cost table as text; speeds as ratios to the first model's and as images a second, with quartiles.

    >>> print(table([{"model": "dense", "accuracy": 0.9, "gmacs": 0.05, "params_m": 0.7, "images_per_s": 900.0}]))
    model                  accuracy   object kept      MMACs   params (M)                   speed   images/s
    dense                    90.0 %                     50.0         0.70                                900
    """
    (unit, macs), score = macs_column([r["gmacs"] for r in rows]), score_of(rows)
    widths = [-20, 10, 13, 10, 12, 23, 10]
    lines = [line(["model", SCORES[score][0], "object kept", unit, "params (M)", "speed", "images/s"], widths)]
    for r, cost in zip(rows, macs, strict=True):
        shown = [r["model"], score_text(score, r.get(score)), share(r.get("kept_digit_cover")), cost]
        low, high = (r.get(f"images_per_s_{end}") for end in ("low", "high"))
        spread = "" if low is None or high is None else f"  ({low:.0f} to {high:.0f})"
        ratio = ""
        if r is not rows[0] and {"speed_ratio", "speed_ratio_low", "speed_ratio_high"} <= set(r):
            ratio = "x {speed_ratio:.2f} ({speed_ratio_low:.2f} to {speed_ratio_high:.2f})".format(**r)
        lines.append(line([*shown, f"{r['params_m']:.2f}", ratio, f"{r['images_per_s']:.0f}"], widths) + spread)
    return "\n".join(lines)
