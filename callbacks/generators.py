"""Where the generators of random numbers and a loader stand, in plain values that checkpoints may hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer


def generators() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  (augmentations draw from it)
    return {
        "python": [version, list(numbers), gauss],
        # A tensor, for no array of NumPy's is read from a checkpoint that is read safely.
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(states: dict[str, Any]) -> None:
    """Go on from such states."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def stateful(trainer: Trainer) -> bool:
    """Whether the training loaders know where they stand, as ``torchdata``'s StatefulDataLoader."""
    names, loaders = ("state_dict", "load_state_dict"), _loaders(trainer)
    return bool(loaders) and all(callable(getattr(loader, name, None)) for loader in loaders for name in names)


def _loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def own_generators(trainer: Trainer) -> list[torch.Generator]:
    """Generators that training loaders and their samplers have of their own, beside torch's."""
    loaders = _loaders(trainer)
    holders = [*loaders, *(getattr(loader, "sampler", None) for loader in loaders)]
    held = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in held if isinstance(generator, torch.Generator)]


def all_places(trainer: Trainer) -> list[dict[str, Any]]:
    """Where each process stands: its generators, and its loaders."""
    loaders = trainer.fit_loop._combined_loader
    mine = {"generators": generators(), "loaders": [] if loaders is None else loaders._state_dicts()}
    places: list[Any] = [mine]
    if trainer.world_size > 1:
        places = [None] * trainer.world_size
        torch.distributed.all_gather_object(places, mine)
    return places


def reopen(trainer: Trainer, place: dict[str, Any]) -> None:
    """Open the training loaders where they stand inside an epoch, as is done when a checkpoint is gone on from."""
    loop: Any = trainer.fit_loop
    loop._combined_loader._load_state_dicts(place["loaders"])
    iter(loop._data_fetcher)
    # How many it has given tells which is the last.
    loop._data_fetcher.fetched += loop.epoch_loop.batch_progress.current.ready
    set_generators(place["generators"])
