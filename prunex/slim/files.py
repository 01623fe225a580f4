"""Slim models on disk: safetensors, config.json with timm's keys, and a model card. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from prunex.attach import method_of, put_tokens
from prunex.checks import called_as
from prunex.errors import PrunexError
from prunex.files import DRAFT, is_there, readable
from prunex.handles.base import handle_on
from prunex.handles.heads import Head, put_head
from prunex.handles.tokens import Pruning
from prunex.hub import HUB, downloaded
from prunex.pruners.base import TokenPruner
from prunex.registry import lookup
from prunex.slim.metadata import architecture, as_read, check_metadata, check_tensors, class_names, known_cfg
from prunex.slim.slim import mark_slim, slim_of
from prunex.units.correction import Correction, correction, note
from prunex.untrusted import read_json, read_tensors
from prunex.version import __version__
from prunex.vit.anatomy import find, read
from prunex.vit.cost import cost
from prunex.vit.describe import describe, outline
from prunex.vit.fold import copy_of, fold, wrapped_parts
from prunex.vit.methods import check_parity
from prunex.vit.mount import HEAD, TOKENS, mounted
from prunex.vit.rebuild import Still, build, build_like
from prunex.vit.units import Backbone, blocks_of, head_dim, opens_channels, opens_heads
from prunex.vit.weights import misfits

VERSION = 3  # 2 knows widths and Swin, 3 heads; whatever needs none is written as 1, which older versions read
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_NEAREST = {  # for models that timm has no name for
    "Eva": "eva02_small_patch14_224",
    "Beit": "beit_base_patch16_224",
    "Cait": "cait_xxs24_224",
    "VisionTransformerRelPos": "vit_relpos_small_patch16_224",
    "SwinTransformer": "swin_tiny_patch4_window7_224",
}
# Constructor arguments that timm's JSON cannot carry.
_ONLY_OURS = ("norm_layer", "embed_norm_layer", "act_layer", "mlp_layer", "block_fn")


@called_as('prunex.save(model, "out/slim")', model=nn.Module)
def save(
    model: nn.Module,
    folder: str | Path,
    *,
    labels: Sequence[str] | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
) -> Path:
    """Write a ViT, pruned or dense, as a folder that :func:`load` and any safetensors reader can open.

    Files are written beside the folder and moved in when all are complete: an interrupted save leaves the old ones.

    Args:
        model: What :func:`prunex.slim` gave; or any supported ViT or timm Swin.
        folder: Where to; made if missing, its three files replaced if there.
        labels: Class names, one a class; None: those that the model was loaded with.
        mean: What the images were normalised with, one number a channel or one for all; None: as the model's
            ``pretrained_cfg`` says, where that was made for as many channels.
        std: Standard deviation, likewise.

    Returns:
        The folder.

    Raises:
        PrunexError: For a model that :func:`check_savable` refuses, labels, mean or std of the wrong number, or a
            folder that cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise PrunexError(f"{folder} is a file: give a folder to save to")
    vit = slim_of(find(model, kinds=Backbone)[1])
    config = _config(vit, labels, mean, std)
    try:
        # Beside the folder, so that moving in is a rename on the same disk.
        folder.parent.mkdir(parents=True, exist_ok=True)
        waiting = Path(tempfile.mkdtemp(prefix=f"{DRAFT}{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise PrunexError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    made = not folder.exists()
    try:
        save_file(_tensors(vit), waiting / WEIGHTS, metadata={"format": "pt"})
        config["prunex"]["sha256"] = _sha256(waiting / WEIGHTS)
        (waiting / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (waiting / CARD).write_text(readable(_card(config)), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        _move_in(waiting, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        # An empty folder would look like one whose files were lost.
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        reason = getattr(error, "strerror", None) or error
        raise PrunexError(f"cannot write to {folder}: {reason}; choose another folder") from error
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    return folder


def check_savable(model: nn.Module, path: str | None = None) -> None:
    """Refuse a model that :func:`save` would refuse, before a training run is spent on it.

    Args:
        model: A ViT or timm Swin, or a module that holds exactly one.
        path: Dotted path to it when there are several.

    Raises:
        PrunexError: By what cannot be written: a head, block or layer that plain values do not describe, weights that
            are no plain tensors.
    """
    vit = find(model, path, Backbone)[1]
    # Slimming will fold adapters into their layers, and what is left then is what must be savable.
    if next(wrapped_parts(vit), None):
        vit = fold(copy_of(vit))
    check_tensors(vit.state_dict())
    describe(vit)


def _tensors(vit: nn.Module) -> dict[str, Tensor]:
    """The weights as they are written: whole, and no two in one storage, of which the file knows nothing."""
    tensors: dict[str, Tensor] = {}
    # safetensors refuses two tensors of one storage, such as tied weights.
    storages = set()
    for name, value in vit.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        start = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if start in storages else tensor
        storages.add(start)
    return tensors


def _move_in(waiting: Path, folder: Path) -> None:
    """Replace the folder's files by those that wait; all of them, or none."""
    names = (WEIGHTS, CARD, CONFIG)
    old = waiting / "old"
    old.mkdir()
    try:
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, old / name)
            os.replace(waiting / name, folder / name)
    except BaseException:  # an interrupt too: old weights beside a new description would fit nothing
        for name in names:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            elif not (waiting / name).exists():
                (folder / name).unlink(missing_ok=True)
        raise


@called_as('prunex.load("out/slim")')
def load(folder: str | Path) -> nn.Module:
    """A saved model again: rebuilt from its description, pruned if it was, in eval mode.

    Args:
        folder: As given to :func:`save`; or ``"hf-hub:owner/name"``, with ``@revision`` for a branch, tag or commit,
            whose description and weights, and nothing else, are downloaded into huggingface_hub's cache.

    Returns:
        The ViT; logits equal the saved model's.

    Raises:
        PrunexError: For a missing, damaged or foreign folder, or one of a later version; of the Hub also for a name
            that is not there, and where neither the network nor the cache has it.
    """
    if not isinstance(folder, str | os.PathLike):
        raise PrunexError(f"folder={folder!r} is not allowed: give the path that save was given")
    by_name = isinstance(folder, str) and folder.startswith(HUB)
    folder = downloaded(str(folder), (CONFIG, WEIGHTS)) if by_name else Path(folder)
    config = read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise PrunexError(f"{folder} has no {WEIGHTS}: the folder is not whole; save the model again")
    ours = config["prunex"]
    # Before anything is built: damaged numbers would fit every shape.
    if _sha256(weights) != ours.get("sha256"):
        raise PrunexError(f"{weights} is damaged or was replaced: its checksum is not the one in {CONFIG}")
    tensors = read_tensors(weights)
    with torch.random.fork_rng(devices=[]):  # building may draw numbers; the caller's stay
        try:
            vit = build_like(ours["model"], tensors)
            outline(vit)
            if ours.get("pruning") is not None:
                _attach(vit, ours)
            if ours.get("head") is not None:
                _put_head(vit, ours["head"])
        except PrunexError as error:
            raise PrunexError(f"{weights} and {CONFIG} beside it: {error}") from error
    # Once more with pruner and head on: the file may hold tensors of theirs that the description does not know.
    wrong = misfits(vit.state_dict(), tensors)
    if wrong:
        names = ", ".join(wrong[:4])
        raise PrunexError(f"{weights} does not fit {CONFIG} ({names}): one of them was changed; save the model again")
    digest = ours.get("model_sha256")  # equal shapes may be cut into heads in another way
    if digest != _digest(ours["model"]) and (digest is not None or ours["version"] > 1):
        raise PrunexError(f"{weights} does not fit {CONFIG} (its model entry was changed): save the model again")
    for kind in (TOKENS, HEAD):
        holder = mounted(vit, kind)
        if holder is not None:
            held = {k.removeprefix(f"{kind}."): v for k, v in tensors.items() if k.startswith(f"{kind}.")}
            holder.load_state_dict(held, assign=True)
    vit.pretrained_cfg = dict(config.get("pretrained_cfg", {}))
    vit.label_names = [readable(name) for name in config.get("label_names") or []]
    if ours.get("correction") is not None:
        note(vit, _corrected(ours["correction"]))
    mark_slim(vit)
    return vit


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a slim folder, checked to be one.

    Raises:
        PrunexError: For a folder that is missing, damaged, foreign or of a later version.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not is_there(folder, Path.is_dir):
        raise PrunexError(f"{folder} is no folder: give one written by prunex.save, such as runs/NAME/slim")
    if not path.is_file():
        raise PrunexError(f"{folder} has no {CONFIG}: give a folder written by prunex.save, such as runs/NAME/slim")
    config = read_json(path)
    ours = config.get("prunex") if isinstance(config, Mapping) else None
    version = ours.get("version") if isinstance(ours, Mapping) else None
    foreign = f"{path} was not written by prunex (it has no whole 'prunex' entry): give a folder of prunex.save"
    if type(version) is not int or ours is None:
        raise PrunexError(foreign)
    if version > VERSION:
        raise PrunexError(f"{path} is of format {version}, this prunex reads up to {VERSION}: upgrade prunex-vit")
    pruning = ours.get("pruning")
    whole = isinstance(ours.get("model"), Mapping) and all(
        spec is None or (isinstance(spec, Mapping) and isinstance(spec.get("method"), str))
        for spec in (pruning, ours.get("head"))
    )
    if not whole or not isinstance(config.get("pretrained_cfg", {}), Mapping):
        raise PrunexError(foreign)
    check_metadata(config, f"{path} is damaged")
    return dict(config)


def _described(pruning: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A token pruner's name and options; these are values, and reach for no other file."""
    # Options that would reach for another file, or a module of the caller's, say nothing of a model.
    spec = dict(pruning)
    method = lookup("pruner", spec.pop("method"))
    for name in ("path", "budget", "explainer", "model", "method"):
        if spec.get(name) is not None:
            raise PrunexError(f"the pruning entry may not name {name!r}: was the file edited?")
    if not issubclass(method.make, TokenPruner):  # type: ignore[arg-type]
        raise PrunexError(f"{method.name} prunes no tokens: was the file edited?")
    return method.name, spec


def _attach(vit: Any, ours: Mapping[str, Any]) -> None:
    name, options = _described(ours["pruning"])
    with _attaching(name):
        if ours.get("made_with") != _versions():  # another timm's forward may not be what ours is equal to
            check_parity(build(ours["model"]))
        with Still():
            put_tokens(vit, read(vit), method_of(name, options), options)


def _put_head(vit: Any, spec: Mapping[str, Any]) -> None:
    options = dict(spec)
    name = lookup("head", options.pop("method")).name
    with _attaching(name), Still():
        put_head(vit, method_of(name, options), options)


@contextmanager
def _attaching(name: str) -> Iterator[None]:
    try:
        yield
    except PrunexError:
        raise
    except Exception as error:  # options of other types than any that save writes
        raise PrunexError(f"cannot attach {name} as described ({type(error).__name__} {error})") from error


def _corrected(values: Any) -> Correction:
    try:
        return Correction.read(values)
    except PrunexError as error:
        raise PrunexError(f"{CONFIG} is damaged: its correction entry cannot be read; save the model again") from error


def _versions() -> dict[str, str]:
    return {"prunex": __version__, "torch": str(torch.__version__), "timm": timm.__version__}


def _config(vit: Any, labels: Sequence[str] | None, mean: Any, std: Any) -> dict[str, Any]:
    """The whole of ``config.json`` but for the weights' checksum, checked as :func:`read_config` will check it."""
    anatomy = outline(vit)
    check_tensors(vit.state_dict())
    model = describe(vit)
    windowed = model["class"] == "SwinTransformer"
    cfg = known_cfg(vit, anatomy.channels, mean, std) | {
        "input_size": [anatomy.channels, *anatomy.image],
        "num_classes": anatomy.classes,
        "first_conv": next(n for n, m in vit.named_modules() if isinstance(m, nn.Conv2d)),
        "classifier": "head.fc" if windowed else "head",
        "fixed_input_size": not anatomy.dynamic,
    }
    pruned, headed = handle_on(Pruning, vit), handle_on(Head, vit)
    pruning = None if pruned is None else pruned.spec
    head = None if headed is None else headed.spec
    if pruning is not None:
        _described(pruning)
    count = cost(vit)
    names, done = class_names(vit, anatomy.classes, labels), correction(vit)
    # The oldest format that says all: older versions read what they know.
    version = 2 if windowed or "widths" in model else 1
    config = {
        "architecture": architecture(vit) or _NEAREST.get(model["class"], "vit_small_patch16_224"),
        "num_classes": anatomy.classes,
        "num_features": anatomy.width,
        "global_pool": anatomy.pool,
        "model_args": {k: v for k, v in model["args"].items() if k not in (*_ONLY_OURS, "num_classes", "global_pool")},
        "pretrained_cfg": cfg,
        **({"label_names": names} if names else {}),
        "prunex": {
            "version": version if head is None else 3,
            "model": model,
            "model_sha256": _digest(model),
            "pruning": pruning,
            **({"head": head} if head is not None else {}),
            **({"correction": done.plain()} if done is not None else {}),
            "macs": count.macs,
            "params": count.params,
            "tokens_per_block": count.tokens,
            "widths_per_block": _widths(vit),
            "made_with": _versions(),
        },
    }
    return as_read(config)


def _widths(vit: Any) -> list[dict[str, int]]:
    """What each block has, where its units are known one by one: heads, the width of one, MLP channels."""
    rows = []
    for _, block in blocks_of(vit):
        row: dict[str, int] = {}
        if opens_heads(block):
            row |= {"heads": block.attn.num_heads, "head_width": head_dim(block.attn)}
        if opens_channels(block):
            row["hidden"] = block.mlp.fc2.in_features
        rows.append(row)
    return rows


def _digest(model: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _width_rows(widths: Sequence[Mapping[str, int]]) -> str:
    titles = {"heads": "heads in each block", "head_width": "width of a head", "hidden": "MLP channels in each block"}
    rows = ""
    for name, title in titles.items():
        if all(name in block for block in widths):
            rows += f"| {title} | {', '.join(str(block[name]) for block in widths)} |\n"
    return rows


def _card(config: Mapping[str, Any]) -> str:
    ours, cfg, pruning = config["prunex"], config["pretrained_cfg"], config["prunex"]["pruning"]
    size = " x ".join(map(str, cfg["input_size"]))
    narrowed = "widths" in ours["model"]
    kind, options, after = ("narrowed", "none", "") if narrowed else ("dense", "dense", "")
    if pruning is not None:
        kind, options = f"pruned with {pruning['method']}", ", ".join(f"{k}={v}" for k, v in pruning.items())
        after = (
            "\npruning = prunex.attached(model)  # after a forward pruning.trace.kept() says which patches were used"
        )
    done = ours.get("correction")
    corrected = "" if done is None else f"\n| corrected | {_corrected(done).summary()} |"
    head = ours.get("head")
    head_row = "" if head is None else f"\n| head | {', '.join(f'{k}={v}' for k, v in head.items())} |"
    if head is not None:
        after += "\nhead = prunex.attached(model, head=True)  # head.evidence(images) says what a decision is made of"
    return f"""---
library_name: prunex
tags: [image-classification, vision-transformer, token-pruning]
---
# {config["architecture"]}, {kind}

| | |
|---|---|
| input | {size}, mean {cfg.get("mean", "not recorded")}, std {cfg.get("std", "not recorded")} |
| classes | {config["num_classes"]} |
| pruning | {options} |{head_row}{corrected}
| multiply-adds an image | {ours["macs"] / 1e9:.3f} G |
| parameters | {ours["params"] / 1e6:.2f} M |
| tokens in each block | {", ".join(map(str, ours["tokens_per_block"]))} |
{_width_rows(ours["widths_per_block"]) if narrowed else ""}
```python
import prunex

model = prunex.load("path/to/this/folder")  # eval mode; model(images) -> logits{after}
```
"""
