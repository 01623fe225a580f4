"""Slim models on disk: safetensors, config.json with timm's keys, and a model card. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import prunex
from prunex.attach import CHILD, UNITS, Pruning, attach
from prunex.errors import PrunexError
from prunex.files import DRAFT
from prunex.pruners.base import TokenPruner
from prunex.registry import lookup
from prunex.slim.slim import slim
from prunex.untrusted import is_there, odd_dtypes, read_json, read_tensors, readable
from prunex.vit.anatomy import find
from prunex.vit.cost import cost
from prunex.vit.rebuild import build_like, describe, outline
from prunex.vit.units import Backbone, blocks_of, head_dim, opens_channels, opens_heads

VERSION = 2  # 2 knows widths and Swin; whatever needs neither is written as 1, which older versions read
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_NEAREST = {  # for models that timm has no name for
    "Eva": "eva02_small_patch14_224",
    "Beit": "beit_base_patch16_224",
    "SwinTransformer": "swin_tiny_patch4_window7_224",
}
_ONLY_OURS = (
    "norm_layer",
    "embed_norm_layer",
    "act_layer",
    "mlp_layer",
    "block_fn",
)  # constructor arguments that timm's JSON cannot carry


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Write a ViT, pruned or dense, as a folder that :func:`load` and any safetensors reader can open.

    Files are written beside the folder and moved in when all are whole, so an interrupted save leaves the old ones.

    Args:
        model: What :func:`prunex.slim` gave; or any supported ViT or timm Swin.
        folder: Where to; made if missing, its three files replaced if there.
        labels: Class names, one a class.
        mean: Per-channel mean the images were normalised with.
        std: Per-channel standard deviation, likewise.

    Returns:
        The folder.

    Raises:
        PrunexError: For a model plain values cannot describe, labels, mean or std of the wrong number, or a folder that
            cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise PrunexError(f"{folder} is a file: give a folder to save to")
    vit = find(model, kinds=Backbone)[1]
    if hasattr(vit, CHILD) or hasattr(vit, UNITS):
        vit = slim(vit)  # no teacher, no gates, and a schedule's present rates as they are now
    config = _config(vit, labels, mean, std)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        waiting = Path(tempfile.mkdtemp(prefix=f"{DRAFT}{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise PrunexError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    made = not folder.exists()
    try:
        tensors = {k: v.detach().cpu().contiguous() for k, v in vit.state_dict().items()}
        save_file(tensors, waiting / WEIGHTS, metadata={"format": "pt"})
        config["prunex"]["sha256"] = _sha256(waiting / WEIGHTS)
        (waiting / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (waiting / CARD).write_text(_card(config))
        folder.mkdir(exist_ok=True)
        _move_in(waiting, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        reason = getattr(error, "strerror", None) or error
        raise PrunexError(f"cannot write to {folder}: {reason}; choose another folder") from error
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    return folder


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


def load(folder: str | Path) -> nn.Module:
    """A saved model again: rebuilt from its description, pruned if it was, in eval mode.

    Args:
        folder: As given to :func:`save`.

    Returns:
        The ViT; logits equal the saved model's.

    Raises:
        PrunexError: For a missing, damaged or foreign folder, or one of a later version.
    """
    if not isinstance(folder, str | os.PathLike):
        raise PrunexError(f"folder={folder!r} is not allowed: give the path that save was given")
    folder = Path(folder)
    config = read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise PrunexError(f"{folder} has no {WEIGHTS}: the folder is not whole; save the model again")
    ours = config["prunex"]
    if _sha256(weights) != ours.get("sha256"):
        raise PrunexError(f"{weights} is damaged or was replaced: its checksum is not the one in {CONFIG}")
    tensors = read_tensors(weights)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights; the caller's random numbers stay
        try:
            vit: Any = build_like(ours["model"], tensors)
            outline(vit)
            if ours.get("pruning") is not None:
                _attach(vit, ours["pruning"])
        except PrunexError as error:
            raise PrunexError(f"{weights} and {CONFIG} beside it: {error}") from error
    first = tensors.get("patch_embed.proj.weight")
    if first is not None and first.is_floating_point():
        vit.to(first.dtype)  # for buffers that no file holds, such as rotary tables
    missing, unexpected = (set(vit.state_dict()) - set(tensors), set(tensors) - set(vit.state_dict()))
    wrong = [k for k, v in vit.state_dict().items() if k in tensors and tensors[k].shape != v.shape]
    wrong += odd_dtypes(vit.state_dict(), tensors)
    if missing or unexpected or wrong:
        names = ", ".join(sorted(missing | unexpected | set(wrong))[:4])
        raise PrunexError(f"{weights} does not fit {CONFIG} ({names}): one of them was changed; save the model again")
    told = ours.get("model_sha256")  # equal shapes may be cut into heads in another way
    if told != _digest(ours["model"]) and (told is not None or ours["version"] > 1):
        raise PrunexError(f"{weights} does not fit {CONFIG} (its model entry was changed): save the model again")
    vit.load_state_dict(tensors, assign=True)  # every tensor keeps the dtype it was saved in
    vit.pretrained_cfg = dict(config.get("pretrained_cfg", {}))
    vit.label_names = [readable(name) for name in config.get("label_names") or []]
    return vit.eval()


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
    ours = ours if isinstance(ours, Mapping) else {}
    version = ours.get("version")
    foreign = f"{path} was not written by prunex (it has no whole 'prunex' entry): give a folder of prunex.save"
    if isinstance(version, bool) or not isinstance(version, int):
        raise PrunexError(foreign)
    if version > VERSION:
        raise PrunexError(f"{path} is of format {version}, this prunex reads up to {VERSION}: upgrade prunex-vit")
    pruning = ours.get("pruning")
    whole = isinstance(ours.get("model"), Mapping) and (
        pruning is None or (isinstance(pruning, Mapping) and isinstance(pruning.get("method"), str))
    )
    if not whole or not isinstance(config.get("pretrained_cfg", {}), Mapping):
        raise PrunexError(foreign)
    _check_told(config, path)
    return dict(config)


def _check_told(config: Mapping[str, Any], path: Path) -> None:
    """What pictures, tables and graphs show of a model: names are text, and there is a number a channel."""
    names, cfg = config.get("label_names") or [], config.get("pretrained_cfg", {})
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise PrunexError(f"{path} is damaged: label_names must be a list of texts")
    size = config["prunex"]["model"].get("args")
    channels = size.get("in_chans", 3) if isinstance(size, Mapping) else 3
    for name, low in (("mean", -math.inf), ("std", 0.0)):
        told = cfg.get(name)
        numbers = told is None or (
            isinstance(told, list)
            and all(isinstance(v, int | float) and not isinstance(v, bool) and low < v < math.inf for v in told)
        )
        if not numbers or (told and len(told) not in (1, channels, max(3, channels if type(channels) is int else 3))):
            raise PrunexError(f"{path} is damaged: {name} must be one number a channel{', above 0' * (low == 0)}")
    if not isinstance(cfg.get("architecture", ""), str | None):
        raise PrunexError(f"{path} is damaged: architecture must be a name")


def _attach(vit: nn.Module, pruning: Mapping[str, Any]) -> None:
    """Put a described token pruner on; its options are values, and reach for no other file."""
    spec = dict(pruning)
    method = lookup("pruner", spec.pop("method"))
    for name in ("path", "budget", "explainer", "model", "method"):
        if spec.get(name) is not None:
            raise PrunexError(f"the pruning entry may not name {name!r}: was the file edited?")
    if not issubclass(method.make, TokenPruner):  # type: ignore[arg-type]
        raise PrunexError(f"{method.name} prunes no tokens: was the file edited?")
    try:
        attach(vit, method.name, **spec)
    except PrunexError:
        raise
    except Exception as error:  # options of other types than any that save writes
        raise PrunexError(f"cannot attach {method.name} as described ({type(error).__name__} {error})") from error


def _config(
    vit: Any, labels: Sequence[str] | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, Any]:
    anatomy, model = outline(vit), describe(vit)
    windowed = model["class"] == "SwinTransformer"
    if labels is not None and len(labels) != anatomy.classes:
        raise PrunexError(f"{len(labels)} labels for {anatomy.classes} classes: give one name a class")
    known = getattr(vit, "pretrained_cfg", None) or {}
    known = known.to_dict() if hasattr(known, "to_dict") else dict(known)
    kept = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license")
    cfg: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items() if k in kept}
    cfg |= {"input_size": [anatomy.channels, *anatomy.image], "num_classes": anatomy.classes}
    cfg |= {
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc" if windowed else "head",
        "fixed_input_size": not anatomy.dynamic,
    }
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            if len(value) != anatomy.channels:
                raise PrunexError(f"{name} has {len(value)} values for {anatomy.channels} channels: give one a channel")
            cfg[name] = [float(v) for v in value]
    pruning = Pruning(vit) if hasattr(vit, CHILD) else None
    count = cost(vit)
    names = list(labels) if labels is not None else list(getattr(vit, "label_names", []) or [])
    return {
        "architecture": known.get("architecture") or _NEAREST.get(model["class"], "vit_small_patch16_224"),
        "num_classes": anatomy.classes,
        "num_features": anatomy.width,
        "global_pool": anatomy.pool,
        "model_args": {k: v for k, v in model["args"].items() if k not in (*_ONLY_OURS, "num_classes", "global_pool")},
        "pretrained_cfg": cfg,
        **({"label_names": names} if names else {}),
        "prunex": {
            "version": 2 if windowed or "widths" in model else 1,
            "model": model,
            "model_sha256": _digest(model),
            "pruning": None if pruning is None else pruning.spec,
            "macs": count.macs,
            "params": count.params,
            "tokens_per_block": count.tokens,
            "widths_per_block": _widths(vit),
            "made_with": {"prunex": prunex.__version__, "torch": str(torch.__version__), "timm": timm.__version__},
        },
    }


def _widths(vit: Any) -> list[dict[str, int]]:
    """What each block has, where its units are known one by one: heads, the width of one, MLP channels."""
    found = []
    for _, block in blocks_of(vit):
        told = {"heads": block.attn.num_heads, "head_width": head_dim(block.attn)} if opens_heads(block) else {}
        found.append({**told, **({"hidden": block.mlp.fc2.in_features} if opens_channels(block) else {})})
    return found


def _digest(model: Mapping[str, Any]) -> str:
    """A checksum of the model's description."""
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _width_rows(widths: Sequence[Mapping[str, int]]) -> str:
    rows = {"heads": "heads in each block", "head_width": "width of a head", "hidden": "MLP channels in each block"}
    return "".join(
        f"| {title} | {', '.join(str(w[name]) for w in widths)} |\n"
        for name, title in rows.items()
        if all(name in w for w in widths)
    )


def _card(config: Mapping[str, Any]) -> str:
    ours, cfg = config["prunex"], config["pretrained_cfg"]
    size = " x ".join(map(str, cfg["input_size"]))
    pruning = ours["pruning"]
    kept = "\nkept = prunex.attached(model).trace.kept()  # after a forward: which patches were used"
    narrowed = "widths" in ours["model"]
    kind = ("narrowed" if narrowed else "dense") if pruning is None else "pruned with " + pruning["method"]
    told = (
        "none"
        if pruning is None and narrowed
        else "dense"
        if pruning is None
        else ", ".join(f"{k}={v}" for k, v in pruning.items())
    )
    return f"""---
library_name: prunex
tags: [image-classification, vision-transformer, token-pruning]
---
# {config["architecture"]}, {kind}

| | |
|---|---|
| input | {size}, mean {cfg.get("mean", "not recorded")}, std {cfg.get("std", "not recorded")} |
| classes | {config["num_classes"]} |
| pruning | {told} |
| multiply-adds an image | {ours["macs"] / 1e9:.3f} G |
| parameters | {ours["params"] / 1e6:.2f} M |
| tokens in each block | {", ".join(map(str, ours["tokens_per_block"]))} |
{_width_rows(ours["widths_per_block"]) if narrowed else ""}
```python
import prunex

model = prunex.load("path/to/this/folder")  # eval mode; model(images) -> logits{"" if pruning is None else kept}
```
"""
