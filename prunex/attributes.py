"""What others' data modules, modules and datasets say of normalisation and class names, in whatever form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunex.errors import PrunexError

CLASS_NAMES = ("class_names", "classes", "label_names")
Pair = tuple[list[float], list[float]]
Warn = Callable[[str], Any]


def given_normalisation(mean: Any, std: Any, channels: int | None = None) -> Pair | None:
    """Mean and standard deviation that a user gave as options: numbers, or one for each channel; both or none.

    ``channels`` is how many the model takes, where that is known; anything that does not fit is refused.

    >>> given_normalisation(0.5, [0.1, 0.2, 0.4], channels=3)
    ([0.5, 0.5, 0.5], [0.1, 0.2, 0.4])
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise PrunexError(f"mean={mean!r} and std={std!r} belong together: give both, or neither")
    try:
        return _in_unit_range(numbers_of("mean", mean, channels), numbers_of("std", std, channels))
    except ValueError as error:
        raise PrunexError(f"mean={mean!r}, std={std!r} are not allowed ({error}): give one number a channel") from None


def read_normalisation(owners: Iterable[Any], channels: int, warn: Warn = warnings.warn) -> Pair | None:
    """What images are normalised by, from the ``mean`` and ``std`` of the first owner that has both.

    Scalars count for all channels; tensors of any device and array shape, NumPy, sequences, properties and methods are
    read. Numbers over 2 are those of pixels in 0..255 and are divided by 255. ``warn`` is told why what an owner (a
    data module, a module; None is passed over) has cannot be used.

    Returns:
        Mean and standard deviation, ``channels`` numbers each, of pixels in 0..1; None where nobody says it.

    >>> class Data:
    ...     mean, std = 0, 255
    >>> read_normalisation([Data()], channels=3)
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    """
    for owner in owners:
        kind = type(owner).__name__
        try:
            mean, std = (_value(owner, name) for name in ("mean", "std"))
            if mean is None and std is None:
                continue
            if mean is None or std is None:
                raise ValueError("one of the two is missing")
            return _in_unit_range(numbers_of("mean", mean, channels), numbers_of("std", std, channels))
        except ValueError as error:
            warn(
                f"mean and std of {kind} cannot be used, and the model's are: {error}; give mean= and std= to the "
                "callbacks, one number a channel"
            )
    return None


def models_normalisation(vit: Any, channels: int) -> Pair:
    """What a model's ``pretrained_cfg`` says its images are normalised by, 0.5 where it says nothing."""
    known = getattr(vit, "pretrained_cfg", None) or {}
    mean, std = (np.ravel([] if known.get(name) is None else known[name]).tolist() for name in ("mean", "std"))
    # timm leaves the three numbers of RGB to models of other channels.
    return ((mean or [0.5]) * channels)[:channels], ((std or [0.5]) * channels)[:channels]


def class_names(owners: Iterable[Any], count: int, warn: Warn = warnings.warn) -> list[str] | None:
    """Names of a model's classes, from the first owner that has as many.

    ``class_names``, ``classes`` or ``label_names``: a sequence of names (or of tuples of synonyms), a mapping from
    numbers to names or from names to numbers, a property or a method. ``warn`` is told why what is there cannot be
    used.

    Returns:
        ``count`` names, or None: classes are then numbers.

    >>> class Data:
    ...     classes = {1: "dog", 0: "cat"}
    >>> class_names([None, Data()], 2)
    ['cat', 'dog']
    """
    why = ""
    for owner in owners:
        for name in CLASS_NAMES:
            try:
                value = _value(owner, name)
                if value is None or isinstance(value, int):  # how many there are
                    continue
                return _names(value, count)
            except ValueError as error:
                why = why or f"{type(owner).__name__}.{name} {error}"
    if why:
        warn(f"classes are shown as numbers: {why}; give the data module class_names, a list of {count} names")
    return None


def _value(owner: Any, name: str) -> Any:
    """An attribute's value; None where there is none, or a layer or a metric of that name."""
    try:
        # A module's metric or layer may be called "mean", and is no number.
        value = getattr(owner, name, None)
        if isinstance(value, nn.Module | type):
            return None
        return value() if callable(value) else value
    except Exception as error:  # whatever somebody else's code raises
        raise ValueError(f"{name} raises {type(error).__name__} ({' '.join(str(error).split())[:80]})") from error


def numbers_of(name: str, value: Any, channels: int | None) -> list[float]:
    """A mean or std as finite numbers, one a channel where channels are known; a ValueError says what is wrong."""
    try:
        if isinstance(value, Tensor):
            value = value.detach().double().cpu().numpy()
        elif isinstance(value, Sequence) and not isinstance(value, str):
            value = [float(v) for v in value]  # tensors of any device among them
        array = np.asarray(value, dtype=float)
    except Exception:
        raise ValueError(f"{name} is a {type(value).__name__} and no numbers") from None
    # [C], [C, 1, 1] and [1, C, 1, 1] are all in use.
    if array.squeeze().ndim > 1:
        raise ValueError(f"{name} has shape {list(array.shape)}")
    numbers: list[float] = array.reshape(-1).tolist()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} is {numbers}")
    if channels is not None and len(numbers) not in (1, channels):
        raise ValueError(f"{name} has {len(numbers)} numbers for {channels} channels")
    if name == "std" and min(numbers) <= 0:
        raise ValueError(f"std is {numbers}, which must be above 0")
    return numbers * (channels or 1) if len(numbers) == 1 else numbers


def _in_unit_range(mean: list[float], std: list[float]) -> Pair:
    # No channel's mean or deviation in 0..1 comes near 2.
    scale = 255 if max(*map(abs, mean), *std) > 2 else 1
    return [v / scale for v in mean], [v / scale for v in std]


def _names(value: Any, count: int) -> list[str]:
    if isinstance(value, Mapping):
        # class_to_idx, or names by number, whose keys JSON has made strings.
        if all(str(key).isdigit() for key in value):
            numbered = {str(n): name for n, name in value.items()}
        else:
            numbered = {str(n): name for name, n in value.items()}
        if set(numbered) != set(map(str, range(count))):
            raise ValueError(f"does not number {count} classes from 0 on")
        value = [numbered[str(i)] for i in range(count)]
    if isinstance(value, str | set | frozenset) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        raise ValueError(f"is a {type(value).__name__}, and no list of names")
    if len(value) != count:
        raise ValueError(f"has {len(value)} names for {count} classes")
    names = []
    for name in value:
        if isinstance(name, tuple | list) and name:  # of synonyms the first
            name = name[0]
        if not isinstance(name, str | int | np.integer):
            raise ValueError("holds other things than names")
        names.append(str(name))
    return names
