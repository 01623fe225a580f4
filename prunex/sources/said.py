"""What a model of transformers says of its images and classes, where prunex and timm look for it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunex.attributes import numbers_of
from prunex.errors import PrunexError
from prunex.untrusted import read_json
from prunex.vit.anatomy import channels_of

_FILES = ("preprocessor_config.json", "processor_config.json")
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic", 1: "lanczos"}  # as Pillow numbers them


def describe_twin(twin: Any, config: Any, processor: Any, folder: Path | None) -> None:
    """Write class names, mean and standard deviation on the twin."""
    channels = channels_of(twin.patch_embed)
    twin.label_names = label_names(config, twin.num_classes)
    said = _settings(processor) if processor is not None else _in_folder(folder)
    twin.pretrained_cfg = {"input_size": (channels, *twin.patch_embed.img_size), "num_classes": twin.num_classes}
    if said is None:
        warnings.warn(
            "nothing says how the model's images are normalised, and prunex will take 0.5 for mean and standard "
            "deviation: give from_transformers its processor=",
            stacklevel=4,
        )
        return
    twin.pretrained_cfg |= normalisation(said, channels)


def label_names(config: Any, classes: int) -> list[str]:
    """Names of the classes; none where they are transformers' own numbers."""
    known = getattr(config, "id2label", None) or {}
    # JSON has texts for keys, and a configuration made by hand may keep them.
    names = [str(known.get(i, known.get(str(i), ""))) for i in range(classes)]
    numbers = all(name in ("", f"LABEL_{i}") for i, name in enumerate(names))
    return [] if numbers or len(known) != classes else names


def normalisation(said: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Mean and standard deviation of pixels in 0..1, and how images are resampled, from a processor's settings.

    >>> normalisation({"image_mean": [0.5], "image_std": [0.25], "resample": 3}, 1)
    {'mean': (0.5,), 'std': (0.25,), 'interpolation': 'bicubic'}
    >>> normalisation({"do_normalize": False}, 1)
    {'mean': (0.0,), 'std': (1.0,)}
    """
    scale = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise PrunexError(f"the processor's rescale_factor={str(scale)[:40]} is no number above 0")
    mean, std = (said.get("image_mean"), said.get("image_std")) if said.get("do_normalize", True) else (0.0, 1.0)
    if mean is None or std is None:
        raise PrunexError("the processor normalises images and has no image_mean and image_std: give another")
    cfg: dict[str, Any] = {}
    for name, value in (("mean", mean), ("std", std)):
        try:
            # What it takes from numbers in 0..255 times the factor, told for pixels in 0..1.
            cfg[name] = tuple(number / (255 * scale) for number in numbers_of(name, value, channels))
        except ValueError as error:
            raise PrunexError(f"the processor's image_{error}: it does not fit the model") from None
    resample = said.get("resample")
    if isinstance(resample, int) and resample in _FILTERS:
        cfg["interpolation"] = _FILTERS[int(resample)]
    return cfg


def _settings(processor: Any) -> dict[str, Any]:
    """An image processor's settings, or those of the one in a processor."""
    inner = getattr(processor, "image_processor", None)
    inner = processor if inner is None else inner
    said = inner.to_dict() if hasattr(inner, "to_dict") else inner
    if not isinstance(said, Mapping) or not ({"image_mean", "do_normalize"} & set(said)):
        raise PrunexError(f"a {type(processor).__name__} is no image processor of transformers: give one, or None")
    return dict(said)


def _in_folder(folder: Path | None) -> dict[str, Any] | None:
    """The settings of the processor that lies in a folder; None where there is none."""
    for name in _FILES:
        path = None if folder is None else folder / name
        # Of several modalities the settings lie one step deeper.
        if path is not None and path.is_file():
            said = read_json(path)
            said = said.get("image_processor", said) if isinstance(said, Mapping) else said
            if isinstance(said, Mapping) and "image_mean" in said:
                return dict(said)
    return None
