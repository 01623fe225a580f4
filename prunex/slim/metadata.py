"""What a saved model says of itself beside its weights: class names and normalisation, checked alike by both sides."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunex.errors import PrunexError
from prunex.untrusted import FLOATS, parse_json

_KEPT = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license")  # of timm's pretrained_cfg
_LOWEST = {"mean": -math.inf, "std": 0.0}


def known_cfg(vit: Any, channels: int, mean: Any = None, std: Any = None) -> dict[str, Any]:
    """How a model's images are prepared, in plain values: what was told, else what its ``pretrained_cfg`` knows.

    A mean and a standard deviation (above 0) are one number a channel, or one for all. Those that were made for other
    channels, as timm's own are for colour images, are left out; given ones of another number are refused.
    """
    cfg = {k: v for k, v in _known(vit).items() if k in _KEPT and v is not None}
    for name, given in (("mean", mean), ("std", std)):
        numbers = _numbers(name, cfg.pop(name, None) if given is None else given)
        if given is None:
            if _fits(numbers, channels):
                cfg[name] = numbers
        elif numbers is None or len(numbers) not in (1, channels):
            above = ", above 0" * (name == "std")
            raise PrunexError(
                f"{name}={given!r} is not allowed for {channels} channels: give one number a channel{above}, or one "
                "for all"
            )
        else:
            cfg[name] = numbers * (channels // len(numbers))
    return cfg


def architecture(vit: Any) -> str:
    """Timm's name for a model, or nothing."""
    name = _known(vit).get("architecture")
    return name if isinstance(name, str) else ""


def _known(vit: Any) -> dict[str, Any]:
    """A model's ``pretrained_cfg``, which timm keeps as an object or a mapping."""
    known = getattr(vit, "pretrained_cfg", None) or {}
    return dict(known.to_dict() if hasattr(known, "to_dict") else known)


def _numbers(name: str, value: Any) -> list[float] | None:
    """A mean or std, whatever holds it, as a list; None for what is none."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        return None
    return numbers if all(_LOWEST[name] < v < math.inf for v in numbers) else None


def _fits(numbers: Any, channels: int) -> bool:
    """Whether there is a number a channel, or one for all; one-channel models may have been told those of colours."""
    return numbers is not None and len(numbers) in (1, channels, max(3, channels))


def class_names(vit: Any, classes: int, labels: Any = None) -> list[str]:
    """Names of the classes: those given, which must be one text a class, else the model's own, else none."""
    if labels is None:
        names = getattr(vit, "label_names", None)
        fits = isinstance(names, list | tuple) and len(names) == classes and all(isinstance(n, str) for n in names)
        return list(map(str, names or ())) if fits else []
    # One text would be a list of its letters.
    names = [labels] if isinstance(labels, str) else list(labels)
    if isinstance(labels, str) or len(names) != classes:
        raise PrunexError(f"{len(names)} labels for {classes} classes: give one name a class, in a list")
    for name in names:
        if not isinstance(name, str):
            raise PrunexError(f"labels hold {name!r}, which is no text: give names, such as list(map(str, labels))")
    return list(map(str, names))


def as_read(config: Mapping[str, Any]) -> dict[str, Any]:
    """A description as whoever reads the file will find it; refused where JSON cannot hold it, or nobody could read."""
    try:
        read = parse_json(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PrunexError(f"cannot save this model: its description cannot be written as JSON ({error})") from error
    check_metadata(read, "cannot save this model")
    return dict(read)


def check_metadata(config: Mapping[str, Any], wrong: str) -> None:
    """Refuse a ``config.json`` whose class names are no texts, or whose normalisation fits no image, in these words."""
    names, cfg = config.get("label_names") or [], config.get("pretrained_cfg", {})
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise PrunexError(f"{wrong}: label_names must be a list of texts")
    args = config["prunex"]["model"].get("args")
    channels = args.get("in_chans", 3) if isinstance(args, Mapping) else 3
    for name in _LOWEST:
        given = cfg.get(name)
        numbers = _numbers(name, given) if isinstance(given, list) and not any(map(_no_number, given)) else None
        if given is not None and not (numbers == [] or _fits(numbers, channels if type(channels) is int else 3)):
            raise PrunexError(f"{wrong}: {name} must be one number a channel{', above 0' * (name == 'std')}")
    if not isinstance(cfg.get("architecture", ""), str | None):
        raise PrunexError(f"{wrong}: architecture must be a name")


def _no_number(value: Any) -> bool:
    return type(value) not in (int, float)


def check_tensors(state: Mapping[str, Tensor]) -> None:
    """Refuse, by name, weights that no file of plain numbers holds, or that nobody could compute with afterwards."""
    for name, value in state.items():
        if value.is_meta:
            raise PrunexError(f"cannot save {name}: it is on the meta device and has no values; load the weights first")
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise PrunexError(
                f"cannot save {name}, which is a {type(value).__name__} and no plain tensor: save the model before it "
                "is quantised or sharded, once all its weights are there"
            )
        if value.is_complex() or (value.is_floating_point() and value.dtype not in FLOATS):
            raise PrunexError(f"cannot save {name} of {value.dtype}: convert it to float16 or wider")
